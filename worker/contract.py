"""The wire format: what a backend sends and what it gets back.

Job in, Verdict and Evidence out, a stream's SessionVerdict, and a person's Review: JSON documents
with a `schema` name, exported to docs/ as JSON Schema by `python -m ralf.worker.contract`.
Boxes are fractions of the displayed frame; times are whole milliseconds of the stream's own
clock; every score is P(forged), 0 to 1.

A Job with an unknown field is refused, because a typo must not become a default.  In every other
document an unknown field is ignored: workers are upgraded before backends, so a backend must be
able to read what a newer worker writes.
Imports no torch: ralf.worker.client needs this file.
"""

import json
import sys
from collections.abc import Mapping
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

from ralf.kernels.manifest import Sampling as ModelSampling
from ralf.kernels.manifest import Strict, Unit

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$")]
ModelName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}(@[0-9a-f]{8})?$")]
JobId = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Milliseconds = Annotated[int, Field(ge=0)]
Priority = Literal["high", "default"]
State = Literal["queued", "running", "succeeded", "failed", "cancelled", "expired", "quarantined"]
ENDED: frozenset[str] = frozenset({"succeeded", "failed", "cancelled", "expired", "quarantined"})
Label = Literal["likely_forged", "likely_authentic", "inconclusive", "no_faces"]


class Output(BaseModel):
    """A document that Ralf writes: frozen; a field that a newer Ralf added is ignored."""

    model_config = ConfigDict(
        # pydantic writes NaN as null, and a null score means that no track may decide: a broken
        # number must be an error instead.
        frozen=True,
        extra="ignore",
        allow_inf_nan=False,
        populate_by_name=True,
    )


class Span(Strict):
    """A part of the clip, from start to end."""

    start_ms: Milliseconds
    end_ms: Milliseconds

    @model_validator(mode="after")
    def _forward(self) -> "Span":
        if self.end_ms <= self.start_ms:
            raise ValueError(f"end_ms {self.end_ms} should be after start_ms {self.start_ms}")
        return self


class Sampling(ModelSampling):
    """Which frames are judged; `spans` limits them to parts of the clip."""

    spans: Annotated[tuple[Span, ...], Field(max_length=64)] = ()


class Media(Strict):
    """Where the upload is."""

    uri: Annotated[str, Field(min_length=1, max_length=4096)]
    sha256: Sha256 | None = None
    size_bytes: Annotated[int, Field(ge=0)] | None = None


class Callback(Strict):
    """Where the verdict is pushed; signed as Standard Webhooks 1.0 with the named secret."""

    url: Annotated[str, Field(pattern=r"^https?://", max_length=2048)]
    secret_id: Name = "default"
    events: tuple[Literal["verdict.ready", "verdict.failed", "session.alert"], ...] = (
        "verdict.ready",
        "verdict.failed",
        "session.alert",
    )


class EvidencePolicy(Strict):
    """What pictures are kept for reviewers."""

    thumbnails: bool = True
    """Faces, and a few whole frames with the faces' boxes."""
    residuals: bool = True
    """Where a face differs from what the network rebuilt; only from models whose manifest proves
    that this points at forgeries."""
    retain: bool = True


class SessionPart(Strict):
    """This job is one numbered segment of a longer stream."""

    session_id: Name
    number: Annotated[int, Field(ge=0)]
    offset_ms: Milliseconds
    """Where the segment starts on the stream's clock."""
    last: bool = False


def _drop_unknown(model: type[BaseModel], value: object) -> object:
    """The value without the fields that the model does not have."""
    # Left to pydantic, whose error names the field.
    if not isinstance(value, Mapping):
        return value
    return {name: part for name, part in value.items() if name in model.model_fields}


def _sampling_used(value: object) -> object:
    kept = _drop_unknown(Sampling, value)
    if isinstance(kept, dict) and isinstance(spans := kept.get("spans"), list | tuple):
        kept["spans"] = [_drop_unknown(Span, span) for span in spans]
    return kept


