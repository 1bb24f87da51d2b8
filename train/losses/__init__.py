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
from typing import Any

GROUP = "ralf.losses"
OURS = {
    "bce": ("ralf.train.losses.objective", "BceObjective"),
    "ralf": ("ralf.train.losses.ralf", "RalfObjective"),
    "fdfl": ("ralf.train.losses.fdfl", "FdflObjective"),
    "reconstruct": ("ralf.train.losses.reconstruct", "ReconstructObjective"),
    "masked": ("ralf.train.losses.reconstruct", "MaskedObjective"),
    "two_stream": ("ralf.train.losses.two_stream", "TwoStreamObjective"),
    "rcl": ("ralf.train.losses.rcl", "RclObjective"),
}


def kinds() -> list[str]:
    """Every loss that `find` knows: ours, then those of other packages."""
    return [*OURS, *sorted(entry_points(group=GROUP).names - OURS.keys())]


def find(kind: Any) -> Any:
    """The Objective of that kind, a class; its type has no name here, since ralf.train.recipe
    imports this file and Objective's imports the recipe."""
    # Ours come first, so that no installed package changes what a stored recipe means.
    if kind in OURS:
        # Imported here and not above: the loss files import ralf.train.recipe, which imports this.
        module, name = OURS[kind]
        return getattr(importlib.import_module(module), name)
    for entry in entry_points(group=GROUP, name=str(kind)):
        return entry.load()
    raise ValueError(f"loss.kind should be one of {', '.join(kinds())}, not {kind!r}")
