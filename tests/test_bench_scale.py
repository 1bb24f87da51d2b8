"""The bench of many workers: a few jobs with one and with two, and what is made of them."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from ralf.worker.bench import scale
from ralf.worker.bench.scale import Turn, record
from ralf.worker.service.processes import ProcessFailed


def test_the_record_tells_what_more_workers_add():
    """Small: the figures are there and sane; what they are is the bench's business."""
    made = json.loads(record((1, 2), {"wait": 6, "empty": 10}, turns=1).dump())

    assert made["theme"] == "scale"
    assert set(made["timings"]) == {
        *("wait, 1 worker", "wait, 2 workers", "empty, 1 worker", "empty, 2 workers"),
    }
    assert made["timings"]["wait, 1 worker"]["median_s"] >= scale.WAIT_S
    assert made["timings"]["wait, 2 workers"]["median_s"] >= scale.WAIT_S / 2
    assert set(made["ratios"]) == {"wait: 2 / 1", "empty: 2 / 1"}
    for load in ("wait", "empty"):
        facts = made["facts"][load]
        assert facts["linearity"]["1"] == 1
        assert facts["linearity"]["2"] == pytest.approx(made["ratios"][f"{load}: 2 / 1"] / 2, 0.05)
        assert facts["jobs_per_s"].keys() == {"1", "2"}


def test_linearity_and_the_bound_of_the_cores_are_arithmetic():
    """Two workers that end a job in 6 ms where one takes 10 ms, at 4 ms of processor a job."""
    facts = scale._facts({1: [Turn(0.010, 0.004)], 2: [Turn(0.006, 0.004)]}, cores=2)

    assert facts["jobs_per_s"] == {"1": 100.0, "2": 166.7}
    assert facts["linearity"] == {"1": 1.0, "2": 0.833}
    assert facts["cores_busy"] == {"1": 0.4, "2": 0.67}
    assert facts["most_jobs_per_s_of_these_cores"] == 500


def started_all_but_workers(add: Callable[..., Any]) -> Callable[..., Any]:
    """A supervisor's `add` that forgets the workers."""

    def added(supervisor: Any, role: str, *arguments: str) -> Any:
        return None if role == "worker" else add(supervisor, role, *arguments)

    return added


def test_a_group_that_does_not_come_up_is_an_error(monkeypatch: pytest.MonkeyPatch):
    """Not a wait without an end.  None is started: a quick one might be up at the first look."""
    monkeypatch.setattr(scale, "PATIENCE_S", 0.0)
    monkeypatch.setattr(scale.Supervisor, "add", started_all_but_workers(scale.Supervisor.add))

    with pytest.raises(ProcessFailed, match="1 workers did not come up"):
        record((1,), {"empty": 1}, turns=1)
