"""Training batches: which faces the network sees, as a function of the seed and the batch's number.

    real frame ─▶ region ─┬─────────▶ same damage ─▶ same cut ─▶ crop, real
                          └─▶ forge ─▶ same damage ─▶ same cut ─▶ crop, forged

`Batches[n]` draws from generators that are seeded by (seed, n, place).  Any process makes the same
batch, in any order, so a resumed run sees what the first run would have seen.  A real face and its
forgery share margin, jitter, flip and damage, so that only the forgery tells them apart.  Crops
are cut by the worker's own function.  The frames of a video are used equally often: frames come
from an endless series of shuffles.  Batches to judge by are in ralf.train.data.evaluation_set.

With `data.views` a pair is made once for each view from the same draws, so that only the last
encoding differs.  First come the real crops, all faces in one view and then in the next; the forged
ones follow in the same order.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ralf.train.data.check import refuse_leaks
from ralf.train.data.crop import Cut, region
from ralf.train.data.crop_cache import CropCache, CropPair
from ralf.train.data.index import Index, IndexFault
from ralf.train.data.pictures import Frame, seeded_by
from ralf.train.data.pool import Pool
from ralf.train.forge.families import FAMILIES, Family
from ralf.train.forge.identity import as_another_person
from ralf.train.forge.landmarks import FaceGeometry
from ralf.train.forge.pixels import Image
from ralf.train.forge.upload_damage import Codec, UploadDamage, damaged, draw_damage
from ralf.train.recipe import DRAWN, Data

REAL = -1
"""The family of a real face."""
SHARED = 1
"""A fourth number in the seed of generators that two neighbours in a batch share."""


@dataclass(frozen=True)
class Batch:
    """Crops, and what is known of each."""

    crops: Tensor  # u8 [m, 3, s, s]
    forged: Tensor  # bool [m]
    pair: Tensor  # int64 [m]: for a forgery the row of its real face, else -1
    family: Tensor  # int64 [m]: -1 for a real face, else the place in `Batches.names`
    ids: list[str]

    def __len__(self) -> int:
        return len(self.ids)


@lru_cache(maxsize=8)
def _shuffle(
    seed: int, stream: int, cycle: int, sizes: tuple[int, ...], most: int
) -> NDArray[np.int64]:
    """One round through the videos: at most `most` frames of each, [n, 2] video and frame."""
    rng = np.random.default_rng((seed, stream, cycle))
    picks = [
        np.stack([np.full(min(size, most), video), rng.permutation(size)[:most]], axis=1)
        for video, size in enumerate(sizes)
    ]
    return rng.permutation(np.concatenate(picks), axis=0)


class Batches:
    """Training batches by number."""

    def __init__(
        self,
        index: Index,
        data: Data,
        split: str = "train",
        seed: int = 0,
        *,
        allow_leaks: bool = False,
        ram_bytes: int = 2 * 1024**3,
        crops: Path | None = None,
    ) -> None:
        """`crops` is a folder that keeps pairs, for a recipe with `data.variants`."""
        refuse_leaks(index, allowed=allow_leaks)
        self.data, self.seed = data, seed
        # What is held out is left out from disk too: made clips carry their family as their method.
        _refuse_unknown(data.held_out, index)
        left = index.without_forgeries(data.left_out).only(data.methods, data.compression)
        self.pool = Pool(left, data, split, ram_bytes=ram_bytes)
        self._real = tuple(len(frames) for frames in self.pool.real)
        self._forged = tuple(len(frames) for frames in self.pool.forged)
        self._families: tuple[Family, ...] = _known(data.trained_families)
        share = dict(zip(data.families, data.shares, strict=True)) if data.shares else {}
        # The draw needs sums of shares only, so shares need not add up to 1.
        self._edges = np.cumsum([share.get(family, 1.0) for family in self._families])
        if not self._families and not self._forged and data.pairing != "reals":
            raise IndexFault(
                f"split {split!r} has no forgeries, and the recipe makes none: set data.families, "
                f"for instance to {','.join(FAMILIES[:3])}"
            )
        self._half = data.batch // 2
        self._views = data.views or (DRAWN,)
        self._faces = self._half // len(self._views)
        # The first frame's number of each video: frames are numbered through.
        self._first = np.cumsum([0, *self._real])
        self.pairs = int(self._first[-1]) * (data.variants or 0) * len(self._views)
        """How many different pairs there are, where faces are forged in so many ways only."""
        self.cache = (
            CropCache(crops, left, data, split, self.pairs) if crops and self.pairs else None
        )
        self._reals = data.batch if data.pairing == "reals" else self._faces

    @property
    def names(self) -> tuple[str, ...]:
        """What each number of Batch.family is called."""
        return self.pool.names

    @property
    def unused_forgeries(self) -> int:
        """How many forged videos on disk no batch shows, because the recipe blends them all."""
        blended = bool(self._families) and self.data.blended_share == 1
        return len(self._forged) if blended and self.data.pairing != "reals" else 0

    def __len__(self) -> int:
        """Batches of an epoch, as the recipe counts it."""
        frames = sum(min(size, self.data.frames) for size in self._real)
        if self.data.epoch_of == "videos":
            frames += sum(min(size, self.data.frames) for size in self._forged)
            return max(1, frames // (2 * self._faces))
        return max(1, frames // self._reals)

    def __getitem__(self, number: int) -> Batch:
        pairing = self.data.pairing
        if pairing == "reals":
            return self._real_batch(number)
        crops: list[Tensor] = [torch.empty(0)] * (2 * self._half)
        pair = torch.full((2 * self._half,), -1, dtype=torch.int64)
        family = torch.full((2 * self._half,), REAL, dtype=torch.int64)
        ids = [""] * (2 * self._half)
        for row in range(self._faces * len(self._views)):
            view, place = divmod(row, self._faces)
            real, both = self._both(number, place, view)
            other = row + self._half
            crops[row], ids[row] = both.real, real.name
            crops[other], ids[other], family[other] = both.forged, both.name, both.family
            pair[other] = row if both.same_face else -1
        forged = torch.arange(2 * self._half) >= self._half
        return Batch(torch.stack(crops), forged, pair, family, ids)

    def _both(self, number: int, place: int, view: int) -> tuple[Frame, CropPair]:
        """A real frame, and its crop and a forged one in one of the views."""
        real = self._frame_at(0, number * self._faces + place)
        if self.data.variants:
            return real, self._shown(number, place, view)
        # The same draws for every view.
        rng = np.random.default_rng((self.seed, number, place))
        seen = self._views[view]
        if self.data.pairing == "balanced":
            return real, self._apart(real, number, place, rng, seen)
        # In a kindred batch two neighbours are forged in the same way.
        common = np.random.default_rng((self.seed, number, place // 2, SHARED))
        how = common if self.data.pairing == "kindred" else rng
        return real, self._pair(real, rng, how, seen)

    def _shown(self, number: int, place: int, view: int) -> CropPair:
        """One of the pairs that are shown again and again; only the flip is drawn anew."""
        video, frame, cycle = self._turn(0, number * self._faces + place)
        ways = self.data.variants or 1
        way = int(self._first[video] + frame) * ways + cycle % ways
        both = self.variant(way * len(self._views) + view)
        rng = np.random.default_rng((self.seed, number, place))
        if not self.data.augment.flip or rng.random() < 0.5:
            return both
        return replace(both, real=both.real.flip(-1), forged=both.forged.flip(-1))

    def variant(self, number: int) -> CropPair:
        """One of `pairs`: from the cache, or made and kept there; the same whatever the seed."""
        kept = self.cache.get(number) if self.cache else None
        if kept is not None:
            return kept
        way, view = divmod(number, len(self._views))
        place, which = divmod(way, self.data.variants or 1)
        video = int(np.searchsorted(self._first, place, side="right")) - 1
        real = self.pool.real[video][place - int(self._first[video])]
        rng = seeded_by(f"{real.name} variant {which}")
        made = self._pair(real, rng, rng, self._views[view])
        if self.cache:
            self.cache.put(number, made)
        return made

    def _real_batch(self, number: int) -> Batch:
        """Real faces alone, each with damage of its own."""
        frames = [self._frame_at(0, number * self._reals + place) for place in range(self._reals)]
        crops = []
        for place, frame in enumerate(frames):
            rng = np.random.default_rng((self.seed, number, place))
            damage = self._damage(self.pool.pictures.face(frame), rng, DRAWN)
            crops.append(self._frame_crop(frame, damage, self._cut(rng, flip=damage.flip), rng))
        none = torch.full((len(frames),), -1, dtype=torch.int64)
        forged = torch.zeros(len(frames), dtype=torch.bool)
        return Batch(torch.stack(crops), forged, none, none.clone(), [x.name for x in frames])

    def _frame_at(self, stream: int, place: int) -> Frame:
        """The place-th frame of the endless series of real (0) or forged (1) frames."""
        videos = self.pool.forged if stream else self.pool.real
        video, frame, _ = self._turn(stream, place)
        return videos[video][frame]

    def _turn(self, stream: int, place: int) -> tuple[int, int, int]:
        """Video, frame, and how many rounds went before."""
        sizes = self._forged if stream else self._real
        most = self.data.frames
        total = sum(min(size, most) for size in sizes)
        # Shuffled rounds use every frame equally often; independent draws would not.
        cycle, within = divmod(place, total)
        video, frame = _shuffle(self.seed, stream, cycle, sizes, most)[within]
        return int(video), int(frame), cycle

    def _pair(
        self, real: Frame, rng: np.random.Generator, how: np.random.Generator, view: str
    ) -> CropPair:
        """A real face and a forgery of it, from disk or made; `how` draws the way of forging."""
        partner = self.pool.partner(real, rng, how)
        if self._families and (partner is None or how.random() < self.data.blended_share):
            return self._blended(real, real, rng, how, view)
        same = partner is not None
        return self._from_disk(real, partner or self._any_forged(rng), rng, view, same_face=same)

    def _apart(
        self, real: Frame, number: int, place: int, rng: np.random.Generator, view: str
    ) -> CropPair:
        """A real face and a forgery that have nothing to do with each other."""
        if self._families and (not self._forged or rng.random() < self.data.blended_share):
            shown = self._frame_at(0, int(rng.integers(2**31)))
            return self._blended(real, shown, rng, rng, view)
        forged = self._frame_at(1, number * self._faces + place)
        return self._from_disk(real, forged, rng, view, same_face=False)

    def _any_forged(self, rng: np.random.Generator) -> Frame:
        video = self.pool.forged[rng.integers(len(self.pool.forged))]
        return video[rng.integers(len(video))]

    def _cut(self, rng: np.random.Generator, *, flip: bool) -> Cut:
        margins, cut_off = self.data.augment.margins, (0.0, 0.0, 0.0, 0.0)
        if self.data.augment.cut_off:  # no number is drawn for a recipe without it
            cut_off = _edges(self.data.augment.cut_off, rng)
        if not margins:
            return Cut(self.data.input, flip=flip, cut_off=cut_off)
        margin = margins[rng.integers(len(margins))]
        shift = rng.normal(0, 0.03, 2)
        return Cut(
            self.data.input.model_copy(update={"margin": margin}),
            shift=(float(shift[0]), float(shift[1])),
            grow=float(np.exp(rng.normal(0, 0.04))),
            flip=flip,
            cut_off=cut_off,
        )

    def _blended(
        self,
        real: Frame,
        shown: Frame,
        rng: np.random.Generator,
        how: np.random.Generator,
        view: str,
    ) -> CropPair:
        """`shown` is the face to forge: the real face itself, or another."""
        family = self._family(how)
        pictures = self.pool.pictures
        image, face = pictures.picture(shown), pictures.face_to_forge(shown)
        # One damage and one cut for both faces of the pair: quality must not give the label away.
        damage = self._damage(face, rng, view)
        cut = self._cut(rng, flip=damage.flip)
        # Changed before the forging, so that an unusual face is met among the reals, too.
        part, moved = as_another_person(*region(image, face, cut), damage.identity_seed)
        fake = self.pool.forgery(shown, part, moved, family, rng)[0]
        forged = self._crop(fake, moved, damage, cut, rng)
        if shown is real:
            genuine = self._crop(part, moved, damage, cut, rng)
        else:
            genuine = self._frame_crop(real, damage, cut, rng)
        return CropPair(
            genuine, forged, f"{shown.name}+{family}", self.pool.number(family), shown is real
        )

    def _family(self, rng: np.random.Generator) -> Family:
        """By the recipe's shares."""
        drawn = rng.random() * self._edges[-1]
        return self._families[int(np.searchsorted(self._edges, drawn, side="right"))]

    def _from_disk(
        self, real: Frame, forged: Frame, rng: np.random.Generator, view: str, *, same_face: bool
    ) -> CropPair:
        """Two frames from disk with the same damage and cut."""
        damage = self._damage(self.pool.pictures.face(real), rng, view)
        cut = self._cut(rng, flip=damage.flip)
        crops = [self._frame_crop(frame, damage, cut, rng) for frame in (real, forged)]
        number = self.pool.number(forged.row.method)
        return CropPair(crops[0], crops[1], forged.name, number, same_face)

    def _damage(
        self, face: FaceGeometry | None, rng: np.random.Generator, view: str
    ) -> UploadDamage:
        """As drawn, but for the view's encoding."""
        longer = _longer(face) if face else self.data.input.size
        drawn = draw_damage(self.data.augment, rng, face_px=longer)
        if view == DRAWN:
            return drawn
        codec, _, quality = view.partition(":")
        return replace(
            drawn,
            codec=cast("Codec", codec),
            quality=float(quality or 0),
            # Where no frame before it was drawn it is a key frame: a copy of the same picture in
            # front of it would leave nothing to encode.
            intra=drawn.intra or drawn.motion == (0, 0),
            generations=(),
        )

    def _frame_crop(
        self, frame: Frame, damage: UploadDamage, cut: Cut, rng: np.random.Generator
    ) -> Tensor:
        """A frame from disk, damaged and cut."""
        image, face = self.pool.pictures.picture(frame), self.pool.pictures.face(frame)
        if face is not None:
            image, face = as_another_person(*region(image, face, cut), damage.identity_seed)
        return self._crop(image, face, damage, cut, rng)

    def _crop(
        self,
        image: Image,
        face: FaceGeometry | None,
        damage: UploadDamage,
        cut: Cut,
        rng: np.random.Generator,
    ) -> Tensor:
        """The crop of a region after its damage."""
        after = damaged(image, damage, rng)
        if face is not None and after.shape != image.shape:
            face = face.scaled(after.shape[1] / image.shape[1], after.shape[0] / image.shape[0])
        return cut.take(after, face)


