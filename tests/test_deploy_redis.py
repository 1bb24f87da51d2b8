"""deploy/redis/users.acl: each role can do its own work on a real Redis, and nothing else."""

import hashlib
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from redis import Redis
from redis.exceptions import NoPermissionError, ResponseError

from ralf.worker.chaos import bodies
from ralf.worker.client import connect as connect_client
from ralf.worker.contract import Callback, Failure, Media
from ralf.worker.doctor import examine_redis
from ralf.worker.service.connection import connect
from ralf.worker.service.deliver import Deliverer, Outbox
from ralf.worker.service.health import queue_counts
from ralf.worker.service.janitor import Janitor
from ralf.worker.service.processes import as_environment
from ralf.worker.service.store import Store
from ralf.worker.settings import Settings
from tests.deploy_tools import DEPLOY, ROOT
from tests.documents import a_job, a_track, a_verdict
from tests.test_deliver import OLD
from tests.test_redis_access import popped
from tests.waiting import until
from tests.web import reply, serving
from tests.workers import QUICK, TESTS

pytestmark = pytest.mark.each_redis
ROLES = ("producer", "worker", "janitor", "deliverer", "reader")


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    """The files that make_secrets.py writes."""
    folder = tmp_path / "secrets"
    subprocess.run([sys.executable, DEPLOY / "make_secrets.py", folder], check=True)
    return folder


@pytest.fixture
def users(redis: Redis, secrets: Path) -> Iterator[dict[str, str]]:
    """Gives the test's Redis these users; returns their addresses by role."""
    socket = redis.connection_pool.connection_kwargs["path"]
    lines = [line.split() for line in (secrets / "users.acl").read_text().splitlines()]
    for _, name, *rules in lines:
        if name != "default":  # the tests' own
            redis.execute_command("ACL", "SETUSER", name, "reset", *rules)
    found = {}
    for role in ROLES:
        url = urlsplit((secrets / f"{role}.env").read_text().splitlines()[0].partition("=")[2])
        found[role] = f"unix://{url.username}:{url.password}@{socket}"
    yield found
    for role in ROLES:
        redis.execute_command("ACL", "DELUSER", role)


def test_secrets_are_private_hashed_for_redis_and_never_overwritten(secrets: Path):
    """Each role has its own password; Redis knows only the hashes."""
    passwords = {
        role: urlsplit((secrets / f"{role}.env").read_text().split("=", 1)[1].split()[0]).password
        for role in ROLES
    }
    acl = (secrets / "users.acl").read_text()

    assert len(set(passwords.values())) == len(ROLES)
    for role, password in passwords.items():
        assert f"user {role} on #{hashlib.sha256(str(password).encode()).hexdigest()} " in acl
        assert str(password) not in acl
    # A container's user reads these by a mount; here the folder keeps them from others.
    mounted = {"users.acl", "deliverer.webhook_secrets", *(f"{role}.redis_url" for role in ROLES)}
    assert {path.name for path in secrets.iterdir() if path.stat().st_mode & 0o077} == mounted
    for role, password in passwords.items():
        assert f":{password}@" in (secrets / f"{role}.redis_url").read_text()
    assert secrets.stat().st_mode & 0o077 == 0
    before = (secrets / "worker.env").read_text()
    again = subprocess.run([sys.executable, DEPLOY / "make_secrets.py", secrets])
    assert (again.returncode, (secrets / "worker.env").read_text()) == (2, before)


