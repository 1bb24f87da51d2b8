"""`ralf bench scale`: how much faster two and four workers are than one, on one machine.

Groups of 1, 2 and 4 workers have queues of their own in one Redis and take turns at the same jobs;
the groups whose turn it is not block in Redis.  Two loads:

    wait    each job waits in its child and computes next to nothing, as one does whose work is done
            by a device: what is missing from linear was lost in the service itself, in Redis, its
            scripts and the hand-over to the child
    empty   the jobs do nothing, so the processor is all that bounds them: a job costs some
            milliseconds of it (parent, child and Redis together), and a machine's cores are soon
            used up.  The bound that follows is in the record: cores / (processor time of a job)

A turn lasts from the first job's start to the last job's end by Redis' clock.  Linearity is the
jobs a second of n workers by n times those of one, of the medians; 1 is perfect.
"""

import argparse
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import Literal

import psutil

from ralf.kernels.bench.record import Record, machine, timing
from ralf.worker.bench.queue import own_redis
from ralf.worker.chaos import bodies
from ralf.worker.client import request
from ralf.worker.service.connection import connect
from ralf.worker.service.processes import ProcessFailed, Supervisor
from ralf.worker.service.store import Store

Load = Literal["wait", "empty"]
WORKERS = (1, 2, 4)
TURNS = 5
WAIT_S = 0.1
PATIENCE_S = 300.0
"""A group that does not come up, or a turn that does not end, in so long has failed."""


def cpu_seconds(pid: int) -> float:
    """Processor seconds that a process has used."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


@dataclass(frozen=True)
class Turn:
    """One group at one load."""

    seconds_a_job: float
    processor_s_a_job: float
    """Of the group's parents and children, and of Redis."""


@dataclass(frozen=True)
class Group:
    """Some warm workers on a queue of their own."""

    supervisor: Supervisor
    store: Store

    def take(self, load: Load, count: int, redis_pid: int) -> Turn:
        """So many jobs, all there before the first can have ended its wait."""
        body, tag = ("sleep", f"sleep:{WAIT_S:g}") if load == "wait" else ("trivial", None)
        made = [
            request(f"https://media.example/{n}.mp4", token=uuid.uuid4().hex, tag=tag)
            for n in range(count)
        ]
        pids = [redis_pid]
        for worker in self.supervisor.of("worker"):
            pids += [worker.pid, self.supervisor.child_of(worker)]
        before = sum(map(cpu_seconds, pids))
        self.store.submit(made, function=bodies.PREFIX + body)
        verdicts = self.store.key("verdicts")
        _wait(lambda: self.store.redis.xlen(verdicts) >= count, f"{count} jobs did not end")
        spent = sum(map(cpu_seconds, pids)) - before
        # By the jobs' own times, since the wait above reads the stream only each 20 ms.
        first, last = self._span([job.job_id for job in made])
        self.store.redis.delete(verdicts)
        return Turn((last - first) / count, spent / count)

    def _span(self, job_ids: list[str]) -> tuple[float, float]:
        """When the first began and the last ended; every one must have succeeded at once."""
        with self.store.redis.pipeline(transaction=False) as pipe:
            for job_id in job_ids:
                key = self.store.key("job", job_id)
                pipe.hmget(key, "state", "attempts", "started_at", "ended_at")
            rows = pipe.execute()
        odd = [row for row in rows if row[:2] != [b"succeeded", b"1"]]
        if odd:
            raise ProcessFailed(
                f"{len(odd)} jobs did not succeed at the first attempt, one of them: {odd[0]}"
            )
        return min(float(row[2]) for row in rows), max(float(row[3]) for row in rows)


