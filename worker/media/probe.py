"""The facts of a file before it is decoded, or the named reason why it is refused.

The order of the checks protects us.  First a regular file of allowed size; then a known container
by its first bytes, opened by exactly that demuxer; then streams, codec and picture size; then one
pass over all packets.  Only this pass says when each frame is shown, which are keyframes, how many
there are and how long the clip is; the container's own claims are never believed.  Only the first
picture is decoded: it carries the rotation, the colour tags and the pixel format.  Every limit
stops the pass early, so a hostile file costs no more than an honest one at the limit.

A clip that breaks in the middle is accepted with a warning, with the frames up to the break.
"""

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av

from ralf.worker.errors import (
    CodecUnsupported,
    CorruptMedia,
    EncryptedMedia,
    NoVideoStream,
    TooLong,
    TooManyFrames,
    TooManyPixels,
    TooManyStreams,
    UnreadableFile,
)
from ralf.worker.media.colour import describe_colour, turn
from ralf.worker.media.containers import Checked, Demuxer, check_file
from ralf.worker.media.packet_times import FrameTimes, PacketTimes, frame_times
from ralf.worker.media.types import Probe
from ralf.worker.settings import Settings

CODECS = frozenset({"h264", "hevc", "vp8", "vp9", "av1", "mpeg4", "mjpeg"})
# FFmpeg compares its whitelist with names of decoders, and AV1 and VP9 have several.
DECODERS = ",".join(sorted(CODECS | {"libdav1d", "libaom-av1", "libvpx", "libvpx-vp9"}))
"""FFmpeg's names of the decoders that may be opened, also while it examines the streams."""
LEAST_SIDE = 16
"""A stream of smaller pictures is a placeholder, and no video stream: no face fits."""
PASS_SECONDS = 60.0
FIRST_FRAME_PACKETS = 300
"""Packets from the first keyframe on within which one picture must decode."""
RETRIES = 8
"""Read errors that the pass survives, before it gives up the rest of the file."""
STRAY_PACKETS = 1000
"""Packets of streams that the file did not announce; more of them count as read errors."""
JUMP_BACK_S = 1.0
"""Decoding times never go back; by more than this, another recording was appended."""
JUMP_ON_S = 3600.0
"""MPEG-TS clocks wrap every 26.5 hours, so FFmpeg reads a jump back as one far ahead."""


def codec_available(name: str) -> bool:
    """Whether this FFmpeg can decode the codec."""
    try:
        av.codec.Codec(name, "r")
    except (av.FFmpegError, ValueError):
        return False
    return True


def ffmpeg_version() -> str:
    """The version of the FFmpeg inside PyAV."""
    return f"FFmpeg {av.ffmpeg_version_info}"


def probe(path: str | os.PathLike[str], settings: Settings) -> Probe:
    """The facts of a video file; raises a Rejected error that names why it is refused."""
    name = str(Path(path).absolute())
    checked = check_file(name, settings.max_bytes, most_frames(settings))
    most_pixels = _padded_area(settings.max_width, settings.max_height)
    with open_media(name, checked.demuxer, most_pixels) as container:
        stream = _video_stream(container, settings)
        reading = _PacketPass(stream, settings, checked.demuxer, checked.layout)
        reading.run(container)
        return _facts(name, checked, stream, reading)


def most_frames(settings: Settings) -> int:
    """Frames of the longest clip at the highest rate."""
    return int(settings.max_frame_rate * (settings.max_seconds + 1))


def _padded_area(width: int, height: int) -> int:
    return (width + 128) * (height + 128)  # coded pictures are padded to whole blocks


