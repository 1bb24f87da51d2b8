"""Plans run on the GPU at hand: marked as verified on its architecture, or withdrawn.

A plan built elsewhere, or without a GPU, may run only where a machine of that architecture has put
the model's golden crops through it (kernels.gate).  What disagrees is withdrawn, so that nobody
finds it again; what another GPU or another version needs is left as it is.
"""

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ralf.kernels import plans
from ralf.kernels.artifact import Artifact, Damaged
from ralf.kernels.engine import Engine, EngineError
from ralf.kernels.engine_torch import batches, restore
from ralf.kernels.engine_trt import TrtEngine, check_key
from ralf.kernels.gate import Agreement, Disagrees, Gate, Score
from ralf.kernels.machine import describe
from ralf.kernels.plans import Plan, Verification

TURNS = 10
DECISIONS = 512
"""Random crops to decide on: a GPU has time for them."""
Say = Callable[[str], None]


class Refused(EngineError):
    """The plan was not published, or taken away again; the message says why."""


def verify(artifact: Artifact, device: torch.device, say: Say = print) -> list[Plan]:
    """Every plan that this GPU can load, verified here; Refused if one disagrees."""
    if not plans.plans(artifact):
        return []
    here = describe(device)
    network = restore(artifact.manifest, artifact.read("weights.safetensors")).to(device)
    gate = Gate(artifact, reference(network), DECISIONS)
    checked: list[Plan] = []
    failures: list[str] = []
    with plans.building(artifact):
        for plan in plans.plans(artifact):
            try:
                runtime = here.runtimes.get(plan.key.flavour, "none")
                check_key(artifact, plan.key, here, runtime)
            except EngineError as misfit:
                say(f"left as it is: {misfit}")
                continue
            try:
                checked.append(verified(plan, gate, device, say))
            except (Disagrees, Damaged) as error:
                plans.withdraw(artifact, plan)
                failures.append(f"{error}; {plan.key} was withdrawn")
            except EngineError as error:  # it could not be asked; that is not yet its fault
                failures.append(f"{plan.key} could not run: {error}")
    if failures:
        raise Refused("; ".join(failures))
    return checked


def verified(plan: Plan, gate: Gate, device: torch.device, say: Say) -> Plan:
    """The plan with this machine's word in its record; call it inside `plans.building`."""
    artifact, record = gate.artifact, plan.record
    front = record.options.get("front", "plan")
    engine = TrtEngine.of(
        artifact, plan.key, plan.read(), record.buckets, device=device, front=front
    )
    agreement = gate.check(str(plan.key), scored(engine), engine.precision)
    architecture = describe(device).architecture
    say(f"{plan.key}: verified on {architecture}, {told(agreement)}")
    checked = {**record.verifications, architecture: verification(engine, agreement)}
    known = record.model_copy(update={"state": "verified", "verifications": checked})
    made = Plan(plan.folder, plan.key, known)
    plans.write_record(made)
    return made


def verification(engine: TrtEngine, agreement: Agreement) -> Verification:
    """What is written down of an engine that agreed, with the time a batch takes it."""
    side = engine.artifact.manifest.input.size
    timing = {}
    for bucket in engine.batching.buckets:
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
    """The FP32 module's logits, in FP32 indeed: no TF32 where it runs on a GPU."""
    device = next(network.parameters()).device

    def score(crops: NDArray[np.uint8]) -> NDArray[np.float32]:
        at_once = 4 if device.type == "cpu" else 32
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
    """An engine as the gate asks it."""
    return lambda crops: engine(torch.from_numpy(crops)).numpy()


def told(agreement: Agreement) -> str:
    """One line."""
    contested = f", {agreement.contested} of them contested" if agreement.contested else ""
    return (
        f"golden logits within {agreement.error:.4f} of the reference "
        f"(budget {agreement.budget:.4f}), {agreement.decisions} decisions alike{contested}"
    )
