"""`ralf publish` and `ralf calibrate`: a run becomes a model, and its scores mean something."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ralf.train.command import OK, Commands, parser_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ralf.kernels.manifest import Manifest
    from ralf.train.calibrate import Calibrated
    from ralf.train.data.index import Index
    from ralf.train.evaluate.judge import Score


def publish_command(subparsers: Commands) -> None:
    parser = parser_of(subparsers, "publish", "make a model of a run", run_publish)
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
    parser.add_argument("--promote", action="store_true", help="make it current, gate by gate")


def _models(args: argparse.Namespace) -> Path:
    """The option, the environment, or the models that come with the code."""

    from ralf.kernels.artifact import models_folder

    return models_folder(args.models)


def run_publish(args: argparse.Namespace) -> int:
    """A run as a new version of a model; its folder on stdout."""
    from ralf.kernels.manifest import Aggregation
    from ralf.kernels.registry import promote
    from ralf.train.card import portions
    from ralf.train.data.layouts import read_all
    from ralf.train.publish import Told, publish

    index = read_all(args.data) if args.data else None
    golden, source = None, Told.golden_source
    if args.golden_from:
        if index is None:
            raise ValueError("--golden-from needs --data")
        golden, source = golden_faces(args.folder, index, args.golden_from.split(","))
    if args.scores and args.calibration_of:
        raise ValueError("publish takes --scores or --calibration-of, not both")
    calibrated = _calibrated_on(args.scores, args.fitted_on) if args.scores else None
    told = Told(
        calibrated=_calibration_of(args.calibration_of) if args.calibration_of else calibrated,
        aggregation=Aggregation.model_validate({"track": args.aggregation}),
        metrics=_figures(args.metrics) if args.metrics else {},
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


def _figures(path: Path) -> dict[str, Any]:
    """Figures by name: a plain object, or what `ralf evaluate --table card --out` wrote."""
    found: dict[str, Any] = json.loads(path.read_text())
    if "title" not in found:
        return found
    models = [each for name, each in found["figures"].items() if _is_flat(each)]
    if len(models) != 1:
        raise ValueError(f"{path} should hold one model's card, it holds {len(models)}")
    flat: dict[str, Any] = models[0]
    return flat


def _is_flat(figures: dict[str, Any]) -> bool:
    """A card's figures are numbers or threes of them; other tables' are nested."""
    return not any(isinstance(value, dict) for value in figures.values())


def golden_faces(run: Path, index: "Index", datasets: list[str]) -> tuple["NDArray[np.uint8]", str]:
    """Sixteen reals and sixteen forgeries of the named collections, evenly from all there are."""
    import numpy as np
    import torch

    from ralf.train.data.evaluation_set import Examples
    from ralf.train.data.index import Index, IndexFault
    from ralf.train.loop.checkpoint import judged, load
    from ralf.train.publish import GOLDEN

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


def _calibration_of(version: Path) -> "Calibrated":
    """What calibrating a version found, with its intervals."""
    from ralf.kernels.artifact import open_artifact
    from ralf.train.calibrate import CalibrationError, restored

    artifact = open_artifact(version)
    if "calibration" not in artifact.manifest.metrics:
        raise CalibrationError(f"{artifact.label} was never calibrated: `ralf calibrate` does it")
    return restored(artifact.manifest.calibration, artifact.manifest.metrics["calibration"])


def calibrate_command(subparsers: Commands) -> None:
    parser = parser_of(
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
    from ralf.kernels.artifact import resolve
    from ralf.kernels.engine import load
    from ralf.train.publish import recalibrate

    if (args.scores is None) == (args.data is None):
        raise ValueError("calibrate needs either --scores CSV or --data PATH")
    artifact = resolve(_models(args), args.model)
    if args.scores:
        found = _calibrated_on(args.scores, args.fitted_on, shift=not args.no_shift)
    else:
        _warn_of_a_used_split(artifact, args.split)
        found = calibrated_by(load(artifact, args.device), artifact.manifest, args)
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

    from ralf.train.calibrate import CalibrationError, calibrate

    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"logit", "label"} <= rows[0].keys():
        raise CalibrationError(f"{path} should be a CSV with columns logit and label (1 = forged)")
    logit = np.array([float(row["logit"]) for row in rows])
    forged = np.array([row["label"] for row in rows]) == "1"
    return calibrate(logit, forged, fitted_on=fitted_on or path.name, shift=shift)


def calibrated_by(score: "Score", manifest: "Manifest", args: argparse.Namespace) -> "Calibrated":
    """By the model itself on a split, a row a video and condition, pooled as a verdict pools."""
    import numpy as np

    from ralf.train.calibrate import calibrate
    from ralf.train.data.evaluation_set import Examples
    from ralf.train.data.layouts import read_all
    from ralf.train.evaluate.judge import scored
    from ralf.train.recipe import Data, seen_families

    index = read_all(args.data)
    families = tuple(filter(None, args.families.split(",")))
    if not families and not len(index.where(split=args.split, label=1)):
        families = seen_families(manifest.trained)
    data = Data(input=manifest.input, evaluation_frames=manifest.input.sampling.max_frames)
    conditions = list(dict.fromkeys(filter(None, args.conditions.split(","))))
    if not conditions:
        raise ValueError("--conditions should name at least one, as clean,h264=30")
    logits, forged, people = [], [], set()
    for condition in conditions:
        examples = Examples(index, data, args.split, families=families, condition=condition)
        found = np.concatenate([score(batch.crops).numpy() for batch in examples])
        videos = scored(examples, found).pooled(manifest.aggregation)
        logits.append(videos.logit)
        forged.append(videos.forged)
        reals = [item for item in examples.items if not item.forged]
        people |= {item.frame.row.target or item.video for item in reals}
    return calibrate(
        np.concatenate(logits),
        np.concatenate(forged),
        fitted_on=args.fitted_on or f"{args.split}: {','.join(conditions)}",
        shift=not args.no_shift,
        # The same person seen again is no new evidence of how often reals are called forged.
        times=max(1, int((~np.concatenate(forged)).sum()) // max(1, len(people))),
    )


def _warn_of_a_used_split(artifact: Any, split: str) -> None:
    """The split that chose the weights flatters them; a word to whoever fits on it."""
    last = artifact.manifest.trained.get("chosen_by") == "last"  # whatever validation said
    if split == "val" and "validation" in artifact.manifest.metrics and not last:
        print(
            "ralf: the split val chose these weights, so scores fitted on it are a little too "
            "sure; --split with faces that chose nothing is better",
            file=sys.stderr,
        )
