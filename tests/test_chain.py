"""A chain of trainings, from stills to a promoted model: declared, stopped, killed and resumed."""

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ralf.__main__ import main
from ralf.kernels import artifact as models
from ralf.train import chain as chains
from ralf.train import trainings
from ralf.train.chain import CHAINS, Chain, MadeClips, RendererFit, Training, chain_of
from ralf.train.data.index import Index, Row
from ralf.train.data.index import load as load_index
from ralf.train.data.pool import Pool
from ralf.train.evaluate.tables import TableOptions
from ralf.train.loop import loop
from ralf.train.loop.checkpoint import LAST, load
from ralf.train.recipe import BLENDS
from ralf.train.recipe_text import RecipeError
from ralf.train.retrain import judging, renderers
from ralf.train.retrain.order import Retraining
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
FIT = {"size": "32", "steps": "2", "batch": "4"}
RENDERING_CHAIN = Chain(
    "rendering",
    ((replace(DETECTOR, recipe="small_classifier", changes={**FASTER, "steps": "8"},
              backbone_from=()),),),
    fits=(
        RendererFit("lip_sync", 1, {**FIT, "width": "4"}, variants=2),
        RendererFit("reconstructor", 1, {**FIT, "base": "4", "blocks": "1"}, held_out=True),
    ),
    clips=MadeClips(crfs=(23,), seconds=0.4, frames=1, stills=2, talk=True),
)  # fmt: skip
RENDERING_STEPS = ["fit lip_sync", "fit reconstructor", "render", "detector", "clips", "calibrate",
                   "evaluate", "publish", "build", "verify", "promote"]  # fmt: skip
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
        patch.setitem(chains.CHAINS, "rendering", RENDERING_CHAIN)
        patch.setattr(loop, "commit", lambda: "c" * 40)
        patch.setattr(judging, "TableOptions", partial(TableOptions, replicates=10))
        patch.setattr(Pool, "forgery", lambda self, frame, image, *_: (red(image), image[..., 0]))
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


def retrain_tiny(stills: Path, root: Path, *more: str, chain: str = "tiny") -> int:
    """`ralf retrain tiny … more`, all of it in this process."""
    changes = [*(each for each in TINY if not each.startswith(("init.", "epochs"))), "norms=batch"]
    changes.append(f"{chains.CHAINS[chain].trainings[0].name}:init.backbone=none")
    return main(
        [
            "retrain", chain, "--data", str(stills), "--name", "made", "--targets", "cpu",
            "--out", str(root / "run"), "--models", str(root / "models"), "--device", "cpu",
            "--processes", "1", "--least-people", "1", "--golden-from", "portraits",
            *(part for change in changes for part in ("--set", change)), *more,
        ]
    )  # fmt: skip


def did(said: str, steps: Sequence[str] = STEPS) -> list[str]:
    """The steps that a command did, from its stderr."""
    began = [line.removeprefix("ralf: ") for line in said.splitlines()]
    names = [line.split(":")[0] for line in began if not line.endswith("done before")]
    return list(dict.fromkeys(name for name in names if name in steps))


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


