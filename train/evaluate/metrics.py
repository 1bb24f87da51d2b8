"""How good scores are: ranking, errors at fixed rates, calibration; by frame and by video.

Every figure is of P(forged) or of the logit, with 1 = forged.  Ranking figures (AUC, EER, AP, TPR
at a rate) depend only on the order of the scores; curves and AP are scikit-learn's.  ECE and
Brier need probabilities; ECE is ours because scikit-learn's bins take no weights.  A video's score
is pooled from its frames by the worker's own rule (worker.scores.level).  A video is identified by
dataset, method, compression and name: `000_003` of two manipulations are two videos.

Intervals are bootstrapped by cluster, not by frame: frames of one video are not independent, and
neither are a face and the forgeries blended from it.  One class alone has no ranking: its figures
are NaN, never 0.5.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, fields

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest
from sklearn.metrics import average_precision_score, roc_curve

from ralf.kernels.manifest import Aggregation, Calibration
from ralf.worker.scores import calibrated, level

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
RATES = (0.001, 0.01, 0.05)
"""False-positive rates at which the true-positive rate is reported."""
UNCALIBRATED = Calibration()
Figure = Callable[[Bools, Floats, Floats], float]


def roc(forged: Bools, score: Floats, weight: Floats | None = None) -> tuple[Floats, Floats]:
    """False and true positive rates at every threshold; NaN where a class is missing.

    Weights count a row several times or, with 0, not at all.
    """
    if not _has_both(forged, weight):
        return np.array([np.nan]), np.array([np.nan])
    # Without its collinear points a curve has the same area, but not the same rates to choose from.
    fpr, tpr, _ = roc_curve(forged, score, sample_weight=weight, drop_intermediate=False)
    return fpr, tpr


def _has_both(forged: Bools, weight: Floats | None) -> bool:
    """scikit-learn warns and gives a figure where one class is missing; we give NaN."""
    counted = forged if weight is None else forged[weight > 0]
    return bool(counted.any() and not counted.all())


def auc(forged: Bools, score: Floats, weight: Floats | None = None) -> float:
    """The chance that a forged one scores above a real one; ties count half.

    A sum over ranks: a bootstrap needs it a thousand times, and building a whole ROC curve by
    scikit-learn for each takes about twenty times as long.
    """
    if not _has_both(forged, weight):
        return float("nan")
    order = np.argsort(score, kind="stable")
    counted = np.ones(len(score)) if weight is None else weight[order]
    # Equal scores are one threshold; each forgery counts half of the reals tied with it.
    last_of_ties = np.flatnonzero(np.diff(score[order], append=np.inf))
    forgeries = np.cumsum(np.where(forged[order], counted, 0.0))[last_of_ties]
    reals = np.cumsum(np.where(forged[order], 0.0, counted))[last_of_ties]
    below = reals - np.diff(reals, prepend=0.0) / 2
    return float(np.diff(forgeries, prepend=0.0) @ below / (forgeries[-1] * reals[-1]))


def eer(forged: Bools, score: Floats, weight: Floats | None = None) -> float:
    """The equal error rate: as many reals are called forged as forgeries are missed.

    Interpolated between the two thresholds around it.
    """
    fpr, tpr = roc(forged, score, weight)
    gap = fpr - (1 - tpr)
    if np.isnan(gap).any():
        return float("nan")
    # The curve ends at (1, 1), where the gap is 1: there always is such a point.
    after = int(np.argmax(gap >= 0))
    if after == 0:
        return float(fpr[0])
    before = after - 1
    share = -gap[before] / (gap[after] - gap[before])
    return float(fpr[before] + share * (fpr[after] - fpr[before]))


def average_precision(forged: Bools, score: Floats, weight: Floats | None = None) -> float:
    """Precision, averaged over the recall that each threshold adds; NaN without forgeries."""
    if not (forged if weight is None else forged[weight > 0]).any():
        return float("nan")
    return float(average_precision_score(forged, score, sample_weight=weight))


def tpr_at(forged: Bools, score: Floats, rate: float, weight: Floats | None = None) -> float:
    """The most forgeries caught by a threshold that calls at most `rate` of the reals forged."""
    fpr, tpr = roc(forged, score, weight)
    # Rates are sums of fractions: one that should equal `rate` may be larger by rounding.
    return float("nan") if np.isnan(fpr).any() else float(tpr[fpr <= rate + 1e-12].max())


def accuracy(forged: Bools, probability: Floats, at: float = 0.5) -> float:
    """The share that a threshold puts on the right side; both classes as frequent as they are."""
    return float(np.mean((probability >= at) == forged)) if len(forged) else float("nan")


def brier(forged: Bools, probability: Floats) -> float:
    """Mean squared distance of the probability from what was true."""
    return float(np.mean((probability - forged) ** 2)) if len(forged) else float("nan")


def reliability(
    forged: Bools, probability: Floats, bins: int = 15, weight: Floats | None = None
) -> tuple[Floats, Floats, Floats]:
    """Mean probability, share forged and weight in each bin of equal width; unweighted: number."""
    weight = np.ones(len(forged)) if weight is None else weight
    # A probability of exactly 1 belongs to the last bin.
    place = np.clip((probability * bins).astype(int), 0, bins - 1)
    number: Floats = np.bincount(place, weight, bins).astype(np.float64)
    with np.errstate(invalid="ignore"):
        said = np.bincount(place, weight * probability, bins) / number
        true = np.bincount(place, weight * forged, bins) / number
    return said, true, number


def ece(forged: Bools, probability: Floats, bins: int = 15, weight: Floats | None = None) -> float:
    """Expected calibration error: how far the stated and the true share differ, weighted by bin."""
    if not len(forged):
        return float("nan")
    said, true, number = reliability(forged, probability, bins, weight)
    filled = number > 0
    return float(np.sum(np.abs(said - true)[filled] * number[filled]) / number.sum())


def ece_by_chance(
    probability: Floats, bins: int = 15, *, weight: Floats | None = None, replicates: int = 200
) -> float:
    """The calibration error that chance alone gives such rows, were every probability true.

    A row of double weight is no more evidence than one row.  So rows are drawn by weight, and as
    many of them as the weights are worth (the effective sample size).
    """
    rng = np.random.default_rng(0)
    said = np.broadcast_to(probability, (replicates, len(probability)))
    if weight is not None:
        share = weight / weight.sum()
        worth = round(1 / float(share @ share))
        said = probability[rng.choice(len(probability), (replicates, worth), p=share)]
    drawn = rng.random(said.shape) < said
    return float(np.mean([ece(*one, bins) for one in zip(drawn, said, strict=True)]))


def at_even_odds(forged: Bools) -> Floats:
    """A weight for each row, so that all reals together weigh as much as all forgeries."""
    weight: Floats = np.where(forged, 0.5 / max(1, forged.sum()), 0.5 / max(1, (~forged).sum()))
    return weight


@dataclass(frozen=True, eq=False)
class Scored:
    """Scores of faces or videos, one row each, with what is known of them."""

    logit: Floats
    forged: Bools
    video: tuple[tuple[str, str, str, str], ...]
    """Dataset, method, compression, name."""
    cluster: tuple[Hashable, ...]
    """What is drawn together in a bootstrap."""
    bits_per_pixel: Floats = field(default_factory=lambda: np.zeros(0))
    """How strongly its video is compressed; NaN, and where none are given, not known."""

    def __post_init__(self) -> None:
        if not len(self.bits_per_pixel):
            # The dataclass is frozen for its users; it is still being made here.
            object.__setattr__(self, "bits_per_pixel", np.full(len(self.logit), np.nan))
        lengths = {len(getattr(self, field.name)) for field in fields(self)}
        if len(lengths) != 1:
            raise ValueError(f"scores, labels, videos and clusters differ in number: {lengths}")
        if not np.isfinite(self.logit).all():
            raise ValueError("a logit is NaN or infinite: the network diverged")

    def __len__(self) -> int:
        return len(self.logit)

    def where(self, kept: Bools) -> "Scored":
        """The rows that are kept."""
        rows = np.flatnonzero(kept)
        return Scored(
            self.logit[rows],
            self.forged[rows],
            tuple(self.video[row] for row in rows),
            tuple(self.cluster[row] for row in rows),
            self.bits_per_pixel[rows],
        )

    def probability(self, calibration: Calibration) -> Floats:
        """P(forged) of each row as it is served: calibrated at its own compression."""
        found = np.empty(len(self))
        # np.unique takes all NaN as one value.
        rates, member = np.unique(self.bits_per_pixel, return_inverse=True)
        for number, rate in enumerate(rates):
            own = member == number
            at = calibration.at(None if np.isnan(rate) else float(rate))
            found[own] = calibrated(self.logit[own], at)
        return found

    @property
    def methods(self) -> tuple[str, ...]:
        """Ways of forging that occur."""
        found = {v[1] for v, forged in zip(self.video, self.forged, strict=True) if forged}
        return tuple(sorted(found))

    def against_all_reals(self, method: str) -> "Scored":
        """One way of forging together with every real face."""
        own = np.array([video[1] == method for video in self.video], bool)
        return self.where(own | ~self.forged)

    def pooled(self, aggregation: Aggregation) -> "Scored":
        """One row for each video, its score pooled by the worker's rule."""
        rows: dict[tuple[str, str, str, str], list[int]] = {}
        for row, video in enumerate(self.video):
            rows.setdefault(video, []).append(row)
        for video, own in rows.items():
            if len(set(self.forged[own].tolist())) > 1:
                raise ValueError(f"video {video} is called both real and forged")
        return Scored(
            np.array([level(self.logit[own], aggregation) for own in rows.values()]),
            np.array([self.forged[own[0]] for own in rows.values()], bool),
            tuple(rows),
            tuple(self.cluster[own[0]] for own in rows.values()),
            np.array([self.bits_per_pixel[own[0]] for own in rows.values()]),
        )


