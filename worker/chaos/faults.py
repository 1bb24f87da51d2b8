"""Inject faults into running processes, and measure how soon each affected job recovers.

    child      kill -9 of a worker's child, mostly in the middle of a job
    parent     kill -9 of a worker; its child dies with it
    pause      SIGSTOP of a worker until its lease is over; it goes on with a job it has lost
    drain      SIGTERM, sometimes a second one soon after
    deliverer  kill -9, mostly while a push waits for its answer
    janitor    kill -9 of the janitor process; each worker has a janitor thread too
    redis      kill -9; it starts again with its append-only file

Every kind comes once before the first comes twice.  An affected job is one whose process was
killed.  It is found when it waits for a worker again, and has recovered when it runs again or has
ended.  Times are Redis' own (started_at, ended_at); Redis and the faults use one machine's clock.
"""

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from redis.exceptions import RedisError

from ralf.worker.chaos.proof import SeenEnd, pid_of
from ralf.worker.contract import ENDED
from ralf.worker.service.processes import Process, Supervisor
from ralf.worker.service.store import PRIORITIES, Store, decoded

Fault = Literal["child", "parent", "pause", "drain", "deliverer", "janitor", "redis"]
WEIGHTS: Mapping[Fault, float] = {
    "child": 0.30,
    "parent": 0.22,
    "pause": 0.08,
    "drain": 0.14,
    "deliverer": 0.09,
    "janitor": 0.05,
    "redis": 0.12,
}
READ_EVERY_S = 0.25
LONG_OUTAGES = 0.25
"""This share of Redis' outages lasts longer than every lease."""
SKIP_IDLE = 0.99
"""How likely a fault waits for the next step when it would interrupt no work."""


@dataclass
class AffectedJob:
    """A job whose process was killed or paused."""

    fault: Fault
    job_id: str
    attempt: int
    at: float
    found_s: float | None = None
    recovered_s: float | None = None


@dataclass(frozen=True)
class Rates:
    """How often faults come, and how long what was killed stays away."""

    gap_s: float
    """Between two faults, on average."""
    redis_down_s: float
    """Redis stays away for up to this long; sometimes for a lease longer."""
    process_down_s: float
    """A killed process stays away for up to this long, as if its supervisor waited."""


class FaultInjector:
    """Injects one fault at a time; step() is called often and does nothing most of the time."""

    def __init__(
        self,
        supervisor: Supervisor,
        store: Store,
        rates: Rates,
        *,
        seed: int,
        pushing: Callable[[], bool] = lambda: False,
    ) -> None:
        self._supervisor, self._store, self._rates = supervisor, store, rates
        self._pushing = pushing
        self._random = random.Random(seed)
        self._next = time.monotonic() + rates.gap_s
        self._round: list[Fault] = list(WEIGHTS)
        self._random.shuffle(self._round)
        self._wanted: Fault | None = None
        self._paused: tuple[float, Process] | None = None
        self._second: tuple[float, Process] | None = None
        self.injected: Counter[str] = Counter()
        self.hit: set[int] = set()
        """Process ids of the workers that we killed, paused, or whose child we killed."""
        self.affected: list[AffectedJob] = []

    @property
    def all_injected(self) -> bool:
        """Whether every kind of fault was injected at least once."""
        return not self._round and self._wanted is None

    def step(self) -> None:
        """Inject a fault, if it is time and there is a process for it."""
        self.finish_started()
        if time.monotonic() < self._next:
            return
        # A fault that finds no process stays wanted, so that each kind comes in its turn.
        fault = self._wanted = self._wanted or self._chosen()
        if self._inject(fault):
            self.injected[fault] += 1
            self._wanted = None
            self._next = time.monotonic() + self._random.expovariate(1 / self._rates.gap_s)

    def finish_started(self) -> None:
        """Do what is due of earlier faults: end the pause, send the second SIGTERM."""
        now = time.monotonic()
        if self._paused is not None and now >= self._paused[0]:
            self._supervisor.signal(self._paused[1], signal.SIGCONT)
            self._paused = None
        if self._second is not None and now >= self._second[0]:
            self._supervisor.signal(self._second[1], signal.SIGTERM)
            self._second = None

    def end(self) -> None:
        """No more faults will come: end a pause that is still under way."""
        if self._paused is not None:
            self._supervisor.signal(self._paused[1], signal.SIGCONT)
            self._paused = None

    def _chosen(self) -> Fault:
        if self._round:
            return self._round.pop()
        return self._random.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]

    def _inject(self, fault: Fault) -> bool:
        supervisor, away = self._supervisor, self._random.uniform(0.0, self._rates.process_down_s)
        match fault:
            case "redis":
                down = self._random.uniform(0.0, self._rates.redis_down_s)
                if self._random.random() < LONG_OUTAGES:
                    down += supervisor.settings.heartbeat_ttl_s
                return supervisor.signal(supervisor.of("redis")[0], signal.SIGKILL, away_s=down)
            case "deliverer" | "janitor":
                idle = fault == "deliverer" and not self._pushing()
                if idle and self._random.random() < SKIP_IDLE:
                    return False
                worker = self._random.choice(supervisor.of(fault))
                return supervisor.signal(worker, signal.SIGKILL, away_s=away)
            case "drain":
                return self._drain(away)
            case _:
                return self._hit_worker(fault, away)

    def _drain(self, away: float) -> bool:
        workers = self._up()
        if not workers:
            return False
        worker = self._random.choice(workers)
        if self._random.random() < 0.4:
            self._second = (time.monotonic() + 1.2, worker)
        return self._supervisor.signal(worker, signal.SIGTERM, away_s=away)

    def _hit_worker(self, fault: Fault, away: float) -> bool:
        """A worker in the middle of a job, if there is one."""
        # Read before the fault: right after it the jobs may have moved already.
        held, workers = self._held(), self._up()
        by_pid = {worker.pid: worker for worker in workers}
        busy = [worker for worker in workers if worker.pid in held]
        if not workers or (not busy and self._random.random() < SKIP_IDLE):
            return False
        worker = self._random.choice(busy or workers)
        at, sharing = time.time(), [worker]
        if fault == "child":
            sharing = [other for other in self._supervisor.of("worker") if _share(worker, other)]
            # Each worker that shares the child reports its death as a crash.
            self.hit.update(other.pid for other in sharing)
            if not self._kill(self._supervisor.child_of(worker)):
                return False
        elif fault == "parent":
            self.hit.add(worker.pid)
            self._supervisor.signal(worker, signal.SIGKILL, away_s=away)
        elif self._paused is None:
            self.hit.add(worker.pid)
            self._supervisor.signal(worker, signal.SIGSTOP)
            lease = self._supervisor.settings.heartbeat_ttl_s
            # From below to above a lease: some paused workers keep their job, others lose it.
            self._paused = (time.monotonic() + self._random.uniform(0.8, 1.6) * lease, worker)
        else:
            return False
        pids = {pid for pid, known in by_pid.items() if known in sharing}
        for pid in pids & held.keys():
            job_id, attempt = held[pid]
            self.affected.append(AffectedJob(fault, job_id, attempt, at))
        return True

    def _kill(self, pid: int) -> bool:
        if not pid:
            return False
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True

    def _up(self) -> list[Process]:
        """Workers that are registered, running and not told to stop."""
        known = set()
        for priority in PRIORITIES:
            members = self._store.redis.smembers(f"rq:workers:{self._store.queue(priority)}")
            known |= {pid_of(decoded(member)) for member in members}
        paused = self._paused[1] if self._paused else None
        return [
            worker
            for worker in self._supervisor.of("worker")
            if worker.pid in known and not worker.stopping and worker is not paused
        ]

    def _held(self) -> dict[int, tuple[str, int]]:
        """The running jobs by their worker's pid: id and attempt."""
        held = {}
        for priority in PRIORITIES:
            for member in self._store.redis.zrange(self._store.key("running", priority), 0, -1):
                job_id = decoded(member)
                key = self._store.key("job", job_id)
                worker, attempt = self._store.redis.hmget(key, "worker", "attempts")
                if worker:
                    held[pid_of(decoded(worker))] = (job_id, int(attempt))
        return held


