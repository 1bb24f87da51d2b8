"""A model on disk: found by name, checked by hash, published.

    models/NAME/VERSION/   manifest.json, the files it names, engines/ (built later, own hashes)
    models/NAME/current    the promoted version, one line, replaced atomically
    models/NAME/history    what was promoted and when; ralf.kernels.registry writes both

VERSION is the first 8 hex digits of the SHA-256 of manifest.json, and the manifest holds the
SHA-256 of every other file, so the folder's name identifies everything in it.  A version never
changes: another calibration makes another version.

Publishing writes to a hidden folder beside the version, flushes it and renames it.  A process
killed at any step leaves the old state or the new one, never half of one; the next process that
holds the lock on the model's folder removes what the dead one left.

Refused, with the reason: a truncated, changed or missing file, a link of any kind inside a
version, a file name that is not a plain name, a manifest that does not hash to its folder's name.
No file here is a pickle, and this module imports no torch.
"""

import hashlib
import io
import json
import os
import re
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from ralf.kernels.atomic_files import flush_folder, locked, write
from ralf.kernels.manifest import Manifest

SHIPPED = Path(__file__).resolve().parent.parent / "models"
"""The models that come with the code."""
REQUIRED = frozenset({"weights.safetensors", "golden.npz", "card.md"})
MANIFEST, GOLDEN = "manifest.json", "golden.npz"
CURRENT, HISTORY = "current", "history"
# A manifest is read before its hash is known, so a huge one must not fill the memory.
MANIFEST_MAX_BYTES = 1_000_000
VERSION = re.compile(r"[0-9a-f]{8}")
# No separator and no leading dot: a name in a manifest from elsewhere must not leave its folder.
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


class ArtifactError(Exception):
    """A model cannot be used, found, published or promoted; the message says why."""


class Damaged(ArtifactError):
    """The files on disk are not those that were published."""


class NotFound(ArtifactError):
    """No such model or version; the message says which there are."""


def models_folder(named: Path | str | None = None) -> Path:
    """The folder of models: the one named, else RALF_MODELS_DIR, else the one beside the code."""
    return Path(named or os.environ.get("RALF_MODELS_DIR") or SHIPPED)


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
        """The hash of the weights, which a verdict reports."""
        return self.manifest.files["weights.safetensors"]

    def file(self, name: str) -> Path:
        """The path of one of this version's files."""
        if name not in self.manifest.files:
            have = ", ".join(sorted(self.manifest.files))
            raise NotFound(f"{self.label} has no file {name!r} (have: {have})")
        return self.path / name

    def read(self, name: str) -> bytes:
        """A file's bytes; the bytes returned are the bytes that were hashed."""
        data = read_regular(self.file(name))
        compare(self.path / name, hashlib.sha256(data).hexdigest(), self.manifest.files[name])
        return data

    def verify(self) -> None:
        """Hash every file again; Damaged if one differs."""
        # Also of links that the manifest does not name: a later reader of the folder might follow
        # one.
        refuse_links(self.path)
        for name, expected in self.manifest.files.items():
            path = self.path / name
            compare(path, digest_of(path), expected)


@dataclass(frozen=True)
class Golden:
    """Crops, and the FP32 reference's logits for them: an engine must give the same."""

    crops: NDArray[np.uint8]  # [n, 3, s, s]
    logits: NDArray[np.float32]  # [n]

    def __post_init__(self) -> None:
        n = len(self.logits)
        square = self.crops.ndim == 4 and self.crops.shape[2] == self.crops.shape[3]
        if not square or self.crops.shape[:2] != (n, 3) or self.crops.dtype != np.uint8:
            raise Damaged(
                f"golden crops should be u8 [{n},3,s,s], got {self.crops.dtype} {self.crops.shape}"
            )
        if n == 0 or self.logits.shape != (n,) or not np.isfinite(self.logits).all():
            raise Damaged(f"golden logits should be finite [n ≥ 1], got {self.logits.shape}")

    def to_bytes(self) -> bytes:
        """The bytes of golden.npz, the same for the same arrays."""
        buffer = io.BytesIO()
        # numpy writes a fixed date into the archive, so the same crops do not become another
        # version.
        np.savez_compressed(buffer, crops=self.crops, logits=self.logits)
        return buffer.getvalue()


