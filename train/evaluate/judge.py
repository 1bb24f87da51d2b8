"""Judge a model on a split: every example's score, figures by frame and video, a CSV of videos.

    model ─▶ JudgedModel ─┐
    index ─▶ Examples ────┴─▶ Scored ─▶ Metrics ─▶ tables (ralf.train.evaluate.tables)
                                   └─▶ videos.csv

Crops are cut by the model's own InputContract and scored in FP32, so that every figure on a card
can be measured again from the artifact and the index and agrees to the third digit.  A model is an
artifact of the registry, a folder of one, or the folder of a training run.
"""

import csv
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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
from ralf.train.data.batches import Batch
from ralf.train.data.evaluation_set import Examples
from ralf.train.data.index import Index
from ralf.train.evaluate.conditions import CLEAN
from ralf.train.evaluate.metrics import Metrics, Scored, measure
from ralf.train.loop.checkpoint import judged, weights
from ralf.train.loop.checkpoint import load as load_checkpoint
from ralf.train.recipe import Data

Scorer = Callable[[Tensor], Tensor]
OnProgress = Callable[[int, int], None]
"""Called with how many batches are done, and of how many."""


@dataclass(frozen=True)
class JudgedModel:
    """A model, and what it takes to judge it as it would be served."""

    name: str
    score: Scorer
    """Crops u8 [m, 3, s, s] → logits [m]."""
    input: InputContract
    calibration: Calibration = field(default_factory=Calibration)
    aggregation: Aggregation = field(default_factory=Aggregation)
    threshold: float = 0.5
    """A calibrated score at or above it is called forged."""
    network: nn.Module | None = None
    """For figures that show what happens inside; None where the engine does not expose it."""
    trained: Mapping[str, Any] = field(default_factory=dict)
    """By which recipe, how many steps and faces."""


def open_model(spec: str, models: Path, *, device: str = "cpu") -> JudgedModel:
    """A model by its name, its folder, or the folder of a training run."""
    if any((Path(spec) / name).is_file() for name in ("best.safetensors", "last.safetensors")):
        return model_of_run(Path(spec), device=device)
    try:
        artifact = resolve(models, spec)
    except ArtifactError as error:
        raise ArtifactError(f"{error} (a folder of `ralf train` would do too)") from error
    # In FP32 on every device, so that figures do not depend on the machine.
    engine = load_engine(artifact, device, precision="fp32")
    model = model_of_manifest(artifact.label, engine, artifact.manifest)
    return replace(model, network=getattr(engine, "network", None))


def model_of_manifest(name: str, score: Scorer, manifest: Manifest) -> JudgedModel:
    """A function that scores crops, judged as its manifest says."""
    return JudgedModel(
        name=name,
        score=score,
        input=manifest.input,
        calibration=manifest.calibration,
        aggregation=manifest.aggregation,
        threshold=manifest.thresholds.get(manifest.policy, 0.5),
        trained=manifest.trained,
    )


def model_of_run(run: Path, *, device: str = "cpu") -> JudgedModel:
    """The weights of a training run that validation judged best, uncalibrated."""
    checkpoint = load_checkpoint(judged(run))
    recipe = checkpoint.recipe
    network = build(recipe.network.build, **recipe.network.dimensions)
    network.load_state_dict(weights(checkpoint))
    state = checkpoint.state
    return replace(
        model_of_network(run.name, network, recipe.data.input, device=device),
        trained={
            "recipe": recipe.name,
            "steps": state.step,
            "faces": state.faces,
            "held_out": recipe.data.unseen,
            "families": list(recipe.data.trained_families),
        },
    )


def model_of_network(
    name: str, network: nn.Module, contract: InputContract, *, device: str = "cpu"
) -> JudgedModel:
    """A bare network as a model to judge."""
    place = pick_device(device)
    # As it was trained, and as engines run it: half as fast again as channels first on a CPU.
    network = network.to(place, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]

    @torch.inference_mode()
    def score(crops: Tensor) -> Tensor:
        return torch.as_tensor(network(crops.to(place))).float().cpu()

    return JudgedModel(name=name, score=score, input=contract, network=network)


