"""Deliveries that are due, in flight, or dead.

The end of a job and an alert of a session put a delivery here in the same script that makes them
true.  A taken delivery is due again after its lease, so a deliverer may die at any point: at worst
it is pushed twice, under the same id.
"""

from collections.abc import Sequence
from typing import Any

from ralf.worker.service.records import Delivery
from ralf.worker.service.store import Store, decoded


class Outbox:
    """The deliverer's door to Redis."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.redis: Any = store.redis
        self._due = store.key("outbox")
        self._dead = store.key("dead")
        self._disabled = store.key("endpoints", "disabled")

    def take(self, limit: int, lease_s: float, *, now: float | None = None) -> list[Delivery]:
        """Deliveries that are due, this attempt counted; each is due again after the lease unless
        it is settled."""
        return [
            Delivery.read(_pairs(flat)) for flat in self.store.call("take", now, limit, lease_s)
        ]

    def delivered(self, delivery_id: str) -> None:
        """Settled: forget it."""
        with self.redis.pipeline() as pipe:
            pipe.zrem(self._due, delivery_id)
            pipe.delete(self._record(delivery_id))
            pipe.execute()

    def postpone(self, delivery_id: str, due_at: float, error: str) -> None:
        """Try again then; nothing, when it was settled meanwhile."""
        self.store.call("settle", None, delivery_id, "outbox", due_at, error)

    def put_off(self, delivery_id: str, due_at: float) -> None:
        """Give a taken one back untried; the attempt that `take` counted is taken off again."""
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
        with self.redis.pipeline() as pipe:
            pipe.zrem(self._dead, delivery_id)
            pipe.delete(self._record(delivery_id))
            return bool(pipe.execute()[0])

    def disable_endpoint(self, tenant: str, url: str, *, now: float | None = None) -> None:
        """Push nothing to this address any more: it answered 410 Gone."""
        self.redis.hset(self._disabled, f"{tenant} {url}", self._at(now))

    def enable_endpoint(self, tenant: str, url: str) -> bool:
        """Push to it again; False if it was not disabled."""
        return bool(self.redis.hdel(self._disabled, f"{tenant} {url}"))

    def endpoint_disabled(self, tenant: str, url: str) -> bool:
        """Whether it answered 410 and nobody enabled it since."""
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
