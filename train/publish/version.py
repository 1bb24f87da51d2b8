"""A run becomes a model: judged weights in FP16, golden crops, calibration, figures and a card.

The weights are those that validation chose, or the last where there was no validation.  They are
loaded strictly, halved, loaded again, and run in FP32 on the golden crops: the logits in golden.npz
are computed from the very bytes that are published.  Recalibrating publishes the same weights as a
new version.  Publishing promotes nothing: ralf.kernels.registry checks and does.

It refuses a run without a checkpoint, weights that do not fit the network or FP16, and golden crops
of another size.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from ralf.kernels import registry
from ralf.kernels.artifact import Artifact, open_artifact
from ralf.kernels.artifact import publish as write_version
from ralf.kernels.engine import pick_device
from ralf.kernels.engine_torch import pack
from ralf.kernels.manifest import Aggregation, Manifest, Network, Reference
from ralf.kernels.networks import build
from ralf.kernels.untrained import patterns
from ralf.train import losses
from ralf.train.data.evaluation_set import Examples
from ralf.train.data.index import Index, IndexFault
from ralf.train.loop.checkpoint import BEST, judged, load, save, weights
from ralf.train.losses.objective import BceLoss
from ralf.train.publish.calibrate import Calibrated, CalibrationError, restored
from ralf.train.publish.card import Portion, by_compression, card

GOLDEN_CROPS = 32
PATTERNS = "made patterns, no person"
Target = Literal["cpu", "rtx-aot", "torch-tensorrt"]
"""What must be able to run the model: `cpu` needs nothing built, `rtx-aot` is a plan made without a
GPU, `torch-tensorrt` one made and proven on the GPU at hand."""
TARGETS: tuple[Target, ...] = ("cpu", "rtx-aot", "torch-tensorrt")


@dataclass(frozen=True)
class PublishDetails:
    """What the publisher knows and the checkpoint does not."""

    calibrated: Calibrated | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """Figures by name; a value with its interval is three numbers."""
    data: Sequence[Portion] = ()
    failures: Sequence[str] = ()
    aggregation: Aggregation = field(default_factory=Aggregation)
    golden: NDArray[np.uint8] | None = None
    """u8 [n, 3, s, s], from data that may ship; None: patterns that show nobody."""
    golden_source: str = PATTERNS
    targets: tuple[str, ...] = ("cpu",)
    """Where the model is to run; promotion asks for an engine for each."""
    reference: Reference | None = None
    """How scores are spread, to notice drift."""


def publish_run(
    run: Path, name: str, models: Path, details: PublishDetails | None = None
) -> Artifact:
    """A run's judged weights as a new version of the named model."""
    details = details or PublishDetails()
    checkpoint = load(judged(run))
    recipe = checkpoint.recipe
    if not losses.find(recipe.loss.kind).makes_detector:
        raise ValueError(
            f"{run} was trained with loss.kind={recipe.loss.kind}, which makes no detector: train "
            "a recipe that begins from it (init.network), and publish that run"
        )
    size = recipe.data.input.size
    crops = patterns(GOLDEN_CROPS, size) if details.golden is None else details.golden
    if crops.shape[1:] != (3, size, size):
        raise ValueError(f"golden crops should be [n, 3, {size}, {size}], got {crops.shape}")
    network = build(recipe.network.build, **recipe.network.dimensions)
    network.load_state_dict(weights(checkpoint))
    # What is hashed into the version must not depend on when or where it is published.
    draft = Manifest(
        name=name,
        network=recipe.network,
        input=recipe.data.input,
        files={},
        aggregation=details.aggregation,
        metrics={**checkpoint.metrics, **details.metrics},
        targets=details.targets,
        reference=details.reference,
        trained={
            "recipe": recipe.name,
            "steps": checkpoint.state.step,
            "faces": checkpoint.state.faces,
            "chosen_by": recipe.schedule.select,
            "held_out": recipe.data.unseen,
            "families": list(recipe.data.trained_families),
            # Said only where there are some, so that other versions keep their hashes.
            **({"also_held_out": [*also]} if (also := recipe.data.also_held_out) else {}),
            "data_sha256": checkpoint.data_sha256,
            "commit": checkpoint.commit,
        },
    )
    draft, files = pack(network, with_calibration(draft, details.calibrated), crops)
    text = card(
        draft,
        recipe,
        details.data,
        golden_source=details.golden_source,
        failures=details.failures,
        forced=forced_promotion(models, name),
    )
    return write_version(models, draft, {**files, "card.md": text.encode()})


def without_residual(run: Path, folder: Path, why: str) -> Path:
    """The plain classifier inside a RALF of two streams, as a run of its own that can be published.

    `why` goes into the notes of its recipe and so onto its card.
    """
    found = load(judged(run))
    recipe, state = found.recipe, weights(found)
    dimensions = recipe.network.dimensions
    sees = dimensions.get("sees", "residual")
    if recipe.network.build != "ralf" or sees == "residual":
        raise ValueError(
            f"{run} trained {recipe.network.build} with sees={sees}: only a RALF that sees the "
            "crop, by sees=bands or both, holds a plain classifier"
        )
    plain = {name: x for name, x in state.items() if name.startswith("classifier.")}
    if sees == "both":
        # There the classifier's own stem reads the residual.
        plain |= {
            f"classifier.stem.{name.removeprefix('plain.')}": x
            for name, x in state.items()
            if name.startswith("plain.")
        }
    own = {key: dimensions[key] for key in ("backbone", "size", "pool") if key in dimensions}
    closed = recipe.replaced(
        name=f"{recipe.name}_closed",
        network=Network.model_validate({"build": "classifier", **own}),
        loss=BceLoss(),
        optimiser=recipe.optimiser.replaced(rates=(), no_decay=("mask",)),
        notes=(why,),
    )
    tensors = {f"network.backbone.{n.removeprefix('classifier.')}": x for n, x in plain.items()}
    folder.mkdir(parents=True, exist_ok=True)
    # The network's figures are not the classifier's.
    save(folder / BEST, replace(found, recipe=closed, tensors=tensors, metrics={}))
    return folder


