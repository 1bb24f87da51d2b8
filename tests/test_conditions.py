"""Perturbations: published levels, against outside oracles, the same on every run."""

import io
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image, ImageEnhance
from scipy import ndimage
from skimage.data import astronaut

from ralf.train.evaluate.conditions import (
    CLEAN,
    DEEPERFORENSICS,
    LEVELS,
    TABLE_3,
    all_conditions,
    on_crop,
    parse,
    perturb,
)
from ralf.train.forge.pixels import LUMA

PICTURE = np.ascontiguousarray(astronaut()[:96, 180:276])


def under(condition: str, seed: int = 0, image: np.ndarray = PICTURE) -> np.ndarray:
    return perturb(image, condition, np.random.default_rng(seed))


def far(condition: str) -> float:
    return float(np.abs(under(condition).astype(float) - PICTURE).mean())


@pytest.mark.parametrize("kind", LEVELS)
def test_each_level_is_worse_than_the_one_before(kind: str):
    """Five levels, in order."""
    distances = [far(f"{kind}:{level}") for level in range(1, 6)]

    assert all(0.9 * one < other for one, other in pairwise(distances))
    assert distances[0] > 0 and distances[-1] > distances[0]


@pytest.mark.parametrize("condition", ["clean", *all_conditions(tuple(LEVELS))])
def test_shape_and_chance(condition: str):
    """Same size, same bits from the same generator, the picture passed in untouched."""
    before = PICTURE.copy()
    out = under(condition)

    assert out.shape == PICTURE.shape and out.dtype == np.uint8
    assert np.array_equal(out, under(condition)) and np.array_equal(before, PICTURE)


def test_seven_kinds_with_five_published_levels():
    """The parameters of DeeperForensics-1.0."""
    assert len(all_conditions()) == 35
    assert {
        "saturation": (0.4, 0.3, 0.2, 0.1, 0.0),
        "contrast": (0.85, 0.725, 0.6, 0.475, 0.35),
        "blocks": (16, 32, 48, 64, 80),
        "noise": (0.001, 0.002, 0.005, 0.01, 0.05),
        "blur": (7, 9, 13, 17, 21),
        "pixelation": (2, 3, 4, 5, 6),
        "h264": (30, 32, 35, 38, 40),
    } == DEEPERFORENSICS
    assert LEVELS["jpeg"] == (90, 70, 50, 30, 10)
    assert [parse(condition) for condition in TABLE_3] == [
        ("fade", 0.725),
        ("blur", 9),
        ("rescale", 3),
        ("pixelation", 3),
    ]
    assert all(map(on_crop, TABLE_3)) and not on_crop("blur:2")


def test_fading_is_pillows_contrast():
    """Towards the mean grey, so the picture stays as bright, where `contrast` darkens it."""
    oracle = ImageEnhance.Contrast(Image.fromarray(PICTURE)).enhance(0.725)

    assert np.abs(under("fade:2").astype(int) - np.asarray(oracle)).max() <= 1
    # Luma, since the grey is a luma: a coloured picture's plain mean moves towards it a little.
    bright, faded, dark = (
        float((each.astype(np.float32) @ LUMA).mean())
        for each in (PICTURE, under("fade:2"), under("contrast:2"))
    )
    assert abs(faded - bright) < 1 < bright - dark


def test_saturation_at_its_last_level_is_grey():
    """All colour gone, luma kept."""
    out = under("saturation:5").astype(int)

    assert np.ptp(out, axis=-1).max() <= 1
    assert np.abs(out[..., 0] - PICTURE @ [0.299, 0.587, 0.114]).max() < 1.5


def test_contrast_multiplies():
    """By its parameter, fractions cut off."""
    assert np.array_equal((PICTURE * 0.6 + 1e-4).astype(np.uint8), under("contrast:3"))


def test_blur_against_a_gaussian_of_the_same_taps():
    """SciPy's Gaussian cut at the same radius, in float."""
    oracle = ndimage.gaussian_filter(
        PICTURE.astype(float), (9 / 6, 9 / 6, 0), mode="mirror", radius=(4, 4, 0)
    )

    assert np.abs(under("blur:2") - oracle).max() <= 0.51


def test_noise_has_the_variance_that_it_is_named_by():
    """On luma, over a flat picture."""
    flat = np.full((128, 128, 3), 128, np.uint8)
    luma = under("noise=0.002", image=flat) @ np.array([0.299, 0.587, 0.114]) / 255

    assert pytest.approx(0.002, rel=0.05) == luma.var()


def test_blocks_are_as_many_as_asked_for():
    """Grey squares of eight pixels, some of which may overlap."""
    black = np.zeros((256, 256, 3), np.uint8)
    covered = (under("blocks:1", image=black) == 128).all(axis=-1).sum()

    assert 0.8 * 16 * 64 < covered <= 16 * 64


def test_pixelation_repeats_pixels_and_rescaling_does_not():
    """Two different things, both called compression by someone."""
    blocks = under("pixelation:2").reshape(32, 3, 32, 3, 3)

    assert np.ptp(blocks.astype(int), axis=(1, 3)).max() == 0
    assert np.ptp(under("rescale:2").reshape(32, 3, 32, 3, 3).astype(int), axis=(1, 3)).max() > 0


def test_true_jpeg_is_jpeg():
    """The same pixels as Pillow's own encoder and decoder."""
    buffer = io.BytesIO()
    Image.fromarray(PICTURE).save(buffer, "JPEG", quality=50)

    assert np.array_equal(np.asarray(Image.open(buffer)), under("jpeg=50"))


def test_uneven_light_scales_what_is_there():
    """Half as bright a picture comes out half as bright, nowhere by more than its strength, and
    from one pixel to the next by less than a third: a shadow's border, not a seam."""
    picture = np.full((256, 256, 3), 100, np.uint8)
    for seed in range(20):
        bright, dark = (
            under("light:5", seed, image).astype(float) for image in (picture, picture // 2)
        )
        gain = np.log(bright / 100)
        np.testing.assert_allclose(dark, bright / 2, atol=0.8)
        assert np.abs(gain).max() < 0.51
        assert max(np.abs(np.diff(gain, axis=axis)).max() for axis in (0, 1)) < 0.33


@pytest.mark.parametrize("condition", ["fog:1", "blur:6", "blur:0", "blur", "jpeg=", "h264:x"])
def test_what_is_not_known_is_refused(condition: str):
    """With what is."""
    with pytest.raises(ValueError, match=r"known|level|should be like"):
        parse(condition)


def test_clean_is_the_picture_itself():
    """Not even copied through an encoder."""
    assert under(CLEAN) is PICTURE
