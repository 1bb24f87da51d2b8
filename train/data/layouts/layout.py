"""What a dataset layout is, and what the layouts share.  The datasets are in the other files here.

A layout file defines `LAYOUT`: how its folder is recognised, the function that turns the folder
into an index, the licences of its datasets, and the counts that their papers publish.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ralf.train.data.index import Index, Split

VIDEOS = {".mp4", ".avi", ".mov", ".mkv", ".webm"}
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
SPLIT_NAMES: tuple[Split, ...] = ("train", "val", "test")


@dataclass(frozen=True)
class Published:
    """How many videos a dataset has by its own paper or lists.  A count left out is not known."""

    methods: Mapping[str, int] = field(default_factory=dict)
    """Method → videos over all splits; the real ones under "real"."""
    method_in_split: Mapping[str, int] = field(default_factory=dict)
    """Split → videos of each method."""
    splits: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Split → real and forged videos."""
    needs_every_method: bool = False
    """Whether a method without any video is reported as missing."""


@dataclass(frozen=True)
class Layout:
    """One way in which a dataset lies on disk."""

    name: str
    sign: str
    """What the folder is recognised by, in words."""
    recognises: Callable[[Path], bool]
    read: Callable[[Path], Index]
    licences: Mapping[str, str] = field(default_factory=dict)
    """Name of a dataset (or how its name begins) → its licence."""
    published: Mapping[str, Published] = field(default_factory=dict)
    """Name of a dataset → its published counts."""
    fallback: bool = False
    """Tried after all others, because its sign fits folders that another layout reads better."""


def holds(*names: str) -> Callable[[Path], bool]:
    """A test for folders that hold any of these files or folders."""
    return lambda root: any((root / name).exists() for name in names)


def videos(folder: Path) -> list[Path]:
    """Video files in a folder, or in its videos/ where that is how it was unpacked."""
    inside = folder / "videos" if (folder / "videos").is_dir() else folder
    return sorted(path for path in inside.glob("*") if path.suffix.lower() in VIDEOS)


def relative(path: Path, root: Path) -> str:
    """The path below the root, as an index stores it."""
    return path.relative_to(root).as_posix()
