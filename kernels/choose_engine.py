"""Which engine runs a model on a device: loaded by name, or the one that measured fastest there.

`measure` times every engine that the device can run, side by side with interleaved turns.  On a CPU
those are torch in FP32 and, if the model allows it, bf16; on a GPU torch in FP16, compiled and
eager, and each plan that was verified there.  The result is the device's line in the model's
engines/fastest.json.  `load` takes the engine of that line; without a line it takes torch.

The line holds for the TensorRT versions that were installed when it was measured: with another
version the machine counts as another device, for which nothing was measured.  A plan that is not
signed where keys are set (ralf.kernels.plan_signature) is not loaded, and torch runs in its place.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import structlog
import torch

from ralf.kernels import plans
from ralf.kernels.artifact import Artifact, ArtifactError
from ralf.kernels.batching import default_batch
from ralf.kernels.bench.record import interleave
from ralf.kernels.engine import Engine, EngineError, check_golden, check_precision, pick_device
from ralf.kernels.engine_torch import KINDS, TorchEngine, offers
from ralf.kernels.engine_trt import load_plan
from ralf.kernels.machine import describe
from ralf.kernels.manifest import Precision
from ralf.kernels.plan_signature import Untrusted
from ralf.kernels.plans import Measured

log = structlog.get_logger()

REPEATS = 7
Say = Callable[[str], None]


def load(
    artifact: Artifact,
    device: str = "auto",
    *,
    precision: Precision | None = None,
    max_batch: int | None = None,
    golden_crops: int | None = None,
    plan_public_key: str | None = None,
) -> Engine:
    """The model on a device ("auto", "cpu", "cuda", "cuda:1"), checked on its golden crops.

    Without `precision` and `max_batch` this is the engine that `ralf build --all` measured as the
    fastest on this device.  If nothing was measured, it is torch in the fastest precision that the
    hardware has and the manifest allows.
    `golden_crops` limits the check: a wrong build shows at the first crops, and all 32 take seconds
    on a CPU.  Eight, or two where torch runs the network on a CPU: there nothing was built, and the
    weights' hash was checked.  `ralf models verify` checks all.
    `plan_public_key` is the PEM that plans are checked with; None means that of the environment.
    """
    place = pick_device(device)
    chosen = precision is not None or max_batch is not None
    name = None if chosen else _measured_fastest(artifact, place)
    engine: Engine | None = None
    if name is not None:
        try:
            engine = make(artifact, place, name, plan_public_key=plan_public_key)
        except Untrusted as error:
            # torch gives the same verdicts, only slower: a key that is set before the plans are
            # signed must not stop every worker.
            log.error("plan.refused", error=str(error), instead="torch")
    if engine is None:
        engine = TorchEngine.of(artifact, place, precision, max_batch)
    if golden_crops is None:
        golden_crops = 2 if isinstance(engine, TorchEngine) and place.type == "cpu" else 8
    check_golden(engine, golden_crops)
    return engine


def make(
    artifact: Artifact,
    device: torch.device,
    name: str,
    *,
    plan_public_key: str | None = None,
    buckets: Sequence[int] | None = None,
) -> Engine:
    """The engine of that name, not checked: torch-PRECISION, torch-eager-PRECISION, or a plan.

    Between `torch` or `torch-eager` and the precision may stand how the residual blocks are
    computed: torch-fused-fp16.  `buckets` are the batches that torch compiles for.
    """
    kind, _, precision = name.rpartition("-")
    if kind not in KINDS:
        return load_plan(artifact, device, name, public_key=plan_public_key)
    check_precision(precision)
    compiled, blocks = KINDS[kind]
    return TorchEngine.of(
        *(artifact, device, cast("Precision", precision)),
        compiled=compiled,
        blocks=blocks,
        buckets=buckets,
    )


def _measured_fastest(artifact: Artifact, device: torch.device) -> str | None:
    if not (artifact.path / "engines" / "fastest.json").exists():
        return None
    measured = plans.fastest(artifact, describe(device))
    return measured.engine if measured else None


def candidates(artifact: Artifact, device: torch.device) -> list[str]:
    """Names of the engines that this device can run, as `make` takes them."""
    here = describe(device)
    return offers(artifact.manifest, device) + [
        str(plan.key)
        for plan in plans.plans(artifact)
        if here.runtimes.get(plan.key.flavour) == plan.key.version
        # load_plan refuses an unverified plan, so none may be recorded as the fastest.
        and plan.record.verified_on(here.architecture)
    ]


def measure(
    artifact: Artifact, device: torch.device, *, batch: int | None = None, say: Say = print
) -> Measured:
    """Time every candidate and write the device's line in fastest.json."""
    batch = batch or default_batch(device)
    engines: dict[str, Engine] = {}
    for name in candidates(artifact, device):
        try:
            engine = make(artifact, device, name)
            check_golden(engine, 8)
        except (EngineError, ArtifactError, torch.OutOfMemoryError) as error:
            say(f"{name}: left out: {error}")
            continue
        engines[name] = engine
    if not engines:
        raise EngineError(f"{artifact.label}: no engine runs on {device}")
    side = artifact.manifest.input.size
    crops = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8)
    timings = interleave(
        {name: partial(engine, crops) for name, engine in engines.items()},
        repeats=REPEATS,
        warmups=2,
    )
    speeds = {name: round(batch / timing.median_s, 2) for name, timing in timings.items()}
    for name, speed in sorted(speeds.items(), key=lambda item: -item[1]):
        say(f"{name}: {speed} faces/s in batches of {batch}")
    best = max(speeds, key=lambda name: speeds[name])
    measured = Measured(engine=best, faces_per_s=speeds, batch=batch, at=plans.now())
    # Timing takes minutes and needs no lock; only the line in the file does.
    with plans.building(artifact):
        plans.record_fastest(artifact, describe(device), measured)
    return measured
