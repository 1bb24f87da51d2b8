"""The exported graph says what the module says, and where two graphs part is found by name."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from ralf.kernels.destructor import destruct
from ralf.kernels.diverge import (
    AT_ONCE,
    TOLERANCE,
    ModuleLayers,
    Tapped,
    first_divergence,
    relative,
)
from ralf.kernels.engine import EngineError
from ralf.kernels.networks import build
from ralf.kernels.networks.backbones import dtype_of, unit
from ralf.kernels.trace import trace
from ralf.kernels.untrained import patterns, settle

ort = pytest.importorskip("onnxruntime", reason="the extra build brings it")
from ralf.kernels import export  # noqa: E402 - it imports what may not be there

SIZE = 32


class Mini(nn.Module):
    """A detector with all that matters here: the op, a batch norm, an in-place activation."""

    def __init__(self, size: int = SIZE) -> None:
        super().__init__()
        self.size = size
        self.mask = nn.Parameter(torch.zeros(size, size))
        self.enter = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True))
        self.blocks = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(AT_ONCE))
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 1)

    def forward(self, crops: Tensor) -> Tensor:
        """Crops to logits."""
        destroyed = destruct(crops, self.mask.float().sigmoid())
        x = self.enter((unit(crops) - destroyed).abs().to(dtype_of(self.enter)))
        for block in self.blocks:
            x = x + 0.2 * block(x).relu()
        x = self.norm(x).float().mean((2, 3))
        logits: Tensor = self.head(x).squeeze(1)
        return logits

    def lower(self, dtype: torch.dtype) -> "Mini":
        """Convolutions in a smaller dtype."""
        for part in (self.enter, self.blocks, self.norm):
            part.to(dtype)
        return self


@pytest.fixture(scope="module")
def mini() -> Mini:
    """Fresh weights, settled, for inference."""
    torch.manual_seed(0)
    network = Mini()
    settle(network, patterns(4, SIZE))
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def graph(mini: Mini, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It as an FP32 graph."""
    path = tmp_path_factory.mktemp("onnx") / "mini.onnx"
    export.export(mini, path, most=8, precision="fp32")
    return path


def logits_of(network: nn.Module, crops: np.ndarray) -> np.ndarray:
    """By torch."""
    return network(torch.from_numpy(crops)).numpy()


@pytest.mark.parametrize("count", [1, 3, 8])
def test_a_graph_gives_the_modules_logits_for_any_batch(mini: Mini, graph: Path, count: int):
    """u8 in, FP32 out, by ONNX Runtime, which shares no code with torch."""
    crops = patterns(count, SIZE, seed=2)
    got = export.logits(export.session(graph), crops, at_once=count)

    assert (np.float32, (count,)) == (got.dtype, got.shape)
    np.testing.assert_allclose(logits_of(mini, crops), got, atol=1e-5)


def test_a_graph_has_its_ends_named_and_no_op_of_ours(graph: Path):
    """Any batch of u8 crops to FP32 logits; every node is ONNX's own."""
    model = onnx.load(graph)
    [crops], [logits] = model.graph.input, model.graph.output
    shape = [d.dim_param or d.dim_value for d in crops.type.tensor_type.shape.dim]

    assert ("crops", "logits") == (crops.name, logits.name)
    assert onnx.TensorProto.UINT8 == crops.type.tensor_type.elem_type
    assert onnx.TensorProto.FLOAT == logits.type.tensor_type.elem_type
    assert [3, SIZE, SIZE] == shape[1:] and isinstance(shape[0], str)
    assert {""} == {node.domain for node in model.graph.node}


def test_bf16_is_refused_because_nothing_here_can_check_it(mini: Mini, tmp_path: Path):
    """The cure is in the message."""
    with pytest.raises(EngineError, match="fp16 or fp32"):
        export.export(mini, tmp_path / "x.onnx", most=8, precision="bf16")


def test_the_whole_detector_in_fp16_agrees_within_its_rounding(tmp_path: Path):
    """RALF, very narrow, as it is built for a GPU."""
    torch.manual_seed(0)
    dimensions = {"base": 4, "blocks": 1, "backbone": "tf_efficientnet_lite0", "size": 64}
    network = build("ralf", **dimensions)
    settle(network, patterns(4, 64))
    network.eval().requires_grad_(False)
    crops = patterns(4, 64, seed=3)
    expected = logits_of(network, crops)
    path = tmp_path / "ralf.onnx"
    export.export(network.lower(torch.float16), path, most=8, precision="fp16")
    got = export.logits(export.session(path), crops)
    names, weights = export.convolutions(path)

    assert 0 < np.abs(got - expected).max() < 0.1 * max(1.0, np.abs(expected).max())
    assert len(names) > 70 and weights > 2 * sum(p.numel() for p in network.classifier.parameters())


