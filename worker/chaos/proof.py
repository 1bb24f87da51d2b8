"""The proof that nothing was lost: what was asked is compared with Redis and the receiver's log.

Every check gives sentences about what is wrong; none means proven.

    tokens       one job for each token, whoever submitted it how often; each has ended, with one
                 verdict or one named failure, as its kind may end
    ends         one entry in the verdict stream for each job, with the state that the job has; an
                 end that was seen during the run has not changed since
    blame        a well-behaved job has no crash of its own except those that the run caused
    deliveries   for each callback at least one push that was taken, under the id that follows from
                 the end, one body for each id, each signature right; no push without a callback
    leftovers    every list, registry and lease is empty, and no worker is registered; what RQ
                 wrote of a killed worker or its job may wait for its time to live

Only reads, with a store of its own, after the service has stopped.
"""

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ralf.worker.chaos.receiver import Receipt
from ralf.worker.contract import State, Verdict
from ralf.worker.service.records import Status
from ralf.worker.service.store import PRIORITIES, Store, decoded

_SHOWN = 5


@dataclass(frozen=True)
class Asked:
    """One token, as its client saw it."""

    token: str
    kind: str
    ends: frozenset[str]
    """The states that this kind of job may end in."""
    innocent: bool
    """It crashes nothing by itself."""
    callback: bool
    answers: tuple[str, ...]
    """The job's id in each answer to a submission."""


@dataclass(frozen=True)
class SeenEnd:
    """A job that was seen to have ended, and how."""

    job_id: str
    state: State
    ended_at: float | None = None


@dataclass(frozen=True)
class Ended:
    """A job as the proof found it."""

    asked: Asked
    status: Status
    crashes: tuple[Mapping[str, Any], ...]


def prove(
    store: Store,
    asked: Sequence[Asked],
    receipts: Sequence[Receipt],
    *,
    seen: Iterable[SeenEnd] = (),
    hit: Collection[int] = (),
) -> list[str]:
    """Everything that is wrong, as sentences.

    `hit` are the pids of workers that the run killed, paused, or whose child it killed; `seen` are
    ends that were read during the run.
    """
    wrong, found = _tokens(store, asked)
    wrong += _ends(store, found, seen)
    wrong += _blame(found, hit)
    wrong += _deliveries(found, receipts)
    wrong += leftovers(store)
    return wrong


def ended_jobs(store: Store, asked: Sequence[Asked]) -> dict[str, Ended]:
    """The jobs of these tokens that are in Redis, by id."""
    found = {}
    for one in asked:
        for job_id in dict.fromkeys(one.answers):
            stored = store.hash(store.key("job", job_id))
            if stored:
                crashes = tuple(json.loads(stored.get("crashes", "[]")))
                found[job_id] = Ended(one, Status.read(job_id, stored), crashes)
    return found


def _tokens(store: Store, asked: Sequence[Asked]) -> tuple[list[str], dict[str, Ended]]:
    wrong: list[str] = []
    found = ended_jobs(store, asked)
    for one in asked:
        ids = set(one.answers)
        if len(ids) != 1:
            wrong.append(f"token {one.token} was given {len(ids)} jobs: {sorted(ids)}")
        wrong += [f"token {one.token}: its job {job} is lost" for job in ids - found.keys()]
    for job_id, job in found.items():
        wrong += _one_end(store, job_id, job)
    known = {decoded(key).rpartition("job:")[2] for key in _keys(store, store.key("job", "*"))}
    wrong += [f"job {job_id} is of no token that was asked" for job_id in known - found.keys()]
    return wrong, found


def _one_end(store: Store, job_id: str, job: Ended) -> Iterator[str]:
    status, name = job.status, f"job {job_id} ({job.asked.kind})"
    verdict = store.verdict(job_id)
    if not status.ended:
        yield f"{name} has not ended: {status.state} after {status.attempts} attempts"
    elif status.state not in job.asked.ends:
        yield f"{name} ended as {status.state}: {status.failure}; may be {sorted(job.asked.ends)}"
    if status.state == "succeeded":
        yield from _verdict_fits(name, status, verdict)
    elif verdict is not None:
        yield f"{name} is {status.state} and has a verdict"
    elif status.ended and (status.failure is None or not status.failure.code):
        yield f"{name} is {status.state} and has no named failure"


def _verdict_fits(name: str, status: Status, verdict: Verdict | None) -> Iterator[str]:
    if verdict is None:
        yield f"{name} succeeded and has no verdict"
    elif verdict.job_id != status.job_id or verdict.made.attempt != status.attempts:
        made = f"{verdict.job_id}, attempt {verdict.made.attempt}"
        yield f"{name} has the verdict of {made}; its last attempt was {status.attempts}"
    elif status.failure is not None:
        yield f"{name} has a verdict and a failure"


def _ends(store: Store, found: Mapping[str, Ended], seen: Iterable[SeenEnd]) -> Iterator[str]:
    entries: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for _, fields in store.redis.xrange(store.key("verdicts")):
        if fields[b"type"] in (b"verdict.ready", b"verdict.failed"):
            entries[decoded(fields[b"job_id"])].append(json.loads(fields[b"data"]))
    for job_id, job in found.items():
        # Popped: what is left afterwards belongs to no job that was asked for.
        said = [entry["state"] for entry in entries.pop(job_id, [])]
        if job.status.ended and said != [job.status.state]:
            yield f"job {job_id} is {job.status.state}, the stream has {said}"
    yield from (f"the stream has an end of {job_id}, of no token" for job_id in entries)
    for sight in seen:
        ended = found.get(sight.job_id)
        if ended is None:
            yield f"job {sight.job_id} was seen {sight.state} and is gone"
            continue
        changed = ended.status.state != sight.state
        if changed or sight.ended_at not in (None, ended.status.ended_at):
            yield (
                f"job {sight.job_id} changed after its end: {sight.state} at {sight.ended_at}, "
                f"now {ended.status.state} at {ended.status.ended_at}"
            )


