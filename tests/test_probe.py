"""What a file is: facts against the plain reference decoder, limits echoed, nothing left open."""

import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from ralf.worker.errors import (
    ContainerUnsupported,
    CorruptMedia,
    EncryptedMedia,
    NoVideoStream,
    TooLarge,
    TooLong,
    TooManyFrames,
    TooManyPixels,
    TooManyStreams,
)
from ralf.worker.media.containers import demuxer_of, unmistakable
from ralf.worker.media.packet_times import PacketTimes, frame_times
from ralf.worker.media.probe import CODECS, codec_available, ffmpeg_version, probe
from ralf.worker.settings import Settings
from tests.clips import decode_all, make_clip, picture, sound_only, video_bytes
from tests.hostile import patch, with_hidden_frames

SETTINGS = Settings()
UNEVEN = np.cumsum([0, *[20, 60, 33, 100, 5, 47] * 4])[:24].tolist()


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("mp4", {}),
        ("mkv", {}),
        ("mov", {"audio": True}),
        ("ts", {}),
        ("ts", {"shift": 1000}),
        ("mp4", {"shift": -5}),
        ("mkv", {"pts": UNEVEN, "time_base": Fraction(1, 1000)}),
        ("avi", {"codec": "mpeg4"}),
        ("avi", {"codec": "mjpeg", "pixel_format": "yuvj420p", "full_range": True}),
        ("webm", {"codec": "libvpx"}),
        ("webm", {"codec": "libvpx-vp9"}),
        ("mp4", {"codec": "libsvtav1"}),
        ("mkv", {"codec": "libx265"}),
        ("mp4", {"container_options": {"movflags": "frag_keyframe+empty_moov"}}),
        ("mp4", {"fps": Fraction(30000, 1001)}),
    ],
)
def test_frames_times_and_keyframes_are_those_of_the_reference_decoder(
    tmp_path: Path, name: str, made: dict
):
    """Counted from packets, in display order, 0.0 at the first frame shown."""
    path = make_clip(tmp_path / f"clip.{name}", 24, **made)

    found, shown = probe(path, SETTINGS), decode_all(path)

    assert [round(frame.time_s, 6) for frame in shown] == found.times_s.round(6).tolist()
    assert [i for i, frame in enumerate(shown) if frame.key] == found.keyframes.tolist()
    assert ("pts" in made) == found.variable_rate
    assert found.warnings == ()


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("mp4", {}),
        ("mov", {}),
        ("mkv", {}),
        ("webm", {"codec": "libvpx-vp9"}),
        ("mp4", {"container_options": {"movflags": "frag_keyframe+empty_moov"}}),
        ("mkv", {"container_options": {"live": "1"}}),
    ],
)
def test_the_beginning_of_an_ordinary_file_is_unmistakable(tmp_path: Path, name: str, made: dict):
    """A decoder that chooses the demuxer by content may have it."""
    path = make_clip(tmp_path / f"clip.{name}", 3, **made)

    assert probe(path, SETTINGS).unmistakable


EBML = b"\x1aE\xdf\xa3"


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"#EXTM3U\n#EXT-X-TARGETDURATION:9\nhttp://127.0.0.1/a.ts\n",
        b"ffconcat version 1.0\nfile http://127.0.0.1/a\n",
        b"v=0\nfree" + b"\nc=IN IP4 127.0.0.1\n" * 9,
        b"v=0\nftyp" + b"\nc=IN IP4 127.0.0.1\n" * 9,
        b"\0\0\0\x18skip" + b"\nc=IN IP4 127.0.0.1\n" * 9,
        b"\0\0\0\x08mdat#EXTM3U\n",
        b"\0\0\0\x08ftyp#EXTM3U\n",
        b"\0\0\0\x18ftypjp2 " + bytes(12),
        b"\0\0\0\x0cjP  \r\n\x87\n",
        EBML + b"\x01\0\0\0\0\0\xff\xff" + b"\x42\x82\x84webm" + bytes(65535),
        EBML + b"\x01\xff\xff\xff\xff\xff\xff\xff" + b"\x42\x82\x84webm",
        EBML + b"\x87" + b"\x42\x82\x84none",
        EBML + b"\x84" + b"\x42\x82\x84webm",
        EBML + b"\x87" + b"\x42\x82\x84we",
        EBML + b"\x84" + b"\xec\x82\0\0" + b"\x42\x82\x84webm",
    ],
)
def test_a_beginning_that_another_demuxer_may_claim_is_told(head: bytes):
    """Playlists and session descriptions, plain and inside what looks like mov or matroska."""
    assert not unmistakable(head)


