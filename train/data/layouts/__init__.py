"""Datasets on disk become one index table: one file for each layout, found by `read`.

To add a layout, add a file to this folder that defines `LAYOUT` (see layout.py); nothing else
lists the layouts.  A reader opens the dataset's own lists and no media.  Where a dataset has no
official splits, or a list is missing, the index says so in its notes.  Label 1 is forged
throughout.
"""

import importlib
import pkgutil
from pathlib import Path

from ralf.train.data.index import Index, IndexFault, load
from ralf.train.data.layouts.layout import Layout, Published, holds

UNKNOWN_LICENCE = "not known to this project: check before you ship"
OWN_TABLE = Layout(
    "index", "an index.csv", holds("index.csv"), lambda root: load(root / "index.csv")
)


def _all_layouts() -> tuple[Layout, ...]:
    """Our own table first, since it describes a folder whatever else lies in it; fallbacks last."""
    modules = (
        importlib.import_module(f"{__name__}.{module.name}")
        for module in sorted(pkgutil.iter_modules(__path__), key=lambda module: module.name)
    )
    found = [module.LAYOUT for module in modules if hasattr(module, "LAYOUT")]
    return (OWN_TABLE, *sorted(found, key=lambda layout: layout.fallback))


LAYOUTS: tuple[Layout, ...] = _all_layouts()
PUBLISHED: dict[str, Published] = {
    dataset: counts for layout in LAYOUTS for dataset, counts in layout.published.items()
}
"""Dataset → its published counts."""


def read(path: str | Path) -> Index:
    """The index of whatever lies at the path: a table, or a dataset in a known layout."""
    path = Path(path)
    if not path.exists():
        raise IndexFault(f"no data at {path}: expected a folder, an index .csv or a .json")
    if path.suffix == ".csv" and path.is_file():
        return load(path)
    for layout in LAYOUTS:
        if layout.recognises(path):
            index = layout.read(path)
            if not len(index):
                raise IndexFault(f"{path} looks like {layout.name} ({layout.sign}) but is empty")
            return index
    if path.is_file():
        raise IndexFault(f"{path.name} is neither an index (.csv) nor DeepfakeBench's .json")
    signs = "\n".join(f"  {layout.name}: {layout.sign}" for layout in LAYOUTS)
    raise IndexFault(f"{path} is in no known layout; the known ones are:\n{signs}")


def read_all(paths: list[str | Path]) -> Index:
    """Several datasets as one table."""
    whole = read(paths[0])
    for path in paths[1:]:
        whole = whole + read(path)
    return whole


def licence_of(dataset: str) -> str:
    """The licence of a dataset by its name or by how its name begins, as for `celeb_df_v2`."""
    name = _plain(dataset)
    # The longest name wins: "dfdc" begins with "dfd", which is another dataset.
    fitting = (known for known in LICENCES if name.startswith(known))
    return LICENCES.get(max(fitting, key=len, default=""), UNKNOWN_LICENCE)


def _plain(dataset: str) -> str:
    return dataset.lower().replace("-", "").replace("+", "p").replace("_", "")


LICENCES: dict[str, str] = {
    _plain(dataset): licence for layout in LAYOUTS for dataset, licence in layout.licences.items()
}
