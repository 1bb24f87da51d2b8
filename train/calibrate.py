"""What a score means: temperature and shift by likelihood, thresholds by false-positive rates.

A logit becomes P(forged) = sigmoid((logit − shift) / temperature).  Both are fitted on a split that
chose nothing else.  Both classes weigh alike in the fit, so a score speaks at even odds, whatever
the split's share of forgeries.  The targets are Platt's, (n + 1) / (n + 2) in place of 1, so that a
hundred faces which are perfectly separated do not make certainty.

A threshold decides about scores at or above it.  At `fpr_0.05`, at most 5 % of the split's real
videos are called forged.  Beside it stand the rate found, its 95 % interval (Clopper-Pearson),
and whether the split is large enough to support it: five expected false positives, the least at
which the interval says anything.  Below `low` lie 5 % of the split's forgeries: a video below it is
called authentic, and one between the two thresholds is inconclusive.

`calibrate_on_split` scores a split as a verdict does, one pooled logit a video, and counts people.
Nothing here writes a model: ralf.train.publish does.
"""

import csv
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit

from ralf.kernels.manifest import Calibration
from ralf.train.data.evaluation_set import Example
from ralf.train.data.index import Index
from ralf.train.evaluate.judge import JudgedModel, examples_for, score_examples
from ralf.train.evaluate.metrics import at_even_odds, share_interval
from ralf.train.recipe import seen_families

Floats = NDArray[np.float64]
FALSE_POSITIVE_RATES = (0.01, 0.05)
MISSED = 0.05
"""Share of forgeries that may lie below the threshold `low`."""
SUPPORTING_FALSE_POSITIVES = 5.0
"""Expected number from which on a split supports a threshold."""


class CalibrationError(ValueError):
    """Scores cannot be calibrated as they are."""


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


@dataclass(frozen=True)
class Calibrated:
    """What calibrating found."""

    calibration: Calibration
    thresholds: dict[str, Threshold]
    nll_before: float
    nll_after: float

    def scores(self) -> dict[str, float]:
        """For the manifest."""
        return {name: threshold.score for name, threshold in self.thresholds.items()}

    def facts(self) -> dict[str, Any]:
        """For the manifest's metrics and the card."""
        found = {name: asdict(threshold) for name, threshold in self.thresholds.items()}
        return {"nll_before": self.nll_before, "nll_after": self.nll_after, "thresholds": found}


def restored(calibration: Calibration, facts: dict[str, Any]) -> Calibrated:
    """The Calibrated that gave these `facts`."""
    thresholds = {
        name: Threshold(**{**each, "interval": tuple(each["interval"])})
        for name, each in facts["thresholds"].items()
    }
    return Calibrated(calibration, thresholds, facts["nll_before"], facts["nll_after"])


def calibrate(
    logit: Floats,
    forged: NDArray[np.bool_],
    *,
    fitted_on: str,
    shift: bool = True,
    person: Sequence[Hashable] | None = None,
) -> Calibrated:
    """Calibration and thresholds from one split: a logit, a label and a person for each video.

    Without `person` each row is somebody else.
    """
    calibration = fit(logit, forged, fitted_on=fitted_on, shift=shift)
    score = probability(logit, calibration)
    forged = np.asarray(forged, bool)
    reals, forgeries = _people(forged, person)
    thresholds = {
        f"fpr_{rate:g}": at_false_positives(score[~forged], rate, reals)
        for rate in FALSE_POSITIVE_RATES
    }
    # `low` stays below every other threshold: between them a video is inconclusive.
    lowest = min(threshold.score for threshold in thresholds.values())
    thresholds["low"] = at_misses(score[forged], MISSED, at_most=lowest, people=forgeries)
    plain = Calibration()
    return Calibrated(
        calibration, thresholds, nll(logit, forged, plain), nll(logit, forged, calibration)
    )


def _people(
    forged: NDArray[np.bool_], person: Sequence[Hashable] | None
) -> tuple[int | None, int | None]:
    """How many people stand among the reals, and how many among the forgeries.

    The classes are counted apart: with nine families, each person is forged nine times and real
    once, and nine forgeries of one person say little more about others than one does.
    """
    if person is None:
        return None, None
    seen: tuple[set[Hashable], set[Hashable]] = (set(), set())
    for who, is_forged in zip(person, forged, strict=True):
        seen[bool(is_forged)].add(who)
    return len(seen[False]), len(seen[True])


