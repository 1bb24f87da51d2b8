"""`ralf train | publish | calibrate | retrain | data | evaluate`: datasets to a published model.

Each command imports what it needs when it runs.  Results go to stdout, one JSON line or a path;
progress and refusals to stderr.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ralf.train.command import INTERRUPTED, OK, Commands, parser_of, refusing
from ralf.train.data.cli import data_commands, evaluate_commands
from ralf.train.ensemble_cli import ensemble_command
from ralf.train.publish_cli import calibrate_command, publish_command
from ralf.train.retrain_cli import retrain_command

if TYPE_CHECKING:
    from ralf.train.data.index import Index
    from ralf.train.loop.loop import Outcome
    from ralf.train.recipe import Data

KEPT_BYTES = 2 * 1024**3
"""Validation crops up to so many are made once and kept."""


def commands(subparsers: Commands) -> None:
    """Register every command of this room."""
    _train(subparsers)
    publish_command(subparsers)
    calibrate_command(subparsers)
    ensemble_command(subparsers)
    retrain_command(subparsers)
    data_commands(subparsers, refusing)
    evaluate_commands(subparsers, refusing)


def _train(subparsers: Commands) -> None:
    parser = parser_of(subparsers, "train", "train a detector; the same command goes on", run_train)
    parser.add_argument(
        "recipe", metavar="RECIPE", help="ralf_small, ralf, ralf_paper, xception, …"
    )
    parser.add_argument("--data", nargs="+", metavar="PATH", help="an index or any known layout")
    parser.add_argument("--out", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("--minutes", type=float, help="stop cleanly after so long")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change a field, repeatable",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    parser.add_argument("--workers", type=int, default=0, help="processes that make batches")
    parser.add_argument("--deterministic", action="store_true", help="same bits on CUDA too")
    parser.add_argument("--allow-leaks", action="store_true", help="train on leaking splits")
    parser.add_argument("--print", action="store_true", help="print the whole recipe and stop")


def run_train(args: argparse.Namespace) -> int:
    """Train, or go on training."""
    started_s = time.monotonic()
    from ralf.train.recipe_text import RecipeError, override, to_json
    from ralf.train.recipes import named

    pairs = [change.partition("=") for change in args.set]
    if bad := [name for name, equals, _ in pairs if not equals]:
        raise RecipeError(f"--set takes NAME=VALUE, not {bad[0]!r}")
    recipe = override(named(args.recipe), {name: text for name, _, text in pairs})
    if args.print:
        print(to_json(recipe))
        return OK
    if not args.data or args.out is None:
        raise RecipeError("train needs --data PATH and --out RUN")

    from ralf.train.data.batches import Batches
    from ralf.train.data.layouts import read_all
    from ralf.train.loop.distributed import joined
    from ralf.train.loop.loop import Options, train

    device = _device(args.device)
    index = read_all(args.data)
    options = Options(
        minutes=args.minutes,
        workers=args.workers,
        deterministic=args.deterministic,
        started_s=started_s,
    )
    with joined(device) as ranks:
        batches = Batches(index, recipe.data, "train", recipe.seed, allow_leaks=args.allow_leaks)
        outcome = train(
            recipe, batches, validation_of(index, recipe.data), args.out,
            data_sha256=index.sha256, device=device, ranks=ranks, options=options,
        )  # fmt: skip
        if ranks.first:
            print(json.dumps(_result(outcome, args.out)))
    return INTERRUPTED if outcome.ending == "interrupted" else OK


def _result(outcome: "Outcome", run: Path) -> dict[str, Any]:
    state = outcome.state
    return {
        "run": str(run),
        "ending": outcome.ending,
        "step": state.step,
        "faces": state.faces,
        "best": state.best,
        "best_step": state.best_step,
        "validation": outcome.look.facts() if outcome.look else None,
    }


def _device(asked: str) -> Any:
    """The device asked for; under torchrun each process takes the one of its own number."""
    import os

    import torch

    from ralf.kernels.engine import pick_device

    device = pick_device(asked)
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return device


def validation_of(index: "Index", data: "Data") -> Any:
    """The validation split, made once and kept where it fits; None where there is none."""
    from ralf.train.data.evaluation_set import Examples

    if not len(index.where(split="val")):
        print("ralf: no rows with split val: the last weights will be kept", file=sys.stderr)
        return None
    examples = Examples(index, data, "val")
    size = data.input.size
    fits = len(examples.items) * 3 * size * size <= KEPT_BYTES
    return Kept(examples) if fits else examples


class Kept:
    """Batches that are made when first asked for, and kept."""

    def __init__(self, examples: Any) -> None:
        self.names = examples.names
        self._examples = examples
        self._made: list[Any] = []

    def __iter__(self) -> Any:
        if not self._made:
            self._made = list(self._examples)
        return iter(self._made)
