"""The CPU decoder: of a probed clip, only the frames that sampling asks for, in bounded chunks.

`plan` says which frames (worker/media/sampling.py).  Wanted frames are decoded in groups: seek to
the keyframe before the first, decode up to the last.  Within a group, frames that are not wanted
and that no other frame refers to are not decoded at all (`skip_frame`); this changes no pixel of
the others.  A frame is identified by its presentation time, never by counting.

A seek throws away the pictures that the decoder's threads are working on, so gaps of up to NEAR
frames are decoded instead; for longer gaps seeking is cheaper, as measured at NEAR.

Damage.  Where a frame cannot be decoded whole, its group is read a second time: from one keyframe
earlier, decoding every frame, and the nearest whole neighbour takes the frame's place.  A neighbour
must be nearer to this wanted frame than to any other, so that no picture counts twice.  Without
such a neighbour the frame is lost, and the chunk's warnings say so.  A clip in which no frame can
be decoded is CorruptMedia.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import av
import numpy as np
import torch
from numpy.typing import NDArray

from ralf.worker.errors import CorruptMedia, JobError
from ralf.worker.media.colour import FULL, colour_of, hdr_of
from ralf.worker.media.probe import hidden, open_media, packets
from ralf.worker.media.sampling import plan
from ralf.worker.media.tonemap import to_sdr
from ralf.worker.media.types import Clip, Frames, Probe

__all__ = ["PyavDecoder", "frames_per_chunk", "plan", "range_in_stream"]

NEAR = 4
"""Gaps of up to so many frames are decoded rather than skipped by a seek.

Seven seeks in 240 frames of 1080p H.264 (3 B-frames, a keyframe in 30), one thread, CPU seconds of
seeking against reading on: over 2 frames 0.465 / 0.477 in MP4 and 0.503 / 0.497 in MPEG-TS, over 5
frames 0.421 / 0.477 and 0.435 / 0.490, over 20 frames 0.339 / 0.476 and 0.368 / 0.494.
"""
THREAD_BYTES = 512 * 1024**2
"""The most memory for pictures that the decoder's threads are working on."""
SKIPS = frozenset({"h264", "hevc", "mpeg4", "vp8"})
"""Codecs whose decoder reads `skip_frame` for each packet; AV1 reads it only when it opens."""
LEAST_CAP = (4096 + 128) * (2304 + 128)
"""A stream that begins smaller may change its size in the middle, up to this area."""
BEYOND = 64
"""Packets after a lost frame that the second reading still decodes before it gives up."""
# Without ACCURATE_RND and FULL_CHR_H_INT swscale takes faster and coarser ways.
_EXACT = av.video.reformatter.Interpolation
_SCALING = _EXACT.BILINEAR | _EXACT.ACCURATE_RND | _EXACT.FULL_CHR_H_INT


