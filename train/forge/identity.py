"""A portrait as if of another person in another place: features, skin and light, without a seam.

Our training portraits are a few hundred officials, lit by professionals: no children, no make-up,
no midday sun, no flash.  A network that meets an unusual face or light only in forgeries calls all
such faces forged.  So a share of the training pictures is changed as a whole before anything is
forged; the network then meets unusual faces among the reals, too.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ralf.train.forge.landmarks import FaceGeometry, Region, fill, grown
from ralf.train.forge.manipulations import expression, smoothed
from ralf.train.forge.pixels import Image, Kernel, Pixels, blur, grid, remap, smooth_field, to_u8

CHEEK_TONE = np.array([0.08, -0.06, -0.03], np.float32)


def as_another_person(
    image: Image, face: FaceGeometry, seed: int | None
) -> tuple[Image, FaceGeometry]:
    """The picture as if of another person in another place, and where the face is then.

    Without a seed it is returned as it was.
    """
    if seed is None:
        return image, face
    rng = np.random.default_rng(seed)
    # Drawn first and together: whether one change is made does not depend on what another drew.
    chance = rng.random(6)
    out = image.astype(np.float32)
    if chance[0] < 0.4:
        out = smoothed(out, face, rng)
    if chance[1] < 0.7:
        out, face = change_features(out, face, rng, speaks=bool(chance[2] < 0.6))
    changes: tuple[Callable[..., Pixels], ...] = (shade, light_face, add_makeup)
    for change, drawn in zip(changes, chance[3:], strict=True):
        if drawn < 0.35:
            out = change(np.clip(out, 0, 255), face, rng)
    return to_u8(out), face


def change_features(
    image: Pixels, face: FaceGeometry, rng: np.random.Generator, *, speaks: bool
) -> tuple[Pixels, FaceGeometry]:
    """Other features, and with `speaks` another expression."""
    height, width = image.shape[:2]
    amplitude = rng.uniform(0, 0.1) * face.eye_distance
    bend = smooth_field(rng, height, width, cells=int(rng.integers(3, 7)), amplitude=amplitude)
    if speaks:
        bend = bend + expression(face, height, width, rng, eyes=0.05)
    kernel: Kernel = "bicubic" if rng.random() < 0.5 else "bilinear"
    return remap(image, grid(height, width) + bend, kernel), face.moved(bend)


def shade(image: Pixels, face: FaceGeometry, rng: np.random.Generator) -> Pixels:
    """Light from one side, or through leaves."""
    light = uneven_light(rng, *image.shape[:2])
    warmth = 1 + rng.normal(0, 0.2) * np.array([1, 0, -1]) + rng.normal(0, 0.04, 3)
    # A product and not a sum, as light is; exp keeps it above 0.
    gain: Pixels = np.exp(light * (rng.uniform(0.05, 0.4) * warmth)).astype(np.float32)
    return image * gain


def uneven_light(rng: np.random.Generator, height: int, width: int) -> NDArray[np.float64]:
    """A field of light and shade, with soft borders or hard ones: [h, w, 1], -1 to 1."""
    hills = smooth_field(rng, height, width, cells=int(rng.integers(1, 5)), amplitude=1)[..., 0]
    hardness = np.exp(rng.uniform(np.log(0.7), np.log(12)))
    light: NDArray[np.float64] = np.tanh(hardness * (hills - rng.normal(0, 0.3)))[..., None]
    return light


def light_face(image: Pixels, face: FaceGeometry, rng: np.random.Generator) -> Pixels:
    """A flash on the face, or the sun behind it: its surroundings darker than it, or brighter."""
    height, width = image.shape[:2]
    at = face.five.mean(axis=0) + rng.normal(0, 0.4 * face.eye_distance, 2)
    reach = rng.uniform(1.0, 2.2, 2) * face.eye_distance
    away = (((grid(height, width) - at) / reach) ** 2).sum(axis=-1)
    light = np.exp(-(away ** rng.uniform(0.7, 2)))[..., None]
    gain: Pixels = np.exp(light * rng.normal(0, 0.3)).astype(np.float32)
    return image * gain


def add_makeup(image: Pixels, face: FaceGeometry, rng: np.random.Generator) -> Pixels:
    """Make-up on lips, lids and cheeks."""
    height, width = image.shape[:2]
    unit, gain = face.eye_distance, np.zeros((height, width, 3), np.float32)
    parts_and_depths: tuple[tuple[Region, float], ...] = (("mouth", 0.25), ("eyes", 0.3))
    for region, depth in parts_and_depths:
        if rng.random() < 0.7:
            parts = [grown(part, rng.uniform(0.9, 1.3)) for part in face.outline(region)]
            mask = blur(fill(parts, height, width), unit * rng.uniform(0.01, 0.06))
            tone = rng.normal([0.05, -0.1, -0.05] if region == "mouth" else -0.1, depth / 2, 3)
            gain += mask[..., None] * tone.astype(np.float32)
    if rng.random() < 0.5:
        for eye, corner in zip(face.five[:2], face.five[3:], strict=True):
            at = (eye + corner) / 2 + (eye - face.five[:2].mean(0)) * 0.3
            away = ((grid(height, width) - at) / (unit * rng.uniform(0.15, 0.35))) ** 2
            gain += np.exp(-away.sum(-1))[..., None] * CHEEK_TONE
    return image * np.exp(gain)
