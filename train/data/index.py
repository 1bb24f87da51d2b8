"""The index: one table of all data to train on, whatever layout it came from.

A row is a video, a folder of frames, or one picture, with its label: 1 is forged.  `target` is the
person whose face it shows and `source` the person whose face was put there.  Both carry the name
of their collection ("ffpp:071"), so that a person of FaceForensics++ has the same name in
DeeperForensics.  `group` joins rows that must be in the same split.

The table is a CSV file; the SHA-256 of its sorted rows names the data in every checkpoint.  `leaks`
finds each identity that is in two splits; training refuses such an index unless leaks are allowed.
"""

import csv
import hashlib
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from ralf.train.forge.landmarks import FaceGeometry

Kind = Literal["video", "frames", "image", "lmdb"]
Split = Literal["train", "val", "test", "check", ""]
SPLITS: tuple[Split, ...] = get_args(Split)
MESHES = "landmarks.npz"
REAL = "real"
"""The method of an authentic face."""


class IndexFault(ValueError):
    """The data is not what the layout or the table promises."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One video, folder of frames, or picture."""

    dataset: str
    method: str
    """How it was forged, or "real"."""
    compression: str = ""
    split: Split = ""
    video: str
    """Unique within dataset, method and compression."""
    target: str = ""
    source: str = ""
    label: int
    """1 is forged."""
    path: str
    """Relative to the index's root; for lmdb the database and the key, joined by '::'."""
    kind: Kind
    group: str = ""
    frame: int = -1
    """Number within the video; -1 for a whole one."""
    masks: str = ""
    """A mask video or folder beside it, where there is one."""
    box: tuple[float, ...] = ()
    """x0 y0 x1 y1 in the picture's pixels, where known."""
    five: tuple[float, ...] = ()
    """Ten numbers: eyes, nose, mouth corners, x before y."""
    mesh: str = ""
    """The name under which landmarks.npz beside the index's root holds 468 points; with another
    file's path and "::" before it, the name in there."""
    face_px: int = 0
    """Size of the face where it came from, in pixels; 0: not known."""
    bits_per_pixel: float = 0.0
    """How strongly the video that it came from is compressed; 0: not known."""
    marked: tuple[float, ...] = ()
    """Where a person saw the face in this frame of a video: left, top, right and bottom as
    fractions of the frame."""

    def __post_init__(self) -> None:
        if self.label not in (0, 1):
            raise IndexFault(f"{self.path}: label should be 0 (real) or 1 (forged), {self.label}")
        if self.split not in SPLITS:
            raise IndexFault(f"{self.path}: split should be one of {SPLITS}, got {self.split!r}")
        if len(self.box) not in (0, 4) or len(self.five) not in (0, 10):
            raise IndexFault(f"{self.path}: box has 4 numbers and five has 10, or none")
        if len(self.marked) not in (0, 4) or not all(0 <= edge <= 1 for edge in self.marked):
            raise IndexFault(f"{self.path}: marked has 4 fractions of the frame, or none")

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What identifies a video: its name alone does not."""
        return (self.dataset, self.method, self.compression, self.video)

    @property
    def person(self) -> str | tuple[str, str]:
        """Whose face it shows; the video, where the data names nobody.

        Compression and method are left out: one video encoded twice shows the same person.
        """
        return self.target or (self.dataset, self.video)

    @property
    def identities(self) -> frozenset[str]:
        """Everyone whose face is in it."""
        return frozenset({self.target, self.source} - {""})

    def geometry(self, mesh: np.ndarray | None = None) -> FaceGeometry | None:
        """Where the face is, if that is known."""
        if not self.box or not self.five:
            return None
        five = np.array(self.five, np.float32).reshape(5, 2)
        return FaceGeometry(np.array(self.box, np.float32), five, mesh)


@dataclass(frozen=True)
class Index:
    """Rows and the folder that their paths start from."""

    root: Path
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    """What the layout's reader could not know, or had to choose."""

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __add__(self, other: "Index") -> "Index":
        """Both tables; paths under the other root become absolute."""
        moved = tuple(other.anywhere(row) for row in other)
        return Index(self.root, self.rows + moved, self.notes + other.notes)

    def __repr__(self) -> str:
        forged = sum(row.label for row in self.rows)
        return f"Index({len(self) - forged} real, {forged} forged, {self.root})"

    def whole_path(self, row: Row) -> str:
        """The row's path with the root."""
        return row.path if Path(row.path).is_absolute() else str(self.root / row.path)

    def anywhere(self, row: Row) -> Row:
        """The row with absolute paths, for an index with another root."""
        mesh = row.mesh
        if mesh and "::" not in mesh:
            mesh = f"{(self.root / MESHES).absolute()}::{mesh}"
        path = row.path if Path(row.path).is_absolute() else str((self.root / row.path).absolute())
        return replace(row, path=path, mesh=mesh)

    def elsewhere(self, root: Path) -> "Index":
        """The same rows under another root, with absolute paths."""
        return Index(root, tuple(self.anywhere(row) for row in self), self.notes)

    def where(self, **wanted: object) -> "Index":
        """The rows whose fields have these values: where(split="val", label=0)."""
        kept = (
            row
            for row in self.rows
            if all(getattr(row, name) == value for name, value in wanted.items())
        )
        return Index(self.root, tuple(kept), self.notes)

    def without_forgeries(self, methods: Collection[str]) -> "Index":
        """The rows but for forgeries made in these ways."""
        kept = (row for row in self.rows if not row.label or row.method not in methods)
        return Index(self.root, tuple(kept), self.notes)

    def only(self, methods: Collection[str], compression: str | None) -> "Index":
        """Forgeries of these methods (() takes all), and what is compressed so or not known to be
        compressed otherwise (None takes all)."""
        kept = (
            row
            for row in self.rows
            if (not methods or not row.label or row.method in methods)
            and (compression is None or row.compression in ("", compression))
        )
        return Index(self.root, tuple(kept), self.notes)

    def matching(self, pairs: Iterable[str]) -> "Index":
        """The rows that FIELD=VALUE pairs ask for; an empty answer is refused.

        A field may have several values, separated by commas or in pairs of its own; a row has to
        match one of them for each field.
        """
        wanted = parse_fields(pairs)
        kept = tuple(
            row
            for row in self.rows
            if all(getattr(row, name) in values for name, values in wanted.items())
        )
        if kept or not wanted:
            return Index(self.root, kept, self.notes)
        have = "; ".join(
            f"{name}: {', '.join(sorted({str(getattr(row, name)) for row in self.rows})[:12])}"
            for name in wanted
        )
        asked = "; ".join(f"{name}={','.join(map(str, v))}" for name, v in wanted.items())
        raise IndexFault(f"no row is left of {len(self)} by --only {asked}; there are {have}")

    @property
    def sha256(self) -> str:
        """The same whatever the order of rows and the place of the root."""
        lines = sorted(repr(_hashed(row)) for row in self.rows)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def save(self, path: str | Path) -> Path:
        """A CSV file with a line for each row, written whole or not at all."""
        path = Path(path)
        names = [field.name for field in fields(Row)]
        partial = path.with_suffix(path.suffix + ".part")
        with partial.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(names)
            for row in self.rows:
                writer.writerow(_plain(getattr(row, name)) for name in names)
        return partial.rename(path)


