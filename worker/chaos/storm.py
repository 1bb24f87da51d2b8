"""Who is hurt next, how, and how long each hurt job took to get well.

    child      kill -9 of a worker's child, mostly in the middle of a job
    parent     kill -9 of a worker; its child dies with it
    pause      a worker stands still until its lease is over, and wakes with a job that is not its
    drain      SIGTERM, sometimes a second one soon after
    deliverer  kill -9, mostly while a push waits for its answer
    janitor    kill -9 of the one that stands alone; each worker has one too
    redis      kill -9; it comes back with its append-only file

Every kind comes once before the first comes twice.  A wound is a job whose process was killed; it
is found when it waits for a worker again and has recovered when it runs again or has ended.  Times
are Redis' own (started_at, ended_at), on the same machine's clock as the blows.
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

from ralf.worker.chaos.proof import Sighting, pid_of
from ralf.worker.contract import ENDED
from ralf.worker.service.processes import Process, Supervisor
from ralf.worker.service.store import PRIORITIES, Store, decoded

Blow = Literal["child", "parent", "pause", "drain", "deliverer", "janitor", "redis"]
WEIGHTS: Mapping[Blow, float] = {
    "child": 0.30,
    "parent": 0.22,
    "pause": 0.08,
    "drain": 0.14,
    "deliverer": 0.09,
    "janitor": 0.05,
    "redis": 0.12,
}
LOOK_S = 0.25
LONG_OUTAGES = 0.25
"""So many outages of Redis outlast every lease."""
PATIENCE = 0.99
"""How likely a blow waits for the next turn when it would hit nothing."""


@dataclass
class Wound:
    """A job whose process was taken away."""

    blow: Blow
    job_id: str
    attempt: int
    at: float
    found_s: float | None = None
    recovered_s: float | None = None


@dataclass(frozen=True)
class Tempo:
    """How hard it storms."""

    gap_s: float
    """Between two blows, on average."""
    redis_down_s: float
    """Redis stays away for up to so long, now and then for a lease more."""
    process_down_s: float
    """A killed process stays away for up to so long, as a supervisor's pause."""


