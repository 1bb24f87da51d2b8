"""From a run to a model: the engine says what the checkpoint's weights say."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ralf.__main__ import main
from ralf.kernels.artifact import Artifact, golden, open_artifact, versions
from ralf.kernels.choose_engine import load as load_engine
from ralf.kernels.manifest import Reference, held_out_family
from ralf.kernels.networks import build
from ralf.kernels.registry import point_to
from ralf.kernels.untrained import patterns
from ralf.train.loop.checkpoint import BEST, LAST, CheckpointError, judged, load, weights
from ralf.train.loop.loop import Options, train
from ralf.train.publish.calibrate import calibrate, restored
from ralf.train.publish.card import Portion, defects, portions, without_places
from ralf.train.publish.version import GOLDEN_CROPS, PublishDetails, publish_run, recalibrate
from ralf.train.recipes import named
from tests.training import MadeBatches, tiny


@pytest.fixture(scope="module", params=["ralf_small", "small_classifier"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run with validation."""
    where = tmp_path_factory.mktemp(request.param)
    recipe = tiny(request.param, **{"schedule.steps": "3"})
    train(
        recipe, MadeBatches(), [MadeBatches()[100]], where, data_sha256="d" * 64,
        options=Options(quiet=True),
    )  # fmt: skip
    return where


def published(run: Path, models: Path, **details: object) -> Artifact:
    """As ralf-small."""
    return publish_run(run, "ralf-small", models, PublishDetails(**details))  # type: ignore[arg-type]


def test_the_card_names_the_family_that_was_held_out(tmp_path: Path):
    """What data.held_out says goes by the manifest's record onto the card."""
    recipe = tiny("small_classifier", **{"schedule.steps": "1", "data.held_out": "swap"})
    train(
        recipe, MadeBatches(), None, tmp_path / "run", data_sha256="d" * 64,
        options=Options(quiet=True),
    )  # fmt: skip
    portrait = Portion(dataset="portraits", method="real", split="train", count=3)
    artifact = published(tmp_path / "run", tmp_path / "models", data=(portrait,))
    card = artifact.read("card.md").decode()

    assert "swap" == held_out_family(artifact.manifest.trained)
    assert "Never trained on, kept for judging: swap." in card
    made = next(line for line in card.splitlines() if line.startswith("Forgeries made"))
    assert "boundary" in made and "swap" not in made
    assert "changed from `small_classifier`: data.held_out: 'boundary' → 'swap'" in card


def test_the_engine_gives_the_checkpoints_logits(run: Path, tmp_path: Path):
    """FP16 on disk, FP32 in the sums: exactly the golden file, and nearly the run itself."""
    artifact = published(run, tmp_path)
    checkpoint = load(run / BEST)
    network = build(checkpoint.recipe.network.build, **checkpoint.recipe.network.dimensions)
    network.load_state_dict(weights(checkpoint))
    crops = MadeBatches()[5].crops

    engine = load_engine(artifact, "cpu", precision="fp32")

    with torch.no_grad():
        own = network.eval()(crops)
    torch.testing.assert_close(engine(crops), own, atol=0.02, rtol=0)
    kept = golden(artifact)
    assert kept.crops.shape == (32, 3, 32, 32)
    torch.testing.assert_close(
        engine(torch.from_numpy(kept.crops)), torch.from_numpy(kept.logits), atol=1e-4, rtol=0
    )


def test_the_manifest_says_what_was_trained(run: Path, tmp_path: Path):
    """Recipe, data, steps, input: read back and verified."""
    artifact = open_artifact(published(run, tmp_path, metrics={"test_auc": [0.9, 0.8, 0.95]}).path)
    manifest, recipe = artifact.manifest, load(run / LAST).recipe

    assert recipe.network == manifest.network
    assert recipe.data.input == manifest.input
    assert (recipe.name, "d" * 64, 3) == tuple(
        manifest.trained[key] for key in ("recipe", "data_sha256", "steps")
    )
    assert {"validation", "test_auc"} == manifest.metrics.keys()
    assert not manifest.untrained


def test_the_same_run_is_the_same_version(run: Path, tmp_path: Path):
    """Publishing again changes nothing; other figures are another version."""
    one, same = published(run, tmp_path), published(run, tmp_path)
    other = published(run, tmp_path, metrics={"test_auc": 0.5})

    assert one.version == same.version != other.version
    assert one.weights_sha256 == other.weights_sha256


