"""How a run of a job ended, and what the store is told of it.

    verdict     succeeded, with its evidence
    failure     its named end: never retried, cancelled, or past its deadline
    retry       interrupted: put off, charged
    crash       counted when the job was alone in its child; retried alone, or quarantined
    hand_back   queued again, uncharged: a drain, a child that left
    lost        another worker has the job: nothing is written

settle() is one script of the store; sent twice, it changes nothing the second time.
"""

from dataclasses import dataclass, field
from typing import Literal, assert_never

from ralf.worker.contract import Evidence, Failure, Verdict
from ralf.worker.errors import Crashed, Interrupted, JobError
from ralf.worker.service.records import Claim
from ralf.worker.service.store import END_BY_CODE, Store


@dataclass(frozen=True)
class Ending:
    """How a run ended, before the store knows."""

    kind: Literal["verdict", "failure", "retry", "crash", "hand_back", "lost"]
    code: str = ""
    message: str = ""
    detail: str = ""
    alone: bool = True
    verdict: Verdict | None = field(default=None, repr=False)
    evidence: Evidence | None = field(default=None, repr=False)

    @classmethod
    def of(cls, error: JobError, *, detail: str = "", alone: bool = True) -> "Ending":
        """What this error's class means for the job."""
        kind: Literal["crash", "retry", "failure"] = "failure"
        if isinstance(error, Crashed):
            kind = "crash"
        elif isinstance(error, Interrupted):
            kind = "retry"
        return cls(kind, error.code, str(error), detail, alone)


def settle(store: Store, claim: Claim, ending: Ending, *, file_sha: str | None = None) -> str:
    """Write the ending; says what became of the job: a state, or retried, crashed, handed_back."""
    failure = Failure(code=ending.code or "none", message=ending.message, attempts=claim.attempt)
    match ending.kind:
        case "verdict":
            assert ending.verdict is not None
            ended = store.end(claim, ending.verdict, evidence=ending.evidence)
            return "succeeded" if ended else "lost"
        case "failure":
            return END_BY_CODE.get(ending.code, "failed") if store.end(claim, failure) else "lost"
        case "retry":
            return store.retry(claim, failure)
        case "crash":
            outcome = store.crashed(
                claim,
                code=ending.code,
                message=ending.message,
                detail=ending.detail,
                alone=ending.alone,
                file_sha=file_sha,
            )
            return "crashed" if outcome == "retried" else outcome
        case "hand_back":
            outcome = store.hand_back(claim)
            return "handed_back" if outcome == "retried" else outcome
        case "lost":
            return "lost"
    assert_never(ending.kind)
