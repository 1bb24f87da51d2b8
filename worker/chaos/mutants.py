"""Media for `ralf fuzz`: small good files of every container, and ways to damage them.

`originals` makes the files with PyAV and Pillow; nothing is shipped.  `mutant` damages one of
them; the same seed and number give the same bytes, on every machine with the same encoders.

Half of the damage is blind (bits, spans, cuts); the other half knows where the container keeps its
lengths, types and tables: MP4 boxes, Matroska elements, RIFF chunks, MPEG-TS packets, PNG chunks.
"""

import os
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from random import Random
from typing import Any, Literal
from zlib import crc32

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

FPS, RATE, SAMPLES = 25, 48_000, 960
WIDTH, HEIGHT = 96, 64
FRAGMENTS = {"movflags": "frag_keyframe+empty_moov", "frag_duration": "100000"}
FRONT = {"movflags": "faststart"}


@dataclass(frozen=True)
class Recipe:
    """How one good video is encoded."""

    codec: str
    container: str = ""
    """FFmpeg's name; without one the file's ending decides."""
    pixel_format: str = "yuv420p"
    options: Mapping[str, str] | None = None
    """Of the container."""
    sound: str = ""
    transfer: int = 0
    """16 is PQ, 18 is HLG."""
    frames: int = 12


VIDEOS: Mapping[str, Recipe] = {
    "h264.mp4": Recipe("libx264", sound="aac", options=FRONT),
    "index-last.mp4": Recipe("libx264"),
    "fragments.mp4": Recipe("libx264", options=FRAGMENTS),
    "hevc-pq.mp4": Recipe("libx265", pixel_format="yuv420p10le", transfer=16),
    "mpeg4.mov": Recipe("mpeg4", sound="aac"),
    "h264.3gp": Recipe("libx264", container="3gp"),
    "h264.mkv": Recipe("libx264", sound="aac"),
    "av1.mkv": Recipe("libsvtav1"),
    "vp8.webm": Recipe("libvpx"),
    "vp9.webm": Recipe("libvpx-vp9", sound="libopus"),
    "h264.ts": Recipe("libx264", container="mpegts", sound="aac"),
    # So long that FFmpeg has named the streams before its end: a stream may begin after that.
    "long.ts": Recipe("libx264", container="mpegts", frames=75),
    "hevc.ts": Recipe("libx265", container="mpegts"),
    "mpeg4.avi": Recipe("mpeg4"),
    "mjpeg.avi": Recipe("mjpeg", pixel_format="yuvj420p"),
    "flv1.flv": Recipe("flv"),
}
"""By file name.  Flash video is refused by its first bytes, damaged or not."""
IMAGES: Mapping[str, Mapping[str, Any]] = {
    "still.jpeg": {"format": "JPEG", "quality": 70},
    "progressive.jpg": {"format": "JPEG", "progressive": True, "optimize": True},
    "still.png": {"format": "PNG"},
    "still.webp": {"format": "WEBP", "quality": 60},
    "lossless.webp": {"format": "WEBP", "lossless": True},
    "still.gif": {"format": "GIF"},
    "animated.gif": {"format": "GIF", "save_all": True, "duration": 40, "loop": 0},
    "animated.png": {"format": "PNG", "save_all": True, "duration": 40},
    "animated.webp": {"format": "WEBP", "save_all": True, "duration": 40},
}
"""By file name: what Pillow's save() takes."""


def originals() -> dict[str, bytes]:
    """Every good file by its name; a codec that this FFmpeg cannot encode is left out."""
    # SVT's encoder prints on stderr otherwise.
    os.environ.setdefault("SVT_LOG", "0")
    made = {}
    for name, recipe in VIDEOS.items():
        if recipe.codec in av.codecs_available:
            made[name] = _video(name, recipe)
    pictures = [Image.fromarray(_picture(number)) for number in range(4)]
    for name, options in IMAGES.items():
        out = BytesIO()
        more = {"append_images": pictures[1:]} if options.get("save_all") else {}
        pictures[0].save(out, **options, **more)
        made[name] = out.getvalue()
    return made


