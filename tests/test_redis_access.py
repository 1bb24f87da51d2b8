"""docs/redis.md: what its access rules allow is enough, and no more, on a real Redis."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from redis import Redis
from redis.exceptions import NoPermissionError, ResponseError

from ralf.worker.chaos import bodies
from ralf.worker.client import connect
from ralf.worker.contract import Callback, SessionPart
from ralf.worker.doctor import examine_redis
from ralf.worker.service.deliver import Deliverer, Outbox
from ralf.worker.service.janitor import Janitor
from ralf.worker.service.quarantine import Quarantine
from ralf.worker.service.store import Store
from tests.documents import a_job
from tests.test_deliver import OLD
from tests.waiting import until
from tests.web import reply, serving
from tests.workers import QUICK, a_worker, ended

pytestmark = pytest.mark.each_redis
ROOT = Path(__file__).resolve().parent.parent
RULES = [
    line.split()[1:]
    for line in (ROOT / "docs" / "redis.md").read_text().splitlines()
    if line.startswith("user ")
]


@pytest.fixture
def users(redis: Redis) -> Iterator[dict[str, str]]:
    """The addresses of the documented users, by name."""
    socket = redis.connection_pool.connection_kwargs["path"]
    for name, *rules in RULES:
        redis.execute_command("ACL", "SETUSER", name, "reset", *rules)
    yield {name: f"unix://{name}:SECRET@{socket}" for name, *_ in RULES}
    for name, *_ in RULES:
        redis.execute_command("ACL", "DELUSER", name)


def test_both_users_are_documented():
    """The test below reads them there."""
    assert [name for name, *_ in RULES] == ["ralf", "reader"]


def test_every_user_begins_with_no_channel():
    """Redis 6.2 gives a new user every channel, and then refuses a pattern of them."""
    deployed = (ROOT / "deploy" / "redis" / "users.acl").read_text().splitlines()
    for rules in (*RULES, *(line.split() for line in deployed)):
        patterns = [place for place, rule in enumerate(rules) if rule.startswith("&")]
        assert rules.index("resetchannels") < min(patterns, default=len(rules))


def test_the_whole_service_runs_as_its_user_and_a_reader_reads(users: dict[str, str]):
    """Submit, work, cancel, watch, fold, push, sweep; then the example of the stream."""
    with serving(lambda request: reply(204)) as web:
        settings = replace(
            QUICK,
            redis_url=users["ralf"],
            webhook_secrets=(f"*/default={OLD}",),
            allow_private_addresses=True,
            fetch_ports=(web.port,),
        )
        client = connect(settings=settings)
        store: Store = client.store
        job = a_job(
            "1",
            tag="sleep:0.5",
            callback=Callback(url=web.url),
            session=SessionPart(session_id="live", number=0, offset_ms=0, last=True),
        )
        store.submit([job], function=bodies.PREFIX + "sleep")
        store.submit([a_job("2")])
        worker = a_worker(settings, "--priority", "high", stderr=None)
        try:
            until(lambda: store.counts().workers["high"] == 1)
            cancelled = client.cancel("j2")
            store.submit(
                [a_job("3", priority="high", tag="sleep:0.5")], function=bodies.PREFIX + "sleep"
            )
            (*_, status) = client.watch("j3", timeout=120)
        finally:
            worker.terminate()
            code = ended(worker)
        claim = store.begin(popped(store), "w")
        assert claim is not None
        store.end(claim, client.result("j3").model_copy(update={"job_id": "j1"}))
        pushes = Deliverer(store, settings).run_once()
        swept = Janitor(store, settings).run_if_due()
        quarantined, dead = Quarantine(store).list(), Outbox(store).dead()
        rolling = client.session("live")
        client.close()

    assert (code, cancelled, status.state) == (0, "cancelled", "succeeded")
    assert (pushes, quarantined, dead, rolling.complete) == (1, [], [], True)
    assert swept is not None
    with Redis.from_url(users["ralf"]) as operator:
        operator.xgroup_create("ralf:verdicts", "review", id="0", mkstream=True)
    read = subprocess.run(
        [sys.executable, "docs/examples/stream_consumer.py", users["reader"], "--drain"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert [json.loads(line)["type"] for line in read.stdout.splitlines()] == [
        "verdict.failed",
        "verdict.ready",
        "verdict.ready",
        "session.updated",
    ]
    with Redis.from_url(users["reader"]) as reader:
        assert reader.get("ralf:verdict:j1") is not None


def test_the_doctor_finds_redis_under_its_documented_user(users: dict[str, str]):
    """INFO is not among the user's commands; that does not make Redis missing."""
    for url in users.values():
        found = next(iter(examine_redis(replace(QUICK, redis_url=url))))
        assert found.state == "ok"
        assert "answers at" in found.found
        assert "SECRET" not in found.found


def popped(store: Store) -> str:
    """The next of the default queue, as RQ's dequeue leaves it."""
    queue = f"rq:queue:{store.queue('default')}"
    job_id: bytes = store.redis.lmove(queue, f"{queue}:intermediate", "LEFT", "RIGHT")
    return job_id.decode()


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("ralf", "SET other 1"),
        ("ralf", "GET other"),
        ("ralf", "FLUSHALL"),
        ("ralf", "CONFIG GET dir"),
        ("ralf", "SUBSCRIBE other"),
        ("ralf", "KEYS *"),
        ("ralf", "SCAN 0"),
        ("ralf", "SCRIPT FLUSH"),
        ("ralf", "PUBSUB CHANNELS"),
        ("reader", "XGROUP CREATE ralf:verdict:new g 0 MKSTREAM"),
        ("reader", "SET ralf:verdict:j1 x"),
        ("reader", "XADD ralf:verdicts * type verdict.ready"),
        ("reader", "HSET ralf:job:j1 state queued"),
        ("reader", "GET ralf:evidence:j1"),
        ("reader", "HGETALL ralf:job:j1"),
        ("reader", "XSETID ralf:verdicts 1-0"),
        ("reader", "XGROUP DESTROY ralf:verdicts review"),
        ("reader", "XGROUP SETID ralf:verdicts review 0"),
        ("reader", "XTRIM ralf:verdicts MAXLEN 0"),
    ],
)
def test_what_is_not_theirs_is_refused(users: dict[str, str], name: str, command: str):
    """By Redis, not by us."""
    with Redis.from_url(users[name]) as redis:
        with pytest.raises((NoPermissionError, ResponseError), match=r"(?i)perm"):
            redis.execute_command(*command.split())
