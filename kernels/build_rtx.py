"""TensorRT-RTX's own builder: a plan from an ONNX graph, on a machine without a GPU.

The builder compiles ahead of time for a range of architectures; the rest happens on the GPU, when
the plan is first loaded there.  Types are those of the graph (strongly typed), and FP32 products
stay FP32: TF32 would drop 13 bits of the frequencies that the destructor computes.

Without a GPU the runtime does not deserialise a plan (seen with 1.4.0.76: it asks for a CUDA
stream first).  What can be checked is checked: the parsed network's inputs and outputs, every
convolution of the graph by name inside the plan, and that the weights fit into it.
"""

import re
import time
from pathlib import Path
from typing import Any

from ralf import install_hint
from ralf.kernels.engine import EngineError
from ralf.kernels.export import Built


def version() -> str:
    """The builder's version, which the runtime must have too."""
    return str(_bindings().__version__)


def architectures() -> tuple[str, ...]:
    """The architectures on which a plan of this builder runs.

    By its documentation 8.0, 8.6, 8.9, 12.0 "and later".  9.0 is listed because a 1.4 plan ran on
    an H200; 1.7.1 refuses it.
    """
    hopper = ("sm90",) if version().startswith("1.4.") else ()
    return ("sm80", "sm86", "sm89", *hopper, "sm120")


def build(graph: Path, size: int, buckets: tuple[int, ...], *, current: bool = False) -> Built:
    """The plan of an ONNX graph, for any batch from 1 to the largest bucket.

    current: for the GPU at hand alone, which FP8's convolutions need.
    """
    trt = _bindings()
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        reasons = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise EngineError(f"TensorRT-RTX does not parse the graph: {reasons}")
    name = _check_ends(trt, network, size)
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    # Puts the layers' names into the plan, where check_structure finds them.
    config.profiling_verbosity = trt.ProfilingVerbosity.LAYER_NAMES_ONLY
    if current:
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.CURRENT, 0)
    # A graph for one crop has no dynamic dimension that a profile could describe.
    if buckets[-1] > 1:
        profile = builder.create_optimization_profile()
        # Optimise for the largest batch: it decides the throughput.
        smallest, largest = ((batch, 3, size, size) for batch in (1, buckets[-1]))
        profile.set_shape(name, smallest, largest, largest)
        config.add_optimization_profile(profile)
    start = time.perf_counter()
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineError("TensorRT-RTX built no plan (its reason is on stderr)")
    options = {"tf32": False, "strongly_typed": True, "profile": [1, buckets[-1], buckets[-1]]}
    return Built(bytes(plan), time.perf_counter() - start, options)


def check_structure(content: bytes, convolutions: list[str], weights_bytes: int) -> None:
    """EngineError unless the plan names every convolution and is large enough for the weights."""
    # A name is printable ASCII without the closing bracket; the bytes around it are arbitrary.
    named = set(re.findall(rb"\[ONNX Layer: ([\x21-\x5c\x5e-\x7e]+)\]", content))
    lacking = [name for name in convolutions if name.encode() not in named]
    if lacking or not convolutions:
        raise EngineError(
            f"the plan lacks {len(lacking)} of {len(convolutions)} convolutions"
            f"{', first ' + lacking[0] if lacking else ''}: it is not the whole network"
        )
    if len(content) < weights_bytes:
        raise EngineError(
            f"the plan has {len(content)} bytes, the graph's weights alone {weights_bytes}"
        )


def _check_ends(trt: Any, network: Any, size: int) -> str:
    """The input's name; EngineError unless u8 crops go in and FP32 logits come out."""
    if network.num_inputs == 1 and network.num_outputs == 1:
        crops, logits = network.get_input(0), network.get_output(0)
        batch, *_ = crops.shape
        took = (crops.dtype, tuple(crops.shape)[1:])
        gave = (logits.dtype, tuple(logits.shape))
        if took == (trt.DataType.UINT8, (3, size, size)) and gave == (trt.DataType.FLOAT, (batch,)):
            return str(crops.name)
    ends = [network.get_input(i) for i in range(network.num_inputs)]
    ends += [network.get_output(i) for i in range(network.num_outputs)]
    listed = ", ".join(f"{end.name} {end.dtype} {tuple(end.shape)}" for end in ends)
    raise EngineError(
        f"the graph should take u8 [m,3,{size},{size}], give FP32 [m]; it has {listed}"
    )


def _bindings() -> Any:
    try:
        import tensorrt_rtx
    except ImportError as error:
        raise EngineError(
            f"building ahead of time needs tensorrt_rtx, which does not import: {error}; "
            + install_hint("build")
        ) from error
    return tensorrt_rtx