def test_each_role_does_its_part(users: dict[str, str]):
    """Each role runs as its own user: submit, cancel, watch; work; repair; push; read."""
    with serving(lambda request: reply(204)) as web:
        base = replace(
            QUICK,
            webhook_secrets=(f"*/default={OLD}",),
            allow_private_addresses=True,
            fetch_ports=(web.port,),
        )
        settings = {role: replace(base, redis_url=url) for role, url in users.items()}
        stores = {role: Store(connect(users[role]), settings[role]) for role in users}
        client = connect_client(settings=settings["producer"])
        worker = a_worker(settings["worker"])
        try:
            until(lambda: stores["producer"].counts().workers["default"] == 1)
            asked = a_job("1", tag="sleep:0.2", callback=Callback(url=web.url))
            stores["producer"].submit([asked, a_job("2")], function=bodies.PREFIX + "sleep")
            cancelled = client.cancel("j2")
            (*_, status) = client.watch("j1", timeout=60)
        finally:
            worker.terminate()
            code = worker.wait(60)
        swept = Janitor(stores["janitor"], settings["janitor"]).run_once()
        pushes = Deliverer(stores["deliverer"], settings["deliverer"]).run_once()
        dead = Outbox(stores["deliverer"]).dead()
        told = {role: next(iter(examine_redis(settings[role]))) for role in users}
        scraped = {
            role: {count.name: count.value for count in queue_counts(stores[role])()}
            for role in ("worker", "janitor", "deliverer")
        }
        client.close()

    assert (code, status.state, cancelled in {"cancelled", "running"}) == (0, "succeeded", True)
    assert (swept.lost, pushes, dead, web.requests[0].method) == ({}, 1, [], "POST")
    assert min(map(len, scraped.values())) > 5
    share = "redis_memory_share"
    assert [True, True, False] == [share in found for found in scraped.values()]
    assert {role for role, found in told.items() if "answers at" in found.found} == {
        "producer",
        "deliverer",
        "reader",
    }
    assert all("noeviction" in told[role].found for role in ("worker", "janitor"))
    with Redis.from_url(users["reader"]) as reader:
        assert reader.get("ralf:verdict:j1") is not None


def a_worker(settings: Settings) -> "subprocess.Popen[bytes]":
    """A worker that runs the test jobs."""
    return subprocess.Popen(
        [sys.executable, "-m", "ralf", "worker", *TESTS],
        env=as_environment(settings, {"PATH": "/usr/bin:/bin"}),
        cwd=ROOT,
    )


def test_a_janitor_brings_a_lost_job_back(users: dict[str, str]):
    """The repair needs writes; the rights of its own user are enough."""
    stores = {
        role: Store(connect(users[role]), QUICK) for role in ("producer", "worker", "janitor")
    }
    stores["producer"].submit([a_job("1")])
    claim = stores["worker"].begin(popped(stores["worker"]), "w")
    assert claim is not None

    later = stores["janitor"].now() + 3600
    swept = Janitor(stores["janitor"], QUICK).run_once(now=later)
    assert swept.lost == {"j1": "retried"}
    again = stores["worker"].begin(popped(stores["worker"]), "w")
    assert again is not None
    verdict = a_verdict([a_track([0.1])]).model_copy(update={"job_id": "j1"})
    assert stores["worker"].end(again, verdict)