def test_calibration_goes_into_the_manifest_and_onto_the_card(run: Path, tmp_path: Path):
    """Temperature, thresholds, their support."""
    rng = np.random.default_rng(0)
    forged = np.arange(100) < 50
    found = calibrate(rng.normal(0, 1, 100) + 2 * forged, forged, fitted_on="val, crf 23")

    artifact = published(run, tmp_path, calibrated=found)

    manifest, card = artifact.manifest, artifact.file("card.md").read_text()
    assert found.calibration == manifest.calibration
    assert {"fpr_0.01", "fpr_0.05", "low"} == manifest.thresholds.keys()
    assert manifest.policy in manifest.thresholds
    assert "fitted on val, crf 23" in card
    assert "too few faces support: fpr_0.01" in card
    again = recalibrate(
        artifact, tmp_path, calibrate(rng.normal(0, 1, 100) + 3 * forged, forged, fitted_on="new")
    )
    assert again.version != artifact.version
    assert again.weights_sha256 == artifact.weights_sha256
    assert again.manifest.calibration.fitted_on == "new"
    assert f"Recalibrated from {artifact.version}" in again.file("card.md").read_text()


def test_a_new_calibration_does_not_keep_the_old_ones_drift_reference(run: Path, tmp_path: Path):
    """The old scores lie elsewhere on the scale: every upload would look like drift."""
    old = Reference(edges=(0.5,), counts=(9, 1), of="the old scores")
    new = Reference(edges=(0.5,), counts=(3, 7), of="the new scores")
    first = published(run, tmp_path, reference=old)
    fitted = calibrate(np.arange(10.0), np.arange(10) > 4, fitted_on="a test")

    assert old == first.manifest.reference
    assert recalibrate(first, tmp_path, fitted).manifest.reference is None
    assert new == recalibrate(first, tmp_path, fitted, new).manifest.reference


def test_a_version_may_take_over_the_calibration_of_another(run: Path, tmp_path: Path):
    """Figures are measured on a calibrated draft; what then ships is calibrated the same."""
    rng = np.random.default_rng(0)
    forged = np.arange(100) < 50
    found = calibrate(rng.normal(0, 1, 100) + 2 * forged, forged, fitted_on="val, crf 23")
    draft = published(run, tmp_path / "drafts", calibrated=found)
    figures = tmp_path / "card.json"
    flat = {"test_auc": [0.9, 0.8, 0.95], "crop clean ece": 0.04}
    card = {"title": "For the card", "figures": {"ralf": flat, "ralf clean": {"frames": {}}}}
    figures.write_text(json.dumps(card))

    asked = [str(run), "--name", "last", "--models", str(tmp_path / "models")]
    asked += ["--calibration-of", str(draft.path), "--metrics", str(figures)]
    code = main(["publish", *asked, "--aggregation", "mean"])
    [version] = versions(tmp_path / "models", "last")
    made = open_artifact(tmp_path / "models" / "last" / version).manifest

    assert code == 0
    assert found.calibration == made.calibration
    assert found.scores() == made.thresholds
    assert flat.items() <= made.metrics.items()
    assert found == restored(made.calibration, made.metrics["calibration"])
    assert "mean" == made.aggregation.track


def test_a_version_without_calibration_has_none_to_take_over(run: Path, tmp_path: Path, capsys):
    """The message says what to do."""
    draft = published(run, tmp_path)
    asked = ["--name", "last", "--models", str(tmp_path), "--calibration-of", str(draft.path)]

    assert main(["publish", str(run), *asked]) == 2
    assert "was never calibrated: `ralf calibrate`" in capsys.readouterr().err


def test_the_card_tells_data_licences_figures_and_what_is_missing(run: Path, tmp_path: Path):
    """A person reads it; what is not known stands there as not known."""
    data = (
        Portion("civilservice", "real", "train", 400),
        Portion("FF++", "Deepfakes", "train", 720),
        Portion("homemade", "real", "val", 3),
    )
    card = published(
        run, tmp_path, data=data, metrics={"test": {"auc": [0.912, 0.88, 0.94]}},
        failures=("Side views.",),
    ).file("card.md").read_text()  # fmt: skip

    for part in (
        "| civilservice | real | train | 400 |",
        "civilservice: official portraits",
        "FF++: FaceForensics++ terms of use",
        "homemade: not known to this project",
        "| test auc | 0.912 | 0.88 to 0.94 |",
        "- Side views.",
        "kept for judging: boundary",
        "changed from",
        "verdicts are inconclusive",
        "d" * 64,
    ):
        assert part in card
    bare = published(run, tmp_path).file("card.md").read_text()
    assert "Not recorded" in bare


