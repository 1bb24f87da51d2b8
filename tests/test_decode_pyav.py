"""The CPU decoder, frame for frame against a plain one, and against the pictures encoded."""

import gc
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ralf.worker.contract import Sampling, Span
from ralf.worker.errors import BadRequest
from ralf.worker.media import decode_pyav
from ralf.worker.media.decode_pyav import PyavDecoder, plan
from ralf.worker.media.probe import probe
from ralf.worker.media.types import Clip, Frames
from ralf.worker.settings import Settings
from tests.clips import Shown, decode_all, make_clip, number_of, picture
from tests.hostile import with_hidden_frames
from tests.test_probe import UNEVEN, open_files

EVERY = Sampling(max_frames=300)
OPEN_GOP = "keyint=12:min-keyint=12:open-gop=1:bframes=3:b-adapt=0:scenecut=0"


def clip_of(path: Path, sampling: Sampling = EVERY) -> Clip:
    return Clip(probe(path, Settings()), sampling)


def decoded(clip: Clip, **options: Any) -> list[Frames]:
    return list(PyavDecoder(**options).decode([clip]))


def pixels_of(chunks: list[Frames]) -> np.ndarray:
    return np.concatenate([chunk.pixels.numpy() for chunk in chunks])


def indices_of(chunks: list[Frames]) -> list[int]:
    return [int(index) for chunk in chunks for index in chunk.indices]


def reference(path: Path, turns: int = 0, mirrored: bool = False) -> np.ndarray:
    """Every frame of the plain decoder, turned counter-clockwise by quarters."""
    frames = np.stack([frame.pixels for frame in decode_all(path)])
    frames = np.rot90(frames, turns, axes=(2, 3))
    return frames[..., ::-1] if mirrored else frames


UNUSUAL: dict[str, tuple[str, dict, int, bool]] = {
    "plain": ("mp4", {}, 0, False),
    "rotated 90": ("mp4", {"rotation": 90}, 1, False),
    "rotated 180": ("mov", {"rotation": 180}, 2, False),
    "rotated 270": ("mp4", {"rotation": 270}, 3, False),
    "mirrored": ("mp4", {"hflip": True}, 0, True),
    "upside down in a mirror": ("mp4", {"vflip": True}, 2, True),
    "variable rate": ("mkv", {"pts": UNEVEN, "time_base": Fraction(1, 1000)}, 0, False),
    "10-bit": ("mp4", {"pixel_format": "yuv420p10le"}, 0, False),
    "10-bit HEVC": ("mkv", {"codec": "libx265", "pixel_format": "yuv420p10le"}, 0, False),
    "4:2:2": ("mp4", {"pixel_format": "yuv422p"}, 0, False),
    "10-bit 4:2:2": ("mov", {"pixel_format": "yuv422p10le"}, 0, False),
    "4:4:4": ("mp4", {"pixel_format": "yuv444p"}, 0, False),
    "interlaced": ("mp4", {"interlaced": True}, 0, False),
    "edit list in the middle of a group": ("mp4", {"shift": -5}, 0, False),
    "edit list that hides the only keyframe": ("mp4", {"shift": -5, "gop": 50}, 0, False),
    "negative start": ("mkv", {"shift": -5}, 0, False),
    "several streams": ("mkv", {"others": 3, "audio": True}, 0, False),
    "wrong extension": ("jpg", {"container": "mp4"}, 0, False),
    "transport stream": ("ts", {}, 0, False),
    "transport stream that starts late": ("ts", {"shift": 1000}, 0, False),
    "fragments": (
        "mp4",
        {"container_options": {"movflags": "frag_keyframe+empty_moov"}},
        0,
        False,
    ),
    "B-pyramid": ("mp4", {"b_frames": 7, "gop": 24}, 0, False),
    "open groups": ("mp4", {"options": {"x264-params": OPEN_GOP}}, 0, False),
    "open groups of HEVC": (
        "mp4",
        {"codec": "libx265", "options": {"x265-params": f"log-level=none:pools=1:{OPEN_GOP}"}},
        0,
        False,
    ),
    "B-frames in AVI": ("avi", {"codec": "mpeg4"}, 0, False),
    "B-frames of H.264 in AVI": ("avi", {}, 0, False),
    "VP8": ("webm", {"codec": "libvpx"}, 0, False),
    "VP9": ("webm", {"codec": "libvpx-vp9"}, 0, False),
    "AV1": ("mp4", {"codec": "libsvtav1"}, 0, False),
    "MJPEG": ("avi", {"codec": "mjpeg", "pixel_format": "yuvj420p"}, 0, False),
    "odd sides": ("mkv", {"size": (97, 65), "pixel_format": "yuv444p"}, 0, False),
}


