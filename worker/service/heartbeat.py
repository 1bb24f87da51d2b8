"""A thread that keeps the job's lease and RQ's records of this worker alive in Redis.

A Redis that accepts a command and never answers blocks the caller until a timeout.  The loop that
judges the run must not wait for that: a hung child would live on, and a drain would not end.  So
this thread extends the job's lease, writes its progress, asks whether it should go on, and keeps
RQ's records alive, over a connection of its own with short timeouts.  The loop only reads `reply`.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import structlog
from redis.exceptions import RedisError

from ralf.worker.contract import Progress, Verdict
from ralf.worker.service.connection import connect
from ralf.worker.service.records import BeatReply, Claim
from ralf.worker.service.store import Store
from ralf.worker.service.wakeup import Wakeup

log = structlog.get_logger()

BEAT_S = 1.0
"""Between two beats: the only throttle of a job's progress."""
TIMEOUT_S = 1.0
"""For an answer of Redis."""
STOP_S = 5.0


@dataclass
class _News:
    """What the next beat writes."""

    progress: Progress | None = None
    partial: Verdict | None = None
    alone: bool | None = None
    file_sha: str | None = None


class Heartbeat:
    """The thread, and what it exchanges with the loop."""

    def __init__(self, store: Store, wakeup: Wakeup, *, rq_beat: Callable[[Any], None]) -> None:
        # connect() gives half of the time to an answer.  No other attempt: the next beat is one.
        settings = store.settings
        self._redis = connect(
            settings.redis_url,
            attempts=0,
            timeout_s=2 * TIMEOUT_S,
            ca_file=settings.redis_ca_file,
        )
        self._store = Store(self._redis, settings)
        self._settings, self._wakeup, self._rq_beat = settings, wakeup, rq_beat
        self._every_s = min(BEAT_S, settings.heartbeat_s)
        self.failed = False
        """Whether the last command got no answer, the loop's commands too."""
        self._asked_at: float | None = None
        self.reply: BeatReply = "go_on"
        """About the job that runs now."""
        self._claim: Claim | None = None
        self._news = _News()
        # Not 0: time.monotonic() may be small on a machine that has just started.
        self._beaten_at = self._rq_beaten_at = -1e9
        self._lock = threading.Lock()
        self._wake, self._stopping = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    @property
    def reachable(self) -> bool:
        """Whether the last command was answered, and none is overdue."""
        asked_at = self._asked_at
        overdue = asked_at is not None and time.monotonic() - asked_at > TIMEOUT_S
        return not (self.failed or overdue)

    def start(self) -> None:
        """Begin to beat; once."""
        self._thread.start()

    def stop(self) -> None:
        """No other beat; one that waits for Redis is not waited for long."""
        self._stopping.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(STOP_S)
        if not self._thread.is_alive():  # else it still uses the connection
            self._redis.close()

    @contextmanager
    def keeping(self, claim: Claim) -> Iterator[None]:
        """Keep this job's lease while the block runs."""
        with self._lock:
            self._claim, self._news, self.reply = claim, _News(), "go_on"
            # The claim has just set the lease.
            self._beaten_at = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                self._claim = None

    def note(
        self,
        *,
        progress: Progress | None = None,
        partial: Verdict | None = None,
        file_sha: str | None = None,
    ) -> None:
        """For the next beat."""
        with self._lock:
            news = self._news
            news.progress = progress or news.progress
            news.partial = partial or news.partial
            news.file_sha = file_sha or news.file_sha

    def note_alone(self, alone: bool) -> None:
        """Written at once, since a crash may come next; progress waits for its time."""
        with self._lock:
            self._news.alone = alone
        self._wake.set()

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._wake.wait(self._every_s)
            self._wake.clear()
            if self._stopping.is_set():
                return
            self._asked_at = time.monotonic()
            try:
                self._beat()
                due = time.monotonic() - self._rq_beaten_at >= self._settings.heartbeat_s
                if due or self.failed:  # after a failure: is Redis back?
                    self._asked_at = time.monotonic()
                    self._rq_beat(self._redis)
                    self._rq_beaten_at = time.monotonic()
                    self.failed = False
            except RedisError as error:  # the job goes on; its lease has some beats to spare
                self.failed = True
                log.warning("redis.unreachable", error=str(error))
            except Exception as error:  # noqa: BLE001  a worker without a heartbeat is lost
                log.error("heartbeat.failed", error=repr(error))
            self._asked_at = None

    def _beat(self) -> None:
        with self._lock:
            claim, news = self._claim, self._news
            due = time.monotonic() - self._beaten_at >= self._every_s
            if claim is None or not (due or news.alone is not None):
                return
            # The hash is written with every beat, since a beat may be lost and a crash is charged
            # to the hash.
            self._news = _News(file_sha=news.file_sha)
            if due:
                self._beaten_at = time.monotonic()
            else:
                self._news.progress, self._news.partial = news.progress, news.partial
                news = _News(alone=news.alone, file_sha=news.file_sha)
        try:
            reply = self._store.beat(
                claim,
                progress=news.progress,
                partial=news.partial,
                alone=news.alone,
                file_sha=news.file_sha,
            )
        except RedisError:
            with self._lock:  # `alone` decides what a crash is blamed on: the next beat writes it
                if self._claim is claim and self._news.alone is None:
                    self._news.alone = news.alone
            raise
        self.failed = False
        with self._lock:
            # The job may have ended while Redis answered; the reply must not cancel the next one.
            if self._claim is not claim:
                return
            self.reply = reply
        if reply != "go_on":
            self._wakeup.wake()
