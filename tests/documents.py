"""Small valid documents of the contract, for tests that need any one of them."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from ralf.worker.contract import (
    Box,
    Evidence,
    Failure,
    Job,
    Label,
    Made,
    Media,
    MediaFacts,
    Picture,
    Sample,
    Sampling,
    Threshold,
    Timeline,
    Track,
    Verdict,
)

SHA = "a" * 64
WHEN = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def a_job(name: str = "1", **fields: Any) -> Job:
    """A job with the id jNAME and the token tNAME."""
    given = {
        "job_id": f"j{name}",
        "token": f"t{name}",
        "media": Media(uri=f"https://media.example/{name}.mp4"),
        "submitted_at": WHEN,
    }
    return Job(**(given | fields))


def a_track(
    scores: Sequence[float],
    *,
    start_ms: int = 0,
    step_ms: int = 200,
    box: tuple[float, float, float, float] = (0.4, 0.2, 0.6, 0.6),
    name: str = "t1",
    min_faces: int = 3,
    score: float | None = None,
) -> Track:
    """A track of a face that does not move, with these scores at even steps."""
    samples = tuple(
        Sample(
            time_ms=start_ms + place * step_ms,
            frame=place,
            box=Box(left=box[0], top=box[1], right=box[2], bottom=box[3]),
            face_px=120,
            confidence=0.99,
            score=value,
        )
        for place, value in enumerate(scores)
    )
    decisive = len(scores) >= min_faces
    return Track(
        track_id=name,
        start_ms=samples[0].time_ms,
        end_ms=samples[-1].time_ms,
        faces=len(samples),
        score=(max(scores) if score is None else score) if decisive else None,
        score_max=max(scores),
        decisive=decisive,
        samples=samples,
    )


def a_verdict(
    tracks: Sequence[Track] = (),
    *,
    label: Label = "likely_forged",
    score: float | None = 0.93,
    duration_ms: int = 2000,
    version: str = "3f9c2a1b",
    **fields: Any,
) -> Verdict:
    """A verdict with these tracks."""
    given = {
        "label": label,
        "score": score,
        "reason": "t1 decided.",
        "threshold": Threshold(policy="fpr_0.05", forged_at=0.8, authentic_below=0.2),
        "tracks": tuple(tracks),
        "segments": (),
        "timeline": Timeline(bin_ms=1000, score=(score,), faces=(1,)),
        "media": MediaFacts(
            sha256=SHA,
            size_bytes=1,
            container="mp4",
            codec="h264",
            pixel_format="yuv420p",
            duration_ms=duration_ms,
            frame_rate=25,
            variable_rate=False,
            frames=duration_ms // 40,
            width=640,
            height=360,
            rotation=0,
            colour="bt601",
        ),
        "made": Made(
            ralf="0.1.0",
            model="ralf-small",
            version=version,
            manifest_sha256=SHA,
            weights_sha256=SHA,
            engine="torch",
            precision="fp32",
            device="cpu",
            decoder="pyav",
            colour_policy="by_tag_untagged_601",
            sampling=Sampling(),
            finder={},
            calibration={"temperature": 1.4},
            aggregation={"track": "top_half_mean", "min_faces": 3},
            frames_asked=10,
            frames_decoded=10,
            frames_replaced=0,
            faces=10,
            stages_ms={},
            host="here",
        ),
        "finished_at": WHEN,
    }
    return Verdict(**(given | fields))


def an_evidence() -> Evidence:
    """Evidence with one picture."""
    return Evidence(pictures=(Picture(track_id="t1", time_ms=0, score=0.9, face="aGk="),))


def a_failure(code: str = "fetch_failed", message: str = "the server answered 503") -> Failure:
    """A failure with a code and a message."""
    return Failure(code=code, message=message)


READY = {
    "job_id": "j1",
    "tenant": "default",
    "tag": "mine",
    "state": "succeeded",
    "label": "likely_forged",
    "score": 0.93,
}
"""What stream and webhook say of `a_job("1", tag="mine")` once it ended with a_verdict()."""
