"""Jobs that crashed their child process too often, kept with what is needed to examine them."""

import uuid
from typing import Any

from ralf.worker.service.records import Quarantined, Submitted
from ralf.worker.service.store import Store


class Quarantine:
    """What `ralf quarantine list | show | retry | drop` works on.

    A job stays until it is dropped, or until settings.quarantine_max later ones came.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.redis: Any = store.redis
        self._entries = store.key("quarantine")
        self._order = store.key("quarantine", "at")

    # The type is in quotes because `list` means this method inside the class.
    def list(self) -> "list[Quarantined]":
        """All of them, the latest first."""
        found = [Quarantined.read(entry) for entry in self.redis.hvals(self._entries)]
        return sorted(found, key=lambda entry: -entry.at)

    def show(self, job_id: str) -> Quarantined | None:
        """One of them."""
        entry = self.redis.hget(self._entries, job_id)
        return None if entry is None else Quarantined.read(entry)

    def drop(self, job_id: str) -> bool:
        """Remove it; its job stays quarantined, its file's crash count expires by itself."""
        self.redis.zrem(self._order, job_id)
        return bool(self.redis.hdel(self._entries, job_id))

    def retry(self, job_id: str, *, now: float | None = None) -> Submitted | None:
        """Submit it again as a new job, since an ended job never changes; clear its file's count.

        The new token is made from the job's id, so that a second call gives the same new job.
        """
        entry = self.show(job_id)
        if entry is None:
            return None
        if entry.file_sha:
            # Or the new job would be quarantined before it runs, for the old crashes of its file.
            self.redis.delete(self.store.key("crashes", "workers", entry.file_sha))
        # Without the deadline: it has most likely passed, and the job would expire at once.
        again = entry.job.model_copy(
            update={"job_id": uuid.uuid4().hex, "token": f"retry:{job_id}", "deadline": None}
        )
        submitted = self.store.submit([again], now=now)[0]
        # Last: if this process dies before it, a second retry finds the entry and the same new
        # job.
        self.drop(job_id)
        return submitted
