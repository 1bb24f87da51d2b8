"""What a score means: temperature and shift by likelihood, thresholds by false-positive rates.

A logit becomes P(forged) = sigmoid((logit − shift) / temperature).  Both are fitted on a split that
chose nothing else.  Compression hides what a detector looks for, so for clips both depend on the
bits per pixel: they are fitted at three strengths of compression and interpolated (the manifest's
`by_compression`).  A collection without forgeries takes no part in the fit.

Both classes weigh alike in the fit, so a score speaks at even odds, whatever the split's share of
forgeries.  The targets are Platt's, (n + 1) / (n + 2) in place of 1, so that a hundred faces which
are perfectly separated do not make certainty.

`fpr_0.05` is the threshold at which at most 5 % of the real videos are called forged:
thresholds.py says of which.  Below `low` lie 5 % of the split's forgeries: a video below it is
called authentic, and one between the two thresholds is inconclusive.

`calibrate_on_split` scores a split as a verdict does, one pooled logit a video, and counts people.
Nothing here writes a model: ralf.train.publish.version does.
"""

import csv
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit

from ralf.kernels.manifest import Calibration, CompressionPoint, never_trained_on
from ralf.train.data.index import Index
from ralf.train.evaluate.judge import JudgedModel, examples_for, score_examples
from ralf.train.evaluate.metrics import Scored, at_even_odds, concatenated
from ralf.train.publish.thresholds import Threshold, at_misses, everywhere
from ralf.train.recipe import seen_families

Floats = NDArray[np.float64]
FALSE_POSITIVE_RATES = (0.01, 0.05)
MISSED = 0.05
"""Share of forgeries that may lie below the threshold `low`."""
KNOTS = (0.05, 0.5, 0.95)
"""Quantiles of the bits per pixel at which temperature and shift are fitted."""
LEAST_APART = 1.2
"""Two knots differ by this factor or more; with one alone there is no curve by compression."""
LEAST_ROWS = 60
"""Real and forged clips each, with known compression, that the curve needs."""


class CalibrationError(ValueError):
    """Scores cannot be calibrated as they are."""


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
    bits_per_pixel: Floats | None = None,
    collection: Sequence[str] | None = None,
) -> Calibrated:
    """Calibration and thresholds from one split: a logit, a label and a person for each video.

    Without `person` each row is somebody else.  `bits_per_pixel` is NaN where it is not known.
    """
    logit, forged = _checked(logit, forged)
    names = np.array(["all"] * len(logit) if collection is None else collection)
    rate = np.full(len(logit), np.nan) if bits_per_pixel is None else bits_per_pixel
    # Reals without forgeries beside them would only shift the odds; their thresholds count.
    fitted = np.isin(names, np.unique(names[forged]))
    rows = (logit[fitted], forged[fitted])
    calibration = fit(*rows, fitted_on=fitted_on, shift=shift)
    points = fit_by_compression(*rows, rate[fitted], calibration) if shift else ()
    calibration = calibration.model_copy(update={"by_compression": points})
    score = probability(logit, calibration, rate)
    people = list(range(len(logit))) if person is None else list(person)
    thresholds = {
        f"fpr_{each:g}": everywhere(
            score[~forged],
            each,
            [who for who, is_forged in zip(people, forged, strict=True) if not is_forged],
            names[~forged].tolist(),
        )
        for each in FALSE_POSITIVE_RATES
    }
    # `low` stays below every other threshold: between them a video is inconclusive.
    lowest = min(threshold.score for threshold in thresholds.values())
    _, forgeries = _people(forged, person)
    thresholds["low"] = at_misses(score[forged], MISSED, at_most=lowest, people=forgeries)
    return Calibrated(
        calibration,
        thresholds,
        nll(*rows, Calibration()),
        nll(*rows, calibration, rate[fitted]),
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
    """From a CSV of logits and labels (1 = forged), one row for each track or video.

    It may have the columns bits_per_pixel (empty: not known), person and collection too.
    """
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"logit", "label"} <= rows[0].keys():
        raise CalibrationError(f"{path} should be a CSV with columns logit and label (1 = forged)")
    logit = np.array([float(row["logit"]) for row in rows])
    forged = np.array([row["label"] for row in rows]) == "1"
    rates = [float(row.get("bits_per_pixel") or np.nan) for row in rows]
    return calibrate(
        logit,
        forged,
        fitted_on=fitted_on or path.name,
        shift=shift,
        person=[row["person"] for row in rows] if "person" in rows[0] else None,
        bits_per_pixel=np.array(rates),
        collection=[row["collection"] for row in rows] if "collection" in rows[0] else None,
    )


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
    # A calibration that has met a generator held out could not be judged by it.
    index = index.without_forgeries(never_trained_on(judge.trained))
    families = tuple(families) or families_to_blend(judge, index, split)
    parts: list[Scored] = []
    people: list[Hashable] = []
    for condition in conditions:
        examples = examples_for(judge, index, split, families=families, condition=condition)
        videos = score_examples(judge, examples).pooled(judge.aggregation)
        who = {item.video: item.frame.row.person for item in examples.items}
        parts.append(videos)
        people += [who[video] for video in videos.video]
    every = concatenated(parts)
    found = calibrate(
        every.logit,
        every.forged,
        fitted_on=fitted_on or f"{split}: {','.join(conditions)}",
        shift=shift,
        person=people,
        bits_per_pixel=every.bits_per_pixel,
        collection=[video[0] for video in every.video],
    )
    # As the fit: a collection without forgeries is there for the thresholds alone.
    forged_too = {
        video[0] for video, is_forged in zip(every.video, every.forged, strict=True) if is_forged
    }
    of_fit = np.array([video[0] in forged_too for video in parts[0].video], bool)
    first = parts[0].where(of_fit & ~parts[0].forged)
    return found, probability(first.logit, found.calibration, first.bits_per_pixel)


