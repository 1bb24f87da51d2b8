"""What is sent and answered over HTTP, and the OpenAPI document that says so."""

from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BaseModel, Field
from pydantic.json_schema import models_json_schema

from ralf import __version__
from ralf.kernels.manifest import Strict
from ralf.worker.contract import (
    Callback,
    EarlyStop,
    EvidencePolicy,
    Failure,
    JobId,
    ModelName,
    Output,
    Progress,
    Sampling,
    Sha256,
    State,
    Verdict,
)
from ralf.worker.service.records import Status


class NewJob(Strict):
    """What is asked for: a URL or, in another part of the request, a file."""

    url: Annotated[str, Field(pattern=r"^(https?|s3|gs)://", max_length=4096)] | None = None
    """Fetched by the worker, which allows public addresses only."""
    sha256: Sha256 | None = None
    """Of the file; a job whose file has another fails."""
    token: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    """Yours, one for each upload: the same request sent again is the same job."""
    tag: Annotated[str, Field(max_length=256)] | None = None
    priority: Literal["high", "default"] = "default"
    """A backfill is not for HTTP: its jobs would not count against the bound of waiting ones."""
    sampling: Sampling | None = None
    max_tracks: Annotated[int, Field(ge=1, le=64)] = 16
    deadline: AwareDatetime | None = None
    callback: Callback | None = None
    evidence: EvidencePolicy = EvidencePolicy()
    stop_early: EarlyStop | None = None
    model: ModelName | None = None

    def options(self) -> dict[str, Any]:
        """What `ralf.worker.client.request` takes besides the media and the token."""
        ours = {"url", "sha256", "token"}
        return {name: getattr(self, name) for name in type(self).model_fields if name not in ours}


AS_JSON = frozenset({"sampling", "max_tracks", "callback", "evidence", "stop_early"})
"""Fields whose value is JSON where it stands in a form or in a query."""


class Links(Output):
    """Where the rest is."""

    self: str
    page: str
    """The verdict as HTML; with a token the link works for an hour."""


class Accepted(Output):
    """The job that a request made, or that it had made before."""

    job_id: JobId
    token: str
    state: State
    existing: bool
    """The token was known: this is the job it was first given to."""
    links: Links


class JobAnswer(Output):
    """Where a job stands, and its verdict once it has one."""

    job_id: JobId
    state: State
    tag: str | None
    attempts: int
    cancelling: bool
    submitted_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    progress: Progress | None
    failure: Failure | None
    last_failure: Failure | None
    """Of a job that runs again: how its latest attempt ended."""
    next_attempt_at: datetime | None
    verdict: Verdict | None
    links: Links

    @classmethod
    def of(cls, status: Status, verdict: Verdict | None, links: Links) -> "JobAnswer":
        """From what the queue says."""

        def moment(seconds: float | None) -> datetime | None:
            return None if seconds is None else datetime.fromtimestamp(seconds, UTC)

        return cls(
            job_id=status.job_id,
            state=status.state,
            tag=status.tag,
            attempts=status.attempts,
            cancelling=status.cancelling,
            submitted_at=datetime.fromtimestamp(status.submitted_at, UTC),
            started_at=moment(status.started_at),
            ended_at=moment(status.ended_at),
            progress=status.progress,
            failure=status.failure,
            last_failure=status.last_failure,
            next_attempt_at=moment(status.next_attempt_at),
            verdict=verdict,
            links=links,
        )


class Problem(Output):
    """Why a request was not answered as asked."""

    code: str
    message: str
    token: str | None = None
    """To send again, where the job may or may not have been stored."""


REFUSALS = {
    400: "the request is not one, or a value does not fit",
    401: "the token is missing or wrong",
    403: "the Host or the Origin header is not allowed",
    404: "no such job, or it is no longer kept",
    408: "the upload came too slowly",
    409: "the token was used for another request",
    413: "the upload is larger than is taken (RALF_MAX_BYTES)",
    415: "a content type that is not taken",
    422: "the upload has another SHA-256 than the request says",
    429: "too many uploads at once, or too many jobs wait; Retry-After says when to try again",
    503: "the queue does not answer; send the same again, with the same token",
    507: "the upload could not be written",
}


