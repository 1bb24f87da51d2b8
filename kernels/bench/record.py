"""A benchmark's record: what was measured, on what, and how; one JSON document a run.

Speed is told as ratios between ways measured side by side in one run, their turns interleaved, so
that a machine that slows down slows them all.  Medians and p95 over repeats; warm-ups excluded.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ralf.kernels.machine import processor

PACKAGES = (
    "torch",
    "torchvision",
    "av",
    "facenet-pytorch",
    "rq",
    "redis",
    "torch-tensorrt",
    "tensorrt-rtx-cu13",
)
ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class Timing:
    """Seconds a turn took, over the repeats."""

    median_s: float
    p95_s: float
    repeats: int


@dataclass(frozen=True)
class Record:
    """One run."""

    theme: str
    machine: Mapping[str, Any]
    conditions: Mapping[str, Any]
    timings: Mapping[str, Timing]
    ratios: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    at: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def dump(self) -> str:
        """As indented JSON."""
        return json.dumps(asdict(self), indent=2)

    def publish(self, folder: str | None, device: str) -> None:
        """Print it; with a folder, keep it there too, as THEME_DEVICE_YEARMONTH.json."""
        print(self.dump())
        if folder is not None:
            path = Path(folder) / f"{self.theme}_{device}_{self.at[:7].replace('-', '')}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(self.dump() + "\n")
            print(f"kept as {path}", file=sys.stderr)


def machine() -> dict[str, Any]:
    """Processor, memory, versions, commit: what a reader needs to repeat the run."""
    facts: dict[str, Any] = {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "commit": _commit(),
    }
    for name in PACKAGES:
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            continue
    return facts


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return run.stdout.strip() or "unknown"


def interleave(
    ways: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    warmups: int = 1,
    calls: int = 1,
    settle: Callable[[], object] | None = None,
) -> dict[str, Timing]:
    """Time each way `repeats` times, in turns: a b c a b c …

    A turn is `calls` calls and then `settle`, which waits for a device that works behind one's
    back; its time is that of one call.
    """
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(-warmups, repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            for _ in range(calls):
                way()
            if settle is not None:
                settle()
            if turn >= 0:
                spent[name].append((time.perf_counter() - start) / calls)
    return {name: timing(seconds) for name, seconds in spent.items()}


def timing(seconds: list[float]) -> Timing:
    """Median and p95 of the repeats."""
    ordered = sorted(seconds)
    p95 = ordered[min(len(ordered) - 1, round(0.95 * (len(ordered) - 1)))]
    return Timing(round(statistics.median(ordered), 8), round(p95, 8), len(ordered))