def open_media(name: str, demuxer: str, most_pixels: int) -> Any:
    """An av container that can only be this demuxer reading this one local file.

    `file:` before the path keeps a name such as `concat:a|b` or `http:…` a name.
    """
    demuxer = demuxer.split(",", maxsplit=1)[0]
    options = {
        "protocol_whitelist": "file",
        "format_whitelist": demuxer,
        "codec_whitelist": DECODERS,
    }
    try:
        return av.open(
            f"file:{name}",
            "r",
            format=demuxer,
            container_options=options,
            options={"max_pixels": str(most_pixels)},
            # Phones write titles in any encoding; that is no reason to refuse a video.
            metadata_errors="replace",
            timeout=(PASS_SECONDS, PASS_SECONDS),
        )
    except av.error.PermissionError as error:
        raise UnreadableFile(f"cannot read {name}: {error.strerror}") from error
    except av.error.MemoryError as error:
        raise TooManyStreams("FFmpeg gave up: more than 1000 streams, or tables too big") from error
    except av.FFmpegError as error:
        raise CorruptMedia(
            f"this {demuxer} file cannot be opened: {error.strerror}; upload it again"
        ) from error


def _video_stream(container: Any, settings: Settings) -> Any:
    """The stream to judge; from here on the demuxer discards every other one."""
    streams = container.streams
    if len(streams) > settings.max_streams:
        raise TooManyStreams(
            f"{len(streams)} streams; at most {settings.max_streams} are taken (RALF_MAX_STREAMS)"
        )
    shown = [stream for stream in streams.video if not _is_picture(stream)]
    known = [stream for stream in shown if _codec(stream) in CODECS]
    candidates = [stream for stream in known if min(_size(stream)) >= LEAST_SIDE]
    if shown and not known:
        raise CodecUnsupported(
            f"expected one of {', '.join(sorted(CODECS))}, got {_codec(shown[0])}; convert it first"
        )
    if not candidates:
        raise NoVideoStream(_what_is_there(streams, shown))
    default = av.stream.Disposition.default
    chosen = max(
        candidates,
        key=lambda s: (bool(s.disposition & default), _size(s)[0] * _size(s)[1], -s.index),
    )
    for stream in streams:
        stream.discard = av.stream.Discard.default if stream is chosen else av.stream.Discard.all
    if "enc_key_id" in chosen.metadata:
        raise EncryptedMedia("the video track is encrypted (Matroska content encryption)")
    refuse_pixels(*_size(chosen), settings)
    return chosen


def _is_picture(stream: Any) -> bool:
    marks = av.stream.Disposition.attached_pic | av.stream.Disposition.timed_thumbnails
    return bool(stream.disposition & marks)


def _codec(stream: Any) -> str:
    context = stream.codec_context
    return "unknown" if context is None else str(context.codec.canonical_name)


def _size(stream: Any) -> tuple[int, int]:
    context = stream.codec_context
    return (0, 0) if context is None else (context.width, context.height)


def _what_is_there(streams: Any, shown: list[Any]) -> str:
    kinds = ", ".join(
        f"{s.type}{' (attached picture)' * _is_picture(s)}" for s in list(streams)[:8]
    )
    if not shown:
        return f"expected a video stream, got {kinds or 'no stream'}"
    sizes = ", ".join("{}×{}".format(*_size(stream)) for stream in shown[:8])
    if all(_size(stream) == (0, 0) for stream in shown):
        return "the video stream has no picture size: it is empty or damaged"
    return f"expected a picture of {LEAST_SIDE}×{LEAST_SIDE} or more, got {sizes}"


def refuse_pixels(width: int, height: int, settings: Settings) -> None:
    """A limit on the longer and on the shorter side, for portrait and landscape alike."""
    most = sorted((settings.max_width, settings.max_height))
    if min(width, height) > most[0] or max(width, height) > most[1]:
        raise TooManyPixels(
            f"{width}×{height} pixels; at most {settings.max_width}×{settings.max_height} are "
            "taken (RALF_MAX_WIDTH, RALF_MAX_HEIGHT)"
        )


