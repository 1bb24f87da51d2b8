"""Follow faces over time: which box of this frame is the face of that one.

The faces of each frame are assigned to the open tracks by one optimal assignment (SciPy's) on
overlap and distance of centres.  Frames may be 40 ms or a minute apart, so the tolerance grows with
the time since the face was last seen, up to a limit:

    distance of centres, in face sizes    ≤ 0.5 + 0.5 · min(gap, 2 s) → 0.5 … 1.5
    change of size, in octaves            ≤ 0.5 + 0.25 · min(gap, 2 s) → 0.5 … 1.0

After any gap, a face more than one and a half sizes away, or more than twice the size, is another
one.  A face in another shot is another one too, wherever it is (cuts.py); a track goes on when its
shot comes back in time.

A track ends when its face was missed in more than three sampled frames and for more than 2 s.
At most `max_tracks` faces are followed at any time: the largest, weighted by confidence.  The other
faces of such a frame get −1, and `overflowed` is set.  There is no limit over a whole clip, so a
slide show of faces cannot use up the tracks before the face that matters.

The ids depend on the frames alone: not on the borders of chunks, not on the order of the faces.
Tracks of a stream's segments are joined where they are folded, in worker/service/sessions.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ralf.worker.boxes import overlap
from ralf.worker.media.cuts import Signatures, same_shot, signatures
from ralf.worker.media.types import Faces, Frames

Boxes = NDArray[np.float64]

GROWS_FOR_S = 2.0
REACH, REACH_PER_S = 0.5, 0.5
STRETCH, STRETCH_PER_S = 0.5, 0.25
MISSES, UNSEEN_S = 3, 2.0


class Seen(NamedTuple):
    """What tracking needs of one chunk of frames."""

    times_s: NDArray[np.float64]
    shots: Signatures
    faces: Faces


@dataclass(frozen=True)
class OpenTrack:
    """A track that the next frame may continue."""

    track: int
    box: tuple[float, float, float, float]
    time_s: float
    """When it was last seen."""
    shot: Signatures = field(repr=False, compare=False)
    """Of the frame in which it was last seen."""
    missed: int = 0
    """Sampled frames since then."""


def _area(boxes: Boxes) -> Boxes:
    # Never 0: sizes are divided by, and their logarithm is taken.
    return np.asarray(np.prod(np.maximum(boxes[:, 2:] - boxes[:, :2], 1e-3), axis=1))


def match(
    before: Boxes,
    after: Boxes,
    gap_s: Boxes,
    missed: Boxes,
    same: NDArray[np.bool_] | None = None,
) -> list[tuple[int, int]]:
    """Pairs (row of before, row of after) that are the same face.

    gap_s and missed, both [len(before), len(after)], are the time between the two and the frames
    in between that did not show the face; `same` [len(before)] says which are of the same shot.
    """
    size_a, size_b = np.sqrt(_area(before))[:, None], np.sqrt(_area(after))[None]
    between = (before[:, None, :2] + before[:, None, 2:] - after[:, :2] - after[:, 2:]) / 2
    distance = np.hypot(between[..., 0], between[..., 1]) / np.sqrt(size_a * size_b)
    stretch = np.abs(np.log2(size_b / size_a))
    grown = np.clip(gap_s, 0, GROWS_FOR_S)
    reach = REACH + REACH_PER_S * grown
    may = (distance <= reach) & (stretch <= STRETCH + STRETCH_PER_S * grown)
    may &= (missed <= MISSES) | (gap_s <= UNSEEN_S)
    if same is not None:
        may &= same[:, None]
    # A forbidden pair costs as much as the worst allowed pair, not more: at a higher cost the
    # assignment would break up a face that stayed in place in order to avoid forbidden pairs.
    cost = np.where(may, 1 - overlap(before, after) + distance, 1 + reach)
    return [(int(a), int(b)) for a, b in zip(*cheapest(cost), strict=True) if may[a, b]]


def cheapest(cost: Boxes) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The rows and columns of the assignment that costs least."""
    if not cost.size:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    # One face is the usual case, and scipy.optimize takes long to import.
    if min(cost.shape) == 1:
        rows, columns = np.unravel_index([int(np.argmin(cost))], cost.shape)
        return rows, columns
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(cost)
    return rows, columns


