"""The service on one machine: what runs beside what, and in which order it stops.

    embedded      a Redis, workers and a deliverer: `ralf serve --embedded`
    on_redis      workers and a deliverer on the Redis of the settings: `ralf serve`
    redis_alone   a Redis for chaos and benches, which add what else they need

Each has its processes while a block runs, under one Supervisor (processes.py).
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from ralf.worker.contract import Priority
from ralf.worker.service.connection import connect
from ralf.worker.service.jobs import Bodies
from ralf.worker.service.processes import START_S, Supervisor
from ralf.worker.service.store import Store
from ralf.worker.settings import Settings

SERVED: tuple[Priority, ...] = ("high", "default")
"""The queues that an embedded service has a worker for; that of default takes a backfill too."""


def _redis_options(url: str, data: Path, *, durable: bool) -> list[str]:
    """A Redis on a socket.

    Durable means `appendfsync always`: what was answered is on disk, so that a kill takes nothing
    back.  With `everysec` Redis may hold a write back during an fsync, and chaos could not tell
    that loss from one of ours.
    """
    options = {
        # No TCP port: whoever may use the socket's folder may use this Redis, and nobody else.
        "port": "0",
        "unixsocket": url.removeprefix("unix://"),
        "unixsocketperm": "700",
        "dir": str(data),
        "save": "",
        "appendonly": "yes" if durable else "no",
        "appendfsync": "always",
        "maxmemory-policy": "noeviction",
        "loglevel": "warning",
    }
    return [part for name, value in options.items() for part in (f"--{name}", value)]


@contextmanager
def redis_alone(settings: Settings, folder: Path, *, durable: bool) -> Iterator[Supervisor]:
    """A Redis at settings.redis_url while the block runs, and whatever is added to it."""
    supervisor = Supervisor(settings, folder, logged=True)
    supervisor.add("redis", *_redis_options(settings.redis_url, folder, durable=durable))
    try:
        supervisor.tend()
        supervisor.wait_for_redis()
        yield supervisor
    finally:
        # Redis last: the others write the ends of their jobs to it.
        supervisor.stop("worker", "janitor", "deliverer")
        supervisor.stop("redis")


@dataclass(frozen=True)
class Embedded:
    """A running service on this machine."""

    settings: Settings
    """As its processes have them: redis_url names the embedded Redis, if there is one."""
    supervisor: Supervisor = field(repr=False)

    @property
    def redis_url(self) -> str:
        """For ralf.client.connect()."""
        return self.settings.redis_url

    @property
    def pids(self) -> dict[str, int]:
        """The process id of each process by its name."""
        return {process.name: process.pid for process in self.supervisor.processes}

    def ended(self) -> str:
        """Which process has ended by itself, and how; empty while all is well."""
        self.supervisor.tend()
        return self.supervisor.ended()


@contextmanager
def embedded(
    settings: Settings,
    *,
    bodies: Bodies = "moderate",
    data: Path | None = None,
    deliver: bool = True,
) -> Iterator[Embedded]:
    """A real Redis, a worker each for high and default and a deliverer while the block runs.

    The two workers share one child, so that the model is in memory once.  A deliverer that ends is
    started again: the queue does not depend on it.

    With `data` the queue is kept in that folder, through a crash too: an append-only file, written
    before each answer, as docs/redis.md asks for.  Without it the queue is forgotten.
    """
    with tempfile.TemporaryDirectory(prefix="ralf-redis-") as name:
        folder = Path(name)
        inside = replace(settings, redis_url=f"unix://{folder / 'redis.sock'}")
        if data is not None:
            data.mkdir(parents=True, exist_ok=True)
        supervisor = Supervisor(inside, folder)
        try:
            durable = data is not None
            options = _redis_options(inside.redis_url, data or folder, durable=durable)
            logged = ("--logfile", str(folder / "redis.log"))
            supervisor.add("redis", *options, *logged, restart=False)
            supervisor.tend()
            supervisor.wait_for_redis()
            _add_workers(supervisor, bodies, deliver=deliver)
            yield Embedded(inside, supervisor)
        finally:
            # Redis last: the others write the ends of their jobs to it.
            supervisor.stop("worker", "deliverer")
            supervisor.stop("redis")


@contextmanager
def on_redis(settings: Settings, *, bodies: Bodies = "moderate") -> Iterator[Embedded]:
    """The same workers and deliverer on the Redis that the settings name."""
    with tempfile.TemporaryDirectory(prefix="ralf-serve-") as name:
        supervisor = Supervisor(settings, Path(name))
        try:
            _add_workers(supervisor, bodies)
            yield Embedded(settings, supervisor)
        finally:
            supervisor.stop("worker", "deliverer")


def _add_workers(supervisor: Supervisor, bodies: Bodies, *, deliver: bool = True) -> None:
    """A deliverer and a worker for each priority; returns once the workers have registered."""
    settings = supervisor.settings
    if deliver:
        # The port of /metrics is the worker's.
        supervisor.add("deliverer", settings=replace(settings, http_port=0))
    # The one of default takes a backfill's jobs too.
    for priority in SERVED:
        port = settings.http_port if priority == "default" else 0
        supervisor.add(
            "worker",
            *("--bodies", bodies, "--priority", priority, "--capacity", "2"),
            settings=replace(settings, http_port=port),
            restart=False,
            shared=supervisor.folder / "child",
        )
    supervisor.tend()
    _wait_for_workers(supervisor)


def _wait_for_workers(supervisor: Supervisor) -> None:
    settings = supervisor.settings
    store = Store(connect(settings.redis_url, ca_file=settings.redis_ca_file), settings)
    seconds = settings.start_allowed() + START_S
    try:
        for worker in supervisor.of("worker"):
            supervisor.wait_until(
                lambda: all(store.counts().workers[name] for name in SERVED), worker, seconds
            )
    finally:
        store.redis.close()
