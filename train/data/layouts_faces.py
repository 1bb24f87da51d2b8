"""Data that is already pictures, or labels of our own: frame folders, tables, reviews.

real_train/N/…/*.png       WildDeepfake: a folder of cropped frames is a video
real/ fake/                anything: videos, pictures, folders of pictures; or split first
faces.csv, faces/          one picture a row, with box and five points
*.json                     reviewers' labels saved from our pages, beside the media they name
"""

import csv
import hashlib
from collections.abc import Iterator
from pathlib import Path

from ralf.train.data.index import MESHES, REAL, Index, IndexFault, Row, Split
from ralf.train.data.layouts_video import SPLIT_NAMES, VIDEOS

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
FIVE_COLUMNS = [
    f"{point}_{axis}" for point in ("eye_l", "eye_r", "nose", "mouth_l", "mouth_r") for axis in "xy"
]
BOX_COLUMNS = ["box_x0", "box_y0", "box_x1", "box_y1"]
REAL_NAMES, FAKE_NAMES = ("real", "original", "0_real"), ("fake", "forged", "1_fake")


def frame_folders(folder: Path) -> list[Path]:
    """Folders, at any depth, that hold pictures themselves."""
    within = [folder, *sorted(path for path in folder.rglob("*") if path.is_dir())]
    return [
        path for path in within if any(each.suffix.lower() in PICTURES for each in path.iterdir())
    ]


def wild_deepfake(root: Path) -> Index:
    """Folder is split; each folder of pictures is one sequence."""
    rows = []
    for name, split in (("train", "train"), ("test", "test")):
        for word, label in (("real", 0), ("fake", 1)):
            top = root / f"{word}_{name}"
            if not top.is_dir():
                continue
            for folder in frame_folders(top):
                inside = folder.relative_to(top).as_posix()
                rows.append(
                    Row(
                        dataset="wild_deepfake",
                        method="wild" if label else REAL,
                        split=split,  # type: ignore[arg-type]
                        video=f"{name}/{inside}",
                        label=label,
                        path=folder.relative_to(root).as_posix(),
                        kind="frames",
                        group=f"wild:{word}_{name}/{inside.split('/')[0]}",
                    )
                )
    return Index(root, tuple(rows), ("no val split: `data index --split` draws one by group",))


def looks_plain(root: Path) -> bool:
    """real/ and fake/ here, or below a split."""
    tops = [root, *(root / split for split in SPLIT_NAMES)]
    return any(_named(top, REAL_NAMES) or _named(top, FAKE_NAMES) for top in tops)


def _named(top: Path, names: tuple[str, ...]) -> Path | None:
    return next((top / name for name in names if (top / name).is_dir()), None)


def plain(root: Path) -> Index:
    """Whatever lies in real/ and fake/; a forgery named A_B belongs to the real named A."""
    rows: list[Row] = []
    splits: list[tuple[Path, Split]] = [(root, "")]
    splits += [(root / split, split) for split in SPLIT_NAMES if (root / split).is_dir()]
    for top, split in splits:
        reals: set[str] = set()
        for names, label in ((REAL_NAMES, 0), (FAKE_NAMES, 1)):
            folder = _named(top, names)
            if folder is None:
                continue
            found = list(_plain_rows(root, folder, split, label, reals))
            reals |= {row.video for row in found} if not label else set()
            rows += found
    notes = () if any(row.split for row in rows) else ("no split folders: no splits",)
    return Index(root, tuple(rows), notes)


def _plain_rows(
    root: Path, folder: Path, split: Split, label: int, reals: set[str]
) -> Iterator[Row]:
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            kind = "frames" if _holds_pictures(path) else None
        else:
            alone = path.parent == folder or not _holds_pictures(path.parent)
            kind = "video" if path.suffix.lower() in VIDEOS else None
            kind = "image" if path.suffix.lower() in PICTURES and alone else kind
        if kind is None:
            continue
        inside = path.relative_to(folder)
        method = inside.parts[0] if label and len(inside.parts) > 1 else "fake"
        video = path.stem if path.is_file() else path.name
        target, _, source = video.partition("_")
        known = label == 1 and target in reals
        yield Row(
            dataset=root.name,
            method=method if label else REAL,
            split=split,
            video="/".join((*inside.parts[:-1], video)),
            target=f"{root.name}:{target if known else video}",
            source=f"{root.name}:{source}" if known and source else "",
            label=label,
            path=path.relative_to(root).as_posix(),
            kind=kind,  # type: ignore[arg-type]
        )