@pytest.mark.parametrize("name", UNUSUAL)
@pytest.mark.parametrize("threads", [1, 3])
def test_unusual_clips_come_out_as_the_reference_decodes_them(
    tmp_path: Path, name: str, threads: int, monkeypatch: pytest.MonkeyPatch
):
    """Every frame, bit for bit, then a few, each of which must be the same picture again; and
    without the second, exact reading, which is for damaged clips."""
    monkeypatch.setattr(decode_pyav._Reader, "_exact", None)
    ending, made, turns, mirrored = UNUSUAL[name]
    path = make_clip(tmp_path / f"clip.{ending}", 24, **made)
    expected = reference(path, turns, mirrored)

    every = decoded(clip_of(path), threads=threads)
    few = decoded(clip_of(path, Sampling(max_frames=5)), threads=threads)

    assert list(range(len(expected))) == indices_of(every)
    assert 5 == len(indices_of(few))
    np.testing.assert_array_equal(expected, pixels_of(every))
    np.testing.assert_array_equal(expected[indices_of(few)], pixels_of(few))
    assert 0 == sum(chunk.replaced for chunk in every + few)
    assert [] == [text for chunk in every + few for text in chunk.warnings]


def test_hidden_reference_frames_are_decoded_though_never_shown(tmp_path: Path):
    """What leans on them is right only then."""
    path = with_hidden_frames(tmp_path / "clip.webm")
    expected = reference(path)

    few = decoded(clip_of(path, Sampling(max_frames=4)))

    np.testing.assert_array_equal(expected, pixels_of(decoded(clip_of(path))))
    np.testing.assert_array_equal(expected[indices_of(few)], pixels_of(few))


@pytest.mark.parametrize("matrix", ["untagged", "bt601", "bt709", "bt2020", "smpte240m"])
@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv444p", "yuv422p10le"])
def test_colours_are_those_that_were_encoded(
    tmp_path: Path, matrix: str, full_range: bool, pixel_format: str
):
    """RGB to YUV by the textbook, through an encoder, and back by the product: by tag, and
    untagged as BT.601 limited.  A wrong matrix is off by 10 levels here, a wrong range by 15."""
    colours = np.random.default_rng(0).integers(40, 216, (6, 3))
    image = np.zeros((64, 96, 3), np.uint8)
    for place, colour in enumerate(colours):
        image[32 * (place // 3) :][:32, 32 * (place % 3) :][:, :32] = colour
    path = make_clip(
        tmp_path / "clip.mp4",
        [image] * 2,
        matrix=matrix,
        full_range=full_range,
        pixel_format=pixel_format,
        quality=4,
    )

    out = pixels_of(decoded(clip_of(path)))[1].transpose(1, 2, 0).astype(int)

    middles = out[8:24, 8:24].mean((0, 1)), out[40:56, 72:88].mean((0, 1))
    assert 3 > np.abs(middles[0] - colours[0]).max()
    assert 3 > np.abs(middles[1] - colours[5]).max()


def test_hd_without_a_tag_is_still_bt601(tmp_path: Path):
    """The policy does not guess from the picture's size."""
    image = np.full((720, 1280, 3), (200, 60, 60), np.uint8)
    path = make_clip(tmp_path / "clip.mp4", [image] * 2)

    middle = pixels_of(decoded(clip_of(path)))[0, :, 300, 600].astype(int)

    assert 3 > np.abs(middle - (200, 60, 60)).max()


def test_a_picture_that_changes_its_size_is_brought_to_the_first(tmp_path: Path):
    """WebRTC recordings do; a chunk has one size."""
    small = make_clip(tmp_path / "small.ts", 12, codec="libx264", b_frames=0).read_bytes()
    large = make_clip(
        tmp_path / "large.ts", [picture(n, 192, 128) for n in range(12, 24)], b_frames=0, shift=12
    )
    path = tmp_path / "clip.ts"
    path.write_bytes(small + large.read_bytes())

    chunks = decoded(clip_of(path))

    assert (64, 96) == pixels_of(chunks).shape[2:]
    assert 20 < len(indices_of(chunks))


@pytest.fixture(scope="module")
def long_clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Shown]]:
    """Variable rate, B-pyramid, uneven groups: 120 numbered frames and what they look like."""
    path = tmp_path_factory.mktemp("clips") / "clip.mkv"
    steps = np.random.default_rng(1).integers(5, 120, 119)
    make_clip(
        path,
        120,
        pts=[0, *np.cumsum(steps).tolist()],
        time_base=Fraction(1, 1000),
        gop=17,
        b_frames=4,
    )
    return path, decode_all(path)


