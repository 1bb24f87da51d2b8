"""DeeperForensics-1.0.  Its reals are FaceForensics++'s target videos, not its own sources."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from ralf.train.data.index import REAL, Index, Row, Split
from ralf.train.data.layouts.layout import SPLIT_NAMES, Layout, holds, relative, videos

NO_REALS = (
    "no real videos: link FaceForensics++'s original_sequences/youtube/c23 in here "
    "(source_videos/ are actors before a plain wall, not the real class)"
)


def deeperforensics(root: Path) -> Index:
    """All variants; reals from original_sequences/ here or in a folder beside it."""
    splits = _splits(root)
    rows = [
        _row(root, path, variant.name, splits)
        for variant in sorted((root / "manipulated_videos").iterdir())
        if variant.is_dir()
        for path in videos(variant)
    ]
    # The lists name forgeries alone; a real takes the split of the forgeries made of it.
    by_target = {row.target: row.split for row in rows if row.split}
    reals = list(_real_rows(root, by_target))
    notes: tuple[str, ...] = () if splits else ("no lists/splits/: no splits",)
    if not reals:
        notes += (NO_REALS,)
    return Index(root, (*reals, *rows), notes)


def _splits(root: Path) -> dict[str, Split]:
    found: dict[str, Split] = {}
    for split in SPLIT_NAMES:
        listed = root / "lists" / "splits" / f"{split}.txt"
        if listed.exists():
            names = (line.split()[0] for line in listed.read_text().splitlines() if line.strip())
            found.update((Path(name).stem, split) for name in names)
    return found


def _row(root: Path, path: Path, variant: str, splits: dict[str, Split]) -> Row:
    target, _, actor = path.stem.partition("_")
    return Row(
        dataset="deeperforensics",
        method=variant,
        compression="",
        split=splits.get(path.stem, ""),
        video=path.stem,
        # Named with FaceForensics++'s collection: leaks between the two are then found.
        target=f"ffpp:{target}",
        source=f"deeper:{actor}",
        label=1,
        path=relative(path, root),
        kind="video",
    )


def _real_rows(root: Path, by_target: Mapping[str, Split]) -> Iterator[Row]:
    # FaceForensics++ may lie beside it, under any name.
    for place in (root, *sorted(other for other in root.parent.iterdir() if other.is_dir())):
        folder = place / "original_sequences" / "youtube" / "c23"
        if not folder.is_dir():
            continue
        for path in videos(folder):
            target = f"ffpp:{path.stem}"
            yield Row(
                dataset="deeperforensics",
                method=REAL,
                split=by_target.get(target, ""),
                video=path.stem,
                target=target,
                label=0,
                # What lies outside the root has no path below it.
                path=relative(path, root) if place == root else str(path.resolve()),
                kind="video",
            )
        # One copy of FaceForensics++ is enough: a second would give every real twice.
        return


LAYOUT = Layout(
    name="DeeperForensics-1.0",
    sign="manipulated_videos/ with lists/splits/",
    recognises=holds("manipulated_videos"),
    read=deeperforensics,
    licences={"deeperforensics": "DeeperForensics terms of use: research, not commercial"},
)