NEW_COLUMNS = ("bits_per_pixel", "marked")


def _hashed(row: Row) -> tuple[object, ...]:
    """The values that the hash covers: a newer column only where it is filled, so that tables
    written before it keep their hash."""
    values = asdict(row)
    new = {name: values.pop(name) for name in NEW_COLUMNS}
    return (*values.values(), *((name, value) for name, value in new.items() if value))


def _plain(value: object) -> object:
    return " ".join(f"{number:g}" for number in value) if isinstance(value, tuple) else value


def parse_fields(pairs: Iterable[str]) -> dict[str, set[object]]:
    """FIELD=VALUE[,VALUE…] pairs as the values of each field, typed as the field is."""
    whole = {field.name for field in fields(Row) if field.type in (int, "int")}
    known = {field.name for field in fields(Row)}
    wanted: dict[str, set[object]] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or name not in known:
            raise ValueError(f"--only takes FIELD=VALUE with a field of {sorted(known)}: {pair!r}")
        values = text.split(",")
        wanted.setdefault(name, set()).update(map(int, values) if name in whole else values)
    return wanted


def load(path: str | Path, root: str | Path | None = None) -> Index:
    """A saved index; its paths start from its own folder unless a root is given."""
    path = Path(path)
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        wanted = {field.name for field in fields(Row)}
        required = {"path", "label", "video", "split", "dataset", "method", "kind"}
        if missing := required - set(reader.fieldnames or ()):
            raise IndexFault(f"{path.name} is not an index: it has no column {sorted(missing)}")
        rows = tuple(
            _row({name: text for name, text in line.items() if name in wanted}) for line in reader
        )
    return Index(Path(root) if root else path.parent, rows)


