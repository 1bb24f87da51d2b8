"""`ralf bench pipeline`: the record, the slopes of a soak, and what strides change."""

import json
import mmap
import os
import stat
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ralf.__main__ import main
from ralf.worker.bench import gauges
from ralf.worker.bench.gauges import Gauges, held
from ralf.worker.bench.pipeline import Slope, slope, soak
from ralf.worker.contract import Sampling
from ralf.worker.media.stride import StridedFinder, searched_rows
from ralf.worker.media.types import Faces, Frames
from ralf.worker.pipeline import Ask, analyze
from ralf.worker.runtime import Parts, load
from ralf.worker.settings import Settings
from tests.clips import face_clip
from tests.scenes import frames_of


@pytest.fixture(autouse=True)
def _tiny_model(tiny_models: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RALF_MODELS_DIR", str(tiny_models))
    monkeypatch.setenv("RALF_MODEL", "tiny")
    monkeypatch.setenv("RALF_THREADS", "1")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory, astronaut: np.ndarray) -> Path:
    """Two faces that move, 20 frames at 20 a second."""
    path = tmp_path_factory.mktemp("clip") / "two.mp4"
    return face_clip(path, [astronaut] * 2, 1.0, size=(480, 270), fps=20, face_height=0.6)


def test_the_record_has_every_stage_rate_and_slope(clip: Path, capsys: pytest.CaptureFixture[str]):
    """Two clips three ways, a stride and a soak of eight, in one document."""
    asked = ["--frames", "2", "--at-once", "2", "--repeats", "1", "--stride", "--soak", "8"]
    assert main(["bench", "pipeline", str(clip), str(clip), *asked]) == 0
    record = json.loads(capsys.readouterr().out)
    facts = record["facts"]

    assert {"ralf", "ralf, 2 at once", "plain"} == record["timings"].keys() == facts["rates"].keys()
    stages = {"probe", "decode", "find", "view", "cut", "score", "judge"}
    assert stages == facts["ralf"]["stages_ms"].keys()
    assert {"decode", "find", "score"} == facts["plain"]["stages_ms"].keys()
    assert 8 == facts["ralf"]["faces"] == facts["at once"]["faces"] == facts["plain"]["faces"]
    taken = record["timings"]["ralf"]["median_s"]
    assert facts["rates"]["ralf"]["clips_s"] == pytest.approx(2 / taken, abs=0.001)
    assert facts["rates"]["ralf"]["video_s_per_s"] == pytest.approx(2 / taken, rel=0.02)
    assert facts["used"]["all ways"]["rss_peak_mib"] > 100
    assert facts["soak"]["clips"] == 8
    assert {"rss_mib", "files", "clip_s"} == facts["soak"]["per_thousand_clips"].keys()
    slopes = facts["soak"]["per_thousand_clips"].values()
    assert all(one["low"] <= one["per_thousand"] <= one["high"] for one in slopes)
    assert {"every", "find_ms", "faces", "labels_changed"} <= facts["stride"].keys()


def test_a_missing_clip_is_a_usage_error(capsys: pytest.CaptureFixture[str]):
    """Said before anything is loaded."""
    assert main(["bench", "pipeline", "/nowhere/clip.mp4"]) == 2
    assert "no clip at ['/nowhere/clip.mp4']" in capsys.readouterr().err


# slopes


def test_a_slope_is_found_with_its_interval():
    """Three units a clip among noise; and none where there is none."""
    noise = np.random.default_rng(0).normal(0, 50, 400)
    grows, stays = slope(np.arange(400) * 3.0 + noise), slope(noise)

    assert grows.low < 3000 < grows.high
    assert grows.low > 2500
    assert stays.low < 0 < stays.high


def test_a_start_that_settles_is_no_leak():
    """The first tenth is left out: caches fill."""
    values = [100.0] * 10 + [400.0] * 90

    assert slope(values) == Slope(per_thousand=0, low=0, high=0, mean=400)


def test_too_few_clips_have_no_slope():
    """A line through two points always fits."""
    with pytest.raises(ValueError, match="at least 3 clips"):
        slope([1.0, 2.0])


def test_a_soak_stops_when_its_time_is_over(clip: Path, tiny_parts: Parts):
    """However many clips were asked for."""
    ask = Ask(sampling=Sampling(mode="uniform", max_frames=1))

    assert soak([clip], tiny_parts, ask, count=10**6, at_once=1, most_s=0.0) == {}
    some = soak([clip], tiny_parts, ask, count=3, at_once=2)
    assert {3} == {len(values) for values in some.values()}


# the machine


def test_what_is_held_is_seen_at_once():
    """Sixty-four MiB more, one file more; mapped, since malloc may have kept as much already."""
    before = held("cpu")
    with mmap.mmap(-1, 2**26) as more, Path(os.devnull).open():
        more.write(b"1" * 2**26)
        now = held("cpu")

    assert now["rss_mib"] - before["rss_mib"] > 0.9 * 2**6
    assert now["files"] == before["files"] + 1


