"""The walk as a whole: a file in, a verdict out, chunk by chunk."""

import io
import time
from base64 import b64decode
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ralf.kernels.manifest import RESIDUAL_INSIDE, Calibration, CompressionPoint
from ralf.worker import pipeline
from ralf.worker.contract import EarlyStop, EvidencePolicy, Job, Media, Sampling, Verdict, dump
from ralf.worker.errors import BadRequest, Cancelled, CorruptMedia
from ralf.worker.media.decode_pyav import PyavDecoder
from ralf.worker.media.probe import probe
from ralf.worker.media.types import Clip, Frames
from ralf.worker.pipeline import Ask, Partial, analyze, file_sha256, walk
from ralf.worker.runtime import Parts, with_decoder
from ralf.worker.settings import Settings
from ralf.worker.verdict import judge

FEW = Sampling(mode="uniform", max_frames=6)


@pytest.fixture(scope="module")
def small_chunks(tiny_parts: Parts) -> Parts:
    """Two frames of 640×360 at a time."""
    return with_decoder(tiny_parts, PyavDecoder(chunk_bytes=2 * 640 * 360 * 3, threads=1))


@pytest.fixture(scope="module")
def of_two(tiny_parts: Parts, clip_of_two: Path):
    """The verdict and evidence of the two faces."""
    return analyze(clip_of_two, tiny_parts, ask=Ask(sampling=FEW))


def test_two_faces_become_two_tracks_of_every_sampled_frame(of_two):
    """Each face is followed through the clip under one name."""
    verdict, _ = of_two

    assert [6, 6] == [track.faces for track in verdict.tracks]
    assert ["t1", "t2"] == [track.track_id for track in verdict.tracks]
    assert 12 == verdict.made.faces
    assert verdict.tracks[0].samples[0].box.left != verdict.tracks[1].samples[0].box.left


def test_a_verdict_says_what_it_was_made_with(of_two, tiny_parts: Parts, clip_of_two: Path):
    """Media, model, engine, frames, timings: enough to make it again."""
    verdict, _ = of_two
    made = verdict.made

    assert file_sha256(clip_of_two) == verdict.media.sha256
    assert ("h264", 640, 360, 20) == (
        verdict.media.codec,
        verdict.media.width,
        verdict.media.height,
        verdict.media.frames,
    )
    assert tiny_parts.artifact.version == made.version
    assert tiny_parts.artifact.manifest.files["weights.safetensors"] == made.weights_sha256
    assert (6, 6, 0) == (made.frames_asked, made.frames_decoded, made.frames_replaced)
    assert {"probe", "decode", "find", "score"} <= made.stages_ms.keys()
    assert "pyav" == made.decoder


def test_the_time_of_judging_is_counted_wherever_it_is_spent(
    tiny_parts: Parts, clip_of_two: Path, monkeypatch: pytest.MonkeyPatch
):
    """Most of it after a chunk, for the progress; the verdict itself then finds it done."""
    slow_s, judged = 0.03, []

    def judging(*facts, **more):
        judged.append(1)
        time.sleep(slow_s)
        return judge(*facts, **more)

    monkeypatch.setattr(pipeline, "judge", judging)
    verdict, _ = analyze(clip_of_two, tiny_parts, ask=Ask(sampling=FEW))

    assert judged
    assert verdict.made.stages_ms["judge"] >= 1000 * slow_s * len(judged)


class TwoDecoders:
    """PyAV under two names, the second with a last word on frames that were lost."""

    name = "both"

    def decode(self, clips):
        (clip,) = clips
        pyav = PyavDecoder(chunk_bytes=2 * 640 * 360 * 3, threads=1)
        names = ("first", "second", "first")
        for name, frames in zip(names, pyav.decode(clips), strict=True):
            yield replace(frames, decoder=name)
        pixels = frames.pixels[:0]
        lost = ("lost_frames: the end",)
        yield Frames(clip, pixels, np.zeros(0), np.zeros(0, np.int64), 6, 6, warnings=lost)


def test_a_verdict_names_the_decoders_that_really_decoded(tiny_parts: Parts, clip_of_two: Path):
    """Each once, in their order; a chunk without frames is no work and no decoder, only words."""
    verdict, _ = analyze(
        clip_of_two, with_decoder(tiny_parts, TwoDecoders()), ask=Ask(sampling=FEW)
    )

    assert "first+second" == verdict.made.decoder
    assert (6, 6, 12) == (
        verdict.made.frames_asked,
        verdict.made.frames_decoded,
        verdict.made.faces,
    )
    assert "lost_frames: the end" in verdict.warnings


