"""The reconstructor's residual blocks by other kernels on CUDA: off until a GPU has measured them.

    cudnn         first convolution, bias and ReLU in one call of cuDNN's (inductor cannot fuse
                  into cuDNN, so it makes a pass over memory of them)
    fused         residual_triton's two launches at the levels that have a tiling for them
    fused32       the same at the level of 32 channels alone
    fused+cudnn   fused, and at the other levels as cudnn

`use` switches a network that is placed on its device and is not trained any more; its state dict
stays the same.  An export always takes the plain block: what is called here exists only in torch.

Each level is checked against the plain block when it is switched, that is, when a model is loaded.
If it is further off than rounding explains, the level stays plain and the log says so.  If Triton
cannot build the kernel, the same weights run in plain torch, and the log has one warning.
"""

from collections.abc import Callable
from copy import deepcopy
from functools import lru_cache
from types import ModuleType
from typing import Literal, get_args

import structlog
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from ralf.kernels.dct import FusedKernelError
from ralf.kernels.networks.reconstructor import Reconstructor, Residual

log = structlog.get_logger()

Blocks = Literal["plain", "cudnn", "fused", "fused32", "fused+cudnn"]
BLOCKS: tuple[Blocks, ...] = get_args(Blocks)
FUSED: dict[Blocks, tuple[int, ...]] = {
    "fused": (32, 64),
    "fused32": (32,),
    "fused+cudnn": (32, 64),
}
"""The widths that residual_triton computes."""
HALF_STEP = 2.0**-11
"""FP16's, relative."""
SAME = ([1, 1], [1, 1], [1, 1])
"""Stride, padding and dilation of a 3×3 convolution that keeps the size."""


def use(network: nn.Module, blocks: Blocks, side: int) -> bool:
    """Compute the residual blocks so, for crops of this side; whether any level is switched."""
    switched = False
    for part in network.modules():
        if not isinstance(part, Reconstructor):
            continue
        levels = zip(part.encoders, part.decoders, strict=True)
        for level, stacks in enumerate(levels):
            both = [m for one in stacks for m in one.modules() if isinstance(m, Residual)]
            switched |= _switch(both, blocks, side >> level)
    return switched


def _switch(blocks: list[Residual], how: Blocks, side: int) -> bool:
    """One level's blocks; they stay plain if this does not apply to it, or is wrong."""
    example = next(blocks[0].parameters())
    pixels = _pixels(len(example), side)
    # The kernel is written for FP16 alone.
    if len(example) in FUSED.get(how, ()) and example.dtype == torch.float16 and pixels:
        for block in blocks:
            _pack(block, pixels)
        chosen = by_two_launches
    elif how in {"cudnn", "fused+cudnn"}:
        chosen = by_cudnn
    else:
        return False
    error, allowed = _errors(blocks[0], chosen, side)
    # Not `error > allowed`, which is false for NaN.
    if not error <= allowed:
        log.warning("blocks.plain_used", blocks=how, side=side, error=error, allowed=allowed)
        return False
    for block in blocks:
        block.instead = chosen
    return True


@torch.inference_mode()
def _errors(
    block: Residual, way: Callable[[Residual, Tensor], Tensor], side: int
) -> tuple[float, float]:
    """The way's largest error on noise, and what the plain block's own error allows."""
    example = next(block.parameters())
    # Few rows, to be quick, but the true width: it decides the tiling and how the edges are cut.
    shape = (2, len(example), min(side, 5), side)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(example)
    x = x.contiguous(memory_format=torch.channels_last)
    # FP64: on CUDA, cuDNN may compute FP32 with the short operands of TF32.
    exact = deepcopy(block).double()(x.double())
    error, plain = (float((y - exact).abs().max()) for y in (way(block, x), block(x)))
    return error, 2 * (plain + HALF_STEP * float(exact.abs().max()))


# cuDNN's convolution with bias and ReLU


