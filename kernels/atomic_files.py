"""Files that are whole or not there: flushed writes, replacement in one step, locks on folders.

A file is flushed before it gets its name, and its folder after that: after a power cut, a name
never stands for half a file.
"""

import fcntl
import hashlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write(path: Path, content: bytes | Path) -> str:
    """Write a new file and flush it; returns the SHA-256 of its bytes."""
    digest = hashlib.sha256()
    source = io.BytesIO(content) if isinstance(content, bytes) else content.open("rb")
    # x: a file that is already there is another writer's, and is never written into.
    with source, path.open("xb") as target:
        while block := source.read(1 << 20):
            digest.update(block)
            target.write(block)
        target.flush()
        os.fsync(target.fileno())
    return digest.hexdigest()


def flush_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str) -> None:
    """Replace a text file in one step: a reader gets the old text or the new one."""
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    # From a process that died and had the same id; `write` refuses a file that is there already.
    staging.unlink(missing_ok=True)
    try:
        write(staging, text.encode())
        staging.replace(path)
    # Also after Ctrl-C: a staging file must not stay.
    except BaseException:
        staging.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def replace_lines(path: Path, lines: list[str]) -> None:
    """The same for lines."""
    replace_text(path, "".join(f"{line}\n" for line in lines))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock: one process at a time.  The lock ends with its process."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # On the folder itself, so that no lock file is left behind; closing the descriptor ends it.
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def hold(folder: Path) -> int:
    """Mark a folder as in use until the returned descriptor is closed, or the process ends.

    `unused` finds it in any process, where the file system has locks.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    # BlockingIOError is an OSError, so it comes first.
    except BlockingIOError:
        os.close(descriptor)
        raise BlockingIOError(f"{folder} is being removed") from None
    except OSError:  # this file system has no locks, so a remover cannot get one either
        pass
    return descriptor


@contextmanager
def unused(folder: Path) -> Iterator[bool]:
    """Whether no process holds the folder; none can while the block runs."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # held; or the file system has no locks, and then we cannot know
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)
