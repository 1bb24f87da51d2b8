"""The wire format: what a backend sends and what it gets back.

Job in, Verdict and Evidence out, a stream's SessionVerdict, and a person's Review: JSON documents
with a `schema` name, exported to docs/ as JSON Schema by schemas.py.
Boxes are fractions of the displayed frame; times are whole milliseconds of the stream's own
clock; every score is P(forged), 0 to 1.

A Job with an unknown field is refused, because a typo must not become a default.  In every other
document an unknown field is ignored: workers are upgraded before backends, so a backend must be
able to read what a newer worker writes.
Imports no torch: ralf.worker.client needs this file.
"""

from collections.abc import Mapping
from datetime import datetime
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import (
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from ralf.kernels.manifest import Sampling as ModelSampling
from ralf.kernels.manifest import Strict, Unit

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$")]
ModelName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}(@[0-9a-f]{8})?$")]
JobId = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Milliseconds = Annotated[int, Field(ge=0)]
Priority = Literal["high", "default", "backfill"]
"""high has workers of its own; workers of default take a backfill when they have nothing else."""
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
        use_attribute_docstrings=True,
    )


class Span(Strict):
    """A part of the clip, from start to end."""

    start_ms: Milliseconds
    """Its first moment, in milliseconds from the clip's start."""
    end_ms: Milliseconds
    """Where it ends; after start_ms."""

    @model_validator(mode="after")
    def _forward(self) -> "Span":
        if self.end_ms <= self.start_ms:
            raise ValueError(f"end_ms {self.end_ms} should be after start_ms {self.start_ms}")
        return self


class Sampling(ModelSampling):
    """Which frames are judged; `spans` limits them to parts of the clip."""

    spans: Annotated[tuple[Span, ...], Field(max_length=64)] = ()
    """Parts of the clip from which frames are taken; empty: the whole clip."""


class Media(Strict):
    """Where the upload is."""

    uri: Annotated[str, Field(min_length=1, max_length=4096)]
    """An http, https, s3, gs or file URI that the workers may fetch."""
    sha256: Sha256 | None = None
    """What the file must hash to; another file fails as hash_mismatch. None: not checked."""
    size_bytes: Annotated[int, Field(ge=0)] | None = None
    """Size that the file must have; another one fails as hash_mismatch. None: not checked."""


class Callback(Strict):
    """Where the verdict is pushed; signed as Standard Webhooks 1.0 with the named secret."""

    url: Annotated[str, Field(pattern=r"^https?://", max_length=2048)]
    """An http or https URL that takes the POST."""
    secret_id: Name = "default"
    """Which of the tenant's secrets signs the pushes."""
    events: tuple[Literal["verdict.ready", "verdict.failed", "session.alert"], ...] = (
        "verdict.ready",
        "verdict.failed",
        "session.alert",
    )
    """Which events are pushed to the URL."""


class EvidencePolicy(Strict):
    """What pictures are kept for reviewers."""

    thumbnails: bool = True
    """Whether pictures are made at all: faces, and a few whole frames with the faces' boxes."""
    residuals: bool = True
    """Where a face differs from what the network rebuilt; only from models whose manifest proves
    that this points at forgeries."""
    retain: bool = True
    """Whether Redis keeps the pictures for client.evidence and the page."""


class SessionPart(Strict):
    """This job is one numbered segment of a longer stream."""

    session_id: Name
    """The stream's name; one and the same in all its segments."""
    number: Annotated[int, Field(ge=0)]
    """The segment's place in the stream: 0, 1, 2 …"""
    offset_ms: Milliseconds
    """Where the segment starts on the stream's clock."""
    last: bool = False
    """True for the segment that ends the stream."""


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
    """How high the score of one deciding track must be."""
    after_faces: Annotated[int, Field(ge=1)] = 8
    """How many faces that track must have by then."""