def _row(text: dict[str, str]) -> Row:
    typed: dict[str, object] = dict(text)
    for name in ("label", "frame", "face_px"):
        if name in text:
            typed[name] = int(text[name])
    typed["bits_per_pixel"] = float(text.get("bits_per_pixel") or 0)
    for name in ("box", "five", "marked"):
        typed[name] = tuple(float(part) for part in text.get(name, "").split())
    return Row(**typed)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Leak:
    """A person, a video or a group that is in two splits."""

    what: Literal["identity", "video", "group"]
    name: str
    splits: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.what} {self.name} is in {' and '.join(self.splits)}"


def leaks(rows: Iterable[Row]) -> list[Leak]:
    """Each identity, group and source video that is in more than one split."""
    seen: dict[tuple[str, str], set[str]] = defaultdict(set)
    for row in rows:
        if not row.split:
            continue
        for identity in row.identities:
            seen["identity", identity].add(row.split)
        if row.group:
            seen["group", row.group].add(row.split)
        # Compressions of one video are one video.
        seen["video", f"{row.dataset}/{row.method}/{row.video}"].add(row.split)
    found = (
        Leak(what, name, tuple(sorted(splits)))  # type: ignore[arg-type]
        for (what, name), splits in seen.items()
        if len(splits) > 1
    )
    return sorted(found, key=lambda leak: (leak.what, leak.name))


def split_by_identity(index: Index, *, val: float = 0.1, test: float = 0.1) -> Index:
    """New splits, drawn by a hash of the name; each identity and group is in one split only."""
    parent: dict[str, str] = {}

    def top(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = name = parent[parent[name]]
        return name

    names = [_bonds(row) for row in index]
    for bond in names:
        for other in bond[1:]:
            # The smaller name becomes the root, so that the order of rows does not change the draw.
            first, second = sorted((top(bond[0]), top(other)))
            parent[second] = first
    rows = [
        replace(row, split=_draw(top(bond[0]), val, test))
        for row, bond in zip(index, names, strict=True)
    ]
    notes = [*index.notes, "splits drawn by identity"]
    # Few people leave a split empty by chance, and training would fail only hours later.
    for split, share in (("train", 1 - val - test), ("val", val), ("test", test)):
        if share > 0 and not any(row.split == split for row in rows):
            notes.append(f"split {split!r} is empty: with few people, ask for a larger share")
    return Index(index.root, tuple(rows), tuple(notes))


def _bonds(row: Row) -> list[str]:
    """The names that a row shares with others: they must be in the same split."""
    named = sorted(row.identities) + ([f"group {row.group}"] if row.group else [])
    return named or [f"video {row.dataset}/{row.video}"]


def _draw(name: str, val: float, test: float) -> Split:
    # By a hash and not by chance: one more video moves no other to another split.
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    return "test" if place < test else "val" if place < test + val else "train"
