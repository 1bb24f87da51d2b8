"""The Lua script in Redis, and the connection it runs over.

jobs.lua, claims.lua and repairs.lua are one script, the settings written before them as constants;
each call names one operation, which is one atomic step.
"""

import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from redis import Redis, exceptions
from redis.backoff import EqualJitterBackoff
from redis.retry import Retry

from ralf.worker.contract import Priority
from ralf.worker.settings import Settings

PRIORITIES: tuple[Priority, ...] = ("high", "default")
RQ_TTL_S = 3600
"""What RQ shows of an ended job is kept for so long."""
TRIES = 3


def connect(url: str, *, attempts: int = 10) -> Redis:
    """A client of Redis that rides out a restart of some ten seconds: every operation here may be
    sent twice."""
    return Redis.from_url(
        url,
        socket_timeout=5.0,  # redis-py before 8 waits for ever; a blocking pop asks for a second
        retry=Retry(EqualJitterBackoff(base=0.05, cap=2.0), attempts),
        retry_on_error=[
            exceptions.ConnectionError,
            exceptions.TimeoutError,
            exceptions.BusyLoadingError,
        ],
        health_check_interval=30,
    )


class Script:
    """Runs operations; Redis keeps the script by its hash, and is given it anew when it lost it."""

    def __init__(self, redis: Any, settings: Settings) -> None:
        self._redis = redis
        self._script: Any = redis.register_script(source(settings))

    def run(self, operation: str, now: float | None, *arguments: Any, client: Any = None) -> Any:
        """One operation, by the clock of Redis unless `now` is given; with a pipeline as `client`
        it is sent with the rest of it."""
        at = "" if now is None else repr(now)
        client = self._redis if client is None else client
        return self._script(args=[operation, at, *arguments], client=client)

    def run_many(self, operation: str, now: float | None, calls: Sequence[Sequence[Any]]) -> Any:
        """One operation for each list of arguments, in one round trip.

        redis-py gives Redis the script before it sends them, and sends them again, without it, to
        a Redis that was started anew meanwhile; so this begins again.  All may be sent twice.
        """
        for left in reversed(range(TRIES)):
            with self._redis.pipeline(transaction=False) as pipe:
                for arguments in calls:
                    self.run(operation, now, *arguments, client=pipe)
                try:
                    return pipe.execute()
                except exceptions.NoScriptError:
                    if not left:
                        raise
        raise AssertionError  # the last try returns or raises


def queue_prefix(settings: Settings) -> str:
    """What the names of RQ's queues begin with; the priority follows."""
    return settings.redis_prefix.replace(":", "-")


def source(settings: Settings) -> str:
    """The script's text."""
    constants = {
        "prefix": settings.redis_prefix,
        "queue": queue_prefix(settings),
        "lease": settings.heartbeat_ttl_s,
        "reclaim": settings.reclaim_after_s,
        "retries": settings.retries,
        "quarantine_after": settings.quarantine_after,
        "job_ttl": settings.job_ttl_s,
        "token_ttl": settings.token_ttl_s,
        "verdict_ttl": settings.verdict_ttl_s,
        "evidence_ttl": settings.evidence_ttl_s,
        "session_ttl": settings.session_ttl_s,
        "crash_ttl": settings.crash_ttl_s,
        "stream": settings.stream_max_len,
        # RQ's own clock is only a last resort: the parent ends a job that is late.
        "rq_timeout": int(settings.timeout_most_s) + 120,
        "rq_ttl": RQ_TTL_S,
    }
    lines = [f"  {name} = {json.dumps(value)}," for name, value in constants.items()]
    lines.append("  priorities = {" + ", ".join(json.dumps(name) for name in PRIORITIES) + "},")
    folder = files("ralf.worker.service").joinpath("lua")
    parts = [folder.joinpath(f"{name}.lua").read_text() for name in ("jobs", "claims", "repairs")]
    return "\n".join(["local C = {", *lines, "}", *parts])


def decoded(value: Any) -> str:
    """What Redis answered, as a string."""
    return value.decode() if isinstance(value, bytes) else str(value)


if __name__ == "__main__":  # for clients in other languages; see docs/integration.md
    print(source(Settings.from_environment()), end="")
