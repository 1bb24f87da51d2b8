"""Our own layout for portraits: faces.csv, one picture a row with box and five points, and faces/.

The column `source` names the collection that a picture comes from.  groups.csv beside it may say
which groups (age, gender, region …) each person belongs to.  It is read by `read_groups` alone, for
figures by group: an index has no such columns, so that nothing can be trained on them.
"""

import csv
from pathlib import Path
from typing import cast

import numpy as np

from ralf.train.data.index import MESHES, REAL, Index, IndexFault, Row, Split
from ralf.train.data.layouts.layout import Layout, holds

GROUPS = "groups.csv"
FIVE_COLUMNS = [
    f"{point}_{axis}" for point in ("eye_l", "eye_r", "nose", "mouth_l", "mouth_r") for axis in "xy"
]
BOX_COLUMNS = ["box_x0", "box_y0", "box_x1", "box_y1"]


def faces_csv(root: Path) -> Index:
    """file, identity and split; box, points, source and label where the table has them."""
    meshes = set()
    if (root / MESHES).exists():
        with np.load(root / MESHES) as packed:
            meshes = set(packed["files"].tolist())
    with (root / "faces.csv").open(newline="") as file:
        reader = csv.DictReader(file)
        if missing := {"file", "identity", "split"} - set(reader.fieldnames or ()):
            raise IndexFault(f"faces.csv has no column {sorted(missing)}")
        rows = tuple(_row(root, line, line["file"] in meshes) for line in reader)
    return Index(root, rows)


def read_groups(root: Path) -> dict[str, dict[str, str]]:
    """A person → column of groups.csv → group: {"anna": {"age": "20-29", "region": "…"}}.

    groups.csv lies beside faces.csv and has the column `file`, and one for each grouping.  The keys
    are identities, so that rows of stills, of prepared crops and of made clips are joined alike, by
    `Row.target`.  A person with two different groups is refused.
    """
    with (root / "faces.csv").open(newline="") as file:
        person = {line["file"]: line["identity"] for line in csv.DictReader(file)}
    found: dict[str, dict[str, str]] = {}
    with (root / GROUPS).open(newline="") as file:
        reader = csv.DictReader(file)
        columns = [name for name in reader.fieldnames or () if name not in ("file", "split")]
        if "file" not in (reader.fieldnames or ()) or not columns:
            raise IndexFault(
                f"{GROUPS} should have the column file and one for each grouping, got "
                f"{', '.join(reader.fieldnames or ()) or 'nothing'}"
            )
        for line in reader:
            if line["file"] not in person:
                raise IndexFault(f"{GROUPS} names {line['file']}, which faces.csv does not")
            groups = {name: line[name] for name in columns}
            if found.setdefault(person[line["file"]], groups) != groups:
                raise IndexFault(
                    f"{GROUPS} puts {person[line['file']]} into two groups: {line['file']} has "
                    f"{groups}, another picture {found[person[line['file']]]}"
                )
    return found


def _row(root: Path, line: dict[str, str], has_mesh: bool) -> Row:
    label = int(line.get("label") or 0)
    below = "faces/" if (root / "faces").is_dir() else ""
    return Row(
        dataset=line.get("source") or root.name,
        method=(line.get("method") or "fake") if label else REAL,
        split=cast(Split, line["split"]),  # Row refuses what is no split
        video=line.get("video") or Path(line["file"]).stem,
        target=line["identity"],
        label=label,
        path=below + line["file"],
        kind="image",
        box=tuple(float(line[name]) for name in BOX_COLUMNS) if line.get("box_x0") else (),
        five=tuple(float(line[name]) for name in FIVE_COLUMNS) if line.get("eye_l_x") else (),
        mesh=line["file"] if has_mesh else "",
        # By way of float: a table may say 180.0, which int() refuses as text.
        face_px=int(float(line.get("face_px") or 0)),
    )


LAYOUT = Layout(
    name="a table of faces",
    sign="faces.csv beside faces/",
    recognises=holds("faces.csv"),
    read=faces_csv,
    licences={
        "civilservice": "official portraits of US office holders, public domain; collection MIT",
        "voteview": "official and public-domain portraits of the US Congress",
        "fairface": "CC BY 4.0: FairFace, Kärkkäinen and Joo; name it wherever weights are used",
        "ffhq": "CC BY-NC-SA: for judging only, never in weights that ship",
    },
)
