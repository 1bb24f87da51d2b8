"""Two things that make training on a CPU faster: quick depthwise gradients, and memory that stays.

torch's bfloat16 kernels for a depthwise convolution are quick forwards, and backwards at stride 1
with 3×3 taps.  The input's gradient at stride 2 and the weights' gradient with 5×5 taps fall to a
reference loop that is ten to forty times slower: 70 % of a step of EfficientNet-Lite0.  Both follow
exactly from what is quick:

    stride 2, input    gradients spread out with zeros between, then a convolution at stride 1
    5×5, weights       the 25 taps are covered by four 3×3 squares of them, the inner row and
                       column twice

`QuickDepthwise` is entered around a forward pass; what else it computes passes through.  In FP32
torch's own way is as quick, and stays.
"""

import ctypes
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

SIDES = (3, 5)


class QuickDepthwise(TorchFunctionMode):
    """While entered, depthwise convolutions on the CPU take their gradients the quick way."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.conv2d:
            call = _Call.of(args, kwargs)
            if call.suits:
                return call.apply()
        return func(*args, **kwargs)


@dataclass(frozen=True)
class _Call:
    """conv2d's arguments, by its own names and in its own order."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None = None
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: int = 1

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "_Call":
        return cls(*args, **kwargs)

    @property
    def dtype(self) -> torch.dtype:
        """What it would be computed in."""
        # This mode sees the call before autocast does, so it must cast as autocast would.
        cast: torch.dtype = torch.get_autocast_dtype("cpu")
        return cast if torch.is_autocast_enabled("cpu") else self.input.dtype

    @property
    def suits(self) -> bool:
        """Whether the quick way gives the same, and is quicker."""
        x, weight = self.input, self.weight
        if isinstance(self.padding, str) or self.bias is not None or x.device.type != "cpu":
            return False
        side = weight.shape[-1]
        depthwise = x.ndim == 4 and self.groups == x.shape[1] == weight.shape[0]
        plain = weight.shape[-2] == side and side in SIDES and _both(self.dilation) == (1, 1)
        short = _both(self.stride) in ((1, 1), (2, 2)) and max(_both(self.padding)) < side
        return depthwise and plain and short and self.dtype is torch.bfloat16

    def apply(self) -> Tensor:
        x, weight = self.input.to(self.dtype), self.weight.to(self.dtype)
        made: Tensor = _Depthwise.apply(x, weight, _both(self.stride)[0], _both(self.padding))
        return made


def _both(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


class _Depthwise(torch.autograd.Function):
    """x [n, c, h, w], weight [c, 1, k, k] → [n, c, h', w']."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, stride: int, padding: tuple[int, int]
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        with torch.autocast("cpu", enabled=False):
            return F.conv2d(x, weight, None, stride, padding, 1, x.shape[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        spread = _spread(gradients[0], x, weight.shape[-1], ctx.stride, ctx.padding)
        with torch.autocast("cpu", enabled=False):
            of_x = _of_input(spread, weight, ctx.padding) if ctx.needs_input_grad[0] else None
            of_weight = None
            if ctx.needs_input_grad[1]:
                of_weight = _of_weight(x, spread, weight, ctx.padding)
        return of_x, of_weight, None, None


def _spread(
    gradient: Tensor, x: Tensor, side: int, stride: int, padding: tuple[int, int]
) -> Tensor:
    """The gradient where stride 1 would have put it, zero between."""
    if stride == 1:
        return gradient
    height, width = (
        size + 2 * pad - side + 1 for size, pad in zip(x.shape[2:], padding, strict=True)
    )
    shape = (*gradient.shape[:2], height, width)
    out = torch.empty(shape, dtype=gradient.dtype, memory_format=torch.channels_last).zero_()
    # Rows and columns that stride left out have no gradient.
    out[:, :, ::stride, ::stride] = gradient
    return out


def _of_input(spread: Tensor, weight: Tensor, padding: tuple[int, int]) -> Tensor:
    side = weight.shape[-1]
    around = (side - 1 - padding[0], side - 1 - padding[1])
    # The gradient of a convolution is a convolution with the taps mirrored.
    return F.conv2d(spread, weight.flip(2, 3), None, 1, around, 1, spread.shape[1])


def _of_weight(x: Tensor, spread: Tensor, weight: Tensor, padding: tuple[int, int]) -> Tensor:
    if weight.shape[-1] == 3:
        return _three(x, spread, weight, padding)
    height, width = spread.shape[2:]
    padded = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    out = torch.empty_like(weight)
    # The squares overlap in the middle row and column, and give those taps the same values.
    for row in (0, 2):
        for column in (0, 2):
            part = padded[:, :, row : row + height + 2, column : column + width + 2]
            part = part.contiguous(memory_format=torch.channels_last)
            corner = weight[:, :, row : row + 3, column : column + 3].contiguous()
            out[:, :, row : row + 3, column : column + 3] = _three(part, spread, corner, (0, 0))
    return out


def _three(x: Tensor, spread: Tensor, weight: Tensor, padding: tuple[int, int]) -> Tensor:
    """The gradient of nine taps, by torch's own kernel."""
    made: Tensor = torch.ops.aten.convolution_backward(
        spread,
        x,
        weight,
        None,
        (1, 1),
        padding,
        (1, 1),
        False,
        (0, 0),
        x.shape[1],
        [False, True, False],
    )[1]
    return made


TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3
"""mallopt's numbers for what it sets."""


def keep_freed() -> bool:
    """Keep freed memory in this process from now on; False where the C library cannot do that.

    glibc maps every tensor of more than 32 MB anew and unmaps it when it dies, and the kernel
    clears each of its pages at the first touch: two fifths of the time of an evaluation on two
    cores.  A training run has the same tensors at every step.  A worker does not call this: its
    memory is bounded, and shared.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    wanted = ((MMAP_THRESHOLD, 1 << 30), (TRIM_THRESHOLD, (1 << 31) - 1), (TOP_PAD, 64 << 20))
    return mallopt is not None and all(mallopt(name, value) == 1 for name, value in wanted)
