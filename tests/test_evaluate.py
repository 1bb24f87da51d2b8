"""Judging: crops by the model's contract, figures by hand, tables, and the CSV of videos."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from ralf.kernels.artifact import ArtifactError
from ralf.kernels.manifest import Aggregation, Calibration, InputContract, Sampling
from ralf.train.data.index import Index, IndexFault
from ralf.train.data.prepare import prepare
from ralf.train.evaluate import papers
from ralf.train.evaluate.conditions import DEEPERFORENSICS
from ralf.train.evaluate.judge import (
    JudgedModel,
    evaluate,
    examples_for,
    model_of_network,
    open_model,
    score_examples,
    write_videos,
)
from ralf.train.evaluate.metrics import Scored, concatenated, measure
from ralf.train.evaluate.tables import MAKERS, table
from ralf.train.evaluate.tables.aggregation import evenly_spread
from ralf.train.evaluate.tables.table import Table, TableOptions, read_groups
from ralf.train.forge.clips import ClipOptions, make_clips
from tests.faces_on_disk import faces

CONTRACT = InputContract(size=64, sampling=Sampling(max_frames=4))


def sharpness(crops: Tensor) -> Tensor:
    """A judge that knows something: how much fine detail there is."""
    grey = crops.float().mean(dim=1)
    return (grey[:, :, 1:] - grey[:, :, :-1]).abs().mean(dim=(1, 2)) / 4 - 1


JUDGE = JudgedModel(name="sharp", score=sharpness, input=CONTRACT)
QUICK = TableOptions(split="val", families=("smooth", "inner"), replicates=20)


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> Index:
    return faces(tmp_path_factory.mktemp("data") / "d", val=4, forgeries="boundary")


def test_figures_are_those_of_the_scores(index):
    """AUC by frame over all, by method against all reals: against scikit-learn."""
    found = evaluate(JUDGE, index, "val", families=("smooth",), replicates=0)
    kept = [video[1] in ("real", "smooth") for video in found.scored.video]
    forged, logit = found.scored.forged, found.scored.logit

    assert (found.frames.real, found.frames.forged) == (4, 8)
    assert {"boundary", "smooth"} == set(found.by_method)
    assert pytest.approx(roc_auc_score(forged, logit)) == found.frames.auc
    assert pytest.approx(roc_auc_score(forged[kept], logit[kept])) == found.by_method["smooth"].auc


def test_judging_twice_gives_the_same_figures(index):
    """To the last bit, intervals too."""
    one, two = (evaluate(JUDGE, index, "val", families=("inner",), replicates=50) for _ in "12")

    assert one.frames == two.frames and one.videos == two.videos


def test_a_face_and_what_was_made_of_it_are_one_cluster(index):
    """The bootstrap draws them together: they are no independent evidence."""
    found = evaluate(JUDGE, index, "val", families=("smooth",), replicates=0).scored

    assert len(found) == 12
    assert len(set(found.cluster)) == 4


def test_crops_are_cut_by_the_models_own_contract(index):
    """Another size or margin is another model."""
    wide = replace(JUDGE, input=CONTRACT.model_copy(update={"size": 48, "margin": 1.6}))

    assert tuple(examples_for(wide, index, "val")[0].crops.shape[2:]) == (48, 48)


def test_frames_of_a_video_are_pooled(index):
    """Four frames are one row by video."""
    first = next(row for row in index if row.split == "val" and not row.label)
    others = tuple(row for row in index if row.split == "val" and row.label)
    rows = tuple(replace(first, frame=n) for n in range(6))
    found = evaluate(JUDGE, Index(index.root, rows + others), "val", replicates=0)

    assert (found.frames.real, found.videos.real) == (4, 1)


def test_the_models_threshold_and_calibration_count(index):
    """Accuracy is at the threshold that the model ships with."""
    everything = replace(JUDGE, threshold=0.0)
    nothing = replace(JUDGE, threshold=1.0, calibration=Calibration(shift=1e3))
    share = [
        evaluate(judge, index, "val", replicates=0).frames.accuracy
        for judge in (everything, nothing)
    ]

    assert share == [0.5, 0.5]


def test_a_network_is_judged_in_inference(index):
    """Dropout sleeps and running statistics stay as they are."""
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.9), nn.Linear(3 * 64 * 64, 1))

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network

        def forward(self, crops: Tensor) -> Tensor:
            return self.inner(crops.float() / 255)[:, 0]

    judge = model_of_network("plain", One().train(), CONTRACT)
    examples = examples_for(judge, index, "val")

    assert np.array_equal(
        score_examples(judge, examples).logit, score_examples(judge, examples).logit
    )


def test_a_diverged_network_is_refused(index):
    """NaN is no score."""
    broken = replace(JUDGE, score=lambda crops: torch.full((len(crops),), float("nan")))

    with pytest.raises(ValueError, match="diverged"):
        evaluate(broken, index, "val")


def test_a_model_that_is_not_there_is_named(tmp_path):
    """With the hint that a run would do."""
    with pytest.raises(ArtifactError, match="ralf train"):
        open_model("nobody", tmp_path)


def test_a_row_for_every_video(index, tmp_path):
    """And its score is the calibrated, pooled one."""
    found = evaluate(JUDGE, index, "val", replicates=0)
    with write_videos(tmp_path / "v.csv", JUDGE, [found]).open() as file:
        rows = list(csv.DictReader(file))

    assert len(found.scored.pooled(JUDGE.aggregation)) == len(rows) == 8
    assert {("real", "0"), ("boundary", "1")} == {(row["method"], row["forged"]) for row in rows}
    first = float(rows[0]["logit"])
    assert pytest.approx(1 / (1 + np.exp(-first)), abs=1e-5) == float(rows[0]["score"])


@pytest.mark.parametrize("kind", sorted({*MAKERS} - {"residual"}))
def test_every_table_prints_and_keeps_its_figures(index, tmp_path, kind):
    """Rows fit their columns; the JSON holds numbers, not text."""
    ask = replace(QUICK, conditions=("blur:2",))
    made = table(kind, [JUDGE, replace(JUDGE, name="twin")], index, ask)

    assert made.rows and all(len(row) == len(made.columns) for row in made.rows)
    assert "twin" in str(made)
    stored = json.loads(made.save(tmp_path / "t.json").read_text())
    assert set(made.figures) == set(stored["figures"])


def renamed(index: Index, dataset: str, compression: str) -> Index:
    rows = (replace(row, dataset=dataset, compression=compression) for row in index)
    return Index(index.root, tuple(rows))


def published_rows(made: Table) -> int:
    return sum(row[0].startswith("published") for row in made.rows)


def test_published_rows_stand_only_beside_the_same_data(index):
    """FaceForensics++ c23 has them; our own portraits do not."""
    ask = replace(QUICK, families=(), conditions=("contrast:2",))
    same, other = renamed(index, "ffpp", "c23"), renamed(index, "own", "")

    assert published_rows(table("intra", [JUDGE], same, ask)) == 11
    assert published_rows(table("robustness", [JUDGE], same, ask)) == 12
    assert published_rows(table("intra", [JUDGE], other, ask)) == 0
    assert published_rows(table("ablation", [JUDGE], same, ask)) == 0
    low = renamed(index, "ffpp", "c40")
    assert published_rows(table("ablation", [JUDGE], low, ask)) == 5
    assert published_rows(table("backbone", [JUDGE], low, ask)) == 3
    assert published_rows(table("backbone", [JUDGE], same, ask)) == 0
    assert published_rows(table("cross", [JUDGE], renamed(index, "dfdc", ""), ask)) == 6
    assert published_rows(table("pooling", [JUDGE], renamed(index, "celeb_df_v2", ""), ask)) == 2
    assert published_rows(table("pooling", [JUDGE], low, ask)) == 2
    assert published_rows(table("pooling", [JUDGE], same, ask)) == 0


def test_published_figures_are_the_papers():
    """One cell of each of RALF's tables, as printed there."""
    assert papers.INTRA["ffpp", "c23"]["RALF"] == (94.71, 98.92)
    assert papers.INTRA["ffpp", "c40"]["RALF"] == (83.94, 89.06)
    assert papers.CROSS["celeb_df_v2"]["RALF"] == (71.00, 34.70)
    assert papers.CROSS["dfdc"]["RALF"] == (63.94, 39.21)
    assert papers.ROBUSTNESS["RALF"] == (-0.40, -8.61, -2.85, -8.37)
    assert papers.ABLATION["RALF, L_freq unweighted"] == 88.59
    assert papers.BACKBONE["RALF ResNet-50"] == 85.60
    assert papers.POOLING["dfdc"] == {
        "RALF average pooling": 58.24,
        "RALF max pooling": 63.94,
    }


