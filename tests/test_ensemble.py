"""Several detectors as one model: its mean, its members in the verdict, and what is refused."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ralf.__main__ import main
from ralf.kernels.artifact import Artifact, current, publish, resolve
from ralf.kernels.choose_engine import load as load_engine
from ralf.kernels.engine import EngineError, check_golden
from ralf.kernels.engine_torch import pack, restore
from ralf.kernels.manifest import Aggregation, Calibration, InputContract, Manifest, Network
from ralf.kernels.networks import build
from ralf.kernels.registry import point_to
from ralf.kernels.untrained import patterns, settle
from ralf.train.publish.ensemble import EnsembleError, publish_ensemble
from ralf.worker.ensemble import FaceScorer
from ralf.worker.scores import Scores, video_score
from ralf.worker.verdict import judge
from tests.faces_on_disk import faces

pytestmark = pytest.mark.usefixtures("one_thread")
SIZE = 64
LITE = {"backbone": "tf_efficientnet_lite0", "size": SIZE}
NETWORKS = {
    "forest": Network(build="ralf", base=4, blocks=1, **LITE),
    "blocks": Network(build="fdfl", fusion="concat", **LITE),
    "centre": Network(build="classifier", **LITE),
}
CALIBRATIONS = {
    "forest": Calibration(temperature=0.5, shift=0.1, fitted_on="a test"),
    "blocks": Calibration(temperature=2.0, shift=-0.3, fitted_on="a test"),
    "centre": Calibration(),
}


def member(models: Path, name: str, **changes: Any) -> Artifact:
    """A published model with random weights, whose batch norms fit its golden crops."""
    crops = patterns(4, SIZE)
    torch.manual_seed(sorted(NETWORKS).index(name))
    network = build(NETWORKS[name].build, **NETWORKS[name].dimensions)
    settle(network, crops)
    draft = Manifest(
        name=name,
        network=NETWORKS[name],
        input=InputContract(size=SIZE),
        calibration=CALIBRATIONS[name],
        files={},
        error_budget={"logit": 0.25},
    ).model_copy(update=changes)
    manifest, files = pack(network, draft, crops)
    return publish(models, manifest, {**files, "card.md": b"# made for a test\n"})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three members, promoted, and `trio`."""
    folder = tmp_path_factory.mktemp("models")
    members = [member(folder, name) for name in NETWORKS]
    trio = publish_ensemble(members, "trio", folder)
    for each in (*members, trio):
        point_to(folder, each.name, each.version)
    return folder


def members_of(models: Path) -> list[Artifact]:
    """In the order of the ensemble."""
    return [resolve(models, name) for name in NETWORKS]


