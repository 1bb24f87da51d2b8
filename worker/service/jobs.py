"""What a job is, as run in the child: a function on a list, never a name out of Redis.

`ralf.worker.service.jobs.moderate` is the job.  The others have torch-free bodies that misbehave on
purpose; a child knows them only when it was started with `--bodies test`, which the commands for
chaos and benches do.  A body gets a Task, tells its progress as it goes (telling is also where a
cancelled job stops), and returns the verdict and its pictures or raises a named error.

Nothing heavy is imported here; moderate imports the pipeline when it first runs.
"""

import dataclasses
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import repeat
from typing import TYPE_CHECKING, Literal, Protocol

from ralf.worker.contract import (
    Evidence,
    Job,
    Made,
    MediaFacts,
    Progress,
    Sampling,
    Threshold,
    Timeline,
    Verdict,
)
from ralf.worker.errors import Cancelled, DecoderCrashed, GpuFatal, GpuOom, JobError, RalfError
from ralf.worker.service.messages import Run
from ralf.worker.service.records import MODERATE

if TYPE_CHECKING:
    from ralf.worker.runtime import Parts

PREFIX = "ralf.worker.service.jobs."
Bodies = Literal["moderate", "test"]
_ZEROS = "0" * 64


class Report(Protocol):
    """Tell progress, the clip's seconds, and how to judge what was seen; raises Cancelled."""

    def __call__(
        self, progress: Progress, seconds: float, partial: Callable[[], Verdict] | None = None, /
    ) -> None: ...


@dataclass(frozen=True)
class Task:
    """One job in the child's hands."""

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
    """Walk the clip; out of device memory means once more with half the batch."""
    if parts is None:
        raise RalfError("moderate needs a model; the child was started without one")
    try:
        return _analyze(task, parts)
    except Exception as error:  # a library's own error says out of memory in its own way
        if not isinstance(as_job_error(error), GpuOom):
            raise
    return _analyze(task, halved(parts))


def _analyze(task: Task, parts: "Parts") -> tuple[Verdict, Evidence]:
    from pathlib import Path

    from ralf.worker.media.probe import probe
    from ralf.worker.pipeline import Ask, Partial, analyze

    run = task.run
    # The parent times the job by the clip's length, and the first chunk may take long.
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

    An error that nobody named is a fault of ours that this file provokes: counted like a crash,
    so that the second time a person gets to look at it instead of a third worker.
    """
    if isinstance(error, (JobError, Cancelled)):
        return error
    kind, text = type(error).__name__, str(error)
    if kind == "OutOfMemoryError":
        return GpuOom(f"the device ran out of memory: {text}")
    if kind == "AcceleratorError" or "CUDA error" in text or "cuDNN error" in text:
        return GpuFatal(f"the device's context is lost: {text}")
    return DecoderCrashed(f"{kind}: {text}")


def blank_verdict(task: Task) -> Verdict:
    """A verdict on nothing that is valid in every field."""
    return Verdict(
        job_id=task.job.job_id,
        tag=task.job.tag,
        tenant=task.job.tenant,
        session=task.job.session,
        label="no_faces",
        score=None,
        reason="a test body looked at nothing",
        threshold=Threshold(policy="test", forged_at=0.5, authentic_below=0.5),
        tracks=(),
        segments=(),
        timeline=Timeline(bin_ms=500, score=(), faces=()),
        media=_NO_MEDIA,
        made=_NOTHING.model_copy(update={"attempt": task.run.attempt}),
        finished_at=datetime.now(UTC),
    )


_NO_MEDIA = MediaFacts(
    sha256=_ZEROS,
    size_bytes=0,
    container="none",
    codec="none",
    pixel_format="none",
    duration_ms=0,
    frame_rate=0.0,
    variable_rate=False,
    frames=0,
    width=0,
    height=0,
    rotation=0,
    colour="none",
)
_NOTHING = Made(
    ralf="test",
    model="none",
    version="none",
    manifest_sha256=_ZEROS,
    weights_sha256=_ZEROS,
    engine="none",
    precision="none",
    device="none",
    decoder="none",
    colour_policy="none",
    sampling=Sampling(),
    finder={},
    calibration={},
    aggregation={},
    frames_asked=0,
    frames_decoded=0,
    frames_replaced=0,
    faces=0,
    stages_ms={},
    host=os.uname().nodename,
)


def _argument(task: Task, default: float) -> float:
    """The number after the colon in the job's tag, as in `sleep:2.5`."""
    _, _, text = (task.job.tag or "").partition(":")
    try:
        return float(text)
    except ValueError:
        return default


