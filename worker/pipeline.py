"""START HERE: a video file in, a verdict out.

    probe → decode → find → score → judge

The walk streams: one chunk of frames at a time goes through every stage, so memory is bounded by
Settings.chunk_bytes whatever the clip's length, and after each chunk there is a Partial: how far
it is, and what would be said of what was seen so far.  Whoever drives the walk may stop it there.
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
from ralf.worker.batcher import behind
from ralf.worker.contract import (
    EarlyStop,
    Evidence,
    EvidencePolicy,
    Job,
    Made,
    MediaFacts,
    Progress,
    Sampling,
    Verdict,
)
from ralf.worker.ensemble import Panel
from ralf.worker.errors import BadRequest
from ralf.worker.evidence import Gallery, pictures
from ralf.worker.media.crops import cut
from ralf.worker.media.probe import probe
from ralf.worker.media.sampling import plan, thinning
from ralf.worker.media.tracks import Tracker
from ralf.worker.media.types import Clip, Faces, Frames, Probe
from ralf.worker.runtime import Parts
from ralf.worker.verdict import Judgement, Scores, calibrated, judge


@dataclass(frozen=True)
class Ask:
    """What is wanted of one walk; every field has the model's own default."""

    sampling: Sampling | None = None
    max_tracks: int = 16
    evidence: EvidencePolicy = field(default_factory=EvidencePolicy)
    stop_early: EarlyStop | None = None
    sha256: str | None = None
    """Of the file, where the fetcher has it already."""
    job: Job | None = None
    attempt: int = 1
    probed: Probe | None = None
    """Where the caller has looked at the file already; it is not looked at twice."""
    spent_ms: Mapping[str, float] = field(default_factory=dict)
    """Stages that were over before the walk began, such as fetch."""

    @classmethod
    def of(cls, job: Job, *, attempt: int = 1, sha256: str | None = None) -> "Ask":
        """What this job asks."""
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
    """Where a walk stands after one chunk."""

    progress: Progress
    duration_s: float
    verdict: Callable[[], Verdict] = field(repr=False)
    """What would be said of what was seen so far; computed only when called."""


def analyze(
    path: Path,
    parts: Parts,
    *,
    ask: Ask = Ask(),
    progress: Callable[[Partial], None] | None = None,
) -> tuple[Verdict, Evidence]:
    """Walk the clip to its end; `progress` is called after each chunk and may raise Cancelled."""
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
                steps.close()
                raise


def walk(
    path: Path, parts: Parts, ask: Ask = Ask()
) -> Generator[Partial, None, tuple[Verdict, Evidence]]:
    """The same, a chunk at a time; closing the generator releases everything it holds."""
    state = _Walk(path, parts, ask)
    for frames in state.chunks():
        state.look(frames)
        yield Partial(state.progress(), state.probe.duration_s, lambda: state.verdict(partial=True))
        if state.settled():
            break
    with state.timed("judge"):
        state.judged()
    verdict = state.verdict(partial=state.stopped_early)
    return verdict, state.evidence(verdict)


