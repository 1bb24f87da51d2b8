"""What the service's processes do; each function is one process.

    run_worker      one RQ worker, its child, its janitor, its /metrics
    run_janitor     a janitor alone
    run_deliverer   the pushes in the outbox

Each of them sets up logging and signals for its process, runs until it is told to stop, and returns
the exit status.  The commands `ralf worker`, `ralf janitor` and `ralf deliver` call them;
processes.py starts those commands.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

import structlog

from ralf.worker import telemetry
from ralf.worker.contract import Priority
from ralf.worker.service import jobs, sandbox
from ralf.worker.service.child_process import ChildProcess
from ralf.worker.service.connection import connect
from ralf.worker.service.deliver import Deliverer
from ralf.worker.service.health import Health, queue_counts, serving
from ralf.worker.service.janitor import Janitor
from ralf.worker.service.models import Rollout
from ralf.worker.service.processes import BROKEN
from ralf.worker.service.rq_worker import RalfWorker
from ralf.worker.service.store import Store
from ralf.worker.service.wakeup import Wakeup
from ralf.worker.settings import Settings, SettingsError

log = structlog.get_logger()

LOOP_TIMEOUT_S = 6.0
"""No command of the worker's loop takes longer, half of it for an answer."""
JANITOR_END_S = 1.0
"""It may be waiting for a Redis that is silent; what it began another janitor repeats."""


def run_worker(
    settings: Settings,
    priority: Priority = "default",
    *,
    bodies: jobs.Bodies = "moderate",
    shared: Path | None = None,
    capacity: int = 1,
    burst: bool = False,
    max_jobs: int | None = None,
) -> int:
    """Take jobs until told to stop. Raises ModelUnavailable when the first load fails.

    shared names a folder: all workers with the same one use one child, up to `capacity` jobs at a
    time; without it the worker has a child of its own.
    """
    # First: a child of the same user could read Redis' password in /proc/PID/environ.
    sandbox.refuse_inspection()
    if settings.plan_signing_key:
        raise SettingsError(
            "RALF_PLAN_SIGNING_KEY belongs to the machines that build and verify plans, and none "
            "of a worker's processes should hold it: set RALF_PLAN_PUBLIC_KEY_FILE here"
        )
    Rollout.of(settings)  # an operator's error in it ends the process before anything starts
    telemetry.configure(settings)
    # The loop tries again by itself; one command must not block it for longer than its timeout.
    url, ca = settings.redis_url, settings.redis_ca_file
    store = Store(connect(url, attempts=0, timeout_s=LOOP_TIMEOUT_S, ca_file=ca), settings)
    # A connection of its own: the janitor waits out an outage of Redis, the loop must not.
    repairs = Store(connect(url, ca_file=ca), settings)
    wakeup, stop = Wakeup(), threading.Event()
    child = ChildProcess(settings, bodies=bodies, shared=shared, capacity=capacity)
    telemetry.METRICS.watch_queue(queue_counts(store))
    health = Health(
        settings,
        pulse=lambda: wakeup.pulse,
        ready=lambda: child.ready is not None and not (wakeup.stopping or wakeup.blocked),
        remarks=child.remarks,
    )
    janitor = threading.Thread(
        target=Janitor(repairs, settings).run_forever, args=(stop,), name="janitor", daemon=True
    )
    # Undone from the last to the first: the janitor stops, then /metrics, then the child; the
    # connections are closed last.
    with ExitStack() as stack:
        stack.callback(store.redis.close)
        stack.callback(repairs.redis.close)
        stack.callback(wakeup.close)
        stack.callback(child.close)
        stack.callback(_ignore_signals)
        stack.enter_context(serving(settings, health, telemetry.METRICS))
        worker = RalfWorker(
            store, child, priority=priority, table=jobs.table(bodies), wakeup=wakeup
        )
        worker.start()
        janitor.start()
        stack.callback(janitor.join, JANITOR_END_S)
        # Called before the join above, which waits for it.
        stack.callback(stop.set)
        worker.work(burst=burst, max_jobs=max_jobs)
    return BROKEN if worker.broken else 0


def run_janitor(settings: Settings) -> int:
    """Find lost jobs and put them back, until told to stop."""
    with _without_child(settings) as (store, stop, beat):
        Janitor(store, settings).run_forever(stop, beat=beat)
    return 0


def run_deliverer(settings: Settings) -> int:
    """Push what is in the outbox, until told to stop."""
    with _without_child(settings) as (store, stop, beat):
        deliverer = threading.Thread(
            target=Deliverer(store, settings, beat=beat).run_forever, args=(stop,), name="deliver"
        )
        deliverer.start()
        while deliverer.is_alive():
            deliverer.join(0.5)
    # A thread's exception does not come here: an end that was not asked for is a fault.
    return 0 if stop.is_set() else BROKEN


@contextmanager
def _without_child(
    settings: Settings,
) -> Iterator[tuple[Store, threading.Event, Callable[[], None]]]:
    """Logging, signals, /metrics and a store, for a process that has no child."""
    sandbox.refuse_inspection()
    telemetry.configure(settings)
    redis = connect(settings.redis_url, ca_file=settings.redis_ca_file)
    store, stop, pulse = Store(redis, settings), threading.Event(), [0.0]

    def ask_to_stop(_: int, __: FrameType | None) -> None:
        stop.set()

    def beat() -> None:
        pulse[0] = time.monotonic()

    # The pulse begins at 0: without this /healthz would fail until the first turn.
    beat()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ask_to_stop)
    telemetry.METRICS.watch_queue(queue_counts(store))
    telemetry.METRICS.ready.set(1)  # there is no model to wait for
    health = Health(settings, pulse=lambda: pulse[0])
    try:
        with serving(settings, health, telemetry.METRICS):
            yield store, stop, beat
    finally:
        _ignore_signals()
        store.redis.close()


def _ignore_signals() -> None:
    """The process is about to end.  Python restores the signals' defaults before it is gone, so a
    second SIGTERM from a supervisor would turn a clean exit into a death by signal."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
