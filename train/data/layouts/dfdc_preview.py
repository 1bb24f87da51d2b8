"""The preview of the Deepfake Detection Challenge: dataset.json beside folders by method."""

import json
from pathlib import Path

from ralf.train.data.index import REAL, Index, Row, Split
from ralf.train.data.layouts.layout import Layout, Published


def recognises(root: Path) -> bool:
    """dataset.json alone would fit other datasets too."""
    folders = ("original_videos", "method_A")
    return (root / "dataset.json").exists() and any((root / name).exists() for name in folders)


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


LAYOUT = Layout(
    name="DFDC preview",
    sign="dataset.json beside original_videos/ or method_A/",
    recognises=recognises,
    read=dfdc_preview,
    published={"dfdc_preview": Published(splits={"test": (276, 501)})},
)