class Job(Strict):
    """One moderation job, as it is stored in Redis."""

    # With an underscore, because `schema` is a method of pydantic's BaseModel.
    schema_: Literal["ralf.job/1"] = Field("ralf.job/1", alias="schema")
    """Name and version of this document's form."""
    job_id: JobId
    """Chosen by the client, new for each submission."""
    token: Annotated[str, Field(min_length=1, max_length=256)]
    """The client's request token: the same token and body is the same job."""
    media: Media
    """The upload to judge."""
    tag: Annotated[str, Field(max_length=256)] | None = None
    """Echoed in the verdict."""
    tenant: Name = "default"
    """Whose job this is: tenants take turns, and each has its own tokens and secrets."""
    priority: Priority = "default"
    """`high` has worker processes of its own."""
    sampling: Sampling | None = None
    """None is the model's own."""
    max_tracks: Annotated[int, Field(ge=1, le=64)] = 16
    """How many faces are followed at most; the worker's RALF_MAX_TRACKS is a limit too."""
    deadline: AwareDatetime | None = None
    """A job that has not ended by then expires; None: it waits as long as it must."""
    callback: Callback | None = None
    """Where the end of the job is pushed; None: nowhere."""
    evidence: EvidencePolicy = EvidencePolicy()
    """Which pictures are made and kept."""
    session: SessionPart | None = None
    """Which segment of which live stream this is; None: a clip of its own."""
    stop_early: EarlyStop | None = None
    """When the walk may stop before the clip's end; None: it never does."""
    model: ModelName | None = None
    """Pin a model by name or name@version; None is the worker's own."""
    # W3C Trace Context, version 00: 2 + 32 + 16 + 2 hex digits and three dashes.
    traceparent: Annotated[str, Field(pattern=r"^[0-9a-f-]{55}$")] | None = None
    """W3C trace context, repeated in log lines, stream and webhook."""
    submitted_at: AwareDatetime
    """When the client made the job."""


class Progress(Output):
    """What a running job has done so far."""

    stage: Literal["queued", "fetch", "probe", "analyze", "finish"]
    """What the worker does now."""
    percent: Annotated[float, Field(ge=0, le=100)]
    """Share of the sampled frames that have been judged, 0 to 100."""
    frames_done: int = 0
    """Sampled frames judged so far."""
    frames_total: int = 0
    """Frames to sample in the passes known so far."""
    faces: int = 0
    """Faces scored so far."""
    score: Unit | None = None
    """The score of what has been seen so far."""


class Box(Output):
    """Fractions of the displayed frame."""

    left: Unit
    """Left edge, from the frame's left."""
    top: Unit
    """Upper edge, from the frame's top."""
    right: Unit
    """Right edge, from the frame's left."""
    bottom: Unit
    """Lower edge, from the frame's top."""


class Sample(Output):
    """One face in one frame."""

    time_ms: Milliseconds
    """When the frame is shown, from the clip's start."""
    frame: int
    """The frame's number in display order, from 0."""
    box: Box
    """Where the face is."""
    face_px: int
    """Shorter side of the face's box, in source pixels."""
    confidence: Unit
    """How sure the face finder is that this is a face; says nothing about forgery."""
    score: Unit
    """Calibrated P(forged) of this face alone."""
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
    """Name of the track within this verdict: t1, t2 … by first appearance."""
    start_ms: Milliseconds
    """When the face was first seen."""
    end_ms: Milliseconds
    """When it was last seen."""
    faces: int
    """In how many sampled frames the face was found."""
    score: Unit | None
    """Calibrated P(forged) of this face over the clip; None where too few of its faces counted."""
    score_max: Unit
    """The highest score of one of its faces; one face alone does not decide."""
    decisive: bool
    """Whether this track may decide the video."""
    reason: str | None = None
    """Why it may not, or may not call the video authentic: occluded faces, an unusual pose."""
    samples: tuple[Sample, ...]
    """Its faces; of many, the highest score from each of even parts."""


