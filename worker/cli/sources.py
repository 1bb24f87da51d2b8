"""What `ralf scan` is given: files, folders, URLs and standard input, as a list of sources."""

import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from ralf.worker.contract import Media
from ralf.worker.errors import JobError, UnreadableFile
from ralf.worker.local import fetched, is_url
from ralf.worker.media.still import ENDINGS as IMAGES
from ralf.worker.settings import Settings

if TYPE_CHECKING:
    from ralf.worker.service.download import Fetched

VIDEOS = frozenset(
    {".mp4", ".m4v", ".mov", ".3gp", ".3g2", ".mkv", ".webm", ".avi", ".ts", ".mts", ".m2ts"}
)
"""Endings that are taken from a folder; a file that is named itself may have any."""
STDIN = "-"


@dataclass(frozen=True)
class Source:
    """One video or image to judge."""

    given: str = field(repr=False)  # a signed URL's query is a credential
    """A path, a URL, or - for standard input."""
    shown: str
    """Its name in messages."""
    tag: str
    """Its name in the verdict."""
    file_name: str
    """What the names of the files begin with that are written about it."""
    path: Path | None = None
    """Where it is, if it is a file here."""
    error: JobError | None = None
    """Why it cannot be judged, where that is known already."""

    @contextmanager
    def opened(self, settings: Settings) -> Iterator[tuple[Path, str | None]]:
        """The source as a local file for as long as the block lasts; its hash where known."""
        if self.error is not None:
            raise self.error
        if self.path is not None:
            yield self.path, None
            return
        with (_spooled if self.given == STDIN else fetched)(self.given, settings) as file:
            yield file.path, file.sha256


def sources(given: Sequence[str]) -> list[Source]:
    """Every source, in the order given; a folder's files sorted by path."""
    found: list[Source] = []
    for name in given:
        if name == STDIN:
            found.append(Source(STDIN, "standard input", "stdin", "stdin"))
        elif is_url(name):
            found.append(_url(name))
        elif Path(name).is_dir():
            found += _in_folder(Path(name))
        else:
            found.append(_file(Path(name)))
    return found


def shown_name(file: Path | str) -> str:
    """A file's name as text: bytes that are no UTF-8, and controls, as a visible mark."""
    # A control character in a name could rewrite the terminal that it is printed on.
    text = os.fsencode(file).decode(errors="replace")
    return "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in text)


def _file(path: Path, tag: str = "") -> Source:
    tag = tag or shown_name(path.name)
    return Source(os.fspath(path), shown_name(path), tag, path.name, path)


def _url(url: str) -> Source:
    """A URL, shown without user, password, query and fragment, which may be secret."""
    parts = urlsplit(url)
    place = shown_name(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}")
    last = unquote(parts.path).rpartition("/")[2] or parts.netloc.rpartition("@")[2]
    # Cut well below the 255 bytes of a file name: a number and an ending follow.
    return Source(url, place, place, re.sub(r"[^\w.-]+", "_", last).lstrip(".")[:150] or "url")


def _in_folder(folder: Path) -> list[Source]:
    """Its videos and images at any depth, by ending; hidden ones are left, links not followed."""
    found: list[Source] = []

    # Without it os.walk leaves out such a folder in silence.
    def unreadable(error: OSError) -> None:
        place = shown_name(error.filename)
        why = UnreadableFile(f"cannot read {place}: {error.strerror}")
        found.append(Source(place, place, place, "folder", error=why))

    for at, below, names in os.walk(folder, onerror=unreadable):
        # In place: os.walk goes into what is left in this very list.
        below[:] = [name for name in below if not name.startswith(".")]
        for name in names:
            path = Path(at, name)
            if not name.startswith(".") and path.suffix.lower() in VIDEOS | IMAGES:
                found.append(_file(path, shown_name(path.relative_to(folder))))
    if not found:
        place = shown_name(folder)
        why = UnreadableFile("the folder holds no video and no image")
        return [Source(place, place, place, "folder", error=why)]
    return sorted(found, key=lambda source: source.given)


@contextmanager
def _spooled(_: str, settings: Settings) -> Iterator["Fetched"]:
    """Standard input as a file, within the cap on uploads: a container must be read twice."""
    from ralf.worker.service.download import CHUNK, receiving

    media = Media(uri="stdin:")
    with tempfile.TemporaryDirectory(prefix="ralf-", dir=settings.work_dir or None) as folder:
        with receiving(media, Path(folder), settings, lambda: None) as upload:
            while part := sys.stdin.buffer.read(CHUNK):
                upload.write(part)
        yield upload.fetched
