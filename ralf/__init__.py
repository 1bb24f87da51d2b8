"""Ralf finds forged faces in video.  Two ways to use it as a library:

    from ralf import analyze
    verdict = analyze("clip.mp4")           # in this process; needs the extra `cpu`

    from ralf.client import connect
    client = connect("redis://queue:6379/0")          # through the queue; needs no torch

The code lies in the folders worker/, kernels/ and train/ of the repository.  They are installed as
ralf.worker, ralf.kernels and ralf.train; in a checkout, three links in this folder do the same.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ralf.worker.contract import Verdict

__version__ = "0.1.0"
__all__ = ["__version__", "analyze", "install_hint", "starting"]


def install_hint(extra: str) -> str:
    """How to get the libraries of an extra.  The package is not on a registry, so: from a file."""
    if (Path(__file__).resolve().parent.parent / "pyproject.toml").is_file():
        return f"in the folder of Ralf's source run: pip install '.[{extra}]'"
    return (
        f"run: pip install 'PATH[{extra}]', where PATH is Ralf's wheel or the folder of its source"
    )


@contextmanager
def starting() -> Iterator[None]:
    """Import libraries and load a model without the garbage collector, and keep them out of it.

    The collector goes through the hundreds of thousands of objects that torch makes again and again
    while it is imported, and once more when Python ends: together a fifth of the time of a short
    command.  For programs of our own only: what exists now is never collected.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def analyze(
    source: str | Path, *, model: str | None = None, device: str | None = None
) -> "Verdict":
    """Judge one video: a path, or an http(s), s3 or gs URL that the worker's fetcher may reach.

    The model is loaded at the first call and kept for the next ones.  `model` is NAME,
    NAME@VERSION or a folder; `device` is auto, cpu, cuda or cuda:N.  All other choices are the
    environment's RALF_ settings.  Raises ralf.worker.errors.JobError when the video cannot be
    judged: its `code` says why.
    """
    from ralf.worker.local import analyze as analyze_here

    return analyze_here(source, model=model, device=device)
