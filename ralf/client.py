"""What a backend imports: submit uploads, read verdicts, cancel.  Needs redis, rq and pydantic."""

from ralf.worker.client import (
    AsyncClient,
    Client,
    ClientError,
    IdempotencyConflict,
    InvalidRequest,
    JobFailed,
    NotFinished,
    NotFound,
    QueueUnavailable,
    Submission,
    TimedOut,
    UnreadableDocument,
    connect,
    request,
)

__all__ = [
    "AsyncClient",
    "Client",
    "ClientError",
    "IdempotencyConflict",
    "InvalidRequest",
    "JobFailed",
    "NotFinished",
    "NotFound",
    "QueueUnavailable",
    "Submission",
    "TimedOut",
    "UnreadableDocument",
    "connect",
    "request",
]