NOBODYS = (
    "CONFIG GET dir",
    "CONFIG SET dir /tmp",
    "FLUSHALL",
    "FLUSHDB",
    "SWAPDB 0 1",
    "KEYS *",
    "SCAN 0",
    "RANDOMKEY",
    "GET other",
    "SET other 1",
    "RENAME ralf:verdicts other",
    "COPY other ralf:other",
    "SCRIPT FLUSH",
    "SCRIPT KILL",
    "MONITOR",
    "CLIENT LIST",
    "CLIENT KILL TYPE normal",
    "ACL LIST",
    "SHUTDOWN NOSAVE",
    "REPLICAOF NO ONE",
    "BGSAVE",
    "MODULE LIST",
    "SLOWLOG GET",
    "PUBSUB CHANNELS",
    "SUBSCRIBE other",
    "PSUBSCRIBE *",
    "EVAL return(redis.call('get','other')) 1 other",
)
"""What no role needs, and each would be worth something to an intruder."""
OTHERS = {
    "producer": (
        "INFO memory",
        "BLPOP rq:queue:ralf-default 1",
        "BLMOVE rq:queue:ralf-default rq:queue:x LEFT RIGHT 1",
        "HSET rq:worker:x state busy",
        "PUBLISH rq:pubsub:x stop",
        "SUBSCRIBE rq:pubsub:x",
    ),
    "worker": ("PUBLISH other x", "SUBSCRIBE ralf:other"),
    "janitor": (
        "BLPOP rq:queue:ralf-default 1",
        "SUBSCRIBE rq:pubsub:x",
        "PUBLISH rq:pubsub:x stop",
    ),
    "deliverer": (
        "INFO memory",
        "HGETALL ralf:job:j1",
        "HSET ralf:job:j1 state succeeded",
        "GET ralf:verdict:j1",
        "GET ralf:evidence:j1",
        "XADD ralf:verdicts * type verdict.ready",
        "LPUSH rq:queue:ralf-default x",
        "SUBSCRIBE ralf:watch:j1",
    ),
    "reader": (
        "INFO memory",
        "SET ralf:verdict:j1 x",
        "DEL ralf:verdict:j1",
        "EXPIRE ralf:verdict:j1 1",
        "GET ralf:evidence:j1",
        "HGETALL ralf:job:j1",
        "HGETALL ralf:delivery:m1",
        "HGETALL ralf:session:t:s",
        "GET ralf:token:t:1",
        "XADD ralf:verdicts * type verdict.ready",
        "XDEL ralf:verdicts 1-0",
        "XSETID ralf:verdicts 1-0",
        "XGROUP CREATE ralf:verdict:new g 0 MKSTREAM",
        "XGROUP DESTROY ralf:verdicts review",
        "XGROUP SETID ralf:verdicts review 0",
        "XTRIM ralf:verdicts MAXLEN 0",
        "PUBLISH ralf:watch:j1 x",
        "EVAL return(1) 0",
    ),
}
"""What belongs to another role."""


@pytest.mark.parametrize("role", ROLES)
def test_a_role_is_refused_what_is_not_its_work(users: dict[str, str], role: str):
    """Redis refuses it, not Ralf."""
    allowed = []
    with Redis.from_url(users[role]) as redis:
        for command in (*NOBODYS, *OTHERS[role]):
            try:
                redis.execute_command(*command.split())
                allowed.append(command)
            except (NoPermissionError, ResponseError) as error:
                if "perm" not in str(error).lower():
                    allowed.append(f"{command}: {error}")
    assert allowed == []


def test_what_a_reader_may_read_holds_no_credential(users: dict[str, str]):
    """Neither the signed address of the upload nor that of the webhook, nor a secret's name."""
    store = Store(connect(users["producer"]), QUICK)
    signed = Media(uri="https://cdn.example/1.mp4?signature=hidden1")
    hook = Callback(url="https://me:hidden2@hook.example/?key=hidden3", secret_id="hidden4")
    ends = (
        a_verdict([a_track([0.1])]).model_copy(update={"job_id": "j0"}),
        Failure(code="fetch_failed", message="it answered 500", attempts=1),
    )
    for number, end in enumerate(ends):
        store.submit([a_job(str(number), callback=hook, media=signed)])
        worker = Store(connect(users["worker"]), QUICK)
        claim = worker.begin(popped(worker), "w")
        assert claim is not None
        assert worker.end(claim, end)
    with Redis.from_url(users["reader"]) as reader:
        seen = repr([reader.xrange("ralf:verdicts"), reader.get("ralf:verdict:j0")])

    assert "succeeded" in seen
    assert "fetch_failed" in seen
    assert "hidden" not in seen


def test_without_a_password_only_ping_is_allowed(redis: Redis):
    """The health check of the container does this."""
    text = (DEPLOY / "redis" / "users.acl").read_text()
    (rules,) = re.findall(r"^user default (.*)$", text, re.MULTILINE)
    socket = redis.connection_pool.connection_kwargs["path"]
    redis.execute_command("ACL", "SETUSER", "nobody", "reset", *rules.split())
    try:
        with Redis.from_url(f"unix://nobody:any@{socket}") as nobody:
            assert nobody.ping()
            with pytest.raises((NoPermissionError, ResponseError), match=r"(?i)perm"):
                nobody.get("ralf:verdict:j1")
    finally:
        redis.execute_command("ACL", "DELUSER", "nobody")
