"""Many resizes at once, as two matrix products: what a device does instead of a loop over faces.

The CPU's 8-bit kernel (Pillow's and torch's: a triangle filter that widens as the picture shrinks,
columns first, rounded to 8 bits, then rows) weighs every input pixel of a line and adds.  Here
those weights stand in a matrix for each region, so that a whole chunk's crops, or its reduced
copies, are  rows @ round(pixels @ columns).  Whatever a region reaches beyond the picture is folded
into the weights of its edge pixel, or dropped, and takes no memory.

Weights are rounded to as many bits as the kernel keeps, which makes the sums exact in FP32 down to
a quarter of the size, in whatever order a device adds them: there CPU and GPU give the same bits.
Below that, or with TF32 switched on, they may differ by a level.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

GROUP_BYTES = 256 * 2**20  # of one product's FP32 input: a face that fills a frame of 8K goes alone
BITS, MOST_BITS = 15, 22  # the kernel's: of one weight, and behind the point


class Axis(NamedTuple):
    """What m regions cover of one axis, in whole pixels; and what of it lies in the picture."""

    start: Tensor  # i64 [m], may lie outside the picture
    length: Tensor  # i64 [m]
    origin: Tensor  # i64 [m] the first pixel that is read
    extent: int  # how many are read from there, in the largest region
    taps: int  # how many pixels weigh on one output at most
    limit: int  # the picture's length


def _axis(start: NDArray[np.int64], end: NDArray[np.int64], size: int, picture: Tensor) -> Axis:
    limit = picture.shape[-1]
    origin = start.clip(0, limit - 1)
    extent = int((end.clip(max=limit).clip(min=origin + 1) - origin).max())
    taps = 2 * int(np.ceil(max(1.0, float((end - start).max()) / size))) + 1

    def there(values: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(picture.device)

    return Axis(there(start), there(end - start), there(origin), extent, taps, limit)


def weights(axis: Axis, size: int, padding: Literal["edge", "zero"]) -> Tensor:
    """How much each pixel that is read weighs on each output: f32 [m, size, extent]."""
    device = axis.start.device
    scale = axis.length.double()[:, None] / size
    reach = scale.clamp(min=1.0)
    middle = scale * (torch.arange(size, device=device) + 0.5)
    first = (middle - reach + 0.5).long().clamp(min=0)
    last = torch.minimum((middle + reach + 0.5).long(), axis.length[:, None])
    tap = first[..., None] + torch.arange(axis.taps, device=device)
    share = 1 - ((tap - middle[..., None] + 0.5) / reach[..., None]).abs()
    share = share.clamp(min=0) * (tap < last[..., None])
    share = share / share.sum(-1, keepdim=True)
    # As many bits as let a region's largest weight fit into BITS, chosen anew for each region.
    scaled = share.amax((1, 2), keepdim=True) * 2.0 ** torch.arange(1, MOST_BITS + 1, device=device)
    bits = ((scaled + 0.5).floor() < 2**BITS).sum(-1, keepdim=True)
    share = (share * 2.0**bits + 0.5).floor() / 2.0**bits

    place = tap + axis.start[:, None, None]
    if padding == "zero":
        share = share * ((place >= 0) & (place < axis.limit))
    place = place.clamp(0, axis.limit - 1) - axis.origin[:, None, None]
    table = torch.zeros((len(share), size, axis.extent), device=device)
    return table.scatter_add_(2, place.clamp(0, axis.extent - 1), share.float())


def _rounded(levels: Tensor) -> Tensor:
    """To whole levels as the kernel does: halves up."""
    return levels.add_(0.5).floor_().clamp_(0, 255)


def cut_all(
    pixels: Tensor,
    frame: NDArray[np.int64],
    regions: NDArray[np.int64],
    size: int,
    padding: Literal["edge", "zero"],
) -> Tensor:
    """Regions [m,4] x0 y0 x1 y1 of frames u8 [n,3,h,w] → crops u8 [m,3,size,size]."""
    crops = pixels.new_empty((len(regions), 3, size, size))
    for rows in _groups(regions, pixels.shape[2], pixels.shape[3]):
        mine = regions[rows]
        x = _axis(mine[:, 0], mine[:, 2], size, pixels)
        y = _axis(mine[:, 1], mine[:, 3], size, pixels[..., 0])
        across = x.origin[:, None] + torch.arange(x.extent, device=pixels.device)
        down = y.origin[:, None] + torch.arange(y.extent, device=pixels.device)
        which = torch.from_numpy(np.ascontiguousarray(frame[rows])).to(pixels.device)
        window = pixels[
            which[:, None, None, None],
            torch.arange(3, device=pixels.device)[None, :, None, None],
            down.clamp(max=y.limit - 1)[:, None, :, None],
            across.clamp(max=x.limit - 1)[:, None, None, :],
        ].float()
        columns = weights(x, size, padding).transpose(1, 2)  # [g, extent, size]
        narrow = _rounded(window.flatten(1, 2) @ columns).view(len(rows), 3, y.extent, size)
        done = _rounded(weights(y, size, padding)[:, None] @ narrow)
        crops[torch.from_numpy(rows).to(pixels.device)] = done.to(torch.uint8)
    return crops


def _groups(regions: NDArray[np.int64], height: int, width: int) -> Iterator[NDArray[np.int64]]:
    """Rows of regions alike in size, as many as may stand in memory side by side."""
    across = np.minimum(regions[:, 2] - regions[:, 0], width)
    down = np.minimum(regions[:, 3] - regions[:, 1], height)
    # A group takes the memory of its largest region times its length, so one large face among small
    # ones would cost much.
    order = np.argsort(np.maximum(across, down), kind="stable")
    first = 0
    for last in range(len(order)):
        group = order[first : last + 1]
        if len(group) > 1 and _bytes(across[group], down[group]) > GROUP_BYTES:
            yield order[first:last]
            first = last
    if len(order):
        yield order[first:]


def _bytes(across: NDArray[np.int64], down: NDArray[np.int64]) -> int:
    return int(len(across) * across.max() * down.max()) * 3 * 4


def shrunk(pixels: Tensor, height: int, width: int) -> Tensor:
    """Frames u8 [n,3,h,w] → u8 [n,3,height,width], as the CPU's kernel gives them."""
    n, _, tall, wide = pixels.shape
    zero = np.zeros(1, np.int64)
    columns = weights(_axis(zero, zero + wide, width, pixels), width, "edge")[0].T
    rows = weights(_axis(zero, zero + tall, height, pixels[..., 0]), height, "edge")[0]
    smaller = pixels.new_empty((n, 3, height, width))
    at_once = max(1, GROUP_BYTES // (12 * tall * wide))
    for first in range(0, n, at_once):
        some = slice(first, first + at_once)
        smaller[some] = _rounded(rows @ _rounded(pixels[some].float() @ columns)).to(torch.uint8)
    return smaller
