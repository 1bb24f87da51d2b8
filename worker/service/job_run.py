"""One run of one claimed job in the parent: fetch the file, hand it to the child, judge the run.

The parent does no work of its own here.  It waits in one select() for the fetching thread, for the
child and for signals, and judges the run at each turn.  It ends a run early for:

    the job's time    clamp(base + per second of video × its seconds, least, most); the most until
                      the length is known; counted from the job's turn in the child
    a hang            no progress for hang_s, native code or not
    memory            the child is above its hard bound
    the deadline      the client's; the job is then expired
    a cancel          asked politely first, killed after a short grace
    a drain           SIGTERM and the grace is over, or a second SIGTERM: handed back, uncharged
    a lost lease      another worker may have the job: stop, touch nothing

A work folder that takes no file, and any other OSError of this process, is no fault of the job: it
is handed back without a charge, and the worker takes no other job until the folder takes files.

run() always returns a RunResult; run_result.py writes it to the store.
"""

import select
import shutil
import tempfile
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import structlog
from pydantic import ValidationError

from ralf.worker.contract import Evidence, Progress, Verdict
from ralf.worker.errors import (
    Cancelled,
    DeadlinePassed,
    DecoderCrashed,
    Hung,
    JobError,
    by_code,
)
from ralf.worker.service import messages
from ralf.worker.service.child_process import JOB_PREFIX, ChildProcess
from ralf.worker.service.fetch import FetchThread
from ralf.worker.service.heartbeat import Heartbeat
from ralf.worker.service.jobs import Body
from ralf.worker.service.records import Claim
from ralf.worker.service.run_result import RunResult
from ralf.worker.service.sandbox import memory_allowed
from ralf.worker.service.wakeup import Wakeup
from ralf.worker.service.work_dir import why_unusable
from ralf.worker.settings import Settings

log = structlog.get_logger()

TURN_S = 0.5
"""The parent looks at the clock at least this often."""
WORKER_IO = "worker_io"
"""The code of a run that ended because this worker could not read or write."""
BUSY_FACTOR = 5
BUSY_SHARE = 0.05
"""Of one core, over the silence."""


@dataclass
class RunTimes:
    """When a run made progress; times are time.monotonic()'s."""

    started: float | None = None
    """When its turn in the child came."""
    progressed: float = 0.0
    cpu: float = 0.0
    """Processor seconds of the child when it progressed last."""
    seconds: float = 0.0
    """The clip's length; 0 while it is not known."""


def overrun(
    settings: Settings,
    times: RunTimes,
    *,
    now: float,
    cpu: float,
    rss: int,
    rss_allowed: int,
    deadline: datetime | None,
) -> JobError | None:
    """The reason why the run must end now, or None.

    Silence alone is not a hang: on a slow machine one chunk of frames may take minutes.  A child
    that sends nothing for hang_s and hardly uses the processor is blocked; one that computes gets
    BUSY_FACTOR times as long.
    """
    if deadline is not None and datetime.now(UTC) >= deadline:
        return DeadlinePassed(f"the deadline {deadline} passed while the job ran")
    # Until its turn a job waits for other parents' jobs: only its deadline counts.
    if times.started is None:
        return None
    allowed = settings.time_allowed(times.seconds)
    if now - times.started > allowed:
        length = f"a clip of {times.seconds:g} s" if times.seconds else "any clip"
        return Hung(f"ran for more than {allowed:g} s, which is what {length} gets")
    silence = now - times.progressed
    if silence > settings.hang_s:
        busy = cpu - times.cpu > BUSY_SHARE * silence
        if not busy or silence > BUSY_FACTOR * settings.hang_s:
            how = "busy all the while" if busy else "and idle"
            return Hung(f"no progress for {silence:.1f} s, {how}; the child was killed")
    if rss > rss_allowed:
        return DecoderCrashed(f"its child held {rss} bytes; at most {rss_allowed} are allowed")
    return None


