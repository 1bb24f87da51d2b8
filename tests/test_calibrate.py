"""Calibration against scikit-learn and by hand; thresholds by their definition."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression

from ralf.kernels.manifest import Calibration, InputContract
from ralf.train import calibrate as calibrate_module
from ralf.train.calibrate import (
    CalibrationError,
    at_false_positives,
    at_misses,
    calibrate,
    calibrate_on_split,
    fit,
    nll,
    probability,
)
from ralf.train.data.index import Index, Row
from ralf.train.data.pool import Pool
from ralf.train.evaluate.judge import JudgedModel, score_examples
from ralf.train.evaluate.metrics import share_interval
from tests.faces_on_disk import faces


def made(n: int, m: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """n forged and m real logits that overlap."""
    rng = np.random.default_rng(seed)
    scores = np.concatenate([rng.normal(2.0, 1.5, n), rng.normal(-1.0, 1.5, m)])
    return scores, np.arange(n + m) < n


@pytest.mark.parametrize("balanced", [True, False])
def test_the_fit_is_scikit_learns_logistic_regression(balanced: bool):
    """Without smoothing, slope and intercept are the maximum likelihood's."""
    scores, forged = made(300, 700)

    found = fit(scores, forged, fitted_on="x", smooth=False, balanced=balanced)

    theirs = LogisticRegression(
        C=np.inf, class_weight="balanced" if balanced else None, tol=1e-10, max_iter=10_000
    ).fit(scores[:, None], forged)
    assert 1 / found.temperature == pytest.approx(theirs.coef_[0, 0], rel=1e-4)
    assert -found.shift / found.temperature == pytest.approx(theirs.intercept_[0], abs=1e-4)


def test_the_temperature_alone_is_found_too():
    """Scores three times too sure need a temperature of three, and no shift."""
    rng = np.random.default_rng(1)
    true = rng.normal(0, 2, 200_000)
    forged = rng.random(200_000) < expit(true)

    found = fit(3 * true, forged, fitted_on="x", shift=False, smooth=False, balanced=False)

    assert found.temperature == pytest.approx(3, rel=0.02)
    assert found.shift == 0


def test_the_temperature_by_hand():
    """Logits ±1, three in four right: the likelihood is greatest at P = 3/4, T = 1/ln 3."""
    scores = np.array([1.0, 1, 1, -1, -1, -1, -1, 1])
    forged = np.arange(8) < 4

    found = fit(scores, forged, fitted_on="x", shift=False, smooth=False)

    assert found.temperature == pytest.approx(1 / np.log(3), rel=1e-5)


def test_platts_targets_keep_parted_scores_modest():
    """Ten faces, all right: P is 6/7 and not 1."""
    scores = np.array([1.0] * 5 + [-1.0] * 5)

    found = fit(scores, np.arange(10) < 5, fitted_on="x")

    assert probability(np.array([1.0]), found)[0] == pytest.approx(6 / 7, rel=1e-4)


@given(seed=st.integers(0, 50), scale=st.floats(0.1, 20), move=st.floats(-10, 10))
def test_calibrated_scores_do_not_depend_on_the_logits_own_scale(
    seed: int, scale: float, move: float
):
    """A network that says the same in other units ends with the same scores."""
    scores, forged = made(40, 60, seed)

    one = probability(scores, fit(scores, forged, fitted_on="x"))
    units = scores * scale + move
    other = probability(units, fit(units, forged, fitted_on="x"))

    np.testing.assert_allclose(other, one, atol=1e-4)


def test_calibrating_lowers_the_likelihoods_loss_and_says_so():
    """Before and after, on the same faces."""
    scores, forged = made(200, 200)

    found = calibrate(5 * scores, forged, fitted_on="val")

    assert found.nll_after < found.nll_before
    assert found.nll_before == pytest.approx(nll(5 * scores, forged, Calibration()))
    assert found.calibration.fitted_on == "val"
    assert {"fpr_0.01", "fpr_0.05", "low"} == found.scores().keys()
    assert found.facts()["thresholds"]["fpr_0.05"]["faces"] == 200


