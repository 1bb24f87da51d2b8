"""FDFL's network: the spectrum against JPEG's own, the fusions, every precision, export."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.fft import dctn
from torch import nn

from ralf.kernels.networks import build
from ralf.kernels.networks.backbones import FAMILIES, Backbone, Features, NetworkError
from ralf.kernels.networks.fdfl import (
    FUSIONS,
    SCALE,
    YCBCR,
    Fdfl,
    MiningBlock,
    Spectrum,
    StreamFusion,
)
from ralf.train.recipes import named
from tests.test_networks import cost, crops

SMALL = {"backbone": "tf_efficientnet_lite0", "size": 64, "fusion": "concat"}


def small(**changes: object) -> Fdfl:
    """A small FDFL for inference, the same each time."""
    torch.manual_seed(0)
    network = build("fdfl", **{**SMALL, **changes})
    assert isinstance(network, Fdfl)
    return network.eval()


def levels(pixels: np.ndarray) -> np.ndarray:
    """The spectrum of u8 pixels [h, w, 3] in JPEG's units: [plane, v, u, rows, columns]."""
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    found = Spectrum()(image)[0] * 255 / SCALE
    return found.reshape(3, 8, 8, *found.shape[1:]).numpy()


def blocks(plane: np.ndarray) -> np.ndarray:
    """Each block's DCT by SciPy, [v, u, rows, columns]."""
    height, width = plane.shape
    cut = plane.reshape(height // 8, 8, width // 8, 8).transpose(0, 2, 1, 3)
    return dctn(cut, axes=(2, 3), norm="ortho").transpose(2, 3, 0, 1)


def test_the_spectrum_is_scipys_dct_of_every_block(astronaut: np.ndarray):
    """Of Y − 128, Cb − 128 and Cr − 128, to FP32's rounding."""
    planes = np.einsum("pc,hwc->phw", np.array(YCBCR), astronaut.astype(np.float64))
    planes[0] -= 128
    expected = np.stack([blocks(plane) for plane in planes])

    np.testing.assert_allclose(levels(astronaut), expected, atol=2e-3)


def test_the_colours_are_pillows(astronaut: np.ndarray):
    """Pillow leaves the fractions of Y, Cb and Cr out: half a level at the DC, noise elsewhere."""
    planes = np.asarray(Image.fromarray(astronaut).convert("YCbCr"), np.float64) - 128
    expected = np.stack([blocks(planes[..., plane]) for plane in range(3)])

    off = np.abs(levels(astronaut) - expected)
    means = off[:, 0, 0].mean((1, 2))
    off[:, 0, 0] = 0

    assert ((2 < means) & (means < 6)).all()  # 8 × ½
    assert off.max() < 3


def test_a_jpeg_files_coefficients_are_found_at_their_frequencies(astronaut: np.ndarray):
    """A JPEG keeps multiples of its table's steps; each frequency here has a step of its own."""
    buffer = io.BytesIO()
    Image.fromarray(astronaut).convert("L").save(
        buffer, "JPEG", qtables=[[24 + 2 * place for place in range(64)]]
    )
    steps = table_of(buffer.getvalue())
    decoded = np.asarray(Image.open(buffer))
    fits = (decoded > 0) & (decoded < 255)  # a clipped pixel no longer says what was coded
    whole = fits.reshape(32, 8, 32, 8).all((1, 3))
    found = levels(np.repeat(decoded[..., None], 3, axis=2))[0]
    counts = found / steps[..., None, None]
    error = (np.abs(counts - counts.round()) * steps[..., None, None])[..., whole]
    turned = found / steps.T[..., None, None]
    other = (np.abs(turned - turned.round()) * steps.T[..., None, None])[..., whole]

    assert whole.mean() > 0.5
    assert (np.abs(counts.round()).sum((2, 3)) > 0).sum() > 12
    assert error.max() < 4  # pixels are rounded when decoded: a deviation of 0.29
    assert error.mean() < 0.3
    assert other.max() > 10  # rows and columns are not to be had the other way round


def table_of(jpeg: bytes) -> np.ndarray:
    """The quantisation table [v, u] that a JPEG file holds, in the standard's zigzag order."""
    at = jpeg.index(b"\xff\xdb") + 5
    order = sorted(
        ((v, u) for v in range(8) for u in range(8)),
        key=lambda place: (sum(place), place[0] if sum(place) % 2 else place[1]),
    )
    table = np.zeros((8, 8))
    for (v, u), step in zip(order, jpeg[at : at + 64], strict=True):
        table[v, u] = step
    return table


def test_a_frequency_keeps_its_blocks_in_their_places():
    """One bright block at row 2, column 5: only that place of the map differs."""
    flat = np.full((64, 64, 3), 127, np.uint8)
    bright = flat.copy()
    bright[16:24, 40:48] += 50
    moved = np.argwhere(np.abs(levels(bright) - levels(flat)).max((0, 1, 2)) > 1)

    assert [[2, 5]] == moved.tolist()


def test_statistics_of_the_spectrum_fit_fp16():
    """The most that a DC can vary, and half a level of the finest frequency."""
    extreme = torch.tensor([0.0, 1.0]).repeat_interleave(64 * 3).reshape(2, 3, 8, 8)
    most = Spectrum()(extreme)[:, 0].var().item()
    least = (0.5 * SCALE / 255) ** 2

    assert most < 65504
    assert float(torch.tensor(least).half()) == pytest.approx(least, rel=1e-3)


@pytest.mark.parametrize("backbone", sorted(FAMILIES))
def test_the_middle_flow_begins_at_a_sixteenth(backbone: str):
    """What is cut in two there computes what the whole does."""
    whole = Backbone(backbone, "mean").eval()
    features = whole.stem(torch.rand(2, 3, 96, 96))
    entered = whole.enter(features)

    assert (2, FAMILIES[backbone].channels, 6, 6) == entered.shape
    assert torch.equal(whole.rest(features), whole.leave(entered))


def test_the_mining_block_keeps_the_colours_apart_first():
    """Three groups, then one; half the side; as wide as it is to be fused."""
    block = MiningBlock(80).eval()
    first, second = block.apart[0], block.together[0]

    assert isinstance(first, nn.Conv2d) and isinstance(second, nn.Conv2d)
    assert (3, 1) == (first.groups, second.groups)
    assert (2, 80, 4, 4) == block(torch.rand(2, 192, 8, 8)).shape


@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_fusion_gives_a_logit_a_face(fusion: str):
    """And what the loss looks at: the pooled features that the head judges."""
    network, faces = small(fusion=fusion), crops(2)
    seen = network.trace(faces)

    assert isinstance(seen, Features)
    assert (2, 1280) == seen.embedding.shape
    assert torch.equal(network(faces), seen.logit)
    torch.testing.assert_close(network.backbone.head(seen.embedding).squeeze(1), seen.logit)


def test_fusions_do_what_they_say():
    """On maps of one number: the sum, the shut gate, the weighed mean."""
    pixels, frequencies = torch.full((1, 4, 2, 2), 2.0), torch.full((1, 4, 2, 2), 6.0)
    halfway = StreamFusion("attention", 4)
    for parameter in halfway.parameters():
        nn.init.zeros_(parameter)

    assert torch.equal(StreamFusion("sum", 4)(pixels, frequencies), torch.full_like(pixels, 8))
    assert torch.equal(StreamFusion("gate", 4)(pixels, frequencies), pixels)
    torch.testing.assert_close(halfway(pixels, frequencies), torch.full_like(pixels, 4))


def test_it_is_gated_where_nothing_else_is_said():
    """What is trained from a backbone begins as that."""
    network = build("fdfl", backbone="tf_efficientnet_lite0", size=32)

    assert "gate" == network.fuse.kind


def test_a_shut_gate_begins_as_the_backbone_and_can_open():
    """Frequencies change nothing at first, and the gradient reaches what would let them in."""
    gated = small(fusion="gate")
    alone = small(fusion="none")
    alone.backbone.load_state_dict(gated.backbone.state_dict())
    faces = crops(2)

    assert torch.equal(alone(faces), gated(faces))
    gated(faces).sum().backward()
    assert gated.fuse.factor.grad is not None and gated.fuse.factor.grad.abs().max() > 0


def test_the_recipes_gate_lets_the_mining_block_learn_from_the_first_step():
    """At 0, as it began before, the block's gradient is exactly 0."""
    recipe = named("fdfl_small")

    def dry(gate: float) -> set[str]:
        network = small(fusion="gate", gate=gate).train()
        network(crops(4)).sum().backward()
        return {n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()}

    assert any(name.startswith("mining.apart") for name in dry(0.0))
    assert {"mining.leave.bias"} >= dry(recipe.network.dimensions["gate"])
    assert ("fuse.factor*20",) == recipe.optimiser.rates == named("fdfl").optimiser.rates


def test_without_fusion_it_is_the_plain_classifier():
    """The row that the branch must beat has no weight more."""
    classifier = build("classifier", pool="mean", backbone="tf_efficientnet_lite0", size=64).eval()
    alone = small(fusion="none")
    alone.load_state_dict(classifier.state_dict())
    faces = crops(2)

    assert torch.equal(classifier(faces), alone(faces))


@pytest.mark.parametrize("fusion", ["concat", "sum", "attention"])
def test_gradients_reach_every_weight(fusion: str):
    """Both streams learn from one logit."""
    network = small(fusion=fusion).train()
    network(crops(4)).sum().backward()
    dry = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]

    assert [] == [name for name in dry if not name.endswith("mining.leave.bias")]


