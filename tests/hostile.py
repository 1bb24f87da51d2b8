"""Files that are broken, contain wrong facts, or are an attack, each with the error it must cause.

They are made from good clips of tests/clips.py by cutting, patching boxes and flipping bits.  The
probe must refuse each of `REFUSED`.  `BROKEN` are clips that break in the middle; they are judged
on the frames that can be read.  The service's tests use both.
"""

import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ralf.worker.errors import (
    CodecUnsupported,
    ContainerUnsupported,
    CorruptMedia,
    EncryptedMedia,
    NoVideoStream,
    Rejected,
    TooLong,
    TooManyFrames,
    TooManyPixels,
    TooManyStreams,
    UnreadableFile,
)
from tests.clips import make_clip, no_frames, packet_places, picture, sound_only

FAST_START = {"movflags": "faststart"}
Maker = Callable[[Path], Path]


def patch(path: Path, kind: bytes, offset: int, new: bytes, which: int = 0) -> Path:
    """Overwrite bytes of an MP4 box; `offset` counts from the start of the box's body."""
    data = bytearray(path.read_bytes())
    at = -1
    for _ in range(which + 1):
        at = data.index(kind, at + 1)
    data[at + 4 + offset : at + 4 + offset + len(new)] = new
    path.write_bytes(data)
    return path


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def truncated(path: Path) -> Path:
    """An MP4 with its index at the end, cut in the middle."""
    data = make_clip(path, 24).read_bytes()
    return written(path, data[: data.index(b"moov") - 40])


def cut_in_the_index(path: Path) -> Path:
    data = make_clip(path, 24, container_options=FAST_START).read_bytes()
    return written(path, data[: data.index(b"stsz") + 20])


def one_by_one(path: Path) -> Path:
    return make_clip(
        path, [np.full((1, 1, 3), 200, np.uint8)] * 5, codec="mjpeg", pixel_format="yuvj444p",
        full_range=True, container="matroska",
    )  # fmt: skip


def wide(path: Path) -> Path:
    return make_clip(path, [np.full((64, 16384, 3), 90, np.uint8)] * 2)


def tall_lie(path: Path) -> Path:
    """The container says 64×64, the bitstream 16384×64: no decoder may allocate that."""
    wide(path)
    return patch(path, b"avc1", 24, struct.pack(">HH", 64, 64), which=1)


def zero_rate(path: Path) -> Path:
    """All frames have the same time: the only delta in the time table is 0."""
    make_clip(path, 24, b_frames=0)
    return patch(path, b"stts", 12, struct.pack(">I", 0))


def lying_count(path: Path) -> Path:
    """A sample table that claims a million frames."""
    make_clip(path, 24)
    return patch(path, b"stsz", 8, struct.pack(">I", 1_000_000))


def sample_bomb(path: Path) -> Path:
    """Four billion one-byte samples; FFmpeg would allocate an entry for each."""
    make_clip(path, 24)
    return patch(path, b"stsz", 4, struct.pack(">II", 1, 0xFFFFFFFF))


def encrypted(path: Path) -> Path:
    """Common encryption marks the sample entry; that mark alone must be enough."""
    make_clip(path, 24)
    return patch(path, b"avc1", -4, b"encv", which=1)


def scrambled(path: Path) -> Path:
    """MPEG-TS whose video packets are flagged as encrypted."""
    data = bytearray(make_clip(path, 24, container="mpegts").read_bytes())
    for at in range(0, len(data), 188):
        if int.from_bytes(data[at + 1 : at + 3], "big") & 0x1FFF == 0x100:
            data[at + 3] |= 0x80
    return written(path, bytes(data))


def playlist(path: Path) -> Path:
    """An HLS playlist that would make FFmpeg open another file of this machine."""
    secret = make_clip(path.with_name("secret.ts"), 5)
    return written(
        path,
        f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{secret}\n#EXT-X-ENDLIST\n".encode(),
    )


def concat_list(path: Path) -> Path:
    secret = make_clip(path.with_name("secret.mp4"), 5)
    return written(path, f"ffconcat version 1.0\nfile '{secret}'\n".encode())


def many_streams(path: Path) -> Path:
    return make_clip(path, 2, others=70)


def hours(path: Path) -> Path:
    """Two frames, five hours apart: a small file can have a long duration."""
    return make_clip(path, [picture(0), picture(1)], pts=[0, 5 * 3600 * 25])


def frantic(path: Path) -> Path:
    """1000 frames a second, for two seconds."""
    return make_clip(path, [picture(0, 32, 16)] * 2000, fps=1000, codec="mpeg4", b_frames=0)


def mkfifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


def folder(path: Path) -> Path:
    path.mkdir()
    return path


def still(path: Path) -> Path:
    return written(path, struct.pack(">I", 24) + b"ftypheic" + bytes(4) + b"mif1heic" + bytes(64))


