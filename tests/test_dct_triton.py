"""The fused destructor: against SciPy in FP64, by triton's interpreter here and by a GPU there."""

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import scipy.fft
import torch
from numpy.typing import NDArray
from structlog.testing import capture_logs
from torch import Tensor

from ralf.kernels import dct, destructor
from ralf.kernels.dct import basis, destruct_reference, fusible
from ralf.kernels.destructor import destruct, destruct_residual
from tests.interpreted import Interpreter

Run = Callable[..., Any]
BAND = 2.0**-12
"""Half a step of FP16 below 1: what the rounding of a result alone may add."""


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    """One process for all tests here."""
    made = Interpreter()
    yield made
    made.close()


@pytest.fixture(params=["interpreted", pytest.param("cuda", marks=pytest.mark.gpu)])
def run(request: pytest.FixtureRequest) -> Run:
    """Runs a function of this module: on the CPU, interpreted, or on the GPU, compiled."""
    if request.param == "cuda":
        return lambda function, *arguments: function("cuda", *arguments)
    interpreter = request.getfixturevalue("interpreter")
    return lambda function, *arguments: interpreter(function, "cpu", *arguments)


class Made(NamedTuple):
    """What the kernels made, and what plain FP16 products make of the same."""

    destroyed: NDArray[np.float32]
    residual: NDArray[np.float16]
    plain: NDArray[np.float32]


@pytest.fixture(params=[0, 3], ids=["halves", "quarters in shares"])
def shares(request: pytest.FixtureRequest) -> int:
    """Each formulation of the kernels: shares of dct_quarters_triton, or 0 for dct_triton."""
    return request.param


def make(
    device: str, image: NDArray[Any], mask: NDArray[Any], layout: str = "plain", shares: int = 0
) -> Made:
    """By the kernels and plainly, on the device."""
    from ralf.kernels.dct_quarters_triton import destruct as by_quarters
    from ralf.kernels.dct_triton import destruct as by_halves

    pixels, weights = torch.from_numpy(image).to(device), torch.from_numpy(mask).to(device)
    matrix = basis(pixels.shape[-1], torch.float16, pixels.device)
    kept = (matrix @ dct.centred(pixels, torch.float16) @ matrix.T) * weights.half()
    plain = (matrix.T @ kept @ matrix).float() + 0.5 * weights[0, 0]
    fused = partial(by_quarters, shares=shares) if shares else by_halves
    destroyed, residual = fused(laid_out(pixels, layout), weights, torch.float32, torch.float16)
    assert residual is not None and destroyed.is_contiguous() and residual.is_contiguous()
    return Made(*(t.cpu().numpy() for t in (destroyed, residual, plain)))


def laid_out(pixels: Tensor, layout: str) -> Tensor:
    """The same pixels, elsewhere in memory."""
    if layout == "channels last":
        return pixels.contiguous(memory_format=torch.channels_last)
    if layout == "part of a larger image":
        larger = pixels.new_zeros((*pixels.shape[:-2], pixels.shape[-2] + 3, pixels.shape[-1] + 5))
        larger[..., 2:-1, 1:-4] = pixels
        return larger[..., 2:-1, 1:-4]
    if layout == "turned":
        return pixels.mT.contiguous().mT
    return pixels


def noise(*shape: int, seed: int = 0) -> NDArray[np.uint8]:
    """Bytes."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def uniform(size: int, seed: int = 1) -> NDArray[np.float32]:
    """A mask of 0..1."""
    return np.random.default_rng(seed).random((size, size), dtype=np.float32)


def exactly(image: NDArray[Any], mask: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Destroyed and residual by SciPy, FP64."""
    pixels = image / 255 if image.dtype == np.uint8 else image.astype(np.float64)
    spectrum = scipy.fft.dctn(pixels, axes=(-2, -1), norm="ortho") * mask
    destroyed = scipy.fft.idctn(spectrum, axes=(-2, -1), norm="ortho")
    return destroyed, np.abs(pixels - destroyed)