class PyavDecoder:
    """Clips in, chunks of at most `chunk_bytes` of pixels out; `threads` 0 is one per core."""

    name = "pyav"

    def __init__(self, chunk_bytes: int = 256 * 1024**2, threads: int = 0) -> None:
        if chunk_bytes < 1:
            raise ValueError(f"chunk_bytes should be positive, got {chunk_bytes}")
        self.chunk_bytes = chunk_bytes
        self.threads = threads

    def halved(self) -> "PyavDecoder":
        """The same with chunks of half the size."""
        return PyavDecoder(max(1, self.chunk_bytes // 2), self.threads)

    def decode(self, clips: Sequence[Clip]) -> Iterator[Frames]:
        """Each clip's frames in time order; closing the iterator early closes the file."""
        failed: list[JobError] = []
        for clip in clips:
            try:
                yield from self.frames(clip, plan(clip))
            except JobError as error:
                failed.append(error)
        if failed:
            raise failed[0]

    def frames(self, clip: Clip, wanted: NDArray[np.int64], *, before: int = 0) -> Iterator[Frames]:
        """These frames of one clip, of which `before` others were given out already."""
        cap = max(LEAST_CAP, (clip.probe.coded_width + 128) * (clip.probe.coded_height + 128))
        with open_media(clip.probe.path, clip.probe.container, cap) as container:
            reader = _Reader(container, clip.probe, self.threads or os.cpu_count() or 1, cap)
            yield from _chunks(
                clip,
                wanted,
                reader,
                chunk_bytes=self.chunk_bytes,
                decoder=self.name,
                before=before,
            )


@dataclass(frozen=True)
class _Decoded:
    """A wanted frame as it was decoded; `picture` is None where nothing near it could be."""

    wanted: int
    index: int
    picture: Any = field(repr=False)


def _chunks(
    clip: Clip,
    wanted: NDArray[np.int64],
    reader: "_Reader",
    *,
    chunk_bytes: int,
    decoder: str,
    before: int,
) -> Iterator[Frames]:
    """Decoded frames, collected into chunks.

    A chunk is given out only when the next one has its first picture, so that the last chunk can
    carry the warning about frames that were lost after it.  Where `before` frames of the same clip
    were given out already, a chunk may be empty and only report what was lost.
    """
    probe = clip.probe
    most = frames_per_chunk(chunk_bytes, probe)
    total = before + len(wanted)
    converter = _RgbConverter(probe)
    chunk, done = _Chunk(probe, decoder, min(most, len(wanted))), 0
    for decoded in reader.decode(wanted):
        if decoded.picture is not None and len(chunk.indices) == len(chunk.pixels):
            yield chunk.frames(clip, before + done, total, reader)
            chunk = _Chunk(probe, decoder, min(most, len(wanted) - done))
        done += 1
        if decoded.picture is None:
            chunk.lost.append(decoded.wanted)
            continue
        converter.write(decoded.picture, chunk.pixels[len(chunk.indices)].numpy())
        chunk.indices.append(decoded.index)
        if decoded.index != decoded.wanted:
            chunk.replaced.append(decoded.wanted)
    # Where DALI gave out frames before, the clip is not corrupt: the empty chunk reports the rest
    # as lost.
    if not chunk.indices and not before:
        raise CorruptMedia(f"none of the {len(wanted)} frames asked for can be decoded")
    yield chunk.frames(clip, before + done, total, reader)


def frames_per_chunk(chunk_bytes: int, probe: Probe) -> int:
    """How many of a clip's frames fit into a chunk of so many bytes; at least one."""
    return max(1, chunk_bytes // (3 * probe.width * probe.height))


class _Chunk:
    """Pixels of a few frames, and which frames were replaced or lost."""

    def __init__(self, probe: Probe, decoder: str, count: int) -> None:
        self.probe, self.decoder = probe, decoder
        self.pixels = torch.empty((count, 3, probe.height, probe.width), dtype=torch.uint8)
        self.indices: list[int] = []
        self.replaced: list[int] = []
        self.lost: list[int] = []

    def frames(self, clip: Clip, asked: int, total: int, reader: "_Reader") -> Frames:
        """The chunk, with warnings about everything since the last chunk."""
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

    def _warnings(self, reader: "_Reader") -> Iterator[str]:
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


class _Reader:
    """An open clip: its position, how to seek, and which packet or picture is which frame."""

    def __init__(self, container: Any, probe: Probe, threads: int, cap: int) -> None:
        self.container, self.probe = container, probe
        self.stream = container.streams[probe.stream_index]
        for other in container.streams:
            if other is not self.stream:
                other.discard = av.stream.Discard.all
        self.context = self.stream.codec_context
        self.reorder = self.context.reorder_depth
        self.context.options = {"max_pixels": str(cap)}
        self.context.thread_type = "AUTO"
        picture = 2 * probe.coded_width * probe.coded_height
        self.context.thread_count = max(1, min(threads, THREAD_BYTES // max(1, picture)))
        self.base = float(self.stream.time_base)
        gaps = np.diff(probe.times_s)
        gaps = gaps[gaps > 0]
        # Less than half the smallest gap, so that a time never fits two frames.
        self.tolerance = max(1e-6, 0.49 * float(gaps.min())) if len(gaps) else 1e-6
        self.unread = packets(container, self.stream, _never)
        # An edit list may hide the first keyframe: -1 stands for the start of the file.
        self.starts = np.r_[-1, probe.keyframes]
        # AVI has no presentation times; with H.264's B-frames only the order of output is right.
        self.by_order = (
            probe.container == "avi" and probe.codec in ("h264", "hevc") and self.reorder > 0
        )
        self.next_out = self.landed = 0
        self.damaged: list[int] = []
        """Frames with an error or damage, since this list was last emptied."""

    def decode(self, wanted: NDArray[np.int64]) -> Iterator[_Decoded]:
        """Every wanted frame in order: itself, a neighbour in its place, or nothing."""
        governing = np.searchsorted(self.starts, wanted, side="right") - 1
        begins = self.starts[governing]
        reach = _reach(self.probe.times_s, wanted)
        at = 0
        while at < len(wanted):
            end = at + 1
            while end < len(wanted) and begins[end] <= wanted[end - 1] + NEAR:
                end += 1
            for decoded in self._fast(wanted[at:end], int(governing[at])):
                yield decoded
                at += 1
            if at < end:
                yield from self._exact(wanted[at:end], reach[at:end], int(governing[at]))
                at = end

    def _fast(self, group: NDArray[np.int64], governing: int) -> Iterator[_Decoded]:
        """The group's frames, up to the first that cannot be decoded whole."""
        left = group.tolist()
        pending = set(left)
        self._go_to(governing)
        for index, frame in self._decoded(pending):
            # A later picture came first, so this frame is lost or damaged: _exact reads the group
            # again.
            if index > left[0]:
                return
            if index == left[0]:
                yield _Decoded(index, index, frame)
                left.pop(0)
                if not left:
                    return

    def _exact(
        self, group: NDArray[np.int64], reach: NDArray[np.float64], governing: int
    ) -> Iterator[_Decoded]:
        """The group again: from one keyframe earlier, every frame, with neighbours where needed."""
        left = list(zip(group.tolist(), reach.tolist(), strict=True))
        times = self.probe.times_s
        last = int(np.searchsorted(times, reach[-1, 1], side="left"))
        before: tuple[int, Any] | None = None
        self._go_to(governing - 1)
        for index, frame in self._decoded(None, until=last + BEYOND):
            while left and index >= left[0][0]:
                (wanted, (low, high)) = left.pop(0)
                near = [
                    (abs(times[i] - times[wanted]), i, picture)
                    for i, picture in filter(None, (before, (index, frame)))
                    if low <= times[i] < high
                ]
                best = min(near, key=lambda found: found[:2], default=(0.0, wanted, None))
                yield _Decoded(wanted, int(best[1]), best[2])
            if not left:
                return
            before = (index, frame)
        for wanted, (low, high) in left:
            if before is not None and low <= times[before[0]] < high:
                yield _Decoded(wanted, *before)
            else:
                yield _Decoded(wanted, wanted, None)

    def _decoded(
        self, pending: set[int] | None, until: int | None = None
    ) -> Iterator[tuple[int, Any]]:
        """Whole pictures from here on, each with its frame number.

        With `pending`, this ends once these frames are decoded, and decodes only those other
        frames that they need.
        """
        # A second field may have its own packet, and packets may come before they are shown.
        extra = (1 if self.probe.interlaced else 0) + (self.reorder if self.by_order else 0)
        every = pending is None or extra > 0 or self.probe.codec not in SKIPS
        for packet in self.unread:
            index = None
            if not hidden(packet, self.stream):
                index = self._number(packet.pts if packet.pts is not None else packet.dts)
            asked = every or (pending is not None and index in pending)
            self.context.skip_frame = "DEFAULT" if asked else "NONREF"
            yield from self._send(packet)
            if pending is not None:
                pending.discard(-1 if index is None else index)
                extra -= not pending
                if extra < 0:
                    break
            if until is not None and index is not None and index > until:
                break
        # The pictures that the decoder held back, for their order or in its threads.
        yield from self._send(None)

    def _send(self, packet: Any) -> Iterator[tuple[int, Any]]:
        """The pictures that this packet completes; a packet that cannot be decoded gives none."""
        try:
            frames = self.context.decode(packet)
        except av.FFmpegError:
            if packet is not None:
                self.damaged.append(self._number(packet.pts) or 0)
            return
        for frame in frames:
            if self.by_order:
                index: int | None = self.next_out
                self.next_out += 1
            else:
                index = self._number(frame.pts if frame.pts is not None else frame.dts)
            if index is None:
                continue
            if not frame.is_corrupt:
                yield index, frame
            elif index >= self.landed:  # pictures before it refer to frames that the seek skipped
                self.damaged.append(index)

    def _number(self, tick: int | None) -> int | None:
        """The frame shown at this time of the stream; None if the probe saw none."""
        if tick is None:
            return None
        time = tick * self.base - self.probe.start_s
        index = int(np.searchsorted(self.probe.times_s, time - self.tolerance))
        if index == self.probe.frame_count:
            return None
        return index if abs(self.probe.times_s[index] - time) <= self.tolerance else None

    def _go_to(self, governing: int) -> None:
        """Seek to this keyframe, or to one before it.

        Some containers index decoding times, so the position after each seek is checked.
        """
        for back in (governing, governing - 1, governing - 2):
            if back <= 0:
                break
            if self._seek(float(self.probe.times_s[self.starts[back]])) <= self.starts[governing]:
                return
        self._seek(-10.0)  # the start of the file, with the frames that an edit list hides

    def _seek(self, time_s: float) -> float:
        """Seek to a time; the number of the keyframe there, infinite if the probe saw none."""
        tick = round((time_s + self.probe.start_s) / self.base)
        try:
            self.container.seek(tick, stream=self.stream)
        except av.FFmpegError:
            return np.inf
        self.context.reorder_depth = max(self.reorder, self.context.reorder_depth)
        self.unread = packets(self.container, self.stream, _never)
        for packet in self.unread:  # some demuxers arrive between two keyframes
            if packet.is_keyframe:
                index = self._number(packet.pts if packet.pts is not None else packet.dts)
                self.unread = chain((packet,), self.unread)
                self.next_out = self.landed = index or 0
                return np.inf if index is None else index
        return np.inf


def _never(_: Exception) -> bool:
    """Do not read past an error: the probe has tried that already."""
    return False


def _reach(times: NDArray[np.float64], wanted: NDArray[np.int64]) -> NDArray[np.float64]:
    """For each wanted frame the times [n, 2] that are nearer to it than to any other."""
    at = times[wanted]
    middles = (at[1:] + at[:-1]) / 2
    return np.stack([np.r_[-np.inf, middles], np.r_[middles, np.inf]], axis=1)


class _RgbConverter:
    """Converts decoded pictures to upright RGB, by the colour policy of colour.py."""

    def __init__(self, probe: Probe) -> None:
        self.turns, self.mirrored = probe.rotation // 90, probe.mirrored
        self.size = (probe.width, probe.height)[:: -1 if self.turns % 2 else 1]
        self.converter = av.video.reformatter.VideoReformatter()

    def write(self, frame: Any, out: NDArray[np.uint8]) -> None:
        """Write one picture to out, [3, h, w]."""
        colour, hdr = colour_of(frame), hdr_of(frame)
        width, height = self.size
        rgb = self.converter.reformat(
            frame,
            width=width,
            height=height,
            # Planes, because a chunk is [3, h, w].
            format="gbrp16le" if hdr else "gbrp",
            src_colorspace=colour.matrix,
            src_color_range=colour.range,
            dst_color_range=2,
            interpolation=_SCALING,
            threads=1,
        )
        kind = np.dtype("<u2" if hdr else "u1")
        planes = [
            # swscale pads each line, so a line is longer than the picture is wide.
            np.frombuffer(plane, kind).reshape(height, plane.line_size // kind.itemsize)[:, :width]
            for plane in rgb.planes
        ]
        red_green_blue = [planes[2], planes[0], planes[1]]  # stored as G, B, R
        if hdr:
            transfer, wide = hdr
            red_green_blue = list(to_sdr(np.stack(red_green_blue), transfer, wide=wide))
        for channel, rows in enumerate(red_green_blue):
            turned = np.rot90(rows, self.turns)
            out[channel] = turned[:, ::-1] if self.mirrored else turned


def range_in_stream(probe: Probe) -> str:
    """tv or pc as the bitstream alone says it, without the container; decodes one picture.

    Decoders that never see the container follow the bitstream.
    """
    cap = max(LEAST_CAP, (probe.coded_width + 128) * (probe.coded_height + 128))
    with open_media(probe.path, probe.container, cap) as container:
        stream = container.streams[probe.stream_index]
        alone = av.CodecContext.create(stream.codec_context.codec.name, "r")
        # In MP4 and Matroska the parameter sets of H.264 and HEVC stand here, outside the packets.
        alone.extradata = stream.codec_context.extradata
        alone.thread_count = 1
        alone.options = {"max_pixels": str(cap)}
        for packet in packets(container, stream, _never):
            try:
                frames = alone.decode(packet)
            except av.FFmpegError:
                continue
            for frame in frames:
                return "pc" if colour_of(frame).range == FULL else "tv"
    return "tv"
