"""An upload on its way into a file: counted, capped, hashed, and whole or not at all.

UploadFile takes the bytes, wherever they come from.  Download brings them from one http(s) URL:
each redirect is judged like the first URL, and https never leads to http.  A download that breaks
off goes on where it stopped (Range and If-Range, RFC 9110) when the server named this version of
the file by a strong ETag or a date; each time the whole chain of redirects is followed anew.
4xx is final, except 408, 425 and 429; those and 5xx let the job try again.  So is a name that does
not exist: else the number of attempts would tell it from a forbidden one.
"""

import email.utils
import hashlib
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urljoin

from ralf.worker.contract import Media
from ralf.worker.errors import FetchDenied, FetchFailed, HashMismatch, TooLarge
from ralf.worker.service.egress import (
    AddressDenied,
    Answer,
    Egress,
    EgressDenied,
    EgressFailed,
    Target,
    UnknownHost,
)
from ralf.worker.settings import Settings

CHUNK = 1 << 20
RESUMES = 5
"""How often a broken download goes on before the job itself is retried."""
PAUSE_S = 0.5
RATE_WINDOW_S = 30.0
"""A download's rate is taken over at least so long."""
REDIRECTS = frozenset({301, 302, 303, 307, 308})
# One text for a forbidden address, a private name and an unknown one: a tenant who could tell them
# apart would learn which names exist inside, and where.  The error's cause has the facts.
NO_PUBLIC_HOST = (
    "the URI's host, or one that it redirects to, cannot be used: its name must exist, and all of "
    "its addresses must be public; the worker's log has the reason"
)
TRANSIENT = frozenset({408, 425, 429})

_RANGE = re.compile(r"bytes ([0-9]+)-([0-9]+)/([0-9]+|\*)")
# Without W/: a weak tag does not promise the same bytes, so a download cannot go on by it.
_STRONG = re.compile(r'"[\x21\x23-\x7e]{1,500}"')


@dataclass(frozen=True)
class Fetched:
    """The upload as a local file."""

    path: Path
    sha256: str
    size_bytes: int


class UploadFile:
    """Takes the bytes of an upload: counts, hashes, caps and writes them."""

    def __init__(
        self,
        media: Media,
        path: Path,
        most: int,
        watch: Callable[[], None],
        file: BinaryIO,
        *,
        least_rate: int = 0,
    ) -> None:
        self.media, self.path, self.most, self.file = media, path, most, file
        self._watch, self._least_rate = watch, least_rate
        self.size, self._hash = 0, hashlib.sha256()
        self._window = (time.monotonic(), 0)
        """When the rate was taken last, and how much there was then."""
        self.fetched: Fetched

    def expect(self, total: int) -> None:
        """The source says how many bytes there will be: refuse early."""
        if total > self.most:
            raise TooLarge(f"the upload has {total} bytes; at most {self.most} are taken")
        if self.media.size_bytes is not None and total != self.media.size_bytes:
            raise HashMismatch(
                f"the upload has {total} bytes; the job says {self.media.size_bytes}"
            )

    def watch(self) -> None:
        """Raises when the fetch must end: cancelled, out of time, too slow."""
        self._watch()
        now, (then, size) = time.monotonic(), self._window
        if now - then < RATE_WINDOW_S:
            return
        if self.size - size < self._least_rate * (now - then):
            raise FetchFailed(
                f"{self.size - size} bytes came in {now - then:.0f} s; at least "
                f"{self._least_rate} a second are expected (RALF_FETCH_LEAST_RATE)"
            )
        self._window = now, self.size

    def write(self, part: bytes) -> None:
        """Take the next bytes."""
        self.watch()
        self.size += len(part)
        # Before the bytes are written: the disk never holds more than the cap.
        if self.size > self.most:
            raise TooLarge(f"the upload has more than the {self.most} bytes that are taken")
        self._hash.update(part)
        self.file.write(part)

    def restart(self) -> None:
        """The source begins again from the first byte."""
        self.size, self._hash = 0, hashlib.sha256()
        self._window = (time.monotonic(), 0)
        self.file.seek(0)
        self.file.truncate()

    def finish(self) -> Fetched:
        """All bytes have come: check them against what the job says."""
        # Once more with what came: the source may have named no size, or a wrong one.
        self.expect(self.size)
        found = self._hash.hexdigest()
        if self.media.sha256 is not None and found != self.media.sha256:
            raise HashMismatch(
                f"the upload's SHA-256 is {found}; the job says {self.media.sha256}: "
                "it was changed since, or the URI names another file"
            )
        self.file.flush()
        self.fetched = Fetched(self.path, found, self.size)
        return self.fetched


@contextmanager
def receiving(
    media: Media, folder: Path, settings: Settings, watch: Callable[[], None]
) -> Iterator[UploadFile]:
    """A new file with a name that nobody can guess, for this user only; removed on any error."""
    try:
        handle, name = tempfile.mkstemp(prefix="media-", dir=folder)
    except OSError as error:
        raise FetchFailed(f"no file could be made in the work folder: {error.strerror}") from error
    try:
        with os.fdopen(handle, "wb") as file:
            upload = UploadFile(
                media,
                Path(name),
                settings.max_bytes,
                watch,
                file,
                least_rate=settings.fetch_least_rate,
            )
            yield upload
            # Inside the block, so that a file with a wrong hash is removed too.
            upload.finish()
    except OSError as error:  # the disk: network and object stores raise classes of ours
        Path(name).unlink(missing_ok=True)
        raise FetchFailed(f"the upload could not be written: {error.strerror or error}") from error
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


