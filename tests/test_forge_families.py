"""Pseudo-forgeries: confined to their mask, repeatable, and each family its own trace."""

import json

import numpy as np
import pytest
from scipy.interpolate import RBFInterpolator
from skimage.data import astronaut

from demo import samples
from demo.samples import PORTRAITS, make_samples, portraits
from ralf.train.forge import families, manipulations
from ralf.train.forge.families import FAMILIES, REGISTRY, ForgeryTask, Portrait, forge
from ralf.train.forge.landmarks import FaceGeometry, fill
from ralf.train.forge.pixels import blur, grid, remap, resize
from ralf.train.recipe import HELD_OUT

FIVE = np.array([[92, 104], [128, 98], [112, 122], [100, 142], [128, 138]], np.float32)
FACE = FaceGeometry(np.array([76, 62, 146, 164], np.float32), FIVE)
IMAGE = np.ascontiguousarray(astronaut()[10:230, 110:330])


def made(family: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    donor = Portrait(np.ascontiguousarray(IMAGE[:, ::-1]), FACE.flipped(220))
    return forge(IMAGE, FACE, family, np.random.default_rng(seed), donor=donor)


def test_the_face_of_the_tests_is_where_it_is_said_to_be():
    """Landmarks typed by hand: skin between the eyes, as bright as a face is."""
    middle = IMAGE[110:125, 105:120].reshape(-1, 3).mean(axis=0)

    assert middle[0] > middle[1] > middle[2] > 60


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_generator_makes_the_same_forgery(family: str):
    """Everything random comes from the generator passed in."""
    (one, mask), (again, mask_again), (other, _) = made(family), made(family), made(family, 1)

    assert np.array_equal(one, again) and np.array_equal(mask, mask_again)
    assert not np.array_equal(one, other)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "self_blend"])
def test_outside_its_mask_a_forgery_is_the_picture_itself(family: str):
    """What is not forged stays as it was; what is forged is seen."""
    for seed in range(3):
        image, mask = made(family, seed)
        change = np.abs(image.astype(int) - IMAGE).max(axis=-1)

        assert mask.min() >= 0 and mask.max() <= 1 + 1e-5
        # Bands of the held-out family reach a little further than the mask they report.
        assert change[blur(mask, 4) < 1e-4].max(initial=0) <= (1 if family == HELD_OUT else 0)
        assert change[mask > 0.5].mean() > 0.2
        assert 0.002 < mask.mean() < 0.5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mask_lies_on_the_face(family: str):
    """Its middle of mass is inside the face's box, on the part that the family changes."""
    _, mask = made(family, 2)
    x, y = (mask[..., None] * grid(*mask.shape)).sum(axis=(0, 1)) / mask.sum()

    assert FACE.box[0] < x < FACE.box[2] and FACE.box[1] < y < FACE.box[3]
    if family == "mouth":
        assert y > FIVE[2, 1]
    if family == "eyes":
        assert y < FIVE[2, 1]


def test_smoothing_takes_texture_and_redrawing_takes_detail():
    """The traces are what their names say: less high frequency inside the mask."""
    for family in ("smooth", "resample"):
        finer = []
        for seed in range(6):
            image, mask = made(family, seed)
            inside = mask > 0.9 * mask.max()
            detail = [
                np.abs(part - blur(part.astype(np.float32), 1.0))[inside].mean()
                for part in (image.astype(np.float32), IMAGE.astype(np.float32))
            ]
            finer.append(detail[0] / detail[1])

        assert np.median(finer) < 0.95


def test_transposed_convolution_leaves_a_period():
    """The doubled picture repeats a pattern of its own grid."""
    flat = np.full((64, 64, 3), 120, np.float32)
    rng = np.random.default_rng(0)
    face = FaceGeometry(np.array([0, 0, 64, 64], np.float32), FIVE / 4)
    spectrum = np.abs(np.fft.rfft2(manipulations.upsample(flat, face, rng)[..., 0] - 120))
    spectrum[0, 0] = 0

    assert spectrum.max() > 20 * np.median(spectrum)


def test_a_swap_shows_the_donor_in_the_colours_of_the_target():
    """The donor's face, recoloured: its mean moves to the target's."""
    donor = Portrait(255 - IMAGE, FACE)
    rng = np.random.default_rng(0)
    moved = manipulations.transplant(
        donor.image.astype(np.float32), FACE, IMAGE.astype(np.float32), FACE, rng
    )
    left, top, right, bottom = FACE.box.astype(int)
    inside = (slice(top, bottom), slice(left, right))
    wanted, before = IMAGE[inside].mean(axis=(0, 1)), donor.image[inside].mean(axis=(0, 1))
    got = moved[inside].mean(axis=(0, 1))

    assert np.abs(got - wanted).max() < 0.5 * np.abs(before - wanted).max()


def test_the_spline_is_a_thin_plate():
    """Against SciPy's, at the knots and between them."""
    rng = np.random.default_rng(0)
    before = rng.uniform(20, 200, (8, 2)).astype(np.float32)
    after = before + rng.normal(0, 4, (8, 2)).astype(np.float32)
    field = manipulations._spline(before, after, 220, 220, 30)
    oracle = RBFInterpolator(after, before - after, kernel="thin_plate_spline")
    at = grid(220, 220)[30:190:10, 30:190:10]
    wanted = oracle(at.reshape(-1, 2).astype(float)).reshape(at.shape)

    assert np.abs(field[30:190:10, 30:190:10] - wanted).max() < 0.7


