"""The fused residual block: against FP64 convolutions, by triton's interpreter and by a GPU."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ralf.kernels.networks.reconstructor import Residual
from tests.interpreted import Interpreter

BAND = 2.0**-11
"""FP16's relative half step."""


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    """One process for all tests here."""
    made = Interpreter()
    yield made
    made.close()


@pytest.fixture(params=["interpreted", pytest.param("cuda", marks=pytest.mark.gpu)])
def run(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Runs a function of this module: on the CPU, interpreted, or on the GPU, compiled."""
    if request.param == "cuda":
        return lambda function, *arguments: function("cuda", *arguments)
    interpreter = request.getfixturevalue("interpreter")
    return lambda function, *arguments: interpreter(function, "cpu", *arguments)


def blocks(device: str, shape: tuple[int, ...], seed: int) -> dict[str, NDArray[Any]]:
    """One block of random weights and biases: fused, in plain FP16, and in FP64."""
    from ralf.kernels.residual_triton import Weights, residual

    torch.manual_seed(seed)
    block = Residual(shape[1])
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.1 if parameter.ndim > 1 else 0.5)
    block = block.half().to(device).requires_grad_(False)
    x = torch.randn(shape).half().to(device).contiguous(memory_format=torch.channels_last)
    made = {"fused": residual(x, Weights.of(block)), "plain": block(x)}
    made["exact"] = block.double()(x.double())
    return {name: tensor.cpu().double().numpy() for name, tensor in made.items()}


@pytest.mark.parametrize(
    "shape",
    [(2, 16, 4, 62), (1, 32, 33, 63), (1, 16, 1, 1)],
    ids=str,
)
def test_it_is_the_block_within_twice_its_rounding(run: Callable[..., Any], shape: tuple[int, ...]):
    """Strips and rows full, one over, and a single pixel; edges padded with zeros."""
    made = run(blocks, shape, sum(shape))
    errors = {name: np.abs(made[name] - made["exact"]).max() for name in ("fused", "plain")}
    allowed = 2 * (errors["plain"] + BAND * np.abs(made["exact"]).max())

    assert np.isfinite(made["fused"]).all()
    assert made["exact"].std() > 0.5
    assert errors["fused"] <= allowed, f"{errors}, allowed {allowed:.2e}"


def test_every_column_is_covered_once():
    """Full strips, and one that is just wide enough for what they leave."""
    from ralf.kernels.residual_triton import cut

    assert [(0, 4, 64), (248, 1, 16)] == cut(256)
    assert [(0, 1, 64)] == cut(62)
    assert [(0, 1, 64), (62, 1, 64)] == cut(62 + 61)
    assert [(0, 1, 32)] == cut(30)
    for width in range(1, 300):
        launches = cut(width)
        ends = [begin + strips * (lanes - 2) for begin, strips, lanes in launches]

        assert [0, *ends[:-1]] == [begin for begin, *_ in launches]
        assert ends[-1] >= width


def refusals(device: str) -> list[str]:
    """What it says of inputs that it does not take."""
    from ralf.kernels.residual_triton import Weights, residual

    weights = Weights.of(Residual(16))
    said = []
    for x in (
        torch.zeros(1, 16, 4, 4, device=device).half(),
        torch.zeros(1, 16, 4, 4, device=device).contiguous(memory_format=torch.channels_last),
        torch.zeros(1, 24, 4, 4, device=device)
        .half()
        .contiguous(memory_format=torch.channels_last),
    ):
        try:
            residual(x, weights)
        except ValueError as error:
            said.append(str(error))
    return said


def test_what_it_does_not_take_is_refused(run: Callable[..., Any]):
    """Other layouts, other dtypes, other widths."""
    layout, dtype, channels = run(refusals)

    assert "channels last, got torch.float16, strides" in layout
    assert "got torch.float32" in dtype
    assert "got 24" in channels
