"""A model on disk: found by name, checked by hash, published, promoted and rolled back atomically.

    models/NAME/VERSION/   manifest.json, the files it names, engines/ (built later, own hashes)
    models/NAME/current    the promoted version, one line, replaced atomically
    models/NAME/history    how it came to be the promoted one; what rollback reads

VERSION is the first 8 hex digits of the SHA-256 of manifest.json, and the manifest holds the
SHA-256 of every other file, so a folder's name vouches for everything in it.  A version never
changes: recalibrating makes a new one.

Publishing writes to a hidden folder beside the version, flushes it, and renames it; removing goes
the other way round.  Killed at any step, each leaves the old state or the new one, whole; what a
dead writer left is swept by the next, since all of them hold the lock on the model's folder.

`promote` here moves the pointer and asks nothing; ralf.kernels.registry asks first.

Refused, with the reason: a torn, truncated, changed or missing file, a link of any kind inside a
version, a file name that is not a plain name, a manifest that does not hash to its folder's name.
Nothing here is a pickle, and nothing here imports torch.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from ralf.kernels import history
from ralf.kernels.atomic_files import (
    ArtifactError,
    Damaged,
    compare,
    digest_of,
    flush_folder,
    locked,
    read_regular,
    refuse_links,
    write,
)
from ralf.kernels.golden import Golden, golden
from ralf.kernels.history import VERSION
from ralf.kernels.manifest import Manifest

__all__ = [
    "SHIPPED",
    "Artifact",
    "ArtifactError",
    "Damaged",
    "Golden",
    "NotFound",
    "golden",
    "models_folder",
    "names",
    "open_artifact",
    "promote",
    "promoted",
    "publish",
    "resolve",
    "rollback",
    "versions",
]

SHIPPED = Path(__file__).resolve().parent.parent / "models"
"""The models that come with the code."""
REQUIRED = frozenset({"weights.safetensors", "golden.npz", "card.md"})
MANIFEST = "manifest.json"
MANIFEST_MAX_BYTES = 1_000_000
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


def models_folder(named: Path | str | None = None) -> Path:
    """Where models lie: the folder named, else RALF_MODELS_DIR, else the one beside the code."""
    return Path(named or os.environ.get("RALF_MODELS_DIR") or SHIPPED)


class NotFound(ArtifactError):
    """No such model or version; the message says what is there."""


@dataclass(frozen=True)
class Artifact:
    """One verified version of a model."""

    path: Path
    manifest: Manifest
    manifest_sha256: str

    @property
    def name(self) -> str:
        """The model's name, without its version."""
        return self.manifest.name

    @property
    def version(self) -> str:
        """First 8 hex digits of the manifest's hash."""
        return self.manifest_sha256[:8]

    @property
    def label(self) -> str:
        """What `resolve` takes: name@version."""
        return f"{self.name}@{self.version}"

    @property
    def weights_sha256(self) -> str:
        """What a verdict reports."""
        return self.manifest.files["weights.safetensors"]

    def file(self, name: str) -> Path:
        """Where a file of this version lies."""
        if name not in self.manifest.files:
            have = ", ".join(sorted(self.manifest.files))
            raise NotFound(f"{self.label} has no file {name!r} (have: {have})")
        return self.path / name

    def read(self, name: str) -> bytes:
        """A file's bytes, hashed as read: what is checked is what is used."""
        data = read_regular(self.file(name))
        compare(self.path / name, hashlib.sha256(data).hexdigest(), self.manifest.files[name])
        return data

    def verify(self) -> None:
        """Hash every file again; Damaged where one differs."""
        refuse_links(self.path)
        for name, expected in self.manifest.files.items():
            path = self.path / name
            compare(path, digest_of(path), expected)


def open_artifact(path: Path | str) -> Artifact:
    """A version's folder, every hash checked."""
    path = Path(path)
    data = read_regular(path / MANIFEST, MANIFEST_MAX_BYTES)
    digest = hashlib.sha256(data).hexdigest()
    folder = path.resolve().name
    if folder != digest[:8]:
        raise Damaged(
            f"{path / MANIFEST} hashes to {digest[:8]}, its folder is named {folder}: "
            "the manifest was changed after publishing, or the folder renamed"
        )
    try:
        manifest = Manifest.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise Damaged(f"{path / MANIFEST}: {where or 'document'}: {first['msg']}") from error
    _check_names(manifest.files, path / MANIFEST)
    artifact = Artifact(path, manifest, digest)
    artifact.verify()
    return artifact


def names(models_dir: Path | str) -> list[str]:
    """Models that have at least one version."""
    root = Path(models_dir)
    if not root.is_dir():
        return []
    found = (p.name for p in root.iterdir() if p.is_dir() and _NAME.fullmatch(p.name))
    return sorted(name for name in found if versions(root, name))


def versions(models_dir: Path | str, name: str) -> list[str]:
    """Published versions of a model, oldest first; not checked for damage."""
    folder = Path(models_dir) / name
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if VERSION.fullmatch(p.name) and p.is_dir()]

    def published(path: Path) -> tuple[float, str]:
        manifest = path / MANIFEST
        return (manifest.stat().st_mtime if manifest.is_file() else 0.0, path.name)

    return [p.name for p in sorted(found, key=published)]


def promoted(models_dir: Path | str, name: str) -> str | None:
    """The version that `current` names, or None."""
    return history.current(Path(models_dir) / name)


