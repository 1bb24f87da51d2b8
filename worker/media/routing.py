"""Where a clip is decoded: on the CPU or on the GPU's decoder; the one place that says so.

First what DALI can take at all (`refusal`): a decoder that would number the frames otherwise, or
show them in other colours, is not asked.  Then what is sooner done (`route`).  Both are functions
of the probe alone and of how much is under way, so they need neither library nor GPU to be tested.

The cost of a clip is not the frames wanted but the frames read: everything from the keyframe that
governs a wanted frame up to it.  A long keyframe distance makes a few frames as dear as all, and a
clip of small pictures costs a GPU more to begin than a CPU to finish.  What is under way already
comes before it, so a full decoder sends the next clip to the other.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ralf.worker.media.types import Probe

Backend = Literal["cpu", "mixed"]
"""DALI's own words: `mixed` reads on the host and decodes on the GPU's NVDEC."""

CODECS: dict[Backend, frozenset[str]] = {
    "cpu": frozenset({"vp9", "mjpeg"}),
    "mixed": frozenset({"h264", "hevc", "vp9"}),
}
"""Not VP8: its hidden frames are packets, which DALI counts.  Not AV1: Hopper's NVDEC has none."""
CONTAINERS: dict[Backend, frozenset[str]] = {
    "cpu": frozenset({"mov", "matroska", "avi"}),
    "mixed": frozenset({"mov", "matroska"}),
}
"""Where a seek comes down on the keyframe that it names, which DALI takes for granted."""
PLANES = frozenset({"yuv420p", "yuvj420p"})
"""What NVDEC gives as it is; deeper and finer pictures it would cut down in its own way."""
LEAST_SIDE = 144
MOST_SIDE = {"h264": 4096, "hevc": 8192, "vp9": 8192}
"""Pictures that NVDEC takes, by its maker's tables."""
MOST_BYTES = 512 * 1024**2
"""DALI wants the whole file in the host's memory."""


@dataclass(frozen=True)
class Rates:
    """Pixels a second of 1080p H.264, one keyframe in 250; `ralf bench decode` prints its own.

    From one H200 with 16 cores: PyAV 1,287 frames/s on all cores, DALI 588 with one clip under
    way and 2,924 with eight.  `begin_s` was not measured on it: it stands for what a GPU loses on
    small clips elsewhere (torchcodec: 0.66 s against 0.11 s for ten frames of a 540p clip).
    """

    core: float = 1287 * 1920 * 1080 / 16
    gpu_alone: float = 588 * 1920 * 1080
    gpu_full: float = 2924 * 1920 * 1080
    begin_s: float = 0.3


RATES = Rates()


@dataclass(frozen=True)
class UnderWay:
    """Pixels that each decoder still has to read for others."""

    cpu: float = 0.0
    gpu: float = 0.0


@dataclass(frozen=True)
class Route:
    """Which decoder, and why."""

    decoder: Literal["pyav", "dali"]
    why: str


DEARNESS = {"h264": 1.0, "hevc": 1.5, "vp9": 1.4}
"""CPU seconds for the same frames read, H.264 being one: 0.084, 0.124 and 0.122 s for 71 frames of
640×360 with film grain at 1.3 to 1.9 Mbit/s, one thread; H.264's B-frames that nobody leans on are
skipped, VP9 has none."""


def refusal(probe: Probe, backend: Backend) -> str:
    """Why DALI may not decode this clip; empty where it may."""
    refusals: tuple[tuple[bool, str], ...] = (
        (probe.codec not in CODECS[backend], f"the codec {probe.codec}"),
        (probe.container not in CONTAINERS[backend], f"the container {probe.container}"),
        (backend == "mixed" and probe.pixel_format not in PLANES, f"{probe.pixel_format} pictures"),
        (backend == "mixed" and not _fits(probe), "pictures too small or too large for NVDEC"),
        (probe.colour_space == "rgb", "RGB pictures"),
        (backend == "mixed" and bool(probe.width % 2 or probe.height % 2), "odd sides"),
        (probe.interlaced, "interlaced pictures"),
        (probe.unshown > 0 or probe.start_s < 0, "frames that are not shown"),
        (bool((np.diff(probe.times_s) <= 0).any()), "frames that share a time"),
        (any(text.startswith("broken") for text in probe.warnings), "it is broken"),
        (any(text.startswith("streams") for text in probe.warnings), "several video streams"),
        (probe.size_bytes > MOST_BYTES, f"more than {MOST_BYTES} bytes"),
    )
    return next((why for refused, why in refusals if refused), "")


def _fits(probe: Probe) -> bool:
    sides = (probe.coded_width, probe.coded_height)
    return min(sides) >= LEAST_SIDE and max(sides) <= MOST_SIDE.get(probe.codec, 0)


def frames_read(probe: Probe, wanted: NDArray[np.int64]) -> int:
    """Frames a decoder goes through for the wanted ones: in each keyframe's group up to the last.

    A CPU leaves out those that no other leans on; that is not counted.
    """
    if not len(wanted):
        return 0
    group = np.searchsorted(probe.keyframes, wanted, side="right")
    last_of_group = np.flatnonzero(np.r_[np.diff(group) > 0, True])
    ends = wanted[last_of_group]
    starts = np.r_[0, probe.keyframes][group[last_of_group]]
    return int((ends - starts + 1).sum())


def pixels_read(probe: Probe, wanted: NDArray[np.int64]) -> float:
    """The same in pixels."""
    return float(frames_read(probe, wanted)) * probe.coded_width * probe.coded_height


def route(
    probe: Probe,
    wanted: NDArray[np.int64],
    *,
    cores: int,
    under_way: UnderWay = UnderWay(),
    rates: Rates = RATES,
) -> Route:
    """The decoder that will be done first with this clip."""
    refused = refusal(probe, "mixed")
    if refused:
        return Route("pyav", refused)
    pixels = pixels_read(probe, wanted)
    on_cpu = (under_way.cpu + pixels * DEARNESS[probe.codec]) / (cores * rates.core)
    on_gpu = rates.begin_s + max(
        pixels / rates.gpu_alone, (under_way.gpu + pixels) / rates.gpu_full
    )
    why = f"{on_cpu:.3f} s on the CPU, {on_gpu:.3f} s on the GPU"
    return Route("dali" if on_gpu < on_cpu else "pyav", why)
