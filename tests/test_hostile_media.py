"""The two lists: what is refused by name, and what breaks in the middle and is judged anyway."""

import os
import shutil
import struct
import tempfile
from contextlib import suppress
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest

from ralf.worker.contract import Sampling, Span
from ralf.worker.errors import CorruptMedia, Rejected, UnreadableFile
from ralf.worker.media import containers
from ralf.worker.media.decode_pyav import PyavDecoder, plan
from ralf.worker.media.probe import probe
from ralf.worker.media.types import Clip
from ralf.worker.settings import Settings
from tests.clips import decode_all, make_clip, number_of
from tests.hostile import BROKEN, REFUSED, SMEARED, flipped, patch
from tests.test_probe import open_files

SETTINGS = Settings()


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.timeout(120)
def test_a_bad_file_gets_its_named_error(tmp_path: Path, name: str):
    """At once, saying what came, and leaving no descriptor and no file behind."""
    ending, make, error = REFUSED[name]
    path = make(tmp_path / f"clip.{ending}")
    files, before = sorted(tmp_path.iterdir()), open_files()

    with pytest.raises(error) as caught:
        probe(path, SETTINGS)

    assert error is type(caught.value)
    assert 20 < len(str(caught.value)) < 300
    assert before == open_files()
    assert files == sorted(tmp_path.iterdir())


def test_a_file_without_permission_is_named():
    """Also when the tests run as root, who may read everything."""
    folder = Path(tempfile.mkdtemp())
    try:
        path = make_clip(folder / "clip.mp4", 2)
        folder.chmod(0o755)
        path.chmod(0)
        user = os.geteuid()
        try:
            if user == 0:
                os.seteuid(65534)
            with pytest.raises(UnreadableFile, match="Permission denied"):
                probe(path, SETTINGS)
        finally:
            os.seteuid(user)
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("count", [300, 8])
def test_a_clip_that_breaks_is_judged_on_what_can_be_read(tmp_path: Path, name: str, count: int):
    """Frames up to the break are right, those after it are what any player would show, and
    somebody says so."""
    ending, make = BROKEN[name]
    path = make(tmp_path / f"clip.{ending}")
    found = probe(path, SETTINGS)
    clip = Clip(found, Sampling(max_frames=count))

    chunks = list(PyavDecoder(threads=1).decode([clip]))

    pixels = np.concatenate([chunk.pixels.numpy() for chunk in chunks])
    indices = [int(i) for chunk in chunks for i in chunk.indices]
    warnings = [*found.warnings, *(text for chunk in chunks for text in chunk.warnings)]
    assert any(
        text.startswith(("broken_clip:", "short_video:", "damaged_clip:")) for text in warnings
    ), f"{warnings}, frames {indices} of a clip with CRC {crc32(path.read_bytes()):08x}"
    assert sorted(set(indices)) == indices
    assert min(count, found.frame_count) == chunks[-1].asked == chunks[-1].total
    assert len(indices) >= (18 if count == 300 else 6)
    good = [row for row, index in enumerate(indices) if index < 12]
    assert [indices[row] for row in good] == [number_of(pixels[row]) for row in good]
    shown = {round(frame.time_s, 6): frame.pixels for frame in decode_all(path)}
    for row, index in enumerate(indices):
        np.testing.assert_array_equal(shown[round(float(found.times_s[index]), 6)], pixels[row])


def test_a_frame_that_does_not_decode_is_replaced_by_its_nearest_neighbour(tmp_path: Path):
    """Counted, warned of, never a neighbour that is already in, and each with its own time."""
    ending, make = BROKEN["overwritten in the middle"]
    found = probe(make(tmp_path / f"clip.{ending}"), SETTINGS)

    chunks = list(PyavDecoder().decode([Clip(found, Sampling(max_frames=8))]))

    indices = [int(i) for chunk in chunks for i in chunk.indices]
    asked = [3, 9, 15, 21, 27, 33, 39, 45]
    stand_ins = [index for index in indices if index not in asked]
    assert len(stand_ins) == sum(chunk.replaced for chunk in chunks) > 0
    for index in stand_ins:
        near = min(asked, key=lambda wanted: abs(wanted - index))
        assert near not in indices
    assert found.times_s[indices].tolist() == np.concatenate([c.times_s for c in chunks]).tolist()


