"""The destructor on a GPU: u8 in, DCT, mask, inverse, |x − x̂| on the way out, in two launches.

Each launch chains two products, D x Dᵀ ∘ M and Dᵀ S D, and keeps what is between them on the chip.
Only the spectrum S goes through memory: FP16, 25 MB for 64 crops of 256², which stays in the L2 of
the GPUs this is for.

Half of the arithmetic is never done.  A row of D is symmetric about the middle where its
frequency is even and antisymmetric where it is odd.  So with E and O the even and odd rows cut at
the middle, H = n/2 wide, D x is E (x + x flipped) and O (x − x flipped), and on the way back a
position and its mirror are one sum and one difference.  Both axes folded: 16 H³ multiplications
a plane in place of 4 n³ = 32 H³; and E and O, 64 KB for n = 256, stay in L1, where D would not.

Numerics.  FP16 operands, FP32 accumulation, one rounding between chained products.  Folded u8
pixels enter as integers, |p + q − 255| ≤ 255, exact in FP16; 1/255 is applied to the FP32 sums.
|coefficient| ≤ n/2.  Maximal error against FP64, u8 noise and a random mask, n = 256, in Triton's
interpreter: 4.3e-4, where plain FP16 products have 6.3e-4; tests/test_dct_triton.py.

Sizes 128 to 512, multiples of 16 (see `kernels.dct.fusible`): H is padded to a power of two, so
128, 256 and 512 waste nothing.  The tilings are fixed tables, so that the same build computes
the same way every time; `ralf bench dct --tilings` measures the alternatives listed here.

Only this file, dct_quarters_triton and residual_triton import triton.  TRITON_INTERPRET=1 runs
them on a CPU.

n: side   H: n/2   P: H as a power of two   a, b: parity of row and column frequency
"""

# ruff: noqa: PLR0917  (a kernel's arguments are positional)

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from subprocess import CalledProcessError

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError

from ralf.kernels.dct import CENTRE, FusedKernelError, basis


@dataclass(frozen=True)
class Tiling:
    """How one launch is cut: rows a program makes, columns a step, warps, loads in flight."""

    rows: int
    chunk: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tilings:
    """Of the two launches."""

    forward: Tiling
    inverse: Tiling

    def __post_init__(self) -> None:
        # The inverse reads whole chunks of frequencies, and the forward writes whole rows of them.
        if self.forward.rows % self.inverse.chunk:
            raise ValueError(
                f"the forward's rows ({self.forward.rows}) should be a multiple of the inverse's "
                f"chunk ({self.inverse.chunk})"
            )


CHOSEN: dict[int, Tilings] = {
    64: Tilings(Tiling(64, 64, 4, 2), Tiling(64, 64, 4, 2)),
    128: Tilings(Tiling(64, 64, 8, 2), Tiling(64, 64, 8, 2)),
    256: Tilings(Tiling(32, 64, 8, 2), Tiling(32, 32, 8, 2)),
}
"""By P: the largest that Triton compiles for sm_90 without spilling registers.  Which is fastest is
not measured."""
CANDIDATES: tuple[Tilings, ...] = (
    Tilings(Tiling(32, 32, 4, 2), Tiling(32, 32, 4, 2)),
    Tilings(Tiling(32, 32, 8, 2), Tiling(32, 32, 8, 3)),
    Tilings(Tiling(64, 32, 8, 3), Tiling(32, 64, 4, 3)),
    Tilings(Tiling(64, 32, 8, 2), Tiling(64, 32, 8, 2)),
    Tilings(Tiling(64, 64, 8, 2), Tiling(64, 64, 8, 3)),
    Tilings(Tiling(64, 64, 8, 3), Tiling(32, 32, 4, 3)),
)
"""What `bench dct --tilings` tries, as far as rows and chunk fit into P.  None spills at 256²."""


@triton.jit  # type: ignore[untyped-decorator]
def _pixel(pointer, u8: tl.constexpr, inside):  # type: ignore[no-untyped-def]
    """A pixel as FP32, about its middle: −127.5..127.5 of bytes, −½..½ of floats."""
    value = tl.load(pointer, mask=inside, other=0).to(tl.float32)
    return value - (127.5 if u8 else 0.5)


