"""The network itself as an engine: on any CPU, on CUDA, and the only one that explains.

CPU: channels-last, and bf16 where the processor multiplies it in hardware (avx512_bf16, amx) and
the manifest says that it was measured to agree; FP32 elsewhere.  CUDA: FP16, channels-last,
compiled for a few batch sizes (ralf.kernels.engine_cuda), eager if compiling fails or is not
wanted.  The network itself decides what runs in the smaller dtype (its `lower`).

This file also writes a network as the bytes of a model (`pack`) and reads it back (`restore`).
Weights are FP16 on disk, and the reference is those weights in FP32.  Nothing is unpickled.

CPU seconds a face, one thread of a busy AVX-512 machine, all in one run:

                  FP32    FP32 channels-last    bf16 channels-last
    RALF small    0.29    0.23                  0.12
    RALF          1.61    1.44                  0.79

Fusing ReLU and sum into oneDNN's convolutions was tried and gained nothing: arithmetic dominates.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from ralf.kernels.artifact import Artifact, Golden
from ralf.kernels.batching import default_batch
from ralf.kernels.cpu_threads import side_by_side
from ralf.kernels.engine import Engine, EngineError, check_crops, check_precision
from ralf.kernels.engine_cuda import OnCuda, buckets_of
from ralf.kernels.machine import cpu_has_bf16
from ralf.kernels.manifest import Manifest, Precision
from ralf.kernels.networks import build
from ralf.kernels.networks.ralf import Explanation
from ralf.kernels.residual_blocks import BLOCKS, Blocks, use

DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
EXPLAIN_BATCH = 8
KINDS: dict[str, tuple[bool, Blocks]] = {
    kind + ("" if blocks == "plain" else f"-{blocks}"): (kind == "torch", blocks)
    for blocks in BLOCKS
    for kind in ("torch", "torch-eager")
}
"""An engine's name without its precision: is it compiled, and how does it compute the blocks."""


class Detector(Protocol):
    """What a network has in addition to an nn.Module."""

    def __call__(self, crops: Tensor) -> Tensor: ...
    def lower(self, dtype: torch.dtype) -> nn.Module: ...


class Explainer(Protocol):
    """A detector that can show pictures of what it judged by."""

    def explain(self, crops: Tensor) -> Explanation: ...


