"""The model versions that the child has loaded, and which of them scores a job.

    promoted   the worker's own; it follows models/NAME/current
    canary     serves some tenants before it is promoted
    shadow     scores some jobs a second time; its verdicts are only compared
    pinned     the last version that a job named

    RALF_SHADOW=3f9c2a1b  RALF_SHADOW_SHARE=0.1     a tenth of the jobs is scored a second time
    RALF_CANARY=3f9c2a1b:tenant-a,tenant-b          these tenants' verdicts come from that version
    RALF_CANARY=3f9c2a1b:5%                         or those of a twentieth of the tenants

Canary and shadow are drawn by hash: each attempt and each worker draws the same, and a tenant that
is chosen at 5 % is chosen at 10 %.  Another version draws other tenants, so that no tenant is
always the first.

`current` is read between two jobs, and every two seconds while idle.  A new version loads in a
thread beside the old one, so that jobs go on, and is checked on its golden file before the next job
uses it.  A version that does not load leaves the old one in place (`model.refused`,
ralf_model_refused) and is tried again later, since the reason may pass: a full device, a folder
that is still being copied.  A model that the settings pin, by name@version or by path, stays.

A loaded version keeps its folder locked, so that `ralf models gc` does not delete it.
"""

import hashlib
import math
import os
import re
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import structlog

from ralf.worker.contract import Job, Verdict
from ralf.worker.errors import BadRequest, ModelUnavailable
from ralf.worker.service.messages import EngineFacts, RefusedModel
from ralf.worker.settings import Settings, SettingsError

if TYPE_CHECKING:
    from ralf.worker.runtime import Parts

log = structlog.get_logger()

CHECK_EVERY_S = 2.0
RETRY_S = 300.0
"""A version that did not load is tried again after this time."""
_VERSION = re.compile(r"(?:[A-Za-z0-9][A-Za-z0-9_.-]{0,127}@)?[0-9a-f]{8}")
_SHARE = re.compile(r"(\d{1,3}(?:\.\d+)?)%")
Role = Literal["promoted", "canary", "shadow"]
Start = Callable[[Callable[[], None]], None]
"""Runs a function without blocking its caller."""


@dataclass(frozen=True)
class Canary:
    """The tenants whose verdicts come from a version before it is promoted."""

    model: str
    """NAME@VERSION."""
    tenants: frozenset[str] = frozenset()
    share: float = 0.0

    def takes(self, tenant: str) -> bool:
        """Whether this tenant gets its verdicts."""
        return tenant in self.tenants or drawn(f"canary {self.model}", tenant, self.share)


@dataclass(frozen=True)
class Rollout:
    """What RALF_CANARY and RALF_SHADOW ask for."""

    canary: Canary | None = None
    shadow: str = ""
    """NAME@VERSION, empty for none."""
    shadow_share: float = 0.0

    @classmethod
    def of(cls, settings: Settings) -> "Rollout":
        """From RALF_SHADOW, RALF_SHADOW_SHARE and RALF_CANARY; SettingsError names the faulty."""
        share = settings.shadow_share
        if not (math.isfinite(share) and 0 <= share <= 1):
            raise SettingsError(f"RALF_SHADOW_SHARE should be from 0 to 1, got {share}")
        shadow = _model("RALF_SHADOW", settings.shadow, settings) if settings.shadow else ""
        return cls(_canary(settings), shadow, share)

    def shadows(self, job_id: str) -> bool:
        """Whether this job is scored by the shadow too."""
        return bool(self.shadow) and drawn(f"shadow {self.shadow}", job_id, self.shadow_share)


def drawn(salt: str, name: str, share: float) -> bool:
    """True for about this share of names; for one name always the same."""
    # Not hash(), which differs from process to process.
    digest = hashlib.sha256(f"{salt}\0{name}".encode()).digest()
    # Python compares an integer with a float exactly, so 0 draws none and 1 draws all.
    return int.from_bytes(digest[:8]) < share * 2**64


def _canary(settings: Settings) -> Canary | None:
    if not settings.canary:
        return None
    version, colon, whom = settings.canary.partition(":")
    share = _SHARE.fullmatch(whom)
    tenants = frozenset(part.strip() for part in whom.split(",") if part.strip())
    if not colon or not tenants or (share and float(share[1]) > 100):
        raise SettingsError(
            "RALF_CANARY should be VERSION:tenant-a,tenant-b or VERSION:5%, "
            f"got {settings.canary!r}"
        )
    model = _model("RALF_CANARY", version, settings)
    return Canary(model, share=float(share[1]) / 100) if share else Canary(model, tenants)


def _model(setting: str, version: str, settings: Settings) -> str:
    """NAME@VERSION; the worker's own name where only the version is given."""
    if not _VERSION.fullmatch(version):
        raise SettingsError(
            f"{setting} should name a version by its 8 digits, or NAME@VERSION, got {version!r}; "
            "see: ralf models list"
        )
    if "@" in version:
        return version
    if os.sep in settings.model:
        raise SettingsError(f"{setting} should be NAME@VERSION where RALF_MODEL is a path")
    return f"{settings.model.partition('@')[0]}@{version}"