def test_a_smeared_frame_is_not_taken_for_whole(tmp_path: Path):
    """The decoder paints over the hole and says so; its neighbour stands in."""
    ending, make = BROKEN["smeared"]
    found = probe(make(tmp_path / f"clip.{ending}"), SETTINGS)
    span = Span(start_ms=SMEARED * 40 - 100, end_ms=SMEARED * 40 + 140)

    (chunk,) = PyavDecoder().decode([Clip(found, Sampling(max_frames=1, spans=(span,)))])

    assert [SMEARED] == plan(chunk.clip).tolist()
    assert [SMEARED - 1] == chunk.indices.tolist() == [number_of(chunk.pixels[0])]
    assert 1 == chunk.replaced
    assert chunk.warnings[-1].startswith("replaced_frames: 1")


def test_a_clip_of_which_nothing_decodes_is_corrupt(tmp_path: Path):
    """The first frame was whole when the file was probed; then the disk was not."""
    path = make_clip(tmp_path / "clip.mp4", 24, container_options={"movflags": "faststart"})
    clip = Clip(probe(path, SETTINGS), Sampling(max_frames=6))
    data = path.read_bytes()
    body = data.index(b"mdat") + 4
    path.write_bytes(data[:body] + bytes(len(data) - body))

    with pytest.raises(CorruptMedia, match="none of the 6 frames"):
        list(PyavDecoder().decode([clip]))


@pytest.mark.parametrize("ending", ["mp4", "mkv", "ts", "avi"])
def test_flipped_bits_end_in_frames_or_in_a_named_error(tmp_path: Path, ending: str):
    """Forty files of each container: nothing else is ever raised, nothing stays open."""
    codec = "mpeg4" if ending == "avi" else "libx264"
    good = make_clip(tmp_path / f"clip.{ending}", 16, codec=codec, quality=25).read_bytes()
    bad = tmp_path / f"bad.{ending}"
    before, ends = open_files(), {"frames": 0, "refused": 0}
    strict = Settings(max_width=1920, max_height=1080, max_seconds=600)

    for seed in range(40):
        bad.write_bytes(flipped(good, seed))
        try:
            clip = Clip(probe(bad, strict), Sampling(max_frames=4))
            for chunk in PyavDecoder(threads=1).decode([clip]):
                assert len(chunk) > 0
            ends["frames"] += 1
        except Rejected:
            ends["refused"] += 1

    assert before == open_files()
    assert ends["frames"] > 0


