"""The values that pass between the stages, and the protocols of a decoder and a face finder.

The values are frozen, check their shapes when they are made, and print shapes, not pixels.
n: frames   m: faces   h, w: height, width of the frame as displayed   s: side of a crop

Times are float seconds on the stream's own presentation clock, counted from its first frame, which
is at 0.0.  They are on the CPU even where the pixels are on a GPU.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ralf.worker.contract import Sampling


@dataclass(frozen=True, kw_only=True)
class Probe:
    """The facts of a file, found without decoding more than its first frame."""

    path: str
    size_bytes: int
    container: str
    """The demuxer that reads it: mov (mp4 too), matroska, avi or mpegts."""
    unmistakable: bool = False
    """Whether a decoder that chooses the demuxer itself would choose this one."""
    codec: str
    stream_index: int
    coded_width: int
    coded_height: int
    width: int
    """As displayed, after rotation; the sample aspect ratio is ignored."""
    height: int
    rotation: int
    """Degrees counter-clockwise to apply: 0, 90, 180 or 270."""
    mirrored: bool = False
    """Left and right are exchanged after the rotation, as some front cameras record it."""
    pixel_format: str
    duration_s: float
    frame_rate: float
    """Average; 0.0 where the container gives none."""
    variable_rate: bool
    frame_count: int
    """Counted from the packets; the container's number is not used."""
    times_s: NDArray[np.float64] = field(repr=False)
    """Presentation time of each frame in display order."""
    keyframes: NDArray[np.int64] = field(repr=False)
    """Indices into times_s."""
    start_s: float
    """The stream's own time of its first frame; times_s are relative to it."""
    colour_space: str
    """bt709, bt601, bt2020 … or "unspecified"."""
    colour_range: str
    """tv, pc or "unspecified"."""
    interlaced: bool
    unshown: int = 0
    """Frames in the file that a player does not show: an edit list hides them, or they come
    before the first keyframe.  A decoder that counts packets counts them too."""
    video_bytes: int = 0
    """Of the video's packets, without sound and container; 0: not known, as of an image."""
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rotation not in (0, 90, 180, 270):
            raise ValueError(f"rotation should be a quarter turn, got {self.rotation}")
        if len(self.times_s) != self.frame_count:
            raise ValueError(f"{len(self.times_s)} times for {self.frame_count} frames")

    @property
    def bits_per_pixel(self) -> float | None:
        """How strongly the video is compressed; None where that is not known."""
        pixels = self.width * self.height * (self.frame_count + self.unshown)
        return 8 * self.video_bytes / pixels if self.video_bytes and pixels else None


@dataclass(frozen=True)
class Clip:
    """A probed file and the choice of frames wanted from it."""

    probe: Probe
    sampling: Sampling


@dataclass(frozen=True)
class Frames:
    """A bounded chunk of one clip's frames, in time order."""

    clip: Clip
    pixels: Tensor = field(repr=False)  # u8 [n, 3, h, w] RGB, upright
    times_s: NDArray[np.float64] = field(repr=False)  # [n]
    indices: NDArray[np.int64] = field(repr=False)  # [n] frame number in display order
    asked: int = 0
    """How many frames sampling asked for up to and including this chunk's end."""
    total: int = 0
    """How many frames sampling asks for in the whole clip."""
    replaced: int = 0
    """How many of this chunk replace a neighbour that could not be decoded."""
    decoder: str = "pyav"
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        n = len(self.times_s)
        if self.pixels.dtype != torch.uint8 or self.pixels.ndim != 4 or self.pixels.shape[1] != 3:
            raise ValueError(
                f"pixels should be u8 [n,3,h,w], got {self.pixels.dtype} {tuple(self.pixels.shape)}"
            )
        if self.pixels.shape[0] != n or len(self.indices) != n:
            raise ValueError(
                f"{self.pixels.shape[0]} frames, {n} times, {len(self.indices)} indices"
            )

    def __len__(self) -> int:
        return len(self.times_s)

    def __repr__(self) -> str:
        n, _, h, w = self.pixels.shape
        span = f"{self.times_s[0]:.3f}–{self.times_s[-1]:.3f} s" if n else "empty"
        return f"Frames({n} of {self.total}, {w}×{h}, {span}, {self.decoder})"


@dataclass(frozen=True)
class Faces:
    """Every face found in one chunk; m may be 0, which is an ordinary outcome."""

    boxes: NDArray[np.float32]  # [m, 4] x0 y0 x1 y1 in pixels of the displayed frame
    landmarks: NDArray[np.float32] = field(repr=False)  # [m, 5, 2] eyes, nose, mouth corners
    confidence: NDArray[np.float32] = field(repr=False)  # [m]
    frame: NDArray[np.int64] = field(repr=False)  # [m] row of the chunk's Frames

    def __post_init__(self) -> None:
        m = len(self.boxes)
        shapes = (self.boxes.shape, self.landmarks.shape, self.confidence.shape, self.frame.shape)
        if shapes != ((m, 4), (m, 5, 2), (m,), (m,)):
            raise ValueError(f"faces disagree: {shapes}")

    def __len__(self) -> int:
        return len(self.boxes)

    def __repr__(self) -> str:
        return f"Faces({len(self)} in {len(np.unique(self.frame))} frames)"

    def take(self, rows: NDArray[np.int64] | NDArray[np.bool_]) -> "Faces":
        """Only these faces, in this order."""
        return Faces(
            boxes=self.boxes[rows],
            landmarks=self.landmarks[rows],
            confidence=self.confidence[rows],
            frame=self.frame[rows],
        )

    @classmethod
    def concat(cls, parts: Sequence["Faces"]) -> "Faces":
        """The faces of all parts, whose frames are counted alike."""
        return cls(
            boxes=np.concatenate([part.boxes for part in parts]),
            landmarks=np.concatenate([part.landmarks for part in parts]),
            confidence=np.concatenate([part.confidence for part in parts]),
            frame=np.concatenate([part.frame for part in parts]),
        )

    @classmethod
    def none(cls) -> "Faces":
        """No face in the chunk."""
        return cls(
            boxes=np.zeros((0, 4), np.float32),
            landmarks=np.zeros((0, 5, 2), np.float32),
            confidence=np.zeros(0, np.float32),
            frame=np.zeros(0, np.int64),
        )


class Decoder(Protocol):
    """Clips in, bounded chunks of frames out; Frames say which clip and which time.

    Each clip's chunks come in order; those of several clips may alternate.  A clip that cannot be
    decoded does not stop the others: its error is raised after they are done.
    """

    name: str

    def decode(self, clips: Sequence[Clip]) -> Iterator[Frames]: ...

    def halved(self) -> "Decoder":
        """The same with chunks of half the size, for when a device's memory has run out."""


class FaceFinder(Protocol):
    """One chunk of frames in, its faces out."""

    def find(self, frames: Frames) -> Faces: ...