SPANS = st.lists(
    st.tuples(st.integers(0, 6000), st.integers(1, 3000)).map(
        lambda pair: Span(start_ms=pair[0], end_ms=sum(pair))
    ),
    max_size=4,
)


SAMPLINGS = st.builds(
    lambda mode, most, fps, spans: Sampling(
        mode=mode, max_frames=most, fps=fps if mode == "fps" else None, spans=tuple(spans)
    ),
    st.sampled_from(["uniform", "fps", "keyframes"]),
    st.integers(1, 60),
    st.floats(0.2, 40),
    SPANS,
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(sampling=SAMPLINGS, chunk=st.integers(1, 5), threads=st.integers(1, 2))
def test_any_sampling_gives_the_frames_of_its_times(
    long_clip: tuple[Path, list[Shown]], sampling: Sampling, chunk: int, threads: int
):
    """Sorted, each once, on screen inside the spans, each the reference decoder's picture."""
    path, shown = long_clip
    clip = clip_of(path, sampling)
    chosen = plan(clip)

    chunks = decoded(clip, chunk_bytes=chunk * 96 * 64 * 3, threads=threads)

    assert chosen.tolist() == indices_of(chunks)
    assert (np.diff(chosen) > 0).all() and 1 <= len(chosen) <= sampling.max_frames
    times = np.concatenate([part.times_s for part in chunks])
    assert [shown[i].time_s for i in chosen] == pytest.approx(times.tolist())
    np.testing.assert_array_equal([shown[i].pixels for i in chosen], pixels_of(chunks))
    assert chosen.tolist() == [number_of(image) for image in pixels_of(chunks)]
    ends = np.r_[clip.probe.times_s[1:], clip.probe.duration_s]
    for i, time in zip(chosen, times, strict=True):
        inside = [s for s in sampling.spans if time < s.end_ms / 1e3 and s.start_ms / 1e3 < ends[i]]
        assert inside or not sampling.spans
    assert max(len(part) for part in chunks) <= chunk
    assert chunks[-1].asked == chunks[-1].total == len(chosen)


def test_a_span_past_the_end_is_a_bad_request(long_clip: tuple[Path, list[Shown]]):
    """The message says how long the clip is."""
    late = Sampling(spans=(Span(start_ms=60_000, end_ms=61_000),))

    with pytest.raises(BadRequest, match=r"begin at 60\.000 s, the clip lasts"):
        plan(clip_of(long_clip[0], late))


def test_uniform_takes_the_frame_on_screen_at_the_centre_of_each_bin(tmp_path: Path):
    """By time: one frame that stands for ten seconds is one answer, not many."""
    times = [0, 40, 80, 120, 10_000, 10_040, 10_080, 10_120]
    path = make_clip(
        tmp_path / "clip.mkv", 8, pts=times, time_base=Fraction(1, 1000), b_frames=0
    )  # fmt: skip

    assert [3] == plan(clip_of(path, Sampling(max_frames=1))).tolist()
    assert [3] == plan(clip_of(path, Sampling(max_frames=2))).tolist()
    assert [1, 3, 4, 6] == plan(clip_of(path, Sampling(max_frames=101))).tolist()
    span = Sampling(max_frames=4, spans=(Span(start_ms=10_000, end_ms=10_160),))
    assert [4, 5, 6, 7] == plan(clip_of(path, span)).tolist()


def test_a_span_takes_frames_that_begin_inside_it(tmp_path: Path):
    """Not the one that still stands from before, unless no other begins there."""
    path = make_clip(tmp_path / "clip.mp4", 10, b_frames=0)

    inside = Sampling(max_frames=1, spans=(Span(start_ms=50, end_ms=90),))
    between = Sampling(max_frames=1, spans=(Span(start_ms=50, end_ms=70),))

    assert [2] == plan(clip_of(path, inside)).tolist()
    assert [1] == plan(clip_of(path, between)).tolist()


def test_fps_and_keyframes_are_thinned_evenly_to_the_most_frames(tmp_path: Path):
    """A cap does not cut the end of the clip off."""
    path = make_clip(tmp_path / "clip.mp4", 100, gop=10, b_frames=0)

    assert [12, 37, 62, 87] == plan(clip_of(path, Sampling(mode="fps", fps=1.0))).tolist()
    assert [5, 15, 25] == plan(clip_of(path, Sampling(mode="fps", fps=2.5))).tolist()[:3]
    capped = plan(clip_of(path, Sampling(mode="fps", fps=20.0, max_frames=4)))
    assert [12, 37, 62, 87] == capped.tolist()
    keys = clip_of(path, Sampling(mode="keyframes"))
    assert list(range(0, 100, 10)) == plan(keys).tolist()
    assert [10, 50, 80] == plan(clip_of(path, Sampling(mode="keyframes", max_frames=3))).tolist()


def test_a_chunk_never_holds_more_than_its_bytes(tmp_path: Path):
    """An hour of 4K is many chunks, of one frame at least."""
    path = make_clip(tmp_path / "clip.mp4", 20)
    frame = 96 * 64 * 3

    assert [3] * 6 + [2] == [len(c) for c in decoded(clip_of(path), chunk_bytes=3 * frame + 1)]
    assert [1] * 20 == [len(c) for c in decoded(clip_of(path), chunk_bytes=1)]


def test_only_what_is_asked_for_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One frame of ten in a clip of ten groups costs one group, not ten."""
    path = make_clip(tmp_path / "clip.mp4", 120, gop=12, b_frames=0)
    seen = _count_packets(monkeypatch)

    decoded(clip_of(path, Sampling(max_frames=1)), threads=1)
    one = len(seen)
    decoded(clip_of(path, Sampling(mode="keyframes")), threads=1)

    assert [60] == plan(clip_of(path, Sampling(max_frames=1))).tolist()
    assert 1 == one
    assert 10 == len(seen) - one


def _count_packets(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The packets that reach the codec."""
    seen: list[Any] = []
    original = decode_pyav._Reader._send

    def counted(self: Any, packet: Any) -> Any:
        if packet is not None:
            seen.append(packet.pts)
        return original(self, packet)

    monkeypatch.setattr(decode_pyav._Reader, "_send", counted)
    return seen


def test_frames_that_no_other_leans_on_are_not_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Two of three frames of this clip are such."""
    path = make_clip(tmp_path / "clip.mp4", 24, gop=24, b_frames=2)
    out: list[int] = []
    original = decode_pyav._Reader._decoded

    def counted(self: Any, *given: Any, **named: Any) -> Any:
        for index, frame in original(self, *given, **named):
            out.append(index)
            yield index, frame

    monkeypatch.setattr(decode_pyav._Reader, "_decoded", counted)

    one = decoded(clip_of(path, Sampling(max_frames=1, spans=(Span(start_ms=880, end_ms=900),))))

    assert [22] == indices_of(one)
    assert 22 in out and len(out) < 18


def test_closing_early_lets_go_of_the_file(tmp_path: Path):
    """A cancelled job keeps no descriptor."""
    path = make_clip(tmp_path / "clip.mp4", 30)
    clip = clip_of(path)
    before = open_files()

    frames = PyavDecoder(chunk_bytes=1).decode([clip])
    next(frames)
    during = open_files()
    frames.close()
    gc.collect()

    assert before + 1 == during
    assert before == open_files()


def test_several_clips_follow_each_other(tmp_path: Path):
    """Chunks say whose they are."""
    clips = [
        clip_of(make_clip(tmp_path / f"{n}.mp4", 5 + n, size=(96 + 16 * n, 64)), EVERY)
        for n in range(3)
    ]

    chunks = list(PyavDecoder().decode(clips))

    assert [5, 6, 7] == [len(chunk) for chunk in chunks]
    assert all(clip is chunk.clip for clip, chunk in zip(clips, chunks, strict=True))


def test_the_same_clip_twice_gives_the_same_bits(tmp_path: Path):
    """Threads do not show."""
    clip = clip_of(make_clip(tmp_path / "clip.mp4", 40, b_frames=5), Sampling(max_frames=9))

    first, second = (pixels_of(decoded(clip, threads=threads)) for threads in (1, 4))

    np.testing.assert_array_equal(first, second)


def test_nonsense_is_refused():
    """A chunk of no bytes holds no frame."""
    with pytest.raises(ValueError, match="positive"):
        PyavDecoder(chunk_bytes=0)
