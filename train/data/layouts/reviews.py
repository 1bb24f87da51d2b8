"""Reviewers' labels: JSON files that our verdict page saved, beside the media that they name."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from ralf.train.data.index import REAL, Index, Row
from ralf.train.data.layouts.layout import VIDEOS, Layout, relative
from ralf.worker.contract import Review, TrackReview


def recognises(root: Path) -> bool:
    """A JSON file that our page saved, among the first twenty: a folder may hold thousands."""
    return any(_is_review(path) for path in sorted(root.glob("*.json"))[:20])


def _is_review(path: Path) -> bool:
    with path.open("rb") as file:
        return b"ralf.review/1" in file.read(4096)


def reviews(root: Path) -> Index:
    """Tracks that a person called real or forged, in media found beside the labels by their hash.

    A row is one face: `frame`, and where it was marked.  Tracks that are unsure,
    show the wrong face or are of poor quality are left out and counted.  If a file has several
    reviews, the last one counts.
    """
    files = [path for path in sorted(root.glob("*.json")) if _is_review(path)]
    found = [Review.model_validate_json(path.read_text()) for path in files]
    # Sorted by time, so that the last review of a file replaces the earlier ones.
    latest = {one.media_sha256: one for one in sorted(found, key=lambda one: one.reviewed_at)}
    media = _videos_by_hash(root)
    rows: list[Row] = []
    missing, left_out = set(), 0
    for sha256, review in latest.items():
        if sha256 not in media:
            missing.add(sha256[:12])
            continue
        usable = [
            track
            for track in review.tracks
            if not (track.label == "unsure" or track.wrong_face or track.poor_quality)
        ]
        left_out += len(review.tracks) - len(usable)
        for track in usable:
            rows += _rows(sha256[:16], track, relative(media[sha256], root))
    notes: tuple[str, ...] = ()
    if left_out:
        notes += (f"{left_out} tracks left out: unsure, wrong face or poor quality",)
    if missing:
        notes += (f"no media for {len(missing)} reviews: {', '.join(sorted(missing)[:5])}",)
    return Index(root, tuple(rows), notes)


def _rows(media: str, track: TrackReview, path: str) -> Iterator[Row]:
    forged = track.label == "forged"
    for face in track.faces:
        yield Row(
            dataset="reviews",
            method="reviewed" if forged else REAL,
            video=f"{media}/{track.track_id}",
            target=f"review:{media}/{track.track_id}",
            label=int(forged),
            path=path,
            kind="video",
            # All tracks of a file go into one split: they share its scene and its compression.
            group=f"review:{media}",
            frame=face.frame,
            marked=(face.box.left, face.box.top, face.box.right, face.box.bottom),
        )


def _videos_by_hash(root: Path) -> dict[str, Path]:
    found = {}
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() in VIDEOS:
            with path.open("rb") as file:
                # By content, so that a file may have any name.
                found[hashlib.file_digest(file, "sha256").hexdigest()] = path
    return found


LAYOUT = Layout(
    name="reviewers' labels",
    sign='JSON files with "schema": "ralf.review/1"',
    recognises=recognises,
    read=reviews,
    licences={"reviews": "your own uploads: your users' terms"},
)
