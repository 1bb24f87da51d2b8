"""Every key in Redis, and the scripts that change them.

A job goes from submission to its end in a few moves.  Each move is one operation of a Lua script
(lua/jobs.lua, claims.lua, repairs.lua), which Redis runs as one atomic step: a process may die
between any two moves, and the job is still in exactly one place.

    submit    token, job, RQ's hash, pending list; known token → the stored job, or its conflict
    begin     queued → running; gives a Claim: only its holder can change the running job
    beat      extend the lease, note progress; answers go_on, cancel or lost
    end       running → ended: state, verdict, evidence, stream, outbox, session, all or none
    retry     running → queued after a delay, charged; past the last retry: failed
    hand_back running → queued, not charged (the worker stops, or has no model)
    crashed   running → queued alone, or quarantined at the second counted crash
    cancel    queued → cancelled; a running job learns of it at its next beat
    release   what is kept of an ended backfill job goes soon

    status  job  verdict  partial  evidence  ends  counts  pinned_versions    only read

`call` runs any one operation of the scripts; deliver.py, quarantine.py and janitor.py give names
to those that only they use.

The keys, under settings.redis_prefix: token:TENANT:TOKEN, job:ID, verdict:ID, evidence:ID,
pending:PRIORITY:TENANT, turn:PRIORITY (tenants in turn), waiting:PRIORITY and running:PRIORITY
(zsets of queued and running jobs), stale:PRIORITY, due, deadlines, popped, verdicts (stream),
outbox, dead, delivery:ID, endpoints:disabled, crashes:job:ID, crashes:workers:SHA, quarantine,
quarantine:at, active:TENANT, used:TENANT,
rank:PRIORITY, session:TENANT:ID, sessions:changed, swept; channel watch:ID.  Beside
them RQ's own: rq:job:ID and rq:queue:ralf-PRIORITY hold an id and a function's name, as JSON; the
job itself is in our keys.

Times come from Redis' own clock unless a test passes `now`.  One Redis (6.2 or later), with
persistence on and `noeviction`; not a Redis Cluster, since one script touches keys of many hash
slots.

`python -m ralf.worker.service.store` prints the script, for clients in other languages; see
docs/integration.md.
"""

import hashlib
import json
import random
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC
from importlib.resources import files
from typing import Any, Literal, cast

from pydantic import ValidationError
from redis import exceptions

from ralf.worker.contract import (
    Evidence,
    Failure,
    Job,
    Priority,
    Progress,
    SessionVerdict,
    State,
    Verdict,
    dump,
)
from ralf.worker.service import sessions
from ralf.worker.service.records import (
    MODERATE,
    NOT_IN_HASH,
    BeatReply,
    Claim,
    Counts,
    Outcome,
    Status,
    Submitted,
)
from ralf.worker.settings import Settings

PRIORITIES: tuple[Priority, ...] = ("high", "default", "backfill")
# A job keeps its last ten crashes in Redis, each with at most this much of the child's log.
DETAIL_BYTES = 4096
END_BY_CODE: Mapping[str, State] = {"cancelled": "cancelled", "deadline_passed": "expired"}
RELEASE_TTL_S = 600
"""What is stored of a backfill's job is kept for this long once its ledger has the end."""
RQ_TTL_S = 3600
"""What RQ shows of an ended job is kept for this long."""
TRIES = 3
WAIT_MS = 1000
"""How long replicas have to confirm a write, where settings.redis_wait_replicas asks for it."""
# A try fails only when another segment ended since the read; the janitor folds what eight miss.
FOLD_TRIES = 8
PAGE = 500


class NotReplicated(exceptions.ResponseError):
    """Redis has the write, and too few replicas have confirmed it."""


def decoded(value: Any) -> str:
    """What Redis answered, as a string."""
    return value.decode() if isinstance(value, bytes) else str(value)


def request_hash(job: Job) -> str:
    """The hash of what the client asked for; the same token with another hash is a conflict.

    Fields that have their default are left out, so that a release with a new field gives the same
    hash as the release before it.
    """
    # The keys are sorted: a release that orders its fields otherwise must give the same hash.
    body = job.model_dump(mode="json", exclude=set(NOT_IN_HASH), exclude_defaults=True)
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


