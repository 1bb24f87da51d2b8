"""Which frames of a clip are decoded and judged: a Sampling turned into frame numbers.

Only presentation times count, so a variable frame rate needs no special case, and every decoder
gets the same frames.
"""

import math

import numpy as np
from numpy.typing import NDArray

from ralf.worker.contract import Sampling, Span
from ralf.worker.errors import BadRequest, TooManyPixels
from ralf.worker.media.types import Clip, Probe
from ralf.worker.settings import Settings

GAP_S = 10.0
"""A long clip is sampled so often, because a forgery of this length matters to people."""

LOOKS, LOOK_S, STEP_S = 8, 2.0, 0.5
"""The second pass: moments that it looks at, how far around each, and how closely."""
LOOK_FRAMES = round(2 * LOOK_S / STEP_S)


def plan(clip: Clip) -> NDArray[np.int64]:
    """Numbers of the frames that the clip's sampling asks for, ascending, each once.

    The spans are cut into equal time bins; of each bin the frame on screen at its centre is taken,
    if it is inside the span.  `fps` makes as many bins as that rate has frames, at most max_frames;
    `keyframes` takes the spans' keyframes, evenly thinned.  A span in which no frame begins gets
    the frame that is on screen then.
    """
    probe, sampling = clip.probe, clip.sampling
    times = probe.times_s
    # A still lasts no time, so it cannot be cut into bins.
    if len(times) == 1:
        return np.zeros(1, np.int64)
    spans = _spans(clip)
    lengths = spans[:, 1] - spans[:, 0]
    if sampling.mode == "keyframes":
        keys = probe.keyframes
        inside = (times[keys, None] >= spans[:, 0]) & (times[keys, None] < spans[:, 1])
        keys = keys[inside.any(1)]
        if len(keys):
            count = min(len(keys), sampling.max_frames)
            return keys[_centres(count, len(keys)).astype(np.int64)]
    count = sampling.max_frames
    if sampling.mode == "fps":
        count = min(count, _at_rate(clip, spans))
    elif sampling.mode == "keyframes":
        count = min(count, len(spans))
    return _on_screen(times, spans, _centres(count, float(lengths.sum())))


def for_long_clip(
    sampling: Sampling, probe: Probe, *, most_frames: int, most_pixels: float
) -> Sampling:
    """The same sampling, but of a long clip more frames, so that gaps are GAP_S at most.

    Never more than most_frames, nor frames that cost more than most_pixels to decode: then the
    gaps stay longer, and the verdict warns.
    """
    wanted = min(math.ceil(probe.duration_s / GAP_S), most_frames)
    while sampling.mode == "uniform" and wanted > sampling.max_frames:
        finer = sampling.model_copy(update={"max_frames": wanted})
        # Computed each time, because the cost does not fall in step with the frames: a wanted frame
        # costs all frames since its keyframe.
        if pixels_read(probe, plan(Clip(probe, finer))) <= most_pixels:
            return finer
        wanted //= 2
    return sampling


def second_look(
    probe: Probe, times_s: NDArray[np.float64], sampled_s: NDArray[np.float64], most_pixels: float
) -> Sampling | None:
    """Frames around these moments, the most important first; None where there are none.

    Around a sampled frame, frames STEP_S apart, up to LOOK_S away and not beyond the sampled
    frames beside it, so a forgery of a second or two that the frame touches gets several scores.
    At most LOOKS moments, and fewer where decoding would cost more than most_pixels.
    """
    windows: list[tuple[float, float]] = []
    for moment in times_s:
        at = int(np.searchsorted(sampled_s, moment))
        before = sampled_s[at - 1] if at else 0.0
        after = sampled_s[at + 1] if at + 1 < len(sampled_s) else probe.duration_s
        start, end = max(before, moment - LOOK_S), min(after, moment + LOOK_S)
        if end - start > LOOK_S and not any(s < end and start < e for s, e in windows):
            windows.append((float(start), float(end)))
        if len(windows) == LOOKS:
            break
    while windows:
        finer = Sampling(
            max_frames=round(sum(end - start for start, end in windows) / STEP_S),
            spans=tuple(
                Span(start_ms=round(1000 * start), end_ms=round(1000 * end))
                for start, end in windows
            ),
        )
        if pixels_read(probe, plan(Clip(probe, finer))) <= most_pixels:
            return finer
        windows.pop()
    return None


