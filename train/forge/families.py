"""Pseudo-forgeries from real faces: what a forger's tool leaves behind, without the forger.

A forged face is an altered copy of a face, blended into the picture that it came from.  Whatever
tool made the copy, two things remain: the inside and the outside differ in colour, sharpness or
noise, and the mask that joins them has a border.  `forge` makes both from one real image (from two
for `swap`).

To add a family, write one function with the decorator `family` in this file.  Its name is the
family's name; the decorator says how often recipes draw it and which part of the face it replaces.
The order of the functions is part of the recipes and of the batches: add new ones at the end.

Everything random comes from the generator passed in: the same state gives the same forgery.
`forge` refuses an unknown family, and a family that needs a donor without one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from ralf.train.forge import manipulations, mesh
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

Family = str
"""The name of one of FAMILIES."""


@dataclass(frozen=True)
class Portrait:
    """An image and where its face is."""

    image: Image  # u8 [h, w, 3]
    face: FaceGeometry


@dataclass(frozen=True)
class ForgeryTask:
    """What a family's function gets."""

    image: Pixels  # f32 [h, w, 3], 0 to 255
    face: FaceGeometry
    rng: np.random.Generator
    donor: Portrait | None
    """Another person; never None for a family that needs one."""


@dataclass(frozen=True)
class Joined:
    """What a family returns that joins its copy to the picture by itself."""

    image: Pixels
    mask: Pixels  # f32 [h, w], 0 to 1


Make = Callable[[ForgeryTask], Pixels | Joined]


@dataclass(frozen=True)
class ForgeryFamily:
    """One way of making pseudo-forgeries."""

    name: Family
    share: float
    """How often recipes draw it, beside the other families' shares."""
    region: Mapping[Region, float]
    """The parts of the face that it may replace, each with its probability."""
    needs_donor: bool
    either_side: bool
    """Whether the picture around the face may be altered in place of the face."""
    make: Make
    speaks: bool = False
    """Whether it draws a donor's mouth, which may move from frame to frame; without a donor it
    draws any."""


REGISTRY: dict[Family, ForgeryFamily] = {}


def family(
    share: float = 1.0,
    region: Region | Mapping[Region, float] = "face",
    *,
    needs_donor: bool = False,
    either_side: bool = False,
) -> Callable[[Make], Make]:
    """Register a function as the family of its name.

    The function returns the altered copy of the whole picture, and `forge` blends the region of it
    into the original; or it returns a Joined, and `region` is not used.
    """
    regions: Mapping[Region, float] = {region: 1.0} if isinstance(region, str) else region

    def register(make: Make) -> Make:
        name = make.__name__
        REGISTRY[name] = ForgeryFamily(name, share, regions, needs_donor, either_side, make)
        return make

    return register


def refuse_unknown(name: str) -> str:
    """The name itself if there is a family of that name, else a ValueError that lists all names."""
    if name not in REGISTRY:
        raise ValueError(f"family should be one of {', '.join(REGISTRY)}; got {name!r}")
    return name


def of(name: Family | ForgeryFamily) -> ForgeryFamily:
    """The family of that name; a fitted renderer is a family by itself, without a name here."""
    return name if isinstance(name, ForgeryFamily) else REGISTRY[refuse_unknown(name)]


def forge(
    image: Image,
    face: FaceGeometry,
    name: Family | ForgeryFamily,
    rng: np.random.Generator,
    *,
    donor: Portrait | None = None,
) -> tuple[Image, Pixels]:
    """A forged copy of the image, and how much of each pixel is forged: f32 [h, w], 0 to 1."""
    made_by = of(name)
    if made_by.needs_donor and donor is None:
        raise ValueError(f"a {made_by.name} needs a donor: pass donor=Portrait(image, face)")
    target = image.astype(np.float32)
    source = made_by.make(ForgeryTask(target, face, rng, donor))
    if isinstance(source, Joined):
        return _as_coloured(source.image, image), source.mask
    mask = _mask(face, _drawn_region(made_by.region, rng), image.shape[:2], rng)
    if made_by.either_side and rng.random() < 0.5:
        # The mask then shows the original face in altered surroundings: a detector must not learn
        # that the odd side of a border is always the inside.
        source, target = target, manipulations.shift(target, rng)
    return _as_coloured(target + (source - target) * mask[..., None], image), mask