def test_an_untrained_model_is_named_in_every_verdict(of_two):
    """Its score means nothing, and the reader is told."""
    verdict, _ = of_two

    assert any(text.startswith("untrained_model") for text in verdict.warnings)


def test_another_sampling_than_the_models_is_marked(of_two):
    """The calibration speaks of the model's own sampling."""
    verdict, _ = of_two

    assert any(text.startswith("uncalibrated_sampling") for text in verdict.warnings)


def test_the_models_own_sampling_is_not_marked(tiny_parts: Parts, clip_of_none: Path):
    """No warning without a cause."""
    verdict, _ = analyze(clip_of_none, tiny_parts)

    assert not any(text.startswith("uncalibrated") for text in verdict.warnings)


def test_no_face_is_an_ordinary_outcome(tiny_parts: Parts, clip_of_none: Path):
    """No score is invented for it."""
    verdict, evidence = analyze(clip_of_none, tiny_parts)

    assert ("no_faces", None, ()) == (verdict.label, verdict.score, verdict.tracks)
    assert () == evidence.pictures


def test_chunks_change_nothing_but_the_memory(small_chunks: Parts, of_two, clip_of_two: Path):
    """The same frames in smaller portions give the same verdict."""
    verdict, _ = analyze(clip_of_two, small_chunks, ask=Ask(sampling=FEW))
    whole, _ = of_two

    assert whole.label == verdict.label
    assert whole.score == pytest.approx(verdict.score, abs=1e-4)
    assert [t.faces for t in whole.tracks] == [t.faces for t in verdict.tracks]


def test_a_walk_tells_its_progress_and_what_it_would_say(small_chunks: Parts, clip_of_two: Path):
    """After each chunk there is a partial verdict, and the last says all frames were seen."""
    seen: list[tuple[Partial, Verdict]] = []

    def note(partial: Partial) -> None:
        seen.append((partial, partial.verdict()))

    final, _ = analyze(clip_of_two, small_chunks, ask=Ask(sampling=FEW), progress=note)

    assert [2, 4, 6] == [partial.progress.frames_done for partial, _ in seen]
    assert [True, True, True] == [verdict.partial for _, verdict in seen]
    assert final.partial is False
    assert final.score == seen[-1][1].score
    assert 100.0 == seen[-1][0].progress.percent


def test_cancelling_stops_the_walk_at_its_next_chunk(small_chunks: Parts, clip_of_two: Path):
    """Whoever hears the progress may say stop."""
    heard = []

    def stop(partial: Partial) -> None:
        heard.append(partial.progress.frames_done)
        raise Cancelled

    with pytest.raises(Cancelled):
        analyze(clip_of_two, small_chunks, ask=Ask(sampling=FEW), progress=stop)

    assert [2] == heard


def test_closing_a_walk_releases_the_file(small_chunks: Parts, clip_of_two: Path):
    """No descriptor on the clip stays open."""
    steps = walk(clip_of_two, small_chunks, Ask(sampling=FEW))
    next(steps)
    steps.close()

    open_files = [entry.resolve() for entry in Path("/proc/self/fd").iterdir() if entry.exists()]
    assert clip_of_two.resolve() not in open_files


def test_an_untrained_model_accuses_nobody(of_two):
    """Neither the video, nor a track, nor a stretch of it."""
    verdict, _ = of_two

    assert "inconclusive" == verdict.label
    assert [False, False] == [track.decisive for track in verdict.tracks]
    assert () == verdict.segments


def test_a_walk_may_stop_early_and_says_so(eager_parts: Parts, clip_of_two: Path):
    """Off by default; with it the verdict is marked partial."""
    ask = Ask(sampling=FEW, stop_early=EarlyStop(score=0.0, after_faces=3))
    decoder = PyavDecoder(chunk_bytes=2 * 640 * 360 * 3, threads=1)
    verdict, _ = analyze(clip_of_two, with_decoder(eager_parts, decoder), ask=ask)

    assert verdict.partial
    assert 4 == verdict.made.frames_asked
    assert any(text.startswith("stopped_early: looked at 4 of 6") for text in verdict.warnings)