def _picture(number: int) -> NDArray[np.uint8]:
    """One frame [h, w, 3]: colours that move."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.float64)
    waves = [np.sin(x / 20 + number / 3), np.sin(y / 15 - number / 4), np.sin((x + y) / 30)]
    return np.stack([128 + 90 * wave for wave in waves], axis=2).astype(np.uint8)


def _video(name: str, recipe: Recipe) -> bytes:
    # A file and no buffer: to put the index first, FFmpeg opens what it wrote a second time.
    with tempfile.TemporaryDirectory(prefix="ralf-fuzz-") as folder:
        path = Path(folder) / name
        _encode(path, recipe)
        return path.read_bytes()


def _encode(path: Path, recipe: Recipe) -> None:
    # bitexact: no random identifiers and no dates, so that a seed gives the same mutants again.
    options = {"fflags": "+bitexact", **(recipe.options or {})}
    with av.open(str(path), "w", format=recipe.container or None, options=options) as file:
        stream: Any = file.add_stream(recipe.codec, rate=FPS, options=_fast(recipe.codec))
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, recipe.pixel_format
        # One thread, so that every run encodes the same bytes.
        stream.codec_context.thread_count, stream.codec_context.gop_size = 1, 6
        if recipe.transfer:
            stream.codec_context.color_trc = recipe.transfer
            stream.codec_context.color_primaries = stream.codec_context.colorspace = 9
        sound: Any = file.add_stream(recipe.sound, rate=RATE) if recipe.sound else None
        heard = 0
        for number in range(recipe.frames):
            frame = av.VideoFrame.from_ndarray(_picture(number), format="rgb24")
            frame = frame.reformat(format=recipe.pixel_format)
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            file.mux(stream.encode(frame))
            while sound is not None and heard * FPS < (number + 1) * RATE:
                file.mux(sound.encode(_silence(heard)))
                heard += SAMPLES
        for each in (stream, sound):
            if each is not None:
                file.mux(each.encode(None))


def _silence(at: int) -> Any:
    frame: Any = av.AudioFrame(format="fltp", layout="stereo", samples=SAMPLES)
    for plane in frame.planes:
        plane.update(bytes(plane.buffer_size))
    frame.sample_rate, frame.pts = RATE, at
    return frame


def _fast(codec: str) -> dict[str, str]:
    match codec:
        case "libx264":
            return {"preset": "ultrafast", "crf": "30", "bf": "2"}
        case "libx265":
            return {"preset": "ultrafast", "crf": "30", "x265-params": "log-level=none:pools=1"}
        case "libvpx" | "libvpx-vp9":
            return {"deadline": "realtime", "cpu-used": "8", "crf": "30", "b": "1M"}
        case "libsvtav1":
            return {"preset": "12", "crf": "50", "svtav1-params": "lp=1"}
        case _:
            return {}


# damage


@dataclass(frozen=True)
class Mutant:
    """A damaged file."""

    number: int
    original: str
    """Name of the file that it was made of."""
    how: str
    """What was done to it, in order."""
    data: bytes


def mutant(files: Mapping[str, bytes], seed: int, number: int) -> Mutant:
    """The mutant of that number: the originals in turn, one to four kinds of damage."""
    random = Random(f"{seed} {number}")
    names = sorted(files)
    name = names[number % len(names)]
    data, done = bytearray(files[name]), []
    for _ in range(random.choice((1, 1, 1, 2, 3, 4))):
        if random.random() < 0.5:
            damage = random.choice(BLIND)
            damage(data, random)
        else:
            damage = _in_structure
            damage(data, random)
        done.append(damage.__name__.strip("_"))
    if random.random() < 0.03:
        other = files[random.choice(names)]
        cut = random.randrange(len(other))
        data[random.randrange(len(data) + 1) :] = other[cut:]
        done.append("spliced")
    return Mutant(number, name, "+".join(done), bytes(data))


Order = Literal["big", "little"]
ORDERS: tuple[Order, Order] = ("big", "little")
Damage = Callable[[bytearray, Random], None]
ODD = (0, 1, 2, 7, 8, 16, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF)
# The millions are too few to be refused as impossible, and enough to fill the memory.
LARGE = (1 << 20, 1 << 24, 100_000_000, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF, 1 << 40)
ODD_NUMBERS = (*ODD, *LARGE, (1 << 63) - 1, (1 << 64) - 1)


def _span(data: bytearray, random: Random, most: int = 4096) -> tuple[int, int]:
    """A random piece of the file: mostly short, sometimes long."""
    start = random.randrange(len(data) or 1)
    return start, min(len(data), start + 1 + int(most * random.random() ** 6))


def _bits(data: bytearray, random: Random) -> None:
    for _ in range(1 << random.randrange(7)):
        if data:
            data[random.randrange(len(data))] ^= 1 << random.randrange(8)


def _bytes(data: bytearray, random: Random) -> None:
    start, end = _span(data, random)
    fill = random.choice((b"\0", b"\xff", b""))
    data[start:end] = fill * (end - start) if fill else random.randbytes(end - start)


def _number(data: bytearray, random: Random) -> None:
    """An odd number at any place."""
    size, order = random.choice((1, 2, 4, 4, 8)), random.choice(ORDERS)
    _put(data, random.randrange(len(data) or 1), random.choice(ODD_NUMBERS), size, order)


def _put(data: bytearray, at: int, value: int, size: int, order: Order) -> None:
    data[at : at + size] = (value & ((1 << 8 * size) - 1)).to_bytes(size, order)


def _cut(data: bytearray, random: Random) -> None:
    del data[random.randrange(len(data) or 1) :]


def _removed(data: bytearray, random: Random) -> None:
    start, end = _span(data, random)
    del data[start:end]


def _repeated(data: bytearray, random: Random) -> None:
    start, end = _span(data, random)
    data[end:end] = data[start:end] * random.choice((1, 1, 2, 50))


def _moved(data: bytearray, random: Random) -> None:
    start, end = _span(data, random)
    piece = data[start:end]
    del data[start:end]
    place = random.randrange(len(data) + 1)
    data[place:place] = piece


BLIND: tuple[Damage, ...] = (_bits, _bits, _bytes, _number, _cut, _removed, _repeated, _moved)


@dataclass(frozen=True)
class Part:
    """A box, element, chunk or packet: where it begins, its body, its end."""

    start: int
    body: int
    end: int


def _in_structure(data: bytearray, random: Random) -> None:
    """Damage one part of the container: its head, its numbers, or the whole of it."""
    found = parts(bytes(data))
    if not found:
        _number(data, random)
        return
    part = random.choice(found)
    # MP4 and PNG write their numbers in this order, and most of them in four bytes.
    order: Order = "little" if data.startswith(b"RIFF") else "big"
    match random.randrange(6):
        case 0:  # the length in its head
            _put(data, part.start, random.choice(ODD_NUMBERS), 4, order)
        case 1:  # a byte of its head
            data[random.randrange(part.start, part.body)] ^= 1 << random.randrange(8)
        case 2 | 3:  # a number in its body: counts and offsets come first
            value = random.choice(random.choice((LARGE, ODD_NUMBERS)))
            _put(data, part.body + 4 * random.randrange(8), value, 4, order)
        case 4:
            data[part.end : part.end] = data[part.start : part.end] * random.choice((1, 1, 30))
        case _:
            del data[part.start : part.end]
    if data.startswith(b"\x89PNG"):
        _true_checksums(data)


def parts(data: bytes) -> list[Part]:
    """The parts of a file as far as they can be read; none for a format that is not known."""
    if data[4:8] in (b"ftyp", b"moov", b"mdat", b"free"):
        return list(_boxes(data, 0, len(data)))
    if data.startswith(b"\x1aE\xdf\xa3"):
        return list(_elements(data, 0, len(data)))
    if data.startswith(b"RIFF"):
        return list(_chunks(data, 12, len(data)))
    if data.startswith(b"\x89PNG"):
        return list(_png_chunks(data))
    if data[:1] == b"\x47" and data[188:189] in (b"\x47", b""):
        return [Part(at, at + 4, min(len(data), at + 188)) for at in range(0, len(data), 188)]
    return []


_BOX_PARENTS = b"moov trak mdia minf stbl moof traf mvex edts dinf udta".split()


def _boxes(data: bytes, at: int, end: int) -> Iterator[Part]:
    while at + 8 <= end:
        size = int.from_bytes(data[at : at + 4], "big")
        if not 8 <= size <= end - at:
            return
        yield Part(at, at + 8, at + size)
        if data[at + 4 : at + 8] in _BOX_PARENTS:
            yield from _boxes(data, at + 8, at + size)
        at += size


_EBML_PARENTS = {0x18538067, 0x1654AE6B, 0xAE, 0xE0, 0x1F43B675, 0x1549A966, 0x114D9B74, 0x1C53BB6B}


def _elements(data: bytes, at: int, end: int) -> Iterator[Part]:
    while at + 2 <= end:
        wide = 9 - data[at].bit_length()
        if wide > 4 or at + wide >= end:
            return
        kind = int.from_bytes(data[at : at + wide], "big")
        long = 9 - data[at + wide].bit_length()
        if long > 8:
            return
        body = at + wide + long
        size = int.from_bytes(data[at + wide : body], "big") & ((1 << 7 * long) - 1)
        stop = min(end, body + size)
        yield Part(at, min(body, end), stop)
        if kind in _EBML_PARENTS:
            yield from _elements(data, body, stop)
        at = stop


def _chunks(data: bytes, at: int, end: int) -> Iterator[Part]:
    while at + 8 <= end:
        size = struct.unpack_from("<I", data, at + 4)[0]
        stop = min(end, at + 8 + size + size % 2)
        yield Part(at, at + 8, stop)
        if data[at : at + 4] == b"LIST":
            yield from _chunks(data, at + 12, stop)
        at = stop


def _png_chunks(data: bytes) -> Iterator[Part]:
    at = 8
    while at + 12 <= len(data):
        stop = min(len(data), at + 12 + struct.unpack_from(">I", data, at)[0])
        yield Part(at, at + 8, stop)
        at = stop


def _true_checksums(data: bytearray) -> None:
    """Without a true checksum a PNG reader looks at no further byte of the chunk."""
    for part in _png_chunks(bytes(data)):
        if part.end - part.body >= 4:
            total = crc32(data[part.start + 4 : part.end - 4])
            data[part.end - 4 : part.end] = struct.pack(">I", total)


def write(folder: Path, made: Mutant) -> Path:
    """Write the mutant under its number and its original's name."""
    path = folder / f"{made.number:06d}-{made.original}"
    path.write_bytes(made.data)
    return path
