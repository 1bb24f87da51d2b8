"""Where clips are decoded: the rule as a function of the probe, and the decoder that obeys it."""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ralf.worker import runtime
from ralf.worker.contract import Sampling, Span
from ralf.worker.errors import BadRequest, CorruptMedia, Infrastructure
from ralf.worker.media.decode_dali import DaliDecoder
from ralf.worker.media.decode_pyav import PyavDecoder
from ralf.worker.media.probe import probe
from ralf.worker.media.routing import (
    RATES,
    InProgress,
    RoutedDecoder,
    refusal,
    route,
)
from ralf.worker.media.sampling import frames_read, pixels_read, plan
from ralf.worker.media.types import Clip, Frames, Probe
from ralf.worker.runtime import choose_decoder, why_no_dali
from ralf.worker.settings import Settings, SettingsError
from tests.clips import make_clip

MIXED = "mixed"


def probed(
    frames: int = 500, gop: int = 250, width: int = 1920, height: int = 1080, **facts: Any
) -> Probe:
    """A 25 fps H.264 clip in an MP4, as the probe would tell it."""
    known: dict[str, Any] = {
        "path": "clip.mp4",
        "size_bytes": 10**7,
        "container": "mov",
        "unmistakable": True,
        "codec": "h264",
        "stream_index": 0,
        "coded_width": width,
        "coded_height": height,
        "width": width,
        "height": height,
        "rotation": 0,
        "pixel_format": "yuv420p",
        "duration_s": frames / 25,
        "frame_rate": 25.0,
        "variable_rate": False,
        "frame_count": frames,
        "times_s": np.arange(frames) / 25,
        "keyframes": np.arange(0, frames, gop),
        "start_s": 0.0,
        "colour_space": "bt709",
        "colour_range": "tv",
        "interlaced": False,
    }
    return Probe(**{**known, **facts})


def chosen(found: Probe, wanted: int = 32, **given_: Any) -> str:
    frames = plan(Clip(found, Sampling(max_frames=wanted)))
    return route(found, frames, **{"cores": 4, **given_}).decoder


