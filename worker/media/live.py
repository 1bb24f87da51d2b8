"""Cut a live stream into short files at its key frames, without decoding it.

    RTSP, HLS, HTTP, TCP, UDP, camera, file ─▶ packets ─▶ segments as MP4 ─▶ who judges them

Packets are copied.  A codec that MP4 or the worker cannot take, such as a camera's MJPEG, is
encoded anew.  A source that breaks off is opened again, later each time.  Where segments are not
taken fast enough, the oldest are dropped or the source waits: at most `keep` wait on the disk.

The address is the operator's, never a tenant's: it is not checked against private networks.  Still,
a playlist can only lead to the protocols that its own address may use.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import av

from ralf.worker.errors import RalfError

PROTOCOLS = {
    "rtsp": "rtsp,rtp,udp,tcp",
    "rtsps": "rtsp,rtsps,rtp,udp,tcp,tls",
    "http": "http,https,tcp,tls,crypto",
    "https": "https,tcp,tls,crypto",
    "tcp": "tcp",
    "udp": "udp",
    "rtp": "rtp,udp",
    "file": "file",
}
"""What each kind of address may open; a playlist from the network cannot name a local file."""
COPIED = frozenset({"h264", "hevc", "av1", "vp9", "mpeg4"})
OPEN_S, READ_S = 20.0, 20.0
"""A source that is silent for longer is opened again."""
FIRST_DELAY_S, MOST_DELAY_S = 1.0, 30.0
JUMP_S = 10.0
"""Times that jump further, or back, begin a new segment."""
NEARLY_S = 1e-3
"""Times are rounded to the container's ticks."""
LONGEST = 6
"""A segment without a key frame ends at this many times its length."""
TICKS = 90_000
Lag = Literal["drop", "wait"]


class BadSource(RalfError):
    """The source cannot be used at all."""


@dataclass(frozen=True)
class Segment:
    """One piece of the stream, as a file."""

    number: int
    offset_ms: int
    """Where it begins on the stream's clock."""
    path: Path
    last: bool = False


@dataclass(frozen=True)
class Source:
    """Where the pictures come from."""

    given: str = field(repr=False)  # it may hold a password

    def __post_init__(self) -> None:
        if self.scheme not in PROTOCOLS and not self.camera:
            raise BadSource(
                f"a stream's address should begin with {', '.join(sorted(PROTOCOLS))} or be a "
                f"path, got {self.scheme}:"
            )

    @property
    def camera(self) -> bool:
        return self.given.startswith("/dev/video")

    @property
    def scheme(self) -> str:
        return urlsplit(self.given).scheme.lower() if "://" in self.given else "file"

    @property
    def shown(self) -> str:
        """Without what makes it a credential."""
        if "://" not in self.given:
            return self.given
        parts = urlsplit(self.given)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"

    def check(self) -> None:
        """Refuse a camera that this machine does not have; one that breaks off is waited for."""
        if not self.camera:
            return
        if "v4l2" not in {name for one in av.formats_available for name in one.split(",")}:
            raise BadSource(
                f"cannot read {self.given}: this build of PyAV has no v4l2, FFmpeg's format for "
                "cameras; use PyAV's wheel for Linux, or give a stream's address"
            )
        if not Path(self.given).is_char_device():
            there = ", ".join(sorted(map(str, Path("/dev").glob("video*")))) or "none"
            raise BadSource(f"there is no camera {self.given}; cameras here: {there}")

    def open(self) -> Any:
        """The container; an av.FFmpegError where it cannot be opened."""
        if self.camera:
            return av.open(self.given, format="v4l2", timeout=(OPEN_S, READ_S))
        options = {"protocol_whitelist": PROTOCOLS[self.scheme]}
        if self.scheme in ("rtsp", "rtsps"):
            options["rtsp_transport"] = "tcp"  # UDP loses packets, and pictures with them
        name = self.given if "://" in self.given else f"file:{self.given}"
        return av.open(name, options=options, timeout=(OPEN_S, READ_S), metadata_errors="replace")


@dataclass
class _File:
    """The segment that is being written."""

    container: Any
    stream: Any
    part: Path
    number: int
    offset_ms: int
    begin: float
    end: float
    last: float
    """The time of its last packet or frame."""
    origin: int = 0
    """The decoding time of its first packet, in the source's ticks."""
    encodes: bool = False


