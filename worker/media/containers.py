"""Which container a file is, by its first bytes, and what an MP4's boxes say.

The file name's ending is ignored.  FFmpeg is told which demuxer to use, because its own guess could
choose a playlist that opens other files.  The boxes are checked before FFmpeg reads them, with
little memory.  Refused are encrypted video (a sample entry `encv` or `drmi`), and tables that
promise more samples than the file has room for, because FFmpeg would allocate them.
"""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from ralf.worker.errors import (
    ContainerUnsupported,
    CorruptMedia,
    EncryptedMedia,
    TooLarge,
    TooManyFrames,
    UnreadableFile,
)

Demuxer = Literal["mov", "matroska", "avi", "mpegts"]

HEAD_BYTES = 64 * 1024
ALLOWED = "mov, mp4, m4a, 3gp, matroska, webm, avi, mpegts"

_MOV_FIRST = {b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"uuid", b"styp"}
_STILL_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"mif1", b"avif"}
_KNOWN_OTHERS: tuple[tuple[bytes, str], ...] = (
    (b"#EXTM3U", "an HLS playlist"),
    (b"ffconcat", "an FFmpeg concat playlist"),
    (b"<?xml", "XML, perhaps a DASH manifest"),
    (b"\x89PNG", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"GIF8", "a GIF picture"),
    (b"%PDF", "a PDF"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"\x1f\x8b", "gzip"),
    (b"OggS", "Ogg"),
    (b"FLV\x01", "Flash video"),
    (b"\x00\x00\x01\xba", "an MPEG program stream"),
    (b"\x00\x00\x01\xb3", "a bare MPEG video stream"),
    (b"\x00\x00\x00\x01", "a bare H.264 or HEVC stream"),
    (b"0&\xb2u\x8ef\xcf\x11", "ASF or WMV"),
    (b"DKIF", "IVF"),
    (b"YUV4MPEG2", "raw YUV4MPEG"),
    (b"ID3", "MP3"),
    (b"fLaC", "FLAC"),
)
_ENCRYPTED_ENTRIES = {b"encv", b"drmi"}
_MOST_BOXES = 1_000_000
"""The most boxes of an honest file; four hours of half-second fragments are 60,000."""


def check_file(name: str, max_bytes: int, most_frames: int) -> tuple[Demuxer, int, tuple[int, int]]:
    """Container, size and packet layout, without FFmpeg; never waits for the writer of a pipe."""
    try:
        kind = Path(name).stat().st_mode
        if not stat.S_ISREG(kind):
            raise UnreadableFile(f"expected a regular file, {name} is {_kind(kind)}")
        descriptor = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise UnreadableFile(f"cannot read {name}: {error.strerror}") from error
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise UnreadableFile(f"expected a regular file, {name} is {_kind(found.st_mode)}")
        size = found.st_size
        if size == 0:
            raise CorruptMedia(f"{name} is empty (0 bytes); upload it again")
        if size > max_bytes:
            raise TooLarge(f"{size} bytes; at most {max_bytes} are taken (RALF_MAX_BYTES)")
        head = file.read(HEAD_BYTES)
        demuxer = demuxer_of(head)
        if demuxer == "mov":
            check_boxes(file, size, most_frames)
        elif demuxer == "mpegts":
            refuse_scrambled(head)
    return demuxer, size, packet_layout(head) or (0, 188)


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def demuxer_of(head: bytes) -> Demuxer:
    """FFmpeg's name of the container that begins with these bytes."""
    if head[4:8] in _MOV_FIRST:
        if head[4:8] == b"ftyp" and head[8:12] in _STILL_BRANDS:
            raise ContainerUnsupported(
                f"expected a video ({ALLOWED}), got a still picture (HEIF, brand "
                f"{head[8:12].decode()}); send a video"
            )
        return "mov"
    if head.startswith(b"\x1aE\xdf\xa3"):
        return "matroska"
    if head.startswith(b"RIFF") and head[8:12] in (b"AVI ", b"AVIX"):
        return "avi"
    if packet_layout(head) is not None:
        return "mpegts"
    raise ContainerUnsupported(
        f"expected one of {ALLOWED} by its first bytes, got {_describe(head)}; convert it first"
    )


