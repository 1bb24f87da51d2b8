"""What happens to every upload, forged or not: scaling, blur, noise, colour, JPEG, H.264.

A Wear is drawn once for a real face and its forgery together and put on both: how good a picture
is must not tell whether it is forged.  The order is that of a camera and a platform: colour and
blur first, then the size, the sensor's noise, and last the encoder.  It works on the picture
around the face, before the crop is cut, so that a crop's edges are padded as in serving.

Its first part, `other`, comes before the forging: train/forge/identity.py.
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
class Wear:
    """One way of having been through the world; the defaults leave a picture as it is."""

    flip: bool = False
    other: int | None = None
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
    """How far the picture before this one stood aside, in pixels: what a P-frame predicts from."""
    intra: bool = False
    """Whether the frame seen is a key frame."""


def draw(augment: Augment, rng: np.random.Generator, *, face_px: float) -> Wear:
    """A Wear by the recipe's probabilities; `face_px` is the longer side of the face's box."""
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
        # Down to a face of 56 px; little sizes as often as large ones.
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
    elif chance[6] < augment.jpeg / max(1 - augment.h264, 1e-6):
        changed["codec"], changed["quality"] = "jpeg", float(rng.integers(30, 96))
    if rng.random() < augment.other:
        changed["other"] = int(rng.integers(2**31))
    return Wear(**changed)  # type: ignore[arg-type]


def put_on(wear: Wear, image: Image, rng: np.random.Generator) -> Image:
    """The picture after it, at its new size.  Flipping is left to whoever cuts the crop."""
    out = image.astype(np.float32)
    out = _coloured(out, wear)
    out = blur(out, wear.blur)
    height, width = image.shape[:2]
    if wear.scale < 1:
        tall, wide = max(16, round(height * wear.scale)), max(16, round(width * wear.scale))
        out = resize(out, tall, wide, wear.kernel)
    if wear.noise:
        grain = rng.normal(0, wear.noise, (*out.shape[:2], 1)).astype(np.float32)
        out = out + grain * (0.7 + 0.3 * rng.standard_normal(out.shape, np.float32))
    return encoded(to_u8(out), wear)


def _coloured(image: Pixels, wear: Wear) -> Pixels:
    if wear.gamma == 1 and wear.saturation == 1 and wear.gain == (1, 1, 1):
        return image
    table = (255 * (np.arange(256) / 255) ** wear.gamma).astype(np.float32)
    curved: Pixels = table[to_u8(image * np.array(wear.gain, np.float32))]
    return saturated(curved, wear.saturation)


def encoded(image: Image, wear: Wear) -> Image:
    """Through the encoder that the Wear names."""
    if wear.codec == "none":
        return image
    if wear.codec == "jpeg":
        return to_u8(jpeg(image.astype(np.float32), round(wear.quality)))
    if wear.intra:
        return np.asarray(recompress([image], wear.quality, wear.codec)[0])
    before = shifted(image, wear.motion)
    return np.asarray(recompress([before, image], wear.quality, wear.codec)[1])
