"""A shadow's look: after the verdict, from a file that may be gone, and never to a job's harm."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ralf.worker import telemetry
from ralf.worker.chaos import bodies
from ralf.worker.contract import Evidence, Job, Progress, Verdict
from ralf.worker.errors import CorruptMedia, GpuFatal
from ralf.worker.service import messages, shadow
from ralf.worker.service.child_process import ChildProcess
from ralf.worker.service.jobs import Body, Task
from ralf.worker.service.shadow import Comparison, ShadowRun
from ralf.worker.settings import Settings
from ralf.worker.telemetry import Metrics
from tests.test_child import ask, document, until

SHADOW: Any = "the shadow's parts"


def unheard(*_: object) -> None:
    """Nobody listens."""


def task(path: Path) -> Task:
    """A job whose file lies there."""
    return Task(ask("j1", "weigh").model_copy(update={"path": str(path)}),
                Job.model_validate_json(document("j1")), unheard)  # fmt: skip


def second(path: Path, work: Any = bodies.weigh, took_s: float = 0.0) -> ShadowRun:
    """The same job once more."""
    first = task(path)
    verdict = bodies.blank_verdict(first).model_copy(
        update={"label": "likely_forged", "score": 0.9}
    )
    return ShadowRun(first, verdict, Body(work, fetches=True, heavy=True), "m@1", SHADOW, took_s)


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """Ten bytes."""
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"0123456789")
    return path


def open_files() -> int:
    """Descriptors of this process."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_the_file_is_read_though_the_parent_has_removed_it(clip: Path):
    """The name goes with the verdict; the descriptor stays until the shadow has looked."""
    sizes: list[int] = []

    def work(asked: Task, parts: Any) -> tuple[Verdict, Evidence]:
        verdict, evidence = bodies.weigh(asked, parts)
        sizes.append(verdict.media.size_bytes)
        assert parts is SHADOW
        assert not (asked.job.evidence.thumbnails or asked.job.evidence.residuals)
        return verdict.model_copy(update={"score": 0.4, "label": "inconclusive"}), evidence

    again = second(clip, work)
    before = open_files()
    clip.unlink()
    found = again.compare()

    assert [10] == sizes
    assert ("likely_forged", "inconclusive", "") == (found.label, found.shadow_label, found.error)
    assert 0.5 == pytest.approx(found.difference)
    assert before - 1 == open_files()


@pytest.mark.parametrize(
    ("error", "told", "fatal"),
    [
        (CorruptMedia("torn"), "CorruptMedia: torn", False),
        (KeyError("x"), "DecoderCrashed: KeyError: 'x'", False),
        (GpuFatal("lost"), "GpuFatal: lost", True),
        (MemoryError(), "DecoderCrashed: MemoryError: ", True),
    ],
)
def test_whatever_goes_wrong_is_part_of_the_comparison(
    clip: Path, error: Exception, told: str, fatal: bool
):
    """A device that is lost, or no memory: the process must not go on, but the job has ended."""

    def work(asked: Task, parts: Any) -> tuple[Verdict, Evidence]:
        raise error

    again = second(clip, work)
    found = again.compare()

    assert (told, None, None) == (found.error, found.shadow_label, found.difference)
    assert fatal == again.fatal


def test_a_file_that_was_gone_before_is_told(tmp_path: Path):
    """No file, no look."""
    assert "FileNotFoundError" in second(tmp_path / "none").compare().error


def test_a_shadow_that_takes_too_long_or_is_in_the_way_stops(
    clip: Path, monkeypatch: pytest.MonkeyPatch
):
    """At its next progress."""

    def work(asked: Task, parts: Any) -> tuple[Verdict, Evidence]:
        for _ in range(10_000):
            asked.report(Progress(stage="analyze", percent=1), 1.0)
            time.sleep(0.001)
        raise AssertionError("never stopped")

    assert second(clip, work).compare(leaving=lambda: True).error.startswith("stopped")
    monkeypatch.setattr(shadow, "SLACK_S", 0.05)
    assert second(clip, work).compare().error.startswith("stopped: more than 0 s")


def test_two_shadows_do_not_run_at_once(clip: Path):
    """The second is skipped, and says so; afterwards there is room again."""
    inner: list[Comparison] = []

    def work(asked: Task, parts: Any) -> tuple[Verdict, Evidence]:
        inner.append(second(clip).compare())
        return bodies.weigh(asked, parts)

    assert "" == second(clip, work).compare().error
    assert ["RalfError: skipped: another job's shadow was still running"] == [
        each.error.replace("DecoderCrashed: ", "") for each in inner
    ]
    assert "" == second(clip).compare().error


