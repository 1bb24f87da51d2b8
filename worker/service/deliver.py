"""Push what the outbox holds: signed, retried for three days, at least once.

Standard Webhooks 1.0.  The body is thin (the verdict is fetched by its job's id) and the same at
each attempt; so is webhook-id, by which a receiver tells a repeated push.  Each secret of the id
that the callback names signs, so that a secret can be rotated; without one nothing is sent.

    2xx             delivered
    410             the endpoint is disabled for its tenant; the delivery is a dead letter
    429, 502-504    tried again by the schedule, or when Retry-After says, if that is later
    anything else   tried again by the schedule; redirects too, they are not followed
    forbidden URL   a dead letter at once: the same guard as for uploads (egress.py)

A push has webhook_timeout_s in all.  Threads are shared out by how an endpoint behaved last: a new
one gets a few, a quick one any, a slow or failing one a single thread, so that it starves nobody.
Several deliverers may run: what one takes is leased.
"""

import email.utils
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

import structlog
from redis.exceptions import RedisError

from ralf.worker import telemetry
from ralf.worker.service.egress import Egress, EgressDenied, EgressFailed
from ralf.worker.service.outbox import Outbox
from ralf.worker.service.records import Delivery
from ralf.worker.service.signing import Secrets, body_of
from ralf.worker.service.store import Store
from ralf.worker.settings import Settings

log = structlog.get_logger()

RETRY_AFTER_MOST_S = 86400.0
BUSY = frozenset({429, 502, 503, 504})
THREADS = 32
SHARE = {"new": 4, "quick": THREADS, "slow": 1}
SLOW_S = 2.0
PUT_OFF_S = 0.5
"""How long a delivery waits that got no thread; it is not counted as tried.  For a slow endpoint
three quarters of a push's timeout."""
POLL_S = 0.5
LEASE_SPARE_S = 10.0
"""A taken delivery is due again after three timeouts and this."""
ANSWER_BYTES = 1 << 16
POLITE_BYTES = 4096
"""So much of an answer is read, so that the other side can finish what it says; none is kept."""


@dataclass(frozen=True)
class Result:
    """What one push came to."""

    kind: Literal["delivered", "retry", "dead", "gone"]
    detail: str
    status: int = 0
    retry_after_s: float = 0.0


