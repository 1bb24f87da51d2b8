"""`ralf chaos`: kill parts of a real service under load, then prove that nothing was lost.

It starts all of it by itself: a Redis with an append-only file, two or more workers with test
bodies, a janitor, a deliverer, and a webhook receiver on loopback.  An uploader submits jobs
(uploader.py), faults are injected (faults.py), and when every job has ended the service is stopped
and the proof is made (proof.py).  The figures are one JSON document on stdout; it exits with 1 when
something is wrong, and says what.

Timings are shortened so that a run takes minutes (SHORT); `--default-timings` runs with those of
production, which takes longer.  Which process is hit follows the seed, but not to the microsecond:
the same seed gives the same mix of jobs and faults, not the same run.

Nothing of the environment is used but the path; all is bounded by --minutes and cleaned at the end,
on Ctrl-C and SIGTERM too.
"""

import argparse
import base64
import json
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from redis.exceptions import RedisError

from ralf.worker.chaos.faults import AffectedJob, FaultInjector, JobWatcher, Rates
from ralf.worker.chaos.proof import doubled, ended_jobs, prove
from ralf.worker.chaos.receiver import Receiver
from ralf.worker.chaos.uploader import Uploader, priorities
from ralf.worker.client import Client
from ralf.worker.contract import Priority
from ralf.worker.service.connection import connect
from ralf.worker.service.embedded import redis_alone
from ralf.worker.service.processes import Supervisor
from ralf.worker.service.store import PRIORITIES, Store
from ralf.worker.settings import Settings

SHORT: dict[str, Any] = {
    "heartbeat_s": 0.5,
    "heartbeat_ttl_s": 5.0,
    "janitor_every_s": 0.5,
    "reclaim_after_s": 2.0,
    "hang_s": 3.0,
    "retry_delays_s": (0.2, 0.6),
    "grace_s": 3.0,
    "child_max_jobs": 20,
    "shared_child_max_jobs": 20,
    "webhook_timeout_s": 1.0,
    "webhook_delays_s": (0.3, *(1.0,) * 20),
}
"""Settings of a run that takes minutes."""
BRIEF = Rates(gap_s=1.2, redis_down_s=2.0, process_down_s=0.5)
LONG = Rates(gap_s=10.0, redis_down_s=15.0, process_down_s=5.0)
STRETCH = 10.0
"""With the timings of production the jobs are longer too, or no fault would hit one."""
ENDED_SHARE = 0.75
"""When this share of the jobs has ended, and all were sent, no more faults come."""
TURN_S = 0.05
TELL_S = 5.0
NO_REDIS = 5
"""Exit status of a process that could not reach Redis when it started."""


@dataclass(frozen=True)
class Plan:
    """One run."""

    jobs: int
    workers: int
    seed: int
    minutes: float
    default_timings: bool = False
    share: bool = False

    @property
    def rates(self) -> Rates:
        """With few jobs faults come sooner: all kinds should come while there is work."""
        if self.default_timings:
            return LONG
        return replace(BRIEF, gap_s=min(BRIEF.gap_s, max(0.5, 0.02 * self.jobs)))

    @property
    def upload_s(self) -> float:
        """The jobs come in over so long."""
        return self.jobs * (2.0 if self.default_timings else 0.2)


def run(args: argparse.Namespace) -> int:
    """Run it, print the figures, say what is wrong."""
    minutes = args.minutes or (60.0 if args.default_timings else 10.0)
    plan = Plan(
        args.jobs, max(2, args.workers), args.seed, minutes, args.default_timings, args.share
    )
    print(f"ralf: chaos with seed {plan.seed}", file=sys.stderr, flush=True)
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        figures = chaos(plan)
    finally:
        signal.signal(signal.SIGTERM, before)
    print(json.dumps(figures, indent=2), flush=True)
    for sentence in figures["wrong"]:
        print(f"ralf: chaos: {sentence}", file=sys.stderr)
    return 1 if figures["wrong"] else 0


# SIGTERM as Ctrl-C: an exception runs the clean-up, the default action does not.
def _interrupt(_: int, __: object) -> None:
    raise KeyboardInterrupt