def _share(worker: Process, other: Process) -> bool:
    """Whether both have the same child."""
    return other is worker or (worker.shared is not None and other.shared == worker.shared)


class JobWatcher:
    """Reads every job a few times a second: when affected jobs recover, which ends were seen."""

    def __init__(self, store: Store, faults: FaultInjector) -> None:
        self._store, self._faults = store, faults
        self._read_at = 0.0
        self.ends: dict[str, SeenEnd] = {}
        self.redis_down_s: list[float] = []
        self._down_since: float | None = None

    def read(self, job_ids: Sequence[str]) -> None:
        """Read what has not ended yet; an outage of Redis is timed."""
        now = time.monotonic()
        if now - self._read_at < READ_EVERY_S:
            return
        self._read_at = now
        open_ids = [job_id for job_id in job_ids if job_id not in self.ends]
        open_ids += [w.job_id for w in self._faults.affected if w.recovered_s is None]
        open_ids = list(dict.fromkeys(open_ids))
        with self._store.redis.pipeline(transaction=False) as pipe:
            # So that an outage is seen also when no job is left to read.
            pipe.ping()
            for job_id in open_ids:
                key = self._store.key("job", job_id)
                pipe.hmget(key, "state", "attempts", "started_at", "ended_at")
            try:
                _, *rows = pipe.execute()
            except RedisError:
                self._down_since = self._down_since or now
                return
        if self._down_since is not None:
            self.redis_down_s.append(now - self._down_since)
            self._down_since = None
        for job_id, row in zip(open_ids, rows, strict=True):
            if row[0] is not None:
                self._note(job_id, decoded(row[0]), row)

    def _note(self, job_id: str, state: Any, row: Sequence[bytes | None]) -> None:
        attempts = int(row[1] or 0)
        started, ended = (float(value) if value else None for value in row[2:4])
        if state in ENDED and job_id not in self.ends:
            self.ends[job_id] = SeenEnd(job_id, state, ended)
        for affected in list(self._faults.affected):
            if affected.job_id != job_id or affected.recovered_s is not None:
                continue
            if attempts > affected.attempt and started is not None:
                affected.recovered_s = max(0.0, started - affected.at)
            elif state in ENDED and ended is not None:
                affected.recovered_s = max(0.0, ended - affected.at)
                if state == "succeeded":  # its verdict was stored before the fault
                    self._faults.affected.remove(affected)
            recovered = affected.recovered_s
            if affected.found_s is None and (state == "queued" or recovered is not None):
                affected.found_s = min(time.time() - affected.at, recovered or float("inf"))