class Segment(Output):
    """A stretch of one track at or above the threshold."""

    start_ms: Milliseconds
    """Where the stretch begins."""
    end_ms: Milliseconds
    """Where it ends."""
    track_id: str
    """Whose face it is."""
    score: Unit
    """Score of the stretch, smoothed over neighbouring faces."""
    peak_ms: Milliseconds
    """When its highest face is shown."""


class Timeline(Output):
    """The clip in equal bins: its strongest score, None where nothing was scored."""

    bin_ms: int
    """Length of each bin."""
    score: tuple[Unit | None, ...]
    """One for each bin: the highest score of a face in it."""
    faces: tuple[int | None, ...]
    """One for each bin: the most faces in one frame; 0: none found; None: no frame sampled."""


class Threshold(Output):
    """The policy that decided."""

    policy: str
    """Name of the threshold in the model's manifest: fpr_0.05 was set where 5 % of authentic videos
    are called forged."""
    forged_at: Unit
    """At or above: likely_forged."""
    authentic_below: Unit
    """Below: likely_authentic; between the two: inconclusive."""

    def decide(self, score: float) -> Label:
        """The label of a score."""
        if score >= self.forged_at:
            return "likely_forged"
        return "likely_authentic" if score < self.authentic_below else "inconclusive"


class MediaFacts(Output):
    """The file's facts."""

    sha256: Sha256
    """Hash of the judged bytes."""
    size_bytes: int
    """Size of the file."""
    container: str
    """Its container, as FFmpeg names the demuxer."""
    codec: str
    """Codec of the judged video stream."""
    pixel_format: str
    """As FFmpeg names it."""
    duration_ms: Milliseconds
    """Length of the video stream, from its packets."""
    frame_rate: float
    """Average frames a second; 0 where there is none, as of a still image."""
    variable_rate: bool
    """Whether the time between frames changes."""
    frames: int
    """Frames in the stream, counted and not taken from the header."""
    width: int
    """Width as shown, after rotation, in pixels."""
    height: int
    """Height as shown, after rotation, in pixels."""
    rotation: int
    """Degrees by which a player turns the stored picture."""
    colour: str
    """Colour space and range, as bt709/tv; unspecified where the file does not say."""
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
    """Version of Ralf."""
    model: str
    """Name of the model."""
    version: str
    """Version of the model, from its manifest's hash."""
    manifest_sha256: Sha256
    """Hash of the model's manifest."""
    weights_sha256: Sha256
    """Hash of the model's weights."""
    detectors: dict[str, Unit] = Field(default_factory=dict)
    """An ensemble's members and their scores."""
    figures: ModelFigures | None = None
    """How often the model errs, by its manifest; None in verdicts of older versions."""
    engine: str
    """What ran the network, such as torch."""
    precision: str
    """What most of its arithmetic was done in: fp32, bf16 or fp16."""
    device: str
    """Where it ran, such as cpu or cuda:0."""
    decoder: str
    """What decoded the frames: pyav, dali, or both."""
    colour_policy: str
    """How YUV became RGB."""
    sampling: SamplingUsed
    """Which frames were asked for."""
    longest_gap_ms: Milliseconds | None = None
    """The longest time between two sampled frames: a shorter forgery could lie in it."""
    finder: dict[str, Any]
    """Settings of the face finder."""
    calibration: dict[str, Any]
    """Temperature and shift that made P(forged) of logits, and what they were fitted on."""
    aggregation: dict[str, Any]
    """How faces' scores became a track's score."""
    frames_asked: int
    """Frames that sampling asked for."""
    frames_by_pass: tuple[int, ...] = ()
    """Frames sampled evenly, and, where a second pass looked again, frames around the moments that
    scored highest; `sampling` describes the first."""
    frames_decoded: int
    """Frames of those that decoded."""
    frames_replaced: int
    """Frames that did not decode and had a neighbour in their place."""
    faces: int
    """Faces scored in all tracks."""
    stages_ms: dict[str, float]
    """Milliseconds spent in each stage."""
    host: str
    """The machine that judged."""
    attempt: int = 1
    """Which run of the job this was, from 1."""


