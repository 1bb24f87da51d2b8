"""Forgeries by mesh, as Face2Face and FaceSwap make them: triangles move, textures follow.

A mesh has 468 points.  Its triangles are Delaunay's, over the points where they go to; each one is
moved by its own affine map.  `transfer_expression` moves the points as another person's mesh says,
and fills an opened mouth from that person's picture.  `lay_texture` draws another person's face
into the triangles of this one.

A face with only five points gets the mean mesh, fitted to them.  The mean mesh has no expression:
where either of the two faces has no mesh of its own, an expression is drawn instead.  mean_mesh.npy
holds it in thousandths of the distance between the eyes, in the frame of landmarks.FIVE: the median
of 616 frontal faces with closed mouths, made symmetric.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import LinearNDInterpolator

from ralf.train.forge.landmarks import (
    FIVE,
    MOUTH_CORNERS,
    FaceGeometry,
    Points,
    applied,
    fill,
    fit,
    hull,
)
from ralf.train.forge.pixels import Image, Pixels, blur, grid, remap, resize

MEAN: Points = np.load(Path(__file__).with_name("mean_mesh.npy")).astype(np.float32) / 1000
INNER_LIPS = [78, 191, 80, 81, 82, 13, 312, 311, 310, 415, 308, 324, 318, 402, 317, 14, 87, 178, 88]
INNER_LIPS += [95]
"""The opening of the mouth in MediaPipe's topology, once around."""
UPPER_INNER, LOWER_INNER = 13, 14
_MOUTH_LINE = float(MEAN[[UPPER_INNER, LOWER_INNER], 1].mean())
_STEP = 2
"""Pixels between two places where the triangles are looked up: triangles are wider."""


def mesh_of(face: FaceGeometry) -> Points:
    """The face's mesh; the mean mesh laid over its five points where it has none."""
    return face.mesh if face.mesh is not None else applied(fit(FIVE, face.five), MEAN)


def _expressive() -> Points:
    """How much each point of the mean mesh belongs to the expression, [468, 1]."""
    x, y = MEAN.T
    mouth = np.exp(-((x / 0.75) ** 2) - ((y - _MOUTH_LINE) / 0.5) ** 2)
    # The chin goes with the lower lip; the cheeks beside it hold still.
    jaw = np.clip((y - _MOUTH_LINE) / 0.15, 0, 1) * np.clip(1.2 - (x / 0.9) ** 2, 0, 1)
    eyes = 0.6 * np.exp(-(((np.abs(x) - 0.5) / 0.35) ** 2) - ((y + 0.1) / 0.3) ** 2)
    most = np.maximum(np.maximum(mouth, jaw), eyes)
    return np.asarray(most.clip(0, 1)[:, None], np.float32)


_EXPRESSIVE = _expressive()


def _drawn_expression(rng: np.random.Generator) -> Points:
    """An expression where no mesh shows one: jaw, width of the mouth, brows; on the mean mesh."""
    x, y = MEAN.T
    jaw, wide, raised = rng.uniform(0, 0.2), rng.normal(0, 0.04), rng.normal(0, 0.04)
    # The lips part at their line, most in the middle; their corners stay.
    lower = np.clip((y - _MOUTH_LINE) / 0.006, 0, 1) * np.clip(1 - (x / 0.7) ** 2, 0, 1)
    down = jaw * lower - raised * np.exp(-(((y + 0.25) / 0.15) ** 2))
    across = wide * (x / 0.44) * np.exp(-(((y - _MOUTH_LINE) / 0.3) ** 2))
    return np.stack([across, down], axis=1).astype(np.float32)


