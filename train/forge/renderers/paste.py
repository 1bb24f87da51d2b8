"""How a drawn face is joined to its picture: colours, mask, border, sharpness.

    drawn crop ─▶ colours of the real crop ─▶ back to the picture ─▶ sharpened ─▶ mask ─▶ picture

Forgers' tools differ more in these steps than in their networks, so each step has several kinds,
and its strength is drawn from what the tools offer.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ralf.train.forge.families import Joined
from ralf.train.forge.landmarks import FaceGeometry, Points, fill, grown, grown_steadily
from ralf.train.forge.pixels import Pixels, blur, grid, remap, smooth_field
from ralf.train.forge.renderers.aligned import Alignment, Window

Colours = NDArray[np.float64]  # [n, 3]
# Reinhard's way to lαβ: cone responses, then their logarithms as one light and two opponents.
_LMS = np.array([[0.3811, 0.5783, 0.0402], [0.1967, 0.7244, 0.0782], [0.0241, 0.1288, 0.8444]])
_OPPONENTS = np.array([[1, 1, 1], [1, 1, -2], [1, -1, 0]]) / np.sqrt([[3], [6], [2]])


def paste(
    image: Pixels,
    face: FaceGeometry,
    alignment: Alignment,
    drawn: Pixels,
    rng: np.random.Generator,
    *,
    colours: bool = True,
    softest: float = 11,
    part: Points | None = None,
) -> Joined:
    """The picture with an aligned crop drawn anew; `softest` is the widest blur of the mask, in
    pixels of a face with 64 of them between the eyes.  `part` is the hull to paste through, in the
    picture's pixels; without it that of the whole face, as tools draw it."""
    window = alignment.window(image.shape)
    if colours:
        drawn = matched(drawn, alignment.cut(image), inner(alignment, face), rng)
    shown = sharpened(alignment.put_back(drawn, window), alignment.scale, rng)
    mask = hull_mask(face, window, rng, softest=softest, part=part)
    mask *= _crop_edge(alignment, window)
    below = image[window]
    out = image.copy()
    out[window] = below + (np.clip(shown, 0, 255) - below) * mask[..., None]
    whole = np.zeros(image.shape[:2], np.float32)
    whole[window] = mask
    return Joined(out, whole)


def inner(alignment: Alignment, face: FaceGeometry) -> NDArray[np.bool_]:
    """The face itself in the aligned crop, without its rim: where colours are compared."""
    hull = [grown(alignment.to_crop(part), 0.85) for part in face.outline("face")]
    found = fill(hull, alignment.size, alignment.size) > 0.5
    # A face whose hull lies outside its crop has points that are wrong; its middle still serves.
    return found if found.sum() >= 64 else np.ones_like(found)


def hull_mask(
    face: FaceGeometry,
    window: Window,
    rng: np.random.Generator,
    *,
    softest: float = 11,
    part: Points | None = None,
) -> Pixels:
    """How much of each pixel of the window is drawn: a hull, eroded or dilated, feathered."""
    rows, columns = window
    height, width = rows.stop - rows.start, columns.stop - columns.start
    unit = face.eye_distance
    if part is None:
        inside = _of_face(face.scaled(1, 1, columns.start, rows.start), height, width, rng)
    else:
        corner = np.array([columns.start, rows.start], np.float32)
        inside = fill([grown_steadily(part - corner, rng.uniform(0.92, 1.05))], height, width)
    bend = smooth_field(rng, height, width, cells=4, amplitude=0.02 * unit)
    bent = remap(inside, grid(height, width) + bend, edge="zeros")
    # OpenCV's kernel of n pixels has a sigma of about n / 5.
    soft = blur(bent, rng.uniform(3, softest) / 5 * unit / 64)
    return np.asarray(np.clip(soft, 0, 1), np.float32)


def _of_face(here: FaceGeometry, height: int, width: int, rng: np.random.Generator) -> Pixels:
    """The hull of the whole face, of the face below the brows, or of its inner parts."""
    unit = here.eye_distance
    kind, factor = rng.random(), rng.uniform(0.8, 1.08)
    hull = fill([grown(part, factor) for part in here.outline("face")], height, width)
    if kind < 0.4:
        # As hulls of 68 points are: they end above the brows.
        down = here.five[3:].mean(axis=0) - here.five[:2].mean(axis=0)
        down = down / max(float(np.linalg.norm(down)), 1e-3)
        below = (grid(height, width) - here.five[:2].mean(axis=0)) @ down
        hull = hull * (below > -rng.uniform(0.25, 0.5) * unit)
    elif kind < 0.5:
        parts = here.outline("inner")
        hull = fill([grown(part, rng.uniform(1.05, 1.4)) for part in parts], height, width)
    return np.asarray(hull, np.float32)