def golden(artifact: Artifact) -> Golden:
    """The version's golden crops and logits; an array of another shape or type is refused."""
    try:
        with np.load(io.BytesIO(artifact.read(GOLDEN)), allow_pickle=False) as arrays:
            return Golden(arrays["crops"], arrays["logits"].astype(np.float32))
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise Damaged(f"{artifact.path / GOLDEN} does not read: {error}") from error


def open_artifact(path: Path | str) -> Artifact:
    """A version's folder, every hash checked."""
    path = Path(path)
    data = read_regular(path / MANIFEST, MANIFEST_MAX_BYTES)
    digest = hashlib.sha256(data).hexdigest()
    folder = path.resolve().name
    # Before it is parsed: nothing in a changed manifest is to be believed.
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
    """Names of the models that have at least one version."""
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
        # The manifest's time: names are hashes without an order, and engines/ changes the folder's
        # time.
        return (manifest.stat().st_mtime if manifest.is_file() else 0.0, path.name)

    return [p.name for p in sorted(found, key=published)]


def promoted(models_dir: Path | str, name: str) -> str | None:
    """The version that `current` names, or None."""
    return current(Path(models_dir) / name)


def current(folder: Path) -> str | None:
    """The same for a model's folder; Damaged where the file names no version."""
    try:
        text = (folder / CURRENT).read_text().strip()
    except FileNotFoundError:
        return None
    if not VERSION.fullmatch(text):
        raise Damaged(f"{folder / CURRENT} should hold a version, got {text[:40]!r}")
    return text


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
        # Under the lock no living writer has a hidden folder, so what is there is a dead one's.
        sweep(folder)
        # In the model's folder: a rename is atomic within one file system only.
        staging = Path(tempfile.mkdtemp(prefix=".new-", dir=folder))
        try:
            return _publish_from(staging, folder, draft, files)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what a killed writer left; the caller holds the lock on the model's folder."""
    for pattern in (".new-*", ".old-*"):
        for left in folder.glob(pattern):
            shutil.rmtree(left)
    for name in (CURRENT, HISTORY):
        for file in folder.glob(f".{name}.*"):
            file.unlink()


def _choose(root: Path, name: str, wanted: str, have: list[str]) -> str:
    if wanted:
        # A shorter prefix is soon shared by another version.
        matching = [v for v in have if v.startswith(wanted)] if len(wanted) >= 4 else []
        if len(matching) == 1:
            return matching[0]
        raise NotFound(f"no one version {wanted!r} of {name} in {root} (have: {', '.join(have)})")
    now = promoted(root, name)
    if now in have:
        return now
    state = f"its promoted version {now} is gone" if now else "none is promoted"
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
    # The names inside before the folder's own: after a power cut a visible version is whole.
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


# Reading never follows a link and never blocks on a pipe: a model's folder may come from anywhere.


def refuse_links(folder: Path) -> None:
    """Damaged if the folder holds a link."""
    for entry in sorted(folder.iterdir()):
        if entry.is_symlink():
            raise Damaged(f"{entry} is a link; a model holds only plain files")


def open_regular(path: Path) -> int:
    """A descriptor of a plain file; links, pipes and folders are refused without blocking."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise Damaged(f"{path} is missing") from None
    except OSError as error:
        raise Damaged(f"{path} cannot be read: {error.strerror}") from error
    # Asked of the descriptor: between a check of the path and the open, the file could be
    # exchanged.
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise Damaged(f"{path} is not a plain file")
    return descriptor


def read_regular(path: Path, most: int | None = None) -> bytes:
    """A plain file's bytes; Damaged if it has more than `most`."""
    with os.fdopen(open_regular(path), "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if most is not None and size > most:
            raise Damaged(f"{path} has {size} bytes, expected at most {most}")
        return stream.read()


def digest_of(path: Path) -> str:
    """SHA-256 of a plain file."""
    with os.fdopen(open_regular(path), "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def compare(path: Path, got: str, expected: str) -> None:
    """Damaged if the hashes differ."""
    if got != expected:
        size = path.stat().st_size
        raise Damaged(
            f"{path} ({size} bytes) hashes to {got[:12]}…, the manifest says {expected[:12]}…: "
            "truncated or changed after publishing"
        )
