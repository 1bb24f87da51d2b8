"""How `ralf retrain` judges what it trained: the residual, made clips, calibration, the figures.

residual    a RALF of two streams is published as RALF only where its residual is at work: closing
            it must cost AUC on the family held out, with a 95 % interval over people above 0.  Else
            the plain classifier inside goes on, under its own name: the two are never called by one
            another's.  Beside it stand the figures of a control, a classifier trained for about the
            same minutes that never had a residual
clips       videos made of the data's stills, and faces cut from them by the worker's face finder
calibrate   forgeries score above reals on the calibration split
evaluate    AUC above chance on the test split, with the threshold that the version is served with
"""

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ralf.kernels.manifest import Calibration
from ralf.train.data.index import Index
from ralf.train.data.layouts import read_all
from ralf.train.data.prepare import prepare
from ralf.train.evaluate.judge import JudgedModel, evaluate, model_of_run
from ralf.train.evaluate.tables import table
from ralf.train.evaluate.tables.residual import residual_figures
from ralf.train.evaluate.tables.table import TableOptions, read_groups
from ralf.train.forge.clips import INDEX, ClipOptions, make_clips
from ralf.train.forge.families import FAMILIES
from ralf.train.forge.renderers.stored import load
from ralf.train.loop.checkpoint import BEST, has_checkpoint
from ralf.train.publish.calibrate import (
    Calibrated,
    CalibrationError,
    calibrate_on_split,
    families_to_blend,
    restored,
)
from ralf.train.publish.version import without_residual
from ralf.train.recipe import seen_families
from ralf.train.retrain.order import Retraining
from ralf.train.retrain.renderers import all_cores, fitted
from ralf.train.retrain.resumable import Facts, Step, Stopped
from ralf.train.trainings import ChainRun
from ralf.worker.drift import histogram

CLOSED = "without_residual"
"""The folder of the plain classifier inside, in the run's folder."""


# residual


def residual_step(order: Retraining) -> Step | None:
    """The step that decides what is published; None where the chain trains no second stream."""
    training, name, split = order.training, order.name, order.calibrate_on
    network, chain = training.last_recipe.network, training.chain
    if network.build != "ralf" or network.dimensions.get("sees") != "bands":
        return None
    return Step(
        "residual",
        {"split": split, "control": chain.control, "name": name, "otherwise": chain.classifier},
        lambda done: _residual(order.with_forgeries(done)),
        f"closing it costs AUC on the family held out, or {chain.classifier} is published",
        still_there=lambda facts: has_checkpoint(Path(facts["folder"])),
    )


def _residual(order: Retraining) -> Facts:
    """What each part of the network is worth on the split's people; which run is published."""
    training, name, split, say = order.training, order.name, order.calibrate_on, order.say
    chain, folder, device = training.chain, training.last_folder, order.torch_device
    named = [each for each in chain.trainings if each.name == chain.control]
    control = model_of_run(training.folder(named[0]), device=device) if named else None
    found = residual_figures(
        model_of_run(folder, device=device), training.index, TableOptions(split=split), control
    )
    value, low, high = found.views["closed"]["costs held out"]
    said = f"{value:+.4f} [{low:+.4f}, {high:+.4f}] of the AUC on the family held out"
    say(f"residual: closing it costs {said}")
    if not found.earned:
        why = f"Trained as RALF. Closing the residual costs {said}: this is the classifier alone."
        folder = without_residual(folder, training.run / CLOSED, why)
        say(f"residual: not at work, so the classifier is published, as {chain.classifier}")
    return {
        "folder": str(folder),
        "earned": found.earned,
        "name": name if found.earned else chain.classifier,
        "views": found.as_json(),
    }


def published_folder(training: ChainRun, done: Mapping[str, Facts]) -> Path:
    """The run that is published."""
    return Path(done["residual"]["folder"]) if "residual" in done else training.last_folder


# clips


