"""torch-tensorrt: the whole network as one plan, built on the GPU that will run it.

It uses the flavour that is installed: `torch-tensorrt` brings standard TensorRT, whose builder
times its kernels on this GPU; `torch-tensorrt-rtx` has the same name and interface and brings
TensorRT-RTX.  Types are those of the traced network, FP32 products stay FP32 (see build_rtx), and
no part may fall back to torch: a plan is the whole network, or it is not built.

The destructor is either inside the plan, as plain matrix products, or runs before it as the fused
op, whose results the plan takes in addition to the crops.  ralf.kernels.build builds both and keeps
the faster.

Neither engine cache nor shared timing cache is used: torch-tensorrt keeps both as pickles in a
folder that any user can write.
"""

import tempfile
import time
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn

from ralf.kernels.engine import EngineError
from ralf.kernels.engine_trt import runtime_module
from ralf.kernels.export import Built, engine_errors, exported
from ralf.kernels.plans import Flavour

OPTIMIZATION = 5
"""TensorRT's highest: searches longest."""


class SplitNetwork(Protocol):
    """A network whose destructor can run separately, before the rest."""

    size: int

    def destroy(self, crops: Tensor) -> tuple[Tensor, ...]:
        """The fused op's results for the crops."""

    def follow(self, crops: Tensor, *destroyed: Tensor) -> Any:
        """All that comes after, its logit included."""


class AfterDestructor(nn.Module):
    """The network without its destructor: takes the op's results in addition to the crops."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.size = network.size

    def forward(self, crops: Tensor, *destroyed: Tensor) -> Tensor:
        logit: Tensor = cast("SplitNetwork", self.network).follow(crops, *destroyed).logit
        return logit


def flavour() -> Flavour:
    """The flavour of the torch-tensorrt that is installed."""
    return "rtx" if _library().ENABLED_FEATURES.tensorrt_rtx else "trt"


def version() -> str:
    """The version of TensorRT in it, which the runtime must have too."""
    _library()
    return str(runtime_module(flavour()).__version__)


def splits(network: nn.Module) -> bool:
    """Whether the destructor can run as an op before the plan, which then uses all its results."""
    # Without a guide nothing reads what was removed, and a plan cannot take an input that is not
    # used.
    guided = getattr(network, "guide", None) is not None
    return guided and hasattr(network, "destroy") and hasattr(network, "follow")


def build(
    network: nn.Module, buckets: tuple[int, ...], front: Literal["plan", "op"] = "plan"
) -> Built:
    """The plan of a network that is on its GPU, for any batch from 1 to the largest bucket."""
    library = _library()
    most = buckets[-1]
    others: tuple[Tensor, ...] = ()
    if front == "op":
        side = int(network.size)  # type: ignore[arg-type]
        device = next(network.parameters()).device
        # Two crops where batches vary, as in `exported`: one would be taken as a constant.
        blank = torch.zeros((min(2, most), 3, side, side), dtype=torch.uint8, device=device)
        with torch.no_grad():
            others = cast("SplitNetwork", network).destroy(blank)
        network = AfterDestructor(network)
    program = exported(network, most, *others)
    examples = [torch.zeros(0, dtype=torch.uint8), *others]
    shapes = [(3, network.size, network.size), *(tuple(other.shape[1:]) for other in others)]
    inputs = [
        library.Input(
            min_shape=(1, *shape), opt_shape=(most, *shape), max_shape=(most, *shape), dtype=x.dtype
        )
        for x, shape in zip(examples, shapes, strict=True)
    ]
    start = time.perf_counter()
    content = _convert(library, program, inputs)
    options: dict[str, Any] = {
        "tf32": False,
        "fp32_sums": True,
        "optimization_level": OPTIMIZATION,
        "profile": [1, most, most],
        "front": front,
    }
    return Built(bytes(content), time.perf_counter() - start, options)


def _convert(library: Any, program: torch.export.ExportedProgram, inputs: list[Any]) -> bytes:
    # The timing cache is a file of this build alone.
    with (
        tempfile.TemporaryDirectory(prefix="ralf-build-") as scratch,
        engine_errors("torch-tensorrt does not build the network"),
    ):
        content: bytes = library.dynamo.convert_exported_program_to_serialized_trt_engine(
            program,
            arg_inputs=inputs,
            require_full_compilation=True,
            # By default torch-tensorrt leaves blocks of fewer than five operations to torch.
            min_block_size=1,
            immutable_weights=True,
            disable_tf32=True,
            use_fp32_acc=True,
            optimization_level=OPTIMIZATION,
            cache_built_engines=False,
            reuse_cached_engines=False,
            timing_cache_path=str(Path(scratch) / "timing.bin"),
        )
    return content


def _library() -> Any:
    try:
        import torch_tensorrt
    except (ImportError, RuntimeError) as error:  # it asks for a CUDA device when imported
        raise EngineError(
            f"torch-tensorrt does not import here: {error}; it needs a GPU and the extra gpu "
            "(or gpu-rtx); a plan without a GPU: ralf build --builder rtx-aot"
        ) from error
    return torch_tensorrt