def check(made: Made, image: NDArray[Any], mask: NDArray[Any]) -> None:
    """Both outputs finite and within twice the error of plain FP16 products."""
    destroyed, residual = exactly(image, mask)
    allowed = 2 * (np.abs(made.plain - destroyed).max() + BAND)
    errors = {
        "destroyed": np.abs(made.destroyed - destroyed).max(),
        "residual": np.abs(made.residual - residual).max(),
    }

    assert np.isfinite(made.destroyed).all() and np.isfinite(made.residual).all()
    assert made.destroyed.shape == made.residual.shape == image.shape
    assert max(errors.values()) <= allowed, f"{errors}, allowed {allowed:.2e}"


@pytest.mark.parametrize(
    ("shape", "shares"),
    [
        (shape, shares)
        for shape in ((3, 1, 128, 128), (1, 1, 144, 144), (1, 3, 256, 256), (512, 512))
        for shares in (0, 1, 3)
        if not shares or shape[-1] <= 256
    ],
    ids=str,
)
def test_it_is_scipys_dct_masked_and_inverted(run: Run, shape: tuple[int, ...], shares: int):
    """Each class of sizes: a power of two or padded to one, smallest to largest; an odd batch."""
    image, mask = noise(*shape), uniform(shape[-1])
    made = run(make, image, mask, "plain", shares)

    check(made, image, mask)
    assert made.destroyed.std() > 0.05


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_floats_of_0_to_1_are_filtered_too(run: Run, dtype: type, shares: int):
    """As training gives them."""
    image = np.random.default_rng(2).random((2, 128, 128)).astype(dtype)
    mask = uniform(128)

    check(run(make, image, mask, "plain", shares), image, mask)


@pytest.mark.parametrize("layout", ["channels last", "part of a larger image", "turned"])
def test_any_strides_are_read(run: Run, layout: str, shares: int):
    """Bit for bit what the contiguous image gives."""
    image, mask = noise(2, 2, 128, 128), uniform(128)
    plain, made = (run(make, image, mask, way, shares) for way in ("plain", layout))

    np.testing.assert_array_equal(plain.destroyed, made.destroyed)
    np.testing.assert_array_equal(plain.residual, made.residual)


def corner(size: int, row: int, column: int) -> NDArray[np.float32]:
    """A mask that keeps one coefficient."""
    mask = np.zeros((size, size), np.float32)
    mask[row, column] = 1
    return mask


@pytest.mark.parametrize(
    "mask",
    [np.ones((144, 144), np.float32), np.zeros((144, 144), np.float32)]
    + [corner(144, *at) for at in ((0, 0), (0, 143), (143, 0), (143, 143), (72, 71))],
    ids=["all", "none", "mean", "last column", "last row", "last", "middle"],
)
def test_masks_at_their_ends_are_exact_filters(run: Run, mask: NDArray[np.float32], shares: int):
    """Everything kept, nothing kept, one coefficient kept."""
    image = noise(1, 144, 144)

    check(run(make, image, mask, "plain", shares), image, mask)


def refused(device: str) -> str:
    """What quarters say of crops that are too large."""
    from ralf.kernels.dct_quarters_triton import destruct as by_quarters

    pixels, mask = torch.zeros(272, 272, device=device), torch.ones(272, 272, device=device)
    try:
        by_quarters(pixels, mask, torch.float32, None)
    except ValueError as error:
        return str(error)
    return ""


def test_quarters_refuse_what_does_not_fit_into_registers(run: Run):
    """Above 256 pixels a side."""
    assert run(refused) == "quarters take crops of up to 256 pixels a side, got 272"


@pytest.mark.parametrize("value", [0, 255])
def test_black_and_white_stay_in_range(run: Run, value: int, shares: int):
    """The largest mean there is, at the largest size that one program row covers in a test."""
    image, mask = np.full((1, 256, 256), value, np.uint8), np.ones((256, 256), np.float32)
    made = run(make, image, mask, "plain", shares)

    np.testing.assert_allclose(made.destroyed, value / 255, rtol=0, atol=2 * BAND)
    np.testing.assert_allclose(made.residual, 0, atol=2 * BAND)


