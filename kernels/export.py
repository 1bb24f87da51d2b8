"""A network as an ONNX graph, and that graph run on a CPU, all of it or layer by layer.

The export is torch's own (dynamo): any batch from 1 to the largest, u8 crops in, FP32 logits out,
dtypes as the network holds them, `ralf::destruct` taken apart into the matrix products that
it means.  Batch norms are folded into their convolutions by the exporter; the folded node keeps
the norm's name, which is how `OnnxLayers` finds a module's value in the graph.

ONNX Runtime has few FP16 kernels on a CPU: it computes in FP32 and rounds between the nodes, which
is what a tensor core with FP32 sums does.  It has no bf16 convolution, so such a graph cannot be
checked here and is refused.
"""

import ast
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import nn

from ralf.kernels.engine import EngineError
from ralf.kernels.manifest import Precision
from ralf.kernels.trace import trace

INPUT, OUTPUT = "crops", "logits"
_SCOPES = "pkg.torch.onnx.name_scopes"
Run = Callable[[NDArray[np.uint8]], list[NDArray[np.float32]]]
Session = Callable[[Path], Run]
"""Makes a graph runnable: ONNX Runtime here, a TensorRT builder and its runtime elsewhere."""


def export(network: nn.Module, path: Path, *, most: int, precision: Precision) -> None:
    """Write the network to the path and let onnx check the graph; beyond 2 GB, weights beside."""
    if precision == "bf16":
        raise EngineError(
            "this builder takes fp16 or fp32: ONNX Runtime, which checks the graph before it is "
            "built, has no bf16 convolution"
        )
    made = torch.onnx.export(
        trace(network, most),
        dynamo=True,
        verbose=False,
        input_names=[INPUT],
        output_names=[OUTPUT],
    )
    if made is None:
        raise EngineError("torch.onnx.export gave nothing")
    made.save(path)
    onnx.checker.check_model(path, full_check=True)


def session(path: Path) -> Run:
    """The graph on the CPU, by ONNX Runtime, as many threads as torch has here."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    made = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(crops: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
        return [np.asarray(value, np.float32) for value in made.run(None, {INPUT: crops})]

    return run


def logits(run: Run, crops: NDArray[np.uint8], at_once: int = 4) -> NDArray[np.float32]:
    """The graph's logits for any number of crops."""
    parts = [run(crops[start : start + at_once])[0] for start in range(0, len(crops), at_once)]
    return np.concatenate(parts)


def convolutions(path: Path) -> tuple[list[str], int]:
    """Names of the graph's convolutions, and the bytes of its weights."""
    graph = onnx.load(path, load_external_data=False).graph
    names = [node.name for node in graph.node if node.op_type in ("Conv", "ConvTranspose")]
    weights = 0
    for tensor in graph.initializer:
        width = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)).itemsize
        weights += width * math.prod(tensor.dims)
    return names, weights


class OnnxLayers:
    """A graph's layers by the names that they have in the torch module."""

    def __init__(self, path: Path, start: Session = session) -> None:
        self.path = path
        self.start = start
        # without the weights where those lie beside the graph
        self.model = onnx.load(path, load_external_data=False)
        self.outputs: dict[str, str] = {}
        for node in self.model.graph.node:
            scope = _scope(node)
            if scope:
                self.outputs.pop(scope, None)
                self.outputs[scope] = node.output[0]

    def names(self) -> Sequence[str]:
        """Modules that own a node, in the order of their last ones."""
        return list(self.outputs)

    def values(
        self, crops: NDArray[np.uint8], names: Sequence[str]
    ) -> Mapping[str, NDArray[np.float32]]:
        """A copy of the graph with these values as its only outputs, run."""
        asked = deepcopy(self.model)
        known = {value.name: value for value in (*asked.graph.value_info, *asked.graph.output)}
        wanted = [self.outputs[name] for name in names]
        del asked.graph.output[:]
        for value in dict.fromkeys(wanted):
            asked.graph.output.append(known.get(value) or onnx.ValueInfoProto(name=value))
        # In the same folder, where weights kept beside the graph are found.
        with tempfile.NamedTemporaryFile(dir=self.path.parent, suffix=".onnx") as probe:
            probe.write(asked.SerializeToString())
            probe.flush()
            values = self.start(Path(probe.name))(crops)
        found = dict(zip(dict.fromkeys(wanted), values, strict=True))
        return {name: found[value] for name, value in zip(names, wanted, strict=True)}


def _scope(node: onnx.NodeProto) -> str:
    """The innermost module that the node was traced in; empty for the outermost."""
    for entry in node.metadata_props:
        if entry.key == _SCOPES:
            scopes: list[str] = ast.literal_eval(entry.value)
            return scopes[-2] if len(scopes) > 1 else ""
    return ""
