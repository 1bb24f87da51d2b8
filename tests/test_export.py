"""The exported graph says what the module says, and where two graphs part is found by name."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from ralf.kernels.destructor import destruct
from ralf.kernels.engine import EngineError
from ralf.kernels.export import exported
from ralf.kernels.networks import build
from ralf.kernels.networks.backbones import dtype_of, unit
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
        self.blocks = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(16))
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
    export.write_onnx(mini, path, most=8, precision="fp32")
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
        export.write_onnx(mini, tmp_path / "x.onnx", most=8, precision="bf16")


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
    export.write_onnx(network.lower(torch.float16), path, most=8, precision="fp16")
    got = export.logits(export.session(path), crops)
    names, weights = export.convolutions(path)

    assert 0 < np.abs(got - expected).max() < 0.1 * max(1.0, np.abs(expected).max())
    assert len(names) > 70 and weights > 2 * sum(p.numel() for p in network.classifier.parameters())


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
    program = exported(Behind(), 8, *others)
    crops = torch.from_numpy(patterns(5, SIZE))
    got = program.module()(crops, torch.ones(5, 3, SIZE, SIZE), torch.zeros(5, 3, SIZE, SIZE))

    torch.testing.assert_close(crops.float().mean((1, 2, 3)) - 1, got.detach())
