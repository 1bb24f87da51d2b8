"""What the store returns: frozen values that are read from Redis.

Times are seconds since the epoch, by Redis' own clock.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from pydantic import BaseModel, ConfigDict

from ralf.worker.contract import (
    ENDED,
    Failure,
    Job,
    Label,
    Priority,
    Progress,
    State,
    Verdict,
    dump,
)

MODERATE = "ralf.worker.service.jobs.moderate"
"""The function that a job names in Redis."""
BeatReply = Literal["go_on", "cancel", "lost"]
"""What a running job should do next; lost: its lease ran out and another may have it."""
Outcome = Literal["retried", "failed", "quarantined", "cancelled", "expired", "lost", "stuck"]
"""What became of a run without a verdict.

lost: the claim was void, nothing changed.  stuck: Redis refused to move the job (only in a sweep).
"""
NOT_IN_HASH = frozenset({"job_id", "submitted_at", "traceparent"})
"""What may differ between two submissions of the same request."""
Event = Literal["verdict.ready", "verdict.failed", "session.alert"]


@dataclass(frozen=True)
class Submitted:
    """What became of one submission."""

    job_id: str
    state: State
    existing: bool
    """The token was known, with the same body: this is the stored job."""
    conflict: tuple[str, ...] = ()
    """The token was known with another body: the fields that differ; nothing was submitted."""

    @classmethod
    def read(cls, job: Job, reply: Sequence[bytes]) -> "Submitted":
        """From what the script answered to this job."""
        kind, job_id, state, document = reply
        differ: set[str] = set()
        if kind == b"conflict":
            stored, asked = json.loads(document), json.loads(dump(job))
            fields = stored.keys() | asked.keys()
            # The hashes may differ where no field does: a client in another language makes its own.
            differ = {f for f in fields if stored.get(f) != asked.get(f)} - NOT_IN_HASH or {"body"}
        return cls(job_id.decode(), _state(state.decode()), kind != b"new", tuple(sorted(differ)))


@dataclass(frozen=True)
class Claim:
    """The right to change one running job; void once its lease has run out."""

    job: Job
    attempt: int
    """Counts every run, from 1."""
    retries: int
    """Retries charged so far."""
    alone: bool
    """This run must have its child for itself: an earlier one crashed."""
    worker: str
    nonce: str

    @property
    def job_id(self) -> str:
        return self.job.job_id


class Status(BaseModel):
    """Where a job stands."""

    model_config = ConfigDict(frozen=True)

    job_id: str
    state: State
    tenant: str
    tag: str | None
    attempts: int
    submitted_at: float
    started_at: float | None
    ended_at: float | None
    cancelling: bool
    progress: Progress | None
    failure: Failure | None
    """Why the job ended without a verdict."""
    last_failure: Failure | None = None
    """Of a job that runs again: how its latest failed attempt ended; `attempts` is its number."""
    next_attempt_at: float | None = None
    """While the job waits for another attempt: the earliest time of that one."""
    label: Label | None
    score: float | None
    partial: Verdict | None = field(default=None, repr=False)
    """While the job runs: the verdict on what it has seen so far."""

    @property
    def ended(self) -> bool:
        """Whether the state will not change any more."""
        return self.state in ENDED

    @classmethod
    def read(cls, job_id: str, stored: Mapping[str, str]) -> "Status":
        """From the job's hash in Redis."""

        def moment(name: str) -> float | None:
            return float(stored[name]) if stored.get(name) else None

        facts = json.loads(stored.get("facts", "{}"))
        progress, failure = stored.get("progress"), stored.get("failure")
        partial, last = stored.get("partial"), stored.get("last_failure")
        return cls(
            job_id=job_id,
            state=_state(stored["state"]),
            tenant=stored["tenant"],
            # The script takes no null: an empty string means none.
            tag=stored["tag"] or None,
            attempts=int(stored["attempts"]),
            submitted_at=float(stored["submitted_at"]),
            started_at=moment("started_at"),
            ended_at=moment("ended_at"),
            cancelling=bool(stored.get("cancel")),
            progress=Progress.model_validate_json(progress) if progress else None,
            failure=Failure.model_validate_json(failure) if failure else None,
            last_failure=Failure.model_validate_json(last) if last else None,
            next_attempt_at=moment("next_attempt_at"),
            label=facts.get("label"),
            score=facts.get("score"),
            partial=Verdict.model_validate_json(partial) if partial else None,
        )


@dataclass(frozen=True)
class Delivery:
    """One push that is due, or dead."""

    id: str
    """Deterministic: the same end gives the same id."""
    event: Event
    tenant: str
    subject: str
    """The job's id, or the session's."""
    url: str
    secret_id: str
    data: Mapping[str, Any]
    created_at: float
    attempts: int
    """This one included."""
    error: str | None = None

    @classmethod
    def read(cls, stored: Mapping[str, str]) -> "Delivery":
        """From the hash in Redis."""
        return cls(
            id=stored["id"],
            event=stored["event"],  # type: ignore[arg-type]
            tenant=stored["tenant"],
            subject=stored["subject"],
            url=stored["url"],
            secret_id=stored["secret_id"],
            data=json.loads(stored["data"]),
            created_at=float(stored["created_at"]),
            attempts=int(stored["attempts"]),
            error=stored.get("error"),
        )


@dataclass(frozen=True)
class Crash:
    """One death of a job's child or parent."""

    code: str
    message: str
    detail: str
    """The end of the child's log, its signal: what the parent saw."""
    at: float
    worker: str
    attempt: int
    alone: bool


@dataclass(frozen=True)
class Quarantined:
    """A job that was put aside, with what is needed to examine it."""

    job: Job
    code: str
    message: str
    at: float
    attempts: int
    file_sha: str | None
    crashes: tuple[Crash, ...]

    @classmethod
    def read(cls, text: str) -> "Quarantined":
        """From the JSON in Redis."""
        stored = json.loads(text)
        return cls(
            job=Job.model_validate_json(stored["document"]),
            code=stored["code"],
            message=stored["message"],
            at=stored["at"],
            attempts=stored["attempts"],
            file_sha=stored["file_sha"] or None,
            # null without crashes: cjson would write an empty table as an object, not as a list.
            crashes=tuple(Crash(**crash) for crash in stored["crashes"] or ()),
        )


@dataclass(frozen=True)
class Counts:
    """The figures that metrics, `ralf doctor` and autoscaling read."""

    waiting: Mapping[Priority, int]
    """Queued jobs, wherever they wait."""
    running: Mapping[Priority, int]
    workers: Mapping[Priority, int]
    due: int
    """Of those waiting: put off to a later time."""
    oldest_s: float
    """Age of the oldest queued job."""
    outbox: int
    dead: int
    quarantined: int
    memory_share: float | None = None
    """Of the memory that Redis may use; None where its user may not ask."""


def _state(text: str) -> State:
    return cast(State, text)