def in_thread(work: Callable[[], None]) -> None:
    """In a thread that ends with the process."""
    threading.Thread(target=work, name="load", daemon=True).start()


@dataclass(frozen=True)
class LoadFailure:
    """A version that did not load."""

    role: Role
    model: str
    why: str
    retry_at: float
    """time.monotonic() of the next try."""


class BackgroundLoad:
    """Loads one version in the background; a failure is kept and tried again later.

    Not locked: one thread calls request() and collect(), and only the load runs beside it.
    """

    def __init__(self, role: Role, load: Callable[[str], "Parts"], start: Start) -> None:
        self.role: Role = role
        self.parts: Parts | None = None
        self.failure: LoadFailure | None = None
        self._load, self._start = load, start
        self._loading = ""
        self._result: Parts | Exception | None = None

    def load_now(self, model: str) -> None:
        """Load it and wait; a failure is kept and not raised."""
        self._loading = model
        self._run(model)
        self.collect()

    def request(self, model: str) -> None:
        """Start to load it, unless it is there, on its way, or failed a moment ago."""
        if self._loading or self.parts is not None:
            return
        failure = self.failure
        if failure and failure.model == model and time.monotonic() < failure.retry_at:
            return
        self._loading = model
        self._start(lambda: self._run(model))

    def _run(self, model: str) -> None:
        try:
            self._result = self._load(model)
        except Exception as error:  # noqa: BLE001  the border: what is in place stays
            self._result = error

    def collect(self) -> bool:
        """Take the result of a load that has ended; whether one had, well or not."""
        # The load's thread sets only the result.  If it cleared `_loading` as well, request()
        # could start the same load again before its result is collected.
        result, model = self._result, self._loading
        if result is None:
            return False
        self._result, self._loading = None, ""
        if isinstance(result, Exception):
            retry_at = time.monotonic() + RETRY_S
            why = str(result) or type(result).__name__
            self.failure = LoadFailure(self.role, model, why, retry_at)
            log.error("model.refused", role=self.role, model=model, error=why)
        else:
            self.parts, self.failure = result, None
        return True

    def forget_failure(self) -> bool:
        """Drop a failure that no longer matters; whether there was one."""
        had, self.failure = self.failure is not None, None
        return had


def load(settings: Settings, model: str | None, *, together: bool = False) -> "Parts":
    """Load a version and lock its folder while it is in use.

    together: for a child that runs several jobs at once, whose crops then share batches.
    """
    # Imported here: torch is heavy, and a child with test bodies does without it.
    from ralf.kernels.atomic_files import hold
    from ralf.worker import runtime

    parts = runtime.load(settings, model=model)
    if together:
        parts = runtime.together(parts)
    try:
        # The lock ends when the parts are freed, not when others replace them: a job may still use
        # them.
        weakref.finalize(parts, os.close, hold(parts.artifact.path))
    except OSError as error:
        raise ModelUnavailable(f"{label(parts)} went away while it was loaded: {error}") from error
    return parts


def promoted(settings: Settings) -> str | None:
    """The version that models/NAME/current names now."""
    from ralf.kernels.artifact import promoted as read
    from ralf.worker.runtime import models_dir

    return read(models_dir(settings), settings.model)


