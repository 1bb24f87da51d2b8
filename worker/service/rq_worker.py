"""The RQ worker: one process that takes jobs from Redis and gives them to its warm child.

RQ's own worker forks for each job, and CUDA does not survive a fork.  Its SimpleWorker sends no
heartbeat during a job and cannot interrupt native code.  This one keeps RQ's loop, names and
registries, so that `rq info`, `rq suspend` and stop-job work, and overrides what RQ 2.12 lets one
override: dequeue, execute_job, heartbeats, kill_horse, request_stop.

    dequeue    BLMOVE into RQ's intermediate list: the job of a worker that dies is found there
    check      it must name one of our functions and its own id: see rq_entry.py
    claim      the store's begin, RQ's registries in one pipeline
    run        fetch, child, result: see job_run.py
    store      one script of the store, then RQ's registries again: see run_result.py

Heartbeats come from a thread of their own: see heartbeat.py.  No signal handler touches Redis or
the child's socket: it sets a flag and wakes the loop.  RQ knows one queue per process, as its safe
dequeue needs it; a worker of `default` takes jobs of `backfill` too while its own queue is empty,
so that an upload waits for one such job at most.  RQ's callbacks, webhooks, dependents, retries and
results are not used, whatever a queue's entry may name.
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
from redis.client import PubSub, PubSubWorkerThread
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import OutOfMemoryError, RedisError, ResponseError
from rq import Queue, Worker, worker_registration
from rq.executions import Execution
from rq.job import Job as RqJob
from rq.serializers import JSONSerializer
from rq.suspension import is_suspended
from rq.utils import now as utc_now
from rq.utils import utcformat
from rq.worker import WorkerStatus

from ralf.worker.contract import Failure, Priority, State
from ralf.worker.errors import ModelUnavailable
from ralf.worker.service.child_process import ChildProcess
from ralf.worker.service.child_supervisor import ChildSupervisor
from ralf.worker.service.heartbeat import Heartbeat
from ralf.worker.service.job_run import WORKER_IO, JobRun
from ralf.worker.service.jobs import Body
from ralf.worker.service.records import Claim
from ralf.worker.service.rq_entry import JOB_ID, check_entry, write_refused
from ralf.worker.service.run_result import RunResult, log_finished, store_result
from ralf.worker.service.store import Store
from ralf.worker.service.wakeup import Wakeup
from ralf.worker.service.work_dir import why_unusable
from ralf.worker.telemetry import METRICS, Metrics

log = structlog.get_logger()

POP_S = 1
"""An idle worker blocks in Redis for so long, then checks signals, the child and the queue."""
LISTENER_END_S = 5.0
"""RQ's listening thread has so long to end; it is a daemon, so nothing depends on it."""