def _edges(share: float, rng: np.random.Generator) -> tuple[float, float, float, float]:
    """What a picture's edge takes of a crop: left, top, right, bottom; mostly nothing."""
    drawn, kind = rng.random(2)
    depth = rng.random(4)
    if drawn >= share:
        return (0.0, 0.0, 0.0, 0.0)
    if kind < 0.5:  # a picture that ends at the face, as avatars and data sets are cut
        taken = 0.22 * depth
    else:  # a face at the border of a frame, or in its corner
        taken = np.zeros(4)
        first = int(rng.integers(4))
        taken[first] = 0.05 + 0.3 * depth[first]
        if rng.random() < 0.4:
            taken[(first + 1) % 4] = 0.05 + 0.3 * depth[(first + 1) % 4]
    left, top, right, bottom = (float(part) for part in taken)
    return left, top, right, bottom


def _longer(face: FaceGeometry) -> float:
    return float(max(face.box[2] - face.box[0], face.box[3] - face.box[1], 1))


def _refuse_unknown(held_out: str | None, index: Index) -> None:
    """A misspelt name would hold out nothing."""
    methods = {row.method for row in index if row.label}
    if held_out is not None and held_out not in {*FAMILIES, *methods}:
        raise IndexFault(
            f"data.held_out {held_out!r} is no family ({', '.join(FAMILIES)}) and no method of the "
            f"forgeries on disk ({', '.join(sorted(methods)) or 'there are none'})"
        )


def _known(families: Sequence[str]) -> tuple[Family, ...]:
    unknown = [family for family in families if family not in FAMILIES]
    if unknown:
        raise IndexFault(f"no family {', '.join(unknown)}; known: {', '.join(FAMILIES)}")
    return tuple(family for family in FAMILIES if family in families)