def test_the_gpus_figures_are_read_from_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A stand-in that says what nvidia-smi says; a column that it does not know is absent."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nprintf '10, [N/A], 900\\n30, [N/A], 700\\n'\nexec sleep 60\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(gauges, "query", lambda device: [str(tool)])
    with Gauges("cuda") as seen:
        subprocess.run(["sleep", "0.5"], check=True)
        while len(seen._lines) < 2:
            subprocess.run(["sleep", "0.05"], check=True)

    assert {"gpu_percent": 20.0, "vram_peak_mib": 900.0} == {
        name: value for name, value in seen.used.items() if name in gauges.NAMES
    }


def test_without_nvidia_smi_its_figures_are_absent(monkeypatch: pytest.MonkeyPatch):
    """Never zero."""
    monkeypatch.setattr(gauges, "query", lambda device: ["/nowhere/nvidia-smi"])
    with Gauges("cuda") as seen:
        pass

    assert {"cpu_cores", "rss_peak_mib"} == seen.used.keys()


# strides


def test_each_nth_frame_and_the_ends_are_looked_at():
    """Sooner where frames lie far apart in time."""
    assert searched_rows(np.arange(10) / 25, 4).tolist() == [0, 4, 8, 9]
    assert searched_rows(np.arange(5) * 0.7, 4).tolist() == [0, 1, 2, 3, 4]
    assert searched_rows(np.array([0, 0.04, 0.08, 0.9, 0.94]), 4).tolist() == [0, 2, 3, 4]
    assert searched_rows(np.zeros(0), 4).tolist() == []


class Moving:
    """Finds one face that moves a pixel a frame, and a second in the first frame only."""

    def __init__(self) -> None:
        self.sought: list[int] = []

    def find(self, frames: Frames) -> Faces:
        self.sought += frames.indices.tolist()
        x = frames.indices.astype(np.float32)
        boxes = np.stack([x, x * 0, x + 40, x * 0 + 50], 1)
        other = np.array([[200, 0, 240, 50]] if frames.indices[0] == 0 else np.zeros((0, 4)))
        boxes = np.concatenate([boxes, other.astype(np.float32)])
        frame = np.concatenate([np.arange(len(x)), np.zeros(len(other), np.int64)])
        return Faces(
            boxes=boxes,
            landmarks=np.repeat(boxes[:, None, :2], 5, 1),
            confidence=np.linspace(1, 0.9, len(boxes), dtype=np.float32),
            frame=frame,
        )


def test_a_face_is_followed_along_a_line_between_two_looks():
    """Where it was in every frame; one that is not seen again is not invented."""
    moving, frames = Moving(), frames_of(np.zeros((10, 8, 8, 3), np.uint8))
    faces = StridedFinder(moving, 4).find(frames)

    assert moving.sought == [0, 4, 8, 9]
    assert faces.frame.tolist() == [0, 0, *range(1, 10)]
    one = faces.boxes[:, 0] < 100
    np.testing.assert_allclose(faces.boxes[one, 0], np.arange(10), atol=1e-4)
    assert (~one).sum() == 1


def test_a_stride_leaves_the_verdict_as_it_is_and_says_so(clip: Path, eager_parts: Parts):
    """Every frame of a moving clip: the same tracks and nearly the same score, and a warning."""
    settings = replace(eager_parts.settings, find_every=4)
    strided = replace(eager_parts, finder=StridedFinder(eager_parts.finder, 4), settings=settings)
    ask = Ask(sampling=Sampling(mode="uniform", max_frames=20))
    every, fourth = (analyze(clip, parts, ask=ask)[0] for parts in (eager_parts, strided))

    assert every.made.faces == fourth.made.faces == 40
    assert [len(track.samples) for track in every.tracks] == [
        len(track.samples) for track in fourth.tracks
    ]
    assert every.score is not None
    assert fourth.score is not None
    assert every.score == pytest.approx(fourth.score, abs=0.02)
    assert any("uncalibrated_finder" in text for text in fourth.warnings)
    assert not any("uncalibrated_finder" in text for text in every.warnings)


@pytest.mark.gpu
def test_both_devices_say_the_same_of_a_clip(clip: Path, eager_models: Path):
    """The same faces, tracks and label; logits within the engine's budget, whoever decoded."""
    settings = Settings(models_dir=str(eager_models), model="eager", threads=2)
    here, there = (load(settings, device=device) for device in ("cpu", "cuda"))
    ask = Ask(sampling=Sampling(mode="uniform", max_frames=20))
    one, other = (analyze(clip, parts, ask=ask)[0] for parts in (here, there))

    assert torch.device(there.engine.device).type == "cuda"
    assert (one.label, one.made.faces, len(one.tracks)) == (
        other.label,
        other.made.faces,
        len(other.tracks),
    )
    assert one.score is not None
    assert other.score is not None
    assert one.score == pytest.approx(other.score, abs=0.02)
