"""Small datasets on disk, made from the portraits that are in the repository."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from demo.samples import PORTRAITS, forged, portraits
from ralf.train.data.index import Index
from ralf.train.data.layouts import read
from ralf.train.data.layouts.face_table import BOX_COLUMNS, FIVE_COLUMNS

COLUMNS = ["file", "source", "identity", "split", "label", "method", "video"]
COLUMNS += [*BOX_COLUMNS, *FIVE_COLUMNS]


def faces(root: Path, *, val: int = 2, forgeries: str | None = None) -> Index:
    """Write a table of faces: all portraits, of which the last `val` are for validation.

    `forgeries` adds a forged row for each: "copies" (the same picture) or a blending family.
    """
    (root / "faces").mkdir(parents=True)
    listed = json.loads((PORTRAITS / "faces.json").read_text())
    lines = []
    for number, (name, portrait) in enumerate(sorted(portraits().items())):
        shutil.copy(PORTRAITS / name, root / "faces" / name)
        split = "val" if number >= len(listed) - val else "train"
        geometry = [*listed[name]["box"], *(x for point in listed[name]["five"] for x in point)]
        person, stem = listed[name]["identity"], Path(name).stem
        lines.append([name, "portraits", person, split, 0, "", stem, *geometry])
        if forgeries is None:
            continue
        fake = f"{stem}_{forgeries}.png"
        image = portrait.image
        if forgeries != "copies":
            image = forged(portrait, forgeries, seed=number)
        Image.fromarray(np.asarray(image)).save(root / "faces" / fake)
        lines.append([fake, "portraits", person, split, 1, forgeries, stem, *geometry])
    with (root / "faces.csv").open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *lines])
    return read(root)
