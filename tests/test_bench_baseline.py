"""The baseline of our benchmarks computes what we compute, or its time would mean nothing."""

import numpy as np
import pytest
import scipy.fft
import torch

from ralf.kernels.bench.baseline import AuthorsWay, Concatenated, dct2, idct2
from ralf.kernels.networks.ralf import Ralf
from ralf.kernels.networks.reconstructor import ScaleFusion
from ralf.kernels.untrained import patterns, settle

DIMENSIONS = {"base": 8, "blocks": 1, "backbone": "tf_efficientnet_lite0", "size": 64}


@pytest.mark.parametrize("shape", [(2, 3, 256, 256), (1, 31, 30)])
def test_its_transform_is_scipys_without_the_norm(shape: tuple[int, ...]):
    """And its inverse gives the image back; even and odd sides."""
    image = torch.rand(shape, dtype=torch.float64)
    expected = scipy.fft.dctn(image.numpy(), axes=(-2, -1))

    assert np.abs(expected - dct2(image).numpy()).max() < 1e-12 * np.abs(expected).max()
    torch.testing.assert_close(idct2(dct2(image)), image, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [0, 1])
def test_fusing_by_concatenation_is_fusing_in_parts(scale: int):
    """Resizing by nearest neighbour commutes with a 1×1 convolution."""
    fuse = ScaleFusion(8, scale)
    maps = [torch.rand(2, 8 << i, 16 >> i, 16 >> i) for i in range(3)]

    torch.testing.assert_close(Concatenated(fuse)(*maps), fuse(*maps), rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_its_logits_are_ours_within_fp32():
    """Same weights, same crops; the pictures in between, too."""
    crops = torch.from_numpy(patterns(4, 64))
    network = Ralf(**DIMENSIONS)
    torch.nn.init.normal_(network.mask)
    settle(network, crops.numpy())
    theirs = AuthorsWay.of(network, **DIMENSIONS)
    ours, other = network.trace(crops), theirs.trace(crops)

    assert ours.logit.std() > 0.01
    torch.testing.assert_close(other.destroyed, ours.destroyed, rtol=0, atol=2e-6)
    torch.testing.assert_close(other.rebuilt, ours.rebuilt, rtol=0, atol=1e-5)
    torch.testing.assert_close(other.logit, ours.logit, rtol=1e-3, atol=1e-4)
