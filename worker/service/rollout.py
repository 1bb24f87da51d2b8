"""Which jobs meet a version that is not the promoted one: a shadow's share, a canary's tenants.

    RALF_SHADOW=3f9c2a1b  RALF_SHADOW_SHARE=0.1     a tenth of the jobs is scored a second time
    RALF_CANARY=3f9c2a1b:tenant-a,tenant-b          these tenants' verdicts come from that version
    RALF_CANARY=3f9c2a1b:5%                         or those of a twentieth of the tenants

Draws are by hash: the same job is drawn at each attempt and on every worker, and a tenant that is
in at 5 % is in at 10 %.  Another version draws others, so that no tenant is always first.
"""

import hashlib
import math
import os
import re
from dataclasses import dataclass

from ralf.worker.settings import Settings, SettingsError

_VERSION = re.compile(r"(?:[A-Za-z0-9][A-Za-z0-9_.-]{0,127}@)?[0-9a-f]{8}")
_SHARE = re.compile(r"(\d{1,3}(?:\.\d+)?)%")


@dataclass(frozen=True)
class Canary:
    """Tenants whose verdicts come from a version before it is promoted."""

    model: str
    """NAME@VERSION."""
    tenants: frozenset[str] = frozenset()
    share: float = 0.0

    def takes(self, tenant: str) -> bool:
        """Whether this tenant is served by it."""
        return tenant in self.tenants or drawn(f"canary {self.model}", tenant, self.share)


@dataclass(frozen=True)
class Rollout:
    """What the settings ask beside the promoted version."""

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
    """True for about this share of names, for each always the same."""
    digest = hashlib.sha256(f"{salt}\0{name}".encode()).digest()
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
