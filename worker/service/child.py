"""The warm child: loads the model once, then serves jobs over a Unix socket.

    python -m ralf.worker.service.child --socket-fd N [--parent PID] [--bodies test] [--capacity N]

It is spawned, never forked, so that CUDA starts in a clean process; it holds no credentials (see
sandbox.py) and speaks only messages.py's messages.  The listening socket is inherited, so a parent
may connect before the child is up.  Several parents may connect; each has one job in flight.  At
most `capacity` jobs run at a time, one on a CPU, in the order in which they came.  A job that
must run alone waits until the others have ended, and none starts beside it.

One thread talks, `capacity` threads work, and the first of them loads the model.  The child never
retries and never decides: deadlines, hangs and memory are judged by its parents, who kill it.  It
leaves when its spawner dies, when a parent says so, when the device's context is lost, or, when
it is shared, once nobody has been connected for a while.
"""

import argparse
import faulthandler
import json
import os
import selectors
import socket
import sys
import threading
import time
import traceback
from functools import partial

import structlog

from ralf.worker import telemetry
from ralf.worker.contract import Job, dump
from ralf.worker.errors import BadRequest, Cancelled, GpuFatal, JobError, RalfError
from ralf.worker.service import jobs, messages, sandbox
from ralf.worker.service.models import EmptyShelf, Facts, Shelf, label, load
from ralf.worker.service.procfs import rss
from ralf.worker.service.shadow import Second
from ralf.worker.service.turnstile import Peer, Turnstile, Visit
from ralf.worker.settings import Settings

log = structlog.get_logger()

IDLE_S = 1.0


