"""Judge one video or image in this process, without the queue: what `ralf.analyze` does."""

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from ralf.worker import telemetry
from ralf.worker.contract import EvidencePolicy, Media, Verdict
from ralf.worker.errors import FetchDenied
from ralf.worker.media.still import ImageDecoder, probe_image
from ralf.worker.pipeline import Ask
from ralf.worker.pipeline import analyze as walk_file
from ralf.worker.runtime import Parts, load, with_decoder
from ralf.worker.settings import Settings

if TYPE_CHECKING:
    from ralf.worker.service.download import Fetched

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
    # Only the verdict is returned, so pictures would be made in vain.
    ask = Ask(evidence=EvidencePolicy(thumbnails=False))
    if not isinstance(source, str) or not is_url(source):
        return _walked(source, parts, ask)
    with fetched(source, settings) as file:
        return _walked(file.path, parts, replace(ask, sha256=file.sha256))


def is_url(source: str) -> bool:
    """Whether this names an upload elsewhere that may be fetched, and not a path."""
    return _URL.match(source) is not None


@contextmanager
def fetched(url: str, settings: Settings) -> Iterator["Fetched"]:
    """The URL's content as a file that lasts as long as the block.

    The address guard (worker/service/url_policy.py) decides which URLs may be fetched.
    """
    # The guarded client takes a quarter of a second to import, and most scans fetch nothing.
    from ralf.worker.service.fetch import fetch

    with tempfile.TemporaryDirectory(prefix="ralf-", dir=settings.work_dir or None) as folder:
        try:
            file = fetch(Media(uri=url), Path(folder), tenant="default", settings=settings)
        except FetchDenied as error:
            # Who scans here is the operator, who may read the reason at once.
            raise FetchDenied(
                f"{error}: {error.__cause__}" if error.__cause__ else str(error)
            ) from error
        yield file


def for_file(path: str | Path, parts: Parts, ask: Ask) -> tuple[Parts, Ask]:
    """Parts and options for this file: the same, or for an image those that read images.

    A track decides from min_faces faces on.  A still has one, so one is enough there; the verdict
    lists the aggregation that was used, and warns that it is not calibrated.
    """
    image = probe_image(path, parts.settings)
    if image is None:
        return parts, ask
    parts = with_decoder(parts, ImageDecoder(parts.settings))
    if image.frame_count == 1:
        manifest = parts.artifact.manifest
        one = manifest.aggregation.model_copy(update={"min_faces": 1})
        alone = manifest.model_copy(update={"aggregation": one})
        parts = replace(parts, artifact=replace(parts.artifact, manifest=alone))
    return parts, replace(ask, probed=image)


def _walked(path: str | Path, parts: Parts, ask: Ask) -> Verdict:
    parts, ask = for_file(path, parts, ask)
    return walk_file(path, parts, ask=ask)[0]


@lru_cache(maxsize=2)
def _loaded(settings: Settings, model: str | None, device: str | None) -> Parts:
    """Kept for the next call: loading takes longer than a short clip."""
    return load(settings, model=model, device=device)
