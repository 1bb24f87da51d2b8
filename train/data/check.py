"""What a dataset should hold against what is there, and who leaks across its splits.

Counts are those of the datasets' own papers and lists.  A count that is not known is not made up:
the column says a dash.  A leak is an identity, a group or a video in two splits; training on one
measures memory, so `refuse_leaks` stops it unless told.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ralf.train.data.index import REAL, Index, IndexFault, Leak, Row, leaks

FF_METHODS = ("Deepfakes", "Face2Face", "FaceSwap", "NeuralTextures", "FaceShifter")
FF_SPLITS = {"train": 720, "val": 140, "test": 140}
IN_SPLIT = {("celeb_df_v2", "test"): (178, 340), ("dfdc_preview", "test"): (276, 501)}
"""Real and forged videos."""


@dataclass(frozen=True)
class Count:
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
class Check:
    """All that `ralf data check` says."""

    counts: tuple[Count, ...]
    leaks: tuple[Leak, ...]
    missing: tuple[str, ...]
    """Files that the lists name and the disk has not."""
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


def check(index: Index, *, files: bool = True) -> Check:
    """Counts, leaks and missing files; `files=False` does not touch the disk."""
    videos = {row.key: row for row in index}
    counts = [*_by_kind(videos), *_by_split(videos)]
    missing = sorted({row.path for row in index if not _there(index, row)}) if files else []
    return Check(tuple(counts), tuple(leaks(index)), tuple(missing), index.notes, index.sha256)


def _there(index: Index, row: Row) -> bool:
    return Path(index.whole_path(row).split("::")[0]).exists()


Keyed = dict[tuple[str, str, str, str], Row]


def _by_kind(videos: Keyed) -> list[Count]:
    """Each method at each compression, over all splits."""
    found = Counter((dataset, method, level) for dataset, method, level, _ in videos)
    # A method of which there is nothing at all is missing too.
    for level in {level for dataset, _, level in found if dataset == "ffpp"}:
        for method in (*FF_METHODS, REAL):
            found.setdefault(("ffpp", method, level), 0)
    return [
        Count(dataset, f"{method} {level}".strip(), number, _whole(dataset, method))
        for (dataset, method, level), number in sorted(found.items())
    ]


def _whole(dataset: str, method: str) -> int | None:
    """How many videos a method of a dataset has."""
    if dataset == "ffpp":
        return 1000 if method in (*FF_METHODS, REAL) else None
    known = {
        ("dfd", REAL): 363,
        ("dfd", "DeepFakeDetection"): 3068,
        ("celeb_df_v2", REAL): 890,  # 590 of celebrities, 300 from YouTube
        ("celeb_df_v2", "Celeb-synthesis"): 5639,
    }
    return known.get((dataset, method))


def _by_split(videos: Keyed) -> list[Count]:
    """Real and forged of each split."""
    found: Counter[tuple[str, str, str, int, str]] = Counter(
        (row.dataset, row.compression, row.split, row.label, row.method if row.label else REAL)
        if row.dataset == "ffpp"
        else (row.dataset, row.compression, row.split, row.label, "")
        for row in videos.values()
    )
    for dataset, split in IN_SPLIT:
        for level in {each[1] for each in found if each[0] == dataset}:
            for label in (0, 1):
                found.setdefault((dataset, level, split, label, ""), 0)
    return [
        Count(
            dataset,
            " ".join(part for part in (split or "no split", _word(label, method), level) if part),
            number,
            _in_split(dataset, split, label),
        )
        for (dataset, level, split, label, method), number in sorted(found.items())
    ]


def _word(label: int, method: str) -> str:
    return method or ("forged" if label else REAL)


def _in_split(dataset: str, split: str, label: int) -> int | None:
    if dataset == "ffpp":
        return FF_SPLITS.get(split)
    return IN_SPLIT[dataset, split][label] if (dataset, split) in IN_SPLIT else None


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
