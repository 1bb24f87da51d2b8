"""Keep chosen frequencies of an image: DCT, mask, inverse DCT, in plain torch.

With the orthonormal basis D the transform of an image x is X = D x D^T, so what a mask M keeps
is D^T (M * X) D: four small matrix products and one multiplication.  No FFT: matrix products
run on every device, in half precision, and survive export to ONNX.

`destruct_reference` takes pixels, u8 or floats in 0..1, and works in the mask's dtype on values
moved to -1/2..1/2.  The mean alone makes a coefficient of n/2, for u8 pixels up to 255 n; at
n = 256 that is 65,280, just below the largest FP16 number (65,504).  A constant c has the one
coefficient c n, so adding c * M[0, 0] afterwards is exact.

Numerics, on a CPU, 12 planes of u8 noise and a uniformly random mask: the largest error against the
same in FP64, and the first transform of a white u8 image without centring in FP16.

    n      FP32      FP16      FP16, not centred    bf16      white u8
    64     2.3e-7    5.3e-4    6.6e-4               5.4e-3    16,320
    255    4.2e-7    6.3e-4    1.4e-3               4.7e-3    65,024
    256    4.1e-7    7.2e-4    1.1e-3               6.6e-3    65,280
    299    3.9e-7    6.5e-4    1.1e-3               5.5e-3    infinite

Half a step of an 8-bit pixel is 2.0e-3: FP16 stays below, bf16 does not, so networks whose other
arithmetic is bf16 run this part in FP32.

This file is the definition.  The ops that networks call are in ralf.kernels.destructor, the fused
kernels in ralf.kernels.dct_triton.
"""

import math

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

CENTRE = 0.5
_bases: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}


def basis(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The orthonormal DCT-II matrix D [size, size]: row k is frequency k.  Made in FP64."""
    key = (size, dtype, device)
    if key not in _bases:
        # A real tensor for any later caller, even where the first one traces for export or runs
        # in inference mode.
        with _disable_current_modes(), torch.inference_mode(False):
            _bases[key] = _make_basis(size).to(device, dtype)
    return _bases[key]


def _make_basis(size: int) -> Tensor:
    frequency = torch.arange(size, dtype=torch.float64)[:, None]
    position = torch.arange(size, dtype=torch.float64)[None, :]
    matrix = torch.cos(math.pi * (2 * position + 1) * frequency / (2 * size))
    scale = torch.full((size, 1), math.sqrt(2 / size), dtype=torch.float64)
    scale[0] = math.sqrt(1 / size)
    return matrix * scale


def _bases_of(image: Tensor) -> tuple[Tensor, Tensor]:
    # A side is a constant of its model, so a tracer with symbolic shapes fixes it here.
    height, width = (int(side) for side in image.shape[-2:])
    return (
        basis(height, image.dtype, image.device),
        basis(width, image.dtype, image.device),
    )


def dct2(image: Tensor) -> Tensor:
    """Orthonormal 2-D DCT-II of [..., h, w], in the image's own (floating) dtype."""
    rows, columns = _bases_of(image)
    return rows @ image @ columns.mT


def idct2(spectrum: Tensor) -> Tensor:
    """Inverse of dct2."""
    rows, columns = _bases_of(spectrum)
    return rows.mT @ spectrum @ columns


def centred(image: Tensor, dtype: torch.dtype) -> Tensor:
    """Pixels of 0..1, or u8 of 0..255, as -1/2..1/2."""
    if image.dtype == torch.uint8:
        # Exact in FP16 until the division; the other way round would round twice.
        return (image.to(dtype) - 255 * CENTRE) / 255
    return image.to(dtype) - CENTRE


def destruct_reference(image: Tensor, mask: Tensor) -> Tensor:
    """The definition of ralf::destruct in plain torch; image [..., h, w], mask [h, w] of 0..1."""
    kept = idct2(dct2(centred(image, mask.dtype)) * mask)
    return kept + CENTRE * mask[0, 0]


def destruct_residual_reference(image: Tensor, mask: Tensor, half: bool) -> tuple[Tensor, Tensor]:
    """The definition of ralf::destruct_residual."""
    kept_in = torch.float16 if half else mask.dtype
    kept = idct2(dct2(centred(image, kept_in)) * mask.to(kept_in))
    # Added in the mask's dtype: in FP16 the sum would be rounded once more.
    destroyed = kept.to(mask.dtype) + CENTRE * mask[0, 0]
    return destroyed, (unit_pixels(image, mask.dtype) - destroyed).abs().to(kept_in)


def unit_pixels(image: Tensor, dtype: torch.dtype) -> Tensor:
    """Pixels of 0..1, or u8 of 0..255, as 0..1 in FP32 at least: what a residual is taken from."""
    exact = wide(dtype)
    return image.to(exact) / 255 if image.dtype == torch.uint8 else image.to(exact)


def wide(dtype: torch.dtype) -> torch.dtype:
    """FP32 for anything smaller."""
    return torch.promote_types(dtype, torch.float32)


def check_mask(image: Tensor, mask: Tensor) -> None:
    """ValueError unless the mask is one for this image."""
    if image.shape[-2:] != mask.shape or not mask.is_floating_point():
        raise ValueError(
            f"mask should be floating [h, w] of the image {tuple(image.shape)}, "
            f"got {mask.dtype} {tuple(mask.shape)}"
        )


def fusible(image: Tensor, products: torch.dtype) -> bool:
    """Whether dct_triton has kernels for it: FP16, square, 128 to 512, a multiple of 16."""
    height, width = image.shape[-2:]
    return (
        products == torch.float16
        and image.dtype in (torch.uint8, torch.float16, torch.bfloat16, torch.float32)
        and height == width
        and 128 <= height <= 512
        and height % 16 == 0
        and image.numel() > 0
    )


class FusedKernelError(RuntimeError):
    """The fused kernels cannot be built or started here; the reference can."""
