"""The DCT and the op ralf::destruct, against SciPy and against what a filter must obey."""

import numpy as np
import onnx
import pytest
import scipy.fft
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from ralf.kernels.dct import basis, dct2, destruct_reference, idct2
from ralf.kernels.destructor import destruct

SIZES = (256, 31, 1)
"""The production size, an odd one, one."""
ROUNDING = 1e-12


def pixels(*shape: int, seed: int = 0) -> Tensor:
    """FP64 noise in 0..1."""
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", SIZES)
def test_it_is_scipys_orthonormal_dct(size: int):
    """An outside oracle, to FP64's precision."""
    image = pixels(2, 3, size, size)
    expected = scipy.fft.dctn(image.numpy(), axes=(-2, -1), norm="ortho")

    assert np.abs(expected - dct2(image).numpy()).max() < ROUNDING * size


@pytest.mark.parametrize("size", SIZES)
def test_the_inverse_gives_the_image_back(size: int):
    """idct2 is dct2's inverse."""
    image = pixels(2, size, size)

    torch.testing.assert_close(idct2(dct2(image)), image, rtol=0, atol=ROUNDING)


def test_a_rectangle_has_a_basis_for_each_side():
    """Height and width need not be equal."""
    image = pixels(5, 8)
    expected = scipy.fft.dctn(image.numpy(), norm="ortho")

    assert np.abs(expected - dct2(image).numpy()).max() < ROUNDING


def test_the_basis_is_orthonormal_and_made_once():
    """D D^T = 1; the second asking costs nothing."""
    matrix = basis(64, torch.float64, torch.device("cpu"))

    torch.testing.assert_close(
        matrix @ matrix.T, torch.eye(64, dtype=torch.float64), rtol=0, atol=ROUNDING
    )
    assert matrix is basis(64, torch.float64, torch.device("cpu"))


def test_a_basis_first_made_in_inference_mode_can_be_trained_with():
    """The cache outlives the mode of whoever filled it."""
    with torch.inference_mode():
        dct2(torch.rand(1, 23, 23))
    image = torch.rand(1, 23, 23, requires_grad=True)
    dct2(image).square().sum().backward()

    torch.testing.assert_close(image.grad, 2 * image.detach())


@settings(max_examples=20, deadline=None)
@given(size=st.integers(1, 24), seed=st.integers(0, 999), cut=st.floats(0, 1))
def test_a_filter_keeps_what_it_should(size: int, seed: int, cut: float):
    """Full mask is identity, disjoint bands sum to the image, energy is the spectrum's."""
    image = pixels(2, 3, size, size, seed=seed)
    band = (pixels(size, size, seed=seed + 1) < cut).double()
    low, high = destruct(image, band), destruct(image, 1 - band)

    torch.testing.assert_close(destruct(image, torch.ones_like(band)), image, rtol=0, atol=1e-9)
    torch.testing.assert_close(low + high, image, rtol=0, atol=1e-9)
    torch.testing.assert_close(dct2(image).square().sum(), image.square().sum())
    torch.testing.assert_close(low.square().sum(), (dct2(image) * band).square().sum())


@pytest.mark.parametrize("size", SIZES)
def test_bytes_and_floats_mean_the_same_pixels(size: int):
    """u8 is scaled inside."""
    image = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    mask = torch.rand(size, size)
    expected = destruct(image.double() / 255, mask.double())

    assert torch.float32 == destruct(image, mask).dtype
    torch.testing.assert_close(destruct(image, mask).double(), expected, rtol=0, atol=2e-6)


def test_an_empty_batch_comes_back_empty():
    """No faces is an ordinary outcome."""
    empty = torch.zeros(0, 3, 8, 8, dtype=torch.uint8)

    assert destruct(empty, torch.ones(8, 8)).shape == (0, 3, 8, 8)


@pytest.mark.parametrize("size", [256, 31])
def test_half_precision_stays_within_twice_its_rounding(size: int):
    """Error against FP64 within the budget of a plain FP16 filter, and finite on white."""
    image = torch.randint(0, 256, (3, size, size), dtype=torch.uint8)
    mask = torch.rand(size, size).half()
    exact = destruct_reference(image, mask.double())
    matrix = basis(size, torch.float16, image.device)
    plain = matrix.T @ ((matrix @ (image / 255).half() @ matrix.T) * mask) @ matrix
    ours, theirs = ((x.double() - exact).abs().max() for x in (destruct(image, mask), plain))
    white = torch.full((1, 299, 299), 255, dtype=torch.uint8)

    assert ours <= theirs + 2**-11, f"ours {ours:.2e}, not centred {theirs:.2e}"
    assert ours < 1e-3
    torch.testing.assert_close(
        destruct(white, torch.ones(299, 299).half()).float(),
        torch.ones(1, 299, 299),
        rtol=0,
        atol=1e-3,
    )


def test_autocast_does_not_reach_into_the_op():
    """Training under bf16 autocast keeps the filter's FP32."""
    image, mask = torch.rand(1, 3, 32, 32), torch.rand(32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = destruct(image, mask)

    assert torch.equal(destruct(image, mask), inside)


def test_gradients_are_those_of_the_formula():
    """To image and mask, against finite differences."""
    image = pixels(2, 2, 6, 6).requires_grad_()
    mask = pixels(6, 6, seed=1).requires_grad_()

    assert torch.autograd.gradcheck(destruct, (image, mask))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_the_op_is_registered_as_torch_wants_it(dtype: torch.dtype):
    """Schema, fake implementation, autograd and tracing, by torch's own check."""
    image = (torch.rand(2, 3, 8, 8) * 255).to(dtype)
    image = image / 255 if dtype.is_floating_point else image

    torch.library.opcheck(torch.ops.ralf.destruct.default, (image, torch.rand(8, 8)))
    torch.library.opcheck(
        torch.ops.ralf.destruct.default, (image, torch.rand(8, 8, requires_grad=True))
    )


def test_a_mask_of_another_size_is_refused():
    """The message says what was expected and what came."""
    with pytest.raises(ValueError, match=r"image \(1, 3, 8, 8\), got .* \(4, 4\)"):
        destruct(torch.rand(1, 3, 8, 8), torch.rand(4, 4))


class Filter(nn.Module):
    """The op in a network."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.mask = nn.Parameter(torch.randn(size, size))

    def forward(self, crops: Tensor) -> Tensor:
        return destruct(crops, self.mask.sigmoid())


@pytest.mark.parametrize("warm", [False, True])
def test_it_exports_to_onnx_with_any_batch(warm: bool):
    """It is exported as plain products; ONNX's own evaluator agrees.  Cache cold and warm."""
    size = 17 + warm
    network, crops = Filter(size), torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    if warm:
        network(crops)
    program = torch.export.export(
        network, (crops,), dynamic_shapes=({0: torch.export.Dim("m", min=1, max=64)},)
    )
    assert "ralf" not in str(program.graph)
    model = torch.onnx.export(program, dynamo=True, verbose=False).model_proto
    onnx.checker.check_model(model)
    more = torch.randint(0, 256, (5, 3, size, size), dtype=torch.uint8)
    [got] = ReferenceEvaluator(model).run(None, {model.graph.input[0].name: more.numpy()})

    assert np.abs(network(more).detach().numpy() - got).max() < 1e-5
    assert basis(size, torch.float32, crops.device).sum().isfinite()
