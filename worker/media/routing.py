"""Which decoder takes a clip, the CPU's or the GPU's: the only place that decides it.

First, what DALI can decode at all (`refusal`): it is not used where it would number the frames
differently or show other colours.  Then, which decoder will finish first (`route`).  Both depend
only on the probe and on the work already in progress, so they are tested without DALI or a GPU.

The cost of a clip is the number of frames read, not of frames wanted: everything from the keyframe
before a wanted frame up to that frame.  With a long keyframe distance a few frames cost as much as
all of them, and for small pictures a GPU needs longer to start than a CPU to finish.  Work in
progress comes first, so when one decoder is busy the next clip goes to the other.

RoutedDecoder is the decoder that follows these rules.
"""

import copy
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import structlog
from numpy.typing import NDArray

from ralf.worker.errors import JobError
from ralf.worker.media.sampling import pixels_read, plan
from ralf.worker.media.types import Clip, Decoder, Frames, Probe

log = structlog.get_logger()

Backend = Literal["cpu", "mixed"]
"""DALI's names: `mixed` reads on the host and decodes on the GPU's NVDEC."""

CODECS: dict[Backend, frozenset[str]] = {
    "cpu": frozenset({"vp9", "mjpeg"}),
    "mixed": frozenset({"h264", "hevc", "vp9"}),
}
"""Without VP8, whose hidden frames DALI counts, and AV1, which Hopper's NVDEC does not decode."""
CONTAINERS: dict[Backend, frozenset[str]] = {
    "cpu": frozenset({"mov", "matroska", "avi"}),
    "mixed": frozenset({"mov", "matroska"}),
}
"""Containers in which a seek arrives at the keyframe it names, as DALI assumes."""
PLANES = frozenset({"yuv420p", "yuvj420p"})
"""Formats that NVDEC gives unchanged; it would reduce others in its own way."""
LEAST_SIDE = 144
MOST_SIDE = {"h264": 4096, "hevc": 8192, "vp9": 8192}
"""The largest pictures that NVDEC decodes, by NVIDIA's tables."""
MOST_BYTES = 512 * 1024**2
"""DALI needs the whole file in the host's memory."""


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
class InProgress:
    """Pixels that each decoder still has to read for other clips; the CPU's as H.264's."""

    cpu: float = 0.0
    gpu: float = 0.0


@dataclass(frozen=True)
class Route:
    """Which decoder, and why."""

    decoder: Literal["pyav", "dali"]
    why: str


RELATIVE_COST = {"h264": 1.0, "hevc": 1.5, "vp9": 1.4}
"""CPU seconds for the same frames read, relative to H.264.

0.084, 0.124 and 0.122 s for 71 frames of 640×360 with film grain at 1.3 to 1.9 Mbit/s, one thread.
H.264's B-frames that no frame refers to are skipped; VP9 has none.
"""


def refusal(probe: Probe, backend: Backend) -> str:
    """Why DALI may not decode this clip; empty where it may."""
    refusals: tuple[tuple[bool, str], ...] = (
        (probe.codec not in CODECS[backend], f"the codec {probe.codec}"),
        (probe.container not in CONTAINERS[backend], f"the container {probe.container}"),
        # DALI chooses the demuxer itself, by the content, among those that open other files too.
        (not probe.unmistakable, "a beginning that other demuxers may claim"),
        (backend == "mixed" and probe.pixel_format not in PLANES, f"{probe.pixel_format} pictures"),
        (backend == "mixed" and not _fits(probe), "pictures too small or too large for NVDEC"),
        (probe.colour_space == "rgb", "RGB pictures"),
        (backend == "mixed" and bool(probe.width % 2 or probe.height % 2), "odd sides"),
        (probe.interlaced, "interlaced pictures"),
        # DALI counts such frames too, so its numbers would name other pictures.
        (probe.unshown > 0 or probe.start_s < 0, "frames that are not shown"),
        (bool((np.diff(probe.times_s) <= 0).any()), "frames that share a time"),
        (any("is HDR" in text for text in probe.warnings), "HDR pictures"),
        (any(text.startswith("broken") for text in probe.warnings), "it is broken"),
        (any(text.startswith("streams") for text in probe.warnings), "several video streams"),
        (probe.size_bytes > MOST_BYTES, f"more than {MOST_BYTES} bytes"),
    )
    return next((why for refused, why in refusals if refused), "")


