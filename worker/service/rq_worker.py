"""The RQ worker whose horse never leaves the stable: one warm child in place of a fork per job.

RQ's own worker forks for each job, and CUDA does not survive a fork; its SimpleWorker sends no
heartbeat during a job and cannot interrupt native code.  This one keeps RQ's loop, names and
registries, so that `rq info`, `rq suspend` and stop-job work, and overrides what RQ 2.12 lets one
override: dequeue, execute_job, heartbeats, kill_horse, request_stop.

    dequeue   BLMOVE into RQ's intermediate list: a job popped by a worker that dies is found there
    check     the function must be on our list, the payload JSON, the argument the job's own id
    begin     the store's claim, RQ's registries in one pipeline
    errand    fetch, child, ending: see errand.py
    settle    the store's one script, then RQ's registries again

No signal handler and no other thread touches Redis or the child's socket: they leave an order and
wake the loop.  One queue per process, which is what RQ's safe dequeue needs.  RQ's callbacks,
webhooks, dependents, retries and results are not used, whatever a queue's entry may say.
"""

import json
import os
import re
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import structlog
from redis.exceptions import RedisError, ResponseError
from rq import Queue, Worker, worker_registration
from rq.executions import Execution
from rq.job import Job as RqJob
from rq.serializers import JSONSerializer
from rq.suspension import is_suspended
from rq.utils import now as utc_now
from rq.utils import utcformat
from rq.worker import WorkerStatus

from ralf.worker.contract import Failure, Priority
from ralf.worker.errors import ModelUnavailable
from ralf.worker.service.child_process import Link
from ralf.worker.service.ending import Ending
from ralf.worker.service.entry import checked, write_refused
from ralf.worker.service.job_run import Errand
from ralf.worker.service.jobs import Body
from ralf.worker.service.stable import Stable
from ralf.worker.service.store import Store
from ralf.worker.service.wakeup import Orders
from ralf.worker.telemetry import METRICS, Metrics

log = structlog.get_logger()

POP_S = 1
"""An idle worker blocks in Redis for so long, then looks around: signals, child, refill."""
LISTENER_END_S = 5.0
"""RQ's listening thread has so long to end; it is a daemon, so nothing hangs on it."""
_JOB_ID = re.compile(r"^[A-Za-z0-9_-]{1,64}$")