def _drawn_region(regions: Mapping[Region, float], rng: np.random.Generator) -> Region:
    """One of the regions, by their probabilities; a single one costs no random number."""
    first, *others = regions
    if not others:
        return first
    drawn = rng.random()
    for region, probability in regions.items():
        if drawn < probability:
            return region
        drawn -= probability
    return others[-1]


def _as_coloured(out: Pixels, image: Image) -> Image:
    """Whole values; a grey picture stays grey, or a tint alone would show that it is forged."""
    channels = image[::4, ::4].astype(np.int16)
    grey = np.abs(channels - channels[..., 1:2]).max() <= 3
    return to_u8(np.repeat((out @ LUMA)[..., None], 3, axis=-1) if grey else out)


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


# The families.  A share is larger where real forgers' tools leave the same traces, and where
# detectors that we trained still missed many.


@family(share=3.0, either_side=True)
def self_blend(task: ForgeryTask) -> Pixels:
    """The face over itself, its statistics shifted and slightly moved."""
    return manipulations.displace(manipulations.shift(task.image, task.rng), task.face, task.rng)


@family(share=2.0, region="inner")
def inner(task: ForgeryTask) -> Pixels:
    """As self_blend, between brows and mouth only."""
    return manipulations.displace(manipulations.shift(task.image, task.rng), task.face, task.rng)


@family(share=3.0, needs_donor=True)
def swap(task: ForgeryTask) -> Pixels:
    """Another person's face, warped onto this one and matched in colour."""
    assert task.donor is not None
    source = task.donor.image.astype(np.float32)
    return manipulations.transplant(source, task.donor.face, task.image, task.face, task.rng)


@family(share=1.5, region={"mouth": 0.4, "lower": 0.6})
def mouth(task: ForgeryTask) -> Pixels:
    """The mouth opened, closed or widened, as lip-sync and reenactment do."""
    return manipulations.move_mouth(task.image, task.face, task.rng)


@family(share=1.0, region="eyes")
def eyes(task: ForgeryTask) -> Pixels:
    """Brows and lids moved."""
    return manipulations.move_eyes(task.image, task.face, task.rng)


@family(share=1.5, region={"inner": 0.4, "face": 0.6})
def reenact(task: ForgeryTask) -> Pixels:
    """The whole expression moved."""
    return manipulations.move_expression(task.image, task.face, task.rng)


@family(share=0.7)
def resample(task: ForgeryTask) -> Pixels:
    """The face through a small size and back, as an autoencoder draws it."""
    return manipulations.redraw(task.image, task.face, task.rng)


@family(share=1.5)
def smooth(task: ForgeryTask) -> Pixels:
    """Skin without its texture."""
    return manipulations.smooth_skin(task.image, task.face, task.rng)


@family(share=0.5)
def spectrum(task: ForgeryTask) -> Pixels:
    """The periodic traces of transposed convolution."""
    return manipulations.upsample(task.image, task.face, task.rng)


@family(share=1.0)
def boundary(task: ForgeryTask) -> Joined:
    """An ellipse, not a hull; joined band by band of a pyramid, not by one feather.

    It is made in another way than the others on purpose: our recipes hold it out, to judge by what
    was not trained on.
    """
    target, face, rng = task.image, task.face, task.rng
    height, width = target.shape[:2]
    source = manipulations.displace(manipulations.tint(target, rng), face, rng)
    source = manipulations.change_texture(source, rng)
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
    return Joined(out, blur(mask, 2.0 ** (levels - 1)))


@family(share=2.0, region={"face": 0.5, "lower": 0.3, "inner": 0.2}, needs_donor=True)
def face2face(task: ForgeryTask) -> Pixels:
    """Another person's expression on this face, by its mesh; a light trace of being drawn anew."""
    assert task.donor is not None
    moved = mesh.transfer_expression(
        task.image, task.face, task.donor.image, task.donor.face, task.rng
    )
    return manipulations.drawn_anew(moved, task.face, task.rng)


@family(share=2.0, needs_donor=True)
def face_swap(task: ForgeryTask) -> Joined:
    """Another person's texture on this face's mesh, matched in colour, its border feathered."""
    assert task.donor is not None
    return Joined(
        *mesh.lay_texture(task.image, task.face, task.donor.image, task.donor.face, task.rng)
    )


FAMILIES: tuple[Family, ...] = tuple(REGISTRY)