def test_the_frequencies_alone_have_a_head_that_takes_no_part_in_the_logit():
    """The same logit as without it; dropped pixels leave the frequencies alone to decide."""
    network = small(fusion="gate", gate=0.1, alone=True)
    without, faces = small(fusion="gate", gate=0.1), crops(4)
    left = without.load_state_dict(network.state_dict(), strict=False)
    found = network.streams(faces)

    assert {"alone.weight", "alone.bias"} == {*left.unexpected_keys} and not left.missing_keys
    assert torch.equal(without(faces), network(faces)) and torch.equal(found.logit, network(faces))
    network.train().streams(faces, plain=False).logit.sum().backward()
    stem, mining = network.backbone.stem, network.mining
    assert stem.conv_stem.weight.grad is None
    assert mining.leave.weight.grad.abs().max() > 0 and network.alone.weight.grad is None
    with pytest.raises(NetworkError, match="alone=true adds it"):
        without.streams(faces)
    with pytest.raises(NetworkError, match="fusion=none has none"):
        small(fusion="none", alone=True)


def test_the_sizes_of_both():
    """Xception's 20.8 M and 11.9 GFLOP, and what the branch adds to it; 2 GFLOP for the small."""
    full = cost(build("fdfl", fusion="concat").eval(), crops(1, 256))
    slim = cost(
        build("fdfl", backbone="tf_efficientnet_lite0", fusion="concat").eval(), crops(1, 256)
    )

    assert full == pytest.approx((20.81 + 1.65, 11.9 + 1.6), rel=0.01)
    assert slim == pytest.approx((3.85, 2.0), rel=0.01)


