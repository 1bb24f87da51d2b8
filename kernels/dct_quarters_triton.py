"""The destructor on a GPU by quarters: four chained products in one launch, their sum in a second.

Off by default: `ralf bench dct --tilings` measures it beside dct_triton, whose words hold here too.

Both axes are folded before the first product, so a plane is four independent problems of H x H,
one for each pair of parities: Y = Cᵀ (M ∘ C F Bᵀ) B, F the folded plane, C and B either E or O.
Folded u8 pixels are sums of four bytes, |sum − 510| ≤ 510, still exact in FP16.  The second launch
adds the four Y with their signs and writes a position and its mirrors: no product.

The first launch computes and the second waits for memory.  So the planes may be cut into shares:
on CUDA a second stream adds one share while the first multiplies the next.

Sizes up to 256 (P up to 128): a quarter has to fit into the registers of one program.
"""

# ruff: noqa: PLR0917  (a kernel's arguments are positional)

from contextlib import nullcontext
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ralf.kernels.dct_triton import (
    folded_basis,
    in_four_dimensions,
    launching,
    padded_half,
    put,
)

LARGEST = 128
"""P."""
SUM = {"ROWS": 8, "num_warps": 4}
"""How the second launch is cut."""
SHARES = (1, 3, 4, 6)
"""What `bench dct --tilings` tries.  An H200 has 132 SMs, each with room for one program of the
first launch: one of 6 shares of 64 crops has 128 programs, one of 4 has 192, so two rounds."""


