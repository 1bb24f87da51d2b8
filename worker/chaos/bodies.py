"""Test bodies: jobs that do nothing, wait, crash, hang or leak on purpose.

For chaos runs, benches and tests.  A worker or a child knows them only when it was started with
`--bodies test` (see worker/service/jobs.py); production never imports this file.  Only
hold_analysis and judge need torch.  What follows a colon in the job's tag is the body's argument,
as in `sleep:2.5`.
"""

import os
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING

from ralf.worker.contract import (
    Evidence,
    Made,
    MediaFacts,
    Progress,
    Sampling,
    Threshold,
    Timeline,
    Verdict,
)
from ralf.worker.errors import GpuFatal, GpuOom
from ralf.worker.service.jobs import Body, Task, moderate

if TYPE_CHECKING:
    from ralf.worker.runtime import Parts

PREFIX = "ralf.worker.chaos.bodies."
ZEROS = "0" * 64


def blank_verdict(task: Task) -> Verdict:
    """A verdict on nothing that is valid in every field."""
    return Verdict(
        job_id=task.job.job_id,
        tag=task.job.tag,
        tenant=task.job.tenant,
        session=task.job.session,
        label="no_faces",
        score=None,
        reason="a test body examined nothing",
        threshold=Threshold(policy="test", forged_at=0.5, authentic_below=0.5),
        tracks=(),
        segments=(),
        timeline=Timeline(bin_ms=500, score=(), faces=()),
        media=_NO_MEDIA,
        made=_NOTHING.model_copy(update={"attempt": task.run.attempt}),
        finished_at=datetime.now(UTC),
    )


_NO_MEDIA = MediaFacts(
    sha256=ZEROS,
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
    manifest_sha256=ZEROS,
    weights_sha256=ZEROS,
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
    """Does nothing: what is left is the cost of the queue."""
    return blank_verdict(task), Evidence()


def weigh(task: Task, parts: "Parts | None") -> tuple[Verdict, Evidence]:
    """Reads the fetched file and reports its size, without decoding it."""
    size = len(Path(task.run.path).read_bytes())
    media = _NO_MEDIA.model_copy(update={"size_bytes": size, "sha256": task.run.sha256 or ZEROS})
    return blank_verdict(task).model_copy(update={"media": media}), Evidence()


def hold(task: Task, parts: "Parts | None") -> tuple[Verdict, Evidence]:
    """Reports half of its progress and a partial verdict, then waits for the file in its tag.

    For tests: with `hold:/path` nothing depends on how fast the machine is.
    """
    release = Path((task.job.tag or "").partition(":")[2])

    def partial() -> Verdict:
        return blank_verdict(task).model_copy(update={"partial": True})

    while not release.exists():
        task.report(Progress(stage="analyze", percent=50), 2.0, partial)
        time.sleep(0.02)
    return blank_verdict(task), Evidence()


def hold_file(task: Task, parts: "Parts | None") -> tuple[Verdict, Evidence]:
    """Holds as above, with a file that was fetched; only at its first attempt."""
    return hold(task, parts) if task.run.attempt <= 1 else trivial(task, parts)


def hold_analysis(task: Task, parts: "Parts | None") -> tuple[Verdict, Evidence]:
    """Analyses the clip; its first attempt waits half-way for the file in its tag, as hold does."""
    release = Path((task.job.tag or "").partition(":")[2])

    def report(
        progress: Progress, seconds: float, partial: Callable[[], Verdict] | None = None
    ) -> None:
        task.report(progress, seconds, partial)
        while task.run.attempt <= 1 and 0 < progress.percent < 100 and not release.exists():
            time.sleep(0.02)
            task.report(progress, seconds, partial)

    return moderate(replace(task, report=report), parts)


def judge(task: Task, parts: "Parts | None") -> tuple[Verdict, Evidence]:
    """Judges the file at the run's path as a worker does, and an image as `ralf scan` does."""
    from ralf.worker.local import for_file
    from ralf.worker.pipeline import Ask, analyze

    assert parts is not None, "a heavy body runs with a loaded model"
    path = Path(task.run.path)
    own, ask = for_file(path, parts, Ask.of(task.job, sha256=task.run.sha256))
    return moderate(task, parts) if ask.probed is None else analyze(path, own, ask=ask)


def sleep(task: Task, parts: "Parts | None") -> tuple[Verdict, Evidence]:
    """Takes the seconds in its tag, reports progress, and stops when it is cancelled."""
    seconds = _argument(task, 1.0)
    start = time.monotonic()
    while (spent := time.monotonic() - start) < seconds:
        task.report(Progress(stage="analyze", percent=100.0 * spent / seconds), seconds)
        time.sleep(min(0.02, seconds - spent))
    return blank_verdict(task), Evidence()


def sleep_once(task: Task, parts: "Parts | None") -> tuple[Verdict, Evidence]:
    """Sleeps at its first attempt only, so that a test need not wait for the second."""
    return sleep(task, parts) if task.run.attempt <= 1 else trivial(task, parts)


def crash(task: Task, parts: "Parts | None") -> tuple[Verdict, Evidence]:
    """Aborts the process as a broken decoder does, without an exception."""
    time.sleep(_argument(task, 0.0))
    os.abort()


def crash_once(task: Task, parts: "Parts | None") -> tuple[Verdict, Evidence]:
    """Aborts at its first attempt only."""
    return crash(task, parts) if task.run.attempt <= 1 else trivial(task, parts)


def hang(task: Task, parts: "Parts | None") -> tuple[Verdict, Evidence]:
    """Blocks for ever and does not notice a cancel, as native code does."""
    while True:
        time.sleep(3600)


def spin(task: Task, parts: "Parts | None") -> tuple[Verdict, Evidence]:
    """Computes for ever in one native call that holds the interpreter's lock."""
    sum(repeat(0))
    return blank_verdict(task), Evidence()


def leak(task: Task, parts: "Parts | None") -> tuple[Verdict, Evidence]:
    """Keeps the MiB in its tag for good, then succeeds."""
    # Random bytes: pages of zeros that were never written need no memory.
    _LEAKED.append(bytearray(os.urandom(1024) * (1024 * int(_argument(task, 32.0)))))
    return blank_verdict(task), Evidence()


def oom(task: Task, parts: "Parts | None") -> tuple[Verdict, Evidence]:
    """Reports that the device's memory is full at its first attempt."""
    if task.run.attempt <= 1:
        raise GpuOom("the test body was asked to run out of memory")
    return blank_verdict(task), Evidence()


def poison(task: Task, parts: "Parts | None") -> tuple[Verdict, Evidence]:
    """Loses the device's context at its first attempt; the child must be replaced."""
    if task.run.attempt <= 1:
        raise GpuFatal("the test body was asked to lose the device")
    return blank_verdict(task), Evidence()


_LEAKED: list[bytearray] = []

BODIES: dict[str, Body] = {
    PREFIX + work.__name__: Body(
        work,
        fetches=work in (weigh, hold_file, hold_analysis),
        heavy=work in (hold_analysis, judge),
    )
    for work in (
        *(
            trivial,
            weigh,
            hold,
            hold_file,
            hold_analysis,
            judge,
            sleep,
            sleep_once,
            crash,
            crash_once,
            hang,
            spin,
            leak,
        ),
        *(oom, poison),
    )
}
