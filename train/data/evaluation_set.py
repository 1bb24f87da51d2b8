"""Faces to judge by: the same every time, in whatever process and order they are made.

Every video on disk, real or forged, gives frames spread evenly over it.  Where families are asked
for, forgeries are also blended from the real faces; the held-out family may be among them.  Their
randomness is seeded by the name of the frame, so that one more video changes no other example.  A
condition (evaluate/conditions.py) changes real and forged alike, before the crop is cut.
"""

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ralf.train.data.batches import REAL, Batch
from ralf.train.data.crop import Cut, region
from ralf.train.data.index import Index, IndexFault
from ralf.train.data.pictures import Frame, seeded_by
from ralf.train.data.pool import Pool
from ralf.train.evaluate.conditions import CLEAN, on_crop, parse, perturb
from ralf.train.forge.families import FAMILIES, Family
from ralf.train.recipe import Data


@dataclass(frozen=True)
class Example:
    """One face to judge."""

    frame: Frame
    family: Family | None = None
    """The family that it is forged by here; None for a face as it lies on disk."""

    @property
    def forged(self) -> bool:
        return self.family is not None or bool(self.frame.row.label)

    @property
    def method(self) -> str:
        """real, the method on disk, or the family."""
        return self.family or self.frame.row.method

    @property
    def video(self) -> tuple[str, str, str, str]:
        """The video that its score is pooled with."""
        row = self.frame.row
        return (row.dataset, self.method, row.compression, row.video)

    @property
    def name(self) -> str:
        return self.frame.name + (f"+{self.family}" if self.family else "")


class Examples:
    """A split to judge, in batches."""

    def __init__(
        self,
        index: Index,
        data: Data,
        split: str,
        *,
        families: Sequence[str] | None = None,
        each: int | None = 1,
        in_turn: bool = False,
        condition: str = CLEAN,
        batch: int = 64,
        limit: int | None = None,
        ram_bytes: int = 2 * 1024**3,
    ) -> None:
        """`families` are blended, the recipe's own by default: for each real frame so many of them
        as `each` says, in turn, or all of them.  `in_turn` thins the forgeries on disk alike: of
        three generators each gives every third video.  `limit` keeps the first videos of each
        class."""
        parse(condition)
        self.data, self.condition, self.batch = data, condition, batch
        if families is None:
            # As the recipe trains: validation must not choose weights by what is held out.
            families = data.trained_families
            index = index.without_forgeries(data.left_out).only(data.methods, data.compression)
        self.pool = Pool(index, data, split, ram_bytes=ram_bytes)
        if unknown := set(families) - set(FAMILIES):
            raise IndexFault(f"no family {sorted(unknown)}; known: {', '.join(FAMILIES)}")
        self.families = tuple(family for family in FAMILIES if family in families)
        self.each = each
        self.items = self._items(limit, in_turn=in_turn)

    @property
    def names(self) -> tuple[str, ...]:
        """What each number of Batch.family is called."""
        return self.pool.names

    def _items(self, limit: int | None, *, in_turn: bool) -> tuple[Example, ...]:
        # The limit is of videos and not of frames: a video is scored whole or not at all.
        real = [frame for video in self.pool.real[:limit] for frame in self._spread(video)]
        on_disk = self._thinned() if in_turn else self.pool.forged
        forged = [frame for video in on_disk[:limit] for frame in self._spread(video)]
        items = [Example(frame) for frame in (*real, *forged)]
        for number, frame in enumerate(real):
            # One family for each frame keeps validation short; tables ask for more of them.
            items += [Example(frame, family) for family in self._families_of(number)]
        return tuple(items)

    def _thinned(self) -> list[list[Frame]]:
        """Of the forged videos on disk, those of each generator's turn."""
        methods = sorted({video[0].row.method for video in self.pool.forged})
        met: Counter[str] = Counter()
        kept = []
        for video in self.pool.forged:
            method = video[0].row.method
            if met[method] % len(methods) == methods.index(method):
                kept.append(video)
            met[method] += 1
        return kept

    def _families_of(self, number: int) -> tuple[Family, ...]:
        """The families that forge the real face of that number."""
        if self.each is None or self.each >= len(self.families):
            return self.families
        begin = number * self.each % len(self.families)
        return (self.families * 2)[begin : begin + self.each]

    def _spread(self, video: list[Frame]) -> list[Frame]:
        """Frames over the whole video: its first ones alone may all show the same pose."""
        most = self.data.evaluation_frames
        if len(video) <= most:
            return video
        places = np.floor((np.arange(most) + 0.5) * len(video) / most).astype(int)
        return [video[place] for place in places]

    def __len__(self) -> int:
        return (len(self.items) + self.batch - 1) // self.batch

    def __iter__(self) -> Iterator[Batch]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> Batch:
        if not 0 <= number < len(self):
            raise IndexError(number)
        items = self.items[number * self.batch : (number + 1) * self.batch]
        return Batch(
            crops=torch.stack([self.crop(item) for item in items]),
            forged=torch.tensor([item.forged for item in items]),
            pair=torch.full((len(items),), -1, dtype=torch.int64),
            family=torch.tensor(
                [self.pool.number(item.method) if item.forged else REAL for item in items]
            ),
            ids=[item.name for item in items],
        )

    def crop(self, item: Example) -> Tensor:
        """u8 [3, s, s]."""
        pictures, cut = self.pool.pictures, Cut(self.data.input)
        image = pictures.picture(item.frame)
        if item.family is None:
            face = pictures.face(item.frame)
            if self.condition == CLEAN:
                return cut.take(image, face)  # what serving would cut, to the bit
            if face is not None:
                image, face = region(image, face, cut)
        else:
            image, face = region(image, pictures.face_to_forge(item.frame), cut)
            # The same forgery under every condition: only the condition differs.
            rng = seeded_by(item.name)
            image, _ = self.pool.forgery(item.frame, image, face, item.family, rng)
        rng = seeded_by(f"{item.name} {self.condition}")
        if not on_crop(self.condition):
            return cut.take(perturb(image, self.condition, rng), face)
        crop = np.ascontiguousarray(cut.take(image, face).numpy().transpose(1, 2, 0))
        damaged = perturb(crop, self.condition, rng)
        return torch.from_numpy(np.ascontiguousarray(damaged.transpose(2, 0, 1)))


KEPT_BYTES = 2 * 1024**3
"""If all validation crops are smaller than this, they are made once and kept."""


def validation_batches(index: Index, data: Data) -> "Examples | KeptBatches | None":
    """The validation split, kept in memory where it fits; None where there is none."""
    if not len(index.where(split="val")):
        print("ralf: no rows with split val: the last weights will be kept", file=sys.stderr)
        return None
    examples = Examples(index, data, "val")
    size = data.input.size
    fits = len(examples.items) * 3 * size * size <= KEPT_BYTES
    return KeptBatches(examples) if fits else examples


class KeptBatches:
    """Batches that are made when they are first asked for, and then kept."""

    def __init__(self, examples: Examples) -> None:
        self.names = examples.names
        self._examples = examples
        self._made: list[Batch] = []

    def __iter__(self) -> Iterator[Batch]:
        if not self._made:
            self._made = list(self._examples)
        return iter(self._made)
