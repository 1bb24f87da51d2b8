"""A published model and a builder → a plan beside it, checked and published, or refused.

    torch-tensorrt   on the GPU that will run it (ralf.kernels.build_trt); the default where one is
    rtx-aot          TensorRT-RTX ahead of time, no GPU needed (ralf.kernels.build_rtx)

What a builder makes must first agree with the FP32 module (kernels.gate).  rtx-aot's ONNX graph is
run on the CPU and must agree before it is compiled, and the plan of it is published `unverified`
unless a GPU is here to run it; ralf.kernels.verify does that later, on each architecture.
torch-tensorrt's plan runs here and now.  What disagrees is not published: the message says by how
much, and names the first layer that differs.

One builder at a time works on a version; a plan that is already there is taken as it is.
"""

import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import nn

from ralf import install_hint
from ralf.kernels import plans
from ralf.kernels.artifact import Artifact, ArtifactError, golden
from ralf.kernels.batching import BUCKETS
from ralf.kernels.diverge import TOLERANCE, Layers, ModuleLayers, first_divergence
from ralf.kernels.engine import EngineError, budget_of, check_precision
from ralf.kernels.engine_torch import DTYPES, Detector, restore
from ralf.kernels.engine_trt import TrtEngine
from ralf.kernels.gate import Agreement, Disagrees, Gate, Score
from ralf.kernels.machine import describe
from ralf.kernels.manifest import Precision
from ralf.kernels.plans import Key, Plan, Verification
from ralf.kernels.trace import Built
from ralf.kernels.verify import Refused, reference, scored, told, verification, verified

Builder = Literal["torch-tensorrt", "rtx-aot"]
BUILDERS: tuple[Builder, ...] = get_args(Builder)
ON_CPU, ON_GPU = 64, 512
"""Random crops to decide on: the reference takes a second a face on a CPU core."""
PACKAGES = ("torch", "torch-tensorrt", "torch-tensorrt-rtx", "onnx", "onnxruntime", "onnxscript")
Say = Callable[[str], None]
Front = Literal["plan", "op"]
"""Where the destructor runs."""


@dataclass(frozen=True)
class Order:
    """What is to be built."""

    artifact: Artifact
    precision: Precision = "fp16"
    buckets: tuple[int, ...] = BUCKETS
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    crops: int | None = None
    """Random crops to decide on; None: as many as the device has time for."""
    again: bool = False
    """Build even if a plan of this key is there."""
    say: Say = print

    def __post_init__(self) -> None:
        check_precision(self.precision)
        budget_of(self.artifact, self.precision)
        ascending = list(self.buckets) == sorted(set(self.buckets))
        if not self.buckets or not ascending or not 1 <= self.buckets[0] <= self.buckets[-1] <= 512:
            raise EngineError(
                f"batches should ascend from 1 or more to at most 512, as 1,8,64; "
                f"got {','.join(map(str, self.buckets))}"
            )

    @property
    def on_gpu(self) -> bool:
        """Whether the device is one."""
        return self.device.type == "cuda"

    def network(self) -> nn.Module:
        """The FP32 reference, on the device."""
        artifact = self.artifact
        return restore(artifact.manifest, artifact.read("weights.safetensors")).to(self.device)

    def lowered(self) -> nn.Module:
        """The network as it is to be built."""
        network = self.network()
        if self.precision == "fp32":
            return network
        return cast("Detector", network).lower(DTYPES[self.precision])

    def gate(self) -> Gate:
        """What the result must pass."""
        count = self.crops if self.crops is not None else ON_GPU if self.on_gpu else ON_CPU
        return Gate(self.artifact, reference(self.network()), count)


def available() -> list[Builder]:
    """The builders that this machine has what it takes for."""
    found: list[Builder] = []
    if torch.cuda.is_available() and find_spec("torch_tensorrt") is not None:
        found.append("torch-tensorrt")
    if all(find_spec(name) is not None for name in ("tensorrt_rtx", "onnx", "onnxruntime")):
        found.append("rtx-aot")
    return found


def build(order: Order, builder: Builder | None = None) -> Plan:
    """The plan, published; Refused where it disagrees with the reference."""
    if builder is None:
        builder = "torch-tensorrt" if order.on_gpu else "rtx-aot"
    if builder == "torch-tensorrt" and not order.on_gpu:
        raise EngineError(
            "torch-tensorrt builds on a GPU, and none was found or asked for; "
            "without one: --builder rtx-aot"
        )
    with plans.building(order.artifact):
        return _by_tensorrt(order) if builder == "torch-tensorrt" else _ahead_of_time(order)