def trivial(task: Task, parts: "Parts | None") -> tuple[Verdict, Evidence]:
    """Nothing at all: what is left is the cost of the queue."""
    return blank_verdict(task), Evidence()


def weigh(task: Task, parts: "Parts | None") -> tuple[Verdict, Evidence]:
    """Reads the fetched file and says its size: the walk without the looking."""
    from pathlib import Path

    size = len(Path(task.run.path).read_bytes())
    media = _NO_MEDIA.model_copy(update={"size_bytes": size, "sha256": task.run.sha256 or _ZEROS})
    return blank_verdict(task).model_copy(update={"media": media}), Evidence()


def sleep(task: Task, parts: "Parts | None") -> tuple[Verdict, Evidence]:
    """A well-behaved job of so many seconds: tells progress, stops when cancelled."""
    seconds = _argument(task, 1.0)
    start = time.monotonic()
    while (spent := time.monotonic() - start) < seconds:
        task.report(Progress(stage="analyze", percent=100.0 * spent / seconds), seconds)
        time.sleep(min(0.02, seconds - spent))
    return blank_verdict(task), Evidence()


def sleep_once(task: Task, parts: "Parts | None") -> tuple[Verdict, Evidence]:
    """Sleeps at its first attempt only: whoever interrupts that need not wait for the second."""
    return sleep(task, parts) if task.run.attempt <= 1 else trivial(task, parts)


def crash(task: Task, parts: "Parts | None") -> tuple[Verdict, Evidence]:
    """Dies as a decoder does: no exception, no farewell."""
    time.sleep(_argument(task, 0.0))
    os.abort()


def crash_once(task: Task, parts: "Parts | None") -> tuple[Verdict, Evidence]:
    """Dies at its first attempt only."""
    return crash(task, parts) if task.run.attempt <= 1 else trivial(task, parts)


def hang(task: Task, parts: "Parts | None") -> tuple[Verdict, Evidence]:
    """Blocks for ever and hears nothing, as native code does."""
    while True:
        time.sleep(3600)


def spin(task: Task, parts: "Parts | None") -> tuple[Verdict, Evidence]:
    """Computes for ever in one call into native code, the interpreter's lock in its hand."""
    sum(repeat(0))
    return blank_verdict(task), Evidence()


def leak(task: Task, parts: "Parts | None") -> tuple[Verdict, Evidence]:
    """Keeps so many MiB for good, and then is done."""
    _LEAKED.append(bytearray(os.urandom(1024) * (1024 * int(_argument(task, 32.0)))))
    return blank_verdict(task), Evidence()


def oom(task: Task, parts: "Parts | None") -> tuple[Verdict, Evidence]:
    """Finds the device's memory full at its first attempt."""
    if task.run.attempt <= 1:
        raise GpuOom("the test body was asked to run out of memory")
    return blank_verdict(task), Evidence()


def poison(task: Task, parts: "Parts | None") -> tuple[Verdict, Evidence]:
    """Loses the device's context at its first attempt; the child must not be used again."""
    if task.run.attempt <= 1:
        raise GpuFatal("the test body was asked to lose the device")
    return blank_verdict(task), Evidence()


_LEAKED: list[bytearray] = []

ALLOWED: dict[str, Body] = {MODERATE: Body(moderate, fetches=True, heavy=True)}
"""What a worker runs. Everything else that a queue may name is refused."""
TESTS: dict[str, Body] = {
    PREFIX + work.__name__: Body(work, fetches=work is weigh, heavy=False)
    for work in (
        *(trivial, weigh, sleep, sleep_once, crash, crash_once, hang, spin, leak, oom, poison),
    )
}


def table(bodies: Bodies) -> dict[str, Body]:
    """The functions that a worker started so may run."""
    return ALLOWED if bodies == "moderate" else TESTS