@dataclass
class _PacketPass:
    """One pass over the video packets, which decodes them until it has the first picture."""

    stream: Any
    settings: Settings
    demuxer: Demuxer
    layout: tuple[int, int]
    """Of MPEG-TS packets: where the first begins, and their length."""
    times: PacketTimes = field(default_factory=PacketTimes)
    first: Any = None
    """The first picture that decoded."""
    tried: int = 0
    """Packets given to the decoder."""
    video_bytes: int = 0
    last_dts: int | None = None
    encrypted: bool = False
    broken: str = ""
    """Why the pass ended before the file did."""

    def run(self, container: Any) -> None:
        """Read to the end, to a break, or to the first limit that is exceeded."""
        context = self.stream.codec_context
        # One picture is wanted, and decoding in threads would delay it by a packet for each thread.
        context.thread_count = 1
        context.options = {
            "max_pixels": str(_padded_area(self.settings.max_width, self.settings.max_height))
        }
        self.base = float(self.stream.time_base)
        self.most_frames = most_frames(self.settings)
        self.tries = 0
        began = time.monotonic()
        for number, packet in enumerate(packets(container, self.stream, self._read_error)):
            if not self._take(packet):
                break
            if self.first is None:
                self._decode_first(packet)
            if number % 1024 == 1023 and time.monotonic() - began > PASS_SECONDS:
                raise TooLong(f"reading {number} packets took more than {PASS_SECONDS:g} s")
        # A decoder may hold back the picture of a very short clip until it is emptied.
        if self.first is None and not self.encrypted:
            self._decode_first(None)

    def _read_error(self, error: Exception) -> bool:
        self.tries += 1
        self.broken = f"the container cannot be read on: {error}"
        return self.tries <= RETRIES

    def _take(self, packet: Any) -> bool:
        """Record when the packet is shown; False ends the pass."""
        if packet.has_sidedata("encryption_info"):
            self.encrypted = True
            return False
        if hidden(packet, self.stream):
            return True
        if packet.dts is not None:
            if self.last_dts is not None:
                step = (packet.dts - self.last_dts) * self.base
                if step < -JUMP_BACK_S or (step > JUMP_ON_S and self.demuxer == "mpegts"):
                    self.broken = "its clock jumps: another recording follows, not looked at"
                    return False
            self.last_dts = packet.dts
        self.video_bytes += packet.size
        tick = packet.pts if packet.pts is not None else packet.dts
        self.times.add(tick, packet.duration or 0, packet.is_keyframe, not packet.is_discard)
        self._refuse_length()
        return True

    def _refuse_length(self) -> None:
        most, ticks = self.settings, self.times.ticks
        if len(ticks) > self.most_frames:
            raise TooManyFrames(
                f"more than {self.most_frames} frames: {most.max_frame_rate:g} a second for "
                f"{most.max_seconds:g} s are taken (RALF_MAX_FRAME_RATE, RALF_MAX_SECONDS)"
            )
        length = abs(ticks[-1] - ticks[0]) * self.base
        if length > most.max_seconds:
            raise TooLong(
                f"{length:.3f} s or more; at most {most.max_seconds:g} s are taken "
                "(RALF_MAX_SECONDS)"
            )

    def _decode_first(self, packet: Any) -> None:
        """Decode until there is one picture; some hundred damaged packets are allowed before it."""
        if not self.times.keys or self.tried > FIRST_FRAME_PACKETS:
            return
        self.tried += 1
        try:
            frames = self.stream.codec_context.decode(packet)
        except av.FFmpegError:
            return
        self.first = next((frame for frame in frames if not frame.is_corrupt), None)


def packets(container: Any, stream: Any, on_error: Any) -> Any:
    """The stream's packets that are not empty; `on_error` says whether to read past an error.

    To a decoder an empty packet means the end of the stream, so empty ones are skipped.
    """
    strays = 0
    while True:
        try:
            for packet in container.demux(stream):
                if packet.size:
                    yield packet
            return
        except av.FFmpegError as error:
            if not on_error(error):
                return
        except IndexError as error:
            # PyAV's answer to a packet of a stream that began after the file was opened, such as
            # an MPEG-TS packet with a flipped bit in its PID.  Reading on skips this packet alone.
            strays += 1
            if strays > STRAY_PACKETS and not on_error(error):
                return


