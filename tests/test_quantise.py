"""FP8 in the reconstructor's wide levels: what is rewritten, how logits move, who may run it."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from ralf.kernels import build as building
from ralf.kernels import build_rtx, engine_trt, verify
from ralf.kernels.artifact import Artifact, golden, open_artifact
from ralf.kernels.build import BuildRequest, build
from ralf.kernels.engine import EngineError
from ralf.kernels.engine_torch import TorchEngine, restore
from ralf.kernels.export import Built
from ralf.kernels.plans import Device
from ralf.kernels.untrained import patterns, publish_untrained
from ralf.kernels.verify import PlanRefused, variations

pytest.importorskip("onnxruntime", reason="the extra build brings it")

from ralf.kernels import export, quantise

SIZE = 64
LEVELS = ("encoders.1", "encoders.2", "decoders.1", "decoders.2")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """RALF, very narrow and untrained: two convolutions in each of the four wide stacks."""
    root = tmp_path_factory.mktemp("models")
    made = publish_untrained(root, name="tiny", base=4, blocks=1, size=SIZE, golden_crops=4)
    return open_artifact(made.path)


@pytest.fixture(scope="module")
def crops(artifact: Artifact) -> np.ndarray:
    """What the scales are found on."""
    return variations(golden(artifact).crops, 4, seed=3)


@pytest.fixture(scope="module")
def plain(artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It as an FP32 graph, so that nothing but FP8 will round."""
    path = tmp_path_factory.mktemp("onnx") / "tiny.onnx"
    network = restore(artifact.manifest, artifact.read("weights.safetensors"))
    export.write_onnx(network, path, most=8, precision="fp32")
    return path


@pytest.fixture(scope="module")
def graph(plain: Path, crops: np.ndarray) -> Path:
    """The same with FP8 in it."""
    path = Path(shutil.copy(plain, plain.with_name("fp8.onnx")))
    assert 8 == quantise.quantise(path, crops)
    return path


def rounded(values: Tensor, scale: Tensor) -> Tensor:
    """To FP8 and back, by torch."""
    return (values / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


def simulated(artifact: Artifact, crops: np.ndarray) -> nn.Module:
    """The module with the same rounding at the same places, in torch."""
    network = restore(artifact.manifest, artifact.read("weights.safetensors"))
    layers = [
        layer
        for name, layer in network.reconstructor.named_modules()
        if name.startswith(LEVELS) and isinstance(layer, nn.Conv2d)
    ]
    peaks: dict[nn.Module, Tensor] = {}

    def watch(layer: nn.Module, given: tuple[Tensor]) -> None:
        peaks[layer] = torch.maximum(peaks.get(layer, torch.zeros(())), given[0].abs().max())

    watching = [layer.register_forward_pre_hook(watch) for layer in layers]
    network(torch.from_numpy(crops))
    for hook in watching:
        hook.remove()
    for layer in layers:
        weight = layer.weight
        weight.data = rounded(weight, weight.abs().amax((1, 2, 3), keepdim=True) / 448)
        scale = (peaks[layer] / 448).clamp_min(2.0**-14)
        layer.register_forward_pre_hook(lambda _, given, scale=scale: rounded(given[0], scale))
    return network


def test_the_graph_computes_what_torch_does_with_the_same_rounding(
    artifact: Artifact, crops: np.ndarray, graph: Path
):
    """On other crops than those of the scales; and FP8 does move the logits."""
    others = patterns(4, SIZE, seed=9)
    expected = simulated(artifact, crops)(torch.from_numpy(others)).numpy()
    exact = restore(artifact.manifest, artifact.read("weights.safetensors"))
    got = export.logits(export.session(graph), others)

    moved = np.abs(got - exact(torch.from_numpy(others)).numpy()).max()
    assert 0 < moved
    # A sum that ends near the middle of two FP8 numbers may round either way in one of the two.
    assert np.abs(got - expected).max() < 0.1 * moved


def test_a_relu_before_a_pair_is_run(tmp_path: Path):
    """ONNX Runtime's optimiser would drop it; FP8 has negative numbers, unlike unsigned bytes."""
    node, info = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    kind = onnx.TensorProto
    fixed = [
        onnx.helper.make_tensor("four", kind.FLOAT, [], [4.0]),
        onnx.helper.make_tensor("one", kind.FLOAT, [], [1.0]),
        onnx.helper.make_tensor("zero", kind.FLOAT8E4M3FN, [], b"\0", raw=True),
    ]
    nodes = [
        node("Cast", ["crops"], ["numbers"], to=kind.FLOAT),
        node("Sub", ["numbers", "four"], ["centred"]),
        node("Relu", ["centred"], ["positive"]),
        node("QuantizeLinear", ["positive", "one", "zero"], ["small"]),
        node("DequantizeLinear", ["small", "one", "zero"], ["logits"]),
    ]
    ends = [info("crops", kind.UINT8, ["n"])], [info("logits", kind.FLOAT, ["n"])]
    graph = onnx.helper.make_graph(nodes, "relu", *ends, fixed)
    opset = [onnx.helper.make_opsetid("", 20)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=9), tmp_path / "x.onnx")

    got = export.session(tmp_path / "x.onnx")(np.arange(8, dtype=np.uint8))[0]
    assert [0, 0, 0, 0, 0, 1, 2, 3] == got.tolist()


