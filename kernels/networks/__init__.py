"""The networks, by the name and dimensions that a manifest holds.

Imports none of them until asked: timm takes seconds, and the face finder needs none of it.
"""

import importlib
import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

NETWORKS = {
    "ralf": ("ralf.kernels.networks.ralf", "Ralf"),
    "classifier": ("ralf.kernels.networks.backbones", "Classifier"),
    "fdfl": ("ralf.kernels.networks.fdfl", "Fdfl"),
    "ensemble": ("ralf.kernels.networks.ensemble", "Ensemble"),
}


def build(name: str, **dimensions: Any) -> "nn.Module":
    """A detector with fresh weights: forward(crops [m,3,s,s]) → logits [m] of being forged."""
    if name not in NETWORKS:
        raise ValueError(f"network should be one of {', '.join(NETWORKS)}, got {name!r}")
    module, kind = NETWORKS[name]
    network: type[nn.Module] = getattr(importlib.import_module(module), kind)
    known = inspect.signature(network).parameters
    if unknown := dimensions.keys() - known.keys():
        raise ValueError(f"{name} has no dimension {sorted(unknown)} (has: {', '.join(known)})")
    return network(**dimensions)
