"""/metrics, /healthz and /readyz of one process, for Prometheus and the kubelet.

    /healthz  200 while the process's own loop turns; 503 once it has not for three heartbeats
    /readyz   200 while it can take a job: the child's model is checked, the work folder has room;
              says what confines the child, what does not, and what makes it slow
    /metrics  Prometheus' text, the queue's figures read from Redis at that moment

The server's thread is always alive, so an answer alone would prove nothing: it reads when the
process's loop last turned.  It binds to settings.http_host, and repeats nothing that a client sent.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import structlog
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from redis.exceptions import RedisError

from ralf.worker.service.store import Store
from ralf.worker.settings import Settings
from ralf.worker.telemetry import Count, Metrics

log = structlog.get_logger()


class Health:
    """The state behind the two checks."""

    def __init__(
        self,
        settings: Settings,
        *,
        pulse: Callable[[], float],
        ready: Callable[[], bool] = lambda: True,
        remarks: Callable[[], str] = lambda: "",
    ) -> None:
        self._allowed_s = 3 * max(settings.heartbeat_s, 5.0)
        self._pulse, self._ready, self._remarks = pulse, ready, remarks

    def live(self) -> tuple[bool, str]:
        """Whether the loop turns."""
        silent = time.monotonic() - self._pulse()
        return silent <= self._allowed_s, f"the loop turned {silent:.1f} s ago"

    def ready(self) -> tuple[bool, str]:
        """Whether a job would be taken now."""
        live, how = self.live()
        ready = live and self._ready()
        return (
            ready,
            "; ".join(filter(None, ("ready", self._remarks())))
            if ready
            else f"no checked model, no room in the work folder, or stopping; {how}",
        )


def queue_counts(store: Store) -> Callable[[], Iterator[Count]]:
    """The gauges that are read from Redis at a scrape."""

    def counts() -> Iterator[Count]:
        try:
            found = store.counts()
        except RedisError as error:
            # telemetry.py does not import redis: an OSError here means that Redis is down.
            raise OSError(str(error)) from error
        for name, by_priority in (
            ("queued_jobs", found.waiting),
            ("started_jobs", found.running),
            ("workers", found.workers),
        ):
            for priority, value in by_priority.items():
                yield Count(name, value, (("priority", priority),))
        yield Count("queue_oldest_age_seconds", found.oldest_s)
        yield Count("put_off_jobs", found.due)
        yield Count("quarantined_jobs", found.quarantined)
        yield Count("outbox_due", found.outbox)
        yield Count("dead_letters", found.dead)
        if found.memory_share is not None:
            yield Count("redis_memory_share", found.memory_share)

    return counts


@contextmanager
def serving(settings: Settings, health: Health, metrics: Metrics) -> Iterator[int]:
    """Answer on settings.http_port while the block runs; gives the port, 0 when it is off."""
    if not settings.http_port:
        yield 0
        return
    with serving_at(settings.http_host, settings.http_port, health, metrics) as port:
        yield port


@contextmanager
def serving_at(host: str, port: int, health: Health, metrics: Metrics) -> Iterator[int]:
    """The same on any address; port 0 takes a free one."""

    class Handler(BaseHTTPRequestHandler):
        # By default each answer would name the version of Python.
        server_version, sys_version = "ralf", ""
        # A client that connects and sends nothing would hold its thread for ever.
        timeout = 10.0

        def do_GET(self) -> None:
            match self.path.partition("?")[0]:
                case "/metrics":
                    self._answer(200, generate_latest(metrics.registry), CONTENT_TYPE_LATEST)
                case "/healthz":
                    self._check(*health.live())
                case "/readyz":
                    self._check(*health.ready())
                case _:
                    self._answer(404, b"there are /metrics, /healthz and /readyz\n")

        def _check(self, well: bool, how: str) -> None:
            self._answer(200 if well else 503, f"{how}\n".encode())

        def _answer(self, code: int, body: bytes, kind: str = "text/plain; charset=utf-8") -> None:
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Silent: a probe every few seconds is not worth a line."""

    class Server(ThreadingHTTPServer):
        # An answer that is under way must not keep the process from ending.
        daemon_threads = True

    with Server((host, port), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, name="http", daemon=True)
        thread.start()
        log.info("http.started", host=host, port=server.server_port)
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join(5.0)
