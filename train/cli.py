"""`ralf train | publish | calibrate | ensemble | retrain`: their options, and what they print.

Each command imports what it needs when it runs, so that `--help` is instant.  Results go to stdout,
one JSON line or a path; progress and refusals go to stderr.  `ralf data`, `ralf forge` and `ralf
evaluate` are in ralf.train.data.cli, ralf.train.forge.cli and ralf.train.evaluate.cli.

Exit codes: 0 done, 1 training diverged or a condition of retraining does not hold, 2 cannot be done
as asked, 130 interrupted (the same command goes on).
"""

import argparse
import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ralf.train.data.cli import Commands, Run, add_command, data_commands, listed
from ralf.train.evaluate.cli import evaluate_commands
from ralf.train.forge.cli import forge_commands

if TYPE_CHECKING:
    import torch

    from ralf.kernels.artifact import Artifact
    from ralf.kernels.manifest import Reference
    from ralf.train.calibrate import Calibrated
    from ralf.train.evaluate.judge import JudgedModel
    from ralf.train.retrain import Retraining

OK, DIVERGED, STOPPED, USAGE, INTERRUPTED = 0, 1, 1, 2, 130


def commands(subparsers: Commands) -> None:
    """Register every command of this room."""
    _add_train(subparsers)
    _add_publish(subparsers)
    _add_calibrate(subparsers)
    _add_ensemble(subparsers)
    _add_retrain(subparsers)
    data_commands(subparsers, refusing)
    forge_commands(subparsers, refusing)
    evaluate_commands(subparsers, refusing)


def refusing(run: Run) -> Run:
    """The command, with its refusals as one line on stderr and an exit code."""

    def run_and_refuse(args: argparse.Namespace) -> int:
        from ralf.kernels.artifact import ArtifactError
        from ralf.kernels.engine import EngineError
        from ralf.train.loop.checkpoint import CheckpointError
        from ralf.train.loop.cpu_speed import keep_freed
        from ralf.train.loop.step import Diverged

        # Here and not where the package is imported: a worker, whose memory is bounded, must not.
        keep_freed()
        try:
            return run(args)
        except Diverged as error:
            print(f"ralf: {error}", file=sys.stderr)
            return DIVERGED
        # Recipes, indexes, networks and calibration refuse with subclasses of ValueError.
        except (ValueError, CheckpointError, ArtifactError, EngineError) as error:
            print(f"ralf: {error}", file=sys.stderr)
            return USAGE

    return run_and_refuse


def _add(subparsers: Commands, name: str, summary: str, run: Run) -> argparse.ArgumentParser:
    return add_command(subparsers, name, summary, refusing(run))


def _add_models_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", type=Path, help="where models lie: RALF_MODELS_DIR, or ours")


def _add_training_options(parser: argparse.ArgumentParser) -> None:
    """What `train` and `retrain` share."""
    parser.add_argument("--minutes", type=float, help="stop each training cleanly after so long")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE",
        help="change a field of the recipe, repeatable; TRAINING:NAME=VALUE for one of a chain",
    )  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    parser.add_argument("--workers", type=int, default=0, help="processes that make batches")
    parser.add_argument("--allow-leaks", action="store_true", help="train on leaking splits")


def _add_calibration_options(parser: argparse.ArgumentParser) -> None:
    """What `calibrate` and `ensemble` share."""
    parser.add_argument("--split", default="val", help="a split that chose nothing else")
    parser.add_argument(
        "--conditions", default="clean", metavar="A,B", help="damage put on both classes alike"
    )
    parser.add_argument("--families", default="", metavar="A,B", help="forgeries to blend")
    parser.add_argument("--fitted-on", default="", help="what it was fitted on, in words")
    parser.add_argument("--no-shift", action="store_true", help="fit the temperature alone")


def _changes(args: argparse.Namespace) -> dict[str, str]:
    """What --set asks for."""
    from ralf.train.recipe_text import RecipeError

    pairs = [change.partition("=") for change in args.set]
    if bad := [name for name, equals, _ in pairs if not equals]:
        raise RecipeError(f"--set takes NAME=VALUE, not {bad[0]!r}")
    return {name: text for name, _, text in pairs}


# train


