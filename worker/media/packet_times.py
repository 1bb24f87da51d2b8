"""When each frame is shown, from what its packets say: the clip's own clock, in display order.

Packets come in decoding order.  Sorted by presentation time they are the frames as shown; what an
edit list hides is left out, and so is what is shown before the first keyframe, since it leans on
pictures that are not in the file.  Kept as flat arrays: four hours at 300 frames/s are 40 MB.
"""

from array import array
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ralf.worker.errors import CorruptMedia, TooManyFrames
from ralf.worker.settings import Settings


@dataclass
class Seen:
    """The packets in the order they came; ticks are the stream's own unit of time."""

    ticks: "array[int]" = field(default_factory=lambda: array("q"))
    is_key: "array[int]" = field(default_factory=lambda: array("b"))
    is_shown: "array[int]" = field(default_factory=lambda: array("b"))
    keys: int = 0
    longest_last: int = 0
    """The duration that the packet shown last claims for itself."""
    _last: int | None = None

    def add(self, tick: int | None, duration: int, is_key: bool, is_shown: bool) -> None:
        """One packet; without any time it follows the one before."""
        if tick is None:
            tick = self.ticks[-1] + max(1, duration) if self.ticks else 0
        self.ticks.append(tick)
        self.is_key.append(is_key)
        self.is_shown.append(is_shown)
        self.keys += is_key
        if is_shown and (self._last is None or tick >= self._last):
            self._last, self.longest_last = tick, duration


@dataclass(frozen=True)
class Timeline:
    """Frames in display order, 0.0 at the first."""

    times_s: NDArray[np.float64]
    keyframes: NDArray[np.int64]
    start_s: float
    duration_s: float
    rate: float
    variable: bool
    early: int
    """Frames before the first keyframe, left out."""

    def refuse_rate(self, settings: Settings) -> None:
        """As many frames as the highest rate gives in this time, and one second of grace."""
        span = float(self.times_s[-1])
        if len(self.times_s) > settings.max_frame_rate * (span + 1):
            raise TooManyFrames(
                f"{len(self.times_s)} frames in {span:.3f} s; at most "
                f"{settings.max_frame_rate:g} a second are taken (RALF_MAX_FRAME_RATE)"
            )


def timeline(seen: Seen, base: float, claimed_rate: float) -> Timeline:
    """The frames that can be shown; `base` is the length of a tick in seconds.

    `claimed_rate` is the container's, asked only where a single frame has no gap to measure.
    """
    if not seen.ticks:
        raise CorruptMedia("the video stream holds no frame")
    if not seen.keys:
        raise CorruptMedia(f"no keyframe in {len(seen.ticks)} frames: nothing can be decoded")
    ticks, keys, early = _shown(seen)
    times = (ticks - ticks[0]) * base
    span = float(times[-1])
    if len(times) > 1 and span <= 0:
        raise CorruptMedia(f"0 frames a second: all {len(times)} frames are shown at one instant")
    gaps = np.diff(times)
    typical = float(np.median(gaps)) if len(gaps) else 1 / claimed_rate if claimed_rate > 0 else 0.0
    return Timeline(
        times_s=times,
        keyframes=keys,
        start_s=float(ticks[0]) * base,
        duration_s=span + (seen.longest_last * base or typical),
        rate=(len(times) - 1) / span if len(times) > 1 else claimed_rate,
        # a container's tick may round each gap up or down by one
        variable=bool(len(gaps) and np.abs(gaps - typical).max() > max(typical / 10, 2 * base)),
        early=early,
    )


def _shown(seen: Seen) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """Ticks in display order, which of them are keyframes, how many were cut at the start."""
    ticks = np.asarray(seen.ticks, dtype=np.int64)
    is_key = np.asarray(seen.is_key, dtype=bool)
    first_key = int(np.argmax(is_key))
    usable = ticks >= ticks[first_key]
    usable[:first_key] = False
    early = int(len(ticks) - usable.sum())
    usable &= np.asarray(seen.is_shown, dtype=bool)
    if not usable.any():
        raise CorruptMedia(f"the edit list hides every one of {len(ticks)} frames")
    ticks, is_key = ticks[usable], is_key[usable]
    order = np.argsort(ticks, kind="stable")
    return ticks[order], np.flatnonzero(is_key[order]), early