def by_cudnn(block: Residual, x: Tensor) -> Tensor:
    """The block with its first half as one call."""
    first, second = (m for m in block.modules() if isinstance(m, nn.Conv2d))
    middle = convolution_relu(x, first.weight, first.get_parameter("bias"))
    added: Tensor = second(middle) + x
    return added


@torch.library.custom_op("ralf::convolution_relu", mutates_args=())
def convolution_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """relu(3×3 convolution + bias) of the input's size and number of channels."""
    return conv2d(x, weight, bias, padding=1).relu()


@convolution_relu.register_kernel("cuda")
def _convolution_relu_on_cuda(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    made: Tensor = torch.ops.aten.cudnn_convolution_relu(x, weight, bias, *SAME, 1)
    return made


@convolution_relu.register_fake
def _convolution_relu_shape(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.empty_like(x)


# Two launches of Triton's


@lru_cache(maxsize=1)
def _kernels() -> ModuleType | None:
    try:
        from ralf.kernels import residual_triton
    except ImportError as error:
        log.warning("blocks.plain_used", reason=str(error))
        return None
    return residual_triton


def _pixels(channels: int, width: int) -> int | None:
    """How many pixels its tiling packs into a row; None: no tiling fits, or there is no triton."""
    kernels = _kernels() if channels in FUSED["fused"] else None
    tiling = kernels.tiling_of(channels, width) if kernels else None
    return tiling.pixels if tiling else None


NAMES = ("first", "first_bias", "second", "second_bias")


def _pack(block: Residual, pixels: int) -> None:
    """Keep the weights beside the block as the kernel reads them, outside its state dict."""
    kernels = _kernels()
    assert kernels is not None
    for name, tensor in zip(NAMES, kernels.Weights.of(block, pixels), strict=True):
        block.register_buffer(f"packed_{name}", tensor, persistent=False)


def by_two_launches(block: Residual, x: Tensor) -> Tensor:
    """The block with its packed weights."""
    made: Tensor = residual_block(x, *(block.get_buffer(f"packed_{name}") for name in NAMES))
    return made


@torch.library.custom_op("ralf::residual_block", mutates_args=())
def residual_block(
    x: Tensor, first: Tensor, first_bias: Tensor, second: Tensor, second_bias: Tensor
) -> Tensor:
    """x + conv(relu(conv(x))), the weights packed as residual_triton reads them."""
    return _unpacked(x, first, first_bias, second, second_bias)


def _unpacked(
    x: Tensor, first: Tensor, first_bias: Tensor, second: Tensor, second_bias: Tensor
) -> Tensor:
    """By torch's convolutions."""
    channels = x.shape[1]

    def conv(y: Tensor, packed: Tensor, bias: Tensor) -> Tensor:
        # The first pixel of a group sees the first three places.
        taps = packed[:, : 3 * channels, :channels].reshape(3, 3, channels, channels)
        return conv2d(y, taps.permute(3, 2, 0, 1), bias[:channels], padding=1)

    return conv(conv(x, first, first_bias).relu(), second, second_bias) + x


# What failed once is not tried again: each try would compile for seconds, in the middle of a job.
_unbuildable: set[tuple[torch.device, int]] = set()


@residual_block.register_kernel("cuda")
def _residual_block_on_cuda(
    x: Tensor, first: Tensor, first_bias: Tensor, second: Tensor, second_bias: Tensor
) -> Tensor:
    x = x.contiguous(memory_format=torch.channels_last)
    kernels, place = _kernels(), (x.device, x.shape[1])
    tiling = kernels.tiling_of(*x.shape[1::2]) if kernels and place not in _unbuildable else None
    if kernels and tiling:
        weights = kernels.Weights(first, first_bias, second, second_bias)
        try:
            made: Tensor = kernels.residual(x, weights, tiling)
            return made
        except FusedKernelError as error:
            _unbuildable.add(place)
            log.warning("blocks.plain_used", reason=str(error))
    return _unpacked(x, first, first_bias, second, second_bias)


@residual_block.register_fake
def _residual_block_shape(
    x: Tensor, first: Tensor, first_bias: Tensor, second: Tensor, second_bias: Tensor
) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)
