"""What a forger's tool makes of a face before it is blended in: one function for each trace.

Each takes a picture (f32 [h, w, 3], 0 to 255), where its face is, and a generator, and gives the
altered picture; families.py decides how much of it is seen.  Strengths are drawn from wide
ranges on purpose: a weak trace must be met in training as well as a strong one.
"""

import numpy as np
from scipy import ndimage
from scipy.interpolate import RBFInterpolator

from ralf.train.forge.landmarks import LOWER_LIP, MOUTH_CORNERS, UPPER_LIP, FaceGeometry, Points
from ralf.train.forge.pixels import (
    Kernel,
    Pixels,
    blur,
    grid,
    jpeg,
    remap,
    resize,
    saturated,
    smooth_field,
    spread,
)

KERNELS: tuple[Kernel, ...] = ("nearest", "bilinear", "bicubic")


def tint(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Another white balance, brightness, contrast and saturation."""
    gain = 1 + rng.normal(0, 0.035, 3).astype(np.float32)
    contrast, saturation = np.exp(rng.normal(0, 0.1, 2)).astype(np.float32)
    level = np.float32(image.mean())
    out = (image * gain - level) * contrast + level + np.float32(rng.normal(0, 6))
    return np.clip(saturated(out, saturation), 0, 255)


def change_texture(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Another sharpness, noise or compression than the picture around it."""
    kind = rng.integers(5)
    if kind == 0:
        return blur(image, rng.uniform(0.4, 1.5))
    if kind == 1:
        return image + (image - blur(image, 1.0)) * np.float32(rng.uniform(0.4, 1.6))
    if kind == 2:
        height, width = image.shape[:2]
        scale = rng.uniform(0.3, 0.8)
        small = resize(image, max(8, int(height * scale)), max(8, int(width * scale)))
        return resize(small, height, width, "bicubic")
    if kind == 3:
        return jpeg(image, int(rng.integers(30, 85)))
    grain = rng.normal(0, rng.uniform(2, 7), image.shape[:2]).astype(np.float32)
    return image + blur(grain, rng.uniform(0, 0.8))[..., None]


def shift(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Colour, or sharpness, or both, moved away from the original's."""
    kind = rng.random()
    out = tint(image, rng) if kind < 0.75 else image
    return change_texture(out, rng) if kind > 0.4 else out


def displace(image: Pixels, face: FaceGeometry, rng: np.random.Generator) -> Pixels:
    """The picture a little moved, scaled, turned and bent about its face."""
    height, width = image.shape[:2]
    unit = face.eye_distance
    middle = face.five.mean(axis=0)
    angle, scale = rng.normal(0, 0.02), np.exp(rng.normal(0, 0.03))
    # The inverse of the movement, as remap asks where each pixel comes from: hence `/ scale`.
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / scale
    away = (grid(height, width) - middle) @ turn.T.astype(np.float32)
    at = away + middle + rng.normal(0, 0.03 * unit, 2).astype(np.float32)
    at += smooth_field(rng, height, width, cells=4, amplitude=rng.uniform(0, 0.035) * unit)
    return remap(image, at, "bicubic" if rng.random() < 0.5 else "bilinear")


def morph(image: Pixels, before: Points, after: Points, scale: float) -> Pixels:
    """The picture bent so that what was at `before` is at `after`; far away it stays.

    A thin-plate spline, evaluated on a coarse grid: its bends are wider than the grid's cells.
    """
    height, width = image.shape[:2]
    return remap(image, grid(height, width) + _spline(before, after, height, width, scale))


def _spline(before: Points, after: Points, height: int, width: int, scale: float) -> Pixels:
    """Where each pixel comes from, relative to itself: [h, w, 2]."""
    rows, columns = min(32, height), min(32, width)
    y = (np.arange(rows) + 0.5) * height / rows - 0.5
    x = (np.arange(columns) + 0.5) * width / columns - 0.5
    # In eye distances, so that the smoothing below means the same on small and large faces.
    cells = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2) / scale
    pull = (before - after).astype(np.float64)
    # A little smoothing, so that two knots that nearly coincide do not tear the picture.
    plate = RBFInterpolator(after.astype(np.float64) / scale, pull, smoothing=1e-3)
    return spread(plate(cells).reshape(rows, columns, 2).astype(np.float32), height, width)


def transplant(
    donor: Pixels,
    donor_face: FaceGeometry,
    target: Pixels,
    face: FaceGeometry,
    rng: np.random.Generator,
) -> Pixels:
    """The donor's picture bent so that its face lies on the target's, in the target's colours."""
    height, width = target.shape[:2]
    meshes = donor_face.mesh is not None and face.mesh is not None
    # A mesh on one side only has no partner points, so both fall back to five points.
    plain = (FaceGeometry(one.box, one.five) for one in (donor_face, face))
    source, place = (donor_face, face) if meshes else plain
    before, after = (source.mesh, place.mesh) if meshes else (source.controls(), place.controls())
    assert before is not None and after is not None
    if meshes:
        # 52 points say as much as 468, and the spline's cost grows with the cube of their number.
        before, after = before[::9], after[::9]
    field = _spline(before, after, height, width, face.eye_distance)
    moved = remap(donor, grid(height, width) + field, "bicubic")
    # Colours are matched within the face's box: the surroundings are not blended in.
    left, top, right, bottom = np.clip(face.box, 0, [width, height, width, height]).astype(int)
    inside = (slice(top, max(bottom, top + 1)), slice(left, max(right, left + 1)))
    return _match(moved, moved[inside], target[inside], rng.uniform(0.7, 1.0))


def _match(image: Pixels, mine: Pixels, wanted: Pixels, amount: float) -> Pixels:
    """Mean and spread of each channel moved towards those wanted."""
    mean, spread_ = mine.mean(axis=(0, 1)), mine.std(axis=(0, 1)) + 1e-3
    # Bounded: a nearly flat patch has a spread near 0, and its noise would be blown up.
    gain = np.clip(wanted.std(axis=(0, 1)) / spread_, 0.5, 2)
    matched = (image - mean) * gain + wanted.mean(axis=(0, 1))
    nearer: Pixels = np.clip(image + (matched - image) * np.float32(amount), 0, 255)
    return nearer


def _ring(face: FaceGeometry) -> Points:
    """Points far out that hold the picture still while its face moves."""
    # A thin-plate spline does not fade away from its points: without these the borders move too.
    middle, reach = face.five.mean(axis=0), 2.2 * face.eye_distance
    turns = np.linspace(0, 2 * np.pi, 10, endpoint=False)
    return np.asarray(middle + reach * np.c_[np.cos(turns), np.sin(turns)], np.float32)


def _mouth(face: FaceGeometry) -> Points:
    """Left corner, right corner, upper lip, lower lip."""
    if face.mesh is not None:
        return face.mesh[[*MOUTH_CORNERS, UPPER_LIP, LOWER_LIP]]
    left, right = face.five[3], face.five[4]
    down = _down(face) * face.eye_distance
    middle = (left + right) / 2
    return np.stack([left, right, middle - 0.1 * down, middle + 0.22 * down])


def _down(face: FaceGeometry) -> Points:
    """The unit vector from eyes to mouth."""
    way = face.five[3:].mean(axis=0) - face.five[:2].mean(axis=0)
    return np.asarray(way / max(float(np.linalg.norm(way)), 1e-3), np.float32)


def _mouth_moves(face: FaceGeometry, rng: np.random.Generator) -> Points:
    """Displacements of the mouth's four points: opened or closed, widened or narrowed, shifted."""
    unit, down = face.eye_distance, _down(face)
    across = np.array([down[1], -down[0]], np.float32)
    wide, lift = np.clip(rng.normal(0, 0.05, 2), -0.1, 0.08)
    push = np.clip(rng.normal(0.04, 0.08), -0.06, 0.2)
    push += np.copysign(0.02, push)  # never nearly nothing, never so much that lips fold over
    along = np.array([-wide, wide, 0, 0])[:, None] * across
    vertical = np.array([lift, lift, -0.4 * push, push])[:, None] * down
    return np.asarray((along + vertical) * unit + rng.normal(0, 0.015 * unit, 2), np.float32)


def drawn_anew(image: Pixels, face: FaceGeometry, rng: np.random.Generator) -> Pixels:
    """A light trace of having been drawn anew: softer, or slightly off in colour."""
    kind = rng.random()
    if kind < 0.45:
        return redraw(image, face, rng, least=96)
    return shift(image, rng) if kind < 0.8 else blur(image, rng.uniform(0.4, 1.0))


def move_mouth(image: Pixels, face: FaceGeometry, rng: np.random.Generator) -> Pixels:
    """The mouth in another position."""
    mouth, hold = _mouth(face), np.concatenate([_ring(face), face.five[:3]])
    before = np.concatenate([mouth, hold])
    after = np.concatenate([mouth + _mouth_moves(face, rng), hold])
    return drawn_anew(morph(image, before, after, face.eye_distance), face, rng)


def move_eyes(image: Pixels, face: FaceGeometry, rng: np.random.Generator) -> Pixels:
    """Eyes and brows moved, each a little on its own."""
    unit, down = face.eye_distance, _down(face)
    across = np.array([down[1], -down[0]], np.float32)
    eyes = np.concatenate([face.five[:2] + side * 0.2 * unit * across for side in (-1, 0, 1)])
    brows = face.five[:2] - 0.27 * unit * down
    raised = rng.normal(0, 0.06 * unit) * down
    moves = rng.normal(0, 0.02 * unit, eyes.shape)
    hold = np.concatenate([_ring(face), face.five[2:]])
    before = np.concatenate([eyes, brows, hold])
    after = np.concatenate([eyes + moves, brows + raised, hold])
    return drawn_anew(morph(image, before, after.astype(np.float32), unit), face, rng)


def move_expression(image: Pixels, face: FaceGeometry, rng: np.random.Generator) -> Pixels:
    """The whole expression moved: mouth, nose, eyes."""
    height, width = image.shape[:2]
    moves = expression(face, height, width, rng, eyes=0.035)
    return drawn_anew(remap(image, grid(height, width) + moves), face, rng)


def expression(
    face: FaceGeometry, height: int, width: int, rng: np.random.Generator, *, eyes: float
) -> Pixels:
    """Where each pixel of another expression comes from: [h, w, 2]; 0 far from the face."""
    unit = face.eye_distance
    mouth, upper = _mouth(face), face.five[:3]
    before = np.concatenate([mouth, upper, _ring(face)])
    moved = upper + rng.normal(0, eyes * unit, upper.shape)
    after = np.concatenate([mouth + _mouth_moves(face, rng), moved, _ring(face)])
    return _spline(before, after.astype(np.float32), height, width, unit)


def redraw(image: Pixels, face: FaceGeometry, rng: np.random.Generator, least: int = 48) -> Pixels:
    """The face at an autoencoder's size, bent, and enlarged again."""
    height, width = image.shape[:2]
    tall = max(1.0, float(face.box[3] - face.box[1]))
    scale = min(1.0, rng.uniform(least, 176) / tall)
    small = resize(image, max(8, round(height * scale)), max(8, round(width * scale)), "bicubic")
    bend = smooth_field(rng, *small.shape[:2], cells=5, amplitude=0.01 * tall * scale)
    small = remap(small, grid(*small.shape[:2]) + bend)
    kernel = KERNELS[rng.choice(3, p=[0.1, 0.45, 0.45])]
    back = resize(small, height, width, kernel)
    back = blur(back, 0.6) if kernel == "nearest" else back
    sharper = back + (back - blur(back, 1.2)) * np.float32(rng.uniform(0, 0.9))
    return tint(sharper, rng) if rng.random() < 0.5 else np.clip(sharper, 0, 255)


def smoothed(image: Pixels, face: FaceGeometry, rng: np.random.Generator) -> Pixels:
    """Skin without its texture: a guided filter keeps edges and takes the rest."""
    radius = max(2, round(face.eye_distance * rng.uniform(0.03, 0.09)))
    tolerance = np.float32(rng.uniform(60, 500))
    out = np.empty_like(image)
    for channel in range(3):
        out[..., channel] = _guided(image[..., channel], radius, tolerance)
    return image + (out - image) * np.float32(rng.uniform(0.5, 1.0))


def smooth_skin(image: Pixels, face: FaceGeometry, rng: np.random.Generator) -> Pixels:
    """Smooth skin, as generators draw it."""
    out = smoothed(image, face, rng)
    if rng.random() < 0.5:  # generators lay one regular texture over the skin
        texture = blur(rng.normal(0, 1, image.shape[:2]).astype(np.float32), rng.uniform(0.5, 1.2))
        out += (texture / texture.std() * np.float32(rng.uniform(0.5, 2.5)))[..., None]
    return tint(out, rng) if rng.random() < 0.3 else out


def _guided(plane: Pixels, radius: int, tolerance: np.float32) -> Pixels:
    """He's guided filter with the plane as its own guide."""
    side = 2 * radius + 1
    mean = ndimage.uniform_filter(plane, side)
    # In FP32 a flat patch may come out a little below 0.  `tolerance` is 60 or more and keeps the
    # quotient below finite.
    variance = ndimage.uniform_filter(plane * plane, side) - mean * mean
    a = variance / (variance + tolerance)
    b = mean * (1 - a)
    smooth: Pixels = ndimage.uniform_filter(a, side) * plane + ndimage.uniform_filter(b, side)
    return smooth


def upsample(image: Pixels, face: FaceGeometry, rng: np.random.Generator) -> Pixels:
    """Halved, then doubled by a transposed convolution whose taps overlap unevenly."""
    height, width = image.shape[:2]
    scale = min(1.0, rng.uniform(90, 220) / max(1.0, float(face.box[3] - face.box[1])))
    # Even, so that exactly one zero stands beside each of the small picture's pixels.
    tall, wide = 2 * max(8, round(height * scale / 2)), 2 * max(8, round(width * scale / 2))
    small = resize(image, tall // 2, wide // 2, "bicubic")
    stuffed = np.zeros((tall, wide, 3), np.float32)
    stuffed[::2, ::2] = small
    # They sum to 2 and not to 1: every other sample that they meet is a zero.
    taps = np.array([1.0, 3.0, 3.0, 1.0]) / 4
    uneven = rng.normal(0, rng.uniform(0.01, 0.07), (2, 4))
    for axis in (0, 1):
        kernel = (taps * (1 + uneven[axis])).astype(np.float32)
        stuffed = ndimage.convolve1d(stuffed, kernel, axis=axis, mode="nearest", origin=0)
    # The uneven taps changed the brightness too; only their pattern should stay.
    stuffed += small.mean() - stuffed.mean()
    sharper = stuffed + (stuffed - blur(stuffed, 1.0)) * np.float32(rng.uniform(0.2, 1.0))
    out = resize(sharper, height, width, "bicubic") if (tall, wide) != (height, width) else sharper
    return tint(out, rng) if rng.random() < 0.4 else np.clip(out, 0, 255)
