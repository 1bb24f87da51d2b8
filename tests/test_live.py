"""A live source is cut into playable files, whatever it does on the way."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from ralf.worker.media.live import BadSource, Cutter, Reader, Segment, Source, left_over
from ralf.worker.media.probe import probe
from ralf.worker.settings import Settings
from tests.clips import decode_all, make_clip, number_of, pictures
from tests.waiting import until


def a_reader(given: str, folder: Path, **options) -> tuple[Reader, list[str]]:
    """A reader, and what it says."""
    said: list[str] = []
    cutter = Cutter(
        folder, "live", seconds=options.pop("seconds", 1.0), number=options.pop("number", 0)
    )
    given_or = {"keep": 16, "lag": "wait", "give_up_s": 60.0, "reencode": False, **options}
    return Reader(Source(given), cutter, say=said.append, **given_or), said


def taken(reader: Reader) -> list[Segment]:
    """All segments until the source has ended."""
    found = []
    while True:
        segment = reader.take(0.5)
        if segment is not None:
            found.append(segment)
        elif reader.ended:
            return found


@contextmanager
def sending(*bodies: bytes, hold: threading.Event | None = None) -> Iterator[str]:
    """A server that sends one body to each connection and closes; the last one after `hold`."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        for number, body in enumerate(bodies):
            with suppress(OSError):
                connection, _ = server.accept()
                with connection:
                    connection.sendall(body)
                    if hold is not None and number == len(bodies) - 1:
                        hold.wait(60)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"tcp://127.0.0.1:{server.getsockname()[1]}"
    finally:
        server.close()
        if hold is not None:
            hold.set()


def a_clip(path: Path, count: int = 75, **options) -> Path:
    """25 frames a second, a key frame each second, every frame with its number."""
    return make_clip(path, pictures(count), fps=25, gop=25, **options)


def numbers(path: Path) -> list[int]:
    return [number_of(shown.pixels) for shown in decode_all(path)]


@pytest.mark.parametrize("ending", [".mp4", ".ts"])
def test_a_file_is_cut_at_its_key_frames_without_losing_a_frame(tmp_path, ending):
    """Each segment plays by itself, begins at 0, and is taken by the worker's own probe."""
    clip = a_clip(tmp_path / f"clip{ending}")
    reader, _ = a_reader(str(clip), tmp_path)
    reader.start()
    segments = taken(reader)

    assert [(one.number, one.last) for one in segments] == [(0, False), (1, False), (2, True)]
    assert [one.offset_ms for one in segments] == [0, 1000, 2000]
    assert [n for one in segments for n in numbers(one.path)] == numbers(clip)
    for one in segments:
        probed = probe(one.path, Settings())
        assert probed.frame_count == 25 and probed.codec == "h264"


def test_a_codec_that_cannot_be_copied_is_encoded_anew(tmp_path):
    """A camera's MJPEG becomes H.264."""
    clip = make_clip(tmp_path / "clip.avi", pictures(50), codec="mjpeg", pixel_format="yuvj420p")
    reader, _ = a_reader(str(clip), tmp_path)
    reader.start()
    segments = taken(reader)

    assert len(segments) == 2
    assert {probe(one.path, Settings()).codec for one in segments} == {"h264"}
    assert [n for one in segments for n in numbers(one.path)] == list(range(50))


def test_a_source_that_breaks_off_is_opened_again_and_numbers_go_on(tmp_path):
    """What was read before is judged at once; the clock goes on as the wall's does."""
    body = a_clip(tmp_path / "clip.ts", 50).read_bytes()
    hold = threading.Event()
    with sending(body, body, hold=hold) as url:
        reader, said = a_reader(url, tmp_path)
        reader.start()
        found: list[Segment] = []
        until(lambda: ((one := reader.take(0.2)) and found.append(one)) or len(found) >= 3)
        reader.stopping = True
        hold.set()
        found += taken(reader)

    assert [one.number for one in found] == [0, 1, 2, 3]
    assert [one.last for one in found] == [False, False, False, True]
    assert found[2].offset_ms >= 2000
    assert any("opened again in 1 s" in line for line in said)
    assert all(len(numbers(one.path)) == 25 for one in found[:3])


def test_the_oldest_segments_are_dropped_when_nobody_takes_them(tmp_path):
    """So the disk holds a bounded part of the stream; it is said."""
    clip = a_clip(tmp_path / "clip.mp4", 150)
    folder = tmp_path / "segments"
    folder.mkdir()
    reader, said = a_reader(str(clip), folder, keep=2, lag="drop")
    reader.start()
    until(lambda: reader.ended)
    left = taken(reader)

    assert [one.number for one in left] == [4, 5]
    assert (reader.dropped, len(said)) == (4, 4)
    assert sorted(folder.iterdir()) == [one.path for one in left]


def test_a_file_waits_for_who_takes_its_segments(tmp_path):
    """Nothing is dropped."""
    folder = tmp_path / "segments"
    folder.mkdir()
    reader, _ = a_reader(str(a_clip(tmp_path / "clip.mp4", 150)), folder, keep=2)
    reader.start()
    until(lambda: len(list(folder.glob("live-*.mp4"))) >= 2)

    assert [one.number for one in taken(reader)] == list(range(6))
    assert reader.dropped == 0


def test_segments_that_a_killed_process_left_come_first(tmp_path):
    """Whole ones with their number and clock; a half-written one is removed."""
    (tmp_path / "live-00000007-42000.mp4").write_bytes(b"x")
    (tmp_path / ".live-00000008.part").write_bytes(b"x")

    assert left_over(tmp_path, "live") == [Segment(7, 42_000, tmp_path / "live-00000007-42000.mp4")]
    assert [path.name for path in tmp_path.iterdir()] == ["live-00000007-42000.mp4"]


def test_a_source_without_key_frames_says_what_to_do(tmp_path):
    """A segment must not grow for ever."""
    clip = make_clip(tmp_path / "clip.mp4", pictures(100), fps=25, gop=1000)
    reader, _ = a_reader(str(clip), tmp_path, seconds=0.5)
    reader.start()
    segments = taken(reader)
    assert "use --reencode" in reader.error
    assert len(segments) == 1

    again = tmp_path / "again"
    again.mkdir()
    reader, _ = a_reader(str(clip), again, seconds=0.5, reencode=True)
    reader.start()
    assert [n for one in taken(reader) for n in numbers(one.path)] == list(range(100))
    assert reader.error == ""


@pytest.mark.parametrize("given", ["concat:/etc/passwd|/etc/hosts", "subfile://x", "ftp://host/x"])
def test_other_protocols_are_refused(given, tmp_path):
    """By the address itself, or as a path that does not exist."""
    with pytest.raises((BadSource, OSError, ValueError)):
        Source(given).open()


def test_a_playlist_from_the_network_cannot_name_a_local_file(tmp_path):
    """FFmpeg's own list of protocols is set."""
    secret = a_clip(tmp_path / "secret.ts", 25)
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{secret}\n#EXT-X-ENDLIST\n"
    head = b"HTTP/1.0 200 OK\r\nContent-Type: application/vnd.apple.mpegurl\r\n\r\n"
    with sending(head + playlist.encode()) as url:
        with pytest.raises((OSError, ValueError)):
            Source(url.replace("tcp://", "http://") + "/x.m3u8").open()
