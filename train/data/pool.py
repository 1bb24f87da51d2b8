"""The faces of one split, and how a forgery of a real face is found or made.

A forgery on disk belongs to the real face that is its target.  Where there is none, one is
blended.  A swap takes its donor from the same split: another person with a similar face shape.
"""

import copy
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ralf.kernels.manifest import InputContract
from ralf.train.data.crop import Cut, region
from ralf.train.data.index import Index, IndexFault
from ralf.train.data.pictures import Frame, Pictures, frames_of
from ralf.train.forge.families import (
    FAMILIES,
    REGISTRY,
    Family,
    ForgeryFamily,
    Portrait,
    forge,
    of,
)
from ralf.train.forge.landmarks import FaceGeometry
from ralf.train.forge.pixels import Image, Pixels
from ralf.train.recipe import Data

PREPARED = "prepare.json"
"""The file beside a prepared index that says how it was prepared."""
VARIANT = "~"
"""Stands between a video's name and the number of a forgery of it, where there are several."""


def refuse_other_contract(index: Index, contract: InputContract) -> None:
    """An error where the index's faces were found in another way than the contract says."""
    # Tables that were joined keep the first one's root; the others' pictures lie in faces/ of
    # theirs.
    elsewhere = {Path(row.path).parent.parent for row in index if Path(row.path).is_absolute()}
    for root in (index.root, *sorted(elsewhere)):
        if (root / PREPARED).exists():
            _refuse_other(root, contract)


def _refuse_other(root: Path, contract: InputContract) -> None:
    made = InputContract.model_validate(json.loads((root / PREPARED).read_text())["contract"])
    for name in ("finder", "colour"):
        if getattr(made, name) != getattr(contract, name):
            raise IndexFault(
                f"{root} was prepared with {name} {getattr(made, name)}, the recipe's input has "
                f"{getattr(contract, name)}: prepare again, or change data.input.{name}"
            )


