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

from ralf.kernels.manifest import Calibration, CompressionPoint, InputContract, Manifest
from ralf.train.data.index import Index, Row
from ralf.train.data.pool import Pool
from ralf.train.evaluate.judge import JudgedModel, score_examples
from ralf.train.evaluate.metrics import at_even_odds, ece, share_interval
from ralf.train.publish import calibrate as calibrate_module
from ralf.train.publish.calibrate import (
    CalibrationError,
    calibrate,
    calibrate_on_split,
    fit,
    nll,
    probability,
)
from ralf.train.publish.thresholds import SMALL, at_false_positives, at_misses
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
    monkeypatch.setattr(Pool, "forgery", lambda self, frame, image, *_: (255 - image // 8, None))

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


def compressed(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """n forged and n real logits and their bits per pixel: the fewer bits, the less is seen."""
    rng = np.random.default_rng(seed)
    forged = np.arange(2 * n) < n
    rate = np.exp(rng.uniform(np.log(0.01), np.log(0.4), 2 * n))
    seen = np.interp(np.log(rate), np.log([0.01, 0.4]), [0.3, 3.0])
    return np.where(forged, seen, -seen) * 2 + rng.normal(0, 2, 2 * n), forged, rate


def test_by_compression_scores_are_true_where_one_curve_is_not():
    """The calibration error at the strongest compression and at the weakest, on new clips."""
    logits, forged, rate = compressed(1500)
    found = calibrate(logits, forged, fitted_on="x", bits_per_pixel=rate)
    new, truth, rates = compressed(6000, seed=1)

    for part, least in ((rates < 0.02, 0.08), (rates > 0.2, 0.0)):
        even = at_even_odds(truth[part])
        plain, by_rate = (
            ece(truth[part], probability(new[part], found.calibration, known), weight=even)
            for known in (None, rates[part])
        )
        assert by_rate < 0.04
        assert plain > least
    assert 3 == len(found.calibration.by_compression)
    assert found.nll_after < nll(logits, forged, found.calibration)


def test_one_strength_of_compression_is_scikit_learns_regression_at_the_knots():
    """Two clusters of bits per pixel: each knot's curve is the fit of that cluster alone."""
    rng = np.random.default_rng(3)
    n = 40_000
    forged = np.arange(2 * n) % 2 == 0
    weak = np.arange(2 * n) < n
    logits = np.where(forged, 1.0, -1.0) * np.where(weak, 2.0, 0.5) + rng.normal(0, 1.5, 2 * n)
    rate = np.where(weak, 0.3, 0.03)

    low, high = calibrate(
        logits, forged, fitted_on="x", bits_per_pixel=rate
    ).calibration.by_compression

    for point, own in ((low, ~weak), (high, weak)):
        theirs = LogisticRegression(C=np.inf, tol=1e-10).fit(logits[own][:, None], forged[own])
        assert 1 / point.temperature == pytest.approx(theirs.coef_[0, 0], rel=1e-2)
        expected = theirs.intercept_[0]
        assert -point.shift / point.temperature == pytest.approx(expected, abs=1e-2)


def test_compression_alone_does_not_tell_the_label():
    """Reals that were compressed more often than forgeries must not make few bits authentic."""
    logits, forged, rate = compressed(2000, seed=4)
    kept = forged | (rate < 0.05) | (np.arange(4000) % 8 == 0)
    fair = calibrate(logits, forged, fitted_on="x", bits_per_pixel=rate).calibration
    found = calibrate(logits[kept], forged[kept], fitted_on="x", bits_per_pixel=rate[kept])

    for bits in (0.012, 0.3):
        one, other = (
            probability(np.zeros(1), each, np.array([bits]))[0]
            for each in (fair, found.calibration)
        )
        assert other == pytest.approx(one, abs=0.1)


def test_too_few_clips_of_known_compression_keep_the_plain_curve():
    """And so does a compression that hardly varies."""
    logits, forged, rate = compressed(50)
    many = compressed(500)

    assert (
        ()
        == calibrate(logits, forged, fitted_on="x", bits_per_pixel=rate).calibration.by_compression
    )
    assert (
        ()
        == calibrate(
            *many[:2], fitted_on="x", bits_per_pixel=np.full(1000, 0.1)
        ).calibration.by_compression
    )


def test_between_the_knots_the_calibration_is_interpolated_and_beyond_them_it_is_the_nearest():
    """Slope and offset in the logarithm of the bits per pixel."""
    fitted = Calibration(
        temperature=7,
        by_compression=(
            CompressionPoint(bits_per_pixel=0.01, temperature=4, shift=1),
            CompressionPoint(bits_per_pixel=1, temperature=1, shift=0),
        ),
    )
    middle = fitted.at(0.1)

    assert (fitted.at(None).temperature, fitted.at(0.001).temperature) == (7, 4)
    assert fitted.at(9).temperature == 1
    assert 1 / middle.temperature == pytest.approx((1 / 4 + 1) / 2)
    assert middle.shift / middle.temperature == pytest.approx((1 / 4 + 0) / 2)


def test_a_model_published_before_keeps_its_one_curve():
    """The shipped manifest has no curve by compression: every clip gets the same two numbers."""
    path = next(Path("models/ralf-small").glob("*/manifest.json"))
    text = path.read_text().replace('"by_compression"', '"ignored"')
    fitted = Manifest.model_validate_json(text).calibration

    assert fitted.at(0.01) == fitted.at(None) == fitted


def test_the_worst_collection_sets_the_threshold():
    """A thousand strangers who score higher than a thousand others, and thirty of a third kind."""
    rng = np.random.default_rng(5)
    reals = np.concatenate([rng.normal(-2, 1, 1000), rng.normal(0, 1, 1000), rng.normal(3, 1, 30)])
    logits = np.concatenate([reals, rng.normal(3, 1, 1000)])
    names = ["studio"] * 1000 + ["street"] * 1000 + ["few"] * 30 + ["studio"] * 1000

    at = calibrate(logits, np.arange(3030) >= 2030, fitted_on="x", collection=names).thresholds[
        "fpr_0.05"
    ]

    assert at.set_by == "street"
    assert at.by_collection["street"][0] == 0.05
    assert at.by_collection["studio"][0] < 0.01 < at.rate < 0.05
    assert at.by_collection["few"][0] > 0.5


def test_small_collections_count_together():
    """Two of 60 people each support 5 % only together, beside one that does alone."""
    reals = np.concatenate([np.linspace(-3, -1, 500), np.linspace(0, 1, 60), np.linspace(0, 1, 60)])
    logits = np.concatenate([reals, np.linspace(0, 5, 500)])
    names = ["large"] * 500 + ["one"] * 60 + ["other"] * 60 + ["large"] * 500

    found = calibrate(logits, np.arange(1120) >= 620, fitted_on="x", collection=names)

    assert found.thresholds["fpr_0.05"].set_by == SMALL


def test_reals_of_a_collection_without_forgeries_move_the_threshold_and_not_the_curve():
    """Stills beside made clips."""
    logits, forged = made(300, 300)
    alone = calibrate(logits, forged, fitted_on="x")
    names = ["clips"] * 600 + ["stills"] * 200
    more = np.concatenate([logits, np.random.default_rng(6).normal(1, 1, 200)])

    found = calibrate(
        more, np.concatenate([forged, np.zeros(200, bool)]), fitted_on="x", collection=names
    )

    assert found.calibration == alone.calibration
    assert found.thresholds["fpr_0.05"].score > alone.thresholds["fpr_0.05"].score
    assert found.thresholds["fpr_0.05"].set_by == "stills"


def test_the_generator_held_out_calibrates_nothing(tmp_path: Path):
    """Forgeries of it lie on disk beside others; without them the split is calibrated alike."""
    reals = [("real", who, f"v{who}", "") for who in "abcd"]
    seen = [("swap", who, f"f{who}", "") for who in "abcd"]
    unseen = [("secret", who, f"x{who}", "") for who in "abcd"]
    judge = replace(by_brightness(), trained={"held_out": "secret"})
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()

    found, _ = calibrate_on_split(judge, split_of(tmp_path / "one", *reals, *seen, *unseen), "val")
    without, _ = calibrate_on_split(judge, split_of(tmp_path / "two", *reals, *seen), "val")

    assert found == without
