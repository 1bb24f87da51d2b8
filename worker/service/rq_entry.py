"""An entry of RQ's queue: what one of ours says, and how another is refused.

Write access to Redis is not the right to run code: an entry that says anything but one of our
functions and its own id is never run and never unpickled.  It is marked as failed, so that RQ's
tools show why.
"""

import json
import re
import time
import zlib
from collections.abc import Collection
from typing import Any

from rq.job import Job as RqJob
from rq.job import JobStatus
from rq.utils import now as utc_now
from rq.utils import utcformat

# One of ours is a function's name and an id.  Without a bound a few compressed kilobytes, which
# anybody who may write to the queue can send, would fill the worker's memory.
PAYLOAD_BYTES = 65536
REFUSED_TTL_S = 86400
JOB_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


def check_entry(raw: bytes | None, job_id: str, functions: Collection[str]) -> tuple[str, str]:
    """The function's name, and what is wrong with RQ's entry, if anything is."""
    if raw is None:
        return "", "its entry in Redis has no data"
    try:
        function, instance, arguments, keywords = json.loads(_inflate(raw))
    # JSON that is nested too deep raises RecursionError; uncaught it would end every worker that
    # takes the entry.
    except (ValueError, TypeError, zlib.error, RecursionError):
        return "", "its payload is not RQ's JSON of function, instance, arguments, keywords"
    # The type first: `in` raises TypeError for a list or an object of JSON.
    if not isinstance(function, str) or function not in functions:
        listed = ", ".join(sorted(functions))
        return "", f"its function is {str(function)[:80]!r}; this worker runs only {listed}"
    if instance is not None or arguments != [job_id] or keywords != {}:
        return "", "its arguments should be its own id and nothing else"
    return function, ""


def _inflate(raw: bytes) -> bytes:
    """RQ compresses its payloads; our script does not. At most PAYLOAD_BYTES are inflated."""
    # A zlib stream with the usual window begins with 0x78, a JSON list does not.
    if raw[:1] != b"\x78":
        if len(raw) > PAYLOAD_BYTES:
            raise ValueError("the payload is larger than any of ours")
        return raw
    # zlib.decompress() has no bound on what it returns.
    inflater = zlib.decompressobj()
    data = inflater.decompress(raw, PAYLOAD_BYTES)
    if inflater.unconsumed_tail:
        raise ValueError("the payload is larger than any of ours")
    return data


def write_refused(pipe: Any, job: RqJob, fault: str, *, worker: str) -> None:
    """Replace the entry by one that RQ shows as failed and that names nothing to run."""
    # HSET alone would keep fields such as callbacks, and fails when the key holds another type.
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