def with_metrics(parts: Parts, **metrics: object) -> Parts:
    """The parts with other figures in the model's manifest."""
    manifest = parts.artifact.manifest.model_copy(update={"metrics": metrics})
    return replace(parts, artifact=replace(parts.artifact, manifest=manifest))


def test_evidence_holds_the_strongest_faces_of_each_track(of_two):
    """At most five a track, each a JPEG of the face as it was scored."""
    _, evidence = of_two
    by_track = {t: [p for p in evidence.pictures if p.track_id == t] for t in ("t1", "t2")}

    for pictures in by_track.values():
        assert 5 == len(pictures)
        scores = [picture.score for picture in pictures]
        assert sorted(scores, reverse=True) == scores


@pytest.mark.parametrize(
    ("measured", "shown"),
    [
        ({}, False),
        ({RESIDUAL_INSIDE: [0.74, 0.70, 0.78]}, False),
        ({RESIDUAL_INSIDE: [0.75, 0.71, 0.79]}, True),
        ({RESIDUAL_INSIDE: "good"}, False),
    ],
)
def test_residuals_are_shown_only_where_they_were_proved_to_point_at_forgeries(
    tiny_parts: Parts, clip_of_two: Path, measured: dict[str, object], shown: bool
):
    """The manifest's figure decides; the verdict names it."""
    parts = with_metrics(tiny_parts, **measured)
    verdict, evidence = analyze(clip_of_two, parts, ask=Ask(sampling=FEW))

    assert [shown] * 10 == [picture.residual is not None for picture in evidence.pictures]
    assert (verdict.made.figures.residual_auc == 0.75) == shown


def test_a_verdict_names_the_error_rates_of_its_model(tiny_parts: Parts, clip_of_two: Path):
    """As the manifest has them; None where nothing was measured."""
    parts = with_metrics(
        tiny_parts,
        **{"other people clean false positives": [0.2, 0.17, 0.24], "clip any forgeries caught": 2},
    )
    verdict, _ = analyze(clip_of_two, parts, ask=Ask(sampling=FEW))

    assert (0.2, 0.17, 0.24) == verdict.made.figures.strangers_flagged
    assert verdict.made.figures.forgeries_caught is None


def test_one_whole_frame_shows_both_people_where_both_are(of_two, clip_of_two: Path):
    """A frame of the clip itself, with the boxes that the verdict has at its time."""
    verdict, evidence = of_two
    (frame,) = evidence.frames
    picture = np.asarray(Image.open(io.BytesIO(b64decode(frame.jpeg))), np.float32)

    assert (640, 360) == (frame.width, frame.height) == picture.shape[1::-1]
    assert {"t1", "t2"} == {face.track_id for face in frame.faces}
    for face in frame.faces:
        (track,) = (track for track in verdict.tracks if track.track_id == face.track_id)
        (sample,) = (sample for sample in track.samples if sample.time_ms == frame.time_ms)
        assert (sample.box, sample.score) == (face.box, face.score)
    sampled = next(PyavDecoder(threads=1).decode([Clip(probe(clip_of_two, Settings()), FEW)]))
    row = (1000 * sampled.times_s).round().tolist().index(frame.time_ms)
    assert np.abs(sampled.pixels[row].permute(1, 2, 0).numpy() - picture).mean() < 4


def test_evidence_can_be_declined(tiny_parts: Parts, clip_of_two: Path):
    """Zero retention: no picture of anybody is made."""
    ask = Ask(sampling=FEW, evidence=EvidencePolicy(thumbnails=False))
    _, evidence = analyze(clip_of_two, tiny_parts, ask=ask)

    assert () == evidence.frames
    assert () == evidence.pictures


def test_a_job_is_echoed_in_its_verdict(tiny_parts: Parts, clip_of_none: Path):
    """Id, tag and tenant come back as they went in."""
    job = Job(
        job_id="j1",
        token="t",
        tag="upload 42",
        tenant="acme",
        media=Media(uri="file:///x"),
        submitted_at=datetime.now(UTC),
    )
    verdict, _ = analyze(clip_of_none, tiny_parts, ask=Ask.of(job, attempt=2))

    assert ("j1", "upload 42", "acme") == (verdict.job_id, verdict.tag, verdict.tenant)
    assert 2 == verdict.made.attempt
    assert Verdict.model_validate_json(dump(verdict)) == verdict


