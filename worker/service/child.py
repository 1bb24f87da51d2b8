"""The warm child process: loads the model once, then runs jobs that arrive over a Unix socket.

    python -m ralf.worker.service.child --socket-fd N --folder DIR [--parent PID] [--bodies test]

The child is spawned and never forked, so that CUDA starts in a clean process.  It holds no
credentials (see sandbox.py) and accepts only the messages of messages.py.  It inherits the
listening socket, so a parent may connect before the child is up.  Several parents may connect;
each has one job in flight.  At most `capacity` jobs run at a time, one on a CPU, in the order of
their arrival.  A job that must run alone waits until the others have ended, and no other starts
beside it.

One thread serves the connections, `capacity` threads work, and the first of them loads the model.
The child never retries a job: its parents judge deadlines, hangs and memory, and kill it.  It exits
when the process that spawned it dies, when a parent tells it to, when the device's context is
lost, or, when it is shared, after nobody has been connected for a while.
"""

import argparse
import faulthandler
import itertools
import math
import os
import selectors
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import structlog

from ralf import starting
from ralf.worker import telemetry
from ralf.worker.contract import Job, Progress, Verdict, dump
from ralf.worker.errors import BadRequest, Cancelled, GpuFatal, JobError, RalfError
from ralf.worker.service import jobs, messages, sandbox
from ralf.worker.service.messages import EngineFacts
from ralf.worker.service.models import LazyModels, LoadedModels, label, load
from ralf.worker.service.shadow import ShadowRun
from ralf.worker.settings import Settings

log = structlog.get_logger()

IDLE_S = 1.0
"""How long a working thread waits for a job before it checks for a promoted model."""
# Some messages are sent under the queue's lock: a parent that is stopped must not hold up the jobs
# of the others for ever.
SEND_TIMEOUT_S = 30.0
PARTIAL_EVERY_S = 5.0
"""A partial verdict costs a judgement; the first comes with the first chunk of frames."""


class ParentConnection:
    """One parent: its connection and the one job that it may have in flight."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.inbox = messages.Inbox()
        self.job: ChildJob | None = None
        self.greeted = False
        self.gone = False
        # The talking thread and a working thread may both send; their frames must not mix.
        self._sending = threading.Lock()
        connection.settimeout(SEND_TIMEOUT_S)

    def send(self, message: messages.Message) -> None:
        """Send; a parent that has gone, or reads nothing for long, is not waited for."""
        try:
            with self._sending:
                self.connection.sendall(messages.encode(message))
        except OSError:
            self.gone = True


@dataclass(eq=False)
class ChildJob:
    """One job in the child, from its parent's Run to the answer."""

    parent: ParentConnection
    run: messages.Run
    cancelled: threading.Event = field(default_factory=threading.Event)
    partial_at: float = -math.inf

    def report(
        self, progress: Progress, seconds: float, partial: Callable[[], Verdict] | None = None
    ) -> None:
        """Send the progress; raises Cancelled when the parent has asked for that, or has gone.

        Not throttled here: the parent writes to Redis once a second, whatever arrives.
        """
        if self.cancelled.is_set() or self.parent.gone:
            raise Cancelled
        now, document = time.monotonic(), ""
        done = progress.percent >= 100  # the verdict itself is next
        if partial is not None and not done and now - self.partial_at >= PARTIAL_EVERY_S:
            self.partial_at, document = now, dump(partial())
        self.parent.send(
            messages.Advanced(
                job_id=self.run.job_id,
                progress=dump(progress),
                seconds=float(seconds),
                partial=document,
            )
        )


