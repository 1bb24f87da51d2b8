"""Aligned faces: what a renderer is trained on, and how a face gets there and back.

A renderer sees each face upright, in one place and at one size.  `Alignment` is the similarity
(shift, turn, scale) that takes the face's five points nearest to those of the mean face; it cuts
the aligned crop out of a picture and puts another crop back.  `aligned_faces` cuts all authentic
faces of a split, with their points moved along.

    m: faces   s: side of the crop   Points are in the crop's pixels, x before y.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ralf.train.data.check import refuse_leaks
from ralf.train.data.index import Index, IndexFault
from ralf.train.data.pictures import Frame, Pictures, frames_of
from ralf.train.forge.landmarks import FIVE, FaceGeometry, Points
from ralf.train.forge.pixels import Kernel, Pixels, grid, remap, resize, to_u8

REACH = 2.8
"""Side of the crop in eye distances: the whole face and a little of what is around it."""
MIDDLE = complex(0, 0.5)
"""A crop's middle on the mean face, whose origin lies between the eyes."""
Window = tuple[slice, slice]
OnProgress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Alignment:
    """Where a face is in its picture, as the similarity z ↦ turn·z + shift onto the mean face."""

    turn: complex
    shift: complex
    size: int
    """Side of the aligned crop."""
    middle: complex = MIDDLE
    """Its middle on the mean face."""

    @classmethod
    def of(cls, face: FaceGeometry, size: int, middle: complex = MIDDLE) -> "Alignment":
        """The alignment with the least squared distance of the five points."""
        seen = face.five.astype(np.float64) @ np.array([1, 1j])
        mean = FIVE.astype(np.float64) @ np.array([1, 1j])
        away, wanted = seen - seen.mean(), mean - mean.mean()
        turn = complex(np.vdot(away, wanted) / max(float(np.vdot(away, away).real), 1e-6))
        # Points that nearly coincide would blow the face up without bound.
        turn *= min(1.0, 4 / face.eye_distance / max(abs(turn), 1e-9))
        return cls(turn, complex(mean.mean() - turn * seen.mean()), size, middle)

    @classmethod
    def native(cls, face: FaceGeometry, *, multiple: int, most: int = 256) -> "Alignment":
        """The alignment whose crop has the picture's own resolution, where `most` allows it; the
        crop's side is such a multiple, at least 64."""
        one = cls.of(face, multiple)
        return cls.of(face, int(np.clip(round(1 / one.scale) * multiple, 64, most)))

    @property
    def scale(self) -> float:
        """Pixels of the crop for each pixel of the picture."""
        return abs(self.turn) * self.size / REACH

    def to_crop(self, points: NDArray[np.float32]) -> Points:
        """Points [..., 2] of the picture, in the crop's pixels."""
        on_mean = self.turn * _complex(points) + self.shift - self.middle
        return _plain(on_mean * (self.size / REACH) + complex(1, 1) * (self.size / 2 - 0.5))

    def to_picture(self, points: NDArray[np.float32]) -> Points:
        """Points [..., 2] of the crop, in the picture's pixels."""
        away = (_complex(points) - complex(1, 1) * (self.size / 2 - 0.5)) * (REACH / self.size)
        return _plain((away + self.middle - self.shift) / self.turn)

    def geometry(self, face: FaceGeometry) -> FaceGeometry:
        """The face in the crop."""
        mesh = None if face.mesh is None else self.to_crop(face.mesh)
        corners = self.to_crop(face.box.reshape(2, 2)).reshape(4)
        return FaceGeometry(corners, self.to_crop(face.five), mesh)

    def cut(self, image: Pixels) -> Pixels:
        """The aligned crop [s, s, 3]; where the picture ends it is mirrored."""
        at = self.to_picture(grid(self.size, self.size))
        rows, columns = self.window(image.shape)
        part = image[rows, columns]
        at -= np.array([columns.start, rows.start], np.float32)
        factor = min(1.0, self.scale)
        if factor < 0.8:
            # Sampled as it is, fine texture would turn into false coarse texture.
            height, width = part.shape[:2]
            part = resize(part, max(8, round(height * factor)), max(8, round(width * factor)))
            ratio = np.array([part.shape[1] / width, part.shape[0] / height], np.float32)
            at = (at + 0.5) * ratio - 0.5
        seen = remap(part, at, "bicubic" if self.scale > 1 else "bilinear", "reflection")
        # Bicubic weights overshoot at edges; no picture has values below 0.
        return np.asarray(np.clip(seen, 0, 255), np.float32)

    def window(self, shape: tuple[int, ...]) -> Window:
        """The part of a picture of this shape that the crop shows."""
        edge = np.array([0, self.size - 1], np.float32)
        corners = self.to_picture(np.stack(np.meshgrid(edge, edge), axis=-1).reshape(-1, 2))
        low, high = np.floor(corners.min(axis=0)) - 2, np.ceil(corners.max(axis=0)) + 3
        rows, columns = (
            slice(int(max(0, low[axis])), int(min(shape[1 - axis], high[axis]))) for axis in (1, 0)
        )
        if rows.stop - rows.start < 8 or columns.stop - columns.start < 8:
            raise IndexFault(f"the face lies outside its picture of {shape[1]}×{shape[0]}")
        return rows, columns

    def put_back(self, crop: Pixels, window: Window, kernel: Kernel = "bicubic") -> Pixels:
        """An aligned crop (or mask) as it lies in a window of the picture."""
        rows, columns = window
        at = grid(rows.stop - rows.start, columns.stop - columns.start)
        at += np.array([columns.start, rows.start], np.float32)
        return remap(crop, self.to_crop(at), kernel)


