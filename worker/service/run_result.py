"""How one run of a job ended, and what becomes of the job in the store, the log and the metrics."""

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal, assert_never

from ralf.worker import telemetry
from ralf.worker.contract import Evidence, Failure, Verdict
from ralf.worker.errors import Crashed, Interrupted, JobError
from ralf.worker.service.records import Claim
from ralf.worker.service.store import END_BY_CODE, Store


@dataclass(frozen=True)
class RunResult:
    """How one run of a job ended; the store decides what becomes of the job.

    verdict     succeeded, with its evidence
    failure     a named end: never retried, cancelled, or past its deadline
    retry       interrupted: delayed, charged
    crash       counted when the job was alone in its child; retried alone, or quarantined
    hand_back   queued again, uncharged: a drain, or a child that left
    lost        another worker has the job: nothing is written
    """

    kind: Literal["verdict", "failure", "retry", "crash", "hand_back", "lost"]
    code: str = ""
    message: str = ""
    detail: str = ""
    alone: bool = True
    verdict: Verdict | None = field(default=None, repr=False)
    evidence: Evidence | None = field(default=None, repr=False)
    blame_file: bool = True
    """A crash may be due to the file's bytes, and not only to this worker or its machine."""
    file_sha: str | None = None
    fetch_s: float = 0.0
    total_s: float = 0.0

    @classmethod
    def of(cls, error: JobError, *, detail: str = "", alone: bool = True) -> "RunResult":
        """What this error's class means for the job."""
        kind: Literal["crash", "retry", "failure"] = "failure"
        if isinstance(error, Crashed):
            kind = "crash"
        elif isinstance(error, Interrupted):
            kind = "retry"
        return cls(kind, error.code, str(error), detail, alone)


def store_result(store: Store, claim: Claim, result: RunResult) -> str:
    """Write a run's result; gives what became of the job: its state, or retried, crashed,
    handed_back, lost.

    Each is one script of the store; sent twice, it changes nothing the second time.
    """
    # Clients read the message and operators the detail; a library may quote a signed URL in both.
    message, detail = telemetry.redact(result.message), telemetry.redact(result.detail)
    failure = Failure(code=result.code or "none", message=message, attempts=claim.attempt)
    match result.kind:
        case "verdict":
            assert result.verdict is not None
            ended = store.end(
                claim, result.verdict, evidence=result.evidence, file_sha=result.file_sha
            )
            return "succeeded" if ended else "lost"
        case "failure":
            return END_BY_CODE.get(result.code, "failed") if store.end(claim, failure) else "lost"
        case "retry":
            return store.retry(claim, failure)
        case "crash":
            outcome = store.crashed(
                claim,
                code=result.code,
                message=message,
                detail=detail,
                alone=result.alone,
                file_sha=result.file_sha,
                blame_file=result.blame_file,
            )
            return "crashed" if outcome == "retried" else outcome
        case "hand_back":
            outcome = store.hand_back(claim)
            return "handed_back" if outcome == "retried" else outcome
        case "lost":
            return "lost"
    assert_never(result.kind)


def log_finished(claim: Claim, result: RunResult, outcome: str) -> None:
    """The one canonical log line of a run, and its metrics."""
    since = (datetime.now(UTC) - claim.job.submitted_at).total_seconds()
    telemetry.job_finished(
        telemetry.Finish(
            job=claim.job,
            outcome=outcome,
            attempt=claim.attempt,
            total_s=result.total_s,
            # submitted_at is the clock of the client's machine, which may be ahead of ours.
            wait_s=max(0.0, since - result.total_s),
            fetch_s=result.fetch_s,
            code=result.code,
            message=result.message,
            verdict=result.verdict,
        )
    )