class RalfWorker(Worker):  # type: ignore[misc]  # rq is untyped
    """One worker process: takes one job at a time to its child."""

    _stop_requested: bool
    _stopped_job_id: str | None

    def __init__(
        self,
        store: Store,
        child: ChildProcess,
        *,
        priority: Priority,
        table: dict[str, Body],
        wakeup: Wakeup | None = None,
        metrics: Metrics = METRICS,
    ) -> None:
        self.store, self.child, self.table, self.metrics = store, child, table, metrics
        self.settings = store.settings
        self.priority: Priority = priority
        self.serves: tuple[Priority, ...] = (priority,)
        """Whose jobs it takes; those of the second only when the first has none."""
        if priority == "default":
            self.serves = (priority, "backfill")
        self.wakeup = wakeup or Wakeup()
        self.supervisor = ChildSupervisor(child, self.wakeup, metrics)
        self.beats = Heartbeat(store, self.wakeup, rq_beat=self._rq_beat)
        self._rq_lock = threading.Lock()
        """Between a beat and the change of what it keeps alive."""
        self.broken = False
        """Whether the loop ended by an error of ours; the process then exits with an error."""
        # EXPIRE takes whole seconds, and 0 would delete the worker's key at once.
        self._ttl = max(1, round(self.settings.heartbeat_ttl_s))
        # Not 0: time.monotonic() may be small on a machine that has just started.
        self._suspension_read_at = -1e9
        self._current: RqJob | None = None
        # RQ refuses the name of a worker that it still lists.  A container that was killed starts
        # again with the same host name and the same process id, so the name has a random part.
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
        self._rq_queues = {
            name: Queue(store.queue(name), connection=store.redis) for name in self.serves
        }

    def start(self) -> None:
        """Install the signal handlers and load the child; raises ModelUnavailable."""
        # Before the load, which may take two minutes: SIGTERM ends it in order.
        self._install_signal_handlers()
        self.supervisor.start()

    def bootstrap(self, *_: Any, **__: Any) -> None:
        """RQ's own, without its log handlers: structlog logs here."""
        self.register_birth()
        self.set_state(WorkerStatus.STARTED)
        self.subscribe()
        # After the birth: a beat before it would create the worker's key, and RQ refuses to
        # register a name whose key exists.
        self.beats.start()
        log.info("worker.started", worker=self.name, queue=self.queue.name, pid=os.getpid())

    def set_state(self, state: str, pipeline: Any = None) -> None:
        """RQ's own; and RQ's record of this worker expires a lease later.

        RQ gives it a minute more at birth, and no time to live where it writes a record that has
        expired: that of a worker killed before its next heartbeat would stay for ever.
        """
        if pipeline is None:
            with self.connection.pipeline() as pipe:
                self.set_state(state, pipe)
                pipe.execute()
            return
        super().set_state(state, pipeline)
        pipeline.expire(self.key, self._ttl)

    @property
    def should_run_maintenance_tasks(self) -> bool:
        """Never: the janitor repairs what is needed, and sooner."""
        return False

    def check_for_suspension(self, burst: bool) -> None:
        """Nothing: the loop below checks it at each turn, not only once before the dequeue."""

    def _suspended(self) -> bool:
        """`rq suspend` pauses this worker too; read at most once a second, shown by `rq info`."""
        if time.monotonic() - self._suspension_read_at < POP_S:
            return False
        self._suspension_read_at = time.monotonic()
        suspended = bool(is_suspended(self.connection, self))
        if suspended != (self._state == WorkerStatus.SUSPENDED):
            self.set_state(WorkerStatus.SUSPENDED if suspended else WorkerStatus.IDLE)
        if suspended:
            time.sleep(POP_S)
        return suspended

    def _blocked(self) -> bool:
        """A full disk: no job is taken, and /readyz says so, until the work folder has room."""
        if not self.wakeup.blocked:
            return False
        self.wakeup.blocked = why_unusable(self.child.uploads)
        self.metrics.ready.set(0 if self.wakeup.blocked else 1)
        if self.wakeup.blocked:
            time.sleep(POP_S)
        else:
            log.info("worker.unblocked")
        return bool(self.wakeup.blocked)

    def dequeue_job_and_maintain_ttl(
        self, timeout: int | None, max_idle_time: int | None = None
    ) -> tuple[RqJob, Queue] | None:
        """The next entry of the queue; None to end the loop (stopping, or a burst is over)."""
        idle_since = time.monotonic()
        while not self._stop_requested:
            try:
                # The child is ready before a job is popped: while a model loads, for up to two
                # minutes, another worker can take the job.
                self.supervisor.ensure_ready()
                self.wakeup.pulse = time.monotonic()
                # ensure_ready() also returns, without a child, when a signal interrupts the load.
                if self._stop_requested:
                    break
                if self._suspended() or self._blocked():
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

    def _pop(self, *, block: bool) -> RqJob | None:
        """An entry of the own queue, else a backfill's; waits for the own queue where both are
        empty, so that an upload is taken at once and a backfill's job after at most POP_S."""
        try:
            for priority in self.serves:
                job_id = self._listed(priority)
                if job_id is not None:
                    return self._entry(job_id, priority)
            if not block:
                return None
            source = self.queue.key
            job_id = self.connection.blmove(source, self.queue.intermediate_queue_key, POP_S)
        except OutOfMemoryError:
            # With its memory full Redis refuses these two, but not our script.  Queued jobs run on.
            for priority in self.serves:
                job_id = self.store.pop(priority)
                if job_id is not None:
                    return self._entry(job_id, priority)
            # The script does not block: without a pause the loop would spin.
            time.sleep(POP_S if block else 0.0)
            return None
        return None if job_id is None else self._entry(job_id, self.priority)

    def _listed(self, priority: Priority) -> bytes | None:
        """The first entry of RQ's list, filled anew where it is empty."""
        queue = self._rq_queues[priority]
        entry: bytes | None = self.connection.lmove(queue.key, queue.intermediate_queue_key)
        if entry is None and self.store.refill(priority):
            entry = self.connection.lmove(queue.key, queue.intermediate_queue_key)
        return entry

    def _entry(self, job_id: bytes, priority: Priority) -> RqJob | None:
        """RQ's job of that id; of its entry only `data` is ever read. Nonsense is thrown away."""
        queue = self._rq_queues[priority]
        text = job_id.decode(errors="replace")
        if not JOB_ID.fullmatch(text):  # match() with $ takes a newline at the end
            log.error("job.refused", job_id=text[:80], reason="not an id that Ralf gives")
            self.metrics.refused.inc()
            self.connection.lrem(queue.intermediate_queue_key, 0, job_id)
            return None
        # Not RqJob.fetch(): it restores every field of the entry, its callbacks too.
        job = RqJob(text, connection=self.connection, serializer=self.serializer)
        job.origin = queue.name
        return job

    def _wait_for_redis(self, error: RedisError) -> None:
        log.warning("redis.unreachable", error=str(error))
        # A loop that waits for Redis is live: a restart by /healthz would not bring Redis back.
        # The pulse before the sleep counts too, since the failed command may have taken seconds.
        self.beats.failed = True
        self.wakeup.pulse = time.monotonic()
        time.sleep(1.0)
        self.wakeup.pulse = time.monotonic()

    def execute_job(self, job: RqJob, queue: Queue) -> None:
        """Check, claim, run, store; whatever the job does, the worker goes on."""
        try:
            self._execute(job)
        except RedisError as error:
            # If the job was claimed, its lease runs out and the janitor queues it again.
            self._wait_for_redis(error)
        except BaseException:
            # RQ's loop catches everything, logs it and returns as if all were well.
            self.broken = True
            raise

    def _execute(self, job: RqJob) -> None:
        raw, claim = self._claimed(job)
        function, fault = check_entry(raw, job.id, self.table)
        if claim is not None and raw is None:
            self.store.hand_back(claim)  # RQ's entry was deleted; this writes it anew
            return
        if fault:
            if claim is not None:
                self.store.end(claim, Failure(code="bad_request", message=fault))
                self._count_end("failed", "bad_request")
            self._refuse(job, fault)
        if fault or claim is None:
            return
        self._register(job)
        succeeded = False
        try:
            with self.beats.keeping(claim):
                result, outcome = self._run(claim, function)
            log_finished(claim, result, outcome)
            # RQ counts good and bad ends only; a cancel and a deadline are the client's doing.
            succeeded = outcome in {"succeeded", "cancelled", "expired"}
        finally:
            self._unregister(job, well=succeeded)

    def _run(self, claim: Claim, function: str) -> tuple[RunResult, str]:
        """Run the job and store its result, while the heartbeat keeps the lease."""
        result = JobRun(
            claim,
            self.table[function],
            function,
            child=self.child,
            settings=self.settings,
            heartbeat=self.beats,
            wakeup=self.wakeup,
        ).run()
        self.supervisor.after_job(result.code)
        if result.code == WORKER_IO:
            self.wakeup.blocked = result.message
            self.metrics.ready.set(0)
            log.error("worker.blocked", reason=result.message)
        return result, self._store(claim, result)

    def _claimed(self, job: RqJob) -> tuple[bytes | None, Claim | None]:
        """RQ's payload and our claim, asked for again while Redis is away.

        The nonce stays the same: a claim whose answer was lost is still ours.
        """
        nonce = uuid.uuid4().hex
        while True:
            try:
                # The payload first: begin() replaces an entry that is missing or of another type.
                raw, alone = self._raw(job), not self.child.shared
                return raw, self.store.begin(
                    job.id, self.name, alone=alone, nonce=nonce, ended=self._count_end
                )
            except RedisError as error:
                if self._stop_requested:
                    raise
                self._wait_for_redis(error)

    def _count_end(self, state: State, code: str) -> None:
        """A job that ended without a run: log_finished() counts only runs."""
        log.info("job.ended_unrun", state=state, code=code)
        self.metrics.jobs.labels(state, code).inc()

    def _raw(self, job: RqJob) -> bytes | None:
        """RQ's payload; None when the entry is gone."""
        try:
            raw: bytes | None = self.connection.hget(job.key, "data")
        except ResponseError:  # somebody put another type there
            # Not None: an entry of another type is refused, a missing one is written anew.
            raw = b""
        return raw

    def _refuse(self, job: RqJob, fault: str) -> None:
        """Mark it failed for RQ too, without running any callback or webhook that it names."""
        log.error("job.refused", job_id=job.id, reason=fault)
        self.metrics.refused.inc()
        with self.connection.pipeline() as pipe:
            write_refused(pipe, job, fault, worker=self.name)
            popped = Queue(job.origin, connection=self.connection).intermediate_queue_key
            pipe.lrem(popped, 0, job.id)
            self.increment_failed_job_count(pipe)
            pipe.expire(self.key, self._ttl)  # as in set_state()
            pipe.execute()

    def _store(self, claim: Claim, result: RunResult) -> str:
        """Write the result, and try again while Redis is away: a verdict is not thrown away.

        Unless the worker has to exit: then the lease runs out, and the job runs again.
        """
        while True:
            try:
                # Not even tried: a command to a silent Redis takes seconds that the exit has not.
                if self._must_exit and not self.beats.reachable:
                    raise RedisError("Redis does not answer, and the worker has to exit")
                outcome = store_result(self.store, claim, result)
                break
            except RedisError as error:
                if self._must_exit:
                    raise
                self._wait_for_redis(error)
        try:
            self.store.replicated()
        except RedisError as error:
            # The end stands on the primary, and nothing better could be done than to say so.
            log.warning("redis.unreplicated", job_id=claim.job_id, error=str(error))
        return outcome

    @property
    def _must_exit(self) -> bool:
        return self.wakeup.must_leave(self.settings.grace_s)

    def _register(self, job: RqJob) -> None:
        """In RQ's registries; an outage is no reason not to run a job that we have claimed."""
        # RQ's command kill-horse does nothing while this number is 0.
        self._horse_pid, self._began = self.child.pid, utc_now()
        self.metrics.running.set(1)
        with self._rq_lock, self._registries() as pipe:
            self._current = job
            self.execution = Execution.create(job, self._ttl, pipe, worker_name=self.name)
            self.set_state(WorkerStatus.BUSY, pipeline=pipe)
            self.set_current_job_id(job.id, pipeline=pipe)

    def _unregister(self, job: RqJob, *, well: bool) -> None:
        self._horse_pid = 0
        self.metrics.running.set(0)
        with self._rq_lock:
            # Under the lock: a beat that comes between would write the execution that is deleted
            # here, and RQ would show the job as running until its time to live is over.
            self._current = None
            with self._registries() as pipe:
                self.cleanup_execution(job, pipe)
                self.set_state(WorkerStatus.IDLE, pipeline=pipe)
                count = self.increment_successful_job_count if well else None
                (count or self.increment_failed_job_count)(pipe)
                self.increment_total_working_time(utc_now() - self._began, pipe)

    @contextmanager
    def _registries(self) -> Iterator[Any]:
        """One round trip for what RQ's tools show; left out while Redis does not answer."""
        try:
            # Filled even when it is not sent: the calls in the block set fields of this object too.
            with self.connection.pipeline(transaction=False) as pipe:
                yield pipe
                if self.beats.reachable:
                    pipe.execute()
        except RedisError as error:
            self.beats.failed = True
            log.warning("redis.unreachable", error=str(error))

    def _pubsub_exception_handler(
        self, exc: Exception, pubsub: PubSub, pubsub_thread: PubSubWorkerThread
    ) -> None:
        """Keep RQ's command thread through any fault of Redis.

        RQ waits and tries again after a ConnectionError, and lets the thread end on anything else.
        Our connection also raises GaveUp, when Redis was silent for longer than a call may take.
        """
        if isinstance(exc, RedisError):
            exc = RedisConnectionError(str(exc))
        super()._pubsub_exception_handler(exc, pubsub, pubsub_thread)

    def kill_horse(self, sig: signal.Signals = signal.SIGKILL) -> None:
        """RQ's commands stop-job and kill-horse, from its listening thread."""
        # Before the kill: the loop may see the child's end at once, and would take it for a crash.
        self.wakeup.operator_kill = "stop-job" if self._stopped_job_id else "kill-horse"
        self._stopped_job_id = None
        self.child.kill()

    def get_heartbeat_ttl(self, job: RqJob) -> int:
        """The same for every job, however long it may take."""
        return self._ttl

    def heartbeat(self, timeout: int | None = None, pipeline: Any = None) -> None:
        """Nothing: RQ calls this from the loop, and the thread does it."""

    def _rq_beat(self, redis: Any) -> None:
        """Keep RQ's records of this worker and its job alive; called by the heartbeat's thread."""
        with self._rq_lock, redis.pipeline(transaction=False) as pipe:
            pipe.hset(self.key, "last_heartbeat", utcformat(utc_now()))
            pipe.expire(self.key, self._ttl)
            job = self._current
            if job is not None and self.execution is not None:
                self.execution.heartbeat(job.started_job_registry, self._ttl, pipeline=pipe)
            # HSET answers 1 for a new field: the worker's key was gone.
            forgotten = pipe.execute()[0] == 1
        if forgotten:  # paused for long, or Redis lost it
            self.last_heartbeat = utc_now()
            with redis.pipeline() as pipe:
                pipe.hset(self.key, mapping=self.serialize())
                pipe.expire(self.key, self._ttl)
                worker_registration.register(self, pipe)
                pipe.execute()

    def _install_signal_handlers(self) -> None:
        """Only from the main thread, as signal() demands; a test may run the loop elsewhere."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self.request_stop)
            signal.signal(signal.SIGTERM, self.request_stop)

    def request_stop(self, signum: int, frame: FrameType | None) -> None:
        """The first signal drains: the job may end within grace_s. The second hands it back."""
        if self._stop_requested:
            self.wakeup.hand_back_now = True
        else:
            self._stop_requested = self.wakeup.stopping = True
            self.wakeup.drain_since = time.monotonic()
        self.wakeup.wake()

    def unsubscribe(self) -> None:
        """End RQ's listening thread, which then closes its own connection.

        RQ's own way unsubscribes and closes from this thread, beside the other one that reads: the
        thread then mostly waits on, which costs a second each time, and on a slow machine both
        take the same connection apart.  A message wakes it instead.
        """
        listener = self.pubsub_thread
        if listener is None:
            return
        # First the flag, then a message: the thread reads the flag only after its wait, which may
        # last a minute.
        listener.stop()
        self.connection.publish(self.pubsub_channel_name, json.dumps({"command": "wake"}))
        listener.join(LISTENER_END_S)

    def teardown(self) -> None:
        """Deregister from RQ; a Redis that does not answer does not hold up the exit."""
        self.beats.stop()
        try:
            if self.beats.reachable:
                super().teardown()
        except RedisError as error:
            log.warning("redis.unreachable", error=str(error))
        log.info("worker.stopped", worker=self.name, broken=self.broken)
