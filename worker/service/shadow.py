"""A second look at a job with a version that is not promoted, and what differed.

It happens after the verdict has been said, in the turn of the job that it belongs to, from a
descriptor that keeps the fetched file readable though the parent has removed its name.  So it costs
the worker time and the job nothing: not when it fails, not when it runs out of memory, and when it
takes the whole process down, the job has its verdict and no other ran unwarned beside it.  One
that takes TIMES as long as the job did is stopped; one that hears nothing is ended with its child.

What comes out is a Comparison, told to the parent for its log and its metrics.  No verdict of a
shadow is kept, shown or pushed.
"""

import contextlib
import faulthandler
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
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
    """None where the shadow came to no verdict; `error` says why."""
    shadow_score: Unit | None = None
    seconds: float = Field(0.0, ge=0)
    error: str = Field("", max_length=500)

    @property
    def difference(self) -> float | None:
        """Of the scores; None where one has none."""
        if self.score is None or self.shadow_score is None:
            return None
        return abs(self.score - self.shadow_score)


@dataclass
class Second:
    """A job that is to be looked at again; made before its verdict is said."""

    task: Task
    verdict: Verdict
    body: Body
    model: str
    """NAME@VERSION of the shadow."""
    parts: "Parts" = field(repr=False)
    took_s: float = 0.0
    fatal: bool = False
    """Afterwards: the device's context was lost, and the process must not go on."""
    _descriptor: int = -1

    def __post_init__(self) -> None:
        with contextlib.suppress(OSError):  # the look itself will say that there is no file
            self._descriptor = os.open(self.task.run.path, os.O_RDONLY | os.O_CLOEXEC)

    def look(self, leaving: Callable[[], bool] = lambda: False) -> Comparison:
        """Walk the file with the shadow; whatever goes wrong is part of the comparison."""
        made, start = self.verdict.made, time.monotonic()
        seen: Verdict | None = None
        why = ""
        try:
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
        """Let go of the file."""
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

        run = replace(self.task.run, path=f"/proc/self/fd/{self._descriptor}", fetch_ms=0.0)
        plain = EvidencePolicy(thumbnails=False, residuals=False, retain=False)
        job = self.task.job.model_copy(update={"evidence": plain})
        return self.body.work(Task(run, job, report), self.parts)[0]


@contextlib.contextmanager
def _alone(seconds: float) -> Iterator[None]:
    """One shadow at a time in a process; the alarm rings in C, whatever Python is stuck in."""
    if not _BUSY.acquire(blocking=False):
        raise RalfError("skipped: another job's shadow was still running")
    try:
        faulthandler.dump_traceback_later(seconds, exit=True)
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        _BUSY.release()
