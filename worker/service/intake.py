"""The bytes of one upload on their way in: counted, capped, hashed; kept whole or not at all."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ralf.worker.contract import Media
from ralf.worker.errors import FetchFailed, HashMismatch, TooLarge
from ralf.worker.settings import Settings


@dataclass(frozen=True)
class Fetched:
    """The upload as a local file."""

    path: Path
    sha256: str
    size_bytes: int


class Intake:
    """Where the bytes go: counted, hashed, capped; written, unless they are a file already."""

    def __init__(
        self,
        media: Media,
        path: Path,
        most: int,
        watch: Callable[[], None],
        file: BinaryIO | None = None,
    ) -> None:
        self.media, self.path, self.most, self.watch, self.file = media, path, most, watch, file
        self.size, self._hash = 0, hashlib.sha256()
        self.fetched: Fetched

    def expect(self, total: int) -> None:
        """The other side says how many bytes there will be: refuse early."""
        if total > self.most:
            raise TooLarge(f"the upload has {total} bytes; at most {self.most} are taken")
        if self.media.size_bytes is not None and total != self.media.size_bytes:
            raise HashMismatch(
                f"the upload has {total} bytes; the job says {self.media.size_bytes}"
            )

    def write(self, part: bytes) -> None:
        self.watch()
        self.size += len(part)
        if self.size > self.most:
            raise TooLarge(f"the upload has more than the {self.most} bytes that are taken")
        self._hash.update(part)
        if self.file is not None:
            self.file.write(part)

    def restart(self) -> None:
        """The other side begins anew."""
        self.size, self._hash = 0, hashlib.sha256()
        if self.file is not None:
            self.file.seek(0)
            self.file.truncate()

    def finish(self) -> Fetched:
        """All came: is it what the job says?"""
        self.expect(self.size)
        found = self._hash.hexdigest()
        if self.media.sha256 is not None and found != self.media.sha256:
            raise HashMismatch(
                f"the upload's SHA-256 is {found}; the job says {self.media.sha256}: "
                "it was changed since, or the URI names another file"
            )
        if self.file is not None:
            self.file.flush()
        self.fetched = Fetched(self.path, found, self.size)
        return self.fetched


@contextmanager
def receiving(
    media: Media, folder: Path, settings: Settings, watch: Callable[[], None]
) -> Iterator[Intake]:
    """A new file that only we can read, under a name nobody can guess; gone unless all is well."""
    try:
        handle, name = tempfile.mkstemp(prefix="media-", dir=folder)
    except OSError as error:
        raise FetchFailed(f"no file could be made in the work folder: {error.strerror}") from error
    try:
        with os.fdopen(handle, "wb") as file:
            intake = Intake(media, Path(name), settings.max_bytes, watch, file)
            yield intake
            intake.finish()
    except OSError as error:  # the disk: the stores' and the network's were named before
        Path(name).unlink(missing_ok=True)
        raise FetchFailed(f"the upload could not be written: {error.strerror or error}") from error
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
