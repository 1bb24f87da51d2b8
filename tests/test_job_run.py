"""When a run must end: its time, its silence, its memory, its deadline."""

from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ralf.worker.contract import Failure
from ralf.worker.service import job_run
from ralf.worker.service.run_result import RunResult, store_result
from ralf.worker.settings import Settings


@given(st.floats(0, 1e6), st.floats(0, 1e6))
def test_the_time_allowed_grows_with_the_clip_within_its_bounds(one: float, other: float):
    """clamp(60 + 0.5 × seconds, 120, 1800); an unknown length gets the most."""
    settings = Settings()
    allowed = settings.time_allowed(one)

    assert settings.time_allowed(0) == 1800
    assert 120 <= allowed <= 1800
    if 0 < other <= one:
        assert settings.time_allowed(other) <= allowed
    if 120 <= one <= 3480:
        assert allowed == pytest.approx(60 + 0.5 * one)


@pytest.mark.parametrize(
    ("silent_s", "cpu_s", "code"),
    [
        (59, 0, None),
        (61, 0, "job_timeout"),
        (61, 30, None),
        (299, 200, None),
        (301, 250, "job_timeout"),
    ],
)
def test_silence_is_a_hang_sooner_when_nothing_is_computed(
    silent_s: float, cpu_s: float, code: str | None
):
    """A slow machine is not a hung one."""
    times = job_run.RunTimes(started=1000.0, progressed=1000.0, cpu=50.0)
    fault = job_run.overrun(
        Settings(),
        times,
        now=1000.0 + silent_s,
        cpu=50.0 + cpu_s,
        rss=1,
        rss_allowed=2,
        deadline=None,
    )

    assert (fault and fault.code) == code


def test_before_its_turn_a_job_has_no_time_to_lose():
    """It waits in a shared child's line; only its deadline counts there."""
    times = job_run.RunTimes()
    args: dict[str, Any] = {"now": 1e6, "cpu": 0.0, "rss": 3, "rss_allowed": 2}
    late = datetime(2020, 1, 1, tzinfo=UTC)

    assert job_run.overrun(Settings(), times, **args, deadline=None) is None
    fault = job_run.overrun(Settings(), times, **args, deadline=late)
    assert fault is not None
    assert fault.code == "deadline_passed"


def test_what_is_stored_of_a_failure_holds_no_signature():
    """A library may quote a signed URL; clients read the message, operators the detail."""
    said = "403 from https://s3.example/k.mp4?X-Amz-Signature=5ecr3t"
    stored: list[Any] = []

    class Books:
        def end(self, claim: Any, failure: Failure) -> bool:
            stored.append(failure.message)
            return True

        def crashed(self, claim: Any, **facts: Any) -> str:
            stored.extend((facts["message"], facts["detail"]))
            return "quarantined"

    claim: Any = SimpleNamespace(attempt=1)
    store: Any = Books()
    for kind, code in (("failure", "fetch_denied"), ("crash", "decoder_crashed")):
        store_result(store, claim, RunResult(kind, code, said, detail=said))

    assert stored == ["403 from https://s3.example/k.mp4?…"] * 3
