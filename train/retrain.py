"""What `ralf retrain` does: from data to a promoted model and its engines, one resumable step after
another.

train       the recipe to its end, or until --minutes with weights that validation has judged; a
            chain of trainings one stage after another, each to its end
clips       (a chain that asks for them) videos made of the data's stills, and faces cut from them
residual    (RALF of two streams) closing it costs AUC, or the plain classifier inside goes on,
            under its own name (ralf.train.residual_gate)
calibrate   forgeries score above reals on the calibration split
evaluate    video AUC above chance on the test split
publish     weights, golden crops, calibration, figures and targets as one version
build       a plan for each target that needs one, within the manifest's error budget
verify      golden.npz through the torch engine, and through every plan that this machine runs
promote     if the checks of ralf.kernels.registry pass

Which trainings there are is declared in ralf.train.chain; ralf.train.resumable does each step once.
"""

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ralf.kernels import plans, registry
from ralf.kernels.artifact import Artifact, ArtifactError, open_artifact
from ralf.kernels.engine import EngineError, pick_device
from ralf.kernels.manifest import Calibration, Reference
from ralf.train.calibrate import (
    Calibrated,
    CalibrationError,
    calibrate_on_split,
    families_to_blend,
    restored,
)
from ralf.train.card import portions
from ralf.train.chain import Chain, MadeClips, Training
from ralf.train.data.index import Index
from ralf.train.data.layouts import read_all
from ralf.train.data.prepare import prepare
from ralf.train.evaluate.judge import JudgedModel, evaluate, model_of_run
from ralf.train.evaluate.tables import table
from ralf.train.evaluate.tables.table import TableOptions, read_groups
from ralf.train.forge.clips import INDEX, ClipOptions, make_clips
from ralf.train.forge.families import FAMILIES
from ralf.train.loop.checkpoint import BEST, has_checkpoint
from ralf.train.publish import (
    PublishDetails,
    Target,
    declared_targets,
    golden_faces,
    publish_run,
)
from ralf.train.recipe import seen_families
from ralf.train.recipe_text import to_json
from ralf.train.residual_gate import published_folder, residual_step
from ralf.train.resumable import Facts, Say, Step, Stopped
from ralf.train.trainings import ChainRun, TrainingFailed
from ralf.worker.drift import EDGES, histogram

LEAST_PEOPLE = 30
"""With 30 people a false-positive rate of 0 still means anything up to 12 %."""

if TYPE_CHECKING:
    from ralf.kernels.build import Builder


@dataclass(frozen=True)
class Retraining:
    """What was asked of one `ralf retrain`."""

    training: ChainRun
    name: str
    models: Path
    targets: tuple[Target, ...] = ("cpu",)
    calibrate_on: str = "val"
    evaluate_on: str = "test"
    conditions: tuple[str, ...] = ("clean",)
    """Damage put on the calibration split, on both classes alike."""
    golden_from: tuple[str, ...] = ()
    """Collections whose faces may ship; none: patterns that show nobody."""
    least_people: int = LEAST_PEOPLE
    """Real people whom the splits to calibrate and to evaluate on should have at least."""
    groups: tuple[Path, ...] = ()
    """Tables of people's groups, to count errors by on the card."""
    force: bool = False
    say: Say = print

    @property
    def run(self) -> Path:
        """The folder of everything that is made on the way."""
        return self.training.run

    @property
    def index(self) -> Index:
        """The data."""
        return self.training.index

    @property
    def clips(self) -> MadeClips | None:
        """The clips to calibrate and measure on; None: the data itself."""
        return self.training.chain.clips


def default_run(chain: Chain, changes: Mapping[str, str], index: Index, name: str) -> Path:
    """The same folder for the same recipes on the same data, so that the same command goes on."""
    # Relative to nowhere: where the run lies must not change its name.
    recipes = [chain.recipe(Path(), training, changes) for training in chain.trainings]
    asked = "\0".join([*map(to_json, recipes), index.sha256])
    digest = hashlib.sha256(asked.encode()).hexdigest()[:8]
    return Path("runs") / f"{name}-{recipes[-1].name}-{digest}"


