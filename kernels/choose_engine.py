"""Which engine is fastest on this device: every one that it can run, timed side by side.

On a CPU those are torch in FP32 and, where the model allows it, bf16; on a GPU torch in FP16 and
each plan that was verified here.  Turns are interleaved, as in every benchmark of this project.
What came out is the device's line in the model's engines/fastest.json, and `kernels.engine.load`
takes that engine; without a line it takes torch.

A device's line holds for the very runtimes that are installed beside it: with another TensorRT the
machine is another device, and nothing was measured there.
"""

import os
from collections.abc import Callable
from functools import partial

import torch

from ralf.kernels import plan_store, plans
from ralf.kernels.artifact import Artifact, ArtifactError
from ralf.kernels.bench.record import interleave, processor
from ralf.kernels.engine import Engine, EngineError, check_golden, make
from ralf.kernels.engine_torch import offers
from ralf.kernels.plans import Device, Measured
from ralf.kernels.verify import now

REPEATS = 7
Say = Callable[[str], None]


def device_of(device: torch.device) -> Device:
    """The device as plans and fastest.json know it."""
    if device.type == "cpu":
        cores = len(os.sched_getaffinity(0))
        return Device(f"{processor()} ({cores} cores)", "cpu")
    from ralf.kernels.engine_trt import facts

    return facts(device)


def candidates(artifact: Artifact, device: torch.device) -> list[str]:
    """Names of the engines that this device can run, as `ralf.kernels.engine.make` takes them."""
    here = device_of(device)
    return offers(artifact.manifest, device) + [
        str(plan.key)
        for plan in plans.plans(artifact)
        if here.runtimes.get(plan.key.flavour) == plan.key.version
        and plan.record.verified_on(here.architecture)
    ]


def measure(
    artifact: Artifact, device: torch.device, *, batch: int | None = None, say: Say = print
) -> Measured:
    """Time every candidate, write the device's line, and say what came out."""
    batch = batch or (4 if device.type == "cpu" else 64)
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
    measured = Measured(engine=best, faces_per_s=speeds, batch=batch, at=now())
    with plan_store.building(artifact):
        plan_store.record_fastest(artifact, device_of(device), measured)
    return measured
