"""Make a job's URI a local file: only from allowed roots, buckets and hosts, and never too large.

    file:         a regular file under one of settings.file_roots, links resolved first, then opened
                  component by component without following any.  It is copied: the child may read
                  the copy alone, and nobody swaps it after its hash was taken.
    http, https   through egress.py; each redirect is judged like the first URL, https never leads
                  to http.  A broken download goes on where it stopped (Range, If-Range) when the
                  server says what it is by a strong ETag or a date.
    s3, gs        fsspec, with this worker's own credentials; hence only buckets that the settings
                  name for the tenant, and only the endpoint that the settings name.

Bytes, time, the declared and the actual size, and the SHA-256 are checked while they stream.
Messages never hold a query: that of a signed URL is a credential.

FetchThread runs a fetch beside the worker process's loop, which must go on sending heartbeats.
"""

import os
import re
import stat
import threading
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote

import fsspec
import structlog

from ralf import install_hint
from ralf.worker.contract import Media
from ralf.worker.errors import Cancelled, FetchDenied, FetchFailed, JobError, UnreadableFile
from ralf.worker.service.download import (
    CHUNK,
    RESUMES,
    Download,
    Fetched,
    UploadFile,
    receiving,
)
from ralf.worker.service.egress import Egress
from ralf.worker.settings import Settings

log = structlog.get_logger()

BLOCK = 8 << 20

_OBJECT = re.compile(r"(s3|gs)://([a-z0-9][a-z0-9._-]{1,220}[a-z0-9])/([^\x00-\x1f\x7f]+)")


def fetch(
    media: Media,
    folder: Path,
    *,
    tenant: str,
    settings: Settings,
    cancelled: Callable[[], bool] = lambda: False,
    egress: Egress | None = None,
    store: Callable[[str, Settings], Any] | None = None,
) -> Fetched:
    """Get the upload into `folder`.

    Raises FetchDenied, TooLarge, HashMismatch, UnreadableFile (never retried),
    FetchFailed (retried) or Cancelled.  store opens an fsspec filesystem for s3 or gs; egress is
    the way to http(s).
    """
    deadline = time.monotonic() + settings.fetch_timeout_s

    def watch() -> None:
        if cancelled():
            raise Cancelled
        if time.monotonic() >= deadline:
            raise FetchFailed(f"the upload took more than {settings.fetch_timeout_s:g} s to fetch")

    scheme = media.uri.partition(":")[0].lower()
    if scheme == "file":
        with receiving(media, folder, settings, watch) as upload:
            _from_disk(media.uri, tenant, settings, upload)
        return upload.fetched
    if scheme in {"http", "https"}:
        door = egress or Egress(settings, hosts=settings.fetch_hosts)
        with receiving(media, folder, settings, watch) as upload:
            Download(media.uri, door, settings, deadline, upload).run()
        return upload.fetched
    if scheme in {"s3", "gs"}:
        path = _object(media.uri, tenant, settings)
        with receiving(media, folder, settings, watch) as upload:
            _from_store(scheme, path, (store or open_store)(scheme, settings), upload)
        return upload.fetched
    raise FetchDenied(f"{scheme[:20]}: is not fetched; expected https, http, s3, gs or file")


class FetchThread:
    """One fetch in a thread; calls `wake` when it is over."""

    def __init__(
        self,
        media: Media,
        folder: Path,
        *,
        tenant: str,
        settings: Settings,
        wake: Callable[[], None],
    ) -> None:
        self.file: Fetched | None = None
        self._error: BaseException | None = None
        self._wake = wake
        self._stop, self._over = threading.Event(), threading.Event()
        # A daemon: a fetch that hangs must not keep the process from ending.
        threading.Thread(
            target=self._work, args=(media, folder, tenant, settings), name="fetch", daemon=True
        ).start()

    def _work(self, media: Media, folder: Path, tenant: str, settings: Settings) -> None:
        try:
            self.file = fetch(
                media, folder, tenant=tenant, settings=settings, cancelled=self._stop.is_set
            )
        except BaseException as error:  # noqa: BLE001  carried over to the other thread
            self._error = error
        # The file or error is stored first and the loop is woken last: it reads them at once.
        self._over.set()
        self._wake()

    @property
    def over(self) -> bool:
        """Whether there is a file or an error."""
        return self._over.is_set()

    def stop(self) -> None:
        """End it at its next piece, without waiting for that."""
        self._stop.set()

    @property
    def error(self) -> JobError | Cancelled:
        """Why there is no file."""
        if isinstance(self._error, (JobError, Cancelled)):
            return self._error
        log.error("fetch.broke", error=repr(self._error))
        return FetchFailed(f"{type(self._error).__name__}: {self._error}")


# file


def _from_disk(uri: str, tenant: str, settings: Settings, upload: UploadFile) -> None:
    path, root = _inside(uri, tenant, settings)
    try:
        handle = _opened(path, root)
    except FileNotFoundError as error:  # a spool on another machine may show it a moment later
        raise FetchFailed(f"{path} does not exist") from error
    except OSError as error:
        raise UnreadableFile(f"{path} could not be opened: {error.strerror}") from error
    # Of the open file: by now the path may name another one.
    before = os.fstat(handle)
    if not stat.S_ISREG(before.st_mode):
        os.close(handle)
        raise UnreadableFile(f"{path} is not a regular file")
    with os.fdopen(handle, "rb") as file:
        upload.expect(before.st_size)
        while part := _read(file, path):
            upload.write(part)
        after = os.fstat(handle)
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise FetchFailed(f"{path} changed while it was read; submit it when it is complete")


def _read(file: BinaryIO, path: Path) -> bytes:
    # Apart from the write, whose OSError means a full work folder and not a broken source.
    try:
        return file.read(CHUNK)
    except OSError as error:
        raise FetchFailed(f"{path} could not be read: {error.strerror}") from error


