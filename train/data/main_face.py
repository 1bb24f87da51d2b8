"""Which face of a video its label is about, and how that face is stored.

A video has one label and may show several people.  With a mask video the labelled face is the one
that the masks cover.  With a reviewer's boxes it is the face under the box.  Otherwise it is the
track that is largest over time.  That rule is the same for real and forged videos, so that the
choice of the face does not give the label away.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ralf.train.data.index import Row
from ralf.train.forge.pixels import Image, resize, to_u8
from ralf.worker.boxes import overlap
from ralf.worker.media.types import Faces

STORED_MARGIN = 1.7
"""The stored picture is this times the longer side of the face's box, so that any margin up to it
can be cut later.  It is smaller where the picture ends."""
SAME_FACE_IOU = 0.4
"""From this overlap on, a found face is the one that a reviewer's box is around."""


@dataclass(frozen=True)
class StoredFace:
    """One face of one frame, as `ralf data prepare` stores it."""

    image: Image
    frame: int
    box: tuple[float, ...]
    """In the stored picture's pixels."""
    five: tuple[float, ...]
    face_px: int
    """Shorter side of the box in the video's pixels."""


def main_track(faces: Faces, tracks: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows of the track with the greatest area, summed over the frames in which it is seen."""
    size = faces.boxes[:, 2:] - faces.boxes[:, :2]
    return _strongest(size.prod(axis=1), tracks)


def masked_track(
    faces: Faces, tracks: NDArray[np.int64], masks: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """Rows of the track that the masks [n, h, w] cover most, weighed over all frames."""
    cover = np.zeros(len(faces))
    height, width = masks.shape[1:]
    for row, box in enumerate(faces.boxes):
        x0, x1 = np.clip(box[[0, 2]].round().astype(int), 0, width)
        y0, y1 = np.clip(box[[1, 3]].round().astype(int), 0, height)
        inside = masks[faces.frame[row], y0:y1, x0:x1]
        cover[row] = inside.mean() if inside.size else 0.0
    if not cover.any():
        return main_track(faces, tracks)
    return _strongest(cover, tracks)


def _strongest(strength: NDArray[np.floating], tracks: NDArray[np.int64]) -> NDArray[np.int64]:
    followed = tracks >= 0
    if not followed.any():
        return np.zeros(0, np.int64)
    total = np.bincount(tracks[followed], strength[followed])
    # One track, not the best face of each frame: that could change the person in mid-video.
    return np.flatnonzero(tracks == int(np.argmax(total)))


def under_reviewed_boxes(
    faces: Faces,
    numbers: NDArray[np.int64],
    rows: Sequence[Row],
    size: tuple[int, int],
) -> list[tuple[Row, int]]:
    """Each reviewed face with the found face that overlaps it most in the same frame."""
    height, width = size
    frame_of = numbers[faces.frame]
    pairs = []
    for row in rows:
        wanted = np.array(row.marked) * [width, height, width, height]
        near = np.flatnonzero(frame_of == row.frame)
        shared = overlap(faces.boxes[near], wanted)[:, 0]
        if len(near) and shared.max() >= SAME_FACE_IOU:
            pairs.append((row, int(near[int(np.argmax(shared))])))
    return pairs


def cut_for_storage(
    image: Image, box: NDArray[np.float32], five: NDArray[np.float32], frame: int, longest: int
) -> StoredFace:
    """The face with its surroundings, reduced to `longest` pixels where it is larger.

    It is not padded where the picture ends: padding is added when the crop is cut, as in serving.
    """
    height, width = image.shape[:2]
    middle, half = (box[:2] + box[2:]) / 2, STORED_MARGIN / 2 * float((box[2:] - box[:2]).max())
    x0, y0 = np.clip(np.floor(middle - half).astype(int), 0, [width - 1, height - 1])
    x1, y1 = np.clip(np.ceil(middle + half).astype(int), [x0 + 1, y0 + 1], [width, height])
    part = image[y0:y1, x0:x1]
    factor = min(1.0, longest / max(part.shape[:2]))
    tall, wide = (max(1, round(side * factor)) for side in part.shape[:2])
    if factor < 1:
        part = to_u8(resize(part.astype(np.float32), tall, wide))
    scale = np.array([wide / (x1 - x0), tall / (y1 - y0)])
    moved_box = (box.reshape(2, 2) - [x0, y0]) * scale
    moved_five = (five - [x0, y0]) * scale
    return StoredFace(
        image=np.ascontiguousarray(part),
        frame=frame,
        # A hundredth of a pixel is enough, and keeps the table readable.
        box=tuple(float(f"{value:.2f}") for value in moved_box.ravel()),
        five=tuple(float(f"{value:.2f}") for value in moved_five.ravel()),
        face_px=int((box[2:] - box[:2]).min()),
    )