def gradients(device: str, image: NDArray[Any], mask: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """Of a loss of both outputs, by the op as registered for CUDA, and by plain FP64 autograd.

    Which way |x − x̂| slopes is the op's to say: near zero it is a matter of rounding.
    """
    if device == "cpu":  # let the op take the kernels here as it does there
        destructor.destruct_residual_op.register_kernel("cpu")(
            destructor._destruct_residual_on_cuda
        )
    found = {}
    for way, dtype in (("op", torch.float32), ("exact", torch.float64)):
        x = torch.from_numpy(image).to(device, dtype).requires_grad_()
        m = torch.from_numpy(mask).to(device, dtype).requires_grad_()
        if way == "op":
            with capture_logs() as events:
                destroyed, residual = destruct_residual(x, m, True)
            assert not events, f"the reference ran: {events}"
            assert (destroyed.dtype, residual.dtype) == (torch.float32, torch.float16)
            slope = (x - destroyed).detach().sign()
        else:
            destroyed = destruct_reference(x, m)
            residual = (x - destroyed) * slope
        loss = (destroyed.square().mean() + residual.to(dtype).mean()) * 3
        loss.backward()
        found |= {f"{way} image": x.grad.cpu().numpy(), f"{way} mask": m.grad.cpu().numpy()}
    return found


def test_training_gets_the_gradients_of_the_formula(run: Run):
    """To pixels and mask, FP32, as FP64 autograd has them."""
    found = run(gradients, noise(2, 128, 128).astype(np.float32) / 255, uniform(128))
    for name in ("image", "mask"):
        exact, got = found[f"exact {name}"], found[f"op {name}"]

        assert got.dtype == np.float32
        assert np.abs(got - exact).max() <= 0.005 * np.abs(exact).max(), name


def checked(device: str, image: NDArray[Any]) -> None:
    """torch's own check of the op with the kernels behind it."""
    if device == "cpu":
        destructor.destruct_op.register_kernel("cpu")(destructor._destruct_on_cuda)
        destructor.destruct_residual_op.register_kernel("cpu")(
            destructor._destruct_residual_on_cuda
        )
    pixels = torch.from_numpy(image).to(device)
    mask = torch.rand(image.shape[-2:], device=device)
    torch.library.opcheck(torch.ops.ralf.destruct.default, (pixels, mask.half()))
    torch.library.opcheck(
        torch.ops.ralf.destruct_residual.default, (pixels, mask.requires_grad_(), True)
    )


def test_the_ops_are_registered_as_torch_wants_them(run: Run):
    """Schema, fake implementation and tracing agree with what the kernels give."""
    run(checked, noise(1, 128, 128))


def test_only_what_the_kernels_are_written_for_goes_to_them():
    """FP16, square, 128 to 512 by 16; anything else is the reference's."""

    def goes(*shape: int, image: torch.dtype = torch.uint8, products=torch.float16) -> bool:
        return fusible(torch.empty(shape, dtype=image), products)

    assert all(goes(1, 3, n, n) for n in (128, 144, 256, 512))
    assert not any(goes(1, 3, n, n) for n in (112, 136, 250, 528))
    assert not goes(1, 256, 128)
    assert not goes(0, 3, 128, 128)
    assert not goes(128, 128, products=torch.float32)
    assert not goes(128, 128, products=torch.bfloat16)
    assert not goes(128, 128, image=torch.float64)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if no kernel had been looked for yet."""
    monkeypatch.setattr(destructor, "_unbuildable", set())
    looked_up = destructor._fused
    looked_up.cache_clear()
    yield
    looked_up.cache_clear()


def both(image: Tensor, mask: Tensor) -> list[Tensor]:
    """What the ops do for a CUDA tensor."""
    return [
        destructor._destruct_on_cuda(image, mask.half()),
        *destructor._destruct_residual_on_cuda(image, mask, True),
    ]


@pytest.mark.usefixtures("fresh")
def test_without_triton_the_reference_runs_and_the_log_says_so_once(
    monkeypatch: pytest.MonkeyPatch,
):
    """A CPU-only install."""
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "ralf.kernels.dct_triton", raising=False)
    image, mask = torch.from_numpy(noise(1, 128, 128)), torch.rand(128, 128)
    with capture_logs() as events:
        found = [both(image, mask) for _ in range(2)]

    assert ["dct.reference_used"] == [event["event"] for event in events]
    assert "triton" in events[0]["reason"]
    expected = [destruct(image, mask.half()), *destruct_residual(image, mask, True)]
    for got in found:
        assert all(torch.equal(e, g) for e, g in zip(expected, got, strict=True))


@pytest.mark.usefixtures("fresh")
def test_a_kernel_that_cannot_be_built_is_not_tried_again(monkeypatch: pytest.MonkeyPatch):
    """At that size, on that device; the log says why."""
    tried: list[int] = []

    def broken(image: Tensor, *_: object) -> None:
        tried.append(image.shape[-1])
        raise dct.FusedKernelError("no room for the shared memory")

    monkeypatch.setattr(destructor, "_fused", lambda: broken)
    with capture_logs() as events:
        for size in (128, 128, 144):
            both(torch.from_numpy(noise(1, size, size)), torch.rand(size, size))

    assert [128, 144] == tried
    assert {"no room for the shared memory"} == {event["reason"] for event in events}
    assert 2 == len(events)


@pytest.mark.usefixtures("fresh")
def test_the_kernels_answer_where_they_can(monkeypatch: pytest.MonkeyPatch):
    """And what they are asked for is what the op promises."""
    asked: list[tuple[torch.dtype, torch.dtype | None]] = []

    def fused(image: Tensor, mask: Tensor, dtype: torch.dtype, residual: torch.dtype | None):
        asked.append((dtype, residual))
        made = torch.full(image.shape, 7.0, dtype=dtype)
        return made, None if residual is None else made.to(residual)

    monkeypatch.setattr(destructor, "_fused", lambda: fused)
    found = both(torch.from_numpy(noise(1, 128, 128)), torch.rand(128, 128))

    assert [(torch.float16, None), (torch.float32, torch.float16)] == asked
    assert [7.0] * 3 == [t.unique().item() for t in found]


def launches(size: int) -> set[tuple[Any, frozenset[tuple[str, int]]]]:
    """Kernels and options: every listed tiling at 256, where the comparison runs; or the chosen."""
    from ralf.kernels import dct_quarters_triton as quarters
    from ralf.kernels import dct_triton as halves

    pad = halves.padded_half(size)
    listed = (halves.CHOSEN[pad], *(halves.CANDIDATES if size == 256 else ()))
    found = {(halves._forward, frozenset(halves._options(t.forward).items())) for t in listed}
    found |= {(halves._inverse, frozenset(halves._options(t.inverse).items())) for t in listed}
    if pad <= quarters.LARGEST:
        found.add((quarters._quarter, frozenset(quarters.products(pad).items())))
        found.add((quarters._unfold, frozenset(quarters.SUM.items())))
    return found


@pytest.mark.parametrize("size", [128, 256, 512])
def test_every_listed_tiling_compiles_for_hopper_without_spilling(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """By Triton's own compiler and ptxas, which need no GPU; a spill is a stack."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    used = {
        f"{kernel.__name__} {sorted(options)}": compiled_for_hopper(kernel, size, options, tmp_path)
        for kernel, options in launches(size)
    }

    assert len(used) >= {128: 4, 256: 14, 512: 2}[size]
    assert {} == {name: stack for name, (stack, _) in used.items() if stack > 0}
    assert {} == {name: shared for name, (_, shared) in used.items() if shared > 227 * 1024}


