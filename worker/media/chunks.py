"""Decoded pictures gathered into chunks of bounded size, with what happened while they came.

A decoder gives its pictures one by one, in order; here they are painted into one tensor until it is
full.  Nothing here decodes, so it does not matter who did.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ralf.worker.errors import CorruptMedia
from ralf.worker.media.types import Clip, Frames, Probe


@dataclass(frozen=True)
class Picture:
    """A wanted frame as it came out; `frame` None means nothing near it could be decoded."""

    wanted: int
    index: int
    frame: Any = field(repr=False)


class Reader(Protocol):
    """Where pictures come from; `damaged` are frame numbers, emptied by whoever reports them."""

    damaged: list[int]

    def pictures(self, wanted: NDArray[np.int64]) -> Iterator[Picture]: ...


class Painter(Protocol):
    """Writes a decoded frame to out, u8 [3, h, w] RGB, upright."""

    def paint(self, frame: Any, out: NDArray[np.uint8]) -> None: ...


def chunks(
    clip: Clip,
    wanted: NDArray[np.int64],
    reader: Reader,
    *,
    painter: Painter,
    chunk_bytes: int,
    decoder: str,
    before: int = 0,
) -> Iterator[Frames]:
    """Pictures gathered into chunks; one goes out only when the next has its first picture.

    So the last chunk can carry the warning for what was lost after it.  `before` frames of the
    same clip went out already; then a chunk may be empty, and only say what was lost.
    """
    probe = clip.probe
    most = frames_in(chunk_bytes, probe)
    total = before + len(wanted)
    chunk, done = _Chunk(probe, decoder, min(most, len(wanted))), 0
    for picture in reader.pictures(wanted):
        if picture.frame is not None and len(chunk.indices) == len(chunk.pixels):
            yield chunk.frames(clip, before + done, total, reader)
            chunk = _Chunk(probe, decoder, min(most, len(wanted) - done))
        done += 1
        if picture.frame is None:
            chunk.lost.append(picture.wanted)
            continue
        painter.paint(picture.frame, chunk.pixels[len(chunk.indices)].numpy())
        chunk.indices.append(picture.index)
        if picture.index != picture.wanted:
            chunk.replaced.append(picture.wanted)
    if not chunk.indices and not before:
        raise CorruptMedia(f"none of the {len(wanted)} frames asked for can be decoded")
    yield chunk.frames(clip, before + done, total, reader)


def frames_in(chunk_bytes: int, probe: Probe) -> int:
    """How many of a clip's frames a chunk of so many bytes holds; one at least."""
    return max(1, chunk_bytes // (3 * probe.width * probe.height))


class _Chunk:
    """Room for so many frames, and what happened while they came."""

    def __init__(self, probe: Probe, decoder: str, count: int) -> None:
        self.probe, self.decoder = probe, decoder
        self.pixels = torch.empty((count, 3, probe.height, probe.width), dtype=torch.uint8)
        self.indices: list[int] = []
        self.replaced: list[int] = []
        self.lost: list[int] = []

    def frames(self, clip: Clip, asked: int, total: int, reader: Reader) -> Frames:
        """What came, and what the reader met since the last chunk."""
        indices = np.asarray(self.indices, dtype=np.int64)
        return Frames(
            clip=clip,
            pixels=self.pixels[: len(indices)],
            times_s=self.probe.times_s[indices],
            indices=indices,
            asked=asked,
            total=total,
            replaced=len(self.replaced),
            decoder=self.decoder,
            warnings=tuple(self._warnings(reader)),
        )

    def _warnings(self, reader: Reader) -> Iterator[str]:
        damaged, reader.damaged = reader.damaged, []
        for numbers, what in (
            (damaged, "damaged_clip: {} frames are damaged {}; later ones may be smeared"),
            (self.replaced, "replaced_frames: {} do not decode {}; neighbours stand in for them"),
            (self.lost, "lost_frames: {} do not decode {}, nor does any near them"),
        ):
            if numbers:
                times = self.probe.times_s[numbers]
                between = f"between {times.min():.3f} and {times.max():.3f} s"
                yield what.format(len(set(numbers)), between)