def calibrate_on_table(path: Path, fitted_on: str, *, shift: bool = True) -> Calibrated:
    """From a CSV of logits and labels (1 = forged), one row for each track or video."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"logit", "label"} <= rows[0].keys():
        raise CalibrationError(f"{path} should be a CSV with columns logit and label (1 = forged)")
    logit = np.array([float(row["logit"]) for row in rows])
    forged = np.array([row["label"] for row in rows]) == "1"
    return calibrate(logit, forged, fitted_on=fitted_on or path.name, shift=shift)


def calibrate_on_split(
    judge: JudgedModel,
    index: Index,
    split: str,
    *,
    families: Sequence[str] = (),
    conditions: Sequence[str] = ("clean",),
    fitted_on: str = "",
    shift: bool = True,
) -> tuple[Calibrated, Floats]:
    """Calibrate a model on a split; with it, the real videos' scores under the first condition.

    Every frame of a real video is forged by every family, and a video's frames are pooled as a
    verdict pools them: if the families took turns by frame, a forged "video" would be a single
    frame, beside reals of eight.
    """
    # A condition that is named twice would weigh its videos twice.
    conditions = list(dict.fromkeys(filter(None, conditions)))
    if not conditions:
        raise ValueError("--conditions should name at least one, as clean,h264=30")
    families = tuple(families) or families_to_blend(judge, index, split)
    logits: list[Floats] = []
    forged: list[NDArray[np.bool_]] = []
    people: list[Hashable] = []
    for condition in conditions:
        examples = examples_for(judge, index, split, families=families, condition=condition)
        videos = score_examples(judge, examples).pooled(judge.aggregation)
        who = {item.video: person_of(item) for item in examples.items}
        logits.append(videos.logit)
        forged.append(videos.forged)
        people += [who[video] for video in videos.video]
    found = calibrate(
        np.concatenate(logits),
        np.concatenate(forged),
        fitted_on=fitted_on or f"{split}: {','.join(conditions)}",
        shift=shift,
        person=people,
    )
    return found, probability(logits[0], found.calibration)[~forged[0]]


def person_of(item: Example) -> Hashable:
    """Whose face it shows; the video, where the data names nobody.

    Compression and method are left out: one video encoded twice shows the same person.
    """
    row = item.frame.row
    return row.target or (row.dataset, row.video)


def families_to_blend(judge: JudgedModel, index: Index, split: str) -> tuple[str, ...]:
    """The families trained on where the split has no forgeries of its own; else none."""
    if len(index.where(split=split, label=1)):
        return ()
    return seen_families(judge.trained)


def probability(logit: Floats, calibration: Calibration) -> Floats:
    """P(forged)."""
    logit = np.asarray(logit, np.float64)
    score: Floats = expit((logit - calibration.shift) / calibration.temperature)
    return score


def nll(logit: Floats, forged: NDArray[np.bool_], calibration: Calibration) -> float:
    """Mean negative log likelihood, both classes weighing alike."""
    logit, forged = _checked(logit, forged)
    z = (logit - calibration.shift) / calibration.temperature
    return float(_loss(z, forged.astype(np.float64), at_even_odds(forged)))


def fit(
    logit: Floats,
    forged: NDArray[np.bool_],
    *,
    fitted_on: str,
    shift: bool = True,
    smooth: bool = True,
    balanced: bool = True,
) -> Calibration:
    """The temperature and, if asked for, the shift of the greatest likelihood."""
    logit, forged = _checked(logit, forged)
    weights = at_even_odds(forged) if balanced else np.full(len(forged), 1 / len(forged))
    n, m = int(forged.sum()), int((~forged).sum())
    high, low = ((n + 1) / (n + 2), 1 / (m + 2)) if smooth else (1.0, 0.0)
    target = np.where(forged, high, low)
    # In units of their own spread, so that the search needs no tuning for a network's scale.
    scale = float(logit.std()) or 1.0
    unit = logit / scale

    def objective(x: Floats) -> tuple[float, Floats]:
        slope, offset = x[0], x[1] if shift else 0.0
        z = slope * unit + offset
        error = weights * (expit(z) - target)
        gradient = np.array([error @ unit, error.sum()])
        return _loss(z, target, weights), gradient[: len(x)]

    start = np.array([1.0, 0.0] if shift else [1.0])
    # The loss is convex in slope and offset; the bound keeps parted, unsmoothed scores finite.
    bounds = [(-1e3, 1e3), (None, None)][: len(start)]
    found = minimize(
        objective, start, jac=True, bounds=bounds, method="L-BFGS-B",
        options={"ftol": 1e-15, "gtol": 1e-10, "maxiter": 1000},
    )  # fmt: skip
    slope = float(found.x[0]) / scale
    # A negative temperature would turn every verdict around, so it is refused and not stored.
    if slope <= 0:
        raise CalibrationError(
            f"higher scores should mean forged, but the fitted slope is {slope:.3g}: the labels "
            "are the wrong way round, or the model knows nothing"
        )
    offset = float(found.x[1]) if shift else 0.0
    return Calibration(temperature=1 / slope, shift=-offset / slope, fitted_on=fitted_on)


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


def _loss(z: Floats, target: Floats, weights: Floats) -> float:
    return float(weights @ (np.logaddexp(0, z) - target * z))


def _checked(logit: Floats, forged: NDArray[np.bool_]) -> tuple[Floats, NDArray[np.bool_]]:
    logit, forged = np.asarray(logit, np.float64), np.asarray(forged, bool)
    if logit.shape != forged.shape or logit.ndim != 1:
        raise CalibrationError(
            f"expected as many logits as labels, got {logit.shape}, {forged.shape}"
        )
    if forged.all() or not forged.any():
        raise CalibrationError(
            f"expected real and forged faces, got {int(forged.sum())} forged of {len(forged)}"
        )
    if not np.isfinite(logit).all():
        raise CalibrationError(f"{int((~np.isfinite(logit)).sum())} logits are not finite")
    return logit, forged
