"""What a score means: temperature and shift by likelihood, thresholds by false alarms.

A logit becomes P(forged) = sigmoid((logit − shift) / temperature), fitted on a split that chose
nothing else, with both classes weighing alike (a score then speaks at even odds, whatever the
split's share of forgeries).  Targets are Platt's, (n + 1) / (n + 2) in place of 1, so that a
hundred faces, perfectly parted, do not make certainty.

A threshold is for scores at or above it.  `fpr_0.05` is where at most 5 % of the reals seen
are called forged; beside it stand the rate found, its 95 % interval (Clopper–Pearson), and whether
the split is large enough to support it: five expected false alarms, the least at which that
interval means anything.  `low` is the score below which 5 % of the forgeries seen fall: below it
a video is called authentic, between the two nothing is.

It refuses one class alone, logits that are not finite, and scores that rank the wrong way round.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit

from ralf.kernels.manifest import Calibration
from ralf.train.evaluate.metrics import at_even_odds, share_interval

Floats = NDArray[np.float64]
FPRS = (0.01, 0.05)
MISSED = 0.05
"""Share of forgeries that the band `low` gives up."""
EXPECTED = 5.0


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
    supported: bool


@dataclass(frozen=True)
class Calibrated:
    """All that calibrating found."""

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
    """What `facts` tell, whole again."""
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
    times: int = 1,
) -> Calibrated:
    """Calibration and thresholds from the scores of one split.

    `times`: how often each video stands there, once under every condition.  The same video seen
    again is no new evidence: intervals and support count it once.
    """
    calibration = fit(logit, forged, fitted_on=fitted_on, shift=shift)
    score = probability(logit, calibration)
    forged = np.asarray(forged, bool)
    thresholds = {f"fpr_{rate:g}": at_false_alarms(score[~forged], rate, times) for rate in FPRS}
    lowest = min(threshold.score for threshold in thresholds.values())
    thresholds["low"] = at_misses(score[forged], MISSED, at_most=lowest, times=times)
    plain = Calibration()
    return Calibrated(
        calibration, thresholds, nll(logit, forged, plain), nll(logit, forged, calibration)
    )


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
    """Temperature, and shift unless told not to, of the greatest likelihood."""
    logit, forged = _checked(logit, forged)
    weights = at_even_odds(forged) if balanced else np.full(len(forged), 1 / len(forged))
    n, m = int(forged.sum()), int((~forged).sum())
    high, low = ((n + 1) / (n + 2), 1 / (m + 2)) if smooth else (1.0, 0.0)
    target = np.where(forged, high, low)
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
    if slope <= 0:
        raise CalibrationError(
            f"higher scores should mean forged, but the fitted slope is {slope:.3g}: the labels "
            "are the wrong way round, or the model knows nothing"
        )
    offset = float(found.x[1]) if shift else 0.0
    return Calibration(temperature=1 / slope, shift=-offset / slope, fitted_on=fitted_on)


def at_false_alarms(real: Floats, rate: float, times: int = 1) -> Threshold:
    """The lowest score at or above which at most `rate` of the reals lie, half-way to the next."""
    ordered = np.sort(np.asarray(real, np.float64))[::-1]
    allowed = int(np.floor(rate * len(ordered) + 1e-9))
    # ordered[allowed] must fall below; equal scores fall with it.
    barred = ordered[allowed] if allowed < len(ordered) else -np.inf
    above = int((ordered > barred).sum())
    next_up = ordered[above - 1] if above else 1.0
    score = 0.0 if np.isneginf(barred) else _between(float(barred), float(next_up))
    alarms = int((ordered >= score).sum())
    return _threshold(score, alarms, len(ordered), rate, times)


def at_misses(forged: Floats, rate: float, *, at_most: float = 1.0, times: int = 1) -> Threshold:
    """The highest score, not above `at_most`, below which at most `rate` of forgeries lie."""
    ordered = np.sort(np.asarray(forged, np.float64))
    allowed = int(np.floor(rate * len(ordered) + 1e-9))
    score = min(float(ordered[min(allowed, len(ordered) - 1)]), at_most)
    return _threshold(score, int((ordered < score).sum()), len(ordered), rate, times)


def _threshold(score: float, events: int, of: int, rate: float, times: int) -> Threshold:
    faces = of // times
    span = share_interval(min(round(events / times), faces), faces)
    return Threshold(score, events / of, span, faces, faces * rate >= EXPECTED)


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
