"""Find what dead processes left behind, and put it back.

A process can die between any two steps.  Every sweep repairs what that can leave:

    a lease that ran out                  worker_lost: retried, or quarantined at the second
    popped from RQ's list, never begun    back into its tenant's turn after reclaim_after_s
    put off, and due now                  into its tenant's turn
    queued, but in no place               into its tenant's turn
    queued past its deadline              expired
    RQ's entries of dead workers          removed
    a session with unfolded segments      folded

Each repair is a script that checks again before it moves anything, so any number of janitors may
run: one in every worker process, and `ralf janitor` alone.  Within settings.janitor_every_s only
one of them sweeps, to save work; safety does not depend on that.  With a lease of 20 s and a sweep
every 3 s a job of a killed worker is found within 23 s, a popped one within 21 s, and runs before
all that wait.

After an outage of Redis every lease has run out although every worker is well.  So when nobody
swept for half a lease, the running jobs get half a lease more before they count as lost.
"""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import structlog
from redis.exceptions import RedisError

from ralf.worker.contract import Priority
from ralf.worker.service.records import Outcome
from ralf.worker.service.store import PRIORITIES, Store, decoded
from ralf.worker.settings import Settings
from ralf.worker.telemetry import METRICS, Metrics

FOLD_AFTER_S = 2.0
"""A job's end folds its session at once; the janitor takes what is still unfolded after this."""
CODE_OF: Mapping[str, str] = {"cancelled": "cancelled", "expired": "deadline_passed"}
"""The code of a lost job that ended for another reason than its loss."""
log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class SweepReport:
    """What one sweep moved."""

    lost: dict[str, Outcome]
    reclaimed: tuple[str, ...]
    due: tuple[str, ...]
    rescued: tuple[str, ...]
    expired: tuple[str, ...]
    workers_forgotten: int
    sessions_folded: int

    def __bool__(self) -> bool:
        """Whether anything was found."""
        return any(vars(self).values())


class Janitor:
    """Sweeps; safe to run anywhere, any number of times."""

    def __init__(self, store: Store, settings: Settings, *, metrics: Metrics = METRICS) -> None:
        self.store = store
        self.settings = settings
        self.metrics = metrics

    def run_once(self, now: float | None = None) -> SweepReport:
        """One sweep, whether or not another janitor sweeps too."""
        report = self._sweep(now)
        self._count(report)
        return report

    def _sweep(self, now: float | None) -> SweepReport:
        return SweepReport(
            lost=self._recover_lost(now),
            reclaimed=tuple(job for p in PRIORITIES for job in self._ids("reclaim", now, p)),
            due=self._ids("due", now),
            expired=self._ids("expire", now),
            rescued=self._rescue(now),
            workers_forgotten=sum(int(self.store.call("workers", now, p)) for p in PRIORITIES),
            sessions_folded=self._fold_sessions(now),
        )

    def run_if_due(self, now: float | None = None) -> SweepReport | None:
        """One sweep, unless another janitor swept within settings.janitor_every_s."""
        # Less than the period: a janitor that wakes a moment early would lose its turn.
        if not self.store.call("awake", now, 0.9 * self.settings.janitor_every_s):
            return None
        return self.run_once(now)

    def run_forever(
        self, stop: threading.Event, *, beat: Callable[[], None] = lambda: None
    ) -> None:
        """Sweep until told to stop; an outage of Redis is waited out.

        A fault of ours is logged and the next sweep tried: in a worker this is a thread, and nobody
        would see its end.
        """
        while not stop.wait(self.settings.janitor_every_s):
            beat()
            try:
                report = self.run_if_due()
            except RedisError as fault:
                log.warning("redis.unreachable", error=str(fault))
            except Exception:  # see the docstring
                log.exception("janitor.broke")
            else:
                if report:
                    log.info("janitor.swept", **vars(report))

    def _count(self, report: SweepReport) -> None:
        """Count the jobs that this sweep ended or put back: no worker does it."""
        for job_id, outcome in report.lost.items():
            if outcome == "stuck":
                log.error("job.stuck", job_id=job_id)
            shown = "crashed" if outcome == "retried" else outcome  # as a worker counts its own
            self.metrics.jobs.labels(shown, CODE_OF.get(outcome, "worker_lost")).inc()
        if report.expired:
            self.metrics.jobs.labels("expired", "deadline_passed").inc(len(report.expired))

    def _recover_lost(self, now: float | None) -> dict[str, Outcome]:
        flat = self._ids("lost", now)
        return cast(dict[str, Outcome], dict(zip(flat[::2], flat[1::2], strict=True)))

    def _rescue(self, now: float | None) -> tuple[str, ...]:
        """Search for queued jobs that are in no place, when the counts say that there are some."""
        if int(self.store.call("audit", now)) == 0:
            return ()
        # The two sets are not read at one moment, so a job that just moved may seem lost: the
        # script checks again.
        return tuple(
            job_id
            for priority in PRIORITIES
            for job_id in sorted(self._waiting(priority) - self._placed(priority))
            if self.store.call("rescue", now, job_id, priority) == b"rescued"
        )

    def _waiting(self, priority: Priority) -> set[str]:
        waiting = self.store.redis.zrange(self.store.key("waiting", priority), 0, -1)
        return {decoded(member) for member in waiting}

    def _placed(self, priority: Priority) -> set[str]:
        queue = f"rq:queue:{self.store.queue(priority)}"
        tenants = self.store.redis.lrange(self.store.key("turn", priority), 0, -1)
        # One transaction: a job that moves between two reads would seem to be in no place.
        with self.store.redis.pipeline() as pipe:
            pipe.zrange(self.store.key("due"), 0, -1)
            pipe.lrange(queue, 0, -1)
            pipe.lrange(f"{queue}:intermediate", 0, -1)
            for tenant in tenants:
                pipe.lrange(self.store.key("pending", priority, decoded(tenant)), 0, -1)
            return {decoded(member) for members in pipe.execute() for member in members}

    def _fold_sessions(self, now: float | None) -> int:
        before = (self.store.now() if now is None else now) - FOLD_AFTER_S
        changed = self.store.redis.zrangebyscore(
            self.store.key("sessions", "changed"), "-inf", before
        )
        folded = 0
        for name in changed:
            tenant, _, session_id = decoded(name).partition(":")
            try:
                folded += self.store.fold_session(tenant, session_id, now=now) is not None
            except ValueError as fault:  # one that cannot be read must not stop the sweep
                log.error("session.unreadable", tenant=tenant, session=session_id, error=str(fault))
        return folded

    def _ids(self, operation: str, now: float | None, *arguments: str) -> tuple[str, ...]:
        return tuple(decoded(part) for part in self.store.call(operation, now, *arguments))