def frames_read(probe: Probe, wanted: NDArray[np.int64]) -> int:
    """Frames that are read for the wanted ones: from each keyframe up to the last wanted frame.

    The CPU decoder skips frames that no other refers to; that is not counted.
    """
    if not len(wanted):
        return 0
    group = np.searchsorted(probe.keyframes, wanted, side="right")
    last_of_group = np.flatnonzero(np.r_[np.diff(group) > 0, True])
    ends = wanted[last_of_group]
    # Before the first keyframe, which an edit list may hide, reading begins at the file's start.
    starts = np.r_[0, probe.keyframes][group[last_of_group]]
    return int((ends - starts + 1).sum())


def pixels_read(probe: Probe, wanted: NDArray[np.int64]) -> float:
    """The pixels of these frames: what decoding them costs, known before it begins."""
    return float(frames_read(probe, wanted)) * probe.coded_width * probe.coded_height


def refuse_work(pixels: float, settings: Settings) -> None:
    """Refuse a clip whose sampled frames cost too much to decode, before decoding begins."""
    if pixels > settings.max_decode_pixels:
        raise TooManyPixels(
            f"{pixels:.2g} pixels would have to be decoded for the sampled frames; at most "
            f"{settings.max_decode_pixels:.2g} are taken (RALF_MAX_DECODE_PIXELS); sample fewer "
            "frames, or encode the clip with more keyframes or smaller pictures"
        )


def thinning(clip: Clip) -> str | None:
    """The warning where mode `fps` asks for more frames than `max_frames` lets it have."""
    sampling = clip.sampling
    if sampling.mode != "fps" or len(clip.probe.times_s) == 1:
        return None
    asked = _at_rate(clip, _spans(clip))
    if asked <= sampling.max_frames:
        return None
    return (
        f"thinned_sampling: {sampling.fps or 1.0:g} frames a second are {asked} here, "
        f"max_frames is {sampling.max_frames}: these are spread evenly instead"
    )


def _at_rate(clip: Clip, spans: NDArray[np.float64]) -> int:
    """Frames that mode `fps` asks for over the spans."""
    length = float((spans[:, 1] - spans[:, 0]).sum())
    return max(1, round(length * (clip.sampling.fps or 1.0)))


def _centres(count: int, length: float) -> NDArray[np.float64]:
    return (np.arange(count, dtype=np.float64) + 0.5) * (length / count)


def _spans(clip: Clip) -> NDArray[np.float64]:
    """The spans in seconds [k, 2], cut to the clip, in order and joined where they overlap."""
    end = clip.probe.duration_s
    asked = sorted((s.start_ms / 1000, s.end_ms / 1000) for s in clip.sampling.spans)
    joined: list[list[float]] = []
    for start, stop in asked or [(0.0, end)]:
        if start >= end:
            break
        if joined and start <= joined[-1][1]:
            joined[-1][1] = max(joined[-1][1], min(stop, end))
        else:
            joined.append([start, min(stop, end)])
    if not joined:
        raise BadRequest(
            f"sampling.spans begin at {asked[0][0]:.3f} s, the clip lasts {end:.3f} s; "
            "ask for a span inside it"
        )
    return np.asarray(joined)


def _on_screen(
    times: NDArray[np.float64], spans: NDArray[np.float64], offsets: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Frames on screen at offsets into the spans laid end to end."""
    ends = np.cumsum(spans[:, 1] - spans[:, 0])
    # Rounding may put the last offset at the very end, behind every span.
    which = np.minimum(np.searchsorted(ends, offsets, side="right"), len(spans) - 1)
    at = spans[which, 1] - (ends[which] - offsets)
    shown = np.maximum(np.searchsorted(times, at, side="right") - 1, 0)
    low = np.searchsorted(times, spans[which, 0], side="left")
    high = np.searchsorted(times, spans[which, 1], side="left")
    inside = np.where(high > low, np.clip(shown, low, np.maximum(high - 1, low)), shown)
    first_of_its_time = np.searchsorted(times, times[inside], side="left")
    return np.unique(first_of_its_time).astype(np.int64)
