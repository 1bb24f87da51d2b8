"""Every key in Redis, and the scripts that change them.

A job's walk is a handful of moves, each a Lua script (jobs.lua, claims.lua, repairs.lua), so that
a process may die between any two of them and the job is still in exactly one place:

    submit    token, job, RQ's hash, pending list; known token → the stored job, or its conflict
    begin     queued → running; gives a Claim, with which alone the running job can be changed
    beat      extend the lease, note progress; answers go_on, cancel or lost
    end       running → its one end: state, verdict, evidence, stream, outbox, session, all or none
    retry     running → queued after a delay, charged; past the last retry: failed
    hand_back running → queued, not charged (drain, no model)
    crashed   running → queued alone, or quarantined at the second counted crash
    cancel    queued → cancelled; a running job is told at its next beat

    status  job  verdict  partial  evidence  counts   only read

`call` runs any one operation of the scripts; outbox.py, quarantine.py, janitor.py and sessions.py
give names to those that are theirs.

What lies where, under settings.redis_prefix: token:TENANT:TOKEN, job:ID, verdict:ID, evidence:ID,
pending:PRIORITY:TENANT, turn:PRIORITY (tenants in turn), waiting:PRIORITY and running:PRIORITY
(zsets of queued and running jobs), due, deadlines, popped, verdicts (stream), outbox, dead,
delivery:ID, endpoints:disabled, crashes:job:ID, crashes:file:SHA, quarantine, session:TENANT:ID,
sessions:changed, swept; channel watch:ID.  Beside them RQ's own: rq:job:ID and
rq:queue:ralf-PRIORITY hold an id and a function's name, as JSON; the job itself is ours.

Time is Redis' own unless a test passes `now`.  One Redis (6.2 or later), with persistence on and
`noeviction`; not a Redis Cluster, since one script touches keys of many hash slots.
"""

import hashlib
import json
import random
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC
from typing import Any, Literal, cast

from pydantic import ValidationError
from redis import exceptions

from ralf.worker.contract import Evidence, Failure, Job, Priority, Progress, State, Verdict, dump
from ralf.worker.service import sessions
from ralf.worker.service.records import NOT_BODY, Claim, Counts, Order, Outcome, Status, Submitted
from ralf.worker.service.script import PRIORITIES, Script, connect, decoded, queue_prefix
from ralf.worker.settings import Settings

__all__ = ["END_BY_CODE", "MODERATE", "PRIORITIES", "Store", "body_of", "connect", "decoded"]

MODERATE = "ralf.worker.service.jobs.moderate"
DETAIL_BYTES = 4096
END_BY_CODE: Mapping[str, State] = {"cancelled": "cancelled", "deadline_passed": "expired"}


def body_of(job: Job) -> str:
    """The hash of what the client asked for; the same token with another body is a conflict.

    Without what has its default, so that a release with a new field is no conflict with the last.
    """
    body = job.model_dump(mode="json", exclude=set(NOT_BODY), exclude_defaults=True)
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