def test_a_sound_graph_parts_from_its_module_nowhere(mini: Mini, graph: Path):
    """Its layers have the module's names, a folded batch norm's too."""
    layers = export.OnnxLayers(graph)
    shared = set(layers.names()) & set(ModuleLayers(mini).names())

    assert {"enter.0", "enter.1", "norm", "head", "blocks.0"} <= shared
    found = first_divergence(ModuleLayers(mini), layers, patterns(2, SIZE), TOLERANCE["fp32"])
    assert found is None


@pytest.mark.parametrize("layer", ["enter.0", "blocks.0", "blocks.9", "blocks.15"])
def test_a_damaged_graph_is_caught_at_its_first_wrong_layer(
    mini: Mini, graph: Path, tmp_path: Path, layer: str
):
    """One convolution's weights a tenth too large; all after it differ as well."""
    model = onnx.load(graph)
    for tensor in model.graph.initializer:
        if tensor.name.endswith(f"{layer}.weight"):
            damaged = onnx.numpy_helper.to_array(tensor) * np.float32(1.1)
            tensor.CopyFrom(onnx.numpy_helper.from_array(damaged, tensor.name))
            break
    else:
        pytest.fail(f"no weight of {layer} among {[t.name for t in model.graph.initializer]}")
    path = tmp_path / "damaged.onnx"
    onnx.save(model, path)
    found = first_divergence(
        ModuleLayers(mini), export.OnnxLayers(path), patterns(2, SIZE), TOLERANCE["fp32"]
    )

    assert found is not None and layer == found.layer
    assert 0.01 < found.difference and found.before < TOLERANCE["fp32"]
    assert layer in str(found)


def test_two_graphs_are_compared_as_well_as_a_graph_and_a_module(mini: Mini, graph: Path, tmp_path):
    """FP16 against FP32: rounding everywhere, and no layer that jumps."""
    from copy import deepcopy

    path = tmp_path / "half.onnx"
    export.export(deepcopy(mini).lower(torch.float16), path, most=8, precision="fp16")
    whole, half = export.OnnxLayers(graph), export.OnnxLayers(path)
    crops = patterns(2, SIZE)
    apart = relative(whole.values(crops, ["norm"])["norm"], half.values(crops, ["norm"])["norm"])

    assert 1e-5 < apart < 0.02
    assert first_divergence(whole, half, crops, TOLERANCE["fp16"]) is None


def test_rounding_that_drifts_is_named_where_it_has_grown_too_far():
    """No layer jumps; the first beyond four tolerances is told."""
    network = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(12)))

    class Drift:
        def __init__(self, rate: float) -> None:
            self.rate = rate

        def names(self):
            return [str(place) for place in range(len(network))]

        def values(self, crops, names):
            return {n: np.full(4, (1 + self.rate) ** (1 + int(n)), np.float32) for n in names}

    found = first_divergence(Drift(0), Drift(0.009), np.zeros(0, np.uint8), 0.01)

    assert found is not None and "4" == found.layer
    assert first_divergence(Drift(0), Drift(0.0001), np.zeros(0, np.uint8), 0.01) is None


def test_a_layer_that_gives_no_number_differs_by_all(mini: Mini):
    """NaN, and another shape."""
    one = np.ones(4, np.float32)

    assert float("inf") == relative(one, np.array([1, np.nan, 1, 1], np.float32))
    assert float("inf") == relative(one, np.ones(3, np.float32))
    assert 0 == relative(one * 0, one * 0)
    with pytest.raises(ValueError, match="no layer in common"):
        first_divergence(ModuleLayers(mini), SimpleNamespace(names=list), patterns(1, SIZE), 0.01)


def test_a_tapped_network_traces_to_the_values_of_its_layers(mini: Mini):
    """What a compiler is given to find the layer that it gets wrong; hooks leave nothing behind."""
    names = ["enter.0", "blocks.3", "head"]
    crops = patterns(3, SIZE)
    expected = ModuleLayers(mini).values(crops, names)
    program = trace(Tapped(mini, names), 8)
    got = program.module()(torch.from_numpy(crops))

    assert not any(module._forward_hooks for module in mini.modules())
    for name, value in zip(names, got, strict=True):
        np.testing.assert_allclose(expected[name], value.detach().numpy(), atol=1e-5)


def test_a_network_traces_with_further_inputs_of_the_same_batch():
    """What a plan behind the op takes beside the crops."""

    class Behind(nn.Module):
        size = SIZE

        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, crops: Tensor, *others: Tensor) -> Tensor:
            return (self.scale * crops.float() - others[0] + others[1]).mean((1, 2, 3))

    others = (torch.zeros(2, 3, SIZE, SIZE), torch.zeros(2, 3, SIZE, SIZE))
    program = trace(Behind(), 8, *others)
    crops = torch.from_numpy(patterns(5, SIZE))
    got = program.module()(crops, torch.ones(5, 3, SIZE, SIZE), torch.zeros(5, 3, SIZE, SIZE))

    torch.testing.assert_close(crops.float().mean((1, 2, 3)) - 1, got.detach())
