"""What a platform's backend imports: submit, status, result, watch, cancel.

    client = connect("redis://…")
    submission = client.submit("s3://uploads/42.mp4", token="upload-42", callback="https://…")
    verdict = client.result(submission.job_id, timeout=600)

The token is yours, one for each upload: sending the same again gives the stored job (and its
verdict), however often and from wherever; the same token with another body is a conflict.  A
submission that raised QueueUnavailable may or may not have been stored: send it again, unchanged.

Needs redis, rq and pydantic only.  Every error is a ClientError and says what to do.
"""

import asyncio
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from typing import Any, TypeVar

from pydantic import ValidationError
from redis import exceptions

from ralf.worker.contract import (
    Callback,
    EarlyStop,
    Evidence,
    EvidencePolicy,
    Job,
    Media,
    Priority,
    Sampling,
    SessionPart,
    SessionVerdict,
    State,
    Verdict,
    first_fault,
)
from ralf.worker.errors import RalfError
from ralf.worker.service.connection import connect as connect_redis
from ralf.worker.service.records import Status, Submitted
from ralf.worker.service.store import Store
from ralf.worker.settings import Settings

POLL_S = 5.0
"""A message may be lost while a connection is re-made, so the status is also read this often."""
SENT_AT_ONCE = 500
T = TypeVar("T")


class ClientError(RalfError):
    """Base of what the client raises."""


class InvalidRequest(ClientError, ValueError):
    """The request does not fit the contract."""


class IdempotencyConflict(ClientError):
    """The token was used before, with another body."""

    def __init__(self, token: str, submitted: Submitted) -> None:
        self.token = token
        self.job_id = submitted.job_id
        self.fields = submitted.conflict
        super().__init__(
            f"token {token!r} was used before, for job {self.job_id}, with other values of: "
            f"{', '.join(self.fields)}; send the same body to get that job, or a new token"
        )


class QueueUnavailable(ClientError):
    """Redis does not answer, or takes nothing."""


class UnreadableDocument(ClientError):
    """What is stored is not a document that this version can read."""


class NotFound(ClientError):
    """No such job, or it is no longer kept."""


class NotFinished(ClientError):
    """The job has not ended yet."""


class TimedOut(NotFinished):
    """The job did not end in the time given; it goes on."""


class JobFailed(ClientError):
    """The job ended without a verdict."""

    def __init__(self, status: Status) -> None:
        self.status = status
        self.code = status.failure.code if status.failure else status.state
        why = status.failure.message if status.failure else "no reason was stored"
        super().__init__(
            f"job {status.job_id} ended as {status.state} ({self.code}): {why}; "
            "to run it again, submit it under a new token"
        )


@dataclass(frozen=True)
class Submission:
    """A stored job."""

    job_id: str
    state: State
    existing: bool = False
    """The token was known: this is the job it was first given to."""
    verdict: Verdict | None = None
    """Of an existing job that has one."""


def connect(
    url: str | None = None, *, settings: Settings | None = None, timeout: float = 10.0
) -> "Client":
    """A client of the Redis at that address, or at RALF_REDIS_URL.

    When Redis does not answer, a call raises QueueUnavailable after about `timeout` seconds.
    """
    settings = settings or Settings.from_environment()
    redis = connect_redis(
        url or settings.redis_url, attempts=3, timeout_s=timeout, ca_file=settings.redis_ca_file
    )
    return Client(redis, settings)


def request(
    media: str | Media,
    *,
    token: str,
    tag: str | None = None,
    tenant: str = "default",
    priority: Priority = "default",
    sampling: Sampling | None = None,
    max_tracks: int = 16,
    deadline: datetime | None = None,
    callback: str | Callback | None = None,
    evidence: EvidencePolicy | None = None,
    session: SessionPart | None = None,
    stop_early: EarlyStop | None = None,
    model: str | None = None,
    traceparent: str | None = None,
) -> Job:
    """A job, checked and not yet sent; `deadline` is a moment, the same each time it is sent."""
    try:
        return Job(
            job_id=uuid.uuid4().hex,
            token=token,
            media=Media(uri=media) if isinstance(media, str) else media,
            tag=tag,
            tenant=tenant,
            priority=priority,
            sampling=sampling,
            max_tracks=max_tracks,
            deadline=deadline,
            callback=Callback(url=callback) if isinstance(callback, str) else callback,
            evidence=evidence or EvidencePolicy(),
            session=session,
            stop_early=stop_early,
            model=model,
            traceparent=traceparent,
            submitted_at=datetime.now(UTC),
        )
    except ValidationError as fault:
        given = _shown(fault.errors()[0]["input"])
        # from None: pydantic's own text quotes the input, and a signed URL is a credential.
        raise InvalidRequest(
            f"{first_fault(fault)}, got {given}; see docs/job.schema.json"
        ) from None