def _blame(found: Mapping[str, Ended], hit: Collection[int]) -> Iterator[str]:
    for job_id, job in found.items():
        for crash in job.crashes if job.asked.innocent else ():
            # A crash with other jobs in the child blames none of them: each runs alone next.
            if crash["alone"] and pid_of(crash["worker"]) not in hit:
                yield (
                    f"job {job_id} ({job.asked.kind}) is blamed for {crash['code']} in "
                    f"{crash['worker']}, to which nothing was done: {crash['message']}"
                )


def pid_of(worker: str) -> int:
    """The process id in a worker's name, HOST-PID-RANDOM; 0 when there is none."""
    found = re.search(r"-(\d+)-[0-9a-f]{8}$", worker)
    return int(found[1]) if found else 0


# deliveries


def delivery_id(tenant: str, job_id: str, state: str) -> str:
    """The id that this end determines, computed as the standard's readers would."""
    # Computed anew: an id that was read from Redis would only agree with itself.
    event = "verdict.ready" if state == "succeeded" else "verdict.failed"
    return "msg_" + hashlib.sha1(f"{tenant}\0{job_id}\0{event}".encode()).hexdigest()


def _deliveries(found: Mapping[str, Ended], receipts: Sequence[Receipt]) -> Iterator[str]:
    came: dict[str, list[Receipt]] = defaultdict(list)
    for receipt in receipts:
        came[receipt.id].append(receipt)
    for job_id, job in found.items():
        status = job.status
        if not status.ended:
            continue
        taken = came.pop(delivery_id(status.tenant, job_id, status.state), [])
        if not job.asked.callback:
            if taken:
                yield f"job {job_id} asked for no callback and was pushed {len(taken)} times"
            continue
        if not any(receipt.answer == "taken" for receipt in taken):
            yield f"job {job_id}: its {status.state} was never taken by the receiver"
        yield from _bodies(job_id, status, taken)
    for message_id, pushed in came.items():
        yield f"{message_id} is the id of no end, and came: {pushed[0].body[:200]}"


def _bodies(job_id: str, status: Status, taken: Sequence[Receipt]) -> Iterator[str]:
    bodies = {receipt.body for receipt in taken}
    if len(bodies) > 1:
        yield f"job {job_id}: {len(bodies)} bodies under one id: {sorted(bodies)}"
    if not all(receipt.signed for receipt in taken):
        yield f"job {job_id}: a push with a wrong signature"
    for body in bodies:
        data = json.loads(body)["data"]
        said = (data["job_id"], data["tenant"], data["state"])
        if said != (job_id, status.tenant, status.state):
            yield f"job {job_id} is {status.state} of {status.tenant}, the push says {said}"


def doubled(receipts: Sequence[Receipt]) -> int:
    """Deliveries that were taken more than once; by their id a receiver recognises them."""
    taken = Counter(receipt.id for receipt in receipts if receipt.answer == "taken")
    return sum(count > 1 for count in taken.values())


# leftovers


def leftovers(store: Store) -> list[str]:
    """Entries where only unended jobs, running workers and unsent pushes may have some."""
    ours = [
        "pending:*",
        "stale:*",
        "turn:*",
        "rank:*",
        "waiting:*",
        "running:*",
        "due",
        "deadlines",
        "popped",
    ]
    ours += ["outbox", "delivery:*", "dead", "endpoints:disabled", "sessions:changed"]
    rq = ["rq:workers", "rq:worker:*", "rq:suspended", "rq:finished:*", "rq:failed:*"]
    rq += ["rq:deferred:*", "rq:scheduled:*", "rq:canceled:*", "rq:execution*"]
    for priority in PRIORITIES:
        queue = store.queue(priority)
        rq += [f"rq:queue:{queue}", f"rq:queue:{queue}:intermediate", f"rq:wip:{queue}"]
        rq.append(f"rq:workers:{queue}")
    wrong: list[str] = []
    for pattern in (*(store.key(name) for name in ours), *rq):
        wrong += [
            f"{decoded(key)} is left behind: {_content(store, key)}"
            for key in _keys(store, pattern)
            # -1: it never expires.  TTL would round the last half second to 0.
            if not key.startswith(b"rq:") or store.redis.pttl(key) == -1
        ]
    return wrong


def _keys(store: Store, pattern: str) -> list[bytes]:
    return sorted(store.redis.scan_iter(match=pattern, count=1000))


def _content(store: Store, key: bytes) -> str:
    redis, members = store.redis, list[bytes]()
    match decoded(redis.type(key)):
        case "list":
            members = redis.lrange(key, 0, _SHOWN - 1)
        case "zset":
            members = redis.zrange(key, 0, _SHOWN - 1)
        case "set":
            members = sorted(redis.smembers(key))[:_SHOWN]
        case "hash":
            members = sorted(redis.hkeys(key))[:_SHOWN]
    return ", ".join(decoded(member) for member in members)