class Child:
    """The talking thread and its workers."""

    def __init__(
        self,
        listener: socket.socket,
        *,
        table: dict[str, jobs.Body],
        shelf: Shelf,
        capacity: int = 1,
        linger_s: float | None = None,
    ) -> None:
        self._listener = listener
        self._table = table
        self._shelf = shelf
        self._capacity = capacity
        self._linger_s = linger_s
        """None: exclusive, leave with the first parent; else how long to wait for another."""
        self._turnstile = Turnstile()
        self._peers: set[Peer] = set()
        self._peers_lock = threading.Lock()
        self._leaving = False
        self._ready: messages.Ready | messages.Unready | None = None

    def serve(self) -> int:
        """Talk until there is a reason to leave; returns the exit status."""
        threading.Thread(target=self._work_first, name="work-0", daemon=True).start()
        lonely_since = time.monotonic()
        with selectors.DefaultSelector() as selector:
            self._listener.setblocking(False)
            selector.register(self._listener, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select(timeout=1.0):
                    if key.fileobj is self._listener:
                        self._accept(selector)
                    elif not self._hear(key.data):
                        self._part(selector, key.data)
                        if self._linger_s is None:
                            return 0
                if self._peers:
                    lonely_since = time.monotonic()
                elif time.monotonic() - lonely_since > (self._linger_s or 60.0):
                    return 0

    def _accept(self, selector: selectors.BaseSelector) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        peer = Peer(connection)
        with self._peers_lock:
            self._peers.add(peer)
        selector.register(connection, selectors.EVENT_READ, peer)

    def _part(self, selector: selectors.BaseSelector, peer: Peer) -> None:
        """A parent has gone: its waiting job leaves the line, its running one is cancelled."""
        peer.gone = True
        selector.unregister(peer.connection)
        peer.connection.close()
        with self._peers_lock:
            self._peers.discard(peer)
        if peer.visit is not None:
            self._turnstile.leave(peer.visit)
            peer.visit.cancelled.set()

    def _hear(self, peer: Peer) -> bool:
        """Act on what a parent said; False when it has gone or talks nonsense."""
        try:
            received = messages.receive(peer.connection, peer.inbox)
        except messages.WireError as error:
            log.error("child.misunderstood", error=str(error))
            return False
        if received is None:
            return False
        return all(self._obey(peer, message) for message in received)

    def _obey(self, peer: Peer, message: messages.Message) -> bool:
        match message:
            case messages.Hello(version=messages.VERSION):
                with self._peers_lock:
                    peer.greeted = True
                    ready = self._ready
                if ready is not None:
                    peer.say(ready)
            case messages.Ping(number=number):
                peer.say(messages.Pong(number))
            case messages.Run() if peer.greeted and peer.visit is None:
                peer.visit = Visit(peer, message)
                self._turnstile.join(peer.visit)
            case messages.Cancel(job_id=job_id):
                self._cancel(peer, job_id)
            case messages.Shutdown():
                self._leaving = True
                self._turnstile.close()
                self._leave_if_idle()
            case _:
                log.error("child.misunderstood", message=type(message).__name__)
                return False
        return True

    def _leave_if_idle(self) -> None:
        """Other parents' running jobs end first; those in line see us gone and ask our heir."""
        if self._leaving and (self._linger_s is None or self._turnstile.idle):
            os._exit(0)

    def _cancel(self, peer: Peer, job_id: str) -> None:
        visit = peer.visit
        if visit is None or visit.run.job_id != job_id:
            return
        visit.cancelled.set()
        if self._turnstile.leave(visit):
            peer.visit = None
            peer.say(messages.Failed(job_id, "cancelled", "the job was cancelled before its turn"))

    def _work_first(self) -> None:
        """Load, tell every parent, then work beside the other threads."""
        ready: messages.Ready | messages.Unready
        try:
            ready = _ready(self._shelf.open())
        except Exception as error:  # noqa: BLE001  the border: the parent logs it and decides
            ready = messages.Unready(
                str(error) if isinstance(error, RalfError) else traceback.format_exc()
            )
        greeted = self._announce(ready)
        if isinstance(ready, messages.Unready):
            log.error("child.unready", error=ready.message)
            if not greeted:
                time.sleep(1.0)  # a parent may still be about to connect
            os._exit(5)
        for number in range(1, self._capacity):
            threading.Thread(target=self._work, name=f"work-{number}", daemon=True).start()
        self._work()

    def _announce(self, ready: messages.Ready | messages.Unready) -> int:
        """Tell every parent; those that greet later are told then."""
        with self._peers_lock:
            self._ready = ready
            greeted = [peer for peer in self._peers if peer.greeted]
        for peer in greeted:
            peer.say(ready)
        return len(greeted)

    def _work(self) -> None:
        while True:
            visit = self._turnstile.enter(IDLE_S)
            switched = self._shelf.follow()
            if switched is not None:
                self._announce(_ready(switched))
            if visit is None:
                continue
            visit.peer.say(messages.Started(visit.run.job_id))
            answer, second = self._answer(visit)
            if second is None:
                self._turnstile.exit(visit)
            visit.peer.visit = None  # before the answer: the parent may send the next at once
            visit.peer.say(answer)
            if second is not None:
                self._look_again(visit, second)
            self._leave_if_idle()
            if isinstance(answer, messages.Failed) and answer.fatal:
                os._exit(70)

    def _look_again(self, visit: Visit, second: Second) -> None:
        """The shadow's turn: it counts as company, so that nobody else is blamed for its death."""
        try:
            if visit.peer.gone:
                second.close()
                return
            found = second.look(leaving=lambda: self._leaving or visit.peer.gone)
            visit.peer.say(messages.Compared(dump(found)))
        finally:
            self._turnstile.exit(visit)
        if second.fatal:
            os._exit(70)

    def _answer(self, visit: Visit) -> tuple[messages.Done | messages.Failed, Second | None]:
        """Run the body; whatever it raises has a name in the answer."""
        run = visit.run
        try:
            body = self._table.get(run.function)
            if body is None:
                raise BadRequest(f"this child runs {sorted(self._table)}, not {run.function!r}")
            job = Job.model_validate_json(run.job)
            parts = self._shelf.of(job) if body.heavy else None
            task, start = jobs.Task(run, job, visit.report), time.monotonic()
            verdict, evidence = body.work(task, parts)
            verdict = self._shelf.marked(verdict, job)
            done = messages.Done(run.job_id, dump(verdict), dump(evidence))
            shadow = self._shelf.shadow_of(job, parts)
            if shadow is None:
                return done, None
            took_s = time.monotonic() - start
            return done, Second(task, verdict, body, label(shadow), shadow, took_s)
        except BaseException as error:  # noqa: BLE001  the border: every end has a name
            named = jobs.as_job_error(error)
            if isinstance(named, Cancelled):
                return messages.Failed(run.job_id, "cancelled", "the job was cancelled"), None
            if named is not error:
                log.error("child.job_failed", job_id=run.job_id, error=traceback.format_exc())
            assert isinstance(named, JobError)
            fatal = isinstance(named, GpuFatal) or isinstance(error, MemoryError)
            return messages.Failed(run.job_id, named.code, str(named), fatal), None


def _ready(facts: Facts) -> messages.Ready:
    return messages.Ready(os.getpid(), rss(os.getpid()), json.dumps(facts))


def main(arguments: list[str] | None = None) -> int:
    """The child's whole life."""
    parser = argparse.ArgumentParser(
        prog="ralf.worker.service.child", description="The warm child."
    )
    parser.add_argument("--socket-fd", type=int, required=True)
    parser.add_argument("--parent", type=int, help="die when this process does")
    parser.add_argument("--bodies", choices=("moderate", "test"), default="moderate")
    parser.add_argument("--capacity", type=int, default=1)
    parser.add_argument("--linger", type=float, help="shared: seconds to wait without a parent")
    options = parser.parse_args(arguments)
    missing = sandbox.enter(options.parent)
    faulthandler.enable()
    settings = Settings.from_environment()
    telemetry.configure(settings)
    for sentence in missing:
        log.warning("child.sandbox_incomplete", missing=sentence)
    listener = socket.socket(fileno=options.socket_fd)
    own = partial(load, together=options.capacity > 1)
    shelf = (Shelf if options.bodies == "moderate" else EmptyShelf)(settings, load=own)
    child = Child(
        listener,
        table=jobs.table(options.bodies),
        shelf=shelf,
        capacity=options.capacity,
        linger_s=options.linger,
    )
    return child.serve()


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # worker threads may be in native code; nobody waits for them
