"""What a run used of the machine: processor, GPU, its video decoder, and memory at its highest.

The GPU's figures come from nvidia-smi, asked five times a second in a process of its own; where
there is none they are absent, never zero.
"""

import contextlib
import os
import resource
import statistics
import subprocess
import threading
import time
from pathlib import Path
from types import TracebackType

import torch

QUERY = ("utilization.gpu", "utilization.decoder", "memory.used")
NAMES = ("gpu_percent", "nvdec_percent", "vram_peak_mib")
EVERY_MS = 200


class Gauges:
    """A block's use of the machine, in `used` once the block is over."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.used: dict[str, float] = {}
        self._lines: list[str] = []
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None

    def __enter__(self) -> "Gauges":
        self._cpu, self._wall = _cpu_s(), time.perf_counter()
        if self.device.type == "cuda":
            with contextlib.suppress(FileNotFoundError):
                self._process = subprocess.Popen(
                    [*_command(self.device)], stdout=subprocess.PIPE, text=True
                )
        if self._process is not None:
            self._reader = threading.Thread(target=self._read, args=(self._process,), daemon=True)
            self._reader.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        wall = time.perf_counter() - self._wall
        if self._process is not None and self._reader is not None:
            self._process.terminate()
            self._process.wait()
            self._reader.join()
        self.used = {
            "cpu_cores": round((_cpu_s() - self._cpu) / wall, 2),
            "rss_peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
            **_summary(self._lines),
        }

    def _read(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            self._lines += lines


def _command(device: torch.device) -> list[str]:
    uuid = torch.cuda.get_device_properties(device).uuid
    return [
        "nvidia-smi",
        f"--id=GPU-{uuid}",
        f"--query-gpu={','.join(QUERY)}",
        "--format=csv,noheader,nounits",
        f"--loop-ms={EVERY_MS}",
    ]


def _summary(lines: list[str]) -> dict[str, float]:
    """Means of the shares, the most of the memory; a column that says N/A is left out."""
    columns: list[list[float]] = [[], [], []]
    for line in lines:
        for column, text in zip(columns, line.split(","), strict=False):
            with contextlib.suppress(ValueError):
                column.append(float(text))
    return {
        name: round(max(column) if name.endswith("peak_mib") else statistics.fmean(column), 1)
        for name, column in zip(NAMES, columns, strict=True)
        if column
    }


def _cpu_s() -> float:
    times = os.times()
    return times.user + times.system


def held(device: str) -> dict[str, float]:
    """What this process holds right now: memory in MiB, open files."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    now = {
        "rss_mib": pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
        "files": float(sum(1 for _ in Path("/proc/self/fd").iterdir())),
    }
    if torch.device(device).type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        now["vram_mib"] = (total - free) / 2**20
    return now
