"""The functions that a job may name, as they run in the child process.

Production has one function, `moderate`.  A process that was started with `--bodies test` has
the test bodies of worker/chaos/bodies.py instead; benches and chaos runs do that.  A function gets
a Task, reports its progress as it goes (a cancelled job stops there), and returns the verdict and
its pictures, or raises a named error.

Nothing heavy is imported here: moderate imports the pipeline when it first runs.
"""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Literal, Protocol

from ralf.worker.contract import Evidence, Job, Progress, Verdict
from ralf.worker.errors import Cancelled, DecoderCrashed, GpuFatal, GpuOom, JobError, RalfError
from ralf.worker.service.messages import Run
from ralf.worker.service.records import MODERATE

if TYPE_CHECKING:
    from ralf.worker.runtime import Parts

Bodies = Literal["moderate", "test"]


class Report(Protocol):
    """Report progress, the clip's seconds, and how to judge what was seen; raises Cancelled."""

    def __call__(
        self, progress: Progress, seconds: float, partial: Callable[[], Verdict] | None = None, /
    ) -> None: ...


@dataclass(frozen=True)
class Task:
    """One job as its function gets it."""

    run: Run
    job: Job
    report: Report = field(repr=False)


Work = Callable[[Task, "Parts | None"], tuple[Verdict, Evidence]]


@dataclass(frozen=True)
class Body:
    """A function that may run, and whether it wants its media fetched first."""

    work: Work
    fetches: bool
    heavy: bool
    """Whether the child must have loaded a model."""


def moderate(task: Task, parts: "Parts | None") -> tuple[Verdict, Evidence]:
    """Judge the clip; when the device's memory is full, once more with half the batch."""
    if parts is None:
        raise RalfError("moderate needs a model; the child was started without one")
    try:
        return _analyze(task, parts)
    except Exception as error:  # a library's own error says out of memory in its own way
        if not isinstance(as_job_error(error), GpuOom):
            raise
    # Outside the except block: there the error's traceback keeps the first run's tensors, and the
    # memory that they hold.
    return _analyze(task, halved(parts))


def _analyze(task: Task, parts: "Parts") -> tuple[Verdict, Evidence]:
    from pathlib import Path

    from ralf.worker.media.probe import probe
    from ralf.worker.pipeline import Ask, Partial, analyze

    run = task.run
    # The parent needs the clip's length for its time limit, before the first chunk is decoded.
    start = time.perf_counter()
    probed = probe(Path(run.path), parts.settings)
    spent = {"probe": round((time.perf_counter() - start) * 1000, 3)}
    task.report(Progress(stage="probe", percent=0), probed.duration_s)
    if run.fetch_ms:
        spent = {"fetch": run.fetch_ms, **spent}
    ask = dataclasses.replace(
        Ask.of(task.job, attempt=run.attempt, sha256=run.sha256 or None),
        probed=probed,
        spent_ms=spent,
    )

    def tell(partial: Partial) -> None:
        task.report(partial.progress, partial.duration_s, partial.verdict)

    return analyze(Path(run.path), parts, ask=ask, progress=tell)


def halved(parts: "Parts") -> "Parts":
    """The same parts with chunks of half the size, the device's cache given back."""
    import torch

    from ralf.worker.runtime import with_decoder

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return with_decoder(parts, parts.decoder.halved())


def as_job_error(error: BaseException) -> BaseException:
    """What a library's error means for the job; Cancelled and named errors stay as they are.

    An error without a name is a fault of ours that this file provokes.  It counts like a crash,
    so that after the second one a person sees it and not a third worker.
    """
    if isinstance(error, (JobError, Cancelled)):
        return error
    kind, text = type(error).__name__, str(error)
    # By name and text: isinstance would import torch, which a child with test bodies does without.
    if kind == "OutOfMemoryError":
        return GpuOom(f"the device ran out of memory: {text}")
    # After such an error every later call on the device fails, so the child must end.
    if kind == "AcceleratorError" or "CUDA error" in text or "cuDNN error" in text:
        return GpuFatal(f"the device's context is lost: {text}")
    return DecoderCrashed(f"{kind}: {text}")


ALLOWED: dict[str, Body] = {MODERATE: Body(moderate, fetches=True, heavy=True)}
"""What a worker runs. Everything else that a queue may name is refused."""


def table(bodies: Bodies) -> dict[str, Body]:
    """The functions that a process started with this option may run.

    The test bodies are imported only here and only when the command line asked for them, so that
    a production process does not even hold their code.
    """
    if bodies == "moderate":
        return ALLOWED
    found: dict[str, Body] = import_module("ralf.worker.chaos.bodies").BODIES
    return found