def clips_step(order: Retraining) -> Step:
    """The step that makes clips of the data's stills."""
    assert order.clips is not None
    recipe = order.training.last_recipe
    seen = recipe.data.trained_families or seen_families({"held_out": recipe.data.unseen})
    # A held-out method of forgeries on disk is judged there: clips are made of families only.
    unseen = (recipe.data.unseen,) if recipe.data.unseen in FAMILIES else ()
    families = {
        # Never the family held out: a calibration that has met it could not be judged by it.
        order.calibrate_on: seen,
        order.evaluate_on: seen + unseen * order.clips.held_out_turns,
    }
    return Step(
        "clips",
        {"families": families, "how": dataclasses.asdict(order.clips)},
        lambda done: _clips(order.with_forgeries(done), families, done),
        "stills set in motion, encoded, and cut by the worker's own face finder",
        still_there=lambda facts: all(Path(path).is_file() for path in facts.values()),
    )


def _clips(
    order: Retraining, families: Mapping[str, tuple[Any, ...]], done: Mapping[str, Facts]
) -> Facts:
    """Faces cut from clips of the calibration split and of the test split: their indexes."""
    how, data = order.clips, order.training.last_recipe.data
    assert how is not None
    found: Facts = {}
    for split, drawn in families.items():
        # As the family held out: a generator held out is shown in the test alone.
        renderers = fitted(order, done, held_out=split == order.evaluate_on)
        talk = how.talk and any(load(path).renderer.speaks for path in renderers)
        options = ClipOptions(
            drawn, renderers, how.crfs,
            seconds=how.seconds, drift=how.drift, talk=talk, uploads=how.uploads,
        )  # fmt: skip
        stills = evenly(order.index.where(split=split, label=0), how.stills)
        workers = order.training.room if order.training.room > 1 else 0
        clips = make_clips(
            stills, order.run / "clips" / split, options, split=split, data=data, workers=workers
        )
        folder = order.run / "crops" / split
        prepare(
            clips, folder, data.input,
            frames=how.frames, workers=workers, device=order.torch_device,
        )  # fmt: skip
        order.say(f"clips: {len(clips)} of split {split}")
        found[split] = str(folder / INDEX)
    return found


# calibrate


def calibrate_step(order: Retraining, done: Mapping[str, Facts]) -> Facts:
    """Temperature, shift and thresholds, on the split to calibrate on."""
    judge = model_of_run(published_folder(order.training, done), device=order.torch_device)
    split, clips = order.calibrate_on, order.clips
    index, fitted_on = order.index, ""
    if clips:
        # Uploads may be stills too, and people of the stills need not be those of the clips: their
        # reals count for the thresholds.
        index = read_all([done["clips"][split]]) + order.index.where(split=split, label=0)
        rates = " and ".join(map(str, clips.crfs))
        fitted_on = f"made clips of the {split} people, H.264 at crf {rates}"
    _refuse_empty(index, split, "--calibrate-on")
    _refuse_few(order, split, "--calibrate-on")
    if _chose_the_weights(order, split):
        order.say(
            "calibrate: split val chose the weights too, so scores come out a little too sure; "
            "--calibrate-on a split that chose nothing is better"
        )
    try:
        with all_cores(order.training.room):
            made, reals = calibrate_on_split(
                judge, index, split, conditions=order.conditions, fitted_on=fitted_on
            )
    except CalibrationError as error:
        raise Stopped(
            f"real and forged videos in split {split}, forgeries scoring higher",
            str(error),
            "train further (--minutes), or name another split: --calibrate-on",
        ) from error
    return {
        "calibration": made.calibration.model_dump(),
        "thresholds": {name: dataclasses.asdict(each) for name, each in made.thresholds.items()},
        "nll": [made.nll_before, made.nll_after],
        "reference": histogram([float(value) for value in reals]),
    }


def _chose_the_weights(order: Retraining, split: str) -> bool:
    """Whether that split decided which weights are published."""
    last = order.training.last_recipe.schedule.select == "last"
    return split == "val" and not last and (order.training.last_folder / BEST).is_file()


