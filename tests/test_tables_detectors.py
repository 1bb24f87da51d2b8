"""Detectors side by side: the figures, the interval of a difference, what a network costs."""

import json
import os
import subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ralf.kernels.manifest import InputContract, Sampling
from ralf.kernels.networks import build
from ralf.train.cli import commands as train
from ralf.train.data.index import Index
from ralf.train.evaluate.judge import JudgedModel, evaluate, model_of_network
from ralf.train.evaluate.metrics import Scored, auc, bootstrap_interval, paired_bootstrap_interval
from ralf.train.evaluate.tables import table
from ralf.train.evaluate.tables.detectors import CANNOT, cost, score_all
from ralf.train.evaluate.tables.table import TableOptions
from ralf.train.recipe import HELD_OUT, Recipe
from ralf.train.recipe_text import override, to_json
from ralf.train.recipes import named
from ralf.worker.cli.main import parser
from tests.faces_on_disk import faces

pytestmark = pytest.mark.usefixtures("one_thread")
CONTRACT = InputContract(size=64, sampling=Sampling(max_frames=1))
ASK = TableOptions(split="val", families=("smooth", "inner"), conditions=("blur:5",), replicates=50)
LITE = {"backbone": "tf_efficientnet_lite0", "size": 64}
SHOWN: Counter[str] = Counter()


def detail(crops: Tensor) -> Tensor:
    """How much fine detail there is; knows a smoothed face, and counts what it is shown."""
    SHOWN["crops"] += len(crops)
    grey = crops.float().mean(dim=1)
    return -(grey[:, :, 1:] - grey[:, :, :-1]).abs().mean(dim=(1, 2)) / 4 + 1


KNOWS = JudgedModel(
    name="knows", score=detail, input=CONTRACT, trained={"recipe": "r", "faces": 640}
)
WRONG = JudgedModel(name="wrong", score=lambda crops: -detail(crops), input=CONTRACT)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return faces(tmp_path_factory.mktemp("data") / "d", val=6)


def test_the_figures_are_those_of_judging_each_alone(index: Index):
    """Seen and unseen against the same reals, to the last bit."""
    made = table("detectors", [KNOWS, WRONG], index, ASK)
    for condition in ("clean", "blur:5"):
        alone = evaluate(
            WRONG, index, "val",
            families=("smooth", "inner", HELD_OUT), condition=condition, replicates=0,
        ).scored  # fmt: skip
        parts = made.figures["wrong"]["parts"][condition]
        for part, families in zip(parts, ({"smooth", "inner"}, {HELD_OUT}), strict=True):
            own = alone.where(np.array([v[1] in families for v in alone.video]) | ~alone.forged)

            assert auc(own.forged, own.logit) == part["figures"]["auc"]
            assert part["figures"]["forged"] == 6 * len(families)


def test_the_unseen_family_is_the_one_that_all_models_held_out(index: Index):
    """It is read from what each model was trained on; models that differ have none in common."""
    both = [replace(judge, trained={"held_out": "inner"}) for judge in (KNOWS, WRONG)]
    made = table("detectors", both, index, ASK)

    assert "unseen: inner" in made.title
    assert ["smooth"] == list(made.figures["asked"]["seen"])
    with pytest.raises(ValueError, match="wrong held out inner"):
        table("detectors", [KNOWS, both[1]], index, ASK)


def test_the_card_calls_unseen_what_the_model_was_not_trained_on(index: Index):
    """Seen and held out change places with the family that training left out."""
    ask = replace(ASK, conditions=("clean",))
    made = {
        unseen: table("card", [replace(KNOWS, trained={"held_out": unseen})], index, ask)
        for unseen in ("smooth", "inner", None)
    }
    figures = {unseen: each.figures["knows"] for unseen, each in made.items()}

    assert "held out: smooth" in made["smooth"].title
    for one, other in (("smooth", "inner"), ("inner", "smooth")):
        held_out = figures[one]["crop clean auc held out"][0]
        assert figures[one][f"crop clean auc {one}"][0] == held_out
        assert figures[other]["crop clean auc seen"][0] == held_out
    assert "crop clean auc held out" not in figures[None]