@triton.jit  # type: ignore[untyped-decorator]
def _quarter(  # type: ignore[no-untyped-def]
    image,
    halves,
    turned,
    mask,
    quarters,
    first,
    channels,
    stride_m,
    stride_c,
    stride_h,
    stride_w,
    N: tl.constexpr,
    P: tl.constexpr,
    U8: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """What the frequencies of one pair of parities give: Y = Cᵀ (M ∘ C F Bᵀ) B, F the folded plane.

    C and B: E or O, by the parity of row and column.
    """
    H: tl.constexpr = N // 2
    plane = first + (tl.program_id(0) // 4).to(tl.int64)
    a, b = tl.program_id(0) % 4 // 2, tl.program_id(0) % 2
    k, v = tl.arange(0, P), tl.arange(0, P)
    square = k[:, None] * P + v[None, :]
    base = image + (plane // channels) * stride_m + (plane % channels) * stride_c
    above, below = base + k[:, None] * stride_h, base + (N - 1 - k)[:, None] * stride_h
    # Bytes are added as integers: three operations and one conversion for four of them.
    kind: tl.constexpr = tl.int32 if U8 else tl.float32
    down, right = (1 - 2 * a).to(kind), (1 - 2 * b).to(kind)
    middle = (1 + down) * (1 + right) * 255 // 2 if U8 else (1 + down) * (1 + right) * 0.5
    wide = tl.zeros((P, P), tl.float32)
    for left in range(0, H, CHUNK):
        c = left + tl.arange(0, CHUNK)
        inside = (k < H)[:, None] & (c < H)[None, :]
        at, mirror = c[None, :] * stride_w, (N - 1 - c)[None, :] * stride_w
        near = tl.load(above + at, mask=inside, other=0).to(kind)
        near += down * tl.load(below + at, mask=inside, other=0).to(kind)
        far = tl.load(above + mirror, mask=inside, other=0).to(kind)
        far += down * tl.load(below + mirror, mask=inside, other=0).to(kind)
        fold = (near + right * far - middle).to(tl.float16)
        some = tl.dot(tl.load(halves + a * P * P + square), fold) * (1.0 / 255 if U8 else 1.0)
        columns = turned + (b * P + c[:, None]) * P + v[None, :]
        wide = tl.dot(some.to(tl.float16), tl.load(columns), wide)
    inside = (k < H)[:, None] & (v < H)[None, :]
    weights = mask + (2 * k + a)[:, None] * N + (2 * v + b)[None, :]
    wide *= tl.load(weights, mask=inside, other=0).to(tl.float32)
    wide = tl.dot(wide.to(tl.float16), tl.load(halves + b * P * P + square))
    wide = tl.dot(tl.load(turned + a * P * P + square), wide.to(tl.float16))
    tl.store(quarters + ((plane * 2 + a) * 2 + b) * P * P + square, wide.to(tl.float16))


@triton.jit  # type: ignore[untyped-decorator]
def _unfold(  # type: ignore[no-untyped-def]
    quarters,
    mask,
    image,
    destroyed,
    residual,
    first,
    channels,
    stride_m,
    stride_c,
    stride_h,
    stride_w,
    N: tl.constexpr,
    P: tl.constexpr,
    U8: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
):
    """ROWS rows of the upper half and their mirrors: four quarters, added with their signs."""
    H: tl.constexpr = N // 2
    PARTS: tl.constexpr = (H + ROWS - 1) // ROWS
    plane = first + (tl.program_id(0) // PARTS).to(tl.int64)
    k = (tl.program_id(0) % PARTS) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, P)
    inside = (k < H)[:, None] & (c < H)[None, :]
    part = quarters + plane * 4 * P * P + k[:, None] * P + c[None, :]
    middle = 0.5 * tl.load(mask).to(tl.float32)
    left = tl.load(part, mask=inside, other=0).to(tl.float32) + middle
    right = tl.load(part + P * P, mask=inside, other=0).to(tl.float32)
    left_odd = tl.load(part + 2 * P * P, mask=inside, other=0).to(tl.float32)
    right_odd = tl.load(part + 3 * P * P, mask=inside, other=0).to(tl.float32)
    upper, lower = left + left_odd, left - left_odd
    upper_odd, lower_odd = right + right_odd, right - right_odd
    base = image + (plane // channels) * stride_m + (plane % channels) * stride_c
    out, apart = destroyed + plane * N * N, residual
    if RESIDUAL:
        apart = residual + plane * N * N
    below, mirror = N - 1 - k, N - 1 - c
    sh, sw = stride_h, stride_w
    put(upper + upper_odd, k, c, inside, base, out, apart, sh, sw, N, U8, RESIDUAL)
    put(upper - upper_odd, k, mirror, inside, base, out, apart, sh, sw, N, U8, RESIDUAL)
    put(lower + lower_odd, below, c, inside, base, out, apart, sh, sw, N, U8, RESIDUAL)
    put(lower - lower_odd, below, mirror, inside, base, out, apart, sh, sw, N, U8, RESIDUAL)


def destruct(
    image: Tensor,
    mask: Tensor,
    dtype: torch.dtype,
    residual: torch.dtype | None,
    shares: int = 1,
) -> tuple[Tensor, Tensor | None]:
    """As dct_triton.destruct; ValueError where a quarter is too large."""
    size = image.shape[-1]
    pad = padded_half(size)
    if pad > LARGEST:
        raise ValueError(f"quarters take crops of up to {2 * LARGEST} pixels a side, got {size}")
    planes = in_four_dimensions(image)
    count = planes.shape[0] * planes.shape[1]
    halves, turned = folded_basis(size, image.device)
    quarters = image.new_empty((count, 2, 2, pad, pad), dtype=torch.float16)
    out = image.new_empty(image.shape, dtype=dtype)
    apart = None if residual is None else image.new_empty(image.shape, dtype=residual)
    mask, layout = mask.contiguous(), (planes.shape[1], *planes.stride())
    shape = {"N": size, "P": pad, "U8": image.dtype == torch.uint8}
    share = max(1, -(-count // shares))
    with launching(image):
        beside = _beside(image.device) if image.is_cuda and shares > 1 else None
        for first in range(0, count, share):
            many = min(share, count - first)
            _quarter[(many * 4,)](
                *(planes, halves, turned, mask, quarters, first, *layout),
                **shape,
                **products(pad),
            )
            if beside is not None:
                beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside) if beside is not None else nullcontext():
                _unfold[(many * -(-size // 2 // SUM["ROWS"]),)](
                    *(quarters, mask, planes, out, out if apart is None else apart),
                    *(first, *layout),
                    **shape,
                    RESIDUAL=apart is not None,
                    **SUM,
                )
        if beside is not None:
            # Until then the allocator must not give away what the other stream reads and writes.
            torch.cuda.current_stream().wait_stream(beside)
    return out, apart


@lru_cache
def _beside(device: torch.device) -> torch.cuda.Stream:
    # A priority of its own keeps it apart from the streams that callers get from torch's pool.
    return torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]


def products(pad: int) -> dict[str, int]:
    """How the first launch is cut: columns a step, warps, loads in flight."""
    return {"CHUNK": 32, "num_warps": 8 if pad > 64 else 4, "num_stages": 1}
