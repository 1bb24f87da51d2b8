"""Other kernels for the residual blocks: they reach the blocks they are for, and nothing else."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs
from torch import Tensor, nn

from ralf.kernels import residual_blocks
from ralf.kernels.artifact import resolve
from ralf.kernels.choose_engine import candidates, make
from ralf.kernels.dct import FusedKernelError
from ralf.kernels.engine import EngineError
from ralf.kernels.engine_torch import KINDS, unmeasured
from ralf.kernels.networks.reconstructor import Reconstructor, Residual
from ralf.kernels.residual_blocks import BLOCKS, Blocks, use

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
OPS = ("convolution_relu", "residual_block")


def reconstructor(base: int, dtype: torch.dtype = torch.float32) -> Reconstructor:
    """As an engine places it: one block a stack, six stacks at three levels."""
    torch.manual_seed(0)
    network = Reconstructor(base, 1).to(dtype).eval().requires_grad_(False)
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each op was called, with how many channels."""
    counted: Counter[str] = Counter()
    for name in OPS:
        op = getattr(residual_blocks, name)

        def counting(x: Tensor, *rest: Tensor, op: Any = op, name: str = name) -> Tensor:
            counted[f"{name} {x.shape[1]}"] += 1
            made: Tensor = op(x, *rest)
            return made

        monkeypatch.setattr(residual_blocks, name, counting)
    return counted


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        ("cudnn", {f"convolution_relu {width}": 2 for width in (32, 64, 128)}),
        ("fused", {"residual_block 32": 2, "residual_block 64": 2}),
        ("fused32", {"residual_block 32": 2}),
        (
            "fused+cudnn",
            {"residual_block 32": 2, "residual_block 64": 2, "convolution_relu 128": 2},
        ),
    ],
)
def test_an_option_reaches_every_block_of_its_levels(
    blocks: Blocks, expected: dict[str, int], calls: Counter[str]
):
    """Encoders and decoders, with the plain network's result and the same state dict."""
    network = reconstructor(32, torch.float16)
    image, before = torch.rand(1, 3, 16, 16), list(network.state_dict())
    plain = network(image).image
    assert use(network, blocks, 256)
    calls.clear()
    made = network(image).image

    assert expected == calls
    assert before == list(network.state_dict())
    torch.testing.assert_close(made, plain, rtol=0, atol=2e-3)


def test_what_an_option_cannot_compute_stays_plain(calls: Counter[str]):
    """FP32, widths without a tiling, maps that are too narrow: and the caller is told."""
    for network, side in (
        (reconstructor(32), 256),
        (reconstructor(8, torch.float16), 256),
        (reconstructor(32, torch.float16), 64),
        (nn.Linear(3, 3), 256),
    ):
        assert not use(network, "fused", side)
        assert all(m.instead is None for m in network.modules() if isinstance(m, Residual))


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_a_level_that_is_wrong_stays_plain_and_is_logged(
    factor: float, monkeypatch: pytest.MonkeyPatch
):
    """Checked against the plain block when the option is turned on."""
    network, right = reconstructor(8), residual_blocks.by_cudnn
    monkeypatch.setattr(residual_blocks, "by_cudnn", lambda block, x: right(block, x) * factor)
    with capture_logs() as events:
        assert not use(network, "cudnn", 32)

    assert ["blocks.plain_used"] * 3 == [event["event"] for event in events]
    assert all(m.instead is None for m in network.modules() if isinstance(m, Residual))


def targets(graph: torch.fx.Graph) -> set[str]:
    """The ops of ours in it."""
    return {name for name in OPS for node in graph.nodes if f"ralf.{name}" in str(node.target)}


def test_an_export_takes_the_plain_blocks_and_a_compiled_network_the_others():
    """What a plan is built from holds none of our ops; torch.compile keeps them whole."""
    network, image = reconstructor(32, torch.float16), torch.rand(1, 3, 16, 16)
    assert use(network, "fused+cudnn", 256)
    seen: list[torch.fx.Graph] = []

    def collect(module: torch.fx.GraphModule, _: object) -> Any:
        seen.append(module.graph)
        return module.forward

    compiled = torch.compile(network, backend=collect, dynamic=False)
    torch.testing.assert_close(compiled(image).image, network(image).image)

    assert set() == targets(torch.export.export(network, (image,)).graph)
    assert set(OPS) == set().union(*map(targets, seen))


def test_the_ops_are_registered_as_torch_wants_them():
    """Schema, fake implementation and tracing agree with what they give."""
    from ralf.kernels.residual_triton import Weights

    block = Residual(4).requires_grad_(False)
    x = torch.rand(1, 4, 6, 6).contiguous(memory_format=torch.channels_last)
    first = block.body[0][0]
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.ralf.convolution_relu.default, (x, first.weight, first.bias), test_utils=tests
    )
    weights = tuple(w.float() for w in Weights.of(block, 2))
    torch.library.opcheck(torch.ops.ralf.residual_block.default, (x, *weights), test_utils=tests)


def test_a_kernel_that_cannot_be_built_is_tried_once_and_the_same_weights_run_plainly(
    monkeypatch: pytest.MonkeyPatch,
):
    """With one warning a width, not one a block."""
    kernels = residual_blocks._kernels()
    assert kernels is not None
    tried: list[torch.Size] = []

    def broken(x: Tensor, *_: object) -> Tensor:
        tried.append(x.shape)
        raise FusedKernelError("no C compiler")

    monkeypatch.setattr(kernels, "residual", broken)
    monkeypatch.setattr(residual_blocks, "_unbuildable", set())
    block = Residual(32).half().requires_grad_(False)
    x = torch.rand(1, 32, 2, 256).half()
    with capture_logs() as events:
        for _ in range(2):
            made = residual_blocks._residual_block_on_cuda(x, *kernels.Weights.of(block, 2))

    torch.testing.assert_close(made, block(x), rtol=0, atol=4e-3)
    assert 1 == len(tried)
    assert ["no C compiler"] == [event["reason"] for event in events]


def test_options_have_names_that_nothing_chooses_before_they_are_measured(tiny_models: Path):
    """`ralf bench engine` times them on CUDA; a recorded name loads one; a CPU refuses it."""
    tiny, names = resolve(tiny_models, "tiny"), unmeasured(CUDA)

    assert {f"torch-{blocks}-fp16" for blocks in BLOCKS[1:]} <= set(names)
    assert (False, "fused+cudnn") == KINDS["torch-eager-fused+cudnn"]
    assert {name.rpartition("-")[0] for name in names} | {"torch", "torch-eager"} == KINDS.keys()
    assert not set(names) & set(candidates(tiny, CPU)) and unmeasured(CPU) == []
    with pytest.raises(EngineError, match="blocks=cudnn is for CUDA"):
        make(tiny, CPU, "torch-cudnn-fp32")
