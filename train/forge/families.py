"""Pseudo-forgeries from real faces: what a forger's tool leaves behind, without the forger.

A forged face is an altered copy of a face blended into the picture it came from.  Whatever made
the copy, two things remain: inside and outside disagree in colour, sharpness or noise, and the
mask that joins them has a border.  `forge` makes both, from one real image (or two, for `swap`),
by one of several families; each can be asked for alone, so that one may be held out.

    self_blend  the face, its statistics shifted and slightly moved, over itself
    inner       the same between brows and mouth only
    swap        another person's face, warped onto this one and matched in colour
    mouth       the mouth opened, closed or widened, as lip-sync and reenactment do
    eyes        brows and lids moved
    reenact     the whole expression moved
    resample    the face through a small size and back, as an autoencoder draws it
    smooth      skin without its texture
    spectrum    the periodic traces of transposed convolution
    boundary    an ellipse joined by bands of frequency: unlike the rest, so kept to judge by

Everything random comes from the generator passed in: the same state gives the same forgery.
It refuses an unknown family, and a swap without a donor.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ralf.train.forge import manipulations
from ralf.train.forge.landmarks import FaceGeometry, Region, fill, grown
from ralf.train.forge.pixels import (
    LUMA,
    Image,
    Pixels,
    blur,
    grid,
    remap,
    resize,
    smooth_field,
    to_u8,
)
from ralf.train.recipe import FAMILIES, Family


@dataclass(frozen=True)
class Portrait:
    """An image and where its face is."""

    image: Image  # u8 [h, w, 3]
    face: FaceGeometry


def forge(
    image: Image,
    face: FaceGeometry,
    family: Family,
    rng: np.random.Generator,
    *,
    donor: Portrait | None = None,
) -> tuple[Image, Pixels]:
    """A forged copy of the image, and how much of each pixel is forged: f32 [h, w], 0 to 1."""
    if family not in FAMILIES:
        raise ValueError(f"family should be one of {', '.join(FAMILIES)}; got {family!r}")
    target = image.astype(np.float32)
    if family == "boundary":
        out, mask = _banded(target, face, rng)
        return _as_coloured(out, image), mask
    if family == "swap":
        if donor is None:
            raise ValueError("a swap needs a donor: pass donor=Portrait(image, face)")
        source = manipulations.wear(donor.image.astype(np.float32), donor.face, target, face, rng)
    else:
        source = _MAKE[family](target, face, rng)
    mask = _mask(face, _region(family, rng), image.shape[:2], rng)
    if family == "self_blend" and rng.random() < 0.5:
        # Either side of the border may be the odd one; the picture around it then carries it.
        source, target = target, manipulations.shift(target, rng)
    return _as_coloured(target + (source - target) * mask[..., None], image), mask


def _as_coloured(out: Pixels, image: Image) -> Image:
    """Whole values; a grey picture stays grey, or a tint would tell what nothing else does."""
    channels = image[::4, ::4].astype(np.int16)
    grey = np.abs(channels - channels[..., 1:2]).max() <= 3
    return to_u8(np.repeat((out @ LUMA)[..., None], 3, axis=-1) if grey else out)


def _moved(image: Pixels, face: FaceGeometry, rng: np.random.Generator) -> Pixels:
    """A shifted copy of the face, a little displaced and bent."""
    return manipulations.displace(manipulations.shift(image, rng), face, rng)


_MAKE: dict[str, Callable[[Pixels, FaceGeometry, np.random.Generator], Pixels]] = {
    "self_blend": _moved,
    "inner": _moved,
    "mouth": manipulations.speak,
    "eyes": manipulations.look,
    "reenact": manipulations.act,
    "resample": manipulations.redraw,
    "smooth": manipulations.polish,
    "spectrum": manipulations.upsample,
}


def _region(family: Family, rng: np.random.Generator) -> Region:
    """Which part of the face the family replaces."""
    if family == "mouth":
        return "mouth" if rng.random() < 0.4 else "lower"
    if family in ("inner", "eyes"):
        return "eyes" if family == "eyes" else "inner"
    if family == "reenact":
        return "inner" if rng.random() < 0.4 else "face"
    return "face"


def _mask(
    face: FaceGeometry, region: Region, size: tuple[int, ...], rng: np.random.Generator
) -> Pixels:
    """The region's hull, its size and shape disturbed, its border feathered."""
    height, width = size[0] // 2, size[1] // 2  # half size: the border is soft anyway
    unit = face.eye_distance / 2
    small = region in ("mouth", "eyes", "nose")
    factor = rng.uniform(1.2, 1.9) if small else rng.uniform(0.85, 1.08)
    half = face.scaled(0.5, 0.5)
    hard = fill([grown(polygon, factor) for polygon in half.outline(region)], height, width)
    bent = grid(height, width) + smooth_field(
        rng, height, width, cells=int(rng.integers(3, 7)), amplitude=0.05 * unit
    )
    soft = blur(remap(hard, bent, edge="zeros"), unit * rng.uniform(0.02, 0.14))
    # Feathering spreads outwards and inwards alike; the power moves the half-way line inwards.
    soft = np.clip(soft, 0, 1) ** rng.uniform(1.0, 2.0)
    opacity = 1.0 if rng.random() < 0.6 else rng.uniform(0.6, 1.0)
    return resize(soft * np.float32(opacity), size[0], size[1], antialias=False)


def _banded(target: Pixels, face: FaceGeometry, rng: np.random.Generator) -> tuple[Pixels, Pixels]:
    """The held-out family: an ellipse, not a hull; bands of a pyramid, not one feather."""
    height, width = target.shape[:2]
    source = manipulations.displace(manipulations.tint(target, rng), face, rng)
    source = manipulations.grind(source, rng)
    left, top, right, bottom = face.box
    reach = np.array([right - left, bottom - top], np.float32) / 2 * rng.uniform(0.75, 1.0)
    middle = np.array([left + right, top + bottom], np.float32) / 2
    middle += rng.normal(0, 0.04 * face.eye_distance, 2).astype(np.float32)
    away = np.linalg.norm((grid(height, width) - middle) / reach, axis=-1)
    mask = (away < 1).astype(np.float32)
    out = np.zeros_like(target)
    a, b, m = source, target, blur(mask, 1.0)
    levels = int(rng.integers(2, 5))
    for level in range(levels):
        sigma = 2.0**level
        low_a, low_b = blur(a, sigma), blur(b, sigma)
        out += (b - low_b) + ((a - low_a) - (b - low_b)) * m[..., None]
        a, b, m = low_a, low_b, blur(m, sigma)
    out += b + (a - b) * m[..., None]
    return out, blur(mask, 2.0 ** (levels - 1))