def test_only_the_wide_stacks_are_in_fp8(graph: Path):
    """One scale for each output channel, biases as they were, and no wide copy of a weight."""
    model = onnx.load(graph)
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    small = [name for name in types if name.endswith(".weight_fp8")]

    assert 8 == len(small)
    for name in small:
        weight = name.removesuffix("_fp8")
        assert name.startswith(tuple(f"reconstructor.{level}." for level in LEVELS))
        assert onnx.TensorProto.FLOAT8E4M3FN == types[name] and weight not in types
        assert shapes[name][:1] == shapes[f"{weight}_scale"]
        assert onnx.TensorProto.FLOAT == types[weight.replace("weight", "bias")]
    assert {"reconstructor.enter.0.weight", "reconstructor.leave.weight"} <= types.keys()


def test_a_network_without_a_reconstructor_is_refused(tmp_path: Path):
    """The cure is in the message."""
    model = onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], []))
    onnx.save(model, tmp_path / "x.onnx")
    with pytest.raises(EngineError, match="build it in fp16"):
        quantise.quantise(tmp_path / "x.onnx", patterns(1, SIZE))


class OnGpu(BuildRequest):
    """An order whose device passes for a GPU."""

    @property
    def on_gpu(self) -> bool:
        return True


@pytest.fixture
def gpu(plain: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """An H200 and its builder, faked at their border; a plan gives what its graph gives."""
    state = SimpleNamespace(run=None, current=[], named=[])

    def compiled(graph: Path, size: int, buckets: tuple[int, ...], *, current: bool) -> Built:
        state.run = export.session(graph)
        state.current.append(current)
        return Built(b"plan", 0.5, {"tf32": False})

    def of(artifact: Artifact, key, content: bytes, buckets, *, device, front="plan"):
        class Engine:
            batching = SimpleNamespace(buckets=buckets)
            precision, name = key.precision, str(key)

            def __call__(self, crops: Tensor) -> Tensor:
                return torch.from_numpy(export.logits(state.run, crops.numpy()))

        made = Engine()
        made.artifact, made.device = artifact, "cpu"
        return made

    here = Device("NVIDIA H200", "sm90", {"rtx": "1.4.0.76"})
    for module in (building, verify, engine_trt):
        monkeypatch.setattr(module, "describe", lambda device: here)
    monkeypatch.setattr(engine_trt.TrtEngine, "of", of)
    # The graph that is there already: an export takes seconds.
    monkeypatch.setattr(export, "write_onnx", lambda _, path, **more: shutil.copy(plain, path))
    monkeypatch.setattr(build_rtx, "version", lambda: "1.4.0.76")
    monkeypatch.setattr(build_rtx, "build", compiled)
    monkeypatch.setattr(
        build_rtx, "check_structure", lambda content, names, weights: state.named.extend(names)
    )
    return state


def order(artifact: Artifact, budget: float) -> BuildRequest:
    """In FP8, under this budget."""
    artifact = open_artifact(artifact.path)
    artifact.manifest.error_budget["logit_fp8"] = budget
    return OnGpu(artifact, "fp8", (1, 8), crops=4, again=True, say=lambda line: None)


def test_a_plan_says_that_it_is_fp8_and_the_gate_decides(artifact: Artifact, gpu: SimpleNamespace):
    """By the model's own budget for the precision; one that is over it is not published."""
    made = build(order(artifact, 10.0))

    assert "rtx1.4.0.76-sm90-fp8-b8" == str(made.key) == made.record.key
    assert made.record.verified_on("sm90") and 10.0 == made.record.error["budget"]
    assert 8 == made.record.options["fp8_convolutions"]
    assert [True] == gpu.current and len(gpu.named) > 70
    error = made.record.error["golden"]
    assert 0 < error < 10
    made.path.unlink()
    (made.folder / f"{made.key}.json").unlink()
    with pytest.raises(PlanRefused, match=r"in fp8: logits of 4 golden crops differ by .*budget"):
        build(order(artifact, error / 2))
    assert not list(made.folder.glob("*.plan"))


def test_what_cannot_be_in_fp8_says_so(artifact: Artifact):
    """No GPU, the other builder, torch."""
    here = BuildRequest(artifact, "fp8", (1, 8), say=lambda line: None)
    for builder in (None, "rtx-aot"):
        with pytest.raises(EngineError, match="on the GPU that will run it"):
            build(here, builder)
    with pytest.raises(EngineError, match="--builder rtx-aot"):
        build(order(artifact, 1.0), "torch-tensorrt")
    with pytest.raises(EngineError, match="only a plan in fp8; see: ralf build --precision fp8"):
        TorchEngine.of(artifact, torch.device("cpu"), "fp8")