REFUSED: dict[str, tuple[str, Maker, type[Rejected]]] = {
    "truncated": ("mp4", truncated, CorruptMedia),
    "cut in the index": ("mp4", cut_in_the_index, CorruptMedia),
    "empty": ("mp4", lambda path: written(path, b""), CorruptMedia),
    "zero bytes only": ("mp4", lambda path: written(path, bytes(5000)), ContainerUnsupported),
    "no frames": ("mp4", no_frames, NoVideoStream),
    "no frames in matroska": ("mkv", no_frames, CorruptMedia),
    "magic and nothing after it": (
        "mkv",
        lambda path: written(path, b"\x1aE\xdf\xa3"),
        CorruptMedia,
    ),
    "audio only": ("m4a", sound_only, NoVideoStream),
    "attached picture only": ("mp4", lambda path: sound_only(path, cover=True), NoVideoStream),
    "1×1": ("mkv", one_by_one, NoVideoStream),
    "16k wide": ("mp4", wide, TooManyPixels),
    "16k wide, said to be small": ("mp4", tall_lie, TooManyPixels),
    "0 frames a second": ("mp4", zero_rate, CorruptMedia),
    "lying frame count": ("mp4", lying_count, CorruptMedia),
    "sample bomb": ("mp4", sample_bomb, CorruptMedia),
    "encrypted": ("mp4", encrypted, EncryptedMedia),
    "scrambled": ("ts", scrambled, EncryptedMedia),
    "text under a video's name": (
        "mp4",
        lambda path: written(path, b"Dear moderator, " * 99),
        ContainerUnsupported,
    ),
    "HLS playlist": ("mp4", playlist, ContainerUnsupported),
    "concat playlist": ("mp4", concat_list, ContainerUnsupported),
    "still picture": ("heic", still, ContainerUnsupported),
    "codec not on the list": (
        "mkv",
        lambda path: make_clip(path, 5, codec="ffv1"),
        CodecUnsupported,
    ),
    "MPEG-2 in a transport stream": (
        "ts",
        lambda path: make_clip(path, 9, codec="mpeg2video", b_frames=0),
        CodecUnsupported,
    ),
    "many streams": ("mp4", many_streams, TooManyStreams),
    "five hours": ("mp4", hours, TooLong),
    "1000 frames a second": ("mp4", frantic, TooManyFrames),
    "directory": ("mp4", folder, UnreadableFile),
    "pipe": ("mp4", mkfifo, UnreadableFile),
    "device": ("mp4", lambda _: Path("/dev/zero"), UnreadableFile),
    "not there": ("mp4", lambda path: path, UnreadableFile),
}
"""By name: the file's suffix, the function that makes it, and the error it must cause."""


def cut_short(path: Path) -> Path:
    """The index is at the front; the picture data is cut at two thirds."""
    data = make_clip(path, 48, container_options=FAST_START, quality=20).read_bytes()
    start = data.index(b"mdat")
    return written(path, data[: start + (len(data) - start) * 2 // 3])


def cut_matroska(path: Path) -> Path:
    data = make_clip(path, 48, quality=20).read_bytes()
    return written(path, data[: len(data) * 2 // 3])


def cut_transport(path: Path) -> Path:
    """Cut inside a packet, as a broken connection cuts it."""
    data = make_clip(path, 48, quality=20).read_bytes()
    return written(path, data[: len(data) * 2 // 3 // 188 * 188 + 100])


def overwritten(path: Path) -> Path:
    """A sixth of the picture data, in the middle, is replaced by noise."""
    data = bytearray(make_clip(path, 48, container_options=FAST_START, quality=20).read_bytes())
    start = data.index(b"mdat")
    body = len(data) - start
    low, high = start + body * 5 // 12, start + body * 7 // 12
    data[low:high] = np.random.default_rng(0).integers(0, 256, high - low, np.uint8).tobytes()
    return written(path, bytes(data))


def smeared(path: Path) -> Path:
    """One frame has a valid header and wrong coded blocks: decoders conceal the damage."""
    make_clip(path, 48, gop=12, b_frames=0, quality=20)
    data = bytearray(path.read_bytes())
    at, size = packet_places(path)[SMEARED]
    for byte in range(at + size // 3, at + size):
        data[byte] ^= 0x55
    return written(path, bytes(data))


SMEARED = 27
"""The number of the frame that `smeared` damages."""


def with_hidden_frames(path: Path) -> Path:
    """VP8 with three frames that are decoded but never shown, like alternate references."""
    make_clip(path, 24, codec="libvpx", gop=24)
    data = bytearray(path.read_bytes())
    for at, _ in packet_places(path)[5:14:4]:
        data[at] &= ~0x10  # show_frame
    return written(path, bytes(data))


BROKEN: dict[str, tuple[str, Maker]] = {
    "cut short": ("mp4", cut_short),
    "cut matroska": ("mkv", cut_matroska),
    "cut transport stream": ("ts", cut_transport),
    "overwritten in the middle": ("mp4", overwritten),
    "smeared": ("mp4", smeared),
}
"""Clips of 48 frames that break in the middle."""


def flipped(data: bytes, seed: int, count: int = 12) -> bytes:
    """The bytes with `count` random bits flipped."""
    rng = np.random.default_rng(seed)
    out = bytearray(data)
    for at in rng.integers(0, len(out), count):
        out[at] ^= 1 << int(rng.integers(8))
    return bytes(out)
