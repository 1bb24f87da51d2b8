"""Who is in the child, and who runs next.

A Peer is one parent at the other end of its connection, a Visit one job of it between Run and our
answer.  The Turnstile lets visits in first come, first served; one that must be alone waits until
nobody else runs, and nobody starts beside it.  Parents of running jobs are told how many others
there are, so that each knows how many suspects there would be if the child died now.
"""

import math
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from ralf.worker.contract import Progress, Verdict, dump
from ralf.worker.errors import Cancelled
from ralf.worker.service import messages

SEND_TIMEOUT_S = 30.0
TELL_EVERY_S = 0.1
"""A job tells its parent no more often; it still looks each time whether it was cancelled."""
PARTIAL_EVERY_S = 5.0
"""The first comes with the first chunk, and another each time so long after."""


class Peer:
    """One parent: its connection and the one job it may have in flight."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.inbox = messages.Inbox()
        self.visit: Visit | None = None
        self.greeted = False
        self.gone = False
        self._sending = threading.Lock()
        connection.settimeout(SEND_TIMEOUT_S)

    def say(self, message: messages.Message) -> None:
        """Send; a parent that has gone, or takes nothing for long, is not waited for."""
        try:
            with self._sending:
                self.connection.sendall(messages.encode(message))
        except OSError:
            self.gone = True


@dataclass(eq=False)
class Visit:
    """One job between its parent's Run and our answer."""

    peer: Peer
    run: messages.Run
    cancelled: threading.Event = field(default_factory=threading.Event)
    told: float = 0.0
    judged: float = -math.inf

    def report(
        self, progress: Progress, seconds: float, partial: Callable[[], Verdict] | None = None
    ) -> None:
        """Tell the parent, at most ten times a second; raises Cancelled once it was asked to."""
        if self.cancelled.is_set() or self.peer.gone:
            raise Cancelled
        now = time.monotonic()
        if now - self.told < TELL_EVERY_S:
            return
        self.told, document = now, ""
        done = progress.percent >= 100  # the verdict itself is next
        if partial is not None and not done and now - self.judged >= PARTIAL_EVERY_S:
            self.judged, document = now, dump(partial())
        self.peer.say(messages.Advanced(self.run.job_id, dump(progress), float(seconds), document))


class Turnstile:
    """Who runs next: first come, first served; a job that must be alone is let in alone."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[Visit] = deque()
        self._running: list[Visit] = []
        self._closed = False

    def close(self) -> None:
        """Nobody else gets a turn."""
        with self._changed:
            self._closed = True

    def join(self, visit: Visit) -> None:
        """Stand in line."""
        with self._changed:
            self._waiting.append(visit)
            self._changed.notify_all()

    def leave(self, visit: Visit) -> bool:
        """Step out of the line; False when the job runs already."""
        with self._changed:
            if visit not in self._waiting:
                return False
            self._waiting.remove(visit)
            self._changed.notify_all()
            return True

    def enter(self, seconds: float) -> Visit | None:
        """Wait for a turn; the visit is then running. None when there was none in time."""
        with self._changed:
            if not self._changed.wait_for(self._may_enter, seconds):
                return None
            visit = self._waiting.popleft()
            self._running.append(visit)
            if len(self._running) > 1:
                self._announce()
            return visit

    def exit(self, visit: Visit) -> None:
        """The visit's turn is over."""
        with self._changed:
            self._running.remove(visit)
            self._announce()
            self._changed.notify_all()

    def _may_enter(self) -> bool:
        if self._closed or not self._waiting:
            return False
        if self._running and self._waiting[0].run.alone:
            return False
        return not any(visit.run.alone for visit in self._running)

    def _announce(self) -> None:
        """Each running job's parent knows how many suspects there would be if we died now."""
        for visit in self._running:
            visit.peer.say(messages.Company(len(self._running) - 1))

    @property
    def idle(self) -> bool:
        """Whether no job runs."""
        with self._changed:
            return not self._running
