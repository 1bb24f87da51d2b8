"""With Redis' memory full only submissions are refused: what is there goes on to its end."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
from redis import Redis

from ralf.worker.chaos import bodies
from ralf.worker.service.connection import connect
from ralf.worker.service.deliver import Outbox
from ralf.worker.service.janitor import Janitor
from ralf.worker.service.store import Store
from tests.documents import a_job
from tests.test_deliver import deliverer, end_one
from tests.test_store import claim
from tests.waiting import until
from tests.web import reply, serving
from tests.workers import QUICK, a_worker, ended

pytestmark = pytest.mark.each_redis


@contextmanager
def full(redis: Redis) -> Iterator[None]:
    """No memory is left while the block runs."""
    redis.config_set("maxmemory", "1")
    try:
        yield
    finally:
        redis.config_set("maxmemory", "0")


def test_each_push_is_sent_once(redis: Redis):
    """What was delivered is forgotten, what was refused is put off, what is gone is disabled."""
    store = Store(redis, QUICK)
    answers = {"/good": 200, "/busy": 503, "/gone": 410}
    with serving(lambda request: reply(answers[request.path])) as web:
        for path in answers:
            end_one(store, f"{web.url}{path}", path[1:])
        pusher = deliverer(store, web)
        with full(redis):
            taken = [pusher.run_once() for _ in range(3)]
        paths = sorted(request.path for request in web.requests)

    assert taken == [3, 0, 0]
    assert paths == ["/busy", "/gone", "/good"]
    assert redis.zcard("ralf:outbox") == 1
    assert [letter.url for letter in Outbox(store).dead()] == [f"{web.url}/gone"]
    assert Outbox(store).endpoint_disabled("default", f"{web.url}/gone")


def test_queued_jobs_run(redis: Redis, redis_url: str):
    """RQ's own dequeue is refused; the worker takes its jobs by the script."""
    settings = replace(QUICK, redis_url=redis_url)
    store = Store(connect(redis_url), settings)
    store.submit(
        [a_job(str(n), tag="sleep:0.3") for n in range(3)], function=bodies.PREFIX + "sleep"
    )
    worker = a_worker(settings)
    try:
        until(lambda: store.counts().running["default"] == 1)
        with full(redis):
            until(lambda: redis.xlen("ralf:verdicts") == 3, store.counts)
            worker.terminate()
            code = ended(worker)
    finally:
        worker.kill()
        worker.wait()
    store.redis.close()

    assert code == 0


def test_the_janitor_sweeps(redis: Redis):
    """A killed worker's job is found."""
    store = Store(redis, QUICK)
    store.submit([a_job()], now=100.0)
    claim(store, now=100.0)
    with full(redis):
        report = Janitor(store, QUICK).run_if_due(200.0)

    assert report is not None
    assert report.lost == {"j1": "retried"}


def test_the_share_of_redis_memory_is_measured(redis: Redis):
    """Of maxmemory where it is set, of the machine's memory where it is not; never a guess."""
    store = Store(redis, QUICK)
    of_the_machine = store.counts().memory_share
    redis.config_set("maxmemory", 1 << 30)
    try:
        of_the_bound = store.counts().memory_share
        used = redis.info("memory")["used_memory"] / (1 << 30)
    finally:
        redis.config_set("maxmemory", "0")

    assert of_the_machine is not None and 0 < of_the_machine < 0.1
    assert of_the_bound is not None and abs(of_the_bound - used) < 0.01


def test_a_user_that_may_not_ask_is_refused_once_and_not_at_each_scrape(
    redis: Redis, redis_url: str
):
    """Redis' ACL LOG is where an operator looks for attacks."""
    rules = ["on", "nopass", "~*", "&*", "+@all", "-info"]
    redis.execute_command("ACL", "SETUSER", "curious", "reset", *rules)
    redis.execute_command("ACL", "LOG", "RESET")
    try:
        with Redis.from_url(redis_url, username="curious", password="any") as curious:
            store = Store(curious, QUICK)
            shares = [store.counts().memory_share for _ in range(3)]
        denied = [each for each in redis.acl_log() if "curious" in repr(each)]
    finally:
        redis.execute_command("ACL", "DELUSER", "curious")

    assert [None] * 3 == shares
    assert 1 == len(denied) and "'count': 1" in repr(denied)
