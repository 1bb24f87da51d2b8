"""The commands of the training room, from pictures on disk to a calibrated model."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ralf.__main__ import main
from ralf.kernels.artifact import golden, resolve
from ralf.kernels.choose_engine import load as load_engine
from tests.training import MadeBatches

ROOT = Path(__file__).resolve().parent.parent
TINY = [
    "network.size=32", "data.input.size=32", "init.backbone=none", "batch=8", "epochs=2",
    "ema=0.5", "norm_momentum=0.3", "families=none", "shares=none", "held_out=none",
    "precision=fp32", "jpeg=0", "h264=0", "resize=0", "blur=0", "noise=0", "augment.colour=0",
    "optimiser.lr=0.003", "margins=none",
]  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ and val/, each with real/ and fake/; a test/ that nobody could read."""
    root = tmp_path_factory.mktemp("pictures")
    for kind in ("real", "fake"):
        (root / "test" / kind).mkdir(parents=True)
        (root / "test" / kind / f"sealed_{kind}.png").write_bytes(b"not a picture")
    for split, numbers in (("train", (0, 1, 2)), ("val", (10, 11))):
        for number in numbers:
            batch = MadeBatches()[number]
            for row, crop in enumerate(batch.crops):
                kind = "fake" if batch.forged[row] else "real"
                folder = root / split / kind
                folder.mkdir(parents=True, exist_ok=True)
                picture = Image.fromarray(crop.permute(1, 2, 0).numpy())
                picture.save(folder / f"{split}{number}_{row}.png")
    return root


