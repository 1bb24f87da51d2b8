"""One claimed job's way through the parent: fetch, child, ending.

The parent does no work of its own here; it waits, for the fetching thread, for the child and for
signals, in one select(), and judges at each turn.  What makes it end a run early:

    the job's time    clamp(base + per second of video); before its length is known, the most
    a hang            no progress for hang_s, native code or not
    memory            the child above its hard bound
    the deadline      the client's; the job is then expired
    a cancel          asked politely first, killed after a short grace
    a drain           SIGTERM and the grace is over, or a second SIGTERM: handed back, uncharged
    a lost lease      another worker may have the job: stop, touch nothing

Whatever happens, walk() returns an Ending; only settle() writes it to the store, once.
"""

import select
import shutil
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import structlog
from pydantic import ValidationError
from redis.exceptions import RedisError

from ralf.worker import telemetry
from ralf.worker.contract import Evidence, Progress, Verdict
from ralf.worker.errors import Cancelled, DecoderCrashed, by_code
from ralf.worker.service import messages
from ralf.worker.service.child_process import Link
from ralf.worker.service.ending import Ending, settle
from ralf.worker.service.fetch import FetchThread
from ralf.worker.service.jobs import Body
from ralf.worker.service.limits import Pace, memory_allowed, overrun
from ralf.worker.service.records import Claim
from ralf.worker.service.store import Store
from ralf.worker.service.wakeup import Orders
from ralf.worker.settings import Settings

log = structlog.get_logger()

TURN_S = 0.5
"""The longest that the parent waits without looking at the clock."""
BEAT_S = 1.0