class Storm:
    """Hurts one process at a time; turn() is called often and does nothing most of the time."""

    def __init__(
        self,
        supervisor: Supervisor,
        store: Store,
        tempo: Tempo,
        *,
        seed: int,
        pushing: Callable[[], bool] = lambda: False,
    ) -> None:
        self._supervisor, self._store, self._tempo = supervisor, store, tempo
        self._pushing = pushing
        self._random = random.Random(seed)
        self._next = time.monotonic() + tempo.gap_s
        self._round: list[Blow] = list(WEIGHTS)
        self._random.shuffle(self._round)
        self._wanted: Blow | None = None
        self._paused: tuple[float, Process] | None = None
        self._second: tuple[float, Process] | None = None
        self.blows: Counter[str] = Counter()
        self.struck: set[int] = set()
        """Workers whose death, or whose child's, was ours."""
        self.wounds: list[Wound] = []

    @property
    def all_blown(self) -> bool:
        """Whether every kind came at least once."""
        return not self._round and self._wanted is None

    def turn(self) -> None:
        """Strike, if it is time and there is somebody to strike."""
        self.relent()
        if time.monotonic() < self._next:
            return
        blow = self._wanted = self._wanted or self._chosen()
        if self._strike(blow):
            self.blows[blow] += 1
            self._wanted = None
            self._next = time.monotonic() + self._random.expovariate(1 / self._tempo.gap_s)

    def relent(self) -> None:
        """What is due of earlier blows: wake the paused one, press the draining one."""
        now = time.monotonic()
        if self._paused is not None and now >= self._paused[0]:
            self._supervisor.signal(self._paused[1], signal.SIGCONT)
            self._paused = None
        if self._second is not None and now >= self._second[0]:
            self._supervisor.signal(self._second[1], signal.SIGTERM)
            self._second = None

    def calm(self) -> None:
        """The last blow has fallen; nobody stays paused."""
        if self._paused is not None:
            self._supervisor.signal(self._paused[1], signal.SIGCONT)
            self._paused = None

    def _chosen(self) -> Blow:
        if self._round:
            return self._round.pop()
        return self._random.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]

    def _strike(self, blow: Blow) -> bool:
        supervisor, away = self._supervisor, self._random.uniform(0.0, self._tempo.process_down_s)
        match blow:
            case "redis":
                down = self._random.uniform(0.0, self._tempo.redis_down_s)
                if self._random.random() < LONG_OUTAGES:
                    down += supervisor.settings.heartbeat_ttl_s
                return supervisor.signal(supervisor.of("redis")[0], signal.SIGKILL, away_s=down)
            case "deliverer" | "janitor":
                if blow == "deliverer" and not self._pushing() and self._random.random() < PATIENCE:
                    return False
                worker = self._random.choice(supervisor.of(blow))
                return supervisor.signal(worker, signal.SIGKILL, away_s=away)
            case "drain":
                return self._drain(away)
            case _:
                return self._hurt_worker(blow, away)

    def _drain(self, away: float) -> bool:
        workers = self._up()
        if not workers:
            return False
        worker = self._random.choice(workers)
        if self._random.random() < 0.4:
            self._second = (time.monotonic() + 1.2, worker)
        return self._supervisor.signal(worker, signal.SIGTERM, away_s=away)

    def _hurt_worker(self, blow: Blow, away: float) -> bool:
        """A worker in the middle of a job, if there is one."""
        held, workers = self._held(), self._up()
        by_pid = {worker.pid: worker for worker in workers}
        busy = [worker for worker in workers if worker.pid in held]
        if not workers or (not busy and self._random.random() < PATIENCE):
            return False
        worker = self._random.choice(busy or workers)
        at, hurt = time.time(), [worker]
        if blow == "child":
            hurt = [other for other in self._supervisor.of("worker") if _share(worker, other)]
            self.struck.update(other.pid for other in hurt)
            if not self._kill(self._supervisor.child_of(worker)):
                return False
        elif blow == "parent":
            self.struck.add(worker.pid)
            self._supervisor.signal(worker, signal.SIGKILL, away_s=away)
        elif self._paused is None:
            self.struck.add(worker.pid)
            self._supervisor.signal(worker, signal.SIGSTOP)
            lease = self._supervisor.settings.heartbeat_ttl_s
            self._paused = (time.monotonic() + self._random.uniform(0.8, 1.6) * lease, worker)
        else:
            return False
        pids = {pid for pid, known in by_pid.items() if known in hurt}
        for pid in pids & held.keys():
            job_id, attempt = held[pid]
            self.wounds.append(Wound(blow, job_id, attempt, at))
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
    """Whether one loses its child with the other's."""
    return other is worker or (worker.shared is not None and other.shared == worker.shared)


class Watch:
    """Looks at every job a few times a second: wounds that heal, ends that were seen."""

    def __init__(self, store: Store, storm: Storm) -> None:
        self._store, self._storm = store, storm
        self._looked = 0.0
        self.ends: dict[str, Sighting] = {}
        self.redis_down_s: list[float] = []
        self._down_since: float | None = None

    def look(self, job_ids: Sequence[str]) -> None:
        """Read what has not ended yet; an outage of Redis is timed."""
        now = time.monotonic()
        if now - self._looked < LOOK_S:
            return
        self._looked = now
        open_ids = [job_id for job_id in job_ids if job_id not in self.ends]
        open_ids += [w.job_id for w in self._storm.wounds if w.recovered_s is None]
        open_ids = list(dict.fromkeys(open_ids))
        with self._store.redis.pipeline(transaction=False) as pipe:
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
            self.ends[job_id] = Sighting(job_id, state, ended)
        for wound in list(self._storm.wounds):
            if wound.job_id != job_id or wound.recovered_s is not None:
                continue
            if attempts > wound.attempt and started is not None:
                wound.recovered_s = max(0.0, started - wound.at)
            elif state in ENDED and ended is not None:
                wound.recovered_s = max(0.0, ended - wound.at)
                if state == "succeeded":  # it had its verdict out before the blow
                    self._storm.wounds.remove(wound)
            if wound.found_s is None and (state == "queued" or wound.recovered_s is not None):
                wound.found_s = min(time.time() - wound.at, wound.recovered_s or float("inf"))
