"""Every scored face of a clip, the level that stands for a track, and the calibrated score.

A track's level is the mean of the k largest logits among its m faces that count:
    top_half_mean  k = ⌈m/2⌉        the default
    mean           k = m
    trimmed_mean   k = m − ⌊m/5⌋    without the lowest fifth
    top_k_mean     k = min(K, m)
Why the top: a blurred, turned or covered face hides a forgery but does not make one, so errors lie
mostly at the low end.  Why still a mean: one bad frame must not decide.

More forged evidence never lowers a level, because k grows by 0 or 1 when m grows by 1:
  - raising a logit never lowers a sum of the k largest;
  - a new face at or above the level L leaves at least k·L over k, or k·L + L over k + 1;
  - for the same reason a new face that is itself at or above a threshold never takes a level from
    above that threshold to below it, even where the face is below L.
Trimming at both ends would break the second (eight 0 and one 9, then a 1: 1.0 falls to 0.125), so
trimmed_mean trims the low end only.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ralf.kernels.manifest import Aggregation, Calibration
from ralf.worker.wording import SCORE_DIGITS

Floats = NDArray[np.float64]
Reals = NDArray[np.floating[Any]]
"""What comes in may be of less precision than what is counted with."""
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]
Views = NDArray[np.int8]
NO_TIMES: Floats = np.zeros(0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """Every scored face: one row each, in any order."""

    time_s: Reals  # [m]
    frame: Ints  # [m] frame number in display order
    box: Reals  # [m, 4] x0 y0 x1 y1 in pixels of the displayed frame
    face_px: Reals  # [m] shorter side of the face's box
    confidence: Reals  # [m] the finder's
    track: Ints  # [m]
    logit: Reals  # [m] uncalibrated, positive is forged
    again: Flags = field(
        default_factory=lambda: np.zeros(0, np.bool_)
    )  # [m] from the second pass; none where not given

    view: Views = field(default_factory=lambda: np.zeros(0, np.int8))
    """[m] 0 clear, 1 occluded, 2 unusual pose (media/views.py); all clear where not given."""

    def __post_init__(self) -> None:
        m = len(self.logit)
        if not len(self.view):
            object.__setattr__(self, "view", np.zeros(m, np.int8))
        if not len(self.again):
            object.__setattr__(self, "again", np.zeros(m, np.bool_))
        for name in ("time_s", "frame", "face_px", "confidence", "track", "logit", "again", "view"):
            shape = np.shape(getattr(self, name))
            if shape != (m,):
                raise ValueError(f"{name} should have shape ({m},) as logit has, got {shape}")
        if np.shape(self.box) != (m, 4):
            raise ValueError(f"box should have shape ({m}, 4), got {np.shape(self.box)}")
        # A comparison with NaN is false, without an error: the NaN of a broken engine would become
        # a verdict.
        for name in ("time_s", "box", "face_px", "confidence", "logit"):
            if not np.isfinite(getattr(self, name)).all():
                raise ValueError(f"{name} should be finite; a NaN or infinity cannot be judged")

    def __len__(self) -> int:
        return len(self.logit)

    def __repr__(self) -> str:
        return f"Scores({len(self)} faces, {len(np.unique(self.track))} tracks)"

    @classmethod
    def none(cls) -> "Scores":
        """No face scored, which is an ordinary outcome."""
        return cls(
            time_s=np.zeros(0),
            frame=np.zeros(0, np.int64),
            box=np.zeros((0, 4)),
            face_px=np.zeros(0),
            confidence=np.zeros(0),
            track=np.zeros(0, np.int64),
            logit=np.zeros(0),
        )

    @classmethod
    def concat(cls, parts: Sequence["Scores"]) -> "Scores":
        """The rows of all parts; tracks of the same number are the same face."""
        parts = parts or (cls.none(),)
        return cls(
            **{name: np.concatenate([getattr(part, name) for part in parts]) for name in COLUMNS}
        )

    def take(self, rows: NDArray[np.int64] | NDArray[np.bool_]) -> "Scores":
        """Only these rows, in this order."""
        return Scores(**{name: getattr(self, name)[rows] for name in COLUMNS})


COLUMNS = ("time_s", "frame", "box", "face_px", "confidence", "track", "logit", "again", "view")


def for_level(rows: Ints, again: Flags, min_faces: int) -> Ints:
    """Those of a track's counted rows that its level is computed from.

    The second pass looks where scores are high, so its faces would raise the level of any long
    track.  They count for segments, and for a track that has too few faces without them.
    """
    first = rows[~again[rows]]
    return first if len(first) >= min_faces else rows


def level(logits: Reals, aggregation: Aggregation) -> float:
    """The logit that stands for a track; see the module for what each aggregation keeps."""
    m = len(logits)
    if m == 0:
        raise ValueError("a level needs at least one logit, got none")
    kept = {
        "top_half_mean": (m + 1) // 2,
        "mean": m,
        "trimmed_mean": m - m // 5,
        "top_k_mean": min(aggregation.k, m),
    }[aggregation.track]
    # fsum rounds once, so rounding keeps the promise above too: a larger logit never gives a
    # smaller sum.
    return math.fsum(np.sort(logits)[m - kept :]) / kept


def calibrated(logits: Reals, calibration: Calibration) -> Floats:
    """P(forged) of each logit, rounded as it is shown."""
    z = (np.asarray(logits, np.float64) - calibration.shift) / calibration.temperature
    rounded: Floats = np.round(0.5 * (1.0 + np.tanh(0.5 * z)), SCORE_DIGITS)  # never overflows
    return rounded


def video_score(scores: Scores, calibration: Calibration, aggregation: Aggregation) -> float | None:
    """A video's score: of its strongest track with faces enough to decide; None without one."""
    counted = scores.face_px >= aggregation.min_face_px
    rows = [np.flatnonzero(counted & (scores.track == one)) for one in np.unique(scores.track)]
    tracks = [scores.logit[for_level(own, scores.again, aggregation.min_faces)] for own in rows]
    # Calibration keeps the order of levels, so it is enough to calibrate the largest.
    levels = [level(own, aggregation) for own in tracks if len(own) >= aggregation.min_faces]
    return float(calibrated(np.array([max(levels)]), calibration)[0]) if levels else None
