"""A child on a GPU that does not exist: its models run fast only if a program could be started.

As Triton does, loading a version starts a program.  A child that is confined already may not, and
then the version runs eagerly.  The files in the child's scratch folder are its world: `version`
names the promoted one, `wait` holds up a load, and `broken` makes it fail.
"""

import os
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ralf.worker.errors import ModelUnavailable
from ralf.worker.service import child, models
from ralf.worker.service.messages import EAGER
from ralf.worker.settings import Settings


def promoted(settings: Settings) -> str:
    """What `current` names."""
    return Path("version").read_text()


def load(settings: Settings, model: str | None) -> Any:
    """Parts of that version, as far as facts need them."""
    version = (model or f"net@{promoted(settings)}").partition("@")[2]
    while Path("wait").exists():
        time.sleep(0.02)
    if Path("broken").exists():
        raise ModelUnavailable("the device is full")
    try:
        subprocess.run(["true"], check=True)
        name = "torch"
    except OSError:
        name = EAGER
    return SimpleNamespace(
        artifact=SimpleNamespace(
            version=version, manifest=SimpleNamespace(name="net", reference=None)
        ),
        engine=SimpleNamespace(name=name, precision="fp16", device="cuda:0"),
        decoder=SimpleNamespace(name="pyav"),
        refused_plans=(),
    )


class CompiledModels(models.LoadedModels):
    """The real ones, with the loads above."""

    def __init__(self, settings: Settings, **_: Any) -> None:
        super().__init__(settings, load=load, promoted=promoted)


if __name__ == "__main__":
    child.LazyModels = CompiledModels  # type: ignore[assignment,misc]
    child.IDLE_S = models.CHECK_EVERY_S = 0.05
    os._exit(child.main())