class JobRun:
    """One run of one job in this worker."""

    def __init__(
        self,
        claim: Claim,
        body: Body,
        function: str,
        *,
        child: ChildProcess,
        settings: Settings,
        heartbeat: Heartbeat,
        wakeup: Wakeup,
    ) -> None:
        self.claim, self.body, self.function = claim, body, function
        self.child, self.heartbeat, self.wakeup = child, heartbeat, wakeup
        self.settings = settings
        self._rss_allowed = memory_allowed(self.settings)
        self._begun = time.monotonic()
        self._fetch_s = 0.0
        self._file_sha: str | None = None
        self._times = RunTimes(progressed=self._begun)
        self._other_jobs = 0
        self._planned: RunResult | None = None
        """The result once it is decided; until then the child may still give another."""
        self._kill_at: float | None = None
        self._sent = False
        """Whether the child has the job."""

    def run(self) -> RunResult:
        """Fetch and analyse; the folder of the fetched file is removed afterwards."""
        # A command that came too late for the job before must not end this one.
        self.wakeup.operator_kill = ""
        try:
            result = self._run()
        except OSError as error:
            result = self._io_failed(error)
        spent = time.monotonic() - self._begun
        return replace(result, file_sha=self._file_sha, fetch_s=self._fetch_s, total_s=spent)

    def _io_failed(self, error: OSError) -> RunResult:
        """The parent cannot go on with this job; the child must not either."""
        log.error("job.io_failed", job_id=self.claim.job_id, error=repr(error))
        if self._sent:
            # A shared child runs other parents' jobs.  It cancels this one when the connection
            # closes.
            if not self.child.shared:
                self.child.kill()
            self.child.detach()
        why = why_unusable(self.child.uploads) or f"{type(error).__name__}: {error}"
        return RunResult("hand_back", WORKER_IO, why)

    def _run(self) -> RunResult:
        if not self.body.fetches:
            return self._in_child(Path())
        folder = Path(tempfile.mkdtemp(prefix=JOB_PREFIX, dir=self.child.uploads))
        try:
            file = self._fetched(folder)
            if isinstance(file, RunResult):
                return file
            # Only now: the child must not read what other parents are fetching.
            folder = self.child.place(folder)
            return self._in_child(folder / file.name)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _fetched(self, folder: Path) -> Path | RunResult:
        """The media as a local file, fetched in a thread so that the run can be ended."""
        job = self.claim.job
        self.heartbeat.note(progress=Progress(stage="fetch", percent=0))
        fetching = FetchThread(
            job.media,
            folder,
            tenant=job.tenant,
            settings=self.settings,
            wake=self.wakeup.wake,
        )
        while not fetching.over:
            # Without the child: the fetch does not need it, and the socket of one that has gone is
            # always readable, so select() would return at once.
            self._wait(listen=False)
            self._judge()
            if self._planned is not None:
                fetching.stop()
                return self._planned
        self._fetch_s = time.monotonic() - self._begun
        if fetching.file is None:
            error = fetching.error
            if isinstance(error, Cancelled):
                return RunResult("failure", "cancelled", "cancelled by the client")
            # What the tenant may not read, such as an internal address, is in the cause alone.
            log.warning(
                "fetch.failed",
                job_id=job.job_id,
                code=error.code,
                error=str(error),
                cause=str(error.__cause__ or ""),
            )
            full = isinstance(error.__cause__, OSError) and why_unusable(self.child.uploads)
            # A file that fills the disk by itself leaves room once it is removed: that is charged.
            return RunResult("hand_back", WORKER_IO, full) if full else RunResult.of(error)
        self._file_sha = fetching.file.sha256
        self.heartbeat.note(file_sha=self._file_sha)
        return fetching.file.path

    def _in_child(self, path: Path) -> RunResult:
        claim = self.claim
        self.child.send(
            messages.Run(
                job_id=claim.job_id,
                function=self.function,
                path=str(path),
                job=claim.job.model_dump_json(by_alias=True),
                attempt=claim.attempt,
                sha256=self._file_sha or "",
                fetch_ms=self._fetch_s * 1000,
                alone=claim.alone,
            )
        )
        self._sent = True
        self._times.progressed = time.monotonic()
        while True:
            received = self._wait(listen=True)
            for message in received or ():
                result = self._handle(message)
                if result is not None:
                    return result
            if received is None:
                return self._child_gone()
            self._judge()
            if self._kill_at is not None and time.monotonic() >= self._kill_at:
                self._end_child()

    def _handle(self, message: messages.Message) -> RunResult | None:
        match message:
            case messages.Started():
                self._times.started = time.monotonic()
                # A shared child's job is claimed as one that has company, and the child is silent
                # to a job that runs alone from its start.
                if self.child.shared:
                    self.heartbeat.note_alone(self._other_jobs == 0)
                self._note_progress()
            case messages.OtherJobs(count=count):
                self._other_jobs = count
                self.heartbeat.note_alone(count == 0)
            case messages.Advanced():
                self._advance(message)
            case messages.Done(job_id=self.claim.job_id):
                return self._done(message)
            case messages.Failed(job_id=self.claim.job_id):
                return self._planned or self._failed(message)
            # Ready and Compared may come during a job too; ChildProcess.receive() handles them.
            case _:
                pass
        return None

    def _advance(self, message: messages.Advanced) -> None:
        self._note_progress()
        try:
            progress = Progress.model_validate_json(message.progress)
            partial = Verdict.model_validate_json(message.partial) if message.partial else None
            self.heartbeat.note(progress=progress, partial=partial)
        except ValidationError as error:
            log.warning("child.misunderstood", job_id=self.claim.job_id, error=str(error)[:300])
        # A report that does not have the length says 0, which would allow the longest time again.
        self._times.seconds = max(self._times.seconds, message.seconds)

    def _note_progress(self) -> None:
        self._times.progressed, self._times.cpu = time.monotonic(), self.child.cpu()

    def _done(self, message: messages.Done) -> RunResult:
        """A verdict counts only if it is valid, and about this job."""
        # A verdict that arrives during a drain is kept; one that arrives after a cancel, a deadline
        # or a lost lease must not change that end.
        if self._planned is not None and self._planned.kind != "hand_back":
            return self._planned
        try:
            verdict = Verdict.model_validate_json(message.verdict)
            evidence = Evidence.model_validate_json(message.evidence)
        except ValidationError as error:
            return self._untrusted(f"its verdict is not ralf.verdict/1: {str(error)[:300]}")
        if verdict.job_id != self.claim.job_id:
            return self._untrusted(f"its verdict is about {verdict.job_id}")
        return RunResult("verdict", verdict=verdict, evidence=evidence)

    def _untrusted(self, why: str) -> RunResult:
        # A shared child too: a file that has taken it over reaches the other parents' jobs as well.
        self.child.kill()
        self.child.detach()
        return self._crash(f"the child cannot be trusted: {why}")

    def _crash(self, why: str, *, detail: str = "") -> RunResult:
        return RunResult.of(DecoderCrashed(why), detail=detail, alone=self._other_jobs == 0)

    def _failed(self, message: messages.Failed) -> RunResult:
        # The child exits by itself a moment later.  Until then open() could still connect to a
        # shared one.
        if message.fatal:
            self.child.kill()
            self.child.detach()
        kind = by_code().get(message.code)
        if kind is None:  # it stopped without being asked, as a leaving child does
            return RunResult("hand_back", message.code, message.message)
        error, detail = kind(message.message), self.child.last_output()
        return RunResult.of(error, detail=detail, alone=self._other_jobs == 0)

    def _child_gone(self) -> RunResult:
        """The child died: we killed it as planned, or it died before or in this job."""
        how = self.child.detach()
        if self._planned is not None:
            return self._planned
        if self.wakeup.operator_kill:
            command, self.wakeup.operator_kill = self.wakeup.operator_kill, ""
            if command == "stop-job":
                return RunResult("failure", "cancelled", "an operator stopped the job")
            return RunResult("hand_back", "child_killed", "an operator killed the child")
        if self._times.started is None:
            # The child opens a file at its job's turn, so this file is not the cause.
            return RunResult("hand_back", "child_left", f"the child {how} before the job's turn")
        why = f"the child {how} in the middle of the job"
        crash = self._crash(why, detail=self.child.last_output())
        return replace(crash, blame_file=self.child.may_blame_file)

    def _wait(self, *, listen: bool) -> list[messages.Message] | None:
        """Until something happens, or TURN_S is over; None: the child has gone."""
        if listen and not self.child.alive:
            return None
        watched: list[Any] = [self.wakeup, self.child] if listen else [self.wakeup]
        ready, _, _ = select.select(watched, [], [], TURN_S)
        if self.wakeup in ready:
            self.wakeup.clear()
        return self.child.receive() if self.child in ready else []

    def _judge(self) -> None:
        """Compare the run with its limits, and plan an early end when it is over one."""
        now = self.wakeup.pulse = time.monotonic()
        if self._planned is None:
            self._obey_reply()
        if self._planned is not None and self._planned.kind != "hand_back":
            return
        error = overrun(
            self.settings,
            self._times,
            now=now,
            cpu=self.child.cpu(),
            rss=self.child.rss(),
            rss_allowed=self._rss_allowed,
            deadline=self.claim.job.deadline,
        )
        if error is not None:
            result = RunResult.of(error, alone=self._other_jobs == 0)
            # A job that hangs never acts on a Cancel, and one above the memory bound must not grow.
            grace = 0.0 if result.kind == "crash" else self.settings.cancel_grace_s
            self._plan(result, grace=grace)
        elif self._planned is None and self.wakeup.must_leave(self.settings.grace_s):
            self._plan(RunResult("hand_back", "drained", "the worker is stopping"), grace=0.0)

    def _plan(self, result: RunResult, *, grace: float) -> None:
        self._planned = result
        self._kill_at = time.monotonic() + grace
        if self._times.started is not None or grace:
            self.child.send(messages.Cancel(job_id=self.claim.job_id))

    def _end_child(self) -> None:
        """The grace is over. A shared child is spared while others' jobs run well in it."""
        assert self._planned is not None
        if not (self.child.shared and self._planned.kind == "hand_back"):
            self.child.kill()
        self.child.detach()

    def _obey_reply(self) -> None:
        """What the store answered to the last beat."""
        if self.heartbeat.reply == "cancel":
            result = RunResult("failure", "cancelled", "cancelled by the client")
            self._plan(result, grace=self.settings.cancel_grace_s)
        elif self.heartbeat.reply == "lost":
            self._plan(RunResult("lost", "lease_lost", "another worker has the job"), grace=0.0)
