"""Verdicts and evidence as the pipeline would make them, for tests that need no pipeline.

The scores are written by hand and judged by ralf.worker.verdict.  The pictures are crops of
scikit-image's astronaut, a public-domain portrait.
"""

import base64
import io
from datetime import UTC, datetime
from functools import cache
from typing import Any

import numpy as np
from PIL import Image
from skimage.data import astronaut

from ralf.kernels.manifest import Aggregation, Calibration
from ralf.worker.contract import (
    Evidence,
    FaceInFrame,
    Made,
    MediaFacts,
    ModelFigures,
    Picture,
    Sampling,
    Threshold,
    Verdict,
    WholeFrame,
)
from ralf.worker.verdict import Judgement, Scores, judge_by

CALIBRATION = Calibration(temperature=1.4, fitted_on="val, crf 23–40")
AGGREGATION = Aggregation()
THRESHOLD = Threshold(policy="fpr_0.05", forged_at=0.62, authentic_below=0.35)


def scores(
    logit: Any, *, track: int = 0, time_s: Any, face_px: float = 120.0, left: float = 200.0
) -> Scores:
    """One track of faces in a frame of 1280 × 720."""
    logit, time_s = np.asarray(logit, np.float64), np.asarray(time_s, np.float64)
    m = len(logit)
    return Scores(
        time_s=time_s,
        frame=np.rint(time_s * 25).astype(np.int64),
        box=np.tile([left, 150.0, left + face_px, 150.0 + 1.3 * face_px], (m, 1)),
        face_px=np.full(m, face_px),
        confidence=np.full(m, 0.995),
        track=np.full(m, track, np.int64),
        logit=logit,
    )


def judgement(found: Scores, sampled_s: Any, duration_s: float) -> Judgement:
    """Judge the scores by the rules above."""
    return judge_by(
        found,
        np.asarray(sampled_s, np.float64),
        width=1280,
        height=720,
        duration_s=duration_s,
        calibration=CALIBRATION,
        aggregation=AGGREGATION,
        threshold=THRESHOLD,
    )


def verdict(judged: Judgement, *, duration_s: float = 10.0, **changes: Any) -> Verdict:
    """Put a judgement into a whole verdict document."""
    fields: dict[str, Any] = {
        "job_id": "job-3f9c2a1b",
        "tag": "upload 4711",
        "tenant": "default",
        **{name: getattr(judged, name) for name in vars(judged) if name in Verdict.model_fields},
        "media": media(duration_s),
        "made": made(sum(track.faces for track in judged.tracks)),
        "finished_at": datetime(2025, 11, 20, 7, 30, tzinfo=UTC),
    }
    return Verdict(**{**fields, **changes})


def media(duration_s: float = 10.0) -> MediaFacts:
    """A plain H.264 clip."""
    return MediaFacts(
        sha256="7d1a54127b222502f5b79b5fb0803061152a44f92b37e23c6527baf665d4da9a",
        size_bytes=4_812_337,
        container="mov,mp4,m4a,3gp,3g2,mj2",
        codec="h264",
        pixel_format="yuv420p",
        duration_ms=round(duration_s * 1000),
        frame_rate=25.0,
        variable_rate=False,
        frames=round(duration_s * 25),
        width=1280,
        height=720,
        rotation=0,
        colour="bt709/tv",
    )


def made(faces: int = 40) -> Made:
    """The `made` part of a verdict from a CPU worker."""
    return Made(
        ralf="0.1.0",
        model="ralf-small",
        version="3f9c2a1b",
        manifest_sha256="3f9c2a1b" + "0" * 56,
        weights_sha256="c4" * 32,
        figures=ModelFigures(strangers_flagged=(0.2, 0.17, 0.24), forgeries_caught=(0.65,)),
        engine="torch",
        precision="bf16",
        device="cpu",
        decoder="pyav",
        colour_policy="by_tag_untagged_601",
        sampling=Sampling(),
        finder={"long_side": 640, "min_face": 48},
        calibration=CALIBRATION.model_dump(exclude={"by_compression"}),
        aggregation=AGGREGATION.model_dump(),
        frames_asked=32,
        frames_decoded=31,
        frames_replaced=1,
        faces=faces,
        stages_ms={"probe": 11.5, "decode": 412.0, "find": 880.25, "score": 1931.0, "judge": 18.0},
        host="worker-1",
    )