def test_a_row_a_model_and_condition_and_a_sentence_on_what_it_shows(index: Index, tmp_path: Path):
    """The first model is what the others are compared with; what cannot be said is said."""
    made = table("detectors", [KNOWS, WRONG], index, ASK)
    stored = json.loads(made.save(tmp_path / "t.json").read_text())
    part = stored["figures"]["wrong"]["parts"]["clean"][0]

    assert ["knows", "  blur:5", "wrong", "  blur:5"] == [row[0] for row in made.rows]
    assert all(len(row) == len(made.columns) for row in made.rows)
    assert ("", "") == made.rows[0][-2:]
    assert "640 faces" in made.rows[0]
    assert part["low"] <= part["less_first"] <= part["high"] < 0
    assert "wrong" in made.notes[0] and "below it" in made.notes[0]
    assert made.notes[-1] == CANNOT
    assert {"machine", "asked", "knows", "wrong"} == set(stored["figures"])


def test_crops_that_are_cut_alike_are_made_once(index: Index, monkeypatch: pytest.MonkeyPatch):
    """Two models of one contract see the same tensors; another contract has its own."""
    wide = replace(KNOWS, name="wide", input=CONTRACT.model_copy(update={"margin": 1.6}))
    made: Counter[str] = Counter()
    from ralf.train.data.evaluation_set import Examples

    whole = Examples.crop

    def counted(self: Examples, item: object) -> Tensor:
        made["crops"] += 1
        return whole(self, item)  # type: ignore[arg-type]

    monkeypatch.setattr(Examples, "crop", counted)
    one = score_all([KNOWS, WRONG], index, ASK, ("smooth",), "clean")
    once = made["crops"]
    three = score_all([KNOWS, wide, WRONG], index, ASK, ("smooth",), "clean")

    assert 12 == once == made["crops"] - 2 * once
    assert np.array_equal(one[0].logit, -one[1].logit)
    assert np.array_equal(one[1].logit, three[2].logit)
    assert not np.array_equal(three[0].logit, three[1].logit)


def test_a_network_has_its_cost_in_the_row(index: Index):
    """Weights and arithmetic of the very network that was judged."""
    judge = model_of_network("fdfl", build("fdfl", fusion="concat", **LITE), CONTRACT)
    made = table("detectors", [KNOWS, judge], index, replace(ASK, families=("smooth",)))
    row = next(row for row in made.rows if row[0] == "fdfl")

    assert ("3.85", "0.12") == row[1:3]
    assert float(row[3]) > 0
    assert ("—", "—") == made.rows[0][1:3]


def test_the_destructors_products_are_counted():
    """Four products for each of three planes at 64²: 25 MFLOP, which torch does not see."""
    small = build("ralf", base=4, blocks=1, **LITE)
    plain = cost(small)
    classifier = cost(build("classifier", **LITE))
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        small.to("meta")(torch.zeros((1, 3, 64, 64), dtype=torch.uint8, device="meta"))

    assert plain.gflop - counter.get_total_flops() / 1e9 == pytest.approx(3 * 8 * 64**3 / 1e9)
    assert (classifier.parameters, round(classifier.gflop, 4)) == (3_372_289, 0.0627)


