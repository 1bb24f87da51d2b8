"""The Deepfake Detection Challenge: the full set in its parts, and its test set.

Forgeries are grouped with the original that they were made from.  The parts were cut by original,
and nothing else in the lists ties a face to its person.
"""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ralf.train.data.index import REAL, Index, Row, Split
from ralf.train.data.layouts import dfdc_preview
from ralf.train.data.layouts.layout import Layout

SPLITS: dict[str, Split] = {"train": "train", "validation": "val", "val": "val", "test": "test"}
LISTS = ("metadata.json", "*/metadata.json", "labels.csv", "*/labels.csv")


def recognises(root: Path) -> bool:
    """Any of the lists, in the folder or in one of its parts; the preview has lists of its own."""
    listed = any(next(root.glob(pattern), None) for pattern in LISTS)
    return listed and not dfdc_preview.recognises(root)


def dfdc(root: Path) -> Index:
    """Every part that is there, grouped by the original; labels.csv is the test set."""
    rows: list[Row] = []
    parts = [root, *sorted(path for path in root.iterdir() if path.is_dir())]
    for part in parts:
        if (part / "metadata.json").exists():
            listed = json.loads((part / "metadata.json").read_text())
            rows += [_row(root, part, name, facts) for name, facts in listed.items()]
        elif (part / "labels.csv").exists():
            rows += _test_rows(root, part)
    notes = ("forged sound alone is labelled FAKE too; nothing in the lists shows which",)
    return Index(root, tuple(rows), notes)


def _row(root: Path, part: Path, name: str, facts: dict[str, Any]) -> Row:
    forged = facts["label"].upper() == "FAKE"
    original = facts.get("original") or name
    return Row(
        dataset="dfdc",
        method="dfdc" if forged else REAL,
        split=SPLITS.get(str(facts.get("split", "")), ""),
        video=Path(name).stem,
        target=f"dfdc:{Path(original).stem}",
        label=int(forged),
        path=(part / name).relative_to(root).as_posix(),
        kind="video",
        group=f"dfdc:{Path(original).stem}",
    )


def _test_rows(root: Path, part: Path) -> Iterator[Row]:
    folder = next((part / name for name in ("videos", "test") if (part / name).is_dir()), part)
    with (part / "labels.csv").open(newline="") as file:
        for line in csv.DictReader(file):
            forged = int(line["label"])
            yield Row(
                dataset="dfdc",
                method="dfdc" if forged else REAL,
                split="test",
                video=Path(line["filename"]).stem,
                # The test list names no originals: there is nothing to group its videos by.
                target="",
                label=forged,
                path=(folder / line["filename"]).relative_to(root).as_posix(),
                kind="video",
            )


LAYOUT = Layout(
    name="DFDC",
    sign="metadata.json, dfdc_train_part_*/metadata.json, or labels.csv",
    recognises=recognises,
    read=dfdc,
    licences={"dfdc": "DFDC licence: see its own terms"},
)
