"""What each station of `ralf retrain` does, and the gate at its end; ralf.train.retrain walks them.

train       the recipe's end, or the end of --minutes with weights that validation has judged
calibrate   scores rank forgeries above reals on the calibration split
evaluate    video AUC above a coin's on the test split
publish     weights, golden crops, calibration, figures and targets as one version
build       a plan for each target that wants one, within the manifest's error budget
verify      golden.npz through the torch engine, and through every plan that this machine runs
promote     ralf.kernels.registry's gates against the promoted version
"""

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ralf.kernels import plans, registry
from ralf.kernels.artifact import Artifact, ArtifactError, open_artifact
from ralf.kernels.engine import EngineError, pick_device
from ralf.kernels.manifest import Calibration, Reference
from ralf.train.calibrate import Calibrated, CalibrationError, calibrate, probability, restored
from ralf.train.card import portions
from ralf.train.data.batches import Batches
from ralf.train.data.index import Index
from ralf.train.evaluate.judge import Judge, evaluate, examples_for, from_run, score
from ralf.train.loop.checkpoint import BEST, judged
from ralf.train.loop.loop import train
from ralf.train.publish import Told, publish
from ralf.train.recipe import seen_families
from ralf.train.recipe_text import to_json
from ralf.train.retrain import Facts, Step, Stopped
from ralf.train.retrain_order import Interrupted, Order, declared
from ralf.worker.drift import EDGES, histogram

if TYPE_CHECKING:
    from ralf.kernels.build import Builder


