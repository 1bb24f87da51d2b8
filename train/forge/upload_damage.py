"""Damage that every upload suffers, forged or not: scaling, blur, noise, colour, JPEG, codecs.

UploadDamage is drawn once for a real face and its forgery and applied to both, so that the quality
of a picture does not tell whether it is forged.  The order is that of a camera and a platform:
colour and blur first, then the size, the sensor's noise, and last the encoder.  Damage is applied
to the picture around the face, before the crop is cut, so that a crop is padded as in serving.

`flip` and `identity_seed` are drawn with it, since a pair must share them too; whoever cuts the
crop flips it, and train/forge/identity.py changes the identity before anything is forged.
"""

from dataclasses import dataclass, replace
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

Codec = Literal["none", "jpeg", "libx264", "libx265", "libvpx-vp9"]
LADDER = (1080, 720, 480, 360)
"""Heights that platforms scale to."""


@dataclass(frozen=True)
class Generation:
    """One encoding on an upload's way: by the phone, by the platform, by whoever shares it on."""

    codec: Codec
    quality: float
    """JPEG's quality, or the encoder's CRF."""
    scale: float = 1.0
    """Size when encoded over the size at which the picture was taken."""
    ten_bit: bool = False
    motion: tuple[int, int] = (0, 0)
    """How far the frame before this one was shifted, in pixels: a P-frame is predicted from it."""
    intra: bool = False
    """Whether the frame is a key frame, predicted from nothing."""


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
    generations: tuple[Generation, ...] = ()
    """Encodings in their order, after those above; sizes are parts of the size before the first."""


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
    # No number is drawn for a recipe without them.
    if augment.uploads or augment.requantised:
        drawn_upload, drawn_requantised = rng.random(2)
        generations: tuple[Generation, ...] = ()
        if drawn_upload < augment.uploads:
            changed["codec"], changed["quality"] = "none", 0.0
            scale = changed.get("scale", 1.0)
            assert isinstance(scale, float)
            generations = draw_upload(rng, face_px=face_px * scale)
        if drawn_requantised < augment.requantised:
            last = generations[-1].scale if generations else 1.0
            generations += (Generation("jpeg", float(rng.integers(8, 17)), last),)
        changed["generations"] = generations
    return UploadDamage(**changed)  # type: ignore[arg-type]


def draw_upload(rng: np.random.Generator, *, face_px: float) -> tuple[Generation, ...]:
    """A phone's encoding or none, a platform's, and sometimes one more at the first size again."""
    taken = LADDER[rng.integers(2)]
    shown = LADDER[rng.integers(len(LADDER))]
    # Never up, and not below a face of 56 px.
    scale = float(np.clip(shown / taken, min(1.0, 56 / face_px), 1.0))
    made = [_encoding(rng, platform=False)] if rng.random() < 0.5 else []
    made.append(replace(_encoding(rng, platform=True), scale=scale))
    if scale < 1 and rng.random() < 0.3:
        # The small copy is taken up again and shared at full size.
        made.append(_encoding(rng, platform=True))
    return tuple(made)


def _encoding(rng: np.random.Generator, *, platform: bool) -> Generation:
    """A phone encodes well, and in ten bits now and then; a platform down to CRF 42."""
    drawn = rng.random(3)
    # H.265 takes three times H.264's time, VP9 twice: the shares keep training fast.
    codec: Codec = "libx264"
    if platform and drawn[0] < 0.18:
        codec = "libvpx-vp9" if drawn[0] < 0.12 else "libx265"
    elif not platform and drawn[0] < 0.12:
        codec = "libx265"
    quality = rng.uniform(18, 42) if platform else rng.uniform(18, 28)
    if codec == "libvpx-vp9":
        quality = 1.3 * quality + 2  # VP9 counts to 63
    return Generation(
        codec,
        float(quality),
        ten_bit=not platform and bool(drawn[1] < 0.3),
        motion=(int(rng.integers(-3, 4)), int(rng.integers(-3, 4))),
        intra=bool(drawn[2] < 0.2),
    )


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
    shown = encoded(to_u8(out), damage)
    height, width = shown.shape[:2]
    for generation in damage.generations:
        size = (max(16, round(height * generation.scale)), max(16, round(width * generation.scale)))
        if size != shown.shape[:2]:
            shown = to_u8(resize(shown.astype(np.float32), *size, damage.kernel))
        shown = _through(shown, generation)
    return shown


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
    once = Generation(damage.codec, damage.quality, motion=damage.motion, intra=damage.intra)
    return _through(image, once, preset="superfast")


def _through(image: Image, made: Generation, preset: str = "ultrafast") -> Image:
    """The picture after one encoder and a decoder."""
    if made.codec == "jpeg":
        return to_u8(jpeg(image.astype(np.float32), round(made.quality)))
    pixels = "yuv420p10le" if made.ten_bit else "yuv420p"
    # Most frames of an upload are predicted from another one, and leave other traces than a key
    # frame: a shifted copy of the picture plays the frame before.
    frames = [image] if made.intra else [shifted(image, made.motion), image]
    seen = recompress(frames, made.quality, made.codec, preset=preset, pixel_format=pixels)
    return np.asarray(seen[-1])
