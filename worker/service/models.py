"""The models that the child has loaded, and which of them a job is walked with.

    promoted   the worker's own; it follows models/NAME/current
    canary     serves some tenants before it is promoted (RALF_CANARY)
    shadow     scores some jobs a second time, and its verdicts go nowhere (RALF_SHADOW)
    pinned     the last version that a job named

`current` is read between two jobs, and every two seconds while idle.  A new version is loaded
beside the old one, in a thread of its own, so that jobs go on; loading checks it on its golden
file; only then does the next job see it.  A version that does not load leaves the old one in its
place, loudly (`model.refused`, ralf_model_refused), and is tried again now and then, since the
reason may pass: a full device, a folder that is still being copied.  A model that the settings
pin, by name@version or by path, is not followed.

What is loaded holds its version's folder, so that `ralf models gc` leaves it alone.
"""

import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import structlog

from ralf.worker.contract import Job, Verdict
from ralf.worker.errors import BadRequest, ModelUnavailable
from ralf.worker.service.rollout import Rollout
from ralf.worker.service.slot import Aside, Slot, in_thread
from ralf.worker.settings import Settings

if TYPE_CHECKING:
    from ralf.worker.runtime import Parts

log = structlog.get_logger()

LOOK_EVERY_S = 2.0
Facts = dict[str, Any]


def load(settings: Settings, model: str | None, *, together: bool = False) -> "Parts":
    """runtime.load, imported when it is first needed; the version is held while it is in use.

    together: for a child that runs several jobs at once, whose crops then share batches.
    """
    from ralf.kernels.atomic_files import hold
    from ralf.worker import runtime

    parts = runtime.load(settings, model=model)
    if together:
        parts = runtime.together(parts)
    try:
        weakref.finalize(parts, os.close, hold(parts.artifact.path))
    except OSError as error:
        raise ModelUnavailable(f"{label(parts)} went away while it was loaded: {error}") from error
    return parts


def promoted(settings: Settings) -> str | None:
    """The version that models/NAME/current names now."""
    from ralf.kernels.artifact import promoted as read
    from ralf.worker.runtime import models_dir

    return read(models_dir(settings), settings.model)


