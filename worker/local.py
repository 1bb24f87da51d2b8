"""Judge one video in this process, without the queue: what `ralf.analyze` does."""

import os
import re
import tempfile
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import structlog

from ralf.worker import telemetry
from ralf.worker.contract import EvidencePolicy, Media, Verdict
from ralf.worker.pipeline import Ask
from ralf.worker.pipeline import analyze as walk_file
from ralf.worker.runtime import Parts, load
from ralf.worker.service.fetch import fetch
from ralf.worker.settings import Settings

_URL = re.compile(r"(https?|s3|gs)://", re.IGNORECASE)


def analyze(source: str | Path, *, model: str | None = None, device: str | None = None) -> Verdict:
    """The verdict on a path, or on a URL fetched within the limits of the RALF_ settings."""
    settings = Settings.from_environment()
    if not structlog.is_configured():
        # structlog's default prints to stdout, which belongs to the program that calls us.  A
        # program that configured structlog itself gets our lines in its own way.
        level = os.environ.get("RALF_LOG_LEVEL", "warning")
        telemetry.configure(replace(settings, log_level=level))
    parts = _loaded(settings, model, device)
    no_pictures = EvidencePolicy(thumbnails=False)
    if not isinstance(source, str) or _URL.match(source) is None:
        return walk_file(source, parts, ask=Ask(evidence=no_pictures))[0]
    with tempfile.TemporaryDirectory(prefix="ralf-") as folder:
        fetched = fetch(Media(uri=source), Path(folder), tenant="default", settings=settings)
        ask = Ask(evidence=no_pictures, sha256=fetched.sha256)
        return walk_file(fetched.path, parts, ask=ask)[0]


@lru_cache(maxsize=2)
def _loaded(settings: Settings, model: str | None, device: str | None) -> Parts:
    """Kept for the next call: loading takes longer than a short clip."""
    return load(settings, model=model, device=device)
