"""Sees to the child between two jobs: there, ready, not worn; and loads it again when it is not.

A child that does not load is tried again with growing pauses, since the reason may pass (a full
device, a model that is being published); after some tries the worker gives up and its supervisor
takes over.  Heartbeats go on meanwhile.
"""

import json
import time
from collections.abc import Callable

import structlog

from ralf.kernels.manifest import Reference
from ralf.worker.errors import ModelUnavailable
from ralf.worker.service import messages
from ralf.worker.service.child_process import Link
from ralf.worker.service.wakeup import Orders
from ralf.worker.telemetry import Metrics

log = structlog.get_logger()

TRIES = 5
LONGEST_REST_S = 30.0


class Stable:
    """One worker's care for its child."""

    def __init__(
        self, link: Link, orders: Orders, metrics: Metrics, *, turn: Callable[[], None]
    ) -> None:
        self._link, self._orders, self._metrics, self._turn = link, orders, metrics, turn
        self._shown: messages.Ready | None = None

    def open(self) -> None:
        """The first child; a model that cannot be loaded is told at once, not tried again."""
        why = self._load()
        if why:
            raise ModelUnavailable(f"the child could not load its model: {why}")

    def see_to_child(self) -> None:
        """Before a job is taken; raises ModelUnavailable after the last try."""
        link = self._link
        if link.alive and link.wait(0) is None:  # it may die between jobs as well
            log.warning("child.died", how=link.closed())
            self._metrics.restarts.labels("died").inc()
        self._show()
        reason = link.worn() if link.ready is not None else ""
        if link.ready is not None and not reason:
            return
        if reason:
            log.info("child.recycled", reason=reason, jobs=link.jobs_done, rss=link.rss())
            self._metrics.restarts.labels(reason).inc()
            link.retire()
        self._load_patiently()

    def mourn(self, reason: str) -> None:
        """After a job: count a child that did not outlive it."""
        if self._link.alive:
            self._metrics.child_rss.set(self._link.rss())
        else:
            self._metrics.restarts.labels(reason or "died").inc()

    def _load_patiently(self) -> None:
        self._metrics.ready.set(0)
        why = ""
        for tried in range(1, TRIES + 1):
            why = self._load()
            if not why or self._orders.stopping:
                return
            log.error("child.unready", tried=tried, error=why)
            self._metrics.restarts.labels("load").inc()
            self._rest(min(2.0**tried, LONGEST_REST_S) if tried < TRIES else 0.0)
        raise ModelUnavailable(f"the child could not load its model {TRIES} times: {why}")

    def _load(self) -> str:
        """Start the child and wait until it is ready; says why it is not."""
        link = self._link
        link.open()
        allowed = link.settings.child_start_timeout_s
        end = time.monotonic() + allowed
        while link.ready is None and not self._orders.stopping:
            said = link.wait(min(0.5, end - time.monotonic()))
            self._turn()
            if said is None or link.refusal:
                why, how = link.refusal, link.closed()
                return why or f"it {how}: {link.last_words()[-300:]}"
            if time.monotonic() > end:
                link.kill()
                link.closed()
                return f"it was not ready after {allowed:g} s"
        self._show()
        return ""

    def _show(self) -> None:
        """The child's facts, when they are new: a new child, or another model in it."""
        ready = self._link.ready
        if ready is None or ready is self._shown:
            return
        self._shown = ready
        facts = json.loads(ready.facts)
        for model, known in facts.pop("references", {}).items():
            reference = Reference.model_validate(known)  # a child's word is checked
            self._metrics.drift.refer(model, reference.edges, reference.counts)
        self._metrics.engine_is(facts)
        self._metrics.ready.set(1)
        self._metrics.child_rss.set(self._link.rss())
        log.info("child.ready", pid=self._link.pid, rss=self._link.rss(), **facts)

    def _rest(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self._orders.stopping:
            self._turn()
            time.sleep(0.1)
