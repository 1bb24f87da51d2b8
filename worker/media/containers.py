"""Which container a file is, by its first bytes, and what an MP4's boxes say.

The file name's ending is ignored.  FFmpeg is given the demuxer to use, because its own guess could
choose a playlist that opens other files.

The boxes are checked before FFmpeg reads them, with little memory and within WALK_SECONDS.  Refused
are encrypted video (a sample entry `encv` or `drmi`), tables that promise more samples than the
file has room for (FFmpeg allocates an entry for each: 85 million in a file of 1.9 kB took 3 GiB),
and more than MOST_ATTACHED bytes of cover pictures or Matroska attachments, which FFmpeg keeps in
memory.  FFmpeg reads these boxes wherever they are, so the check does the same.
"""

import os
import stat
import time
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
_WEAK_BRANDS = {b"jp2 ", b"jpx ", b"jxl "}
"""Pictures, for which FFmpeg's mov demuxer bids little."""
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
_PARENTS = frozenset(
    b"moov trak mdia minf stbl moof traf mvex edts dinf udta ilst tref sinf schi wave gmhd".split()
)
"""Boxes that FFmpeg searches for other boxes."""
_DEEPEST = 16
_MOST_BOXES = 3_000_000
"""The most boxes of an honest file; four hours in fragments of 0.1 s are 1.4 million."""
_MOST_TABLES = 4096
WALK_SECONDS = 10.0
"""For reading boxes or elements; 300,000 take about one second."""
MOST_SAMPLES = 16_000_000
"""In fragments; FFmpeg keeps some 32 bytes of each.  Four hours at 300 frames/s are 4.3 million."""
MOST_ATTACHED = 64 * 1024**2
_EBML, _DOCTYPE = 0x1A45DFA3, 0x4282
_SEGMENT, _ATTACHMENTS = 0x18538067, 0x1941A469
_LONGEST_HEADER = 512
"""Of an honest file: 16 bytes of a file type box and 4 a brand; some 40 of an EBML header."""


@dataclass(frozen=True)
class Checked:
    """What the bytes of a file say before FFmpeg reads it."""

    demuxer: Demuxer
    size: int
    layout: tuple[int, int]
    """Of MPEG-TS packets: where the first begins, and their length."""
    unmistakable: bool
    """Whether a decoder that chooses the demuxer itself would choose this one."""


def check_file(name: str, max_bytes: int, most_frames: int) -> Checked:
    """The facts, without FFmpeg; never waits for the writer of a pipe."""
    try:
        kind = Path(name).stat().st_mode
        if not stat.S_ISREG(kind):
            raise UnreadableFile(f"expected a regular file, {name} is {_kind(kind)}")
        # The name may become a pipe after stat(): O_NONBLOCK does not wait for a writer, and
        # fstat() below checks the file that was really opened.
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
        elif demuxer == "matroska":
            refuse_attachments(file, size)
        elif demuxer == "mpegts":
            refuse_scrambled(head)
    return Checked(demuxer, size, packet_layout(head) or (0, 188), unmistakable(head))


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


def unmistakable(head: bytes) -> bool:
    """Whether a decoder that chooses the demuxer itself takes the one of demuxer_of.

    Such a decoder asks all of FFmpeg's demuxers, and one that opens further files or sockets (hls,
    concat, sdp) may outbid mov or matroska where their own sign is weak.  A file type box at the
    very beginning, or a short EBML header with the name, is as strong a sign as any.
    """
    if head[4:8] == b"ftyp":
        length = int.from_bytes(head[:4], "big")
        return 16 <= length <= _LONGEST_HEADER and head[8:12] not in _WEAK_BRANDS
    if head.startswith(b"RIFF") and head[8:12] == b"AVI ":
        return True
    return _doctype(head) in (b"webm", b"matroska")