@contextmanager
def _group(supervisor: Supervisor, workers: int) -> Iterator[Group]:
    """So many workers, each with its child loaded, that serve only this group's queue."""
    folder = supervisor.folder / f"group-{workers}"
    folder.mkdir()
    # work_dir stays the supervisor's: a path to a socket must be short
    own = Supervisor(
        replace(supervisor.settings, redis_prefix=f"scale{workers}:"), folder, logged=True
    )
    store = Store(connect(own.settings.redis_url), own.settings)
    for _ in range(workers):
        own.add("worker", "--bodies", "test")
    try:
        own.tend()

        def up() -> bool:
            own.tend()
            return store.counts().workers["default"] == workers

        _wait(up, f"{workers} workers did not come up")
        yield Group(own, store)
    finally:
        own.stop("worker")
        store.redis.close()


def _wait(true: Callable[[], bool], fault: str) -> None:
    end = time.monotonic() + PATIENCE_S
    while not true():
        if time.monotonic() > end:
            raise ProcessFailed(f"{fault} within {PATIENCE_S:g} s")
        time.sleep(0.02)


def run_scale(args: argparse.Namespace) -> int:
    """Print the record, and write it into the folder of --out."""
    made = record(WORKERS, {"wait": args.waits, "empty": args.jobs}, turns=args.turns)
    made.save(args.out, f"cpu{made.machine['cores']}")
    return 0


def record(workers: tuple[int, ...], counts: Mapping[Load, int], *, turns: int) -> Record:
    """Measure each load with each number of workers, in turns; the first turn warms up."""
    before = machine()
    taken: dict[Load, dict[int, list[Turn]]] = {load: {n: [] for n in workers} for load in counts}
    with own_redis() as supervisor, ExitStack() as stack:
        redis_pid = supervisor.of("redis")[0].pid
        groups = {n: stack.enter_context(_group(supervisor, n)) for n in workers}
        for turn in range(-1, turns):
            for load, count in counts.items():
                for n, group in groups.items():
                    took = group.take(load, count, redis_pid)
                    if turn >= 0:
                        taken[load][n].append(took)
    return Record(
        theme="scale",
        machine=before,
        conditions={
            "jobs_a_turn": dict(counts),
            "wait_s": WAIT_S,
            "workers": list(workers),
            "worker": "a parent and a warm child, a process each",
            "redis": "a process of its own on a Unix socket, no append-only file",
            "logs": "warnings only",
            "others": f"the {sum(workers)} workers are up all the time; those not at work sleep",
            "nice": os.nice(0),
            "seconds": "a job, from the first one's start to the last one's end, by turn",
        },
        timings={
            _name(load, n): timing([turn.seconds_a_job for turn in some])
            for load, groups_taken in taken.items()
            for n, some in groups_taken.items()
        },
        ratios={
            f"{load}: {n} / {workers[0]}": round(_rate(by[n]) / _rate(by[workers[0]]), 2)
            for load, by in taken.items()
            for n in workers[1:]
        },
        facts={load: _facts(by, int(before["cores"])) for load, by in taken.items()},
    )


def _name(load: Load, workers: int) -> str:
    return f"{load}, {workers} worker{'s' if workers > 1 else ''}"


def _rate(turns: list[Turn]) -> float:
    return 1 / median(turn.seconds_a_job for turn in turns)


def _facts(by: Mapping[int, list[Turn]], cores: int) -> dict[str, object]:
    """Jobs a second, linearity, and how far the cores allow it to go."""
    least = min(by)
    one = _rate(by[least]) / least
    processor = {n: median(turn.processor_s_a_job for turn in turns) for n, turns in by.items()}
    return {
        "jobs_per_s": {str(n): round(_rate(turns), 1) for n, turns in by.items()},
        "linearity": {str(n): round(_rate(turns) / (n * one), 3) for n, turns in by.items()},
        "processor_ms_a_job": {str(n): round(1000 * spent, 2) for n, spent in processor.items()},
        "cores_busy": {str(n): round(_rate(by[n]) * spent, 2) for n, spent in processor.items()},
        # Processor time is counted in ticks: a short run may show none at all.
        "most_jobs_per_s_of_these_cores": round(cores / max(min(processor.values()), 1e-4)),
    }