class RunQueue:
    """Which job runs next: first come, first served; one that must be alone runs alone."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[ChildJob] = deque()
        self._running: list[ChildJob] = []
        self._closed = False

    def close(self) -> None:
        """Start no other job."""
        with self._changed:
            self._closed = True

    def add(self, job: ChildJob) -> None:
        """Append a job."""
        with self._changed:
            self._waiting.append(job)
            self._changed.notify_all()

    def withdraw(self, job: ChildJob) -> bool:
        """Remove a job that waits; False when it runs already."""
        with self._changed:
            if job not in self._waiting:
                return False
            self._waiting.remove(job)
            self._changed.notify_all()
            return True

    def start_next(self, seconds: float) -> ChildJob | None:
        """Wait until a job may run, and count it as running; None when none could in time."""
        with self._changed:
            if not self._changed.wait_for(self._may_start, seconds):
                return None
            job = self._waiting.popleft()
            self._running.append(job)
            # Before the job begins, so that a crash in its first frame is blamed on no single job.
            if len(self._running) > 1:
                self._tell_parents()
            return job

    def finish(self, job: ChildJob) -> None:
        """The job no longer runs."""
        with self._changed:
            self._running.remove(job)
            self._tell_parents()
            self._changed.notify_all()

    def _may_start(self) -> bool:
        if self._closed or not self._waiting:
            return False
        # Only the first may start: if others passed it, a job that must be alone might wait for
        # ever.
        if self._running and self._waiting[0].run.alone:
            return False
        return not any(job.run.alone for job in self._running)

    def _tell_parents(self) -> None:
        """A parent blames its job for a crash only when it ran alone: send how many others run."""
        for job in self._running:
            job.parent.send(messages.OtherJobs(count=len(self._running) - 1))

    @property
    def idle(self) -> bool:
        """Whether no job runs."""
        with self._changed:
            return not self._running


class Child:
    """The thread that serves the parents' connections, and the threads that run jobs."""

    def __init__(
        self,
        listener: socket.socket,
        *,
        table: dict[str, jobs.Body],
        models: LoadedModels,
        settings: Settings,
        protections: tuple[messages.Protection, ...] = (),
        capacity: int = 1,
        linger_s: float | None = None,
    ) -> None:
        self._listener = listener
        self._table = table
        self._models = models
        self._settings, self._protections = settings, protections
        self._capacity = capacity
        self._linger_s = linger_s
        """None: exclusive, exit with the first parent; else how long to wait for another."""
        self._queue = RunQueue()
        self._parents: set[ParentConnection] = set()
        self._parents_lock = threading.Lock()
        self._leaving = False
        self._served = itertools.count(1)
        self._ready: messages.Ready | messages.Unready | None = None

    def serve(self) -> int:
        """Serve the connections until there is a reason to exit; returns the exit status."""
        threading.Thread(target=self._load_and_work, name="work-0", daemon=True).start()
        connected_at = time.monotonic()
        with selectors.DefaultSelector() as selector:
            self._listener.setblocking(False)
            selector.register(self._listener, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select(timeout=1.0):
                    if key.fileobj is self._listener:
                        self._accept(selector)
                    elif not self._receive(key.data):
                        self._part(selector, key.data)
                        if self._linger_s is None:
                            return 0
                if self._parents:
                    connected_at = time.monotonic()
                # 60 s end an exclusive child to which no parent has ever connected.
                elif time.monotonic() - connected_at > (self._linger_s or 60.0):
                    return 0

    def _accept(self, selector: selectors.BaseSelector) -> None:
        try:
            connection, _ = self._listener.accept()
        # The parent may have gone since select(), and the listener does not block.
        except OSError:
            return
        parent = ParentConnection(connection)
        with self._parents_lock:
            self._parents.add(parent)
        selector.register(connection, selectors.EVENT_READ, parent)

    def _part(self, selector: selectors.BaseSelector, parent: ParentConnection) -> None:
        """A parent has gone: its waiting job is withdrawn, its running one cancelled."""
        parent.gone = True
        selector.unregister(parent.connection)
        parent.connection.close()
        with self._parents_lock:
            self._parents.discard(parent)
        if parent.job is not None:
            self._queue.withdraw(parent.job)
            parent.job.cancelled.set()

    def _receive(self, parent: ParentConnection) -> bool:
        """Act on a parent's messages; False when it has gone or sends nonsense."""
        try:
            received = messages.receive(parent.connection, parent.inbox)
        except messages.ProtocolError as error:
            log.error("child.misunderstood", error=str(error))
            return False
        if received is None:
            return False
        return all(self._obey(parent, message) for message in received)

    def _obey(self, parent: ParentConnection, message: messages.Message) -> bool:
        match message:
            case messages.Hello(version=messages.VERSION):
                # Both under the lock that _announce() takes: a parent that greets while the model
                # becomes ready would else get no Ready, or two.
                with self._parents_lock:
                    parent.greeted = True
                    ready = self._ready
                if ready is not None:
                    parent.send(ready)
            # A second job, or one before the greeting, breaks the protocol: see the last case.
            case messages.Run() if parent.greeted and parent.job is None:
                parent.job = ChildJob(parent, message)
                self._queue.add(parent.job)
            case messages.Cancel(job_id=job_id):
                self._cancel(parent, job_id)
            case messages.Shutdown():
                self._leaving = True
                self._queue.close()
                self._exit_if_idle()
            case _:
                log.error("child.misunderstood", message=message.type)
                return False
        return True

    def _exit_if_idle(self) -> None:
        """Other parents' running jobs end first; waiting ones go to the next child."""
        if self._leaving and (self._linger_s is None or self._queue.idle):
            os._exit(0)

    def _cancel(self, parent: ParentConnection, job_id: str) -> None:
        job = parent.job
        if job is None or job.run.job_id != job_id:
            return
        job.cancelled.set()
        if self._queue.withdraw(job):
            parent.job = None
            parent.send(_cancelled(job_id, "the job was cancelled before its turn"))

    def _load_and_work(self) -> None:
        """Load the model, send the outcome to all parents, then run jobs like the other threads."""
        ready: messages.Ready | messages.Unready
        try:
            with starting():
                facts = self._models.open()
            ready = self._confined(facts)
        except Exception as error:  # noqa: BLE001  the border: the parent logs it and decides
            ready = messages.Unready(
                message=str(error) if isinstance(error, RalfError) else traceback.format_exc()
            )
        greeted = self._announce(ready)
        if isinstance(ready, messages.Unready):
            log.error("child.unready", error=ready.message)
            if not greeted:
                time.sleep(1.0)  # a parent may still be about to connect
            # sys.exit() would end this thread only.
            os._exit(5)
        for number in range(1, self._capacity):
            threading.Thread(target=self._work, name=f"work-{number}", daemon=True).start()
        self._work()

    def _confined(self, facts: EngineFacts) -> messages.Ready | messages.Unready:
        """The model is loaded: from now on no program is started, and hostile files may come."""
        self._protections += (sandbox.forbid_programs(self._settings),)
        for sentence in sandbox.missing(self._protections):
            log.warning("child.sandbox_incomplete", missing=sentence)
        why = sandbox.why_refused(self._settings, self._protections)
        return messages.Unready(message=why) if why else self._ready_with(facts)

    def _ready_with(self, facts: EngineFacts) -> messages.Ready:
        return messages.Ready(facts=facts.model_copy(update={"protections": self._protections}))

    def _announce(self, ready: messages.Ready | messages.Unready) -> int:
        """Send it to all parents that have greeted, keep it for later ones; returns how many."""
        with self._parents_lock:
            self._ready = ready
            greeted = [parent for parent in self._parents if parent.greeted]
        for parent in greeted:
            parent.send(ready)
        return len(greeted)

    def _work(self) -> None:
        while True:
            job = self._queue.start_next(IDLE_S)
            facts: EngineFacts | None = self._models.follow()
            if facts is not None:
                self._announce(self._ready_with(facts))
            if job is None:
                continue
            job.parent.send(messages.Started(job_id=job.run.job_id))
            answer, shadow = self._answer(job)
            if shadow is None:
                self._queue.finish(job)
            job.parent.job = None  # before the answer: the parent may send the next at once
            job.parent.send(answer.model_copy(update={"served": next(self._served)}))
            if shadow is not None:
                self._run_shadow(job, shadow)
            self._exit_if_idle()
            if isinstance(answer, messages.Failed) and answer.fatal:
                os._exit(70)

    def _run_shadow(self, job: ChildJob, shadow: ShadowRun) -> None:
        """The job still counts as running, so that no other job is blamed for a crash here."""
        try:
            if job.parent.gone:
                shadow.close()
                return
            found = shadow.compare(leaving=lambda: self._leaving or job.parent.gone)
            job.parent.send(messages.Compared(document=dump(found)))
        finally:
            self._queue.finish(job)
        if shadow.fatal:
            os._exit(70)

    def _answer(self, job: ChildJob) -> tuple[messages.Done | messages.Failed, ShadowRun | None]:
        """Run the body; every exception becomes a named failure."""
        run = job.run
        try:
            return self._done(job)
        except BaseException as error:  # noqa: BLE001  the border: every end has a name
            named = jobs.as_job_error(error)
            if isinstance(named, Cancelled):
                return _cancelled(run.job_id, "the job was cancelled"), None
            if named is not error:
                log.error("child.job_failed", job_id=run.job_id, error=traceback.format_exc())
            assert isinstance(named, JobError)
            fatal = isinstance(named, GpuFatal) or isinstance(error, MemoryError)
            failed = messages.Failed(
                job_id=run.job_id, code=named.code, message=str(named), fatal=fatal
            )
            return failed, None

    def _done(self, job: ChildJob) -> tuple[messages.Done, ShadowRun | None]:
        """The job's verdict, and the shadow's run when one is due."""
        run = job.run
        body = self._table.get(run.function)
        if body is None:
            raise BadRequest(f"this child runs {sorted(self._table)}, not {run.function!r}")
        document = Job.model_validate_json(run.job)
        parts = self._models.of(document) if body.heavy else None
        task, start = jobs.Task(run, document, job.report), time.monotonic()
        verdict, evidence = body.work(task, parts)
        verdict = self._models.marked(verdict, document)
        done = messages.Done(job_id=run.job_id, verdict=dump(verdict), evidence=dump(evidence))
        shadow = self._models.shadow_of(document, parts)
        if shadow is None:
            return done, None
        took_s = time.monotonic() - start
        return done, ShadowRun(task, verdict, body, label(shadow), shadow, took_s)


def _cancelled(job_id: str, message: str) -> messages.Failed:
    return messages.Failed(job_id=job_id, code="cancelled", message=message)


def main(arguments: list[str] | None = None) -> int:
    """Run the child process; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="ralf.worker.service.child", description="The warm child process."
    )
    parser.add_argument("--socket-fd", type=int, required=True)
    parser.add_argument(
        "--folder", type=Path, required=True, help="of the jobs' files, and scratch"
    )
    parser.add_argument("--parent", type=int, help="exit when this process does")
    parser.add_argument("--bodies", choices=("moderate", "test"), default="moderate")
    parser.add_argument("--capacity", type=int, default=1)
    parser.add_argument("--linger", type=float, help="shared: seconds to wait without a parent")
    options = parser.parse_args(arguments)
    settings = Settings.from_environment()
    protections = sandbox.enter(settings, options.folder, options.parent)
    # A crash in native code writes the Python stack to stderr, whose end the quarantine keeps.
    faulthandler.enable()
    telemetry.configure(settings)
    own = partial(load, together=options.capacity > 1)
    child = Child(
        socket.socket(fileno=options.socket_fd),
        table=jobs.table(options.bodies),
        models=(LoadedModels if options.bodies == "moderate" else LazyModels)(settings, load=own),
        settings=settings,
        protections=tuple(protections),
        capacity=options.capacity,
        linger_s=options.linger,
    )
    return child.serve()


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # worker threads may be in native code; they are not waited for
