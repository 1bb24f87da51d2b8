"""When: what each look at a clip speaks for, the stretches that look forged, the clip in bins.

A look is one sampled frame.  It speaks for the time half-way to its neighbours, but for no more
than REACH_S either side: a sparse sampling leaves time that nobody looked at, and says so.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ralf.kernels.manifest import Calibration
from ralf.worker.contract import Segment, Timeline
from ralf.worker.scores import Floats, Ints, Reals, Scores, calibrated

REACH_S = 1.0
BRIDGE = 3.5
"""A face unseen for more than so many usual steps ends its segment."""
MAX_BINS = 240
BINS_MS = (100, 200, 250, 500, 1000, 2000, 5000, 10_000, 15_000, 30_000, 60_000)


@dataclass(frozen=True, eq=False)
class Record:
    """The scores in time order, and the looks they came from, on one clock of milliseconds."""

    scores: Scores
    time_ms: Ints  # [m]
    probability: Floats  # [m]
    counted: NDArray[np.bool_]  # [m] large enough
    looks_ms: Ints  # [n] sorted, no two alike
    starts_ms: Floats  # [n] what each look speaks for
    ends_ms: Floats  # [n]
    step_ms: float
    """The usual distance of two looks."""
    duration_ms: int
    calibration: Calibration

    @classmethod
    def of(
        cls,
        scores: Scores,
        looked_s: Reals,
        duration_s: float,
        calibration: Calibration,
        min_face_px: int,
    ) -> "Record":
        left = scores.box[:, 0]
        order = np.lexsort((scores.logit, scores.track, left, scores.frame, scores.time_s))
        scores = scores.take(order)
        time_ms = milliseconds(scores.time_s)
        looks = np.unique(np.concatenate([milliseconds(np.asarray(looked_s)), time_ms]))
        duration = max(milliseconds(np.array([duration_s]))[0], looks.max(initial=0))
        gaps = np.diff(looks).astype(np.float64)
        reach = 1000 * REACH_S
        half = np.minimum(gaps / 2, reach)
        first, last = looks[:1], looks[-1:]
        return cls(
            scores=scores,
            time_ms=time_ms,
            probability=calibrated(scores.logit, calibration),
            counted=scores.face_px >= min_face_px,
            looks_ms=looks,
            starts_ms=looks - np.concatenate([np.minimum(first, reach), half]),
            ends_ms=looks + np.concatenate([half, np.minimum(duration - last, reach)]),
            step_ms=float(np.median(gaps)) if len(gaps) else 2 * reach,
            duration_ms=int(duration),
            calibration=calibration,
        )


def milliseconds(seconds: Reals) -> Ints:
    """Whole milliseconds of the clip's clock, which begins at 0."""
    whole: Ints = np.maximum(np.rint(np.asarray(seconds, np.float64) * 1000), 0).astype(np.int64)
    return whole


def segments_of(name: str, votes: Ints, record: Record, forged_at: float) -> list[Segment]:
    """Stretches where at least two of three neighbouring faces are at or above the threshold.

    That is the median of three, and at an end the lower of the two: a lone high face makes no
    segment and a lone low one breaks none.  Only faces of the same unbroken presence are
    neighbours.
    """
    times = record.time_ms[votes]
    parted = np.flatnonzero(np.diff(times) > BRIDGE * record.step_ms) + 1
    found = []
    for rows in np.split(votes, parted):
        logits = record.scores.logit[rows]
        padded = np.concatenate([[-np.inf], logits, [-np.inf]])
        smooth = np.median(np.stack([padded[:-2], logits, padded[2:]]), axis=0)
        hot = calibrated(smooth, record.calibration) >= forged_at
        edges = np.flatnonzero(np.diff(np.concatenate([[0], hot.astype(np.int8), [0]])))
        for start, end in edges.reshape(-1, 2):
            found.append(_segment(name, rows[start:end], smooth[start:end], record))
    return found


def _segment(name: str, rows: Ints, smooth: Reals, record: Record) -> Segment:
    first, last = np.searchsorted(record.looks_ms, record.time_ms[rows[[0, -1]]])
    start = int(record.starts_ms[first])
    stands = math.fsum(smooth) / len(smooth)
    return Segment(
        start_ms=start,
        end_ms=max(start + 1, int(record.ends_ms[last])),
        track_id=name,
        score=float(calibrated(np.array([stands]), record.calibration)[0]),
        peak_ms=int(record.time_ms[rows[np.argmax(record.scores.logit[rows])]]),
    )


def _bin_ms(duration_ms: int) -> int:
    for size in BINS_MS:
        if duration_ms <= size * MAX_BINS:
            return size
    minutes = math.ceil(duration_ms / (MAX_BINS * BINS_MS[-1]))
    return minutes * BINS_MS[-1]


def timeline_of(record: Record) -> Timeline:
    """Each look colours the bin it falls in and those whose middle it speaks for."""
    size = _bin_ms(record.duration_ms)
    bins = max(1, math.ceil(record.duration_ms / size))
    best = np.full(len(record.looks_ms), -1.0)
    look = np.searchsorted(record.looks_ms, record.time_ms)
    np.maximum.at(best, look[record.counted], record.probability[record.counted])
    seen = np.bincount(look, minlength=len(best))
    score = np.full(bins, -1.0)
    faces = np.full(bins, -1, np.int64)
    for place, time_ms in enumerate(record.looks_ms):
        own = min(int(time_ms // size), bins - 1)
        first = min(own, math.ceil(record.starts_ms[place] / size - 0.5))
        last = max(own, math.floor(record.ends_ms[place] / size - 0.5))
        part = slice(first, min(last, bins - 1) + 1)
        score[part] = np.maximum(score[part], best[place])
        faces[part] = np.maximum(faces[part], seen[place])
    return Timeline(
        bin_ms=size,
        score=tuple(float(value) if value >= 0 else None for value in score),
        faces=tuple(int(value) if value >= 0 else None for value in faces),
    )
