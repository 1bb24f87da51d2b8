"""Workers as real processes, and what a test does to them."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from rq.suspension import resume, suspend

from ralf.worker.chaos import bodies
from ralf.worker.chaos.proof import pid_of
from ralf.worker.contract import Job, Media
from ralf.worker.service import jobs
from ralf.worker.service.connection import connect
from ralf.worker.service.processes import as_environment
from ralf.worker.service.records import Status
from ralf.worker.service.store import Store
from ralf.worker.settings import Settings
from tests.waiting import LONG_S, PATIENCE_S, until

ROOT = Path(__file__).resolve().parent.parent
TESTS = ("--bodies", "test")
QUICK = Settings(
    heartbeat_s=0.3,
    heartbeat_ttl_s=20.0,
    janitor_every_s=0.2,
    reclaim_after_s=1.0,
    hang_s=60.0,
    retry_delays_s=(0.1,),
    grace_s=5.0,
    log_format="json",
)
"""What a test waits for comes soon; what it must not run into is far, even when the machine stands
still for seconds."""
FOR_EVER = f"sleep:{LONG_S:g}"
"""The tag of a job that is to be interrupted, never waited for."""


class Service:
    """Some workers on a queue of their own, and what a test does to them."""

    def __init__(self, url: str, settings: Settings) -> None:
        prefix = f"t{uuid.uuid4().hex[:8]}:"
        self.settings = replace(settings, redis_url=url, redis_prefix=prefix)
        self.redis = Redis.from_url(url)
        self.store = Store(connect(url), self.settings)
        self.queue = self.store.queue("default")
        self.workers: list[subprocess.Popen[bytes]] = []
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  a pipe that nobody reads fills up
        self.shared: Path | None = None

    def worker(self, *arguments: str, prefix: Sequence[str] = ()) -> subprocess.Popen[bytes]:
        """One more worker, up when this returns."""
        process = a_worker(self.settings, *arguments, prefix=prefix, stderr=self._log)
        self.workers.append(process)
        until(lambda: process.pid in self.registered() or process.poll() is not None)
        assert process.poll() is None, self.said()
        return process

    def registered(self) -> set[int]:
        """The process ids of RQ's workers on this queue."""
        members = self.redis.smembers(f"rq:workers:{self.queue}")
        return {pid_of(member.decode()) for member in members}

    def said(self) -> str:
        """What the workers logged."""
        self._log.seek(0)
        return self._log.read().decode()

    def submit(self, body: str, tag: str | None = None, **fields: Any) -> str:
        """A job with a test body; the tag is the body's argument."""
        job = Job(
            job_id=uuid.uuid4().hex,
            token=uuid.uuid4().hex,
            media=fields.pop("media", Media(uri="file:///nowhere.mp4")),
            tag=tag,
            submitted_at=datetime.now(UTC),
            **fields,
        )
        function = jobs.MODERATE if body == "moderate" else bodies.PREFIX + body
        self.store.submit([job], function=function)
        return job.job_id

    def status(self, job_id: str) -> Status:
        """Where the job stands."""
        status = self.store.status(job_id)
        assert status is not None
        return status

    def reaches(self, job_id: str, *states: str) -> Status:
        """Wait for one of the states."""
        until(lambda: self.status(job_id).state in states, lambda: self.status(job_id))
        return self.status(job_id)

    def runs(self, job_id: str) -> Status:
        """Wait until the child has told the job's progress."""
        until(lambda: self.status(job_id).progress is not None, lambda: self.status(job_id))
        return self.status(job_id)

    def beats(self, count: int) -> None:
        """Wait until the only worker has told RQ so often again that it lives."""
        (key,) = self.redis.smembers(f"rq:workers:{self.queue}")
        for _ in range(count):
            last = self.redis.hget(key, "last_heartbeat")
            until(lambda last=last: self.redis.hget(key, "last_heartbeat") != last)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """No job is taken in the block: the worker has said that it is suspended."""
        (key,) = self.redis.smembers(f"rq:workers:{self.queue}")
        suspend(self.redis)
        try:
            until(lambda: self.redis.hget(key, "state") == b"suspended")
            yield
        finally:
            resume(self.redis)

    def child(self) -> int:
        """The process id of the only worker's child."""
        return child_of(self.workers[-1].pid)

    def stop(self) -> list[dict[str, Any]]:
        """End the workers; gives what they logged."""
        lines: list[dict[str, Any]] = []
        for process in self.workers:
            process.terminate()
        for process in self.workers:
            ended(process)
        if self.shared is not None:  # it would linger
            with suppress(OSError):
                os.kill(int((self.shared / "pid").read_text()), signal.SIGKILL)
        self.workers.clear()
        for line in self.said().splitlines():
            with suppress(ValueError):
                lines.append(json.loads(line))
        return lines

    def close(self) -> None:
        """Leave nothing running."""
        self.stop()
        self._log.close()
        self.redis.close()
        self.store.redis.close()


def child_of(pid: int) -> int:
    """The warm child among a worker's children."""
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        if b"ralf.worker.service.child" in Path(f"/proc/{child}/cmdline").read_bytes():
            return int(child)
    return 0


def a_worker(
    settings: Settings,
    *arguments: str,
    prefix: Sequence[str] = (),
    stderr: Any = subprocess.DEVNULL,
) -> "subprocess.Popen[bytes]":
    """A worker with test bodies, as a supervisor starts it."""
    return subprocess.Popen(
        [*prefix, sys.executable, "-m", "ralf", "worker", *TESTS, *arguments],
        env=as_environment(settings, os.environ),
        cwd=ROOT,
        stderr=stderr,
    )


def ended(process: "subprocess.Popen[Any]") -> int:
    """The exit status of a process that was told to stop; one that does not is killed."""
    try:
        return process.wait(PATIENCE_S)
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def settings(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Of the suite's Redis, with quick waits; in this process' environment is its address too."""
    monkeypatch.setenv("RALF_REDIS_URL", redis_url)
    return replace(QUICK, redis_url=redis_url)


@pytest.fixture
def store(redis: Redis) -> Store:
    """The worker's side, for tests that play a worker's part themselves."""
    return Store(redis, Settings())