class LoadedModels:
    """Gives each job the loaded version that scores it."""

    def __init__(
        self,
        settings: Settings,
        *,
        load: Callable[[Settings, str | None], "Parts"] = load,
        promoted: Callable[[Settings], str | None] = promoted,
        start: Start = in_thread,
    ) -> None:
        self._settings, self._load, self._promoted = settings, load, promoted
        self._rollout = Rollout.of(settings)
        self._follows = "@" not in settings.model and os.sep not in settings.model
        self._own: Parts | None = None
        self._switched = False
        """Whether `_own` is another version than the one that open() loaded."""
        self._pinned: tuple[str, Parts] | None = None
        self._next = BackgroundLoad("promoted", self._loaded, start)
        self._canary = BackgroundLoad("canary", self._loaded, start)
        self._shadow = BackgroundLoad("shadow", self._loaded, start)
        self._unreadable = ""
        self._checked_at = 0.0
        self._lock = threading.Lock()

    def open(self) -> EngineFacts:
        """Load the worker's own model; raises ModelUnavailable.  The others may fail."""
        self._own = self._load(self._settings, None)
        self._checked_at = time.monotonic()
        if self._rollout.canary is not None:
            self._canary.load_now(self._rollout.canary.model)
        if self._rollout.shadow:
            self._shadow.load_now(self._rollout.shadow)
        return self._facts()

    def follow(self) -> EngineFacts | None:
        """Check for a promotion now and then; the facts when they have changed."""
        with self._lock:
            now = time.monotonic()
            if self._own is not None and now - self._checked_at >= CHECK_EVERY_S:
                self._checked_at = now
                if self._request_missing(self._own):
                    return self._facts()
            return self._facts() if self._install() else None

    def _request_missing(self, own: "Parts") -> bool:
        """Request what is not loaded; True when an old failure no longer matters."""
        if self._rollout.canary is not None:
            self._canary.request(self._rollout.canary.model)
        if self._rollout.shadow:
            self._shadow.request(self._rollout.shadow)
        version = self._current() if self._follows else None
        if version is not None and version != own.artifact.version:
            self._next.request(f"{self._settings.model}@{version}")
            return False
        # The version in use is the promoted one again, so nothing waits for the refused one.
        return version is not None and self._next.forget_failure()

    def _install(self) -> bool:
        """Use what has been loaded; whether anything changed."""
        # A list: any() would stop at the first that is true and leave the others uncollected.
        changed = [each.collect() for each in (self._canary, self._shadow, self._next)]
        fresh, self._next.parts = self._next.parts, None
        if fresh is not None and self._own is not None:
            was, version = self._own.artifact.version, fresh.artifact.version
            # None: `current` cannot be read now, and this version was the last that it named.
            if self._current() in {version, None}:
                self._own, self._switched = fresh, True
                log.info("model.switched", version=version, was=was)
            else:  # another was promoted while this one loaded; the next check requests that one
                log.info("model.overtaken", version=version, stays=was)
        return any(changed)

    def _current(self) -> str | None:
        """What `current` names; None when it cannot be read, which is logged once."""
        try:
            version = self._promoted(self._settings)
        except Exception as error:  # noqa: BLE001  the border: the old model stays
            if str(error) != self._unreadable:
                self._unreadable = str(error)
                log.error("model.unreadable", error=str(error))
            return None
        self._unreadable = ""
        return version

    def _loaded(self, spec: str) -> "Parts":
        """Load a version; one that canary or shadow has already is not loaded twice."""
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
                rollout = self._rollout.canary
                served = rollout is not None and canary is not None and rollout.takes(job.tenant)
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
        """The verdict, with a warning when it is a canary's that is not promoted."""
        canary, own = self._rollout.canary, self._own
        if job.model not in {None, verdict.made.model} or canary is None or own is None:
            return verdict
        made = f"{verdict.made.model}@{verdict.made.version}"
        if made != canary.model or made == label(own):
            return verdict
        text = f"canary_model: {made} is not promoted; it was chosen for this tenant"
        return verdict.model_copy(update={"warnings": (*verdict.warnings, text)})

    def shadow_of(self, job: Job, parts: "Parts | None") -> "Parts | None":
        """The version that scores this job too, only beside the promoted one."""
        shadow = self._shadow.parts
        if shadow is None or parts is None or parts is not self._own:
            return None
        drawn = self._rollout.shadows(job.job_id) and label(shadow) != label(parts)
        return shadow if drawn else None

    def _facts(self) -> EngineFacts:
        assert self._own is not None
        failures = (each.failure for each in (self._next, self._canary, self._shadow))
        parts = (self._own, self._canary.parts, self._shadow.parts)
        # Not a reason to serve another version, since torch gives the same verdicts.
        unsigned = {
            label(each): each.refused_plans[0]
            for each in parts
            if each is not None and each.refused_plans
        }
        return engine_facts(self._own).model_copy(
            update={
                "loaded_late": self._switched,
                "refused": tuple(
                    RefusedModel(role=each.role, model=each.model, why=each.why[:500])
                    for each in failures
                    if each is not None
                )
                + tuple(
                    RefusedModel(role="plan", model=model, why=why[:500])
                    for model, why in unsigned.items()
                ),
                "references": {
                    label(each): known
                    for each in parts
                    if each is not None and (known := each.artifact.manifest.reference)
                },
            }
        )


class LazyModels(LoadedModels):
    """For test bodies: the worker's model is loaded only when a body needs one."""

    def open(self) -> EngineFacts:
        """Load nothing yet."""
        return EngineFacts(model="none", engine="test")

    def of(self, job: Job) -> "Parts | None":
        """The worker's own model."""
        with self._lock:
            if self._own is None:
                self._own = self._load(self._settings, None)
            return self._own

    def follow(self) -> EngineFacts | None:
        """Never another."""
        return None


def engine_facts(parts: "Parts") -> EngineFacts:
    """What ralf_engine_info shows."""
    return EngineFacts(
        model=parts.artifact.manifest.name,
        version=parts.artifact.version,
        engine=parts.engine.name,
        precision=parts.engine.precision,
        device=parts.engine.device,
        decoder=parts.decoder.name,
    )


def label(parts: "Parts") -> str:
    """NAME@VERSION."""
    return f"{parts.artifact.manifest.name}@{parts.artifact.version}"
