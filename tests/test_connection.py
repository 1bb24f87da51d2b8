"""The addresses that Redis may have: TLS with a private CA, and a primary behind Sentinel."""

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from redis import Redis
from redis.exceptions import ConnectionError as NoConnection

from ralf.worker.chaos import bodies
from ralf.worker.client import QueueUnavailable
from ralf.worker.client import connect as connect_client
from ralf.worker.doctor import examine_redis, settings_shown
from ralf.worker.service.connection import connect
from ralf.worker.service.store import NotReplicated, Store
from ralf.worker.settings import Settings
from tests.documents import a_job, a_verdict
from tests.redis_server import RedisServer, executable, program_of
from tests.test_failover import ends_over, free_port
from tests.test_store import claim
from tests.waiting import until
from tests.workers import QUICK, a_worker, ended

NAME = "queue"
"""What the Sentinels call the primary."""


@pytest.fixture(params=["installed", "bundled"])
def program(request: pytest.FixtureRequest) -> str:
    """Each Redis that the tests have."""
    return program_of(request.param)


def a_server(program: str) -> RedisServer:
    """One that can be replicated, without the pause before a replica gets its copy."""
    return RedisServer(port=free_port(), program=program, repl_diskless_sync_delay="0")


# TLS


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A private CA and a server's certificate for 127.0.0.1 that it has signed."""
    folder = tmp_path_factory.mktemp("ca")
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost")
    names = "-CAcreateserial -extfile names"
    key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
    for command in (
        f"req -x509 {key} -days 2 -subj /CN=private -keyout ca.key -out ca.pem",
        f"req {key} -subj /CN=redis -keyout redis.key -out redis.csr",
        f"x509 -req -days 2 -in redis.csr -CA ca.pem -CAkey ca.key {names} -out redis.pem",
    ):
        subprocess.run(["openssl", *command.split()], cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture
def secure_redis(certificates: Path) -> Iterator[str]:
    """The address of a Redis that speaks TLS only."""
    if "BUILD_TLS" not in tls_support():
        pytest.skip("this redis-server was built without TLS; install the distribution's")
    port = free_port()
    server = RedisServer(
        tls_port=str(port),
        tls_cert_file=str(certificates / "redis.pem"),
        tls_key_file=str(certificates / "redis.key"),
        tls_ca_cert_file=str(certificates / "ca.pem"),
        tls_auth_clients="no",
    )
    server.start()
    yield f"rediss://127.0.0.1:{port}/0"
    server.stop()


def tls_support() -> str:
    """BUILD_TLS, if the server takes an option of TLS."""
    tried = subprocess.run(
        [executable(), "--tls-port", "0", "--port", "0", "--tls-protocols", "none"],
        capture_output=True,
        text=True,
        timeout=10,
    )
    return "" if "Bad directive" in tried.stdout + tried.stderr else "BUILD_TLS"


def test_a_private_ca_is_trusted_when_its_file_is_named(secure_redis: str, certificates: Path):
    """A backend, a whole worker and the doctor reach Redis with RALF_REDIS_CA_FILE."""
    settings = replace(QUICK, redis_url=secure_redis, redis_ca_file=str(certificates / "ca.pem"))
    client = connect_client(settings=settings)
    worker = a_worker(settings)
    try:
        store = client.store
        store.submit([a_job("1", tag="sleep:0.1")], function=bodies.PREFIX + "sleep")
        verdict = client.result("j1", timeout=60)
    finally:
        worker.terminate()
        code = ended(worker)
    client.close()
    (redis, _) = examine_redis(settings)

    assert (verdict.job_id, code) == ("j1", 0)
    assert redis.state == "broken"  # it keeps nothing; but it was asked
    assert "no append-only file" in redis.found


def test_without_the_file_the_certificate_is_refused(secure_redis: str):
    """No connection to a server that nobody vouches for."""
    client = connect_client(secure_redis, settings=Settings(), timeout=5)
    with pytest.raises(QueueUnavailable, match=r"(?i)certificate"):
        client.submit("https://cdn.example/1.mp4", token="1")
    client.close()


# Sentinel


class Watched:
    """A primary, its replica, and two Sentinels that watch them."""

    def __init__(self, program: str, stack: ExitStack) -> None:
        self.primary, self.replica = a_server(program), a_server(program)
        for server in (self.primary, self.replica):
            stack.callback(server.stop)
            server.start()
        self.follow()
        ports = [free_port(), free_port()]
        for port in ports:
            self._watch(program, port, stack)
        hosts = ",".join(f"127.0.0.1:{port}" for port in ports)
        self.url = f"redis+sentinel://{hosts}/{NAME}/0"
        for port in ports:
            with Redis(port=port) as sentinel:
                until(lambda: knows_all(sentinel), sentinel.sentinel_masters)

    def follow(self) -> None:
        """Make the replica one, and wait until it has all."""
        with Redis.from_url(self.replica.url) as replica:
            replica.replicaof("127.0.0.1", self.primary.port)
            until(lambda: replica.info("replication")["master_link_status"] == "up")

    def _watch(self, program: str, port: int, stack: ExitStack) -> None:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ralf-sentinel-")))
        (folder / "sentinel.conf").write_text(
            f"port {port}\nbind 127.0.0.1\ndir {folder}\n"
            f"sentinel monitor {NAME} 127.0.0.1 {self.primary.port} 2\n"
            f"sentinel down-after-milliseconds {NAME} 300\n"
            f"sentinel failover-timeout {NAME} 2000\n"
        )
        process = subprocess.Popen(
            [program, folder / "sentinel.conf", "--sentinel"], stdout=subprocess.DEVNULL
        )
        stack.callback(process.wait)
        stack.callback(process.kill)

        def answers() -> bool:
            try:
                with Redis(port=port) as sentinel:
                    return bool(sentinel.ping())
            except NoConnection:
                return False

        until(answers)


def knows_all(sentinel: "Redis") -> bool:
    """Whether it has found the replica and the other Sentinel: before, no fail-over happens."""
    state = sentinel.sentinel_masters()[NAME]
    return bool(state["num-slaves"] == 1 and state["num-other-sentinels"] == 1)


@pytest.fixture
def watched(program: str) -> Iterator[Watched]:
    with ExitStack() as stack:
        yield Watched(program, stack)


def test_all_jobs_end_when_the_primary_dies_behind_sentinel(watched: Watched):
    """kill -9 during a job: clients and workers ask the Sentinels who is primary, and go on."""
    settings = replace(QUICK, redis_url=watched.url, redis_wait_replicas=1)
    store = Store(connect(watched.url, attempts=40), settings)

    def fail_over() -> Store:
        watched.primary.kill()
        return Store(store.redis, replace(settings, redis_wait_replicas=0))

    assert ends_over(fail_over, store, 6) == (0, 6)
    with Redis.from_url(watched.replica.url) as new:
        assert new.hget("ralf:job:j5", "state") == b"succeeded"


@pytest.mark.parametrize(
    "url",
    [
        "redis+sentinel://host:26379",
        "redis+sentinel:///queue/0",
        "redis+sentinel://host/queue/first",
    ],
)
def test_an_address_of_sentinel_that_lacks_a_part_is_refused(url: str):
    """And the message shows the form, but no password."""
    with pytest.raises(ValueError, match=r"redis.sentinel://USER:PASSWORD@HOST:PORT") as caught:
        connect(url.replace("//", "//me:secret@"))
    assert "secret" not in str(caught.value)


def test_the_parts_of_an_address_of_sentinel_arrive():
    """User and password of Redis, others for the Sentinels, IPv6, a port left out."""
    url = "rediss+sentinel://me:a%40b@[::1]:7000,two/queue/3?sentinel_password=x"
    client = connect(url, ca_file="/ca.pem")
    pool = client.connection_pool
    sentinels = pool.sentinel_manager.sentinels
    own = [one.connection_pool.connection_kwargs for one in sentinels]

    assert [(one["host"], one["port"]) for one in own] == [("::1", 7000), ("two", 26379)]
    assert {one["password"] for one in own} == {"x"}
    assert {one["ssl_ca_certs"] for one in own} == {"/ca.pem"}
    assert pool.service_name == "queue"
    wanted = {"db": 3, "username": "me", "password": "a@b", "ssl_ca_certs": "/ca.pem"}
    assert wanted.items() <= pool.connection_kwargs.items()
    shown = dict(settings_shown(Settings(redis_url=url)))["RALF_REDIS_URL"]
    assert shown == "rediss+sentinel://…@[::1]:7000,two/queue/3"


# WAIT


def test_a_submission_that_no_replica_confirms_is_refused(program: str):
    """Stored on the primary alone is not enough where RALF_REDIS_WAIT_REPLICAS asks for one."""
    primary, replica = a_server(program), a_server(program)
    primary.start(), replica.start()
    settings = Settings(redis_url=primary.url, redis_wait_replicas=1)
    client = connect_client(settings=settings)
    try:
        with pytest.raises(QueueUnavailable, match="0 of 1 replicas confirmed"):
            client.submit_many([a_job("1")])
        with pytest.raises(QueueUnavailable, match="0 of 1 replicas confirmed"):
            client.submit_many([a_job("1")])  # known already, and still on one machine only
        with Redis.from_url(replica.url) as other:
            other.replicaof("127.0.0.1", primary.port)
            until(lambda: other.info("replication")["master_link_status"] == "up")
            (again,) = client.submit_many([a_job("1")])
            assert again.existing
            running = claim(client.store)
            assert client.store.end(running, a_verdict())
            client.store.replicated()
            assert other.hget("ralf:job:j1", "state") == b"succeeded"
        replica.kill()
        with pytest.raises(NotReplicated):
            client.store.replicated()
    finally:
        client.close()
        primary.stop(), replica.stop()
