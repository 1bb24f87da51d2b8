"""One file → its faces, by the worker's own parts: probe, decode, find, follow, choose, store.

A file that cannot be used gets a FileOutcome with its reason; none is left out in silence.
Pictures go the same way without probe and decoder.  A folder of frames in which no face is found
keeps its frames as they are, since datasets of frames hold crops of faces already.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as Picture
from PIL import UnidentifiedImageError

from ralf.kernels.manifest import InputContract
from ralf.train.data.index import Row
from ralf.train.data.main_face import (
    StoredFace,
    cut_for_storage,
    main_track,
    masked_track,
    under_reviewed_boxes,
)
from ralf.train.forge.pixels import Image
from ralf.worker.contract import Sampling
from ralf.worker.errors import JobError
from ralf.worker.media.decode_pyav import PyavDecoder
from ralf.worker.media.mtcnn import Mtcnn
from ralf.worker.media.probe import probe
from ralf.worker.media.tracks import Tracker
from ralf.worker.media.types import Clip, Faces, Frames, Probe
from ralf.worker.settings import Settings


@dataclass(frozen=True)
class PrepareOptions:
    """How files are prepared; the same for all files of one folder."""

    contract: InputContract
    frames: int
    quality: int = 98
    """JPEG quality, without chroma subsampling; 0 stores PNG."""

    @property
    def longest(self) -> int:
        """Longest side of a stored face: enough to cut any margin without enlarging."""
        return round(1.6 * self.contract.size)


@dataclass(frozen=True)
class FileTask:
    """One file, or one folder of frames, and the rows about it."""

    path: str
    rows: tuple[Row, ...]
    masks: str = ""
    pictures: tuple[str, ...] = ()
    """Whole paths, in place of a video."""

    @property
    def name(self) -> str:
        """The name of its stored faces and of its outcome file."""
        row = self.rows[0]
        said = "|".join((row.path, *row.key[:3]))
        return f"{Path(row.path).stem[:40]}-{hashlib.sha256(said.encode()).hexdigest()[:12]}"


@dataclass(frozen=True)
class FileOutcome:
    """What became of one file."""

    path: str
    asked: int = 0
    decoded: int = 0
    found: int = 0
    kept: int = 0
    reason: str = ""
    """Why nothing was kept, or what was unusual; empty when all is well."""

    def __str__(self) -> str:
        return f"{self.path}: {self.kept} faces {self.reason}".rstrip()


class Extractor:
    """The worker's decoder and finder, made once a process."""

    def __init__(
        self, options: PrepareOptions, folder: Path, *, device: str = "cpu", threads: int = 1
    ) -> None:
        self.options, self.folder, self.settings = options, folder, Settings()
        self.decoder = PyavDecoder(self.settings.chunk_bytes, threads=threads)
        self.finder = Mtcnn(options.contract.finder, device)

    def work(self, task: FileTask) -> tuple[FileOutcome, list[Row]]:
        """The file's faces, stored, and their rows."""
        row = task.rows[0]
        seen = _FacesOfFile()
        try:
            for frames in self._pictures(task) if task.pictures else self._video(task):
                seen.add(frames, self.finder.find(frames))
        except JobError as error:
            if not seen.images:
                return FileOutcome(row.path, reason=f"{error.code}: {error}"), []
            seen.remarks.append(f"{error.code} after {len(seen.images)} frames")
        except (UnidentifiedImageError, OSError) as error:
            return FileOutcome(row.path, reason=f"unreadable_picture: {error}"), []
        rows = [
            replace(self._store(task, whose, kept), bits_per_pixel=round(seen.bits_per_pixel, 6))
            for whose, kept in self._choose(task, seen)
        ]
        if not rows and task.pictures:
            rows = self._as_they_are(task)
            seen.remarks.append("no_faces: kept as crops")
        elif not rows:
            seen.remarks.append("no_faces")
        asked = seen.asked or len(task.pictures)
        reason = "; ".join(dict.fromkeys(seen.remarks))
        return FileOutcome(row.path, asked, len(seen.images), len(seen), len(rows), reason), rows

    def _clip(self, path: str) -> Clip:
        sampling = self.options.contract.sampling.model_dump() | {"max_frames": self.options.frames}
        return Clip(probe(path, self.settings), Sampling(**sampling))

    def _video(self, task: FileTask) -> Iterator[Frames]:
        yield from self.decoder.decode([self._clip(task.path)])

    def _pictures(self, task: FileTask) -> Iterator[Frames]:
        """Each picture as a clip of its own, because pictures may differ in size."""
        places = range(len(task.pictures))
        if len(places) > self.options.frames:
            even = (np.arange(self.options.frames) + 0.5) * len(places) / self.options.frames
            places = [int(place) for place in even]  # type: ignore[assignment]
        for place in places:
            with Picture.open(task.pictures[place]) as opened:
                yield _still(np.array(opened.convert("RGB")), place, task.pictures[place])

    def _choose(self, task: FileTask, seen: "_FacesOfFile") -> Iterator[tuple[Row, StoredFace]]:
        """The found faces to store, each with the row that it belongs to."""
        if not len(seen):
            return
        row, longest = task.rows[0], self.options.longest
        faces, numbers = seen.faces, np.array(seen.numbers)
        if row.frame >= 0 and row.kind == "video":
            size = (seen.images[0].shape[0], seen.images[0].shape[1])
            pairs = under_reviewed_boxes(faces, numbers, task.rows, size)
            if len(pairs) < len(task.rows):
                seen.remarks.append(f"{len(task.rows) - len(pairs)} reviewed faces not found again")
        else:
            tracks = np.concatenate(seen.tracks)
            masks = self._masks(task, seen) if task.masks else None
            found = (
                main_track(faces, tracks) if masks is None else masked_track(faces, tracks, masks)
            )
            pairs = [(row, int(place)) for place in found]
        for whose, place in pairs:
            at = int(faces.frame[place])
            kept = cut_for_storage(
                seen.images[at],
                faces.boxes[place],
                faces.landmarks[place],
                seen.numbers[at],
                longest,
            )
            yield whose, kept

    def _masks(self, task: FileTask, seen: "_FacesOfFile") -> NDArray[np.bool_] | None:
        """The same frames of the mask video, [n, h, w]; None where it does not fit the video."""
        try:
            parts = list(self.decoder.decode([self._clip(task.masks)]))
        except JobError as error:
            seen.remarks.append(f"masks unused: {error.code}")
            return None
        numbers = [int(number) for part in parts for number in part.indices]
        # Not > 0: a mask video is lossy too, and black is seldom exactly 0.
        masks = np.concatenate([part.pixels.float().mean(dim=1).numpy() > 16 for part in parts])
        if numbers != seen.numbers or masks.shape[1:] != seen.images[0].shape[:2]:
            seen.remarks.append("masks unused: other frames or size than the video")
            return None
        return np.asarray(masks)

    def _store(self, task: FileTask, row: Row, kept: StoredFace) -> Row:
        """The face as a file, and its row."""
        # Reviews may name several people of one frame: the name then keeps their files apart.
        mine = "" if len({one.video for one in task.rows}) == 1 else f"-{row.video.split('/')[-1]}"
        suffix = "jpg" if self.options.quality else "png"
        name = f"faces/{task.name}{mine}-{kept.frame:05d}.{suffix}"
        # The JPEG must not halve the colour's resolution once more.
        lossy = {"quality": self.options.quality, "subsampling": 0} if self.options.quality else {}
        Picture.fromarray(kept.image).save(self.folder / name, **lossy)
        return replace(
            row, path=name, kind="image", frame=kept.frame, masks="", box=kept.box, five=kept.five,
            mesh="", face_px=kept.face_px, marked=(),
        )  # fmt: skip

    def _as_they_are(self, task: FileTask) -> list[Row]:
        places = np.unique(np.linspace(0, len(task.pictures) - 1, self.options.frames).astype(int))
        return [
            replace(task.rows[0], path=task.pictures[place], kind="image", frame=int(place))
            for place in places
        ]


