"""DALI's decoder against PyAV's, one body for both, on clips that DALI's CPU backend reads."""

import threading
import weakref
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from ralf.worker.contract import Sampling, Span
from ralf.worker.errors import BadRequest, CorruptMedia
from ralf.worker.media import decode_dali
from ralf.worker.media.decode_dali import DaliDecoder, FrameRequest, reason, upright
from ralf.worker.media.decode_pyav import PyavDecoder, range_in_stream
from ralf.worker.media.probe import probe
from ralf.worker.media.sampling import plan
from ralf.worker.media.types import Clip, Decoder, Frames
from ralf.worker.settings import Settings
from tests.clips import decode_all, make_clip, number_of, packet_places
from tests.test_decode_pyav import reference
from tests.test_probe import UNEVEN

pytestmark = pytest.mark.dali
EVERY = Sampling(max_frames=300)
VP9 = {"codec": "libvpx-vp9"}


def clip_of(path: Path, sampling: Sampling = EVERY) -> Clip:
    return Clip(probe(path, Settings()), sampling)


def dali(chunk_bytes: int = 2**28, **options: int) -> DaliDecoder:
    fallback = PyavDecoder(chunk_bytes=max(1, chunk_bytes), threads=1)
    return DaliDecoder(fallback, device="cpu", chunk_bytes=chunk_bytes, **options)


def decoders(chunk_bytes: int = 2**28) -> list[Decoder]:
    return [PyavDecoder(chunk_bytes=chunk_bytes, threads=1), dali(chunk_bytes)]


def pixels_of(chunks: Sequence[Frames]) -> np.ndarray:
    return np.concatenate([chunk.pixels.numpy() for chunk in chunks]).astype(int)


def indices_of(chunks: Sequence[Frames]) -> list[int]:
    return [int(index) for chunk in chunks for index in chunk.indices]


def texts_of(chunks: Sequence[Frames]) -> list[str]:
    return [text for chunk in chunks for text in chunk.warnings]


KINDS: dict[str, tuple[str, dict, int, bool, float]] = {
    "BT.601": ("webm", {"matrix": "bt601"}, 0, False, 0.0),
    "untagged": ("webm", {}, 0, False, 0.0),
    "BT.709": ("webm", {"matrix": "bt709"}, 0, False, 0.3),
    "BT.709 in MP4": ("mp4", {"matrix": "bt709"}, 0, False, 0.3),
    "BT.2020": ("mkv", {"matrix": "bt2020"}, 0, False, 0.3),
    "SMPTE 240M": ("webm", {"matrix": "smpte240m"}, 0, False, 0.3),
    "BT.601, full range": ("webm", {"matrix": "bt601", "full_range": True}, 0, False, 0.0),
    "BT.709, full range": ("webm", {"matrix": "bt709", "full_range": True}, 0, False, 0.3),
    "rotated 90": ("mp4", {"rotation": 90}, 1, False, 0.0),
    "rotated 180": ("mp4", {"rotation": 180}, 2, False, 0.0),
    "rotated 270, BT.709": ("mp4", {"rotation": 270, "matrix": "bt709"}, 3, False, 0.3),
    "mirrored": ("mp4", {"hflip": True}, 0, True, 0.0),
    "upside down in a mirror": ("mp4", {"vflip": True}, 2, True, 0.0),
    "variable rate": ("mkv", {"pts": UNEVEN, "time_base": Fraction(1, 1000)}, 0, False, 0.0),
    "odd sides": ("webm", {"size": (97, 65), "exact": False}, 0, False, 0.01),
    "late start": ("mp4", {"shift": 5}, 0, False, 0.0),
    "edit list": ("mp4", {"shift": -5}, 0, False, 0.0),
    "MJPEG": ("avi", {"codec": "mjpeg", "pixel_format": "yuvj420p"}, 0, False, 0.0),
}
"""Container, how it is made, turns, mirrored, and how far DALI's pixels may lie off on average.

Where no matrix is corrected DALI's CPU backend gives PyAV's very bits.  The correction works on
values that were rounded once already, and rounds again: 0.23 levels, 3 at most.
"""
TAKEN = {name for name in KINDS if name != "edit list"}


