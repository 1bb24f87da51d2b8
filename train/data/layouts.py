"""Datasets as they lie on disk → one index table.

`read(path)` looks at a folder, says which layout it is and turns it into rows; nothing is opened
but the datasets' own lists.  `KNOWN` holds each reader with what it looks for.  Where a dataset
has no official splits, or a list is missing, the index says so in its notes.  Label 1 is forged
throughout: Celeb-DF's lists, where 1 is real, are flipped, and checked against the folders.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ralf.train.data import layouts_dfdc, layouts_faces, layouts_packed, layouts_video
from ralf.train.data.index import Index, IndexFault, load

Looks = Callable[[Path], bool]
Reads = Callable[[Path], Index]


@dataclass(frozen=True)
class Layout:
    """One way in which data lies on disk."""

    name: str
    sign: str
    """What it is recognised by, in words."""
    looks_like: Looks
    read: Reads


def _any(*names: str) -> Looks:
    """Whether the folder holds one of these."""
    return lambda root: any((root / name).exists() for name in names)


def _any_glob(*patterns: str) -> Looks:
    return lambda root: any(next(root.glob(pattern), None) for pattern in patterns)


KNOWN: tuple[Layout, ...] = (
    Layout("index", "an index.csv", _any("index.csv"), lambda root: load(root / "index.csv")),
    Layout(
        "FaceForensics++ and DFD",
        "original_sequences/ or manipulated_sequences/",
        lambda root: (
            _any("original_sequences", "manipulated_sequences")(root)
            and not _any("manipulated_videos")(root)
        ),
        layouts_video.faceforensics,
    ),
    Layout(
        "DeeperForensics-1.0",
        "manipulated_videos/ with lists/splits/",
        _any("manipulated_videos"),
        layouts_video.deeperforensics,
    ),
    Layout("Celeb-DF", "Celeb-real/", _any("Celeb-real"), layouts_video.celeb_df),
    Layout(
        "DFDC preview",
        "dataset.json beside original_videos/ or method_A/",
        lambda root: _any("dataset.json")(root) and _any("original_videos", "method_A")(root),
        layouts_dfdc.dfdc_preview,
    ),
    Layout(
        "DFDC",
        "metadata.json, dfdc_train_part_*/metadata.json, or labels.csv",
        _any_glob("metadata.json", "*/metadata.json", "labels.csv", "*/labels.csv"),
        layouts_dfdc.dfdc,
    ),
    Layout(
        "WildDeepfake",
        "real_train/, fake_train/, real_test/ or fake_test/",
        _any("real_train", "fake_train", "real_test", "fake_test"),
        layouts_faces.wild_deepfake,
    ),
    Layout(
        "a table of faces", "faces.csv beside faces/", _any("faces.csv"), layouts_faces.faces_csv
    ),
    Layout(
        "reviewers' labels",
        'JSON files with "schema": "ralf.review/1"',
        layouts_faces.looks_reviewed,
        layouts_faces.reviews,
    ),
    Layout(
        "real and fake folders",
        "real/ and fake/, or train/, val/, test/ that hold them",
        layouts_faces.looks_plain,
        layouts_faces.plain,
    ),
)


def read(path: str | Path) -> Index:
    """The index of whatever lies at the path: a table, a DeepfakeBench JSON, or a known layout."""
    path = Path(path)
    if not path.exists():
        raise IndexFault(f"no data at {path}: expected a folder, an index .csv or a .json")
    if path.is_file():
        if path.suffix == ".csv":
            return load(path)
        if path.suffix == ".json":
            return layouts_packed.deepfake_bench(path)
        raise IndexFault(f"{path.name} is neither an index (.csv) nor DeepfakeBench's .json")
    for layout in KNOWN:
        if layout.looks_like(path):
            index = layout.read(path)
            if not len(index):
                raise IndexFault(f"{path} looks like {layout.name} ({layout.sign}) but is empty")
            return index
    signs = "\n".join(f"  {layout.name}: {layout.sign}" for layout in KNOWN)
    raise IndexFault(f"{path} is no layout that is known; these are:\n{signs}")


def read_all(paths: list[str | Path]) -> Index:
    """Several datasets as one table."""
    whole = read(paths[0])
    for path in paths[1:]:
        whole = whole + read(path)
    return whole
