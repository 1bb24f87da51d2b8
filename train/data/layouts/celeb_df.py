"""Celeb-DF v1, v2 and ++: Celeb-real/, YouTube-real/, Celeb-synthesis/ and a list of test videos.

In that list 1 means real; here label 1 is forged throughout, so the list is flipped and checked
against the folders.
"""

import re
from pathlib import Path

from ralf.train.data.index import REAL, Index, IndexFault, Row, Split
from ralf.train.data.layouts.layout import VIDEOS, Layout, Published, holds, relative

FOLDERS = ("celeb-real", "youtube-real", "celeb-synthesis")
TEST_LIST = "List_of_testing_videos.txt"
VERSIONS = {518: "celeb_df_v2", 100: "celeb_df_v1"}
"""Length of the list of test videos → version: nothing else in a download tells it."""


def celeb_df(root: Path) -> Index:
    """Train is everything but the test list, although both show the same people."""
    tested, version, notes = _test_list(root)
    rows: list[Row] = []
    for folder in sorted(root.iterdir()):
        if folder.name.lower() not in FOLDERS:
            continue
        forged = folder.name.lower() == "celeb-synthesis"
        inner = folder / "videos" if (folder / "videos").is_dir() else folder
        for path in sorted(p for p in inner.rglob("*") if p.suffix.lower() in VIDEOS):
            listed = tested.get(f"{folder.name}/{path.name}".lower())
            if listed is not None and listed != forged:
                # A list that is read the wrong way round would swap real and forged everywhere.
                raise IndexFault(
                    f"{folder.name}/{path.name} is called {'forged' if listed else 'real'} by "
                    f"{TEST_LIST}, where 1 means real: the list and folders disagree"
                )
            # Only Celeb-DF++ has a folder for each way of forging.
            method = path.parent.name if path.parent != inner else "Celeb-synthesis"
            split: Split = "train" if listed is None else "test"
            rows.append(_row(root, path, version, method if forged else REAL, split))
    return Index(root, tuple(rows), notes)


def _test_list(root: Path) -> tuple[dict[str, bool], str, tuple[str, ...]]:
    """folder/name in lower case → forged; the version; notes."""
    listed = root / TEST_LIST
    if not listed.exists():
        return {}, "celeb_df", (f"no {TEST_LIST}: everything is called train",)
    found = {}
    for line in listed.read_text().splitlines():
        if line.strip():
            real, name = line.split(maxsplit=1)
            folder, _, rest = name.strip().partition("/")
            found[f"{folder}/{Path(rest).name}".lower()] = real == "0"
    plus = any((root / "Celeb-synthesis" / kind).is_dir() for kind in ("FaceSwap", "FaceReenact"))
    version = "celeb_df_pp" if plus else VERSIONS.get(len(found), "celeb_df")
    note = "Celeb-DF has no identity-disjoint training split: `data check` will list its leaks"
    return found, version, (note,)


def _row(root: Path, path: Path, dataset: str, method: str, split: Split) -> Row:
    forged = method != REAL
    people = re.findall(r"id\d+", path.stem)
    # YouTube's videos are bare numbers, and nothing says who is in two of them: a person each.
    target = people[0] if people else f"youtube{path.stem}"
    return Row(
        dataset=dataset,
        method=method,
        split=split,
        video=path.stem if people else f"youtube-{path.stem}",
        target=f"celeb:{target}",
        source=f"celeb:{people[1]}" if forged and len(people) > 1 else "",
        label=int(forged),
        path=relative(path, root),
        kind="video",
    )


LAYOUT = Layout(
    name="Celeb-DF",
    sign="Celeb-real/",
    recognises=holds("Celeb-real"),
    read=celeb_df,
    licences={"celeb_df": "Celeb-DF terms of use: research, not commercial"},
    published={
        "celeb_df_v2": Published(
            methods={REAL: 890, "Celeb-synthesis": 5639},  # 590 of celebrities, 300 from YouTube
            splits={"test": (178, 340)},
        )
    },
)