@pytest.mark.parametrize("name", KINDS)
def test_both_decoders_give_the_reference_decoders_pictures(tmp_path: Path, name: str):
    """Every frame, then a few in small chunks: the same indices, times and pictures."""
    ending, made, turns, mirrored, off = KINDS[name]
    path = make_clip(tmp_path / f"clip.{ending}", 24, **{**VP9, **made})
    expected = reference(path, turns, mirrored).astype(int)
    few_of = clip_of(path, Sampling(max_frames=5))
    small = 2 * expected[0].size

    for decoder, most in zip(decoders(), (min(off, 0.01), off), strict=True):
        every = list(decoder.decode([clip_of(path)]))
        assert list(range(len(expected))) == indices_of(every)
        assert most >= np.abs(expected - pixels_of(every)).mean()
        assert {decoder.name if name in TAKEN else "pyav"} == {part.decoder for part in every}
        assert [] == texts_of(every)
    for decoder, most in zip(decoders(small), (min(off, 0.01), off), strict=True):
        few = list(decoder.decode([few_of]))
        assert plan(few_of).tolist() == indices_of(few)
        assert most >= np.abs(expected[indices_of(few)] - pixels_of(few)).mean()
        assert [2, 2, 1] == [len(part) for part in few]
        assert [2, 4, 5] == [part.asked for part in few] and {5} == {part.total for part in few}
        times = np.concatenate([part.times_s for part in few])
        np.testing.assert_array_equal(few_of.probe.times_s[plan(few_of)], times)


def test_the_matrix_is_what_makes_the_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Uncorrected, BT.709 read as BT.601 is off by more than two levels."""
    path = make_clip(tmp_path / "clip.webm", 4, **VP9, matrix="bt709")
    monkeypatch.setattr(decode_dali, "from_bt601", lambda space: None)

    wrong = pixels_of(list(dali().decode([clip_of(path)])))

    assert 2 < np.abs(reference(path).astype(int) - wrong).mean()


def test_any_sampling_gives_the_frames_that_pyav_gives(tmp_path: Path):
    """Variable rate, several keyframe groups; modes, spans and chunk sizes at random."""
    steps = np.random.default_rng(3).integers(5, 120, 59)
    path = make_clip(
        tmp_path / "clip.mkv",
        60,
        **VP9,
        pts=[0, *np.cumsum(steps).tolist()],
        time_base=Fraction(1, 1000),
        gop=13,
    )
    random = np.random.default_rng(4)
    for mode in ("uniform", "keyframes", "uniform", "fps", "uniform", "fps"):
        spans = tuple(
            Span(start_ms=int(start), end_ms=int(start) + 900)
            for start in random.integers(0, 2000, int(random.integers(0, 3)))
        )
        fps = float(random.uniform(1, 30)) if mode == "fps" else None
        most = int(random.integers(1, 40))
        clip = clip_of(path, Sampling(mode=mode, max_frames=most, fps=fps, spans=spans))
        one, other = (
            list(each.decode([clip])) for each in decoders(int(random.integers(1, 9)) * 96 * 64 * 3)
        )
        assert plan(clip).tolist() == indices_of(one) == indices_of(other)
        np.testing.assert_array_equal(pixels_of(one), pixels_of(other))
        assert indices_of(other) == [number_of(image) for image in pixels_of(other)]


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Six clips of six sizes and lengths."""
    folder = tmp_path_factory.mktemp("several")
    return [
        make_clip(folder / f"{n}.webm", 6 + 3 * n, **VP9, size=(96 + 16 * n, 64 + 8 * n), gop=5)
        for n in range(6)
    ]


def damaged(path: Path, good: Path) -> Path:
    """Noise in place of two pictures in the middle."""
    data = bytearray(good.read_bytes())
    noise = np.random.default_rng(0)
    for start, length in packet_places(good)[7:9]:
        data[start : start + length] = noise.integers(0, 256, length, np.uint8).tobytes()
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("at_once", [1, 4])
def test_clips_of_one_batch_come_out_as_each_alone(several: list[Path], at_once: int):
    """Sizes and lengths differ; chunks of one clip keep their order."""
    clips = [clip_of(path) for path in several]
    decoder = dali(5 * 96 * 64 * 3, clips_at_once=at_once)

    together = list(decoder.decode(clips))

    for clip, path in zip(clips, several, strict=True):
        mine = [part for part in together if part.clip is clip]
        expected = reference(path).astype(int)
        assert list(range(len(expected))) == indices_of(mine)
        np.testing.assert_array_equal(expected, pixels_of(mine))
        assert len(expected) == mine[-1].asked == mine[-1].total


