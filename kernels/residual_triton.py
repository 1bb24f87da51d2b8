"""A residual block in two launches: relu(conv(x)), then x + conv(that), each one pass over memory.

Off until it is measured on a GPU (PERFORMANCE.md); ralf.kernels.residual_blocks turns it on.

Each launch is a 3×3 convolution as an implicit GEMM.  A program computes a strip of GROUPS × GROUP
pixels of `rows` rows, from the top.  For each row of the input the tensor memory accelerator (TMA)
brings three tiles: the strip, and the strip moved by one to the left and to the right.  It gives
zeros beyond the edges, which is the convolution's padding.  The tiles go from there into wgmma, not
through registers; nine products, one a tap, add them to the FP32 sums of the three output rows that
need them.  The weights stay in shared memory.

PIXELS neighbours are packed into one row of the matrices, because a product of 32 columns reads
shared memory faster than it can: m64n32k16 computes for 16 cycles and reads 3 KB, which takes 24.
Two pixels of 32 channels are 64 columns, at 32 cycles for both.  Of their products a quarter are
with zeros.  In channels last this packing is only another view of the same memory.

The middle activation does pass through memory: Triton can move a tile in shared memory by one
pixel only through registers, which costs more than the pass.

Numerics.  FP16 operands, FP32 sums; the middle is rounded to FP16 as cuDNN's is; bias and identity
are added before the one rounding of a result.

C: channels of a packed row   SIDE: channels of one pixel   K: rows of a tap's three matrices
"""

# ruff: noqa: PLR0917  (a kernel's arguments are positional)

from contextlib import nullcontext
from dataclasses import dataclass
from subprocess import CalledProcessError
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from triton.errors import TritonError
from triton.tools.tensor_descriptor import TensorDescriptor

from ralf.kernels.dct import FusedKernelError

PROGRAMS = 132
"""The multiprocessors of an H100 or H200."""


@dataclass(frozen=True)
class Tiling:
    """How a launch is cut: pixels packed, such groups a strip, rows, warps, loads in flight."""

    pixels: int
    groups: int
    rows: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{self.pixels}×{self.groups}×{self.rows} w{self.warps} s{self.stages}"


TILINGS: dict[int, tuple[Tiling, ...]] = {
    32: (
        Tiling(2, 128, 64, 8, 3),
        Tiling(2, 128, 64, 8, 2),
        Tiling(2, 64, 64, 4, 2),
        Tiling(2, 64, 32, 4, 3),
        Tiling(1, 256, 64, 8, 2),
        Tiling(1, 128, 64, 4, 3),
    ),
    64: (
        Tiling(1, 128, 64, 8, 2),
        Tiling(1, 128, 32, 8, 2),
        Tiling(1, 64, 64, 4, 2),
    ),
}
"""By channels; the first that fits a map's width is used.  All of them compile for sm_90 without
spilling registers (PERFORMANCE.md); which is fastest is not measured."""


def tiling_of(channels: int, width: int) -> Tiling | None:
    """What a map of these channels and this width is computed with; None: nothing fits."""
    fitting = (t for t in TILINGS.get(channels, ()) if t.pixels * t.groups <= width)
    return next(fitting, None)