class Store:
    """All reads and writes of Redis; safe to share between threads."""

    def __init__(self, redis: Any, settings: Settings, *, function: str = MODERATE) -> None:
        self.redis: Any = redis
        self.settings = settings
        self.function = function
        self.prefix = settings.redis_prefix
        self._may_ask_memory = True
        # Redis keeps the script under its hash; redis-py sends the text again where it is lost.
        self._script: Any = redis.register_script(lua_source(settings))

    # names in Redis

    def key(self, *parts: str) -> str:
        """A key of ours."""
        return self.prefix + ":".join(parts)

    def queue(self, priority: Priority) -> str:
        """The name of RQ's queue."""
        return _queue_prefix(self.settings) + priority

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
        replies = self._call_many("submit", now, calls)
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

    def release(self, job_ids: Sequence[str], *, now: float | None = None) -> None:
        """Let what is stored of a backfill's ended jobs expire soon: its ledger has their ends."""
        if job_ids:
            self._call_many("release", now, [(job_id,) for job_id in job_ids])

    def ends(self, job_ids: Sequence[str]) -> dict[str, tuple[Status | None, Verdict | None]]:
        """Status and verdict of each job that is not under way, read in two round trips."""
        with self.redis.pipeline(transaction=False) as pipe:
            for job_id in job_ids:
                pipe.hgetall(self.key("job", job_id))
            stored = [{decoded(k): decoded(v) for k, v in job.items()} for job in pipe.execute()]
        read = [
            Status.read(i, job) if job else None for i, job in zip(job_ids, stored, strict=True)
        ]
        ended = {i: one for i, one in zip(job_ids, read, strict=True) if one is None or one.ended}
        with self.redis.pipeline(transaction=False) as pipe:
            for job_id in ended:
                pipe.get(self.key("verdict", job_id))
            texts = pipe.execute()
        return {
            job_id: (status, None if text is None else Verdict.model_validate_json(text))
            for (job_id, status), text in zip(ended.items(), texts, strict=True)
        }

    # the worker's moves

    def begin(
        self,
        job_id: str,
        worker: str,
        *,
        alone: bool = True,
        nonce: str | None = None,
        ended: Callable[[State, str], None] = lambda state, code: None,
        now: float | None = None,
    ) -> Claim | None:
        """Claim a job that RQ's dequeue popped; None when it is no longer this worker's to run.

        alone says whether the child has no other job now; `beat` corrects it.  ended is called with
        state and code of a job that ends here instead of being claimed.
        """
        # Made here and not in the script: when redis-py sends the call twice, the second one must
        # find its own claim and not another worker's.
        nonce = nonce or uuid.uuid4().hex
        reply = self.call("begin", now, job_id, nonce, worker, _flag(alone))
        if reply is None:
            return None
        if len(reply) == 2:
            state, code = map(decoded, reply)
            ended(cast(State, state), code)
            return None
        document, attempts, retries, run_alone = reply
        try:
            job = Job.model_validate_json(document)
        except ValidationError as fault:
            # It is claimed already. Left alone its lease would run out, and it would count as a
            # crash.
            failure = Failure(
                code="bad_request",
                message=f"the stored job does not fit ralf.job/1: {fault.errors()[0]['msg']}; "
                "submit it with ralf.worker.client of the worker's own release",
                attempts=int(attempts),
            )
            text = failure.model_dump_json()
            self.call("finish", now, job_id, nonce, "failed", text, text, "", "", "", "")
            ended("failed", failure.code)
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
    ) -> BeatReply:
        """Prove that the job runs, store what is given; gives what to do next.

        The caller sends progress at most once a second, and beats at least every
        settings.heartbeat_s.
        """
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
        return cast(BeatReply, decoded(reply))

    def end(
        self,
        claim: Claim,
        outcome: Verdict | Failure,
        *,
        evidence: Evidence | None = None,
        file_sha: str | None = None,
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
        names = (claim.job_id, claim.nonce)
        ended = bool(self.call("finish", now, *names, *arguments, file_sha or ""))
        if ended and job.session is not None:
            # If the fold fails the end still stands: the session stays marked for the janitor.
            with suppress(exceptions.RedisError):
                self.fold_session(job.tenant, job.session.session_id, now=now)
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
            # Jitter: jobs that failed together should not all come back together.
            delay_s = delays[min(claim.retries, len(delays) - 1)] * random.uniform(0.8, 1.2)
        text = failure.model_copy(update={"attempts": claim.attempt}).model_dump_json()
        return self._outcome("retry", now, claim.job_id, claim.nonce, delay_s, text)

    def hand_back(self, claim: Claim, *, delay_s: float = 0.0, now: float | None = None) -> Outcome:
        """Queue the job again before all others, at no charge to it."""
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
        blame_file: bool = True,
        now: float | None = None,
    ) -> Outcome:
        """Count a crash that the job was alone with, and retry it alone or quarantine it.

        file_sha: the hash that the worker computed.  blame_file: the crash may be due to the bytes
        and counts against them in every tenant's jobs.
        """
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
            _flag(blame_file),
        )

    def refill(self, priority: Priority) -> int:
        """Fill RQ's list up to one job a worker and one more, one tenant after the other.

        Every other move does it too.
        """
        return int(self.call("refill", None, priority))

    def pop(self, priority: Priority) -> bytes | None:
        """RQ's dequeue, without waiting, that works when Redis' memory is full."""
        return cast("bytes | None", self.call("pop", None, priority))

    def fold_session(
        self, tenant: str, session_id: str, *, now: float | None = None
    ) -> SessionVerdict | None:
        """Fold a changed session, store it and announce it.

        None when there is no such session, or when others keep changing it: it then stays marked,
        and the next end or the janitor folds it.
        """
        for _ in range(FOLD_TRIES):
            stored = self.hash(self.key("session", tenant, session_id))
            verdict = sessions.fold(tenant, session_id, stored)
            facts = json.dumps(sessions.facts(verdict))
            alert = _flag(sessions.is_alert(verdict))
            # The script compares the revision: it writes nothing if a segment has ended since the
            # read.
            written = self.call(
                "fold", now, tenant, session_id, verdict.revision, dump(verdict), facts, alert
            )
            if written:
                return verdict if stored else None
        return None

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
            # Jobs were submitted by this clock, so their ages are by it too.
            pipe.time()
            *by_priority, due, outbox, dead, quarantined, clock = pipe.execute()
        at = float(clock[0]) + float(clock[1]) / 1e6 if now is None else now
        # Each priority has four replies; the fourth is its oldest job.  A backfill's jobs wait on
        # purpose, and their age must raise no alert.
        oldest = [
            first[0][1]
            for priority, first in zip(PRIORITIES, by_priority[3::4], strict=True)
            if first and priority != "backfill"
        ]
        return Counts(
            waiting=dict(zip(PRIORITIES, by_priority[0::4], strict=True)),
            running=dict(zip(PRIORITIES, by_priority[1::4], strict=True)),
            workers=dict(zip(PRIORITIES, by_priority[2::4], strict=True)),
            due=due,
            oldest_s=max(0.0, at - min(oldest)) if oldest else 0.0,
            outbox=outbox,
            dead=dead,
            quarantined=quarantined,
            memory_share=self._memory_share(),
        )

    def _memory_share(self) -> float | None:
        """How full Redis is; None where this user may not ask."""
        if not self._may_ask_memory:
            return None
        try:
            info = self.redis.info("memory")
        except exceptions.NoPermissionError:
            # Each refusal is an entry in Redis' ACL LOG, where an operator looks for attacks.
            self._may_ask_memory = False
            return None
        # Redis compares with maxmemory without the buffers of replicas and append-only file.
        used = int(info["used_memory"]) - int(info.get("mem_not_counted_for_evict", 0))
        most = int(info.get("maxmemory", 0)) or int(info.get("total_system_memory", 0))
        return used / most if most else None

    def pinned_versions(self, model: str) -> dict[str, str]:
        """Each version of the model that a queued or running job names, and why to keep it.

        `ralf models gc` must not remove these.  Read in pages, so that a long queue costs time and
        not memory.
        """
        counts: dict[str, int] = {}
        for document in self._unended_documents():
            name, _, version = str(json.loads(document).get("model") or "").partition("@")
            if name == model and version:
                counts[version] = counts.get(version, 0) + 1
        return {version: f"pinned by {n} waiting or running jobs" for version, n in counts.items()}

    def _unended_documents(self) -> Iterator[str]:
        for priority in PRIORITIES:
            for kind in ("waiting", "running"):
                ids = self.redis.zrange(self.key(kind, priority), 0, -1)
                for start in range(0, len(ids), PAGE):
                    with self.redis.pipeline(transaction=False) as pipe:
                        for job_id in ids[start : start + PAGE]:
                            pipe.hget(self.key("job", decoded(job_id)), "document")
                        yield from (decoded(text) for text in pipe.execute() if text is not None)

    # the script

    def call(self, operation: str, now: float | None, *arguments: Any, client: Any = None) -> Any:
        """Run one operation of the script; with a pipeline as `client`, as a part of it."""
        at = "" if now is None else repr(now)
        return self._script(args=[operation, at, *arguments], client=client or self.redis)

    def _call_many(self, operation: str, now: float | None, calls: Sequence[Sequence[Any]]) -> Any:
        """Run one operation for each list of arguments, in one round trip.

        redis-py loads the script before it sends the calls.  A Redis that was restarted in between
        has lost it, and redis-py sends the calls again without it; so we begin again.
        """
        for left in reversed(range(TRIES)):
            with self.redis.pipeline(transaction=False) as pipe:
                for arguments in calls:
                    self.call(operation, now, *arguments, client=pipe)
                if self.settings.redis_wait_replicas:
                    self._wait_for_replicas(pipe)
                try:
                    return self._check_replicas(pipe.execute())
                except exceptions.NoScriptError:
                    if not left:
                        raise
        raise AssertionError  # the last try returns or raises

    def replicated(self) -> None:
        """Wait until replicas have all that was written, where the settings ask for that.

        Raises NotReplicated when they are too few.
        """
        if self.settings.redis_wait_replicas:
            with self.redis.pipeline(transaction=False) as pipe:
                self._wait_for_replicas(pipe)
                self._check_replicas(pipe.execute())

    def _wait_for_replicas(self, pipe: Any) -> None:
        """Wait until enough replicas have all that was written before."""
        # WAIT counts replicas that have the connection's own last write.  A token that is sent
        # again writes nothing, so without this one it would wait for nothing.
        pipe.set(self.key("replicated"), 1, ex=60)
        pipe.execute_command("WAIT", self.settings.redis_wait_replicas, WAIT_MS)

    def _check_replicas(self, replies: list[Any]) -> list[Any]:
        """The replies without those of _wait_for_replicas(); NotReplicated if they are too few."""
        wanted = self.settings.redis_wait_replicas
        if not wanted:
            return replies
        *others, _, confirmed = replies
        if int(confirmed) < wanted:
            raise NotReplicated(
                f"stored, but {confirmed} of {wanted} replicas confirmed it within "
                f"{WAIT_MS / 1000:g} s (RALF_REDIS_WAIT_REPLICAS)"
            )
        return others

    def hash(self, key: str) -> dict[str, str]:
        """A hash in Redis, empty when there is none."""
        return {decoded(k): decoded(value) for k, value in self.redis.hgetall(key).items()}

    def _outcome(self, operation: str, now: float | None, *arguments: Any) -> Outcome:
        return cast(Outcome, decoded(self.call(operation, now, *arguments)))


