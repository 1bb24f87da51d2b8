"""Before each job: is the child there, ready, and fit for the job?  If not, it is replaced.

A child that does not load is tried again with growing pauses, since the reason may pass (a full
device, a model that is being published).  After some tries the worker gives up, and whoever
supervises the worker takes over.

A version that is promoted while the child runs is loaded by a confined child, which can start no
compiler: on a GPU without a plan it runs uncompiled.  Then another child loads beside it, which
takes minutes, and takes its place between two jobs.
"""

import time

import structlog

from ralf.worker.errors import ModelUnavailable
from ralf.worker.service import messages
from ralf.worker.service.child_process import ChildProcess
from ralf.worker.service.wakeup import Wakeup
from ralf.worker.telemetry import Metrics

log = structlog.get_logger()

LOAD_TRIES = 5
LONGEST_PAUSE_S = 30.0
RETRY_NEXT_S = 300.0
"""A child beside the first that did not load is tried again after this time."""


class ChildSupervisor:
    """Makes sure that a fit child is ready before each job."""

    def __init__(self, child: ChildProcess, wakeup: Wakeup, metrics: Metrics) -> None:
        self._child, self._wakeup, self._metrics = child, wakeup, metrics
        self._published: messages.Ready | None = None
        self._next_end = 0.0
        """time.monotonic() by which the next child must be ready."""
        self._next_not_before = 0.0

    def start(self) -> None:
        """The first child; a model that cannot be loaded is reported at once."""
        why = self._load()
        if why:
            raise ModelUnavailable(f"the child could not load its model: {why}")

    def ensure_ready(self) -> None:
        """Before a job is taken; raises ModelUnavailable after the last try."""
        child = self._child
        if child.alive and child.wait(0) is None:  # it may die between jobs as well
            log.warning("child.died", how=child.detach())
            self._metrics.restarts.labels("died").inc()
        self._replace_uncompiled()
        self.publish_facts()
        reason = child.recycle_reason() if child.ready is not None else ""
        if child.ready is not None and not reason:
            return
        if reason:
            log.info("child.recycled", reason=reason, jobs=child.jobs_done, rss=child.rss())
            self._metrics.restarts.labels(reason).inc()
            # Asked and not killed: a shared child first ends the running jobs of other parents.
            child.retire()
        self._load_with_retries()

    def _replace_uncompiled(self) -> None:
        """Start a child that may compile beside one that may not; switch when it is ready."""
        child, now = self._child, time.monotonic()
        if child.next is None:
            if child.uncompiled and now >= self._next_not_before and child.start_next():
                self._next_end = now + child.settings.start_allowed()
            return
        said = child.next.wait(0)
        if not child.uncompiled:  # it died or was replaced, and its successor did compile
            child.drop_next()
        elif child.next.ready is not None:
            log.info("child.recycled", reason="uncompiled", jobs=child.jobs_done, rss=child.rss())
            self._metrics.restarts.labels("uncompiled").inc()
            child.switch()
        elif said is None or child.next.load_error or now > self._next_end:
            why = child.next.load_error
            how = child.drop_next()
            self._next_not_before = now + RETRY_NEXT_S
            log.error("child.next_unready", error=why or f"it {how}", stays="uncompiled")

    def after_job(self, reason: str) -> None:
        """Show the child's memory, or count a child that did not survive the job."""
        if self._child.alive:
            self._metrics.child_rss.set(self._child.rss())
        else:
            self._metrics.restarts.labels(reason or "died").inc()

    def _load_with_retries(self) -> None:
        self._metrics.ready.set(0)
        why = ""
        for tried in range(1, LOAD_TRIES + 1):
            why = self._load()
            if not why or self._wakeup.stopping:
                return
            log.error("child.unready", tried=tried, error=why)
            self._metrics.restarts.labels("load").inc()
            self._pause(min(2.0**tried, LONGEST_PAUSE_S) if tried < LOAD_TRIES else 0.0)
        raise ModelUnavailable(f"the child could not load its model {LOAD_TRIES} times: {why}")

    def _load(self) -> str:
        """Start the child and wait until it is ready; says why it is not."""
        child = self._child
        child.open()
        allowed = child.settings.start_allowed()
        end = time.monotonic() + allowed
        while child.ready is None and not self._wakeup.stopping:
            # In short waits: a load may take minutes, in which signals and /healthz need the loop.
            received = child.wait(min(0.5, end - time.monotonic()))
            self._wakeup.pulse = time.monotonic()
            if received is None or child.load_error:
                why, how = child.load_error, child.detach()
                return why or f"it {how}: {child.last_output()[-300:]}"
            if time.monotonic() > end:
                child.kill()
                child.detach()
                return f"it was not ready after {allowed:g} s"
        self.publish_facts()
        return ""

    def publish_facts(self) -> None:
        """Show the child's facts when they are new: a new child, or another model in it."""
        ready = self._child.ready
        if ready is None or ready is self._published:
            return
        self._published = ready
        for model, reference in ready.facts.references.items():
            self._metrics.drift.set_reference(model, reference.edges, reference.counts)
        facts = ready.facts.model_dump(exclude={"references"})
        self._metrics.engine_is(facts)
        self._metrics.ready.set(1)
        self._metrics.child_rss.set(self._child.rss())
        log.info("child.ready", pid=self._child.pid, rss=self._child.rss(), **facts)

    def _pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self._wakeup.stopping:
            self._wakeup.pulse = time.monotonic()
            time.sleep(0.1)
