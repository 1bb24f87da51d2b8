"""The CPU decoder: of a probed clip, only the frames that sampling asks for, in bounded chunks.

`plan` says which (worker/media/sampling.py).  Decoding goes from group to group of wanted frames:
seek to the keyframe that governs the first, decode up to the last, go on.  Within a group, frames
that nobody asked for and that no other frame leans on are not decoded at all (`skip_frame`), which
changes no pixel of the rest.  Frames are known by their presentation time, never by counting.

A seek throws away what the decoder's threads have under way, so a gap of up to NEAR frames is
decoded through; over anything longer seeking is cheaper, measured at NEAR.

Damage.  A frame that does not come out whole sends its group into a second, exact reading: from one
keyframe earlier, every frame decoded, the nearest whole neighbour taken in its place.  A neighbour
must lie nearer to this wanted frame than to any other, so no picture is ever counted twice; if
there is none, the frame is lost and the chunk's warnings say so.  A clip of which nothing decodes
is CorruptMedia.
"""

import os
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from ralf.worker.errors import JobError
from ralf.worker.media.chunks import Picture, chunks
from ralf.worker.media.colour import FULL, colour_of
from ralf.worker.media.probe import hidden, open_media, packets
from ralf.worker.media.sampling import plan
from ralf.worker.media.types import Clip, Frames, Probe

__all__ = ["PyavDecoder", "plan", "range_in_stream"]

NEAR = 4
"""Frames that are rather decoded than jumped over.

Seven jumps in 240 frames of 1080p H.264 (3 B-frames, a keyframe in 30), one thread, CPU seconds of
seeking against reading on: over 2 frames 0.465 / 0.477 in MP4 and 0.503 / 0.497 in MPEG-TS, over 5
frames 0.421 / 0.477 and 0.435 / 0.490, over 20 frames 0.339 / 0.476 and 0.368 / 0.494.
"""
THREAD_BYTES = 512 * 1024**2
"""Pictures in flight in the decoder's threads, at most."""
SKIPS = frozenset({"h264", "hevc", "mpeg4", "vp8"})
"""Codecs that read `skip_frame` anew for each packet; AV1 reads it once, when it opens."""
LEAST_CAP = (4096 + 128) * (2304 + 128)
"""A stream may change its size in the middle, up to this area if it began smaller."""
BEYOND = 64
"""Packets past a lost frame's own reach that the exact reading still waits for pictures from."""
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
        """Each clip's frames in time order; closing the iterator early lets go of the file."""
        failed: list[JobError] = []
        for clip in clips:
            try:
                yield from self.frames(clip, plan(clip))
            except JobError as error:
                failed.append(error)
        if failed:
            raise failed[0]

    def frames(self, clip: Clip, wanted: NDArray[np.int64], *, before: int = 0) -> Iterator[Frames]:
        """These frames of one clip, of which `before` others went out already."""
        cap = max(LEAST_CAP, (clip.probe.coded_width + 128) * (clip.probe.coded_height + 128))
        with open_media(clip.probe.path, clip.probe.container, cap) as container:
            reader = _Reader(container, clip.probe, self.threads or os.cpu_count() or 1, cap)
            yield from chunks(
                clip,
                wanted,
                reader,
                painter=_Painter(clip.probe),
                chunk_bytes=self.chunk_bytes,
                decoder=self.name,
                before=before,
            )