def _doctype(head: bytes) -> bytes:
    """What a short EBML header says that the file is; empty where there is no such header."""
    element, length, at = _element(head[:12])
    end = at + (length or 0)
    if element != _EBML or end > min(len(head), _LONGEST_HEADER):
        return b""
    while at < end:
        element, length, header = _element(head[at : at + 12])
        if not header or length is None:
            break
        at += header + length
        if element == _DOCTYPE and at <= end:
            return head[at - length : at]
    return b""


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
    # Bare packets, packets behind a recorder's four-byte time code, and packets with 16 bytes of
    # error correction.
    for stride in (188, 192, 204):
        for offset in range(min(stride, max(0, len(head) - 2 * stride))):
            syncs = head[offset::stride][:16]
            # One 0x47 is only the letter G; three at equal distances are packets.
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
    # A majority, because one flipped bit must not refuse a clip.
    if controls and sum(control >> 6 != 0 for control in controls) * 2 > len(controls):
        raise EncryptedMedia(
            "most MPEG-TS packets are scrambled (transport_scrambling_control); send it decrypted"
        )


@dataclass(frozen=True)
class _Box:
    kind: bytes
    start: int  # of the body
    end: int


class _Clock:
    """Ends a walk over boxes that takes too long or meets too many of them."""

    def __init__(self) -> None:
        self.count, self.end = 0, time.monotonic() + WALK_SECONDS

    def tick(self) -> None:
        """Count one box."""
        self.count += 1
        if self.count > _MOST_BOXES:
            raise CorruptMedia(f"more than {_MOST_BOXES} boxes; no honest file has so many")
        if self.count % 1024 == 0 and time.monotonic() > self.end:
            raise CorruptMedia(f"reading {self.count} boxes took more than {WALK_SECONDS:g} s")


def _boxes(file: BinaryIO, start: int, end: int, clock: _Clock) -> Iterator[_Box]:
    """The boxes between two offsets, one level deep; a box that leaves them is cut at the end."""
    while end - start >= 8:
        clock.tick()
        file.seek(start)
        header = file.read(16)
        size, kind, body = int.from_bytes(header[:4], "big"), header[4:8], start + 8
        if size == 1 and len(header) == 16:
            size, body = int.from_bytes(header[8:16], "big"), start + 16
        # By the standard: until the end of what contains it.
        elif size == 0:
            size = end - start
        # A box smaller than its own header would never let the walk move on.
        if size < body - start:
            return
        yield _Box(kind, body, min(start + size, end))
        start += size


def _all_boxes(
    file: BinaryIO, start: int, end: int, clock: _Clock, parents: tuple[_Box, ...] = ()
) -> Iterator[tuple[_Box, tuple[_Box, ...]]]:
    """Every box at every depth, with the boxes that it is in."""
    for box in _boxes(file, start, end, clock):
        yield box, parents
        if box.kind in _PARENTS and len(parents) < _DEEPEST:
            yield from _all_boxes(file, box.start, box.end, clock, (*parents, box))


def check_boxes(file: BinaryIO, size: int, most_frames: int) -> None:
    """Refuse an MP4 without an index, with encrypted video, or with impossible tables."""
    clock, fragment_samples, has_index = _Clock(), 0, False
    tables: list[tuple[_Box, _Box | None]] = []
    for box, parents in _all_boxes(file, 0, size, clock):
        if box.kind == b"moov" and not parents:
            has_index = True
        elif box.kind == b"trun":
            fragment_samples += _run_samples(file, box, size)
            if fragment_samples > MOST_SAMPLES:
                raise CorruptMedia(f"more than {MOST_SAMPLES} samples in fragments")
        elif box.kind in (b"udta", b"meta") and box.end - box.start > MOST_ATTACHED:
            raise CorruptMedia(f"{box.end - box.start} bytes of metadata; remove the pictures")
        elif box.kind in (b"hdlr", b"stsd", b"stsz", b"stz2"):
            track = next((parent for parent in parents if parent.kind == b"trak"), None)
            # Checked at the end: whether a track is video stands in its hdlr, which may come after
            # its tables.
            tables.append((box, track))
            if len(tables) > _MOST_TABLES:
                raise CorruptMedia(f"more than {_MOST_TABLES} sample tables")
    if not has_index:
        raise CorruptMedia(
            "no index (moov box) in this MP4: it was cut short, or never finished; upload it again"
        )
    _check_tables(file, tables, size, most_frames)