def warp_field(before: Points, after: Points, height: int, width: int) -> Pixels:
    """Where each pixel within the points comes from, relative to itself: [h, w, 2]; 0 outside."""
    field = np.zeros((height, width, 2), np.float32)
    low = np.maximum(np.floor(after.min(axis=0)).astype(int), 0)
    high = np.minimum(np.ceil(after.max(axis=0)).astype(int) + 1, [width, height])
    wide, tall = (high - low).tolist()
    if wide < 2 or tall < 2:
        return field
    rows, columns = max(2, tall // _STEP), max(2, wide // _STEP)
    y = low[1] + (np.arange(rows) + 0.5) * tall / rows - 0.5
    x = low[0] + (np.arange(columns) + 0.5) * wide / columns - 0.5
    pull = LinearNDInterpolator(after.astype(np.float64), before - after, fill_value=0.0)
    coarse = pull(*np.meshgrid(x, y)).astype(np.float32)
    field[low[1] : high[1], low[0] : high[0]] = resize(coarse, tall, wide, antialias=False)
    return field


def transfer_expression(
    image: Pixels,
    face: FaceGeometry,
    donor: Image,
    donor_face: FaceGeometry,
    rng: np.random.Generator,
) -> Pixels:
    """The face with the donor's expression; an opened mouth is filled from the donor's."""
    height, width = image.shape[:2]
    before, after = expression_moves(face, donor_face, rng)
    # A ring that holds still: the movement fades out between the face's border and the ring.
    rim = hull(before)
    middle = before.mean(axis=0)
    ring = middle + (rim - middle) * np.float32(1.35)
    field = warp_field(np.concatenate([before, ring]), np.concatenate([after, ring]), height, width)
    moved = remap(image, grid(height, width) + field, "bicubic")
    opened = np.linalg.norm(after[LOWER_INNER] - after[UPPER_INNER])
    opened -= np.linalg.norm(before[LOWER_INNER] - before[UPPER_INNER])
    if opened > 0.03 * face.eye_distance:
        moved = _fill_mouth(moved, after, donor, donor_face, face.eye_distance)
    return np.clip(moved, 0, 255)


def expression_moves(
    face: FaceGeometry, donor_face: FaceGeometry, rng: np.random.Generator
) -> tuple[Points, Points]:
    """The mesh as it is, and as it is with the donor's expression."""
    before = mesh_of(face)
    strength = np.float32(rng.uniform(0.6, 1.15))
    if face.mesh is None or donor_face.mesh is None:
        drawn = strength * _drawn_expression(rng)
        return before, np.asarray(before + drawn @ fit(MEAN, before)[:2], np.float32)
    kept = np.float32(rng.uniform(0, 0.4))  # of the face's own expression
    shown = strength * expression_of(donor_face, rng)
    return before, with_expression(before, shown, kept)


def expression_of(face: FaceGeometry, rng: np.random.Generator) -> Points:
    """How each point of a face differs from the mean mesh, on that; drawn where it has no mesh.

    Laid over the mean face by the best affine map, a mesh keeps its expression and some of its
    person; position, size, tilt and most of a turn of the head are gone.
    """
    if face.mesh is None:
        return _drawn_expression(rng)
    return applied(fit(face.mesh, MEAN), face.mesh) - MEAN


def with_expression(mesh: Points, shown: Points, kept: np.float32) -> Points:
    """The mesh with another expression, and with so much of its own."""
    own = applied(fit(mesh, MEAN), mesh) - MEAN
    delta = (shown - (1 - kept) * own) * _EXPRESSIVE
    # Bounded: a profile does not fit the mean face, and its delta would tear the picture.
    length = np.linalg.norm(delta, axis=1, keepdims=True)
    delta *= np.minimum(1, 0.3 / np.maximum(length, 1e-6))
    return np.asarray(mesh + delta @ fit(MEAN, mesh)[:2], np.float32)


def _fill_mouth(
    image: Pixels, mesh: Points, donor: Image, donor_face: FaceGeometry, unit: float
) -> Pixels:
    """The opening of the mouth from the donor's picture; dark where the donor shows none."""
    height, width = image.shape[:2]
    opening = mesh[INNER_LIPS]
    mask = blur(fill([opening], height, width), max(0.6, 0.012 * unit))[..., None]
    source = mesh_of(donor_face)
    gap = np.linalg.norm(source[LOWER_INNER] - source[UPPER_INNER]) / donor_face.eye_distance
    lips = image[_box(mesh[[*MOUTH_CORNERS, 0, 17]], height, width)].mean(axis=(0, 1))
    if donor_face.mesh is None or gap < 0.05:
        return np.asarray(image + (0.25 * lips - image) * mask, np.float32)
    field = warp_field(source[INNER_LIPS], opening, height, width)
    inside = remap(donor.astype(np.float32), grid(height, width) + field, "bicubic")
    shown = _box(source[[*MOUTH_CORNERS, 0, 17]], *donor.shape[:2])
    gain = np.clip(lips / np.maximum(donor[shown].mean(axis=(0, 1)), 1), 0.5, 1.8)
    return np.asarray(image + (inside * gain.astype(np.float32) - image) * mask, np.float32)


def _box(points: Points, height: int, width: int) -> tuple[slice, slice]:
    """The pixels around some points; at least one."""
    low = np.clip(np.floor(points.min(axis=0)).astype(int), 0, [width - 1, height - 1])
    high = np.clip(np.ceil(points.max(axis=0)).astype(int) + 1, low + 1, [width, height])
    return slice(low[1], high[1]), slice(low[0], high[0])


def lay_texture(
    image: Pixels,
    face: FaceGeometry,
    donor: Image,
    donor_face: FaceGeometry,
    rng: np.random.Generator,
) -> tuple[Pixels, Pixels]:
    """The donor's face drawn into this one's mesh, and its alpha [h, w]: picture and mask."""
    height, width = image.shape[:2]
    unit = face.eye_distance
    source, own = mesh_of(donor_face), mesh_of(face)
    # FaceSwap's model takes some of the donor's shape along, not only its skin.
    shape = np.float32(rng.uniform(0, 0.5))
    place = own + shape * (applied(fit(source, own), source) - own)
    at = grid(height, width) + warp_field(source, place, height, width)
    texture = remap(_textured(donor, donor_face, rng), at, "bicubic")
    rim = hull(place)
    middle = place.mean(axis=0)
    alpha = fill([middle + (rim - middle) * np.float32(rng.uniform(0.88, 1.0))], height, width)
    # Beyond the donor's picture there is no texture; its repeated edge would be streaks.
    seen = ((at >= 0) & (at <= np.array(donor.shape[1::-1], np.float32) - 1)).all(axis=-1)
    inside = alpha * seen
    feather = unit * np.exp(rng.uniform(np.log(0.015), np.log(0.15)))
    # Twice the blur less one: it feathers inwards only, so that no edge of the texture shows.
    soft = np.clip(2 * blur(inside, feather) - 1, 0, 1)
    if rng.random() < 0.5:
        texture = _recoloured(texture, image, inside > 0.5, np.float32(rng.uniform(0.7, 1.0)))
    else:
        texture = _relit(texture, image, inside, unit * rng.uniform(0.35, 0.8))
    opacity = np.float32(1.0 if rng.random() < 0.6 else rng.uniform(0.7, 1.0))
    mask = np.asarray(soft * opacity, np.float32)
    return image + (np.clip(texture, 0, 255) - image) * mask[..., None], mask


def _textured(donor: Image, face: FaceGeometry, rng: np.random.Generator) -> Pixels:
    """The donor's picture at the size of a texture map, which is seldom the picture's own."""
    picture = donor.astype(np.float32)
    scale = rng.uniform(90, 260) / max(1.0, float(face.box[3] - face.box[1]))
    if scale >= 1:
        return picture
    height, width = picture.shape[:2]
    small = resize(picture, max(8, round(height * scale)), max(8, round(width * scale)))
    return resize(small, height, width, "bilinear", antialias=False)


def _recoloured(
    texture: Pixels, target: Pixels, inside: NDArray[np.bool_], amount: np.float32
) -> Pixels:
    """Mean and spread of each channel within the face moved to the target's."""
    if not inside.any():
        return texture
    mine, wanted = texture[inside], target[inside]
    gain = np.clip(wanted.std(axis=0) / (mine.std(axis=0) + 1e-3), 0.6, 1.5)
    matched = (texture - mine.mean(axis=0)) * gain + wanted.mean(axis=0)
    return np.asarray(texture + (matched - texture) * amount, np.float32)


def _relit(texture: Pixels, target: Pixels, inside: Pixels, sigma: float) -> Pixels:
    """The target's light on the texture: the quotient of both after a wide blur."""
    # At a quarter of the size: what is left after such a blur needs no more.
    height, width = target.shape[:2]
    size = max(8, height // 4), max(8, width // 4)
    weight = resize(inside, *size)[..., None]
    both = np.concatenate(
        [resize(texture, *size) * weight, resize(target, *size) * weight], axis=-1
    )
    mine, wanted = np.split(blur(both, sigma / 4) + np.float32(1e-3), 2, axis=-1)
    # Bounded, or a shadow on one of the two faces becomes a lamp.
    gain = np.clip((wanted + 4e-2) / (mine + 4e-2), 0.4, 2.5)
    return np.asarray(texture * resize(gain, height, width, antialias=False), np.float32)
