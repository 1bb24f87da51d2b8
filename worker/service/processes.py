"""The processes of a chaos run, and the small supervisor that starts each again when it ends.

A post is one process that should be there: the Redis, a worker, a janitor, a deliverer.  tend()
fills empty posts and keeps what is worth knowing of an end that nobody caused.  Redis writes its
append-only file with `appendfsync always`: what it acknowledged is on disk before the answer, so a
kill -9 may take nothing back.  With `everysec` it may hold a write back while an fsync is under
way, and chaos could not tell that loss from one of ours.

Each process dies with whoever runs the fleet; each has a session of its own, so that a Ctrl-C
reaches only that one, who stops them in order.  Needs Linux, for /proc and for that.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from redis.exceptions import RedisError

import ralf
from ralf.worker.contract import Priority
from ralf.worker.errors import Infrastructure
from ralf.worker.service.serve import as_environment, redis_server
from ralf.worker.service.store import connect
from ralf.worker.settings import Settings

Role = Literal["redis", "worker", "janitor", "deliverer"]
START_S = 30.0
STILLBORN = 5
NO_REDIS = 5
"""Exit status of a process that could not reach Redis when it started."""
_LOG_TAIL = 1500


class FleetFailed(Infrastructure):
    """A process of the run did not come up."""


@dataclass
class Post:
    """One process that should be there."""

    name: str
    role: Role
    command: list[str]
    log: Path
    process: "subprocess.Popen[bytes] | None" = None
    empty_until: float = 0.0
    """Not filled before then."""
    leaving: bool = False
    """It was told to stop, or killed: its end is no surprise."""
    starts: int = 0
    started: float = 0.0
    stillborn: int = 0
    """How often in a row it ended by itself soon after its start."""

    @property
    def pid(self) -> int:
        """Of the process; 0 when the post is empty."""
        return self.process.pid if self.process is not None and self.process.poll() is None else 0


@dataclass(frozen=True)
class Surprise:
    """A process that ended by itself."""

    name: str
    status: int
    log: str


@dataclass
class Fleet:
    """A Redis and everything that works on it, in one folder."""

    settings: Settings
    folder: Path
    posts: list[Post] = field(default_factory=list)
    surprises: list[Surprise] = field(default_factory=list)
    shared: Path | None = None
    """The folder of the child that the default workers share; none: each has its own."""
    stubborn: list[str] = field(default_factory=list)
    """Posts that SIGTERM did not end in time."""

    def add(self, role: Role, *arguments: str) -> Post:
        """One more post, filled at the next tend()."""
        number = sum(post.role == role for post in self.posts)
        name = f"{role}-{number}"
        post = Post(name, role, list(arguments), self.folder / f"{name}.log")
        self.posts.append(post)
        return post

    def of(self, role: Role) -> list[Post]:
        """The posts of a role."""
        return [post for post in self.posts if post.role == role]

    def tend(self) -> None:
        """Fill every post that is empty and may be filled; raises FleetFailed."""
        for post in self.posts:
            if post.pid or time.monotonic() < post.empty_until:
                continue
            if post.process is not None and not post.leaving:
                self._wonder(post, post.process.returncode)
            self._fill(post)

    def _wonder(self, post: Post, status: int) -> None:
        """Nobody ended it; one that never gets up ends the run."""
        self.surprises.append(Surprise(post.name, status, _tail(post.log)))
        soon = time.monotonic() - post.started < START_S
        post.stillborn = post.stillborn + 1 if soon else 0
        if post.stillborn > STILLBORN:
            raise FleetFailed(f"{post.name} ends with {status} each time: {_tail(post.log)}")

    def _fill(self, post: Post) -> None:
        head = [sys.executable, "-m", "ralf.worker.service.serve", "--parent", str(os.getpid())]
        with post.log.open("ab") as log:
            post.process = subprocess.Popen(
                [*head, *post.command],
                env=self._environment(),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        post.leaving, post.starts, post.started = False, post.starts + 1, time.monotonic()

    def _environment(self) -> Mapping[str, str]:
        environment = as_environment(self.settings, os.environ)
        root = str(Path(ralf.__file__).resolve().parent.parent)
        path = environment.get("PYTHONPATH")
        return environment | {"PYTHONPATH": f"{root}{os.pathsep}{path}" if path else root}

    def signal(self, post: Post, number: signal.Signals, *, empty_s: float = 0.0) -> bool:
        """Send it to the post's process, which may stay away so long; False when there is none."""
        if not post.pid or post.process is None:
            return False
        if number in (signal.SIGKILL, signal.SIGTERM):
            post.leaving = True
            post.empty_until = time.monotonic() + empty_s
        post.process.send_signal(number)
        if number == signal.SIGKILL:
            post.process.wait()
        return True

    def wait_for_redis(self) -> None:
        """Until it answers; raises FleetFailed when it does not."""
        end = time.monotonic() + START_S
        client = connect(self.settings.redis_url, attempts=0)
        try:
            while True:
                with suppress(RedisError):
                    client.ping()
                    return
                if time.monotonic() > end:
                    log = _tail(self.of("redis")[0].log)
                    raise FleetFailed(f"Redis did not answer within {START_S:g} s: {log}")
                self.tend()
                time.sleep(0.05)
        finally:
            client.close()

    def stop(self, *roles: Role) -> None:
        """SIGTERM all of these roles' processes, then SIGKILL those that take too long."""
        going = [post for post in self.posts if post.role in roles and post.process is not None]
        for post in going:
            post.leaving = True
            if post.pid and post.process is not None:
                post.process.send_signal(signal.SIGCONT)
                post.process.terminate()
        end = time.monotonic() + self.settings.grace_s + 15.0
        for post in going:
            assert post.process is not None
            try:
                post.process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.stubborn.append(post.name)
                post.process.kill()
                post.process.wait()

    def child_of(self, post: Post) -> int:
        """The warm child of a worker; 0 when it has none."""
        if self.shared is not None and str(self.shared) in post.command:
            return self._shared_child()
        with suppress(OSError):
            for child in Path(f"/proc/{post.pid}/task/{post.pid}/children").read_text().split():
                if _is_child(int(child)):
                    return int(child)
        return 0

    def sharing(self, post: Post) -> list[Post]:
        """The workers that lose their child with this one's."""
        if self.shared is None or str(self.shared) not in post.command:
            return [post]
        return [other for other in self.of("worker") if str(self.shared) in other.command]

    def _shared_child(self) -> int:
        with suppress(OSError, ValueError):
            pid = int((self.shared / "pid").read_text()) if self.shared else 0
            return pid if _is_child(pid) else 0
        return 0

    def end_shared_child(self) -> None:
        """It outlives its parents for some seconds, which is longer than the fleet's folder."""
        pid = self._shared_child()
        if pid:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _is_child(pid: int) -> bool:
    with suppress(OSError):
        return b"ralf.worker.service.child" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


