"""A worker's private folder for uploads; it is removed even after the worker was killed.

The folder holds a file `owner` that the worker keeps locked.  The kernel releases the lock when the
process dies, however it dies.  A worker that starts first removes the folders beside its own whose
owner is dead, so that half-fetched uploads do not fill the disk.
"""

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from ralf.worker.errors import Infrastructure

PREFIX = "ralf-"
PROBE_BYTES = 1024**2
"""A folder that does not take so much is full: no job is taken until it does."""
_OWNER = "owner"
MOST_BYTES = 85
"""A Unix socket's path holds 107 bytes; the folder's own name and the socket's take the rest."""


class WorkDir:
    """A new private folder; close() removes it, or the next worker to start after our death."""

    def __init__(self, root: str | Path | None = None) -> None:
        place = Path(root or tempfile.gettempdir())
        if len(os.fsencode(place.absolute())) > MOST_BYTES:
            raise Infrastructure(
                f"RALF_WORK_DIR should be at most {MOST_BYTES} bytes long, since a socket lies in "
                f"it, got {len(os.fsencode(place.absolute()))}: {place}"
            )
        if not place.is_dir():
            raise Infrastructure(f"RALF_WORK_DIR should be a folder, there is none at {place}")
        _sweep(place)
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
        # Locked before it has the name that _sweep() searches: else it could be taken for unowned.
        self._lock = (self.path / "owner.new").open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        (self.path / "owner.new").rename(self.path / _OWNER)

    def close(self) -> None:
        """Remove it."""
        # Locked until it is gone, so that no other worker's _sweep() removes it at the same time.
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def why_unusable(folder: Path) -> str:
    """Why no upload can be written there, such as a full disk; empty when one can."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            # A write finds a full disk, a quota, a read-only mount and a missing folder alike.
            file.write(bytes(PROBE_BYTES))
    except OSError as error:
        return f"nothing can be written to the work folder {folder}: {error.strerror or error}"
    return ""


def _sweep(place: Path) -> None:
    """Remove our folders there whose owners are dead; those of other users are left alone."""
    for owner in place.glob(f"{PREFIX}*/{_OWNER}"):
        with suppress(OSError):  # it is locked, or somebody else is removing it
            # In a shared folder such as /tmp another user may plant a link to a folder of ours.
            if owner.lstat().st_uid != os.getuid() or owner.parent.is_symlink():
                continue
            with owner.open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(owner.parent, ignore_errors=True)