def test_a_chain_fits_renderers_and_keeps_one_whole_generator_for_the_test(
    stills: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    """Killed while it renders, it fits none again; its figures say each generator; all is timed."""
    run = tmp_path / "run"
    # As most users leave it: the face finder that reads the made clips needs a device by name.
    auto = ("--device", "auto")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with monkeypatch.context() as patch:
        patch.setattr(renderers, "render", _killing_render())
        with pytest.raises(Killed):
            retrain_tiny(stills, tmp_path, *auto, chain="rendering")
    assert RENDERING_STEPS[:3] == did(capsys.readouterr().err, RENDERING_STEPS)
    # Eight steps make no model that stands recompression, which promotion asks for.
    assert 0 == retrain_tiny(stills, tmp_path, *auto, "--force", chain="rendering")
    assert RENDERING_STEPS[2:] == did(capsys.readouterr().err, RENDERING_STEPS)
    made = models.resolve(tmp_path / "models", "made")

    index = load_index(run / "rendered" / "index.csv")
    of = {
        (method, split): sum(row.method == method and row.split == split for row in index)
        for method in ("lip_sync", "reconstructor")
        for split in ("train", "val", "test")
    }
    reals = {split: len(index.where(split=split, label=0)) for split in ("train", "val", "test")}
    assert 2 * reals["train"] == of["lip_sync", "train"]
    assert [reals["val"], reals["test"]] == [of["lip_sync", "val"], of["lip_sync", "test"]]
    assert [0, 0] == [of["reconstructor", "train"], of["reconstructor", "val"]]
    assert reals["test"] == of["reconstructor", "test"] > 0
    assert ["reconstructor"] == made.manifest.trained["also_held_out"]
    figures = made.manifest.metrics
    assert {"crop clean auc lip_sync", "crop clean auc reconstructor"} <= set(figures)
    record = json.loads((run / "retrain.json").read_text())
    assert RENDERING_STEPS == list(record["done"]) and set(RENDERING_STEPS) == set(
        record["minutes"]
    )
    clips = load_index(run / "clips" / "val" / "index.csv")
    assert "reconstructor" not in {row.method for row in clips}
    assert 0 == retrain_tiny(stills, tmp_path, chain="rendering")
    assert [] == did(capsys.readouterr().err, RENDERING_STEPS)


def _killing_render() -> Any:
    """Rendering that ends the process at the second split."""
    real, asked = renderers.render, []

    def render(index: Index, request: Any) -> Any:
        asked.append(request)
        if len(asked) == 2:
            raise Killed
        return real(index, request)

    return render


def test_so_many_stills_are_taken_from_each_collection_alike():
    """A small one gives all it has; order and rows are the index's own."""
    rows = tuple(
        Row(path=f"{dataset}/{n}.png", label=0, video=str(n), split="val", dataset=dataset,
            method="real", kind="image")
        for dataset, count in (("large", 50), ("little", 3))
        for n in range(count)
    )  # fmt: skip
    index = Index(Path("nowhere"), rows)
    kept = judging.evenly(index, 10)

    assert [7, 3] == [len(kept.where(dataset=name)) for name in ("large", "little")]
    assert [row for row in rows if row in set(kept)] == list(kept)
    assert index is judging.evenly(index, None) is judging.evenly(index, 53)


def test_clips_show_the_held_out_family_in_the_test_alone():
    """Another family by --set: each training leaves it out, and calibration sees it no more."""
    asked = {"data.held_out": "swap"}
    shipped = CHAINS["shipped"]
    index = Index(Path("nowhere"), ())
    order = Retraining(
        trainings.ChainRun(shipped, (), index, Path("runs/x"), asked), "x", Path("models")
    )
    families = judging.clips_step(order).asks["families"]

    assert {*BLENDS} - {"swap"} == {*families["val"]}
    assert ("swap",) * 3 == families["test"][len(families["val"]) :]
    for training in shipped.trainings:
        assert "swap" not in order.training.recipe(training).data.trained_families


def test_the_chain_that_ships_trains_small_first_and_few_weights_first_and_sees_both_collections():
    """Steps, sizes, whose weights each begins with; the generator held out is nobody's."""
    chain = CHAINS["shipped"]
    recipes = {
        training.name: chain.recipe(Path("runs/x"), training, {}) for training in chain.trainings
    }

    assert ["head", "small", "whole", "branch31", "branch32", "detector"] == list(recipes)
    assert [128, 128, 256, 256, 256, 256] == [
        r.network.dimensions["size"] for r in recipes.values()
    ]
    assert {16} == {recipe.data.batch for recipe in recipes.values()}
    assert {True} == {recipe.data.tight_pictures for recipe in recipes.values()}
    assert {("boundary", "reconstructor")} == {r.data.left_out for r in recipes.values()}
    assert "conv_pw*0" in recipes["head"].optimiser.rates and not recipes["small"].optimiser.rates
    assert ("auc", 4) == (recipes["small"].schedule.select, recipes["small"].schedule.patience)
    assert "runs/x/head" == recipes["small"].init.network
    assert "runs/x/small" == recipes["whole"].init.backbone
    assert ["31", "32"] == [str(recipes[f"branch{seed}"].seed) for seed in (31, 32)]
    assert "runs/x/branch31,runs/x/branch32" == recipes["detector"].init.network
    ralf = CHAINS["shipped_ralf"]
    joint = ralf.recipe(Path("runs/x"), ralf.last, {})
    assert ("two_stream", "detector") == (joint.name, ralf.control)


def test_the_minutes_asked_for_scale_every_fit_and_every_training():
    """A third of the minutes is a third of the steps; what is asked by name has the last word."""
    chain, run = CHAINS["shipped"], Path("run")
    third = chain.scaled(39)
    steps = [third.recipe(run, each, {}).schedule.steps for each in third.trainings]

    assert [100, 1200, 300, 183, 183, 67] == steps
    assert [6.0, 5 / 3, 4.0, 4 / 3] == pytest.approx([fit.minutes for fit in third.fits])
    asked = {"small:steps": "7"}
    assert 7 == third.recipe(run, third.trainings[1], asked).schedule.steps
    assert chain is chain.scaled(None)
    assert CHAINS["ralf_two_streams"] is CHAINS["ralf_two_streams"].scaled(5)
    with pytest.raises(RecipeError, match="above 0"):
        chain.scaled(0)


def test_a_change_is_for_all_trainings_or_for_the_one_that_it_names():
    """An unknown training is refused; so is a chain that begins with what it does not train."""
    chain, run = CHAINS["shipped"], Path("run")
    asked = {"seed": "7", "branch32:seed": "8", "head:init.backbone": "lite0.safetensors"}
    recipes = {each.name: chain.recipe(run, each, asked) for each in chain.trainings}

    assert [7, 7, 7, 7, 8, 7] == [each.seed for each in recipes.values()]
    assert "lite0.safetensors" == recipes["head"].init.backbone
    assert {} == chain.options(chain.fits[0], asked)
    assert {"size": "64"} == chain.options(chain.fits[0], {"autoencoder:size": "64"})
    with pytest.raises(RecipeError, match="no training 'branch33' in shipped"):
        chain.recipe(run, chain.last, {"branch33:seed": "8"})
    with pytest.raises(RecipeError, match=r"begins with .'one', 'other'., which no earlier stage"):
        Chain("odd", ((DETECTOR,),))
    with pytest.raises(RecipeError, match="should end in one training"):
        Chain("odd", ((CLASSIFIER,), BRANCHES))
    with pytest.raises(RecipeError, match=r"known: fdfl.*chains of several: shipped"):
        chain_of("nope")