def concatenated(parts: Sequence[Scored]) -> Scored:
    """All their rows, one after another."""
    return Scored(
        np.concatenate([part.logit for part in parts]),
        np.concatenate([part.forged for part in parts]),
        tuple(video for part in parts for video in part.video),
        tuple(cluster for part in parts for cluster in part.cluster),
        np.concatenate([part.bits_per_pixel for part in parts]),
    )


@dataclass(frozen=True)
class Metrics:
    """The figures of one table row."""

    real: int
    forged: int
    auc: float
    auc_low: float
    auc_high: float
    eer: float
    ap: float
    accuracy: float
    tpr_at_fpr: tuple[float, ...]
    """At each of RATES."""
    ece: float
    brier: float


def measure(
    scored: Scored,
    calibration: Calibration = UNCALIBRATED,
    *,
    replicates: int = 1000,
    threshold: float = 0.5,
) -> Metrics:
    """Every figure, and the 95 % interval of the AUC."""
    forged, logit = scored.forged, scored.logit
    probability = scored.probability(calibration)
    low, high = bootstrap_interval(scored, auc, replicates=replicates)
    return Metrics(
        real=int((~forged).sum()),
        forged=int(forged.sum()),
        auc=auc(forged, logit),
        auc_low=low,
        auc_high=high,
        eer=eer(forged, logit),
        ap=average_precision(forged, logit),
        accuracy=accuracy(forged, probability, threshold),
        tpr_at_fpr=tuple(tpr_at(forged, logit, rate) for rate in RATES),
        ece=ece(forged, probability),
        brier=brier(forged, probability),
    )


