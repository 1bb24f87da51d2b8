"""Pictures of what was learnt: each says what its numbers say, and all fit on one page."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.fft import dctn
from torch import Tensor, nn

from ralf.kernels.manifest import InputContract, Sampling
from ralf.kernels.networks import build
from ralf.train.evaluate.figures import (
    embedding_figure,
    features_of,
    grad_cam,
    last_convolution,
    last_linear,
    mask_figure,
    png,
    reliability_figure,
    roc_figure,
    spectrum_ratio,
    strips_figure,
)
from ralf.train.evaluate.judge import (
    JudgedModel,
    evaluation_of,
    examples_for,
    model_of_network,
    score_examples,
)
from ralf.train.evaluate.metrics import Scored
from ralf.train.evaluate.page import write_page
from tests.faces_on_disk import faces

CONTRACT = InputContract(size=64, sampling=Sampling(max_frames=2))


def shape(figure) -> tuple[int, ...]:
    return np.asarray(Image.open(io.BytesIO(png(figure)))).shape


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return build("ralf", base=8, blocks=1, backbone="tf_efficientnet_lite0", size=64).eval()


class Corner(nn.Module):
    """Calls forged whatever is bright at the top left."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.maps = nn.Conv2d(4, 2, 3, padding=1)
        self.head = nn.Linear(2, 1)
        nn.init.constant_(self.stem.weight, 0.2)
        nn.init.constant_(self.stem.bias, 0.0)
        nn.init.constant_(self.maps.weight, 0.05)
        nn.init.constant_(self.maps.bias, 0.0)
        nn.init.constant_(self.head.weight, 1.0)

    def forward(self, crops: Tensor) -> Tensor:
        maps = self.maps(self.stem(crops.float() / 255))
        return self.head(maps.mean(dim=(2, 3)))[:, 0]


def test_grad_cam_points_at_the_evidence():
    """A bright patch moves the decision, and the heat lies on it."""
    crops = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    crops[:, :, 4:10, 4:10] = 255
    heat = grad_cam(Corner(), crops)[0]

    assert heat[4:10, 4:10].mean() > 0.5 and heat[16:, 16:].max() < 0.05
    assert (heat >= 0).all() and heat.max() <= 1 + 1e-6


def test_grad_cam_works_on_frozen_weights_and_leaves_no_gradient(network):
    """An artifact's network does not require gradients."""
    frozen = Corner().requires_grad_(False)
    crops = torch.randint(0, 255, (2, 3, 32, 32), dtype=torch.uint8)

    assert grad_cam(frozen, crops).shape == (2, 32, 32)
    assert all(parameter.grad is None for parameter in frozen.parameters())
    assert grad_cam(network, crops.repeat(1, 1, 2, 2)).shape == (2, 64, 64)


@pytest.mark.parametrize(
    ("name", "dimensions"),
    [
        ("ralf", {"base": 4, "blocks": 1, "backbone": "xception"}),
        ("ralf", {"base": 4, "blocks": 1, "backbone": "tf_efficientnet_lite0"}),
        ("fdfl", {"backbone": "tf_efficientnet_lite0"}),
    ],
)
def test_the_last_convolution_is_the_classifiers(name: str, dimensions: dict[str, object]):
    """Not RALF's guide nor FDFL's mining block, which stand later in the list of modules."""
    network = build(name, size=64, **dimensions).eval()
    layer = last_convolution(network, torch.zeros(1, 3, 64, 64, dtype=torch.uint8))

    assert layer.out_channels >= 1280
    assert last_linear(network).in_features == layer.out_channels


