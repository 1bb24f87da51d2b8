"""From pictures to a promoted model: killed anywhere, resumed, and stopped at each gate."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ralf.__main__ import main
from ralf.kernels import artifact as models
from ralf.kernels import registry
from ralf.kernels.atomic_files import hold
from ralf.train import resumable, retrain, trainings
from ralf.train.loop import loop
from ralf.train.publish import targets_of
from ralf.train.resumable import Step, StepsDone, Stopped, do_steps, outlook
from tests.test_train_cli import TINY
from tests.training import MadeBatches

# A few steps from random weights are too few for running statistics to settle.
CHANGES = [*TINY, "epochs=4", "norms=batch"]
STEPS = ["train", "calibrate", "evaluate", "publish", "build", "verify", "promote"]

pytestmark = pytest.mark.usefixtures("one_thread")


class Killed(BaseException):
    """What nothing here may catch."""


@pytest.fixture(scope="module", autouse=True)
def _same_commit() -> Iterator[None]:
    """A manifest names the commit that trained it, and somebody may commit meanwhile."""
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


class Desk:
    """Where one retraining is typed."""

    def __init__(self, pictures: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.pictures, self.run, self.models = pictures, root / "run", root / "models"
        self._capsys = capsys
        self.out = self.err = ""

    def type(self, *more: str) -> int:
        """`ralf retrain … more`, and what it said."""
        changes = [part for change in CHANGES for part in ("--set", change)]
        command = ["retrain", "small_classifier", "--data", str(self.pictures), "--name", "made"]
        where = ["--out", str(self.run), "--models", str(self.models), "--device", "cpu"]
        try:
            return main([*command, "--targets", "cpu", *where, *changes, *more])
        finally:
            said = self._capsys.readouterr()
            self.out, self.err = said.out, said.err

    @property
    def repeated(self) -> list[str]:
        """The steps that the last command did."""
        lines = [line.removeprefix("ralf: ") for line in self.err.splitlines()]
        told = [line.split(":")[0] for line in lines if not line.endswith("done before")]
        return list(dict.fromkeys(name for name in told if name in STEPS))


@pytest.fixture
def desk(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Desk:
    """A clean one."""
    return Desk(pictures, tmp_path, capsys)


@pytest.fixture(scope="module")
def whole(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, models.Artifact]:
    """A retraining that nothing interrupted: its run and its model."""
    root = tmp_path_factory.mktemp("whole")
    changes = [part for change in CHANGES for part in ("--set", change)]
    command = ["retrain", "small_classifier", "--data", str(pictures), "--name", "made"]
    where = ["--out", str(root / "run"), "--models", str(root / "models"), "--device", "cpu"]
    assert 0 == main([*command, "--targets", "cpu", *where, *changes])
    return root / "run", models.resolve(root / "models", "made")


def test_the_walk_ends_in_a_promoted_model_that_knows_how_it_was_made(
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
    desk: Desk, whole: tuple[Path, models.Artifact], monkeypatch: pytest.MonkeyPatch
):
    """Training goes on from its checkpoint; no step that is on record is done again."""
    with monkeypatch.context() as patch:
        patch.setattr(trainings, "Batches", killing_at(5))
        with pytest.raises(Killed):
            desk.type()
    for number, name in enumerate(STEPS):
        for when in ("inside", "after"):
            with monkeypatch.context() as patch:
                patch.setattr(retrain, "steps", dying(name, when))
                with pytest.raises(Killed):
                    desk.type()
            # what was killed after its work, before its record, is done once more
            known = STEPS[:number] if when == "after" else STEPS[: max(0, number - 1)]
            assert set() == set(known) & set(desk.repeated), (name, when)
    assert 0 == desk.type()
    made = models.resolve(desk.models, "made")

    assert ["promote"] == desk.repeated
    assert whole[1].version == made.version
    assert ["promoted"] == [event.kind for event in registry.events(desk.models / "made")]
    assert 0 == desk.type()
    assert [] == desk.repeated
    assert made.version == json.loads(desk.out)["version"]


def killing_at(number: int) -> Any:
    """Batches that end the process when that one is asked for."""
    real = trainings.Batches

    class Killing(real):  # type: ignore[misc,valid-type]
        def __getitem__(self, asked: int) -> Any:
            if asked == number:
                raise Killed
            return super().__getitem__(asked)

    return Killing


def dying(name: str, when: str) -> Any:
    """The walk, dead before that step's work or between its work and its record."""
    real = retrain.steps

    def steps(order: Any) -> list[Step]:
        return [replace(s, work=work(s)) if s.name == name else s for s in real(order)]

    def work(step: Step) -> Any:
        def die(done: Mapping[str, Any]) -> Any:
            if when == "after":
                step.work(done)
            raise Killed(step.name)

        return die

    return steps


def test_a_gate_that_does_not_pass_says_what_was_asked_what_came_and_how_to_go_on(
    desk: Desk, pictures: Path
):
    """No time, no such split, worse than what is in place: each stops, and nothing is promoted."""
    assert 1 == desk.type("--minutes", "0")
    assert "asked: weights that validation has judged" in desk.err
    assert "the same command: ralf retrain small_classifier --data" in desk.err
    assert 1 == desk.type("--evaluate-on", "tset")
    assert "asked: rows of split tset" in desk.err
    assert "came: none; there are ['test', 'train', 'val']" in desk.err
    assert ["train", "calibrate", "evaluate"] == desk.repeated
    assert models.names(desk.models) == []

    publish_better(desk)
    assert 1 == desk.type()
    assert ["evaluate", "publish", "build", "verify", "promote"] == desk.repeated
    assert "asked: test_auc at least 1.9900" in desk.err
    assert "--force" in desk.err
    better = models.current(desk.models / "made")
    assert 0 == desk.type("--force")
    assert ["promote"] == desk.repeated
    assert better != models.current(desk.models / "made")
    assert "forced past metrics" in registry.events(desk.models / "made")[-1].remark


