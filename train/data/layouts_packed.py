"""DeepfakeBench's files: one JSON a dataset, pictures loose or in an LMDB beside it.

    {DATASET: {LABEL: {SPLIT: {[COMPRESSION:] {VIDEO: {"label", "frames", "masks"}}}}}}

Published files hold Windows' backslashes, some have a level for compression and some have none,
and landmarks in an LMDB are bare integers whose width is that of the machine that wrote them:
648 bytes are int32, 1,296 are int64, 81 points either way.
"""

import io
import json
import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ralf.train.data.index import REAL, Index, IndexFault, Row, Split

POINTS = 81
SPLITS: dict[str, Split] = {"train": "train", "val": "val", "test": "test"}
FAMILY = {"FaceForensics++": "ffpp", "DeepFakeDetection": "dfd", "Celeb-DF-v2": "celeb_df_v2"}
FAMILY |= {"Celeb-DF-v1": "celeb_df_v1", "DFDC": "dfdc", "DFDCP": "dfdc_preview"}
PEOPLE = {"ffpp": "ffpp", "celeb_df_v1": "celeb", "celeb_df_v2": "celeb", "dfd": "dfd"}


def deepfake_bench(path: Path) -> Index:
    """The index of one of its JSON files; pictures are looked for in an LMDB first, then loose."""
    listed = json.loads(path.read_text())
    rows: list[Row] = []
    for name, labels in listed.items():
        store = _store(path, name)
        for label, splits in labels.items():
            for split, videos in splits.items():
                for compression, video, facts in _videos(videos):
                    what = _What(name, label, split, compression, video)
                    rows += _frames(what, facts.get("frames", []), store)
    return Index(path.parent, tuple(rows))


class _What:
    """Where in the JSON a video stands, and so what it is."""

    def __init__(self, name: str, label: str, split: str, compression: str, video: str) -> None:
        self.dataset = "ffpp" if name.startswith("FF-") else FAMILY.get(name, name.lower())
        self.forged = not label.lower().endswith("real")
        self.method = label if self.forged else REAL
        self.split: Split = SPLITS.get(split, "")
        self.compression, self.video = compression, video
        people = PEOPLE.get(self.dataset, self.dataset)
        pattern = r"id\d+" if people == "celeb" else r"\d+"
        named = re.findall(pattern, video.split("__", maxsplit=1)[0])
        if people == "celeb" and not named:
            named = [f"youtube{video}"]
        self.target = f"{people}:{named[0] if named else video}"
        self.source = f"{people}:{named[1]}" if self.forged and len(named) > 1 else ""


def _videos(level: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Compression, video and its facts, whether or not there is a level for compression."""
    for name, below in level.items():
        if "frames" in below:
            yield "", name, below
        else:
            compression = "raw" if name == "c0" else name
            yield from ((compression, video, facts) for video, facts in below.items())


def _frames(what: _What, frames: list[str], store: Path | None) -> Iterator[Row]:
    for name in frames:
        clean = PurePosixPath(name.replace("\\", "/"))
        number = re.search(r"\d+$", clean.stem)
        yield Row(
            dataset=what.dataset,
            method=what.method,
            compression=what.compression,
            split=what.split,
            video=what.video,
            target=what.target,
            source=what.source,
            label=int(what.forged),
            path=f"{store.name}::{clean}" if store else clean.as_posix().removeprefix("./"),
            kind="lmdb" if store else "image",
            frame=int(number.group()) if number else -1,
        )


def _store(path: Path, name: str) -> Path | None:
    """The dataset's LMDB beside the JSON, where there is one."""
    found = (path.parent / f"{each}_lmdb" for each in (name, path.stem))
    return next((folder for folder in found if (folder / "data.mdb").exists()), None)


class Store:
    """An LMDB of pictures, read-only; one a process, opened when first read."""

    def __init__(self, folder: Path) -> None:
        import lmdb

        self.folder = folder
        self.dataset = folder.name.removesuffix("_lmdb")
        self._open = lmdb.open(
            str(folder), readonly=True, lock=False, readahead=False, create=False
        )

    def close(self) -> None:
        self._open.close()

    def value(self, name: str) -> bytes:
        """The bytes under a relative path, whichever way its separators lean."""
        backward = name.replace("/", "\\")
        tried = [f"{self.dataset}\\{name}", f"{self.dataset}\\{backward}"]
        tried += [f"{self.dataset}/{name}", name, backward]
        with self._open.begin() as view:
            for key in tried:
                if (found := view.get(key.encode())) is not None:
                    return bytes(found)
        raise IndexFault(f"{self.folder.name} has no {name!r} (tried {tried[0]!r}, …)")

    def picture(self, name: str) -> NDArray[np.uint8]:
        """u8 [h, w, 3] RGB."""
        return np.asarray(Image.open(io.BytesIO(self.value(name))).convert("RGB"))

    def landmarks(self, picture: str) -> NDArray[np.float32] | None:
        """The five points of a picture's face, from the 81 stored beside it, if they are."""
        name = re.sub(r"(^|/)frames/", r"\1landmarks/", picture)
        try:
            return five_points(self.value(str(PurePosixPath(name).with_suffix(".npy"))))
        except IndexFault:
            return None


def opened(folder: Path) -> Store:
    """The store of a folder.  LMDB opens a file once a process: training and validation share it.
    A forked process opens its own."""
    return _opened(folder.resolve(), os.getpid())


@cache
def _opened(folder: Path, _process: int) -> Store:
    return Store(folder)


def five_points(stored: bytes) -> NDArray[np.float32]:
    """81 landmarks as raw integers of either width, or as a .npy → eyes, nose, mouth corners."""
    if stored[:6] == b"\x93NUMPY":
        points = np.load(io.BytesIO(stored), allow_pickle=False)
    else:
        widths = {POINTS * 2 * 4: np.int32, POINTS * 2 * 8: np.int64}
        if len(stored) not in widths:
            raise IndexFault(
                f"landmarks should be {sorted(widths)} bytes (81 points), got {len(stored)}"
            )
        points = np.frombuffer(stored, widths[len(stored)]).reshape(POINTS, 2)
    points = points.astype(np.float32)
    # dlib's numbering: 36–41 and 42–47 the eyes, 30 the nose's tip, 48 and 54 the mouth's corners.
    five = [points[36:42].mean(axis=0), points[42:48].mean(axis=0), *points[[30, 48, 54]]]
    return np.stack(five)
