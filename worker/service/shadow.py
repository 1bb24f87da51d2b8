"""Scores a job a second time with a version that is not promoted, and compares the two.

This happens after the verdict was sent, while the job still counts as running in the child.  The
file is read through a descriptor, since the parent may have removed its name.  A shadow costs the
worker time and can never harm the job: not when it fails, not when it runs out of memory, and when
it takes the whole process down, the job has its verdict and no other job is blamed.  A shadow that
takes TIMES as long as the job did is stopped; one that does not react ends with its child.

The result is a Comparison, which the parent logs and counts.  A shadow's verdict is never kept,
shown or pushed.
"""

import contextlib
import faulthandler
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pydantic import Field

from ralf.kernels.manifest import Strict, Unit
from ralf.worker.contract import EvidencePolicy, Label, Progress, Verdict
from ralf.worker.errors import Cancelled, GpuFatal, RalfError
from ralf.worker.service.jobs import Body, Task, as_job_error

if TYPE_CHECKING:
    from ralf.worker.runtime import Parts

TIMES = 10.0
SLACK_S = 30.0
# One at a time, since faulthandler has one alarm for the whole process: a second would replace it.
_BUSY = threading.Lock()


class Comparison(Strict):
    """Two versions on one job."""

    job_id: str
    model: str = Field(max_length=200)
    """NAME@VERSION that gave the verdict."""
    label: Label
    score: Unit | None
    shadow: str = Field(max_length=200)
    shadow_label: Label | None = None
    """None when the shadow has no verdict; `error` says why."""
    shadow_score: Unit | None = None
    seconds: float = Field(0.0, ge=0)
    error: str = Field("", max_length=500)

    @property
    def difference(self) -> float | None:
        """Between the scores; None when one is missing."""
        if self.score is None or self.shadow_score is None:
            return None
        return abs(self.score - self.shadow_score)


@dataclass
class ShadowRun:
    """The second run of a job; made before its verdict is sent."""

    task: Task
    verdict: Verdict
    body: Body
    model: str
    """NAME@VERSION of the shadow."""
    parts: "Parts" = field(repr=False)
    took_s: float = 0.0
    fatal: bool = False
    """Set when the device's context was lost: the process must not go on."""
    _descriptor: int = -1

    def __post_init__(self) -> None:
        with contextlib.suppress(OSError):  # the run itself will report that there is no file
            self._descriptor = os.open(self.task.run.path, os.O_RDONLY | os.O_CLOEXEC)

    def compare(self, leaving: Callable[[], bool] = lambda: False) -> Comparison:
        """Analyse the file with the shadow; an error becomes part of the comparison."""
        made, start = self.verdict.made, time.monotonic()
        seen: Verdict | None = None
        why = ""
        try:
            # Twice the time: a shadow that still reports progress is stopped by report() before the
            # alarm, which ends the whole child.
            with _alone(2 * self._allowed_s):
                seen = self._walked(leaving, start)
        except Cancelled:
            why = f"stopped: more than {self._allowed_s:.0f} s, or the worker is leaving"
        except BaseException as error:  # noqa: BLE001  the border: the job has its verdict
            named = as_job_error(error)
            self.fatal = isinstance(named, GpuFatal) or isinstance(error, MemoryError)
            why = f"{type(named).__name__}: {named}"[:500]
        finally:
            self.close()
        return Comparison(
            job_id=self.task.job.job_id,
            model=f"{made.model}@{made.version}",
            label=self.verdict.label,
            score=self.verdict.score,
            shadow=self.model,
            shadow_label=seen.label if seen else None,
            shadow_score=seen.score if seen else None,
            seconds=round(time.monotonic() - start, 3),
            error=why,
        )

    def close(self) -> None:
        """Close the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    @property
    def _allowed_s(self) -> float:
        return TIMES * self.took_s + SLACK_S

    def _walked(self, leaving: Callable[[], bool], start: float) -> Verdict:
        def report(progress: Progress, seconds: float, partial: object = None) -> None:
            if leaving() or time.monotonic() - start > self._allowed_s:
                raise Cancelled

        # The name may be gone, and the body wants a path: this one opens the file from its start.
        path = f"/proc/self/fd/{self._descriptor}"
        run = self.task.run.model_copy(update={"path": path, "fetch_ms": 0.0})
        # Its pictures would be made for nothing.
        plain = EvidencePolicy(thumbnails=False, residuals=False, retain=False)
        job = self.task.job.model_copy(update={"evidence": plain})
        return self.body.work(Task(run, job, report), self.parts)[0]


@contextlib.contextmanager
def _alone(seconds: float) -> Iterator[None]:
    """One shadow at a time in a process; the alarm works even when Python is stuck in C."""
    if not _BUSY.acquire(blocking=False):
        raise RalfError("skipped: another job's shadow was still running")
    try:
        faulthandler.dump_traceback_later(seconds, exit=True)
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        _BUSY.release()