class Pool:
    """The frames of one split, real and forged, and how forgeries are found or made for them."""

    def __init__(self, index: Index, data: Data, split: str, *, ram_bytes: int) -> None:
        refuse_other_contract(index, data.input)
        chosen = index.where(split=split)
        videos = frames_of(chosen)
        self.real = [frames for frames in videos.values() if not frames[0].row.label]
        self.forged = [frames for frames in videos.values() if frames[0].row.label]
        if not self.real and len(index) and not any(row.split for row in index):
            raise IndexFault("no row has a split: draw them with `ralf data index --split`")
        if not self.real:
            raise IndexFault(f"split {split!r} has no real faces, only {len(self.forged)} forged")
        methods = sorted({frames[0].row.method for frames in self.forged})
        self.names: tuple[str, ...] = (*FAMILIES, *methods)
        """What each number of Batch.family is called."""
        self.by_target: dict[str, dict[str, list[list[Frame]]]] = defaultdict(dict)
        for frames in self.forged:
            row = frames[0].row
            # A pair has one compression, or compression would tell the forgery from its real.
            key = f"{row.target}|{row.compression}" if row.target else ""
            self.by_target[key].setdefault(row.method, []).append(frames)
        everything = [frame for frames in (*self.real, *self.forged) for frame in frames]
        self.tight = data.tight_pictures
        self.pictures = Pictures(index, everything, ram_bytes=ram_bytes, by_mesh=self.tight)
        self.size = data.input.size
        self.alone = next(
            name
            for name, family in REGISTRY.items()
            if not family.needs_donor and name != data.held_out
        )
        """The family that stands in where nobody can be the donor; never the one held out."""

    def number(self, method: str) -> int:
        """The family's number."""
        return self.names.index(method)

    def partner(
        self, real: Frame, rng: np.random.Generator, how: np.random.Generator | None = None
    ) -> Frame | None:
        """A forgery of this face from disk, near the same moment; None where there is none.

        The way of forging is drawn by `how` where it is given, else by `rng`.
        """
        row = real.row
        methods = self.by_target.get(f"{row.target}|{row.compression}") if row.target else None
        if not methods:
            return None
        # The method first, then the video: a method with many videos is not drawn more often.
        videos = methods[sorted(methods)[(how or rng).integers(len(methods))]]
        # A forgery with the real's own name was made from it, and not only from the same person.
        own = [v for v in videos if v[0].row.video.partition(VARIANT)[0] == row.video]
        videos = own or videos
        video = videos[rng.integers(len(videos))]
        return min(video, key=lambda frame: (abs(frame.number - real.number), frame.number))

    def donor(
        self,
        real: Frame,
        face: FaceGeometry,
        rng: np.random.Generator,
        *,
        any_mouth: bool = False,
    ) -> Portrait | None:
        """Another person with a similar face shape: the best of a dozen drawn.

        With `any_mouth` the mouth may be where it likes: only eyes and nose, which show how the
        head is turned, are compared.
        """
        best, least, points = None, (True, np.inf), 3 if any_mouth else 5
        for place in rng.integers(0, len(self.real), 12):
            other = self.real[place][0]
            if other.row.person == real.row.person or other.row.video == real.row.video:
                continue
            # Only the geometry is read for the dozen; the picture of the best alone is decoded.
            shape = self.pictures.face(other)
            if shape is None:
                continue
            # A face that its picture cuts has no texture to give where it is cut.
            cut = self.tight and not _whole(shape, self.pictures.size(other))
            if (apart := (cut, _unlike(shape, face, points))) < least:
                best, least = (other, shape), apart
        if best is None:
            return None
        image, shape = self.pictures.picture(best[0]), best[1]
        whole = Cut(InputContract(size=self.size, margin=1.5))
        return Portrait(*region(image, shape, whole))

    def forgery(
        self,
        frame: Frame,
        image: Image,
        face: FaceGeometry,
        family: Family | ForgeryFamily,
        rng: np.random.Generator,
    ) -> tuple[Image, Pixels]:
        """A pseudo-forgery of the region, and how much of each pixel is forged: f32 [h, w], 0 to 1.

        With nobody to swap with, it is made of the face itself.
        """
        return next(self.forgeries(frame, image, (face,), family, rng))

    def forgeries(
        self,
        frame: Frame,
        image: Image,
        faces: Sequence[FaceGeometry],
        family: Family | ForgeryFamily,
        rng: np.random.Generator,
        *,
        donors: Sequence[Portrait] | None = None,
    ) -> Iterator[tuple[Image, Pixels]]:
        """The same forgery for each place where the face was found, and its mask.

        `donors` has one for each place; else one is chosen for all.
        """
        way = of(family)
        if donors is None:
            asked = way.needs_donor or way.speaks
            donor = self.donor(frame, faces[0], rng, any_mouth=way.speaks) if asked else None
            way = of(self.alone) if way.needs_donor and donor is None else way
            shown: Sequence[Portrait | None] = [donor] * len(faces)
        else:
            shown = donors
        for face, donor in zip(faces, shown, strict=True):
            # Each begins with the same random numbers: only the face's place tells them apart.
            own_rng = copy.deepcopy(rng) if len(faces) > 1 else rng
            if not self.tight:
                yield forge(image, face, way, own_rng, donor=donor)
                continue
            wide, moved, own = _mirrored(image, face)
            forged, mask = forge(wide, moved, way, own_rng, donor=donor)
            yield forged[own], mask[own]


def _whole(face: FaceGeometry, size: tuple[int, int]) -> bool:
    """Whether the face's outline lies within a picture of this width and height."""
    points = np.concatenate(face.outline("face"))
    return bool((points >= 0).all() and (points <= np.array(size) - 1).all())


def _mirrored(image: Image, face: FaceGeometry) -> tuple[Image, FaceGeometry, tuple[slice, slice]]:
    """The picture mirrored beyond the edges that its face is near, and where it is in that."""
    height, width = image.shape[:2]
    # A forged copy is moved by up to a quarter of the distance between the eyes.
    most = min(int(np.ceil(0.25 * face.eye_distance)), height - 1, width - 1)
    points = np.concatenate(face.outline("face"))
    (left, top), (right, bottom) = (
        points.min(axis=0) < most,
        points.max(axis=0) > (np.array([width, height]) - 1 - most),
    )
    x, y = (left * most, right * most), (top * most, bottom * most)
    wide = np.pad(image, (y, x, (0, 0)), mode="reflect")
    own = slice(y[0], y[0] + height), slice(x[0], x[0] + width)
    return wide, face.scaled(1, 1, -x[0], -y[0]), own


def _unlike(one: FaceGeometry, other: FaceGeometry, points: int) -> float:
    """The distance of so many of two faces' five points after the eyes are aligned."""
    shapes = []
    for face in (one, other):
        across = face.five[1] - face.five[0]
        turn = complex(*across) if across.any() else 1 + 0j
        away = (face.five[:points] - face.five[0]) @ np.array([1, 1j])
        shapes.append(away / turn)
    return float(np.abs(shapes[0] - shapes[1]).sum())