def test_what_differs_is_counted(capsys: pytest.CaptureFixture[str]):
    """Agreed, disagreed, failed; the label is the operator's word, whatever the child says."""
    metrics, settings = Metrics(), Settings(shadow="3f9c2a1b")
    seen = Comparison(job_id="j1", model="m@1", label="likely_forged", score=0.9, shadow="evil")
    for update in (
        {"shadow_label": "likely_forged", "shadow_score": 0.85},
        {"shadow_label": "inconclusive", "shadow_score": 0.4},
        {"error": "DecoderCrashed: x"},
    ):
        telemetry.shadow_compared(seen.model_copy(update=update), settings, metrics)

    def value(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(name, {"shadow": "3f9c2a1b", **labels})

    assert [1.0, 1.0, 1.0] == [
        value("ralf_shadow_jobs_total", result=result)
        for result in ("agreed", "disagreed", "failed")
    ]
    assert 2.0 == value("ralf_shadow_score_difference_count")
    assert 1.0 == value("ralf_shadow_score_difference_bucket", le="0.1")
    assert 0.55 == pytest.approx(value("ralf_shadow_score_difference_sum"))


# in a real child


CHILD = """
import os, socket, sys
from ralf.worker.chaos import bodies
from ralf.worker.service import child, jobs
from ralf.worker.service import models
from ralf.worker.settings import Settings

class Parts:
    pass

class Models(models.LazyModels):
    def of(self, job):
        return "own"
    def shadow_of(self, job, parts):
        return parts_of_shadow
    def marked(self, verdict, job):
        return verdict

def work(task, parts):
    if parts is parts_of_shadow and task.job.tag == "abort":
        os.abort()
    return bodies.weigh(task, parts)

class parts_of_shadow:
    class artifact:
        version = "12345678"
        class manifest:
            name = "m"

listener = socket.socket(fileno=int(sys.argv[1]))
table = {bodies.PREFIX + "weigh": jobs.Body(work, fetches=True, heavy=True)}
settings = Settings()
made = child.Child(
    listener, settings=settings, table=table, models=Models(settings), capacity=1
)
os._exit(made.serve())
"""


class ShadowedChild(ChildProcess):
    """Its child has a shadow that may die."""

    def _command(self, descriptor: int) -> list[str]:
        return [sys.executable, "-c", CHILD, str(descriptor)]


@contextmanager
def shadowed() -> Iterator[ChildProcess]:
    """That child, ready."""
    child = ShadowedChild(Settings(shadow="12345678"))
    try:
        child.open()
        until(child, lambda said: child.ready is not None)
        yield child
    finally:
        child.close()


def run(clip: Path, job_id: str, tag: str | None = None) -> messages.Run:
    """Weigh that file."""
    return ask(job_id, "weigh", tag=tag).model_copy(update={"path": str(clip)})


def test_the_verdict_comes_first_and_the_comparison_after_it(clip: Path):
    """Also when the next job has come meanwhile."""
    with shadowed() as child:
        said: list[messages.Message] = []
        for job_id in ("a", "b"):
            child.send(run(clip, job_id))
            said += until(child, lambda heard: any(isinstance(m, messages.Done) for m in heard))
        so_far = sum(isinstance(m, messages.Compared) for m in said)
        said += until(
            child, lambda heard: sum(isinstance(m, messages.Compared) for m in heard) + so_far == 2
        )

    names = [type(m).__name__ for m in said if not isinstance(m, messages.OtherJobs)]
    assert ["Started", "Done", "Compared", "Started", "Done", "Compared"] == names
    found = [json.loads(m.document) for m in said if isinstance(m, messages.Compared)]
    assert ["a", "b"] == [each["job_id"] for each in found]
    assert ["m@12345678"] * 2 == [each["shadow"] for each in found]


def test_a_shadow_that_takes_the_child_down_costs_no_job(clip: Path):
    """The job has its verdict; the next one, not begun, finds another child."""
    with shadowed() as child:
        child.send(run(clip, "a", tag="abort"))
        said = until(child, lambda heard: any(isinstance(m, messages.Done) for m in heard))
        child.send(run(clip, "b"))
        said += until(child, lambda heard: False)  # until it has gone
        how = child.detach()
        assert ["Started", "Done"] == [type(m).__name__ for m in said]
        assert "died of SIGABRT" == how
        child.open()
        until(child, lambda heard: child.ready is not None)
        child.send(run(clip, "b"))
        until(child, lambda heard: any(isinstance(m, messages.Done) for m in heard))