def _check_tables(
    file: BinaryIO, tables: list[tuple[_Box, _Box | None]], size: int, most_frames: int
) -> None:
    """The sample entries and sample sizes of each track."""
    videos = {
        track
        for box, track in tables
        if box.kind == b"hdlr" and _read(file, box, 12)[8:12] == b"vide"
    }
    for box, track in tables:
        video = track in videos
        if box.kind == b"stsd" and video:
            _refuse_encrypted(file, box)
        elif box.kind in (b"stsz", b"stz2"):
            _check_sizes(file, box, size, most_frames if video else None)


def _read(file: BinaryIO, box: _Box, count: int) -> bytes:
    file.seek(box.start)
    return file.read(min(count, box.end - box.start))


def _refuse_encrypted(file: BinaryIO, descriptions: _Box) -> None:
    for entry in _boxes(file, descriptions.start + 8, descriptions.end, _Clock()):
        if entry.kind in _ENCRYPTED_ENTRIES:
            raise EncryptedMedia(
                f"the video track is encrypted (sample entry {entry.kind.decode()}); "
                "send it decrypted"
            )


def _check_sizes(file: BinaryIO, box: _Box, file_size: int, most_frames: int | None) -> None:
    head = _read(file, box, 12)
    each, count = int.from_bytes(head[4:8], "big"), int.from_bytes(head[8:12], "big")
    if box.kind == b"stz2":  # the sizes are packed into 4, 8 or 16 bits each
        room = (box.end - box.start - 12) * 8 // max(4, each & 0xFF)
    else:
        # Samples of one size need no entries, so only the file itself can bound how many there are.
        room = file_size // each if each else (box.end - box.start - 12) // 4
    if len(head) < 12 or count > room:
        raise CorruptMedia(
            f"the sample table promises {count} samples and has room for {max(room, 0)}; "
            "the file was cut short or made up"
        )
    if most_frames is not None and count > most_frames:
        raise TooManyFrames(f"{count} frames in the sample table; at most {most_frames} are taken")


def _run_samples(file: BinaryIO, box: _Box, file_size: int) -> int:
    """Samples of a fragment's run, refused where neither the box nor the file has room for them."""
    head = _read(file, box, 8)
    flags, count = int.from_bytes(head[:4], "big"), int.from_bytes(head[4:8], "big")
    # Duration, size, flags and time offset have four bytes each, where the run lists them.
    each = 4 * sum(bool(flags & bit) for bit in (0x100, 0x200, 0x400, 0x800))
    fixed = 8 + 4 * sum(bool(flags & bit) for bit in (0x1, 0x4))
    room = (box.end - box.start - fixed) // each if each else file_size
    if len(head) < 8 or count > room:
        raise CorruptMedia(
            f"a fragment promises {count} samples and has room for {max(room, 0)}; "
            "the file was cut short or made up"
        )
    return count


def refuse_attachments(file: BinaryIO, size: int) -> None:
    """Refuse a Matroska file with large attachments (fonts, pictures).

    Reads the elements' headers, and stops at one that is none, or after WALK_SECONDS.  FFmpeg may
    still find attachments behind it, so the child's memory limit stays necessary.
    """
    at, attached, end = 0, 0, time.monotonic() + WALK_SECONDS
    while at < size and time.monotonic() < end:
        file.seek(at)
        element, length, header = _element(file.read(12))
        if not header:
            return
        if element == _ATTACHMENTS:
            attached += length if length is not None else size - at
            if attached > MOST_ATTACHED:
                raise CorruptMedia(f"{attached} bytes of attachments; remove them")
        at += header
        # An element of unknown length, as in live recordings, is read from the inside.
        if element != _SEGMENT and length is not None:
            at += length


def _element(head: bytes) -> tuple[int, int | None, int]:
    """An EBML element's id, its length (None: unknown), and its header's length (0: invalid)."""
    # The leading zero bits give the length of an id, which has four bytes at most.
    if not head or not head[0] >> 4:
        return 0, None, 0
    id_bytes = 9 - head[0].bit_length()
    rest = head[id_bytes:]
    if not rest or not rest[0]:
        return 0, None, 0
    length_bytes = 9 - rest[0].bit_length()
    if len(rest) < length_bytes:
        return 0, None, 0
    most = (1 << 7 * length_bytes) - 1
    length = int.from_bytes(rest[:length_bytes], "big") & most
    element = int.from_bytes(head[:id_bytes], "big")
    # A length of ones only means that it is unknown.
    return element, None if length == most else length, id_bytes + length_bytes
