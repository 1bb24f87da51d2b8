"""The machine at hand: its processor, its GPU, and the TensorRT runtimes that are installed."""

import os
import platform
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ralf.kernels.plans import Device, Flavour

if TYPE_CHECKING:
    import torch

DISTRIBUTIONS: dict[Flavour, tuple[str, ...]] = {
    "trt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "rtx": ("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12"),
}
MODULES: dict[Flavour, str] = {"trt": "tensorrt", "rtx": "tensorrt_rtx"}


def describe(device: "torch.device") -> Device:
    """What plans and fastest.json need to know of a torch device."""
    if device.type == "cpu":
        # The cores that this process may use: in a cpuset fewer than the machine has.
        cores = len(os.sched_getaffinity(0))
        return Device(f"{processor()} ({cores} cores)", "cpu")
    import torch

    properties = torch.cuda.get_device_properties(device)
    architecture = f"sm{properties.major}{properties.minor}"
    return Device(properties.name, architecture, installed_runtimes())


def installed_runtimes() -> dict[Flavour, str]:
    """The TensorRT flavours that this Python can import, and their versions; imports neither."""
    found: dict[Flavour, str] = {}
    for flavour, names in DISTRIBUTIONS.items():
        if find_spec(MODULES[flavour]) is None:
            continue
        # One module comes in several distributions, by CUDA version.
        for name in names:
            try:
                found[flavour] = version(name)
                break
            except PackageNotFoundError:
                continue
    return found


def processor() -> str:
    """The processor's name, as its maker gives it."""
    names = _cpuinfo("model name")
    return names[0] if names else platform.processor()


@lru_cache(maxsize=1)
def cpu_has_bf16() -> bool:
    """Whether this processor multiplies bf16 in hardware; emulated, it is slower than FP32."""
    # The first core's; where there are none (ARM has "Features"), the answer is no.
    flags = " ".join(_cpuinfo("flags")[:1]).split()
    return "avx512_bf16" in flags or "amx_bf16" in flags


def _cpuinfo(field: str) -> list[str]:
    """The field's value for each core; empty where the system has no /proc."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return [value.strip() for name, value in pairs if name.strip() == field]