def scored(logit: np.ndarray, clusters: int = 30) -> Scored:
    """Each cluster a real and a forged face."""
    forged = np.arange(2 * clusters) % 2 == 1
    names = tuple(("d", "real", "", str(row // 2)) for row in range(2 * clusters))
    return Scored(logit, forged, names, tuple(row // 2 for row in range(2 * clusters)))


def test_a_difference_on_the_same_faces_is_surer_than_two_figures():
    """One model is the other and a little noise: alone both are unsure, their difference is not."""
    rng = np.random.default_rng(0)
    base = rng.normal(0, 1, 60) + np.tile([0.0, 0.8], 30)
    one, other = scored(base), scored(base + rng.normal(0, 0.05, 60))
    low, high = paired_bootstrap_interval(one, other, auc, replicates=300)
    wide = bootstrap_interval(one, auc, replicates=300)

    assert low <= auc(one.forged, one.logit) - auc(other.forged, other.logit) <= high
    assert high - low < (wide[1] - wide[0]) / 4
    assert (0.0, 0.0) == paired_bootstrap_interval(one, one, auc, replicates=20)


def test_models_that_saw_other_faces_cannot_be_paired():
    """Nor one class alone have an interval."""
    one = scored(np.zeros(60))
    with pytest.raises(ValueError, match="same faces in the same order"):
        paired_bootstrap_interval(one, one.where(np.arange(60) < 58), auc)
    reals = one.where(~one.forged)

    assert np.isnan(paired_bootstrap_interval(reals, reals, auc)).all()


def asked_by(
    name: str, folder: Path, faces: int, prints: str = "", **environment: str
) -> tuple[list[list[str]], list[Recipe]]:
    """What a script of bench/ asks `ralf` for at 64 px, word by word, and the recipes it trains."""
    log, stub = folder / "log", folder / "stub"
    stub.write_text(f'#!/bin/sh\necho "$@" >> {log}\necho {prints}\n')
    stub.chmod(0o755)
    script = Path(__file__).resolve().parent.parent / "bench" / name
    given = os.environ | {"PYTHON": str(stub), "BACKBONE": "b.safetensors", **environment}
    paths = f"{folder},{folder}"
    subprocess.run([script, paths, folder / "out", str(faces), "64"], env=given, check=True)
    said = [line.split()[2:] for line in log.read_text().splitlines()]
    for words in said:
        parser([train]).parse_args(words)  # today's commands take them
    recipes = [
        override(named(words[1]), dict(s.split("=", 1) for s in words if "=" in s))
        for words in said
        if words[0] == "train"
    ]
    return said, recipes


def test_the_comparison_is_one_command_with_one_budget(tmp_path: Path):
    """Each recipe takes what the script sets; all see as many faces, and all are judged at once."""
    said, recipes = asked_by(
        "compare_detectors.sh", tmp_path, 3200, "/models/one/12345678", LIMIT="5"
    )

    small = ["small_classifier", "ralf_small_cpu", "ralf_small_cpu", "fdfl_small", "rcl_small"]
    assert small == [recipe.name for recipe in recipes]
    assert ["residual", "both"] == [r.network.dimensions["sees"] for r in recipes[1:3]]
    assert {3200} == {recipe.data.batch * (recipe.schedule.steps or 0) for recipe in recipes}
    assert {64} == {recipe.data.input.size for recipe in recipes}
    assert {"b.safetensors"} == {recipe.init.backbone for recipe in recipes}
    # A recipe may give parts of its network another rate; all else of the optimiser is shared.
    plain = {recipe.optimiser.replaced(rates=(), no_decay=()) for recipe in recipes}
    assert len(plain) == 1
    for words in said:
        if "--data" in words:
            first = words.index("--data") + 1
            assert words[first : first + 2] == [str(tmp_path)] * 2
    models = ["classifier", "ralf", "ralf_both", "fdfl", "rcl"]
    assert said[-1][:7] == ["evaluate", *models, "trio"]
    assert {"--limit", "5", "detectors"} <= set(said[-1])
    promoted = [words[2] for words in said if words[:2] == ["models", "promote"]]
    assert [f"{name}@12345678" for name in models] == promoted


def test_the_ablation_leaves_one_thing_out_at_a_time(tmp_path: Path):
    """Every arm is a recipe that differs from the first; all see as many faces."""
    more = "colder optimiser.lr=1e-5\nwarmer optimiser.lr=1e-2 schedule.warmup=0.1"
    data = {"JOBS": "1", "HELD_OUT": "renderer", "ARMS": more}
    (*asked, judged), recipes = asked_by("ablate.sh", tmp_path, 1600, **data)
    trained = [words for words in asked if words[0] == "train"]

    assert {1600} == {recipe.data.batch * (recipe.schedule.steps or 0) for recipe in recipes}
    # Two of them because the stub says that there are forgeries on disk, and two that were asked.
    assert len(recipes) == len({to_json(recipe) for recipe in recipes}) == 15
    assert {"renderer"} == {recipe.data.held_out for recipe in recipes}
    assert recipes[-1].schedule.warmup == 0.1
    blended, disk = recipes[-4:-2]
    assert blended.data.blended_share == 1 and disk.data.families == ()
    (index,) = [words for words in asked if words[:2] == ["data", "index"]]
    assert {"label=1", "split=train"} <= set(index)
    runs = [words[words.index("--out") + 1] for words in trained]
    assert judged[: len(runs) + 1] == ["evaluate", *runs] and runs[0].endswith("/all")


def test_both_scripts_can_be_rehearsed_with_a_few_steps(tmp_path: Path):
    """STEPS takes the place of the faces; ONLY leaves arms out, and refuses a name of none."""
    few = {"JOBS": "1", "STEPS": "2", "ONLY": "all swap_alone"}
    (*_, judged), recipes = asked_by("ablate.sh", tmp_path, 1600, **few)
    assert [2, 2] == [recipe.schedule.steps for recipe in recipes]
    assert ["all", "swap_alone"] == [Path(run).name for run in judged[1:3]]
    with pytest.raises(subprocess.CalledProcessError):
        asked_by("ablate.sh", tmp_path, 1600, **few | {"ONLY": "swapalone"})
    (tmp_path / "log").unlink()
    _, recipes = asked_by("compare_detectors.sh", tmp_path, 1600, STEPS="2")
    assert [2] * 5 == [recipe.schedule.steps for recipe in recipes]