@pytest.mark.parametrize("seed", range(3))
def test_noise_after_a_good_beginning_is_survived(tmp_path: Path, seed: int):
    """A header that opens, then random bytes."""
    rng = np.random.default_rng(seed)
    for ending in ("mkv", "ts", "avi"):
        good = make_clip(tmp_path / f"clip.{ending}", 8, codec="mpeg4").read_bytes()
        bad = tmp_path / f"bad.{ending}"
        noise = rng.integers(0, 256, 20_000, np.uint8).tobytes()
        bad.write_bytes(good[: len(good) // 2] + noise)
        with suppress(Rejected):
            clip = Clip(probe(bad, SETTINGS), Sampling(max_frames=4))
            assert list(PyavDecoder().decode([clip]))


def test_one_flipped_bit_in_a_packets_pid_costs_only_its_picture(tmp_path: Path):
    """PyAV raises IndexError for a packet of a stream that MPEG-TS did not announce."""
    path = make_clip(tmp_path / "clip.ts", 50)
    data = bytearray(path.read_bytes())
    whole = probe(path, SETTINGS)
    video = [at for at in range(0, len(data), 188) if data[at + 1 : at + 3] == b"A\0"]
    data[video[len(video) // 2] + 1] ^= 4  # PID 256 becomes 1280
    path.write_bytes(data)

    found = probe(path, SETTINGS)
    clip = Clip(found, Sampling(mode="uniform", max_frames=10))
    frames = list(PyavDecoder(threads=1).decode([clip]))

    assert found.frame_count >= whole.frame_count - 1
    assert sum(len(part) for part in frames) >= 9


def test_packets_of_unannounced_streams_without_end_are_a_break(tmp_path: Path):
    """A file of nothing else is given up, at once and by name."""
    path = make_clip(tmp_path / "clip.ts", 50)
    data = bytearray(path.read_bytes())
    first = next(at for at in range(0, len(data), 188) if data[at + 1 : at + 3] == b"A\0")
    stray = bytearray(data[first : first + 188])
    stray[1:3] = b"E\0"
    path.write_bytes(bytes(data) + bytes(stray) * 20_000 + bytes(data[188 * 3 :]))

    found = probe(path, SETTINGS)

    assert found.frame_count == 50
    assert [text for text in found.warnings if text.startswith("broken_clip")]


def box(kind: bytes, body: bytes) -> bytes:
    """An MP4 box."""
    return struct.pack(">I", 8 + len(body)) + kind + body


@pytest.mark.parametrize("inside", [b"moof traf", b"traf", b"", b"moov trak"])
def test_a_fragment_cannot_promise_samples_that_the_file_has_no_room_for(
    tmp_path: Path, inside: bytes
):
    """85 million in 1.9 kB took FFmpeg 2.95 GiB; wherever the box is."""
    run = box(b"trun", struct.pack(">II", 0, 85_000_000))
    for kind in reversed(inside.split()):
        run = box(kind, run)
    path = make_clip(tmp_path / "clip.mp4", 12)
    path.write_bytes(path.read_bytes() + run)

    with pytest.raises(CorruptMedia, match="a fragment promises 85000000 samples"):
        probe(path, SETTINGS)


def test_a_run_that_lists_its_samples_needs_room_for_them(tmp_path: Path):
    """Four bytes for each size."""
    run = box(b"trun", struct.pack(">II", 0x200, 11) + bytes(4 * 10))
    path = make_clip(tmp_path / "clip.mp4", 12)
    path.write_bytes(path.read_bytes() + box(b"moof", box(b"traf", run)))

    with pytest.raises(CorruptMedia, match="promises 11 samples and has room for 10"):
        probe(path, SETTINGS)


def test_compact_sample_sizes_are_bounded_too(tmp_path: Path):
    """stz2 is stsz with fewer bits; FFmpeg allocates as much for it."""
    path = make_clip(tmp_path / "clip.mp4", 24)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"stsz" + bytes(8), b"stz2" + struct.pack(">II", 0, 8), 1))
    patch(path, b"stz2", 8, struct.pack(">I", 85_000_000))

    with pytest.raises(CorruptMedia, match="promises 85000000 samples"):
        probe(path, SETTINGS)


def test_fragmented_clips_pass(tmp_path: Path):
    """As cameras, recorders and players write them."""
    options = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
    path = make_clip(tmp_path / "clip.mp4", 48, gop=12, container_options=options)

    assert b"trun" in path.read_bytes()
    assert 48 == probe(path, SETTINGS).frame_count


def test_large_attachments_are_refused(tmp_path: Path):
    """FFmpeg holds them in memory; small ones, such as a font, pass."""
    path = make_clip(tmp_path / "clip.mkv", 12)
    data = path.read_bytes()
    small, large = (
        bytes.fromhex("1941A469") + struct.pack(">Q", 1 << 56 | length) for length in (1000, 2**27)
    )
    path.write_bytes(data + small + bytes(1000))
    assert 12 == probe(path, SETTINGS).frame_count

    with path.open("r+b") as file:
        file.seek(len(data))
        file.write(large)
        file.truncate(len(data) + 12 + 2**27)
    with pytest.raises(CorruptMedia, match="bytes of attachments"):
        probe(path, SETTINGS)


def test_reading_boxes_ends_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """However deep they are nested, and however many there are."""
    path = make_clip(tmp_path / "clip.mp4", 12)
    path.write_bytes(path.read_bytes() + box(b"moov", box(b"free", b"") * 20_000))
    assert 12 == probe(path, SETTINGS).frame_count

    monkeypatch.setattr(containers, "WALK_SECONDS", 0.0)
    with pytest.raises(CorruptMedia, match="boxes took more than 0 s"):
        probe(path, SETTINGS)
    monkeypatch.setattr(containers, "_MOST_BOXES", 10_000)
    monkeypatch.setattr(containers, "WALK_SECONDS", 60.0)
    with pytest.raises(CorruptMedia, match="more than 10000 boxes"):
        probe(path, SETTINGS)
