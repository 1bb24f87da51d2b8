"""Push what the outbox holds: signed, retried for three days, at least once.

The format is Standard Webhooks 1.0.  The body is short (a receiver fetches the whole verdict by its
job's id) and the same at each attempt, and so is webhook-id: by it a receiver recognises a
repeated push.  The signature is over id, time and the exact bytes of the body.  All secrets of the
id that the callback names sign, so that a secret can be rotated; without a secret nothing is sent.

    2xx             delivered
    410             the endpoint is disabled for its tenant; the delivery is a dead letter
    429, 502-504    tried again by the schedule, or when Retry-After says, if that is later
    anything else   tried again by the schedule; redirects too, they are not followed
    forbidden URL   a dead letter at once: the same guard as for uploads (egress.py)

The end of a job and an alert of a session put a delivery into the outbox in the same script that
makes them true.  A deliverer leases what it takes: it may die at any point, and the delivery is due
again after the lease; at worst it is pushed twice, under the same id.  Several deliverers may run.

One push may take webhook_timeout_s in all.  How many threads an endpoint gets depends on its last
push: a new or slow endpoint gets a few, a quick one any number, a failing one a single thread.  One
tenant's endpoints that are not quick share a part of the threads.  So neither an endpoint nor a
tenant can hold up the others.
"""

import base64
import binascii
import email.utils
import json
import random
import threading
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import structlog
from redis.exceptions import RedisError
from standardwebhooks import Webhook

from ralf.worker import telemetry
from ralf.worker.service.egress import Egress, EgressDenied, EgressFailed
from ralf.worker.service.records import Delivery
from ralf.worker.service.store import Store, decoded
from ralf.worker.settings import Settings, SettingsError

log = structlog.get_logger()

# A receiver may name any time: without a bound a delivery could wait for years.
RETRY_AFTER_MOST_S = 86400.0
# Standard Webhooks slows down at 429, 502 and 504; HTTP defines Retry-After for 503.
BUSY = frozenset({429, 502, 503, 504})
THREADS = 32
SHARE = {"new": 4, "quick": THREADS, "slow": 6, "failing": 1}
TENANT_SHARE = 8
"""Threads of one tenant's endpoints that are not quick: 40 hosts that hang hold no more."""
SLOW_S = 2.0
PUT_OFF_S = 0.5
"""A delivery that got no thread waits this long, and is not counted as tried.  For a failing
endpoint it waits three quarters of a push's timeout."""
POLL_S = 0.5
LEASE_SPARE_S = 10.0
"""A taken delivery is due again after three timeouts and this."""
# Of headers and body together.
ANSWER_BYTES = 1 << 16
POLITE_BYTES = 4096
"""This much of an answer is read, so that the receiver can finish sending; none of it is kept."""


# the outbox


