"""WildDeepfake: real_train/N/…/*.png; a folder of cropped frames is one sequence."""

from pathlib import Path

from ralf.train.data.index import REAL, Index, Row, Split
from ralf.train.data.layouts.layout import PICTURES, Layout, holds, relative

SPLITS: tuple[Split, ...] = ("train", "test")


def wild_deepfake(root: Path) -> Index:
    """The folder's name gives the split and the label."""
    rows = []
    for split in SPLITS:
        for word, label in (("real", 0), ("fake", 1)):
            top = root / f"{word}_{split}"
            if not top.is_dir():
                continue
            for folder in _frame_folders(top):
                inside = relative(folder, top)
                # No target: the collection names nobody, so nothing says who is in two sequences.
                rows.append(
                    Row(
                        dataset="wild_deepfake",
                        method="wild" if label else REAL,
                        split=split,
                        video=f"{split}/{inside}",
                        label=label,
                        path=relative(folder, root),
                        kind="frames",
                        group=f"wild:{word}_{split}/{inside.split('/')[0]}",
                    )
                )
    return Index(root, tuple(rows), ("no val split: `data index --split` draws one by group",))


def _frame_folders(folder: Path) -> list[Path]:
    """Folders, at any depth, that hold pictures themselves."""
    within = [folder, *sorted(path for path in folder.rglob("*") if path.is_dir())]
    return [
        path for path in within if any(each.suffix.lower() in PICTURES for each in path.iterdir())
    ]


LAYOUT = Layout(
    name="WildDeepfake",
    sign="real_train/, fake_train/, real_test/ or fake_test/",
    recognises=holds("real_train", "fake_train", "real_test", "fake_test"),
    read=wild_deepfake,
    licences={"wild_deepfake": "WildDeepfake terms of use: research, not commercial"},
)