def test_robustness_is_nine_kinds_of_five_levels(index):
    """Unless told otherwise, and each beside the clean figure."""
    one = index.where(video=next(row for row in index if row.split == "val").video)
    made = table("robustness", [JUDGE], one, replace(QUICK, families=(), replicates=0))
    told = [row[0].removeprefix("sharp ") for row in made.rows]

    assert told[0] == "clean" and len(told) == len(set(told)) == 1 + 9 * 5 + 2 + 4
    for kind in (*DEEPERFORENSICS, "jpeg", "light"):
        assert {f"{kind}:{level}" for level in range(1, 6)} <= set(told)
    assert {"fade:2@crop", "rescale:2@crop"} <= set(told)
    assert any("jpeg is true JPEG" in note for note in made.notes)


def test_robustness_is_told_as_a_change(index):
    """The clean row changes by nothing; blur takes the detail that this judge lives by."""
    made = table("robustness", [JUDGE], index, replace(QUICK, conditions=("blur:5",)))

    assert made.rows[0][2] == "+0.00"
    assert (
        made.figures["sharp clean"]["frames"]["auc"]
        != made.figures["sharp blur:5"]["frames"]["auc"]
    )


def test_false_positives_count_reals_alone(index):
    """By size, colour and pose; with an exact interval."""
    strict = replace(JUDGE, threshold=0.0)
    made = table("false_positives", [strict], index, replace(QUICK, conditions=("jpeg=50",)))
    facts = made.figures["sharp clean all"]

    assert (facts["faces"], facts["forged"]) == (4, 4) and facts["interval"][1] == 1
    assert any("colour" in name for name in made.figures)


