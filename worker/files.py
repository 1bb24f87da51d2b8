"""Write a file whole or not at all."""

import os
import tempfile
from pathlib import Path


def write_whole(place: Path, text: str) -> None:
    """Beside its place first, then moved: no reader sees half, and nothing stays behind."""
    handle, name = tempfile.mkstemp(dir=place.parent, prefix=f".{place.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(name).chmod(0o644)
        Path(name).replace(place)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
