"""Which version a name means, and how it came to: promoted, rolled back, forced.

    models/NAME/current    the promoted version, one line, replaced atomically
    models/NAME/history    one line an event, oldest first: version, time, event, remark

The history is only ever added to, so what was forced stays on record; where a rollback leads is
found by playing the events: a promotion goes on the pile, a rollback takes one off.

The event is written before `current`.  Killed between the two, the last event has not happened:
nothing is on top of its pile that `current` names, and the next writer cuts it off.
"""

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from ralf.kernels.atomic_files import Damaged, replace_lines

VERSION = re.compile(r"[0-9a-f]{8}")
CURRENT, HISTORY = "current", "history"
Kind = Literal["promoted", "rolled_back"]
_KINDS: dict[str, Kind] = {"promoted": "promoted", "rolled_back": "rolled_back"}


@dataclass(frozen=True)
class Event:
    """A change of the promoted version."""

    version: str
    """The one in place afterwards."""
    at: str = ""
    """UTC; empty where an older release wrote it."""
    kind: Kind = "promoted"
    remark: str = ""
    """Which gates were overridden, and what they had said."""

    def line(self) -> str:
        """As it lies on disk."""
        return "\t".join((self.version, self.at, self.kind, " ".join(self.remark.split())))

    @classmethod
    def parse(cls, line: str) -> "Event | None":
        """From a line, None where it is none of ours."""
        version, at, kind, remark = (*line.rstrip("\n").split("\t"), "", "", "")[:4]
        if not VERSION.fullmatch(version):
            return None
        return cls(version, at, _KINDS.get(kind, "promoted"), remark)


def current(folder: Path) -> str | None:
    """The promoted version, None where none is; Damaged where the file names none."""
    try:
        text = (folder / CURRENT).read_text().strip()
    except FileNotFoundError:
        return None
    if not VERSION.fullmatch(text):
        raise Damaged(f"{folder / CURRENT} should hold a version, got {text[:40]!r}")
    return text


def events(folder: Path) -> list[Event]:
    """What has happened, oldest first, without what a dead writer only announced."""
    now = current(folder)
    if now is None:
        return []
    path = folder / HISTORY
    lines = path.read_text().splitlines() if path.exists() else []
    told = [event for event in map(Event.parse, lines) if event is not None]
    for happened in range(len(told), 0, -1):
        if pile(told[:happened])[-1:] == [now]:
            return told[:happened]
    return [Event(now)]


def pile(told: list[Event]) -> list[str]:
    """Promoted versions that a rollback leads through; the last is the current one."""
    found: list[str] = []
    for event in told:
        if event.kind == "rolled_back":
            found = found[:-1]
        elif found[-1:] != [event.version]:
            found = [*found, event.version]
    return found


def record(folder: Path, version: str, kind: Kind, remark: str = "") -> None:
    """Make a version the promoted one; the caller holds the folder's lock."""
    at = datetime.now(UTC).isoformat(timespec="seconds")
    told = [*events(folder), Event(version, at, kind, remark)]
    replace_lines(folder / HISTORY, [event.line() for event in told])
    replace_lines(folder / CURRENT, [version])