# A Job's parts that other documents repeat: strict in the Job, lenient there.
SamplingUsed = Annotated[Sampling, BeforeValidator(_sampling_used)]
PartOfSession = Annotated[SessionPart, BeforeValidator(partial(_drop_unknown, SessionPart))]


class EarlyStop(Strict):
    """Stop the walk once the score is this clear; the verdict says that it stopped."""

    score: Unit = 0.99
    after_faces: Annotated[int, Field(ge=1)] = 8


class Job(Strict):
    """One moderation job, as it is stored in Redis."""

    # With an underscore, because `schema` is a method of pydantic's BaseModel.
    schema_: Literal["ralf.job/1"] = Field("ralf.job/1", alias="schema")
    job_id: JobId
    token: Annotated[str, Field(min_length=1, max_length=256)]
    """The client's request token: the same token and body is the same job."""
    media: Media
    tag: Annotated[str, Field(max_length=256)] | None = None
    """Echoed in the verdict."""
    tenant: Name = "default"
    priority: Priority = "default"
    sampling: Sampling | None = None
    """None is the model's own."""
    max_tracks: Annotated[int, Field(ge=1, le=64)] = 16
    deadline: AwareDatetime | None = None
    callback: Callback | None = None
    evidence: EvidencePolicy = EvidencePolicy()
    session: SessionPart | None = None
    stop_early: EarlyStop | None = None
    model: ModelName | None = None
    """Pin a model by name or name@version; None is the worker's own."""
    # W3C Trace Context, version 00: 2 + 32 + 16 + 2 hex digits and three dashes.
    traceparent: Annotated[str, Field(pattern=r"^[0-9a-f-]{55}$")] | None = None
    submitted_at: AwareDatetime


class Progress(Output):
    """What a running job has done so far."""

    stage: Literal["queued", "fetch", "probe", "analyze", "finish"]
    percent: Annotated[float, Field(ge=0, le=100)]
    frames_done: int = 0
    frames_total: int = 0
    faces: int = 0
    score: Unit | None = None
    """The score of what has been seen so far."""


class Box(Output):
    """Fractions of the displayed frame."""

    left: Unit
    top: Unit
    right: Unit
    bottom: Unit


class Sample(Output):
    """One face in one frame."""

    time_ms: Milliseconds
    frame: int
    box: Box
    face_px: int
    """Shorter side of the face's box, in source pixels."""
    confidence: Unit
    score: Unit
    counted: bool = True
    """False: too small to count."""
    view: Literal["clear", "occluded", "unusual_pose"] = "clear"
    """Whether the face is hidden in part, or turned or upside down, as far as that can be seen."""
    second_pass: bool = False
    """From a second look at a suspicious moment: counts for segments, and for the track's score
    only where the track has too few other faces."""


class Track(Output):
    """One face followed through the clip."""

    track_id: str
    start_ms: Milliseconds
    end_ms: Milliseconds
    faces: int
    score: Unit | None
    """None where too few faces counted."""
    score_max: Unit
    decisive: bool
    """Whether this track may decide the video."""
    reason: str | None = None
    """Why it may not, or may not call the video authentic: occluded faces, an unusual pose."""
    samples: tuple[Sample, ...]


class Segment(Output):
    """A stretch of one track at or above the threshold."""

    start_ms: Milliseconds
    end_ms: Milliseconds
    track_id: str
    score: Unit
    peak_ms: Milliseconds


class Timeline(Output):
    """The clip in equal bins: its strongest score, None where nothing was scored."""

    bin_ms: int
    score: tuple[Unit | None, ...]
    faces: tuple[int | None, ...]
    """0: sampled, and no face found; None: not sampled."""


class Threshold(Output):
    """The policy that decided."""

    policy: str
    forged_at: Unit
    """At or above: likely_forged."""
    authentic_below: Unit
    """Below: likely_authentic; between the two: inconclusive."""

    def decide(self, score: float) -> tuple[Label, str]:
        """The label of a score, and the words that say on which side of the thresholds it is."""
        if score >= self.forged_at:
            return "likely_forged", f"at or above {self.forged_at:g}"
        if score < self.authentic_below:
            return "likely_authentic", f"below {self.authentic_below:g}"
        return "inconclusive", f"between {self.authentic_below:g} and {self.forged_at:g}"


