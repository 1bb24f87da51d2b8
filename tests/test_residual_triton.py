"""The fused residual block: against FP64 convolutions, by triton's interpreter and by a GPU."""

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ralf.kernels.networks.reconstructor import Residual
from ralf.kernels.residual_blocks import use
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


def random_block(device: str, channels: int) -> Residual:
    """With weights, biases and an activation of the same order of size, FP16."""
    block = Residual(channels)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.1 if parameter.ndim > 1 else 0.5)
    return block.half().to(device).requires_grad_(False)


def blocks(
    device: str, shape: tuple[int, ...], tiling: tuple[int, ...], programs: int
) -> dict[str, NDArray[Any]]:
    """One block of random weights and biases: fused, in plain FP16, and in FP64."""
    from ralf.kernels.residual_triton import Tiling, Weights, residual

    torch.manual_seed(sum(shape))
    block, chosen = random_block(device, shape[1]), Tiling(*tiling)
    x = torch.randn(shape).half().to(device).contiguous(memory_format=torch.channels_last)
    weights = Weights.of(block, chosen.pixels)
    made = {"fused": residual(x, weights, chosen, programs), "plain": block(x)}
    assert made["fused"].is_contiguous(memory_format=torch.channels_last)
    made["exact"] = block.double()(x.double())
    return {name: tensor.cpu().double().numpy() for name, tensor in made.items()}


@pytest.mark.parametrize(
    ("shape", "tiling", "programs"),
    [
        ((1, 32, 3, 34), (2, 16, 2, 4, 1), 1),
        ((2, 64, 2, 16), (1, 16, 64, 4, 1), 1),
        ((2, 16, 1, 17), (1, 16, 64, 4, 1), 132),
    ],
    ids=["pairs, strips and rows one over", "whole rows of two maps", "small maps, short programs"],
)
def test_it_is_the_block_within_twice_its_rounding(
    run: Callable[..., Any],
    shape: tuple[int, ...],
    tiling: tuple[int, ...],
    programs: int,
):
    """Pixels alone and in pairs; all four edges padded with zeros."""
    made = run(blocks, shape, tiling, programs)
    errors = {name: np.abs(made[name] - made["exact"]).max() for name in ("fused", "plain")}
    allowed = 2 * (errors["plain"] + BAND * np.abs(made["exact"]).max())

    assert np.isfinite(made["fused"]).all()
    assert made["exact"].std() > 0.5
    assert errors["fused"] <= allowed, f"{errors}, allowed {allowed:.2e}"


@pytest.mark.gpu
@pytest.mark.parametrize(("channels", "side"), [(32, 256), (64, 128)])
def test_on_a_gpu_every_listed_tiling_is_the_block(channels: int, side: int):
    """At the levels that they are for, and a batch of three."""
    from ralf.kernels.residual_triton import TILINGS, Weights, residual

    torch.manual_seed(0)
    block = random_block("cuda", channels)
    x = torch.randn(3, channels, side, side, device="cuda").half()
    x = x.contiguous(memory_format=torch.channels_last)
    exact, plain = block.double()(x.double()), block.half()(x)
    allowed = 2 * float((plain - exact).abs().max() + BAND * exact.abs().max())
    for tiling in TILINGS[channels]:
        made = residual(x, Weights.of(block, tiling.pixels), tiling)
        assert float((made - exact).abs().max()) <= allowed, str(tiling)


def refusals(device: str) -> list[str]:
    """What it says of inputs that it does not take."""
    from ralf.kernels.residual_triton import Tiling, Weights, residual

    tiling = Tiling(2, 16, 4, 4, 1)
    last = {"memory_format": torch.channels_last}
    said = []
    for x in (
        torch.zeros(1, 16, 4, 4, device=device).half(),
        torch.zeros(1, 16, 4, 4, device=device).contiguous(**last),
        torch.zeros(1, 24, 4, 4, device=device).half().contiguous(**last),
        torch.zeros(1, 16, 4, 5, device=device).half().contiguous(**last),
        torch.zeros(1, 32, 4, 4, device=device).half().contiguous(**last),
    ):
        try:
            residual(x, Weights.of(Residual(16), 2), tiling)
        except ValueError as error:
            said.append(str(error))
    return said


