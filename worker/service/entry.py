"""What RQ's entry of a job may say: one of our functions, and the job's own id, as JSON.

Write access to Redis is not the right to run code: an entry that says anything else is never run,
never unpickled, and refused so that RQ's tools show why.  Its callbacks, webhooks and retries are
not looked at.
"""

import json
import time
import zlib
from collections.abc import Collection
from typing import Any

from rq.job import Job as RqJob
from rq.job import JobStatus
from rq.utils import now as utc_now
from rq.utils import utcformat

PAYLOAD_BYTES = 65536
REFUSED_TTL_S = 86400


def checked(raw: bytes | None, job_id: str, functions: Collection[str]) -> tuple[str, str]:
    """The function's name, and what is wrong with the entry, if anything is."""
    if raw is None:
        return "", "its entry in Redis has no data"
    try:
        function, instance, arguments, keywords = json.loads(_inflated(raw))
    except (ValueError, TypeError, zlib.error):
        return "", "its payload is not RQ's JSON of function, instance, arguments, keywords"
    if not isinstance(function, str) or function not in functions:
        listed = ", ".join(sorted(functions))
        return "", f"its function is {str(function)[:80]!r}; this worker runs only {listed}"
    if instance is not None or arguments != [job_id] or keywords != {}:
        return "", "its arguments should be its own id and nothing else"
    return function, ""


def _inflated(raw: bytes) -> bytes:
    """RQ compresses its payloads; our store's script does not. A bomb is not inflated."""
    if raw[:1] != b"\x78":
        return raw
    inflater = zlib.decompressobj()
    data = inflater.decompress(raw, PAYLOAD_BYTES)
    if inflater.unconsumed_tail:
        raise ValueError("the payload is larger than any of ours")
    return data


def write_refused(pipe: Any, job: RqJob, fault: str, *, worker: str) -> None:
    """Write a new entry in its place that has failed in RQ's eyes and names nothing to run."""
    pipe.delete(job.key)
    pipe.hset(
        job.key,
        mapping={
            "status": JobStatus.FAILED.value,
            "origin": job.origin,
            "data": zlib.compress(b'["refused", null, [], {}]'),
            "description": "refused",
            "exc_info": zlib.compress(f"refused: {fault}".encode()),
            "created_at": utcformat(utc_now()),
            "ended_at": utcformat(utc_now()),
            "worker_name": worker,
        },
    )
    pipe.expire(job.key, REFUSED_TTL_S)
    pipe.zadd(job.failed_job_registry.key, {job.id: int(time.time()) + REFUSED_TTL_S})
