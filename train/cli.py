"""The commands of this room: `ralf train` and `ralf retrain`; the others are in their folders'
cli.py.

Each command imports what it needs when it runs, so that `--help` is instant.  Results go to stdout,
one JSON line or a path; progress and refusals go to stderr.
"""

import argparse
import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ralf.kernels.cli import DEVICE
from ralf.train.command_line import (
    DATA,
    INTERRUPTED,
    OK,
    Commands,
    add_command,
    add_models_option,
    changes_of,
    listed,
)
from ralf.train.data.cli import data_commands
from ralf.train.evaluate.cli import evaluate_commands
from ralf.train.forge.cli import forge_commands
from ralf.train.publish.cli import publish_commands

if TYPE_CHECKING:
    import torch

    from ralf.train.retrain.order import Retraining

STOPPED = 1
RECIPE = "a recipe such as ralf_small or xception; docs/training.md lists all"


def commands(subparsers: Commands) -> None:
    """Register every command of this room."""
    _add_train(subparsers)
    _add_retrain(subparsers)
    publish_commands(subparsers)
    data_commands(subparsers)
    forge_commands(subparsers)
    evaluate_commands(subparsers)


def _add_training_options(parser: argparse.ArgumentParser) -> None:
    """What `train` and `retrain` share."""
    parser.add_argument(
        "--minutes",
        type=float,
        metavar="N",
        help="end each training after N minutes, with a checkpoint; chains that state their "
        "minutes train fewer steps instead, to take about N minutes in all (default: no limit)",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE",
        help="change a field of the recipe, or with TRAINING:NAME=VALUE of one training of a "
        "chain; may be given several times",
    )  # fmt: skip
    parser.add_argument("--device", default="auto", help=DEVICE)
    parser.add_argument("--workers", type=int, default=0, metavar="N",
                        help="make batches in N processes beside the training; 0: in the training "
                        "itself")  # fmt: skip
    parser.add_argument("--allow-leaks", action="store_true",
                        help="train although a person, a video or a group is in two splits",
                        )  # fmt: skip


# train


def _add_train(subparsers: Commands) -> None:
    parser = add_command(
        subparsers,
        "train",
        "train a detector; if stopped, the same command continues",
        run_train,
    )
    parser.add_argument("recipe", metavar="RECIPE", help=RECIPE)
    parser.add_argument("--data", nargs="+", metavar="PATH", help=f"{DATA} (required)")
    parser.add_argument("--out", type=Path, metavar="RUN",
                        help="write checkpoints and the log into this folder (required)",
                        )  # fmt: skip
    _add_training_options(parser)
    parser.add_argument(
        "--crops", type=Path, metavar="DIR",
        help="keep the pairs of crops of a recipe with data.variants in this folder (default: make "
        "them anew each time)",
    )  # fmt: skip
    parser.add_argument("--deterministic", action="store_true",
                        help="give the same weights bit for bit in each run, on a GPU too (slower)",
                        )  # fmt: skip
    parser.add_argument("--print", action="store_true",
                        help="print the whole recipe, with --set applied, and stop")  # fmt: skip


def run_train(args: argparse.Namespace) -> int:
    """Train, or go on training."""
    # Before torch is imported and the data is read: --minutes counts that time too.
    started_s = time.monotonic()
    from ralf.train.recipe_text import RecipeError, override, to_json
    from ralf.train.recipes import named

    recipe = override(named(args.recipe), changes_of(args.set))
    if args.print:
        print(to_json(recipe))
        return OK
    if not args.data or args.out is None:
        raise RecipeError("train needs --data PATH and --out RUN")

    from ralf.train.data.layouts import read_all
    from ralf.train.loop.distributed import joined
    from ralf.train.loop.loop import Options
    from ralf.train.trainings import outcome_facts, train_on

    device = _own_device(args.device)
    index = read_all(args.data)
    options = Options(
        minutes=args.minutes,
        workers=args.workers,
        deterministic=args.deterministic,
        started_s=started_s,
    )
    with joined(device) as ranks:
        outcome = train_on(
            index, recipe, args.out,
            device=device, ranks=ranks, options=options, allow_leaks=args.allow_leaks,
            crops=args.crops,
        )  # fmt: skip
        # One line, however many processes there are: `ralf retrain` reads the last one as JSON.
        if ranks.first:
            print(json.dumps(outcome_facts(outcome, args.out)))
    return INTERRUPTED if outcome.ending == "interrupted" else OK


def _own_device(asked: str) -> "torch.device":
    """The device asked for; under torchrun each process takes the GPU of its own number."""
    import torch

    from ralf.kernels.engine import pick_device

    device = pick_device(asked)
    # Without this all processes would share the first GPU.
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return device


# retrain