class _Walk:
    """One clip's walk: what has been seen, and how long each stage took."""

    def __init__(self, path: Path, parts: Parts, ask: Ask) -> None:
        self.parts, self.ask = parts, ask
        self.manifest = parts.artifact.manifest
        self.stages_ms: dict[str, float] = dict(ask.spent_ms)
        with self.timed("probe"):
            self.probe: Probe = ask.probed or probe(path, parts.settings)
            self.sha256 = ask.sha256 or file_sha256(path)
        self.sampling = ask.sampling or parts.default_sampling
        if self.sampling.max_frames > parts.settings.max_frames:
            raise BadRequest(
                f"sampling.max_frames should be at most {parts.settings.max_frames} here "
                f"(RALF_MAX_FRAMES), got {self.sampling.max_frames}"
            )
        self.clip = Clip(self.probe, self.sampling)
        self.warnings: dict[str, None] = dict.fromkeys(self.probe.warnings)  # ordered, once each
        if self.manifest.untrained:
            self.warn("untrained_model: these weights were never trained; the score means nothing")
        if self.sampling != parts.default_sampling:
            self.warn("uncalibrated_sampling: the model was calibrated with another sampling")
        if (thinned := thinning(self.clip)) is not None:
            self.warn(thinned)
        if parts.finder_changed:
            self.warn("uncalibrated_finder: the model was calibrated with another finder setting")
        self.tracker = Tracker(max_tracks=min(ask.max_tracks, parts.settings.max_tracks))
        self.gallery = Gallery()
        self.panel = Panel(parts.engine)
        if (unlisted := self.panel.unlisted) is not None:
            self.warn(unlisted)
        self.scores = Scores.none()
        self.looked: list[NDArray[np.float64]] = []
        self.asked = self.decoded = self.replaced = 0
        self.decoders: dict[str, None] = {}  # ordered, once each
        self.total = len(plan(self.clip))
        self.stopped_early = False
        self._judged: Judgement | None = None

    def warn(self, text: str) -> None:
        """Say it once."""
        self.warnings.setdefault(text)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the block's wall time to its stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = (time.perf_counter() - start) * 1000
            self.stages_ms[stage] = round(self.stages_ms.get(stage, 0.0) + spent, 3)

    def chunks(self) -> Iterator[Frames]:
        """The decoder's chunks, its time counted."""
        frames = self.parts.decoder.decode([self.clip])
        try:
            while True:
                with self.timed("decode"):
                    chunk = next(frames, None)
                if chunk is None:
                    return
                yield chunk
        finally:
            close = getattr(frames, "close", None)
            if close is not None:
                close()

    def look(self, frames: Frames) -> None:
        """Find the chunk's faces, score them, and remember what is needed to judge."""
        self._judged = None
        self.asked, self.decoded = frames.asked, self.decoded + len(frames)
        self.replaced += frames.replaced
        if len(frames):
            self.decoders.setdefault(frames.decoder)
        self.looked.append(frames.times_s)
        for text in frames.warnings:
            self.warn(text)
        if not len(frames):  # a decoder's last word on frames that were lost
            return
        with self.timed("find"):
            faces = self.parts.finder.find(frames)
            tracks = self.tracker.update(frames, faces)
        if self.tracker.overflowed:
            self.warn(f"too_many_tracks: only {self.tracker.max_tracks} faces are followed")
        known = tracks >= 0
        if not known.any():
            return
        faces, tracks = _chosen(faces, known), tracks[known]
        with self.timed("cut"):
            crops = cut(frames, faces, self.manifest.input)
        with self.timed("score"):
            logits = self.panel(crops)
        times = frames.times_s[faces.frame]
        sides = faces.boxes[:, 2:] - faces.boxes[:, :2]
        self.scores = Scores.concat(
            [
                self.scores,
                Scores(
                    time_s=times,
                    frame=frames.indices[faces.frame],
                    box=faces.boxes,
                    face_px=sides.min(1),
                    confidence=faces.confidence,
                    track=tracks,
                    logit=logits,
                ),
            ]
        )
        if self.ask.evidence.thumbnails:
            self.gallery.offer(tracks, times, logits, crops)

    def judged(self) -> Judgement:
        """The judgement on all that was seen so far."""
        if self._judged is None:
            self._judged = judge(
                self.scores,
                looked_s=np.concatenate([*self.looked, np.zeros(0)]),
                width=self.probe.width,
                height=self.probe.height,
                duration_s=self.probe.duration_s,
                manifest=self.manifest,
                max_tracks=self.tracker.max_tracks,
            )
            if self.manifest.untrained:
                self._judged = undecided(self._judged)
        return self._judged

    def settled(self) -> bool:
        """Whether the job's own policy allows to stop here."""
        stop = self.ask.stop_early
        if stop is None or self.asked >= self.total:
            return False
        judgement = self.judged()
        self.stopped_early = (
            judgement.score is not None
            and judgement.score >= stop.score
            and any(
                track.decisive
                and track.score == judgement.score
                and track.faces >= stop.after_faces
                for track in judgement.tracks
            )
        )
        if self.stopped_early:
            self.warn(f"stopped_early: looked at {self.asked} of {self.total} frames")
        return self.stopped_early

    def progress(self) -> Progress:
        """How far the walk is."""
        return Progress(
            stage="analyze",
            percent=min(100.0, 100.0 * self.asked / max(self.total, 1)),
            frames_done=self.asked,
            frames_total=self.total,
            faces=len(self.scores),
            score=self.judged().score,
        )

    def verdict(self, *, partial: bool) -> Verdict:
        """The document."""
        judgement, job = self.judged(), self.ask.job
        return Verdict(
            job_id=job.job_id if job else None,
            tag=job.tag if job else None,
            tenant=job.tenant if job else None,
            session=job.session if job else None,
            label=judgement.label,
            score=judgement.score,
            reason=judgement.reason,
            threshold=judgement.threshold,
            tracks=judgement.tracks,
            segments=judgement.segments,
            timeline=judgement.timeline,
            media=media_facts(self.probe, self.sha256),
            made=self._made(),
            warnings=(*self.warnings, *judgement.warnings),
            partial=partial,
            finished_at=datetime.now(UTC),
        )

    def evidence(self, verdict: Verdict) -> Evidence:
        """The strongest faces of each track that the verdict shows."""
        names = self.judged().track_names
        kept = self.gallery.of(names)
        if not kept:
            return Evidence()
        residuals = None
        engine = explainer(behind(self.parts.engine))
        if engine is not None and engine.explains and self.ask.evidence.residuals:
            residuals = engine.explain(torch.stack([item.crop for item in kept])).residual
        logits = np.array([item.logit for item in kept], np.float32)
        scores = calibrated(logits, self.manifest.calibration).tolist()
        return Evidence(pictures=pictures(kept, names, scores, residuals))

    def _made(self) -> Made:
        artifact, engine, settings = self.parts.artifact, self.parts.engine, self.manifest
        return Made(
            ralf=__version__,
            model=settings.name,
            version=artifact.version,
            manifest_sha256=artifact.manifest_sha256,
            weights_sha256=settings.files["weights.safetensors"],
            detectors=self.panel.scores(self.scores, settings.aggregation),
            engine=engine.name,
            precision=engine.precision,
            device=engine.device,
            decoder="+".join(self.decoders) or self.parts.decoder.name,
            colour_policy=settings.input.colour,
            sampling=self.sampling,
            finder=self.parts.finder_settings.model_dump(),
            calibration=settings.calibration.model_dump(),
            aggregation=settings.aggregation.model_dump(),
            frames_asked=self.asked,
            frames_decoded=self.decoded - self.replaced,
            frames_replaced=self.replaced,
            faces=len(self.scores),
            stages_ms=dict(self.stages_ms),
            host=platform.node(),
            attempt=self.ask.attempt,
        )


def undecided(judgement: Judgement) -> Judgement:
    """The same numbers, deciding nothing: the model was never trained."""
    if judgement.label == "no_faces":
        return judgement
    why = {"decisive": False, "reason": "the model was never trained"}
    return replace(
        judgement,
        label="inconclusive",
        reason="The model was never trained, so its score decides nothing.",
        tracks=tuple(track.model_copy(update=why) for track in judgement.tracks),
        segments=(),
    )


def _chosen(faces: Faces, keep: NDArray[np.bool_]) -> Faces:
    return Faces(
        boxes=faces.boxes[keep],
        landmarks=faces.landmarks[keep],
        confidence=faces.confidence[keep],
        frame=faces.frame[keep],
    )


def file_sha256(path: Path) -> str:
    """SHA-256 of the file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def media_facts(found: Probe, sha256: str) -> MediaFacts:
    """What the verdict says of the file."""
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
    )
