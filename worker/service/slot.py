"""A place for one version that is brought in aside, refused with a reason, tried again later."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import structlog

if TYPE_CHECKING:
    from ralf.worker.runtime import Parts

log = structlog.get_logger()

RETRY_S = 300.0
"""A refused version is tried again after so long."""
Role = Literal["promoted", "canary", "shadow"]
Aside = Callable[[Callable[[], None]], None]
"""Runs work without keeping its caller."""


def in_thread(work: Callable[[], None]) -> None:
    """In a thread that ends with the process."""
    threading.Thread(target=work, name="load", daemon=True).start()


@dataclass(frozen=True)
class Refusal:
    """A version that did not load."""

    role: Role
    model: str
    why: str
    again: float
    """time.monotonic() of the next try."""

    def facts(self) -> dict[str, str]:
        """What the parent is told."""
        return {"role": self.role, "model": self.model, "why": self.why[:500]}


class Slot:
    """Not locked: one thread wants and takes, and only `load` runs beside it."""

    def __init__(self, role: Role, load: Callable[[str], "Parts"], aside: Aside) -> None:
        self.role: Role = role
        self.parts: Parts | None = None
        self.refused: Refusal | None = None
        self._load, self._aside = load, aside
        self._coming = ""
        self._come: Parts | Exception | None = None

    def fill(self, model: str) -> None:
        """Load it now; a refusal is no error of the caller's."""
        self._coming = model
        self._bring(model)
        self.taken()

    def want(self, model: str) -> None:
        """Have it brought in, unless it is there, on its way, or refused a moment ago."""
        if self._coming or self.parts is not None:
            return
        refused = self.refused
        if refused and refused.model == model and time.monotonic() < refused.again:
            return
        self._coming = model
        self._aside(lambda: self._bring(model))

    def _bring(self, model: str) -> None:
        try:
            self._come = self._load(model)
        except Exception as error:  # noqa: BLE001  the border: what is in place stays
            self._come = error

    def taken(self) -> bool:
        """Put into place what has come; whether something has, good or bad."""
        come, model = self._come, self._coming
        if come is None:
            return False
        self._come, self._coming = None, ""
        if isinstance(come, Exception):
            again = time.monotonic() + RETRY_S
            self.refused = Refusal(self.role, model, str(come) or type(come).__name__, again)
            log.error("model.refused", role=self.role, model=model, error=self.refused.why)
        else:
            self.parts, self.refused = come, None
        return True

    def forgive(self) -> bool:
        """Forget a refusal that nobody waits for any more; whether there was one."""
        had, self.refused = self.refused is not None, None
        return had