def test_a_damaged_clip_fails_none_of_its_batch(
    tmp_path: Path, several: list[Path], monkeypatch: pytest.MonkeyPatch
):
    """Its batch is tried clip by clip until it is found; PyAV decodes it, with its own warnings,
    and the fact is told."""
    bad = clip_of(damaged(tmp_path / "bad.webm", several[4]))
    clips = [clip_of(path) for path in several[:4]]
    clips.insert(2, bad)
    sizes: list[int] = []
    run = DaliDecoder._run
    monkeypatch.setattr(DaliDecoder, "_run", lambda self, o: sizes.append(len(o)) or run(self, o))

    together = list(dali().decode(clips))

    assert [5, 1, 1, 1, 2] == sizes
    mine = [part for part in together if part.clip is bad]
    others = [part for part in together if part.clip is not bad]
    alone = list(PyavDecoder(threads=1).decode([bad]))
    assert {"pyav"} == {part.decoder for part in mine} and {"dali"} == {p.decoder for p in others}
    np.testing.assert_array_equal(pixels_of(alone), pixels_of(mine))
    assert ["decoder", *(t.split(":")[0] for t in texts_of(alone))] == [
        text.split(":")[0] for text in texts_of(mine)
    ]
    assert "DALI could not decode it" in texts_of(mine)[0] and "PyAV did" in texts_of(mine)[0]
    assert [] == texts_of(others)
    for part in others:
        expected = reference(Path(part.clip.probe.path)).astype(int)
        np.testing.assert_array_equal(expected, pixels_of([part]))