class MediaFacts(Output):
    """The file's facts."""

    sha256: Sha256
    size_bytes: int
    container: str
    codec: str
    pixel_format: str
    duration_ms: Milliseconds
    frame_rate: float
    variable_rate: bool
    frames: int
    width: int
    height: int
    rotation: int
    colour: str
    bits_per_pixel: float | None = None
    """How strongly the video is compressed; the score's calibration may depend on it."""


class ModelFigures(Output):
    """What the model's manifest says of its errors; None where that was not measured.

    Each is a share, with the ends of its 95 % interval where the manifest has them.
    """

    strangers_flagged: tuple[Unit, ...] | None = None
    """Authentic people of a collection that it never saw, called forged at the threshold."""
    forgeries_caught: tuple[Unit, ...] | None = None
    """Made forgeries in test clips that it calls forged."""
    residual_auc: Unit | None = None
    """How well the residual shows where a made forgery is; 0.5 is chance."""


class Made(Output):
    """What the verdict was made with."""

    ralf: str
    model: str
    version: str
    manifest_sha256: Sha256
    weights_sha256: Sha256
    detectors: dict[str, Unit] = Field(default_factory=dict)
    """An ensemble's members and their scores."""
    figures: ModelFigures | None = None
    """None in verdicts of older versions."""
    engine: str
    precision: str
    device: str
    decoder: str
    colour_policy: str
    sampling: SamplingUsed
    longest_gap_ms: Milliseconds | None = None
    """The longest time between two sampled frames: a shorter forgery could lie in it."""
    finder: dict[str, Any]
    calibration: dict[str, Any]
    aggregation: dict[str, Any]
    frames_asked: int
    frames_by_pass: tuple[int, ...] = ()
    """Frames sampled evenly, and, where a second pass looked again, frames around the moments that
    scored highest; `sampling` describes the first."""
    frames_decoded: int
    frames_replaced: int
    faces: int
    stages_ms: dict[str, float]
    host: str
    attempt: int = 1


class Verdict(Output):
    """What Ralf says about one upload."""

    schema_: Literal["ralf.verdict/1"] = Field("ralf.verdict/1", alias="schema")
    job_id: JobId | None = None
    tag: str | None = None
    tenant: str | None = None
    session: PartOfSession | None = None
    label: Label
    score: Unit | None
    """Calibrated P(forged) of the video; None with no_faces, and where no track may decide."""
    reason: str
    """One sentence that says what decided."""
    threshold: Threshold
    tracks: tuple[Track, ...]
    segments: tuple[Segment, ...]
    timeline: Timeline
    media: MediaFacts
    made: Made
    warnings: tuple[str, ...] = ()
    partial: bool = False
    """True for a verdict on the frames so far, and when the walk stopped early."""
    finished_at: datetime


class Failure(Output):
    """How a job ended without a verdict."""

    code: str
    message: str
    attempts: int = 1


class Picture(Output):
    """One piece of evidence: a face, and where its residual is strong."""

    track_id: str
    time_ms: Milliseconds
    score: Unit
    face: str
    """JPEG, base64."""
    residual: str | None = None
    """The residual drawn over the face; JPEG, base64."""


class FaceInFrame(Output):
    """A track's face in a whole frame."""

    track_id: str
    box: Box
    score: Unit


class WholeFrame(Output):
    """A frame of the clip, made smaller, and where the tracks' faces are in it."""

    time_ms: Milliseconds
    width: Annotated[int, Field(ge=1)]
    """Of the picture, in pixels; `height` too."""
    height: Annotated[int, Field(ge=1)]
    jpeg: str
    """Base64; nothing is drawn into it."""
    faces: tuple[FaceInFrame, ...]


class Evidence(Output):
    """The pictures of one verdict; the page reads these two documents and nothing else."""

    schema_: Literal["ralf.evidence/1"] = Field("ralf.evidence/1", alias="schema")
    pictures: tuple[Picture, ...] = ()
    frames: tuple[WholeFrame, ...] = ()
    """Few frames that together show every listed track, as far as the most that are kept allow."""


