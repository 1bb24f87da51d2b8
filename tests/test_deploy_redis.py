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
from ralf.worker.contract import Callback
from ralf.worker.service.deliver import Deliverer, Outbox
from ralf.worker.service.health import queue_counts
from ralf.worker.service.janitor import Janitor
from ralf.worker.service.processes import as_environment
from ralf.worker.service.store import Store, connect
from ralf.worker.settings import Settings
from tests.deploy_tools import DEPLOY, ROOT
from tests.documents import a_job, a_track, a_verdict
from tests.test_deliver import OLD
from tests.test_redis_access import popped
from tests.test_rq_worker import QUICK, TESTS, until
from tests.web import reply, serving

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
    assert {path.name for path in secrets.iterdir() if path.stat().st_mode & 0o077} == {"users.acl"}
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
        counted = [len(list(queue_counts(stores[r])())) for r in ("worker", "janitor", "deliverer")]
        client.close()

    assert (code, status.state, cancelled in {"cancelled", "running"}) == (0, "succeeded", True)
    assert (swept.lost, pushes, dead, web.requests[0].method) == ({}, 1, [], "POST")
    assert min(counted) > 5
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


@pytest.mark.parametrize(
    ("role", "command"),
    [
        ("producer", "BLPOP rq:queue:ralf-default 1"),
        ("producer", "HSET rq:worker:x state busy"),
        ("producer", "SUBSCRIBE rq:pubsub:x"),
        ("producer", "CONFIG GET dir"),
        ("worker", "FLUSHALL"),
        ("worker", "SET other 1"),
        ("janitor", "BLPOP rq:queue:ralf-default 1"),
        ("janitor", "SUBSCRIBE rq:pubsub:x"),
        ("deliverer", "HSET ralf:job:j1 state succeeded"),
        ("deliverer", "GET ralf:verdict:j1"),
        ("deliverer", "LPUSH rq:queue:ralf-default x"),
        ("deliverer", "SUBSCRIBE ralf:watch:j1"),
        ("reader", "SET ralf:verdict:j1 x"),
        ("reader", "GET ralf:evidence:j1"),
        ("reader", "HGETALL ralf:job:j1"),
        ("reader", "XSETID ralf:verdicts 1-0"),
        ("reader", "XGROUP DESTROY ralf:verdicts review"),
        ("reader", "XGROUP SETID ralf:verdicts review 0"),
        ("reader", "XTRIM ralf:verdicts MAXLEN 0"),
    ],
)
def test_a_role_is_refused_what_other_roles_may_do(users: dict[str, str], role: str, command: str):
    """Redis refuses it, not Ralf."""
    with Redis.from_url(users[role]) as redis:
        with pytest.raises((NoPermissionError, ResponseError), match=r"(?i)perm"):
            redis.execute_command(*command.split())


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
