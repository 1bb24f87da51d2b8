"""`ralf train | publish | calibrate | data | evaluate`: datasets on disk to a published model.

Each command imports what it needs when it runs.  Results go to stdout, one JSON line or a path;
progress and refusals to stderr.  Exit codes: 0 done, 1 training diverged, 2 cannot be done as
asked, 130 interrupted (and resumable).
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.data_cli import data_commands, evaluate_commands

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from train.calibrate import Calibrated
    from train.index import Index
    from train.loop import Outcome
    from train.recipe import Data

Commands = "argparse._SubParsersAction[argparse.ArgumentParser]"
Run = Callable[[argparse.Namespace], int]
OK, DIVERGED, USAGE, INTERRUPTED = 0, 1, 2, 130
KEPT_BYTES = 2 * 1024**3
"""Validation crops up to so many are made once and kept."""


def commands(subparsers: Commands) -> None:
    """Register every command of this room."""
    _train(subparsers)
    _publish(subparsers)
    _calibrate(subparsers)
    data_commands(subparsers, refusing)
    evaluate_commands(subparsers, refusing)


def refusing(run: Run) -> Run:
    """The command, its refusals as one line on stderr and an exit code."""

    def told(args: argparse.Namespace) -> int:
        from kernels.artifact import ArtifactError
        from kernels.engine import EngineError
        from train.checkpoint import CheckpointError
        from train.diverged import Diverged

        try:
            return run(args)
        except Diverged as error:
            print(f"ralf: {error}", file=sys.stderr)
            return DIVERGED
        # Recipes, indices, networks and calibration refuse by kinds of ValueError.
        except (ValueError, CheckpointError, ArtifactError, EngineError) as error:
            print(f"ralf: {error}", file=sys.stderr)
            return USAGE

    return told


def _parser(subparsers: Commands, name: str, summary: str, run: Run) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.set_defaults(run=refusing(run))
    return parser


def _train(subparsers: Commands) -> None:
    parser = _parser(subparsers, "train", "train a detector; the same command goes on", run_train)
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
    from train.recipe_text import RecipeError, override, to_json
    from train.recipes import named

    pairs = [change.partition("=") for change in args.set]
    if bad := [name for name, equals, _ in pairs if not equals]:
        raise RecipeError(f"--set takes NAME=VALUE, not {bad[0]!r}")
    recipe = override(named(args.recipe), {name: text for name, _, text in pairs})
    if args.print:
        print(to_json(recipe))
        return OK
    if not args.data or args.out is None:
        raise RecipeError("train needs --data PATH and --out RUN")

    from train.data import Batches
    from train.layouts import read_all
    from train.loop import Options, train
    from train.ranks import joined

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
            recipe, batches, _validation(index, recipe.data), args.out,
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

    from kernels.engine import pick_device

    device = pick_device(asked)
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return device


def _validation(index: "Index", data: "Data") -> Any:
    """The validation split, made once and kept where it fits; None where there is none."""
    from train.examples import Examples

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


def _publish(subparsers: Commands) -> None:
    parser = _parser(subparsers, "publish", "make a model of a run", run_publish)
    parser.add_argument("folder", type=Path, metavar="RUN", help="folder that `ralf train` wrote")
    parser.add_argument("--name", required=True, help="the model's name, as ralf-small")
    parser.add_argument("--models", type=Path, help="where models lie: RALF_MODELS_DIR, or ours")
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
        "--failure", action="append", default=[], help="a known failure, repeatable"
    )
    parser.add_argument("--promote", action="store_true", help="make it the current version")


def _models(args: argparse.Namespace) -> Path:
    """The option, the environment, or the models that come with the code."""
    import os

    from kernels.artifact import SHIPPED

    return args.models or Path(os.environ.get("RALF_MODELS_DIR") or SHIPPED)


def run_publish(args: argparse.Namespace) -> int:
    """A run as a new version of a model; its folder on stdout."""
    from kernels.artifact import promote
    from train.card import portions
    from train.layouts import read_all
    from train.publish import Told, publish

    index = read_all(args.data) if args.data else None
    golden, source = None, Told.golden_source
    if args.golden_from:
        if index is None:
            raise ValueError("--golden-from needs --data")
        golden, source = golden_faces(args.folder, index, args.golden_from.split(","))
    told = Told(
        calibrated=_calibrated_on(args.scores, args.fitted_on) if args.scores else None,
        metrics=json.loads(args.metrics.read_text()) if args.metrics else {},
        data=portions(index) if index is not None else (),
        failures=tuple(args.failure),
        golden=golden,
        golden_source=source,
    )
    artifact = publish(args.folder, args.name, _models(args), told)
    if args.promote:
        promote(_models(args), artifact.name, artifact.version)
    print(artifact.path)
    return OK


def golden_faces(run: Path, index: "Index", datasets: list[str]) -> tuple["NDArray[np.uint8]", str]:
    """Sixteen reals and sixteen forgeries of the named collections, evenly from all there are."""
    import numpy as np
    import torch

    from train.checkpoint import load
    from train.examples import Examples
    from train.index import Index, IndexFault
    from train.publish import GOLDEN, judged

    kept = Index(index.root, tuple(row for row in index if row.dataset in datasets))
    if not len(kept):
        have = sorted({row.dataset for row in index})
        raise IndexFault(f"no rows of {', '.join(datasets)} (have: {', '.join(have)})")
    data = load(judged(run)).recipe.data
    split = "val" if len(kept.where(split="val")) else kept.rows[0].split
    examples = Examples(kept, data, split)
    chosen = []
    for forged in (False, True):
        items = [item for item in examples.items if item.forged == forged]
        count = min(len(items), GOLDEN // 2)
        chosen += [items[place * len(items) // count] for place in range(count)]
    crops: NDArray[np.uint8] = torch.stack([examples.crop(item) for item in chosen]).numpy()
    return crops, f"{', '.join(datasets)}, split {split or 'unnamed'}"


def _calibrate(subparsers: Commands) -> None:
    parser = _parser(
        subparsers, "calibrate", "fit a model's scores and thresholds: a new version", run_calibrate
    )
    parser.add_argument("model", metavar="MODEL", help="name, name@version or path")
    parser.add_argument("--models", type=Path, help="where models lie: RALF_MODELS_DIR, or ours")
    parser.add_argument("--scores", type=Path, metavar="CSV", help="columns logit and label")
    parser.add_argument("--data", nargs="+", metavar="PATH", help="score this data instead")
    parser.add_argument("--split", default="val", help="a split that chose nothing else")
    parser.add_argument(
        "--conditions", default="clean", metavar="A,B", help="wear put on both classes alike"
    )
    parser.add_argument("--families", default="", metavar="A,B", help="forgeries to blend")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    parser.add_argument("--fitted-on", default="", help="what it was fitted on, in words")
    parser.add_argument("--no-shift", action="store_true", help="fit the temperature alone")


def run_calibrate(args: argparse.Namespace) -> int:
    """Publish the same weights with new calibration; the new version's folder on stdout."""
    from kernels.artifact import resolve
    from train.publish import recalibrate

    if (args.scores is None) == (args.data is None):
        raise ValueError("calibrate needs either --scores CSV or --data PATH")
    artifact = resolve(_models(args), args.model)
    if args.scores:
        found = _calibrated_on(args.scores, args.fitted_on, shift=not args.no_shift)
    else:
        found = _calibrated_by(artifact, args)
    for name, each in found.thresholds.items():
        low, high = each.interval
        support = "" if each.supported else "  (too few faces to support it)"
        print(
            f"{name}: {each.score:.4f}  rate {each.rate:.3f} [{low:.3f}, {high:.3f}]{support}",
            file=sys.stderr,
        )
    print(recalibrate(artifact, _models(args), found).path)
    return OK