def chaos(plan: Plan) -> dict[str, Any]:
    """One run from an empty Redis to the proof."""
    secret = "whsec_" + base64.b64encode(b"chaos is no secret, but it signs").decode()
    timing = {} if plan.default_timings else SHORT
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ralf-chaos-")))
        base = replace(Settings(), **timing)
        receiver = Receiver(
            secret,
            # A second refusal would wait for production's second delay, which is five minutes.
            refusals=1 if plan.default_timings else 2,
            stall_s=base.webhook_timeout_s + 0.5,
            seed=plan.seed,
        )
        stack.enter_context(receiver.listening())
        settings = replace(
            base,
            redis_url=f"unix://{folder / 'redis.sock'}",
            redis_prefix="chaos:",
            work_dir=str(folder / "work"),
            allow_private_addresses=True,
            fetch_ports=receiver.ports,
            webhook_secrets=(f"*/default={secret}",),
            log_format="json",
        )
        (folder / "work").mkdir()
        client = Client(connect(settings.redis_url, attempts=3), settings)
        stack.callback(client.close)
        uploader = Uploader(
            client,
            receiver,
            count=plan.jobs,
            seconds=plan.upload_s,
            stretch=STRETCH if plan.default_timings else 1.0,
            seed=plan.seed,
        )
        supervisor = stack.enter_context(
            _service(settings, folder, workers=priorities(plan.workers), share=plan.share)
        )
        # Registered last and so called first: it must not wait for a Redis that was stopped.
        stack.callback(uploader.stop)
        return Run(plan, supervisor, uploader, receiver).run(stack)


@contextmanager
def _service(
    settings: Settings, folder: Path, *, workers: Mapping[Priority, int], share: bool
) -> Iterator[Supervisor]:
    """A durable Redis, workers with test bodies, a janitor and a deliverer; stopped in any case.

    share: the default workers have one child, which runs two jobs at a time.
    """
    with redis_alone(settings, folder, durable=True) as supervisor:
        for priority, count in workers.items():
            arguments = ["--bodies", "test", "--priority", priority]
            shared = folder / "shared" if share and priority == "default" else None
            if shared is not None:
                arguments += ["--capacity", "2"]
            for _ in range(count):
                supervisor.add("worker", *arguments, shared=shared)
        supervisor.add("janitor")
        supervisor.add("deliverer")
        supervisor.tend()
        yield supervisor