def test_facts_are_named(tmp_path: Path):
    """Everything the verdict later says of the file."""
    path = make_clip(
        tmp_path / "clip.mp4", 25, size=(96, 64), matrix="bt709", rotation=90, audio=True
    )

    found = probe(path, SETTINGS)

    assert (str(path), path.stat().st_size) == (found.path, found.size_bytes)
    assert ("mov", "h264", "yuv420p") == (found.container, found.codec, found.pixel_format)
    assert (64, 96, 90) == (found.width, found.height, found.rotation)
    assert (96, 64) == (found.coded_width, found.coded_height)
    assert ("bt709", "tv") == (found.colour_space, found.colour_range)
    assert (1.0, 25.0, 0.0) == pytest.approx((found.duration_s, found.frame_rate, found.start_s))
    assert not found.interlaced and not found.mirrored


def test_the_start_of_a_transport_stream_is_kept_apart(tmp_path: Path):
    """Times begin at 0; start_s says where the stream's own clock stood."""
    path = make_clip(tmp_path / "clip.ts", 10, shift=1000, b_frames=0)

    found = probe(path, SETTINGS)

    assert 0.0 == found.times_s[0]
    assert 40.0 == pytest.approx(found.start_s, abs=0.1)


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        ({}, ("unspecified", "unspecified")),
        ({"full_range": True}, ("unspecified", "pc")),
        ({"matrix": "bt601"}, ("bt601", "tv")),
        ({"matrix": "bt709", "full_range": True}, ("bt709", "pc")),
        ({"matrix": "bt2020"}, ("bt2020", "tv")),
        ({"matrix": "smpte240m"}, ("smpte240m", "tv")),
    ],
)
def test_colour_tags_are_read_from_the_first_frame(tmp_path: Path, made: dict, expected: tuple):
    """What is not tagged is called so."""
    found = probe(make_clip(tmp_path / "clip.mp4", 2, **made), SETTINGS)

    assert expected == (found.colour_space, found.colour_range)


def test_interlaced_is_seen(tmp_path: Path):
    """The verdict can then say that frames are woven of two fields."""
    assert probe(make_clip(tmp_path / "clip.mp4", 5, interlaced=True), SETTINGS).interlaced


@pytest.mark.parametrize("ending", ["jpg", "txt", "m3u8", "avi", ""])
def test_the_ending_of_the_name_is_never_asked(tmp_path: Path, ending: str):
    """An MP4 is an MP4 under any name."""
    path = make_clip(tmp_path / f"clip.{ending}", 3, container="mp4")

    assert "mov" == probe(path, SETTINGS).container


def test_a_name_that_looks_like_a_url_is_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """FFmpeg is never given anything but file:."""
    monkeypatch.chdir(tmp_path)
    for name in ("concat:a|b", "http:evil", "pipe:0"):
        Path(name).write_bytes(make_clip(tmp_path / "clip.mp4", 2).read_bytes())

        assert 2 == probe(name, SETTINGS).frame_count


@pytest.mark.parametrize("container", ["mp4", "mkv"])
def test_of_several_video_streams_the_largest_is_looked_at(tmp_path: Path, container: str):
    """And the verdict's warnings say that there are others."""
    found = probe(make_clip(tmp_path / f"clip.{container}", 5, others=3, audio=True), SETTINGS)

    assert (0, 96) == (found.stream_index, found.width)
    assert ("streams: 4 video streams; only #0 is looked at",) == found.warnings


@pytest.mark.parametrize(
    ("limit", "made", "error", "says"),
    [
        ({"max_bytes": 1000}, {}, TooLarge, ("at most 1000", "RALF_MAX_BYTES")),
        ({"max_width": 95, "max_height": 60}, {}, TooManyPixels, ("96×64", "95×60")),
        ({"max_width": 96, "max_height": 63}, {}, TooManyPixels, ("96×64", "96×63")),
        ({"max_seconds": 0.5}, {}, TooLong, ("0.520 s", "at most 0.5 s")),
        ({"max_frame_rate": 10.0}, {}, TooManyFrames, ("24 frames", "at most 10 a second")),
        ({"max_streams": 2}, {"others": 2}, TooManyStreams, ("3 streams", "at most 2")),
    ],
)
def test_a_limit_echoes_the_value_and_itself(
    tmp_path: Path, limit: dict, made: dict, error: type[Exception], says: tuple[str, ...]
):
    """The sender can see what was measured and what is allowed."""
    path = make_clip(tmp_path / "clip.mp4", 24, b_frames=0, **made)
    assert 24 == probe(path, SETTINGS).frame_count

    with pytest.raises(error) as caught:
        probe(path, Settings(**limit))

    assert [text for text in says if text not in str(caught.value)] == []