def resolve(models_dir: Path | str, spec: str) -> Artifact:
    """A model by "name" (its promoted version), "name@version", or the path of either."""
    root = Path(models_dir)
    if os.sep in spec or spec in {".", ".."}:
        path = Path(spec)
        if (path / MANIFEST).exists():
            return open_artifact(path)
        if not (path / "current").exists():
            raise NotFound(f"no model at {spec}: neither {MANIFEST} nor current is there")
        root, spec = path.resolve().parent, path.resolve().name
    name, _, wanted = spec.partition("@")
    have = versions(root, name) if _NAME.fullmatch(name) else []
    if not have:
        there = ", ".join(names(root)) or "none"
        raise NotFound(
            f"no model {name!r} in {root} (have: {there}); make one: "
            "ralf publish, or ralf models untrained for one that knows nothing"
        )
    artifact = open_artifact(root / name / _choose(root, name, wanted, have))
    if artifact.name != name:
        raise Damaged(f"{artifact.path} holds a model named {artifact.name!r}, not {name!r}")
    return artifact


def publish(models_dir: Path | str, draft: Manifest, files: Mapping[str, bytes | Path]) -> Artifact:
    """Write a new version; the same content again is the same version, and changes nothing.

    The draft's own `files` are ignored: they are hashed as they are written.
    """
    if lacking := REQUIRED - files.keys():
        raise ArtifactError(f"a model needs {sorted(REQUIRED)}, lacks {sorted(lacking)}")
    _check_names(files, "the files to publish")
    folder = Path(models_dir) / draft.name
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        sweep(folder)
        staging = Path(tempfile.mkdtemp(prefix=".new-", dir=folder))
        try:
            return _publish_from(staging, folder, draft, files)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def promote(models_dir: Path | str, name: str, version: str, *, remark: str = "") -> Artifact:
    """Make a version the one that `name` means; it is verified first."""
    root = Path(models_dir)
    artifact = resolve(root, f"{name}@{version}")
    with locked(root / name):
        point(root / name, artifact, remark)
    return artifact


def point(folder: Path, artifact: Artifact, remark: str = "") -> None:
    """The same once the folder is locked; the current one again is no event."""
    if history.current(folder) != artifact.version:
        history.record(folder, artifact.version, "promoted", remark)


def rollback(models_dir: Path | str, name: str) -> Artifact:
    """Go back to the version promoted before the current one; it is verified first."""
    folder = Path(models_dir) / name
    if not folder.is_dir():
        raise NotFound(f"no model {name!r} in {models_dir}")
    with locked(folder):
        past = history.pile(history.events(folder))
        if len(past) < 2:
            now = past[-1] if past else "none"
            raise NotFound(f"{name}: nothing was promoted before the current version ({now})")
        if not (folder / past[-2]).is_dir():
            raise NotFound(f"{name}: the version before, {past[-2]}, was removed; promote another")
        artifact = open_artifact(folder / past[-2])
        history.record(folder, artifact.version, "rolled_back")
    return artifact


def sweep(folder: Path) -> None:
    """What a dead writer left; the caller holds the lock on the model's folder."""
    for pattern in (".new-*", ".old-*"):
        for left in folder.glob(pattern):
            shutil.rmtree(left)
    for name in (history.CURRENT, history.HISTORY):
        for file in folder.glob(f".{name}.*"):
            file.unlink()


def _choose(root: Path, name: str, wanted: str, have: list[str]) -> str:
    if wanted:
        matching = [v for v in have if v.startswith(wanted)] if len(wanted) >= 4 else []
        if len(matching) == 1:
            return matching[0]
        raise NotFound(f"no one version {wanted!r} of {name} in {root} (have: {', '.join(have)})")
    current = promoted(root, name)
    if current in have:
        return current
    state = f"its promoted version {current} is gone" if current else "none is promoted"
    raise NotFound(
        f"{name} in {root}: {state} (have: {', '.join(have)}); "
        f"promote one: ralf models promote {name}@{have[-1]}"
    )


def _publish_from(
    staging: Path, folder: Path, draft: Manifest, files: Mapping[str, bytes | Path]
) -> Artifact:
    hashes = {name: write(staging / name, files[name]) for name in sorted(files)}
    manifest = draft.model_copy(update={"files": hashes})
    document = manifest.model_dump(mode="json", by_alias=True)
    text = json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    digest = write(staging / MANIFEST, text.encode())
    Manifest.model_validate_json(text)  # model_copy does not check
    final = folder / digest[:8]
    if final.exists():
        try:
            there = open_artifact(final)
        except Damaged as error:
            raise Damaged(f"{error}; remove {final} and publish again") from error
        if there.manifest_sha256 != digest:
            raise ArtifactError(f"{final} is another model with the same first 8 digits")
        return there
    staging.chmod(0o755)  # mkdtemp makes folders private; a worker may run as another user
    flush_folder(staging)
    staging.rename(final)
    flush_folder(folder)
    return Artifact(final, manifest, digest)


def _check_names(files: Mapping[str, object], where: Path | str) -> None:
    for name in files:
        if not _FILE.fullmatch(name) or name in {MANIFEST, "engines"}:
            raise Damaged(f"{where}: {name!r} is not a plain file name")
    if isinstance(where, Path) and (lacking := REQUIRED - files.keys()):
        raise Damaged(f"{where}: names no {', '.join(sorted(lacking))}")