def test_what_it_does_not_take_is_refused(run: Callable[..., Any]):
    """Other layouts, dtypes and widths, and weights of another block."""
    layout, dtype, channels, width, weights = run(refusals)

    assert "channels last, got torch.float16, strides" in layout
    assert "got torch.float32" in dtype
    assert "got 24" in channels
    assert "a multiple of 2 pixels" in width and "got width 5" in width
    assert "packed for that many" in weights and "[3, 64, 32]" in weights


def test_a_level_gets_the_first_tiling_that_fits_its_width():
    """A narrow map would compute mostly zeros; other widths than 32 and 64 have none."""
    from ralf.kernels.residual_triton import TILINGS, tiling_of

    assert TILINGS[32][0] == tiling_of(32, 256)
    assert TILINGS[64][0] == tiling_of(64, 128)
    narrow = tiling_of(32, 128)
    assert narrow is not None and narrow.pixels * narrow.groups <= 128
    assert tiling_of(32, 32) is None and tiling_of(8, 256) is None and tiling_of(128, 64) is None


@pytest.mark.gpu
@pytest.mark.parametrize("blocks", ["cudnn", "fused"])
def test_on_a_gpu_a_reconstructor_with_the_option_agrees_with_itself(blocks: str):
    """To FP16's rounding through all its blocks, eager and compiled."""
    from ralf.kernels.networks.reconstructor import Reconstructor

    torch.manual_seed(0)
    network = Reconstructor(32, 1).half().cuda().requires_grad_(False)
    network = network.to(memory_format=torch.channels_last)
    image = torch.rand(2, 3, 256, 256, device="cuda")
    with torch.inference_mode():
        expected = network(image).image
        assert use(network, blocks, 256)
        compiled = torch.compile(network, dynamic=False)
        for made in (network(image).image, compiled(image).image):
            torch.testing.assert_close(made, expected, rtol=0, atol=4e-3)


@pytest.mark.parametrize("channels", [32, 64])
def test_the_first_tilings_compile_for_hopper_without_spilling(
    channels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """By Triton's own compiler and ptxas, which need no GPU; a spill is a stack."""
    from ralf.kernels.residual_triton import TILINGS

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    used = compiled_for_hopper(channels, TILINGS[channels][0], tmp_path)

    assert used["stack"] == 0
    assert used["shared"] <= 227 * 1024
    assert used["wgmma"] > 0


def compiled_for_hopper(channels: int, tiling: Any, folder: Path) -> dict[str, int]:
    """What the second launch, the larger one, takes on sm_90.

    For every listed tiling: python -m tests.test_residual_triton
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ralf.kernels.residual_triton import _convolve

    width = channels * tiling.pixels
    constants = {"C": width, "SIDE": channels, "GROUPS": tiling.groups, "LAST": True}
    tiles = dict.fromkeys(("x", "out"), f"tensordesc<fp16[1,1,{tiling.groups},{width}]>")
    tiles["sides"] = f"tensordesc<fp16[1,1,{tiling.groups},{channels}]>"
    pointers = ("weights", "bias", "identity")
    names = _convolve.arg_names
    kinds = {n: tiles.get(n, "*fp16" if n in pointers else "i32") for n in names}
    source = ASTSource(
        _convolve,
        kinds | dict.fromkeys(constants, "constexpr"),
        {(names.index(n),): value for n, value in constants.items()},
        {(names.index(n),): [["tt.divisibility", 16]] for n in (*pointers, "H", "W")},
    )
    options = {"num_warps": tiling.warps, "num_stages": tiling.stages}
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    binary = folder / "kernel.cubin"
    binary.write_bytes(built.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    said = subprocess.run(
        [tool, "-res-usage", binary], capture_output=True, text=True, check=True
    ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert found is not None
    return {
        "registers": int(found[1]),
        "stack": int(found[2]),
        "shared": built.metadata.shared,
        "wgmma": built.asm["ptx"].count("wgmma.mma_async"),
    }


if __name__ == "__main__":
    import tempfile

    from ralf.kernels.residual_triton import TILINGS

    with tempfile.TemporaryDirectory() as made:
        for width, listed in TILINGS.items():
            for one in listed:
                print(width, one, compiled_for_hopper(width, one, Path(made)), flush=True)
