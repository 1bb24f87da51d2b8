"""A worker's log lines and metrics, and one summary line per job.

Logs are structlog's, to stderr: JSON, or coloured text when a person watches the terminal.  Every
event is `noun.verb_past` with facts as keys.  URIs lose their user, query and fragment before
they are written, since a signed URL is a credential; values under a secret's name are dropped.
Both hold at any depth of a value, in exceptions, and in the messages that Redis stores.

Metrics are Prometheus', in seconds and totals, under `ralf_`.  Jobs, frames and faces are counted
here as jobs end; the state of the queue is read from Redis at each scrape, so it is right even
after a crash.  The traceparent of a job is
put on each of its lines as it came, and its trace id beside it; nothing needs OpenTelemetry.
"""

import contextlib
import logging
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TextIO

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from structlog.typing import ExcInfo

from ralf.worker.contract import Job, Verdict
from ralf.worker.drift import Drift
from ralf.worker.settings import Settings

if TYPE_CHECKING:
    from ralf.worker.service.shadow import Comparison

_NAMES = (
    r"secret|password|passwd|authorization|signature|api[_-]?key|credential|security[_-]token"
    r"|access[_-]?token|private[_-]?key|access[_-]?key"
)
_SECRET = re.compile(_NAMES, re.IGNORECASE)
# The last @ before the path ends the user.  A quote ends a URL, because tracebacks quote their
# arguments; ' is legal in a query, so there it ends one only before what follows an argument.
_QUERY = r"(?:[^\s\"'<>#]|'(?=[^\s,;:)\]}'\"<>]))*"
_URL = re.compile(
    rf"([A-Za-z][A-Za-z0-9+.-]*:/{{1,3}})([^\s/?#\"<>]*@)?([^\s?#\"'<>]*)(\?{_QUERY})?(#{_QUERY})?"
)
# Without a scheme: a query, a name with its value, a header, a webhook's secret.
_LOOSE = (
    (re.compile(rf"(?<=[\w/])\?(?=[\w.~%-]+=){_QUERY}"), "?…"),
    (
        re.compile(
            # A quote stands behind backslashes where a text was quoted by repr or JSON.
            rf"(?i)([\w-]*(?:{_NAMES})\\*[\"']?\s*[=:]\s*)(?!…)"
            r"(\"[^\"]*\"|'[^']*'|(?:bearer|basic)\s+\S+|\\+([\"']).*?\\+\3|[^\s&\"',;]+)"
        ),
        r"\1…",
    ),
    (re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]{8,}"), r"\1 …"),
    (re.compile(r"whsec_[A-Za-z0-9+/=]+"), "whsec_…"),
)


def redact(text: str) -> str:
    """The text without users, queries and fragments of URLs, and without secrets by their name."""

    def bare(found: re.Match[str]) -> str:
        return found[1] + found[3] + ("?…" if found[4] else "")

    text = _URL.sub(bare, text) if ":/" in text else text  # pathlib makes one slash of two
    for pattern, instead in _LOOSE:
        text = pattern.sub(instead, text)
    return text


def redacted(value: Any, depth: int = 8) -> Any:
    """The same with every text in it redacted, however deep; what lies under a secret's name goes.

    What is no plain value is written as its repr, as the JSON renderer would.
    """
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return redact(value)
    if depth == 0:
        return "…"
    if isinstance(value, Mapping):
        return {
            redact(str(key)): "…" if _is_secret(key) else redacted(part, depth - 1)
            for key, part in value.items()
        }
    if isinstance(value, list | tuple | set | frozenset):
        return [redacted(part, depth - 1) for part in value]
    return redact(repr(value))


def _is_secret(key: object) -> bool:
    # `secret_id` is the name of a secret: it says which one signed.
    return bool(_SECRET.search(str(key))) and not str(key).endswith("_id")