def _crop_edge(alignment: Alignment, window: Window) -> Pixels:
    """1 inside the aligned crop, fading to 0 at its edge: beyond it nothing was drawn."""
    rows, columns = window
    at = grid(rows.stop - rows.start, columns.stop - columns.start)
    at += np.array([columns.start, rows.start], np.float32)
    inside = alignment.to_crop(at)
    depth = np.minimum(inside, alignment.size - 1 - inside).min(axis=-1)
    return np.asarray(np.clip(depth / (0.04 * alignment.size), 0, 1), np.float32)


def sharpened(image: Pixels, scale: float, rng: np.random.Generator) -> Pixels:
    """Now and then sharpened, as tools do with a small crop that was enlarged; or with grain."""
    kind = rng.random()
    if kind < 0.35:
        # The finest detail that a small crop holds is as wide as its pixels in the picture.
        sigma = np.clip(0.8 / scale, 0.7, 2.5) * rng.uniform(0.8, 1.3)
        return image + (image - blur(image, float(sigma))) * np.float32(rng.uniform(0.3, 1.3))
    if kind < 0.5:
        grain = rng.normal(0, rng.uniform(1, 4), image.shape[:2]).astype(np.float32)
        return image + blur(grain, rng.uniform(0, 0.7))[..., None]
    return image


def matched(
    drawn: Pixels, real: Pixels, where: NDArray[np.bool_], rng: np.random.Generator
) -> Pixels:
    """The drawn crop in the real one's colours, by one of the ways that tools offer."""
    kind = rng.random()
    if kind < 0.1:
        return drawn
    transfer = _TRANSFERS[int((kind - 0.1) / 0.9 * len(_TRANSFERS))]
    pixels = np.clip(drawn, 0, 255).reshape(-1, 3).astype(np.float64)
    made = transfer(pixels, pixels[where.ravel()], real[where].astype(np.float64))
    amount = 1.0 if rng.random() < 0.7 else rng.uniform(0.5, 1)
    nearer = pixels + (made - pixels) * amount
    return np.clip(nearer, 0, 255).reshape(drawn.shape).astype(np.float32)


def _mean_and_spread(pixels: Colours, mine: Colours, wanted: Colours) -> Colours:
    # Bounded: a nearly flat face has a spread near 0, and its noise would be blown up.
    gain = np.clip(wanted.std(axis=0) / (mine.std(axis=0) + 1e-3), 0.6, 1.7)
    return np.asarray((pixels - mine.mean(axis=0)) * gain + wanted.mean(axis=0))


def _reinhard(pixels: Colours, mine: Colours, wanted: Colours) -> Colours:
    """Mean and spread in lαβ, where brightness and colour vary independently."""

    def there(colours: Colours) -> Colours:
        return np.asarray(np.log(colours @ _LMS.T + 1) @ _OPPONENTS.T)

    moved = _mean_and_spread(there(pixels), there(mine), there(wanted))
    return np.asarray((np.exp(moved @ _OPPONENTS) - 1) @ np.linalg.inv(_LMS).T)


def _covariance(pixels: Colours, mine: Colours, wanted: Colours) -> Colours:
    """The linear map that moves one covariance onto the other with the least movement."""
    ours, theirs = (np.cov(each.T) + 4 * np.eye(3) for each in (mine, wanted))
    root = _power(ours, 0.5)
    back = _power(ours, -0.5)
    move = back @ _power(root @ theirs @ root, 0.5) @ back
    return np.asarray((pixels - mine.mean(axis=0)) @ move.T + wanted.mean(axis=0))


def _power(matrix: Colours, exponent: float) -> Colours:
    values, vectors = np.linalg.eigh(matrix)
    return np.asarray((vectors * np.maximum(values, 1e-6) ** exponent) @ vectors.T)


def _histogram(pixels: Colours, mine: Colours, wanted: Colours) -> Colours:
    """Each channel's histogram onto the real one's."""
    shares = np.linspace(0, 1, 65)
    columns = [
        np.interp(pixels[:, c], np.quantile(mine[:, c], shares), np.quantile(wanted[:, c], shares))
        for c in range(3)
    ]
    return np.stack(columns, axis=-1)


_TRANSFERS: tuple[Callable[[Colours, Colours, Colours], Colours], ...] = (
    _mean_and_spread,
    _reinhard,
    _covariance,
    _histogram,
)
