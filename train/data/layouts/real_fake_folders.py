"""Folders named real/ and fake/ with anything in them: videos, pictures, folders of pictures.

train/, val/ and test/ may stand above them.
"""

from collections.abc import Iterator
from pathlib import Path

from ralf.train.data.index import REAL, Index, Kind, Row, Split
from ralf.train.data.layouts.layout import PICTURES, SPLIT_NAMES, VIDEOS, Layout, relative

REAL_NAMES, FAKE_NAMES = ("real", "original", "0_real"), ("fake", "forged", "1_fake")


def recognises(root: Path) -> bool:
    """real/ and fake/ here, or below a split."""
    tops = [root, *(root / split for split in SPLIT_NAMES)]
    return any(_named(top, REAL_NAMES) or _named(top, FAKE_NAMES) for top in tops)


def _named(top: Path, names: tuple[str, ...]) -> Path | None:
    return next((top / name for name in names if (top / name).is_dir()), None)


def real_fake_folders(root: Path) -> Index:
    """Whatever lies in real/ and fake/; a forgery named A_B belongs to the real named A."""
    rows: list[Row] = []
    splits: list[tuple[Path, Split]] = [(root, "")]
    splits += [(root / split, split) for split in SPLIT_NAMES if (root / split).is_dir()]
    for top, split in splits:
        reals: set[str] = set()
        # Reals first: the names of forgeries are then compared with theirs.
        for names, label in ((REAL_NAMES, 0), (FAKE_NAMES, 1)):
            folder = _named(top, names)
            if folder is None:
                continue
            found = list(_rows(root, folder, split, label, reals))
            reals |= {row.video for row in found} if not label else set()
            rows += found
    notes = () if any(row.split for row in rows) else ("no split folders: no splits",)
    return Index(root, tuple(rows), notes)


def _rows(root: Path, folder: Path, split: Split, label: int, reals: set[str]) -> Iterator[Row]:
    for path in sorted(folder.rglob("*")):
        kind = _kind(path, folder)
        if kind is None:
            continue
        inside = path.relative_to(folder)
        method = inside.parts[0] if label and len(inside.parts) > 1 else "fake"
        video = path.stem if path.is_file() else path.name
        target, _, source = video.partition("_")
        # An underscore alone is no sign of a pair: any file may be named so.
        known = label == 1 and target in reals
        yield Row(
            dataset=root.name,
            method=method if label else REAL,
            split=split,
            video="/".join((*inside.parts[:-1], video)),
            target=f"{root.name}:{target if known else video}",
            source=f"{root.name}:{source}" if known and source else "",
            label=label,
            path=relative(path, root),
            kind=kind,
        )


def _kind(path: Path, folder: Path) -> Kind | None:
    """What a path below real/ or fake/ is; pictures in a folder of their own are its frames."""
    if path.is_dir():
        return "frames" if _holds_pictures(path) else None
    if path.suffix.lower() in VIDEOS:
        return "video"
    if path.suffix.lower() in PICTURES and path.parent == folder:
        return "image"
    return None


def _holds_pictures(folder: Path) -> bool:
    return any(path.suffix.lower() in PICTURES for path in folder.iterdir() if path.is_file())


LAYOUT = Layout(
    name="real and fake folders",
    sign="real/ and fake/, or train/, val/, test/ that hold them",
    recognises=recognises,
    read=real_fake_folders,
    fallback=True,
)