@pytest.mark.parametrize(
    ("name", "options", "last"),
    [
        ("ralf", {"base": 4, "blocks": 1}, "classifier.rest.conv4.pointwise"),
        ("ralf", {"base": 4, "blocks": 1, "sees": "bands"}, "classifier.rest.conv4.pointwise"),
        ("classifier", {}, "backbone.rest.conv4.pointwise"),
        ("fdfl", {}, "backbone.rest.conv4.pointwise"),
    ],
)
def test_grad_cam_shows_the_maps_that_are_pooled(name: str, options: dict, last: str):
    """Not the guide's, the residual's or the mining block's, which are listed after them."""
    network = build(name, backbone="xception", size=64, **options).eval()
    layer = network.get_submodule(last)
    seen: list[tuple[int, ...]] = []
    layer.register_forward_hook(lambda _module, _given, out: seen.append(tuple(out.shape)))
    crops = torch.randint(0, 255, (1, 3, 64, 64), dtype=torch.uint8)

    assert network.cam_layer is layer
    assert grad_cam(network, crops).shape == (1, 64, 64)
    assert [(1, 2048, 2, 2)] == seen


def test_features_are_what_the_last_layer_sees(network):
    """The logit comes out again."""
    crops = torch.randint(0, 255, (3, 3, 64, 64), dtype=torch.uint8)
    features = features_of(network, [crops[:2], crops[2:]])
    head = last_linear(network)
    with torch.no_grad():
        logit = head(torch.from_numpy(features))[:, 0]

        assert torch.allclose(network(crops), logit, atol=1e-4)


def test_the_spectrums_ratio_is_of_scipys_dct():
    """Mean power over mean power, for each coefficient."""
    rng = np.random.default_rng(0)
    real, forged = (torch.from_numpy(rng.integers(0, 255, (4, 3, 32, 32), np.uint8)) for _ in "12")

    def power(crops: Tensor) -> np.ndarray:
        grey = crops.numpy().astype(float).mean(axis=1) / 255
        return (dctn(grey, axes=(1, 2), norm="ortho") ** 2).mean(axis=0)

    ratio = spectrum_ratio(real, forged)

    assert pytest.approx(power(forged) / power(real), rel=1e-3) == ratio


def test_plain_figures_are_pictures():
    """Nothing to look at is no excuse to fail."""
    forged = np.arange(40) % 2 == 1
    logit = forged + np.sin(np.arange(40.0))
    found = Scored(
        logit, forged, tuple(("d", "m", "", str(n)) for n in range(40)), tuple(range(40))
    )
    names = ["real" if n % 2 else "inner" for n in range(40)]
    made = (
        mask_figure(torch.zeros(16, 16)),
        roc_figure(found, replicates=5),
        reliability_figure(forged, 1 / (1 + np.exp(-logit))),
        embedding_figure(np.random.default_rng(0).normal(size=(40, 5)), names),
    )

    assert all(min(shape(figure)[:2]) > 100 for figure in made)


def test_strips_show_what_the_network_can(network):
    """Five columns of RALF, two of a plain classifier."""
    crops = torch.randint(0, 255, (2, 3, 64, 64), dtype=torch.uint8)
    wide, narrow = (
        shape(strips_figure(each, crops, ["real", "inner"]))[1] for each in (network, Corner())
    )

    assert wide > 2 * narrow


@pytest.mark.parametrize("plain", [False, True])
def test_a_page_stands_alone(network, tmp_path, plain):
    """Nothing from elsewhere; what could not be drawn is named."""
    index = faces(tmp_path / "d", val=4)
    judge = model_of_network("tiny", Corner() if plain else network, CONTRACT)
    examples = examples_for(judge, index, "val", families=("inner", "boundary"))
    found = evaluation_of(judge, score_examples(judge, examples), "clean", replicates=10)
    page = write_page(judge, examples, found, tmp_path / "page.html").read_text()

    assert "http" not in page and 'src="data:image/png' in page
    assert "boundary" in page and ("mask: the network has none" in page) == plain
    assert page.count("<img") == (5 if plain else 6)


def test_a_bare_judge_has_a_page_too(tmp_path):
    """An engine without a network shows its scores alone."""
    index = faces(tmp_path / "d", val=2)
    judge = JudgedModel("dark", lambda crops: crops.float().mean(dim=(1, 2, 3)) - 128, CONTRACT)
    examples = examples_for(judge, index, "val", families=("inner",))
    found = evaluation_of(judge, score_examples(judge, examples), "clean", replicates=0)

    assert "shows no network" in write_page(judge, examples, found, tmp_path / "p.html").read_text()