def test_the_threshold_by_hand():
    """Of 40 reals two may be called forged: between the second and the third highest."""
    real = np.arange(40) / 100

    found = at_false_positives(real, 0.05)

    assert found.score == pytest.approx((0.37 + 0.38) / 2)
    assert (found.rate, found.faces) == (0.05, 40)


def test_with_too_few_reals_none_may_pass():
    """1 % of 50 is less than one face: above the highest, half-way to 1."""
    found = at_false_positives(np.linspace(0, 0.6, 50), 0.01)

    assert found.score == pytest.approx(0.8)
    assert (found.rate, found.supported) == (0.0, False)
    assert found.interval[1] == pytest.approx(1 - 0.025 ** (1 / 50))


def test_five_expected_alarms_support_a_threshold():
    """121 reals support 5 % and not 1 %; 500 support 1 %."""
    some, many = np.random.default_rng(0).random(121), np.random.default_rng(0).random(500)

    assert [at_false_positives(some, rate).supported for rate in (0.05, 0.01)] == [True, False]
    assert at_false_positives(many, 0.01).supported


def test_the_same_faces_under_three_conditions_are_no_new_evidence():
    """Scores count three times, the interval and its support once."""
    scores, forged = made(60, 60, seed=2)
    once = calibrate(scores, forged, fitted_on="x")
    thrice = np.tile(scores, 3), np.tile(forged, 3)

    found = calibrate(*thrice, fitted_on="x", person=[*range(120)] * 3)

    for name, threshold in found.thresholds.items():
        assert (threshold.faces, threshold.supported) == (60, False), name
        assert threshold.interval == pytest.approx(once.thresholds[name].interval), name
    assert calibrate(*thrice, fitted_on="x").thresholds["fpr_0.05"].supported


def test_people_are_counted_apart_in_reals_and_forgeries():
    """120 people once real and forged in nine ways: 120 forged people, not 1080."""
    scores, forged = made(1080, 120, seed=3)
    person = [number % 120 for number in range(1080)] + [*range(120)]

    found = calibrate(scores, forged, fitted_on="x", person=person).thresholds

    assert {120} == {each.faces for each in found.values()}
    assert (found["fpr_0.05"].supported, found["fpr_0.01"].supported) == (True, False)
    low = found["low"]
    assert low.interval == pytest.approx(share_interval(round(low.rate * 120), 120))


def test_a_number_of_videos_that_people_do_not_divide_counts_people():
    """Ten reals of six people are six, where dividing and rounding down says ten."""
    scores, forged = made(10, 10, seed=5)
    person = [0, 1, 2, 3, 4, 5, 0, 1, 2, 3] * 2

    found = calibrate(scores, forged, fitted_on="x", person=person).thresholds

    assert {6} == {each.faces for each in found.values()}
    assert found["fpr_0.05"].interval[1] == pytest.approx(1 - 0.025 ** (1 / 6))


def test_a_split_is_calibrated_by_people_whatever_videos_compressions_and_conditions(
    tmp_path: Path,
):
    """Six real videos of four people and three forged ones of two, each under two conditions."""
    index = split_of(
        tmp_path,
        ("real", "ann", "v0", ""), ("real", "ann", "v1", ""), ("real", "bob", "v2", ""),
        ("real", "cat", "v3", ""), ("real", "", "v4", "c23"), ("real", "", "v4", "c40"),
        ("swap", "ann", "f0", ""), ("mouth", "ann", "f1", ""), ("swap", "bob", "f2", ""),
    )  # fmt: skip

    found, reals = calibrate_on_split(
        by_brightness(), index, "val", conditions=("clean", "jpeg=95", "clean")
    )

    assert "val: clean,jpeg=95" == found.calibration.fitted_on
    people = {name: each.faces for name, each in found.thresholds.items()}
    assert {"fpr_0.01": 4, "fpr_0.05": 4, "low": 2} == people
    assert 6 == len(reals)
    assert (reals < found.thresholds["fpr_0.05"].score).all()


