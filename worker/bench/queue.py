"""`ralf bench queue`: what the queue costs, compared with RQ's own workers on one real Redis.

    no-op job      RQ's SimpleWorker, RQ's Worker (a fork for each job) and ours, in turns.  Ours
                   goes the whole way: claim, the warm child over its socket, verdict, stream entry.
                   Only the worker's loop is timed, from its first dequeue to the empty queue.
    to enqueue     submit_many beside RQ's enqueue and enqueue_many, in turns
    latency        from submit() to the verdict in the client's hand, one job at a time
    fairness       how many jobs are served until the last of one tenant's ten, which came after
                   another's ten thousand; 20 is a perfect turn by turn

The bodies do nothing, and ratios are what counts: all three run in this process, with the same
Redis and quiet logs.  The requirement is at most 1.5 times SimpleWorker's cost for a no-op job.
"""

import argparse
import logging
import random
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rq import Queue, SimpleWorker, Worker
from rq.worker import BaseWorker

from ralf.kernels.bench.record import Record, Timing, machine, timing
from ralf.worker import telemetry
from ralf.worker.chaos import bodies
from ralf.worker.client import Client, request
from ralf.worker.contract import Failure, Job
from ralf.worker.service import jobs
from ralf.worker.service.child_process import ChildProcess
from ralf.worker.service.connection import connect
from ralf.worker.service.embedded import redis_alone
from ralf.worker.service.processes import Supervisor
from ralf.worker.service.rq_worker import RalfWorker
from ralf.worker.service.store import Store
from ralf.worker.settings import Settings

TURNS = 7
LATENCY_JOBS = 200
CROWD, FEW = 10_000, 10
IDLE_S = 0.05
"""Between two jobs of the latency measurement, on average: the worker blocks in Redis again."""
TRIVIAL = bodies.PREFIX + "trivial"


def nothing(name: str) -> None:
    """RQ's job that does nothing; it takes a name as its argument, as ours does."""


def run_queue(args: argparse.Namespace) -> int:
    """Print the record."""
    print(record(args.jobs, turns=TURNS, latency_jobs=LATENCY_JOBS, crowd=CROWD).dump())
    return 0


def record(count: int, *, turns: int, latency_jobs: int, crowd: int) -> Record:
    """Measure with `count` jobs a turn."""
    before = machine()
    with own_redis() as supervisor:
        running = _run(supervisor.settings, count, turns)
        enqueuing = _enqueue(supervisor.settings, count, turns)
        waits = _latency(supervisor, latency_jobs)
        served = _fairness(supervisor.settings, crowd)
    ran = {name: timing(spent) for name, spent in running.items()}
    queued = {name: timing(spent) for name, spent in enqueuing.items()}
    latency = timing(waits)
    return Record(
        theme="queue",
        machine=before,
        conditions={
            "jobs_a_turn": count,
            "job": "does nothing",
            "redis": "a process of its own on a Unix socket, no append-only file",
            "logs": "warnings only, RQ's and ours",
            "child": "warm before the first turn, not recycled",
            "latency": f"{latency_jobs} jobs, one at a time, {IDLE_S * 1000:g} ms apart",
            "seconds": "a job, by turn; the latency's by job",
        },
        timings=ran | queued | {"latency": latency},
        ratios={
            "ours / SimpleWorker": _ratio(ran, "run ralf", "run rq SimpleWorker"),
            "Worker / ours": _ratio(ran, "run rq Worker", "run ralf"),
            "enqueue / submit_many": _ratio(queued, "enqueue rq", "enqueue ralf submit_many"),
            "enqueue_many / submit_many": _ratio(
                queued, "enqueue rq many", "enqueue ralf submit_many"
            ),
        },
        facts={
            "jobs_per_s": {name: round(1 / t.median_s) for name, t in (ran | queued).items()},
            "latency_ms": {
                "p50": round(1000 * latency.median_s, 2),
                "p99": round(1000 * sorted(waits)[int(0.99 * (len(waits) - 1))], 2),
            },
            "fairness": {"crowd": crowd, "few": FEW, "served_until_the_few_ended": served},
        },
    )


def _ratio(timings: Mapping[str, Timing], above: str, below: str) -> float:
    return round(timings[above].median_s / timings[below].median_s, 2)


@contextmanager
def own_redis() -> Iterator[Supervisor]:
    """A Redis of the bench's own, and quiet logs."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ralf-bench-")))
        settings = replace(
            Settings(),
            redis_url=f"unix://{folder / 'redis.sock'}",
            redis_prefix="bench:",
            work_dir=str(folder),
            # No recycling: the start of a new child would count as a cost of the queue.
            child_max_jobs=0,
            shared_child_max_jobs=0,
            log_level="warning",
        )
        telemetry.configure(settings)
        logging.getLogger("rq").setLevel(logging.WARNING)
        yield stack.enter_context(redis_alone(settings, folder, durable=False))


# running


def _run(settings: Settings, count: int, turns: int) -> dict[str, list[float]]:
    """Seconds a job in each way's loop, the ways in turns; the first turn warms up."""
    spent: dict[str, list[float]] = {}
    with ExitStack() as stack:
        child = ChildProcess(settings, bodies="test")
        stack.callback(child.close)
        store = Store(connect(settings.redis_url), settings, function=TRIVIAL)
        stack.callback(store.redis.close)
        ways: dict[str, Callable[[], float]] = {
            "run rq SimpleWorker": lambda: _rq_loop(store.redis, SimpleWorker, count),
            "run ralf": lambda: _our_loop(store, child, count),
            "run rq Worker": lambda: _rq_loop(store.redis, Worker, count),
        }
        for turn in range(-1, turns):
            for name, way in ways.items():
                seconds = way()
                if turn >= 0:
                    spent.setdefault(name, []).append(seconds / count)
    return spent