def _add_retrain(subparsers: Commands) -> None:
    parser = add_command(
        subparsers, "retrain", "train, calibrate, judge, publish and promote a model; if stopped, "
        "the same command continues", run_retrain,
    )  # fmt: skip
    parser.add_argument(
        "recipe", metavar="RECIPE",
        help=f"{RECIPE}; or a chain of trainings, such as shipped",
    )  # fmt: skip
    parser.add_argument("--data", nargs="+", required=True, metavar="PATH", help=DATA)
    parser.add_argument("--name", required=True,
                        help="name of the model to publish, such as ralf-small")  # fmt: skip
    parser.add_argument(
        "--targets", default="all", metavar="A,B",
        help="build engines for these: cpu, rtx-aot, torch-tensorrt, or all that this machine can "
        "build for",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, metavar="RUN",
        help="write everything that is made on the way into this folder (default: one below runs/, "
        "named by model, recipe and data)",
    )  # fmt: skip
    add_models_option(parser)
    _add_training_options(parser)
    parser.add_argument("--processes", type=int, metavar="N",
                        help="train in N processes (default: a recipe in one; a chain in one for "
                        "each GPU, or in two on a CPU)")  # fmt: skip
    parser.add_argument("--calibrate-on", default="val", metavar="SPLIT",
                        help="fit scores and thresholds on this split")  # fmt: skip
    parser.add_argument("--conditions", default="clean", metavar="A,B",
                        help="damage the calibration faces in these ways, such as "
                        "clean,h264=40")  # fmt: skip
    parser.add_argument("--evaluate-on", default="test", metavar="SPLIT",
                        help="measure the finished model on this split")  # fmt: skip
    parser.add_argument(
        "--least-people", type=int, default=30, metavar="N",
        help="stop where a split to calibrate or measure on has fewer real people",
    )  # fmt: skip
    parser.add_argument(
        "--golden-from", default="", metavar="COLLECTION,…",
        help="put up to 32 faces of these collections into the published model, to check engines "
        "with; their licence must allow it (default: patterns that show nobody)",
    )  # fmt: skip
    parser.add_argument("--groups", action="append", default=[], type=Path, metavar="CSV",
                        help="count errors on the card by group of people: a CSV with the column "
                        "file and some of age, gender, region; may be given several times",
                        )  # fmt: skip
    parser.add_argument("--force", action="store_true",
                        help="promote although a check fails; the history records which one",
                        )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true",
                        help="list the steps, done or to do, and stop")  # fmt: skip


def run_retrain(args: argparse.Namespace) -> int:
    """Do the steps that are left; one JSON line on stdout at the end."""
    from ralf.train.retrain import steps
    from ralf.train.retrain.resumable import Stopped, do_steps, outlook
    from ralf.train.trainings import Interrupted

    order = _retraining(args)
    todo = steps.all_steps(order)
    if args.dry_run:
        width = max(len(step.name) for step in todo)
        for step, done_before in outlook(todo, order.run):
            state = "done " if done_before else "to do"
            print(f"{state}  {step.name:<{width}}  {step.condition}")
        print(f"in {order.run}; models in {order.models}", file=sys.stderr)
        return OK
    try:
        done = do_steps(todo, order.run, order.say)
    except Stopped as stop:
        print(f"ralf: stopped, nothing was promoted\n  {stop}", file=sys.stderr)
        print(f"  the same command: {_same_command(args)}", file=sys.stderr)
        return STOPPED
    except Interrupted as stop:
        print(f"ralf: {stop}; the same command continues: {_same_command(args)}", file=sys.stderr)
        return INTERRUPTED
    facts = {"name": order.name, "run": str(order.run), "plans": done["build"]["plans"]}
    print(json.dumps(facts | done["publish"] | {"metrics": done["evaluate"]}))
    return OK


def _retraining(args: argparse.Namespace) -> "Retraining":
    """What was typed."""
    started_s = time.monotonic()
    from ralf.kernels.artifact import models_folder
    from ralf.train.chain import chain_of
    from ralf.train.data.layouts import read_all
    from ralf.train.loop.loop import Options
    from ralf.train.publish.version import targets_of
    from ralf.train.retrain.order import Retraining, default_run
    from ralf.train.trainings import ChainRun

    chain, changes = chain_of(args.recipe).scaled(args.minutes), changes_of(args.set)
    # A chain that knows its minutes has shared them out among its steps.
    box = args.minutes if chain.minutes is None else None
    index = read_all(args.data)
    training = ChainRun(
        chain=chain,
        data=tuple(map(str, args.data)),
        index=index,
        run=args.out or default_run(chain, changes, index, args.name),
        changes=changes,
        device=args.device,
        processes=args.processes,
        options=Options(minutes=box, workers=args.workers, started_s=started_s),
        allow_leaks=args.allow_leaks,
    )
    return Retraining(
        training=training,
        name=args.name,
        models=models_folder(args.models),
        targets=targets_of(args.targets, args.device),
        calibrate_on=args.calibrate_on,
        evaluate_on=args.evaluate_on,
        conditions=listed(args.conditions) or ("clean",),
        golden_from=listed(args.golden_from),
        least_people=args.least_people,
        groups=tuple(args.groups),
        force=args.force,
        say=lambda text: print(f"ralf: {text}", file=sys.stderr, flush=True),
    )


def _same_command(args: argparse.Namespace) -> str:
    """The command that goes on."""
    words = ["ralf", "retrain", args.recipe, "--data", *map(str, args.data), "--name", args.name]
    words += ["--targets", args.targets]
    for option in ("out", "models", "minutes", "workers", "processes", "calibrate_on",
                   "evaluate_on", "least_people", "conditions", "golden_from",
                   "device"):  # fmt: skip
        value = getattr(args, option)
        if value not in (None, ""):
            words += [f"--{option.replace('_', '-')}", str(value)]
    for change in args.set:
        words += ["--set", change]
    for table in args.groups:
        words += ["--groups", str(table)]
    words += [
        f"--{flag.replace('_', '-')}" for flag in ("allow_leaks", "force") if getattr(args, flag)
    ]
    return shlex.join(words)
