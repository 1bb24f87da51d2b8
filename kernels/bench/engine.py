"""`ralf bench engine`: faces a second by every engine that this machine can make of a model.

The baselines run in the same process, in turns: the papers' way in FP32
(ralf.kernels.bench.baseline), and on CUDA the same with TF32 and under FP16 autocast.  Then the
network in plain FP32 channels-last, torch's engine eager and compiled, and each plan that was
verified here.  On CUDA the engines that are off until measured run too (residual_blocks.py),
compiled for this batch alone.  All take u8 crops in the CPU's memory and end with logits there.
Making, compiling and building are not timed with them; the seconds to make each engine stand in a
field of their own.

--fresh measures a network with fresh weights, --build builds its plans first: together they are
all that a session on a new GPU needs.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ralf.kernels.artifact import Artifact, ArtifactError, models_folder, resolve
from ralf.kernels.batching import default_batch
from ralf.kernels.bench.baseline import AuthorsWay
from ralf.kernels.bench.record import Record, gpu_facts, interleave, machine, settle, short_name
from ralf.kernels.choose_engine import candidates, make
from ralf.kernels.engine import EngineError, check_golden, pick_device
from ralf.kernels.engine_cuda import OnCuda
from ralf.kernels.engine_torch import placed, restore, unmeasured
from ralf.kernels.networks.ralf import Ralf
from ralf.kernels.untrained import patterns, publish_untrained

FRESH: dict[str, dict[str, Any]] = {
    "ralf": {"base": 32, "blocks": 8, "backbone": "xception"},
    "ralf-small": {
        "base": 8,
        "blocks": 2,
        "backbone": "tf_efficientnet_lite0",
        "sees": "both",
    },
}
AUTHORS = "authors, FP32"
Way = Callable[[], Tensor]


def run_engine(args: argparse.Namespace) -> int:
    """Print the record."""
    device = pick_device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        artifact = chosen(args, Path(folder))
        if args.build:
            build_plans(artifact, device)
        batch = args.batch or default_batch(device)
        crops = torch.from_numpy(patterns(batch, artifact.manifest.input.size, seed=1))
        made_s: dict[str, float] = {}
        with torch.inference_mode():
            ways = baselines(artifact, device, crops)
            ways |= engines(artifact, device, crops, made_s)
            if args.compile:
                ways |= compiled_on_cpu(artifact, device, crops, made_s)
            reference = ways[AUTHORS]().float()
            errors = {name: float((way() - reference).abs().max()) for name, way in ways.items()}
            timings = interleave(ways, repeats=args.repeats, settle=settle(device))
    theirs = timings[AUTHORS].median_s
    record = Record(
        theme="engine",
        machine=machine() | gpu_facts(device),
        conditions={
            "model": artifact.label,
            "network": artifact.manifest.network.model_dump(),
            "crops": f"u8 {list(crops.shape)} on the CPU",
            "seconds": "for all crops, to logits on the CPU",
        },
        timings=timings,
        ratios={
            f"{AUTHORS} / {name}": round(theirs / timing.median_s, 2)
            for name, timing in timings.items()
            if name != AUTHORS
        },
        facts={
            "faces_per_s": {n: round(batch / t.median_s, 2) for n, t in timings.items()},
            "seconds to make": made_s,
            f"largest logit difference to {AUTHORS}": errors,
        },
    )
    record.save(args.out, short_name(device))
    return 0


def chosen(args: argparse.Namespace, folder: Path) -> Artifact:
    """The model named, or one with fresh weights in the folder."""
    if args.fresh:
        say(f"making {args.fresh} with fresh weights")
        dimensions = FRESH[args.fresh]
        return publish_untrained(
            folder, name=args.fresh, size=args.size, golden_crops=8, **dimensions
        )
    if args.model is None:
        raise EngineError(f"name a model, or ask for fresh weights: --fresh {' or '.join(FRESH)}")
    return resolve(models_folder(args.models), args.model)


def build_plans(artifact: Artifact, device: torch.device) -> None:
    """Build by every builder that is here; one that fails is reported, and the others still run."""
    from ralf.kernels.build import BuildRequest, available, build

    for builder in available():
        say(f"building by {builder}")
        try:
            build(BuildRequest(artifact, device=device, say=say), builder)
        except EngineError as error:
            say(f"{builder}: {error}")


def baselines(artifact: Artifact, device: torch.device, crops: Tensor) -> dict[str, Way]:
    """What the engines are compared with; all of them one network in FP32."""
    network = restore(artifact.manifest, artifact.read("weights.safetensors"))
    if not isinstance(network, Ralf):
        raise EngineError(
            f"{artifact.label} is a {artifact.manifest.network.build}; the baseline here is RALF's"
        )
    theirs = AuthorsWay.of(network, **artifact.manifest.network.dimensions).to(device)
    plain = placed(network, "fp32", device)
    ways: dict[str, Way] = {
        AUTHORS: partial(_plainly, theirs, crops, device),
        "FP32, channels last": partial(_plainly, plain, crops, device),
    }
    if device.type == "cuda":
        ways["authors, TF32"] = partial(_plainly, theirs, crops, device, tf32=True)
        ways["authors, FP16 autocast"] = partial(_plainly, theirs, crops, device, half=True)
    return ways


def _plainly(
    network: nn.Module,
    crops: Tensor,
    device: torch.device,
    *,
    tf32: bool = False,
    half: bool = False,
) -> Tensor:
    with (
        torch.inference_mode(),
        _tf32(tf32),
        torch.autocast("cuda", dtype=torch.float16, enabled=half),
    ):
        logits: Tensor = network(crops.to(device))
        return logits.float().cpu()


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    """Convolutions and products in TF32, or truly in FP32; torch's default is one of each."""
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = allowed
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])


def engines(
    artifact: Artifact, device: torch.device, crops: Tensor, made_s: dict[str, float]
) -> dict[str, Way]:
    """Every engine that runs here and agrees with the reference."""
    ways: dict[str, Way] = {}
    offered = candidates(artifact, device)
    for name in [*offered, *unmeasured(device)]:
        start = time.perf_counter()
        try:
            # One bucket where nothing serves with it: compiling three takes a minute more each.
            buckets = None if name in offered else (len(crops),)
            engine = make(artifact, device, name, buckets=buckets)
            check_golden(engine)
        except (EngineError, ArtifactError, torch.OutOfMemoryError) as error:
            say(f"{name}: left out: {error}")
            continue
        made_s[name] = round(time.perf_counter() - start, 2)
        ways[name] = partial(engine, crops)
    return ways


def compiled_on_cpu(
    artifact: Artifact, device: torch.device, crops: Tensor, made_s: dict[str, float]
) -> dict[str, Way]:
    """torch.compile on the CPU, FP32, for this batch alone; no engine of ours, only a number."""
    if device.type != "cpu":
        return {}
    network = restore(artifact.manifest, artifact.read("weights.safetensors"))
    start = time.perf_counter()
    side, buckets = artifact.manifest.input.size, (len(crops),)
    run = OnCuda(placed(network, "fp32", device), device, side=side, buckets=buckets)
    made_s["torch.compile, FP32"] = round(time.perf_counter() - start, 2)
    return {"torch.compile, FP32": partial(run, crops)} if run.compiled else {}


def say(line: str) -> None:
    """Progress."""
    print(f"ralf bench: {line}", file=sys.stderr, flush=True)