class Several(Protocol):
    """A network of several detectors."""

    def members(self, crops: Tensor) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class TorchEngine:
    """One model in memory on one device."""

    artifact: Artifact
    network: nn.Module
    device: str
    precision: Precision
    max_batch: int
    name: str = "torch"
    runner: OnCuda | None = field(default=None, repr=False)
    """Runs the network on CUDA; None on a CPU."""

    @classmethod
    def of(
        cls,
        artifact: Artifact,
        device: torch.device,
        precision: Precision | None = None,
        max_batch: int | None = None,
        *,
        compiled: bool = True,
        blocks: Blocks = "plain",
        buckets: Sequence[int] | None = None,
    ) -> "TorchEngine":
        """Read, check and place the weights; the caller checks the golden crops.

        The last three are for CUDA.  compiled: loading then takes minutes the first time on a
        machine.  blocks: how residual blocks are computed (ralf.kernels.residual_blocks).
        buckets: the batches it is compiled for, if not the usual ones.
        """
        if precision is None:
            precision = best_precision(artifact.manifest, device)
        check_precision(precision)
        if precision not in DTYPES:
            raise EngineError(
                f"torch runs a network in {', '.join(DTYPES)}, only a plan in {precision}; "
                f"see: ralf build --precision {precision}"
            )
        if max_batch is not None and max_batch < 1:
            raise EngineError(f"max_batch should be at least 1, got {max_batch}")
        network = restore(artifact.manifest, artifact.read("weights.safetensors"))
        network = placed(network, precision, device)
        batch, side = max_batch or default_batch(device), artifact.manifest.input.size
        if device.type == "cpu":
            if blocks != "plain":
                raise EngineError(f"blocks={blocks} is for CUDA; use plain on a CPU")
            return cls(artifact, network, str(device), precision, batch)
        if blocks != "plain" and not use(network, blocks, side):
            raise EngineError(f"{artifact.label} has no residual blocks that {blocks} can compute")
        sizes = buckets or buckets_of(batch)
        runner = OnCuda(network, device, side=side, buckets=sizes, compiled=compiled)
        # Verdicts report the name, so it says what runs, not what was asked for.
        name = "torch" if runner.compiled else "torch-eager"
        return cls(artifact, network, str(device), precision, batch, name, runner)

    @property
    def explains(self) -> bool:
        """Whether the network can show pictures."""
        return hasattr(self.network, "explain")

    @torch.inference_mode()
    def __call__(self, crops: Tensor) -> Tensor:
        """Crops u8 [m, 3, s, s] → FP32 logits [m] on the CPU; any m, in bounded batches."""
        check_crops(crops, self.artifact)
        if not len(crops):
            return torch.zeros(0)
        if self.runner is not None:
            return self.runner(crops)
        return self._in_threads(self.network, crops)

    def _in_threads(self, score: Callable[[Tensor], Tensor], crops: Tensor) -> Tensor:
        """Split the crops over torch's threads, in batches of at most max_batch."""
        # Even shares: with full batches alone, a few crops would leave threads without work.
        share = -(-len(crops) // torch.get_num_threads())
        pieces = batches(crops, min(self.max_batch, share))
        return torch.cat(side_by_side([partial(_alone, score, one) for one in pieces]))

    @property
    def detectors(self) -> tuple[str, ...]:
        """An ensemble's members; none where the network is one detector."""
        names: tuple[str, ...] = getattr(self.network, "names", ())
        return names

    @torch.inference_mode()
    def members(self, crops: Tensor) -> Tensor:
        """The logits of an ensemble's members, FP32 [m, k] on the CPU; their mean is the logit."""
        check_crops(crops, self.artifact)
        if not self.detectors:
            raise EngineError(f"{self.artifact.label} is one detector: it has no members")
        ensemble = cast("Several", self.network)
        if not len(crops):
            return torch.zeros(0, len(self.detectors))
        if self.device == "cpu":
            return self._in_threads(ensemble.members, crops)
        # Not through the runner: its programs give the mean alone.
        parts = [ensemble.members(part.to(self.device)) for part in batches(crops, self.max_batch)]
        return torch.cat(parts).float().cpu()

    @torch.inference_mode()
    def explain(self, crops: Tensor) -> Explanation:
        """The network's pictures of each crop (its `explain`), FP32 on the CPU."""
        check_crops(crops, self.artifact)
        if not self.explains:
            build_name = self.artifact.manifest.network.build
            raise EngineError(f"{self.artifact.label} is a {build_name}, which explains nothing")
        # An empty batch still has shapes: ask for one face, and keep none.
        wanted = crops if len(crops) else crops.new_zeros((1, *crops.shape[1:]))
        network = cast("Explainer", self.network)
        # Pictures are for few faces; a full batch of them beside the scoring might not fit.
        most = min(self.max_batch, EXPLAIN_BATCH)
        parts = [network.explain(b.to(self.device)) for b in batches(wanted, most)]
        columns = zip(*parts, strict=True)
        return Explanation(*(torch.cat(column)[: len(crops)].float().cpu() for column in columns))


def _alone(score: Callable[[Tensor], Tensor], crops: Tensor) -> Tensor:
    """One thread's piece; each thread must enter inference mode itself."""
    with torch.inference_mode():
        return score(crops).float()


def explainer(engine: Engine) -> TorchEngine | None:
    """The torch engine that can show pictures for this engine; None if there is none."""
    found = getattr(engine, "explainer", engine)
    return found if isinstance(found, TorchEngine) else None


def batches(crops: Tensor, most: int) -> Iterator[Tensor]:
    """The crops in order, at most so many at once."""
    for start in range(0, len(crops), most):
        yield crops[start : start + most]


def placed(network: nn.Module, precision: Precision, device: torch.device) -> nn.Module:
    """The network as the engine runs it: its bulk in the precision's dtype, channels last."""
    if precision != "fp32":
        network = cast("Detector", network).lower(DTYPES[precision])
    network.to(device)
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def best_precision(manifest: Manifest, device: torch.device) -> Precision:
    """The fastest that the hardware multiplies and the manifest was measured for."""
    if device.type == "cuda":
        return "fp16"
    # Without a budget of its own, bf16 was measured to be too far off when the model was published.
    return "bf16" if cpu_has_bf16() and "logit_bf16" in manifest.error_budget else "fp32"


def offers(manifest: Manifest, device: torch.device) -> list[str]:
    """The engines of this file that a device can run, as choose_engine.make names them."""
    if device.type == "cuda":
        return ["torch-fp16", "torch-eager-fp16"]
    return list(dict.fromkeys(("torch-fp32", f"torch-{best_precision(manifest, device)}")))


def unmeasured(device: torch.device) -> list[str]:
    """Those that `ralf bench engine` times as well, but nothing chooses: see PERFORMANCE.md."""
    if device.type != "cuda":
        return []
    return [f"{kind}-fp16" for kind, (_, blocks) in KINDS.items() if blocks != "plain"]


def weights_bytes(network: nn.Module) -> bytes:
    """weights.safetensors: every tensor, floats in FP16; a number FP16 cannot hold is refused."""
    tensors: dict[str, Tensor] = {}
    # Sorted: the same weights are the same bytes, and so the same version of the model.
    for name, tensor in sorted(network.state_dict().items()):
        kept = tensor.detach().cpu()
        if kept.is_floating_point():
            kept = kept.to(torch.float16)
            # Too large a number becomes infinite in FP16, without any error.
            if not kept.isfinite().all():
                most = tensor.detach().abs().max().item()
                raise EngineError(f"{name} holds {most:.3g}, FP16 ends at 65504")
        tensors[name] = kept.contiguous()
    data: bytes = save_tensors(tensors)
    return data


def restore(manifest: Manifest, weights: bytes) -> nn.Module:
    """The reference: the manifest's network with the weights on disk, in FP32, for inference."""
    try:
        # Fresh weights, about to be overwritten, must not move a training run's random state.
        with torch.random.fork_rng(devices=[]):
            network = build(manifest.network.build, **manifest.network.dimensions)
    except ValueError as error:
        raise EngineError(f"{manifest.name}: {error}") from error
    if network.size != manifest.input.size:
        raise EngineError(
            f"{manifest.name}: the network takes {network.size} px, "
            f"the input contract cuts {manifest.input.size} px"
        )
    try:
        network.load_state_dict(load_tensors(weights))
    except (RuntimeError, SafetensorError) as error:
        raise EngineError(f"{manifest.name}: weights do not fit the network: {error}") from error
    return network.eval().requires_grad_(False)


@torch.inference_mode()
def logits_of(network: nn.Module, crops: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The network's logits for any number of crops, on the CPU, in small batches."""
    parts = [network(part) for part in batches(torch.from_numpy(crops), 4)]
    logits: NDArray[np.float32] = torch.cat(parts).float().numpy()
    return logits


def reference_logits(
    manifest: Manifest, weights: bytes, crops: NDArray[np.uint8]
) -> NDArray[np.float32]:
    """What golden.npz holds: the FP16 weights on disk, run in FP32."""
    return logits_of(restore(manifest, weights), crops)


def pack(
    network: nn.Module, draft: Manifest, crops: NDArray[np.uint8]
) -> tuple[Manifest, dict[str, bytes]]:
    """A network as what `artifact.publish` takes, all but the card.

    The budget is the draft's `logit`, and what was measured here: FP32 may differ by rounding
    alone; bf16 by twice what it did, if that is no more than `logit`, and else not at all.
    """
    weights = weights_bytes(network)
    logits = reference_logits(draft, weights, crops)
    budget = {"logit": draft.error_budget["logit"]}
    budget["logit_fp32"] = min(budget["logit"], 1e-3 * max(1.0, float(np.abs(logits).max())))
    rounded = logits_of(placed(restore(draft, weights), "bf16", torch.device("cpu")), crops)
    error = 2 * float(np.abs(rounded - logits).max())
    if error <= budget["logit"]:
        budget["logit_bf16"] = round(max(error, 1e-3), 6)
    manifest = draft.model_copy(update={"error_budget": budget})
    files = {"weights.safetensors": weights, "golden.npz": Golden(crops, logits).to_bytes()}
    return manifest, files