def test_too_many_faces_are_warned_of(tiny_parts: Parts, clip_of_two: Path):
    """One followed of two: the reader learns that some were not."""
    verdict, _ = analyze(clip_of_two, tiny_parts, ask=Ask(sampling=FEW, max_tracks=1))

    assert 1 == len(verdict.tracks)
    assert any(text.startswith("too_many_tracks") for text in verdict.warnings)


def test_a_broken_file_is_a_named_error(tiny_parts: Parts, tmp_path: Path):
    """Noise under a video's name."""
    path = tmp_path / "noise.mp4"
    path.write_bytes(np.random.default_rng(0).bytes(4000))

    with pytest.raises(Exception, match=r".") as caught:
        analyze(path, tiny_parts)

    assert caught.value.code in ("corrupt_media", "container_unsupported")
    assert issubclass(CorruptMedia, type(caught.value).__mro__[1])


def test_spans_limit_what_is_looked_at(tiny_parts: Parts, clip_of_two: Path):
    """Only the second half is sampled."""
    sampling = Sampling(max_frames=4, spans=({"start_ms": 1000, "end_ms": 2000},))
    verdict, _ = analyze(clip_of_two, tiny_parts, ask=Ask(sampling=sampling))
    times = [sample.time_ms for track in verdict.tracks for sample in track.samples]

    assert min(times) >= 1000


def test_the_same_clip_gives_the_same_verdict_twice(tiny_parts: Parts, clip_of_two: Path, of_two):
    """Nothing in the walk draws at random."""
    again, _ = analyze(clip_of_two, tiny_parts, ask=Ask(sampling=FEW))
    first, _ = of_two
    ignored = {"finished_at", "made"}

    assert first.model_dump(exclude=ignored) == again.model_dump(exclude=ignored)


def test_another_smallest_face_is_marked(tiny_parts: Parts, clip_of_none: Path):
    """The finder's settings belong to the model's calibration."""
    smaller = tiny_parts.finder_settings.model_copy(update={"min_face": 30})
    verdict, _ = analyze(clip_of_none, replace(tiny_parts, finder_settings=smaller))

    assert any(text.startswith("uncalibrated_finder") for text in verdict.warnings)


def test_more_frames_than_the_operator_allows_are_refused(tiny_parts: Parts, clip_of_none: Path):
    """The bound is the machine's, not the job's."""
    strict = replace(tiny_parts, settings=replace(tiny_parts.settings, max_frames=4))

    with pytest.raises(BadRequest, match="RALF_MAX_FRAMES"):
        analyze(clip_of_none, strict, ask=Ask(sampling=FEW))


def test_a_rate_that_max_frames_cannot_keep_up_with_is_warned_of(
    tiny_parts: Parts, clip_of_none: Path
):
    """Ten frames a second of one second are ten; with fewer allowed it is another rate."""
    said = {}
    for most in (10, 4):
        sampling = Sampling(mode="fps", fps=10, max_frames=most)
        verdict, _ = analyze(clip_of_none, tiny_parts, ask=Ask(sampling=sampling))
        said[most] = [text for text in verdict.warnings if text.startswith("thinned_sampling")]
        assert most == verdict.made.frames_asked

    assert [] == said[10]
    assert "10 frames a second are 10 here, max_frames is 4" in said[4][0]


def test_a_clip_is_calibrated_at_its_own_compression(eager_parts: Parts, clip_of_two: Path):
    """The score is the sigmoid at the clip's bits per pixel; the verdict says which that was."""
    artifact = eager_parts.artifact
    bits = probe(clip_of_two, Settings()).bits_per_pixel
    fitted = Calibration(
        by_compression=(
            CompressionPoint(bits_per_pixel=bits / 4, temperature=9, shift=9),
            CompressionPoint(bits_per_pixel=bits, temperature=3, shift=-2),
        )
    )
    manifest = artifact.manifest.model_copy(update={"calibration": fitted})
    parts = replace(eager_parts, artifact=replace(artifact, manifest=manifest))

    plain, _ = analyze(clip_of_two, eager_parts)
    found, _ = analyze(clip_of_two, parts)

    assert found.media.bits_per_pixel == pytest.approx(bits, abs=1e-6)
    assert {"temperature": 3, "shift": -2, "fitted_on": "nothing"} == found.made.calibration
    logit = np.log(plain.score / (1 - plain.score))
    assert found.score == pytest.approx(1 / (1 + np.exp(-(logit + 2) / 3)), abs=1e-5)
