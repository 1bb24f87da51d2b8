"""Where two runs of one network part: the first layer whose values differ.

A layer is a leaf module of the network, by its dotted name, and its value is what it hands on.
Anything that can say what its layers give is a `Layers`: the module itself (here), the ONNX graph
under ONNX Runtime (kernels.export_onnx), a plan (through the builders).  Two of them are compared
in the order of the first one's execution, a few layers at a time, so that a large network's
activations are never in memory at once.

A difference is told relative to the layer's own size: the root mean square of the difference over
that of the expected values.  Rounding grows with depth, little by little (in FP16 an untrained
RALF small reached 0.12 in its last layer, from 0.0005 in its first), while a wrong layer makes a
jump: the first layer that differs by several times more than all before it is the one named.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

AT_ONCE = 16
"""Layers whose values are held together."""
JUMP = 4.0
"""A layer that rounds as those before it did differs by less than this many times as much."""
TOLERANCE: dict[str, float] = {"fp32": 1e-3, "fp16": 0.01, "bf16": 0.05}
"""Relative differences below are rounding, however they came."""


class Layers(Protocol):
    """A runnable network that can say what its layers give."""

    def names(self) -> Sequence[str]:
        """Its layers, in the order in which they run."""

    def values(
        self, crops: NDArray[np.uint8], names: Sequence[str]
    ) -> Mapping[str, NDArray[np.float32]]:
        """What the named layers give for these crops."""


@dataclass(frozen=True)
class Divergence:
    """The first layer that differs by more than it may."""

    layer: str
    difference: float
    """Root mean square of the difference over that of the expected values; inf for a NaN."""
    before: float
    """The most that any layer before it differed."""

    def __str__(self) -> str:
        return f"{self.layer} (differs by {self.difference:.3g}, none before by {self.before:.3g})"


def first_divergence(
    expected: Layers, got: Layers, crops: NDArray[np.uint8], tolerance: float
) -> Divergence | None:
    """The first layer, of those known to both, that differs by more than rounding explains.

    Where none jumps, but rounding alone has grown beyond four tolerances, it is the layer where it
    did; None where it has not.
    """
    known = set(got.names())
    shared = [name for name in expected.names() if name in known]
    if not shared:
        raise ValueError("the two networks have no layer in common to compare")
    worst, drifted = 0.0, None
    for start in range(0, len(shared), AT_ONCE):
        names = shared[start : start + AT_ONCE]
        wanted, had = expected.values(crops, names), got.values(crops, names)
        for name in names:
            difference = relative(wanted[name], had[name])
            if difference > tolerance and difference > JUMP * worst:
                return Divergence(name, difference, worst)
            if drifted is None and difference > JUMP * tolerance:
                drifted = Divergence(name, difference, worst)
            worst = max(worst, difference)
    return drifted


def relative(expected: NDArray[np.float32], got: NDArray[np.float32]) -> float:
    """Size of the difference over the size of what was expected; inf where they do not compare."""
    if expected.shape != got.shape or not np.isfinite(got).all():
        return float("inf")
    size = float(np.sqrt(np.square(expected, dtype=np.float64).mean()))
    apart = float(np.sqrt(np.square(expected - got, dtype=np.float64).mean()))
    if apart == 0:
        return 0.0
    return apart / size if size > 0 else float("inf")


class ModuleLayers:
    """A torch module's leaves, whatever device and dtype it is in."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.order: list[str] = []

    def names(self) -> Sequence[str]:
        """Leaves in the order in which they ran; one crop is run to learn it."""
        if not self.order:
            side = int(self.network.size)  # type: ignore[arg-type]
            blank = np.zeros((1, 3, side, side), np.uint8)
            leaves = [name for name, module in self.network.named_modules() if _is_leaf(module)]
            self.order = list(self.values(blank, leaves))
        return self.order

    def values(
        self, crops: NDArray[np.uint8], names: Sequence[str]
    ) -> Mapping[str, NDArray[np.float32]]:
        """What the named leaves give; of one that runs twice, the last."""
        seen: dict[str, NDArray[np.float32]] = {}
        with tapped(self.network, names) as values, torch.inference_mode():
            self.network(torch.from_numpy(crops).to(next(self.network.parameters()).device))
            seen |= {name: value.float().cpu().numpy() for name, value in values.items()}
        return seen


class tapped:  # noqa: N801 - reads as the context it is
    """While inside, the mapping fills with what the named modules give, in order of running."""

    def __init__(self, network: nn.Module, names: Sequence[str]) -> None:
        self.network = network
        self.wanted = names
        self.found: dict[str, Tensor] = {}

    def __enter__(self) -> dict[str, Tensor]:
        self.hooks = list(self._hook())
        return self.found

    def __exit__(self, *exception: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def _hook(self) -> Iterator[torch.utils.hooks.RemovableHandle]:
        modules = dict(self.network.named_modules())
        for name in self.wanted:

            def keep(_: nn.Module, __: object, output: object, name: str = name) -> None:
                if isinstance(output, Tensor):
                    # A copy: the activation behind it may work in place.
                    self.found.pop(name, None)
                    self.found[name] = output.detach().clone()

            yield modules[name].register_forward_hook(keep)


class Tapped(nn.Module):
    """The network as one that gives the named layers' values, for a compiler to build."""

    def __init__(self, network: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.network = network
        self.size = network.size
        self.taps = tuple(names)

    def forward(self, crops: Tensor) -> tuple[Tensor, ...]:
        """FP32 values in the order of the names."""
        with tapped(self.network, self.taps) as values:
            self.network(crops)
            return tuple(values[name].float() for name in self.taps)


def _is_leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None and not isinstance(
        module, nn.Identity | nn.Dropout
    )
