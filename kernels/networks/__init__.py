"""The detectors' networks, by the name and the dimensions that a manifest holds.

A package outside this repository adds a network by an entry point of the group `ralf.networks`
whose name is the network's and whose object is the class:

    [project.entry-points."ralf.networks"]
    mynet = "mypackage.network:MyNet"

The class takes its dimensions as keyword arguments, has the attribute `size` (side of a crop) and
`lower(dtype)`, and its forward turns crops [m, 3, s, s] into logits [m] of being forged.

This file imports a network only when it is built: timm takes seconds to import.
"""

import importlib
import inspect
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

GROUP = "ralf.networks"
OURS = {
    "ralf": ("ralf.kernels.networks.ralf", "Ralf"),
    "classifier": ("ralf.kernels.networks.classifier", "Classifier"),
    "fdfl": ("ralf.kernels.networks.fdfl", "Fdfl"),
    "ensemble": ("ralf.kernels.networks.ensemble", "Ensemble"),
}


def names() -> list[str]:
    """The names that `build` takes: our networks, then those of other packages."""
    others = entry_points(group=GROUP).names - OURS.keys()
    return [*OURS, *sorted(others)]


def options(name: str) -> Mapping[str, inspect.Parameter]:
    """A network's dimensions by name; each has a type (`annotation`) and a `default`."""
    # A package's annotations may be strings; a recipe needs the types that they name.
    return inspect.signature(_class_of(name), eval_str=True).parameters


def build(name: str, **dimensions: Any) -> "nn.Module":
    """A detector with fresh weights: forward(crops [m,3,s,s]) → logits [m] of being forged."""
    network, known = _class_of(name), options(name)
    if unknown := dimensions.keys() - known.keys():
        raise ValueError(f"{name} has no dimension {sorted(unknown)} (has: {', '.join(known)})")
    return network(**dimensions)


def _class_of(name: str) -> "type[nn.Module]":
    found: type[nn.Module]
    # Our names come first, so that no installed package changes what a published model means.
    if name in OURS:
        module, kind = OURS[name]
        found = getattr(importlib.import_module(module), kind)
        return found
    for entry in entry_points(group=GROUP, name=name):
        found = entry.load()
        return found
    raise ValueError(f"network should be one of {', '.join(names())}, got {name!r}")
