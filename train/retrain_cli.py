"""`ralf retrain`: train → calibrate → evaluate → publish → build → verify → promote."""

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ralf.train.command import INTERRUPTED, OK, Commands, parser_of

if TYPE_CHECKING:
    from ralf.train.retrain_order import Order

STOPPED = 1


def retrain_command(subparsers: Commands) -> None:
    """Register it."""
    parser = parser_of(
        subparsers, "retrain", "from data to a promoted model and its engines", run_retrain
    )
    parser.add_argument("recipe", metavar="RECIPE", help="ralf_small, ralf, xception, …")
    parser.add_argument("--data", nargs="+", required=True, metavar="PATH")
    parser.add_argument("--name", required=True, help="the model's name, as ralf-small")
    parser.add_argument(
        "--targets", default="all", help="all that this machine builds, or cpu,rtx-aot,…"
    )
    parser.add_argument("--out", type=Path, metavar="RUN", help="folder (by recipe and data)")
    parser.add_argument("--models", type=Path, help="where models lie: RALF_MODELS_DIR, or ours")
    parser.add_argument("--minutes", type=float, help="train no longer than this")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="change a field"
    )
    parser.add_argument("--calibrate-on", default="val", metavar="SPLIT")
    parser.add_argument("--conditions", default="clean", metavar="A,B", help="while calibrating")
    parser.add_argument("--evaluate-on", default="test", metavar="SPLIT")
    parser.add_argument("--golden-from", default="", metavar="DATASET,…", help="faces may ship")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    parser.add_argument("--workers", type=int, default=0, help="processes that make batches")
    parser.add_argument("--allow-leaks", action="store_true", help="train on leaking splits")
    parser.add_argument("--force", action="store_true", help="promote past gates that refuse")
    parser.add_argument("--dry-run", action="store_true", help="show the plan and stop")


def run_retrain(args: argparse.Namespace) -> int:
    """Walk what is to be walked; one JSON line on stdout at the end."""
    from ralf.train.retrain import Stopped, plan, walk
    from ralf.train.retrain_order import Interrupted
    from ralf.train.retrain_steps import steps

    order = order_of(args)
    stations = steps(order)
    if args.dry_run:
        for step, done in plan(stations, order.run):
            print(f"{'done ' if done else 'to do'}  {step.name:<9}  {step.gate}")
        print(f"in {order.run}; models in {order.models}", file=sys.stderr)
        return OK
    try:
        done = walk(stations, order.run, order.say)
    except Stopped as stop:
        print(f"ralf: stopped, nothing was promoted\n  {stop}", file=sys.stderr)
        print(f"  the same command: {again(args)}", file=sys.stderr)
        return STOPPED
    except Interrupted as stop:
        print(f"ralf: {stop}: {again(args)}", file=sys.stderr)
        return INTERRUPTED
    published = done["publish"]
    facts = {"name": order.name, "run": str(order.run), "plans": done["build"]["plans"]}
    print(json.dumps(facts | published | {"metrics": done["evaluate"]}))
    return OK


def order_of(args: argparse.Namespace) -> "Order":
    """What was typed."""
    started_s = time.monotonic()
    from ralf.kernels.artifact import models_folder
    from ralf.train.data.layouts import read_all
    from ralf.train.loop.loop import Options
    from ralf.train.recipe_text import RecipeError, override
    from ralf.train.recipes import named
    from ralf.train.retrain_order import Order, default_run, targets_of

    pairs = [change.partition("=") for change in args.set]
    if bad := [name for name, equals, _ in pairs if not equals]:
        raise RecipeError(f"--set takes NAME=VALUE, not {bad[0]!r}")
    recipe = override(named(args.recipe), {name: text for name, _, text in pairs})
    index = read_all(args.data)
    return Order(
        recipe=recipe,
        index=index,
        name=args.name,
        run=args.out or default_run(recipe, index, args.name),
        models=models_folder(args.models),
        targets=targets_of(args.targets, args.device),
        device=args.device,
        options=Options(minutes=args.minutes, workers=args.workers, started_s=started_s),
        calibrate_on=args.calibrate_on,
        evaluate_on=args.evaluate_on,
        conditions=_listed(args.conditions) or ("clean",),
        golden_from=_listed(args.golden_from),
        allow_leaks=args.allow_leaks,
        force=args.force,
        say=_say,
    )


def _listed(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _say(text: str) -> None:
    print(f"ralf: {text}", file=sys.stderr, flush=True)


def again(args: argparse.Namespace) -> str:
    """The command that goes on."""
    words = ["ralf", "retrain", args.recipe, "--data", *map(str, args.data), "--name", args.name]
    words += ["--targets", args.targets]
    for option in ("out", "models", "minutes", "calibrate_on", "evaluate_on", "conditions",
                   "golden_from", "device"):  # fmt: skip
        value = getattr(args, option)
        if value not in (None, ""):
            words += [f"--{option.replace('_', '-')}", str(value)]
    for change in args.set:
        words += ["--set", change]
    words += [
        f"--{flag.replace('_', '-')}" for flag in ("allow_leaks", "force") if getattr(args, flag)
    ]
    return shlex.join(words)
