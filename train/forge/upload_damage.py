"""Damage that every upload suffers, forged or not: scaling, blur, noise, colour, JPEG, H.264.

UploadDamage is drawn once for a real face and its forgery and applied to both, so that the quality
of a picture does not tell whether it is forged.  The order is that of a camera and a platform:
colour and blur first, then the size, the sensor's noise, and last the encoder.  Damage is applied
to the picture around the face, before the crop is cut, so that a crop is padded as in serving.

`flip` and `identity_seed` are drawn with it, since a pair must share them too; whoever cuts the
crop flips it, and train/forge/identity.py changes the identity before anything is forged.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from ralf.train.forge.pixels import (
    Image,
    Kernel,
    Pixels,
    blur,
    jpeg,
    resize,
    saturated,
    shifted,
    to_u8,
)
from ralf.train.forge.video import recompress
from ralf.train.recipe import Augment

Codec = Literal["none", "jpeg", "libx264", "libx265"]


@dataclass(frozen=True)
class UploadDamage:
    """What happened to one upload; the defaults leave a picture as it is."""

    flip: bool = False
    identity_seed: int | None = None
    """The seed of another person's features, skin and light; None leaves them."""
    gain: tuple[float, float, float] = (1.0, 1.0, 1.0)
    gamma: float = 1.0
    saturation: float = 1.0
    blur: float = 0.0
    scale: float = 1.0
    """Size of the picture afterwards over its size before."""
    kernel: Kernel = "bilinear"
    noise: float = 0.0
    codec: Codec = "none"
    quality: float = 0.0
    """JPEG's quality, or the encoder's CRF."""
    motion: tuple[int, int] = (0, 0)
    """How far the frame before this one was shifted, in pixels: a P-frame is predicted from it."""
    intra: bool = False
    """Whether the frame is a key frame, predicted from nothing."""


def draw_damage(augment: Augment, rng: np.random.Generator, *, face_px: float) -> UploadDamage:
    """Damage by the recipe's probabilities; `face_px` is the longer side of the face's box."""
    # Drawn first and together: whether one kind happens does not depend on what another drew.
    chance = rng.random(7)
    changed: dict[str, object] = {"flip": bool(chance[0] < augment.flip)}
    if chance[1] < augment.colour:
        grey = rng.random() < 0.15
        changed["gain"] = tuple(float(x) for x in np.exp(rng.normal(0, 0.06, 3)))
        changed["gamma"] = float(np.exp(rng.normal(0, 0.15)))
        changed["saturation"] = 0.0 if grey else float(np.exp(rng.normal(0, 0.2)))
    if chance[2] < augment.blur:
        changed["blur"] = float(rng.uniform(0.3, 1.6))
    if chance[3] < augment.resize:
        # Down to a face of 56 px.  Uniform in the logarithm: small sizes are as frequent as large.
        least = min(1.0, 56 / face_px)
        changed["scale"] = float(np.exp(rng.uniform(np.log(least), 0)))
        changed["kernel"] = ("bilinear", "bicubic")[rng.integers(2)]
    if chance[4] < augment.noise:
        changed["noise"] = float(rng.uniform(1, 9))
    if chance[5] < augment.h264:
        changed["codec"] = "libx265" if rng.random() < 0.1 else "libx264"
        changed["quality"] = float(rng.uniform(18, 42))
        changed["motion"] = tuple(int(step) for step in rng.integers(-3, 4, 2))
        changed["intra"] = bool(rng.random() < 0.2)
    # JPEG is drawn only where H.264 was not: the division keeps its overall share as asked for.
    elif chance[6] < augment.jpeg / max(1 - augment.h264, 1e-6):
        changed["codec"], changed["quality"] = "jpeg", float(rng.integers(30, 96))
    if rng.random() < augment.other:
        changed["identity_seed"] = int(rng.integers(2**31))
    return UploadDamage(**changed)  # type: ignore[arg-type]


def damaged(image: Image, damage: UploadDamage, rng: np.random.Generator) -> Image:
    """The picture after the damage, at its new size; not flipped."""
    out = image.astype(np.float32)
    out = _coloured(out, damage)
    out = blur(out, damage.blur)
    height, width = image.shape[:2]
    if damage.scale < 1:
        tall, wide = max(16, round(height * damage.scale)), max(16, round(width * damage.scale))
        out = resize(out, tall, wide, damage.kernel)
    if damage.noise:
        grain = rng.normal(0, damage.noise, (*out.shape[:2], 1)).astype(np.float32)
        out = out + grain * (0.7 + 0.3 * rng.standard_normal(out.shape, np.float32))
    return encoded(to_u8(out), damage)


def _coloured(image: Pixels, damage: UploadDamage) -> Pixels:
    if damage.gamma == 1 and damage.saturation == 1 and damage.gain == (1, 1, 1):
        return image
    table = (255 * (np.arange(256) / 255) ** damage.gamma).astype(np.float32)
    curved: Pixels = table[to_u8(image * np.array(damage.gain, np.float32))]
    return saturated(curved, damage.saturation)


def encoded(image: Image, damage: UploadDamage) -> Image:
    """The picture after the damage's encoder and a decoder."""
    if damage.codec == "none":
        return image
    if damage.codec == "jpeg":
        return to_u8(jpeg(image.astype(np.float32), round(damage.quality)))
    if damage.intra:
        return np.asarray(recompress([image], damage.quality, damage.codec)[0])
    # Most frames of an upload are predicted from another one, and leave other traces than a key
    # frame: a shifted copy of the picture plays the frame before.
    before = shifted(image, damage.motion)
    return np.asarray(recompress([before, image], damage.quality, damage.codec)[1])