REFUSED: dict[str, dict[str, Any]] = {
    "AV1": {"codec": "av1"},
    "VP8": {"codec": "vp8"},
    "MJPEG": {"codec": "mjpeg"},
    "transport stream": {"container": "mpegts"},
    "a beginning that is no file type": {"unmistakable": False},
    "ten bits": {"pixel_format": "yuv420p10le"},
    "4:4:4": {"pixel_format": "yuv444p"},
    "odd width": {"width": 1919},
    "odd height": {"height": 1079},
    "tiny": {"coded_width": 96, "coded_height": 64},
    "wider than NVDEC takes H.264": {"coded_width": 4112},
    "interlaced": {"interlaced": True},
    "edit list": {"unshown": 3},
    "negative start": {"start_s": -0.2},
    "two frames at one time": {"times_s": np.arange(500) // 2 / 25},
    "broken": {"warnings": ("broken_clip: it ends early",)},
    "several streams": {"warnings": ("streams: 2 video streams; only #0 is looked at",)},
    "a very large file": {"size_bytes": 2**31},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_dali_would_show_otherwise_goes_to_pyav(name: str):
    """However busy the CPU is."""
    found = probed(**REFUSED[name])
    busy = InProgress(cpu=1e15)

    assert "" == refusal(probed(), MIXED)
    assert refusal(found, MIXED)
    way = route(found, np.arange(5), cores=1, in_progress=busy)
    assert ("pyav", refusal(found, MIXED)) == (way.decoder, way.why)


@pytest.mark.parametrize("codec", ["h264", "hevc", "vp9"])
def test_long_hd_clips_go_to_the_gpu_and_small_ones_do_not(codec: str):
    """Four cores: a minute of 1080p is NVDEC's, a second of it or a 240p clip is not."""
    assert "dali" == chosen(probed(1500, codec=codec))
    assert "pyav" == chosen(probed(25, codec=codec))
    assert "pyav" == chosen(probed(500, width=426, height=240, codec=codec))


def test_a_short_keyframe_distance_favours_the_cpu():
    """It jumps over what nobody wants: the same clip, the same 32 frames."""
    assert "dali" == chosen(probed(1500, gop=250))
    assert "pyav" == chosen(probed(1500, gop=2))


def test_sixteen_idle_cores_are_sooner_done_than_one_nvdec():
    """1,287 frames/s against 588, as measured; with seven clips before it, the GPU is."""
    clip = probed(525)
    seven = 7 * pixels_read(clip, np.arange(525))

    assert "pyav" == chosen(clip, cores=16)
    assert "dali" == chosen(clip, cores=16, in_progress=InProgress(cpu=seven))
    assert "pyav" == chosen(clip, cores=16, in_progress=InProgress(cpu=seven, gpu=3 * seven))


@given(
    cpu=st.floats(0, 1e12),
    gpu=st.floats(0, 1e12),
    more=st.floats(0, 1e12),
    frames=st.integers(1, 3000),
    cores=st.integers(1, 64),
)
def test_more_work_before_a_decoder_never_draws_a_clip_to_it(
    cpu: float, gpu: float, more: float, frames: int, cores: int
):
    """Monotone in both loads."""
    found = probed(frames)
    here = chosen(found, cores=cores, in_progress=InProgress(cpu, gpu))

    if here == "dali":
        assert "dali" == chosen(found, cores=cores, in_progress=InProgress(cpu + more, gpu))
    else:
        assert "pyav" == chosen(found, cores=cores, in_progress=InProgress(cpu, gpu + more))


def test_frames_read_reach_from_each_keyframe_to_the_last_wanted_of_its_group():
    """Counted by hand, keyframes at 0, 10, 20 …"""
    found = probed(40, gop=10)

    assert 0 == frames_read(found, np.array([], np.int64))
    assert 1 == frames_read(found, np.array([10]))
    assert 10 == frames_read(found, np.array([19]))
    assert 10 == frames_read(found, np.array([12, 15, 19]))
    assert 3 + 6 == frames_read(found, np.array([2, 25]))
    assert 40 == frames_read(found, np.arange(40))
    assert 6 == frames_read(replace(found, keyframes=np.array([20])), np.array([5]))


def test_the_rates_are_those_that_were_measured():
    """measured.md's figures for 1080p H.264: a full GPU is 2.3 times sixteen cores."""
    assert 2924 / 1287 == pytest.approx(RATES.gpu_full / (16 * RATES.core))
    assert RATES.gpu_alone < 16 * RATES.core < RATES.gpu_full


class Fake:
    """A decoder that gives one frame a clip, and waits to be told to."""

    def __init__(self, name: str, go: threading.Event | None = None) -> None:
        self.name, self.go = name, go
        self.asked: list[Clip] = []

    def decode(self, clips: Sequence[Clip]) -> Iterator[Frames]:
        for clip in clips:
            self.asked.append(clip)
            if self.go is not None:
                assert self.go.wait(60)
            if clip.probe.path == "bad.mp4":
                raise CorruptMedia("nothing decodes")
            pixels = torch.zeros((1, 3, 2, 2), dtype=torch.uint8)
            yield Frames(clip, pixels, np.zeros(1), np.zeros(1, np.int64), 1, 1, decoder=self.name)


def routed(**events: threading.Event) -> tuple[RoutedDecoder, dict[str, Fake]]:
    fakes = {name: Fake(name, events.get(name)) for name in ("pyav", "dali")}
    decoder = RoutedDecoder(
        PyavDecoder(threads=1), DaliDecoder(PyavDecoder(threads=1), device="cpu"), cores=4
    )
    decoder.decoders = dict(fakes)
    return decoder, fakes


def clip(**facts: Any) -> Clip:
    return Clip(probed(1500, **facts), Sampling(max_frames=32))


def test_each_clip_goes_its_way_and_the_frames_say_which():
    """A large one, a small one, an interlaced one."""
    decoder, _ = routed()
    clips = [clip(width=96, height=64), clip(), clip(interlaced=True)]

    parts = list(decoder.decode(clips))

    assert [(clips[1], "dali"), (clips[0], "pyav"), (clips[2], "pyav")] == [
        (part.clip, part.decoder) for part in parts
    ]
    assert InProgress() == decoder.in_progress


def test_a_failing_clip_leaves_the_other_decoders_share_alone():
    """Its error comes last; nonsense that was asked counts as one."""
    decoder, _ = routed()
    late = Clip(probed(1500), Sampling(spans=(Span(start_ms=90_000, end_ms=91_000),)))
    parts: list[Frames] = []

    with pytest.raises(CorruptMedia):
        collect(decoder, [clip(path="bad.mp4"), clip(interlaced=True)], parts)
    with pytest.raises(BadRequest):
        collect(decoder, [late, clip()], parts)

    assert ["pyav", "dali"] == [part.decoder for part in parts]
    assert InProgress() == decoder.in_progress


def collect(decoder: RoutedDecoder, clips: list[Clip], parts: list[Frames]) -> None:
    for part in decoder.decode(clips):
        parts.append(part)  # noqa: PERF402 - what came before the error is wanted


def test_what_is_in_progress_counts_until_it_is_done_or_dropped():
    """A long queue for the GPU sends the next clip to the CPU, and no longer once it is gone."""
    decoder, fakes = routed()
    walks = [decoder.decode([clip()]) for _ in range(12)]
    for walk in walks:
        next(walk)

    dali = len(fakes["dali"].asked)
    assert 1 < dali < 12 and 12 == dali + len(fakes["pyav"].asked)
    assert decoder.in_progress.gpu > 0 < decoder.in_progress.cpu
    for walk in walks[:6]:
        walk.close()
    for walk in walks[6:]:
        assert [] == list(walk)
    assert InProgress() == decoder.in_progress


def test_the_cpus_work_in_progress_is_weighed_as_route_weighs_it():
    """An HEVC frame costs 1.5 times an H.264 one, and NVDEC's share is in plain pixels."""
    decoder, _ = routed()
    costs = []
    for facts in ({"codec": "hevc", "interlaced": True}, {"codec": "mpeg4"}, {"codec": "hevc"}):
        one = clip(**facts)
        walk = decoder.decode([one])
        next(walk)
        now, pixels = decoder.in_progress, pixels_read(one.probe, plan(one))
        costs.append((now.cpu / pixels, now.gpu / pixels))
        walk.close()

    assert [(1.5, 0), (1, 0), (0, 1)] == costs
    assert InProgress() == decoder.in_progress


@pytest.mark.dali
def test_with_the_real_decoders_a_small_clip_is_pyavs(tmp_path: Path):
    """End to end, without a fake."""
    path = make_clip(tmp_path / "clip.mp4", 12)
    pyav = PyavDecoder(threads=1)
    decoder = RoutedDecoder(pyav, DaliDecoder(pyav, device="cpu"), cores=1)

    parts = list(decoder.decode([Clip(probe(path, Settings()), Sampling(max_frames=4))]))

    assert ["pyav"] == [part.decoder for part in parts] and 4 == len(parts[0])


def test_chunks_are_halved_for_both_decoders_and_counted_in_common():
    """What a job does once more when the device's memory has run out."""
    pyav = PyavDecoder(chunk_bytes=100, threads=3)
    decoder = RoutedDecoder(pyav, DaliDecoder(pyav, device="cpu", chunk_bytes=51), cores=4)
    other = decoder.halved()

    sizes = {name: each.chunk_bytes for name, each in other.decoders.items()}
    assert {"dali": 25, "pyav": 50} == sizes and 3 == other.decoders["pyav"].threads
    assert 50 == other.decoders["dali"].fallback.chunk_bytes
    assert 51 == decoder.decoders["dali"].chunk_bytes
    other._count("dali", 7.0)
    assert 7.0 == decoder.in_progress.gpu


def with_gpu(
    monkeypatch: pytest.MonkeyPatch, *, dali: str | None = "2.4.0", nvdec: bool = True
) -> list[DaliDecoder]:
    """A machine as far as the choice looks; the pipelines that it would build."""
    warmed: list[DaliDecoder] = []
    monkeypatch.setattr(runtime, "dali_version", lambda: dali)
    monkeypatch.setattr(runtime, "nvdec_present", lambda: nvdec)

    def warm(self: DaliDecoder) -> None:
        warmed.append(self)

    monkeypatch.setattr(DaliDecoder, "warm", warm)
    return warmed


def test_a_cpu_worker_decodes_with_pyav():
    """With whatever is installed; DALI cannot be pinned there."""
    assert "pyav" == choose_decoder(Settings(threads=3), "cpu").name
    with pytest.raises(Infrastructure, match=r"RALF_DECODER=dali, but the device is cpu"):
        choose_decoder(Settings(decoder="dali"), "cpu")
    with pytest.raises(SettingsError, match="auto, pyav or dali, got 'nvdec'"):
        choose_decoder(Settings(decoder="nvdec"), "cpu")


def test_a_gpu_worker_routes_unless_one_is_pinned(monkeypatch: pytest.MonkeyPatch):
    """DALI is warmed at load, on that device, with chunks of its own size."""
    warmed = with_gpu(monkeypatch)
    settings = Settings(threads=3, chunk_bytes=10, gpu_chunk_bytes=20)

    both = choose_decoder(settings, "cuda:1")

    assert isinstance(both, RoutedDecoder) and 3 == both.cores
    assert warmed == [both.decoders["dali"]]
    assert ("cuda:1", 20, 10) == (
        str(warmed[0].device),
        warmed[0].chunk_bytes,
        warmed[0].fallback.chunk_bytes,
    )
    assert "dali" == choose_decoder(replace(settings, decoder="dali"), "cuda:1").name
    assert "pyav" == choose_decoder(replace(settings, decoder="pyav"), "cuda:1").name


@pytest.mark.parametrize(
    ("lacks", "told"), [({"dali": None}, "not installed"), ({"nvdec": False}, "libnvcuvid")]
)
def test_a_gpu_without_dali_or_nvdec_decodes_with_pyav_and_says_why(
    monkeypatch: pytest.MonkeyPatch, lacks: dict[str, Any], told: str
):
    """Pinned, it is an error: never a silent fallback."""
    assert [] == with_gpu(monkeypatch, **lacks)

    assert "pyav" == choose_decoder(Settings(), "cuda").name
    assert told in why_no_dali("cuda")
    with pytest.raises(Infrastructure, match=told):
        choose_decoder(Settings(decoder="dali"), "cuda")


def test_a_dali_that_cannot_start_is_found_at_load(monkeypatch: pytest.MonkeyPatch):
    """Its pipeline is built then; pinned, the worker does not come up."""
    monkeypatch.setattr(runtime, "why_no_dali", lambda device: "")
    monkeypatch.setattr(DaliDecoder, "_built", lambda self: int("driver too old"))

    assert "pyav" == choose_decoder(Settings(), "cuda").name
    with pytest.raises(Infrastructure, match="DALI cannot start"):
        choose_decoder(Settings(decoder="dali"), "cuda")
