"""When the forgery is in the clip: the segments of each track, and the clip in time bins.

Each sampled frame stands for the time until half-way to its neighbours, but for no more than
REACH_S on either side.  So where few frames are sampled, some time is covered by no frame, and the
timeline says that it was not sampled.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ralf.kernels.manifest import Calibration
from ralf.worker.contract import Segment, Timeline
from ralf.worker.scores import NO_TIMES, Floats, Ints, Reals, Scores, calibrated

REACH_S = 1.0
GAP_STEPS = 3.5
"""A face that is away for more than so many usual steps ends its segment."""
MAX_BINS = 240
BINS_MS = (100, 200, 250, 500, 1000, 2000, 5000, 10_000, 15_000, 30_000, 60_000)


@dataclass(frozen=True, eq=False)
class ScoredFrames:
    """The scores in order of time and the sampled frames they came from, in milliseconds."""

    scores: Scores
    time_ms: Ints  # [m]
    probability: Floats  # [m]
    counted: NDArray[np.bool_]  # [m] large enough
    frames_ms: Ints  # [n] the sampled frames, sorted, no two alike
    starts_ms: Floats  # [n] the time that each frame stands for
    ends_ms: Floats  # [n]
    step_ms: float
    """The usual distance of two sampled frames."""
    duration_ms: int
    calibration: Calibration

    @classmethod
    def of(
        cls,
        scores: Scores,
        sampled_s: Reals,
        duration_s: float,
        calibration: Calibration,
        min_face_px: int,
        *,
        again_s: Reals = NO_TIMES,
    ) -> "ScoredFrames":
        """sampled_s are the times of all sampled frames, again_s those of the second pass."""
        left = scores.box[:, 0]
        # By everything that can differ, so that the order in which the rows came means nothing; by
        # left edge before track number, because tracks are named in this order.
        order = np.lexsort((scores.logit, scores.track, left, scores.frame, scores.time_s))
        scores = scores.take(order)
        time_ms = milliseconds(scores.time_s)
        # The faces' own times too: searchsorted below must find the frame of each face.
        frames = np.unique(np.concatenate([milliseconds(np.asarray(sampled_s)), time_ms]))
        duration = max(milliseconds(np.array([duration_s]))[0], frames.max(initial=0))
        gaps = np.diff(frames).astype(np.float64)
        reach = 1000 * REACH_S
        half = np.minimum(gaps / 2, reach)
        first, last = frames[:1], frames[-1:]
        return cls(
            scores=scores,
            time_ms=time_ms,
            probability=calibrated(scores.logit, calibration),
            counted=scores.face_px >= min_face_px,
            frames_ms=frames,
            starts_ms=frames - np.concatenate([np.minimum(first, reach), half]),
            ends_ms=frames + np.concatenate([half, np.minimum(duration - last, reach)]),
            # Not of the second pass, whose frames are close together: a face that is seen in each
            # frame of the first pass would be torn apart between any two of them.
            step_ms=_usual_step(np.setdiff1d(frames, milliseconds(again_s)), 2 * reach),
            duration_ms=int(duration),
            calibration=calibration,
        )

    @property
    def longest_gap_ms(self) -> int:
        """The longest time between two sampled frames; of a single frame, the whole clip."""
        if len(self.frames_ms) < 2:
            return self.duration_ms
        return int(np.diff(self.frames_ms).max())


def _usual_step(frames_ms: Ints, otherwise: float) -> float:
    return float(np.median(np.diff(frames_ms))) if len(frames_ms) > 1 else otherwise


def milliseconds(seconds: Reals) -> Ints:
    """Whole milliseconds of the clip's clock, which begins at 0."""
    whole: Ints = np.maximum(np.rint(np.asarray(seconds, np.float64) * 1000), 0).astype(np.int64)
    return whole


def segments_of(name: str, votes: Ints, scored: ScoredFrames, forged_at: float) -> list[Segment]:
    """Stretches where at least two of three neighbouring faces are at or above the threshold.

    That is the median of three, and at an end the lower of the two: a lone high face makes no
    segment and a lone low one breaks none.  Only faces of the same unbroken presence are
    neighbours.
    """
    times = scored.time_ms[votes]
    splits = np.flatnonzero(np.diff(times) > GAP_STEPS * scored.step_ms) + 1
    found = []
    for rows in np.split(votes, splits):
        logits = scored.scores.logit[rows]
        padded = np.concatenate([[-np.inf], logits, [-np.inf]])
        # A missing neighbour counts as low, so a segment at an end needs two high faces there too.
        smooth = np.median(np.stack([padded[:-2], logits, padded[2:]]), axis=0)
        forged = calibrated(smooth, scored.calibration) >= forged_at
        edges = np.flatnonzero(np.diff(np.concatenate([[0], forged.astype(np.int8), [0]])))
        for start, end in edges.reshape(-1, 2):
            found.append(_segment(name, rows[start:end], smooth[start:end], scored))
    return found


def _segment(name: str, rows: Ints, smooth: Reals, scored: ScoredFrames) -> Segment:
    first, last = np.searchsorted(scored.frames_ms, scored.time_ms[rows[[0, -1]]])
    start = int(scored.starts_ms[first])
    # The smoothed logits are all at or above the threshold, so their mean is too.  A lone low face
    # inside could take the mean of the raw ones below it.
    mean = math.fsum(smooth) / len(smooth)
    return Segment(
        start_ms=start,
        end_ms=max(start + 1, int(scored.ends_ms[last])),
        track_id=name,
        score=float(calibrated(np.array([mean]), scored.calibration)[0]),
        peak_ms=int(scored.time_ms[rows[np.argmax(scored.scores.logit[rows])]]),
    )


def _bin_ms(duration_ms: int) -> int:
    for size in BINS_MS:
        if duration_ms <= size * MAX_BINS:
            return size
    minutes = math.ceil(duration_ms / (MAX_BINS * BINS_MS[-1]))
    return minutes * BINS_MS[-1]


def timeline_of(scored: ScoredFrames) -> Timeline:
    """Each sampled frame counts in its own bin, and in those whose middle it stands for."""
    size = _bin_ms(scored.duration_ms)
    bins = max(1, math.ceil(scored.duration_ms / size))
    best = np.full(len(scored.frames_ms), -1.0)
    frame = np.searchsorted(scored.frames_ms, scored.time_ms)
    np.maximum.at(best, frame[scored.counted], scored.probability[scored.counted])
    seen = np.bincount(frame, minlength=len(best))
    score = np.full(bins, -1.0)
    faces = np.full(bins, -1, np.int64)
    for place, time_ms in enumerate(scored.frames_ms):
        # A frame at the very end of the clip is on the border behind the last bin.
        own = min(int(time_ms // size), bins - 1)
        first = min(own, math.ceil(scored.starts_ms[place] / size - 0.5))
        last = max(own, math.floor(scored.ends_ms[place] / size - 0.5))
        part = slice(first, min(last, bins - 1) + 1)
        score[part] = np.maximum(score[part], best[place])
        faces[part] = np.maximum(faces[part], seen[place])
    return Timeline(
        bin_ms=size,
        score=tuple(float(value) if value >= 0 else None for value in score),
        faces=tuple(int(value) if value >= 0 else None for value in faces),
    )
