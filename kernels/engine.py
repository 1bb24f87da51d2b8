"""What all engines share: u8 crops in, logits of being forged out.

`check_golden` compares an engine with the FP32 reference on the model's own golden crops; a
difference above the manifest's error budget is an error, not a warning.  A device that is not there
is an error too: there is no silent fallback to the CPU.  ralf.kernels.choose_engine loads an
engine.
"""

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ralf.kernels.artifact import Artifact, golden
from ralf.kernels.manifest import PRECISIONS, Precision


class EngineError(Exception):
    """An engine cannot be built or loaded, or disagrees with its model's reference."""


class Engine(Protocol):
    """What the pipeline needs from an engine."""

    @property
    def name(self) -> str:
        """The implementation: torch, trt, …"""

    @property
    def precision(self) -> Precision:
        """The precision of most of the arithmetic."""

    @property
    def device(self) -> str:
        """Where it runs: cpu, cuda:0, …"""

    @property
    def artifact(self) -> Artifact:
        """The model it runs."""

    def __call__(self, crops: Tensor) -> Tensor:
        """Crops u8 [m, 3, s, s] RGB, m ≥ 0 → FP32 logits [m] on the CPU."""


def pick_device(device: str) -> torch.device:
    """The torch device that a setting names; EngineError if it does not exist here."""
    kind, colon, index = device.partition(":")
    if kind not in {"auto", "cpu", "cuda"} or (
        # isdecimal, because int() would also take "+1", "1_0" and spaces.
        colon and not (kind == "cuda" and index.isdecimal())
    ):
        raise EngineError(f"device should be auto, cpu, cuda or cuda:N, got {device!r}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cpu" or (kind == "auto" and count == 0):
        return torch.device("cpu")
    if int(index or 0) >= count:
        raise EngineError(f"device {device!r} was asked for; torch finds {count} CUDA devices")
    return torch.device("cuda", int(index or 0))


def budget_of(artifact: Artifact, precision: Precision) -> float:
    """The most a logit may differ from the reference's in this precision."""
    budget = artifact.manifest.error_budget
    for key in (f"logit_{precision}", "logit"):
        if key in budget:
            return budget[key]
    raise EngineError(f"{artifact.label}: error_budget has no logit, only {sorted(budget)}")


def check_golden(engine: Engine, most: int | None = None) -> float:
    """The largest difference from the reference on golden crops; EngineError beyond budget."""
    artifact = engine.artifact
    budget = budget_of(artifact, engine.precision)
    expected = golden(artifact)
    crops, logits = expected.crops[:most], expected.logits[:most]
    got = engine(torch.from_numpy(crops)).numpy()
    # Infinite for NaN: a comparison of NaN with the budget is false, and would pass.
    error = float(np.abs(got - logits).max()) if np.isfinite(got).all() else float("inf")
    if error > budget:
        raise EngineError(
            f"{artifact.label} by {engine.name} in {engine.precision} on {engine.device}: "
            f"logits of {len(crops)} golden crops differ by {error:.4f}, budget {budget:.4f}; "
            "try another precision, or publish the model again"
        )
    return error


def check_crops(crops: Tensor, artifact: Artifact) -> None:
    """EngineError unless the crops have the type and shape of the model's input."""
    side = artifact.manifest.input.size
    if crops.dtype != torch.uint8 or crops.shape[1:] != (3, side, side):
        raise EngineError(
            f"{artifact.label} takes crops u8 [m,3,{side},{side}], "
            f"got {crops.dtype} {tuple(crops.shape)}"
        )


def check_precision(precision: str) -> None:
    """EngineError for an unknown precision."""
    if precision not in PRECISIONS:
        raise EngineError(f"precision should be one of {PRECISIONS}, got {precision!r}")
