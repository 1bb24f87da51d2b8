"""Plans by TensorRT-RTX's own builder, without a GPU: whole, and of what they should be of.

With REQUIRE_RTX=1, as `make plans` runs it, the shipped sizes are built as well.
"""

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("onnxruntime", reason="the extra build brings it")

from ralf.kernels import build_rtx, export, plans
from ralf.kernels.artifact import SHIPPED, resolve
from ralf.kernels.build import BuildRequest, build
from ralf.kernels.engine import EngineError
from ralf.kernels.untrained import publish_untrained
from ralf.worker.settings import Settings

SIZE = 32
REAL = pytest.mark.skipif(os.environ.get("REQUIRE_RTX") != "1", reason="make plans runs it")


class Small(nn.Module):
    """Two convolutions and a mean."""

    size = SIZE

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))

    def forward(self, crops: Tensor) -> Tensor:
        """Crops to logits."""
        x: Tensor = self.body((crops.float() / 255).half())
        return x.float().mean((1, 2, 3))


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It as an FP16 graph."""
    path = tmp_path_factory.mktemp("onnx") / "small.onnx"
    torch.manual_seed(0)
    network = Small().eval().requires_grad_(False)
    network.body.half()
    export.write_onnx(network, path, most=8, precision="fp16")
    return path


@pytest.mark.rtx
def test_a_graph_becomes_a_plan_of_the_whole_graph_without_a_gpu(graph: Path):
    """Each convolution by name, the weights' bytes, and nothing less than all of it."""
    made = build_rtx.build(graph, SIZE, (1, 8))
    names, weights = export.convolutions(graph)
    build_rtx.check_structure(made.content, names, weights)

    assert 2 == len(names)
    assert 2 * (8 * 27 + 8 + 8 * 72 + 8) <= weights < len(made.content)
    assert {"tf32": False, "strongly_typed": True, "profile": [1, 8, 8]} == made.options
    with pytest.raises(EngineError, match="it is not the whole network"):
        build_rtx.check_structure(made.content[:100], names, weights)
    with pytest.raises(EngineError, match="lacks 1 of 3 convolutions, first node_conv2d_99"):
        build_rtx.check_structure(made.content, [*names, "node_conv2d_99"], weights)
    with pytest.raises(EngineError, match="the graph's weights alone"):
        build_rtx.check_structure(made.content, names, len(made.content) + 1)


@pytest.mark.rtx
def test_the_key_names_version_and_architectures():
    """Those that its documentation gives, and the one it was seen on."""
    architectures = build_rtx.architectures()

    assert build_rtx.version().count(".") == 3
    assert {"sm80", "sm86", "sm89", "sm120"} <= set(architectures)
    assert build_rtx.version().startswith("1.4.") == ("sm90" in architectures)
    plans.Key("rtx", build_rtx.version(), architectures, "fp16", 64)


@pytest.mark.rtx
def test_a_batch_of_one_alone_needs_no_profile(tmp_path: Path):
    """A plan for batch 1."""
    network = Small().eval().requires_grad_(False)
    network.body.half()
    export.write_onnx(network, tmp_path / "one.onnx", most=1, precision="fp16")

    assert build_rtx.build(tmp_path / "one.onnx", SIZE, (1,)).content


@pytest.mark.rtx
@pytest.mark.parametrize(
    ("damage", "message"),
    [("floats in", "should take u8"), ("size", "should take u8"), ("bytes", "does not parse")],
)
def test_a_graph_that_is_no_detector_is_refused(graph: Path, tmp_path: Path, damage, message):
    """Another input, another size, no graph at all."""
    path = tmp_path / "wrong.onnx"
    model = onnx.load(graph)
    if damage == "floats in":
        kind = onnx.TensorProto.FLOAT16
        model.graph.input[0].type.tensor_type.elem_type = kind
    onnx.save(model, path)
    if damage == "bytes":
        path.write_bytes(b"not a graph")
    with pytest.raises(EngineError, match=message):
        build_rtx.build(path, SIZE + 1 if damage == "size" else SIZE, (1, 8))


def test_without_the_builder_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    """The extra build."""
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(EngineError, match=r"needs tensorrt_rtx.*\.\[build\]"):
        build_rtx.version()


@REAL
@pytest.mark.rtx
@pytest.mark.parametrize(
    ("name", "dimensions", "parameters"),
    [
        ("small", {"base": 16, "blocks": 4, "backbone": "tf_efficientnet_lite0"}, 4.3e6),
        ("full", {"base": 32, "blocks": 8, "backbone": "xception"}, 27e6),
    ],
)
def test_the_shipped_sizes_become_plans(tmp_path: Path, name: str, dimensions, parameters: float):
    """Exported, compared with the FP32 module by ONNX Runtime, built, published unverified."""
    artifact = publish_untrained(tmp_path, name=name, golden_crops=4, **dimensions)
    said: list[str] = []
    made = build(BuildRequest(artifact, crops=4, say=said.append), "rtx-aot")
    record = made.record

    assert "unverified" == record.state and (1, 8, 64) == record.buckets
    assert 0 < record.error["golden"] <= record.error["budget"]
    assert 4 == record.error["decisions"]
    assert record.size_bytes == len(made.read()) > 2 * parameters
    assert plans.covers(artifact, "sm90") and not plans.covers(artifact, "sm90-verified")
    assert np.isfinite(list(record.timing.values())).all()


@REAL
@pytest.mark.rtx
def test_the_model_that_ships_becomes_a_plan(tmp_path: Path):
    """Trained weights and real faces: rounding is another matter there."""
    shutil.copytree(SHIPPED, tmp_path / "models")
    artifact = resolve(tmp_path / "models", Settings().model)
    record = build(BuildRequest(artifact, crops=16), "rtx-aot").record

    assert 0 < record.error["golden"] <= artifact.manifest.error_budget["logit"]
    assert 16 == record.error["decisions"]