def _shown(value: object) -> str:
    """The value without what makes a URL a credential: its user and its query."""
    return re.sub(r"(?<=://)[^/?#@'\"]*@|\?[^'\"]*", "…", repr(value))[:200]


def _standing(status: Status) -> str:
    """The state, and for a job that failed and runs again, why and when."""
    last, due = status.last_failure, status.next_attempt_at
    said = str(status.state)
    if last is not None:
        said += f" (attempt {last.attempts} ended with {last.code}: {last.message}"
        if due is not None:
            said += f"; the next is due at {datetime.fromtimestamp(due, UTC):%Y-%m-%d %H:%M:%S} UTC"
        said += ")"
    return said


class Client:
    """Safe to share between threads."""

    def __init__(self, redis: Any, settings: Settings | None = None) -> None:
        self.store = Store(redis, settings or Settings())

    def submit(self, media: str | Media, *, token: str, **options: Any) -> Submission:
        """Store and queue one upload; the options are those of `request`."""
        return self.submit_many([request(media, token=token, **options)])[0]

    def submit_many(self, requests: Iterable[Job]) -> list[Submission]:
        """Store and queue many, some hundred in each round trip.

        On a conflict the others of its round trip are stored and later ones are not: mend it and
        send all of them again, what is stored stays as it is.
        """
        submissions: list[Submission] = []
        waiting = iter(requests)
        while jobs := list(islice(waiting, SENT_AT_ONCE)):
            with self.reaching():
                replies = self.store.submit(jobs)
                for job, reply in zip(jobs, replies, strict=True):
                    if reply.conflict:
                        raise IdempotencyConflict(job.token, reply)
                    stored = reply.existing and reply.state == "succeeded"
                    verdict = self.store.verdict(reply.job_id) if stored else None
                    submissions.append(
                        Submission(reply.job_id, reply.state, reply.existing, verdict)
                    )
        return submissions

    def status(self, job_id: str) -> Status:
        """The job's state, its progress, its failure."""
        with self.reaching():
            status = self.store.status(job_id)
        if status is None:
            raise NotFound(
                f"no job {job_id!r}; ids come from submit(), and are kept for "
                f"{self.store.settings.job_ttl_s // 86400} days after the end"
            )
        return status

    def result(self, job_id: str, *, timeout: float | None = None) -> Verdict:
        """The verdict; waits for it as long as `timeout` says, not at all without."""
        status = self.status(job_id) if timeout is None else self._wait(job_id, timeout)
        if not status.ended:
            raise NotFinished(
                f"job {job_id} is {_standing(status)}; give result() a timeout to wait for it, "
                "watch() it, or take its webhook"
            )
        if status.state != "succeeded":
            raise JobFailed(status)
        with self.reaching():
            verdict = self.store.verdict(job_id)
        if verdict is None:
            raise NotFound(
                f"the verdict of job {job_id} was kept for "
                f"{self.store.settings.verdict_ttl_s // 86400} days and is gone; submit it again "
                "under a new token"
            )
        return verdict

    def partial(self, job_id: str) -> Verdict | None:
        """The verdict on what a running job has seen so far, once it has seen something."""
        with self.reaching():
            return self.store.partial(job_id)

    def evidence(self, job_id: str) -> Evidence:
        """The verdict's pictures."""
        with self.reaching():
            evidence = self.store.evidence(job_id)
        if evidence is None:
            state = self.status(job_id).state
            raise NotFound(
                f"no evidence is kept of job {job_id} ({state}): it is kept for "
                f"{self.store.settings.evidence_ttl_s // 86400} days, and only when the job's "
                "evidence policy says retain"
            )
        return evidence

    def cancel(self, job_id: str) -> State:
        """Ask for the end: a queued job is cancelled at once, a running one within about a second
        (its state is still `running` in the answer), an ended one stays as it is."""
        with self.reaching():
            state = self.store.cancel(job_id)
        return state or self.status(job_id).state

    def watch(self, job_id: str, *, timeout: float | None = None) -> Iterator[Status]:
        """The status now and at each change; the last one has ended.  TimedOut after `timeout`."""
        for status in self._follow(job_id, lambda: self.status(job_id), timeout):
            yield status
            if status.ended:
                return

    def session(self, session_id: str, *, tenant: str = "default") -> SessionVerdict:
        """The rolling verdict of a stream's segments."""
        with self.reaching():
            stored = self.store.hash(self.store.key("session", tenant, session_id))
            if "verdict" in stored:
                return SessionVerdict.model_validate_json(stored["verdict"])
        raise NotFound(
            f"no segment of session {session_id!r} of tenant {tenant!r} has ended yet, or its "
            f"last was more than {self.store.settings.session_ttl_s // 3600} h ago"
        )

    def watch_session(
        self, session_id: str, *, tenant: str = "default", timeout: float | None = None
    ) -> Iterator[SessionVerdict]:
        """The rolling verdict at each fold; the last one is complete."""

        def read() -> SessionVerdict | None:
            try:
                return self.session(session_id, tenant=tenant)
            # No segment has ended yet; the first one makes the session.
            except NotFound:
                return None

        for verdict in self._follow(f"session:{tenant}:{session_id}", read, timeout):
            if verdict is not None:
                yield verdict
                if verdict.complete:
                    return

    def close(self) -> None:
        """Close the connections."""
        self.store.redis.close()

    def _wait(self, job_id: str, timeout: float) -> Status:
        status = self.status(job_id)
        if status.ended:
            return status
        *_, status = self.watch(job_id, timeout=timeout)
        return status

    def _follow(self, name: str, read: Callable[[], T], timeout: float | None) -> Iterator[T]:
        """What `read` returns, now and after each change; a message says when to read again."""
        deadline = None if timeout is None else time.monotonic() + timeout
        with self.reaching(), self.store.redis.pubsub(ignore_subscribe_messages=True) as channel:
            # Before the first read: a change between the two would be missed.
            channel.subscribe(self.store.watch_channel(name))
            seen = read()
            yield seen
            while True:
                left = POLL_S if deadline is None else deadline - time.monotonic()
                if left <= 0:
                    raise TimedOut(
                        f"{name} did not end within {timeout:g} s, it goes on: last seen as {seen}"
                    )
                # The message itself does not matter: the state is read again, also when none came.
                channel.get_message(timeout=min(left, POLL_S))
                now = read()
                if now != seen:
                    seen = now
                    yield seen

    @contextmanager
    def reaching(self) -> Iterator[None]:
        """Errors of Redis and of the documents read from it as the client's."""
        try:
            yield
        except ValidationError as fault:
            raise UnreadableDocument(
                f"the stored {fault.title} cannot be read ({first_fault(fault)}): a version of "
                "Ralf that does not fit this client wrote it; use the workers' version here"
            ) from fault
        except exceptions.ResponseError as fault:
            # Without the command that redis-py names: its arguments may hold a signed URL.
            said = str(fault).rpartition("caused error: ")[2]
            if "used memory > 'maxmemory'" in said:  # Redis 6 has no class for it
                raise QueueUnavailable(
                    "Redis is out of memory and takes no job; give it more (maxmemory), or wait "
                    "until verdicts expire"
                ) from fault
            raise QueueUnavailable(
                f"Redis refused ({said}); when it is mended send the same again: a token is never "
                "stored twice"
            ) from fault
        except exceptions.RedisError as fault:
            raise QueueUnavailable(
                f"Redis does not answer ({fault}); check RALF_REDIS_URL and that it runs, then "
                "send the same again: a token is never stored twice"
            ) from fault


