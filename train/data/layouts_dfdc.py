"""The Deepfake Detection Challenge: the full set in its parts, its test set, and the preview.

Forgeries are grouped with the original that they were made from: parts were cut by it, and nothing
else ties a face to its person.
"""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ralf.train.data.index import REAL, Index, Row, Split


def dfdc(root: Path) -> Index:
    """Every part that is there, grouped by the original; labels.csv is the test set."""
    rows: list[Row] = []
    parts = [root, *sorted(path for path in root.iterdir() if path.is_dir())]
    for part in parts:
        if (part / "metadata.json").exists():
            listed = json.loads((part / "metadata.json").read_text())
            rows += [_dfdc_row(root, part, name, facts) for name, facts in listed.items()]
        elif (part / "labels.csv").exists():
            rows += _dfdc_tests(root, part)
    notes = ("forged sound alone is labelled FAKE too; nothing in the lists tells which",)
    return Index(root, tuple(rows), notes)


def _dfdc_row(root: Path, part: Path, name: str, facts: dict[str, Any]) -> Row:
    forged = facts["label"].upper() == "FAKE"
    original = facts.get("original") or name
    named = {"train": "train", "validation": "val", "val": "val", "test": "test"}
    return Row(
        dataset="dfdc",
        method="dfdc" if forged else REAL,
        split=named.get(str(facts.get("split", "")), ""),  # type: ignore[arg-type]
        video=Path(name).stem,
        target=f"dfdc:{Path(original).stem}",
        label=int(forged),
        path=(part / name).relative_to(root).as_posix(),
        kind="video",
        group=f"dfdc:{Path(original).stem}",
    )


def _dfdc_tests(root: Path, part: Path) -> Iterator[Row]:
    folder = next((part / name for name in ("videos", "test") if (part / name).is_dir()), part)
    with (part / "labels.csv").open(newline="") as file:
        for line in csv.DictReader(file):
            forged = int(line["label"])
            yield Row(
                dataset="dfdc",
                method="dfdc" if forged else REAL,
                split="test",
                video=Path(line["filename"]).stem,
                target="",
                label=forged,
                path=(folder / line["filename"]).relative_to(root).as_posix(),
                kind="video",
            )


def dfdc_preview(root: Path) -> Index:
    """dataset.json: path → label and set; people by the numbers in the file names."""
    rows = []
    for path, facts in json.loads((root / "dataset.json").read_text()).items():
        forged = facts["label"].lower() == "fake"
        target = str(facts.get("target_id") or Path(path).stem.split("_")[0])
        source = str(facts.get("swapped_id") or "")
        split: Split = "test" if facts["set"] == "test" else "train"
        original = str(facts.get("original") or ("" if forged else path))
        rows.append(
            Row(
                dataset="dfdc_preview",
                method=Path(path).parts[0] if forged else REAL,
                split=split,
                video=Path(path).stem,
                target=f"dfdcp:{target}",
                source=f"dfdcp:{source}" if forged and source else "",
                label=int(forged),
                path=path,
                kind="video",
                group=f"dfdcp:{Path(original).stem}" if original else "",
            )
        )
    return Index(root, tuple(rows))