def _add_train(subparsers: Commands) -> None:
    parser = _add(subparsers, "train", "train a detector; the same command goes on", run_train)
    parser.add_argument(
        "recipe", metavar="RECIPE", help="ralf_small, ralf, ralf_paper, xception, …"
    )
    parser.add_argument("--data", nargs="+", metavar="PATH", help="an index or any known layout")
    parser.add_argument("--out", type=Path, metavar="RUN", help="folder of the run")
    _add_training_options(parser)
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


# publish


def _add_publish(subparsers: Commands) -> None:
    parser = _add(subparsers, "publish", "make a model of a run", run_publish)
    parser.add_argument("folder", type=Path, metavar="RUN", help="folder that `ralf train` wrote")
    parser.add_argument("--name", required=True, help="the model's name, as ralf-small")
    parser.add_argument(
        "--without-residual", action="store_true",
        help="the plain classifier inside a RALF of two streams",
    )  # fmt: skip
    _add_models_option(parser)
    parser.add_argument("--data", nargs="+", metavar="PATH", help="the index, for the card")
    parser.add_argument(
        "--golden-from", metavar="DATASET,…", help="collections whose faces may ship, of --data"
    )
    parser.add_argument(
        "--metrics", type=Path, metavar="JSON", help="figures for manifest and card"
    )
    parser.add_argument("--scores", type=Path, metavar="CSV", help="logit,label: to calibrate on")
    parser.add_argument("--fitted-on", default="", help="what --scores is, in words")
    parser.add_argument(
        "--calibration-of", type=Path, metavar="VERSION",
        help="folder of a version of the same run that was calibrated: take that",
    )  # fmt: skip
    parser.add_argument(
        "--aggregation", default="top_half_mean", metavar="RULE",
        help="what stands for a track: `ralf evaluate --table aggregation` compares them",
    )  # fmt: skip
    parser.add_argument(
        "--failure", action="append", default=[], help="a known failure, repeatable"
    )
    parser.add_argument(
        "--promote", action="store_true", help="make it current if it passes the checks"
    )


def run_publish(args: argparse.Namespace) -> int:
    """A run as a new version of a model; its folder on stdout."""
    from ralf.kernels.artifact import models_folder
    from ralf.kernels.manifest import Aggregation
    from ralf.kernels.registry import promote
    from ralf.train.calibrate import calibrate_on_table
    from ralf.train.card import portions
    from ralf.train.data.layouts import read_all
    from ralf.train.publish import (
        PATTERNS,
        PublishDetails,
        calibration_of,
        figures_in,
        golden_faces,
        publish_run,
        without_residual,
    )

    models, run = models_folder(args.models), args.folder
    if args.without_residual:
        run = without_residual(run, run / "without_residual", "The classifier inside a RALF.")
    index = read_all(args.data) if args.data else None
    golden, source = None, PATTERNS
    if args.golden_from:
        if index is None:
            raise ValueError("--golden-from needs --data")
        golden, source = golden_faces(run, index, args.golden_from.split(","))
    if args.scores and args.calibration_of:
        raise ValueError("publish takes --scores or --calibration-of, not both")
    calibrated = calibrate_on_table(args.scores, args.fitted_on) if args.scores else None
    details = PublishDetails(
        calibrated=calibration_of(args.calibration_of) if args.calibration_of else calibrated,
        aggregation=Aggregation.model_validate({"track": args.aggregation}),
        metrics=figures_in(args.metrics) if args.metrics else {},
        data=portions(index) if index is not None else (),
        failures=tuple(args.failure),
        golden=golden,
        golden_source=source,
    )
    artifact = publish_run(run, args.name, models, details)
    if args.promote:
        promote(models, artifact.name, artifact.version)
    print(artifact.path)
    return OK


# calibrate


def _add_calibrate(subparsers: Commands) -> None:
    parser = _add(
        subparsers, "calibrate", "fit a model's scores and thresholds: a new version", run_calibrate
    )
    parser.add_argument("model", metavar="MODEL", help="name, name@version or path")
    _add_models_option(parser)
    parser.add_argument("--scores", type=Path, metavar="CSV", help="columns logit and label")
    parser.add_argument("--data", nargs="+", metavar="PATH", help="score this data instead")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    _add_calibration_options(parser)


