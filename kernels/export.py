"""A network as torch.export and as ONNX give it: what every builder of plans starts from.

`exported` is the network for any batch from 1 to the largest.  Our own ops exist only in torch, so
they are replaced by the plain products that define them.  `write_onnx` makes an ONNX graph of
it: u8 crops in, FP32 logits out, dtypes as the network holds them.  The exporter folds batch norms
into their convolutions.

`session` runs a graph on the CPU.  ONNX Runtime has few FP16 kernels there: it computes in FP32 and
rounds between the nodes, as a tensor core with FP32 sums does.  It has no bf16 convolution, so such
a graph cannot be checked here and is refused.

If a graph disagrees with its network, `torch.onnx.verification.verify_onnx_program` with
compare_intermediates=True finds the value where they part; for a TensorRT plan,
`polygraphy run --onnx-outputs mark all` does.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ralf import install_hint
from ralf.kernels import dct
from ralf.kernels.engine import EngineError
from ralf.kernels.manifest import Precision

OPS = ("destruct", "destruct_residual")
INPUT, OUTPUT = "crops", "logits"
Run = Callable[[NDArray[np.uint8]], list[NDArray[np.float32]]]


@dataclass(frozen=True)
class Built:
    """A plan, and what its builder did."""

    content: bytes
    seconds: float
    options: dict[str, Any]


def exported(network: nn.Module, most: int, *others: Tensor) -> torch.export.ExportedProgram:
    """The network for batches of 1 to `most`; `others` are example inputs beside the crops."""
    side = int(network.size)  # type: ignore[arg-type]
    device = next(network.parameters()).device
    # Where batches vary the example has two crops: torch.export takes a batch of one as a constant.
    count = 2 if most > 1 else 1
    crops = torch.zeros((count, 3, side, side), dtype=torch.uint8, device=device)
    batch = {0: torch.export.Dim("batch", min=1, max=most)} if most > 1 else {}
    examples = (crops, *others)
    # A variadic forward takes what comes after the crops as one tuple.
    shapes = (batch, tuple(batch for _ in others)) if others else (batch,)
    with engine_errors("torch.export does not take the network"):
        program = torch.export.export(network, examples, dynamic_shapes=shapes)
    # ralf.kernels.destructor exports plain products; a network that calls torch.ops.ralf itself has
    # them replaced here, which torch 2.11 cannot.
    table = torch.export.default_decompositions()
    for name in OPS:
        table[getattr(torch.ops.ralf, name).default] = getattr(dct, f"{name}_reference")
    with engine_errors("torch.export does not decompose the network"):
        plain: torch.export.ExportedProgram = program.run_decompositions(table)
    return plain


@contextmanager
def engine_errors(what: str) -> Iterator[None]:
    """Turn any error of a library's exporter or builder into an EngineError."""
    try:
        yield
    # Ours has its message already; it must not be wrapped as a library's.
    except EngineError:
        raise
    # Their types are private (SpecViolationError) or mistakes in the library (UnboundLocalError in
    # torch-tensorrt 2.11), so no list of them would be complete.
    except Exception as error:
        raise EngineError(f"{what}: {type(error).__name__}: {error}") from error


def require_onnx() -> None:
    """EngineError, with what to install, where onnx or onnxruntime is missing."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise EngineError(
            f"building ahead of time needs onnx and onnxruntime: {error}; " + install_hint("build")
        ) from error


def write_onnx(network: nn.Module, path: Path, *, most: int, precision: Precision) -> None:
    """Write the network as an ONNX file, checked by onnx; beyond 2 GB weights lie beside it."""
    import onnx

    if precision == "bf16":
        raise EngineError(
            "this builder takes fp16 or fp32: ONNX Runtime, which checks the graph before it is "
            "built, has no bf16 convolution"
        )
    program = exported(network, most)
    with engine_errors("torch.onnx does not export the network"):
        made = torch.onnx.export(
            program, dynamo=True, verbose=False, input_names=[INPUT], output_names=[OUTPUT]
        )
    if made is None:
        raise EngineError("torch.onnx.export gave nothing")
    made.save(path)
    # By its path: a graph in memory is checked as one protobuf message, which ends at 2 GB.
    onnx.checker.check_model(path, full_check=True)


def session(path: Path) -> Run:
    """The graph on the CPU, by ONNX Runtime, with as many threads as torch uses here."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    # Errors alone.
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    # FP8's pairs only round here: fused, they would become integer convolutions, which lack FP8.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    # ONNX Runtime 1.31 drops a ReLU before a QuantizeLinear whose zero point is 0, as is right for
    # unsigned integers; FP8 has a sign, so negative numbers would pass.
    made = ort.InferenceSession(
        path,
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=["ReluQuantRewrite"],
    )

    def run(crops: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
        return [np.asarray(value, np.float32) for value in made.run(None, {INPUT: crops})]

    return run


def logits(run: Run, crops: NDArray[np.uint8], at_once: int = 4) -> NDArray[np.float32]:
    """The graph's logits for any number of crops."""
    parts = [run(crops[start : start + at_once])[0] for start in range(0, len(crops), at_once)]
    return np.concatenate(parts)


def convolutions(path: Path) -> tuple[list[str], int]:
    """The names of the graph's convolutions, and the bytes of its weights."""
    import onnx

    # Names and shapes suffice; the weights beside the file may be gigabytes.
    graph = onnx.load(path, load_external_data=False).graph
    names = [node.name for node in graph.node if node.op_type in ("Conv", "ConvTranspose")]
    weights = 0
    for tensor in graph.initializer:
        width = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)).itemsize
        weights += width * math.prod(tensor.dims)
    return names, weights
