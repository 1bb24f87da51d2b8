"""The conditions of robustness tables: perturbations of a picture, by kind and level.

DEEPERFORENSICS is the field's standard: seven kinds of five levels each, with the published
parameters.  Its "JPEG" is not JPEG but a picture made small and large again, so it is called
`pixelation` here; true JPEG is `jpeg`.  RALF's Table 3 uses four kinds at level 2: `fade` (which
the paper calls contrast), blur, `rescale` (which it calls compression) and pixelation.  They change
the crop of 256 pixels and not the picture that it is cut from: `@crop` says so.  `h264` is by CRF.
`light` is ours: sun from one side or through leaves, which studio portraits do not show.

Training damages pictures too (forge/upload_damage.py), at random strengths and several kinds at
once.  Here one thing changes at a time, by a published amount; the encoders are the same.

Kernels follow OpenCV's definitions; values may differ from OpenCV's own by one.  Noise and blocks
come from the generator passed in, so a table can be made again.
"""

from collections.abc import Callable

import numpy as np
from scipy import ndimage

from ralf.train.forge.identity import uneven_light
from ralf.train.forge.pixels import LUMA, Image, Pixels, resize, saturated, to_u8
from ralf.train.forge.upload_damage import UploadDamage, encoded

Apply = Callable[[Image, float, np.random.Generator], Image]


def _saturation(image: Image, factor: float, _rng: np.random.Generator) -> Image:
    """Colour differences shrunk towards grey; 0 takes all of them."""
    return to_u8(saturated(image.astype(np.float32), factor))


def _contrast(image: Image, factor: float, _rng: np.random.Generator) -> Image:
    """Every value multiplied: darker as well as flatter."""
    return (image.astype(np.float32) * np.float32(factor)).astype(np.uint8)


def _fade(image: Image, factor: float, _rng: np.random.Generator) -> Image:
    """Blended with its own mean grey: flatter, and as bright as before."""
    grey = np.float32(round(float((image.astype(np.float32) @ LUMA).mean())))
    return to_u8(grey + (image.astype(np.float32) - grey) * np.float32(factor))


