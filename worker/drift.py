"""Drift: how far recent scores have moved from a reference, as one number.

The population stability index compares two distributions over the same bins:

    PSI = Σ (a − e) · ln(a / e)        a: share of recent scores in a bin, e: of the reference's

It is 0 for equal distributions and never negative, because it is the sum of both Kullback–Leibler
divergences.  By convention below 0.1 is no drift, and above 0.25 it should be investigated.  Half
a score is added to each bin, so that an empty bin gives a finite number.  Without any drift PSI
still averages about (bins − 1) · (1/n + 1/m) for n recent and m reference scores; therefore nothing
is reported for fewer than LEAST.

The reference is the manifest's, or the first WINDOW scores of this process.  Bins are narrow at
both ends, where a calibrated model puts most of its scores.  Memory is bounded: WINDOW small
numbers for each model and engine, and at most KINDS of these.
"""

import math
from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

EDGES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
WINDOW = 1000
LEAST = 300
KINDS = 16


def psi(late: Sequence[float], reference: Sequence[float]) -> float:
    """The index of two histograms over the same bins."""
    if len(late) != len(reference) or not late:
        raise ValueError(f"expected two histograms alike, got {len(late)}, {len(reference)} bins")
    a, e = _shares(late), _shares(reference)
    return math.fsum((x - y) * math.log(x / y) for x, y in zip(a, e, strict=True))


def histogram(scores: Sequence[float], edges: Sequence[float] = EDGES) -> list[int]:
    """How many scores fall into each bin: below the first edge, …, at or above the last."""
    counts = [0] * (len(edges) + 1)
    for score in scores:
        # An edge belongs to the bin above it, as in numpy's histogram.
        counts[bisect_right(edges, score)] += 1
    return counts


def _shares(counts: Sequence[float]) -> list[float]:
    whole = math.fsum(counts) + 0.5 * len(counts)
    return [(count + 0.5) / whole for count in counts]


@dataclass
class Window:
    """The recent scores of one model and engine, and their reference."""

    edges: tuple[float, ...] = EDGES
    reference: tuple[int, ...] | None = None
    """None: the first WINDOW scores become the reference."""
    # The bins and not the scores: what falls out of the window leaves the bin that counted it.
    late: deque[int] = field(default_factory=lambda: deque(maxlen=WINDOW))
    counts: list[int] = field(default_factory=list)

    def add(self, score: float) -> None:
        """Add a score; a full window drops its oldest."""
        self.counts = self.counts or [0] * (len(self.edges) + 1)
        if len(self.late) == self.late.maxlen:
            self.counts[self.late[0]] -= 1
        place = bisect_right(self.edges, score)
        self.late.append(place)
        self.counts[place] += 1
        if self.reference is None and len(self.late) == WINDOW:
            self.reference = tuple(self.counts)
            # The index would begin near 0 if the scores that made the reference were compared with
            # it.
            self.late.clear()
            self.counts = []

    @property
    def index(self) -> float | None:
        """PSI; None while there are too few scores."""
        if self.reference is None or len(self.late) < LEAST:
            return None
        return psi(self.counts, self.reference)


class Drift:
    """A window for each version and engine that this process has used recently."""

    def __init__(self) -> None:
        self._windows: OrderedDict[tuple[str, str], Window] = OrderedDict()
        self._references: dict[str, tuple[tuple[float, ...], tuple[int, ...]]] = {}

    def set_reference(self, model: str, edges: Sequence[float], counts: Sequence[int]) -> None:
        """Use the manifest's reference for NAME@VERSION; windows without it start again."""
        known = (tuple(edges), tuple(counts))
        # The same reference comes again whenever a child loads the model; the window must go on.
        if self._references.get(model) == known:
            return
        if len(self._references) >= KINDS:
            self._references.pop(next(iter(self._references)))
        self._references[model] = known
        for key in [key for key in self._windows if key[0] == model]:
            del self._windows[key]

    def observe(self, model: str, engine: str, score: float) -> float | None:
        """Add a score; the PSI with it, None while there are too few scores."""
        key = (model, engine)
        if key not in self._windows:
            if len(self._windows) >= KINDS:
                self._windows.popitem(last=False)
            edges, counts = self._references.get(model, (EDGES, None))
            self._windows[key] = Window(edges, counts)
        self._windows.move_to_end(key)
        window = self._windows[key]
        window.add(score)
        return window.index