def hidden(packet: Any, stream: Any) -> bool:
    """VP8 stores hidden reference frames as packets of their own; they are never shown."""
    return _codec(stream) == "vp8" and not memoryview(packet)[0] & 0x10


def _facts(name: str, checked: Checked, stream: Any, reading: _PacketPass) -> Probe:
    if reading.encrypted:
        raise EncryptedMedia("the video's packets are encrypted; send it decrypted")
    first = reading.first
    shown = frame_times(reading.times, reading.base, _rate(stream))
    if first is None:
        raise CorruptMedia(
            f"none of the first pictures of {len(shown.times_s)} can be decoded; upload it again"
        )
    # The header's size was checked before any decoding; the bitstream may say another.
    refuse_pixels(first.width, first.height, reading.settings)
    shown.refuse_rate(reading.settings)
    quarter_turns, mirrored = turn(first)
    width, height = (first.width, first.height)[:: -1 if quarter_turns % 2 else 1]
    space, colour_range, notes = describe_colour(first)
    context = stream.codec_context
    return Probe(
        path=name,
        size_bytes=checked.size,
        container=checked.demuxer,
        unmistakable=checked.unmistakable,
        codec=context.codec.canonical_name,
        stream_index=stream.index,
        coded_width=context.coded_width or first.width,
        coded_height=context.coded_height or first.height,
        width=width,
        height=height,
        rotation=quarter_turns * 90,
        mirrored=mirrored,
        pixel_format=first.format.name,
        duration_s=shown.duration_s,
        frame_rate=shown.rate,
        variable_rate=shown.variable,
        frame_count=len(shown.times_s),
        times_s=shown.times_s,
        keyframes=shown.keyframes,
        start_s=shown.start_s,
        colour_space=space,
        colour_range=colour_range,
        interlaced=bool(first.interlaced_frame),
        unshown=len(reading.times.ticks) - len(shown.times_s),
        video_bytes=reading.video_bytes,
        warnings=(*notes, *_warnings(reading, stream, shown, checked.size)),
    )


def _rate(stream: Any) -> float:
    return float(stream.average_rate or 0.0)


def _warnings(reading: _PacketPass, stream: Any, shown: FrameTimes, size: int) -> list[str]:
    found = []
    others = sum(not _is_picture(other) for other in stream.container.streams.video) - 1
    if others:
        found.append(f"streams: {others + 1} video streams; only #{stream.index} is looked at")
    there, listed = len(reading.times.ticks), stream.frames
    if reading.broken:
        found.append(f"broken_clip: after {shown.times_s[-1]:.3f} s {reading.broken}")
    elif reading.demuxer == "mov" and listed > there:
        found.append(
            f"broken_clip: its index lists {listed} frames, {there} are there; "
            f"it ends at {shown.duration_s:.3f} s"
        )
    elif reading.demuxer == "mpegts" and (size - reading.layout[0]) % reading.layout[1]:
        found.append(f"broken_clip: it ends inside a packet, at {shown.duration_s:.3f} s")
    elif reading.demuxer == "avi" and abs(listed - there) > 1:
        found.append(f"frame_count: the header says {listed} frames, {there} are there")
    claimed = (stream.container.duration or 0) / av.time_base
    if not any(text.startswith("broken") for text in found) and claimed - shown.duration_s > max(
        0.5, claimed / 10
    ):
        found.append(
            f"short_video: the container says {claimed:.3f} s, its video ends at "
            f"{shown.duration_s:.3f} s"
        )
    if shown.early:
        found.append(
            f"early_frames: {shown.early} frames before the first keyframe cannot be decoded"
        )
    return found
