"""Which versions of a model the queue's jobs pin: what `ralf models gc` must not remove.

A job may name NAME@VERSION; until it has ended, that version must stay.  Read in pages from the
queued and the running jobs, so that a long queue costs time and not memory.
"""

import json
from collections.abc import Iterator

from ralf.worker.service.store import PRIORITIES, Store, decoded

PAGE = 500


def pinned(store: Store, name: str) -> dict[str, str]:
    """Each version that a queued or running job pins, with the reason to keep it."""
    counts: dict[str, int] = {}
    for document in _documents(store):
        model, _, version = str(json.loads(document).get("model") or "").partition("@")
        if model == name and version:
            counts[version] = counts.get(version, 0) + 1
    return {version: f"pinned by {n} waiting or running jobs" for version, n in counts.items()}


def _documents(store: Store) -> Iterator[str]:
    for priority in PRIORITIES:
        for kind in ("waiting", "running"):
            ids = store.redis.zrange(store.key(kind, priority), 0, -1)
            for start in range(0, len(ids), PAGE):
                with store.redis.pipeline(transaction=False) as pipe:
                    for job_id in ids[start : start + PAGE]:
                        pipe.hget(store.key("job", decoded(job_id)), "document")
                    yield from (decoded(text) for text in pipe.execute() if text is not None)
