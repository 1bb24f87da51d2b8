"""Thresholds: scores that decide, and how well the data supports them.

A threshold decides about scores at or above it.  At a false-positive rate of 0.05, at most 5 % of
the real videos are called forged: of all together, and of each collection that has enough people to
say so.  The worst one sets the threshold, since a platform's users may be like any of them.
Collections that are too small alone count together.

Beside a threshold stand the rate found, its 95 % interval (Clopper-Pearson), and whether the data
is large enough to support it: five expected false positives, the least at which the interval says
anything.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from ralf.train.evaluate.metrics import share_interval

Floats = NDArray[np.float64]
SUPPORTING_FALSE_POSITIVES = 5.0
"""Expected number from which on a split supports a threshold."""
SMALL = "small collections together"


@dataclass(frozen=True)
class Threshold:
    """A score that decides, and how well the split supports it."""

    score: float
    rate: float
    """Share of the split's reals at or above it (for low: of its forgeries below it)."""
    interval: tuple[float, float]
    """95 %, of the rate."""
    faces: int
    """How many people the rate was measured on."""
    supported: bool
    set_by: str = ""
    """The collection whose reals need so high a threshold; empty: all of them together."""
    by_collection: dict[str, list[float]] = field(default_factory=dict)
    """The rate of each collection's reals with its interval, where there are several."""


def everywhere(
    real: Floats, rate: float, person: Sequence[Hashable], collection: Sequence[str]
) -> Threshold:
    """The lowest score that keeps the rate on all reals, and on each collection that is large
    enough to support it; its own rate is that of all."""
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(collection):
        rows.setdefault(name, []).append(row)
    small = [name for name, own in rows.items() if not _supports(own, person, rate)]
    groups = {name: own for name, own in rows.items() if name not in small}
    if groups and small:
        groups[SMALL] = [row for name in small for row in rows[name]]
    everybody = at_false_positives(real, rate, len(set(person)))
    worst, set_by = everybody.score, ""
    for name, own in groups.items():
        needed = at_false_positives(real[own], rate).score
        if needed > worst and _supports(own, person, rate):
            worst, set_by = needed, name
    found = replace(
        _threshold(worst, int((real >= worst).sum()), len(real), rate, len(set(person))),
        set_by=set_by,
    )
    if len(rows) == 1:
        return found
    return replace(
        found,
        by_collection={
            name: _rate_of(real[own] >= worst, [person[row] for row in own])
            for name, own in sorted(rows.items())
        },
    )


def _supports(rows: Sequence[int], person: Sequence[Hashable], rate: float) -> bool:
    return len({person[row] for row in rows}) * rate >= SUPPORTING_FALSE_POSITIVES


def _rate_of(above: NDArray[np.bool_], person: Sequence[Hashable]) -> list[float]:
    """A rate of videos with its interval, which counts people."""
    found = _threshold(0.0, int(above.sum()), len(above), 0.0, len(set(person)))
    return [found.rate, *found.interval]


def at_false_positives(real: Floats, rate: float, people: int | None = None) -> Threshold:
    """The lowest score at or above which at most `rate` of the reals lie, half-way to the next."""
    ordered = np.sort(np.asarray(real, np.float64))[::-1]
    # The product may come out a hair below a whole number: the 1e-9 keeps that one.
    allowed = int(np.floor(rate * len(ordered) + 1e-9))
    # ordered[allowed] must lie below the threshold, and all that equal it do too.
    barred = ordered[allowed] if allowed < len(ordered) else -np.inf
    above = int((ordered > barred).sum())
    # With no real above, the range that the threshold halves ends where the scale does.
    next_up = ordered[above - 1] if above else 1.0
    score = 0.0 if np.isneginf(barred) else _between(float(barred), float(next_up))
    alarms = int((ordered >= score).sum())
    return _threshold(score, alarms, len(ordered), rate, people)


def at_misses(
    forged: Floats, rate: float, *, at_most: float = 1.0, people: int | None = None
) -> Threshold:
    """The highest score, not above `at_most`, below which at most `rate` of forgeries lie."""
    ordered = np.sort(np.asarray(forged, np.float64))
    allowed = int(np.floor(rate * len(ordered) + 1e-9))
    # With `rate` near 1 every forgery may be missed: the highest score is then the answer.
    score = min(float(ordered[min(allowed, len(ordered) - 1)]), at_most)
    return _threshold(score, int((ordered < score).sum()), len(ordered), rate, people)


def _threshold(score: float, events: int, of: int, rate: float, people: int | None) -> Threshold:
    """The rate is of all videos; interval and support count each person once.

    The same person seen again, in another video or under another condition, is no new evidence of
    how often other people are called forged.
    """
    people = of if people is None else people
    span = share_interval(min(round(events * people / of), people), people)
    return Threshold(score, events / of, span, people, people * rate >= SUPPORTING_FALSE_POSITIVES)


def _between(low: float, high: float) -> float:
    """A score above `low` and not above `high`, in the middle where floats leave room."""
    middle = low + (high - low) / 2
    return middle if low < middle <= high else min(float(np.nextafter(low, np.inf)), 1.0)
