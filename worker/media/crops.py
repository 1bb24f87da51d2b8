"""Cuts face boxes out of frames, as the model's InputContract says.

A crop is a square of whole pixels around the middle of the box, `margin` times its longer side,
or with `squeeze` the tight box itself, from the frame at full resolution.  It is resized to
`size` by a triangle filter that widens as the picture shrinks (bilinear with antialiasing: the
kernel of Pillow's BILINEAR and of torch's `antialias=True`), in 8-bit pixels, columns first and
then rows.  What lies outside the frame is its nearest edge pixel, or black.

Training cuts with the same function (cut_one), so it cannot see other crops than serving does.

On a CPU there is a loop over faces, on purpose: crops differ in size, and the 8-bit kernel takes
0.1–0.3 ms a face where gathering all taps takes several, beside a network that takes 25 ms and
more.  A device cuts all faces of a chunk at once (resample.py): to the same bits where they shrink
to a quarter at most, and within one level of 255 where they shrink further.
"""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ralf.kernels.manifest import InputContract
from ralf.worker.media.resample import cut_all
from ralf.worker.media.types import Faces, Frames


def cut(frames: Frames, faces: Faces, contract: InputContract) -> Tensor:
    """Each face as the model takes it, u8 [m,3,size,size], on the frames' device."""
    if frames.pixels.is_cuda:
        where = regions(faces.boxes, contract)
        return cut_all(frames.pixels, faces.frame, where, contract.size, contract.padding)
    side = contract.size
    crops = frames.pixels.new_empty((len(faces), 3, side, side))
    for row, region in enumerate(regions(faces.boxes, contract).tolist()):
        crops[row] = _resampled(frames.pixels[int(faces.frame[row])], region, contract)
    return crops


def cut_one(image: Tensor, box: ArrayLike, contract: InputContract) -> Tensor:
    """One face of one image u8 [3,h,w], box x0 y0 x1 y1 → u8 [3,size,size]."""
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"image should be u8 [3,h,w], got {image.dtype} {tuple(image.shape)}")
    region = regions(np.asarray(box, np.float64)[None], contract)
    if image.is_cuda:
        first = np.zeros(1, np.int64)
        return cut_all(image[None], first, region, contract.size, contract.padding)[0]
    return _resampled(image, region[0].tolist(), contract)


def regions(boxes: NDArray[np.floating], contract: InputContract) -> NDArray[np.int64]:
    """Boxes [m,4] → the whole pixels that are cut, [m,4] x0 y0 x1 y1, maybe outside the frame."""
    boxes = boxes.astype(np.float64)
    # NaN as a whole number is an arbitrary place, and the crop of it would get a score.
    if not np.isfinite(boxes).all():
        raise ValueError("a face's box should be finite numbers; the finder gave NaN or infinity")
    size = boxes[:, 2:] - boxes[:, :2]
    if not contract.squeeze:
        size = np.repeat(size.max(axis=1, keepdims=True), 2, axis=1) * contract.margin
    size = np.maximum(_whole(size), 1)
    start = _whole((boxes[:, :2] + boxes[:, 2:] - size) / 2)
    return np.concatenate([start, start + size], axis=1).astype(np.int64)


def _whole(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Nearest whole number, halves up: never to even, which would make crops flicker."""
    return np.asarray(np.floor(values + 0.5))


def _resampled(image: Tensor, region: list[int], contract: InputContract) -> Tensor:
    """The region of u8 [3,h,w] as u8 [3,size,size].

    Columns are shrunk before rows are padded, so that a region much larger than the frame is
    never in memory as a whole.  The kernel also does columns first: the bits are the same.
    """
    x0, y0, x1, y1 = region
    height = image.shape[1]
    top = min(max(y0, 0), height - 1)
    # One row at least, for a region that lies wholly outside the frame.
    bottom = max(min(y1, height), top + 1)
    band = _padded(image[:, top:bottom], 2, x0, x1, contract)
    if y0 < 0 or y1 > height:
        band = _resized(band, bottom - top, contract.size)
    band = _padded(band, 1, y0 - top, y1 - top, contract)
    return _resized(band, contract.size, contract.size)


def _padded(picture: Tensor, dim: int, start: int, end: int, contract: InputContract) -> Tensor:
    """Rows (dim 1) or columns (dim 2) from start to end of [3,h,w]; they may lie outside it."""
    length = picture.shape[dim]
    if start >= 0 and end <= length:
        return picture.narrow(dim, start, end - start)
    places = torch.arange(start, end, device=picture.device)
    padded = picture.index_select(dim, places.clamp(0, length - 1))
    if contract.padding == "zero":
        outside = (places < 0) | (places >= length)
        padded.index_fill_(dim, outside.nonzero().flatten(), 0)
    return padded


def _resized(picture: Tensor, height: int, width: int) -> Tensor:
    """u8 [3,h,w] → u8 [3,height,width]."""
    if picture.shape[1:] == (height, width):
        return picture
    return F.interpolate(picture[None], size=(height, width), mode="bilinear", antialias=True)[0]