def _rq_loop(redis: Any, kind: type[BaseWorker], count: int) -> float:
    queue = Queue("bench-rq", connection=redis)
    queue.enqueue_many([Queue.prepare_data(nothing, (str(n),)) for n in range(count)])
    worker = kind([queue], connection=redis)
    clock = _clocked(worker)
    worker.work(burst=True, logging_level="WARNING")
    assert len(queue) == 0
    redis.flushdb()
    return clock()


def _our_loop(store: Store, child: ChildProcess, count: int) -> float:
    store.submit([_job(str(n)) for n in range(count)])
    worker = RalfWorker(store, child, priority="default", table=jobs.table("test"))
    worker.start()
    clock = _clocked(worker)
    worker.work(burst=True)
    # A worker that lost jobs would seem quick.
    assert store.redis.xlen(store.key("verdicts")) == count
    store.redis.flushdb()
    return clock()


def _clocked(worker: Any) -> Callable[[], float]:
    """Seconds from the first dequeue to the one that finds the queue empty."""
    moments: list[float] = []
    dequeue = worker.dequeue_job_and_maintain_ttl

    def timed(*args: Any, **kwargs: Any) -> Any:
        moments.append(time.perf_counter())
        return dequeue(*args, **kwargs)

    worker.dequeue_job_and_maintain_ttl = timed
    return lambda: moments[-1] - moments[0]


def _job(name: str) -> Job:
    return _job_of("default", name)


def _job_of(tenant: str, name: str) -> Job:
    token = f"{name}-{uuid.uuid4().hex}"
    return request(f"https://media.example/{name}.mp4", token=token, tenant=tenant)


# enqueuing


def _enqueue(settings: Settings, count: int, turns: int) -> dict[str, list[float]]:
    """Seconds a job to put `count` of them into Redis."""
    client = Client(connect(settings.redis_url), settings)
    redis = client.store.redis
    queue = Queue("bench-rq", connection=redis)

    def one_by_one() -> None:
        for number in range(count):
            queue.enqueue(nothing, str(number))

    def many() -> None:
        queue.enqueue_many([Queue.prepare_data(nothing, (str(n),)) for n in range(count)])

    def submit_many() -> None:
        client.submit_many(_job(str(n)) for n in range(count))

    ways = {
        "enqueue rq": one_by_one,
        "enqueue rq many": many,
        "enqueue ralf submit_many": submit_many,
    }
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(-1, turns):
        for name, way in ways.items():
            redis.flushdb()
            start = time.perf_counter()
            way()
            if turn >= 0:
                spent[name].append((time.perf_counter() - start) / count)
    redis.flushdb()
    client.close()
    return spent


# latency


def _latency(supervisor: Supervisor, count: int) -> list[float]:
    """Seconds from submit() to the verdict, with a worker that has nothing else to do."""
    supervisor.add("worker", "--bodies", "test")
    supervisor.tend()
    client = Client(connect(supervisor.settings.redis_url), supervisor.settings)
    client.store.function = TRIVIAL
    rng, spent = random.Random(0), []
    try:
        # Not timed: the first job waits until the worker and its child are up.
        client.result(client.submit_many([_job("first")])[0].job_id, timeout=60.0)
        for number in range(count):
            time.sleep(rng.uniform(0.5, 1.5) * IDLE_S)
            start = time.perf_counter()
            made = client.submit_many([_job(str(number))])[0]
            client.result(made.job_id, timeout=60.0)
            spent.append(time.perf_counter() - start)
    finally:
        client.close()
        supervisor.stop("worker")
    return spent


# fairness


def _fairness(settings: Settings, crowd: int) -> int:
    """How many jobs are served until those of a tenant with few, sent last, have ended."""
    store = Store(connect(settings.redis_url), settings, function=TRIVIAL)
    queue = f"rq:queue:{store.queue('default')}"
    client = Client(store.redis, settings)
    client.submit_many(_job_of("crowd", str(number)) for number in range(crowd))
    client.submit_many(_job_of("few", str(number)) for number in range(FEW))
    served, left = 0, FEW
    while left:
        job_id: Any = store.redis.lmove(queue, f"{queue}:intermediate")
        claim = store.begin(job_id.decode(), "bench")
        assert claim is not None
        store.end(claim, Failure(code="fetch_denied", message="served"))
        served += 1
        left -= claim.job.tenant == "few"
    store.redis.flushdb()
    store.redis.close()
    return served