class Store:
    """The service's one door to Redis; safe to share between threads."""

    def __init__(self, redis: Any, settings: Settings, *, function: str = MODERATE) -> None:
        self.redis: Any = redis
        self.settings = settings
        self.function = function
        self.prefix = settings.redis_prefix
        self._script = Script(redis, settings)

    # names in Redis

    def key(self, *parts: str) -> str:
        """A key of ours."""
        return self.prefix + ":".join(parts)

    def queue(self, priority: Priority) -> str:
        """The name of RQ's queue."""
        return queue_prefix(self.settings) + priority

    def watch_channel(self, job_id: str) -> str:
        """Where a message says that a job's status is worth reading again."""
        return self.key("watch", job_id)

    def now(self) -> float:
        """Redis' own clock."""
        seconds, micros = self.redis.time()
        return float(seconds) + float(micros) / 1e6

    # the client's moves

    def submit(
        self, jobs: Sequence[Job], *, now: float | None = None, function: str | None = None
    ) -> list[Submitted]:
        """Store and queue each job, in order, in one round trip; see `Submitted`."""
        if not jobs:
            return []
        calls = [_submission(job, function or self.function) for job in jobs]
        replies = self._script.run_many("submit", now, calls)
        return [Submitted.read(job, reply) for job, reply in zip(jobs, replies, strict=True)]

    def cancel(self, job_id: str, *, now: float | None = None) -> State | None:
        """Ask for the end; gives the state that the job then has, None for an unknown one."""
        reply = self.call("cancel", now, job_id)
        return cast("State | None", reply and decoded(reply))

    def status(self, job_id: str) -> Status | None:
        """Where the job stands; None for an unknown one."""
        stored = self.hash(self.key("job", job_id))
        return Status.read(job_id, stored) if stored else None

    def job(self, job_id: str) -> Job | None:
        """The job as it was submitted."""
        text = self.redis.hget(self.key("job", job_id), "document")
        return None if text is None else Job.model_validate_json(text)

    def verdict(self, job_id: str) -> Verdict | None:
        """The verdict, once there is one."""
        text = self.redis.get(self.key("verdict", job_id))
        return None if text is None else Verdict.model_validate_json(text)

    def partial(self, job_id: str) -> Verdict | None:
        """The verdict on what a running job has seen so far."""
        text = self.redis.hget(self.key("job", job_id), "partial")
        return None if text is None else Verdict.model_validate_json(text)

    def evidence(self, job_id: str) -> Evidence | None:
        """The verdict's pictures, while they are kept."""
        text = self.redis.get(self.key("evidence", job_id))
        return None if text is None else Evidence.model_validate_json(text)

    # the worker's moves

    def begin(
        self,
        job_id: str,
        worker: str,
        *,
        alone: bool = True,
        nonce: str | None = None,
        now: float | None = None,
    ) -> Claim | None:
        """Claim a job that RQ's dequeue popped; None when it is no longer this worker's to run.

        alone says whether the child has no other job now; `beat` corrects it.
        """
        nonce = nonce or uuid.uuid4().hex
        reply = self.call("begin", now, job_id, nonce, worker, _flag(alone))
        if reply is None:
            return None
        document, attempts, retries, run_alone = reply
        try:
            job = Job.model_validate_json(document)
        except ValidationError as fault:
            failure = Failure(
                code="bad_request",
                message=f"the stored job does not fit ralf.job/1: {fault.errors()[0]['msg']}; "
                "submit it with ralf.worker.client of the worker's own release",
                attempts=int(attempts),
            )
            text = failure.model_dump_json()
            self.call("finish", now, job_id, nonce, "failed", text, text, "", "", "")
            return None
        return Claim(job, int(attempts), int(retries), run_alone == b"1", worker, nonce)

    def beat(
        self,
        claim: Claim,
        *,
        progress: Progress | None = None,
        partial: Verdict | None = None,
        alone: bool | None = None,
        file_sha: str | None = None,
        now: float | None = None,
    ) -> Order:
        """Prove that the job runs, note what is given, and hear what to do; at most once a second
        with progress (the caller's part), and at least each settings.heartbeat_s."""
        reply = self.call(
            "beat",
            now,
            claim.job_id,
            claim.nonce,
            "" if alone is None else _flag(alone),
            file_sha or "",
            "" if progress is None else dump(progress),
            "" if partial is None else dump(partial),
        )
        return cast(Order, decoded(reply))

    def end(
        self,
        claim: Claim,
        outcome: Verdict | Failure,
        *,
        evidence: Evidence | None = None,
        now: float | None = None,
    ) -> bool:
        """The job's one end; False, and nothing changed, when it had ended or the claim is void.

        A Failure's code decides the state: cancelled, deadline_passed → expired, else failed.
        """
        job = claim.job
        if isinstance(outcome, Verdict):
            facts = json.dumps({"label": outcome.label, "score": outcome.score})
            kept = dump(evidence) if evidence is not None and job.evidence.retain else ""
            digest = sessions.digest(outcome, job.session) if job.session else ""
            arguments = ("succeeded", facts, "", dump(outcome), kept, digest)
        else:
            text = outcome.model_copy(update={"attempts": claim.attempt}).model_dump_json()
            state = END_BY_CODE.get(outcome.code, "failed")
            arguments = (state, text, text, "", "", "")
        ended = bool(self.call("finish", now, claim.job_id, claim.nonce, *arguments))
        if ended and job.session is not None:
            # The end stands whatever becomes of the fold: the session is marked for the janitor.
            with suppress(exceptions.RedisError):
                sessions.refold(self, job.tenant, job.session.session_id, now=now)
        return ended

    def retry(
        self,
        claim: Claim,
        failure: Failure,
        *,
        delay_s: float | None = None,
        now: float | None = None,
    ) -> Outcome:
        """Put the job off and charge a retry; past the last one it fails with this failure."""
        if delay_s is None:
            delays = self.settings.retry_delays_s or (0.0,)
            delay_s = delays[min(claim.retries, len(delays) - 1)] * random.uniform(0.8, 1.2)
        text = failure.model_copy(update={"attempts": claim.attempt}).model_dump_json()
        return self._outcome("retry", now, claim.job_id, claim.nonce, delay_s, text)

    def hand_back(self, claim: Claim, *, delay_s: float = 0.0, now: float | None = None) -> Outcome:
        """Queue the job again at the front of its tenant's turn, at no charge to it."""
        return self._outcome("hand_back", now, claim.job_id, claim.nonce, delay_s)

    def crashed(
        self,
        claim: Claim,
        *,
        code: str,
        message: str,
        detail: str = "",
        alone: bool = True,
        file_sha: str | None = None,
        now: float | None = None,
    ) -> Outcome:
        """Count a crash that the job was alone with, and retry it alone or quarantine it."""
        return self._outcome(
            "crashed",
            now,
            claim.job_id,
            claim.nonce,
            code,
            message,
            detail[-DETAIL_BYTES:],
            _flag(alone),
            file_sha or "",
        )

    def refill(self, priority: Priority) -> int:
        """Top RQ's list up to twice the workers, tenant by tenant; every other move does it too."""
        return int(self.call("refill", None, priority))

    # figures

    def counts(self, *, now: float | None = None) -> Counts:
        """What metrics show."""
        with self.redis.pipeline() as pipe:
            for priority in PRIORITIES:
                pipe.zcard(self.key("waiting", priority))
                pipe.zcard(self.key("running", priority))
                pipe.scard(f"rq:workers:{self.queue(priority)}")
                pipe.zrange(self.key("waiting", priority), 0, 0, withscores=True)
            pipe.zcard(self.key("due"))
            pipe.zcard(self.key("outbox"))
            pipe.zcard(self.key("dead"))
            pipe.hlen(self.key("quarantine"))
            pipe.time()
            *by_priority, due, outbox, dead, quarantined, clock = pipe.execute()
        at = float(clock[0]) + float(clock[1]) / 1e6 if now is None else now
        oldest = [first[0][1] for first in by_priority[3::4] if first]
        return Counts(
            waiting=dict(zip(PRIORITIES, by_priority[0::4], strict=True)),
            running=dict(zip(PRIORITIES, by_priority[1::4], strict=True)),
            workers=dict(zip(PRIORITIES, by_priority[2::4], strict=True)),
            due=due,
            oldest_s=max(0.0, at - min(oldest)) if oldest else 0.0,
            outbox=outbox,
            dead=dead,
            quarantined=quarantined,
        )

    # the scripts

    def call(self, operation: str, now: float | None, *arguments: Any) -> Any:
        """Run one operation of the scripts."""
        return self._script.run(operation, now, *arguments)

    def hash(self, key: str) -> dict[str, str]:
        """A hash in Redis, empty when there is none."""
        return {decoded(k): decoded(value) for k, value in self.redis.hgetall(key).items()}

    def _outcome(self, operation: str, now: float | None, *arguments: Any) -> Outcome:
        return cast(Outcome, decoded(self.call(operation, now, *arguments)))


def _submission(job: Job, function: str) -> tuple[Any, ...]:
    created = job.submitted_at.astimezone(UTC)
    return (
        job.job_id,
        body_of(job),
        dump(job),
        job.tenant,
        job.priority,
        job.token,
        job.tag or "",
        "" if job.callback is None else dump(job.callback),
        "" if job.session is None else dump(job.session),
        "" if job.deadline is None else repr(job.deadline.timestamp()),
        created.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        function,
        job.media.sha256 or "",
    )


def _flag(value: bool) -> Literal["0", "1"]:
    return "1" if value else "0"