def _calibrated_on(path: Path, fitted_on: str, *, shift: bool = True) -> "Calibrated":
    """From a table of logits and labels (1 = forged), one row a decision: a track, or a video."""
    import csv

    import numpy as np

    from train.calibrate import CalibrationError, calibrate

    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"logit", "label"} <= rows[0].keys():
        raise CalibrationError(f"{path} should be a CSV with columns logit and label (1 = forged)")
    logit = np.array([float(row["logit"]) for row in rows])
    forged = np.array([row["label"] for row in rows]) == "1"
    return calibrate(logit, forged, fitted_on=fitted_on or path.name, shift=shift)


def _calibrated_by(artifact: Any, args: argparse.Namespace) -> "Calibrated":
    """By the model itself on a split, under each condition."""
    import numpy as np

    from kernels.engine import load
    from train.blend import FAMILIES, HELD_OUT
    from train.calibrate import calibrate
    from train.examples import Examples
    from train.layouts import read_all
    from train.recipe import Data

    engine = load(artifact, args.device)
    index = read_all(args.data)
    families = tuple(filter(None, args.families.split(",")))
    if not families and not len(index.where(split=args.split, label=1)):
        families = tuple(family for family in FAMILIES if family != HELD_OUT)
    data = Data(input=artifact.manifest.input)
    logits, forged = [], []
    for condition in args.conditions.split(","):
        for batch in Examples(index, data, args.split, families=families, condition=condition):
            logits.append(engine(batch.crops).numpy())
            forged.append(batch.forged.numpy())
    return calibrate(
        np.concatenate(logits).astype(np.float64),
        np.concatenate(forged),
        fitted_on=args.fitted_on or f"{args.split}: {args.conditions}",
        shift=not args.no_shift,
    )