def cpu_cost(probe: Probe) -> float:
    """CPU seconds for a pixel of this clip, relative to H.264's; 1 where none was measured."""
    return RELATIVE_COST.get(probe.codec, 1.0)


def _fits(probe: Probe) -> bool:
    sides = (probe.coded_width, probe.coded_height)
    return min(sides) >= LEAST_SIDE and max(sides) <= MOST_SIDE.get(probe.codec, 0)


def route(
    probe: Probe,
    wanted: NDArray[np.int64],
    *,
    cores: int,
    in_progress: InProgress = InProgress(),
    rates: Rates = RATES,
) -> Route:
    """The decoder that will finish this clip first."""
    refused = refusal(probe, "mixed")
    if refused:
        return Route("pyav", refused)
    pixels = pixels_read(probe, wanted)
    on_cpu = (in_progress.cpu + pixels * cpu_cost(probe)) / (cores * rates.core)
    # One clip keeps one of the chip's decoders busy, so its own speed is a limit; with several
    # clips the limit is the whole chip.
    on_gpu = rates.begin_s + max(
        pixels / rates.gpu_alone, (in_progress.gpu + pixels) / rates.gpu_full
    )
    why = f"{on_cpu:.3f} s on the CPU, {on_gpu:.3f} s on the GPU"
    return Route("dali" if on_gpu < on_cpu else "pyav", why)


class RoutedDecoder:
    """Sends each clip to DALI or to PyAV; safe for several threads at once."""

    name = "routed"

    def __init__(self, pyav: Decoder, dali: Decoder, *, cores: int, rates: Rates = RATES) -> None:
        self.decoders: dict[str, Decoder] = {"dali": dali, "pyav": pyav}
        self.cores, self.rates = cores, rates
        self._pixels = {"dali": 0.0, "pyav": 0.0}
        self._lock = threading.Lock()

    def halved(self) -> "RoutedDecoder":
        """The same with chunks of half the size; both share the count of work in progress."""
        other = copy.copy(self)
        other.decoders = {name: decoder.halved() for name, decoder in self.decoders.items()}
        return other

    @property
    def in_progress(self) -> InProgress:
        """The work of the clips that each decoder has and has not finished."""
        with self._lock:
            return InProgress(cpu=self._pixels["pyav"], gpu=self._pixels["dali"])

    def decode(self, clips: Sequence[Clip]) -> Iterator[Frames]:
        """DALI's clips side by side, then PyAV's one after the other."""
        shares: dict[str, list[Clip]] = {"dali": [], "pyav": []}
        pixels = {"dali": 0.0, "pyav": 0.0}
        failed: list[JobError] = []
        try:
            for clip in clips:
                try:
                    decoder, cost = self._sent(clip)
                except JobError as error:  # its sampling cannot be planned
                    failed.append(error)
                    continue
                shares[decoder].append(clip)
                pixels[decoder] += cost
            for decoder, share in shares.items():
                try:
                    yield from self.decoders[decoder].decode(share)
                except JobError as error:
                    failed.append(error)
                # At once and not in `finally`: DALI's share is done, while PyAV's may take minutes
                # more.
                self._count(decoder, -pixels[decoder])
                pixels[decoder] = 0.0
        finally:
            # Also where the caller closes this generator in the middle of a clip.
            for decoder, cost in pixels.items():
                self._count(decoder, -cost)
        if failed:
            raise failed[0]

    def _sent(self, clip: Clip) -> tuple[str, float]:
        """The clip's decoder, and its cost, which is in progress there from now on."""
        wanted = plan(clip)
        busy = self.in_progress
        way = route(clip.probe, wanted, cores=self.cores, in_progress=busy, rates=self.rates)
        cost = pixels_read(clip.probe, wanted)
        if way.decoder == "pyav":  # in the unit of `route`, which compares what is in progress
            cost *= cpu_cost(clip.probe)
        self._count(way.decoder, cost)
        log.debug("decoder.chosen", decoder=way.decoder, why=way.why)
        return way.decoder, cost

    def _count(self, decoder: str, pixels: float) -> None:
        with self._lock:
            self._pixels[decoder] += pixels