class Cutter:
    """Writes segments from one connection after the other; numbers and clock go on."""

    def __init__(
        self, folder: Path, name: str, *, seconds: float, number: int = 0, offset_ms: int = 0
    ) -> None:
        self.folder, self.name, self.seconds = folder, name, seconds
        self.number, self.offset_ms = number, offset_ms
        self._file: _File | None = None

    def cut(
        self, container: Any, *, reencode: bool, stopping: Callable[[], bool] = lambda: False
    ) -> Iterator[Segment]:
        """Each segment as it becomes whole; the last one stays open, for finish()."""
        if not container.streams.video:
            raise BadSource("the source has no video")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"

        def going_on(_: object) -> bool:
            return not stopping()

        name = stream.codec_context.name
        if reencode or name not in COPIED:
            yield from self._encoded(takewhile(going_on, container.decode(stream)), stream)
        else:
            yield from self._copied(takewhile(going_on, container.demux(stream)), stream)

    def finish(self, *, last: bool) -> Segment | None:
        """End the open segment; None where there is none."""
        file, self._file = self._file, None
        if file is None:
            return None
        if file.encodes:
            file.container.mux(file.stream.encode(None))
        file.container.close()
        # The offset is in the name, so that a later process knows it.
        place = self.folder / segment_name(self.name, file.number, file.offset_ms)
        file.part.replace(place)
        self.offset_ms = file.offset_ms + round(1000 * (file.end - file.begin))
        return Segment(file.number, file.offset_ms, place, last)

    def _copied(self, packets: Iterable[Any], stream: Any) -> Iterator[Segment]:
        for packet in packets:
            if packet.dts is None:  # the end, or a packet without a time
                continue
            at, lasts = float(packet.dts * packet.time_base), self._length(packet, stream)
            file = self._file
            if file is not None and file.last - 1.0 < at <= file.last:
                continue  # a repeated packet
            jumped = file is not None and not file.last < at <= file.end + JUMP_S
            due = file is not None and at - file.begin >= self.seconds - NEARLY_S
            late = file is not None and at - file.begin >= LONGEST * self.seconds
            if jumped or late or (due and packet.is_keyframe):
                done = self.finish(last=False)
                if done is not None:
                    yield done
            if late and not packet.is_keyframe:
                raise BadSource(
                    f"the source sends no key frame for {LONGEST * self.seconds:g} s, so it cannot "
                    "be cut without decoding; use --reencode"
                )
            if self._file is None:
                if not packet.is_keyframe:
                    continue
                self._begin(at)
                assert self._file is not None
                self._file.stream = self._file.container.add_stream_from_template(stream)
                self._file.origin = packet.dts
            now = self._file
            if packet.pts is not None:
                packet.pts -= now.origin
            packet.dts -= now.origin
            packet.stream = now.stream
            now.container.mux(packet)
            now.last, now.end = at, at + lasts

    def _encoded(self, frames: Iterable[Any], stream: Any) -> Iterator[Segment]:
        """H.264 of the decoded frames; each segment has an encoder of its own."""
        tick = -1
        for frame in frames:
            at = frame.time
            if at is None:
                continue
            file = self._file
            jumped = file is not None and not file.last - 1.0 < at <= file.end + JUMP_S
            at_end = jumped or (file is not None and at - file.begin >= self.seconds - NEARLY_S)
            if at_end and (done := self.finish(last=False)):
                yield done
            if self._file is None:
                self._begin(at)
                assert self._file is not None
                self._file.stream = _encoder(self._file.container, stream, frame)
                self._file.encodes, tick = True, -1
            now = self._file
            place = round((at - now.begin) * TICKS)
            if place <= tick:
                continue
            tick = place
            picture = frame.reformat(
                width=now.stream.width, height=now.stream.height, format="yuv420p"
            )
            picture.pts, picture.time_base = place, Fraction(1, TICKS)
            now.container.mux(now.stream.encode(picture))
            now.last, now.end = at, at + float(1 / (stream.average_rate or 25))

    def _begin(self, at: float) -> None:
        part = self.folder / f".{self.name}-{self.number:08d}.part"
        container = av.open(str(part), "w", format="mp4")
        self._file = _File(container, None, part, self.number, self.offset_ms, at, at, at - 1.0)
        self.number += 1

    @staticmethod
    def _length(packet: Any, stream: Any) -> float:
        if packet.duration:
            return float(packet.duration * packet.time_base)
        return float(1 / (stream.average_rate or 25))


def segment_name(name: str, number: int, offset_ms: int) -> str:
    return f"{name}-{number:08d}-{offset_ms}.mp4"


def left_over(folder: Path, name: str) -> list[Segment]:
    """Segments that an earlier process left, in their order; half-written ones are removed."""
    for part in folder.glob(f".{name}-*.part"):
        part.unlink(missing_ok=True)
    found = []
    for path in sorted(folder.glob(f"{name}-*.mp4")):
        number, _, offset = path.stem.removeprefix(f"{name}-").partition("-")
        if number.isdigit() and offset.isdigit():
            found.append(Segment(int(number), int(offset), path))
    return found


