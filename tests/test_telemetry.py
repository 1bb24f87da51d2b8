"""What a worker says of itself: redacted lines, counted metrics, one canonical line."""

import io
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from ralf.worker import telemetry
from ralf.worker.settings import Settings
from ralf.worker.telemetry import Count, Finish, Metrics
from tests.documents import a_job, a_track, a_verdict
from tests.test_boundaries import modules_after

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def lines_of(monkeypatch: pytest.MonkeyPatch, **settings: str) -> io.StringIO:
    """Where the process now logs to."""
    said = io.StringIO()
    monkeypatch.setattr("sys.stderr", said)
    telemetry.configure(Settings(**settings))  # type: ignore[arg-type]
    return said


def finish(**fields: object) -> Finish:
    """One attempt that went well."""
    given: dict[str, object] = {
        "job": a_job(traceparent=TRACE),
        "outcome": "succeeded",
        "attempt": 1,
        "total_s": 1.5,
        "wait_s": 0.25,
        "verdict": a_verdict([a_track([0.9, 0.95, 0.97])]),
    }
    return Finish(**(given | fields))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("said", "written"),
    [
        ("s3://bucket/key.mp4", "s3://bucket/key.mp4"),
        ("https://h/x.mp4?X-Amz-Signature=abc&y=1", "https://h/x.mp4?…"),
        ("https://user:pw@h:8443/x", "https://h:8443/x"),
        ("redis://:s3cret@host/0", "redis://host/0"),
        (
            "403 from https://h/a?sig=1 then https://k/b#abc",
            "403 from https://h/a?… then https://k/b",
        ),
        ("no url at all? none", "no url at all? none"),
    ],
)
def test_a_url_loses_what_makes_it_a_credential(said: str, written: str):
    """User, query and fragment go; what tells where the file is stays."""
    redacted = telemetry.redact(said)

    assert redacted.startswith(written)
    assert not {"pw", "s3cret", "sig=1", "abc"} & {
        word for word in ("pw", "s3cret", "sig=1", "abc") if word in redacted
    }


def test_lines_are_json_off_a_terminal_and_hold_no_secret(monkeypatch: pytest.MonkeyPatch):
    """Whatever a caller passes, under whatever key."""
    said = lines_of(monkeypatch)
    structlog.get_logger().warning(
        "media.fetched",
        uri="https://h/v.mp4?sig=s3cret",
        webhook_secret="s3cret",
        secret_id="default",
    )
    line = json.loads(said.getvalue())

    assert "s3cret" not in said.getvalue()
    assert (line["event"], line["level"]) == ("media.fetched", "warning")
    assert (line["uri"], line["secret_id"]) == ("https://h/v.mp4?…", "default")
    assert datetime.fromisoformat(line["timestamp"]).tzinfo == UTC


def test_an_exception_is_redacted_too(monkeypatch: pytest.MonkeyPatch):
    """Tracebacks quote their arguments."""
    said = lines_of(monkeypatch, log_format="json")
    try:
        raise ValueError("cannot read https://h/v.mp4?sig=s3cret")
    except ValueError:
        structlog.get_logger().exception("fetch.broke")

    assert "s3cret" not in said.getvalue()
    assert "https://h/v.mp4?…" in json.loads(said.getvalue())["exception"]