def forged() -> Verdict:
    """Two people, one forged for a while; then no face; then a part without sampled frames."""
    sampled = np.concatenate([np.arange(24) * 0.3 + 0.15, [9.6]])
    first = scores(
        np.interp(sampled[:20], [0, 1.5, 2, 4.4, 4.8, 6], [-2.5, -2, 3.5, 5.5, -1, -2.5]),
        time_s=sampled[:20],
    )
    second = scores(-3 + np.sin(sampled[4:18]), track=1, time_s=sampled[4:18], left=800.0)
    small = scores([2.0, 2.5], track=2, time_s=sampled[8:10], left=40.0, face_px=30.0)
    found = Scores.concat([first, second, small])
    return verdict(judgement(found, sampled, 10.0))


def authentic() -> Verdict:
    """One person, clearly real."""
    sampled = np.arange(32) * 0.3125 + 0.156
    found = scores(-3.5 + np.sin(sampled * 2), time_s=sampled)
    return verdict(judgement(found, sampled, 10.0))


def undecided() -> Verdict:
    """Only two faces: too few to decide."""
    sampled = np.arange(32) * 0.3125 + 0.156
    return verdict(judgement(scores([3.0, 4.0], time_s=sampled[5:7]), sampled, 10.0))


def faceless() -> Verdict:
    """Frames were sampled and no face was found."""
    sampled = np.arange(32) * 0.3125 + 0.156
    return verdict(judgement(Scores.none(), sampled, 10.0))


def evidence(of: Verdict, per_track: int = 5) -> Evidence:
    """Pictures of the highest scores of each track, each with another brightness."""
    pictures = []
    for track in of.tracks:
        best = sorted(track.samples, key=lambda sample: -sample.score)[:per_track]
        for place, sample in enumerate(best):
            pictures.append(
                Picture(
                    track_id=track.track_id,
                    time_ms=sample.time_ms,
                    score=sample.score,
                    face=face(place, heated=False),
                    residual=face(place, heated=True),
                )
            )
    return Evidence(pictures=tuple(pictures), frames=whole_frames(of))


def whole_frames(of: Verdict) -> tuple[WholeFrame, ...]:
    """One frame with the first face of each track."""
    faces = tuple(
        FaceInFrame(track_id=t.track_id, box=t.samples[0].box, score=t.samples[0].score)
        for t in of.tracks
    )
    if not faces:
        return ()
    at = of.tracks[0].samples[0].time_ms
    frame = Image.fromarray(astronaut()[100:388]).resize((640, 360))
    return (WholeFrame(time_ms=at, width=640, height=360, jpeg=_jpeg(frame), faces=faces),)


def proved(of: Verdict) -> Verdict:
    """The same from a model whose residual was proved to point at forgeries."""
    figures = of.made.figures.model_copy(update={"residual_auc": 0.8})
    return of.model_copy(update={"made": of.made.model_copy(update={"figures": figures})})


def _jpeg(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return base64.b64encode(file.getvalue()).decode()


@cache
def face(place: int, *, heated: bool) -> str:
    """A crop of 256 × 256 as base64 JPEG; `heated` paints a heat map over the mouth."""
    shift = 4 * place
    crop = astronaut()[20 + shift : 200 + shift, 134 + shift : 314 + shift].astype(np.float32)
    crop = crop * (0.85 + 0.07 * place)
    if heated:
        y, x = np.mgrid[0:180, 0:180]
        spot = np.exp(-(((x - 90) / 34) ** 2 + ((y - 118 + 6 * place) / 20) ** 2))
        alpha = (0.85 * spot)[..., None]
        crop = crop.mean(-1, keepdims=True) * (1 - alpha) + np.array([230, 97, 1]) * alpha
    return _jpeg(Image.fromarray(np.clip(crop, 0, 255).astype(np.uint8)).resize((256, 256)))