def test_a_split_without_reals_is_refused(index):
    """There would be nothing to rank against."""
    with pytest.raises(IndexFault, match="no real faces"):
        table("intra", [JUDGE], index.where(label=1), QUICK)
    with pytest.raises(ValueError, match="there are intra, cross"):
        table("beauty", [JUDGE], index, QUICK)


def test_the_aggregation_table_pools_as_the_worker_would(tmp_path):
    """Frames evenly spread, each rule's AUC by video, against scikit-learn."""
    rng = np.random.default_rng(0)
    video = tuple(("d", m, "", f"v{n}") for m in ("real", "fake") for n in range(6) for _ in "1234")
    forged = np.array([name[1] == "fake" for name in video])
    found = Scored(rng.normal(forged * 0.7), forged, video, video)
    half = found.where(evenly_spread(found, 2))

    assert [1, 3] == np.flatnonzero(evenly_spread(found, 2))[:2].tolist()
    assert [2] == np.flatnonzero(evenly_spread(found, 1))[:1].tolist()
    assert evenly_spread(found, 4).all()
    means = half.logit.reshape(12, 2).mean(axis=1)
    expected = roc_auc_score(half.forged[::2], means)
    pooled = half.pooled(Aggregation(track="mean"))
    assert pytest.approx(expected) == measure(pooled, replicates=0).auc


def test_the_aggregation_table_has_a_row_for_each_count_and_rule(index):
    """One frame needs no rule; counts that no video has are left out."""
    made = table("aggregation", [JUDGE], index, QUICK)

    assert ["sharp 1 mean"] == [row[0] for row in made.rows]
    assert 0 <= made.figures["sharp 1 mean"]["auc"] <= 1


@pytest.fixture(scope="module")
def carded(tmp_path_factory) -> tuple[Index, Table]:
    """Stills, prepared clips of them, and people to check by."""
    root = tmp_path_factory.mktemp("card")
    stills = faces(root / "stills", val=3)
    wanted = ClipOptions(families=("boundary", "smooth"), crfs=(23, 40), seconds=0.3)
    clips = make_clips(stills, root / "clips", wanted, split="val")
    crops = prepare(clips, root / "crops", CONTRACT, frames=2)
    others = [
        replace(stills.anywhere(row), dataset="others", split="check", video=f"o{n}", target="")
        for n, row in enumerate(stills.where(split="train"))
    ]
    everything = stills + crops + Index(stills.root, tuple(others))
    groups = root / "groups.csv"
    people = [Path(row.path).name for row in stills.where(split="val")]
    groups.write_text(
        "file,split,gender\n"
        + "".join(f"{name},val,{'ab'[n > 0]}\n" for n, name in enumerate(people))
    )
    options = TableOptions(
        split="val",
        families=("smooth", "boundary"),
        conditions=("clean", "jpeg=8"),
        replicates=20,
        groups=read_groups([groups]),
    )
    return everything, table("card", [JUDGE], everything, options)