class Horse(Worker):  # type: ignore[misc]  # rq is untyped
    """One worker process: takes one job at a time to its child."""

    _stop_requested: bool
    _stopped_job_id: str | None

    def __init__(
        self,
        store: Store,
        link: Link,
        *,
        priority: Priority,
        table: dict[str, Body],
        orders: Orders | None = None,
        metrics: Metrics = METRICS,
    ) -> None:
        self.store, self.link, self.table, self.metrics = store, link, table, metrics
        self.settings = store.settings
        self.priority: Priority = priority
        self.orders = orders or Orders()
        self.stable = Stable(link, self.orders, metrics, turn=self._look_around)
        self.broken = False
        """Whether the loop ended for a fault of ours; the process then exits with an error."""
        self._ttl = max(1, round(self.settings.heartbeat_ttl_s))
        self._beaten = self._looked = -1e9
        self._current: RqJob | None = None
        name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        super().__init__(
            [store.queue(priority)],
            name=re.sub(r"[^A-Za-z0-9_-]", "-", name),
            connection=store.redis,
            serializer=JSONSerializer,
            worker_ttl=self._ttl,
            job_monitoring_interval=max(1, round(self.settings.heartbeat_s)),
            log_job_description=False,
        )
        self.queue: Queue = self.queues[0]

    def start(self) -> None:
        """Listen to signals and load the child; raises ModelUnavailable."""
        self._install_signal_handlers()
        self.stable.open()

    # RQ's loop, bent to ours

    def bootstrap(self, *_: Any, **__: Any) -> None:
        """RQ's, without its log handlers: structlog has the floor."""
        self.register_birth()
        self.subscribe()
        self.set_state(WorkerStatus.STARTED)
        log.info("worker.started", worker=self.name, queue=self.queue.name, pid=os.getpid())

    @property
    def should_run_maintenance_tasks(self) -> bool:
        """The janitor does what is needed, sooner."""
        return False

    def check_for_suspension(self, burst: bool) -> None:
        """Asked at each turn of the dequeue, not only once before it."""

    def _suspended(self) -> bool:
        """`rq suspend` holds this worker too; asked at most once a second."""
        if time.monotonic() - self._looked < POP_S:
            return False
        self._looked = time.monotonic()
        if not is_suspended(self.connection, self):
            return False
        time.sleep(POP_S)
        return True

    def dequeue_job_and_maintain_ttl(
        self, timeout: int | None, max_idle_time: int | None = None
    ) -> tuple[RqJob, Queue] | None:
        """The next entry of the queue; None to end the loop (stopping, or a burst is over)."""
        idle_since = time.monotonic()
        while not self._stop_requested:
            try:
                self.stable.see_to_child()
                self._look_around()
                if self._stop_requested:
                    break
                if self._suspended():
                    continue
                job = self._pop(block=timeout is not None)
            except RedisError as error:
                self._wait_for_redis(error)
                continue
            except ModelUnavailable as error:
                log.error("worker.gave_up", error=str(error))
                self.broken = True
                return None
            if job is not None:
                return job, self.queue
            if timeout is None:
                return None
            if max_idle_time is not None and time.monotonic() - idle_since >= max_idle_time:
                return None
        return None

    def _look_around(self) -> None:
        self.orders.pulse = time.monotonic()
        self.heartbeat()

    def _pop(self, *, block: bool) -> RqJob | None:
        source, popped = self.queue.key, self.queue.intermediate_queue_key
        if block:
            job_id = self.connection.blmove(source, popped, POP_S)
        else:
            job_id = self.connection.lmove(source, popped)
        if job_id is None:
            if not self.store.refill(self.priority):
                return None
            job_id = self.connection.lmove(source, popped)
        return None if job_id is None else self._entry(job_id)

    def _entry(self, job_id: bytes) -> RqJob | None:
        """RQ's job of that id, of which only `data` is ever read; nonsense is thrown away."""
        text = job_id.decode(errors="replace")
        if not _JOB_ID.match(text):
            log.error("job.refused", job_id=text[:80], reason="not an id that Ralf gives")
            self.metrics.refused.inc()
            self.connection.lrem(self.queue.intermediate_queue_key, 0, job_id)
            return None
        job = RqJob(text, connection=self.connection, serializer=self.serializer)
        job.origin = self.queue.name
        return job

    def _wait_for_redis(self, error: RedisError) -> None:
        log.warning("redis.unreachable", error=str(error))
        self.orders.pulse = time.monotonic()
        time.sleep(1.0)

    # one job

    def execute_job(self, job: RqJob, queue: Queue) -> None:
        """Check, claim, run, settle; whatever the job does, the worker goes on."""
        try:
            self._execute(job)
        except RedisError as error:
            # The claim, if there was one, runs out, and the janitor puts the job back.
            self._wait_for_redis(error)
        except BaseException:
            self.broken = True
            raise

    def _execute(self, job: RqJob) -> None:
        raw = self._raw(job)
        function, fault = checked(raw, job.id, self.table)
        claim = self.store.begin(job.id, self.name, alone=not self.link.shared)
        if claim is not None and raw is None:
            self.store.hand_back(claim)  # RQ's entry was deleted; this writes it anew
            return
        if fault:
            if claim is not None:
                self.store.end(claim, Failure(code="bad_request", message=fault))
            self._refuse(job, fault)
        if fault or claim is None:
            return
        self._register(job)
        ended = False
        try:
            errand = Errand(
                claim,
                self.table[function],
                function,
                link=self.link,
                store=self.store,
                orders=self.orders,
                beat=self.heartbeat,
            )
            ending = errand.walk()
            self.stable.mourn(ending.code)
            ended = self._settled(errand, ending)
        finally:
            self._unregister(job, well=ended)

    def _raw(self, job: RqJob) -> bytes | None:
        """RQ's payload; None when the entry is gone."""
        try:
            raw: bytes | None = self.connection.hget(job.key, "data")
        except ResponseError:  # somebody put another type there
            raw = b""
        return raw

    def _refuse(self, job: RqJob, fault: str) -> None:
        """Failed in RQ's eyes too, without running any callback or webhook that it names."""
        log.error("job.refused", job_id=job.id, reason=fault)
        self.metrics.refused.inc()
        with self.connection.pipeline() as pipe:
            write_refused(pipe, job, fault, worker=self.name)
            pipe.lrem(self.queue.intermediate_queue_key, 0, job.id)
            self.increment_failed_job_count(pipe)
            pipe.execute()

    def _settled(self, errand: Errand, ending: Ending) -> bool:
        """Write the ending, as often as Redis needs to be asked: a verdict is not thrown away."""
        while True:
            try:
                return errand.settle(ending) in {"succeeded", "cancelled", "expired"}
            except RedisError as error:
                if self.orders.hurry:
                    raise
                self._wait_for_redis(error)

    def _register(self, job: RqJob) -> None:
        """In RQ's books; an outage there is no reason not to run a job that is ours."""
        self._current, self._horse_pid, self._began = job, self.link.pid, utc_now()
        self.metrics.running.set(1)
        with self._books() as pipe:
            self.execution = Execution.create(job, self._ttl, pipe, worker_name=self.name)
            self.set_state(WorkerStatus.BUSY, pipeline=pipe)
            self.set_current_job_id(job.id, pipeline=pipe)

    def _unregister(self, job: RqJob, *, well: bool) -> None:
        self._current, self._horse_pid = None, 0
        self.metrics.running.set(0)
        with self._books() as pipe:
            self.cleanup_execution(job, pipe)
            self.set_state(WorkerStatus.IDLE, pipeline=pipe)
            (self.increment_successful_job_count if well else self.increment_failed_job_count)(pipe)
            self.increment_total_working_time(utc_now() - self._began, pipe)

    @contextmanager
    def _books(self) -> Iterator[Any]:
        """One round trip for what is only shown to people."""
        try:
            with self.connection.pipeline(transaction=False) as pipe:
                yield pipe
                pipe.execute()
        except RedisError as error:
            log.warning("redis.unreachable", error=str(error))

    def kill_horse(self, sig: signal.Signals = signal.SIGKILL) -> None:
        """RQ's commands stop-job and kill-horse, from its listening thread."""
        self.orders.stopped = "stop-job" if self._stopped_job_id else "kill-horse"
        self._stopped_job_id = None
        self.link.kill()

    # heartbeats

    def get_heartbeat_ttl(self, job: RqJob) -> int:
        """The same for every job, however long it may take."""
        return self._ttl

    def heartbeat(self, timeout: int | None = None, pipeline: Any = None) -> None:
        """RQ's records of this worker and its job stay alive; at most each heartbeat_s."""
        early = time.monotonic() - self._beaten < self.settings.heartbeat_s
        if early or self.birth_date is None:
            return
        job = self._current
        try:
            with self.connection.pipeline(transaction=False) as pipe:
                pipe.hset(self.key, "last_heartbeat", utcformat(utc_now()))
                pipe.expire(self.key, self._ttl)
                if job is not None and self.execution is not None:
                    self.execution.heartbeat(job.started_job_registry, self._ttl, pipeline=pipe)
                forgotten = pipe.execute()[0] == 1
            if forgotten:  # paused for long, or Redis lost it
                self.last_heartbeat = utc_now()
                with self.connection.pipeline() as pipe:
                    pipe.hset(self.key, mapping=self.serialize())
                    worker_registration.register(self, pipe)
                    pipe.execute()
        except RedisError as error:
            log.warning("redis.unreachable", error=str(error))
            return
        self._beaten = time.monotonic()

    # stopping

    def _install_signal_handlers(self) -> None:
        """Only from the main thread, as signal() demands; a test may run the loop elsewhere."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self.request_stop)
            signal.signal(signal.SIGTERM, self.request_stop)

    def request_stop(self, signum: int, frame: FrameType | None) -> None:
        """The first signal drains: the job may end within grace_s. The second hands it back."""
        if self._stop_requested:
            self.orders.hurry = True
        else:
            self._stop_requested = self.orders.stopping = True
            self.orders.drain_since = time.monotonic()
        self.orders.wake()

    def unsubscribe(self) -> None:
        """End RQ's listening thread, which then closes its own connection.

        RQ's own way unsubscribes and closes from this thread, beside the other one that reads: the
        thread then mostly waits on, which costs a second each time, and on a slow machine both
        take the same connection apart.  A message wakes it instead.
        """
        listener = self.pubsub_thread
        if listener is None:
            return
        listener.stop()
        self.connection.publish(self.pubsub_channel_name, json.dumps({"command": "wake"}))
        listener.join(LISTENER_END_S)

    def teardown(self) -> None:
        """Leave nothing behind but the job's state."""
        try:
            super().teardown()
        except RedisError as error:
            log.warning("redis.unreachable", error=str(error))
        log.info("worker.stopped", worker=self.name, broken=self.broken)