def _refuse_empty(index: Index, split: str, option: str) -> None:
    if not len(index.where(split=split)):
        raise Stopped(
            f"rows of split {split}",
            f"none; there are {sorted({row.split for row in index})}",
            f"name another: {option} SPLIT",
        )


def _refuse_few(order: Retraining, split: str, option: str) -> None:
    """Figures of a handful of people say nothing about others."""
    real = order.index.where(split=split, label=0)
    people = len({row.person for row in real})
    if people < order.least_people:
        raise Stopped(
            f"at least {order.least_people} real people in split {split}",
            f"{people}: too few to calibrate on or to measure with",
            f"add people, or name another split: {option} SPLIT; to see the steps work on a few, "
            f"--least-people {max(1, people)}",
        )


def evenly(index: Index, most: int | None) -> Index:
    """So many of the rows, from each collection alike as far as it goes, in the index's order."""
    if most is None or len(index) <= most:
        return index
    turns: list[tuple[str, str, int]] = []
    for dataset in sorted({row.dataset for row in index}):
        own = [number for number, row in enumerate(index) if row.dataset == dataset]
        # By a hash, as a table may be sorted by anything; the n-th of each comes before any n+1-th.
        own.sort(key=lambda number: hashlib.sha256(index.rows[number].path.encode()).digest())
        turns += [(f"{turn:09}", dataset, number) for turn, number in enumerate(own)]
    kept = sorted(number for _, _, number in sorted(turns)[:most])
    return Index(index.root, tuple(index.rows[number] for number in kept), index.notes)


def calibrated_of(facts: Facts) -> Calibrated:
    """What calibrating found, back from the record."""
    before, after = facts["nll"]
    found = {"thresholds": facts["thresholds"], "nll_before": before, "nll_after": after}
    return restored(Calibration(**facts["calibration"]), found)


# evaluate


def evaluate_step(order: Retraining, done: Mapping[str, Facts]) -> Facts:
    """The figures of the card, on the split to evaluate on."""
    made, split = calibrated_of(done["calibrate"]), order.evaluate_on
    _refuse_empty(order.index, split, "--evaluate-on")
    _refuse_few(order, split, "--evaluate-on")
    # Judged with the calibration and the threshold that this version will be served with.
    judge = dataclasses.replace(
        model_of_run(published_folder(order.training, done), device=order.torch_device),
        calibration=made.calibration,
        threshold=made.scores()["fpr_0.05"],
    )
    with all_cores(order.training.room):
        if order.clips:
            figures = _card_figures(order, judge, done["clips"][split])
        else:
            figures = _video_figures(order, judge)
    area = figures[f"{split}_auc"]
    if not area[0] > 0.5:  # NaN too: one class alone
        raise Stopped(
            f"AUC above 0.5 on split {split}",
            f"{area[0]:.4f}",
            "train further or on more data; or name another split: --evaluate-on",
        )
    return {name: _without_nan(value) for name, value in figures.items()}


def _card_figures(order: Retraining, judge: JudgedModel, clips: str) -> Facts:
    """All figures of the card's table, on stills and on made clips."""
    index = read_all([*order.training.data, clips])
    options = TableOptions(split=order.evaluate_on, groups=read_groups(order.groups))
    made = table("card", [judge], index, options)
    made.save(order.run / "card.json")
    return dict(made.figures[judge.name])


def _video_figures(order: Retraining, judge: JudgedModel) -> Facts:
    split = order.evaluate_on
    families = families_to_blend(judge, order.index, split)
    found = evaluate(judge, order.index, split, families=families)
    videos, frames = found.videos, found.frames
    return {
        f"{split}_auc": [videos.auc, videos.auc_low, videos.auc_high],
        f"{split}_auc_frames": [frames.auc, frames.auc_low, frames.auc_high],
        f"{split}_eer": videos.eer,
        f"{split}_ece": videos.ece,
        f"{split}_videos": videos.real + videos.forged,
    }


def _without_nan(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, list):
        # An interval may be NaN where its value is not, with one cluster for example.
        return value if all(map(math.isfinite, value)) else value[:1]
    return value if math.isfinite(value) else None