class AsyncClient:
    """The same for asyncio: each call runs the client above in a thread."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def submit(self, media: str | Media, *, token: str, **options: Any) -> Submission:
        return await asyncio.to_thread(self._client.submit, media, token=token, **options)

    async def submit_many(self, requests: Iterable[Job]) -> list[Submission]:
        # Listed here: a generator may use what belongs to the event loop's thread.
        return await asyncio.to_thread(self._client.submit_many, list(requests))

    async def status(self, job_id: str) -> Status:
        return await asyncio.to_thread(self._client.status, job_id)

    async def result(self, job_id: str, *, timeout: float | None = None) -> Verdict:
        return await asyncio.to_thread(self._client.result, job_id, timeout=timeout)

    async def partial(self, job_id: str) -> Verdict | None:
        return await asyncio.to_thread(self._client.partial, job_id)

    async def evidence(self, job_id: str) -> Evidence:
        return await asyncio.to_thread(self._client.evidence, job_id)

    async def cancel(self, job_id: str) -> State:
        return await asyncio.to_thread(self._client.cancel, job_id)

    async def session(self, session_id: str, *, tenant: str = "default") -> SessionVerdict:
        return await asyncio.to_thread(self._client.session, session_id, tenant=tenant)

    async def watch(self, job_id: str, *, timeout: float | None = None) -> AsyncIterator[Status]:
        """As Client.watch; a task that is cancelled leaves its thread waiting for up to 5 s."""
        statuses = self._client.watch(job_id, timeout=timeout)
        # None marks the end: asyncio cannot carry StopIteration out of a thread.
        while (status := await asyncio.to_thread(next, statuses, None)) is not None:
            yield status

    async def watch_session(
        self, session_id: str, *, tenant: str = "default", timeout: float | None = None
    ) -> AsyncIterator[SessionVerdict]:
        """As Client.watch_session; cancelled, it leaves its thread as watch does."""
        verdicts = self._client.watch_session(session_id, tenant=tenant, timeout=timeout)
        while (verdict := await asyncio.to_thread(next, verdicts, None)) is not None:
            yield verdict

    async def close(self) -> None:
        await asyncio.to_thread(self._client.close)
