"""A fail-over: the address leads to another Redis, and the old one becomes its replica."""

import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace

import pytest
from redis import Redis

from ralf.worker.chaos import bodies
from ralf.worker.service.connection import connect
from ralf.worker.service.store import Store
from tests.documents import a_job, a_verdict
from tests.redis_server import RedisServer, program_of
from tests.test_store import claim
from tests.waiting import until
from tests.workers import QUICK, a_worker, ended


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Pair:
    """A primary, its replica, and one address that leads to the primary of the moment."""

    def __init__(self, program: str) -> None:
        self.old = RedisServer(port=free_port(), program=program)
        self.new = RedisServer(port=free_port(), program=program)
        self.address = self.old.socket.parent / "primary.sock"
        self.url = f"unix://{self.address}"

    def start(self) -> None:
        self.old.start(), self.new.start()
        self.address.symlink_to(self.old.socket)
        with Redis.from_url(self.new.url) as new:
            new.replicaof("127.0.0.1", self.old.port)
            until(lambda: new.info("replication")["master_link_status"] == "up")

    def fail_over(self) -> None:
        """As Sentinel does it, and as a service's address follows; old connections stay open."""
        with Redis.from_url(self.old.url) as old, Redis.from_url(self.new.url) as new:
            with suppress(Exception):
                old.execute_command("WAIT", 1, 5000)
            new.replicaof("NO", "ONE")
            self.address.unlink()
            self.address.symlink_to(self.new.socket)
            old.replicaof("127.0.0.1", self.new.port)

    def stop(self) -> None:
        self.old.stop(), self.new.stop()


@pytest.fixture(params=["installed", "bundled"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    pair = Pair(program_of(request.param))
    try:
        pair.start()
        yield pair
    finally:
        pair.stop()


def test_a_client_follows_its_address_after_a_fail_over(pair: Pair):
    """An open connection answers READONLY: every move connects again and is done once."""
    store = Store(connect(pair.url), replace(QUICK, redis_url=pair.url))
    store.submit([a_job("1")])
    running = claim(store)
    pair.fail_over()

    assert store.beat(running) == "go_on"
    store.submit([a_job("2")])
    assert store.end(running, a_verdict())
    store.redis.close()
    with Redis.from_url(pair.new.url) as new:
        assert new.hget("ralf:job:j1", "state") == b"succeeded"
        assert new.hget("ralf:job:j2", "state") == b"queued"


def test_a_submission_follows_too(pair: Pair):
    """Its first write is refused in another place of the script."""
    store = Store(connect(pair.url), replace(QUICK, redis_url=pair.url))
    store.submit([a_job("1")])
    pair.fail_over()
    made = store.submit([a_job("2"), a_job("1")])
    store.redis.close()

    assert [one.existing for one in made] == [False, True]


def ends_over(fail_over: Callable[[], Store], store: Store, count: int) -> tuple[int, int]:
    """A worker's exit status and the ends of so many jobs, all of which have succeeded.

    Four jobs are submitted before the fail-over, which comes while one of them runs; the others are
    submitted after it, by the store that it returns.
    """
    worker = a_worker(store.settings)
    try:
        until(lambda: store.counts().workers["default"] == 1)
        jobs = [a_job(str(n), tag="sleep:0.5") for n in range(count)]
        store.submit(jobs[:4], function=bodies.PREFIX + "sleep")
        until(lambda: store.counts().running["default"] == 1)
        later = fail_over()
        later.submit(jobs[4:], function=bodies.PREFIX + "sleep")
        until(lambda: later.redis.xlen("ralf:verdicts") >= count, later.counts)
        worker.terminate()
        code = ended(worker)
    finally:
        worker.kill()
        worker.wait()
    states = [store.status(job.job_id).state for job in jobs]  # type: ignore[union-attr]
    ends = store.redis.xlen("ralf:verdicts")
    store.redis.close()
    assert states == ["succeeded"] * count
    return code, ends


def test_workers_end_all_jobs_over_a_fail_over(pair: Pair):
    """Those that ran, those that waited and those that came later, each once."""
    store = Store(connect(pair.url), replace(QUICK, redis_url=pair.url))

    def fail_over() -> Store:
        pair.fail_over()
        return store

    assert ends_over(fail_over, store, 8) == (0, 8)