class Download:
    """One URL into an UploadFile; goes on after a break where the server allows."""

    def __init__(
        self, url: str, egress: Egress, settings: Settings, deadline: float, upload: UploadFile
    ) -> None:
        self.url, self.egress, self.settings = url, egress, settings
        self.deadline, self.upload = deadline, upload
        self._validator = ""
        """What the server calls this version of the file; empty: it cannot be resumed."""

    def run(self) -> None:
        """Fetch it; raises FetchDenied (final) or FetchFailed (worth another try)."""
        for turn in range(RESUMES + 1):
            try:
                with self._answer() as answer:
                    self._take(answer)
                return
            except (AddressDenied, UnknownHost) as error:
                raise FetchDenied(NO_PUBLIC_HOST) from error
            except EgressDenied as error:
                raise FetchDenied(str(error)) from error
            except (EgressFailed, FetchFailed) as error:
                # The deadline may be what broke it: then watch() raises, and nothing is resumed.
                self.upload.watch()
                if turn == RESUMES or not self.upload.size or not self._validator:
                    raise FetchFailed(str(error)) from error
                self._pause(PAUSE_S * 2**turn)

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self.upload.watch()
            time.sleep(min(left, 0.2))

    def _answer(self) -> Answer:
        """The first answer that is no redirect."""
        target = self.egress.target(self.url)
        for _ in range(self.settings.fetch_redirects + 1):
            answer = self.egress.request(
                "GET",
                target,
                headers=self._headers(),
                deadline=self.deadline,
                allowance=2 * self.upload.most + CHUNK,  # chunked framing adds to the body
                watch=self.upload.watch,
            )
            if answer.status not in REDIRECTS:
                return answer
            with answer:
                target = self._redirected(target, answer.header("Location"))
        raise FetchDenied(
            f"{target} is behind more than {self.settings.fetch_redirects} redirects; "
            "submit the last URL"
        )

    def _redirected(self, target: Target, location: str) -> Target:
        # Before urljoin, which removes tabs and line breaks without a word.
        if not location or re.search(r"[\x00-\x20\x7f-\xff\\]", location):
            raise FetchDenied(f"{target} redirects to something that is not a URL")
        following = self.egress.target(urljoin(target.url, location))
        if target.scheme == "https" and following.scheme != "https":
            raise FetchDenied(f"{target} redirects from https to http")
        return following

    def _headers(self) -> dict[str, str]:
        # Sizes, ranges and the hash are those of the file itself, not of a compressed form.
        headers = {"Accept": "*/*", "Accept-Encoding": "identity"}
        if self.upload.size and self._validator:
            headers |= {"Range": f"bytes={self.upload.size}-", "If-Range": self._validator}
        return headers

    def _take(self, answer: Answer) -> None:
        self._judge(answer)
        total = answer.length
        if answer.status == 206:
            total = self._continued(answer)
        elif self.upload.size:
            # The server sent the whole file: it ignored the range, or the file has changed.
            self.upload.restart()
        if total is not None:
            self.upload.expect(total)
        # A 206 may leave it out; after a 200 without one the download cannot be resumed.
        self._validator = _validator(answer) or (self._validator if answer.status == 206 else "")
        while part := answer.read(CHUNK):
            self.upload.write(part)
        if total is not None and self.upload.size != total:
            raise FetchFailed(f"{answer.target}: {self.upload.size} of {total} bytes came")

    def _judge(self, answer: Answer) -> None:
        status = answer.status
        if status >= 500 or status in TRANSIENT or (status == 416 and self.upload.size):
            raise FetchFailed(f"{answer.target} answered {status}")
        if status != 200 and not (status == 206 and self.upload.size):
            raise FetchDenied(f"{answer.target} answered {status}, expected 200")
        if answer.header("Content-Encoding").lower() not in {"", "identity"}:
            raise FetchDenied(f"{answer.target} sends it compressed though asked not to")

    def _continued(self, answer: Answer) -> int | None:
        """A 206 must go on at the right byte of the same file; gives the whole file's size."""
        found = _RANGE.fullmatch(answer.header("Content-Range"))
        # An empty validator ends the resuming: run() then gives up, and the job is retried from
        # the start.
        if found is None or int(found[1]) != self.upload.size:
            self._validator = ""
            raise FetchFailed(f"{answer.target} goes on at another byte than was asked")
        if _validator(answer) not in {"", self._validator}:
            self._validator = ""
            raise FetchFailed(f"{answer.target} changed while it was fetched")
        return None if found[3] == "*" else int(found[3])


def _validator(answer: Answer) -> str:
    tag, date = answer.header("ETag"), answer.header("Last-Modified")
    if _STRONG.fullmatch(tag):
        return tag
    with suppress(ValueError):
        # If-Range takes a date only in HTTP's own form, which ends in GMT.
        return email.utils.format_datetime(email.utils.parsedate_to_datetime(date), usegmt=True)
    return ""
