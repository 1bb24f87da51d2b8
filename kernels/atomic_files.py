"""Files that are whole or not there: hashed reads of plain files, flushed writes, one lock.

What ralf.kernels.artifact stands on.  Reading never follows a link and never blocks on a pipe.
Writing flushes a file before its name can be seen, and its folder after.
"""

import fcntl
import hashlib
import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class ArtifactError(Exception):
    """A model cannot be used, found, published or promoted; the message says why."""


class Damaged(ArtifactError):
    """What lies on disk is not what was published."""


def refuse_links(folder: Path) -> None:
    """Damaged where the folder holds a link."""
    for entry in sorted(folder.iterdir()):
        if entry.is_symlink():
            raise Damaged(f"{entry} is a link; a model holds only plain files")


def open_regular(path: Path) -> int:
    """A descriptor of a plain file; links, pipes and folders are refused without blocking."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise Damaged(f"{path} is missing") from None
    except OSError as error:
        raise Damaged(f"{path} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise Damaged(f"{path} is not a plain file")
    return descriptor


def read_regular(path: Path, most: int | None = None) -> bytes:
    """A plain file's bytes, at most so many."""
    with os.fdopen(open_regular(path), "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if most is not None and size > most:
            raise Damaged(f"{path} has {size} bytes, expected at most {most}")
        return stream.read()


def digest_of(path: Path) -> str:
    """SHA-256 of a plain file."""
    with os.fdopen(open_regular(path), "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def compare(path: Path, got: str, expected: str) -> None:
    """Damaged where the hashes differ."""
    if got != expected:
        size = path.stat().st_size
        raise Damaged(
            f"{path} ({size} bytes) hashes to {got[:12]}…, the manifest says {expected[:12]}…: "
            "truncated or changed after publishing"
        )


def write(path: Path, content: bytes | Path) -> str:
    """Write and flush; the SHA-256 of what was written."""
    digest = hashlib.sha256()
    source = io.BytesIO(content) if isinstance(content, bytes) else content.open("rb")
    with source, path.open("xb") as target:
        while block := source.read(1 << 20):
            digest.update(block)
            target.write(block)
        target.flush()
        os.fsync(target.fileno())
    return digest.hexdigest()


def flush_folder(folder: Path) -> None:
    """Make the names in a folder last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str) -> None:
    """A text file, old or new, never between; nothing else stays behind."""
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    staging.unlink(missing_ok=True)
    try:
        write(staging, text.encode())
        staging.replace(path)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def replace_lines(path: Path, lines: list[str]) -> None:
    """The same, a line each."""
    replace_text(path, "".join(f"{line}\n" for line in lines))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One publisher or promoter of a model at a time; the lock dies with its process."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def hold(folder: Path) -> int:
    """A descriptor that says: this version is in use.  Closing it, or dying, lets go.

    Seen by every process on a file system that has locks; see `unused`.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ArtifactError(f"{folder} is being removed") from None
    except OSError:  # no locks here; whoever wants to remove cannot get one either
        pass
    return descriptor


@contextmanager
def unused(folder: Path) -> Iterator[bool]:
    """Whether nobody holds the folder, and nobody can while the block runs."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # held; or no locks here, and then nobody knows
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)