def families_to_blend(judge: JudgedModel, index: Index, split: str) -> tuple[str, ...]:
    """The families trained on where the split has no forgeries of its own; else none."""
    if len(index.where(split=split, label=1)):
        return ()
    return seen_families(judge.trained)


def probability(
    logit: Floats, calibration: Calibration, bits_per_pixel: Floats | None = None
) -> Floats:
    """P(forged)."""
    score: Floats = expit(_normal(logit, calibration, bits_per_pixel))
    return score


def nll(
    logit: Floats,
    forged: NDArray[np.bool_],
    calibration: Calibration,
    bits_per_pixel: Floats | None = None,
) -> float:
    """Mean negative log likelihood, both classes weighing alike."""
    logit, forged = _checked(logit, forged)
    z = _normal(logit, calibration, bits_per_pixel)
    return float(_loss(z, forged.astype(np.float64), at_even_odds(forged)))


def _normal(logit: Floats, calibration: Calibration, bits_per_pixel: Floats | None) -> Floats:
    """(logit − shift) / temperature of each row, at its own compression where that is known."""
    logit = np.asarray(logit, np.float64)
    found = np.empty(len(logit))
    rates = np.full(len(logit), np.nan) if bits_per_pixel is None else bits_per_pixel
    for rate in np.unique(rates):  # takes all NaN as one value
        own = np.isnan(rates) if np.isnan(rate) else rates == rate
        at = calibration.at(None if np.isnan(rate) else float(rate))
        found[own] = (logit[own] - at.shift) / at.temperature
    return found


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


def fit_by_compression(
    logit: Floats, forged: NDArray[np.bool_], bits_per_pixel: Floats, plain: Calibration
) -> tuple[CompressionPoint, ...]:
    """Temperature and shift at some strengths of compression; none where too little is known.

    Slope and offset of the logit are linear between the knots, in the logarithm of the bits per
    pixel, so this is one logistic regression.
    """
    known = np.isfinite(bits_per_pixel) & (bits_per_pixel > 0)
    logit, forged = logit[known], forged[known]
    if min(int(forged.sum()), int((~forged).sum())) < LEAST_ROWS:
        return ()
    place = np.log(bits_per_pixel[known])
    knots = _apart(np.quantile(place, KNOTS, method="nearest"))
    weights = _even_odds_by_compression(place, forged)
    if len(knots) < 2 or not weights.any():
        return ()
    share = np.stack([np.interp(place, knots, hat) for hat in np.eye(len(knots))], axis=1)
    features = np.concatenate([share * (logit / plain.temperature)[:, None], share], axis=1)
    n, m = int(forged.sum()), int((~forged).sum())
    target = np.where(forged, (n + 1) / (n + 2), 1 / (m + 2))

    def objective(x: Floats) -> tuple[float, Floats]:
        z = features @ x
        return _loss(z, target, weights), features.T @ (weights * (expit(z) - target))

    middle = [1.0] * len(knots) + [-plain.shift / plain.temperature] * len(knots)
    # Where compression leaves nothing to see the slope would fall to 0 or below: a twentieth of
    # the plain one keeps the order of scores.
    bounds = [(0.05, 50.0)] * len(knots) + [(None, None)] * len(knots)
    found = minimize(
        objective, np.array(middle), jac=True, bounds=bounds, method="L-BFGS-B",
        options={"ftol": 1e-15, "gtol": 1e-10, "maxiter": 1000},
    )  # fmt: skip
    slopes, offsets = found.x[: len(knots)] / plain.temperature, found.x[len(knots) :]
    return tuple(
        CompressionPoint(
            bits_per_pixel=float(np.exp(knot)),
            temperature=float(1 / slope),
            shift=float(-offset / slope),
        )
        for knot, slope, offset in zip(knots, slopes, offsets, strict=True)
    )


def _apart(knots: Floats) -> Floats:
    """The knots without those that lie close to the one before."""
    kept = [float(knots[0])]
    kept += [
        float(knot)
        for before, knot in pairwise(knots)
        if knot - kept[-1] >= np.log(LEAST_APART) and knot > before
    ]
    return np.array(kept)


def _even_odds_by_compression(place: Floats, forged: NDArray[np.bool_]) -> Floats:
    """A weight for each row: both classes weigh alike in each narrow range of compression.

    Else, where the reals were compressed more often, compression itself would tell the label.
    """
    ranges = min(12, len(place) // 40)
    number = np.searchsorted(np.quantile(place, np.arange(1, ranges) / ranges), place)
    weights = np.zeros(len(place))
    for each in np.unique(number):
        own = number == each
        # A range of one class alone says nothing about the odds.
        if forged[own].any() and not forged[own].all():
            weights[own] = at_even_odds(forged[own]) * own.mean()
    return weights


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