def _describe(head: bytes) -> str:
    for magic, name in _KNOWN_OTHERS:
        if head.lstrip(b"\xef\xbb\xbf").startswith(magic):
            return name
    if head.startswith(b"RIFF"):
        return f"RIFF of kind {head[8:12]!r}"
    if not head.strip(b"\0"):
        return "zero bytes only"
    if all(32 <= byte < 127 or byte in b"\t\r\n" for byte in head[:256]):
        return f"text ({head[:24].decode()!r}…)"
    return f"{head[:8].hex(' ')}"


def packet_layout(head: bytes) -> tuple[int, int] | None:
    """Offset of the first sync byte and the stride, if the head is a run of MPEG-TS packets."""
    for stride in (188, 192, 204):
        for offset in range(min(stride, max(0, len(head) - 2 * stride))):
            syncs = head[offset::stride][:16]
            if len(syncs) >= 3 and not syncs.strip(b"\x47"):
                return offset, stride
    return None


def refuse_scrambled(head: bytes) -> None:
    """MPEG-TS says in each packet's header whether its payload is encrypted."""
    layout = packet_layout(head)
    if layout is None:
        return
    offset, stride = layout
    controls = head[offset + 3 :: stride]
    if controls and sum(control >> 6 != 0 for control in controls) * 2 > len(controls):
        raise EncryptedMedia(
            "most MPEG-TS packets are scrambled (transport_scrambling_control); send it decrypted"
        )


@dataclass(frozen=True)
class _Box:
    kind: bytes
    start: int  # of the body
    end: int


def _boxes(file: BinaryIO, start: int, end: int) -> Iterator[_Box]:
    """The boxes between two offsets, one level deep; a box that leaves them is cut at the end."""
    for _ in range(_MOST_BOXES):
        if end - start < 8:
            return
        file.seek(start)
        header = file.read(16)
        size, kind, body = int.from_bytes(header[:4], "big"), header[4:8], start + 8
        if size == 1 and len(header) == 16:
            size, body = int.from_bytes(header[8:16], "big"), start + 16
        elif size == 0:
            size = end - start
        if size < body - start:
            return
        yield _Box(kind, body, min(start + size, end))
        start += size
    raise CorruptMedia(f"more than {_MOST_BOXES} boxes in one level of an MP4")


def _inside(file: BinaryIO, box: _Box, *path: bytes) -> Iterator[_Box]:
    """Every box at the end of the path below this one."""
    for child in _boxes(file, box.start, box.end):
        if child.kind == path[0]:
            yield from [child] if len(path) == 1 else _inside(file, child, *path[1:])


def check_boxes(file: BinaryIO, size: int, most_frames: int) -> None:
    """Refuse an MP4 without an index, with encrypted video, or with an impossible sample table."""
    movie = next((box for box in _boxes(file, 0, size) if box.kind == b"moov"), None)
    if movie is None:
        raise CorruptMedia(
            "no index (moov box) in this MP4: it was cut short, or never finished; upload it again"
        )
    for track in _inside(file, movie, b"trak"):
        video = any(
            _read(file, box, 12)[8:12] == b"vide" for box in _inside(file, track, b"mdia", b"hdlr")
        )
        for table in _inside(file, track, b"mdia", b"minf", b"stbl"):
            for box in _boxes(file, table.start, table.end):
                if box.kind == b"stsd" and video:
                    _refuse_encrypted(file, box)
                elif box.kind == b"stsz":
                    _check_sizes(file, box, size, most_frames if video else None)


def _read(file: BinaryIO, box: _Box, count: int) -> bytes:
    file.seek(box.start)
    return file.read(min(count, box.end - box.start))


def _refuse_encrypted(file: BinaryIO, descriptions: _Box) -> None:
    for entry in _boxes(file, descriptions.start + 8, descriptions.end):
        if entry.kind in _ENCRYPTED_ENTRIES:
            raise EncryptedMedia(
                f"the video track is encrypted (sample entry {entry.kind.decode()}); "
                "send it decrypted"
            )


def _check_sizes(file: BinaryIO, box: _Box, file_size: int, most_frames: int | None) -> None:
    head = _read(file, box, 12)
    each, count = int.from_bytes(head[4:8], "big"), int.from_bytes(head[8:12], "big")
    room = file_size // each if each else (box.end - box.start - 12) // 4
    if len(head) < 12 or count > room:
        raise CorruptMedia(
            f"the sample table promises {count} samples and has room for {max(room, 0)}; "
            "the file was cut short or made up"
        )
    if most_frames is not None and count > most_frames:
        raise TooManyFrames(f"{count} frames in the sample table; at most {most_frames} are taken")
