"""The losses by name: one file a detector, each with its options and its Objective.

A package outside this repository adds a loss by an entry point of the group `ralf.losses` whose
name is the loss's kind and whose object is the Objective:

    [project.entry-points."ralf.losses"]
    mine = "mypackage.loss:MyObjective"

Its class attribute `options` is a subclass of ralf.train.recipe.Loss with `kind: Literal["mine"]`.
A loss's file is imported when a recipe names it, so reading one recipe imports one loss.
"""

import importlib
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ralf.train.losses.objective import Objective

GROUP = "ralf.losses"
OURS = {
    "bce": ("ralf.train.losses.objective", "BceObjective"),
    "ralf": ("ralf.train.losses.ralf", "RalfObjective"),
    "fdfl": ("ralf.train.losses.fdfl", "FdflObjective"),
    "reconstruct": ("ralf.train.losses.reconstruct", "ReconstructObjective"),
    "two_stream": ("ralf.train.losses.two_stream", "TwoStreamObjective"),
    "rcl": ("ralf.train.losses.rcl", "RclObjective"),
}


def kinds() -> list[str]:
    """Every loss that `find` knows: ours, then those of other packages."""
    return [*OURS, *sorted(entry_points(group=GROUP).names - OURS.keys())]


def find(kind: Any) -> "type[Objective]":
    """The Objective of that kind."""
    found: type[Objective]
    # Ours come first, so that no installed package changes what a stored recipe means.
    if kind in OURS:
        # Imported here and not above: the loss files import ralf.train.recipe, which imports this.
        module, name = OURS[kind]
        found = getattr(importlib.import_module(module), name)
        return found
    for entry in entry_points(group=GROUP, name=str(kind)):
        found = entry.load()
        return found
    raise ValueError(f"loss.kind should be one of {', '.join(kinds())}, not {kind!r}")