class Outbox:
    """Deliveries in Redis: due, in flight, or dead."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.redis: Any = store.redis
        self._dead = store.key("dead")
        self._disabled = store.key("endpoints", "disabled")

    def take(self, limit: int, lease_s: float, *, now: float | None = None) -> list[Delivery]:
        """Take due deliveries and count this attempt.

        Each is due again after the lease, unless it is settled before.
        """
        return [
            Delivery.read(_pairs(flat)) for flat in self.store.call("take", now, limit, lease_s)
        ]

    def delivered(self, delivery_id: str) -> None:
        """Settled: forget it.

        By a script, as every write here: with its memory full Redis refuses a transaction, and the
        same push would be sent again and again.
        """
        self.store.call("forget", None, "outbox", delivery_id)

    def postpone(self, delivery_id: str, due_at: float, error: str) -> None:
        """Try again at that time; does nothing when it was settled meanwhile."""
        self.store.call("settle", None, delivery_id, "outbox", due_at, error)

    def put_off(self, delivery_id: str, due_at: float) -> None:
        """Give a taken one back untried; the attempt that `take` counted is subtracted again."""
        self.store.call("put_off", None, delivery_id, due_at)

    def bury(self, delivery_id: str, error: str, *, now: float | None = None) -> None:
        """Give up: a dead letter, kept until it is redelivered or dropped."""
        self.store.call("settle", None, delivery_id, "dead", self._at(now), error)

    def dead(self) -> list[Delivery]:
        """The dead letters, the latest first."""
        ids = [decoded(member) for member in self.redis.zrevrange(self._dead, 0, -1)]
        stored = [self.store.hash(self._record(delivery_id)) for delivery_id in ids]
        return [Delivery.read(entry) for entry in stored if entry]

    def redeliver(self, delivery_id: str, *, now: float | None = None) -> bool:
        """Put a dead letter back, due at once, attempts counted anew; False if there is none."""
        return bool(self.store.call("revive", now, delivery_id))

    def drop(self, delivery_id: str) -> bool:
        """Forget a dead letter."""
        return bool(self.store.call("forget", None, "dead", delivery_id))

    def disable_endpoint(self, tenant: str, url: str, *, now: float | None = None) -> None:
        """Push nothing to this address any more: it answered 410 Gone."""
        self.store.call("disable", now, f"{tenant} {url}")

    def enable_endpoint(self, tenant: str, url: str) -> bool:
        """Push to it again; False if it was not disabled."""
        return bool(self.redis.hdel(self._disabled, f"{tenant} {url}"))

    def endpoint_disabled(self, tenant: str, url: str) -> bool:
        """Whether it answered 410 and nobody has enabled it since."""
        return bool(self.redis.hexists(self._disabled, f"{tenant} {url}"))

    def disabled_endpoints(self) -> list[tuple[str, str]]:
        """Tenant and address of each."""
        names = sorted(decoded(name) for name in self.redis.hkeys(self._disabled))
        return [(tenant, url) for tenant, _, url in (name.partition(" ") for name in names)]

    def _record(self, delivery_id: str) -> str:
        return self.store.key("delivery", delivery_id)

    def _at(self, now: float | None) -> float:
        return self.store.now() if now is None else now


def _pairs(flat: Sequence[Any]) -> dict[str, str]:
    texts = [decoded(part) for part in flat]
    return dict(zip(texts[::2], texts[1::2], strict=True))


# the body and its signature


class Secrets:
    """The signing secrets by id, checked when they are read and never printed."""

    def __init__(self, entries: Sequence[str]) -> None:
        self._hooks: dict[tuple[str, str], list[Webhook]] = {}
        for number, entry in enumerate(entries, 1):
            name, _, secret = entry.partition("=")
            tenant, _, secret_id = name.partition("/")
            if not tenant or not secret_id or not 24 <= _length(secret) <= 64:
                raise SettingsError(
                    f"RALF_WEBHOOK_SECRETS: entry {number} should be TENANT/secret_id=whsec_ and "
                    "the base64 of 24 to 64 random bytes; the tenant * is every tenant"
                )
            # One id twice is a rotation: both secrets sign.
            self._hooks.setdefault((tenant, secret_id), []).append(Webhook(secret))

    def sign(self, tenant: str, secret_id: str, message_id: str, at: datetime, body: str) -> str:
        """One signature for each secret of that id that this tenant may use; empty without one.

        A tenant that could name another's secret could make pushes that the other's receiver
        believes.  `at` is in UTC.
        """
        hooks = self._hooks.get((tenant, secret_id)) or self._hooks.get(("*", secret_id), [])
        return " ".join(hook.sign(message_id, at, body) for hook in hooks)


def _length(secret: str) -> int:
    """Bytes of key in whsec_…; 0 when it is not one."""
    kind, _, text = secret.partition("_")
    padded = text + "=" * (-len(text) % 4)
    try:
        return len(base64.b64decode(padded, validate=True)) if kind == "whsec" else 0
    except binascii.Error:
        return 0


def webhook_body(delivery: Delivery, most: int) -> str | None:
    """{type, timestamp, data}, the same at each attempt; None when it needs more than `most` bytes.

    Only a failure's message may be long: it is cut.
    """
    text = _json(delivery, delivery.data)
    message = delivery.data.get("message")
    if len(text.encode()) > most and isinstance(message, str):

        def cut(kept: int) -> str:
            return _json(delivery, {**delivery.data, "message": message[:kept] + "…"})

        # The limit is in bytes and the cut in characters: one needs up to four bytes, or six as an
        # escape in JSON.
        fits = bisect_right(range(len(message)), most, key=lambda kept: len(cut(kept).encode()))
        text = cut(max(0, fits - 1))
    return text if len(text.encode()) <= most else None


def _json(delivery: Delivery, data: Mapping[str, object]) -> str:
    when = datetime.fromtimestamp(delivery.created_at, UTC).isoformat(timespec="milliseconds")
    document = {"type": delivery.event, "timestamp": when, "data": data}
    return json.dumps(document, ensure_ascii=False, separators=(",", ":"))


# pushing


@dataclass(frozen=True)
class PushResult:
    """How one push ended."""

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
        self._manner: dict[str, Literal["quick", "slow", "failing"]] = {}
        self._free = threading.Event()

    def run_forever(self, stop: threading.Event) -> None:
        """Push until stop is set; pushes that are under way then end first."""
        with ThreadPoolExecutor(THREADS, thread_name_prefix="push") as pool:
            while not stop.is_set():
                self._beat()
                try:
                    taken = self.take_due(pool)
                except RedisError as error:
                    log.warning("redis.unreachable", error=str(error))
                    taken = 0
                if not taken:
                    # A thread that becomes free ends the wait early.
                    self._free.wait(POLL_S)
                    self._free.clear()

    def run_once(self) -> int:
        """Push what is due now and wait for it; gives how many deliveries were taken."""
        with ThreadPoolExecutor(THREADS, thread_name_prefix="push") as pool:
            return self.take_due(pool)

    def take_due(self, pool: ThreadPoolExecutor) -> int:
        """Give free threads to due deliveries; gives how many were taken, to push or to put off."""
        with self._lock:
            free = THREADS - self._running.total()
        # Take no more than there are threads for: what waits in the pool would use up its lease
        # there.
        if free <= 0:
            return 0
        lease = 3 * self.settings.webhook_timeout_s + LEASE_SPARE_S
        now = self.now()
        taken = self.outbox.take(free, lease, now=now)
        for delivery in taken:
            endpoint = _endpoint(delivery)
            manner = self._admitted(endpoint, delivery.tenant)
            if manner:
                failing = manner == "failing"
                wait = 0.75 * self.settings.webhook_timeout_s if failing else PUT_OFF_S
                # At random times, or all that were put off together would come back together.
                self.outbox.put_off(delivery.id, now + wait * random.uniform(0.5, 1.5))
            else:
                pool.submit(self._handle, delivery, endpoint)
        return len(taken)

    def _admitted(self, endpoint: str, tenant: str) -> str:
        """Count one more push to this endpoint and give ""; when the endpoint already has its share
        of threads, give how it behaved instead: new, quick, slow or failing; or tenant, when the
        tenant's endpoints have their share."""
        with self._lock:
            manner = self._manner.get(endpoint, "new")
            if self._running[endpoint] >= SHARE[manner]:
                return manner
            if manner != "quick" and self._not_quick(tenant) >= TENANT_SHARE:
                return "tenant"
            self._running[endpoint] += 1
            return ""

    def _not_quick(self, tenant: str) -> int:
        """Pushes under way to the tenant's endpoints that are new, slow or failing."""
        return sum(
            count
            for endpoint, count in self._running.items()
            if endpoint.startswith(f"{tenant} ") and self._manner.get(endpoint) != "quick"
        )

    def _handle(self, delivery: Delivery, endpoint: str) -> None:
        """In a thread of the pool: push, settle, and give the thread back whatever happens."""
        began = time.monotonic()
        # Until it has succeeded: an exception must not leave the endpoint as quick.
        manner: Literal["quick", "slow", "failing"] = "failing"
        try:
            result = self.push(delivery)
            took = time.monotonic() - began
            if result.kind == "delivered":
                manner = "quick" if took < SLOW_S else "slow"
            self._settle(delivery, result, took)
        except RedisError as error:  # it is due again after its lease, under the same id
            log.warning("redis.unreachable", delivery=delivery.id, error=str(error))
        except Exception:  # the pool would swallow it; the lease brings the delivery back
            log.exception("webhook.broke", delivery=delivery.id)
        finally:
            with self._lock:
                self._running[endpoint] -= 1
                if not self._running[endpoint]:
                    # A Counter keeps zeros: it would grow with every new endpoint.
                    del self._running[endpoint]
                self._manner[endpoint] = manner
                # Tenants choose the addresses, so their number has no bound. A forgotten one is
                # new again.
                if len(self._manner) > 10_000:
                    self._manner.clear()
            self._free.set()

    # one push

    def push(self, delivery: Delivery) -> PushResult:
        """Send it once."""
        # At each push: another deliverer may have got the 410.
        if self.outbox.endpoint_disabled(delivery.tenant, delivery.url):
            return PushResult(
                "dead", "the endpoint answered 410 before; ralf deliver --enable uses it again"
            )
        body = webhook_body(delivery, self.settings.webhook_max_body)
        if body is None:
            return PushResult(
                "dead", f"its body has more than {self.settings.webhook_max_body} bytes"
            )
        # The header has whole seconds, and the signature must be over the same number.
        at = datetime.fromtimestamp(int(self.now()), UTC)
        signature = self.secrets.sign(delivery.tenant, delivery.secret_id, delivery.id, at, body)
        if not signature:
            return PushResult(
                "dead",
                f"RALF_WEBHOOK_SECRETS has no secret {delivery.secret_id!r} for tenant "
                f"{delivery.tenant}, and nothing is sent unsigned; add it, then: "
                "ralf deliver --redeliver",
            )
        headers = {
            "Content-Type": "application/json",
            "webhook-id": delivery.id,
            "webhook-timestamp": str(int(at.timestamp())),
            "webhook-signature": signature,
        }
        return self._send(delivery.url, headers, body.encode())

    def _send(self, url: str, headers: Mapping[str, str], body: bytes) -> PushResult:
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
            return PushResult("dead", f"forbidden: {error}")
        except EgressFailed as error:
            return PushResult("retry", str(error))
        with answer:
            answer.drain(POLITE_BYTES)
        return self._judged(answer.status, answer.header("Retry-After"))

    def _judged(self, status: int, retry_after: str) -> PushResult:
        if 200 <= status < 300:
            return PushResult("delivered", "", status)
        if status == 410:
            return PushResult("gone", "the endpoint answered 410 Gone and is disabled", status)
        if 300 <= status < 400:
            return PushResult("retry", f"answered {status}; redirects are not followed", status)
        wait = self._asked_wait(retry_after) if status in BUSY else 0.0
        return PushResult("retry", f"answered {status}", status, wait)

    def _asked_wait(self, text: str) -> float:
        """Retry-After in seconds, as a number or a date; 0 when it is neither, never over a day."""
        # isdigit alone takes signs such as ² too, on which float() fails.
        if text.isascii() and text.isdigit():
            return min(float(text), RETRY_AFTER_MOST_S)
        try:
            at = email.utils.parsedate_to_datetime(text).timestamp()
        except (ValueError, OverflowError):
            return 0.0
        return min(max(0.0, at - self.now()), RETRY_AFTER_MOST_S)

    # after the push

    def _settle(self, delivery: Delivery, result: PushResult, took_s: float) -> None:
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
            # First: if this process dies before the dead letter is written, the next attempt finds
            # the endpoint disabled and does not push again.
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
    # A URL with a user is refused only when it is pushed to, and is never logged.
    return "/".join(url.split("/", 3)[:3]).rpartition("@")[2]


def _endpoint(delivery: Delivery) -> str:
    return f"{delivery.tenant} {_host(delivery.url)}"
