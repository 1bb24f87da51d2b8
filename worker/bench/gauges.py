"""What a run used of the machine: processor, GPU, the GPU's video decoder, and peak memory.

The GPU's figures come from nvidia-smi, which reports five times a second.  Without nvidia-smi they
are absent, never zero.  The peak memory comes from getrusage, because psutil has none on Linux.
"""

import contextlib
import resource
import statistics
import subprocess
import threading
import time
from types import TracebackType

import psutil
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
        self._cpu_s, self._start = sum(psutil.Process().cpu_times()[:2]), time.perf_counter()
        if self.device.type == "cuda":
            with contextlib.suppress(FileNotFoundError):
                self._process = subprocess.Popen(
                    [*query(self.device)], stdout=subprocess.PIPE, text=True
                )
        if self._process is not None:
            # It empties the pipe: nvidia-smi would block once that is full.
            self._reader = threading.Thread(target=self._read, args=(self._process,), daemon=True)
            self._reader.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        wall = time.perf_counter() - self._start
        process = psutil.Process()
        if self._process is not None and self._reader is not None:
            # Before the join: the reader ends when the other end of its pipe is closed.
            self._process.terminate()
            self._process.wait()
            self._reader.join()
        self.used = {
            "cpu_cores": round((sum(process.cpu_times()[:2]) - self._cpu_s) / wall, 2),
            # In KiB on Linux; the peak of the whole process, not of this block alone.
            "rss_peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
            **_summary(self._lines),
        }

    def _read(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            self._lines += lines


def query(device: torch.device) -> list[str]:
    # By UUID: CUDA_VISIBLE_DEVICES changes torch's numbers and not those of nvidia-smi.
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


def held(device: str) -> dict[str, float]:
    """What this process holds now: memory in MiB, open files."""
    process = psutil.Process()
    now = {"rss_mib": process.memory_info().rss / 2**20, "files": float(process.num_fds())}
    if torch.device(device).type == "cuda":
        # The whole device: what DALI or TensorRT allocates is not in torch's own figures.
        free, total = torch.cuda.mem_get_info(device)
        now["vram_mib"] = (total - free) / 2**20
    return now
