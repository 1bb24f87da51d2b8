"""A run becomes a model: judged weights in FP16, golden crops, calibration, figures, a card.

The weights are those that validation chose (best.safetensors), or the last where there was no
validation.  They are loaded strictly, halved, loaded again, and run in FP32 on the golden crops:
what golden.npz holds is said by the very bytes that are published.  Recalibrating publishes the
same weights under a new version.  Publishing promotes nothing.

It refuses a run without a checkpoint, weights that do not fit or do not fit into FP16, and golden
crops of another size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ralf.kernels.artifact import Artifact
from ralf.kernels.artifact import publish as write_artifact
from ralf.kernels.engine_torch import pack
from ralf.kernels.manifest import Aggregation, Manifest, Reference
from ralf.kernels.networks import build
from ralf.train.calibrate import Calibrated
from ralf.train.card import Portion, card
from ralf.train.loop.checkpoint import judged, load, weights

GOLDEN = 32
"""Crops in golden.npz."""


@dataclass(frozen=True)
class Told:
    """What the publisher knows and the checkpoint does not."""

    calibrated: Calibrated | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """Figures by name; a value with its interval is three numbers."""
    data: Sequence[Portion] = ()
    failures: Sequence[str] = ()
    aggregation: Aggregation = field(default_factory=Aggregation)
    golden: NDArray[np.uint8] | None = None
    """u8 [n, 3, s, s], from data that may ship; None: made pictures."""
    golden_source: str = "made pictures, no person"
    targets: tuple[str, ...] = ("cpu",)
    """Where it is to run; promotion asks for each one's engine."""
    reference: Reference | None = None
    """How scores are spread, for drift."""


def publish(run: Path, name: str, models: Path, told: Told | None = None) -> Artifact:
    """A run's best weights as a new version of the named model."""
    told = told or Told()
    checkpoint = load(judged(run))
    recipe = checkpoint.recipe
    size = recipe.data.input.size
    crops = told.golden if told.golden is not None else made_crops(size)
    if crops.shape[1:] != (3, size, size):
        raise ValueError(f"golden crops should be [n, 3, {size}, {size}], got {crops.shape}")
    network = build(recipe.network.build, **recipe.network.dimensions)
    network.load_state_dict(weights(checkpoint))
    draft = Manifest(
        name=name,
        network=recipe.network,
        input=recipe.data.input,
        files={},
        aggregation=told.aggregation,
        metrics={**checkpoint.metrics, **told.metrics},
        targets=told.targets,
        reference=told.reference,
        trained={
            "recipe": recipe.name,
            "steps": checkpoint.state.step,
            "faces": checkpoint.state.faces,
            "chosen_by": recipe.schedule.select,
            "held_out": recipe.data.unseen,
            "data_sha256": checkpoint.data_sha256,
            "commit": checkpoint.commit,
        },
    )
    draft, files = pack(network, with_calibration(draft, told.calibrated), crops)
    text = card(draft, recipe, told.data, golden_source=told.golden_source, failures=told.failures)
    return write_artifact(models, draft, {**files, "card.md": text.encode()})


def recalibrate(artifact: Artifact, models: Path, calibrated: Calibrated) -> Artifact:
    """The same weights with another calibration: a new version, its card amended."""
    draft = with_calibration(artifact.manifest, calibrated)
    fitted = draft.calibration
    text = artifact.read("card.md").decode().rstrip("\n")
    lines = [
        f"## Recalibrated from {artifact.version}",
        "",
        f"Fitted on {fitted.fitted_on}; it replaces what is said above.",
        f"- temperature {fitted.temperature:.4g}, shift {fitted.shift:.4g}",
        *(f"- `{name}` {score:.4f}" for name, score in sorted(draft.thresholds.items())),
    ]
    files: dict[str, bytes | Path] = {
        name: artifact.read(name) for name in artifact.manifest.files if name != "card.md"
    }
    amended = f"{text}\n\n" + "\n".join(lines) + "\n"
    return write_artifact(models, draft, files | {"card.md": amended.encode()})


def with_calibration(draft: Manifest, calibrated: Calibrated | None) -> Manifest:
    """The manifest with what calibrating found."""
    if calibrated is None:
        return draft
    return draft.model_copy(
        update={
            "calibration": calibrated.calibration,
            "thresholds": calibrated.scores(),
            "metrics": {**draft.metrics, "calibration": calibrated.facts()},
        }
    )


def made_crops(size: int, count: int = GOLDEN) -> NDArray[np.uint8]:
    """Pictures of no one, the same each time: soft blobs, every second one with a fine pattern.

    Enough to prove an engine; crops of faces from data that may ship prove it where it matters.
    """
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:size, 0:size] / size
    crops = np.empty((count, 3, size, size), np.uint8)
    for number in range(count):
        wave = rng.uniform(0.5, 4, (3, 2)) * 2 * np.pi
        phase = rng.uniform(0, 2 * np.pi, 3)
        soft = 128 + 70 * np.sin(
            wave[:, 0, None, None] * x + wave[:, 1, None, None] * y + phase[:, None, None]
        )
        fine = rng.normal(0, 12, (3, size, size)) if number % 2 else 0.0
        crops[number] = np.clip(soft + fine, 0, 255).round()
    return crops