class Shelf:
    """Gives each job the parts that it is to be walked with."""

    def __init__(
        self,
        settings: Settings,
        *,
        load: Callable[[Settings, str | None], "Parts"] = load,
        promoted: Callable[[Settings], str | None] = promoted,
        aside: Aside = in_thread,
    ) -> None:
        self._settings, self._load, self._promoted = settings, load, promoted
        self._rollout = Rollout.of(settings)
        self._follows = "@" not in settings.model and os.sep not in settings.model
        self._own: Parts | None = None
        self._pinned: tuple[str, Parts] | None = None
        self._next = Slot("promoted", self._brought, aside)
        self._canary = Slot("canary", self._brought, aside)
        self._shadow = Slot("shadow", self._brought, aside)
        self._unread = ""
        self._looked = 0.0
        self._lock = threading.Lock()

    def open(self) -> Facts:
        """Load the worker's own model; raises ModelUnavailable.  The others may fail."""
        self._own = self._load(self._settings, None)
        self._looked = time.monotonic()
        if self._rollout.canary is not None:
            self._canary.fill(self._rollout.canary.model)
        if self._rollout.shadow:
            self._shadow.fill(self._rollout.shadow)
        return self._facts()

    def follow(self) -> Facts | None:
        """Look for a promotion, now and then; the facts once they have changed."""
        with self._lock:
            now = time.monotonic()
            if self._own is not None and now - self._looked >= LOOK_EVERY_S:
                self._looked = now
                if self._look(self._own):
                    return self._facts()
            return self._facts() if self._taken() else None

    def _look(self, own: "Parts") -> bool:
        """Have brought in what is not there; whether a refusal has become void."""
        if self._rollout.canary is not None:
            self._canary.want(self._rollout.canary.model)
        if self._rollout.shadow:
            self._shadow.want(self._rollout.shadow)
        version = self._named() if self._follows else None
        if version is not None and version != own.artifact.version:
            self._next.want(f"{self._settings.model}@{version}")
            return False
        return version is not None and self._next.forgive()

    def _taken(self) -> bool:
        """Put in place what has come; whether anything changed."""
        changed = [slot.taken() for slot in (self._canary, self._shadow, self._next)]
        fresh, self._next.parts = self._next.parts, None
        if fresh is not None and self._own is not None:
            was, version = self._own.artifact.version, fresh.artifact.version
            if self._named() in {version, None}:
                self._own = fresh
                log.info("model.switched", version=version, was=was)
            else:  # promoted while another was on its way; the next look brings that one
                log.info("model.overtaken", version=version, stays=was)
        return any(changed)

    def _named(self) -> str | None:
        """What `current` names; a file that does not read leaves all as it is, told once."""
        try:
            version = self._promoted(self._settings)
        except Exception as error:  # noqa: BLE001  the border: the old model stays
            if str(error) != self._unread:
                self._unread = str(error)
                log.error("model.unreadable", error=str(error))
            return None
        self._unread = ""
        return version

    def _brought(self, spec: str) -> "Parts":
        """A version, loaded; what another slot has is not loaded twice."""
        for parts in (self._canary.parts, self._shadow.parts):
            if parts is not None and label(parts) == spec:
                return parts
        return self._load(self._settings, spec)

    def of(self, job: Job) -> "Parts | None":
        """The parts for this job; a pin that cannot be loaded is the job's fault."""
        with self._lock:
            own, canary = self._own, self._canary.parts
            if own is None:
                return None
            if job.model is None or job.model == own.artifact.manifest.name:
                chosen = self._rollout.canary
                served = chosen is not None and canary is not None and chosen.takes(job.tenant)
                return canary if served else own
            for parts in (own, canary, self._shadow.parts):
                if parts is not None and label(parts) == job.model:
                    return parts
            if self._pinned is None or self._pinned[0] != job.model:
                self._pinned = None  # before the load: the device has room for few
                try:
                    self._pinned = job.model, self._load(self._settings, job.model)
                except ModelUnavailable as error:
                    raise BadRequest(f"the job pins model {job.model!r}: {error}") from error
            return self._pinned[1]

    def marked(self, verdict: Verdict, job: Job) -> Verdict:
        """The verdict; a canary's says so, as long as it is not promoted."""
        canary, own = self._rollout.canary, self._own
        if job.model not in {None, verdict.made.model} or canary is None or own is None:
            return verdict
        made = f"{verdict.made.model}@{verdict.made.version}"
        if made != canary.model or made == label(own):
            return verdict
        text = f"canary_model: {made} is not promoted; it was chosen for this tenant"
        return verdict.model_copy(update={"warnings": (*verdict.warnings, text)})

    def shadow_of(self, job: Job, parts: "Parts | None") -> "Parts | None":
        """What is to score this job too: only beside the promoted version."""
        shadow = self._shadow.parts
        if shadow is None or parts is None or parts is not self._own:
            return None
        drawn = self._rollout.shadows(job.job_id) and label(shadow) != label(parts)
        return shadow if drawn else None

    def _facts(self) -> Facts:
        assert self._own is not None
        slots = (self._next, self._canary, self._shadow)
        loaded = (self._own, self._canary.parts, self._shadow.parts)
        return facts(self._own) | {
            "refused": [slot.refused.facts() for slot in slots if slot.refused is not None],
            "references": dict(filter(None, (reference(p) for p in loaded if p is not None))),
        }


class EmptyShelf(Shelf):
    """For test bodies: loads the worker's model when a body needs one, and not before."""

    def open(self) -> Facts:
        """Nothing is loaded yet."""
        return {"model": "none", "engine": "test"}

    def of(self, job: Job) -> "Parts | None":
        """The worker's own model."""
        with self._lock:
            if self._own is None:
                self._own = self._load(self._settings, None)
            return self._own

    def follow(self) -> Facts | None:
        """A test's model is not replaced."""
        return None


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


def label(parts: "Parts") -> str:
    """NAME@VERSION."""
    return f"{parts.artifact.manifest.name}@{parts.artifact.version}"


def reference(parts: "Parts") -> tuple[str, dict[str, Any]] | None:
    """The manifest's spread of scores, for drift."""
    known = parts.artifact.manifest.reference
    return None if known is None else (label(parts), {"edges": known.edges, "counts": known.counts})