def _encoder(container: Any, source: Any, frame: Any) -> Any:
    rate = Fraction(source.average_rate or 25).limit_denominator(1001)
    options = {"crf": "18", "preset": "veryfast"}
    stream = container.add_stream("libx264", rate=rate, options=options)
    # 4:2:0 wants even sides.
    stream.width, stream.height = frame.width // 2 * 2, frame.height // 2 * 2
    stream.pix_fmt = "yuv420p"
    stream.codec_context.time_base = Fraction(1, TICKS)
    return stream


class Reader:
    """A thread that reads the source for as long as it lasts, and keeps segments until taken."""

    def __init__(
        self,
        source: Source,
        cutter: Cutter,
        *,
        keep: int,
        lag: Lag,
        give_up_s: float,
        reencode: bool,
        say: Callable[[str], None],
        began: float = 0.0,
    ) -> None:
        self._source, self._cutter, self._say = source, cutter, say
        self._keep, self._lag, self._give_up_s, self._reencode = keep, lag, give_up_s, reencode
        self._ready: deque[Segment] = deque(left_over(cutter.folder, cutter.name))
        self._changed = threading.Condition()
        self.stopping = False
        """Set it to end the open segment, as the stream's last one, and to read no more."""
        self.began = began
        """When the stream's clock was 0, in seconds since the epoch; 0 until it is open."""
        self._thread = threading.Thread(target=self._run, name="live", daemon=True)
        self.dropped = 0
        self.ended = False
        """Nothing more will come; what is ready can still be taken."""
        self.error = ""

    def start(self) -> None:
        """Begin to read."""
        self._thread.start()

    def take(self, wait_s: float = 0.0) -> Segment | None:
        """The oldest segment that is ready."""
        with self._changed:
            if not self._ready and not self.ended and wait_s:
                self._changed.wait(wait_s)
            segment = self._ready.popleft() if self._ready else None
            self._changed.notify_all()
        return segment

    def _put(self, segment: Segment) -> None:
        with self._changed:
            while self._lag == "wait" and len(self._ready) >= self._keep and not self.stopping:
                self._changed.wait(1.0)
            while len(self._ready) >= self._keep:
                old = self._ready.popleft()
                old.path.unlink(missing_ok=True)
                self.dropped += 1
                self._say(f"segment {old.number} was dropped: segments are not judged fast enough")
            self._ready.append(segment)
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            self._read_on()
        except (RalfError, OSError) as error:
            self.error = str(error)
        try:
            if done := self._cutter.finish(last=True):
                self._put(done)
        except OSError as error:
            self.error = self.error or str(error)
        finally:
            with self._changed:
                self.ended = True
                self._changed.notify_all()

    def _read_on(self) -> None:
        """Connection after connection, until it is told to stop, a file ends, or it gives up."""
        delay, since = FIRST_DELAY_S, time.monotonic()
        while not self.stopping:
            before = self._cutter.number
            try:
                if self._read():
                    return
                why = "it ended"
            except av.FFmpegError as error:
                why = error.strerror or type(error).__name__
                if self._source.scheme == "file" and not self._source.camera:
                    raise BadSource(f"cannot read {self._source.shown}: {why}") from error
            if self.stopping:
                return
            if self._cutter.number > before:
                delay, since = FIRST_DELAY_S, time.monotonic()
            # What was read is judged now, and not when the source is back.
            if done := self._cutter.finish(last=False):
                self._put(done)
            if time.monotonic() - since > self._give_up_s:
                raise BadSource(f"{self._source.shown} did not come back ({why})")
            self._say(f"{self._source.shown}: {why}; opened again in {delay:.0f} s")
            until = time.monotonic() + delay
            while not self.stopping and time.monotonic() < until:
                time.sleep(0.1)
            delay = min(MOST_DELAY_S, 2 * delay)

    def _read(self) -> bool:
        """One connection; whether the source is one that has an end, and ended."""
        with self._source.open() as container:
            ends = bool(container.duration) and not self._source.camera
            if not ends:
                # After a break the clock is the wall's: the stream went on meanwhile.
                self.began = self.began or time.time()
                now = round(1000 * (time.time() - self.began))
                self._cutter.offset_ms = max(self._cutter.offset_ms, now)
            for segment in self._cutter.cut(
                container, reencode=self._reencode, stopping=lambda: self.stopping
            ):
                self._put(segment)
            return self.stopping or ends or self._source.scheme == "file"