class _FacesOfFile:
    """The frames and faces found in one file so far."""

    def __init__(self) -> None:
        self.images: list[Image] = []
        self.numbers: list[int] = []
        self.tracks: list[NDArray[np.int64]] = []
        self.remarks: list[str] = []
        self.asked = 0
        self.bits_per_pixel = 0.0
        self._faces: list[Faces] = []
        self._tracker = Tracker(max_tracks=16)

    def add(self, frames: Frames, faces: Faces) -> None:
        self.bits_per_pixel = frames.clip.probe.bits_per_pixel or 0.0
        self.tracks.append(self._tracker.update(frames, faces))
        self._faces.append(replace(faces, frame=faces.frame + len(self.images)))
        self.images += list(frames.pixels.permute(0, 2, 3, 1).cpu().numpy())
        self.numbers += [int(number) for number in frames.indices]
        self.asked = frames.total
        if frames.replaced:
            self.remarks.append("frames stood in for broken neighbours")
        self.remarks += frames.warnings

    def __len__(self) -> int:
        return sum(len(faces) for faces in self._faces)

    @property
    def faces(self) -> Faces:
        fields = ("boxes", "landmarks", "confidence", "frame")
        return Faces(*(np.concatenate([getattr(f, name) for f in self._faces]) for name in fields))


def _still(image: Image, number: int, path: str) -> Frames:
    """A picture as a clip of one frame, at its own place in time."""
    height, width = image.shape[:2]
    facts = Probe(
        path=path, size_bytes=0, container="picture", codec="picture", stream_index=0,
        coded_width=width, coded_height=height, width=width, height=height, rotation=0,
        pixel_format="rgb24", duration_s=0.04, frame_rate=25.0, variable_rate=False, frame_count=1,
        times_s=np.zeros(1), keyframes=np.zeros(1, np.int64), start_s=0.0,
        colour_space="unspecified", colour_range="pc", interlaced=False,
    )  # fmt: skip
    return Frames(
        clip=Clip(facts, Sampling()),
        pixels=torch.from_numpy(image.transpose(2, 0, 1).copy())[None],
        times_s=np.array([number / 25]),
        indices=np.array([number], np.int64),
    )