def _roots(tenant: str, settings: Settings) -> list[str]:
    """The folders that this tenant's URIs may name."""
    roots = []
    for entry in settings.file_roots:
        owner, bound, folder = entry.partition("=")
        if entry.startswith("/") or not bound:  # a path may have = in it
            roots.append(entry)
        elif owner in (tenant, "*"):
            roots.append(folder)
    return roots


def _inside(uri: str, tenant: str, settings: Settings) -> tuple[Path, Path]:
    """The path without links, and the root that it is under."""
    found = re.fullmatch(r"(?i:file)://(?:localhost)?(/[^?#]*)", uri)
    try:
        name = unquote(found[1], errors="strict") if found else ""
    except UnicodeDecodeError:
        name = ""
    if not name or "\0" in name or not settings.file_roots:
        raise FetchDenied(
            "expected file:///path without query, under a folder of RALF_FILE_ROOTS"
            + ("" if settings.file_roots else ", which names none")
        )
    path = Path(os.path.realpath(name))
    for root in _roots(tenant, settings):
        # The root may be a link itself.
        real = Path(os.path.realpath(root))
        if path != real and path.is_relative_to(real):
            return path, real
    raise FetchDenied("the file is not under a folder of RALF_FILE_ROOTS for this tenant")


def _opened(path: Path, root: Path) -> int:
    """Open each folder below the root, then the file, and follow no link.

    So the file that was checked is the one that is read, even when somebody changes a link.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # a pipe must not block
    at = os.open(root, flags | os.O_DIRECTORY)
    parts = path.relative_to(root).parts
    for place, part in enumerate(parts):
        kind = os.O_DIRECTORY if place < len(parts) - 1 else 0
        try:
            below = os.open(part, flags | kind, dir_fd=at)
        finally:
            os.close(at)
        at = below
    return at


# s3, gs


def _object(uri: str, tenant: str, settings: Settings) -> str:
    """bucket/key, if this tenant may read that bucket with the worker's credentials."""
    found = _OBJECT.fullmatch(uri)
    if found is None or any(part in {".", ".."} for part in found[3].split("/")):
        raise FetchDenied("expected s3://bucket/key or gs://bucket/key, no . or .. in the key")
    bucket = f"{found[1]}://{found[2]}"
    if not {f"{tenant}={bucket}", f"*={bucket}"} & set(settings.buckets):
        raise FetchDenied(
            f"{bucket} is not open to tenant {tenant}; "
            f"the operator may add {tenant}={bucket} to RALF_BUCKETS"
        )
    return f"{found[2]}/{found[3]}"


def open_store(scheme: str, settings: Settings) -> Any:
    """The filesystem of a scheme, one for each endpoint and process."""
    return _opened_store(scheme, settings.s3_endpoint if scheme == "s3" else settings.gs_endpoint)


@lru_cache(maxsize=8)
def _opened_store(scheme: str, endpoint: str) -> Any:
    # A cached listing would answer the second info() from the first, and hide that the object
    # changed.
    shared = {"skip_instance_cache": True, "use_listings_cache": False}
    try:
        if scheme == "s3":
            return fsspec.filesystem(
                "s3",
                client_kwargs={"endpoint_url": endpoint} if endpoint else {},
                config_kwargs={
                    "connect_timeout": 10,
                    "read_timeout": 30,
                    "ignore_configured_endpoint_urls": True,  # endpoints come from Settings only
                },
                **shared,
            )
        return fsspec.filesystem(
            "gs",
            access="read_only",
            requests_timeout=30,
            endpoint_url=endpoint or "https://storage.googleapis.com",
            **shared,
        )
    except ImportError as error:
        raise FetchFailed(
            f"{scheme}:// needs the extra `stores` on the worker; " + install_hint("stores")
        ) from error


def _from_store(scheme: str, path: str, files: Any, upload: UploadFile) -> None:
    """Read block by block; time, cancel and caps are checked between, a failed block is retried."""
    name = f"{scheme}://{path}"
    facts = _asked(name, lambda: files.info(path))
    size = facts.get("size")
    if facts.get("type") != "file" or not isinstance(size, int):
        raise FetchDenied(f"{name} is not an object with a size")
    upload.expect(size)
    broken = 0
    while upload.size < size:
        upload.watch()
        start, end = upload.size, min(upload.size + BLOCK, size)
        try:
            part = _asked(name, lambda a=start, b=end: files.cat_file(path, start=a, end=b))
            if len(part) != end - start:
                raise FetchFailed(f"{name} broke off: {start + len(part)} of {size} bytes came")
        except FetchFailed:
            broken += 1
            if broken > RESUMES:
                raise
            continue
        upload.write(part)
    if _version(_asked(name, lambda: files.info(path))) != _version(facts):
        raise FetchFailed(f"{name} changed while it was fetched")


def _asked(name: str, ask: Callable[..., Any]) -> Any:
    """Ask the object store, whose libraries each raise errors of their own."""
    try:
        return ask()
    except FileNotFoundError as error:
        raise FetchDenied(f"{name} does not exist, or may not be seen") from error
    except PermissionError as error:
        raise FetchDenied(f"{name} may not be read with the worker's credentials") from error
    except Exception as error:
        # Only the type of the error: its text may hold a URL with its signature.
        raise FetchFailed(f"{name}: the store failed with {type(error).__name__}") from error


def _version(facts: dict[str, Any]) -> tuple[Any, ...]:
    # Each store names its versions otherwise; a name that one lacks is None both times.
    names = ("size", "ETag", "etag", "generation", "LastModified", "mtime")
    return tuple(facts.get(name) for name in names)
