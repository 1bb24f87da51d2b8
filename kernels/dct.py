"""Keep chosen frequencies of an image: DCT, mask, inverse DCT; the op `ralf::destruct`.

`destruct_residual` gives |image − destroyed| as well, in the same pass where a kernel can.

With the orthonormal basis D the transform of an image x is X = D x D^T, so what a mask M keeps
is D^T (M * X) D: four small matrix products and one multiplication.  No FFT: matrix products
run on every device, in half precision, and survive export to ONNX.

`destruct` takes pixels, u8 or floats in 0..1, and works in the mask's dtype on values moved to
-1/2..1/2: the mean alone makes a coefficient of n/2, for u8 pixels up to 255 n, and 65,280 at
n = 256 is a hair under the largest FP16 number (65,504).  A constant c has the one coefficient
c n, so c * M[0, 0] put back afterwards is exact.

Numerics, on a CPU, 12 planes of u8 noise and a uniformly random mask: maximal error against the
same in FP64, and what the first transform of a white u8 image without centring comes to in FP16.

    n      FP32      FP16      FP16, not centred    bf16      white u8
    64     2.3e-7    5.3e-4    6.6e-4               5.4e-3    16,320
    255    4.2e-7    6.3e-4    1.4e-3               4.7e-3    65,024
    256    4.1e-7    7.2e-4    1.1e-3               6.6e-3    65,280
    299    3.9e-7    6.5e-4    1.1e-3               5.5e-3    infinite

Half a step of an 8-bit pixel is 2.0e-3: FP16 stays below, bf16 does not, so the networks run
this part in FP32 where they run in bf16.

The ops and their backward are opaque to torch.compile and torch.export, so that fused kernels can
take their place; `destruct_reference` is what the first means, in plain torch, and what export
decomposes it to.  On CUDA, FP16 products of the sizes that `fusible` knows are dct_triton's;
without triton, or where it cannot build its kernels, the log says so once and the reference runs.
Differentiable once; gradients are summed in FP32 at least, since those of a mean over a batch
are too small for FP16.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import structlog
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

CENTRE = 0.5
log = structlog.get_logger()
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
    """What ralf::destruct means, in plain torch; image [..., h, w], mask [h, w] of 0..1."""
    kept = idct2(dct2(centred(image, mask.dtype)) * mask)
    return kept + CENTRE * mask[0, 0]


def destruct_residual_reference(image: Tensor, mask: Tensor, half: bool) -> tuple[Tensor, Tensor]:
    """What ralf::destruct_residual means."""
    kept_in = torch.float16 if half else mask.dtype
    kept = idct2(dct2(centred(image, kept_in)) * mask.to(kept_in))
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


class FusedKernelError(RuntimeError):
    """The fused kernels cannot be built or started here; the reference can."""


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


Fused = Callable[[Tensor, Tensor, torch.dtype, torch.dtype | None], tuple[Tensor, Tensor | None]]


@lru_cache(maxsize=1)
def _fused() -> Fused | None:
    try:
        from ralf.kernels.dct_triton import destruct as fused
    except ImportError as error:
        log.warning("dct.reference_used", reason=str(error))
        return None
    return fused


_unbuildable: set[tuple[torch.device, int]] = set()


def _try_fused(
    image: Tensor, mask: Tensor, products: torch.dtype, residual: bool
) -> tuple[Tensor, Tensor | None] | None:
    """What the fused kernels make of it, or None where the reference has to."""
    place = (image.device, image.shape[-1])
    if not fusible(image, products) or place in _unbuildable or (fused := _fused()) is None:
        return None
    try:
        return fused(image, mask, mask.dtype, products if residual else None)
    except FusedKernelError as error:
        _unbuildable.add(place)
        log.warning("dct.reference_used", reason=str(error))
        return None


def _plainly(image: Tensor, mask: Tensor) -> Tensor:
    # Autocast reaches into an op's body, and would run the products in bf16.
    with torch.autocast(image.device.type, enabled=False):
        return destruct_reference(image, mask)


def _residual_plainly(image: Tensor, mask: Tensor, half: bool) -> tuple[Tensor, Tensor]:
    with torch.autocast(image.device.type, enabled=False):
        return destruct_residual_reference(image, mask, half)


@torch.library.custom_op("ralf::destruct", mutates_args=())
def destruct(image: Tensor, mask: Tensor) -> Tensor:
    """The image without the frequencies that the mask (0..1) takes away, in the mask's dtype."""
    check_mask(image, mask)
    return _plainly(image, mask)


