"""What is asked of one retraining: recipe, data, name, and where the model is to run.

A target names what must be able to run it: `cpu` needs nothing built; `rtx-aot` is a plan made
without a GPU; `torch-tensorrt` one made and proven on the GPU at hand.  The manifest declares them
by architecture, and promotion asks for each one's engine.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ralf.kernels.engine import pick_device
from ralf.train.data.index import Index
from ralf.train.loop.loop import Options
from ralf.train.recipe import Recipe
from ralf.train.recipe_text import to_json
from ralf.train.retrain import Say

Target = Literal["cpu", "rtx-aot", "torch-tensorrt"]
TARGETS: tuple[Target, ...] = ("cpu", "rtx-aot", "torch-tensorrt")


@dataclass(frozen=True)
class Order:
    """What was asked of one retraining."""

    recipe: Recipe
    index: Index
    name: str
    run: Path
    models: Path
    targets: tuple[Target, ...] = ("cpu",)
    device: str = "auto"
    options: Options = field(default_factory=Options)
    calibrate_on: str = "val"
    evaluate_on: str = "test"
    conditions: tuple[str, ...] = ("clean",)
    """Wear put on the calibration split, both classes alike."""
    golden_from: tuple[str, ...] = ()
    """Collections whose faces may ship; none: made pictures."""
    allow_leaks: bool = False
    force: bool = False
    say: Say = print


class Interrupted(Exception):
    """Training was asked to stop; its checkpoint is whole."""


def targets_of(names: str, device: str) -> tuple[Target, ...]:
    """From `all` (what this machine can build for) or a list as `cpu,rtx-aot`."""
    from ralf.kernels.build import available

    if names == "all":
        here = available()
        return tuple(t for t in TARGETS if t == "cpu" or (t in here and _fits(t, device)))
    found = [name.strip() for name in names.split(",") if name.strip()]
    chosen = tuple(target for target in TARGETS if target in found)
    if not chosen or len(chosen) != len(set(found)):
        raise ValueError(f"--targets takes all, or some of {', '.join(TARGETS)}; got {names!r}")
    return chosen


def _fits(target: Target, device: str) -> bool:
    return target != "torch-tensorrt" or pick_device(device).type == "cuda"


def declared(order: Order) -> tuple[str, ...]:
    """The targets as the manifest names them; promotion asks for each of them."""
    found: list[str] = []
    for target in order.targets:
        if target == "rtx-aot":
            from ralf.kernels.build_rtx import architectures

            found += architectures()
        elif target == "torch-tensorrt":
            from ralf.kernels.engine_trt import facts

            found.append(f"{facts(pick_device(order.device)).architecture}-verified")
        else:
            found.append(target)
    return tuple(dict.fromkeys(found))


def default_run(recipe: Recipe, index: Index, name: str) -> Path:
    """The same folder for the same recipe on the same data, so that the same command goes on."""
    digest = hashlib.sha256(f"{to_json(recipe)}\0{index.sha256}".encode()).hexdigest()[:8]
    return Path("runs") / f"{name}-{recipe.name}-{digest}"
