"""A child that may not compile is replaced by one that did, between two jobs."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from structlog.testing import capture_logs

from ralf.worker import telemetry
from ralf.worker.service import child_process, child_supervisor, messages, sandbox
from ralf.worker.service.child_process import ChildProcess
from ralf.worker.service.child_supervisor import ChildSupervisor
from ralf.worker.settings import Settings
from tests import waiting
from tests.test_child import alive, answer, answered, ask, until

FIRST, SECOND = "aaaaaaaa", "bbbbbbbb"


@dataclass
class Parent:
    """A worker's side: its child, the supervisor, and the world of its child."""

    child: ChildProcess
    supervisor: ChildSupervisor
    metrics: telemetry.Metrics
    world: Path

    @property
    def facts(self) -> messages.EngineFacts:
        """Of the ready child."""
        assert self.child.ready is not None
        return self.child.ready.facts

    @property
    def replaced(self) -> float:
        """Children that were replaced because they could not compile."""
        counted = self.metrics.registry.get_sample_value(
            "ralf_child_restarts_total", {"reason": "uncompiled"}
        )
        return counted or 0.0

    def promote(self, version: str) -> None:
        """In one step, since the child reads it."""
        (self.world / "version.new").write_text(version)
        (self.world / "version.new").replace(self.world / "version")

    def runs(self, engine: str) -> bool:
        """Whether that engine is in use, as the worker finds before its next job."""
        self.supervisor.ensure_ready()
        return self.facts.engine == engine

    def job(self, name: str) -> str:
        """One job to its end; what the child answered."""
        return answer(self.child, ask(name, "trivial")).type


@contextmanager
def parent(monkeypatch: pytest.MonkeyPatch, shared: Path | None = None) -> Iterator[Parent]:
    """With a child that has compiled the first version."""
    monkeypatch.setattr(child_process, "CHILD_MODULE", "tests.compiling_child")
    settings = replace(Settings(), model="net", child_max_jobs=1000)
    link = ChildProcess(settings, bodies="test", shared=shared, capacity=2 if shared else 1)
    metrics = telemetry.Metrics()
    wakeup: Any = SimpleNamespace(stopping=False, pulse=0.0)
    made = Parent(
        link, ChildSupervisor(link, wakeup, metrics), metrics, link.folder / sandbox.SCRATCH
    )
    try:
        made.promote(FIRST)
        made.supervisor.start()
        assert (FIRST, "torch", False) == (
            made.facts.version,
            made.facts.engine,
            made.facts.loaded_late,
        )
        yield made
    finally:
        pid = link.pid
        if shared and pid:
            link.kill()
        link.close()


def test_jobs_go_on_while_another_child_compiles_what_was_promoted(
    monkeypatch: pytest.MonkeyPatch,
):
    """The old child runs the version uncompiled; then the new one takes its place."""
    with parent(monkeypatch) as worker:
        (worker.world / "wait").touch()
        worker.promote(SECOND)
        (worker.world / "wait").unlink()
        waiting.until(lambda: worker.runs("torch-eager"), lambda: worker.facts)
        (worker.world / "wait").touch()
        old = worker.child.pid
        assert (SECOND, True) == (worker.facts.version, worker.facts.loaded_late)
        assert worker.child.remarks().startswith("SLOW")
        worker.supervisor.ensure_ready()
        assert worker.child.next is not None

        assert ["done", "done"] == [worker.job("j1"), worker.job("j2")]
        assert old == worker.child.pid
        (worker.world / "wait").unlink()
        waiting.until(lambda: worker.runs("torch"), lambda: worker.facts)

        assert worker.child.pid != old and not alive(old)
        assert (SECOND, False) == (worker.facts.version, worker.facts.loaded_late)
        assert "done" == worker.job("j3")
        assert 1 == worker.child.jobs_done
        assert 1.0 == worker.replaced
        worker.supervisor.ensure_ready()
        assert worker.child.next is None


def test_a_next_child_that_does_not_load_leaves_the_old_one_and_is_tried_later(
    monkeypatch: pytest.MonkeyPatch,
):
    """A device may have no room for two."""
    with parent(monkeypatch) as worker, capture_logs() as events:
        worker.promote(SECOND)
        waiting.until(lambda: worker.facts.version == SECOND or worker.runs("torch-eager"))
        old = worker.child.pid
        (worker.world / "broken").touch()

        def gave_up() -> bool:
            worker.supervisor.ensure_ready()
            return "child.next_unready" in [event["event"] for event in events]

        waiting.until(gave_up)
        (failed,) = [event for event in events if event["event"] == "child.next_unready"]
        assert "the device is full" in failed["error"]
        worker.supervisor.ensure_ready()
        assert worker.child.next is None
        assert (old, "done") == (worker.child.pid, worker.job("j1"))

        (worker.world / "broken").unlink()
        later = time.monotonic() + child_supervisor.RETRY_NEXT_S
        monkeypatch.setattr(child_supervisor.time, "monotonic", lambda: later)
        worker.supervisor.ensure_ready()
        monkeypatch.undo()
        assert worker.child.next is not None


def test_parents_of_one_child_start_one_other_and_their_jobs_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """A job that runs in the old child ends there; each parent then uses the new one."""
    shared = tmp_path / "gpu0"
    with parent(monkeypatch, shared) as one, parent(monkeypatch, shared) as other:
        old, release = one.child.pid, tmp_path / "release"
        assert old == other.child.pid
        one.promote(SECOND)
        waiting.until(lambda: one.runs("torch-eager"), lambda: one.facts)
        other.child.send(ask("long", "hold", tag=f"hold:{release}"))
        until(other.child, lambda said: any(each.type == "started" for each in said))
        waiting.until(lambda: one.runs("torch"), lambda: one.facts)
        new = one.child.pid
        assert new != old and alive(old)
        assert "done" == one.job("short")
        release.touch()
        assert "done" == until(other.child, answered)[-1].type

        waiting.until(lambda: other.runs("torch"), lambda: other.facts)
        assert new == other.child.pid
        assert 1.0 == one.replaced and other.child.next is None
        assert "done" == other.job("after")
