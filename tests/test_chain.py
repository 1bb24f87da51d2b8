"""A chain of trainings, from stills to a promoted model: declared, stopped, killed and resumed."""

import csv
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ralf.__main__ import main
from ralf.kernels import artifact as models
from ralf.train import chain as chains
from ralf.train import retrain, trainings
from ralf.train.chain import CHAINS, Chain, MadeClips, Training, chain_of
from ralf.train.data.index import Index
from ralf.train.data.pool import Pool
from ralf.train.evaluate.tables import TableOptions
from ralf.train.loop import loop
from ralf.train.loop.checkpoint import LAST, load
from ralf.train.recipe import BLENDS
from ralf.train.recipe_text import RecipeError
from tests.faces_on_disk import faces
from tests.test_retrain import Killed, killing_at
from tests.test_train_cli import TINY

FASTER = {"schedule.select": "last", "evaluate_every": "50"}
CLASSIFIER = Training("classifier", "small_classifier", {**FASTER, "steps": "12"})
BRANCHES = tuple(
    Training(
        name, "small_classifier", {**FASTER, "steps": "4", "seed": seed},
        network_from=("classifier",),
    )
    for name, seed in (("one", "31"), ("other", "32"))
)  # fmt: skip
DETECTOR = Training(
    "detector", "ralf_small_cpu",
    {**FASTER, "steps": "12", "base": "4", "blocks": "1", "init.perceptual": "none",
     "con_patch": "32"},
    backbone_from=("one", "other"),
)  # fmt: skip
TINY_CHAIN = Chain(
    "tiny",
    ((CLASSIFIER,), BRANCHES, (DETECTOR,)),
    clips=MadeClips(crfs=(23,), seconds=0.4, frames=2),
)
STEPS = ["classifier", "one and other", "detector", "clips", "calibrate", "evaluate", "publish",
         "build", "verify", "promote"]  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_thread")


def red(image: np.ndarray) -> np.ndarray:
    """A forgery that a few steps of training find."""
    painted = image // 3
    painted[..., 0] = 170 + image[..., 0] // 3
    return painted


@pytest.fixture(scope="module", autouse=True)
def _tiny_chain() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(chains.CHAINS, "tiny", TINY_CHAIN)
        patch.setattr(loop, "commit", lambda: "c" * 40)
        patch.setattr(retrain, "TableOptions", partial(TableOptions, replicates=10))
        patch.setattr(Pool, "forgery", lambda self, frame, image, *_: red(image))
        yield


