"""FaceForensics++, and the DeepFakeDetection set (DFD) that is distributed inside it.

Identities are named with the collection that they come from ("ffpp:071"), so that a person has
the same name in every dataset made from it.
"""

import json
from pathlib import Path

from ralf.train.data.index import REAL, Index, IndexFault, Row, Split
from ralf.train.data.layouts.layout import SPLIT_NAMES, Layout, Published, holds, relative, videos

METHODS = ("Deepfakes", "Face2Face", "FaceSwap", "NeuralTextures", "FaceShifter")
LICENCE = "FaceForensics++ terms of use: research, not commercial"


def recognises(root: Path) -> bool:
    """DeeperForensics, too, may hold original_sequences/: its reals are FaceForensics++'s."""
    ours = holds("original_sequences", "manipulated_sequences")
    return ours(root) and not (root / "manipulated_videos").exists()


def faceforensics(root: Path) -> Index:
    """Every manipulation and compression that is there."""
    splits, notes = _splits(root)
    rows: list[Row] = []
    for kind in ("original_sequences", "manipulated_sequences"):
        for level in sorted((root / kind).glob("*/*/videos")):
            method, compression = level.parts[-3], level.parts[-2]
            # METHOD/masks/videos has the depth of METHOD/COMPRESSION/videos, but holds masks.
            if "masks" in (method, compression):
                continue
            compression = "raw" if compression == "c0" else compression
            for path in videos(level):
                if method in ("actors", "DeepFakeDetection"):
                    rows.append(_dfd_row(root, path, method, compression))
                else:
                    rows.append(_row(root, path, method, compression, splits))
    return Index(root, tuple(rows), notes)


def _splits(root: Path) -> tuple[dict[str, Split], tuple[str, ...]]:
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


def _row(root: Path, path: Path, method: str, compression: str, splits: dict[str, Split]) -> Row:
    target, _, source = path.stem.partition("_")
    forged = bool(source)
    return Row(
        dataset="ffpp",
        method=method if forged else REAL,
        compression=compression,
        # By the target alone: the official lists are of pairs, so both people are in one split.
        split=splits.get(target, ""),
        video=path.stem,
        target=f"ffpp:{target}",
        source=f"ffpp:{source}" if forged else "",
        label=int(forged),
        path=relative(path, root),
        kind="video",
        masks=_masks(root, path, method) if forged else "",
    )


def _dfd_row(root: Path, path: Path, method: str, compression: str) -> Row:
    """DFD has no official split; all of it is a test set."""
    people = path.stem.split("__")[0].split("_")
    forged = method != "actors"
    return Row(
        dataset="dfd",
        method=method if forged else REAL,
        compression=compression,
        split="test",
        video=path.stem,
        target=f"dfd:{people[0]}",
        source=f"dfd:{people[1]}" if forged and len(people) > 1 else "",
        label=int(forged),
        path=relative(path, root),
        kind="video",
        masks=_masks(root, path, method) if forged else "",
    )


def _masks(root: Path, path: Path, method: str) -> str:
    """The mask video of a forgery, where it was downloaded too."""
    mask = root / "manipulated_sequences" / method / "masks" / "videos" / path.name
    return relative(mask, root) if mask.exists() else ""


LAYOUT = Layout(
    name="FaceForensics++ and DFD",
    sign="original_sequences/ or manipulated_sequences/",
    recognises=recognises,
    read=faceforensics,
    licences={"ffpp": LICENCE, "dfd": LICENCE},
    published={
        "ffpp": Published(
            methods=dict.fromkeys((*METHODS, REAL), 1000),
            method_in_split={"train": 720, "val": 140, "test": 140},
            needs_every_method=True,
        ),
        "dfd": Published(methods={REAL: 363, "DeepFakeDetection": 3068}),
    },
)