class Errand:
    """One run of one job in this worker."""

    def __init__(
        self,
        claim: Claim,
        body: Body,
        function: str,
        *,
        link: Link,
        store: Store,
        orders: Orders,
        beat: Callable[[], None],
    ) -> None:
        self.claim, self.body, self.function = claim, body, function
        self.link, self.store, self.orders = link, store, orders
        self.settings: Settings = store.settings
        self._rq_beat = beat
        self._rss_allowed = memory_allowed(self.settings)
        self.begun = time.monotonic()
        self.fetch_s = 0.0
        self._file_sha: str | None = None
        self._pace = Pace(progressed=self.begun)
        self._others = 0
        self._progress: Progress | None = None
        self._partial: Verdict | None = None
        self._beaten = self.begun
        self._planned: Ending | None = None
        self._kill_at: float | None = None

    # the walk

    def walk(self) -> Ending:
        """Take the job through; the folder it was fetched into is gone afterwards."""
        self.orders.stopped = ""
        if not self.body.fetches:
            return self._in_child(Path())
        folder = Path(tempfile.mkdtemp(prefix="job-", dir=self.link.uploads))
        try:
            path, early = self._fetched(folder)
            return early or self._in_child(path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _fetched(self, folder: Path) -> tuple[Path, Ending | None]:
        """The media as a local file; heartbeats go on while a thread fetches it."""
        job = self.claim.job
        self._progress = Progress(stage="fetch", percent=0)
        fetching = FetchThread(
            job.media,
            folder,
            tenant=job.tenant,
            settings=self.settings,
            wake=self.orders.wake,
        )
        while not fetching.over:
            self._wait(listen=False)
            self._judge()
            if self._planned is not None:
                fetching.stop()
                return Path(), self._planned
        self.fetch_s = time.monotonic() - self.begun
        if fetching.file is None:
            error = fetching.error
            if isinstance(error, Cancelled):
                return Path(), Ending("failure", "cancelled", "cancelled by the client")
            return Path(), Ending.of(error)
        self._file_sha = fetching.file.sha256
        return fetching.file.path, None

    def _in_child(self, path: Path) -> Ending:
        claim = self.claim
        self.link.say(
            messages.Run(
                job_id=claim.job_id,
                function=self.function,
                path=str(path),
                job=claim.job.model_dump_json(by_alias=True),
                attempt=claim.attempt,
                sha256=self._file_sha or "",
                fetch_ms=self.fetch_s * 1000,
                alone=claim.alone,
            )
        )
        self._pace.progressed = time.monotonic()
        while True:
            said = self._wait(listen=True)
            for message in said or ():
                ending = self._heard(message)
                if ending is not None:
                    return ending
            if said is None:
                return self._gone()
            self._judge()
            if self._planned is not None and self._overdue():
                self._force()

    def _heard(self, message: messages.Message) -> Ending | None:
        match message:
            case messages.Started():
                self._pace.started = time.monotonic()
                self._moved()
            case messages.Company(others=others):
                self._others = others
                self._beat(alone=others == 0)
            case messages.Advanced():
                self._advanced(message)
            case messages.Done(job_id=self.claim.job_id):
                return self._done(message)
            case messages.Failed(job_id=self.claim.job_id):
                return self._planned or self._failed(message)
            case _:
                pass
        return None

    def _advanced(self, message: messages.Advanced) -> None:
        self._moved()
        try:
            self._progress = Progress.model_validate_json(message.progress)
            if message.partial:
                self._partial = Verdict.model_validate_json(message.partial)
        except ValidationError as error:
            log.warning("child.misunderstood", job_id=self.claim.job_id, error=str(error)[:300])
        self._pace.seconds = max(self._pace.seconds, message.seconds)

    def _moved(self) -> None:
        self._pace.progressed, self._pace.cpu = time.monotonic(), self.link.cpu()

    def _done(self, message: messages.Done) -> Ending:
        """A verdict counts only if it is one, and about this job."""
        if self._planned is not None and self._planned.kind != "hand_back":
            return self._planned
        try:
            verdict = Verdict.model_validate_json(message.verdict)
            evidence = Evidence.model_validate_json(message.evidence)
        except ValidationError as error:
            return self._liar(f"its verdict is not ralf.verdict/1: {str(error)[:300]}")
        if verdict.job_id != self.claim.job_id:
            return self._liar(f"its verdict is about {verdict.job_id}")
        return Ending("verdict", verdict=verdict, evidence=evidence)

    def _liar(self, why: str) -> Ending:
        self.link.kill()
        self.link.closed()
        return Ending.of(DecoderCrashed(f"the child cannot be trusted: {why}"), alone=self._alone)

    def _failed(self, message: messages.Failed) -> Ending:
        if message.fatal:
            self.link.kill()
            self.link.closed()
        kind = by_code().get(message.code)
        if kind is None:  # it stopped without being asked, as a leaving child does
            return Ending("hand_back", message.code, message.message)
        return Ending.of(kind(message.message), detail=self.link.last_words(), alone=self._alone)

    @property
    def _alone(self) -> bool:
        return self._others == 0

    def _gone(self) -> Ending:
        """The child died: by our hand as planned, before the job's turn, or in the job."""
        how = self.link.closed()
        if self._planned is not None:
            return self._planned
        if self.orders.stopped:
            reason, self.orders.stopped = self.orders.stopped, ""
            if reason == "stop-job":
                return Ending("failure", "cancelled", "an operator stopped the job")
            return Ending("hand_back", "child_killed", "an operator killed the child")
        if self._pace.started is None:
            return Ending("hand_back", "child_left", f"the child {how} before the job's turn")
        error = DecoderCrashed(f"the child {how} in the middle of the job")
        return Ending.of(error, detail=self.link.last_words(), alone=self._alone)

    # waiting and judging

    def _wait(self, *, listen: bool) -> list[messages.Message] | None:
        """Until something happens, or it is time to look at the clock; None: the child has gone."""
        if listen and not self.link.alive:
            return None
        watched: list[Any] = [self.orders, self.link] if listen else [self.orders]
        ready, _, _ = select.select(watched, [], [], TURN_S)
        if self.orders in ready:
            self.orders.drained()
        return self.link.hear() if self.link in ready else []

    def _judge(self) -> None:
        """Look at the clock, the lease, the child's memory and the orders; plan an early end."""
        now = self.orders.pulse = time.monotonic()
        if now - self._beaten >= min(BEAT_S, self.settings.heartbeat_s):
            self._beat()
            self._rq_beat()
        if self._planned is not None and self._planned.kind != "hand_back":
            return
        fault = overrun(
            self.settings,
            self._pace,
            now=now,
            cpu=self.link.cpu(),
            rss=self.link.rss(),
            rss_allowed=self._rss_allowed,
            deadline=self.claim.job.deadline,
        )
        if fault is not None:
            ending = Ending.of(fault, alone=self._alone)
            grace = 0.0 if ending.kind == "crash" else self.settings.cancel_grace_s
            self._plan(ending, grace=grace)
        elif self._planned is None and self._must_drain(now):
            self._plan(Ending("hand_back", "drained", "the worker is stopping"), grace=0.0)

    def _must_drain(self, now: float) -> bool:
        since = self.orders.drain_since
        over = since is not None and now - since > self.settings.grace_s
        return over or self.orders.hurry

    def _plan(self, ending: Ending, *, grace: float) -> None:
        self._planned = ending
        self._kill_at = time.monotonic() + grace
        if self._pace.started is not None or grace:
            self.link.say(messages.Cancel(self.claim.job_id))

    def _overdue(self) -> bool:
        return self._kill_at is not None and time.monotonic() >= self._kill_at

    def _force(self) -> None:
        """The grace is over. A shared child is spared while others' jobs run well in it."""
        assert self._planned is not None
        if self.link.shared and self._planned.kind == "hand_back":
            self.link.closed()
        else:
            self.link.kill()
            self.link.closed()

    def _beat(self, *, alone: bool | None = None) -> None:
        """Prove that the job runs; hear whether it should go on. News of the company goes out at
        once and alone, so that progress is not written more often for it."""
        progress, partial = None, None
        if alone is None:
            self._beaten = time.monotonic()
            progress, self._progress = self._progress, None
            partial, self._partial = self._partial, None
        try:
            order = self.store.beat(
                self.claim,
                progress=progress,
                partial=partial,
                alone=alone,
                file_sha=self._file_sha,
            )
        except RedisError as error:  # the job goes on; its lease has some beats to spare
            log.warning("redis.unreachable", job_id=self.claim.job_id, error=str(error))
            return
        if self._planned is not None:
            return
        if order == "cancel":
            ending = Ending("failure", "cancelled", "cancelled by the client")
            self._plan(ending, grace=self.settings.cancel_grace_s)
        elif order == "lost":
            self._plan(Ending("lost", "lease_lost", "another worker has the job"), grace=0.0)

    # the ending

    def settle(self, ending: Ending) -> str:
        """Write the ending to the store and the canonical line; says what became of the job."""
        outcome = settle(self.store, self.claim, ending, file_sha=self._file_sha)
        spent = time.monotonic() - self.begun
        since = (datetime.now(UTC) - self.claim.job.submitted_at).total_seconds()
        telemetry.job_finished(
            telemetry.Finish(
                job=self.claim.job,
                outcome=outcome,
                attempt=self.claim.attempt,
                total_s=spent,
                wait_s=max(0.0, since - spent),
                fetch_s=self.fetch_s,
                code=ending.code,
                message=ending.message,
                verdict=ending.verdict,
            )
        )
        return outcome
