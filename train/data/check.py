"""`ralf data check`: counts against the published ones, missing files, and leaks across splits.

Published counts stand with each dataset's layout (data/layouts/).  A count that is not known is
shown as a dash.  A leak is an identity, a group or a video in two splits.  A model that is
trained on one of them and tested on the other is tested for its memory, so `refuse_leaks` stops
training unless leaks are allowed.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ralf.train.data.index import REAL, Index, IndexFault, Leak, Row, leaks
from ralf.train.data.layouts import PUBLISHED
from ralf.train.data.layouts.layout import Published

NOTHING_PUBLISHED = Published()


@dataclass(frozen=True)
class VideoCount:
    """Videos of one kind."""

    dataset: str
    what: str
    found: int
    expected: int | None

    @property
    def fine(self) -> bool:
        return self.expected is None or self.found == self.expected

    def __str__(self) -> str:
        wanted = "—" if self.expected is None else str(self.expected)
        return f"{self.dataset:<18} {self.what:<34} {self.found:>7} {wanted:>9}" + (
            "" if self.fine else "  differs"
        )


@dataclass(frozen=True)
class DataCheck:
    """Everything that `ralf data check` reports."""

    counts: tuple[VideoCount, ...]
    leaks: tuple[Leak, ...]
    missing: tuple[str, ...]
    """Files that the lists name and that are not on the disk."""
    notes: tuple[str, ...]
    sha256: str

    @property
    def fine(self) -> bool:
        return not self.leaks and not self.missing and all(count.fine for count in self.counts)

    def __str__(self) -> str:
        lines = [f"{'dataset':<18} {'what':<34} {'found':>7} {'expected':>9}"]
        lines += [str(count) for count in self.counts]
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"{len(self.missing)} files are missing", *(f"  {m}" for m in self.missing[:20])]
        lines += [f"{len(self.leaks)} leaks across splits", *(f"  {leak}" for leak in self.leaks)]
        return "\n".join([*lines, f"data sha256 {self.sha256}"])


def check(index: Index, *, files: bool = True) -> DataCheck:
    """Counts, leaks and missing files; `files=False` does not touch the disk."""
    videos = {row.key: row for row in index}
    counts = [*_by_method(videos), *_by_split(videos)]
    # A set: several rows may be of one file.
    missing = sorted({row.path for row in index if not _exists(index, row)}) if files else []
    return DataCheck(tuple(counts), tuple(leaks(index)), tuple(missing), index.notes, index.sha256)


def _exists(index: Index, row: Row) -> bool:
    return Path(index.whole_path(row).split("::")[0]).exists()


def _published(dataset: str) -> Published:
    return PUBLISHED.get(dataset, NOTHING_PUBLISHED)


VideosByKey = dict[tuple[str, str, str, str], Row]


def _by_method(videos: VideosByKey) -> list[VideoCount]:
    """Each method at each compression, over all splits."""
    found = Counter((dataset, method, level) for dataset, method, level, _ in videos)
    for dataset, level in {(dataset, level) for dataset, _, level in found}:
        if _published(dataset).needs_every_method:
            for method in _published(dataset).methods:
                found.setdefault((dataset, method, level), 0)
    return [
        VideoCount(
            dataset, f"{method} {level}".strip(), number, _published(dataset).methods.get(method)
        )
        for (dataset, method, level), number in sorted(found.items())
    ]


def _by_split(videos: VideosByKey) -> list[VideoCount]:
    """Real and forged videos of each split; of each method where that is what is published."""
    found: Counter[tuple[str, str, str, int, str]] = Counter()
    for row in videos.values():
        method = row.method if _published(row.dataset).method_in_split else ""
        found[row.dataset, row.compression, row.split, row.label, method] += 1
    for dataset, level in {(each[0], each[1]) for each in found}:
        # A published split of which nothing is there is reported with a count of 0.
        for split in _published(dataset).splits:
            for label in (0, 1):
                found.setdefault((dataset, level, split, label, ""), 0)
    return [
        VideoCount(
            dataset,
            " ".join(part for part in (split or "no split", _word(label, method), level) if part),
            number,
            _expected_in_split(dataset, split, label),
        )
        for (dataset, level, split, label, method), number in sorted(found.items())
    ]


def _word(label: int, method: str) -> str:
    return method or ("forged" if label else REAL)


def _expected_in_split(dataset: str, split: str, label: int) -> int | None:
    known = _published(dataset)
    if known.method_in_split:
        return known.method_in_split.get(split)
    return known.splits[split][label] if split in known.splits else None


def refuse_leaks(index: Index, *, allowed: bool = False) -> list[Leak]:
    """The leaks of an index; an error unless they are allowed."""
    found = leaks(index)
    if found and not allowed:
        shown = "\n".join(f"  {leak}" for leak in found[:10])
        more = f"\n  and {len(found) - 10} more" if len(found) > 10 else ""
        raise IndexFault(
            f"{len(found)} leaks across splits:\n{shown}{more}\n"
            "draw new splits (`ralf data index --split`), or train all the same with --allow-leaks"
        )
    return found