class Deliverer:
    """Takes what is due and pushes it, until told to stop."""

    def __init__(
        self,
        store: Store,
        settings: Settings,
        *,
        egress: Egress | None = None,
        clock: Callable[[], float] | None = None,
        jitter: Callable[[], float] = lambda: random.uniform(0.9, 1.1),
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        self.outbox, self.settings = Outbox(store), settings
        self.egress = egress or Egress(settings)
        self.secrets = Secrets(settings.webhook_secrets)
        self.now = clock or store.now
        self._jitter, self._beat = jitter, beat
        self._lock = threading.Lock()
        self._running: Counter[str] = Counter()
        self._manner: dict[str, Literal["quick", "slow"]] = {}
        self._free = threading.Event()

    def run_forever(self, stop: threading.Event) -> None:
        """Until stop is set; pushes that are under way then end first."""
        with ThreadPoolExecutor(THREADS, thread_name_prefix="push") as pool:
            while not stop.is_set():
                self._beat()
                try:
                    taken = self.take_due(pool)
                except RedisError as error:
                    log.warning("redis.unreachable", error=str(error))
                    taken = 0
                if not taken:
                    self._free.wait(POLL_S)
                    self._free.clear()

    def run_once(self) -> int:
        """Push what is due now, and wait for it; how many deliveries were taken up."""
        with ThreadPoolExecutor(THREADS, thread_name_prefix="push") as pool:
            return self.take_due(pool)

    def take_due(self, pool: ThreadPoolExecutor) -> int:
        """Give free threads to due deliveries; how many were taken up, to push or to put off."""
        with self._lock:
            free = THREADS - self._running.total()
        if free <= 0:
            return 0
        lease = 3 * self.settings.webhook_timeout_s + LEASE_SPARE_S
        now = self.now()
        taken = self.outbox.take(free, lease, now=now)
        for delivery in taken:
            endpoint = _endpoint(delivery)
            manner = self._admitted(endpoint)
            if manner:
                wait = 0.75 * self.settings.webhook_timeout_s if manner == "slow" else PUT_OFF_S
                self.outbox.put_off(delivery.id, now + wait * random.uniform(0.5, 1.5))
            else:
                pool.submit(self._handle, delivery, endpoint)
        return len(taken)

    def _admitted(self, endpoint: str) -> str:
        """Count a push in, or say how the endpoint is that has its share already."""
        with self._lock:
            manner = self._manner.get(endpoint, "new")
            if self._running[endpoint] >= SHARE[manner]:
                return manner
            self._running[endpoint] += 1
            return ""

    def _handle(self, delivery: Delivery, endpoint: str) -> None:
        """In a thread of the pool: push, settle, and leave whatever happens."""
        began = time.monotonic()
        manner: Literal["quick", "slow"] = "slow"
        try:
            result = self.push(delivery)
            took = time.monotonic() - began
            if result.kind == "delivered" and took < SLOW_S:
                manner = "quick"
            self._settle(delivery, result, took)
        except RedisError as error:  # it is due again after its lease, under the same id
            log.warning("redis.unreachable", delivery=delivery.id, error=str(error))
        except Exception:  # the pool would swallow it; the lease brings the delivery back
            log.exception("webhook.broke", delivery=delivery.id)
        finally:
            with self._lock:
                self._running[endpoint] -= 1
                if not self._running[endpoint]:
                    del self._running[endpoint]
                self._manner[endpoint] = manner
                if len(self._manner) > 10_000:
                    self._manner.clear()
            self._free.set()

    # one push

    def push(self, delivery: Delivery) -> Result:
        """Send it once."""
        if self.outbox.endpoint_disabled(delivery.tenant, delivery.url):
            return Result(
                "dead", "the endpoint answered 410 before; ralf deliver --enable uses it again"
            )
        body = body_of(delivery, self.settings.webhook_max_body)
        if body is None:
            return Result("dead", f"its body has more than {self.settings.webhook_max_body} bytes")
        at = datetime.fromtimestamp(int(self.now()), UTC)
        signature = self.secrets.sign(delivery.secret_id, delivery.id, at, body)
        if not signature:
            return Result(
                "dead",
                f"RALF_WEBHOOK_SECRETS has no secret {delivery.secret_id!r}, and nothing is sent "
                "unsigned; add it, then: ralf deliver --redeliver",
            )
        headers = {
            "Content-Type": "application/json",
            "webhook-id": delivery.id,
            "webhook-timestamp": str(int(at.timestamp())),
            "webhook-signature": signature,
        }
        return self._send(delivery.url, headers, body.encode())

    def _send(self, url: str, headers: Mapping[str, str], body: bytes) -> Result:
        deadline = time.monotonic() + self.settings.webhook_timeout_s
        try:
            target = self.egress.target(url)
            answer = self.egress.request(
                "POST",
                target,
                headers=headers,
                body=body,
                deadline=deadline,
                allowance=ANSWER_BYTES,
            )
        except EgressDenied as error:
            return Result("dead", f"forbidden: {error}")
        except EgressFailed as error:
            return Result("retry", str(error))
        with answer:
            answer.drain(POLITE_BYTES)
        return self._judged(answer.status, answer.header("Retry-After"))

    def _judged(self, status: int, retry_after: str) -> Result:
        if 200 <= status < 300:
            return Result("delivered", "", status)
        if status == 410:
            return Result("gone", "the endpoint answered 410 Gone and is disabled", status)
        if 300 <= status < 400:
            return Result("retry", f"answered {status}; redirects are not followed", status)
        wait = self._asked_wait(retry_after) if status in BUSY else 0.0
        return Result("retry", f"answered {status}", status, wait)

    def _asked_wait(self, text: str) -> float:
        """Retry-After in seconds, as a number or a date; 0 when it is neither, never over a day."""
        if text.isascii() and text.isdigit():
            return min(float(text), RETRY_AFTER_MOST_S)
        try:
            at = email.utils.parsedate_to_datetime(text).timestamp()
        except (ValueError, OverflowError):
            return 0.0
        return min(max(0.0, at - self.now()), RETRY_AFTER_MOST_S)

    # what becomes of it

    def _settle(self, delivery: Delivery, result: Result, took_s: float) -> None:
        facts = {
            "delivery": delivery.id,
            "event_type": delivery.event,
            "tenant": delivery.tenant,
            "subject": delivery.subject,
            "host": _host(delivery.url),
            "attempt": delivery.attempts,
            "status": result.status or None,
            "took_s": round(took_s, 3),
        }
        metric = telemetry.METRICS.deliveries
        if result.kind == "delivered":
            self.outbox.delivered(delivery.id)
            metric.labels("delivered").inc()
            log.info("webhook.delivered", **facts)
            return
        if result.kind == "gone":
            self.outbox.disable_endpoint(delivery.tenant, delivery.url, now=self.now())
        delays = self.settings.webhook_delays_s
        if result.kind == "retry" and delivery.attempts <= len(delays):
            wait = delays[delivery.attempts - 1] * self._jitter()
            wait = max(wait, result.retry_after_s)
            self.outbox.postpone(delivery.id, self.now() + wait, result.detail)
            metric.labels("failed").inc()
            log.warning("webhook.failed", **facts, error=result.detail, retry_s=round(wait, 1))
            return
        why = result.detail
        if result.kind == "retry":
            why = f"gave up after {delivery.attempts} attempts; the last: {why}"
        self.outbox.bury(delivery.id, why, now=self.now())
        metric.labels("gave_up").inc()
        log.error("webhook.gave_up", **facts, error=why)


def _host(url: str) -> str:
    """Scheme, host and port: a path may hold a token."""
    return "/".join(url.split("/", 3)[:3]).rpartition("@")[2]


def _endpoint(delivery: Delivery) -> str:
    return f"{delivery.tenant} {_host(delivery.url)}"
