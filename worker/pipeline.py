"""START HERE: a video file in, a verdict out.

    probe → sample → decode → find faces → track → crop → score → judge
    media/  media/   media/   media/       media/  media/ kernels/ verdict.py

One chunk of frames at a time goes through every stage, so memory is bounded by
Settings.chunk_bytes however long the clip is.  After each chunk the caller gets a Partial: how far
the walk is, and the verdict on the frames so far.  The caller may stop the walk there.

Of a long clip, sampled by default, a second pass looks at more frames around the moments that score
highest, so that a forgery shorter than the distance of two sampled frames is found where one of
them touches it (_Walk.look_again).

`analyze` runs a walk to its end.  `walk` is the same as a generator, for callers that must answer
between two chunks.  _Walk holds one clip's state; read `walk` and `_Walk.process` first.
"""

import hashlib
import platform
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ralf import __version__
from ralf.kernels.engine_torch import explainer
from ralf.kernels.manifest import (
    FORGERIES_CAUGHT,
    RESIDUAL_INSIDE,
    STRANGERS_FLAGGED,
    Manifest,
)
from ralf.worker.batcher import engine_behind
from ralf.worker.contract import (
    EarlyStop,
    Evidence,
    EvidencePolicy,
    Job,
    Made,
    MediaFacts,
    ModelFigures,
    Progress,
    Sampling,
    Verdict,
)
from ralf.worker.ensemble import FaceScorer
from ralf.worker.errors import BadRequest
from ralf.worker.evidence import StrongestFaces, pictures
from ralf.worker.media.crops import cut
from ralf.worker.media.cuts import signatures
from ralf.worker.media.probe import probe
from ralf.worker.media.sampling import (
    LOOK_FRAMES,
    for_long_clip,
    pixels_read,
    plan,
    refuse_work,
    second_look,
    thinning,
)
from ralf.worker.media.tracks import Seen, Tracker, follow_all
from ralf.worker.media.types import Clip, Frames, Probe
from ralf.worker.media.views import views_of
from ralf.worker.runtime import Parts
from ralf.worker.verdict import Judgement, Scores, calibrated, judge, suspicious, without_decision


@dataclass(frozen=True)
class Ask:
    """The options of one walk; by default the model's own."""

    sampling: Sampling | None = None
    max_tracks: int = 16
    evidence: EvidencePolicy = field(default_factory=EvidencePolicy)
    stop_early: EarlyStop | None = None
    sha256: str | None = None
    """The file's hash, where the fetcher has computed it already."""
    job: Job | None = None
    attempt: int = 1
    probed: Probe | None = None
    """The file's facts, where the caller has probed it already."""
    spent_ms: Mapping[str, float] = field(default_factory=dict)
    """Times of stages that ended before the walk began, such as fetch."""

    @classmethod
    def of(cls, job: Job, *, attempt: int = 1, sha256: str | None = None) -> "Ask":
        """The options of a job."""
        return cls(
            sampling=job.sampling,
            max_tracks=job.max_tracks,
            evidence=job.evidence,
            stop_early=job.stop_early,
            sha256=sha256,
            job=job,
            attempt=attempt,
        )


@dataclass(frozen=True)
class Partial:
    """How far a walk is after one chunk."""

    progress: Progress
    duration_s: float
    verdict: Callable[[], Verdict] = field(repr=False)
    """Computes the verdict on the frames so far."""


def analyze(
    path: str | Path,
    parts: Parts,
    *,
    ask: Ask = Ask(),
    progress: Callable[[Partial], None] | None = None,
) -> tuple[Verdict, Evidence]:
    """Judge a clip; `progress` is called after each chunk and may raise Cancelled to stop."""
    steps = walk(path, parts, ask)
    while True:
        try:
            partial = next(steps)
        except StopIteration as end:
            result: tuple[Verdict, Evidence] = end.value
            return result
        if progress is not None:
            try:
                progress(partial)
            except BaseException:
                # Closed here: the error's traceback refers to this frame, so the walk would
                # otherwise keep its file open until the error is released.
                steps.close()
                raise


