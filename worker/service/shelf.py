"""The models that the child has loaded: the worker's own, and the last one that a job pinned.

The worker's own follows its promotions: between two jobs, and every two seconds while idle, the
file models/NAME/current is read.  A new version is loaded beside the old one and checked on its
golden file by that load; only then does the next job see it.  One that does not load leaves the
old one in its place, and is not tried again until another is promoted.  A model that the settings
pin, by name@version or by path, is not followed.
"""

import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import structlog

from worker.contract import Job
from worker.errors import BadRequest, ModelUnavailable
from worker.settings import Settings

if TYPE_CHECKING:
    from worker.runtime import Parts

log = structlog.get_logger()

LOOK_EVERY_S = 2.0
Facts = dict[str, object]


def load(settings: Settings, model: str | None) -> "Parts":
    """runtime.load, imported when it is first needed."""
    from worker import runtime

    return runtime.load(settings, model=model)


def promoted(settings: Settings) -> str | None:
    """The version that models/NAME/current names now."""
    from kernels.artifact import promoted as read
    from worker.runtime import models_dir

    return read(models_dir(settings), settings.model)


class Shelf:
    """Gives each job the parts that it is to be walked with."""

    def __init__(
        self,
        settings: Settings,
        *,
        load: Callable[[Settings, str | None], "Parts"] = load,
        promoted: Callable[[Settings], str | None] = promoted,
    ) -> None:
        self._settings, self._load, self._promoted = settings, load, promoted
        self._follows = "@" not in settings.model and os.sep not in settings.model
        self._own: Parts | None = None
        self._pinned: tuple[str, Parts] | None = None
        self._refused = ""
        self._looked = 0.0
        self._lock = threading.Lock()

    def open(self) -> Facts:
        """Load the worker's own model; raises ModelUnavailable."""
        self._own = self._load(self._settings, None)
        self._looked = time.monotonic()
        return facts(self._own)

    def follow(self) -> Facts | None:
        """Look for a promotion, now and then; the new model's facts once it is in place."""
        with self._lock:
            now = time.monotonic()
            if self._own is None or not self._follows or now - self._looked < LOOK_EVERY_S:
                return None
            self._looked = now
            version, mine = self._promoted(self._settings), self._own.artifact.version
            if version is None or version in {mine, self._refused}:
                return None
            try:
                fresh = self._load(self._settings, f"{self._settings.model}@{version}")
            except Exception as error:  # noqa: BLE001  the border: the old model stays
                self._refused = version
                log.error("model.refused", version=version, stays=mine, error=str(error))
                return None
            self._own, self._refused = fresh, ""
            log.info("model.switched", version=version, was=mine)
            return facts(fresh)

    def of(self, job: Job) -> "Parts | None":
        """The parts for this job; a pin that cannot be loaded is the job's fault."""
        with self._lock:
            if job.model is None or self._own is None or _is(job.model, self._own):
                return self._own
            if self._pinned is None or self._pinned[0] != job.model:
                self._pinned = None  # before the load: there is room for two, not for three
                try:
                    self._pinned = job.model, self._load(self._settings, job.model)
                except ModelUnavailable as error:
                    raise BadRequest(f"the job pins model {job.model!r}: {error}") from error
            return self._pinned[1]


class EmptyShelf(Shelf):
    """For bodies that need no model."""

    def open(self) -> Facts:
        """Nothing to load."""
        return {"model": "none", "engine": "test"}


def facts(parts: "Parts") -> Facts:
    """What ralf_engine_info shows."""
    return {
        "model": parts.artifact.manifest.name,
        "version": parts.artifact.version,
        "engine": parts.engine.name,
        "precision": parts.engine.precision,
        "device": parts.engine.device,
        "decoder": parts.decoder.name,
    }


def _is(pin: str, parts: "Parts") -> bool:
    name, _, version = pin.partition("@")
    return name == parts.artifact.manifest.name and version in {"", parts.artifact.version}
