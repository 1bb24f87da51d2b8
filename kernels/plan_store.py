"""Writing what ralf.kernels.plans reads: one builder at a time, and never half a plan.

The record is what publishes.  A plan is written under a name that nobody reads yet, then its
record replaces the old one in one step, then what no record names is swept.  Killed anywhere, a
builder leaves the old plan or the new one, whole; the lock on the folder dies with its process.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ralf.kernels.artifact import Artifact
from ralf.kernels.atomic_files import flush_folder, locked, replace_text, write
from ralf.kernels.manifest import Strict
from ralf.kernels.plans import (
    Device,
    Fastest,
    Key,
    Measured,
    Plan,
    PlanRecord,
    engines,
    measurements,
    plans,
)


@contextmanager
def building(artifact: Artifact) -> Iterator[Path]:
    """The engines folder, locked for one builder; what a dead one left is swept."""
    folder = engines(artifact)
    folder.mkdir(exist_ok=True)
    with locked(folder):
        sweep(artifact)
        yield folder


def publish(artifact: Artifact, content: bytes | Path, draft: Mapping[str, Any]) -> Plan:
    """Write the plan, then its record; call it inside `building`.

    The draft is a PlanRecord but for file, plan_sha256, size_bytes, and the model's hashes.
    """
    folder = engines(artifact)
    key = Key.parse(str(draft["key"]))
    staging = folder / f".{key}.new"
    staging.unlink(missing_ok=True)
    try:
        digest = write(staging, content)
        record = PlanRecord.model_validate(
            {
                **draft,
                "file": f"{key}-{digest[:8]}.plan",
                "plan_sha256": digest,
                "size_bytes": staging.stat().st_size,
                "manifest_sha256": artifact.manifest_sha256,
                "weights_sha256": artifact.weights_sha256,
            }
        )
        staging.replace(folder / record.file)
    finally:
        staging.unlink(missing_ok=True)
    flush_folder(folder)
    made = Plan(folder, key, record)
    _forget(artifact, key)
    rewrite(made)
    sweep(artifact)
    return made


def rewrite(made: Plan) -> None:
    """Replace a plan's record: how it is published, and how it becomes verified."""
    replace_text(made.folder / f"{made.key}.json", _text(made.record))


def withdraw(artifact: Artifact, found: Plan) -> None:
    """Take a plan away: its record first, so that nobody finds half of it."""
    _forget(artifact, found.key)
    (found.folder / f"{found.key}.json").unlink(missing_ok=True)
    flush_folder(found.folder)
    sweep(artifact)


def sweep(artifact: Artifact) -> None:
    """Remove what no record names: left by a killed builder, or replaced."""
    folder = engines(artifact)
    named = {found.record.file for found in plans(artifact)}
    for path in folder.iterdir():
        if path.is_dir():
            continue
        if path.name.startswith(".") or (path.suffix == ".plan" and path.name not in named):
            path.unlink()


def record_fastest(artifact: Artifact, device: Device, measured: Measured) -> None:
    """Add or replace a device's line; call it inside `building`."""
    _write(artifact, {**measurements(artifact).devices, device.label: measured})


def _forget(artifact: Artifact, key: Key) -> None:
    """What was measured of a plan says nothing of the one that replaces it."""
    known = measurements(artifact).devices
    kept = {label: measured for label, measured in known.items() if measured.engine != str(key)}
    if kept != known:
        _write(artifact, kept)


def _write(artifact: Artifact, devices: dict[str, Measured]) -> None:
    replace_text(engines(artifact) / "fastest.json", _text(Fastest(devices=devices)))


def _text(document: Strict) -> str:
    plain = document.model_dump(mode="json", by_alias=True)
    return json.dumps(plain, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