def bootstrap_interval(
    scored: Scored, figure: Figure, *, replicates: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """The middle 95 % of a figure over samples of clusters; NaN with one class or one cluster."""
    found = [
        figure(scored.forged, scored.logit, weight)
        for weight in bootstrap_weights(scored, replicates, seed)
    ]
    return middle_95(found)


def paired_bootstrap_interval(
    one: Scored, other: Scored, figure: Figure, *, replicates: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """The middle 95 % of the difference of a figure between two models on the same rows.

    Both models get the same samples.  Faces that are hard for all models then do not widen the
    interval of their difference.
    """
    if one.video != other.video or one.cluster != other.cluster:
        raise ValueError("two models can be paired only on the same faces in the same order")
    found = [
        figure(one.forged, one.logit, weight) - figure(other.forged, other.logit, weight)
        for weight in bootstrap_weights(one, replicates, seed)
    ]
    return middle_95(found)


def bootstrap_weights(scored: Scored, replicates: int, seed: int) -> Iterator[Floats]:
    """How often each row is drawn in each sample; no samples with one class or one cluster."""
    _, member = np.unique(_numbered(scored.cluster), return_inverse=True)
    clusters = int(member.max()) + 1 if len(scored) else 0
    if clusters < 2 or scored.forged.all() or not scored.forged.any():
        return
    rng = np.random.default_rng(seed)
    for _ in range(replicates):
        # Rows are weighted, not copied: a row drawn twice has weight 2, one not drawn has 0.
        times = np.bincount(rng.integers(0, clusters, clusters), minlength=clusters)
        weight = times[member].astype(np.float64)
        # A sample without one of the classes has no ranking; 0.5 would pull the interval there.
        if weight[scored.forged].any() and weight[~scored.forged].any():
            yield weight


def share_interval(events: int, of: int, confidence: float = 0.95) -> tuple[float, float]:
    """Clopper and Pearson's interval of a share: `events` of `of` independent trials."""
    span = binomtest(events, of).proportion_ci(confidence, method="exact")
    return float(span.low), float(span.high)


def middle_95(found: Sequence[float]) -> tuple[float, float]:
    """The 2.5 % and 97.5 % quantiles; NaN of nothing."""
    if not found:
        return float("nan"), float("nan")
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def _numbered(names: Sequence[Hashable]) -> NDArray[np.int64]:
    # np.unique alone would take tuples for rows of an array, and cannot sort names of mixed types.
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in names], np.int64)
