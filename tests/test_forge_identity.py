"""Portraits as if of others: found where they went, lit without a seam, painted on the face."""

from collections.abc import Callable

import numpy as np
import pytest

from ralf.train.forge.identity import (
    add_makeup,
    as_another_person,
    change_features,
    light_face,
    shade,
)
from ralf.train.forge.landmarks import FaceGeometry
from ralf.train.forge.manipulations import smoothed
from tests.faces_on_disk import portraits

Change = Callable[[np.ndarray, FaceGeometry, np.random.Generator], np.ndarray]
LIGHTS = (shade, light_face, add_makeup)
FIVE = np.array([[120, 120], [180, 120], [150, 150], [125, 180], [175, 180]], np.float32)
FACE = FaceGeometry(np.array([80, 70, 220, 230], np.float32), FIVE)


def grainy(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(60, 180, (300, 300, 3)).astype(np.float32)


def test_the_seed_tells_all_and_none_leaves_all():
    """The same seed the same picture; without one it is the picture itself."""
    portrait = next(iter(portraits().values()))
    image, face = portrait.image, portrait.face

    again = [as_another_person(image, face, seed) for seed in (7, 7, 8)]

    assert np.array_equal(again[0][0], again[1][0])
    assert np.array_equal(again[0][1].five, again[1][1].five)
    assert not np.array_equal(again[0][0], again[2][0])
    assert again[2][0].shape == image.shape
    assert again[2][0].dtype == np.uint8
    assert as_another_person(image, face, None) == (image, face)


def test_a_bent_face_is_found_where_it_went():
    """Dots drawn on the landmarks lie under the landmarks of the bent picture."""
    image = np.zeros((300, 300, 3), np.float32)
    for x, y in FIVE.astype(int):
        image[y - 2 : y + 3, x - 2 : x + 3] = 255
    went = []

    for seed in range(20):
        rng = np.random.default_rng(seed)
        picture, moved = change_features(image, FACE, rng, speaks=bool(seed % 2))
        went.append(np.abs(moved.five - FIVE).max())
        for x, y in np.rint(moved.five).astype(int):
            assert picture[y - 1 : y + 2, x - 1 : x + 2].max() > 100
        assert (moved.box[:2] < moved.five.min(axis=0)).all()

    assert max(went) > 3


def test_smoothed_skin_loses_its_grain_and_edges_stay():
    """Over many draws grain goes, and a step between two fields keeps its height."""
    rng = np.random.default_rng(0)
    field = np.full((240, 240, 1), 80.0)
    field[:, 120:] = 180
    image = (field + rng.normal(0, 6, (240, 240, 1))).astype(np.float32).repeat(3, axis=-1)

    seen = [smoothed(image, FACE, np.random.default_rng(seed)) for seed in range(20)]

    grain = [float(one[:, :90].std()) for one in seen]
    assert min(grain) < 3
    assert max(grain) < 6
    assert all(abs(one[:, 160:].mean() - one[:, :80].mean() - 100) < 4 for one in seen)


@pytest.mark.parametrize("light", LIGHTS)
def test_light_and_paint_only_scale_what_is_there(light: Change):
    """Half as bright a picture comes out half as bright: nothing is drawn, no texture is lost."""
    image = grainy()
    for seed in range(10):
        whole, half = (light(one, FACE, np.random.default_rng(seed)) for one in (image, image / 2))
        np.testing.assert_allclose(half, whole / 2, rtol=1e-4)


@pytest.mark.parametrize("light", LIGHTS)
def test_light_and_paint_have_no_seam(light: Change):
    """From pixel to pixel the gain changes by less than a quarter, and somewhere it matters."""
    image, most = grainy(), 0.0
    for seed in range(30):
        gain = np.log(light(image, FACE, np.random.default_rng(seed)) / image)
        steps = max(float(np.abs(np.diff(gain, axis=axis)).max()) for axis in (0, 1))
        assert steps < 0.25
        most = max(most, float(np.ptp(gain)))
    assert most > 0.3


def test_paint_stays_on_the_face():
    """An eye distance from the box nothing changes."""
    image = grainy()
    for seed in range(30):
        out = add_makeup(image, FACE, np.random.default_rng(seed))
        np.testing.assert_allclose(out[:8], image[:8], rtol=1e-3)
        np.testing.assert_allclose(out[:, :15], image[:, :15], rtol=1e-3)


def test_most_others_differ_from_the_picture_and_from_each_other():
    """Of many seeds few leave it as it is, and the light of some is far from even."""
    flat = np.full((300, 300, 3), 120, np.uint8)

    seen = [as_another_person(flat, FACE, seed)[0].astype(float) for seed in range(100)]

    uneven = np.array([float(np.ptp(one)) for one in seen])
    assert 0.55 < (uneven > 2).mean() < 0.9  # 1 − 0.65³ = 0.73 are lit or painted
    assert (uneven > 60).mean() > 0.1
