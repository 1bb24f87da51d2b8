"""Judge a model on a split: every example's score, figures by frame and video, a CSV of videos.

    model ─▶ Judge ─┐
    index ─▶ Examples ─┴─▶ Scored ─▶ Metrics ─▶ tables (ralf.train.evaluate.tables)
                                └─▶ videos.csv

Crops are cut by the model's own InputContract and scored in FP32, so every figure on a card comes
out again, to the third digit, from the artifact and the index.  A model is an artifact of the
registry, a folder of one, or the folder of a training run.
"""

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ralf.kernels.artifact import ArtifactError, resolve
from ralf.kernels.choose_engine import load as load_engine
from ralf.kernels.engine import pick_device
from ralf.kernels.manifest import Aggregation, Calibration, InputContract, Manifest
from ralf.kernels.networks import build
from ralf.train.data.evaluation_set import Examples
from ralf.train.data.index import Index
from ralf.train.evaluate.conditions import CLEAN
from ralf.train.evaluate.metrics import Metrics, Scored, measure
from ralf.train.loop.checkpoint import judged, weights
from ralf.train.loop.checkpoint import load as load_checkpoint
from ralf.train.recipe import Data
from ralf.worker.scores import calibrated

Score = Callable[[Tensor], Tensor]
Watch = Callable[[int, int], None]


@dataclass(frozen=True)
class Judge:
    """A model and what it wants to be judged by."""

    name: str
    score: Score
    """Crops u8 [m, 3, s, s] → logits [m]."""
    input: InputContract
    calibration: Calibration = field(default_factory=Calibration)
    aggregation: Aggregation = field(default_factory=Aggregation)
    threshold: float = 0.5
    """Of the calibrated score: at or above it, forged."""
    network: nn.Module | None = None
    """For figures that look inside."""
    trained: Mapping[str, Any] = field(default_factory=dict)
    """By which recipe, how many steps and faces."""


def judge_of(spec: str, models: Path, *, device: str = "cpu") -> Judge:
    """A Judge from a model's name, its folder, or a run's folder."""
    if any((Path(spec) / name).is_file() for name in ("best.safetensors", "last.safetensors")):
        return from_run(Path(spec), device=device)
    try:
        artifact = resolve(models, spec)
    except ArtifactError as error:
        raise ArtifactError(f"{error} (a folder of `ralf train` would do too)") from error
    engine = load_engine(artifact, device, precision="fp32")
    judge = of_manifest(artifact.label, engine, artifact.manifest)
    return replace(judge, network=getattr(engine, "network", None))


def of_manifest(name: str, score: Score, manifest: Manifest) -> Judge:
    """What scores crops, judged as its manifest says."""
    return Judge(
        name=name,
        score=score,
        input=manifest.input,
        calibration=manifest.calibration,
        aggregation=manifest.aggregation,
        threshold=manifest.thresholds.get(manifest.policy, 0.5),
        trained=manifest.trained,
    )


def from_run(run: Path, *, device: str = "cpu") -> Judge:
    """The judged weights of a training run, uncalibrated."""
    checkpoint = load_checkpoint(judged(run))
    recipe = checkpoint.recipe
    network = build(recipe.network.build, **recipe.network.dimensions)
    network.load_state_dict(weights(checkpoint))
    state = checkpoint.state
    return replace(
        of_network(run.name, network, recipe.data.input, device=device),
        trained={
            "recipe": recipe.name,
            "steps": state.step,
            "faces": state.faces,
            "held_out": recipe.data.unseen,
        },
    )


def of_network(
    name: str, network: nn.Module, contract: InputContract, *, device: str = "cpu"
) -> Judge:
    """A bare network as a Judge."""
    place = pick_device(device)
    network = network.to(place).eval()

    @torch.inference_mode()
    def score(crops: Tensor) -> Tensor:
        return torch.as_tensor(network(crops.to(place))).float().cpu()

    return Judge(name=name, score=score, input=contract, network=network)


def examples_for(
    judge: Judge,
    index: Index,
    split: str,
    *,
    families: Sequence[str] = (),
    condition: str = CLEAN,
    frames: int | None = None,
    limit: int | None = None,
) -> Examples:
    """The split as this model wants it cut: all families for every real face."""
    most = frames or judge.input.sampling.max_frames
    return Examples(
        index,
        Data(input=judge.input, evaluation_frames=most),
        split,
        families=families,
        each="all",
        condition=condition,
        limit=limit,
        batch=16,
    )


def score(judge: Judge, examples: Examples, watch: Watch | None = None) -> Scored:
    """Every example's logit, by frame."""
    logits: list[Tensor] = []
    for number, batch in enumerate(examples):
        logits.append(judge.score(batch.crops))
        if watch is not None:
            watch(number + 1, len(examples))
    return scored(examples, torch.cat(logits).numpy())


def scored(examples: Examples, logit: np.ndarray) -> Scored:
    """Logits in the order of the examples, with what is known of them.

    A face and what was blended from it fall into one cluster: they are one person's one picture.
    """
    items = examples.items
    return Scored(
        np.asarray(logit, np.float64),
        np.array([item.forged for item in items], bool),
        tuple(item.video for item in items),
        tuple((item.frame.row.dataset, item.frame.row.video) for item in items),
    )


@dataclass(frozen=True)
class Result:
    """One model on one split under one condition."""

    model: str
    condition: str
    frames: Metrics
    videos: Metrics
    by_method: dict[str, Metrics]
    """Frames of each way of forging against all reals."""
    scored: Scored


def evaluate(
    judge: Judge,
    index: Index,
    split: str = "test",
    *,
    families: Sequence[str] = (),
    condition: str = CLEAN,
    frames: int | None = None,
    limit: int | None = None,
    replicates: int = 1000,
    watch: Watch | None = None,
) -> Result:
    """Figures by frame, by video and by method."""
    examples = examples_for(
        judge, index, split,
        families=families, condition=condition, frames=frames, limit=limit,
    )  # fmt: skip
    return result(judge, score(judge, examples, watch), condition, replicates)


def result(judge: Judge, found: Scored, condition: str, replicates: int = 1000) -> Result:
    """The figures of scores."""

    def figures(part: Scored) -> Metrics:
        return measure(part, judge.calibration, replicates=replicates, threshold=judge.threshold)

    return Result(
        model=judge.name,
        condition=condition,
        frames=figures(found),
        videos=figures(found.pooled(judge.aggregation)),
        by_method={name: figures(found.against_all_reals(name)) for name in found.methods},
        scored=found,
    )


def write_videos(path: Path, judge: Judge, results: Iterable[Result]) -> Path:
    """A row for each video and condition: what it is, how many frames, its score."""
    columns = "model condition dataset method compression video forged frames logit score"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns.split())
        for each in results:
            pooled = each.scored.pooled(judge.aggregation)
            score_of = calibrated(pooled.logit, judge.calibration)
            frames: dict[tuple[str, str, str, str], int] = {}
            for video in each.scored.video:
                frames[video] = frames.get(video, 0) + 1
            for row, video in enumerate(pooled.video):
                logit, value = f"{pooled.logit[row]:.6f}", f"{score_of[row]:.6f}"
                label = int(pooled.forged[row])
                head = (each.model, each.condition, *video)
                writer.writerow([*head, label, frames[video], logit, value])
    return path