def _blocks(image: Image, count: float, rng: np.random.Generator) -> Image:
    """Grey squares of 8 pixels; the count is for a picture of 256 and grows with larger ones."""
    out = image.copy()
    height, width = image.shape[:2]
    for _ in range(int(count) * max(1, min(height, width) // 256)):
        top, left = rng.integers(0, height - 8), rng.integers(0, width - 8)
        out[top : top + 8, left : left + 8] = 128
    return out


# ITU-R BT.601, full range: rows Y, Cb, Cr.
_TO_YCC = np.array(
    [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]], np.float32
)
_FROM_YCC = np.linalg.inv(_TO_YCC).astype(np.float32)


def _noise(image: Image, variance: float, rng: np.random.Generator) -> Image:
    """Gaussian noise of this variance (values 0 to 1) on luma and both colour differences."""
    scaled = image.astype(np.float32) / np.float32(255)
    planes = np.asarray(scaled @ _TO_YCC.T, np.float32)
    planes += np.float32(np.sqrt(variance)) * rng.standard_normal(planes.shape, np.float32)
    return to_u8((planes @ _FROM_YCC.T * np.float32(255)).astype(np.float32, copy=False))


def _blur(image: Image, size: float, _rng: np.random.Generator) -> Image:
    """A Gaussian of `size` taps whose sigma is a sixth of that."""
    at = np.arange(int(size)) - (int(size) - 1) / 2
    taps = np.exp(-0.5 * (at / (size / 6)) ** 2)
    out = image.astype(np.float32)
    for axis in (0, 1):
        # scipy's `mirror` is OpenCV's default border: the edge pixel is not repeated.
        out = ndimage.correlate1d(out, taps / taps.sum(), axis=axis, mode="mirror")
    return to_u8(out)


def _pixelation(image: Image, factor: float, _rng: np.random.Generator) -> Image:
    """Reduced, and enlarged by repeating pixels."""
    small = _reduced(image, factor)
    return to_u8(resize(small, image.shape[0], image.shape[1], "nearest"))


def _rescale(image: Image, factor: float, _rng: np.random.Generator) -> Image:
    """Reduced and enlarged, both times bilinear without a low-pass."""
    small = _reduced(image, factor)
    return to_u8(resize(small, image.shape[0], image.shape[1], antialias=False))


def _reduced(image: Image, factor: float) -> Pixels:
    height, width = (max(1, int(side / factor)) for side in image.shape[:2])
    return resize(image.astype(np.float32), height, width, antialias=False)


def _h264(image: Image, crf: float, _rng: np.random.Generator) -> Image:
    """The second frame of a clip whose first was shifted by two pixels and one."""
    # Most frames of a video are predicted from another; a lone frame would be a key frame.
    return encoded(image, UploadDamage(codec="libx264", quality=crf, motion=(2, 1)))


def _jpeg(image: Image, quality: float, _rng: np.random.Generator) -> Image:
    return encoded(image, UploadDamage(codec="jpeg", quality=int(quality)))


def _light(image: Image, strength: float, rng: np.random.Generator) -> Image:
    """Brighter here than there by up to exp(2 strength)."""
    light = uneven_light(rng, *image.shape[:2])
    return to_u8((image * np.exp(strength * light)).astype(np.float32))


DEEPERFORENSICS: dict[str, tuple[float, ...]] = {
    "saturation": (0.4, 0.3, 0.2, 0.1, 0.0),
    "contrast": (0.85, 0.725, 0.6, 0.475, 0.35),
    "blocks": (16, 32, 48, 64, 80),
    "noise": (0.001, 0.002, 0.005, 0.01, 0.05),
    "blur": (7, 9, 13, 17, 21),
    "pixelation": (2, 3, 4, 5, 6),
    "h264": (30, 32, 35, 38, 40),
}
TRUE_JPEG = {"jpeg": (90.0, 70.0, 50.0, 30.0, 10.0)}
RESCALE = {"rescale": (2.0, 3.0, 4.0, 5.0, 6.0)}
LIGHT = {"light": (0.1, 0.2, 0.3, 0.4, 0.5)}
FADE = {"fade": DEEPERFORENSICS["contrast"]}
LEVELS = DEEPERFORENSICS | TRUE_JPEG | RESCALE | LIGHT | FADE
REQUANTISED = ("jpeg=16", "jpeg=8")
"""Saved again as a JPEG of low quality, as messengers and screenshots do."""
ON_CROP = "@crop"
TABLE_3 = ("fade:2@crop", "blur:2@crop", "rescale:2@crop", "pixelation:2@crop")
"""What RALF's Table 3 shows."""
_APPLY: dict[str, Apply] = {
    "saturation": _saturation,
    "contrast": _contrast,
    "fade": _fade,
    "blocks": _blocks,
    "noise": _noise,
    "blur": _blur,
    "pixelation": _pixelation,
    "h264": _h264,
    "jpeg": _jpeg,
    "rescale": _rescale,
    "light": _light,
}
CLEAN = "clean"


def perturb(image: Image, condition: str, rng: np.random.Generator) -> Image:
    """The picture under a condition: "clean", "blur:2" (a level from 1 to 5), or "h264=23".

    After "=" comes the parameter itself: CRF, JPEG quality, factor, variance, taps, count or
    strength.  "blur:2@crop" is meant for the crop: whoever calls passes that.
    """
    kind, value = parse(condition)
    return image if kind == CLEAN else _APPLY[kind](image, value, rng)


def parse(condition: str) -> tuple[str, float]:
    """The kind and its parameter; an unknown one is refused with those that are known."""
    if condition == CLEAN:
        return CLEAN, 0.0
    condition = condition.removesuffix(ON_CROP)
    level = ":" in condition
    kind, _, text = condition.partition(":" if level else "=")
    if kind not in LEVELS:
        raise ValueError(f"no perturbation {kind!r}; known: {', '.join((CLEAN, *LEVELS))}")
    try:
        value = float(text)
    except ValueError:
        # Refused below as any number out of range is, so that every bad value gets the same
        # advice.
        value = -1.0
    if level and value not in (1, 2, 3, 4, 5):
        raise ValueError(f"a level is a whole number from 1 to 5, not {text!r} (in {condition!r})")
    if value < 0:
        raise ValueError(f"{condition!r} should be like {kind}:2 or {kind}={LEVELS[kind][1]:g}")
    return kind, LEVELS[kind][int(value) - 1] if level else value


def on_crop(condition: str) -> bool:
    """Whether it changes the crop, and not the picture that the crop is cut from."""
    return condition.endswith(ON_CROP)


def all_conditions(kinds: tuple[str, ...] = tuple(DEEPERFORENSICS)) -> list[str]:
    """Every kind at every level."""
    return [f"{kind}:{level}" for kind in kinds for level in range(1, 6)]
