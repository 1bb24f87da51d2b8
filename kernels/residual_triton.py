"""A residual block in one launch: x + conv(relu(conv(x))), the middle activation never in memory.

Not in use: no network calls it, because it has not been measured on a GPU (PERFORMANCE.md has the
prediction and the command).  It is for the reconstructor's full-resolution level, whose maps are
wide in pixels and narrow in channels.

A program computes 32 rows of a strip of LANES columns, from the top.  For each row it makes the
middle row by nine small products (taps × channels) and rounds it to FP16.  The middle row is added
to the FP32 sums of the three output rows that need it.  A value in registers has no address, so the
row is shifted to the left and right by a product with a shifted identity.  That is exact, since
each sum has one term; it costs a fifth more arithmetic.  Strips overlap by two columns, blocks by
two rows.

Numerics.  FP16 operands, FP32 sums; the middle is rounded to FP16 as cuDNN's would be, the second
convolution and the identity are summed before the one rounding of the result.

C: channels, a power of two from 16   weights as [3, 3, in, out]   maps as channels last
"""

# ruff: noqa: PLR0917  (a kernel's arguments are positional)

from contextlib import nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

LANES, ROWS, WARPS = 64, 32, 4


@triton.jit  # type: ignore[untyped-decorator]
def _taps(weights, dy: tl.constexpr, dx: tl.constexpr, C: tl.constexpr):  # type: ignore[no-untyped-def]
    """One tap's matrix, [in, out]."""
    c = tl.arange(0, C)
    return tl.load(weights + ((dy * 3 + dx) * C + c[:, None]) * C + c[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def _spread(left, middle, right, weights, dy: tl.constexpr, total, C: tl.constexpr):  # type: ignore[no-untyped-def]
    """What a middle row adds to an output row, by row dy of the weights."""
    total = tl.dot(left, _taps(weights, dy, 0, C), total)
    total = tl.dot(middle, _taps(weights, dy, 1, C), total)
    return tl.dot(right, _taps(weights, dy, 2, C), total)


@triton.jit  # type: ignore[untyped-decorator]
def _block(  # type: ignore[no-untyped-def]
    x,
    first,
    first_bias,
    second,
    second_bias,
    out,
    H,
    W,
    strips,
    leftmost,
    C: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
):
    lane, c = tl.arange(0, LANES), tl.arange(0, C)
    w = leftmost + tl.program_id(0) % strips * (LANES - 2) + lane - 1
    top = tl.program_id(1) * ROWS
    # 64 bits: the offsets of a large batch pass 2³¹.
    start = (tl.program_id(0) // strips).to(tl.int64) * H * W * C
    x += start
    out += start
    to_right = (lane[None, :] == lane[:, None] - 1).to(tl.float16)
    to_left = (lane[None, :] == lane[:, None] + 1).to(tl.float16)
    bias = tl.load(first_bias + c)[None, :].to(tl.float32)
    last_bias = tl.load(second_bias + c)[None, :].to(tl.float32)
    above = tl.zeros((LANES, C), tl.float32)
    here = tl.zeros((LANES, C), tl.float32)
    # Two rows more than are written: the first and the last need a middle row beyond them.
    for step in range(ROWS + 2):
        r = top + step - 1
        middle = tl.zeros((LANES, C), tl.float32)
        for tap in tl.static_range(9):
            row, column = r + tap // 3 - 1, w + tap % 3 - 1
            inside = (column >= 0) & (column < W) & (row >= 0) & (row < H)
            pixels = x + (row * W + column)[:, None] * C + c[None, :]
            tile = tl.load(pixels, mask=inside[:, None], other=0)
            middle = tl.dot(tile, _taps(first, tap // 3, tap % 3, C), middle)
        # The second convolution is padded with zeros, not with what the first gives there.
        inside = (w >= 0) & (w < W) & (r >= 0) & (r < H)
        middle = tl.where(inside[:, None], tl.maximum(middle + bias, 0), 0).to(tl.float16)
        left = tl.dot(to_right, middle).to(tl.float16)
        right = tl.dot(to_left, middle).to(tl.float16)
        above = _spread(left, middle, right, second, 2, above, C)
        here = _spread(left, middle, right, second, 1, here, C)
        below = _spread(left, middle, right, second, 0, tl.zeros((LANES, C), tl.float32), C)
        o = r - 1
        # The outer lanes lack a neighbour; another strip writes their columns.
        own = (lane > 0) & (lane < LANES - 1) & (w < W) & (o >= top) & (o < H)
        place = (o * W + w)[:, None] * C + c[None, :]
        identity = tl.load(x + place, mask=own[:, None], other=0).to(tl.float32)
        tl.store(out + place, (above + last_bias + identity).to(tl.float16), mask=own[:, None])
        above = here
        here = below


class Weights(NamedTuple):
    """A block's two convolutions as the kernel reads them, FP16."""

    first: Tensor  # [3, 3, C, C]
    first_bias: Tensor  # [C]
    second: Tensor
    second_bias: Tensor

    @classmethod
    def of(cls, block: nn.Module) -> "Weights":
        """From a `ralf.kernels.networks.reconstructor.Residual`."""
        made: list[Tensor] = []
        for conv in (m for m in block.modules() if isinstance(m, nn.Conv2d)):
            weight, bias = conv.get_parameter("weight"), conv.get_parameter("bias")
            made += [weight.detach().permute(2, 3, 1, 0).contiguous().half(), bias.detach().half()]
        return cls(*made)


def residual(x: Tensor, weights: Weights) -> Tensor:
    """The block of x [m, C, h, w], FP16 and channels last; so is the result."""
    m, channels, height, width = x.shape
    if x.dtype != torch.float16 or not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"x should be FP16 and channels last, got {x.dtype}, strides {x.stride()}")
    if channels < 16 or channels & (channels - 1):
        raise ValueError(f"channels should be a power of two from 16, got {channels}")
    out = torch.empty_like(x)
    blocks = -(-height // ROWS)
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        for leftmost, strips, lanes in cut(width):
            _block[(m * strips, blocks)](
                *(x, *weights, out, height, width, strips, leftmost),
                C=channels,
                LANES=lanes,
                ROWS=ROWS,
                num_warps=WARPS if lanes == LANES else 1,
                num_stages=1,  # loads in flight take 168 KB of shared memory: one program an SM
            )
    return out


def cut(width: int) -> list[tuple[int, int, int]]:
    """Launches that cover the columns: where each begins, its strips, their lanes.

    256 columns are four strips of 62 and 8 more, for which 16 lanes do.
    """
    strips, rest = divmod(width, LANES - 2)
    launches = [(0, strips, LANES)] if strips else []
    if rest:
        # A power of two that holds the rest and both neighbours; tl.dot takes no side below 16.
        lanes = max(16, 1 << (rest + 1).bit_length())
        launches.append((strips * (LANES - 2), 1, lanes))
    return launches