def steps(order: Retraining) -> list[Step]:
    """All steps, in order."""
    on = "made clips of " if order.clips else ""
    gate = residual_step(order.training, order.name, order.calibrate_on, order.say)
    least = order.least_people
    calibrating = {"split": order.calibrate_on, "conditions": order.conditions, "least": least}
    publishing = {
        "name": order.name,
        "targets": order.targets,
        "golden": order.golden_from,
        # Absolute: the same relative folder elsewhere is another one, and lacks the version.
        "models": str(order.models.resolve()),
    }
    return [
        *(_train_step(order, stage) for stage in order.training.chain.stages),
        *([gate] if gate is not None else []),
        *([_clips_step(order)] if order.clips else []),
        Step(
            "calibrate", calibrating, lambda done: _calibrate(order, done),
            f"forgeries score above reals on {on}split {order.calibrate_on}",
        ),
        Step(
            "evaluate",
            {"split": order.evaluate_on, "least": least, "groups": _hashes(order.groups)},
            lambda done: _evaluate(order, done),
            f"AUC above 0.5 on split {order.evaluate_on}, of {least} people or more",
        ),
        Step(
            "publish", publishing, lambda done: _publish(order, done),
            f"a version of {order.name} in {order.models}, golden crops proven",
            still_there=lambda facts: _opens(Path(facts["path"])),
        ),
        Step(
            "build", {}, lambda done: _build(order, _artifact(done)),
            f"engines for {', '.join(order.targets)}, within the error budget",
            still_there=lambda facts: _covered(Path(facts["path"])),
        ),
        Step(
            "verify", {}, lambda done: _verify(order, _artifact(done)),
            "golden.npz through every engine that this machine runs",
        ),
        Step(
            "promote", {}, lambda done: _promote(order, _artifact(done)),
            "engines, metrics and golden crops as the registry asks",
        ),
    ]  # fmt: skip


def _hashes(paths: Sequence[Path]) -> list[str]:
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]


# training


def _train_step(order: Retraining, stage: tuple[Training, ...]) -> Step:
    training = order.training
    recipes = [
        hashlib.sha256(to_json(training.recipe(each)).encode()).hexdigest() for each in stage
    ]
    asks: dict[str, Any] = {"recipe": ",".join(recipes), "data": order.index.sha256}
    if (processes := training.processes_of(stage)) > 1:
        asks["processes"] = processes  # with another number, every batch is another one
    until = "" if _builds_on_each_other(order) else ", or out of --minutes and judged once"
    return Step(
        " and ".join(each.name for each in stage),
        asks,
        lambda done: _train(order, stage),
        f"{training.recipe(stage[0]).name} to its end{until}",
        still_there=lambda facts: all(has_checkpoint(training.folder(each)) for each in stage),
    )


def _builds_on_each_other(order: Retraining) -> bool:
    return len(order.training.chain.trainings) > 1


def _train(order: Retraining, stage: tuple[Training, ...]) -> Facts:
    """A single training's facts as they are, those of several by name."""
    try:
        said = order.training.train(stage)
    except TrainingFailed as error:
        raise Stopped(
            f"{' and '.join(training.name for training in stage)} to the end",
            f"{error}; its own message stands above",
            "mend what it says, then the same command again",
        ) from error
    found = {
        training.name: _ended(order, training, facts)
        for training, facts in zip(stage, said, strict=True)
    }
    return found if len(stage) > 1 else found[stage[0].name]


def _ended(order: Retraining, training: Training, said: Facts) -> Facts:
    """The facts to keep of a training, if it ended as the next step needs it."""
    ending, step = said["ending"], said["step"]
    if ending == "out_of_time" and _builds_on_each_other(order):
        raise Stopped(
            f"{training.name} to its end, since what follows builds on it",
            f"--minutes ended at step {step}",
            "the same command again; it trains on from that step",
        )
    if ending == "out_of_time" and not (Path(said["run"]) / BEST).is_file():
        raise Stopped(
            "weights that validation has judged at least once",
            f"--minutes ended at step {step}, before the first validation on split val",
            "the same command again; it trains on from that step",
        )
    return {"ending": ending, "step": step, "best": said["best"]}


# calibration and figures


def _clips_step(order: Retraining) -> Step:
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
        lambda done: _clips(order, families),
        "stills set in motion, encoded, and cut by the worker's own face finder",
        still_there=lambda facts: all(Path(path).is_file() for path in facts.values()),
    )


def _clips(order: Retraining, families: Mapping[str, tuple[Any, ...]]) -> Facts:
    """Faces cut from clips of the calibration split and of the test split: their indexes."""
    how = order.clips
    assert how is not None
    found: Facts = {}
    for split, drawn in families.items():
        options = ClipOptions(
            drawn, crfs=how.crfs, seconds=how.seconds, drift=how.drift, uploads=how.uploads
        )
        clips = make_clips(order.index, order.run / "clips" / split, options, split=split)
        folder = order.run / "crops" / split
        contract = order.training.last_recipe.data.input
        prepare(clips, folder, contract, frames=how.frames, device=order.training.device)
        order.say(f"clips: {len(clips)} of split {split}")
        found[split] = str(folder / INDEX)
    return found


def _calibrate(order: Retraining, done: Mapping[str, Facts]) -> Facts:
    judge = model_of_run(published_folder(order.training, done), device=_torch(order))
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
    people = len({row.target or (row.dataset, row.video) for row in real})
    if people < order.least_people:
        raise Stopped(
            f"at least {order.least_people} real people in split {split}",
            f"{people}: too few to calibrate on or to measure with",
            f"add people, or name another split: {option} SPLIT; to see the steps work on a few, "
            f"--least-people {max(1, people)}",
        )


