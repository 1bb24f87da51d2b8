"""DeepfakeBench: one JSON file for each dataset, with the pictures in an LMDB beside it or loose.

    {DATASET: {LABEL: {SPLIT: {[COMPRESSION:] {VIDEO: {"label", "frames", "masks"}}}}}}

The published files contain Windows' backslashes.  Some have a level for compression, some have
none.  Landmarks in an LMDB are bare integers, as wide as on the machine that wrote them: 81
points are 648 bytes of int32 or 1,296 bytes of int64.
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
from ralf.train.data.layouts.layout import Layout

POINTS = 81
SPLITS: dict[str, Split] = {"train": "train", "val": "val", "test": "test"}
DATASETS = {
    "FaceForensics++": "ffpp",
    "DeepFakeDetection": "dfd",
    "Celeb-DF-v1": "celeb_df_v1",
    "Celeb-DF-v2": "celeb_df_v2",
    "DFDC": "dfdc",
    "DFDCP": "dfdc_preview",
}
"""Their name of a dataset → ours."""
PEOPLE = {"ffpp": "ffpp", "celeb_df_v1": "celeb", "celeb_df_v2": "celeb", "dfd": "dfd"}
"""Dataset → the collection that its people are named with."""


def deepfake_bench(path: Path) -> Index:
    """The index of one of its JSON files; pictures are looked for in an LMDB first, then loose."""
    listed = json.loads(path.read_text())
    rows: list[Row] = []
    for name, labels in listed.items():
        lmdb_folder = _lmdb_folder(path, name)
        for label, splits in labels.items():
            for split, videos in splits.items():
                for compression, video, facts in _videos(videos):
                    what = _Video(name, label, split, compression, video)
                    rows += _frames(what, facts.get("frames", []), lmdb_folder)
    return Index(path.parent, tuple(rows))


class _Video:
    """What the place of a video in the JSON says about it."""

    def __init__(self, name: str, label: str, split: str, compression: str, video: str) -> None:
        # FF-DF, FF-F2F and so on: each manipulation of FaceForensics++ has a JSON of its own.
        self.dataset = "ffpp" if name.startswith("FF-") else DATASETS.get(name, name.lower())
        self.forged = not label.lower().endswith("real")
        self.method = label if self.forged else REAL
        self.split: Split = SPLITS.get(split, "")
        self.compression, self.video = compression, video
        people = PEOPLE.get(self.dataset, self.dataset)
        pattern = r"id\d+" if people == "celeb" else r"\d+"
        # DFD's names go on after the people with the scene and a hash, whose digits are nobody.
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
            # c0 and raw are two names of the same videos, here and in faceforensics.py.
            compression = "raw" if name == "c0" else name
            yield from ((compression, video, facts) for video, facts in below.items())


def _frames(video: _Video, frames: list[str], lmdb_folder: Path | None) -> Iterator[Row]:
    for name in frames:
        clean = PurePosixPath(name.replace("\\", "/"))
        number = re.search(r"\d+$", clean.stem)
        yield Row(
            dataset=video.dataset,
            method=video.method,
            compression=video.compression,
            split=video.split,
            video=video.video,
            target=video.target,
            source=video.source,
            label=int(video.forged),
            path=(
                f"{lmdb_folder.name}::{clean}"
                if lmdb_folder
                else clean.as_posix().removeprefix("./")
            ),
            kind="lmdb" if lmdb_folder else "image",
            frame=int(number.group()) if number else -1,
        )


def _lmdb_folder(path: Path, name: str) -> Path | None:
    """The dataset's LMDB beside the JSON, where there is one."""
    found = (path.parent / f"{each}_lmdb" for each in (name, path.stem))
    return next((folder for folder in found if (folder / "data.mdb").exists()), None)


class LmdbPictures:
    """An LMDB of pictures, opened read-only."""

    def __init__(self, folder: Path) -> None:
        import lmdb

        self.folder = folder
        self.dataset = folder.name.removesuffix("_lmdb")
        # No lock file, which a read-only disk refuses; no readahead, which reads pages for nothing
        # where pictures are taken in random order.
        self._open = lmdb.open(
            str(folder), readonly=True, lock=False, readahead=False, create=False
        )

    def close(self) -> None:
        """Unmap the file."""
        self._open.close()

    def value(self, name: str) -> bytes:
        """The bytes under a relative path, with slashes or backslashes."""
        backward = name.replace("/", "\\")
        # The keys were written on Windows or on Linux, with or without the dataset's name.
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


def opened(folder: Path) -> LmdbPictures:
    """The LMDB of a folder, opened once in each process.

    LMDB refuses to open a file twice in one process, and training and validation read the same
    one.  A forked process must open its own.
    """
    return _opened(folder.resolve(), os.getpid())


@cache
def _opened(folder: Path, _process: int) -> LmdbPictures:
    return LmdbPictures(folder)


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


def _is_json_file(path: Path) -> bool:
    return path.is_file() and path.suffix == ".json"


LAYOUT = Layout(
    name="DeepfakeBench",
    sign="one of its .json files, not a folder",
    recognises=_is_json_file,
    read=deepfake_bench,
)
