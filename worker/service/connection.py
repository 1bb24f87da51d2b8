"""Connections to Redis: by address or through Sentinel, with TLS, and with a bound on waiting.

    redis://USER:PASSWORD@HOST:6379/0      one server
    rediss://…                             the same with TLS; RALF_REDIS_CA_FILE names a private CA
    unix:///run/redis.sock                 a socket of this machine
    redis+sentinel://USER:PASSWORD@HOST:26379,HOST:26379/NAME/0
                                           the primary that Sentinel knows as NAME; rediss+sentinel
                                           speaks TLS to Redis and to the Sentinels

USER and PASSWORD are those of Redis.  The Sentinels' own come as ?sentinel_username=…&
sentinel_password=….
"""

import math
import threading
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from redis import Redis, exceptions
from redis.backoff import EqualJitterBackoff
from redis.retry import Retry
from redis.sentinel import Sentinel

SENTINEL_PORT = 26379
SENTINEL_TIMEOUT_S = 1.0
"""For one Sentinel's answer; the next one is asked after that."""

# One for each thread: a connection pool is shared between threads, and each call has a deadline of
# its own.
_call = threading.local()


class GaveUp(exceptions.RedisError):
    """Redis did not answer in the time that a call may take."""


class _RetryUntil(Retry):
    """Retries, but not after `seconds` from the start of the outermost call.

    redis-py retries to connect inside each retry of a command, so their numbers multiply: with
    three retries each, a Redis that accepts connections and says nothing blocked a call for 83 s.
    """

    def __init__(self, retries: int, seconds: float) -> None:
        super().__init__(EqualJitterBackoff(base=0.05, cap=2.0), retries)
        self._seconds = seconds

    def call_with_retry(self, do: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
        """redis-py's, but the clock is read before each try."""
        outermost = getattr(_call, "until", None) is None
        if outermost:
            _call.until = time.monotonic() + self._seconds

        def in_time() -> Any:
            if time.monotonic() >= _call.until:
                raise GaveUp(f"no answer within {self._seconds:g} s")
            return do()

        try:
            return super().call_with_retry(in_time, *args, **kwargs)
        finally:
            if outermost:
                # Also after an error: with the old time the thread's next call would be over
                # before it began.
                _call.until = None


def connect(
    url: str, *, attempts: int = 10, timeout_s: float = math.inf, ca_file: str = ""
) -> Redis:
    """A client that waits out a restart or a fail-over of Redis of some ten seconds.

    It sends a command again when the answer was lost, so every operation here may run twice.  No
    call lasts much longer than timeout_s.  ca_file: the certificates that a rediss: address is
    checked with; empty means those of the system.  Raises ValueError for an address of another
    form.
    """
    options: dict[str, Any] = {
        # redis-py before 8 waits for ever; a blocking pop asks for a second
        "socket_timeout": min(5.0, timeout_s / 2),
        "socket_connect_timeout": min(5.0, timeout_s / 2),
        "retry": _RetryUntil(attempts, timeout_s),
        "retry_on_error": [
            exceptions.ConnectionError,
            exceptions.TimeoutError,
            exceptions.BusyLoadingError,
            # After a fail-over this connection leads to what is now a replica: connect again.
            exceptions.ReadOnlyError,
        ],
        "health_check_interval": 30,
    }
    scheme = url.partition(":")[0]
    if ca_file and scheme.startswith("rediss"):
        options["ssl_ca_certs"] = ca_file
    if scheme in {"redis+sentinel", "rediss+sentinel"}:
        return _through_sentinel(url, options)
    return Redis.from_url(url, **options)


def _through_sentinel(url: str, options: dict[str, Any]) -> Redis:
    """A client of the primary; each new connection asks the Sentinels anew who that is."""
    parts = urlsplit(url)
    name, _, database = parts.path.strip("/").partition("/")
    credentials, _, hosts = parts.netloc.rpartition("@")
    user, _, password = (unquote(part) for part in credentials.partition(":"))
    sentinels = [_address(host) for host in hosts.split(",") if host]
    if not name or not sentinels or not (database or "0").isdecimal():
        raise ValueError(
            "expected redis+sentinel://USER:PASSWORD@HOST:PORT,HOST:PORT/NAME/DATABASE, got "
            f"{parts.scheme}://{hosts}{parts.path}"
        )
    own = {
        "socket_timeout": min(SENTINEL_TIMEOUT_S, options["socket_timeout"]),
        "socket_connect_timeout": min(SENTINEL_TIMEOUT_S, options["socket_timeout"]),
        # The next Sentinel is asked instead.
        "retry": Retry(EqualJitterBackoff(), 0),
    }
    if parts.scheme == "rediss+sentinel":
        options["ssl"] = own["ssl"] = True
        if "ssl_ca_certs" in options:
            own["ssl_ca_certs"] = options["ssl_ca_certs"]
    queries = dict(parse_qsl(parts.query))
    own |= {
        field: queries[f"sentinel_{field}"]
        for field in ("username", "password")
        if f"sentinel_{field}" in queries
    }
    manager: Any = Sentinel(sentinels, sentinel_kwargs=own)  # type: ignore[no-untyped-call]
    client: Redis = manager.master_for(
        name,
        db=int(database or 0),
        username=user or None,
        password=password or None,
        **options,
    )
    return client


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":") if ":" in text.rpartition("]")[2] else (text, "", "")
    return host.strip("[]"), int(port or SENTINEL_PORT)