@contextmanager
def redis_alone(settings: Settings, folder: Path, *, durable: bool) -> Iterator[Fleet]:
    """A Redis at settings.redis_url while the block runs, and whatever is added to it."""
    fleet = Fleet(settings, folder)
    options = {
        "port": "0",
        "unixsocket": settings.redis_url.removeprefix("unix://"),
        "unixsocketperm": "700",
        "dir": str(folder),
        "save": "",
        "appendonly": "yes" if durable else "no",
        "appendfsync": "always",
        "maxmemory-policy": "noeviction",
        "loglevel": "warning",
    }
    given = (part for name, value in options.items() for part in (f"--{name}", value))
    fleet.add("redis", "run", redis_server(), *given)
    try:
        fleet.tend()
        fleet.wait_for_redis()
        yield fleet
    finally:
        fleet.stop("worker", "janitor", "deliverer")
        fleet.end_shared_child()
        fleet.stop("redis")


@contextmanager
def running(
    settings: Settings, folder: Path, *, workers: Mapping[Priority, int], share: bool = False
) -> Iterator[Fleet]:
    """A durable Redis, workers with test bodies, a janitor and a deliverer; stopped in any case.

    share: the default workers have one child, which runs two jobs at a time.
    """
    with redis_alone(settings, folder, durable=True) as fleet:
        fleet.shared = folder / "shared" if share else None
        for priority, count in workers.items():
            arguments = ["worker", "--bodies", "test", "--priority", priority]
            if priority == "default" and share:
                arguments += ["--shared", str(fleet.shared), "--capacity", "2"]
            for _ in range(count):
                fleet.add("worker", *arguments)
        fleet.add("janitor", "janitor")
        fleet.add("deliverer", "deliver")
        fleet.tend()
        yield fleet


def _tail(log: Path) -> str:
    with suppress(OSError):
        return log.read_bytes()[-_LOG_TAIL:].decode(errors="replace")
    return ""