def _holds_pictures(folder: Path) -> bool:
    return any(path.suffix.lower() in PICTURES for path in folder.iterdir() if path.is_file())


def faces_csv(root: Path) -> Index:
    """file, identity and split; box, points, source and label where the table has them."""
    meshes = set()
    if (root / MESHES).exists():
        import numpy as np

        with np.load(root / MESHES) as packed:
            meshes = set(packed["files"].tolist())
    with (root / "faces.csv").open(newline="") as file:
        reader = csv.DictReader(file)
        if missing := {"file", "identity", "split"} - set(reader.fieldnames or ()):
            raise IndexFault(f"faces.csv has no column {sorted(missing)}")
        rows = tuple(_face_row(root, line, line["file"] in meshes) for line in reader)
    return Index(root, rows)


def _face_row(root: Path, line: dict[str, str], mesh: bool) -> Row:
    label = int(line.get("label") or 0)
    below = "faces/" if (root / "faces").is_dir() else ""
    return Row(
        dataset=line.get("source") or root.name,
        method=(line.get("method") or "fake") if label else REAL,
        split=line["split"],  # type: ignore[arg-type]
        video=line.get("video") or Path(line["file"]).stem,
        target=line["identity"],
        label=label,
        path=below + line["file"],
        kind="image",
        box=tuple(float(line[name]) for name in BOX_COLUMNS) if line.get("box_x0") else (),
        five=tuple(float(line[name]) for name in FIVE_COLUMNS) if line.get("eye_l_x") else (),
        mesh=line["file"] if mesh else "",
        face_px=int(float(line.get("face_px") or 0)),
    )


def looks_reviewed(root: Path) -> bool:
    """A JSON file that our page saved."""
    return any(_is_review(path) for path in sorted(root.glob("*.json"))[:20])


def _is_review(path: Path) -> bool:
    with path.open("rb") as file:
        return b"ralf.review/1" in file.read(4096)


def reviews(root: Path) -> Index:
    """Tracks that a person called real or forged, in media found beside the labels by their hash.

    A row is one face: `frame` and `box`, as fractions of the picture.  Unsure tracks, wrong faces
    and poor pictures are left out and counted; of several reviews of a file the last one counts.
    """
    from ralf.worker.contract import Review

    held = {path: Review.model_validate_json(path.read_text()) for path in _review_files(root)}
    media = _by_hash(root)
    rows: list[Row] = []
    missing, passed = set(), 0
    latest = {one.media_sha256: one for one in sorted(held.values(), key=lambda r: r.reviewed_at)}
    for sha256, review in latest.items():
        path = media.get(sha256)
        if path is None:
            missing.add(sha256[:12])
            continue
        for track in review.tracks:
            if track.label == "unsure" or track.wrong_face or track.poor_quality:
                passed += 1
                continue
            forged = track.label == "forged"
            rows += [
                Row(
                    dataset="reviews",
                    method="reviewed" if forged else REAL,
                    video=f"{sha256[:16]}/{track.track_id}",
                    target=f"review:{sha256[:16]}/{track.track_id}",
                    label=int(forged),
                    path=path.relative_to(root).as_posix(),
                    kind="video",
                    group=f"review:{sha256[:16]}",
                    frame=face.frame,
                    box=(face.box.left, face.box.top, face.box.right, face.box.bottom),
                )
                for face in track.faces
            ]
    notes: tuple[str, ...] = ()
    if passed:
        notes += (f"{passed} tracks left out: unsure, wrong face or poor quality",)
    if missing:
        notes += (f"no media for {len(missing)} reviews: {', '.join(sorted(missing)[:5])}",)
    return Index(root, tuple(rows), notes)


def _review_files(root: Path) -> list[Path]:
    return [path for path in sorted(root.glob("*.json")) if _is_review(path)]


def _by_hash(root: Path) -> dict[str, Path]:
    found = {}
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() in VIDEOS:
            with path.open("rb") as file:
                found[hashlib.file_digest(file, "sha256").hexdigest()] = path
    return found