def _answers(*refusals: int, **more: tuple[str, str, str]) -> dict[str, Any]:
    """The `responses` of one operation; of each answer its words, its type and its schema."""
    found: dict[str, Any] = {}
    for name, (words, kind, model) in more.items():
        schema = {"$ref": f"#/components/schemas/{model}"} if model else {"type": "string"}
        found[name.lstrip("_")] = {"description": words, "content": {kind: {"schema": schema}}}
    for status in refusals:
        found[str(status)] = {
            "description": REFUSALS[status],
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Problem"}}},
        }
        if status in {429, 503}:
            found[str(status)]["headers"] = {
                "Retry-After": {"description": "seconds", "schema": {"type": "integer"}}
            }
    return found


def openapi(*, token_needed: bool) -> dict[str, Any]:
    """The OpenAPI 3.1 document of this server."""
    models: list[type[BaseModel]] = [NewJob, Accepted, JobAnswer, Problem]
    _, schemas = models_json_schema(
        [(model, "validation") for model in models],
        by_alias=True,
        ref_template="#/components/schemas/{model}",
    )
    components: dict[str, Any] = {"schemas": schemas["$defs"]}
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "Ralf",
            "version": __version__,
            "description": "Finds forged faces in uploaded video.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": {
            "/jobs": {"post": _submit()},
            "/jobs/{job_id}": {"get": _read(), "delete": _cancel(), "parameters": [_JOB_ID]},
            "/jobs/{job_id}/page": {"get": _page(), "parameters": [_JOB_ID]},
            "/healthz": {
                "get": {
                    "operationId": "health",
                    "summary": "Whether the queue answers and has workers",
                    "security": [],
                    "responses": _answers(
                        _200=("it does", "text/plain", ""), _503=("it does not", "text/plain", "")
                    ),
                }
            },
        },
        "components": components,
    }
    if token_needed:
        components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"token": []}]
    return document


_JOB_ID = {"name": "job_id", "in": "path", "required": True, "schema": {"type": "string"}}


def _query(name: str, words: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "query", "description": words, "schema": schema}


def _submit() -> dict[str, Any]:
    file = {"type": "string", "contentMediaType": "application/octet-stream"}
    fields = {name: {"type": "string"} for name in NewJob.model_fields if name != "url"}
    for name in AS_JSON:
        fields[name] = {"type": "string", "contentMediaType": "application/json"}
    return {
        "operationId": "submit",
        "summary": "Submit a file or a URL",
        "description": "A form with a part `file`, the file's bytes as the whole body with the "
        "fields in the query, or JSON with a `url`.",
        "parameters": [
            _query(name, f"as {name} of NewJob; for a body that is the file itself", schema)
            for name, schema in fields.items()
        ],
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {
                    "schema": {
                        "type": "object",
                        "properties": {"file": file, **fields},
                        "required": ["file"],
                        "additionalProperties": False,
                    }
                },
                "application/octet-stream": {"schema": file},
                "video/*": {"schema": file},
                "application/json": {"schema": {"$ref": "#/components/schemas/NewJob"}},
            },
        },
        "responses": {
            **_answers(
                *(400, 401, 403, 408, 409, 413, 415, 422, 429, 503, 507),
                _202=("the job is stored", "application/json", "Accepted"),
            ),
        },
    }


def _read() -> dict[str, Any]:
    seconds = {"type": "number", "minimum": 0, "maximum": 60}
    return {
        "operationId": "read",
        "summary": "Where a job stands, and its verdict once it has one",
        "parameters": [_query("wait", "seconds to wait for the end", seconds)],
        "responses": _answers(
            *(400, 401, 403, 404, 503), _200=("the job", "application/json", "JobAnswer")
        ),
    }


def _cancel() -> dict[str, Any]:
    return {
        "operationId": "cancel",
        "summary": "Cancel a job; one that has ended stays as it is",
        "responses": _answers(
            *(401, 403, 404, 503), _200=("the job", "application/json", "JobAnswer")
        ),
    }


def _page() -> dict[str, Any]:
    words = "of the link in a job's answer: in place of the header Authorization"
    return {
        "operationId": "page",
        "summary": "The verdict as one HTML page",
        "parameters": [
            _query("until", words, {"type": "string"}),
            _query("key", words, {"type": "string"}),
        ],
        "responses": _answers(
            *(401, 403, 404, 503),
            _200=("the page", "text/html", ""),
            _202=("the job has not ended; the page loads itself again", "text/html", ""),
            _409=("the job ended without a verdict; the page says why", "text/html", ""),
        ),
    }
