"""`ralf train` and `ralf retrain`: their options, and what they print.

Results go to stdout as one JSON line; progress goes to stderr.  Exit codes: 0 done, 1 a condition
of retraining does not hold, 130 interrupted (the same command goes on).
"""

import argparse
import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ralf.train.data.cli import Commands, Refusing, add_command, listed

if TYPE_CHECKING:
    import torch

    from ralf.train.retraining import Retraining

OK, STOPPED, INTERRUPTED = 0, 1, 130


def training_commands(subparsers: Commands, refusing: Refusing) -> None:
    """Register `ralf train` and `ralf retrain`."""
    _add_train(subparsers, refusing)
    _add_retrain(subparsers, refusing)


def add_models_option(parser: argparse.ArgumentParser) -> None:
    """Where models lie."""
    parser.add_argument("--models", type=Path, help="where models lie: RALF_MODELS_DIR, or ours")


def _add_training_options(parser: argparse.ArgumentParser) -> None:
    """What `train` and `retrain` share."""
    parser.add_argument(
        "--minutes",
        type=float,
        help="stop each training cleanly after so long; "
        "a chain that says its minutes takes so many in all, by fewer steps",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE",
        help="change a field of the recipe, repeatable; TRAINING:NAME=VALUE for one of a chain",
    )  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    parser.add_argument("--workers", type=int, default=0, help="processes that make batches")
    parser.add_argument("--allow-leaks", action="store_true", help="train on leaking splits")


def _changes(args: argparse.Namespace) -> dict[str, str]:
    """What --set asks for."""
    from ralf.train.recipe_text import RecipeError

    pairs = [change.partition("=") for change in args.set]
    if bad := [name for name, equals, _ in pairs if not equals]:
        raise RecipeError(f"--set takes NAME=VALUE, not {bad[0]!r}")
    return {name: text for name, _, text in pairs}


# train


def _add_train(subparsers: Commands, refusing: Refusing) -> None:
    parser = add_command(
        subparsers, "train", "train a detector; the same command goes on", refusing(run_train)
    )
    parser.add_argument(
        "recipe", metavar="RECIPE", help="ralf_small, ralf, ralf_paper, xception, …"
    )
    parser.add_argument("--data", nargs="+", metavar="PATH", help="an index or any known layout")
    parser.add_argument("--out", type=Path, metavar="RUN", help="folder of the run")
    _add_training_options(parser)
    parser.add_argument(
        "--crops", type=Path, metavar="DIR", help="keeps pairs of a recipe with data.variants"
    )
    parser.add_argument("--deterministic", action="store_true", help="same bits on CUDA too")
    parser.add_argument("--print", action="store_true", help="print the whole recipe and stop")


def run_train(args: argparse.Namespace) -> int:
    """Train, or go on training."""
    # Before torch is imported and the data is read: --minutes counts that time too.
    started_s = time.monotonic()
    from ralf.train.recipe_text import RecipeError, override, to_json
    from ralf.train.recipes import named

    recipe = override(named(args.recipe), _changes(args))
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


def _add_retrain(subparsers: Commands, refusing: Refusing) -> None:
    parser = add_command(
        subparsers, "retrain", "from data to a promoted model and its engines",
        refusing(run_retrain),
    )  # fmt: skip
    parser.add_argument(
        "recipe", metavar="RECIPE",
        help="ralf_small, ralf, xception, …, or a chain: shipped makes the model that ships",
    )  # fmt: skip
    parser.add_argument("--data", nargs="+", required=True, metavar="PATH")
    parser.add_argument("--name", required=True, help="the model's name, as ralf-small")
    parser.add_argument(
        "--targets", default="all", help="all that this machine builds, or cpu,rtx-aot,…"
    )
    parser.add_argument("--out", type=Path, metavar="RUN", help="folder (by recipe and data)")
    add_models_option(parser)
    _add_training_options(parser)
    parser.add_argument("--processes", type=int, help="of each training (the chain's own)")
    parser.add_argument("--calibrate-on", default="val", metavar="SPLIT")
    parser.add_argument("--conditions", default="clean", metavar="A,B", help="while calibrating")
    parser.add_argument("--evaluate-on", default="test", metavar="SPLIT")
    parser.add_argument(
        "--least-people", type=int, default=30, metavar="N", help="real people to judge by (30)"
    )
    parser.add_argument("--golden-from", default="", metavar="DATASET,…", help="faces may ship")
    parser.add_argument("--groups", action="append", default=[], type=Path, metavar="CSV",
                        help="file, age, gender, region: the card's errors by group")  # fmt: skip
    parser.add_argument("--force", action="store_true", help="promote past checks that fail")
    parser.add_argument("--dry-run", action="store_true", help="show the steps and stop")


def run_retrain(args: argparse.Namespace) -> int:
    """Do the steps that are left; one JSON line on stdout at the end."""
    from ralf.train import retrain
    from ralf.train.resumable import Stopped, do_steps, outlook
    from ralf.train.trainings import Interrupted

    order = _retraining(args)
    todo = retrain.steps(order)
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
        print(f"ralf: {stop}; the same command goes on: {_same_command(args)}", file=sys.stderr)
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
    from ralf.train.publish import targets_of
    from ralf.train.retraining import Retraining, default_run
    from ralf.train.trainings import ChainRun

    chain, changes = chain_of(args.recipe).scaled(args.minutes), _changes(args)
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
