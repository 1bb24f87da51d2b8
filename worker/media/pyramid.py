"""Every resize that MTCNN asks for, from one integral picture a frame.

MTCNN resizes by area: each output pixel is the mean of a window of whole input pixels.  Such a
mean is a difference of four corners of an integral picture, so the levels of the pyramid and the
crops of all candidates of all frames are gathers from one tensor, without a loop over boxes.  The
sums are integers, hence exact: the results are those of torch's `interpolate(mode="area")`, which
facenet-pytorch calls box by box.

Layout: integral pictures are [n,h+1,w+1,3], so that what is gathered from them is channels-last.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW, STRIDE = 12, 2  # P-Net's view, and the step between two of its cells
FACTOR = 0.709  # from one level of the pyramid to the next: half the area


class Level(NamedTuple):
    """One scale of the pyramid: the copy shrunk by `scale` to height × width."""

    scale: float
    height: int
    width: int


def pyramid(height: int, width: int, min_face: float) -> list[Level]:
    """The levels at which a face of `min_face` pixels or more fills P-Net's window."""
    levels = []
    scale = WINDOW / min_face
    side = min(height, width) * scale
    while side >= WINDOW:
        levels.append(Level(scale, int(height * scale + 1), int(width * scale + 1)))
        scale, side = scale * FACTOR, side * FACTOR
    return levels


class Windows(NamedTuple):
    """Every cell of every level's P-Net output, in one row: P of them."""

    levels: tuple[Level, ...]
    boxes: Tensor  # f32 [P, 4] the cell's window, in pixels of the reduced copy
    level: Tensor  # i64 [P]


@lru_cache(maxsize=16)
def all_windows(height: int, width: int, min_face: float, device: torch.device) -> Windows:
    """The window of each cell of P-Net's output, over the whole pyramid."""
    levels = tuple(pyramid(height, width, min_face))
    boxes, level = [torch.zeros(0, 4)], [torch.zeros(0, dtype=torch.int64)]
    for number, (scale, rows, columns) in enumerate(levels):
        # A 3×3 convolution, a 2×2 pooling that rounds up, and two more 3×3 convolutions.
        y = torch.arange((rows - 2 + 1) // 2 - 4).float()
        x = torch.arange((columns - 2 + 1) // 2 - 4).float()
        cells = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], -1).view(-1, 2) * STRIDE
        # As facenet-pytorch counts: boxes begin at pixel one.
        start, end = ((cells + 1) / scale).floor(), ((cells + WINDOW) / scale).floor()
        boxes.append(torch.cat([start, end], 1))
        level.append(torch.full((len(cells),), number))
    return Windows(levels, torch.cat(boxes).to(device), torch.cat(level).to(device))


def integral(pixels: Tensor) -> Tensor:
    """u8 [n,3,h,w] → i32 [n,h+1,w+1,3]: the sum of all pixels above and to the left.

    Sums of a whole 8k frame wrap around; differences of them do not care, as long as one window's
    own sum fits, which is any window under 8 million pixels.
    """
    sums = pixels.permute(0, 2, 3, 1).cumsum(2, dtype=torch.int32).cumsum(1, dtype=torch.int32)
    return F.pad(sums, (0, 0, 1, 0, 1, 0))


def _windows(length: Tensor | int, count: int, steps: Tensor) -> tuple[Tensor, Tensor]:
    """First and one-past-last input of those `steps` among `count` outputs over `length` inputs."""
    if isinstance(length, Tensor):
        length = length[:, None]
    # Rounded down and up, as torch's `area` does, so neighbouring windows may share an input.
    return steps * length // count, ((steps + 1) * length + count - 1) // count


def _normalised(sums: Tensor, area: Tensor) -> Tensor:
    """Window sums [k,y,x,3] over their areas [·,y,x,1] → network input [k,3,y,x], channels-last."""
    return ((sums / area - 127.5) * 0.0078125).permute(0, 3, 1, 2)


def shrink(sums: Tensor, level: Level, first: int, last: int) -> Tensor:
    """Integral pictures [n,h+1,w+1,3] → their rows from first to last at one level, normalised."""
    steps = torch.arange(max(level.width, last), device=sums.device)
    y0, y1 = _windows(sums.shape[1] - 1, level.height, steps[first:last])
    x0, x1 = _windows(sums.shape[2] - 1, level.width, steps[: level.width])
    rows = sums.index_select(1, y1) - sums.index_select(1, y0)
    windows = rows.index_select(2, x1) - rows.index_select(2, x0)
    return _normalised(windows, ((y1 - y0)[:, None] * (x1 - x0))[None, :, :, None])


def bands(level: Level, pixels: int) -> Iterator[tuple[int, int]]:
    """Rows of a level, first and last, to show P-Net in turn: together they give its whole answer.

    P-Net's row j sees rows 2j to 2j + 11 of its input, so neighbouring bands share ten rows.
    """
    answers = (level.height - WINDOW + 1) // STRIDE + 1
    at_once = max(1, (pixels // level.width - WINDOW) // STRIDE + 1)
    for first in range(0, answers, at_once):
        last = min(first + at_once, answers)
        yield first * STRIDE, min((last - 1) * STRIDE + WINDOW, level.height)


def crops(sums: Tensor, frame: Tensor, corners: Tensor, side: int) -> Tensor:
    """Squares [k,3,side,side], normalised, from corners i64 [k,4] x0 y0 x1 y1 within the copy."""
    _, height, width, _ = sums.shape
    steps = torch.arange(side, device=sums.device)
    x0, x1 = _windows(corners[:, 2] - corners[:, 0], side, steps)
    y0, y1 = _windows(corners[:, 3] - corners[:, 1], side, steps)
    area = (y1 - y0)[:, :, None] * (x1 - x0)[:, None, :]
    x0, x1 = (x + corners[:, :1] for x in (x0, x1))
    y0, y1 = ((y + corners[:, 1:2] + frame[:, None] * height) * width for y in (y0, y1))
    flat = sums.view(-1, 3)

    def at(y: Tensor, x: Tensor) -> Tensor:
        places = y[:, :, None] + x[:, None, :]
        return flat.index_select(0, places.flatten()).view(*places.shape, 3)

    return _normalised(at(y1, x1) - at(y0, x1) - at(y1, x0) + at(y0, x0), area[..., None])
