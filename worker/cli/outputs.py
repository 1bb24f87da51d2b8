"""Where `ralf scan` writes pages, verdicts and videos; refuses a bad place before any work."""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ralf.worker.cli.sources import Source


@dataclass(frozen=True)
class Targets:
    """The files to write about each source."""

    pages: Mapping[Source, Sequence[Path]] = field(default_factory=dict)
    documents: Mapping[Source, Path] = field(default_factory=dict)
    videos: Mapping[Source, Path] = field(default_factory=dict)


def targets(
    sources: Sequence[Source], *, report: str | None, output_dir: str | None, annotated: str | None
) -> Targets:
    """The files that these options ask for."""
    names, several = _names(sources), len(sources) > 1
    pages: dict[Source, list[Path]] = {source: [] for source in sources}
    for option, place, end in (
        ("--report", report, ".html"),
        ("--output-dir", output_dir, ".html"),
    ):
        whole = several or option == "--output-dir"
        for source, path in _placed(option, place, names, end, folder=whole).items():
            pages[source].append(path)
    documents = _placed("--output-dir", output_dir, names, ".json", folder=True)
    videos = _placed("--annotated", annotated, names, ".annotated.mp4", folder=several)
    return Targets({s: paths for s, paths in pages.items() if paths}, documents, videos)


def usage(message: str) -> SystemExit:
    """The error of a wrong option, already printed."""
    print(f"ralf scan: {message}", file=sys.stderr)
    return SystemExit(2)


def _placed(
    option: str, target: str | None, names: Mapping[Source, str], end: str, *, folder: bool = False
) -> dict[Source, Path]:
    """One file for each source: in the folder `target`, or `target` itself for a single source."""
    if target is None:
        return {}
    place = Path(target)
    several = folder or place.is_dir() or target.endswith("/")
    if several:
        if place.is_file():
            raise usage(f"{option} wants a folder, {target} is a file")
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise usage(f"{option}: cannot make the folder {target}: {error.strerror}") from None
    parent = place if several else place.parent
    if not parent.is_dir():
        raise usage(f"{option}: there is no folder {parent}")
    # Now and not at the first write: the scan before it may take hours.
    if not os.access(parent, os.W_OK | os.X_OK):
        raise usage(f"{option}: the folder {parent} may not be written to")
    found = {
        source: parent / f"{name}{end}" if several else place for source, name in names.items()
    }
    # Resolved: a link to an input is that input, and it would be overwritten.
    judged = {source.path.resolve() for source in names if source.path is not None}
    for path in found.values():
        if path.resolve() in judged:
            raise usage(f"{option}: {path} is one of the files to judge")
    return found


def _names(sources: Sequence[Source]) -> dict[Source, str]:
    """What each source's files begin with; sources of one file name are numbered."""
    names: dict[Source, str] = {}
    taken: set[str] = set()
    # A file that is named twice is one source, and needs one name.
    for source in dict.fromkeys(sources):
        name, number = source.file_name, 1
        while name in taken:
            number += 1
            name = f"{source.file_name}.{number}"
        names[source] = name
        taken.add(name)
    return names