def split_of(root: Path, *videos: tuple[str, str, str, str]) -> Index:
    """Pictures by method, person, video and compression; forged ones are brighter."""
    rows = []
    for number, (method, person, video, compression) in enumerate(videos):
        forged = method != "real"
        level = (180 if forged else 60) + 3 * number
        path = f"{method}_{video}_{compression}.png"
        Image.fromarray(np.full((32, 32, 3), level, np.uint8)).save(root / path)
        rows.append(
            Row(
                dataset="made",
                method=method,
                compression=compression,
                split="val",
                video=video,
                target=person and f"made:{person}",
                label=int(forged),
                path=path,
                kind="image",
            )
        )
    return Index(root, tuple(rows))


def by_brightness(size: int = 32) -> JudgedModel:
    """Calls bright pictures forged."""
    return JudgedModel(
        name="brightness",
        score=lambda crops: (crops.float().mean((1, 2, 3)) - 120) / 20,
        input=InputContract(size=size),
    )


def test_every_family_forges_every_frame_of_a_video(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Two families in turn would make two videos of one frame each, beside a real one of two."""
    index = faces(tmp_path / "d", val=2).where(split="val")
    index = replace(
        index, rows=tuple(replace(row, video="v", target="d:ann", frame=n)
                          for n, row in enumerate(index)),
    )  # fmt: skip
    pooled = []
    monkeypatch.setattr(
        calibrate_module,
        "score_examples",
        lambda *asked: pooled.append(score_examples(*asked)) or pooled[-1],
    )
    monkeypatch.setattr(Pool, "forgery", lambda self, frame, image, *_: 255 - image // 8)

    found, _ = calibrate_on_split(by_brightness(64), index, "val", families=("self_blend", "mouth"))

    frames = Counter(video[1] for video in pooled[0].video)
    assert {"real": 2, "self_blend": 2, "mouth": 2} == frames
    assert {1} == {each.faces for each in found.thresholds.values()}


@given(
    real=st.lists(st.integers(0, 30), min_size=1, max_size=120),
    rate=st.sampled_from([0.0, 0.01, 0.05, 0.2, 1.0]),
)
def test_a_threshold_keeps_its_rate_and_could_not_be_lower(real: list[int], rate: float):
    """Ties and all: the next real score below would let too many pass."""
    scores = np.array(real) / 31

    found = at_false_positives(scores, rate)

    assert 0 <= found.score <= 1
    assert (scores >= found.score).mean() <= rate + 1e-12
    assert found.rate == (scores >= found.score).mean()
    below = scores[scores < found.score]
    if len(below):
        assert (scores >= below.max()).mean() > rate


@given(
    forged=st.lists(st.integers(0, 30), min_size=1, max_size=120),
    at_most=st.floats(0, 1),
)
def test_the_low_band_gives_up_no_more_than_its_share(forged: list[int], at_most: float):
    """And never reaches above the threshold."""
    scores = np.array(forged) / 31

    found = at_misses(scores, 0.05, at_most=at_most)

    assert (scores < found.score).mean() <= 0.05
    assert found.score <= at_most


def test_scores_that_saturate_still_make_a_threshold():
    """A real face at exactly 1 bars every score; the rate found says that it was not held."""
    found = at_false_positives(np.array([1.0, 1.0, 0.2]), 0.1)

    assert found.score == 1.0
    assert found.rate == pytest.approx(2 / 3)


def test_thresholds_hold_on_the_score_that_is_served():
    """Worker's formula, same threshold, same decisions."""
    scores, forged = made(300, 300, seed=4)
    found = calibrate(scores, forged, fitted_on="val")
    at = found.thresholds["fpr_0.05"]

    by_logit = found.calibration.shift + found.calibration.temperature * logit(at.score)

    assert at.rate == np.mean(scores[~forged] >= by_logit) == 0.05


@pytest.mark.parametrize(
    ("scores", "forged", "said"),
    [
        ([1.0, 2.0], [True, True], "real and forged"),
        ([1.0, np.nan], [True, False], "not finite"),
        ([-1.0, 1.0, -2.0, 2.0], [True, False, True, False], "wrong way round"),
        ([1.0], [True, False], "as many logits as labels"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(scores: list[float], forged: list[bool], said: str):
    """With its reason."""
    with pytest.raises(CalibrationError, match=said):
        calibrate(np.array(scores), np.array(forged), fitted_on="x")
