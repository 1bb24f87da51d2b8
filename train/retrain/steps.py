"""What `ralf retrain` does: from data to a promoted model and its engines, one resumable step after
another.

fit         (a chain that asks for them) learned renderers of forged faces, each for its minutes
render      their forgeries beside the data, as one index
train       the recipe to its end, or until --minutes with weights that validation has judged; a
            chain of trainings one stage after another, each to its end
residual    (RALF of two streams) closing it costs AUC, or the plain classifier inside goes on,
            under its own name
clips       (a chain that asks for them) videos made of the data's stills, and faces cut from them
calibrate   forgeries score above reals on the calibration split
evaluate    video AUC above chance on the test split
publish     weights, golden crops, calibration, figures and targets as one version
build       a plan for each target that needs one, within the manifest's error budget
verify      golden.npz through the torch engine, and through every plan that this machine runs
promote     if the checks of ralf.kernels.registry pass

Which trainings there are is declared in ralf.train.chain.  The files beside this one do each step
once (resumable.py), fit and render (renderers.py), and judge (judging.py).
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ralf.kernels import plans, registry
from ralf.kernels.artifact import Artifact, ArtifactError, open_artifact
from ralf.kernels.engine import EngineError, pick_device
from ralf.kernels.manifest import Reference
from ralf.train.chain import Training
from ralf.train.loop.checkpoint import BEST, has_checkpoint
from ralf.train.publish.card import portions
from ralf.train.publish.version import (
    PublishDetails,
    declared_targets,
    golden_faces,
    publish_run,
)
from ralf.train.recipe_text import to_json
from ralf.train.retrain.judging import (
    calibrate_step,
    calibrated_of,
    clips_step,
    evaluate_step,
    published_folder,
    residual_step,
)
from ralf.train.retrain.order import Retraining
from ralf.train.retrain.renderers import renderer_steps
from ralf.train.retrain.resumable import Facts, Step, Stopped
from ralf.train.trainings import TrainingFailed
from ralf.worker.drift import EDGES

if TYPE_CHECKING:
    from ralf.kernels.build import Builder


def all_steps(order: Retraining) -> list[Step]:
    """All steps, in order."""
    on = "made clips of " if order.clips else ""
    gate = residual_step(order)
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
        *renderer_steps(order),
        *(_train_step(order, stage) for stage in order.training.chain.stages),
        *([gate] if gate is not None else []),
        *([clips_step(order)] if order.clips else []),
        Step(
            "calibrate", calibrating, lambda done: calibrate_step(order.with_forgeries(done), done),
            f"forgeries score above reals on {on}split {order.calibrate_on}",
        ),
        Step(
            "evaluate",
            {"split": order.evaluate_on, "least": least, "groups": _hashes(order.groups)},
            lambda done: evaluate_step(order.with_forgeries(done), done),
            f"AUC above 0.5 on split {order.evaluate_on}, of {least} people or more",
        ),
        Step(
            "publish", publishing, lambda done: _publish(order.with_forgeries(done), done),
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
        lambda done: _train(order.with_forgeries(done), stage),
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


# publishing


def _publish(order: Retraining, done: Mapping[str, Facts]) -> Facts:
    source, folder = (
        (" of made clips" if order.clips else ""),
        published_folder(order.training, done),
    )
    earned = done.get("residual", {})
    measured = {"residual": earned["views"]} if earned.get("earned") else {}
    details = PublishDetails(
        calibrated=calibrated_of(done["calibrate"]),
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