class FaceAt(Output):
    """Where a reviewed face is, so that it can be cut again from the file."""

    time_ms: Milliseconds
    frame: int
    box: Box


class TrackReview(Output):
    """What a person says of one track."""

    track_id: str
    label: Literal["real", "forged", "unsure"]
    wrong_face: bool = False
    """Not a face, or not one and the same person."""
    poor_quality: bool = False
    """Too blurred, dark, small or covered to learn from."""
    score: Unit | None
    """What the model said."""
    start_ms: Milliseconds
    end_ms: Milliseconds
    faces: tuple[FaceAt, ...]


class Review(Output):
    """A reviewer's labels for one verdict, as the page saves them and training reads them."""

    schema_: Literal["ralf.review/1"] = Field("ralf.review/1", alias="schema")
    job_id: JobId | None = None
    tag: str | None = None
    media_sha256: Sha256
    model: str
    version: str
    label: Label
    score: Unit | None
    decision: Literal["confirm", "overturn", "second_review"]
    tracks: tuple[TrackReview, ...]
    note: Annotated[str, Field(max_length=4000)] = ""
    reviewed_at: AwareDatetime


class Gap(Output):
    """Segment numbers that never came, both ends included."""

    first: int
    last: int


class FailedSegment(Output):
    """A segment whose job ended without a verdict."""

    number: int
    code: str


class SessionTrack(Output):
    """One face followed through a stream, across the borders of its segments."""

    track_id: str
    """Segment number and track of its first appearance."""
    start_ms: Milliseconds
    """On the stream's clock."""
    end_ms: Milliseconds
    faces: int
    score: Unit | None
    score_max: Unit
    decisive: bool
    segments: tuple[int, ...]


class SessionVerdict(Output):
    """What Ralf says about a stream so far: all its segments folded by number."""

    schema_: Literal["ralf.session/1"] = Field("ralf.session/1", alias="schema")
    session_id: Name
    tenant: Name
    revision: int
    """Grows with every segment that ends."""
    label: Label
    score: Unit | None
    """The strongest face track's, over the whole stream so far; None where none may decide."""
    reason: str
    threshold: Threshold | None
    """None until a segment has a verdict."""
    tracks: tuple[SessionTrack, ...]
    segments: int
    """Folded so far."""
    complete: bool
    """The last segment is known, and none before it is missing."""
    missing: tuple[Gap, ...] = ()
    late: tuple[int, ...] = ()
    """Ended after a segment of a higher number had."""
    repeated: tuple[int, ...] = ()
    """Came more than once; the first verdict counts."""
    failed: tuple[FailedSegment, ...] = ()
    warnings: tuple[str, ...] = ()


def dump(document: BaseModel) -> str:
    """The document as JSON, its schema name included, no spaces."""
    return document.model_dump_json(by_alias=True)


DOCUMENTS: dict[str, type[BaseModel]] = {
    "job": Job,
    "verdict": Verdict,
    "evidence": Evidence,
    "review": Review,
    "session": SessionVerdict,
}


def schemas() -> dict[str, str]:
    """File name → JSON Schema of each document, as text that is the same each time."""
    found = {}
    for name, document in DOCUMENTS.items():
        schema = document.model_json_schema(by_alias=True)
        if document is not Job:
            # Sampling and Span are strict in a Job; here, too, a newer Ralf may add to them.
            for part in schema.get("$defs", {}).values():
                if part.get("additionalProperties") is False:
                    del part["additionalProperties"]
        whole = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
        text = json.dumps(whole, indent=2, ensure_ascii=False)
        found[f"{name}.schema.json"] = f"{text}\n"
    return found


def write_schemas(folder: Path) -> list[Path]:
    """Write every schema into the folder."""
    written = []
    for name, text in schemas().items():
        (folder / name).write_text(text, encoding="utf-8")
        written.append(folder / name)
    return written


if __name__ == "__main__":
    chosen = Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).resolve().parent.parent / "docs"
    for path in write_schemas(chosen):
        print(path)