def compiled_for_hopper(
    kernel: Any, size: int, options: frozenset[tuple[str, int]], folder: Path
) -> tuple[int, int]:
    """Bytes of stack and of shared memory on sm_90."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ralf.kernels.dct_triton import padded_half

    pointers = {"image": "*u8", "destroyed": "*fp32", "mask": "*fp32"}
    pointers |= dict.fromkeys(("halves", "turned", "spectrum", "quarters", "residual"), "*fp16")
    constants = {"N": size, "P": padded_half(size), "U8": True, "RESIDUAL": True, "stride_w": 1}
    constants |= dict(options)
    names = kernel.arg_names
    kinds = {n: "constexpr" if n in constants else pointers.get(n, "i32") for n in names}
    source = ASTSource(
        kernel,
        kinds,
        {(names.index(n),): value for n, value in constants.items() if n in names},
        {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in pointers},
    )
    built = triton.compile(
        source,
        target=GPUTarget("cuda", 90, 32),
        options={name: value for name, value in options if name not in names},
    )
    binary = folder / "kernel.cubin"
    binary.write_bytes(built.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    said = subprocess.run(
        [tool, "-res-usage", binary], capture_output=True, text=True, check=True
    ).stdout
    found = re.search(r"STACK:(\d+)", said)
    assert found is not None
    return int(found[1]), built.metadata.shared