def built(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each pipeline that is built from now on."""
    made: list[int] = []
    build = DaliDecoder._built
    monkeypatch.setattr(DaliDecoder, "_built", lambda self: made.append(1) or build(self))
    return made


def test_a_bad_clip_among_ones_that_decoded_before_costs_one_pipeline(
    tmp_path: Path, several: list[Path], monkeypatch: pytest.MonkeyPatch
):
    """The others decode one by one, so nobody has to try it again."""
    decoder, requests = dali(), []
    bad = damaged(tmp_path / "bad.webm", several[4])
    for path in (bad, *several[:3]):
        found, data = probe(path, Settings()), np.fromfile(path, np.uint8)
        wanted = np.arange(5, 9) if path == bad else np.arange(3)
        requests.append(FrameRequest(found, data, wanted, known=path != bad))
    made = built(monkeypatch)

    decoder._queue.ask(requests)

    assert 2 == len(made)  # the first of all, and one after the failure
    assert [True, False, False, False] == [bool(request.error) for request in requests]
    assert all(request.pixels is not None for request in requests[1:])


def test_a_file_that_failed_once_goes_to_pyav_at_once(
    tmp_path: Path, several: list[Path], monkeypatch: pytest.MonkeyPatch
):
    """In the second pass and in a retry, under another name too; its neighbours stay with DALI."""
    bad = damaged(tmp_path / "bad.webm", several[4])
    decoder = dali()
    first = list(decoder.decode([clip_of(bad)]))
    copied = tmp_path / "again.webm"
    copied.write_bytes(bad.read_bytes())
    made = built(monkeypatch)
    again = list(decoder.halved().decode([clip_of(copied), clip_of(several[0])]))

    assert 1 == len(made)  # for the neighbour, since the failure broke the one before
    assert ["pyav", "dali"] == sorted({part.decoder for part in again}, reverse=True)
    told = [text for text in texts_of(first) if text.startswith("decoder:")]
    assert told == [text for text in texts_of(again) if text.startswith("decoder:")]


def test_a_files_bytes_are_let_go_before_pyav_decodes(
    several: list[Path], monkeypatch: pytest.MonkeyPatch
):
    """PyAV reads the file itself, perhaps for minutes, and the upload may have half a gigabyte."""
    held: list[weakref.ref[np.ndarray]] = []
    alive: list[bool] = []
    read, frames = np.fromfile, PyavDecoder.frames

    def reading(path: str, kind: type) -> np.ndarray:
        data = read(path, kind)
        held.append(weakref.ref(data))
        return data

    def decoding(self: PyavDecoder, *more: object, **options: object) -> Iterator[Frames]:
        alive.append(held[0]() is not None)
        yield from frames(self, *more, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(np, "fromfile", reading)
    monkeypatch.setattr(PyavDecoder, "frames", decoding)
    monkeypatch.setattr(DaliDecoder, "_tried", lambda self, requests: "it is refused")

    assert {"pyav"} == {part.decoder for part in dali().decode([clip_of(several[0])])}
    assert [False] == alive


def test_a_file_that_another_demuxer_may_claim_never_reaches_dali(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """PyAV is told that it is mov; DALI would ask all of FFmpeg's demuxers, as sdp's here."""
    good = make_clip(tmp_path / "good.mp4", 6, **VP9)
    lines = b"\nv=0\nc=IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\n" * 4
    crafted = tmp_path / "crafted.mp4"
    crafted.write_bytes(moved_by(good, (8 + len(lines)).to_bytes(4) + b"free" + lines))
    monkeypatch.setattr(DaliDecoder, "_run", lambda self, requests: pytest.fail("DALI was asked"))

    parts = list(dali().decode([clip_of(crafted)]))

    assert {"pyav"} == {part.decoder for part in parts}
    assert list(range(6)) == indices_of(parts)


def moved_by(path: Path, before: bytes) -> bytes:
    """An MP4 with bytes before it, and its chunks' places corrected."""
    data = path.read_bytes()
    at = data.index(b"stco") + 4
    entries = int.from_bytes(data[at + 4 : at + 8], "big")
    for place in range(at + 8, at + 8 + 4 * entries, 4):
        moved = int.from_bytes(data[place : place + 4], "big") + len(before)
        data = data[:place] + moved.to_bytes(4) + data[place + 4 :]
    return before + data


def test_damage_found_late_leaves_the_chunks_that_went_out(tmp_path: Path, several: list[Path]):
    """PyAV takes over at the frame that DALI could not reach; none is told twice or left out."""
    bad = clip_of(damaged(tmp_path / "bad.webm", several[5]))
    frame = bad.probe.width * bad.probe.height * 3

    parts = list(dali(3 * frame).decode([bad]))

    assert "dali" == parts[0].decoder and "pyav" == parts[-1].decoder
    alone = list(PyavDecoder(threads=1).decode([bad]))
    assert indices_of(alone) == indices_of(parts)
    np.testing.assert_array_equal(pixels_of(alone), pixels_of(parts))
    asked = [part.asked for part in parts]
    assert sorted(asked) == asked and alone[-1].asked == asked[-1] == parts[-1].total
    assert 1 == sum(text.startswith("decoder:") for text in texts_of(parts)[:1])


def test_a_truncated_clip_gives_what_pyav_gives(tmp_path: Path, several: list[Path]):
    """Cut in the middle of a picture."""
    data = several[5].read_bytes()
    path = tmp_path / "cut.webm"
    path.write_bytes(data[: len(data) * 2 // 3])
    clip = clip_of(path)

    one, other = (list(each.decode([clip])) for each in decoders())

    assert 3 < len(indices_of(one)) < 21
    assert indices_of(one) == indices_of(other)
    np.testing.assert_array_equal(pixels_of(one), pixels_of(other))


def test_a_clip_of_which_nothing_decodes_fails_after_its_neighbours(
    tmp_path: Path, several: list[Path]
):
    """For both decoders: its error comes last, the others' frames before it."""
    gone = make_clip(tmp_path / "gone.webm", 6, **VP9)
    lost = clip_of(gone)
    data = bytearray(gone.read_bytes())
    for start, length in packet_places(gone):
        data[start : start + length] = bytes(length)
    gone.write_bytes(data)
    clips = [clip_of(several[0]), lost, clip_of(several[1])]

    for decoder in decoders():
        parts: list[Frames] = []
        with pytest.raises(CorruptMedia):
            collect(decoder, clips, parts)
        assert {6, 9} == {len(part) for part in parts}


def collect(decoder: Decoder, clips: list[Clip], parts: list[Frames]) -> None:
    for part in decoder.decode(clips):
        parts.append(part)  # noqa: PERF402 - what came before the error is wanted


def test_a_bad_request_fails_only_its_own_clip(several: list[Path]):
    """A span past the end is found by the plan."""
    late = clip_of(several[0], Sampling(spans=(Span(start_ms=60_000, end_ms=61_000),)))
    parts: list[Frames] = []

    with pytest.raises(BadRequest):
        collect(dali(), [late, clip_of(several[1])], parts)

    assert [9] == [len(part) for part in parts]


def test_threads_that_ask_meanwhile_share_the_next_batch(
    several: list[Path], monkeypatch: pytest.MonkeyPatch
):
    """The first thread decodes alone; those that come while it does go together, right after."""
    decoder, sizes = dali(), []
    first, others_wait = threading.Event(), threading.Event()
    run = DaliDecoder._run

    def slow(self: DaliDecoder, requests: list) -> list:
        sizes.append(len(requests))
        if len(sizes) == 1:
            first.set()
            assert others_wait.wait(60)
        return run(self, requests)

    monkeypatch.setattr(DaliDecoder, "_run", slow)
    found: dict[int, np.ndarray] = {}

    def walk(n: int) -> None:
        found[n] = pixels_of(list(decoder.decode([clip_of(several[n])])))

    threads = [threading.Thread(target=walk, args=(n,)) for n in range(6)]
    threads[0].start()
    assert first.wait(60)
    for thread in threads[1:]:
        thread.start()
    while len(decoder._queue.waiting) < 5:
        assert threads[0].is_alive()
    others_wait.set()
    for thread in threads:
        thread.join(60)

    assert [1, 5] == sizes
    for n, path in enumerate(several):
        np.testing.assert_array_equal(reference(path).astype(int), found[n])


def test_a_batch_that_is_given_up_leaves_nobody_waiting(
    several: list[Path], monkeypatch: pytest.MonkeyPatch
):
    """What is not DALI's own error passes through; the decoder works on."""
    decoder = dali()
    with monkeypatch.context() as patch:
        patch.setattr(DaliDecoder, "_decoded", lambda self, requests: 1 / 0)
        decoder._queue.decode = decoder._decoded
        with pytest.raises(ZeroDivisionError):
            next(decoder.decode([clip_of(several[0])]))
    decoder._queue.decode = decoder._decoded

    assert 6 == len(indices_of(list(decoder.decode([clip_of(several[0])]))))
    assert not decoder._queue.shared.busy


def test_a_batch_holds_only_so_many_clips_and_bytes(several: list[Path]):
    """A long clip queues for each of its chunks; one request always goes."""
    decoder = dali()
    queue = decoder._queue
    found = clip_of(several[0]).probe
    frame = found.width * found.height * 3
    queue.most, queue.most_bytes = 3, 10 * frame
    for count in (40, 4, 6, 1, 1, 1, 1):
        queue.waiting.append(FrameRequest(found, np.zeros(1, np.uint8), np.arange(count)))

    taken = []
    while queue.waiting:
        taken.append([len(one.wanted) for one in queue._take()])

    assert [[40], [4, 6], [1, 1, 1], [1]] == taken


def test_pictures_of_another_size_than_the_probes_are_not_believed(
    several: list[Path], monkeypatch: pytest.MonkeyPatch
):
    """The container may tell DALI one size, and the pictures have another."""
    monkeypatch.setattr(
        DaliDecoder, "_run", lambda self, requests: [torch.zeros((6, 8, 8, 3), dtype=torch.uint8)]
    )

    parts = list(dali().decode([clip_of(several[0])]))

    assert {"pyav"} == {part.decoder for part in parts}
    assert "it gave pictures of (8, 8)" in texts_of(parts)[0]


def test_colours_are_corrected_in_passes_as_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """A pass is bounded, so that FP32 copies stay small beside the frames."""
    clip = clip_of(make_clip(tmp_path / "clip.mp4", 7, **VP9, matrix="bt709", rotation=90))
    pixels = torch.randint(0, 256, (7, 64, 96, 3), dtype=torch.uint8)
    at_once = upright(pixels, clip.probe)
    monkeypatch.setattr(decode_dali, "PIXELS_A_PASS", 2 * 96 * 64)

    assert torch.equal(at_once, upright(pixels, clip.probe))


def test_the_bitstreams_own_range_is_told_from_the_containers(tmp_path: Path):
    """H.264 writes it beside the container; VP9 in its own header."""
    full = clip_of(make_clip(tmp_path / "f.mp4", 3, matrix="bt709", full_range=True)).probe
    limited = clip_of(make_clip(tmp_path / "l.mp4", 3, matrix="bt709")).probe
    plain = clip_of(make_clip(tmp_path / "p.mp4", 3)).probe

    assert ["pc", "tv", "tv"] == [range_in_stream(each) for each in (full, limited, plain)]


def test_the_reason_is_one_short_line():
    """DALI's messages are a page, with paths of its build in it."""
    message = (
        "Critical error\nTraceback\n  File x\n\nencountered:\n\nAssert failed: bad video\nC++ …"
    )

    assert "Assert failed: bad video" == reason(RuntimeError(message))
    assert "MemoryError" == reason(MemoryError())
    assert 160 == len(reason(RuntimeError("encountered:\n" + "x" * 500)))


def test_nonsense_is_refused():
    """A chunk of no bytes holds no frame."""
    with pytest.raises(ValueError, match="positive"):
        dali(0)


def test_every_frame_of_the_reference_is_told_apart(several: list[Path]):
    """The oracle itself: its frames carry their numbers."""
    numbers = [number_of(shown.pixels) for shown in decode_all(several[3])]

    assert list(range(15)) == numbers
