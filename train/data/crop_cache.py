"""Pairs of crops on disk: forged, damaged and encoded once, and shown again in later epochs.

    FOLDER/KEY/crops.json    what KEY is the hash of
    FOLDER/KEY/crops.u8      real and forged crop of each pair, as they are [n, 2, 3, s, s]
    FOLDER/KEY/pairs.bin     of each pair: is it there, its family, its name, a checksum

With `data.variants` a face is forged in so many ways, each seeded by the face's name, so a pair is
the same whether it is read from here or made anew: the folder may be removed at any time.  The key
is the hash of the recipe's data part, of the index and of the code that forges, so a change of any
makes another folder.  Several processes may fill one folder: they write the same bytes.  A pair
that was written half, by a process that was killed, fails its checksum and is made anew.
"""

import hashlib
import json
import os
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ralf.kernels.atomic_files import replace_text
from ralf.train.data.index import Index
from ralf.train.recipe import Data

PAIR = np.dtype(
    [("there", "u1"), ("same", "u1"), ("family", "<i2"), ("crc", "<u4"), ("name", "S248")]
)
NOT_CROPS = ("batch", "evaluation_frames", "epoch_of")
"""Fields of the data part that change no pair."""


@dataclass(frozen=True)
class CropPair:
    """A real and a forged crop, with what is known of the forged one."""

    real: Tensor
    forged: Tensor
    name: str
    family: int
    same_face: bool


class CropCache:
    """The pairs of one recipe's data, by number."""

    def __init__(self, folder: Path, index: Index, data: Data, split: str, pairs: int) -> None:
        asked = {
            "data": {k: v for k, v in data.model_dump(mode="json").items() if k not in NOT_CROPS},
            "index": index.where(split=split).sha256,
            "split": split,
            "pairs": pairs,
            "code": _code(),
        }
        text = json.dumps(asked, sort_keys=True)
        self.folder = folder / hashlib.sha256(text.encode()).hexdigest()[:12]
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "crops.json").exists():
            replace_text(self.folder / "crops.json", text + "\n")
        self._shape = (pairs, 2, 3, data.input.size, data.input.size)
        self._open()

    def _open(self) -> None:
        self._crops = _mapped(self.folder / "crops.u8", np.dtype("u1"), self._shape)
        self._pairs = _mapped(self.folder / "pairs.bin", PAIR, self._shape[:1])

    def __getstate__(self) -> dict[str, Any]:
        # A loader process maps the files itself: numpy would send it all pairs as a copy.
        return {"folder": self.folder, "_shape": self._shape}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def get(self, number: int) -> CropPair | None:
        """A pair; None where it is not there, or not whole."""
        row = self._pairs[number]
        if not row["there"]:
            return None
        crops = np.array(self._crops[number])
        if zlib.crc32(crops.tobytes()) != row["crc"]:
            return None
        both = torch.from_numpy(crops)
        name = bytes(row["name"]).decode(errors="ignore")
        return CropPair(both[0], both[1], name, int(row["family"]), bool(row["same"]))

    def put(self, number: int, pair: CropPair) -> None:
        """Keep a pair."""
        crops = torch.stack([pair.real, pair.forged]).numpy()
        self._crops[number] = crops
        crc = zlib.crc32(crops.tobytes())
        name = pair.name.encode()[:248]
        self._pairs[number] = (1, pair.same_face, pair.family, crc, name)

    @property
    def kept(self) -> int:
        """How many pairs are there."""
        return int(self._pairs["there"].sum())


def _mapped(path: Path, kind: np.dtype[Any], shape: tuple[int, ...]) -> np.memmap[Any, Any]:
    """A file of that many zeros, where it is missing; it takes room on disk as it is filled."""
    length = kind.itemsize * int(np.prod(shape))
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        os.ftruncate(descriptor, length)  # the same length for everyone who opens it
    finally:
        os.close(descriptor)
    return np.memmap(path, kind, "r+", shape=shape)


@cache
def _code() -> str:
    """The hash of all code that makes a pair."""
    room = Path(__file__).resolve().parents[1]
    files = [*(room / "forge").rglob("*.py"), *(room / "data").glob("*.py")]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.read_bytes())
    return digest.hexdigest()