HIDDEN = st.text("abcXYZ0123456789-_.~%+", min_size=1, max_size=20).map("5ecr3t{}".format)
PLACES = st.sampled_from(
    [
        "https://user:{}@h.example/v.mp4",
        "redis://:p@ss:{}@host:6379/0",
        "https://s3.example/b/k.mp4?X-Amz-Credential=x&X-Amz-Signature={}&x=1",
        "https://h.example/a?n='it'&sig={}",
        "https://h.example/a#access_token={}",
        "gs://b/k?GoogleAccessId=a&Signature={}",
        "cdn.example/v.mp4?token={}",
        "Authorization: Bearer {}",
        "X-Amz-Security-Token={}",
        '{{"aws_secret_access_key": "{}"}}',
        "password='{}'",
    ]
)
AROUND = st.sampled_from(["{}", "GET {} failed", "got '{}', then 403", 'in "{}".', "a\n({})\nb"])
TEXTS = st.builds(
    lambda around, place, word: around.format(place.format(word)), AROUND, PLACES, HIDDEN
)
VALUES = st.recursive(
    st.one_of(
        TEXTS,
        TEXTS.map(ValueError),
        TEXTS.map(str.encode),
        TEXTS.map(Path),
        HIDDEN.map(lambda word: {"webhook_secret": word}),
        st.integers() | st.none(),
    ),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.sampled_from(["uri", "facts", "at"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(VALUES)
def test_no_secret_survives_at_any_depth(value: Any):
    """In dicts, lists, exceptions, bytes and paths, wherever in a longer text a URL stands."""
    assert "5ecr3t" not in json.dumps(telemetry.redacted({"value": value}))


def test_what_is_no_secret_stays():
    """A log that hides everything says nothing."""
    kept = {
        "message": "403 from https://h.example/v.mp4; expected 200? no",
        "secret_id": "default",
        "counts": [1, 2.5, None, True],
        "job": {"tenant": "a", "token": "upload-42"},
        "path": "/work/job-1/media-x",
    }

    assert telemetry.redacted(kept) == kept


def test_a_person_reads_a_traceback_without_its_secrets(monkeypatch: pytest.MonkeyPatch):
    """Text for a terminal is redacted like JSON."""
    said = lines_of(monkeypatch, log_format="text")
    try:
        raise ValueError("cannot read https://h/v.mp4?sig=s3cret")
    except ValueError:
        structlog.get_logger().exception("fetch.broke", seen=[{"uri": "redis://:s3cret@h/0"}])

    assert "s3cret" not in said.getvalue()
    assert "ValueError: cannot read https://h/v.mp4?…" in said.getvalue()


def test_a_person_gets_text_and_a_quiet_level_is_quiet(monkeypatch: pytest.MonkeyPatch):
    """RALF_LOG_FORMAT and RALF_LOG_LEVEL are heard."""
    said = lines_of(monkeypatch, log_format="text", log_level="error")
    structlog.get_logger().info("not.shown")
    structlog.get_logger().error("job.refused", job_id="j1")

    assert "not.shown" not in said.getvalue()
    assert "job.refused" in said.getvalue() and not said.getvalue().startswith("{")


def test_a_log_that_cannot_be_written_stops_nobody(monkeypatch: pytest.MonkeyPatch):
    """A closed pipe costs the lines and not the service; the stream of the moment is the one."""
    gone = lines_of(monkeypatch)
    gone.close()
    structlog.get_logger().warning("janitor.failed", error="nobody hears this")
    monkeypatch.setattr("sys.stderr", None)
    structlog.get_logger().exception("janitor.broke")
    said = io.StringIO()
    monkeypatch.setattr("sys.stderr", said)
    structlog.get_logger().warning("janitor.failed", error="heard")

    assert json.loads(said.getvalue())["error"] == "heard"


def test_one_line_per_run_tells_how_it_went_and_is_counted():
    """The canonical line and the metrics are made of the same facts."""
    metrics = Metrics()
    with capture_logs() as lines:
        telemetry.job_finished(finish(), metrics)
        telemetry.job_finished(
            finish(outcome="retried", code="fetch_failed", message="503", verdict=None), metrics
        )
    first, second = lines
    value = metrics.registry.get_sample_value

    assert [line["event"] for line in lines] == ["job.finished"] * 2
    assert (first["label"], first["score"], first["trace_id"]) == (
        "likely_forged",
        0.93,
        TRACE.split("-")[1],
    )
    assert (second["code"], second["outcome"]) == ("fetch_failed", "retried")
    assert value("ralf_jobs_total", {"outcome": "succeeded", "code": ""}) == 1
    assert value("ralf_jobs_total", {"outcome": "retried", "code": "fetch_failed"}) == 1
    assert value("ralf_faces_total") == 10
    assert value("ralf_frames_total", {"decoder": "pyav"}) == 10
    score = {"model": "ralf-small", "version": "3f9c2a1b"}
    assert value("ralf_score_bucket", {**score, "le": "0.9"}) == 0
    assert value("ralf_score_bucket", {**score, "le": "0.95"}) == 1


def test_stages_are_seconds_in_the_metrics_and_in_the_line():
    """One unit everywhere outside the verdict."""
    metrics = Metrics()
    verdict = a_verdict()
    made = verdict.made.model_copy(update={"stages_ms": {"decode": 1500.0}})
    with capture_logs() as lines:
        telemetry.job_finished(finish(verdict=verdict.model_copy(update={"made": made})), metrics)

    assert lines[0]["decode_s"] == 1.5
    assert metrics.registry.get_sample_value("ralf_stage_seconds_sum", {"stage": "decode"}) == 1.5


def test_the_queue_is_read_at_the_scrape_and_an_outage_shows_as_such():
    """No gauge keeps a number that Redis no longer has."""
    metrics, answer = Metrics(), [[Count("queued_jobs", 3, (("priority", "high"),))]]
    metrics.watch_queue(lambda: answer[0])
    value = metrics.registry.get_sample_value
    assert value("ralf_queued_jobs", {"priority": "high"}) == 3
    assert value("ralf_redis_up") == 1

    def away() -> list[Count]:
        raise OSError("connection refused")

    metrics.watch_queue(away)
    assert value("ralf_queued_jobs", {"priority": "high"}) is None
    assert value("ralf_redis_up") == 0


def test_only_the_engine_that_runs_is_shown():
    """After a reload the old one's 1 would be a lie."""
    metrics = Metrics()
    metrics.engine_is({"model": "ralf-small", "version": "aaaa", "engine": "torch"})
    metrics.engine_is({"model": "ralf-small", "version": "bbbb", "engine": "torch"})
    family = next(f for f in metrics.registry.collect() if f.name == "ralf_engine_info")

    assert [sample.labels["version"] for sample in family.samples] == ["bbbb"]


@pytest.mark.parametrize("text", [None, "", "00-zz", "a-b-c-d-e"])
def test_a_traceparent_that_is_none_gives_no_trace(text: str | None):
    """It is carried as it came, and never fails a job."""
    assert telemetry.trace_id(text) is None


def test_telemetry_imports_no_torch():
    """Parents and the deliverer import it."""
    assert modules_after("import ralf.worker.telemetry") & {"torch", "numpy", "av"} == set()
