"""From pictures to a promoted model: killed anywhere, resumed, and stopped at each condition."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ralf.__main__ import main
from ralf.kernels import artifact as models
from ralf.kernels import registry
from ralf.train import trainings
from ralf.train.loop import loop
from ralf.train.publish.version import targets_of
from ralf.train.retrain import steps
from ralf.train.retrain.resumable import Step
from tests.test_train_cli import TINY
from tests.training import MadeBatches

# A few steps from random weights are too few for running statistics to settle.
CHANGES = [*TINY, "epochs=4", "norms=batch"]
STEPS = ["train", "calibrate", "evaluate", "publish", "build", "verify", "promote"]

pytestmark = pytest.mark.usefixtures("one_thread")


class Killed(BaseException):
    """An end that no code under test may catch."""


@pytest.fixture(scope="module", autouse=True)
def _same_commit() -> Iterator[None]:
    """The manifest names the commit, which may change while the tests run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "commit", lambda: "c" * 40)
        yield


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/, val/ and test/, each with real/ and fake/."""
    root = tmp_path_factory.mktemp("pictures")
    for split, numbers in (("train", (0, 1, 2)), ("val", (10, 11)), ("test", (20, 21))):
        for number in numbers:
            batch = MadeBatches()[number]
            batch.crops[batch.forged, 0] = 255  # red: nobody can miss it
            batch.crops[batch.forged, 1:] //= 4
            for row, crop in enumerate(batch.crops):
                folder = root / split / ("fake" if batch.forged[row] else "real")
                folder.mkdir(parents=True, exist_ok=True)
                picture = Image.fromarray(crop.permute(1, 2, 0).numpy())
                picture.save(folder / f"{split}{number}_{row}.png")
    return root


class Typed:
    """One retraining as it is typed: its folders, and what the last command printed."""

    def __init__(self, pictures: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.pictures, self.run, self.models = pictures, root / "run", root / "models"
        self._capsys = capsys
        self.out = self.err = ""

    def type(self, *more: str) -> int:
        """`ralf retrain … more`, and what it said."""
        changes = [part for change in CHANGES for part in ("--set", change)]
        command = ["retrain", "small_classifier", "--data", str(self.pictures), "--name", "made"]
        command += ["--least-people", "1"]
        where = ["--out", str(self.run), "--models", str(self.models), "--device", "cpu"]
        try:
            return main([*command, "--targets", "cpu", *where, *changes, *more])
        finally:
            said = self._capsys.readouterr()
            self.out, self.err = said.out, said.err

    @property
    def repeated(self) -> list[str]:
        """The steps that the last command did, in order."""
        lines = [line.removeprefix("ralf: ") for line in self.err.splitlines()]
        began = [line.split(":")[0] for line in lines if not line.endswith("done before")]
        return list(dict.fromkeys(name for name in began if name in STEPS))


@pytest.fixture(scope="module", autouse=True)
def _one_thread_for_the_file() -> Iterator[None]:
    """Sums have one order in each training, whatever an earlier file set: the bits are compared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def typed(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Typed:
    """A retraining in an empty folder."""
    return Typed(pictures, tmp_path, capsys)


@pytest.fixture(scope="module")
def whole(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, models.Artifact]:
    """A retraining that nothing interrupted: its run and its model."""
    root = tmp_path_factory.mktemp("whole")
    changes = [part for change in CHANGES for part in ("--set", change)]
    command = ["retrain", "small_classifier", "--data", str(pictures), "--name", "made"]
    command += ["--least-people", "1"]
    where = ["--out", str(root / "run"), "--models", str(root / "models"), "--device", "cpu"]
    assert 0 == main([*command, "--targets", "cpu", *where, *changes])
    return root / "run", models.resolve(root / "models", "made")


def test_it_ends_in_a_promoted_model_that_says_how_it_was_made(
    whole: tuple[Path, models.Artifact],
):
    """Calibration, figures on the test split, targets, the spread of its scores."""
    run, artifact = whole
    manifest = artifact.manifest
    done = json.loads((run / "retrain.json").read_text())["done"]

    assert STEPS == list(done)
    assert ("cpu",) == manifest.targets
    assert "val: clean" == manifest.calibration.fitted_on
    assert {"fpr_0.01", "fpr_0.05", "low"} == set(manifest.thresholds)
    assert manifest.metrics["test_auc"][0] > 0.9
    assert 16 == manifest.metrics["test_videos"]
    assert manifest.reference is not None
    assert (8, "real videos of split val") == (
        sum(manifest.reference.counts), manifest.reference.of,
    )  # fmt: skip
    assert "finished" == done["train"]["facts"]["ending"]


def test_killed_inside_and_after_each_step_it_comes_to_the_same_bits(
    typed: Typed, whole: tuple[Path, models.Artifact], monkeypatch: pytest.MonkeyPatch
):
    """Training goes on from its checkpoint; no step that is on record is done again."""
    with monkeypatch.context() as patch:
        patch.setattr(trainings, "Batches", killing_at(5))
        with pytest.raises(Killed):
            typed.type()
    for number, name in enumerate(STEPS):
        for when in ("inside", "after"):
            with monkeypatch.context() as patch:
                patch.setattr(steps, "all_steps", killed_at_step(name, when))
                with pytest.raises(Killed):
                    typed.type()
            # A step that was killed after its work but before its record is done once more.
            known = STEPS[:number] if when == "after" else STEPS[: max(0, number - 1)]
            assert set() == set(known) & set(typed.repeated), (name, when)
    assert 0 == typed.type()
    made = models.resolve(typed.models, "made")

    assert ["promote"] == typed.repeated
    assert whole[1].version == made.version
    assert ["promoted"] == [event.kind for event in registry.events(typed.models / "made")]
    assert 0 == typed.type()
    assert [] == typed.repeated
    assert made.version == json.loads(typed.out)["version"]


def killing_at(number: int) -> Any:
    """Batches that end the process when that one is asked for."""
    real = trainings.Batches

    class Killing(real):  # type: ignore[misc,valid-type]
        def __getitem__(self, asked: int) -> Any:
            if asked == number:
                raise Killed
            return super().__getitem__(asked)

    return Killing


def killed_at_step(name: str, when: str) -> Any:
    """The steps, of which one is killed before its work, or between its work and its record."""
    real = steps.all_steps

    def killing(order: Any) -> list[Step]:
        return [replace(s, work=work(s)) if s.name == name else s for s in real(order)]

    def work(step: Step) -> Any:
        def die(done: Mapping[str, Any]) -> Any:
            if when == "after":
                step.work(done)
            raise Killed(step.name)

        return die

    return killing


def test_a_condition_that_does_not_hold_says_what_was_asked_what_came_and_how_to_go_on(
    typed: Typed, pictures: Path
):
    """No time, no such split, worse than the promoted version: each stops, nothing is promoted."""
    assert 1 == typed.type("--minutes", "0")
    assert "asked: weights that validation has judged" in typed.err
    assert "the same command: ralf retrain small_classifier --data" in typed.err
    assert 1 == typed.type("--evaluate-on", "tset")
    assert "asked: rows of split tset" in typed.err
    assert "came: none; there are ['test', 'train', 'val']" in typed.err
    assert ["train", "calibrate", "evaluate"] == typed.repeated
    assert models.names(typed.models) == []

    publish_better(typed)
    assert 1 == typed.type()
    assert ["evaluate", "publish", "build", "verify", "promote"] == typed.repeated
    assert "asked: test_auc at least 1.9900" in typed.err
    assert "--force" in typed.err
    better = models.current(typed.models / "made")
    assert 0 == typed.type("--force")
    assert ["promote"] == typed.repeated
    assert better != models.current(typed.models / "made")
    assert "forced past metrics" in registry.events(typed.models / "made")[-1].remark


def test_a_handful_of_people_is_too_few_to_calibrate_on_or_to_measure_with(typed: Typed):
    """Unless the command says so; the message says how.  What it prints to go on is complete."""
    assert 1 == typed.type("--least-people", "9", "--workers", "1")
    assert "asked: at least 9 real people in split val" in typed.err
    assert "came: 8: too few" in typed.err and "--least-people 8" in typed.err
    again = typed.err.split("the same command: ")[1]
    assert "--workers 1" in again and "--least-people 9" in again
    assert models.names(typed.models) == []


def publish_better(typed: Typed) -> None:
    """Promote a version whose figures nothing can reach."""
    draft = models.Manifest(name="made", network={"build": "ralf"}, files={},
                            metrics={"test_auc": 2.0})  # fmt: skip
    crops = np.zeros((1, 3, 32, 32), "uint8")
    golden = models.Golden(crops, np.zeros(1, "float32"))
    files: dict[str, bytes | Path] = {
        "weights.safetensors": b"w", "golden.npz": golden.to_bytes(), "card.md": b"better",
    }  # fmt: skip
    made = models.publish(typed.models, draft, files)
    registry.point_to(typed.models, "made", made.version)


def test_a_dry_run_shows_the_steps_and_does_nothing(typed: Typed):
    """Not even the folder is made; a mistake in the command is refused."""
    assert 0 == typed.type("--dry-run")
    assert STEPS == [line.split()[2] for line in typed.out.splitlines()]
    assert {"to do"} == {line[:5] for line in typed.out.splitlines()}
    assert not typed.run.exists() and not typed.models.exists()
    assert 2 == typed.type("--dry-run", "--set", "nonsense")
    assert 2 == typed.type("--dry-run", "--targets", "toaster")


def test_targets_are_known_by_name_and_in_order(monkeypatch: pytest.MonkeyPatch):
    """`all` is what this machine can build."""
    monkeypatch.setattr("ralf.kernels.build.available", lambda: ["torch-tensorrt", "rtx-aot"])

    assert ("cpu", "rtx-aot") == targets_of("rtx-aot, cpu", "cpu") == targets_of("all", "cpu")
    for wrong in ("", "cpu,toaster", "ALL"):
        with pytest.raises(ValueError, match="--targets takes all, or some of cpu"):
            targets_of(wrong, "cpu")
