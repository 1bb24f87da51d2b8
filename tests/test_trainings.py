"""Trainings as processes of their own: run together, stopped together, none left alone."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from ralf.train.chain import Chain, Training
from ralf.train.data.layouts import read
from ralf.train.loop.checkpoint import BEST, load
from ralf.train.trainings import (
    ChainRun,
    Interrupted,
    TrainCommand,
    TrainingFailed,
    train_together,
)
from tests.test_retrain import pictures
from tests.test_train_cli import TINY

__all__ = ["pictures"]

SAYS = """
print('a word before')
print('{"ending": "finished", "step": %d}')
"""
STOPS_WHEN_ASKED = """
import json, pathlib, signal, sys, time
def stop(*_):
    pathlib.Path({mark!r}).with_suffix(".stopped").touch()
    sys.exit({code})
signal.signal(signal.SIGTERM, stop)
pathlib.Path({mark!r}).touch()
while True:
    time.sleep(0.05)
"""


@dataclass(frozen=True)
class Script(TrainCommand):
    """A short program in the place of `ralf train`."""

    program: str = ""

    @property
    def words(self) -> list[str]:
        """Python alone, without torch."""
        return [sys.executable, "-c", self.program]


def script(program: str) -> Script:
    return Script((), program=program)


def waiting(mark: Path, code: int = 130) -> Script:
    """One that runs until it is asked to stop; it touches `mark` when it has begun."""
    return script(STOPS_WHEN_ASKED.format(mark=str(mark), code=code))


def test_several_run_at_the_same_time_and_each_ones_last_line_comes_back(tmp_path: Path):
    """Each waits for the other to have begun, so one after the other would never end."""
    meet = (
        "import pathlib, time\n"
        "pathlib.Path({own!r}).touch()\n"
        "while not pathlib.Path({other!r}).exists(): time.sleep(0.01)\n"
    )
    marks = [str(tmp_path / "a"), str(tmp_path / "b")]
    programs = [
        meet.format(own=own, other=other) + SAYS % step
        for step, (own, other) in enumerate((marks, marks[::-1]))
    ]

    said = train_together([script(program) for program in programs])

    assert [{"ending": "finished", "step": step} for step in (0, 1)] == said


def test_when_one_fails_the_other_is_stopped_and_the_failed_one_named(tmp_path: Path):
    """It is asked to stop, not killed, so that its checkpoint is whole."""
    mark = tmp_path / "began"
    fails = script(
        f"import pathlib, time\nwhile not pathlib.Path({str(mark)!r}).exists(): time.sleep(0.01)\n"
        "raise SystemExit(7)"
    )

    with pytest.raises(TrainingFailed, match="exit code 7"):
        train_together([waiting(mark), fails])

    assert mark.with_suffix(".stopped").exists()


def test_a_signal_to_this_process_stops_all_of_them(tmp_path: Path):
    """Both are asked to stop, and it does not matter what they print."""
    marks = [tmp_path / "a", tmp_path / "b"]

    def signal_when_begun() -> None:
        while not all(mark.exists() for mark in marks):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=signal_when_begun)
    thread.start()
    with pytest.raises(Interrupted):
        train_together([waiting(marks[0]), waiting(marks[1], code=0)])
    thread.join()

    assert all(mark.with_suffix(".stopped").exists() for mark in marks)


def test_one_that_was_stopped_by_somebody_else_is_an_interruption(tmp_path: Path):
    """It saved its checkpoint, so the same command goes on."""
    with pytest.raises(Interrupted):
        train_together([script("raise SystemExit(130)")])


@pytest.mark.skipif(sys.platform != "linux", reason="a parent's death is signalled on Linux only")
def test_trainings_do_not_outlive_a_killed_parent(tmp_path: Path):
    """Else the same command, typed again, would train in the same folder beside them."""
    mark = tmp_path / "began"
    program = waiting(mark).program
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            (
                "import sys; from ralf.train.trainings import TrainCommand, train_together\n"
                "words = property(lambda self: [sys.executable, '-c', *self.arguments])\n"
                "TrainCommand.words = words\n"
                f"train_together([TrainCommand(({program!r},))])"
            ),
        ]
    )
    while not mark.exists():
        assert parent.poll() is None
        time.sleep(0.02)
    parent.kill()
    parent.wait()

    stopped = mark.with_suffix(".stopped")
    until = time.monotonic() + 60
    while not stopped.exists() and time.monotonic() < until:
        time.sleep(0.02)
    assert stopped.exists()


def test_a_stage_of_two_trains_in_processes_what_it_trains_here(pictures: Path, tmp_path: Path):
    """The same recipes, the same steps and figures; each in its own folder."""
    stage = tuple(
        Training(name, "small_classifier", {"seed": seed, "epochs": "1"})
        for name, seed in (("one", "1"), ("other", "2"))
    )
    last = Training("last", "small_classifier", network_from=("one",))
    changes = dict(change.split("=") for change in TINY if not change.startswith("epochs"))
    here = ChainRun(
        chain=Chain("pair", (stage, (last,))),
        data=(str(pictures),),
        index=read(pictures),
        run=tmp_path / "here",
        changes=changes,
        device="cpu",
        processes=1,
    )

    alone = here.train(stage)
    together = replace(here, run=tmp_path / "apart", processes=2).train(stage)

    for one, other in zip(alone, together, strict=True):
        assert Path(one["run"]).name == Path(other["run"]).name
        assert one["step"] == other["step"] > 0
        assert one["validation"]["auc"] == pytest.approx(other["validation"]["auc"], abs=0.01)
        assert load(Path(one["run"]) / BEST).recipe == load(Path(other["run"]) / BEST).recipe
    assert json.loads(json.dumps(together)) == together


def test_several_processes_of_one_training_are_torchruns():
    """The arguments reach `ralf train` as a person would type them."""
    words = TrainCommand(("ralf_small", "--out", "run"), processes=2).words

    assert ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"] == words[1:5]
    assert ["-m", "ralf", "train", "ralf_small", "--out", "run"] == words[5:]
