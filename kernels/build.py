"""A published model and a builder → a plan beside it, checked and published, or refused.

    torch-tensorrt   on the GPU that will run it (ralf.kernels.build_trt); the default on a GPU
    rtx-aot          TensorRT-RTX ahead of time, no GPU needed (ralf.kernels.build_rtx)

A plan must first agree with the FP32 module (ralf.kernels.verify).  rtx-aot's ONNX graph is run and
must agree before it is compiled, and its plan is published `unverified` unless a GPU is here to
run it; `ralf models verify` does that later, on each architecture.  torch-tensorrt's plan runs here
at once.  A plan that disagrees is not published; the message says by how much.

One builder at a time works on a version.  A plan that is already there is not built again.
"""

import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import nn

from ralf.kernels import build_rtx, build_trt, export, plan_signature, plans, quantise
from ralf.kernels.artifact import Artifact, ArtifactError, golden
from ralf.kernels.batching import BUCKETS
from ralf.kernels.engine import EngineError, budget_of, check_precision
from ralf.kernels.engine_torch import DTYPES, Detector, restore
from ralf.kernels.engine_trt import TrtEngine
from ralf.kernels.export import Built
from ralf.kernels.machine import describe
from ralf.kernels.manifest import Precision
from ralf.kernels.plans import Key, Plan, Verification
from ralf.kernels.verify import (
    DECISIONS,
    Agreement,
    AgreementCheck,
    Disagrees,
    PlanRefused,
    Score,
    describe_agreement,
    reference,
    scored,
    variations,
    verification,
    verified,
)

Builder = Literal["torch-tensorrt", "rtx-aot"]
BUILDERS: tuple[Builder, ...] = get_args(Builder)
GRAPH_CROPS = 8
"""Golden crops and random ones for the ONNX graph, which runs on the CPU, if the plan itself then
runs on a GPU."""
SCALE_CROPS, SCALE_SEED = 16, 7
"""Crops on which FP8's scales are found: variations of the golden ones, but not those that the
check decides on."""
PACKAGES = ("torch", "torch-tensorrt", "torch-tensorrt-rtx", "onnx", "onnxruntime", "onnxscript")
Say = Callable[[str], None]
Front = Literal["plan", "op"]
"""Where the destructor runs."""


@dataclass(frozen=True)
class BuildRequest:
    """What is to be built, and how it is checked."""

    artifact: Artifact
    precision: Precision = "fp16"
    buckets: tuple[int, ...] = BUCKETS
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    crops: int | None = None
    """Random crops for the decisions; None: as many as the device computes in reasonable time."""
    again: bool = False
    """Build even if there is a plan with this key."""
    say: Say = print

    def __post_init__(self) -> None:
        check_precision(self.precision)
        # For its error alone, which is better seen now than after minutes of building.
        budget_of(self.artifact, self.precision)
        ascending = list(self.buckets) == sorted(set(self.buckets))
        if not self.buckets or not ascending or not 1 <= self.buckets[0] <= self.buckets[-1] <= 512:
            raise EngineError(
                f"batches should ascend from 1 or more to at most 512, as 1,8,64; "
                f"got {','.join(map(str, self.buckets))}"
            )

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    def network(self) -> nn.Module:
        """The FP32 reference, on the device."""
        artifact = self.artifact
        return restore(artifact.manifest, artifact.read("weights.safetensors")).to(self.device)

    def lowered(self) -> nn.Module:
        """The network in the precision that is to be built."""
        network = self.network()
        if self.precision == "fp32":
            return network
        # FP8 is written into an FP16 graph after the export.
        held: Precision = "fp16" if self.precision == "fp8" else self.precision
        return cast("Detector", network).lower(DTYPES[held])

    def check(self) -> AgreementCheck:
        """The check that the result must pass."""
        count = self.crops if self.crops is not None else DECISIONS
        return AgreementCheck(self.artifact, reference(self.network()), count)