def run_calibrate(args: argparse.Namespace) -> int:
    """Publish the same weights with new calibration; the new version's folder on stdout."""
    from ralf.kernels.artifact import models_folder, resolve
    from ralf.kernels.choose_engine import load
    from ralf.train.calibrate import calibrate_on_table
    from ralf.train.evaluate.judge import model_of_manifest
    from ralf.train.publish import recalibrate

    if (args.scores is None) == (args.data is None):
        raise ValueError("calibrate needs either --scores CSV or --data PATH")
    models = models_folder(args.models)
    artifact = resolve(models, args.model)
    if args.scores:
        found = calibrate_on_table(args.scores, args.fitted_on, shift=not args.no_shift)
        reference = None
    else:
        _warn_if_split_chose_the_weights(artifact, args.split)
        # In the precision that serves, unlike tables, since these very scores are thresholded.
        engine = load(artifact, args.device)
        judge = model_of_manifest(artifact.label, engine, artifact.manifest)
        found, reference = _calibrated(judge, args)
    for name, each in found.thresholds.items():
        low, high = each.interval
        support = "" if each.supported else "  (too few faces to support it)"
        print(
            f"{name}: {each.score:.4f}  rate {each.rate:.3f} [{low:.3f}, {high:.3f}]{support}",
            file=sys.stderr,
        )
    print(recalibrate(artifact, models, found, reference).path)
    return OK


def _calibrated(judge: "JudgedModel", args: argparse.Namespace) -> "tuple[Calibrated, Reference]":
    """What was fitted, and how real videos score under it."""
    from ralf.kernels.manifest import Reference
    from ralf.train.calibrate import calibrate_on_split
    from ralf.train.data.layouts import read_all
    from ralf.worker.drift import EDGES, histogram

    found, reals = calibrate_on_split(
        judge,
        read_all(args.data),
        args.split,
        families=listed(args.families),
        conditions=listed(args.conditions),
        fitted_on=args.fitted_on,
        shift=not args.no_shift,
    )
    counts = tuple(histogram([float(score) for score in reals]))
    return found, Reference(edges=EDGES, counts=counts, of=f"real videos of split {args.split}")


def _warn_if_split_chose_the_weights(artifact: "Artifact", split: str) -> None:
    last = artifact.manifest.trained.get("chosen_by") == "last"  # then validation chose nothing
    if split == "val" and "validation" in artifact.manifest.metrics and not last:
        print(
            "ralf: the split val chose these weights, so scores fitted on it are a little too "
            "sure; --split with faces that chose nothing is better",
            file=sys.stderr,
        )


# ensemble


def _add_ensemble(subparsers: Commands) -> None:
    parser = _add(subparsers, "ensemble", "make one model of several: their mean", run_ensemble)
    parser.add_argument("members", nargs="+", metavar="MODEL", help="name, name@version or path")
    parser.add_argument("--name", required=True, help="the ensemble's own name, as trio")
    _add_models_option(parser)
    parser.add_argument("--data", nargs="+", metavar="PATH", help="calibrate the mean on this")
    _add_calibration_options(parser)
    parser.add_argument(
        "--promote", action="store_true", help="make it current if it passes the checks"
    )


def run_ensemble(args: argparse.Namespace) -> int:
    """Publish the ensemble; its folder on stdout."""
    from ralf.kernels.artifact import models_folder, resolve
    from ralf.kernels.registry import promote
    from ralf.train.ensemble import judge_of_members, publish_ensemble

    models = models_folder(args.models)
    members = [resolve(models, spec) for spec in args.members]
    for member in members:
        if member.manifest.calibration.fitted_on == "nothing":
            print(
                f"ralf: {member.label} is not calibrated: its bare logits enter the mean",
                file=sys.stderr,
            )
    calibrated = _calibrated(judge_of_members(members, args.name), args)[0] if args.data else None
    artifact = publish_ensemble(members, args.name, models, calibrated)
    if args.promote:
        promote(models, artifact.name, artifact.version)
    print(artifact.path)
    return OK


# retrain


def _add_retrain(subparsers: Commands) -> None:
    parser = _add(
        subparsers, "retrain", "from data to a promoted model and its engines", run_retrain
    )
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
    _add_models_option(parser)
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
    from ralf.train.retrain import Retraining, default_run
    from ralf.train.trainings import ChainRun

    chain, changes = chain_of(args.recipe), _changes(args)
    index = read_all(args.data)
    training = ChainRun(
        chain=chain,
        data=tuple(map(str, args.data)),
        index=index,
        run=args.out or default_run(chain, changes, index, args.name),
        changes=changes,
        device=args.device,
        processes=args.processes,
        options=Options(minutes=args.minutes, workers=args.workers, started_s=started_s),
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
