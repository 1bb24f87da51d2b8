"""What a benchmark's record says of the device it ran on, and how to wait for it."""

import os
import subprocess
from collections.abc import Callable
from typing import Any

import torch


def facts(device: torch.device) -> dict[str, Any]:
    """Name, limits and versions of a GPU; nothing for a CPU, which `machine` describes."""
    if device.type == "cpu":
        return {"device": "cpu", "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(device)
    asked = _asked(device, "driver_version", "power.limit", "clocks.max.sm")
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        **asked,
    }


def _asked(device: torch.device, *fields: str) -> dict[str, str]:
    """What nvidia-smi says of it; nothing where it is missing."""
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


def short_name(device: torch.device) -> str:
    """For file names: cpu2, h200."""
    if device.type == "cpu":
        return f"cpu{len(os.sched_getaffinity(0))}"
    return torch.cuda.get_device_name(device).split()[-1].lower()


def settle(device: torch.device) -> Callable[[], None]:
    """Waits until the device has done all it was given."""
    if device.type == "cpu":
        return lambda: None
    return lambda: torch.cuda.synchronize(device)


def captured(way: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """On a GPU the way's kernels as one graph, so that starting them from Python costs nothing."""
    if device.type == "cpu":
        return way
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            way()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        way()
    replay: Callable[[], object] = graph.replay
    return replay