def available() -> list[Builder]:
    """The builders that can run on this machine."""
    found: list[Builder] = []
    # Not imported to find out: torch-tensorrt raises where there is no CUDA device.
    if torch.cuda.is_available() and find_spec("torch_tensorrt") is not None:
        found.append("torch-tensorrt")
    if all(find_spec(name) is not None for name in ("tensorrt_rtx", "onnx", "onnxruntime")):
        found.append("rtx-aot")
    return found


def build(request: BuildRequest, builder: Builder | None = None) -> Plan:
    """The plan, published; PlanRefused if it disagrees with the reference."""
    fp8 = request.precision == "fp8"
    if builder is None:
        builder = "torch-tensorrt" if request.on_gpu and not fp8 else "rtx-aot"
    if builder == "torch-tensorrt" and not request.on_gpu:
        raise EngineError(
            "torch-tensorrt builds on a GPU, and none was found or asked for; "
            "without one: --builder rtx-aot"
        )
    if fp8 and (builder == "torch-tensorrt" or not request.on_gpu):
        raise EngineError("fp8 is built by --builder rtx-aot, on the GPU that will run it")
    plan_signature.require_signer()
    with plans.building(request.artifact):
        return _by_tensorrt(request) if builder == "torch-tensorrt" else _ahead_of_time(request)


def _ahead_of_time(request: BuildRequest) -> Plan:
    export.require_onnx()
    fp8 = request.precision == "fp8"
    key = Key(
        "rtx",
        build_rtx.version(),
        # FP8's convolutions are compiled for the GPU at hand alone.
        (describe(request.device).architecture,) if fp8 else build_rtx.architectures(),
        request.precision,
        request.buckets[-1],
    )
    if there := _existing(request, key):
        return there
    check, started = request.check(), time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="ralf-build-") as scratch:
        graph = Path(scratch) / "network.onnx"
        export.write_onnx(
            request.lowered().cpu(), graph, most=request.buckets[-1], precision=request.precision
        )
        options = _quantised(request, graph) if fp8 else {}
        exported = time.perf_counter()
        request.say(f"{key}: exported in {exported - started:.0f} s; running it on the CPU")
        run = export.session(graph)
        runs_here = request.on_gpu and _fits(key, request.device)
        few = replace(check, count=min(check.count, GRAPH_CROPS), most_golden=GRAPH_CROPS)
        agreement = _agreement(
            request,
            few if runs_here else check,
            "the ONNX graph",
            lambda crops: export.logits(run, crops),
        )
        checked = time.perf_counter()
        request.say(f"{key}: {describe_agreement(agreement)}; building")
        size = request.artifact.manifest.input.size
        built = build_rtx.build(graph, size, request.buckets, current=fp8)
        build_rtx.check_structure(built.content, *export.convolutions(graph))
    draft = _draft(request, key, "rtx-aot", built.options | options) | {
        "error": _errors(agreement),
        "timing": {
            "export_s": round(exported - started, 2),
            "check_s": round(checked - exported, 2),
            "build_s": round(built.seconds, 2),
        },
    }
    # Published before it has run: no engine loads it until a run has marked it as verified.
    plan = plans.write_plan(request.artifact, built.content, draft)
    if not runs_here:
        return plan
    try:
        return verified(plan, check, request.device, request.say)
    except Disagrees as error:
        plans.withdraw(request.artifact, plan)
        raise PlanRefused(f"{error}; it was withdrawn") from error


def _quantised(request: BuildRequest, graph: Path) -> dict[str, Any]:
    crops = variations(golden(request.artifact).crops, SCALE_CROPS, SCALE_SEED)
    return {"fp8_convolutions": quantise.quantise(graph, crops), "scale_crops": SCALE_CROPS}


def _fits(key: Key, device: torch.device) -> bool:
    here = describe(device)
    same = here.runtimes.get(key.flavour) == key.version
    return same and here.architecture in key.architectures


