"""What a built engine must show before it is published: the logits and decisions of the reference.

The reference is the model's FP32 module.  On its golden crops a built engine's logits may differ
by the manifest's budget for the precision.  On a larger random set, made of the golden crops by
blending, mirroring, light and noise, it must decide alike at every threshold that the manifest
holds; only where the reference itself lies within the budget of a threshold may it fall on the
other side, since no engine can promise more than the budget.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ralf.kernels.artifact import Artifact, golden
from ralf.kernels.engine import EngineError, budget_of
from ralf.kernels.manifest import Manifest, Precision

Score = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
SEED = 20261120


class Disagrees(EngineError):
    """A built engine says something else than the reference; the message says by how much."""


@dataclass(frozen=True)
class Agreement:
    """What was measured."""

    error: float
    """The largest difference of a golden logit."""
    budget: float
    decisions: int
    """Random crops on which engine and reference were asked to decide."""
    contested: int
    """Of those, decided otherwise where the reference lies within the budget of a threshold."""
    spread: float
    """The largest difference of a logit on the random crops."""


@dataclass(frozen=True, eq=False)
class Gate:
    """One model's questions; the reference answers once, however many engines are asked."""

    artifact: Artifact
    reference: Score
    """The FP32 module's logits."""
    count: int = 64
    """Random crops, beside the golden ones."""

    @cached_property
    def crops(self) -> NDArray[np.uint8]:
        """The random set."""
        return variations(golden(self.artifact).crops, self.count)

    @cached_property
    def expected(self) -> NDArray[np.float32]:
        """The reference's logits for it."""
        return self.reference(self.crops)

    def check(self, what: str, score: Score, precision: Precision) -> Agreement:
        """How far the engine is from the reference; Disagrees where that is too far."""
        budget = budget_of(self.artifact, precision)
        known = golden(self.artifact)
        error = largest(score(known.crops) - known.logits)
        if not error <= budget:
            raise Disagrees(
                f"{what} of {self.artifact.label} in {precision}: logits of {len(known.logits)} "
                f"golden crops differ by {error:.4f}, budget {budget:.4f}"
            )
        got = score(self.crops)
        spread = largest(got - self.expected)
        flipped, contested = decided_otherwise(
            self.expected, got, thresholds(self.artifact.manifest), budget
        )
        if flipped or not math.isfinite(spread):
            raise Disagrees(
                f"{what} of {self.artifact.label} in {precision} decides {flipped} of "
                f"{len(got)} random crops otherwise than the FP32 module "
                f"(logits differ by up to {spread:.4f}, budget {budget:.4f})"
            )
        return Agreement(error, budget, len(got), contested, spread)


def largest(differences: NDArray[np.float32]) -> float:
    """The largest absolute difference; infinite where one is not a number."""
    return float(np.abs(differences).max()) if np.isfinite(differences).all() else float("inf")


def decided_otherwise(
    expected: NDArray[np.float32], got: NDArray[np.float32], limits: list[float], margin: float
) -> tuple[int, int]:
    """Crops that fall on another side of a limit: firmly, and within the margin of it."""
    flipped = np.zeros(len(expected), bool)
    contested = np.zeros(len(expected), bool)
    for limit in limits:
        other = (expected >= limit) != (got >= limit)
        near = np.abs(expected - limit) <= margin
        flipped |= other & ~near
        contested |= other & near
    return int(flipped.sum()), int((contested & ~flipped).sum())


def thresholds(manifest: Manifest) -> list[float]:
    """The manifest's thresholds as logits; that of an even chance where it holds none."""
    fitted = manifest.calibration
    scores = [score for score in manifest.thresholds.values() if 0 < score < 1] or [0.5]
    logits = {math.log(score / (1 - score)) for score in scores}
    return sorted(fitted.shift + fitted.temperature * logit for logit in logits)


def variations(crops: NDArray[np.uint8], count: int, seed: int = SEED) -> NDArray[np.uint8]:
    """Crops [count, 3, s, s] made of these: two of them blended, mirrored, lit, with noise."""
    random = np.random.default_rng(seed)
    made = np.empty((count, *crops.shape[1:]), np.uint8)
    for place in range(count):
        one, two = crops[random.integers(len(crops), size=2)].astype(np.float32)
        share = random.choice([1.0, random.uniform(0.5, 1)])
        mixed = share * one + (1 - share) * two
        if random.random() < 0.5:
            mixed = mixed[..., ::-1]
        mixed = (mixed - 128) * random.uniform(0.7, 1.3) + 128 + random.uniform(-25, 25)
        mixed = mixed + random.normal(0, random.choice([0, 2, 8]), mixed.shape)
        made[place] = np.clip(np.rint(mixed), 0, 255)
    return made
