"""One crop: which part of a picture the network sees, cut by the worker's own function."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ralf.kernels.manifest import InputContract
from ralf.train.data.index import IndexFault
from ralf.train.forge.landmarks import FaceGeometry
from ralf.train.forge.pixels import Image, resize, to_u8
from ralf.worker.media.crops import cut_one


@dataclass(frozen=True)
class Cut:
    """How a crop is taken: the same for a real face and its forgery."""

    contract: InputContract
    shift: tuple[float, float] = (0.0, 0.0)  # of the box's longer side
    grow: float = 1.0
    flip: bool = False
    cut_off: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """What the picture's edge takes away: left, top, right, bottom, in parts of the crop's side."""

    def take(self, image: Image, face: FaceGeometry | None) -> Tensor:
        """u8 [3, s, s]; a picture without geometry is a crop already and is only resized."""
        pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        if face is None:
            whole = self.contract.model_copy(update={"squeeze": True})
            crop = cut_one(pixels, [0, 0, image.shape[1], image.shape[0]], whole)
        else:
            crop = cut_one(pixels, self.box(face), self.contract)
        return crop.flip(-1) if self.flip else crop

    def box(self, face: FaceGeometry) -> NDArray[np.float32]:
        """The face's box, moved and grown by the jitter."""
        if self.shift == (0, 0) and self.grow == 1:
            return face.box  # untouched: rounding here would move a crop by a pixel
        corners = face.box.reshape(2, 2)
        middle, size = corners.mean(axis=0), corners[1] - corners[0]
        middle = middle + np.array(self.shift, np.float32) * size.max()
        return np.concatenate([middle - size * self.grow / 2, middle + size * self.grow / 2])


def region(image: Image, face: FaceGeometry, cut: Cut) -> tuple[Image, FaceGeometry]:
    """The part of the picture around the crop, reduced to the resolution that the crop needs.

    It is not padded where the picture ends: padding is added when the crop is cut, as in serving.
    """
    left, top, right, bottom = cut.box(face)
    reach = max(right - left, bottom - top) * (1.0 if cut.contract.squeeze else cut.contract.margin)
    # A tenth wider than the crop: blur and encoders reach across its border.
    middle, half = np.array([left + right, top + bottom]) / 2, 0.55 * reach
    low, high = middle - half, middle + half
    if any(cut.cut_off):
        low, high = _cut_off(low, high, reach, face, cut.cut_off)
    height, width = image.shape[:2]
    x0, y0 = (int(max(0, value)) for value in np.floor(low))
    x1, y1 = (
        int(min(most, value)) for most, value in zip((width, height), np.ceil(high), strict=True)
    )
    if x1 - x0 < 8 or y1 - y0 < 8:
        raise IndexFault(
            f"the face's box {face.box.round(1).tolist()} lies outside {width}×{height}"
        )
    part = image[y0:y1, x0:x1]
    factor = min(1.0, 1.6 * cut.contract.size / reach)
    if factor < 1:
        tall, wide = round(part.shape[0] * factor), round(part.shape[1] * factor)
        moved = face.scaled(wide / part.shape[1], tall / part.shape[0], x0, y0)
        return to_u8(resize(part.astype(np.float32), tall, wide)), moved
    return part, face.scaled(1, 1, x0, y0)


def _cut_off(
    low: NDArray[np.floating],
    high: NDArray[np.floating],
    reach: float,
    face: FaceGeometry,
    parts: tuple[float, float, float, float],
) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """The corners of the region once the picture's edge has moved in, never over the five points.

    The region is a tenth wider than the crop, so the edge first passes that tenth.
    """
    taken = np.array(parts).reshape(2, 2) * reach
    border = 0.05 * reach
    near = 0.25 * face.eye_distance
    left_top = np.where(taken[0] > 0, low + border + taken[0], low)
    right_bottom = np.where(taken[1] > 0, high - border - taken[1], high)
    return (
        np.minimum(left_top, np.maximum(low, face.five.min(axis=0) - near)),
        np.maximum(right_bottom, np.minimum(high, face.five.max(axis=0) + near)),
    )