@triton.jit  # type: ignore[untyped-decorator]
def _taps(weights, row: tl.constexpr, C: tl.constexpr, SIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The matrices of one row of the weights: for the pixel before, the group, the pixel after."""
    c, s = tl.arange(0, C), tl.arange(0, SIDE)
    weights += row * (C + 2 * SIDE) * C
    edge = weights + s[:, None] * C + c[None, :]
    centre = weights + (SIDE + c[:, None]) * C + c[None, :]
    return tl.load(edge), tl.load(centre), tl.load(edge + (SIDE + C) * C)


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _convolve(  # type: ignore[no-untyped-def]
    x,
    sides,
    weights,
    bias,
    identity,
    out,
    H,
    W,
    rows,
    C: tl.constexpr,
    SIDE: tl.constexpr,
    GROUPS: tl.constexpr,
    LAST: tl.constexpr,
):
    """relu(conv(x)), or if LAST identity + conv(x)."""
    left, top, n = tl.program_id(0) * GROUPS, tl.program_id(1) * rows, tl.program_id(2)
    c, w = tl.arange(0, C), left + tl.arange(0, GROUPS)
    place = w[:, None] * C + c[None, :]
    # 64 bits: the offsets of a large batch pass 2³¹.
    identity += n.to(tl.int64) * H * W * C
    bottom = tl.minimum(top + rows, H)
    offset = tl.load(bias + c)[None, :].to(tl.float32)
    b0, m0, a0 = _taps(weights, 0, C, SIDE)
    b1, m1, a1 = _taps(weights, 1, C, SIDE)
    b2, m2, a2 = _taps(weights, 2, C, SIDE)
    above = tl.zeros((GROUPS, C), tl.float32)
    here = tl.zeros((GROUPS, C), tl.float32)
    # One row more at each end: the first and the last output row need it.
    for r in tl.range(top - 1, bottom + 1):
        done = r > top
        if LAST:
            # Asked for before the products, so that it comes while they run.
            own = done & (w < W)[:, None]
            known = tl.load(identity + (r - 1) * W * C + place, mask=own, other=0)
        before = sides.load([n, r, left - 1, C - SIDE]).reshape(GROUPS, SIDE)
        middle = x.load([n, r, left, 0]).reshape(GROUPS, C)
        after = sides.load([n, r, left + 1, 0]).reshape(GROUPS, SIDE)
        above = tl.dot(before, b2, above)
        above = tl.dot(middle, m2, above)
        above = tl.dot(after, a2, above)
        here = tl.dot(before, b1, here)
        here = tl.dot(middle, m1, here)
        here = tl.dot(after, a1, here)
        below = tl.dot(before, b0)
        below = tl.dot(middle, m0, below)
        below = tl.dot(after, a0, below)
        above += offset
        above = above + known.to(tl.float32) if LAST else tl.maximum(above, 0)
        # Row -1 is beyond the edge, where the TMA writes nothing.  An `if` around the store would
        # be plainer, but Triton 3.6 cannot compile it.
        row = above.to(tl.float16).reshape(1, 1, GROUPS, C)
        out.store([n, tl.where(done, r - 1, -1), left, 0], row)
        above = here
        here = below


class Weights(NamedTuple):
    """A block's two convolutions as the kernel reads them, FP16."""

    first: Tensor  # [3, K, C]
    first_bias: Tensor  # [C]
    second: Tensor
    second_bias: Tensor

    @classmethod
    def of(cls, block: nn.Module, pixels: int) -> "Weights":
        """From a `ralf.kernels.networks.reconstructor.Residual`."""
        made: list[Tensor] = []
        for conv in (m for m in block.modules() if isinstance(m, nn.Conv2d)):
            weight, bias = conv.get_parameter("weight"), conv.get_parameter("bias")
            made += [packed(weight.detach().half(), pixels), bias.detach().half().repeat(pixels)]
        return cls(*made)


def packed(weight: Tensor, pixels: int) -> Tensor:
    """[out, in, 3, 3] for so many pixels at once: a row of K is an input channel of a pixel from
    the one before the group to the one after it, a column an output channel of one in the group."""
    size = len(weight)
    made = weight.new_zeros(3, pixels + 2, size, pixels, size)
    for pixel in range(pixels):
        # The pixel at place p sees those at p − 1 to p + 1; places begin with the one before.
        made[:, pixel : pixel + 3, :, pixel] = weight.permute(2, 3, 1, 0)
    return made.reshape(3, (pixels + 2) * size, pixels * size)


def residual(x: Tensor, weights: Weights, tiling: Tiling, programs: int = PROGRAMS) -> Tensor:
    """The block of x [m, c, h, w], FP16 and channels last; so is the result.

    Few rows are cut into shorter programs than the tiling's, so that there are `programs`.
    FusedKernelError where Triton cannot build or start the kernel.
    """
    channels, width = x.shape[1], x.shape[3]
    if x.dtype != torch.float16 or not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"x should be FP16 and channels last, got {x.dtype}, strides {x.stride()}")
    if channels < 16 or channels & (channels - 1):
        raise ValueError(f"channels should be a power of two from 16, got {channels}")
    if width % tiling.pixels or weights.first.shape[-1] != channels * tiling.pixels:
        raise ValueError(
            f"width should be a multiple of {tiling.pixels} pixels, and the weights packed for "
            f"that many; got width {width}, weights {list(weights.first.shape)}"
        )
    middle, out = torch.empty_like(x), torch.empty_like(x)
    try:
        with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
            strips = -(-width // (tiling.pixels * tiling.groups))
            rows = min(tiling.rows, -(-len(x) * strips * x.shape[2] // programs))
            cut = (tiling, strips, rows)
            _launch(x, weights.first, weights.first_bias, x, middle, *cut, last=False)
            _launch(middle, weights.second, weights.second_bias, x, out, *cut, last=True)
    # Triton's own, and what making its launcher may meet: no C compiler, a cache it cannot write.
    except (TritonError, RuntimeError, OSError, CalledProcessError) as error:
        raise FusedKernelError(f"{list(x.shape)} on {x.device}: {error}") from error
    return out


def _launch(
    x: Tensor,
    weights: Tensor,
    bias: Tensor,
    identity: Tensor,
    out: Tensor,
    tiling: Tiling,
    strips: int,
    rows: int,
    *,
    last: bool,
) -> None:
    m, side, height, width = x.shape
    shape = [m, height, width // tiling.pixels, side * tiling.pixels]
    strides = [height * width * side, width * side, shape[3], 1]

    def tiles(memory: Tensor, channels: int) -> TensorDescriptor:
        return TensorDescriptor(memory, shape, strides, [1, 1, tiling.groups, channels])

    _convolve[(strips, -(-height // rows), m)](
        *(tiles(x, shape[3]), tiles(x, side), weights, bias, identity, tiles(out, shape[3])),
        *(height, shape[2], rows),
        C=shape[3],
        SIDE=side,
        GROUPS=tiling.groups,
        LAST=last,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
