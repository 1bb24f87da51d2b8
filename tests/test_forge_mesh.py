"""Forgeries by mesh: triangles move, mouths are filled, textures end with the picture."""

import numpy as np
import pytest
from skimage.data import astronaut
from skimage.transform import PiecewiseAffineTransform

from ralf.train.forge import mesh
from ralf.train.forge.families import Portrait, forge
from ralf.train.forge.landmarks import FIVE, FaceGeometry, applied, fill, fit, five_of_mesh
from ralf.train.forge.pixels import grid

POINTS = np.array([[92, 104], [128, 98], [112, 122], [100, 142], [128, 138]], np.float32)
BOX = np.array([76, 62, 146, 164], np.float32)
IMAGE = np.ascontiguousarray(astronaut()[10:230, 110:330])


def face_with(expression: np.ndarray | float = 0.0) -> FaceGeometry:
    """The face of the picture, its mesh the mean one with an expression in eye distances."""
    return FaceGeometry(BOX, POINTS, applied(fit(FIVE, POINTS), mesh.MEAN + expression))


def jaw_dropped(by: float) -> np.ndarray:
    """Lower lip and chin further down, on the mean mesh."""
    lower = (mesh.MEAN[:, 1] > 1.0625) & (np.abs(mesh.MEAN[:, 0]) < 0.4)
    return np.stack([np.zeros(468), by * lower], axis=1).astype(np.float32)


def gap(points: np.ndarray) -> float:
    return float(np.linalg.norm(points[mesh.LOWER_INNER] - points[mesh.UPPER_INNER]))


def test_the_mean_mesh_is_symmetric_and_lies_on_its_five_points():
    """In the frame of the five points, one unit from eye to eye."""
    mirrored = mesh.MEAN * np.array([-1, 1])
    apart = np.linalg.norm(mirrored[:, None] - mesh.MEAN[None], axis=-1).min(axis=1)

    assert apart.max() < 0.002
    assert np.abs(five_of_mesh(mesh.MEAN) - FIVE).max() < 0.1


def test_a_warp_is_affine_in_each_triangle():
    """Against scikit-image's piecewise affine transform."""
    rng = np.random.default_rng(0)
    after = grid(220, 220)[30:200:24, 30:200:24].reshape(-1, 2)
    after = (after + rng.uniform(-4, 4, after.shape)).astype(np.float32)
    before = after + rng.normal(0, 3, after.shape).astype(np.float32)
    oracle = PiecewiseAffineTransform.from_estimate(after, before)
    at = grid(220, 220)[50:170:7, 50:170:7]
    wanted = oracle(at.reshape(-1, 2)).reshape(at.shape) - at
    field = mesh.warp_field(before, after, 220, 220)

    assert np.abs(field[50:170:7, 50:170:7] - wanted).mean() < 0.1
    assert not field[:20].any() and not field[:, 210:].any()


def test_the_donors_expression_arrives_whatever_the_donors_size_and_tilt():
    """An opened mouth opens this one; brow and cheeks stay; the donor's pose does not matter."""
    turn = np.array([[1.5, 0.7], [-0.7, 1.5]], np.float32)
    open_mouth = face_with(jaw_dropped(0.25))
    assert open_mouth.mesh is not None
    turned = FaceGeometry(BOX, POINTS @ turn, open_mouth.mesh @ turn)
    moves = [
        mesh.expression_moves(face_with(), donor, np.random.default_rng(3))
        for donor in (open_mouth, turned)
    ]
    (before, after), (_, as_turned) = moves
    still = [10, 234, 454, 168]  # brow, both cheeks, root of the nose

    assert gap(after) > gap(before) + 0.1 * face_with().eye_distance
    assert np.linalg.norm(after - before, axis=1)[still].max() < 0.15 * gap(after)
    assert np.abs(after - as_turned).max() < 0.1


def test_an_opened_mouth_shows_the_donors_and_a_closed_one_shows_none():
    """A donor with a green mouth: green appears between the lips, where they were opened."""
    donor_face = face_with(jaw_dropped(0.25))
    assert donor_face.mesh is not None
    green = IMAGE.copy()
    green[fill([donor_face.mesh[mesh.INNER_LIPS]], 220, 220) > 0.5] = [0, 200, 0]

    def greenness(donor: FaceGeometry) -> float:
        rng = np.random.default_rng(3)
        made = mesh.transfer_expression(IMAGE.astype(np.float32), face_with(), green, donor, rng)
        return float((made[..., 1] - made[..., 0]).max())

    assert greenness(donor_face) > 60
    assert greenness(face_with()) < 30


@pytest.mark.parametrize("meshes", [(True, False), (False, True), (False, False)])
def test_five_points_are_enough_for_both_families(meshes: tuple[bool, bool]):
    """The mean mesh stands in; an expression is drawn; the face changes and nothing else."""
    own, other = (face_with() if has else FaceGeometry(BOX, POINTS) for has in meshes)
    donor = Portrait(np.ascontiguousarray(255 - IMAGE), other)
    for family in ("face2face", "face_swap"):
        image, mask = forge(IMAGE, own, family, np.random.default_rng(5), donor=donor)

        assert np.abs(image.astype(int) - IMAGE)[mask > 0.5].mean() > 0.5
        assert np.array_equal(image[mask == 0], IMAGE[mask == 0])


def test_a_texture_ends_where_the_donors_picture_does():
    """A donor cut off through the face gives only what it has, in this face's colours."""
    half = (IMAGE[:, :112] * 0.6).astype(np.uint8)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        made, mask = mesh.lay_texture(IMAGE.astype(np.float32), face_with(), half, face_with(), rng)
        inside = mask > 0.9 * mask.max()

        assert mask[:, 120:].max() < 0.05 < mask[:, :105].max()
        assert np.abs(made[inside].mean(axis=0) - IMAGE[inside].mean(axis=0)).max() < 25


def test_a_mesh_on_another_thing_than_the_face_is_told_by_the_five_points():
    """And box and points by mesh agree with those that a finder gives."""
    face = face_with()
    assert face.mesh is not None
    on_the_ear = FaceGeometry(BOX, POINTS, face.mesh * np.float32(0.3) + 100)
    found = face.by_mesh()

    assert face.consistent and FaceGeometry(BOX, POINTS).consistent
    assert not on_the_ear.consistent
    assert np.abs(found.five - POINTS).max() < 5
    assert np.abs(found.box - BOX).max() < 12