def examples_for(
    model: JudgedModel,
    index: Index,
    split: str,
    *,
    families: Sequence[str] = (),
    each: int | None = None,
    in_turn: bool = False,
    condition: str = CLEAN,
    frames: int | None = None,
    limit: int | None = None,
) -> Examples:
    """The split's faces, cut as this model wants them; every family forges every real face, or
    `each` of them do, in turn."""
    most = frames or model.input.sampling.max_frames
    # The model's own input contract, but no family held out: judging needs that family too.
    return Examples(
        index,
        Data(input=model.input, evaluation_frames=most),
        split,
        families=families,
        each=each,
        in_turn=in_turn,
        condition=condition,
        limit=limit,
        batch=16,
    )


def score_examples(
    model: JudgedModel, examples: Examples, on_progress: OnProgress | None = None
) -> Scored:
    """Every example's logit, by frame."""
    return score_together([model], examples, on_progress)[0]


def score_together(
    models: Sequence[JudgedModel], examples: Examples, on_progress: OnProgress | None = None
) -> list[Scored]:
    """Every example's logit by each model; a crop is made once and shown to all."""
    logits: list[list[Tensor]] = [[] for _ in models]
    for number, batch in enumerate(_made_ahead(examples)):
        for model, own in zip(models, logits, strict=True):
            own.append(model.score(batch.crops))
        if on_progress is not None:
            on_progress(number + 1, len(examples))
    return [with_logits(examples, torch.cat(own).numpy()) for own in logits]


def _made_ahead(examples: Examples) -> Iterator[Batch]:
    """Each batch; the next one is made while it is scored, which takes about as long."""
    with ThreadPoolExecutor(1) as maker:
        made: deque[Future[Batch]] = deque()
        for number in range(len(examples)):
            made.append(maker.submit(examples.__getitem__, number))
            if len(made) > 1:
                yield made.popleft().result()
        while made:
            yield made.popleft().result()


def with_logits(examples: Examples, logit: np.ndarray) -> Scored:
    """Logits in the order of the examples, with what is known of them.

    A face and what was blended from it fall into one cluster: they are one person's one picture.
    """
    items = examples.items
    return Scored(
        np.asarray(logit, np.float64),
        np.array([item.forged for item in items], bool),
        tuple(item.video for item in items),
        tuple((item.frame.row.dataset, item.frame.row.video) for item in items),
        # Under a condition a picture is no longer compressed as its video was.
        np.array(
            [
                (examples.condition == CLEAN and item.frame.row.bits_per_pixel) or np.nan
                for item in items
            ]
        ),
    )


@dataclass(frozen=True)
class Evaluation:
    """One model on one split under one condition."""

    model: str
    condition: str
    frames: Metrics
    videos: Metrics
    by_method: dict[str, Metrics]
    """Frames of each way of forging against all reals."""
    scored: Scored


def evaluate(
    model: JudgedModel,
    index: Index,
    split: str = "test",
    *,
    families: Sequence[str] = (),
    condition: str = CLEAN,
    frames: int | None = None,
    limit: int | None = None,
    replicates: int = 1000,
    on_progress: OnProgress | None = None,
) -> Evaluation:
    """Figures by frame, by video and by method."""
    examples = examples_for(
        model, index, split,
        families=families, condition=condition, frames=frames, limit=limit,
    )  # fmt: skip
    return evaluation_of(model, score_examples(model, examples, on_progress), condition, replicates)


def evaluation_of(
    model: JudgedModel, found: Scored, condition: str, replicates: int = 1000
) -> Evaluation:
    """The figures of scores."""

    def figures(part: Scored) -> Metrics:
        return measure(part, model.calibration, replicates=replicates, threshold=model.threshold)

    return Evaluation(
        model=model.name,
        condition=condition,
        frames=figures(found),
        videos=figures(found.pooled(model.aggregation)),
        by_method={name: figures(found.against_all_reals(name)) for name in found.methods},
        scored=found,
    )


def write_videos(path: Path, model: JudgedModel, evaluations: Iterable[Evaluation]) -> Path:
    """A CSV row for each video and condition: what it is, how many frames, its score."""
    columns = "model condition dataset method compression video forged frames logit score"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns.split())
        for each in evaluations:
            pooled = each.scored.pooled(model.aggregation)
            # Rounded, as the worker shows it: the CSV and a verdict then agree to the last digit.
            score_of = pooled.probability(model.calibration)
            frames = Counter(each.scored.video)
            for row, video in enumerate(pooled.video):
                logit, value = f"{pooled.logit[row]:.6f}", f"{score_of[row]:.6f}"
                label = int(pooled.forged[row])
                head = (each.model, each.condition, *video)
                writer.writerow([*head, label, frames[video], logit, value])
    return path
