"""FP8 for the reconstructor's wide levels: Q/DQ pairs around their convolutions in an ONNX graph.

The stacks at half and quarter size hold two thirds of the reconstructor's arithmetic, in channels
wide enough for FP8's tensor cores.  Each of their convolutions reads FP8 weights (E4M3), with one
scale for each output channel, and an FP8 activation with one scale for all.  A scale is the largest
absolute value over 448, for activations over the crops that are given.  Sums, biases, residual
additions and all other layers stay as they are.

Whether the logits stay accurate is not decided here: the graph, and then the plan, have to pass the
same gate as any other (ralf.kernels.verify).

INT8 is not offered.  TensorRT-RTX 1.4.0.76, the one that runs on an H200, parses INT8 convolutions
and then builds none: its code generator takes FP32, FP16, BF16 and FP8 E4M3.  For FP8 ones it asks
for a GPU, where none was built yet; its documentation names matrix products alone as supported.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ralf.kernels import export
from ralf.kernels.engine import EngineError

LEVELS = re.compile(r"reconstructor\.(encoders|decoders)\.[12]\..+\.weight")
"""Weights of the stacks at half and quarter size."""
LARGEST = 448.0
"""The largest number of E4M3."""
SMALLEST_SCALE = 2.0**-14
"""FP16's smallest normal number: a channel of zeros still needs a scale."""
Numbers = NDArray[np.floating[Any]]


def quantise(graph: Path, crops: NDArray[np.uint8]) -> int:
    """Rewrite a graph; activations' scales are found on the crops.  How many convolutions."""
    import onnx

    model = onnx.load(graph)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    chosen = [
        node
        for node in model.graph.node
        if node.op_type == "Conv" and LEVELS.fullmatch(node.input[1]) and node.input[1] in weights
    ]
    if not chosen:
        raise EngineError(
            "fp8 is for RALF's reconstructor: the graph has no convolution with a weight named as "
            "reconstructor.encoders.1.0.body.0.0.weight; build it in fp16"
        )
    kind = onnx.numpy_helper.to_array(weights[chosen[0].input[1]]).dtype
    read = list(dict.fromkeys(node.input[0] for node in chosen))
    peaks = _peaks(model, read, graph.with_suffix(".peaks.onnx"), crops)
    added = {name: _around(model, name, peaks[name].astype(kind)) for name in read}
    added |= {n.input[1]: _packed(model, weights[n.input[1]]) for n in chosen}
    _insert(model, chosen, added)
    onnx.save(model, graph)
    onnx.checker.check_model(graph, full_check=True)
    return len(chosen)


def _peaks(
    model: Any, names: list[str], probe: Path, crops: NDArray[np.uint8]
) -> dict[str, Numbers]:
    """The largest absolute value of each of these tensors over the crops."""
    import onnx
    from onnx import TensorProto, helper

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for name in names:
        ends = [f"{name}_abs", f"{name}_peak", f"{name}_peak_fp32"]
        copy.graph.node.extend(
            [
                helper.make_node("Abs", [name], ends[:1]),
                helper.make_node("ReduceMax", ends[:1], ends[1:2], keepdims=0),
                helper.make_node("Cast", ends[1:2], ends[2:], to=TensorProto.FLOAT),
            ]
        )
        copy.graph.output.append(helper.make_tensor_value_info(ends[2], TensorProto.FLOAT, []))
    onnx.save(copy, probe)
    run = export.session(probe)
    # One crop at a time, since a run holds every activation in question.
    found = np.array([run(crops[place : place + 1])[1:] for place in range(len(crops))])
    probe.unlink()
    if not np.isfinite(found).all():
        raise EngineError("an activation of the reconstructor is not finite, so it has no scale")
    return {name: np.asarray(found[:, place].max()) for place, name in enumerate(names)}


def _scale(peak: Numbers) -> Numbers:
    """For each peak; in its dtype, which is the graph's."""
    scale = np.maximum(peak.astype(np.float32) / LARGEST, SMALLEST_SCALE)
    return np.asarray(scale, peak.dtype)


def _stored(name: str, values: Numbers) -> Any:
    """Numbers as an initializer in E4M3, rounded to nearest; torch has the type, numpy has not."""
    from onnx import TensorProto, helper

    small = torch.tensor(values, dtype=torch.float32).clamp(-LARGEST, LARGEST)
    content = small.to(torch.float8_e4m3fn).view(torch.uint8).numpy().tobytes()
    return helper.make_tensor(name, TensorProto.FLOAT8E4M3FN, values.shape, content, raw=True)


def _around(model: Any, name: str, peak: Numbers) -> list[Any]:
    """An activation to FP8 and back."""
    from onnx import helper, numpy_helper

    scale, zero, small = (f"{name}_{part}" for part in ("scale", "zero", "fp8"))
    model.graph.initializer.extend(
        [numpy_helper.from_array(_scale(peak), scale), _stored(zero, np.zeros((), np.float32))]
    )
    return [
        helper.make_node("QuantizeLinear", [name, scale, zero], [small]),
        helper.make_node("DequantizeLinear", [small, scale, zero], [f"{name}_back"]),
    ]


def _packed(model: Any, tensor: Any) -> list[Any]:
    """A weight as FP8, and its way back; the wide one is removed."""
    from onnx import helper, numpy_helper

    name, whole = tensor.name, numpy_helper.to_array(tensor)
    scale = _scale(np.abs(whole).max(axis=(1, 2, 3)))
    steps = whole.astype(np.float32) / scale.astype(np.float32)[:, None, None, None]
    parts = [
        _stored(f"{name}_fp8", steps),
        numpy_helper.from_array(scale, f"{name}_scale"),
        _stored(f"{name}_zero", np.zeros(len(scale), np.float32)),
    ]
    model.graph.initializer.remove(tensor)
    model.graph.initializer.extend(parts)
    read = [part.name for part in parts]
    return [helper.make_node("DequantizeLinear", read, [f"{name}_back"], axis=0)]


def _insert(model: Any, chosen: list[Any], added: dict[str, list[Any]]) -> None:
    """Put the new nodes before the first convolution that reads them: a graph is in order."""
    names, nodes = {node.name for node in chosen}, []
    for node in model.graph.node:
        if node.name in names:
            for place in (0, 1):
                nodes += added.pop(node.input[place], [])
                node.input[place] += "_back"
        nodes.append(node)
    whole = [type(node).FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(whole)
