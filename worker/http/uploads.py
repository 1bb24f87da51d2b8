"""Uploads that came by HTTP, in a folder that workers read as `file:` URIs.

    NAME.media   a whole upload; NAME comes from the job's token and the bytes, so that the same
                 upload sent twice has the same URI and is the same job
    NAME.job     the id of the job that reads it
    media-…      an upload that is still coming; removed on any error, and at the next start

sweep() removes an upload once its job has ended, and after `http_upload_ttl_s` in any case.
"""

import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from ralf.worker.errors import Infrastructure
from ralf.worker.service.download import Fetched
from ralf.worker.settings import Settings

TENANT = "http"
"""Of every job that comes by HTTP: it reads this folder, and its jobs are the only ones shown."""


class Uploads:
    """The folder of one server; `opened` makes it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    @contextmanager
    def opened(cls, folder: Path) -> Iterator["Uploads"]:
        """Take the folder for this server; what an earlier one left half-written is removed."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = folder.resolve()
        if "," in str(folder):
            raise Infrastructure(f"the folder of uploads must not have a comma, got {folder}")
        with (folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise Infrastructure(
                    f"another server uses the folder of uploads {folder}; "
                    "give each its own (RALF_HTTP_UPLOADS)"
                ) from None
            for partial in folder.glob("media-*"):
                partial.unlink()
            yield cls(folder)

    def for_workers(self, settings: Settings) -> Settings:
        """The settings with which a worker reads these uploads; without the server's token."""
        roots = (*settings.file_roots, f"{TENANT}={self.folder}")
        return replace(settings, file_roots=roots, http_token="")

    def held(self) -> int:
        """Bytes of all uploads, also of those that are still coming."""
        total = 0
        for entry in os.scandir(self.folder):
            # It may have been removed since the folder was listed.
            with suppress(FileNotFoundError):
                total += entry.stat().st_size
        return total

    def keep(self, fetched: Fetched, token: str) -> Path:
        """Give a whole upload the name that belongs to its token and bytes."""
        digest = hashlib.sha256(f"{token}\0{fetched.sha256}".encode()).hexdigest()
        path = self.folder / f"{digest[:40]}.media"
        # The same upload again: a worker may be reading the file that is there.
        if path.exists():
            fetched.path.unlink()
        else:
            fetched.path.replace(path)
        return path

    def belongs_to(self, path: Path, job_id: str) -> None:
        """Note whose upload it is."""
        path.with_suffix(".job").write_text(job_id)

    def drop_unclaimed(self, path: Path) -> None:
        """Remove an upload unless a job reads it."""
        if not path.with_suffix(".job").exists():
            path.unlink(missing_ok=True)

    def sweep(
        self, ended: Callable[[str], bool], cancel: Callable[[str], object], ttl_s: float
    ) -> int:
        """Remove what is no longer needed; returns how many uploads.

        A job that has not ended after `ttl_s` is cancelled first.
        """
        removed = 0
        for path in self.folder.glob("*.media"):
            note = path.with_suffix(".job")
            job_id = note.read_text() if note.exists() else ""
            too_old = time.time() - path.stat().st_mtime > ttl_s
            done = bool(job_id) and ended(job_id)
            if not (done or too_old):
                continue
            if job_id and not done:
                cancel(job_id)
            path.unlink(missing_ok=True)
            note.unlink(missing_ok=True)
            removed += 1
        return removed


@contextmanager
def upload_folder(settings: Settings, data: Path | None) -> Iterator[Path]:
    """RALF_HTTP_UPLOADS, else inside --data, else a private folder that is removed at the end."""
    if settings.http_uploads:
        yield Path(settings.http_uploads)
    elif data is not None:
        yield data / "uploads"
    else:
        folder = Path(tempfile.mkdtemp(prefix="ralf-uploads-"))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
