"""A benchmark's record: what was measured, on what, and how; one JSON document a run.

Speed is given as ratios between functions measured in one run with interleaved turns, so that a
machine that slows down slows all of them.  Medians and p95 over repeats; warm-ups excluded.
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
from typing import TYPE_CHECKING, Any

from ralf.kernels.machine import processor

if TYPE_CHECKING:
    import torch

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

    def save(self, folder: str | None, device: str) -> None:
        """Print it; with a folder, write it there too, as THEME_DEVICE_YEARMONTH.json."""
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
        # So that a reader can tell a record made on a busy machine.
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

    A turn is `calls` calls and then `settle`, which waits for a device that works asynchronously.
    The turn's time is divided by `calls`.
    """
    spent: dict[str, list[float]] = {name: [] for name in ways}
    # Turns below zero are the warm-ups.
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


def gpu_facts(device: "torch.device") -> dict[str, Any]:
    """Name, limits and versions of a GPU; of a CPU only the threads, `machine` has the rest."""
    import torch

    if device.type == "cpu":
        return {"device": "cpu", "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(device)
    asked = nvidia_smi(device, "driver_version", "power.limit", "clocks.max.sm")
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        **asked,
    }


def nvidia_smi(device: "torch.device", *fields: str) -> dict[str, str]:
    """The GPU's fields by nvidia-smi; nothing where that is missing."""
    command = ["nvidia-smi", f"--id={device.index or 0}", "--format=csv,noheader"]
    try:
        run = subprocess.run(
            [*command, f"--query-gpu={','.join(fields)}"],
            capture_output=True,
            text=True,
            check=False,
            timeout=20,
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return {}
    values = run.stdout.strip().split(", ") if run.returncode == 0 else []
    return dict(zip(fields, values, strict=False))


def short_name(device: "torch.device") -> str:
    """For file names: cpu2, h200."""
    if device.type == "cpu":
        return f"cpu{len(os.sched_getaffinity(0))}"
    import torch

    return torch.cuda.get_device_name(device).split()[-1].lower()


def settle(device: "torch.device") -> Callable[[], None]:
    """A function that waits until the device has finished its work."""
    if device.type == "cpu":
        return lambda: None
    import torch

    return lambda: torch.cuda.synchronize(device)


def captured(way: Callable[[], object], device: "torch.device") -> Callable[[], object]:
    """On a GPU the function's kernels as one graph, so that Python's launches are not measured."""
    if device.type == "cpu":
        return way
    import torch

    from ralf.kernels.cuda_graphs import capture

    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        # Libraries choose kernels and take memory at first calls, which cannot be captured.
        for _ in range(3):
            way()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with capture(graph, device, stream):
        way()
    replay: Callable[[], object] = graph.replay
    return replay