class Run:
    """The loop of one run, and its figures."""

    def __init__(
        self, plan: Plan, supervisor: Supervisor, uploader: Uploader, receiver: Receiver
    ) -> None:
        self.plan, self.supervisor = plan, supervisor
        self.uploader, self.receiver = uploader, receiver
        # No retries: the loop must not stand still while Redis is away.
        self.store = Store(connect(supervisor.settings.redis_url, attempts=0), supervisor.settings)
        self.faults = FaultInjector(
            supervisor, self.store, plan.rates, seed=plan.seed, pushing=lambda: receiver.busy
        )
        self.watch = JobWatcher(self.store, self.faults)
        self.began = time.monotonic()
        self.wrong: list[str] = []
        self.waits_for = ""
        self._told = self.began

    def run(self, stack: ExitStack) -> dict[str, Any]:
        """Inject faults, let the rest end, stop, prove, count."""
        stack.callback(self.store.redis.close)
        self.uploader.start()
        self._run_until(self._injected_all, injecting=True)
        # A worker that is still paused could neither end its job nor stop.
        self.faults.end()
        self._run_until(self._settled, injecting=False)
        took = time.monotonic() - self.began
        self.uploader.stop()
        self.supervisor.stop("worker", "janitor", "deliverer")
        # The last fault may have killed it, and the proof reads all of it.
        self.supervisor.wait_for_redis()
        self._check_processes()
        asked = self.uploader.asked()
        seen_ends = [*self.uploader.seen_ends, *self.watch.ends.values()]
        self.wrong += prove(
            self.store, asked, self.receiver.receipts, seen=seen_ends, hit=self.faults.hit
        )
        self.wrong += self.uploader.wrong
        return self._figures(took)

    def _run_until(self, over: Any, *, injecting: bool) -> None:
        end = self.began + 60.0 * self.plan.minutes
        while True:
            self.supervisor.tend()
            ids = [one.answers[0] for one in self.uploader.asked()]
            try:
                if injecting:
                    self.faults.step()
                else:
                    self.faults.finish_started()
                self.watch.read(ids)
                if over():
                    return
            except RedisError:
                # Redis is away on purpose: read again in the next turn.
                pass
            self._tell(injecting)
            if time.monotonic() > end:
                if not injecting:
                    self.wrong.append(f"not settled within {self.plan.minutes:g} minutes")
                return
            time.sleep(TURN_S)

    def _tell(self, injecting: bool) -> None:
        """Print where the run stands."""
        if time.monotonic() - self._told < TELL_S:
            return
        self._told = time.monotonic()
        phase = "injecting faults" if injecting else "waiting for the rest"
        print(
            f"ralf: chaos: {self._told - self.began:.0f} s, {phase}: "
            f"{len(self.watch.ends)} of {self.plan.jobs} ended, {self.waits_for}; "
            + ", ".join(
                f"{count} {fault}" for fault, count in sorted(self.faults.injected.items())
            ),
            file=sys.stderr,
            flush=True,
        )

    def _injected_all(self) -> bool:
        ended = len(self.watch.ends) >= ENDED_SHARE * self.plan.jobs
        return self.uploader.done and ended and self.faults.all_injected

    def _settled(self) -> bool:
        """Whether all jobs have ended and been pushed, and Redis lists only workers that run."""
        self.waits_for = self._unsettled()
        return not self.waits_for

    def _unsettled(self) -> str:
        """What is still to come, in words."""
        counts, redis = self.store.counts(), self.store.redis
        unended = len(self.uploader.asked()) - len(self.watch.ends)
        if unended or not self.uploader.done:
            return f"{unended} jobs to end"
        if counts.outbox:
            return f"{counts.outbox} pushes to send"
        here = sum(1 for process in self.supervisor.of("worker") if process.pid)
        known = sum(counts.workers.values())
        if not known == here == len(self.supervisor.of("worker")):
            return f"{here} workers run, {known} are registered"
        books = [f"rq:wip:{self.store.queue(p)}" for p in PRIORITIES]
        books += [f"rq:queue:{self.store.queue(p)}:intermediate" for p in PRIORITIES]
        return ", ".join(f"{book} to be empty" for book in books if redis.exists(book))

    def _check_processes(self) -> None:
        """Unexpected ends, processes that did not stop, tracebacks, folders that were left."""
        for process in self.supervisor.processes:
            if process.role == "redis":
                continue
            status = process.exit_code
            # SIGKILL came from a fault; one that had to be killed at the stop is in `killed`.
            if status not in (0, NO_REDIS, -signal.SIGKILL):
                self.wrong.append(f"{process.name} left with status {status} when told to stop")
        for name in self.supervisor.killed:
            self.wrong.append(f"{name} did not stop within its grace")
        for end in self.supervisor.unexpected:
            if end.status != NO_REDIS:
                self.wrong.append(f"{end.name} ended by itself with {end.status}: {end.log}")
        for log in sorted(self.supervisor.folder.glob("*.log")):
            text = log.read_text(errors="replace")
            for found in re.finditer(r"Traceback \(most recent call last\)", text):
                shown = text[found.start() : found.start() + 1500]
                self.wrong.append(f"{log.stem} logged a traceback: {shown}")
        left = sorted(path.name for path in (self.supervisor.folder / "work").iterdir())
        if left:
            self.wrong.append(f"folders of dead workers are left: {left}")

    def _figures(self, took: float) -> dict[str, Any]:
        jobs = ended_jobs(self.store, self.uploader.asked()).values()
        attempts = sum(job.status.attempts for job in jobs)
        ran = sum(1 for job in jobs if job.status.attempts)
        receipts = self.receiver.receipts
        ends = Counter(job.status.state for job in jobs)
        return {
            "seed": self.plan.seed,
            "timings": "default" if self.plan.default_timings else "short",
            "settings": {} if self.plan.default_timings else SHORT,
            # The names of the figures stay, so that the records can be compared.
            "tempo": asdict(self.plan.rates),
            "appendfsync": "always",
            "workers": self.plan.workers,
            "shared_child": self.plan.share,
            "jobs": dict(Counter(job.asked.kind for job in jobs)),
            "ends": dict(ends),
            "blows": dict(self.faults.injected),
            "starts": {process.name: process.starts for process in self.supervisor.processes},
            "found_s": _by_fault(self.faults.affected, "found_s"),
            "recovery_s": _by_fault(self.faults.affected, "recovered_s"),
            "redis_down_s": _spread(self.watch.redis_down_s),
            "attempts": attempts,
            "retries": attempts - ran,
            "quarantined": ends["quarantined"],
            "crashes_counted": sum(len(job.crashes) for job in jobs),
            "uploads": dict(self.uploader.facts),
            "pushes": {
                "received": len(receipts),
                **Counter(receipt.answer for receipt in receipts),
                "ids": len({receipt.id for receipt in receipts}),
                "doubled": doubled(receipts),
            },
            "seconds": round(took, 1),
            "wrong": self.wrong,
        }


def _by_fault(affected: Sequence[AffectedJob], name: str) -> dict[str, Any]:
    kinds = {"all": affected}
    for fault in sorted({job.fault for job in affected}):
        kinds[fault] = [job for job in affected if job.fault == fault]
    return {
        kind: _spread([s for w in some if (s := getattr(w, name)) is not None])
        for kind, some in kinds.items()
    }


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    """How many, the median, the 99th hundredth, the most."""
    if not seconds:
        return {"n": 0}
    ordered = sorted(seconds)

    def at(share: float) -> float:
        return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 3)

    return {"n": len(ordered), "p50": at(0.5), "p99": at(0.99), "most": round(ordered[-1], 3)}