def _by_tensorrt(request: BuildRequest) -> Plan:
    here = describe(request.device)
    flavour, version = build_trt.flavour(), build_trt.version()
    key = Key(flavour, version, (here.architecture,), request.precision, request.buckets[-1])
    if there := _existing(request, key):
        return there
    # Two networks: lowering changes one in place, and the check needs the FP32 one.
    check, network = request.check(), request.lowered()
    fronts: tuple[Front, ...] = ("plan", "op") if build_trt.splits(network) else ("plan",)
    made: list[_Candidate] = []
    failures: list[EngineError] = []
    for front in fronts:
        try:
            made.append(_build_candidate(request, check, key, network, front))
        except EngineError as error:  # the other place for the destructor may still work
            request.say(f"{key}, destructor in the {front}: {error}")
            failures.append(error)
    if not made:
        raise failures[0]
    best = min(made, key=lambda one: one.ms_a_face)
    fronts_ms = {one.built.options["front"]: one.run.timing_ms for one in made}
    options = {**best.built.options, "fronts_ms": fronts_ms}
    draft = _draft(request, key, "torch-tensorrt", options) | {
        "error": _errors(best.agreement),
        "timing": {"build_s": round(best.built.seconds, 2)},
        "state": "verified",
        "verifications": {here.architecture: best.run},
    }
    return plans.write_plan(request.artifact, best.built.content, draft)


@dataclass(frozen=True)
class _Candidate:
    """A plan that ran on this GPU and agreed with the reference."""

    built: Built
    agreement: Agreement
    run: Verification

    @property
    def ms_a_face(self) -> float:
        """In the largest batch that fitted into the device's memory."""
        largest = max(self.run.timing_ms, key=int)
        return self.run.timing_ms[largest] / int(largest)


def _build_candidate(
    request: BuildRequest, check: AgreementCheck, key: Key, network: nn.Module, front: Front
) -> _Candidate:
    built = build_trt.build(network, request.buckets, front)
    request.say(f"{key}: destructor in the {front}, built in {built.seconds:.0f} s; running it")
    engine = TrtEngine.of(
        request.artifact, key, built.content, request.buckets, device=request.device, front=front
    )
    what = f"{key}, destructor in the {front},"
    agreement = _agreement(request, check, what, scored(engine))
    run = verification(engine, agreement)
    request.say(f"{key}: {describe_agreement(agreement)}, ms a batch: {run.timing_ms}")
    return _Candidate(built, agreement, run)


def _existing(request: BuildRequest, key: Key) -> Plan | None:
    """The plan with this key, if its file is whole and it was built for these batches."""
    if request.again:
        return None
    try:
        plan = plans.plan(request.artifact, key)
        # Only to have signature and hash checked: a forged or damaged plan is built again.
        plan.check_trusted()
        plan.read()
    except ArtifactError:
        return None
    # The key has only the largest batch, so these may differ under the same key.
    if plan.record.buckets != request.buckets:
        return None
    request.say(f"{key}: already built at {plan.record.at}; build it anew with --again")
    return plan


def _agreement(request: BuildRequest, check: AgreementCheck, what: str, score: Score) -> Agreement:
    try:
        return check.run(what, score, request.precision)
    except Disagrees as error:
        raise PlanRefused(f"{error}; not published") from error


def _draft(
    request: BuildRequest, key: Key, builder: Builder, options: dict[str, Any]
) -> dict[str, Any]:
    return {
        "key": str(key),
        "builder": builder,
        "options": options,
        "buckets": request.buckets,
        "versions": versions(),
        "at": plans.now(),
    }


def _errors(agreement: Agreement) -> dict[str, float]:
    return {
        "golden": agreement.error,
        "budget": agreement.budget,
        "random": agreement.spread,
        "decisions": agreement.decisions,
        "contested": agreement.contested,
    }


def versions() -> dict[str, str]:
    """Versions of the packages that take part in building."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version_of(name)
        except PackageNotFoundError:
            continue
    return found