@pytest.fixture(scope="module")
def stills(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The portraits, each with a red copy: four people to train on, two and two to judge by."""
    root = tmp_path_factory.mktemp("stills") / "portraits"
    faces(root, val=4, forgeries="copies")
    with (root / "faces.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows[-4:]:
        row["split"] = "test"
    for row in rows:
        if row["label"] == "1":
            path = root / "faces" / row["file"]
            Image.fromarray(red(np.asarray(Image.open(path).convert("RGB")))).save(path)
    with (root / "faces.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return root


def retrain_tiny(stills: Path, root: Path, *more: str) -> int:
    """`ralf retrain tiny … more`, all of it in this process."""
    changes = [*(each for each in TINY if not each.startswith(("init.", "epochs"))), "norms=batch"]
    changes.append("classifier:init.backbone=none")
    return main(
        [
            "retrain", "tiny", "--data", str(stills), "--name", "made", "--targets", "cpu",
            "--out", str(root / "run"), "--models", str(root / "models"), "--device", "cpu",
            "--processes", "1", "--least-people", "1", "--golden-from", "portraits",
            *(part for change in changes for part in ("--set", change)), *more,
        ]
    )  # fmt: skip


def did(said: str) -> list[str]:
    """The steps that a command did, from its stderr."""
    began = [line.removeprefix("ralf: ") for line in said.splitlines()]
    names = [line.split(":")[0] for line in began if not line.endswith("done before")]
    return list(dict.fromkeys(name for name in names if name in STEPS))


def test_a_chain_stopped_and_killed_and_resumed_makes_the_same_model(
    stills: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    """Out of time in the first training, killed in the second branch; each goes on, none twice."""
    run, folder = tmp_path / "run", tmp_path / "models"
    assert 0 == retrain_tiny(stills, tmp_path)
    assert STEPS == did(capsys.readouterr().err)
    whole = models.resolve(folder, "made")
    # The same folders again: the first weights' paths are part of a recipe.
    uninterrupted = run.rename(tmp_path / "uninterrupted")
    folder.rename(tmp_path / "its_models")

    assert 1 == retrain_tiny(stills, tmp_path, "--minutes", "0")
    said = capsys.readouterr().err
    assert "asked: classifier to its end, since what follows builds on it" in said
    assert "the same command: ralf retrain tiny --data" in said and "--processes 1" in said
    with monkeypatch.context() as patch:
        patch.setattr(trainings, "Batches", killing_at(11))
        with pytest.raises(Killed):
            retrain_tiny(stills, tmp_path)
    assert ["classifier"] == did(capsys.readouterr().err)
    with monkeypatch.context() as patch:
        patch.setattr(trainings, "Batches", _killing_second_branch())
        with pytest.raises(Killed):
            retrain_tiny(stills, tmp_path)
    assert ["classifier", "one and other"] == did(capsys.readouterr().err)
    assert 0 == retrain_tiny(stills, tmp_path)
    assert STEPS[1:] == did(capsys.readouterr().err)
    again = models.resolve(folder, "made")

    assert whole.version == again.version
    assert 0 == retrain_tiny(stills, tmp_path)
    assert [] == did(capsys.readouterr().err)
    its_parts(run, again, uninterrupted)


def _killing_second_branch() -> Any:
    """Batches that end the process in the middle of the branch with seed 32."""
    real = trainings.Batches

    class Killing(real):  # type: ignore[misc,valid-type]
        def __getitem__(self, asked: int) -> Any:
            if self.seed == 32 and asked == 2:
                raise Killed
            return super().__getitem__(asked)

    return Killing


def its_parts(run: Path, artifact: models.Artifact, uninterrupted: Path) -> None:
    """Each training began with its predecessors' weights; clips calibrated it and measured it."""
    begins = {
        name: load(run / name / LAST).recipe.init for name in ("classifier", "one", "detector")
    }
    assert begins["classifier"].network is None
    assert str(run / "classifier") == begins["one"].network
    assert f"{run / 'one'},{run / 'other'}" == begins["detector"].backbone
    assert 31 == load(run / "one" / LAST).recipe.seed
    manifest = artifact.manifest
    assert "made clips of the val people, H.264 at crf 23" == manifest.calibration.fitted_on
    assert {2} == {each["faces"] for each in manifest.metrics["calibration"]["thresholds"].values()}
    assert manifest.metrics["test_auc"][0] > 0.5
    assert manifest.metrics["clip crf23 auc seen"][0] > 0.5
    assert "real videos of made clips of split val" == manifest.reference.of
    assert "portraits, split val" in artifact.read("card.md").decode()
    facts = json.loads((run / "retrain.json").read_text())["done"]
    assert ["one", "other"] == list(facts["one and other"]["facts"])
    before = json.loads((uninterrupted / "retrain.json").read_text())["done"]
    assert before["evaluate"]["facts"] == facts["evaluate"]["facts"]


def test_clips_show_the_held_out_family_in_the_test_alone():
    """Another family by --set: each training leaves it out, and calibration sees it no more."""
    asked = {"data.held_out": "swap"}
    shipped = CHAINS["shipped"]
    index = Index(Path("nowhere"), ())
    order = retrain.Retraining(
        trainings.ChainRun(shipped, (), index, Path("runs/x"), asked), "x", Path("models")
    )
    families = retrain._clips_step(order).asks["families"]

    assert {*BLENDS} - {"swap"} == {*families["val"]}
    assert ("swap",) * 3 == families["test"][len(families["val"]) :]
    for training in shipped.trainings:
        assert "swap" not in order.training.recipe(training).data.trained_families


def test_the_chain_that_ships_is_declared_as_it_was_trained():
    """Steps, seeds, damage, rates and whose weights each begins with."""
    chain = CHAINS["shipped"]
    recipes = {
        training.name: chain.recipe(Path("runs/x"), training, {}) for training in chain.trainings
    }

    assert ["classifier", "branch31", "branch32", "detector"] == list(recipes)
    assert {16} == {recipe.data.batch for recipe in recipes.values()}
    assert {"last"} == {recipe.schedule.select for recipe in recipes.values()}
    assert [3000, 1150, 1150, 450] == [each.schedule.steps for each in recipes.values()]
    assert [0, 31, 32, 0] == [each.seed for each in recipes.values()]
    assert [0.5, 0.7, 0.7, 0.5] == [each.data.augment.other for each in recipes.values()]
    assert [0.99, 0.995, 0.995, 0.99] == [each.optimiser.ema for each in recipes.values()]
    assert [3e-4, 3e-4] == [recipes[f"branch{seed}"].optimiser.lr for seed in (31, 32)]
    assert "runs/x/classifier" == recipes["branch31"].init.network
    assert "runs/x/branch31,runs/x/branch32" == recipes["detector"].init.backbone
    assert chain.clips == MadeClips(crfs=(23, 40), seconds=1.3, frames=8, held_out_turns=3)


def test_a_change_is_for_all_trainings_or_for_the_one_that_it_names():
    """An unknown training is refused; so is a chain that begins with what it does not train."""
    chain, run = CHAINS["shipped"], Path("run")
    asked = {"seed": "7", "branch32:seed": "8", "classifier:init.backbone": "lite0.safetensors"}
    recipes = {each.name: chain.recipe(run, each, asked) for each in chain.trainings}

    assert [7, 7, 8, 7] == [each.seed for each in recipes.values()]
    assert "lite0.safetensors" == recipes["classifier"].init.backbone
    with pytest.raises(RecipeError, match="no training 'branch33' in shipped"):
        chain.recipe(run, chain.last, {"branch33:seed": "8"})
    with pytest.raises(RecipeError, match=r"begins with .'one', 'other'., which no earlier stage"):
        Chain("odd", ((DETECTOR,),))
    with pytest.raises(RecipeError, match="should end in one training"):
        Chain("odd", ((CLASSIFIER,), BRANCHES))
    with pytest.raises(RecipeError, match=r"known: fdfl.*chains of several: shipped"):
        chain_of("nope")