def test_five_points_and_a_mesh_agree_on_where_the_face_is():
    """The mean face laid over five points covers what was typed in as the box."""
    region = fill(FACE.outline("face"), 220, 220)
    box = np.zeros((220, 220), np.float32)
    box[62:164, 76:146] = 1

    assert (region * box).sum() / region.sum() > 0.8
    assert (region * box).sum() / box.sum() > 0.6


def test_geometry_follows_the_picture():
    """Scaling, cutting and mirroring move box and points with the pixels."""
    cut = FACE.scaled(2, 2, left=10, top=20)
    mirrored = FACE.flipped(220).flipped(220)

    assert pytest.approx((FIVE - [10, 20]) * 2) == cut.five
    assert pytest.approx(FIVE) == mirrored.five and pytest.approx(FACE.box) == mirrored.box
    assert FACE.flipped(220).five[0, 0] < FACE.flipped(220).five[1, 0]


def test_an_unknown_family_and_a_swap_without_donor_are_refused():
    """The message lists what there is."""
    with pytest.raises(ValueError, match="self_blend, inner"):
        forge(IMAGE, FACE, "magic", np.random.default_rng(0))
    with pytest.raises(ValueError, match="needs a donor"):
        forge(IMAGE, FACE, "swap", np.random.default_rng(0))


def test_a_family_is_one_function():
    """Its name is the family's; the decorator says how often it is drawn, and where it is seen."""

    @families.family(share=2.5, region="mouth")
    def darkened(task: ForgeryTask) -> np.ndarray:
        return task.image * np.float32(0.5)

    try:
        image, mask = made("darkened")
        assert 2.5 == REGISTRY["darkened"].share
        assert image[mask > 0.5].mean() < 0.8 * IMAGE[mask > 0.5].mean()
        assert np.array_equal(image[mask == 0], IMAGE[mask == 0])
    finally:
        del REGISTRY["darkened"]


def test_the_same_seed_makes_the_same_forgery_as_ever():
    """A run that goes on must see the forgeries that it saw: mean change of three of each family.

    A random number more or fewer changes them all; another processor's rounding does not.
    """
    known = {
        "self_blend": (1.22472, 1.65116, 8.06410),
        "inner": (0.55532, 0.66907, 0.78448),
        "swap": (3.93246, 5.29744, 3.41161),
        "mouth": (0.47404, 0.13148, 0.38207),
        "eyes": (0.16916, 0.19854, 0.37513),
        "reenact": (1.39930, 0.58629, 0.58292),
        "resample": (1.25202, 1.15332, 0.84185),
        "smooth": (0.22112, 0.26892, 0.41425),
        "spectrum": (1.58272, 1.93282, 1.49840),
        "boundary": (1.54989, 0.89490, 0.92899),
        "face2face": (0.38072, 1.84146, 0.34122),
        "face_swap": (3.22337, 2.50087, 4.01866),
    }

    for name, changes in known.items():
        found = [np.abs(made(name, seed)[0].astype(float) - IMAGE).mean() for seed in range(3)]
        assert pytest.approx(changes, rel=1e-3) == found, name


def test_remap_and_resize_do_nothing_when_nothing_is_asked():
    """The identity field and the same size give the picture back."""
    image = IMAGE.astype(np.float32)

    assert np.abs(remap(image, grid(220, 220)) - image).max() < 1e-2
    assert np.abs(resize(image, 220, 220) - image).max() < 1e-3


def test_a_wide_blur_is_nearly_gaussian():
    """Three boxes against SciPy's Gaussian."""
    from scipy.ndimage import gaussian_filter

    plane = IMAGE[..., 0].astype(np.float32)
    for sigma in (3.3, 5, 9):
        apart = np.abs(blur(plane, sigma) - gaussian_filter(plane, sigma, mode="nearest"))

        assert apart[30:-30, 30:-30].max() < 6


def test_every_portrait_has_its_face_and_its_source():
    """At most eight, each named in SOURCES.md."""
    found = portraits()
    sources_md = (PORTRAITS / "SOURCES.md").read_text()

    assert 0 < len(found) <= 8
    for name, portrait in found.items():
        assert name in sources_md
        height, width = portrait.image.shape[:2]
        assert (portrait.face.five > 0).all() and (portrait.face.five < [width, height]).all()


def test_samples_say_the_truth_and_are_made_alike_twice(tmp_path, monkeypatch):
    """Every clip named in truth.json is there; the bytes do not change from call to call."""
    short = samples.animate
    monkeypatch.setattr(
        samples, "animate", lambda *args, **options: short(*args, **options | {"seconds": 0.2})
    )
    truth = make_samples(tmp_path / "one")
    make_samples(tmp_path / "two")
    stored = json.loads((tmp_path / "one" / "truth.json").read_text())

    assert [clip.file for clip in truth] == [clip["file"] for clip in stored["clips"]]
    assert {"authentic", "forged", "no_faces"} == {clip.label for clip in truth}
    for clip in truth:
        first, second = ((tmp_path / run / clip.file).read_bytes() for run in ("one", "two"))
        assert first == second


def test_a_sample_never_puts_one_person_on_another():
    """Swaps are for training data alone."""
    portrait = next(iter(portraits().values()))

    with pytest.raises(ValueError, match="never puts one person"):
        samples.forged(portrait, "swap")
