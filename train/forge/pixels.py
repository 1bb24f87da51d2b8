"""Operations on pixels: resampling, smooth random fields, blur, saturation, JPEG.

Everything that bends an image goes through `remap`, so that an animated portrait, a forged face
and its mask are resampled by one rule.  Images are float32 [h, w, c] or [h, w] with values 0 to
255 (masks 0 to 1).  Positions are pixel centres, x before y; (0, 0) is the centre of the top left
pixel.  All randomness comes from the generator that is passed in.
"""

import io
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image as Picture
from scipy import ndimage

Image = NDArray[np.uint8]
Pixels = NDArray[np.float32]
Kernel = Literal["nearest", "bilinear", "bicubic"]
Edge = Literal["border", "reflection", "zeros"]
LUMA = np.array([0.299, 0.587, 0.114], np.float32)
"""Weights of red, green and blue in brightness (ITU-R BT.601)."""


def grid(height: int, width: int) -> Pixels:
    """The position of every pixel: [h, w, 2]."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    return np.stack([x, y], axis=-1)


def remap(image: Pixels, at: Pixels, kernel: Kernel = "bilinear", edge: Edge = "border") -> Pixels:
    """The image seen at the given positions, at [h', w', 2] of its own pixels."""
    height, width = image.shape[:2]
    scale = np.array([2 / width, 2 / height], np.float32)
    where = torch.from_numpy((at + 0.5) * scale - 1)[None]
    source = torch.from_numpy(np.ascontiguousarray(image, np.float32))
    source = source[None, None] if image.ndim == 2 else source.permute(2, 0, 1)[None]
    seen = F.grid_sample(source, where, mode=kernel, padding_mode=edge, align_corners=False)[0]
    return seen[0].numpy() if image.ndim == 2 else seen.permute(1, 2, 0).contiguous().numpy()


def resize(
    image: Pixels, height: int, width: int, kernel: Kernel = "bilinear", antialias: bool = True
) -> Pixels:
    """The image at another size; antialiasing low-passes before it shrinks."""
    source = torch.from_numpy(np.ascontiguousarray(image, np.float32))
    source = source[None, None] if image.ndim == 2 else source.permute(2, 0, 1)[None]
    if kernel == "nearest":
        seen = F.interpolate(source, (height, width), mode="nearest-exact")[0]
    else:
        seen = F.interpolate(
            source, (height, width), mode=kernel, align_corners=False, antialias=antialias
        )[0]
    return seen[0].numpy() if image.ndim == 2 else seen.permute(1, 2, 0).contiguous().numpy()


def smooth_field(
    rng: np.random.Generator, height: int, width: int, *, cells: int, amplitude: float
) -> Pixels:
    """A random displacement [h, w, 2] that bends over `cells` cells, about `amplitude` pixels."""
    knots = rng.normal(0, amplitude, (cells + 1, cells + 1, 2)).astype(np.float32)
    return spread(knots, height, width)


def spread(knots: Pixels, height: int, width: int) -> Pixels:
    """Values at coarse knots, spread smoothly over [h, w]."""
    # Bicubic to a middle size and bilinear from there: the same curve in a tenth of the time.
    middle = resize(knots, min(48, height), min(48, width), "bicubic", antialias=False)
    return resize(middle, height, width, antialias=False)


def blur(image: Pixels, sigma: float) -> Pixels:
    """Gaussian blur; wide ones as three box blurs, whose time does not grow with sigma."""
    if sigma <= 0:
        return image
    axes = (sigma, sigma) if image.ndim == 2 else (sigma, sigma, 0)
    if sigma < 3:
        narrow: Pixels = ndimage.gaussian_filter(image, axes, mode="nearest", truncate=3)
        return narrow
    out = image
    for side in _boxes(sigma):
        for axis in (0, 1):
            out = ndimage.uniform_filter1d(out, side, axis=axis, mode="nearest")
    return out


def _boxes(sigma: float) -> list[int]:
    """Three odd widths whose variances, (side² − 1) / 12 each, add up to about sigma²."""
    least = max(1, int((np.sqrt(4 * sigma**2 + 1) - 1) / 2) * 2 + 1)
    more = (12 * sigma**2 - 3 * (least**2 - 1)) / (4 * least + 4)
    wide = int(np.clip(round(more), 0, 3))
    return [least] * (3 - wide) + [least + 2] * wide


def to_u8(image: Pixels) -> Image:
    """Rounded to whole values; out of range is clipped."""
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def saturated(image: Pixels, factor: float) -> Pixels:
    """Colour differences multiplied by a factor; 0 makes the image grey."""
    luma: Pixels = (image @ LUMA)[..., None]
    coloured: Pixels = luma + (image - luma) * np.float32(factor)
    return coloured


def jpeg(image: Pixels, quality: int) -> Pixels:
    """The image after a JPEG of this quality."""
    buffer = io.BytesIO()
    Picture.fromarray(to_u8(image)).save(buffer, "JPEG", quality=quality)
    return np.asarray(Picture.open(buffer).convert("RGB"), np.float32)


def shifted(image: Image, motion: tuple[int, int]) -> Image:
    """The image moved by whole pixels (x, y), its edge repeated."""
    rows = np.clip(np.arange(image.shape[0]) - motion[1], 0, image.shape[0] - 1)
    columns = np.clip(np.arange(image.shape[1]) - motion[0], 0, image.shape[1] - 1)
    return image[rows][:, columns]
