"""From data to engines in one command: train → calibrate → evaluate → publish → build → verify →
promote.

    runs/…/retrain.json    which steps are done, what each was asked and what came of it

A step that is done is not done again, as long as what it was asked is still what is asked: another
split to evaluate on repeats evaluating and what follows, and leaves the training alone.  Kill it
anywhere and type the same command: training goes on from its checkpoint, every other step begins
anew and comes to the same.  The file is replaced in one move after each step.

Each step ends at a gate.  One that does not pass stops the walk and says what was asked, what came
and how to go on; nothing behind it has happened then.  What the steps do is in train.retrain_steps.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ralf.kernels.atomic_files import replace_text, unused

JOURNAL = "retrain.json"
SCHEMA = "ralf.retrain/1"
Facts = dict[str, Any]
Say = Callable[[str], None]


class Stopped(Exception):
    """A gate did not pass."""

    def __init__(self, asked: str, came: str, go_on: str) -> None:
        self.asked, self.came, self.go_on = asked, came, go_on
        super().__init__(f"asked: {asked}\n  came: {came}\n  to go on: {go_on}")


class Busy(ValueError):
    """Another process works in the same folder."""


@dataclass(frozen=True)
class Step:
    """One station: what it is asked, and what it does."""

    name: str
    asks: Mapping[str, Any]
    """Whatever changes its outcome and no earlier step's."""
    work: Callable[[Mapping[str, Facts]], Facts]
    """From the facts of the steps before to its own; raises Stopped."""
    gate: str
    """What has to hold for the walk to go on, in words."""
    there: Callable[[Facts], bool] = lambda facts: True
    """Whether what it made is still there."""


class Journal:
    """The steps that are done."""

    def __init__(self, run: Path) -> None:
        self._path = run / JOURNAL
        self._done: dict[str, Facts] = {}
        if self._path.exists():
            try:
                stored = json.loads(self._path.read_text())
                if stored["schema"] != SCHEMA:
                    raise ValueError(f"its schema is {stored['schema']!r}")
                self._done = dict(stored["done"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{self._path} should be {SCHEMA}: {error}; remove it and every step but the "
                    "training is done again"
                ) from error

    def facts(self, step: Step, asked: str) -> Facts | None:
        """What came of a step; None where it is to be done."""
        stored = self._done.get(step.name)
        if stored is None or stored["asked"] != asked or not step.there(stored["facts"]):
            return None
        facts: Facts = stored["facts"]
        return facts

    def record(self, step: Step, asked: str, facts: Facts, later: list[str]) -> None:
        """Done; those behind it are to be done again."""
        kept = {name: what for name, what in self._done.items() if name not in later}
        self._done = kept | {step.name: {"asked": asked, "facts": facts}}
        document = {"schema": SCHEMA, "done": self._done}
        replace_text(self._path, json.dumps(document, indent=2, allow_nan=False) + "\n")


def digests(steps: list[Step]) -> dict[str, str]:
    """For each step, the hash of what it and all before it are asked."""
    so_far = hashlib.sha256()
    found = {}
    for step in steps:
        so_far.update(json.dumps([step.name, step.asks], sort_keys=True).encode())
        found[step.name] = so_far.hexdigest()
    return found


def plan(steps: list[Step], run: Path) -> list[tuple[Step, bool]]:
    """Each step, and whether it is done; changes nothing."""
    journal, asked = Journal(run), digests(steps)
    found, so_far = [], True
    for step in steps:
        so_far = so_far and journal.facts(step, asked[step.name]) is not None
        found.append((step, so_far))
    return found


def walk(steps: list[Step], run: Path, say: Say) -> dict[str, Facts]:
    """Do what is to be done, in order; raises Stopped at a gate."""
    run.mkdir(parents=True, exist_ok=True)
    with unused(run) as free:
        if not free:
            raise Busy(f"another process retrains in {run}; wait for it, or name another --out")
        journal, asked = Journal(run), digests(steps)
        done: dict[str, Facts] = {}
        redo = False
        for number, step in enumerate(steps):
            facts = None if redo else journal.facts(step, asked[step.name])
            if facts is None:
                redo = True
                say(f"{step.name}: {step.gate}")
                facts = step.work(done)
                later = [each.name for each in steps[number + 1 :]]
                journal.record(step, asked[step.name], facts, later)
            else:
                say(f"{step.name}: done before")
            done[step.name] = facts
    return done