@pytest.mark.parametrize(
    ("dtype", "budget"), [(torch.bfloat16, 0.05), (torch.float16, 0.02), (torch.float32, 1e-4)]
)
def test_lowered_and_channels_last_it_agrees_with_fp32(dtype: torch.dtype, budget: float):
    """Spectrum and norm are taken in FP32 and rounded after."""
    network, faces = small(), crops(2)
    expected = network(faces)
    lowered = network.lower(dtype).to(memory_format=torch.channels_last)

    assert torch.float32 == lowered(faces).dtype == lowered.spectrum.kernels.dtype
    assert (lowered(faces) - expected).abs().max() < budget * max(1, expected.abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_also_runs_wholly_in_half_precision(dtype: torch.dtype):
    """network.to(dtype), as builders of engines do it."""
    assert small().to(dtype)(crops(2)).isfinite().all()


def test_autocast_leaves_the_spectrum_alone(astronaut: np.ndarray):
    """Training in bf16 sees the same fine detail."""
    image = torch.from_numpy(astronaut).permute(2, 0, 1)[None].float() / 255
    spectrum = Spectrum()
    with torch.autocast("cpu", torch.bfloat16):
        inside = spectrum(image)

    assert torch.equal(spectrum(image), inside)


def test_its_onnx_graph_gives_its_logits(tmp_path: Path):
    """As the builder exports it, for a batch that it was not traced with; ONNX Runtime runs it."""
    pytest.importorskip("onnxruntime")
    from ralf.kernels import export

    network, faces = small(size=32), crops(3, 32)
    export.write_onnx(network, tmp_path / "n.onnx", most=4, precision="fp32")
    got = export.logits(export.session(tmp_path / "n.onnx"), faces.numpy())

    np.testing.assert_allclose(network(faces).detach().numpy(), got, atol=1e-3)


@pytest.mark.parametrize(
    ("dimensions", "message"),
    [
        ({"size": 299}, "multiple of 16, at least 32, got 299"),
        ({"size": 16}, "at least 32"),
        ({"fusion": "magic"}, "one of gate, sum, concat, attention, none, got 'magic'"),
        ({"backbone": "vgg"}, "one of xception"),
    ],
)
def test_what_cannot_be_built_is_said(dimensions: dict[str, object], message: str):
    """Expected and got."""
    with pytest.raises(NetworkError, match=message):
        small(**dimensions)
