"""Options of `ralf publish | calibrate | ensemble`.  Paths go to stdout, the rest to stderr."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ralf.kernels.cli import DEVICE, SPEC
from ralf.train.command_line import DATA, OK, Commands, add_command, add_models_option, listed

if TYPE_CHECKING:
    from ralf.kernels.artifact import Artifact
    from ralf.kernels.manifest import Reference
    from ralf.train.evaluate.judge import JudgedModel
    from ralf.train.publish.calibrate import Calibrated


def publish_commands(subparsers: Commands) -> None:
    """Register `ralf publish`, `ralf calibrate` and `ralf ensemble`."""
    _add_publish(subparsers)
    _add_calibrate(subparsers)
    _add_ensemble(subparsers)


def _add_calibration_options(parser: argparse.ArgumentParser) -> None:
    """What `calibrate` and `ensemble` share."""
    parser.add_argument("--split", default="val",
                        help="with --data, fit on this split; best one that chose no weights",
                        )  # fmt: skip
    parser.add_argument(
        "--conditions", default="clean", metavar="A,B",
        help="with --data, damage reals and forgeries alike in these ways, such as clean,h264=40",
    )  # fmt: skip
    parser.add_argument("--families", default="", metavar="A,B",
                        help="with --data, make forgeries of the reals with these families "
                        "(default: use those of the data)")  # fmt: skip
    parser.add_argument("--fitted-on", default="", metavar="TEXT",
                        help="say in words what it was fitted on; verdicts repeat it (default: the "
                        "split or the file's name)")  # fmt: skip
    parser.add_argument("--no-shift", action="store_true",
                        help="fit the temperature of the scores alone, and no shift")  # fmt: skip


# publish


def _add_publish(subparsers: Commands) -> None:
    parser = add_command(
        subparsers, "publish", "make a version of a model from a training run", run_publish
    )
    parser.add_argument("folder", type=Path, metavar="RUN", help="folder that `ralf train` wrote")
    parser.add_argument("--name", required=True,
                        help="name of the model, such as ralf-small")  # fmt: skip
    parser.add_argument(
        "--without-residual", action="store_true",
        help="publish only the plain classifier inside a RALF of two streams",
    )  # fmt: skip
    add_models_option(parser)
    parser.add_argument("--data", nargs="+", metavar="PATH",
                        help=f"data of the training, which the card lists: {DATA}")  # fmt: skip
    parser.add_argument(
        "--golden-from", metavar="COLLECTION,…",
        help="put up to 32 faces of these collections of --data into the version, to check engines "
        "with; their licence must allow it (default: patterns that show nobody)",
    )  # fmt: skip
    parser.add_argument(
        "--metrics", type=Path, metavar="JSON",
        help="put the figures of this file, which `ralf evaluate --table card --out` wrote, on "
        "manifest and card",
    )  # fmt: skip
    parser.add_argument("--scores", type=Path, metavar="CSV",
                        help="calibrate on this table with the columns logit and label (1: forged)",
                        )  # fmt: skip
    parser.add_argument("--fitted-on", default="", metavar="TEXT",
                        help="say in words what --scores is (default: the file's name)",
                        )  # fmt: skip
    parser.add_argument(
        "--calibration-of", type=Path, metavar="VERSION",
        help="take the calibration of this version's folder, which must be of the same run",
    )  # fmt: skip
    parser.add_argument(
        "--aggregation", default="top_half_mean", metavar="RULE",
        help="how the scores of a person's faces become one; `ralf evaluate --table aggregation` "
        "compares the rules",
    )  # fmt: skip
    parser.add_argument(
        "--failure", action="append", default=[], metavar="TEXT",
        help="write this known failure on the card; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--promote", action="store_true", help="make it the version in use, if it passes the checks"
    )


def run_publish(args: argparse.Namespace) -> int:
    """A run as a new version of a model; its folder on stdout."""
    from ralf.kernels.artifact import models_folder
    from ralf.kernels.manifest import Aggregation
    from ralf.kernels.registry import promote
    from ralf.train.data.layouts import read_all
    from ralf.train.publish.calibrate import calibrate_on_table
    from ralf.train.publish.card import portions
    from ralf.train.publish.version import (
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
    parser = add_command(
        subparsers, "calibrate", "fit a model's scores and thresholds, as a new version of it",
        run_calibrate,
    )  # fmt: skip
    parser.add_argument("model", metavar="MODEL", help=SPEC)
    add_models_option(parser)
    parser.add_argument("--scores", type=Path, metavar="CSV",
                        help="fit on this table with the columns logit and label (1: forged)",
                        )  # fmt: skip
    parser.add_argument("--data", nargs="+", metavar="PATH",
                        help="score this data, and fit on that, in place of --scores")  # fmt: skip
    parser.add_argument("--device", default="auto", help=DEVICE)
    _add_calibration_options(parser)


def run_calibrate(args: argparse.Namespace) -> int:
    """Publish the same weights with new calibration; the new version's folder on stdout."""
    from ralf.kernels.artifact import models_folder, resolve
    from ralf.kernels.choose_engine import load
    from ralf.train.evaluate.judge import model_of_manifest
    from ralf.train.publish.calibrate import calibrate_on_table
    from ralf.train.publish.version import recalibrate

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
    from ralf.train.data.layouts import read_all
    from ralf.train.publish.calibrate import calibrate_on_split
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
    parser = add_command(
        subparsers, "ensemble", "make one model of several, whose score is their mean", run_ensemble
    )
    parser.add_argument("members", nargs="+", metavar="MODEL", help=SPEC)
    parser.add_argument("--name", required=True,
                        help="name of the new model, such as trio")  # fmt: skip
    add_models_option(parser)
    parser.add_argument("--data", nargs="+", metavar="PATH",
                        help="calibrate the mean on this data (default: do not calibrate)",
                        )  # fmt: skip
    _add_calibration_options(parser)
    parser.add_argument(
        "--promote", action="store_true", help="make it the version in use, if it passes the checks"
    )


def run_ensemble(args: argparse.Namespace) -> int:
    """Publish the ensemble; its folder on stdout."""
    from ralf.kernels.artifact import models_folder, resolve
    from ralf.kernels.registry import promote
    from ralf.train.publish.ensemble import judge_of_members, publish_ensemble

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
