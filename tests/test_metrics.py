"""Figures against their definitions and scikit-learn, and mistakes that other evaluations make."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta
from sklearn.calibration import calibration_curve
from sklearn.metrics import (
    accuracy_score,
    brier_score_loss,
    roc_auc_score,
    roc_curve,
)

from ralf.kernels.manifest import Aggregation, Calibration
from ralf.train.evaluate.metrics import (
    RATES,
    Scored,
    accuracy,
    at_even_odds,
    auc,
    average_precision,
    bootstrap_interval,
    brier,
    ece,
    ece_by_chance,
    eer,
    measure,
    reliability,
    share_interval,
    tpr_at,
)

rows = st.lists(
    st.tuples(st.booleans(), st.sampled_from([0.0, 0.1, 0.2, 0.25, 0.5, 0.7, 0.9, 1.0]),
              st.integers(1, 3)),
    min_size=4, max_size=60,
).filter(lambda found: 0 < sum(row[0] for row in found) < len(found))  # fmt: skip


def arrays(found) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    forged, score, weight = zip(*found, strict=True)
    return np.array(forged), np.array(score), np.array(weight, float)


def auc_by_pairs(forged, score, weight) -> float:
    """Every forged row against every real one: who scores higher; ties count half."""
    above = np.sign(score[forged][:, None] - score[~forged][None]) / 2 + 0.5
    both = weight[forged][:, None] * weight[~forged][None]
    return float((above * both).sum() / both.sum())


def precision_by_threshold(forged, score, weight) -> float:
    """Precision at each threshold, weighed by the recall that the threshold adds."""
    total, before = 0.0, 0.0
    for threshold in sorted(set(score), reverse=True):
        called = score >= threshold
        if not weight[called].sum():
            continue
        recall = weight[called & forged].sum() / weight[forged].sum()
        total += (recall - before) * weight[called & forged].sum() / weight[called].sum()
        before = recall
    return total


@pytest.mark.parametrize("seed", range(20))
def test_auc_is_scikit_learns_with_ties_and_weights(seed: int):
    """Rows of weight 0 do not count; equal scores count half."""
    rng = np.random.default_rng(seed)
    forged = np.array([True, False, *(rng.random(60) < 0.4)])
    score = rng.integers(0, 12, 62) / 4 + forged
    weight = np.array([1.0, 1.0, *rng.integers(0, 4, 60)])

    assert auc(forged, score) == pytest.approx(roc_auc_score(forged, score), abs=1e-12)
    assert auc(forged, score, weight) == pytest.approx(
        roc_auc_score(forged, score, sample_weight=weight), abs=1e-12
    )


@given(rows)
def test_ranking_is_that_of_the_definitions(found):
    """AUC and AP, with ties and with weights, by loops that share no code with them."""
    forged, score, weight = arrays(found)
    ones = np.ones(len(score))

    assert pytest.approx(auc_by_pairs(forged, score, ones), abs=1e-12) == auc(forged, score)
    assert pytest.approx(auc_by_pairs(forged, score, weight), abs=1e-12) == auc(
        forged, score, weight
    )
    assert pytest.approx(precision_by_threshold(forged, score, ones), abs=1e-12) == (
        average_precision(forged, score)
    )
    assert pytest.approx(precision_by_threshold(forged, score, weight), abs=1e-12) == (
        average_precision(forged, score, weight)
    )


@given(rows)
def test_rates_are_scikit_learns(found):
    """The best rate at or under each false-positive rate, and where both errors meet."""
    forged, score, _ = arrays(found)
    fpr, tpr, _ = roc_curve(forged, score, drop_intermediate=False)

    for rate in (*RATES, 0.3):
        assert pytest.approx(tpr[fpr <= rate].max()) == tpr_at(forged, score, rate)
    fine = np.linspace(0, 1, 20001)
    missed = 1 - np.interp(fine, fpr, tpr)
    met = fine[np.argmin(np.abs(missed - fine))]
    crossing = eer(forged, score)
    # Upright parts of the ROC jump over the meeting point: then any height of the jump is right.
    assert abs(crossing - met) < 1e-3 or _on_a_jump(fpr, tpr, crossing)


def _on_a_jump(fpr, tpr, value: float) -> bool:
    at = np.isclose(fpr, value, atol=1e-3)
    return bool(at.any() and (1 - tpr[at]).min() - 1e-3 <= value <= (1 - tpr[at]).max() + 1e-3)


@given(rows)
def test_probabilities_are_scored_as_scikit_learn_does(found):
    """Accuracy, Brier, and the bins of the reliability diagram."""
    forged, score, _ = arrays(found)
    inside = 0.05 + 0.9 * score  # a score on a bin's edge belongs to either
    true, said = calibration_curve(forged, inside, n_bins=10)
    ours_said, ours_true, number = reliability(forged, inside, 10)
    filled = number > 0

    assert pytest.approx(accuracy_score(forged, score >= 0.5)) == accuracy(forged, score)
    assert pytest.approx(brier_score_loss(forged, score)) == brier(forged, score)
    assert number.sum() == len(forged)
    np.testing.assert_allclose(ours_said[filled], said)
    np.testing.assert_allclose(ours_true[filled], true)


def test_calibration_error_by_hand():
    """Ten said 0.9 of which six are forged: 0.3 apart."""
    forged = np.array([True] * 6 + [False] * 4)

    assert pytest.approx(0.3) == ece(forged, np.full(10, 0.9))
    assert ece(np.array([True, False]), np.array([1.0, 0.0])) == 0


def test_true_probabilities_show_the_error_that_chance_makes():
    """Few rows show much of it; overconfidence shows more than chance explains."""
    rng = np.random.default_rng(0)
    said = rng.uniform(0, 1, 100)
    found = [ece(rng.random(100) < said, said) for _ in range(100)]

    assert ece_by_chance(said) == pytest.approx(np.mean(found), rel=0.1)
    assert ece_by_chance(np.tile(said, 16)) == pytest.approx(np.mean(found) / 4, rel=0.15)
    assert ece_by_chance(np.array([0.0, 1.0, 1.0])) == 0
    assert ece(rng.random(100) < 0.5, np.round(said)) > 2 * ece_by_chance(said)


def test_few_rows_that_weigh_much_show_the_chance_of_few():
    """A hundred rows of which ten carry nearly everything err like ten."""
    said = np.random.default_rng(0).uniform(0, 1, 100)
    heavy = np.where(np.arange(100) < 10, 1.0, 1e-4)

    assert ece_by_chance(said, weight=np.ones(100)) == pytest.approx(ece_by_chance(said), rel=0.1)
    assert ece_by_chance(said, weight=heavy) == pytest.approx(ece_by_chance(said[:10]), rel=0.25)


def test_weighing_a_row_twice_is_seeing_it_twice():
    """Even odds of three forgeries to a real: the real weighs as much as all three."""
    forged = np.array([True, True, True, False])
    score = np.array([0.9, 0.7, 0.4, 0.3])
    weight = at_even_odds(forged)

    np.testing.assert_allclose(weight, [1 / 6, 1 / 6, 1 / 6, 1 / 2])
    rows = [0, 1, 2, 3, 3, 3]
    assert pytest.approx(ece(forged[rows], score[rows])) == ece(forged, score, weight=weight)


def test_perfect_and_useless_scores():
    """All right is 1 and 0; ties throughout are chance, not luck."""
    forged = np.array([True] * 5 + [False] * 5)
    right = forged.astype(float)

    assert (
        auc(forged, right), eer(forged, right), average_precision(forged, right),
        tpr_at(forged, right, 0.001),
    ) == (1, 0, 1, 1)  # fmt: skip
    assert (
        auc(forged, right * 0), eer(forged, right * 0), tpr_at(forged, right * 0, 0.05),
    ) == (0.5, 0.5, 0)  # fmt: skip


def test_one_class_alone_has_no_ranking():
    """NaN, never 0.5."""
    forged = np.ones(5, bool)
    found = (figure(forged, np.arange(5.0)) for figure in (auc, eer))

    assert all(np.isnan(value) for value in found)
    assert np.isnan(tpr_at(forged, np.arange(5.0), 0.1))


def scored(logit, forged, videos=None, clusters=None) -> Scored:
    videos = videos or [("d", "m" if f else "real", "", str(n)) for n, f in enumerate(forged)]
    return Scored(
        np.array(logit, float), np.array(forged, bool), tuple(videos),
        tuple(clusters or range(len(logit))),
    )  # fmt: skip


def test_videos_of_two_manipulations_are_two_videos():
    """DeepfakeBench keys by folder name and merges them; so would a key without compression."""
    keys = [("ff", "DF", "c23", "000_003"), ("ff", "F2F", "c23", "000_003")]
    keys += [("ff", "DF", "c40", "000_003"), ("ff", "DF", "c23", "000_003")]
    pooled = scored([1, 2, 3, 5], [True] * 4, keys).pooled(Aggregation(track="mean"))

    assert pooled.logit.tolist() == [3, 2, 3]


def test_a_video_is_pooled_by_the_workers_rule():
    """The top half by default."""
    keys = [("d", "m", "", "v")] * 4
    pooled = scored([0, 1, 2, 4], [True] * 4, keys).pooled(Aggregation())

    assert pooled.logit.tolist() == [3.0]


def test_a_video_called_both_is_refused():
    """Its label would be whichever frame came first."""
    with pytest.raises(ValueError, match="both real and forged"):
        scored([0, 1], [True, False], [("d", "m", "", "v")] * 2).pooled(Aggregation())


def test_a_method_is_judged_against_all_reals():
    """Not against the reals of its own folder."""
    keys = [("d", "real", "", "1"), ("d", "DF", "", "1"), ("d", "FS", "", "1")]
    found = scored([0, 1, 2], [False, True, True], keys)

    assert found.methods == ("DF", "FS")
    assert found.against_all_reals("FS").logit.tolist() == [0, 2]


def test_diverged_scores_are_refused():
    """A NaN would sort somewhere and look like a figure."""
    with pytest.raises(ValueError, match="diverged"):
        scored([0, float("nan")], [False, True])


def test_intervals_are_wider_by_video_than_by_frame():
    """Twenty frames of a video are hardly more evidence than one."""
    rng = np.random.default_rng(0)
    videos = np.repeat(np.arange(20), 20)
    forged = videos % 2 == 1
    logit = forged + rng.normal(0, 1.5, 20)[videos] + rng.normal(0, 0.1, 400)
    by_video = bootstrap_interval(scored(logit, forged, None, videos.tolist()), auc, replicates=300)
    by_frame = bootstrap_interval(scored(logit, forged), auc, replicates=300)
    inside = auc(forged, logit)

    assert by_video[0] < inside < by_video[1]
    assert by_video[1] - by_video[0] > 2 * (by_frame[1] - by_frame[0])


@settings(max_examples=5)
@given(st.integers(0, 100))
def test_an_interval_covers_the_truth(seed):
    """For two normals a unit apart the AUC is 0.76."""
    rng = np.random.default_rng(seed)
    forged = np.arange(400) % 2 == 1
    low, high = bootstrap_interval(scored(rng.normal(forged, 1), forged), auc, replicates=200)

    assert low - 0.03 < 0.7602 < high + 0.03


def test_measure_uses_the_calibration():
    """Ranking stays; probabilities move."""
    found = scored([-4, -2, 2, 4], [False, False, True, True])
    plain = measure(found, replicates=10)
    shifted = measure(found, Calibration(shift=3), replicates=10)

    assert (plain.auc, shifted.auc, plain.accuracy, shifted.accuracy) == (1, 1, 1, 0.75)
    assert plain.brier < shifted.brier and (plain.real, plain.forged) == (2, 2)


@pytest.mark.parametrize(("events", "of"), [(0, 20), (3, 40), (20, 20), (6, 121), (1, 2000)])
def test_the_interval_of_a_share_is_clopper_and_pearsons(events: int, of: int):
    """By the quantiles of the beta distribution, as the two defined it."""
    low = 0.0 if events == 0 else beta.ppf(0.025, events, of - events + 1)
    high = 1.0 if events == of else beta.ppf(0.975, events + 1, of - events)

    assert share_interval(events, of) == pytest.approx((low, high), abs=1e-12)