def recalibrate(
    artifact: Artifact, models: Path, calibrated: Calibrated, reference: Reference | None = None
) -> Artifact:
    """The same weights with another calibration: a new version, its card amended.

    `reference` is how scores are spread under the new calibration.  Without it the version has
    none, and a worker takes the first scores that it computes: the old one's scores were on another
    scale, and every upload would look like drift.
    """
    draft = with_calibration(artifact.manifest, calibrated)
    draft = draft.model_copy(update={"reference": reference})
    fitted = draft.calibration
    text = artifact.read("card.md").decode().rstrip("\n")
    forced = forced_promotion(models, artifact.name)
    lines = [
        f"## Recalibrated from {artifact.version}",
        "",
        f"Fitted on {fitted.fitted_on}; this replaces what is said above.",
        f"- temperature {fitted.temperature:.4g}, shift {fitted.shift:.4g}",
        *by_compression(fitted),
        *(f"- `{name}` {score:.4f}" for name, score in sorted(draft.thresholds.items())),
        *([f"- {forced}"] if forced else []),
    ]
    files: dict[str, bytes | Path] = {
        name: artifact.read(name) for name in artifact.manifest.files if name != "card.md"
    }
    amended = f"{text}\n\n" + "\n".join(lines) + "\n"
    return write_version(models, draft, files | {"card.md": amended.encode()})


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


def forced_promotion(models: Path, name: str) -> str:
    """A sentence for the card where the promoted version was forced past a check; else empty.

    A card is sealed before its own version is promoted, so it cannot speak of itself.  But the
    checks compare each version with the promoted one, and one that was forced sets the bar low.
    """
    happened = registry.events(models / name)
    if not happened or not happened[-1].remark.startswith("forced past"):
        return ""
    last = happened[-1]
    return f"the version to be replaced, {last.version}, was itself {last.remark}"


def calibration_of(version: Path) -> Calibrated:
    """What calibrating a published version found, with its intervals."""
    artifact = open_artifact(version)
    if "calibration" not in artifact.manifest.metrics:
        raise CalibrationError(f"{artifact.label} was never calibrated: `ralf calibrate` does it")
    return restored(artifact.manifest.calibration, artifact.manifest.metrics["calibration"])


def figures_in(path: Path) -> dict[str, Any]:
    """Figures by name: a plain object, or what `ralf evaluate --table card --out` wrote."""
    found: dict[str, Any] = json.loads(path.read_text())
    if "title" not in found:
        return found
    # A card's figures are numbers or threes of numbers; those of other tables are nested.
    models = [
        each
        for each in found["figures"].values()
        if not any(isinstance(value, dict) for value in each.values())
    ]
    if len(models) != 1:
        raise ValueError(f"{path} should hold one model's card, it holds {len(models)}")
    flat: dict[str, Any] = models[0]
    return flat


def golden_faces(run: Path, index: Index, datasets: Sequence[str]) -> tuple[NDArray[np.uint8], str]:
    """Sixteen reals and sixteen forgeries of the named collections, evenly from all there are."""
    kept = Index(index.root, tuple(row for row in index if row.dataset in datasets))
    if not len(kept):
        have = sorted({row.dataset for row in index})
        raise IndexFault(f"no rows of {', '.join(datasets)} (have: {', '.join(have)})")
    data = load(judged(run)).recipe.data
    # Not from the train split: the model was trained on those faces, and golden crops should be
    # hard.
    split = "val" if len(kept.where(split="val")) else kept.rows[0].split
    examples = Examples(kept, data, split)
    chosen = []
    for forged in (False, True):
        items = [item for item in examples.items if item.forged == forged]
        # Evenly from all of them: the first ones alone may be of one collection.
        count = min(len(items), GOLDEN_CROPS // 2)
        chosen += [items[place * len(items) // count] for place in range(count)]
    crops: NDArray[np.uint8] = torch.stack([examples.crop(item) for item in chosen]).numpy()
    return crops, f"{', '.join(datasets)}, split {split or 'unnamed'}"


def targets_of(names: str, device: str) -> tuple[Target, ...]:
    """From `all` (what this machine can build for) or a list as `cpu,rtx-aot`."""
    from ralf.kernels.build import available

    if names == "all":
        here = available()
        return tuple(t for t in TARGETS if t == "cpu" or (t in here and _has_device(t, device)))
    found = [name.strip() for name in names.split(",") if name.strip()]
    chosen = tuple(target for target in TARGETS if target in found)
    # Fewer than were named: one of the names is no target.
    if not chosen or len(chosen) != len(set(found)):
        raise ValueError(f"--targets takes all, or some of {', '.join(TARGETS)}; got {names!r}")
    return chosen


def _has_device(target: Target, device: str) -> bool:
    return target != "torch-tensorrt" or pick_device(device).type == "cuda"


def declared_targets(targets: Sequence[Target], device: str) -> tuple[str, ...]:
    """The targets as the manifest names them; promotion asks for an engine for each."""
    found: list[str] = []
    for target in targets:
        if target == "rtx-aot":
            from ralf.kernels.build_rtx import architectures

            found += architectures()
        elif target == "torch-tensorrt":
            from ralf.kernels.machine import describe

            found.append(f"{describe(pick_device(device)).architecture}-verified")
        else:
            found.append(target)
    return tuple(dict.fromkeys(found))
