"""The ops `ralf::destruct` and `ralf::destruct_residual`, and `split`, which the networks call.

`destruct` gives an image without the frequencies that a mask takes away; `destruct_residual` gives
|image − destroyed| as well, in the same pass if a kernel can.  What they compute is defined by the
references in ralf.kernels.dct, in plain torch.

The ops and their backward are opaque to torch.compile, so that fused kernels can take their place.
On CUDA, FP16 products run in dct_triton where `fusible` allows their size.  Without triton, or if
it cannot build its kernels, the reference runs, and the log has one warning.

An export gets the references: our ops exist only in torch, and torch 2.11 cannot decompose them
after the export (SpecViolationError: the basis is a constant that the program lacks).

The ops are differentiable once.  Gradients are summed in FP32 at least, since those of a mean over
a batch are too small for FP16.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import structlog
import torch
from torch import Tensor

from ralf.kernels.dct import (
    CENTRE,
    FusedKernelError,
    centred,
    check_mask,
    dct2,
    destruct_reference,
    destruct_residual_reference,
    fusible,
    idct2,
    unit_pixels,
    wide,
)

log = structlog.get_logger()

Fused = Callable[[Tensor, Tensor, torch.dtype, torch.dtype | None], tuple[Tensor, Tensor | None]]


@lru_cache(maxsize=1)
def _fused() -> Fused | None:
    try:
        from ralf.kernels.dct_triton import destruct as fused
    except ImportError as error:
        log.warning("dct.reference_used", reason=str(error))
        return None
    return fused


# What failed once is not tried again: each try would compile for seconds, in the middle of a job.
_unbuildable: set[tuple[torch.device, int]] = set()


def _try_fused(
    image: Tensor, mask: Tensor, products: torch.dtype, residual: bool
) -> tuple[Tensor, Tensor | None] | None:
    """The fused kernels' result; None where the reference has to run instead."""
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


def destruct(image: Tensor, mask: Tensor) -> Tensor:
    """The image without the frequencies that the mask (0..1) takes away, in the mask's dtype."""
    if torch.compiler.is_exporting():
        return destruct_reference(image, mask)
    made: Tensor = destruct_op(image, mask)
    return made


def destruct_residual(image: Tensor, mask: Tensor, half: bool) -> tuple[Tensor, Tensor]:
    """What destruct gives, in the mask's dtype, and |image − that|, taken before rounding.

    half: the products run in FP16 and the residual comes in FP16; else in the mask's dtype.  The
    mask itself stays as it is, so that its gradient keeps FP32's range.
    """
    if torch.compiler.is_exporting():
        # Whatever `half` says: what is exported is lowered by who builds from it.
        return destruct_residual_reference(image, mask, False)
    made: tuple[Tensor, Tensor] = destruct_residual_op(image, mask, half)
    return made


@torch.library.custom_op("ralf::destruct", mutates_args=())
def destruct_op(image: Tensor, mask: Tensor) -> Tensor:
    """What destruct gives, as an op of torch's."""
    check_mask(image, mask)
    return _plainly(image, mask)


@destruct_op.register_kernel("cuda")
def _destruct_on_cuda(image: Tensor, mask: Tensor) -> Tensor:
    check_mask(image, mask)
    made = _try_fused(image, mask, mask.dtype, residual=False)
    return made[0] if made else _plainly(image, mask)


@destruct_op.register_fake
def _destruct_shape(image: Tensor, mask: Tensor) -> Tensor:
    # Contiguous whatever the image's strides, as the kernels write it; empty_like would copy them.
    return torch.empty(image.shape, dtype=mask.dtype, device=image.device)


@torch.library.custom_op("ralf::destruct_residual", mutates_args=())
def destruct_residual_op(image: Tensor, mask: Tensor, half: bool) -> tuple[Tensor, Tensor]:
    """What destruct_residual gives, as an op of torch's."""
    check_mask(image, mask)
    return _residual_plainly(image, mask, half)


@destruct_residual_op.register_kernel("cuda")
def _destruct_residual_on_cuda(image: Tensor, mask: Tensor, half: bool) -> tuple[Tensor, Tensor]:
    check_mask(image, mask)
    made = _try_fused(image, mask, torch.float16 if half else mask.dtype, residual=True)
    if made and made[1] is not None:
        return made[0], made[1]
    return _residual_plainly(image, mask, half)


@destruct_residual_op.register_fake
def _destruct_residual_shapes(image: Tensor, mask: Tensor, half: bool) -> tuple[Tensor, Tensor]:
    destroyed = torch.empty(image.shape, dtype=mask.dtype, device=image.device)
    return destroyed, torch.empty_like(destroyed, dtype=torch.float16 if half else mask.dtype)


def split(image: Tensor, mask: Tensor, half: bool) -> tuple[Tensor, Tensor]:
    """What destruct_residual gives; called plainly where nothing is compiled, traced or learnt.

    The first call of an op on a CPU imports torch's compiler, which takes more than a second.
    """
    opaque = torch.compiler.is_compiling() or torch.is_grad_enabled()
    if image.device.type != "cpu" or opaque:
        made: tuple[Tensor, Tensor] = destruct_residual(image, mask, half)
        return made
    check_mask(image, mask)
    return _residual_plainly(image, mask, half)


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
        # CENTRE * mask[0, 0] is added after the inverse, so it has a gradient of its own.
        to_mask[0, 0] += CENTRE * grad.sum(dtype=exact)
        to_mask = to_mask.to(mask.dtype)
        if image.dtype == torch.uint8:
            # An op's result must be a tensor: None is not possible here.
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


destruct_op.register_autograd(_backward, setup_context=_keep_for_backward)


def _keep_with_destroyed(
    ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: tuple[Tensor, Tensor]
) -> None:
    ctx.save_for_backward(*inputs[:2], output[0])


def _backward_with_residual(
    ctx: Any, grad: Tensor, to_residual: Tensor
) -> tuple[Tensor | None, Tensor | None, None]:
    image, mask, destroyed = ctx.saved_tensors
    # From `destroyed`, not from the residual: an absolute value has lost its sign.
    sign = (unit_pixels(image, mask.dtype) - destroyed).sign()
    pulled = sign * to_residual
    to_image, to_mask = destruct_backward(grad - pulled, image, mask)
    wants_image, wants_mask, _ = ctx.needs_input_grad
    # A whole u8 image has no gradient, and needs none.
    to_image = to_image + pulled.to(image.dtype) if wants_image else None
    return to_image, (to_mask if wants_mask else None), None


destruct_residual_op.register_autograd(_backward_with_residual, setup_context=_keep_with_destroyed)