def publish_better(desk: Desk) -> None:
    """A version in place that nothing can reach."""
    draft = models.Manifest(name="made", network={"build": "ralf"}, files={},
                            metrics={"test_auc": 2.0})  # fmt: skip
    crops = np.zeros((1, 3, 32, 32), "uint8")
    golden = models.Golden(crops, np.zeros(1, "float32"))
    files: dict[str, bytes | Path] = {
        "weights.safetensors": b"w", "golden.npz": golden.to_bytes(), "card.md": b"better",
    }  # fmt: skip
    made = models.publish(desk.models, draft, files)
    registry.point_to(desk.models, "made", made.version)


def test_the_plan_is_shown_and_nothing_done(desk: Desk):
    """Not even the folder is made; a fault in what was typed is told."""
    assert 0 == desk.type("--dry-run")
    assert STEPS == [line.split()[2] for line in desk.out.splitlines()]
    assert {"to do"} == {line[:5] for line in desk.out.splitlines()}
    assert not desk.run.exists() and not desk.models.exists()
    assert 2 == desk.type("--dry-run", "--set", "nonsense")
    assert 2 == desk.type("--dry-run", "--targets", "toaster")


# the walk itself


def chain(counts: dict[str, int], **asks: Any) -> list[Step]:
    """Three steps that count how often they worked."""

    def step(name: str) -> Step:
        def work(done: Mapping[str, Any]) -> dict[str, Any]:
            counts[name] = counts.get(name, 0) + 1
            return {"after": sorted(done)}

        return Step(name, {"asked": asks.get(name)}, work, f"gate of {name}")

    return [step(name) for name in ("a", "b", "c")]


def test_another_question_repeats_its_step_and_what_follows(tmp_path: Path):
    """And nothing before it; the plan says so beforehand."""
    counts: dict[str, int] = {}
    done = do_steps(chain(counts), tmp_path, lambda text: None)
    assert {"a": {"after": []}, "b": {"after": ["a"]}, "c": {"after": ["a", "b"]}} == done
    asked = chain(counts, b="another")

    assert [True, False, False] == [known for _, known in outlook(asked, tmp_path)]
    do_steps(asked, tmp_path, lambda text: None)
    assert {"a": 1, "b": 2, "c": 2} == counts


def test_what_is_no_longer_there_is_made_again_with_what_follows(tmp_path: Path):
    """A version that somebody removed."""
    counts: dict[str, int] = {}
    do_steps(chain(counts), tmp_path, lambda text: None)
    first, second, third = chain(counts)
    do_steps(
        [first, replace(second, still_there=lambda facts: False), third],
        tmp_path,
        lambda text: None,
    )

    assert {"a": 1, "b": 2, "c": 2} == counts


def test_a_step_that_stops_leaves_those_before_it_done(tmp_path: Path):
    """The next command begins there."""
    counts: dict[str, int] = {}

    def stop(done: Mapping[str, Any]) -> dict[str, Any]:
        raise Stopped("more", "less", "try")

    first, second, third = chain(counts)
    with pytest.raises(Stopped, match=r"asked: more\n  came: less\n  to go on: try"):
        do_steps([first, replace(second, work=stop), third], tmp_path, lambda text: None)
    do_steps(chain(counts), tmp_path, lambda text: None)

    assert {"a": 1, "b": 1, "c": 1} == counts


def test_killed_while_the_journal_is_written_it_holds_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """At each flush and rename."""
    for number in range(1, 20):
        counts: dict[str, int] = {}
        run = tmp_path / str(number)
        with monkeypatch.context() as patch:
            left = [number]
            for name in ("fsync", "replace"):
                patch.setattr(os, name, counted(getattr(os, name), left))
            try:
                do_steps(chain(counts), run, lambda text: None)
            except Killed:
                pass
            else:
                break
        known = [step.name for step, done in outlook(chain(counts), run) if done]
        before = dict(counts)
        do_steps(chain(counts), run, lambda text: None)
        assert all(counts[name] == before.get(name, 0) + (name not in known) for name in "abc")
    assert number > 6


def counted(real: Any, left: list[int]) -> Any:
    """The function, dying when its turn has come."""

    def call(*args: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise Killed
        return real(*args, **options)

    return call


def test_two_do_not_work_in_one_folder(tmp_path: Path):
    """The second is told, at once."""
    held = hold(tmp_path)
    try:
        with pytest.raises(resumable.FolderBusy, match="another process retrains"):
            do_steps(chain({}), tmp_path, lambda text: None)
    finally:
        os.close(held)


def test_a_journal_that_is_none_is_refused(tmp_path: Path):
    """With what to do about it."""
    (tmp_path / "retrain.json").write_text('{"schema": "ralf.model/1"}')

    with pytest.raises(ValueError, match="remove it and every step but the training"):
        StepsDone(tmp_path)


def test_targets_are_known_by_name_and_in_order(monkeypatch: pytest.MonkeyPatch):
    """`all` is what this machine can build."""
    monkeypatch.setattr("ralf.kernels.build.available", lambda: ["torch-tensorrt", "rtx-aot"])

    assert ("cpu", "rtx-aot") == targets_of("rtx-aot, cpu", "cpu") == targets_of("all", "cpu")
    for wrong in ("", "cpu,toaster", "ALL"):
        with pytest.raises(ValueError, match="--targets takes all, or some of cpu"):
            targets_of(wrong, "cpu")
