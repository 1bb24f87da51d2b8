"""Workers that share one child: they run jobs side by side, drain together and end together."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from ralf.worker.chaos import bodies
from ralf.worker.service import worker_group
from ralf.worker.service.connection import connect
from ralf.worker.service.processes import BROKEN, as_environment
from ralf.worker.service.store import Store
from ralf.worker.service.worker_group import healthy
from ralf.worker.settings import Settings
from tests.documents import a_job
from tests.waiting import LONG_S, until
from tests.web import get
from tests.workers import QUICK, ended

ROOT = Path(__file__).resolve().parent.parent
RUN = (
    "import sys; from ralf.worker.service.worker_group import run_group; "
    "from ralf.worker.settings import Settings; "
    "sys.exit(run_group(Settings.from_environment(), ['high', 'default'], bodies='test'))"
)

JOBS = (("1", "default"), ("2", "high"))
"""Number and priority."""


def ready(port: int) -> bool:
    """Whether the parent there would take a job; one that drains would not."""
    return get(port, "/readyz")[0] == 200


def two_ports() -> int:
    """A port that is free, and so is the next."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
            with suppress(OSError):
                second.bind(("127.0.0.1", port + 1))
                return port


@contextmanager
def a_group(settings: Settings) -> Iterator["subprocess.Popen[bytes]"]:
    """Two parents and their child, taking jobs."""
    store = Store(connect(settings.redis_url), settings)
    process = subprocess.Popen(
        [sys.executable, "-c", RUN], env=as_environment(settings, os.environ), cwd=ROOT
    )
    try:
        until(lambda: store.counts().workers == {"high": 1, "default": 1, "backfill": 0})
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def members(group: "subprocess.Popen[bytes]") -> list[int]:
    """The process ids of its parents."""
    return [
        int(pid)
        for pid in Path(f"/proc/{group.pid}/task/{group.pid}/children").read_text().split()
        if b"\0worker\0" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]


def test_two_parents_run_two_jobs_in_one_child_and_drain_at_a_signal(
    redis_url: str, tmp_path: Path
):
    """Side by side, each at a port of its own; SIGTERM lets the running jobs end."""
    settings = replace(
        QUICK, redis_url=redis_url, http_port=two_ports(), work_dir=str(tmp_path), grace_s=LONG_S
    )
    store, release = Store(connect(redis_url), settings), tmp_path / "release"
    with a_group(settings) as group:
        asked = [a_job(n, tag=f"hold:{release}", priority=p) for n, p in JOBS]
        store.submit(asked, function=bodies.PREFIX + "hold")
        until(lambda: store.counts().running == {"high": 1, "default": 1, "backfill": 0})
        ports = (settings.http_port, settings.http_port + 1)
        assert [get(port, "/healthz")[0] for port in ports] == [200, 200]
        until(lambda: all(store.status(job.job_id).progress for job in asked))  # type: ignore[union-attr]
        group.send_signal(signal.SIGTERM)
        until(lambda: all(not ready(port) for port in ports))
        release.touch()
        code = ended(group)

    states = [store.status(name).state for name in ("j1", "j2")]  # type: ignore[union-attr]
    assert (code, states) == (0, ["succeeded", "succeeded"])


def test_a_parent_that_dies_ends_the_whole_group(redis_url: str, tmp_path: Path):
    """Whoever supervises the container then starts all of it anew."""
    settings = replace(QUICK, redis_url=redis_url, work_dir=str(tmp_path))
    with a_group(settings) as group:
        os.kill(members(group)[0], signal.SIGKILL)

        assert group.wait(60) == BROKEN


def test_nobody_at_the_port_is_a_start_and_silence_is_not(monkeypatch: pytest.MonkeyPatch):
    """A parent that loads has no port yet; one that takes the question and is still is stuck."""
    monkeypatch.setattr(worker_group, "ANSWER_S", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        port = int(silent.getsockname()[1])
        assert healthy(port)
        silent.listen()

        assert not healthy(port)
