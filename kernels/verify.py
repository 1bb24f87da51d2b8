"""A built engine against the reference: what a plan must show before it is published or used.

The reference is the model's FP32 module.  On the model's golden crops an engine's logits may differ
by the manifest's budget for the precision.  On a larger random set, made of the golden crops by
blending, mirroring, brightness and noise, it must make the same decision at every threshold of the
manifest; only where the reference itself is within the budget of a threshold may it decide
differently, because no engine can promise more than the budget.

`verify` runs the plans of a model on the GPU at hand: a plan built elsewhere may run only where a
machine of that architecture has checked it.  A plan that agrees is marked as verified on this
architecture.  One that disagrees is withdrawn, so that it is never loaded; a plan for another GPU
or another TensorRT version is left as it is.
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ralf.kernels import plan_signature, plans
from ralf.kernels.artifact import Artifact, Damaged, golden
from ralf.kernels.engine import Engine, EngineError, budget_of
from ralf.kernels.engine_torch import batches, restore
from ralf.kernels.engine_trt import TrtEngine, check_key
from ralf.kernels.machine import describe
from ralf.kernels.manifest import Manifest, Precision
from ralf.kernels.plans import Plan, Verification

Score = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
# Fixed, so that every engine of a model decides on the same crops.
SEED = 20261120


class Disagrees(EngineError):
    """A built engine's logits are not the reference's; the message says by how much."""


@dataclass(frozen=True)
class Agreement:
    """What was measured."""

    error: float
    """The largest difference of a golden logit."""
    budget: float
    decisions: int
    """Random crops on which the decisions of engine and reference were compared."""
    contested: int
    """Of those, decided differently while the reference was within the budget of a threshold."""
    spread: float
    """The largest difference of a logit on the random crops."""


@dataclass(frozen=True, eq=False)
class AgreementCheck:
    """One model's crops and the reference's logits for them, computed once for all engines."""

    artifact: Artifact
    reference: Score
    """The FP32 module's logits for any crops."""
    count: int = 64
    """Random crops, in addition to the golden ones."""
    most_golden: int | None = None
    """Golden crops at most; None: all."""

    @cached_property
    def crops(self) -> NDArray[np.uint8]:
        """The random crops."""
        return variations(golden(self.artifact).crops, self.count)

    @cached_property
    def expected(self) -> NDArray[np.float32]:
        """The reference's logits for them."""
        return self.reference(self.crops)

    def run(self, what: str, score: Score, precision: Precision) -> Agreement:
        """How far the engine is from the reference; Disagrees if that is too far."""
        budget = budget_of(self.artifact, precision)
        known = golden(self.artifact)
        crops, logits = known.crops[: self.most_golden], known.logits[: self.most_golden]
        error = largest(score(crops) - logits)
        if not error <= budget:
            raise Disagrees(
                f"{what} of {self.artifact.label} in {precision}: logits of {len(logits)} "
                f"golden crops differ by {error:.4f}, budget {budget:.4f}"
            )
        got = score(self.crops)
        spread = largest(got - self.expected)
        flipped, contested = decided_otherwise(
            self.expected, got, thresholds(self.artifact.manifest), budget
        )
        # NaN is below every threshold, so it could pass for agreement on an authentic face.
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
    """Crops decided differently at a limit: beyond the margin around it, and within it."""
    flipped = np.zeros(len(expected), bool)
    contested = np.zeros(len(expected), bool)
    for limit in limits:
        other = (expected >= limit) != (got >= limit)
        near = np.abs(expected - limit) <= margin
        flipped |= other & ~near
        contested |= other & near
    # A crop that is wrong at one threshold and contested at another counts once, as wrong.
    return int(flipped.sum()), int((contested & ~flipped).sum())


def thresholds(manifest: Manifest) -> list[float]:
    """The manifest's thresholds as logits; without any, the logit of an even chance."""
    fitted = manifest.calibration
    curves = (fitted.at(None), *(fitted.at(each.bits_per_pixel) for each in fitted.by_compression))
    # A score of 0 or 1 has no finite logit: every engine decides alike there.
    scores = [score for score in manifest.thresholds.values() if 0 < score < 1] or [0.5]
    logits = {math.log(score / (1 - score)) for score in scores}
    return sorted({curve.shift + curve.temperature * logit for curve in curves for logit in logits})


def variations(crops: NDArray[np.uint8], count: int, seed: int = SEED) -> NDArray[np.uint8]:
    """Crops [count, 3, s, s] made of these by blending two, mirroring, brightness and noise."""
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