class _Reader:
    """An open clip: where it stands, how to jump, and which packet or picture is which frame."""

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
        self.tolerance = max(1e-6, 0.49 * float(gaps.min())) if len(gaps) else 1e-6
        self.unread = packets(container, self.stream, _never)
        # an edit list may hide the first keyframe: -1 is the start of the file
        self.starts = np.r_[-1, probe.keyframes]
        # AVI has no presentation times; with B-frames of H.264 only the order of output is true
        self.by_order = (
            probe.container == "avi" and probe.codec in ("h264", "hevc") and self.reorder > 0
        )
        self.next_out = self.landed = 0
        self.damaged: list[int] = []
        """Frames that gave an error or came out damaged, since this was last emptied."""

    def pictures(self, wanted: NDArray[np.int64]) -> Iterator[Picture]:
        """Every wanted frame in order, itself, a neighbour in its place, or nothing."""
        governing = np.searchsorted(self.starts, wanted, side="right") - 1
        begins = self.starts[governing]
        reach = _reach(self.probe.times_s, wanted)
        at = 0
        while at < len(wanted):
            end = at + 1
            while end < len(wanted) and begins[end] <= wanted[end - 1] + NEAR:
                end += 1
            for picture in self._fast(wanted[at:end], int(governing[at])):
                yield picture
                at += 1
            if at < end:
                yield from self._exact(wanted[at:end], reach[at:end], int(governing[at]))
                at = end

    def _fast(self, group: NDArray[np.int64], governing: int) -> Iterator[Picture]:
        """The group's frames, stopping at the first that does not come out whole."""
        left = group.tolist()
        pending = set(left)
        self._jump(governing)
        for index, frame in self._decoded(pending):
            if index > left[0]:
                return
            if index == left[0]:
                yield Picture(index, index, frame)
                left.pop(0)
                if not left:
                    return

    def _exact(
        self, group: NDArray[np.int64], reach: NDArray[np.float64], governing: int
    ) -> Iterator[Picture]:
        """The group again, one keyframe earlier and every frame, with neighbours where need be."""
        left = list(zip(group.tolist(), reach.tolist(), strict=True))
        times = self.probe.times_s
        last = int(np.searchsorted(times, reach[-1, 1], side="left"))
        before: tuple[int, Any] | None = None
        self._jump(governing - 1)
        for index, frame in self._decoded(None, until=last + BEYOND):
            while left and index >= left[0][0]:
                (wanted, (low, high)) = left.pop(0)
                near = [
                    (abs(times[i] - times[wanted]), i, picture)
                    for i, picture in filter(None, (before, (index, frame)))
                    if low <= times[i] < high
                ]
                best = min(near, key=lambda found: found[:2], default=(0.0, wanted, None))
                yield Picture(wanted, int(best[1]), best[2])
            if not left:
                return
            before = (index, frame)
        for wanted, (low, high) in left:
            if before is not None and low <= times[before[0]] < high:
                yield Picture(wanted, *before)
            else:
                yield Picture(wanted, wanted, None)

    def _decoded(
        self, pending: set[int] | None, until: int | None = None
    ) -> Iterator[tuple[int, Any]]:
        """Whole pictures from here on, each with its frame number.

        With `pending`, ends once these are decoded, and decodes of the rest only what they need.
        """
        # a second field may have its own packet, and packets may come before what they are shown as
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
        yield from self._send(None)

    def _send(self, packet: Any) -> Iterator[tuple[int, Any]]:
        """Pictures that this packet completes; a packet that cannot be decoded gives none."""
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
            elif index >= self.landed:  # before it lie pictures that lean on what was jumped over
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

    def _jump(self, governing: int) -> None:
        """Stand at this one of the starts, or before it.

        Indices hold decoding times in some containers, so where a seek came down is checked.
        """
        for back in (governing, governing - 1, governing - 2):
            if back <= 0:
                break
            if self._seek(float(self.probe.times_s[self.starts[back]])) <= self.starts[governing]:
                return
        self._seek(-10.0)  # the start, and whatever an edit list hides before it

    def _seek(self, time_s: float) -> float:
        """Seek to a time; the number of the keyframe there, infinite if the probe saw none."""
        tick = round((time_s + self.probe.start_s) / self.base)
        try:
            self.container.seek(tick, stream=self.stream)
        except av.FFmpegError:
            return np.inf
        self.context.reorder_depth = max(self.reorder, self.context.reorder_depth)
        self.unread = packets(self.container, self.stream, _never)
        for packet in self.unread:  # some demuxers come down between keyframes
            if packet.is_keyframe:
                index = self._number(packet.pts if packet.pts is not None else packet.dts)
                self.unread = chain((packet,), self.unread)
                self.next_out = self.landed = index or 0
                return np.inf if index is None else index
        return np.inf


def _never(_: Exception) -> bool:
    """Reading on past an error would only repeat what the probe has seen."""
    return False


def _reach(times: NDArray[np.float64], wanted: NDArray[np.int64]) -> NDArray[np.float64]:
    """For each wanted frame the times [n, 2] that are nearer to it than to any other."""
    at = times[wanted]
    middles = (at[1:] + at[:-1]) / 2
    return np.stack([np.r_[-np.inf, middles], np.r_[middles, np.inf]], axis=1)


class _Painter:
    """Decoded pictures into upright RGB planes, by the colour policy."""

    def __init__(self, probe: Probe) -> None:
        self.turns, self.mirrored = probe.rotation // 90, probe.mirrored
        self.size = (probe.width, probe.height)[:: -1 if self.turns % 2 else 1]
        self.converter = av.video.reformatter.VideoReformatter()

    def paint(self, frame: Any, out: NDArray[np.uint8]) -> None:
        """Write one picture to out, [3, h, w]."""
        colour = colour_of(frame)
        width, height = self.size
        rgb = self.converter.reformat(
            frame,
            width=width,
            height=height,
            format="gbrp",
            src_colorspace=colour.matrix,
            src_color_range=colour.range,
            dst_color_range=2,
            interpolation=_SCALING,
            threads=1,
        )
        for channel, plane in zip((1, 2, 0), rgb.planes, strict=True):  # stored as G, B, R
            rows = np.frombuffer(plane, np.uint8).reshape(height, plane.line_size)[:, :width]
            rows = np.rot90(rows, self.turns)
            out[channel] = rows[:, ::-1] if self.mirrored else rows


def range_in_stream(probe: Probe) -> str:
    """tv or pc as the bitstream alone says it, whatever the container adds; one picture's decoding.

    Decoders that never see the container go by this.
    """
    cap = max(LEAST_CAP, (probe.coded_width + 128) * (probe.coded_height + 128))
    with open_media(probe.path, probe.container, cap) as container:
        stream = container.streams[probe.stream_index]
        alone = av.CodecContext.create(stream.codec_context.codec.name, "r")
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