def train_command(pictures: Path, run: Path, *more: str) -> list[str]:
    """What a person types."""
    changes = [part for change in TINY for part in ("--set", change)]
    return [
        "train", "small_classifier", "--data", str(pictures), "--out", str(run),
        "--device", "cpu", *changes, *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    where = tmp_path_factory.mktemp("runs") / "run"
    assert main(train_command(pictures, where, "--set", "epochs=8")) == 0
    return where


def test_train_prints_one_json_line_and_goes_on_where_it_was(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Out of time at once, then to the end, then nothing left to do; test is never opened."""
    endings = []
    for more in (["--minutes", "0"], [], []):
        assert main(train_command(pictures, tmp_path / "run", *more)) == 0
        endings.append(json.loads(capsys.readouterr().out))

    assert [each["ending"] for each in endings] == ["out_of_time", "finished", "finished"]
    assert endings[0]["step"] == 0 < endings[1]["step"] == endings[2]["step"]
    assert endings[1]["validation"]["faces"] == 16
    assert endings[1]["best"] is not None


@pytest.mark.parametrize(("share", "said"), [("1", True), ("0.5", False)])
def test_training_says_when_forgeries_on_disk_are_left_out(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], share: str, said: bool
):
    """A recipe that blends all its forgeries would ignore one's own without a word."""
    more = ["--minutes", "0", "--set", "families=inner", "--set", f"blended_share={share}"]
    assert main(train_command(pictures, tmp_path / "run", *more)) == 0

    assert ("12 forged videos of split train are not trained on" in capsys.readouterr().err) == said


def test_publish_and_calibrate_make_versions_that_serve_the_same_logits(
    run: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """RUN to model, model to calibrated model; the golden faces come from the named collection."""
    models = tmp_path / "models"
    collection = json.loads((run / "recipe.json").read_text())["name"]
    assert collection == "small_classifier"
    publish = ["publish", str(run), "--name", "small", "--models", str(models), "--promote"]

    assert main([*publish, "--data", str(pictures), "--golden-from", dataset_of(pictures)]) == 0
    first = resolve(models, "small")
    assert str(first.path) == capsys.readouterr().out.strip()
    calibrate = ["calibrate", "small", "--models", str(models), "--device", "cpu"]
    assert main([*calibrate, "--data", str(pictures), "--conditions", "clean"]) == 0
    said = capsys.readouterr()

    second = resolve(models, f"small@{Path(said.out.strip()).name}")
    assert second.version != first.version
    assert second.weights_sha256 == first.weights_sha256
    assert second.manifest.calibration.fitted_on == "val: clean"
    assert "fpr_0.05:" in said.err and "too few faces to support it" in said.err
    assert "val chose these weights" in said.err
    assert "| train | 12 |" in first.file("card.md").read_text()
    kept = golden(second)
    assert kept.crops.shape[0] == 16  # eight real and eight forged are all there are in val
    logits = load_engine(second, "cpu", precision="fp32")(torch.from_numpy(kept.crops)).numpy()
    np.testing.assert_allclose(logits, kept.logits, atol=1e-4)


def test_calibrating_warns_of_a_split_that_chose_the_weights_and_of_no_other(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Where the last weights are taken, validation chose nothing."""
    run, models = tmp_path / "run", tmp_path / "models"
    assert main(train_command(pictures, run, "--set", "schedule.select=last")) == 0
    assert main(["publish", str(run), "--name", "small", "--models", str(models)]) == 0
    model = capsys.readouterr().out.splitlines()[-1]

    fit = ["calibrate", model, "--models", str(models), "--device", "cpu"]
    assert main([*fit, "--data", str(pictures)]) == 0

    assert resolve(models, model).manifest.trained["chosen_by"] == "last"
    assert "chose these weights" not in capsys.readouterr().err


def test_a_calibrated_score_speaks_of_videos_counted_once(run: Path, tmp_path: Path):
    """Frames are pooled as a verdict pools them, and a second condition is no second video."""
    for number in range(2):
        batch = MadeBatches()[20 + number]
        for row, crop in enumerate(batch.crops):
            kind = "fake" if batch.forged[row] else "real"
            folder = tmp_path / "films" / "test" / kind / f"{kind}{number}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(crop.permute(1, 2, 0).numpy()).save(folder / f"{row}.png")
    models = tmp_path / "models"
    assert main(["publish", str(run), "--name", "small", "--models", str(models), "--promote"]) == 0
    command = ["calibrate", "small", "--models", str(models), "--device", "cpu", "--split", "test"]

    assert main([*command, "--data", str(tmp_path / "films"), "--conditions", "clean,jpeg=95"]) == 0

    newest = max(models.glob("small/????????"), key=lambda path: path.stat().st_mtime_ns)
    manifest = resolve(models, f"small@{newest.name}").manifest
    assert manifest.calibration.fitted_on == "test: clean,jpeg=95"
    found = manifest.metrics["calibration"]["thresholds"]
    assert {2} == {each["faces"] for each in found.values()}


def test_people_on_both_sides_are_refused_unless_told(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """One person in train and val measures memory; --allow-leaks says that this is meant."""
    leaking = tmp_path / "leaking"
    shutil.copytree(pictures, leaking)
    shutil.copy(leaking / "train/real/train0_0.png", leaking / "val/real/train0_0.png")
    command = train_command(leaking, tmp_path / "run", "--minutes", "0")

    assert main(command) == 2
    assert "train0_0 is in train and val" in capsys.readouterr().err
    assert main([*command, "--allow-leaks"]) == 0


def dataset_of(pictures: Path) -> str:
    """What the layout calls the collection."""
    from ralf.train.data.layouts import read

    return read(pictures).rows[0].dataset


def test_calibrate_takes_a_table_of_scores(run: Path, tmp_path: Path):
    """One row a track or a video, label 1 forged: the scores that the verdict is made of."""
    models = tmp_path / "models"
    assert main(["publish", str(run), "--name", "small", "--models", str(models), "--promote"]) == 0
    table = tmp_path / "scores.csv"
    rng = np.random.default_rng(0)
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["video", "logit", "label"])
        for number in range(200):
            writer.writerow([number, rng.normal(2 * (number % 2), 1), number % 2])
    command = ["calibrate", "small", "--models", str(models), "--scores", str(table)]

    assert main([*command, "--fitted-on", "made clips"]) == 0

    newest = max(models.glob("small/????????"), key=lambda path: path.stat().st_mtime_ns)
    manifest = resolve(models, f"small@{newest.name}").manifest
    assert manifest.calibration.fitted_on == "made clips"
    assert manifest.calibration.shift == pytest.approx(1, abs=0.3)


def test_a_recipe_is_printed_without_data(capsys: pytest.CaptureFixture[str]):
    """To read before hours are spent on it."""
    assert main(["train", "ralf_paper", "--print", "--set", "epochs=3"]) == 0

    assert json.loads(capsys.readouterr().out)["schedule"]["epochs"] == 3


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["train", "nope"], "known: fdfl"),
        (["train", "ralf", "--set", "epochs"], "NAME=VALUE"),
        (["train", "ralf"], "--data PATH and --out RUN"),
        (["train", "ralf", "--data", "/nowhere", "--out", "run"], "no data at /nowhere"),
        (["publish", "/nowhere", "--name", "x"], "is it a folder of `ralf train`"),
        (["calibrate", "x"], "either --scores CSV or --data PATH"),
    ],
)
def test_a_refusal_is_one_line_and_exit_2(
    command: list[str], said: str, capsys: pytest.CaptureFixture[str]
):
    """What was expected, what came; no traceback."""
    assert main(command) == 2

    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


def test_the_help_of_every_command_of_training_is_instant():
    """It imports neither torch nor numpy."""
    program = """
import contextlib, io, sys
from ralf.__main__ import main
for command in (["train"], ["publish"], ["calibrate"], ["ensemble"], ["retrain"], ["evaluate"],
                ["data"], ["data", "check"], ["data", "clips"], ["data", "prepare"]):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        main([*command, "--help"])
    assert "usage: ralf " + command[0] in said.getvalue(), command
print(sorted({"torch", "numpy", "scipy", "sklearn", "pandas"} & set(sys.modules)))
"""
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )

    assert "[]" == run.stdout.strip()
