"""The pictures of an index's rows, held in memory as encoded files and decoded on demand.

Encoded files take a tenth of the memory that pixels take.  Decoding a 400-pixel JPEG takes 2 of
the 25 ms that a training pair takes.  The files are in one tensor in shared memory, so that loader
processes read the same bytes.  Files beyond the memory budget are read from disk each time.  A
picture that cannot be read is an error that names it; it is never replaced by another one.
"""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as Picture
from PIL import UnidentifiedImageError

from ralf.train.data.index import MESHES, Index, IndexFault, Row
from ralf.train.data.layouts.deepfakebench import LmdbPictures, opened
from ralf.train.data.layouts.layout import PICTURES
from ralf.train.forge.landmarks import FaceGeometry
from ralf.train.forge.pixels import Image


@dataclass(frozen=True)
class Frame:
    """One picture of one video."""

    row: Row
    path: str
    number: int

    @property
    def name(self) -> str:
        """Dataset, method, compression, video and frame: identifies a score."""
        return "/".join((*self.row.key, str(self.number)))


def seeded_by(name: str) -> np.random.Generator:
    """The generator of that name: the same in every process, whatever else is drawn."""
    digest = hashlib.sha256(name.encode()).digest()[:8]
    return np.random.default_rng(int.from_bytes(digest, "big"))


def frames_of(index: Index) -> dict[tuple[str, str, str, str], list[Frame]]:
    """Video → its frames in order.  Videos must have been prepared into pictures first."""
    found: dict[tuple[str, str, str, str], list[Frame]] = {}
    for row in index:
        if row.kind == "video":
            raise IndexFault(
                f"{row.path} is a video: `ralf data prepare` cuts faces out of it first"
            )
        found.setdefault(row.key, []).extend(_frames(index, row))
    for frames in found.values():
        frames.sort(key=lambda frame: (frame.number, frame.path))
    return found


def _frames(index: Index, row: Row) -> list[Frame]:
    if row.kind != "frames":
        return [Frame(row, row.path, row.frame)]
    folder = Path(index.whole_path(row))
    # Sorted, because a folder's own order differs between file systems.
    names = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in PICTURES)
    return [Frame(row, f"{row.path}/{name}", number) for number, name in enumerate(names)]


class Pictures:
    """Every picture of some frames, by path."""

    def __init__(
        self,
        index: Index,
        frames: Sequence[Frame] = (),
        *,
        ram_bytes: int = 2 * 1024**3,
        by_mesh: bool = False,
    ) -> None:
        """With `by_mesh`, a face's box and points come from its mesh where there is one."""
        self.root, self._by_mesh = index.root, by_mesh
        self._meshes = self._read_meshes(frames)
        self._held, self._places = self._hold(frames, ram_bytes)

    def picture(self, frame: Frame) -> Image:
        """u8 [h, w, 3] RGB."""
        try:
            with Picture.open(io.BytesIO(self._encoded(frame))) as opened:
                return np.asarray(opened.convert("RGB"))
        except (UnidentifiedImageError, OSError) as error:
            raise IndexFault(f"{frame.path} is not a picture that can be read: {error}") from error

    def size(self, frame: Frame) -> tuple[int, int]:
        """Width and height, from the file's header alone."""
        with Picture.open(io.BytesIO(self._encoded(frame))) as opened:
            width, height = opened.size
        return width, height

    def _encoded(self, frame: Frame) -> bytes:
        place = self._places.get(frame.path)
        if place is None:
            return self._read(frame.path)
        return self._held[slice(*place)].numpy().tobytes()

    def face(self, frame: Frame) -> FaceGeometry | None:
        """Where the face is, where that is known."""
        if frame.row.kind == "lmdb" and not frame.row.five:
            return self._stored_face(frame)
        face = frame.row.geometry(self._meshes.get(frame.row.mesh))
        if face is not None and not face.consistent:
            face = FaceGeometry(face.box, face.five)
        return face.by_mesh() if face is not None and self._by_mesh else face

    def face_to_forge(self, frame: Frame) -> FaceGeometry:
        """Where the face is; an error where that is not known."""
        face = self.face(frame)
        if face is None:
            raise IndexFault(
                f"{frame.path} has no box and five points, so nothing can be blended into it: "
                "`ralf data prepare` finds them"
            )
        return face

    def _stored_face(self, frame: Frame) -> FaceGeometry | None:
        """DeepfakeBench's landmarks; its crops are 1.3 times the face, so the box follows."""
        folder, name = frame.path.split("::")
        five = self._lmdb(folder).landmarks(name)
        if five is None:
            return None
        middle, unit = five.mean(axis=0), float(np.linalg.norm(five[1] - five[0]))
        # A finder's box is about 2.1 eye distances wide and 2.9 tall, its middle by the nose.
        reach = np.array([1.05, 1.45], np.float32) * unit
        return FaceGeometry(np.concatenate([middle - reach, middle + reach]), five)

    def _read(self, path: str) -> bytes:
        if "::" in path:
            folder, name = path.split("::")
            return self._lmdb(folder).value(name)
        whole = Path(path) if Path(path).is_absolute() else self.root / path
        try:
            return whole.read_bytes()
        except OSError as error:
            raise IndexFault(f"{path} cannot be read: {error.strerror}") from error

    def _lmdb(self, folder: str) -> LmdbPictures:
        return opened(self.root / folder)

    def _read_meshes(self, frames: Sequence[Frame]) -> dict[str, NDArray[np.float32]]:
        wanted: dict[Path, dict[str, str]] = {}
        for mesh in {frame.row.mesh for frame in frames} - {""}:
            elsewhere, _, name = mesh.rpartition("::")
            place = Path(elsewhere) if elsewhere else self.root / MESHES
            wanted.setdefault(place, {})[name] = mesh
        found = {}
        for file, names in wanted.items():
            with np.load(file) as packed:
                points = packed["points_eighth_px"].astype(np.float32) / 8
                for row, name in enumerate(packed["files"].tolist()):
                    if name in names:
                        found[names[name]] = points[row]
        return found

    def _hold(
        self, frames: Sequence[Frame], ram_bytes: int
    ) -> tuple[torch.Tensor, dict[str, tuple[int, int]]]:
        """As many encoded pictures as fit, end to end, and the place of each."""
        parts: list[NDArray[np.uint8]] = []
        places: dict[str, tuple[int, int]] = {}
        end = 0
        # Each path once: several rows may name one picture.
        for path in dict.fromkeys(frame.path for frame in frames):
            encoded = self._read(path)
            if end + len(encoded) > ram_bytes:
                break
            parts.append(np.frombuffer(encoded, np.uint8))
            places[path] = (end, end + len(encoded))
            end += len(encoded)
        together = np.concatenate(parts) if parts else np.zeros(0, np.uint8)
        return torch.from_numpy(together).share_memory_(), places  # type: ignore[no-untyped-call]