def test_the_card_says_that_the_version_to_be_replaced_was_forced(run: Path, tmp_path: Path):
    """Promotion compares with that version, so its figures are no bar to be proud of."""
    first = published(run, tmp_path)
    point_to(tmp_path, first.name, first.version, remark="forced past metrics REFUSED: asked more")
    forced = f"the version to be replaced, {first.version}, was itself forced past metrics REFUSED"
    fitted = calibrate(np.arange(8.0), np.arange(8) > 3, fitted_on="new")

    assert "forced past" not in first.file("card.md").read_text()
    assert forced in published(run, tmp_path).file("card.md").read_text()
    assert forced in recalibrate(first, tmp_path, fitted).file("card.md").read_text()
    point_to(tmp_path, first.name, published(run, tmp_path).version)
    assert "forced past" not in published(run, tmp_path).file("card.md").read_text()


def test_rows_are_counted_by_collection_method_and_split():
    """The index on the card."""
    rows = [Row("a", "real", "train", 0)] * 2 + [Row("a", "swap", "train", 1)]

    assert (Portion("a", "real", "train", 2), Portion("a", "swap", "train", 1)) == portions(rows)


class Row:
    """A row of an index."""

    def __init__(self, dataset: str, method: str, split: str, label: int) -> None:
        self.dataset, self.method, self.split, self.label = dataset, method, split, label


def test_golden_crops_may_come_from_the_caller(run: Path, tmp_path: Path):
    """Of the contract's size, and no other."""
    crops = MadeBatches()[0].crops.numpy()

    artifact = published(run, tmp_path, golden=crops, golden_source="eight made faces")

    assert np.array_equal(crops, golden(artifact).crops)
    assert "eight made faces" in artifact.file("card.md").read_text()
    with pytest.raises(ValueError, match="golden crops should be"):
        published(run, tmp_path, golden=crops[:, :, :16, :16])


def test_made_crops_are_always_the_same_and_no_two_alike():
    """Else a republished model would be a new version."""
    one = patterns(GOLDEN_CROPS, 32)

    assert np.array_equal(one, patterns(GOLDEN_CROPS, 32))
    assert len(one) == len(np.unique(one.reshape(len(one), -1), axis=0))


def test_without_validation_the_last_average_is_published(tmp_path: Path):
    """Without validation there are no best weights."""
    recipe = tiny("small_classifier", **{"schedule.steps": "2"})
    quiet = Options(quiet=True)
    train(recipe, MadeBatches(), None, tmp_path / "run", data_sha256="d" * 64, options=quiet)
    checkpoint = load(tmp_path / "run" / LAST)

    assert judged(tmp_path / "run").name == LAST
    average = checkpoint.part("average")
    assert all(torch.equal(average[name], tensor) for name, tensor in weights(checkpoint).items())
    assert not torch.equal(
        average["backbone.head.weight"], checkpoint.tensors["network.backbone.head.weight"]
    )


def test_a_folder_without_a_run_is_refused(tmp_path: Path):
    """Before anything is written."""
    with pytest.raises(CheckpointError, match="is it a folder of `ralf train`"):
        published(tmp_path, tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_the_card_names_first_weights_by_their_file_alone():
    """Where they lay on the trainer's machine is nobody's business."""
    recipe = named("ralf_small")
    init = recipe.init.replaced(
        backbone="/home/ann/weights/lite0.safetensors",
        network="/home/ann/runs/one,/home/ann/runs/two",
    )

    shown = without_places(recipe.replaced(init=init))

    assert shown.init.backbone == "lite0.safetensors"
    assert shown.init.network == "one,two"
    assert shown.init.perceptual == recipe.init.perceptual


def test_the_card_names_a_group_that_is_called_forged_far_more_often():
    """More than twice as often as the others; and a residual that shows nothing."""
    figures = {
        "group age 70+ false positives": [0.21, 0.12, 0.33],
        "group age 70+ others false positives": [0.10, 0.08, 0.12],
        "group age 20-29 false positives": [0.10, 0.07, 0.13],
        "group age 20-29 others false positives": [0.12, 0.10, 0.14],
        "residual inside the mask auc": [0.53, 0.5, 0.56],
    }

    age, residual = defects(figures)

    assert "age 70+ is called forged in 21.0% [12.0%, 33.0%], the others in 10.0%" in age
    assert "AUC 0.53" in residual
    assert [] == defects({"residual inside the mask auc": [0.8, 0.7, 0.9]})