def _ahead_of_time(order: Order) -> Plan:
    try:
        from ralf.kernels import build_rtx, export
    except ImportError as error:
        raise EngineError(
            f"building ahead of time needs onnx and onnxruntime: {error}; " + install_hint("build")
        ) from error

    key = Key(
        "rtx",
        build_rtx.version(),
        build_rtx.architectures(),
        order.precision,
        order.buckets[-1],
    )
    if there := _there(order, key):
        return there
    gate, started = order.gate(), time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="ralf-build-") as scratch:
        graph = Path(scratch) / "network.onnx"
        export.export(
            order.lowered().cpu(), graph, most=order.buckets[-1], precision=order.precision
        )
        exported = time.perf_counter()
        order.say(f"{key}: exported in {exported - started:.0f} s; running it on the CPU")
        run = export.session(graph)
        agreement = _agree(
            order,
            gate,
            "the ONNX graph",
            lambda crops: export.logits(run, crops),
            lambda: export.OnnxLayers(graph),
        )
        checked = time.perf_counter()
        order.say(f"{key}: {told(agreement)}; building")
        built = build_rtx.build(graph, order.artifact.manifest.input.size, order.buckets)
        build_rtx.check_structure(built.content, *export.convolutions(graph))
    draft = _draft(order, key, "rtx-aot", built.options) | {
        "error": _errors(agreement),
        "timing": {
            "export_s": round(exported - started, 2),
            "check_s": round(checked - exported, 2),
            "build_s": round(built.seconds, 2),
        },
    }
    plan = plans.write_plan(order.artifact, built.content, draft)
    if not order.on_gpu or not _fits(key, order.device):
        return plan
    try:
        return verified(plan, gate, order.device, order.say)
    except Disagrees as error:
        plans.withdraw(order.artifact, plan)
        raise Refused(f"{error}; it was withdrawn") from error


def _fits(key: Key, device: torch.device) -> bool:
    here = describe(device)
    same = here.runtimes.get(key.flavour) == key.version
    return same and here.architecture in key.architectures


def _by_tensorrt(order: Order) -> Plan:
    from ralf.kernels import build_trt

    here = describe(order.device)
    flavour, version = build_trt.flavour(), build_trt.version()
    key = Key(flavour, version, (here.architecture,), order.precision, order.buckets[-1])
    if there := _there(order, key):
        return there
    gate, network = order.gate(), order.lowered()
    fronts: tuple[Front, ...] = ("plan", "op") if build_trt.splits(network) else ("plan",)
    made: list[_Tried] = []
    failures: list[EngineError] = []
    for front in fronts:
        try:
            made.append(_tried(order, gate, key, network, front))
        except EngineError as error:  # the other way may still do
            order.say(f"{key}, destructor in the {front}: {error}")
            failures.append(error)
    if not made:
        raise failures[0]
    best = min(made, key=lambda one: one.ms_a_face)
    fronts_ms = {one.built.options["front"]: one.run.timing_ms for one in made}
    options = {**best.built.options, "fronts_ms": fronts_ms}
    draft = _draft(order, key, "torch-tensorrt", options) | {
        "error": _errors(best.agreement),
        "timing": {"build_s": round(best.built.seconds, 2)},
        "state": "verified",
        "verifications": {here.architecture: best.run},
    }
    return plans.write_plan(order.artifact, best.built.content, draft)


@dataclass(frozen=True)
class _Tried:
    """A plan that ran here and agreed."""

    built: Built
    agreement: Agreement
    run: Verification

    @property
    def ms_a_face(self) -> float:
        """In the largest batch that the device had room for."""
        largest = max(self.run.timing_ms, key=int)
        return self.run.timing_ms[largest] / int(largest)


def _tried(order: Order, gate: Gate, key: Key, network: nn.Module, front: Front) -> _Tried:
    from ralf.kernels import build_trt

    built = build_trt.build(network, order.buckets, front)
    order.say(f"{key}: destructor in the {front}, built in {built.seconds:.0f} s; running it")
    engine = TrtEngine.of(
        order.artifact, key, built.content, order.buckets, device=order.device, front=front
    )

    def layers() -> Layers:
        names = ModuleLayers(order.network()).names()
        return build_trt.PlanLayers(network, names, order.device)

    what = f"{key}, destructor in the {front},"
    agreement = _agree(order, gate, what, scored(engine), layers)
    run = verification(engine, agreement)
    order.say(f"{key}: {told(agreement)}, ms a batch: {run.timing_ms}")
    return _Tried(built, agreement, run)


def _there(order: Order, key: Key) -> Plan | None:
    """The plan of this key, if it is whole and made for these batches."""
    if order.again:
        return None
    try:
        plan = plans.plan(order.artifact, key)
        plan.read()
    except ArtifactError:
        return None
    if plan.record.buckets != order.buckets:
        return None
    order.say(f"{key}: already built at {plan.record.at}; build it anew with --again")
    return plan


def _agree(
    order: Order,
    gate: Gate,
    what: str,
    score: Score,
    layers: Callable[[], Layers],
) -> Agreement:
    try:
        return gate.check(what, score, order.precision)
    except Disagrees as error:
        crops = golden(order.artifact).crops[:2]
        found = first_divergence(
            ModuleLayers(order.network()), layers(), crops, TOLERANCE[order.precision]
        )
        where = f"the first layer that differs is {found}" if found else "no one layer differs"
        raise Refused(f"{error}; {where}; not published") from error


def _draft(order: Order, key: Key, builder: Builder, options: dict[str, Any]) -> dict[str, Any]:
    return {
        "key": str(key),
        "builder": builder,
        "options": options,
        "buckets": order.buckets,
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
    """Of what takes part in building."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version_of(name)
        except PackageNotFoundError:
            continue
    return found