class Verdict(Output):
    """What Ralf says about one upload."""

    schema_: Literal["ralf.verdict/1"] = Field("ralf.verdict/1", alias="schema")
    """Name and version of this document's form."""
    job_id: JobId | None = None
    """The job that it answers; None outside the queue."""
    tag: str | None = None
    """The job's tag; from `ralf scan`, the file's name."""
    tenant: str | None = None
    """The job's tenant."""
    session: PartOfSession | None = None
    """The segment of a live stream that this is; None for a clip of its own."""
    label: Label
    """The answer; inconclusive and no_faces do not mean authentic."""
    score: Unit | None
    """Calibrated P(forged) of the video; None with no_faces, and where no track may decide."""
    reason: str
    """One sentence that says what decided."""
    threshold: Threshold
    """The limits that turned the score into the label."""
    tracks: tuple[Track, ...]
    """The faces followed, in order of appearance; of many, the strongest."""
    segments: tuple[Segment, ...]
    """Stretches of tracks that scored at or above the threshold, the places to look at first."""
    timeline: Timeline
    """The clip over time."""
    media: MediaFacts
    """What the file is."""
    made: Made
    """What judged it, so that the verdict can be made again."""
    warnings: tuple[str, ...] = ()
    """What limits the verdict: each begins with a fixed word and a colon, or is that word."""
    partial: bool = False
    """True for a verdict on the frames so far, and when the walk stopped early."""
    finished_at: datetime
    """When the verdict was made."""


class Failure(Output):
    """How a job ended without a verdict."""

    code: str
    """The kind of failure: corrupt_media, fetch_denied, …"""
    message: str
    """What was expected, what came, and what to do."""
    attempts: int = 1
    """Runs of the job so far, the failed one included."""


class Picture(Output):
    """One piece of evidence: a face, and where its residual is strong."""

    track_id: str
    """The face's track."""
    time_ms: Milliseconds
    """When the frame is shown."""
    score: Unit
    """P(forged) of this face."""
    face: str
    """JPEG, base64."""
    residual: str | None = None
    """The residual drawn over the face; JPEG, base64."""


class FaceInFrame(Output):
    """A track's face in a whole frame."""

    track_id: str
    """The face's track."""
    box: Box
    """Where the face is."""
    score: Unit
    """P(forged) of this face."""


class WholeFrame(Output):
    """A frame of the clip, made smaller, and where the tracks' faces are in it."""

    time_ms: Milliseconds
    """When the frame is shown."""
    width: Annotated[int, Field(ge=1)]
    """Of the picture, in pixels."""
    height: Annotated[int, Field(ge=1)]
    """Of the picture, in pixels."""
    jpeg: str
    """Base64; nothing is drawn into it."""
    faces: tuple[FaceInFrame, ...]
    """The tracks' faces in the frame."""


class Evidence(Output):
    """The pictures of one verdict; the page reads these two documents and nothing else."""

    schema_: Literal["ralf.evidence/1"] = Field("ralf.evidence/1", alias="schema")
    """Name and version of this document's form."""
    pictures: tuple[Picture, ...] = ()
    """The faces shown."""
    frames: tuple[WholeFrame, ...] = ()
    """Few frames that together show every listed track, as far as the most that are kept allow."""


class FaceAt(Output):
    """Where a reviewed face is, so that it can be cut again from the file."""

    time_ms: Milliseconds
    """When the frame is shown."""
    frame: int
    """The frame's number in display order, from 0."""
    box: Box
    """Where the face is."""