def steps(order: Order) -> list[Step]:
    """The walk, in order."""
    recipe = hashlib.sha256(to_json(order.recipe).encode()).hexdigest()
    return [
        Step(
            "train", {"recipe": recipe, "data": order.index.sha256},
            lambda done: _train(order),
            f"{order.recipe.name} to its end, or out of --minutes and judged once",
            there=lambda facts: judged(order.run).is_file(),
        ),
        Step(
            "calibrate", {"split": order.calibrate_on, "conditions": order.conditions},
            lambda done: _calibrate(order),
            f"forgeries score above reals on split {order.calibrate_on}",
        ),
        Step(
            "evaluate", {"split": order.evaluate_on},
            lambda done: _evaluate(order, done["calibrate"]),
            f"video AUC above 0.5 on split {order.evaluate_on}",
        ),
        Step(
            "publish",
            {"name": order.name, "targets": order.targets, "golden": order.golden_from,
             "models": str(order.models.resolve())},
            lambda done: _publish(order, done),
            f"a version of {order.name} in {order.models}, golden crops proven",
            there=lambda facts: _opens(Path(facts["path"])),
        ),
        Step(
            "build", {}, lambda done: _build(order, _artifact(done)),
            f"engines for {', '.join(order.targets)}, within the error budget",
            there=lambda facts: _covered(Path(facts["path"])),
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


def _train(order: Order) -> Facts:
    from ralf.train.cli import validation_of

    recipe, index = order.recipe, order.index
    batches = Batches(index, recipe.data, "train", recipe.seed, allow_leaks=order.allow_leaks)
    outcome = train(
        recipe, batches, validation_of(index, recipe.data), order.run,
        data_sha256=index.sha256, device=pick_device(order.device), options=order.options,
    )  # fmt: skip
    state = outcome.state
    if outcome.ending == "interrupted":
        raise Interrupted(f"stopped at step {state.step}; the same command goes on")
    judged_once = (order.run / BEST).is_file()
    if outcome.ending == "out_of_time" and not judged_once:
        raise Stopped(
            "weights that validation has judged at least once",
            f"--minutes ended at step {state.step}, before the first look at split val",
            "the same command again; it trains on from that step",
        )
    return {"ending": outcome.ending, "step": state.step, "best": state.best}


def _calibrate(order: Order) -> Facts:
    judge, split = from_run(order.run, device=_torch(order)), order.calibrate_on
    if split == "val" and (order.run / BEST).is_file():
        order.say(
            "calibrate: split val chose the weights too, so scores come out a little too sure; "
            "--calibrate-on a split that chose nothing is better"
        )
    seen = [_videos(order, judge, split, condition) for condition in order.conditions]
    logit, forged = (np.concatenate([each[column] for each in seen]) for column in (0, 1))
    people: set[str] = set().union(*(each[2] for each in seen))
    try:
        made = calibrate(
            logit, forged,
            fitted_on=f"{split}: {','.join(order.conditions)}",
            # The same person seen again is no new evidence of how often reals are called forged.
            times=max(1, int((~forged).sum()) // max(1, len(people))),
        )  # fmt: skip
    except CalibrationError as error:
        raise Stopped(
            f"real and forged videos in split {split}, forgeries scoring higher",
            str(error),
            "train further (--minutes), or name another split: --calibrate-on",
        ) from error
    first, known, _ = seen[0]
    reals = probability(first, made.calibration)[~known]
    return {
        "calibration": made.calibration.model_dump(),
        "thresholds": {name: dataclasses.asdict(each) for name, each in made.thresholds.items()},
        "nll": [made.nll_before, made.nll_after],
        "reference": histogram([float(value) for value in reals]),
    }


def _videos(
    order: Order, judge: Judge, split: str, condition: str
) -> tuple[np.ndarray, np.ndarray, set[str]]:
    """A logit and a label for each video, pooled as a verdict pools; and who is in them."""
    if not len(order.index.where(split=split)):
        raise Stopped(
            f"rows of split {split}",
            f"none; there are {sorted({row.split for row in order.index})}",
            "name another: --calibrate-on SPLIT, --evaluate-on SPLIT",
        )
    examples = examples_for(
        judge,
        order.index,
        split,
        families=_families(judge, order.index, split),
        condition=condition,
    )
    pooled = score(judge, examples).pooled(judge.aggregation)
    reals = [item for item in examples.items if not item.forged]
    people = {str(item.frame.row.target or item.video) for item in reals}
    return pooled.logit, pooled.forged, people


def _families(judge: Judge, index: Index, split: str) -> tuple[str, ...]:
    """Blended forgeries where the split has none of its own."""
    if len(index.where(split=split, label=1)):
        return ()
    return seen_families(judge.trained)


def calibrated_of(facts: Facts) -> Calibrated:
    """What calibrating found, back from the journal."""
    before, after = facts["nll"]
    told = {"thresholds": facts["thresholds"], "nll_before": before, "nll_after": after}
    return restored(Calibration(**facts["calibration"]), told)


def _evaluate(order: Order, calibration: Facts) -> Facts:
    made, split = calibrated_of(calibration), order.evaluate_on
    bare = from_run(order.run, device=_torch(order))
    judge = dataclasses.replace(
        bare, calibration=made.calibration, threshold=made.scores()["fpr_0.05"]
    )
    if not len(order.index.where(split=split)):
        raise Stopped(
            f"rows of split {split}",
            f"none; there are {sorted({row.split for row in order.index})}",
            "name another: --evaluate-on SPLIT",
        )
    found = evaluate(judge, order.index, split, families=_families(judge, order.index, split))
    videos = found.videos
    if not videos.auc > 0.5:  # NaN too: one class alone
        raise Stopped(
            f"video AUC above 0.5 on split {split}",
            f"{videos.auc:.4f} on {videos.real} real and {videos.forged} forged videos",
            "train further or on more data; or name another split: --evaluate-on",
        )
    figures = {
        f"{split}_auc": [videos.auc, videos.auc_low, videos.auc_high],
        f"{split}_auc_frames": [found.frames.auc, found.frames.auc_low, found.frames.auc_high],
        f"{split}_eer": videos.eer,
        f"{split}_ece": videos.ece,
        f"{split}_videos": videos.real + videos.forged,
    }
    return {name: _finite(value) for name, value in figures.items()}


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, list):
        return value if all(map(math.isfinite, value)) else value[:1]
    return value if math.isfinite(value) else None


def _publish(order: Order, done: Mapping[str, Facts]) -> Facts:
    from ralf.train.publish_cli import golden_faces

    told = Told(
        calibrated=calibrated_of(done["calibrate"]),
        metrics=done["evaluate"],
        data=portions(order.index),
        targets=declared(order),
        reference=Reference(
            edges=EDGES,
            counts=tuple(done["calibrate"]["reference"]),
            of=f"real videos of split {order.calibrate_on}",
        ),
    )
    if order.golden_from:
        crops, source = golden_faces(order.run, order.index, list(order.golden_from))
        told = dataclasses.replace(told, golden=crops, golden_source=source)
    artifact = publish(order.run, order.name, order.models, told)
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


def _build(order: Order, artifact: Artifact) -> Facts:
    built = [_built(order, artifact, target) for target in order.targets if target != "cpu"]
    return {"path": str(artifact.path), "plans": built}


def _built(order: Order, artifact: Artifact, builder: "Builder") -> str:
    from ralf.kernels.build import Order as BuildOrder
    from ralf.kernels.build import build

    try:
        on = pick_device(order.device if builder == "torch-tensorrt" else "cpu")
        found = build(BuildOrder(artifact, device=on, say=order.say), builder)
    except (ArtifactError, EngineError, ImportError) as error:
        raise Stopped(
            f"a plan of {artifact.label} by {builder}, within its error budget",
            str(error),
            "the same command where that builder works, or without it: --targets cpu",
        ) from error
    return str(found.key)


def _verify(order: Order, artifact: Artifact) -> Facts:
    gate = registry.check_golden_logits(artifact)
    verified: Sequence[str] = ()
    try:
        device = pick_device(order.device)
        if device.type == "cuda":
            from ralf.kernels.verify import verify

            verified = [str(plan.key) for plan in verify(artifact, device, order.say)]
    except (ArtifactError, EngineError) as error:
        gate = dataclasses.replace(gate, passed=False, came=str(error))
    if not gate.passed:
        raise Stopped(gate.asked, gate.came, f"ralf models verify {artifact.label}, then again")
    return {"golden": gate.came, "verified": list(verified)}


def _promote(order: Order, artifact: Artifact) -> Facts:
    try:
        _, checks = registry.promote(
            order.models, artifact.name, artifact.version, force=order.force
        )
    except registry.NotPromoted as error:
        shut = [gate for gate in error.checks if not gate.passed]
        raise Stopped(
            "; ".join(gate.asked for gate in shut),
            "; ".join(gate.came for gate in shut),
            "; ".join(dict.fromkeys(gate.advice for gate in shut if gate.advice))
            + f"; or all the same: ralf models promote {artifact.label} --models {order.models} "
            "--force",
        ) from error
    for gate in checks:
        order.say(f"promote: {gate}")
    return {"version": artifact.version, "forced": not all(gate.passed for gate in checks)}


def _torch(order: Order) -> str:
    return str(pick_device(order.device))
