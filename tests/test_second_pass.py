"""The second pass: more frames around the moments of a long clip that score highest."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ralf.kernels.manifest import Aggregation, Calibration
from ralf.worker.contract import EvidencePolicy, Sampling, Verdict
from ralf.worker.media.sampling import plan
from ralf.worker.media.types import Clip, Faces, Frames, Probe
from ralf.worker.pipeline import Ask, analyze
from ralf.worker.runtime import Parts
from ralf.worker.scores import for_level
from tests.clips import face_clip
from tests.documents import SHA, a_job
from tests.test_routing import probed

SIDE = 64
HIGH, LOW = 4.0, -3.0
Truth = Callable[[np.ndarray], np.ndarray]


@dataclass
class Fakes:
    """A decoder, a finder and an engine: one face in each frame, whose score depends on the time.

    The frames are flat, and the brightness of a frame is its score.
    """

    truth: Truth
    name: str = "fake"
    decoded: tuple[tuple[float, ...], ...] = ()

    def decode(self, clips: Sequence[Clip]) -> Iterator[Frames]:
        (clip,) = clips
        wanted = plan(clip)
        times = clip.probe.times_s[wanted]
        self.decoded += (tuple(times.tolist()),)
        bright = np.where(self.truth(times), 200, 100).astype(np.uint8)
        pixels = torch.from_numpy(
            np.broadcast_to(bright[:, None, None, None], (len(times), 3, SIDE, SIDE)).copy()
        )
        for first in range(0, len(wanted), 50):
            part = slice(first, first + 50)
            done = min(first + 50, len(wanted))
            yield Frames(
                clip, pixels[part], times[part], wanted[part], asked=done, total=len(wanted)
            )

    def halved(self) -> "Fakes":
        return self

    def find(self, frames: Frames) -> Faces:
        n = len(frames)
        return Faces(
            boxes=np.tile(np.float32([2, 2, 60, 62]), (n, 1)),
            landmarks=np.zeros((n, 5, 2), np.float32),
            confidence=np.ones(n, np.float32),
            frame=np.arange(n),
        )


class FakeEngine:
    """Bright crops are forged."""

    def __init__(self, parts: Parts) -> None:
        self.artifact = parts.artifact
        self.name, self.precision, self.device = "fake", "fp32", "cpu"

    def __call__(self, crops: torch.Tensor) -> torch.Tensor:
        return torch.where(crops.float().mean((1, 2, 3)) > 150, HIGH, LOW)


@pytest.fixture
def fair_parts(eager_parts: Parts) -> Parts:
    """Parts whose model has ordinary thresholds."""
    rules = {
        "thresholds": {"fpr_0.05": 0.65, "low": 0.2},
        "aggregation": Aggregation(min_face_px=20),
        "calibration": Calibration(),
    }
    manifest = eager_parts.artifact.manifest.model_copy(update=rules)
    return replace(eager_parts, artifact=replace(eager_parts.artifact, manifest=manifest))


def clip_of(seconds: float) -> Probe:
    """Ten frames a second, a keyframe in each five seconds."""
    times = np.arange(0, seconds, 0.1)
    return probed(
        times_s=times, frame_count=len(times), duration_s=seconds, frame_rate=10.0, width=SIDE,
        height=SIDE, coded_width=SIDE, coded_height=SIDE, keyframes=np.arange(0, len(times), 50),
    )  # fmt: skip


def judged(parts: Parts, seconds: float, truth: Truth, **ask: object) -> tuple[Verdict, Fakes]:
    fakes = Fakes(truth)
    parts = replace(parts, decoder=fakes, finder=fakes, engine=FakeEngine(parts))
    quiet = EvidencePolicy(thumbnails=False)
    asked = Ask(probed=clip_of(seconds), sha256=SHA, evidence=quiet, **ask)
    return analyze("clip.mp4", parts, ask=asked)[0], fakes


def between(start: float, end: float) -> Truth:
    return lambda times: (times >= start) & (times < end)


def test_two_hundred_forged_seconds_of_two_hours_are_never_authentic(fair_parts: Parts):
    """At default settings; the segment is listed."""
    verdict, _ = judged(fair_parts, 7200, between(100, 300))

    assert verdict.label in ("inconclusive", "likely_forged")
    assert any(100 <= s.peak_ms / 1000 < 300 and s.score > 0.9 for s in verdict.segments)


@pytest.mark.parametrize("length", [1.5, 5.0])
def test_a_forgery_shorter_than_the_gap_is_found_where_a_sample_touches_it(
    fair_parts: Parts, length: float
):
    """One sample of two hours lies in it: alone it makes no segment."""
    touched = float(clip_of(7200).times_s[plan(Clip(clip_of(7200), Sampling(max_frames=300)))][77])
    truth = between(touched - 0.2, touched - 0.2 + length)

    verdict, fakes = judged(fair_parts, 7200, truth)

    assert verdict.label == "inconclusive"
    (segment,) = verdict.segments
    assert abs(segment.peak_ms / 1000 - touched) < length
    assert 2 == len(fakes.decoded)


def test_the_verdict_says_what_each_pass_sampled(fair_parts: Parts):
    """The second is small, lies around the moment, and repeats no frame."""
    touched = float(clip_of(7200).times_s[plan(Clip(clip_of(7200), Sampling(max_frames=300)))][77])

    verdict, fakes = judged(fair_parts, 7200, between(touched - 1, touched + 1))

    first, second = verdict.made.frames_by_pass
    assert (300, True) == (first, 4 <= second <= 8)
    assert first + second == verdict.made.frames_asked == verdict.made.frames_decoded
    assert all(abs(time - touched) <= 2.01 for time in fakes.decoded[1])
    samples = [sample for track in verdict.tracks for sample in track.samples]
    assert len({sample.time_ms for sample in samples}) == len(samples)
    assert verdict.made.longest_gap_ms > 10_000


def test_scattered_high_scores_cost_a_bounded_number_of_frames(fair_parts: Parts):
    """Eight moments at most, however many single frames score high."""
    verdict, _ = judged(fair_parts, 7200, lambda times: np.round(times * 10) % 7 == 0)

    assert 64 >= verdict.made.frames_by_pass[1] > 8


@pytest.mark.parametrize(
    ("seconds", "truth"),
    [
        (7200, between(-1, -1)),
        (7200, between(0, 7200)),
        (12, between(5, 5.5)),
    ],
    ids=["nothing suspicious", "forged already", "dense already"],
)
def test_without_a_reason_there_is_no_second_pass(fair_parts: Parts, seconds: float, truth: Truth):
    """A clip that needs none costs what it did."""
    verdict, fakes = judged(fair_parts, seconds, truth)

    assert 1 == len(fakes.decoded) == len(verdict.made.frames_by_pass)


def test_who_names_the_sampling_gets_it(fair_parts: Parts):
    """And nothing else."""
    asked = Sampling(max_frames=100)
    verdict, fakes = judged(fair_parts, 7200, between(3500, 3600), sampling=asked)

    assert 1 == len(fakes.decoded) and 100 == verdict.made.frames_asked


def test_a_second_pass_does_not_raise_an_authentic_tracks_score(fair_parts: Parts):
    """It looks where scores are high, so its faces must not count in the level of a long track."""
    times = clip_of(7200).times_s[plan(Clip(clip_of(7200), Sampling(max_frames=300)))]
    lone = between(float(times[10]) - 0.05, float(times[10]) + 0.05)

    verdict, _ = judged(fair_parts, 7200, lone)
    fixed, _ = judged(fair_parts, 7200, lone, sampling=Sampling(max_frames=300))

    assert 2 == len(verdict.made.frames_by_pass)
    assert (fixed.label, fixed.score) == (verdict.label, verdict.score)
    assert verdict.label == "likely_authentic"


def test_faces_of_the_second_pass_count_where_there_are_too_few_others():
    """A person who is seen for two seconds only."""
    again = np.array([False, True, True, True])

    assert for_level(np.arange(4), again, 3).tolist() == [0, 1, 2, 3]
    assert for_level(np.arange(4), again, 1).tolist() == [0]


def test_work_and_time_are_kept_to(fair_parts: Parts):
    """Neither the pixels that a job may cost nor its deadline are exceeded."""
    truth = between(3600, 3640)
    cost = SIDE * SIDE
    settings = replace(fair_parts.settings, max_decode_pixels=4 * 300 * 50 * cost)
    soon = a_job(deadline=datetime.now(UTC) + timedelta(seconds=0.01))

    poor, _ = judged(
        replace(fair_parts, settings=replace(settings, max_decode_pixels=8000 * cost)), 7200, truth
    )
    late, _ = judged(fair_parts, 7200, truth, job=soon)

    assert 1 == len(poor.made.frames_by_pass) or poor.made.frames_by_pass[1] <= 8
    assert 1 == len(late.made.frames_by_pass)


def test_two_runs_give_one_verdict(fair_parts: Parts):
    """Nothing is drawn at random."""
    one, other = (judged(fair_parts, 3600, between(1000, 1012))[0] for _ in range(2))

    assert one.model_dump(exclude={"made", "finished_at"}) == other.model_dump(
        exclude={"made", "finished_at"}
    )
    assert one.made.frames_by_pass == other.made.frames_by_pass


def test_a_real_clip_is_decoded_a_second_time(
    fair_parts: Parts, astronaut: np.ndarray, tmp_path: Path
):
    """PyAV, MTCNN and the tracker as they are; the engine calls one second of a minute forged."""
    path = face_clip(
        tmp_path / "minute.mp4", [astronaut], 100.0, size=(160, 120), fps=4, face_height=0.8,
        quality=30, gop=20,
    )  # fmt: skip
    times: list[float] = []

    class TimedEngine(FakeEngine):
        def __call__(self, crops: torch.Tensor) -> torch.Tensor:
            at = torch.tensor(times[-len(crops) :])
            return torch.where((at >= 45) & (at < 47.5), HIGH, LOW)

    def find(frames: Frames) -> Faces:
        found = fair_parts.finder.find(frames)
        times.extend(frames.times_s[found.frame].tolist())
        return found

    parts = replace(fair_parts, engine=TimedEngine(fair_parts), finder=SimpleNamespace(find=find))
    verdict, evidence = analyze(path, parts, ask=Ask(evidence=EvidencePolicy(residuals=False)))

    assert 2 == len(verdict.made.frames_by_pass)
    assert verdict.label == "inconclusive"
    assert any(44 <= segment.peak_ms / 1000 < 48 for segment in verdict.segments)
    assert {picture.track_id for picture in evidence.pictures} <= {
        track.track_id for track in verdict.tracks
    }