def test_the_card_judges_stills_clips_and_other_people(carded):
    """Seen families apart from the one held out; clips by video, at each rate."""
    _, made = carded
    figures = made.figures["sharp"]

    assert {
        "crop clean auc seen", "crop clean auc held out", "crop clean auc smooth",
        "crop clean ece", "crop clean false positives", "clip crf23 auc seen",
        "clip crf40 forgeries caught", "clip any ece", "clip any ece by chance",
        "other people clean false positives",
    } <= figures.keys()  # fmt: skip
    assert figures["crop clean auc seen"] == figures["crop clean auc smooth"]
    share, low, high = figures["other people clean false positives"]
    assert low <= share <= high and share * 5 == round(share * 5)
    assert "other people clean frontal false positives" in figures


def test_the_card_counts_by_group_size_and_collection_and_names_generators_on_disk(carded):
    """A group beside the others; reals by collection; forgeries on disk by their method."""
    everything, made = carded
    figures = made.figures["sharp"]
    each = evaluate(JUDGE, everything.where(dataset="portraits"), "val", replicates=0)
    logit = each.scored.logit[~each.scored.forged]
    wrong = 1 / (1 + np.exp(-logit)) >= 0.5

    assert figures["group gender a false positives"][0] == wrong[0]
    assert figures["group gender b false positives"][0] == wrong[1:].mean()
    assert (
        figures["group gender a others false positives"]
        == figures["group gender b false positives"]
    )
    assert figures["real portraits false positives"][0] == wrong.mean()
    assert any(name.startswith("crop clean ") and name.endswith("px auc") for name in figures)
    assert "clip any auc smooth" in figures
    lost = figures["crop clean auc seen"][0] - figures["crop jpeg=8 auc seen"][0]
    assert figures["crop jpeg=8 auc lost"] == pytest.approx(lost)
    assert "crop jpeg=8 ece" not in figures


def test_forgeries_on_disk_are_a_generator_that_can_be_held_out(index):
    """By its method's name: apart from what was seen, in the card and beside other detectors."""
    judge = replace(JUDGE, trained={"held_out": "boundary"})
    options = replace(QUICK, conditions=("clean",), families=("smooth",))
    figures = table("card", [judge], index, options).figures["sharp"]

    assert figures["crop clean auc held out"] == figures["crop clean auc boundary"]
    assert figures["crop clean auc seen"] == figures["crop clean auc smooth"]


def test_groups_without_a_known_column_are_refused(tmp_path):
    """With the columns that are read."""
    (tmp_path / "g.csv").write_text("file,shoe\na.jpg,43\n")

    with pytest.raises(ValueError, match="some of age, gender, region"):
        read_groups([tmp_path / "g.csv"])


def test_the_cards_figures_are_those_of_the_scores(carded):
    """The held-out family against all reals, by scikit-learn; clips pooled by video."""
    everything, made = carded
    stills = everything.where(dataset="portraits")
    each = evaluate(JUDGE, stills, "val", families=("boundary",), replicates=0)
    expected = roc_auc_score(each.scored.forged, each.scored.logit)
    at_each = [made.evaluations[place].scored.pooled(JUDGE.aggregation) for place in (-2, -1)]
    pooled = at_each[0]
    every = concatenated(at_each)
    seen = every.where(np.array([video[1] != "boundary" for video in every.video]))

    of_all = roc_auc_score(seen.forged, seen.logit)
    assert made.figures["sharp"]["clip any auc seen"][0] == pytest.approx(of_all, abs=1e-12)
    assert pytest.approx(expected) == made.figures["sharp"]["crop clean auc held out"][0]
    assert 6 == len(pooled)