def test_its_logit_is_the_mean_of_its_members_calibrated_ones(models: Path):
    """Each is brought to its own scale first; every weight is the member's, to the bit."""
    crops = torch.from_numpy(patterns(5, SIZE, seed=3))
    engine = load_engine(resolve(models, "trio"), "cpu", precision="fp32")
    alone = [
        (load_engine(each, "cpu", precision="fp32")(crops) - each.manifest.calibration.shift)
        / each.manifest.calibration.temperature
        for each in members_of(models)
    ]

    torch.testing.assert_close(engine.members(crops), torch.stack(alone, 1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(engine(crops), torch.stack(alone, 1).mean(1), rtol=1e-4, atol=1e-4)
    assert torch.equal(engine(crops), engine.members(crops).mean(1))
    assert (0, 3) == engine.members(crops[:0]).shape


def test_it_is_a_model_like_any_other(models: Path, capsys: pytest.CaptureFixture[str]):
    """Golden crops agree, `ralf models verify` says so, and its members stand in the manifest."""
    trio = resolve(models, "trio")

    assert check_golden(load_engine(trio, "cpu")) <= trio.manifest.error_budget["logit"]
    assert 0 == main(["models", "verify", "trio", "--models", str(models)])
    listed = [each["name"] for each in trio.manifest.network.dimensions["members"]]
    assert listed == [each.label for each in members_of(models)]
    assert listed == trio.manifest.trained["members"]
    assert all(label in trio.read("card.md").decode() for label in listed)
    assert "trio@" in capsys.readouterr().out


def test_pictures_come_from_the_member_that_has_some(models: Path):
    """RALF shows the residual; an ensemble without it explains nothing."""
    crops = torch.from_numpy(patterns(2, SIZE))
    forest, *others = members_of(models)
    trio = load_engine(resolve(models, "trio"), "cpu", precision="fp32")
    own = load_engine(forest, "cpu", precision="fp32")
    duo = publish_ensemble(others, "duo", models)

    torch.testing.assert_close(trio.explain(crops).residual, own.explain(crops).residual)
    with pytest.raises(EngineError, match="explains nothing"):
        load_engine(duo, "cpu").explain(crops)
    with pytest.raises(EngineError, match="has no members"):
        own.members(crops)


def test_each_member_is_lowered_as_it_lowers_itself(models: Path):
    """What it keeps in FP32 it keeps here: the same logits as alone."""
    crops = torch.from_numpy(patterns(2, SIZE))
    trio = restored(resolve(models, "trio"))
    alone = [restored(each).lower(torch.bfloat16)(crops) for each in members_of(models)]
    said = trio.lower(torch.bfloat16).members(crops)

    assert torch.float32 == said.dtype
    torch.testing.assert_close(
        said * trio.temperature + trio.shift, torch.stack(alone, 1), rtol=1e-4, atol=1e-4
    )


def restored(artifact: Artifact) -> Any:
    """The network of a model."""
    return restore(artifact.manifest, artifact.read("weights.safetensors"))


def test_the_command_publishes_and_scan_lists_each_detectors_score(
    models: Path, clip_of_two: Path, capsys: pytest.CaptureFixture[str]
):
    """A detector's score in the verdict is what it would have said alone."""
    names = list(NETWORKS)
    command = ["ensemble", *names, "--name", "mean-of-three", "--models", str(models), "--promote"]
    assert 0 == main(command)
    said = capsys.readouterr()
    artifact = resolve(models, "mean-of-three")
    verdicts = {}
    for name in ("mean-of-three", *names):
        scan = ["scan", str(clip_of_two), "--model", name, "--models", str(models), "--json"]
        assert 0 == main([*scan, "--quiet", "--device", "cpu", "--max-frames", "3"])
        verdicts[name] = json.loads(capsys.readouterr().out)
    made = verdicts["mean-of-three"]["made"]

    assert str(artifact.path) == said.out.strip()
    assert "centre@" in said.err and "not calibrated" in said.err and "forest@" not in said.err
    assert [each.label for each in members_of(models)] == list(made["detectors"])
    alone = {resolve(models, name).label: verdicts[name]["score"] for name in names}
    assert alone == pytest.approx(made["detectors"], abs=0.02)
    assert {} == verdicts["centre"]["made"]["detectors"]


def test_an_ensemble_is_promoted_through_the_same_checks_as_any_model(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """One without an engine for its target stays unpromoted, and the check is named."""
    listed = [member(tmp_path, name, targets=("sm90",)) for name in ("forest", "centre")]
    names = [each.label for each in listed]
    command = ["ensemble", *names, "--name", "duo", "--models", str(tmp_path), "--promote"]

    assert 2 == main(command)
    assert "engines REFUSED" in capsys.readouterr().err
    assert current(tmp_path / "duo") is None


def test_the_mean_is_calibrated_on_data_as_any_model_is(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """In the same command: thresholds, and what they were fitted on; or it says why not."""
    index = faces(tmp_path / "d", val=6, forgeries="boundary")
    command = ["ensemble", "forest", "blocks", "--name", "fitted", "--models", str(models)]
    code = main([*command, "--data", str(index.root), "--fitted-on", "six faces"])
    said = capsys.readouterr()

    if code:  # random weights may rank forgeries below reals, which calibration refuses
        assert "higher scores should mean forged" in said.err
        return
    manifest = resolve(models, f"fitted@{Path(said.out.strip()).name}").manifest
    assert "six faces" == manifest.calibration.fitted_on
    assert {"fpr_0.01", "fpr_0.05", "low"} == set(manifest.thresholds)


def test_members_of_other_crops_or_pooling_are_refused_by_name(models: Path, tmp_path: Path):
    """One crop is shown to all, and one mean is pooled."""
    forest, blocks, _ = members_of(models)
    wide = member(tmp_path, "blocks", input=InputContract(size=SIZE, margin=1.6))
    mean = member(tmp_path, "blocks", aggregation=Aggregation(track="mean"))

    with pytest.raises(EnsembleError, match=r"differ in input: margin: 1\.3 → 1\.6"):
        publish_ensemble([forest, wide], "odd", tmp_path)
    with pytest.raises(EnsembleError, match="differ in aggregation: track"):
        publish_ensemble([forest, mean], "odd", tmp_path)
    with pytest.raises(EnsembleError, match="two members or more"):
        publish_ensemble([forest], "odd", tmp_path)
    with pytest.raises(ValueError, match="two different members"):
        publish_ensemble([blocks, blocks], "odd", tmp_path)
    with pytest.raises(ValueError, match="name its members instead"):
        publish_ensemble([resolve(models, "trio"), blocks], "odd", tmp_path)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([{"name": "a"}, {"name": "b"}], "network: Field required"),
        ([{"name": n, "network": NETWORKS["centre"].model_dump() | {"size": 32}} for n in "ab"],
         "a takes crops of 32 px, not 64"),
    ],
)  # fmt: skip
def test_a_manifest_that_makes_no_ensemble_is_refused(members: list[Any], message: str):
    """By the member and the field."""
    with pytest.raises(ValueError, match=message):
        build("ensemble", members=members, size=SIZE)


def test_one_untrained_member_makes_it_untrained(models: Path, tiny_models: Path):
    """Every verdict made with it will say so."""
    tiny = resolve(tiny_models, "tiny")
    forest = members_of(models)[0]
    made = publish_ensemble([forest, tiny], "half", models)

    assert made.manifest.untrained
    assert "Untrained" in made.read("card.md").decode()


@dataclass(frozen=True)
class Plan:
    """An engine that gives the mean alone."""

    artifact: Artifact
    name: str = "trt"
    precision: str = "fp16"
    device: str = "cuda:0"

    def __call__(self, crops: Tensor) -> Tensor:
        return torch.arange(len(crops), dtype=torch.float32)


def test_an_engine_that_gives_the_mean_alone_is_told_of(models: Path):
    """No list is better than a guessed one; a single detector needs none."""
    trio, forest = resolve(models, "trio"), members_of(models)[0]
    scorer = FaceScorer(Plan(trio))

    assert [0, 1] == scorer(torch.zeros(2, 3, SIZE, SIZE, dtype=torch.uint8)).tolist()
    assert {} == scorer.member_scores(Scores.none(), Aggregation())
    assert "detectors_unlisted: trt gives the ensemble's mean alone" == scorer.warning
    assert FaceScorer(Plan(forest)).warning is None
    assert FaceScorer(load_engine(trio, "cpu")).warning is None


def scores(logits: list[float], tracks: list[int], sides: list[int]) -> Scores:
    """Faces of one clip."""
    m = len(logits)
    boxes = np.array([[0.0, 0.0, side, side] for side in sides]).reshape(m, 4)
    return replace(
        Scores.none(),
        time_s=np.arange(m) / 5,
        frame=np.arange(m),
        box=boxes,
        face_px=np.array(sides, float),
        confidence=np.ones(m),
        track=np.array(tracks, np.int64),
        logit=np.array(logits),
    )


@given(rows=st.lists(st.tuples(st.floats(-9, 9), st.integers(0, 2), st.sampled_from([30, 90]))))
@settings(max_examples=60, deadline=None)
def test_the_strongest_score_is_the_verdicts(rows: list[tuple[float, int, int]]):
    """Small faces and short tracks count as little for a member as for the mean."""
    found = scores(*(list(column) for column in zip(*rows, strict=True))) if rows else Scores.none()
    manifest = Manifest(name="m", network=Network(build="ralf"), files={})
    said = judge(found, found.time_s, width=640, height=360, duration_s=60.0, manifest=manifest)

    assert said.score == video_score(found, manifest.calibration, manifest.aggregation)