def _complex(points: NDArray[np.float32]) -> NDArray[np.complex128]:
    return np.asarray(points.astype(np.float64) @ np.array([1, 1j]))


def _plain(points: NDArray[np.complex128]) -> Points:
    return np.stack([points.real, points.imag], axis=-1).astype(np.float32)


def crop_tensor(crop: Pixels) -> Tensor:
    """A crop [s, s, 3] of 0 to 255 as a batch of one, [1, 3, s, s] of 0 to 1."""
    return torch.from_numpy(np.ascontiguousarray(crop.transpose(2, 0, 1)))[None].float() / 255


def crop_pixels(crop: Tensor) -> Pixels:
    """A batch of one [1, 3, s, s] of 0 to 1 as pixels [s, s, 3] of 0 to 255."""
    pixels: Pixels = crop[0].float().clamp(0, 1).mul(255).permute(1, 2, 0).contiguous().numpy()
    return pixels


@dataclass(frozen=True)
class Faces:
    """All authentic faces of a split, aligned."""

    crops: Tensor  # u8 [n, 3, s, s]
    five: Tensor  # f32 [n, 5, 2]
    mesh: Tensor  # f32 [n, 468, 2]; NaN where a face has no mesh
    people: tuple[str, ...]
    """Who each face is: two crops of one person have the same name."""

    def __len__(self) -> int:
        return len(self.people)

    @property
    def meshed(self) -> Tensor:
        """The places of the faces that have a mesh."""
        return torch.nonzero(~self.mesh[:, 0, 0].isnan())[:, 0]

    def to(self, device: torch.device) -> "Faces":
        """The same on another device."""
        crops, five, mesh = (each.to(device) for each in (self.crops, self.five, self.mesh))
        return Faces(crops, five, mesh, self.people)

    def batch(self, chosen: Tensor) -> "FaceBatch":
        """Some of the faces, by their places, as a renderer draws them."""
        chosen = chosen.to(self.crops.device)
        crops = self.crops[chosen].float() / 255
        return FaceBatch(crops, self.five[chosen], self.mesh[chosen], chosen)


@dataclass(frozen=True)
class FaceBatch:
    """Some aligned faces."""

    crops: Tensor  # f32 [m, 3, s, s], 0 to 1
    five: Tensor  # f32 [m, 5, 2]
    mesh: Tensor  # f32 [m, 468, 2]
    chosen: Tensor  # int64 [m]: the places in Faces


def aligned_faces(
    index: Index,
    split: str,
    size: int,
    *,
    middle: complex = MIDDLE,
    most: int | None = None,
    on_progress: OnProgress | None = None,
) -> Faces:
    """The authentic faces of a split, at most so many, spread evenly over it."""
    refuse_leaks(index)
    frames = [frame for video in frames_of(index.where(split=split, label=0)).values()
              for frame in video]  # fmt: skip
    if most is not None and len(frames) > most:
        frames = [frames[place] for place in np.linspace(0, len(frames) - 1, most).astype(int)]
    pictures = Pictures(index, frames, ram_bytes=0)
    known = [(frame, face) for frame in frames if (face := pictures.face(frame)) is not None]
    if not known:
        raise IndexFault(
            f"split {split!r} has no authentic face with a box and five points: "
            "`ralf data prepare` finds them"
        )
    crops = torch.empty(len(known), 3, size, size, dtype=torch.uint8)
    five, mesh = np.empty((len(known), 5, 2), "f4"), np.full((len(known), 468, 2), np.nan, "f4")
    for place, (frame, face) in enumerate(known):
        alignment = Alignment.of(face, size, middle)
        crop = alignment.cut(pictures.picture(frame).astype(np.float32))
        crops[place] = torch.from_numpy(to_u8(crop)).permute(2, 0, 1)
        five[place] = alignment.to_crop(face.five)
        if face.mesh is not None:
            mesh[place] = alignment.to_crop(face.mesh)
        if on_progress is not None:
            on_progress(place + 1, len(known), frame.path)
    people = tuple(_person(frame) for frame, _ in known)
    return Faces(crops, torch.from_numpy(five), torch.from_numpy(mesh), people)


def _person(frame: Frame) -> str:
    return frame.row.target or "/".join(frame.row.key)