def _submission(job: Job, function: str) -> tuple[Any, ...]:
    created = job.submitted_at.astimezone(UTC)
    return (
        job.job_id,
        request_hash(job),
        dump(job),
        job.tenant,
        job.priority,
        job.token,
        job.tag or "",
        "" if job.callback is None else dump(job.callback),
        "" if job.session is None else dump(job.session),
        "" if job.deadline is None else repr(job.deadline.timestamp()),
        # The format in which RQ stores created_at.
        created.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        function,
        job.media.sha256 or "",
    )


def _flag(value: bool) -> Literal["0", "1"]:
    return "1" if value else "0"


# the script's text


def lua_source(settings: Settings) -> str:
    """The three Lua files as one script, with the settings before them as constants."""
    constants = {
        "prefix": settings.redis_prefix,
        "queue": _queue_prefix(settings),
        "lease": settings.heartbeat_ttl_s,
        "reclaim": settings.reclaim_after_s,
        "retries": settings.retries,
        "quarantine_after": settings.quarantine_after,
        "job_ttl": settings.job_ttl_s,
        "token_ttl": settings.token_ttl_s,
        "verdict_ttl": settings.verdict_ttl_s,
        "evidence_ttl": settings.evidence_ttl_s,
        "session_ttl": settings.session_ttl_s,
        "crash_ttl": settings.crash_ttl_s,
        "stream": settings.stream_max_len,
        "tenant_running": settings.tenant_running_max,
        "fair_over": settings.fair_over_s,
        "dead_most": settings.dead_letters_max,
        "quarantine_most": settings.quarantine_max,
        # RQ's own time limit is only a last resort: the worker process ends a late job before.
        "rq_timeout": int(settings.timeout_most_s) + 120,
        "rq_ttl": RQ_TTL_S,
        "release_ttl": RELEASE_TTL_S,
    }
    # A number or a plain string in JSON is one in Lua too.
    lines = [f"  {name} = {json.dumps(value)}," for name, value in constants.items()]
    lines.append("  priorities = {" + ", ".join(json.dumps(name) for name in PRIORITIES) + "},")
    folder = files("ralf.worker.service").joinpath("lua")
    parts = [folder.joinpath(f"{name}.lua").read_text() for name in ("jobs", "claims", "repairs")]
    return "\n".join(["local C = {", *lines, "}", *parts])


def _queue_prefix(settings: Settings) -> str:
    """How the names of RQ's queues begin; the priority follows."""
    return settings.redis_prefix.replace(":", "-")


if __name__ == "__main__":
    print(lua_source(Settings.from_environment()), end="")