@triton.jit  # type: ignore[untyped-decorator]
def _forward(  # type: ignore[no-untyped-def]
    image,
    halves,
    turned,
    mask,
    spectrum,
    channels,
    stride_m,
    stride_c,
    stride_h,
    stride_w,
    N: tl.constexpr,
    P: tl.constexpr,
    U8: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """ROWS row frequencies of one parity, all columns: S[a, :, u, :] = M ∘ (D x Dᵀ)."""
    H: tl.constexpr = N // 2
    PARTS: tl.constexpr = 2 * ((H + ROWS - 1) // ROWS)
    # 64 bits: the offsets of a large batch pass 2³¹.
    plane = (tl.program_id(0) // PARTS).to(tl.int64)
    a = (tl.program_id(0) % PARTS) % 2
    u = (tl.program_id(0) % PARTS) // 2 * ROWS + tl.arange(0, ROWS)
    v = tl.arange(0, P)
    k = tl.arange(0, CHUNK)
    sign = (1 - 2 * a).to(tl.float32)
    base = image + (plane // channels) * stride_m + (plane % channels) * stride_c
    even = tl.zeros((ROWS, P), tl.float32)
    odd = tl.zeros((ROWS, P), tl.float32)
    for left in range(0, H, CHUNK):
        c = left + tl.arange(0, CHUNK)
        near = tl.zeros((ROWS, CHUNK), tl.float32)  # columns c
        far = tl.zeros((ROWS, CHUNK), tl.float32)  # their mirrors, n − 1 − c
        for top in range(0, H, CHUNK):
            r = top + k
            inside = (r < H)[:, None] & (c < H)[None, :]
            rows = tl.load(halves + (a * P + u[:, None]) * P + r[None, :])
            above = base + r[:, None] * stride_h
            below = base + (N - 1 - r)[:, None] * stride_h
            at, mirror = c[None, :] * stride_w, (N - 1 - c)[None, :] * stride_w
            fold = _pixel(above + at, U8, inside) + sign * _pixel(below + at, U8, inside)
            near = tl.dot(rows, fold.to(tl.float16), near)
            fold = _pixel(above + mirror, U8, inside) + sign * _pixel(below + mirror, U8, inside)
            far = tl.dot(rows, fold.to(tl.float16), far)
        # After the first sums, whose operands are integers and so exact in FP16.
        scale = 1.0 / 255 if U8 else 1.0
        columns = turned + c[:, None] * P + v[None, :]
        even = tl.dot(((near + far) * scale).to(tl.float16), tl.load(columns), even)
        odd = tl.dot(((near - far) * scale).to(tl.float16), tl.load(columns + P * P), odd)
    kept = (u < H)[:, None] & (v < H)[None, :]
    weights = mask + (2 * u + a)[:, None] * N + 2 * v[None, :]
    out = spectrum + ((plane * 4 + a * 2) * P + u[:, None]) * P + v[None, :]
    even *= tl.load(weights, mask=kept, other=0).to(tl.float32)
    odd *= tl.load(weights + 1, mask=kept, other=0).to(tl.float32)
    # Without a mask: the inverse reads the padding too, and it must be zero (its weights were 0).
    tl.store(out, even.to(tl.float16))
    tl.store(out + P * P, odd.to(tl.float16))


@triton.jit  # type: ignore[untyped-decorator]
def _half_back(  # type: ignore[no-untyped-def]
    halves,
    turned,
    spectrum,
    k,
    b: tl.constexpr,
    H: tl.constexpr,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """What the columns' frequencies of parity b give at rows k, and at their mirrors."""
    c = tl.arange(0, P)
    upper = tl.zeros((ROWS, P), tl.float32)
    lower = tl.zeros((ROWS, P), tl.float32)
    for left in range(0, H, CHUNK):
        v = left + tl.arange(0, CHUNK)
        even = tl.zeros((ROWS, CHUNK), tl.float32)
        odd = tl.zeros((ROWS, CHUNK), tl.float32)
        for top in range(0, H, CHUNK):
            u = top + tl.arange(0, CHUNK)
            rows = turned + k[:, None] * P + u[None, :]
            part = spectrum + (b * P + u[:, None]) * P + v[None, :]
            even = tl.dot(tl.load(rows), tl.load(part), even)
            odd = tl.dot(tl.load(rows + P * P), tl.load(part + 2 * P * P), odd)
        columns = tl.load(halves + (b * P + v[:, None]) * P + c[None, :])
        upper = tl.dot((even + odd).to(tl.float16), columns, upper)
        lower = tl.dot((even - odd).to(tl.float16), columns, lower)
    return upper, lower


@triton.jit  # type: ignore[untyped-decorator]
def put(  # type: ignore[no-untyped-def]
    values,
    rows,
    columns,
    inside,
    base,
    destroyed,
    residual,
    stride_h,
    stride_w,
    N: tl.constexpr,
    U8: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """One quarter of the plane, and how far it is from the pixels that came in."""
    at = rows[:, None] * N + columns[None, :]
    tl.store(destroyed + at, values.to(destroyed.dtype.element_ty), mask=inside)
    if RESIDUAL:
        pixels = base + rows[:, None] * stride_h + columns[None, :] * stride_w
        came = _pixel(pixels, U8, inside)
        came = (came / 255 if U8 else came) + 0.5
        tl.store(residual + at, tl.abs(came - values).to(residual.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _inverse(  # type: ignore[no-untyped-def]
    spectrum,
    halves,
    turned,
    mask,
    image,
    destroyed,
    residual,
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
    CHUNK: tl.constexpr,
):
    """ROWS rows of the upper half and their mirrors, all columns: x̂ = Dᵀ S D + ½ M₀₀."""
    H: tl.constexpr = N // 2
    PARTS: tl.constexpr = (H + ROWS - 1) // ROWS
    plane = (tl.program_id(0) // PARTS).to(tl.int64)
    k = (tl.program_id(0) % PARTS) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, P)
    spectrum += plane * 4 * P * P
    upper, lower = _half_back(halves, turned, spectrum, k, 0, H, P, ROWS, CHUNK)
    upper_odd, lower_odd = _half_back(halves, turned, spectrum, k, 1, H, P, ROWS, CHUNK)
    middle = 0.5 * tl.load(mask).to(tl.float32)
    upper += middle
    lower += middle
    base = image + (plane // channels) * stride_m + (plane % channels) * stride_c
    out, apart = destroyed + plane * N * N, residual
    if RESIDUAL:
        apart = residual + plane * N * N
    inside = (k < H)[:, None] & (c < H)[None, :]
    below, mirror = N - 1 - k, N - 1 - c
    sh, sw = stride_h, stride_w
    put(upper + upper_odd, k, c, inside, base, out, apart, sh, sw, N, U8, RESIDUAL)
    put(upper - upper_odd, k, mirror, inside, base, out, apart, sh, sw, N, U8, RESIDUAL)
    put(lower + lower_odd, below, c, inside, base, out, apart, sh, sw, N, U8, RESIDUAL)
    put(lower - lower_odd, below, mirror, inside, base, out, apart, sh, sw, N, U8, RESIDUAL)


# Never emptied: a process has at most as many sizes as models.
_folded: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}


def folded_basis(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """E and O as one FP16 tensor [2, P, P], zeros behind H; and the same with each transposed."""
    key = (size, device)
    if key not in _folded:
        half = size // 2
        matrix = basis(size, torch.float64, torch.device("cpu"))[:, :half]
        with torch.inference_mode(False):
            halves = torch.zeros(2, padded_half(size), padded_half(size), dtype=torch.float64)
            halves[:, :half, :half] = torch.stack((matrix[0::2], matrix[1::2]))
            # Made on the CPU, so that no other stream can see them half done.
            made = halves.to(torch.float16)
            _folded[key] = made.to(device), made.mT.contiguous().to(device)
    return _folded[key]


def padded_half(size: int) -> int:
    """P: half the side, up to a power of two."""
    return 1 << (size // 2 - 1).bit_length()


def destruct(
    image: Tensor,
    mask: Tensor,
    dtype: torch.dtype,
    residual: torch.dtype | None,
    tilings: Tilings | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Destroyed [..., n, n] in `dtype` and, where asked, |x − x̂| in `residual`; contiguous.

    The image is u8 or floats of 0..1, strides of any kind; the mask of any floating dtype.
    FusedKernelError where Triton cannot build or start the kernels.
    """
    size = image.shape[-1]
    pad = padded_half(size)
    chosen = tilings or CHOSEN[pad]
    planes = in_four_dimensions(image)
    count = planes.shape[0] * planes.shape[1]
    halves, turned = folded_basis(size, image.device)
    spectrum = image.new_empty((count, 2, 2, pad, pad), dtype=torch.float16)
    out = image.new_empty(image.shape, dtype=dtype)
    apart = None if residual is None else image.new_empty(image.shape, dtype=residual)
    # The image's strides go to the kernel, so that it is not copied; the mask is small.
    strides, mask = planes.stride(), mask.contiguous()
    shape = {"N": size, "P": pad, "U8": image.dtype == torch.uint8}
    forward, inverse = chosen.forward, chosen.inverse
    with launching(image):
        _forward[(count * 2 * _parts(size, forward),)](
            *(planes, halves, turned, mask, spectrum, planes.shape[1], *strides),
            **shape,
            **_options(forward),
        )
        _inverse[(count * _parts(size, inverse),)](
            *(spectrum, halves, turned, mask, planes, out),
            # Triton needs a pointer here even where the kernel writes no residual.
            *(out if apart is None else apart, planes.shape[1], *strides),
            **shape,
            RESIDUAL=apart is not None,
            **_options(inverse),
        )
    return out, apart


def in_four_dimensions(image: Tensor) -> Tensor:
    """The same pixels as [m, c, n, n]."""
    planes = image.reshape(-1, *image.shape[-3:]) if image.ndim > 4 else image
    return planes[(None,) * (4 - planes.ndim)]


@contextmanager
def launching(image: Tensor) -> Iterator[None]:
    """On the image's device; what goes wrong there becomes a FusedKernelError."""
    try:
        with torch.cuda.device(image.device) if image.is_cuda else nullcontext():
            yield
    # Triton's own, and what making its launcher may meet: no C compiler, a cache it cannot write.
    except (TritonError, RuntimeError, OSError, CalledProcessError) as error:
        raise FusedKernelError(f"size {image.shape[-1]} on {image.device}: {error}") from error


def _parts(size: int, tiling: Tiling) -> int:
    return -(-size // 2 // tiling.rows)


def _options(tiling: Tiling) -> dict[str, int]:
    return {
        "ROWS": tiling.rows,
        "CHUNK": tiling.chunk,
        "num_warps": tiling.warps,
        "num_stages": tiling.stages,
    }


assert CENTRE == 0.5, "the kernels above have it as a number"