@destruct.register_kernel("cuda")
def _destruct_on_cuda(image: Tensor, mask: Tensor) -> Tensor:
    check_mask(image, mask)
    made = _try_fused(image, mask, mask.dtype, residual=False)
    return made[0] if made else _plainly(image, mask)


@destruct.register_fake
def _destruct_shape(image: Tensor, mask: Tensor) -> Tensor:
    return torch.empty(image.shape, dtype=mask.dtype, device=image.device)


@torch.library.custom_op("ralf::destruct_residual", mutates_args=())
def destruct_residual(image: Tensor, mask: Tensor, half: bool) -> tuple[Tensor, Tensor]:
    """What destruct gives, in the mask's dtype, and |image − that|, taken before rounding.

    half: the products run in FP16 and the residual comes in FP16; else in the mask's dtype.  The
    mask itself stays as it is, so that its gradient keeps FP32's range.
    """
    check_mask(image, mask)
    return _residual_plainly(image, mask, half)


@destruct_residual.register_kernel("cuda")
def _destruct_residual_on_cuda(image: Tensor, mask: Tensor, half: bool) -> tuple[Tensor, Tensor]:
    check_mask(image, mask)
    made = _try_fused(image, mask, torch.float16 if half else mask.dtype, residual=True)
    if made and made[1] is not None:
        return made[0], made[1]
    return _residual_plainly(image, mask, half)


@destruct_residual.register_fake
def _destruct_residual_shapes(image: Tensor, mask: Tensor, half: bool) -> tuple[Tensor, Tensor]:
    destroyed = torch.empty(image.shape, dtype=mask.dtype, device=image.device)
    return destroyed, torch.empty_like(destroyed, dtype=torch.float16 if half else mask.dtype)


@torch.library.custom_op("ralf::destruct_backward", mutates_args=())
def destruct_backward(grad: Tensor, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients to image and mask; the image's is empty where the image is u8.

    destruct is its own adjoint; the mask's share is the product of both spectra.
    """
    exact = wide(mask.dtype)
    with torch.autocast(grad.device.type, enabled=False):
        spectrum = dct2(grad.to(exact))
        products = spectrum * dct2(centred(image, exact))
        to_mask = products.reshape(-1, *mask.shape).sum(0)
        to_mask[0, 0] += CENTRE * grad.sum(dtype=exact)
        to_mask = to_mask.to(mask.dtype)
        if image.dtype == torch.uint8:
            return grad.new_empty(0), to_mask
        return idct2(spectrum * mask.to(exact)).to(image.dtype), to_mask


@destruct_backward.register_fake
def _destruct_backward_shape(grad: Tensor, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    to_image = grad.new_empty(0) if image.dtype == torch.uint8 else image.new_empty(image.shape)
    return to_image, mask.new_empty(mask.shape)


def _keep_for_backward(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    image, mask = ctx.saved_tensors
    to_image, to_mask = destruct_backward(grad, image, mask)
    wants_image, wants_mask = ctx.needs_input_grad
    return (to_image if wants_image else None, to_mask if wants_mask else None)


destruct.register_autograd(_backward, setup_context=_keep_for_backward)


def _keep_with_destroyed(
    ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: tuple[Tensor, Tensor]
) -> None:
    ctx.save_for_backward(*inputs[:2], output[0])


def _backward_with_residual(
    ctx: Any, grad: Tensor, to_residual: Tensor
) -> tuple[Tensor | None, Tensor | None, None]:
    image, mask, destroyed = ctx.saved_tensors
    sign = (unit_pixels(image, mask.dtype) - destroyed).sign()
    pulled = sign * to_residual
    to_image, to_mask = destruct_backward(grad - pulled, image, mask)
    wants_image, wants_mask, _ = ctx.needs_input_grad
    # A whole u8 image has no gradient, and needs none.
    to_image = to_image + pulled.to(image.dtype) if wants_image else None
    return to_image, (to_mask if wants_mask else None), None


destruct_residual.register_autograd(_backward_with_residual, setup_context=_keep_with_destroyed)
