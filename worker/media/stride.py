"""Search for faces in each Nth frame only, and interpolate them in the frames between.

A face that is found in two searched frames in a row, at overlapping places, is interpolated on the
straight line between them: box, landmarks, and the smaller confidence of the two.  A face without
a partner in the next searched frame is not interpolated.  The first and the last frame of every
chunk are searched.  Frames further apart than GAP_S are all searched, because a face may have
moved anywhere meanwhile; so sampling a few frames of a long clip does not change.

Off unless RALF_FIND_EVERY is more than 1.  Verdicts made with it say that the finder is not the
one that the model was calibrated with.  `ralf bench pipeline` measures what it changes.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from ralf.worker.boxes import overlap
from ralf.worker.media.tracks import cheapest
from ralf.worker.media.types import FaceFinder, Faces, Frames

GAP_S = 0.25
"""Two searched frames are at most so far apart."""
LEAST_OVERLAP = 0.3


class StridedFinder:
    """A finder that searches each Nth frame."""

    def __init__(self, finder: FaceFinder, every: int) -> None:
        if every < 1:
            raise ValueError(f"every should be at least 1 frame, got {every}")
        self.finder, self.every = finder, every

    def find(self, frames: Frames) -> Faces:
        """Every face of the chunk, frame by frame; between two searched frames, interpolated."""
        rows = searched_rows(frames.times_s, self.every)
        if len(rows) == len(frames):
            return self.finder.find(frames)
        some = replace(
            frames,
            pixels=frames.pixels[torch.from_numpy(rows).to(frames.pixels.device)],
            times_s=frames.times_s[rows],
            indices=frames.indices[rows],
        )
        seen = self.finder.find(some)
        # `seen.frame` counts the searched frames, and `rows` says which rows of the chunk they are.
        parts = [_at(seen, np.flatnonzero(seen.frame == 0), rows[:1])]
        for place in range(1, len(rows)):
            parts += _between(seen, place, rows, frames.times_s)
            parts.append(_at(seen, np.flatnonzero(seen.frame == place), rows[place : place + 1]))
        return Faces.concat(parts)


def searched_rows(times_s: NDArray[np.float64], every: int) -> NDArray[np.int64]:
    """The rows to search: each Nth, sooner where frames are far apart in time, and the last."""
    rows: list[int] = []
    for row in range(len(times_s)):
        last = rows[-1] if rows else -1
        ends = row + 1 == len(times_s)
        # The next row's time counts: without this row, the gap would reach from the last one to it.
        if not rows or ends or row - last >= every or times_s[row + 1] - times_s[last] > GAP_S:
            rows.append(row)
    return np.array(rows, np.int64)


def _between(
    seen: Faces, place: int, rows: NDArray[np.int64], times_s: NDArray[np.float64]
) -> Iterator[Faces]:
    """The faces of the frames between one searched frame and the one before it."""
    before, after = (np.flatnonzero(seen.frame == number) for number in (place - 1, place))
    if not len(before) or not len(after) or rows[place] - rows[place - 1] < 2:
        return
    shared = overlap(seen.boxes[before].astype(float), seen.boxes[after].astype(float))
    one, other = cheapest(-shared)
    close = shared[one, other] >= LEAST_OVERLAP
    one, other = before[one[close]], after[other[close]]
    start, end = times_s[rows[place - 1]], times_s[rows[place]]
    for row in range(rows[place - 1] + 1, rows[place]):
        # Frames may share a time; then end - start is 0.
        share = float((times_s[row] - start) / (end - start)) if end > start else 0.5
        yield Faces(
            boxes=_mixed(seen.boxes[one], seen.boxes[other], share),
            landmarks=_mixed(seen.landmarks[one], seen.landmarks[other], share),
            confidence=np.minimum(seen.confidence[one], seen.confidence[other]),
            frame=np.full(len(one), row, np.int64),
        )


def _mixed(
    one: NDArray[np.float32], other: NDArray[np.float32], share: float
) -> NDArray[np.float32]:
    return (one * (1 - share) + other * share).astype(np.float32)


def _at(seen: Faces, found: NDArray[np.int64], row: NDArray[np.int64]) -> Faces:
    """The faces of one searched frame, at their frame's row of the chunk."""
    return Faces(
        boxes=seen.boxes[found],
        landmarks=seen.landmarks[found],
        confidence=seen.confidence[found],
        frame=np.repeat(row, len(found)),
    )