class TrackReview(Output):
    """What a person says of one track."""

    track_id: str
    """The track of the verdict."""
    label: Literal["real", "forged", "unsure"]
    """What the person says."""
    wrong_face: bool = False
    """Not a face, or not one and the same person."""
    poor_quality: bool = False
    """Too blurred, dark, small or covered to learn from."""
    score: Unit | None
    """What the model said."""
    start_ms: Milliseconds
    """The track's start."""
    end_ms: Milliseconds
    """The track's end."""
    faces: tuple[FaceAt, ...]
    """The faces that the verdict lists of the track."""


class Review(Output):
    """A reviewer's labels for one verdict, as the page saves them and training reads them."""

    schema_: Literal["ralf.review/1"] = Field("ralf.review/1", alias="schema")
    """Name and version of this document's form."""
    job_id: JobId | None = None
    """The reviewed verdict's job."""
    tag: str | None = None
    """The reviewed verdict's tag."""
    media_sha256: Sha256
    """Hash of the reviewed file."""
    model: str
    """Model of the reviewed verdict."""
    version: str
    """Its version."""
    label: Label
    """Label of the reviewed verdict."""
    score: Unit | None
    """Score of the reviewed verdict."""
    decision: Literal["confirm", "overturn", "second_review"]
    """Whether the person agrees, disagrees, or asks for another person."""
    tracks: tuple[TrackReview, ...]
    """What the person says of each track."""
    note: Annotated[str, Field(max_length=4000)] = ""
    """What the person wrote."""
    reviewed_at: AwareDatetime
    """When the person saved it."""


class Gap(Output):
    """Segment numbers that never came, both ends included."""

    first: int
    """The first missing number."""
    last: int
    """The last missing number."""


class FailedSegment(Output):
    """A segment whose job ended without a verdict."""

    number: int
    """The segment's number."""
    code: str
    """Why it has no verdict."""


class SessionTrack(Output):
    """One face followed through a stream, across the borders of its segments."""

    track_id: str
    """Segment number and track of its first appearance."""
    start_ms: Milliseconds
    """On the stream's clock."""
    end_ms: Milliseconds
    """When the face was last seen, on the stream's clock."""
    faces: int
    """In how many sampled frames the face was found."""
    score: Unit | None
    """Its score over all its segments; None where too few faces counted."""
    score_max: Unit
    """The highest score of one of its faces."""
    decisive: bool
    """Whether this track may decide."""
    segments: tuple[int, ...]
    """Numbers of the segments in which it was seen."""


class SessionVerdict(Output):
    """What Ralf says about a stream so far: all its segments folded by number."""

    schema_: Literal["ralf.session/1"] = Field("ralf.session/1", alias="schema")
    """Name and version of this document's form."""
    session_id: Name
    """The stream's name."""
    tenant: Name
    """Whose stream it is."""
    revision: int
    """Grows with every segment that ends."""
    label: Label
    """The answer for the stream so far."""
    score: Unit | None
    """The strongest face track's, over the whole stream so far; None where none may decide."""
    reason: str
    """One sentence that says what decided."""
    threshold: Threshold | None
    """None until a segment has a verdict."""
    tracks: tuple[SessionTrack, ...]
    """The faces followed across segments; of many, the strongest."""
    segments: int
    """Folded so far."""
    complete: bool
    """The last segment is known, and none before it is missing."""
    missing: tuple[Gap, ...] = ()
    """Segments that never came."""
    late: tuple[int, ...] = ()
    """Ended after a segment of a higher number had."""
    repeated: tuple[int, ...] = ()
    """Came more than once; the first verdict counts."""
    failed: tuple[FailedSegment, ...] = ()
    """Segments without a verdict."""
    warnings: tuple[str, ...] = ()
    """What limits the verdict."""


def dump(document: BaseModel) -> str:
    """The document as JSON, its schema name included, no spaces."""
    return document.model_dump_json(by_alias=True)


def first_fault(error: ValidationError) -> str:
    """The field that does not fit, and why; without its value: a signed URL is a credential."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or "the document"
    return f"{where}: {first['msg']}"
