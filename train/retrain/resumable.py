"""Steps that are done once: interrupted anywhere, the same command goes on with what is left.

    RUN/retrain.json    which steps are done, what each was asked, what came of it, and its minutes

A step counts as done as long as the same is asked of it and of all steps before it: another split
to evaluate on repeats evaluating and what follows, but not the training.  Every step but a training
starts anew when it was interrupted, and gives the same result; a training goes on from its
checkpoint.  The file is replaced in one move after each step.

Each step ends at a condition.  Where it does not hold, the step raises Stopped, and no later step
is begun.  What the steps of `ralf retrain` do is in ralf.train.retrain.steps.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ralf.kernels.atomic_files import replace_text, unused

RECORD = "retrain.json"
SCHEMA = "ralf.retrain/1"
Facts = dict[str, Any]
Say = Callable[[str], None]


class Stopped(Exception):
    """The condition at the end of a step does not hold."""

    def __init__(self, asked: str, came: str, go_on: str) -> None:
        self.asked, self.came, self.go_on = asked, came, go_on
        super().__init__(f"asked: {asked}\n  came: {came}\n  to go on: {go_on}")


class FolderBusy(ValueError):
    """Another process works in the same folder."""


@dataclass(frozen=True)
class Step:
    """One step: what is asked of it, and what it does."""

    name: str
    asks: Mapping[str, Any]
    """What changes this step's outcome and not that of an earlier step."""
    work: Callable[[Mapping[str, Facts]], Facts]
    """Takes the facts of the steps before, gives its own; raises Stopped."""
    condition: str
    """What has to hold at the end, in words."""
    still_there: Callable[[Facts], bool] = lambda facts: True
    """Whether what the step made still exists."""


class StepsDone:
    """The record of the steps that are done, on disk."""

    def __init__(self, run: Path) -> None:
        self._path = run / RECORD
        self._done: dict[str, Facts] = {}
        self._minutes: dict[str, float] = {}
        if self._path.exists():
            try:
                stored = json.loads(self._path.read_text())
                if stored["schema"] != SCHEMA:
                    raise ValueError(f"its schema is {stored['schema']!r}")
                self._done = dict(stored["done"])
                # Records written before steps were timed have none.
                self._minutes = dict(stored.get("minutes", {}))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{self._path} should be {SCHEMA}: {error}; remove it and every step but the "
                    "training is done again"
                ) from error

    def facts(self, step: Step, asked: str) -> Facts | None:
        """What came of a step; None where it has to be done."""
        stored = self._done.get(step.name)
        if stored is None or stored["asked"] != asked or not step.still_there(stored["facts"]):
            return None
        facts: Facts = stored["facts"]
        return facts

    def record(self, step: Step, asked: str, facts: Facts, later: list[str]) -> None:
        """Note a step as done, and the later ones as not done."""
        kept = {name: what for name, what in self._done.items() if name not in later}
        self._done = kept | {step.name: {"asked": asked, "facts": facts}}
        self._write()

    @contextmanager
    def timed(self, step: Step) -> Iterator[None]:
        """Add the minutes of the block to the step's own, also where it is interrupted."""
        began = time.monotonic()
        try:
            yield
        finally:
            spent = self._minutes.get(step.name, 0.0) + (time.monotonic() - began) / 60
            self._minutes[step.name] = round(spent, 3)
            self._write()

    def minutes(self, step: Step) -> float:
        """The minutes of a step over all commands."""
        return self._minutes.get(step.name, 0.0)

    def _write(self) -> None:
        document = {"schema": SCHEMA, "done": self._done, "minutes": self._minutes}
        replace_text(self._path, json.dumps(document, indent=2, allow_nan=False) + "\n")


def digests(steps: list[Step]) -> dict[str, str]:
    """For each step, the hash of what is asked of it and of all steps before it."""
    so_far = hashlib.sha256()
    found = {}
    for step in steps:
        # The hash goes on growing, so a step is asked anew when any step before it is.
        so_far.update(json.dumps([step.name, step.asks], sort_keys=True).encode())
        found[step.name] = so_far.hexdigest()
    return found


def outlook(steps: list[Step], run: Path) -> list[tuple[Step, bool]]:
    """Each step, and whether it is done; changes nothing."""
    record, asked = StepsDone(run), digests(steps)
    found, so_far = [], True
    for step in steps:
        # As do_steps does: after a step that is to do, every later one is to do.
        so_far = so_far and record.facts(step, asked[step.name]) is not None
        found.append((step, so_far))
    return found


def do_steps(steps: list[Step], run: Path, say: Say) -> dict[str, Facts]:
    """Do in order what is not done yet; the facts of all steps."""
    run.mkdir(parents=True, exist_ok=True)
    # A lock, not a file: it ends with the process, so a killed one blocks nobody.
    with unused(run) as free:
        if not free:
            raise FolderBusy(
                f"another process retrains in {run}; wait for it, or name another --out"
            )
        record, asked = StepsDone(run), digests(steps)
        done: dict[str, Facts] = {}
        redo = False
        for number, step in enumerate(steps):
            facts = None if redo else record.facts(step, asked[step.name])
            if facts is None:
                redo = True
                say(f"{step.name}: {step.condition}")
                with record.timed(step):
                    facts = step.work(done)
                # What was built on an older outcome of this step no longer counts.
                later = [each.name for each in steps[number + 1 :]]
                record.record(step, asked[step.name], facts, later)
                say(f"{step.name}: {record.minutes(step):.1f} minutes")
            else:
                say(f"{step.name}: done before")
            done[step.name] = facts
    return done
