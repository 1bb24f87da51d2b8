"""The tree of errors: how a job can fail, and whether it is then retried.

RalfError
├─ JobError            a job's named end; `code` is what the verdict store and the metrics show
│  ├─ Rejected         never retried: the same bytes will fail again
│  │    FetchDenied HashMismatch UnreadableFile TooLarge TooLong TooManyPixels TooManyFrames
│  │    TooManyStreams ContainerUnsupported CodecUnsupported CorruptMedia NoVideoStream
│  │    EncryptedMedia BadRequest DeadlinePassed
│  ├─ Interrupted      retried with back-off: FetchFailed GpuOom GpuFatal
│  └─ Crashed          counted, quarantined at the second: DecoderCrashed Hung WorkerLost
├─ Infrastructure      not the job's fault: ModelUnavailable
└─ ClientError         ralf.worker.client's own: IdempotencyConflict NotFound QueueUnavailable …
Cancelled is not an error: raising it stops a running walk.

A message says what was expected, what came, and what to do. This file imports nothing.
"""

from typing import ClassVar


class RalfError(Exception):
    """Base of everything Ralf raises on purpose."""


# Not a RalfError: what handles errors must not take a cancel for one.
class Cancelled(Exception):
    """The job was asked to stop."""


class JobError(RalfError):
    """A job's named end."""

    code: ClassVar[str] = "job_error"


class Rejected(JobError):
    """Never retried."""


class Interrupted(JobError):
    """Retried with back-off."""


class Crashed(JobError):
    """Counted; the second one quarantines."""


class FetchDenied(Rejected):
    code = "fetch_denied"


class HashMismatch(Rejected):
    code = "hash_mismatch"


class UnreadableFile(Rejected):
    """A directory, a pipe, a file without permission, or a missing file."""

    code = "unreadable_file"


class TooLarge(Rejected):
    code = "too_large"


class TooLong(Rejected):
    code = "too_long"


class TooManyPixels(Rejected):
    code = "too_many_pixels"


class TooManyFrames(Rejected):
    """More frames a second, or more in all, than are taken."""

    code = "too_many_frames"


class TooManyStreams(Rejected):
    code = "too_many_streams"


class ContainerUnsupported(Rejected):
    code = "container_unsupported"


class CodecUnsupported(Rejected):
    code = "codec_unsupported"


class CorruptMedia(Rejected):
    code = "corrupt_media"


class NoVideoStream(Rejected):
    code = "no_video_stream"


class EncryptedMedia(Rejected):
    code = "encrypted_media"


class BadRequest(Rejected):
    """The job's document itself is not valid."""

    code = "bad_request"


class DeadlinePassed(Rejected):
    code = "deadline_passed"


class FetchFailed(Interrupted):
    code = "fetch_failed"


class GpuOom(Interrupted):
    code = "gpu_oom"


class GpuFatal(Interrupted):
    code = "gpu_fatal"


class DecoderCrashed(Crashed):
    code = "decoder_crashed"


class Hung(Crashed):
    """The job exceeded its time, or reported no progress for too long."""

    code = "job_timeout"


class WorkerLost(Crashed):
    """The worker process ended in the middle of the job; the janitor's script stores this code."""

    code = "worker_lost"


class Infrastructure(RalfError):
    """Not the job's fault."""


class ModelUnavailable(Infrastructure):
    """No model could be loaded; the message names the model and what is there."""


def by_code() -> dict[str, type[JobError]]:
    """Every job error that has a code of its own, by that code."""
    found: dict[str, type[JobError]] = {}
    queue: list[type[JobError]] = [Rejected, Interrupted, Crashed]
    while queue:
        kind = queue.pop()
        queue.extend(kind.__subclasses__())
        # vars, not hasattr: Rejected and its like inherit a code that no job ends with.
        if "code" in vars(kind):
            found[kind.code] = kind
    return found