def _calibrated_of(facts: Facts) -> Calibrated:
    """What calibrating found, back from the record."""
    before, after = facts["nll"]
    found = {"thresholds": facts["thresholds"], "nll_before": before, "nll_after": after}
    return restored(Calibration(**facts["calibration"]), found)


def _evaluate(order: Retraining, done: Mapping[str, Facts]) -> Facts:
    made, split = _calibrated_of(done["calibrate"]), order.evaluate_on
    _refuse_empty(order.index, split, "--evaluate-on")
    _refuse_few(order, split, "--evaluate-on")
    # Judged with the calibration and the threshold that this version will be served with.
    judge = dataclasses.replace(
        model_of_run(published_folder(order.training, done), device=_torch(order)),
        calibration=made.calibration,
        threshold=made.scores()["fpr_0.05"],
    )
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


# publishing


def _publish(order: Retraining, done: Mapping[str, Facts]) -> Facts:
    source, folder = (
        (" of made clips" if order.clips else ""),
        published_folder(order.training, done),
    )
    earned = done.get("residual", {})
    measured = {"residual": earned["views"]} if earned.get("earned") else {}
    details = PublishDetails(
        calibrated=_calibrated_of(done["calibrate"]),
        metrics={**done["evaluate"], **measured},
        data=portions(order.index),
        targets=declared_targets(order.targets, order.training.device),
        reference=Reference(
            edges=EDGES,
            counts=tuple(done["calibrate"]["reference"]),
            of=f"real videos{source} of split {order.calibrate_on}",
        ),
    )
    if order.golden_from:
        crops, source = golden_faces(folder, order.index, order.golden_from)
        details = dataclasses.replace(details, golden=crops, golden_source=source)
    name = earned.get("name", order.name)
    artifact = publish_run(folder, name, order.models, details)
    order.say(f"publish: {artifact.label}")
    return {"path": str(artifact.path), "version": artifact.version}


def _opens(path: Path) -> bool:
    try:
        open_artifact(path)
    except ArtifactError:
        return False
    return True


def _covered(path: Path) -> bool:
    artifact = open_artifact(path)
    return all(plans.covers(artifact, target) for target in artifact.manifest.targets)


def _artifact(done: Mapping[str, Facts]) -> Artifact:
    return open_artifact(Path(done["publish"]["path"]))


def _build(order: Retraining, artifact: Artifact) -> Facts:
    built = [_built(order, artifact, target) for target in order.targets if target != "cpu"]
    return {"path": str(artifact.path), "plans": built}


def _built(order: Retraining, artifact: Artifact, builder: "Builder") -> str:
    from ralf.kernels.build import BuildRequest as BuildOrder
    from ralf.kernels.build import build

    try:
        # An rtx-aot plan is made without a GPU; only torch-tensorrt proves its plan on one.
        on = pick_device(order.training.device if builder == "torch-tensorrt" else "cpu")
        found = build(BuildOrder(artifact, device=on, say=order.say), builder)
    except (ArtifactError, EngineError, ImportError) as error:
        raise Stopped(
            f"a plan of {artifact.label} by {builder}, within its error budget",
            str(error),
            "the same command where that builder works, or without it: --targets cpu",
        ) from error
    return str(found.key)


def _verify(order: Retraining, artifact: Artifact) -> Facts:
    golden = registry.check_golden_logits(artifact)
    verified: Sequence[str] = ()
    try:
        device = pick_device(order.training.device)
        if device.type == "cuda":
            # Only here: plans run on GPUs alone, and elsewhere the torch engine is all there is.
            from ralf.kernels.verify import verify

            verified = [str(plan.key) for plan in verify(artifact, device, order.say)]
    except (ArtifactError, EngineError) as error:
        # One way to stop below, whether the golden logits differ or an engine refuses.
        golden = dataclasses.replace(golden, passed=False, came=str(error))
    if not golden.passed:
        raise Stopped(golden.asked, golden.came, f"ralf models verify {artifact.label}, then again")
    return {"golden": golden.came, "verified": list(verified)}


def _promote(order: Retraining, artifact: Artifact) -> Facts:
    try:
        _, checks = registry.promote(
            order.models, artifact.name, artifact.version, force=order.force
        )
    except registry.NotPromoted as error:
        failed = [check for check in error.checks if not check.passed]
        raise Stopped(
            "; ".join(check.asked for check in failed),
            "; ".join(check.came for check in failed),
            "; ".join(dict.fromkeys(check.advice for check in failed if check.advice))
            + f"; or all the same: ralf models promote {artifact.label} --models {order.models} "
            "--force",
        ) from error
    for check in checks:
        order.say(f"promote: {check}")
    return {"version": artifact.version, "forced": not all(check.passed for check in checks)}


def _torch(order: Retraining) -> str:
    return str(pick_device(order.training.device))