def test_a_portrait_video_may_be_as_tall_as_a_landscape_one_is_wide(tmp_path: Path):
    """The limit is on the longer and the shorter side."""
    path = make_clip(tmp_path / "clip.mp4", 2, size=(96, 160))

    assert 160 == probe(path, Settings(max_width=160, max_height=96)).height


def test_the_duration_is_not_the_containers_word(tmp_path: Path):
    """A header that claims ten hours does not make the clip longer, and is called out."""
    path = make_clip(tmp_path / "clip.mp4", 24)
    for kind in (b"mvhd", b"mdhd", b"tkhd"):
        at = {b"mvhd": 16, b"mdhd": 16, b"tkhd": 20}[kind]
        patch(path, kind, at, struct.pack(">I", 36_000_000))

    found = probe(path, SETTINGS)

    assert 0.96 == pytest.approx(found.duration_s)


def test_a_lying_header_of_an_avi_is_called_out(tmp_path: Path):
    """avih and strh say a million frames; twenty-four are counted."""
    path = make_clip(tmp_path / "clip.avi", 24, codec="mjpeg", pixel_format="yuvj420p")
    patch(path, b"strh", 4 + 32, struct.pack("<I", 1_000_000))
    data = path.read_bytes()
    path.write_bytes(data)

    found = probe(path, SETTINGS)

    assert 24 == found.frame_count
    assert ["frame_count"] == [text.split(":")[0] for text in found.warnings][:1]


def test_hidden_frames_of_vp8_are_not_counted(tmp_path: Path):
    """A packet whose show_frame bit is off is decoded and never seen."""
    path = with_hidden_frames(tmp_path / "clip.webm")

    found = probe(path, SETTINGS)

    assert 21 == found.frame_count == len(decode_all(path))


