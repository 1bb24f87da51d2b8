"""Where `ralf serve --embedded` of this user serves, so that `ralf submit` finds it by itself.

The address is in a file of the user's own, as long as the service runs.  Only commands read it,
and only where neither --redis nor RALF_REDIS_URL names a Redis; a backend always names its own.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ralf.kernels.atomic_files import replace_text


def _file() -> Path:
    private = os.environ.get("XDG_RUNTIME_DIR")
    folder = Path(private) if private and Path(private).is_dir() else Path(tempfile.gettempdir())
    return folder / f"ralf-serving-{os.getuid()}"


@contextmanager
def announced(url: str) -> Iterator[None]:
    """Let commands of this user find the service at that socket while the block runs."""
    file = _file()
    # In a shared folder the name may be another user's, who cannot be replaced: commands then need
    # the address, which `serve` prints.
    with suppress(OSError):
        replace_text(file, url)
    try:
        yield
    finally:
        # A service that was started later has put its own address there.
        if address() == url:
            file.unlink(missing_ok=True)


def address() -> str | None:
    """The address of the embedded service that this user runs here; None where there is none."""
    try:
        # No link is followed: it could lead to a file of ours that somebody else has chosen.
        with os.fdopen(os.open(_file(), os.O_RDONLY | os.O_NOFOLLOW), encoding="utf-8") as file:
            if os.fstat(file.fileno()).st_uid != os.getuid():
                return None
            url = file.read().strip()
    except (OSError, UnicodeDecodeError):
        return None
    return url if Path(url.removeprefix("unix://")).is_socket() else None