def walk(
    path: str | Path, parts: Parts, ask: Ask = Ask()
) -> Generator[Partial, None, tuple[Verdict, Evidence]]:
    """The same, one chunk at a time; closing the generator closes the file and frees the memory."""
    clip = _Walk(Path(path), parts, ask)
    while True:
        for frames in clip.chunks():
            clip.process(frames)
            now = clip.progress()
            yield Partial(now, clip.probe.duration_s, lambda: clip.verdict(partial=True))
            if clip.may_stop_early():
                break
        if not clip.look_again():
            break
    return clip.verdict(partial=clip.stopped_early), clip.evidence()


class _Walk:
    """One clip's state: the scores so far, the warnings, and how long each stage took."""

    def __init__(self, path: Path, parts: Parts, ask: Ask) -> None:
        self.parts, self.ask = parts, ask
        self.manifest = parts.artifact.manifest
        self.stages_ms: dict[str, float] = dict(ask.spent_ms)
        with self.timed("probe"):
            # A job's child process has probed the file already.  To probe again costs 30 ms for a
            # short clip and seconds for hours of video.
            self.probe: Probe = ask.probed or probe(path, parts.settings)
            self.sha256 = ask.sha256 or file_sha256(path)
        self.sampling = ask.sampling or for_long_clip(
            parts.default_sampling,
            self.probe,
            most_frames=parts.settings.max_frames,
            most_pixels=parts.settings.max_decode_pixels / 4,  # a choice of ours costs less
        )
        if self.sampling.max_frames > parts.settings.max_frames:
            raise BadRequest(
                f"sampling.max_frames should be at most {parts.settings.max_frames} here "
                f"(RALF_MAX_FRAMES), got {self.sampling.max_frames}"
            )
        self.clip = Clip(self.probe, self.sampling)
        self.calibration = self.manifest.calibration.at(self.probe.bits_per_pixel)
        wanted = plan(self.clip)
        self.pixels = pixels_read(self.probe, wanted)
        refuse_work(self.pixels, parts.settings)
        self.by_pass = [len(wanted)]
        self.tracker = Tracker(max_tracks=min(ask.max_tracks, parts.settings.max_tracks))
        self.scorer = FaceScorer(parts.engine)
        self.scores = Scores.none()
        self.strongest_faces = StrongestFaces()
        self.sampled_s: list[NDArray[np.float64]] = []
        self.again_s: list[NDArray[np.float64]] = []
        self.seen: list[Seen] = []
        self.double = 0
        self.percent = 0.0
        self.asked = self.decoded = self.replaced = 0
        # Dicts as ordered sets: each warning and each decoder is listed once.
        self.warnings: dict[str, None] = dict.fromkeys(self.probe.warnings)
        self.decoders: dict[str, None] = {}
        self.stopped_early = False
        self._judgement: Judgement | None = None
        self._warn_of_settings()

    def _warn_of_settings(self) -> None:
        """Say where this walk differs from the one that the model was calibrated with."""
        if self.manifest.untrained:
            self.warn("untrained_model: these weights were never trained; the score means nothing")
        # A job that names the model's own sampling differs in nothing.
        if self.ask.sampling not in (None, self.parts.default_sampling):
            self.warn("uncalibrated_sampling: the model was calibrated with another sampling")
        if (thinned := thinning(self.clip)) is not None:
            self.warn(thinned)
        if self.parts.finder_changed:
            self.warn("uncalibrated_finder: the model was calibrated with another finder setting")
        if (no_members := self.scorer.warning) is not None:
            self.warn(no_members)

    def warn(self, text: str) -> None:
        """Add a warning to the verdict, once."""
        self.warnings.setdefault(text)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the block's wall time to its stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = (time.perf_counter() - start) * 1000
            self.stages_ms[stage] = round(self.stages_ms.get(stage, 0.0) + spent, 3)

    @property
    def total(self) -> int:
        """Frames to sample in all passes so far."""
        return sum(self.by_pass)

    def chunks(self) -> Iterator[Frames]:
        """The decoder's chunks of this pass, with the time that decoding took."""
        frames = self.parts.decoder.decode([self.clip])
        try:
            while True:
                # Only next() is timed: while this generator waits at `yield`, the caller finds and
                # scores faces, which is not decoding.
                with self.timed("decode"):
                    chunk = next(frames, None)
                if chunk is None:
                    return
                yield chunk
        finally:
            # A generator that is stopped in the middle must let go of the open file now.
            close = getattr(frames, "close", None)
            if close is not None:
                close()

    def process(self, frames: Frames) -> None:
        """One chunk through every stage: find its faces, track them, score them."""
        self._judgement = None
        again = len(self.by_pass) > 1
        if again:
            frames = self._unseen(frames)
        # Also for a chunk without faces, which returns early below: its frames count as sampled,
        # and so change the timeline and the longest gap.
        self._count(frames)
        if not len(frames):  # the decoder only reports frames that were lost
            return
        with self.timed("find"):
            faces = self.parts.finder.find(frames)
            seen = Seen(frames.times_s, signatures(frames.pixels), faces)
            self.seen.append(seen)
            tracks = self._track_anew() if again else self.tracker.follow(*seen)
        if self.tracker.overflowed:
            self.warn(f"too_many_tracks: only {self.tracker.max_tracks} faces are followed")
        # Faces that are not followed are dropped before they are cut: a frame of a large crowd must
        # cost no more than max_tracks crops.
        followed = tracks >= 0
        if not followed.any():
            return
        faces, tracks = faces.take(followed), tracks[followed]
        with self.timed("cut"):
            crops = cut(frames, faces, self.manifest.input)
        with self.timed("view"):
            views = views_of(frames, faces)
        with self.timed("score"):
            logits = self.scorer(crops)
        times = frames.times_s[faces.frame]
        sides = faces.boxes[:, 2:] - faces.boxes[:, :2]
        new = Scores(
            time_s=times,
            frame=frames.indices[faces.frame],
            box=faces.boxes,
            face_px=sides.min(1),
            confidence=faces.confidence,
            track=tracks,
            logit=logits,
            again=np.full(len(faces), again),
            view=views,
        )
        self.scores = Scores.concat([self.scores, new])
        # A job may ask that no picture is kept; then no crop outlives its chunk.
        if self.ask.evidence.thumbnails:
            self.strongest_faces.add(
                tracks, times, logits, crops, lambda row: frames.pixels[int(faces.frame[row])]
            )

    def _count(self, frames: Frames) -> None:
        """Note which frames were sampled, and what went wrong with them."""
        self.asked = sum(self.by_pass[:-1]) + frames.asked - self.double
        self.decoded += len(frames)
        self.replaced += frames.replaced
        self.sampled_s.append(frames.times_s)
        if len(self.by_pass) > 1:
            self.again_s.append(frames.times_s)
        if len(frames):
            self.decoders.setdefault(frames.decoder)
        for text in frames.warnings:
            self.warn(text)

    def _unseen(self, frames: Frames) -> Frames:
        """The chunk without frames that the first pass had; one frame must not count twice."""
        known = np.concatenate(self.sampled_s)
        new = np.flatnonzero(~np.isin(frames.times_s, known))
        if len(new) == len(frames):
            return frames
        double = len(frames) - len(new)
        self.by_pass[-1] -= double
        self.double += double
        return replace(
            frames,
            pixels=frames.pixels[torch.from_numpy(new).to(frames.pixels.device)],
            times_s=frames.times_s[new],
            indices=frames.indices[new],
        )

    def _track_anew(self) -> NDArray[np.int64]:
        """Track all faces of both passes in order of time; the newest chunk's tracks."""
        tracks = follow_all(self.seen, self.tracker.max_tracks)
        # Which faces of a frame are followed does not depend on other frames, so the rows stay.
        newest = len(self.seen[-1].faces)
        older = tracks[: len(tracks) - newest]
        older = older[older >= 0]
        moved = {
            (int(old), float(at)): int(new)
            for old, at, new in zip(self.scores.track, self.scores.time_s, older, strict=True)
        }
        self.strongest_faces.follow(lambda face: moved[face.track, face.time_s])
        self.scores = replace(self.scores, track=older)
        return tracks[len(tracks) - newest :]

    def look_again(self) -> bool:
        """Begin the second pass, if there is a reason, and time and work for it; at most once."""
        default = self.ask.sampling in (None, self.parts.default_sampling)
        if self.stopped_early or len(self.by_pass) > 1 or not default or self.manifest.untrained:
            return False
        found = self.judgement()
        # A third of the remaining time, because what comes need not be as fast as what was.
        spent_s = sum(self.stages_ms.values()) / 1000
        left_s = self.parts.settings.time_allowed(self.probe.duration_s) - spent_s
        if self.ask.job is not None and self.ask.job.deadline is not None:
            until = (self.ask.job.deadline - datetime.now(UTC)).total_seconds()
            left_s = min(left_s, until)
        affordable = left_s / 3 / max(spent_s / max(self.asked, 1), 1e-6)
        most = self.parts.settings.max_decode_pixels
        finer = second_look(
            self.probe,
            suspicious(self.scores, found, self.calibration, self.manifest)[
                : max(0, int(affordable // LOOK_FRAMES))
            ],
            np.sort(np.concatenate([*self.sampled_s, np.zeros(0)])),
            min(most / 4, most - self.pixels),  # a choice of ours costs less
        )
        if finer is None:
            return False
        self.clip = Clip(self.probe, finer)
        self.by_pass.append(len(plan(self.clip)))
        return True

    def judgement(self) -> Judgement:
        """The judgement on all frames so far; computed once per chunk."""
        if self._judgement is None:
            with self.timed("judge"):
                self._judgement = self._judged()
        return self._judgement

    def _judged(self) -> Judgement:
        found = judge(
            self.scores,
            # np.concatenate refuses an empty list, and a decoder may give no chunk.
            np.concatenate([*self.sampled_s, np.zeros(0)]),
            width=self.probe.width,
            height=self.probe.height,
            duration_s=self.probe.duration_s,
            manifest=self.manifest,
            calibration=self.calibration,
            max_tracks=self.tracker.max_tracks,
            again_s=np.concatenate([*self.again_s, np.zeros(0)]),
        )
        return without_decision(found) if self.manifest.untrained else found

    def may_stop_early(self) -> bool:
        """Whether the job's own policy allows to stop here; the verdict then says so."""
        stop = self.ask.stop_early
        # After the last chunk every frame was judged, so the verdict must not be marked partial.
        if stop is None or self.asked >= self.total:
            return False
        found = self.judgement()
        self.stopped_early = (
            found.score is not None
            and found.score >= stop.score
            and any(
                # The score is one track's.  That track alone must have enough faces: faces of other
                # tracks say nothing about it.
                track.decisive and track.score == found.score and track.faces >= stop.after_faces
                for track in found.tracks
            )
        )
        if self.stopped_early:
            self.warn(f"stopped_early: looked at {self.asked} of {self.total} frames")
        return self.stopped_early

    def progress(self) -> Progress:
        """How far the walk is; the second pass, which nobody could foresee, takes nothing back."""
        self.percent = max(self.percent, min(100.0, 100.0 * self.asked / max(self.total, 1)))
        return Progress(
            stage="analyze",
            percent=self.percent,
            frames_done=self.asked,
            frames_total=self.total,
            faces=len(self.scores),
            score=self.judgement().score,
        )

    def verdict(self, *, partial: bool) -> Verdict:
        """The verdict on all frames so far."""
        found, job = self.judgement(), self.ask.job
        return Verdict(
            job_id=job.job_id if job else None,
            tag=job.tag if job else None,
            tenant=job.tenant if job else None,
            session=job.session if job else None,
            label=found.label,
            score=found.score,
            reason=found.reason,
            threshold=found.threshold,
            tracks=found.tracks,
            segments=found.segments,
            timeline=found.timeline,
            media=media_facts(self.probe, self.sha256),
            made=self._made(),
            warnings=(*self.warnings, *found.warnings),
            partial=partial,
            finished_at=datetime.now(UTC),
        )

    def evidence(self) -> Evidence:
        """Pictures of the strongest faces of each track that the verdict lists."""
        names = self.judgement().track_names
        kept = self.strongest_faces.of_tracks(names)
        if not kept:
            return Evidence()
        residuals = None
        engine = explainer(engine_behind(self.parts.engine))
        wanted = self.ask.evidence.residuals and self.manifest.residual_shows_where
        if engine is not None and engine.explains and wanted:
            residuals = engine.explain(torch.stack([face.crop for face in kept])).residual
        logits = np.array([face.logit for face in kept], np.float32)
        scores = calibrated(logits, self.calibration).tolist()
        return Evidence(
            pictures=pictures(kept, names, scores, residuals),
            frames=self.strongest_faces.frames(self.judgement().tracks),
        )

    def _made(self) -> Made:
        """Model, engine, settings, counts and times: enough to make the verdict again."""
        artifact, engine, manifest = self.parts.artifact, self.parts.engine, self.manifest
        return Made(
            ralf=__version__,
            model=manifest.name,
            version=artifact.version,
            manifest_sha256=artifact.manifest_sha256,
            weights_sha256=manifest.files["weights.safetensors"],
            detectors=self.scorer.member_scores(self.scores, manifest.aggregation),
            figures=model_figures(manifest),
            engine=engine.name,
            precision=engine.precision,
            device=engine.device,
            # What really decoded: a routed clip, or one that DALI gave up, may have come from
            # another decoder than the configured one.
            decoder="+".join(self.decoders) or self.parts.decoder.name,
            colour_policy=manifest.input.colour,
            sampling=self.sampling,
            longest_gap_ms=self.judgement().longest_gap_ms,
            finder=self.parts.finder_settings.model_dump(),
            calibration=self.calibration.model_dump(exclude={"by_compression"}),
            aggregation=manifest.aggregation.model_dump(),
            frames_asked=self.asked,
            frames_by_pass=tuple(self.by_pass),
            frames_decoded=self.decoded - self.replaced,
            frames_replaced=self.replaced,
            faces=len(self.scores),
            stages_ms=dict(self.stages_ms),
            host=platform.node(),
            attempt=self.ask.attempt,
        )


def file_sha256(path: Path) -> str:
    """SHA-256 of the file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_figures(manifest: Manifest) -> ModelFigures:
    """What the manifest says of the model's errors, for people who read the verdict."""
    located = manifest.figure(RESIDUAL_INSIDE)
    return ModelFigures(
        strangers_flagged=manifest.figure(STRANGERS_FLAGGED),
        forgeries_caught=manifest.figure(FORGERIES_CAUGHT),
        residual_auc=located and located[0],
    )


def media_facts(found: Probe, sha256: str) -> MediaFacts:
    """The file's facts for the verdict."""
    return MediaFacts(
        sha256=sha256,
        size_bytes=found.size_bytes,
        container=found.container,
        codec=found.codec,
        pixel_format=found.pixel_format,
        duration_ms=round(found.duration_s * 1000),
        frame_rate=round(found.frame_rate, 3),
        variable_rate=found.variable_rate,
        frames=found.frame_count,
        width=found.width,
        height=found.height,
        rotation=found.rotation,
        colour=f"{found.colour_space}/{found.colour_range}",
        bits_per_pixel=found.bits_per_pixel and round(found.bits_per_pixel, 6),
    )
