"""A TensorRT plan as an engine, of either flavour: standard TensorRT or TensorRT-RTX.

Both have the same Python interface under two names, and a plan is read by the very version that
wrote it, on an architecture that its key names, once a machine of that architecture has verified
it; all else is refused with the command that helps.

Any number of crops is cut into the plan's buckets and padded (ralf.kernels.batching); the device's
side, streams and buffers and graphs, is ralf.kernels.trt_session.  One caller at a time.
"""

import hashlib
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import cast

import torch
from torch import Tensor

from ralf.kernels import plans
from ralf.kernels.artifact import Artifact, ArtifactError, Damaged
from ralf.kernels.batching import Batching
from ralf.kernels.engine import EngineError, check_crops
from ralf.kernels.engine_torch import TorchEngine, placed, restore
from ralf.kernels.machine import MODULES, describe
from ralf.kernels.manifest import Precision
from ralf.kernels.plans import Device, Flavour, Key, Plan
from ralf.kernels.trt_session import Queue, Session


def runtime_module(flavour: Flavour) -> ModuleType:
    """The flavour's bindings."""
    try:
        if flavour == "rtx":
            import tensorrt_rtx

            return tensorrt_rtx  # type: ignore[no-any-return]
        import tensorrt

        return tensorrt  # type: ignore[no-any-return]
    except ImportError as error:
        raise EngineError(
            f"the plan needs {MODULES[flavour]}, which does not import here: {error}; "
            "install the extra gpu (or gpu-rtx), or use the torch engine"
        ) from error


@dataclass(eq=False)
class TrtEngine:
    """One plan in memory on one GPU."""

    artifact: Artifact
    key: Key
    device: str
    session: Session = field(repr=False)
    batching: Batching = field(repr=False)
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @classmethod
    def of(
        cls,
        artifact: Artifact,
        key: Key,
        content: bytes,
        buckets: Sequence[int],
        *,
        device: torch.device,
        front: str = "plan",
    ) -> "TrtEngine":
        """The plan on the device, every bucket ready; whether it is verified is not asked here.

        front "op": the destructor runs before the plan, which takes what it makes.
        """
        here = describe(device)
        trt = runtime_module(key.flavour)
        check_key(artifact, key, here, str(trt.__version__))
        queue = Queue(device)
        # The kernel in front is not part of the plan, so it needs the model's mask from the
        # weights.
        before = destructor(artifact, key, device) if front == "op" else None
        session = Session(trt, content, queue, device, cache_file(content, key, here), before)
        engine = cls(artifact, key, str(device), session, Batching(buckets))
        engine.warm()
        return engine

    @property
    def name(self) -> str:
        """The plan's key."""
        return str(self.key)

    @property
    def precision(self) -> Precision:
        """Of the bulk of the arithmetic."""
        return cast("Precision", self.key.precision)

    @cached_property
    def explainer(self) -> TorchEngine:
        """A plan gives logits alone, so torch makes the pictures; eagerly, since they are few."""
        return TorchEngine.of(self.artifact, torch.device(self.device), compiled=False)

    def warm(self) -> None:
        """Make every bucket that fits ready; what does not fit is halved now, not in a job."""
        side = self.artifact.manifest.input.size
        blank = torch.zeros((1, 3, side, side), dtype=torch.uint8)
        # The largest first: if it is halved, the loop below must see the new buckets.
        self(blank.expand(self.batching.most, -1, -1, -1))
        for bucket in self.batching.buckets:
            self(blank.expand(bucket, -1, -1, -1))
        # Only now has every bucket been compiled.
        self.session.remember()

    def __call__(self, crops: Tensor) -> Tensor:
        """Crops u8 [m, 3, s, s] → FP32 logits [m] on the CPU; one caller at a time."""
        check_crops(crops, self.artifact)
        if not len(crops):
            return torch.zeros(0)
        with self.lock, torch.inference_mode():
            return self.batching(crops, self._score)

    def _score(self, part: Tensor, bucket: int) -> Tensor:
        # After a halving the smaller batch needs the memory that the larger one's buffers hold.
        self.session.drop(above=self.batching.most)
        return self.session.run(bucket, part)[0].reshape(-1)


def load_plan(
    artifact: Artifact, device: torch.device, name: str, *, public_key: str | None = None
) -> TrtEngine:
    """The plan of this name as an engine.

    Refused if it was not verified on this architecture, or is not signed where keys are set;
    public_key: PEM, None for the environment's.
    """
    here = describe(device)
    _check_gpu(here)
    for attempt in (1, 2):
        plan = plans.plan(artifact, name)
        plan.check_trusted(public_key)
        if not plan.record.verified_on(here.architecture):
            # a plan for another architecture gets a message of its own
            check_key(artifact, plan.key, here, here.runtimes.get(plan.key.flavour, "none"))
            raise plans.unverified(artifact, plan, here.architecture)
        try:
            content = plan.read()
        except Damaged:
            # A builder may have replaced the plan after its record was read: try once more.
            if attempt == 2 or _record_of(artifact, plan) == plan.record.plan_sha256:
                raise
            continue
        front = plan.record.options.get("front", "plan")
        return TrtEngine.of(
            artifact, plan.key, content, plan.record.buckets, device=device, front=front
        )
    raise AssertionError("the second attempt returns or raises")


def destructor(
    artifact: Artifact, key: Key, device: torch.device
) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """The model's own destructor, with its mask, in the plan's precision."""
    network = restore(artifact.manifest, artifact.read("weights.safetensors"))
    network = placed(network, cast("Precision", key.precision), device)
    return cast("Callable[[Tensor], tuple[Tensor, ...]]", network.destroy)


def check_key(artifact: Artifact, key: Key, here: Device, runtime: str) -> None:
    """EngineError where another version or architecture is needed than is here."""
    _check_gpu(here)
    advice = f"build one here: {plans.command(artifact)}"
    if runtime != key.version:
        raise EngineError(
            f"{key} of {artifact.label} needs {MODULES[key.flavour]} {key.version}, "
            f"here is {runtime}; {advice}"
        )
    if here.architecture not in key.architectures:
        raise EngineError(
            f"{key} of {artifact.label} is for {', '.join(key.architectures)}, "
            f"{here.name} is {here.architecture}; {advice}"
        )


def _check_gpu(here: Device) -> None:
    if here.architecture == "cpu":
        raise EngineError("a plan runs on a GPU, not on cpu")


def cache_file(content: bytes, key: Key, here: Device) -> Path | None:
    """Where RTX's compiled kernels are kept: the user's own folder, one file a plan and GPU."""
    if key.flavour != "rtx":
        return None
    home = os.environ.get("XDG_CACHE_HOME")
    # By content, not by key: a plan that is built again has the same key and other kernels.
    name = f"{hashlib.sha256(content).hexdigest()[:16]}-{here.architecture}"
    folder = Path(home) if home else Path.home() / ".cache"
    return folder / "ralf" / f"{name}.compiled"


def _record_of(artifact: Artifact, plan: Plan) -> str | None:
    try:
        return plans.plan(artifact, plan.key).record.plan_sha256
    except ArtifactError:
        return None
