"""Public datasets of videos: FaceForensics++, DFD, DeeperForensics, Celeb-DF (DFDC is beside it).

Identities are named with the collection that they come from, so that a person is the same person
in every dataset made from it: DeeperForensics' targets are "ffpp:…" too.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from ralf.train.data.index import REAL, Index, IndexFault, Row, Split

VIDEOS = {".mp4", ".avi", ".mov", ".mkv", ".webm"}
NO_REALS = (
    "no real videos: link FaceForensics++'s original_sequences/youtube/c23 in here "
    "(source_videos/ are actors before a plain wall, not the real class)"
)
SPLIT_NAMES: tuple[Split, ...] = ("train", "val", "test")


def videos(folder: Path) -> list[Path]:
    """Video files in a folder, or in its videos/ where that is how it was unpacked."""
    inside = folder / "videos" if (folder / "videos").is_dir() else folder
    return sorted(path for path in inside.glob("*") if path.suffix.lower() in VIDEOS)


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


# FaceForensics++ and the DeepFakeDetection set that is distributed inside it


def faceforensics(root: Path) -> Index:
    """Every manipulation and compression that is there; splits from either place for the lists."""
    splits, notes = _ff_splits(root)
    rows: list[Row] = []
    for kind in ("original_sequences", "manipulated_sequences"):
        for level in sorted((root / kind).glob("*/*/videos")):
            method, compression = level.parts[-3], level.parts[-2]
            if compression == "masks" or method == "masks":
                continue
            compression = "raw" if compression == "c0" else compression
            for path in videos(level):
                make = _dfd_row if method in ("actors", "DeepFakeDetection") else _ff_row
                rows.append(make(root, path, method, compression, splits))
    return Index(root, tuple(rows), notes)


def _ff_splits(root: Path) -> tuple[dict[str, Split], tuple[str, ...]]:
    """Video number → split, from splits/, dataset/splits/ or the folder itself."""
    found: dict[str, Split] = {}
    for folder in (root / "splits", root / "dataset" / "splits", root):
        if not (folder / "train.json").exists():
            continue
        for split in SPLIT_NAMES:
            if not (folder / f"{split}.json").exists():
                raise IndexFault(f"{folder} has train.json but no {split}.json")
            for pair in json.loads((folder / f"{split}.json").read_text()):
                found.update(dict.fromkeys((f"{int(number):03d}" for number in pair), split))
        return found, ()
    note = "no train.json, val.json, test.json in splits/, dataset/splits/ or here: no splits"
    return {}, (note,)


def _ff_row(root: Path, path: Path, method: str, compression: str, splits: dict[str, Split]) -> Row:
    target, _, source = path.stem.partition("_")
    mask = root / "manipulated_sequences" / method / "masks" / "videos" / path.name
    forged = bool(source)
    return Row(
        dataset="ffpp",
        method=method if forged else REAL,
        compression=compression,
        split=splits.get(target, ""),
        video=path.stem,
        target=f"ffpp:{target}",
        source=f"ffpp:{source}" if forged else "",
        label=int(forged),
        path=_relative(path, root),
        kind="video",
        masks=_relative(mask, root) if forged and mask.exists() else "",
    )


def _dfd_row(
    root: Path, path: Path, method: str, compression: str, _splits: dict[str, Split]
) -> Row:
    """DFD has no official split; all of it is a test set."""
    people = path.stem.split("__")[0].split("_")
    forged = method != "actors"
    mask = root / "manipulated_sequences" / method / "masks" / "videos" / path.name
    return Row(
        dataset="dfd",
        method=method if forged else REAL,
        compression=compression,
        split="test",
        video=path.stem,
        target=f"dfd:{people[0]}",
        source=f"dfd:{people[1]}" if forged and len(people) > 1 else "",
        label=int(forged),
        path=_relative(path, root),
        kind="video",
        masks=_relative(mask, root) if forged and mask.exists() else "",
    )


# DeeperForensics-1.0: its reals are FaceForensics++'s target videos, not its own source videos


def deeperforensics(root: Path) -> Index:
    """All variants; reals from original_sequences/ here or in a folder beside it."""
    splits = _deeper_splits(root)
    rows = [
        _deeper_row(root, path, variant.name, splits)
        for variant in sorted((root / "manipulated_videos").iterdir())
        if variant.is_dir()
        for path in videos(variant)
    ]
    by_target = {row.target: row.split for row in rows if row.split}
    reals = list(_deeper_reals(root, by_target))
    notes: tuple[str, ...] = () if splits else ("no lists/splits/: no splits",)
    if not reals:
        notes += (NO_REALS,)
    return Index(root, (*reals, *rows), notes)


def _deeper_splits(root: Path) -> dict[str, Split]:
    found: dict[str, Split] = {}
    for split in SPLIT_NAMES:
        listed = root / "lists" / "splits" / f"{split}.txt"
        if listed.exists():
            names = (line.split()[0] for line in listed.read_text().splitlines() if line.strip())
            found.update((Path(name).stem, split) for name in names)
    return found


def _deeper_row(root: Path, path: Path, variant: str, splits: dict[str, Split]) -> Row:
    target, _, actor = path.stem.partition("_")
    return Row(
        dataset="deeperforensics",
        method=variant,
        compression="",
        split=splits.get(path.stem, ""),
        video=path.stem,
        target=f"ffpp:{target}",
        source=f"deeper:{actor}",
        label=1,
        path=_relative(path, root),
        kind="video",
    )


def _deeper_reals(root: Path, by_target: Mapping[str, Split]) -> Iterator[Row]:
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
                path=_relative(path, root) if place == root else str(path.resolve()),
                kind="video",
            )
        return


# Celeb-DF


def celeb_df(root: Path) -> Index:
    """v1, v2 and ++; train is everything but the test list, which shares its people with it."""
    tested, version, notes = _celeb_tests(root)
    rows: list[Row] = []
    folders = [
        folder
        for folder in sorted(root.iterdir())
        if folder.name.lower() in ("celeb-real", "youtube-real", "celeb-synthesis")
    ]
    for folder in folders:
        forged = folder.name == "Celeb-synthesis"
        inner = folder / "videos" if (folder / "videos").is_dir() else folder
        for path in sorted(p for p in inner.rglob("*") if p.suffix.lower() in VIDEOS):
            listed = tested.get(f"{folder.name}/{path.name}".lower())
            if listed is not None and listed != forged:
                raise IndexFault(
                    f"{folder.name}/{path.name} is called {'forged' if listed else 'real'} by "
                    "List_of_testing_videos.txt, where 1 means real: the list and folders disagree"
                )
            method = path.parent.name if path.parent != inner else "Celeb-synthesis"
            split: Split = "train" if listed is None else "test"
            method = method if forged else REAL
            rows.append(_celeb_row(root, path, version, method, split))
    return Index(root, tuple(rows), notes)


def _celeb_tests(root: Path) -> tuple[dict[str, bool], str, tuple[str, ...]]:
    """folder/name, lower case → forged; the version that the length of the list tells."""
    listed = root / "List_of_testing_videos.txt"
    if not listed.exists():
        return {}, "celeb_df", ("no List_of_testing_videos.txt: everything is called train",)
    found = {}
    for line in listed.read_text().splitlines():
        if line.strip():
            real, name = line.split(maxsplit=1)
            folder, _, rest = name.strip().partition("/")
            found[f"{folder}/{Path(rest).name}".lower()] = real == "0"
    plus = any((root / "Celeb-synthesis" / kind).is_dir() for kind in ("FaceSwap", "FaceReenact"))
    version = "celeb_df_pp" if plus else {518: "celeb_df_v2", 100: "celeb_df_v1"}.get(len(found))
    note = "Celeb-DF has no identity-disjoint training split: `data check` will list its leaks"
    return found, version or "celeb_df", (note,)


def _celeb_row(root: Path, path: Path, dataset: str, method: str, split: Split) -> Row:
    forged = method != REAL
    people = re.findall(r"id\d+", path.stem)
    target = people[0] if people else f"youtube{path.stem}"
    return Row(
        dataset=dataset,
        method=method,
        split=split,
        video=path.stem if people else f"youtube-{path.stem}",
        target=f"celeb:{target}",
        source=f"celeb:{people[1]}" if forged and len(people) > 1 else "",
        label=int(forged),
        path=_relative(path, root),
        kind="video",
    )