def test_frames_before_the_first_keyframe_are_left_out(tmp_path: Path):
    """A transport stream cut in the middle of a group starts at its next keyframe."""
    data = make_clip(tmp_path / "whole.ts", 36, b_frames=0, quality=2).read_bytes()
    whole = probe(tmp_path / "whole.ts", SETTINGS)
    path = tmp_path / "clip.ts"
    start = 0
    for at in range(188 * 3, len(data) // 3, 188):  # first packet that begins a frame after a while
        pid = int.from_bytes(data[at + 1 : at + 3], "big")
        if pid & 0x1FFF == 0x100 and pid & 0x4000 and at > 188 * 12:
            start = at
            break
    path.write_bytes(data[: 188 * 3] + data[start:])

    found = probe(path, SETTINGS)

    assert whole.frame_count > found.frame_count == 24
    assert 0 == found.keyframes[0]
    assert found.warnings[0].startswith("early_frames:")


def test_matroska_content_encryption_is_refused(tmp_path: Path):
    """A ContentEncodings element of kind encryption in the track, grown into the header."""
    plain = make_clip(tmp_path / "clip.mkv", 5, container_options={"write_crc32": "0"})
    data = plain.read_bytes()
    algorithm = bytes.fromhex("47e18105") + bytes.fromhex("47e290") + bytes(range(16))
    encryption = bytes.fromhex("5035") + bytes([0x80 | len(algorithm)]) + algorithm
    kind = bytes.fromhex("503381015031810050328101")
    body = kind + encryption
    encoding = bytes.fromhex("6240") + bytes([0x80 | len(body)]) + body
    encodings = bytes.fromhex("6d80") + bytes([0x80 | len(encoding)]) + encoding
    path = tmp_path / "encrypted.mkv"
    path.write_bytes(_with_track_element(data, encodings))

    with pytest.raises(EncryptedMedia):
        probe(path, SETTINGS)


def _with_track_element(data: bytes, extra: bytes) -> bytes:
    """The Matroska file with `extra` at the end of its track entry, both lengths corrected."""
    name = bytes.fromhex("1654ae6b")
    tracks = data.index(name, data.index(name) + 4)  # the first is its entry in the seek head
    track = data.index(b"\xae", tracks + 4)
    out = bytearray(data)
    end = 0
    for at in (tracks + 4, track + 1):
        width = 9 - data[at].bit_length()
        value = int.from_bytes(data[at : at + width], "big") & ((1 << 7 * width) - 1)
        end = at + width + value
        out[at : at + width] = ((value + len(extra)) | 1 << 7 * width).to_bytes(width, "big")
    return bytes(out[:end]) + extra + bytes(out[end:])


def test_a_cover_picture_is_not_a_video(tmp_path: Path):
    """The error says what is there instead."""
    with pytest.raises(NoVideoStream, match=r"audio, video \(attached picture\)"):
        probe(sound_only(tmp_path / "song.mp4", cover=True), SETTINGS)


def test_wrong_text_in_the_metadata_is_no_reason_to_refuse(tmp_path: Path):
    """Phones write titles in any encoding."""
    path = make_clip(tmp_path / "clip.mp4", 2, metadata={"title": "QQQQ"})
    path.write_bytes(path.read_bytes().replace(b"QQQQ", b"\xff\xfe\xe9Q"))

    assert 2 == probe(path, SETTINGS).frame_count


def test_one_frame_is_a_clip(tmp_path: Path):
    """It has a duration, and no rate but the container's."""
    found = probe(make_clip(tmp_path / "clip.mp4", 1), SETTINGS)

    assert (1, [0], 0.04) == (found.frame_count, found.keyframes.tolist(), found.duration_s)


def test_every_allowed_codec_can_be_decoded_here():
    """And doctor can say with what."""
    assert {name for name in CODECS if codec_available(name)} == CODECS
    assert not codec_available("no such codec")
    assert ffmpeg_version().startswith("FFmpeg ")


def open_files() -> int:
    """Descriptors of this process."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_probing_leaves_no_descriptor_open(tmp_path: Path):
    """Neither for a good file nor for a refused one."""
    good = make_clip(tmp_path / "good.mp4", 3)
    bad = patch(make_clip(tmp_path / "bad.mp4", 3, b_frames=0), b"stts", 12, bytes(4))
    probe(good, SETTINGS)
    before = open_files()

    for _ in range(5):
        probe(good, SETTINGS)
        with pytest.raises(CorruptMedia):
            probe(bad, SETTINGS)

    assert before == open_files()


@pytest.mark.parametrize(
    ("head", "names"),
    [
        (b"#EXTM3U\n#EXTINF", "HLS"),
        (b"ffconcat version 1.0", "concat"),
        (b"\x89PNG\r\n\x1a\n", "PNG"),
        (b"RIFF\0\0\0\0WAVEfmt ", "WAVE"),
        (b"hello there, this is text", "text"),
        (bytes(64), "zero bytes"),
        (b"\x01\x02\x03", "01 02 03"),
    ],
)
def test_a_foreign_beginning_is_named(head: bytes, names: str):
    """So that the sender knows what was sent."""
    with pytest.raises(ContainerUnsupported, match=names):
        demuxer_of(head)


@pytest.mark.parametrize(("stride", "offset"), [(188, 0), (188, 7), (192, 4), (204, 0)])
def test_transport_streams_are_known_in_all_their_packings(stride: int, offset: int):
    """Bare, inside a recording's four-byte time codes, and with error correction."""
    head = bytearray(b"\x11" * stride * 20)
    head[offset::stride] = b"\x47" * len(head[offset::stride])

    assert "mpegts" == demuxer_of(bytes(head))


def test_packets_without_times_follow_each_other():
    """Nothing is lost when a container forgets."""
    packets = PacketTimes()
    for tick in (0, None, None, 30):
        packets.add(tick, 10, is_key=tick == 0, is_shown=True)

    assert [0.0, 0.1, 0.2, 0.3] == frame_times(packets, 0.01, 25.0).times_s.round(9).tolist()


def test_a_recording_glued_to_another_ends_at_the_seam(tmp_path: Path):
    """Times that jump back cannot be put on one clock; the warning says from where on."""
    first = make_clip(tmp_path / "a.ts", 50, b_frames=0, shift=2000).read_bytes()
    second = make_clip(tmp_path / "b.ts", [picture(n) for n in range(60, 85)], b_frames=0)
    path = tmp_path / "glued.ts"
    path.write_bytes(first + second.read_bytes())

    found = probe(path, SETTINGS)

    assert 50 == found.frame_count
    assert "clock jumps" in found.warnings[0]


@pytest.mark.parametrize("audio", [False, True])
def test_bits_per_pixel_are_those_of_the_videos_own_packets(tmp_path: Path, audio: bool):
    """Sound and container do not count; PyAV's packets, added up, are the reference."""
    path = make_clip(tmp_path / "clip.mp4", 25, size=(96, 64), audio=audio)

    expected = 8 * video_bytes(path) / (96 * 64 * 25)
    assert probe(path, SETTINGS).bits_per_pixel == pytest.approx(expected)