# plans on this machine

TURNS = 10
DECISIONS = 64
"""Random crops for the decisions: the reference takes a second a face on a CPU core."""
Say = Callable[[str], None]


class PlanRefused(EngineError):
    """A plan was not published, or was withdrawn; the message says why."""


def verify(artifact: Artifact, device: torch.device, say: Say = print) -> list[Plan]:
    """Verify every plan that this GPU can load; PlanRefused if one disagrees."""
    if not plans.plans(artifact):
        return []
    plan_signature.require_signer()
    here = describe(device)
    network = restore(artifact.manifest, artifact.read("weights.safetensors")).to(device)
    check = AgreementCheck(artifact, reference(network), DECISIONS)
    checked: list[Plan] = []
    failures: list[str] = []
    # For the whole run: no builder may replace a plan between its check and its record.
    with plans.building(artifact):
        for plan in plans.plans(artifact):
            try:
                runtime = here.runtimes.get(plan.key.flavour, "none")
                check_key(artifact, plan.key, here, runtime)
            except EngineError as misfit:
                say(f"left as it is: {misfit}")
                continue
            try:
                # To verify a plan is to run it, and to sign what it did.
                plan.check_trusted()
                checked.append(verified(plan, check, device, say))
            # Disagrees is an EngineError too, so this comes first.
            except plan_signature.Untrusted as error:
                failures.append(str(error))
            except (Disagrees, Damaged) as error:
                plans.withdraw(artifact, plan)
                failures.append(f"{error}; {plan.key} was withdrawn")
            except EngineError as error:  # it could not run here, which does not prove it wrong
                failures.append(f"{plan.key} could not run: {error}")
    if failures:
        raise PlanRefused("; ".join(failures))
    return checked


def verified(plan: Plan, check: AgreementCheck, device: torch.device, say: Say) -> Plan:
    """Run a plan here and add the result to its record; the caller is inside `plans.building`."""
    artifact, record = check.artifact, plan.record
    front = record.options.get("front", "plan")
    engine = TrtEngine.of(
        artifact, plan.key, plan.read(), record.buckets, device=device, front=front
    )
    agreement = check.run(str(plan.key), scored(engine), engine.precision)
    architecture = describe(device).architecture
    say(f"{plan.key}: verified on {architecture}, {describe_agreement(agreement)}")
    checked = {**record.verifications, architecture: verification(engine, agreement)}
    known = record.model_copy(update={"state": "verified", "verifications": checked})
    return plans.write_record(Plan(plan.folder, plan.key, known))


def verification(engine: TrtEngine, agreement: Agreement) -> Verification:
    """The record of an engine that agreed, with its time for a batch of each size."""
    side = engine.artifact.manifest.input.size
    timing = {}
    for bucket in engine.batching.buckets:
        # On the CPU, as in `ralf bench engine`: the time includes both copies.
        crops = torch.zeros((bucket, 3, side, side), dtype=torch.uint8)
        spent = []
        for _ in range(TURNS):
            start = time.perf_counter()
            engine(crops)
            spent.append(time.perf_counter() - start)
        timing[str(bucket)] = round(1000 * statistics.median(spent), 3)
    return Verification(
        device=describe(torch.device(engine.device)).label,
        error=agreement.error,
        budget=agreement.budget,
        decisions=agreement.decisions,
        timing_ms=timing,
        at=plans.now(),
    )


def reference(network: nn.Module) -> Score:
    """The FP32 module's logits, without TF32 where it runs on a GPU."""
    device = next(network.parameters()).device

    def score(crops: NDArray[np.uint8]) -> NDArray[np.float32]:
        at_once = 4 if device.type == "cpu" else 32
        # cuDNN's switch has a context manager; that of the products has none and is process-wide.
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = False
        try:
            with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                pieces = batches(torch.from_numpy(crops), at_once)
                parts = [network(piece.to(device)).float().cpu() for piece in pieces]
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before
        logits: NDArray[np.float32] = torch.cat(parts).numpy()
        return logits

    return score


def scored(engine: Engine) -> Score:
    """An engine as a function from numpy crops to numpy logits."""
    return lambda crops: engine(torch.from_numpy(crops)).numpy()


def describe_agreement(agreement: Agreement) -> str:
    """The agreement in one line."""
    contested = f", {agreement.contested} of them contested" if agreement.contested else ""
    return (
        f"golden logits within {agreement.error:.4f} of the reference "
        f"(budget {agreement.budget:.4f}), {agreement.decisions} decisions alike{contested}"
    )