def _redacted(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for key, value in event.items():
        if key != "exc_info":  # it becomes text later, and is redacted then
            event[key] = "…" if _is_secret(key) else redacted(value)
    return event


def _redacted_traceback(stream: TextIO, info: ExcInfo) -> None:
    stream.write("\n" + redact("".join(traceback.format_exception(*info))).rstrip())


class _Stderr:
    """Writes each line to the current sys.stderr.

    A line that cannot be written is dropped, because a service that has lost its log (a closed
    pipe, a full disk) must still do its jobs.
    """

    def msg(self, message: str) -> None:
        """One line."""
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed; None in a daemon
            # sys.stderr is read for each line: a stream that was kept may have been closed since.
            sys.stderr.write(message + "\n")
            sys.stderr.flush()

    log = debug = info = warn = warning = msg
    error = err = critical = fatal = failure = exception = msg


def configure(settings: Settings) -> None:
    """Configure structlog for this process; called once, by the program's entry point."""
    level = logging.getLevelNamesMapping().get(settings.log_level.upper(), logging.INFO)
    person = settings.log_format == "text" or (
        settings.log_format == "auto" and sys.stderr.isatty()
    )
    last: list[Any] = (
        [structlog.dev.ConsoleRenderer(exception_formatter=_redacted_traceback)]
        if person
        # Redacted a second time, after the traceback has become text: it quotes URLs too.
        else [structlog.processors.format_exc_info, _redacted, structlog.processors.JSONRenderer()]
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _redacted,
            *last,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *_: _Stderr(),
        # A cached logger would keep the configuration of its first use.
        cache_logger_on_first_use=False,
    )


def trace_id(traceparent: str | None) -> str | None:
    """The trace's id in a W3C traceparent."""
    return traceparent.split("-")[1] if traceparent and traceparent.count("-") == 3 else None


_SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
_ENGINE_LABELS = ("model", "version", "engine", "precision", "device", "decoder")


class Metrics:
    """Every metric of one process, in its own registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        counter = partial(Counter, registry=self.registry)
        gauge = partial(Gauge, registry=self.registry)
        histogram = partial(Histogram, registry=self.registry)
        timer = partial(histogram, buckets=_SECONDS)
        model = ("model", "version")
        self._queue: Collector | None = None
        self.jobs = counter("ralf_jobs", "Jobs that ended or went back.", ["outcome", "code"])
        self.job_seconds = timer(
            "ralf_job_seconds", "From a job's start in this worker to its end."
        )
        self.wait_seconds = timer("ralf_job_wait_seconds", "From a job's submission to its start.")
        self.stage_seconds = timer(
            "ralf_stage_seconds", "Time spent in one stage of a job.", ["stage"]
        )
        self.frames = counter("ralf_frames", "Frames decoded.", ["decoder"])
        self.faces = counter("ralf_faces", "Faces scored.")
        self.video_seconds = counter("ralf_video_seconds", "Length of the videos judged.")
        self.verdicts = counter("ralf_verdicts", "Verdicts by label.", ["label", *model])
        self.score = histogram(
            "ralf_score",
            "Scores of videos with a face, for drift.",
            model,
            buckets=[step / 20 for step in range(1, 21)],
        )
        self.drift = Drift()
        self.psi = gauge(
            "ralf_score_psi",
            "How far late scores have moved from the reference: above 0.25 look into it.",
            [*model, "engine"],
        )
        self.shadow_jobs = counter(
            "ralf_shadow_jobs",
            "Jobs seen by the shadow too, by whether its label was the same.",
            ["shadow", "result"],
        )
        self.shadow_difference = histogram(
            "ralf_shadow_score_difference",
            "How far the shadow's score lay from the verdict's.",
            ["shadow"],
            buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0),
        )
        self.model_refused = gauge(
            "ralf_model_refused",
            "1 for a version that should be served and did not load, the one before it goes on; "
            "role plan: its TensorRT plan is not signed, torch runs instead.",
            ["role", "model"],
        )
        self.running = gauge("ralf_running_jobs", "Jobs in this worker.")
        self.ready = gauge("ralf_ready", "1 once the model is checked.")
        self.engine = gauge(
            "ralf_engine_info",
            "What this worker scores with; always 1.",
            _ENGINE_LABELS,
        )
        self.restarts = counter("ralf_child_restarts", "Children replaced, by reason.", ["reason"])
        self.child_rss = gauge("ralf_child_rss_bytes", "Resident memory of the child.")
        self.refused = counter("ralf_refused_jobs", "Queue entries that were not ours.")
        self.deliveries = counter("ralf_deliveries", "Webhook attempts by result.", ["result"])

    def engine_is(self, facts: Mapping[str, object]) -> None:
        """Show what the child loaded, and only that."""
        # Otherwise the engine before a reload would still be shown with 1.
        self.engine.clear()
        self.engine.labels(*(str(facts.get(name, "")) for name in _ENGINE_LABELS)).set(1)
        self.model_refused.clear()
        refused: Any = facts.get("refused", ())
        for each in refused:
            self.model_refused.labels(each["role"], each["model"]).set(1)

    def watch_queue(self, counts: Callable[[], Iterable["Count"]]) -> None:
        """Show the gauges that are read from Redis at each scrape."""
        if self._queue is not None:
            self.registry.unregister(self._queue)
        self._queue = _QueueCollector(counts)
        self.registry.register(self._queue)


@dataclass(frozen=True)
class Count:
    """One number read from Redis: a gauge's name without `ralf_`, its labels, its value."""

    name: str
    value: float
    labels: tuple[tuple[str, str], ...] = ()


_QUEUE_HELP = {
    "queue_oldest_age_seconds": "How long the oldest waiting job has waited.",
    "queued_jobs": "Jobs that wait for a worker, by priority.",
    "started_jobs": "Jobs that some worker has, by priority.",
    "put_off_jobs": "Of the queued jobs: put off to be retried later.",
    "quarantined_jobs": "Jobs in quarantine.",
    "outbox_due": "Deliveries in the outbox.",
    "dead_letters": "Deliveries that were given up.",
    "workers": "Workers with a live heartbeat.",
    "redis_memory_share": "Redis' memory in use: of maxmemory, or of the machine's if that is 0.",
    "redis_up": "Whether Redis answered this scrape.",
}


class _QueueCollector(Collector):
    """Reads the queue at each scrape; without an answer from Redis ralf_redis_up is 0."""

    def __init__(self, counts: Callable[[], Iterable[Count]]) -> None:
        self._counts = counts

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        try:
            counts = [*self._counts(), Count("redis_up", 1)]
        except OSError:  # redis' own errors are made OSErrors by the caller
            counts = [Count("redis_up", 0)]
        families: dict[str, GaugeMetricFamily] = {}
        for count in counts:
            names = [name for name, _ in count.labels]
            family = families.setdefault(
                count.name,
                GaugeMetricFamily(
                    f"ralf_{count.name}", _QUEUE_HELP.get(count.name, count.name), labels=names
                ),
            )
            family.add_metric([value for _, value in count.labels], count.value)
        return families.values()


METRICS = Metrics()
"""This process's metrics."""


@dataclass(frozen=True)
class Finish:
    """The outcome of one attempt at a job; the summary line and the metrics are made from it."""

    job: Job
    outcome: str
    """A state of the contract, or `retried`, `crashed`, `handed_back`."""
    attempt: int
    total_s: float
    wait_s: float
    fetch_s: float = 0.0
    code: str = ""
    message: str = ""
    verdict: Verdict | None = None


def job_finished(finish: Finish, metrics: Metrics = METRICS) -> None:
    """Write the line of one attempt, and count it."""
    job, verdict = finish.job, finish.verdict
    facts: dict[str, Any] = {
        "job_id": job.job_id,
        "tenant": job.tenant,
        "outcome": finish.outcome,
        "attempt": finish.attempt,
        "wait_s": round(finish.wait_s, 3),
        "fetch_s": round(finish.fetch_s, 3),
        "total_s": round(finish.total_s, 3),
    }
    if finish.code:
        facts |= {"code": finish.code, "message": finish.message[:300]}
    if job.traceparent:
        facts |= {"traceparent": job.traceparent, "trace_id": trace_id(job.traceparent)}
    if verdict is not None:
        made = verdict.made
        facts |= {
            "label": verdict.label,
            "score": verdict.score,
            "frames": made.frames_decoded,
            "faces": made.faces,
            "video_s": verdict.media.duration_ms / 1000,
            "model": f"{made.model}@{made.version}",
            "engine": made.engine,
            **{f"{stage}_s": round(spent / 1000, 3) for stage, spent in made.stages_ms.items()},
        }
    structlog.get_logger().info("job.finished", **facts)
    metrics.jobs.labels(finish.outcome, finish.code).inc()
    metrics.job_seconds.observe(finish.total_s)
    # A later attempt's wait includes the attempts before it, which is no time in the queue; a
    # backfill's jobs wait on purpose.
    if finish.attempt <= 1 and job.priority != "backfill":
        # The client's clock may be ahead of this machine's.
        metrics.wait_seconds.observe(max(0.0, finish.wait_s))
    if verdict is not None:
        _count(verdict, metrics)


def _count(verdict: Verdict, metrics: Metrics) -> None:
    made = verdict.made
    for stage, spent_ms in made.stages_ms.items():
        metrics.stage_seconds.labels(stage).observe(spent_ms / 1000)
    metrics.frames.labels(made.decoder).inc(made.frames_decoded)
    metrics.faces.inc(made.faces)
    metrics.video_seconds.inc(verdict.media.duration_ms / 1000)
    metrics.verdicts.labels(verdict.label, made.model, made.version).inc()
    if verdict.score is not None:
        metrics.score.labels(made.model, made.version).observe(verdict.score)
        label = f"{made.model}@{made.version}"
        index = metrics.drift.observe(label, made.engine, verdict.score)
        if index is not None:
            metrics.psi.labels(made.model, made.version, made.engine).set(index)


def shadow_compared(found: "Comparison", settings: Settings, metrics: Metrics = METRICS) -> None:
    """Write the line of a shadowed job, and count it under the settings' name of the shadow."""
    # The child decodes untrusted files, so its word must not become a metric's label.
    shadow = settings.shadow or "none"
    structlog.get_logger().info(
        "shadow.compared", difference=found.difference, **found.model_dump(exclude_defaults=True)
    )
    agreed = "agreed" if found.shadow_label == found.label else "disagreed"
    metrics.shadow_jobs.labels(shadow, "failed" if found.error else agreed).inc()
    if found.difference is not None:
        metrics.shadow_difference.labels(shadow).observe(found.difference)
