"""When each frame is shown, computed from the packets' times, in display order.

Packets come in decoding order; sorted by presentation time they are the frames as shown.  Frames
that an edit list hides are left out, and so are frames before the first keyframe, because they
refer to pictures that are not in the file.  Flat arrays save memory: four hours at 300 frames/s
are 40 MB.
"""

from array import array
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ralf.worker.errors import CorruptMedia, TooManyFrames
from ralf.worker.settings import Settings


@dataclass
class PacketTimes:
    """The times of all packets in the order they came; ticks are the stream's unit of time."""

    ticks: "array[int]" = field(default_factory=lambda: array("q"))
    is_key: "array[int]" = field(default_factory=lambda: array("b"))
    is_shown: "array[int]" = field(default_factory=lambda: array("b"))
    keys: int = 0
    longest_last: int = 0
    """The duration that the packet which is shown last says of itself."""
    _last: int | None = None

    def add(self, tick: int | None, duration: int, is_key: bool, is_shown: bool) -> None:
        """Add one packet; without a time of its own it follows the packet before."""
        if tick is None:
            # At least one tick, so that no two frames share a time.
            tick = self.ticks[-1] + max(1, duration) if self.ticks else 0
        self.ticks.append(tick)
        self.is_key.append(is_key)
        self.is_shown.append(is_shown)
        self.keys += is_key
        if is_shown and (self._last is None or tick >= self._last):
            self._last, self.longest_last = tick, duration


@dataclass(frozen=True)
class FrameTimes:
    """The frames in display order; the first is at 0.0."""

    times_s: NDArray[np.float64]
    keyframes: NDArray[np.int64]
    start_s: float
    duration_s: float
    rate: float
    variable: bool
    early: int
    """Frames before the first keyframe, left out."""

    def refuse_rate(self, settings: Settings) -> None:
        """Refuse more frames than the highest rate gives in this time and one second more."""
        span = float(self.times_s[-1])
        if len(self.times_s) > settings.max_frame_rate * (span + 1):
            raise TooManyFrames(
                f"{len(self.times_s)} frames in {span:.3f} s; at most "
                f"{settings.max_frame_rate:g} a second are taken (RALF_MAX_FRAME_RATE)"
            )


def frame_times(packets: PacketTimes, base: float, claimed_rate: float) -> FrameTimes:
    """The frames that can be shown; `base` is the length of a tick in seconds.

    `claimed_rate` is the container's; it is used only for a single frame, which has no gap.
    """
    if not packets.ticks:
        raise CorruptMedia("the video stream holds no frame")
    if not packets.keys:
        raise CorruptMedia(f"no keyframe in {len(packets.ticks)} frames: nothing can be decoded")
    ticks, keys, early = _shown(packets)
    times = (ticks - ticks[0]) * base
    span = float(times[-1])
    if len(times) > 1 and span <= 0:
        raise CorruptMedia(f"0 frames a second: all {len(times)} frames are shown at one instant")
    gaps = np.diff(times)
    typical = float(np.median(gaps)) if len(gaps) else 1 / claimed_rate if claimed_rate > 0 else 0.0
    return FrameTimes(
        times_s=times,
        keyframes=keys,
        start_s=float(ticks[0]) * base,
        duration_s=span + (packets.longest_last * base or typical),
        rate=(len(times) - 1) / span if len(times) > 1 else claimed_rate,
        # The container's tick may round each gap up or down by one.
        variable=bool(len(gaps) and np.abs(gaps - typical).max() > max(typical / 10, 2 * base)),
        early=early,
    )


def _shown(packets: PacketTimes) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """Ticks in display order, which of them are keyframes, how many were left out at the start."""
    ticks = np.asarray(packets.ticks, dtype=np.int64)
    is_key = np.asarray(packets.is_key, dtype=bool)
    first_key = int(np.argmax(is_key))
    usable = ticks >= ticks[first_key]
    usable[:first_key] = False
    early = int(len(ticks) - usable.sum())
    usable &= np.asarray(packets.is_shown, dtype=bool)
    if not usable.any():
        raise CorruptMedia(f"the edit list hides every one of {len(ticks)} frames")
    ticks, is_key = ticks[usable], is_key[usable]
    # Stable, so that frames which share a time keep their order in the file.
    order = np.argsort(ticks, kind="stable")
    return ticks[order], np.flatnonzero(is_key[order]), early