class Tracker:
    """Gives each face the number of its track, frame by frame."""

    def __init__(self, max_tracks: int = 16) -> None:
        if max_tracks < 1:
            raise ValueError(f"max_tracks should be 1 or more, got {max_tracks}")
        self.max_tracks = max_tracks
        self.overflowed = False
        """True once a frame had more faces than can be followed."""
        self._next = 0
        self._open: list[OpenTrack] = []

    def update(self, frames: Frames, faces: Faces) -> NDArray[np.int64]:
        """The track of each face [m], −1 for one that is not followed; chunks in time order."""
        return self.follow(frames.times_s, signatures(frames.pixels), faces)

    def follow(
        self, times_s: NDArray[np.float64], shots: Signatures, faces: Faces
    ) -> NDArray[np.int64]:
        """The same for frames of which only times and signatures were kept."""
        ids = np.full(len(faces), -1, np.int64)
        boxes, confidence = faces.boxes.astype(np.float64), faces.confidence.astype(np.float64)
        for row, time_s in enumerate(times_s):
            mine = np.flatnonzero(faces.frame == row)
            ids[mine] = self._step(float(time_s), shots[row], boxes[mine], confidence[mine])
        return ids

    def _step(
        self, time_s: float, shot: Signatures, boxes: Boxes, confidence: Boxes
    ) -> NDArray[np.int64]:
        """One frame."""
        ids = np.full(len(boxes), -1, np.int64)
        strength = _area(boxes) * confidence
        # Of equally strong faces the place decides, so that the finder's order means nothing.
        followed = np.lexsort((*boxes.T, -strength))[: self.max_tracks]
        self.overflowed |= len(boxes) > self.max_tracks
        now = boxes[followed]
        gap, missed = (
            np.tile(np.array(column, np.float64)[:, None], (1, len(now)))
            for column in ([time_s - t.time_s for t in self._open], [t.missed for t in self._open])
        )
        shots = np.array([t.shot for t in self._open], np.float32).reshape(-1, len(shot))
        for a, b in match(_stacked(self._open), now, gap, missed, same_shot(shots, shot)):
            ids[followed[b]] = self._open[a].track
        for row in followed[ids[followed] < 0]:
            ids[row] = self._next
            self._next += 1
        seen = [OpenTrack(int(ids[row]), _plain(boxes[row]), time_s, shot) for row in followed]
        self._open = self._kept(time_s, seen)
        return ids

    def _kept(self, time_s: float, seen: list[OpenTrack]) -> list[OpenTrack]:
        """The tracks of this frame, then the others that are still open, the latest seen first."""
        here = {track.track for track in seen}
        waiting = [replace(t, missed=t.missed + 1) for t in self._open if t.track not in here]
        stay = [t for t in waiting if t.missed <= MISSES or time_s - t.time_s <= UNSEEN_S]
        kept = [*sorted(seen, key=_by_track), *sorted(stay, key=lambda t: (t.missed, t.track))]
        # A slide show opens a track at each slide, so the open ones are bounded too.
        return kept[: self.max_tracks]


def follow_all(chunks: Sequence[Seen], max_tracks: int) -> NDArray[np.int64]:
    """The track of each face of these chunks, whose frames may be in any order of time."""
    times = np.concatenate([chunk.times_s for chunk in chunks])
    order = np.argsort(times, kind="stable")
    place = np.argsort(order, kind="stable")
    starts = np.cumsum([0, *(len(chunk.times_s) for chunk in chunks)])
    faces = Faces.concat(
        [
            replace(chunk.faces, frame=place[chunk.faces.frame + start])
            for chunk, start in zip(chunks, starts[:-1], strict=True)
        ]
    )
    shots = np.concatenate([chunk.shots for chunk in chunks])[order]
    return Tracker(max_tracks).follow(times[order], shots, faces)


def _stacked(tracks: Sequence[OpenTrack]) -> Boxes:
    return np.array([track.box for track in tracks], np.float64).reshape(-1, 4)


def _by_track(track: OpenTrack) -> int:
    return track.track


def _plain(box: Boxes) -> tuple[float, float, float, float]:
    x0, y0, x1, y1 = (float(value) for value in box)
    return x0, y0, x1, y1
