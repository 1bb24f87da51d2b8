"""How scores, people, sampling and errors are said to people."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ralf.worker.contract import ModelFigures, Sample, Threshold, Verdict
from ralf.worker.page import words
from ralf.worker.wording import digits_for, policy_text, score_text, side_text
from tests import verdicts

SHIPPED = Threshold(policy="fpr_0.05", forged_at=0.6498843478686173, authentic_below=0.1924975071)


def made(verdict: Verdict, **changes: Any) -> Verdict:
    """The verdict with other facts of how it was made."""
    return verdict.model_copy(update={"made": verdict.made.model_copy(update=changes)})


# Scores


@pytest.mark.parametrize(
    ("score", "said"),
    [
        (0.981234, "0.98, at or above 0.65"),
        (0.649885, "0.65, at or above 0.65"),
        (0.649883, "0.649883, between 0.192498 and 0.649884"),
        (0.6491, "0.649, between 0.192 and 0.650"),
        (0.132, "0.13, below 0.19"),
        (0.999999, ">0.99, at or above 0.65"),
        (0.0001, "<0.01, below 0.19"),
        (0.5, "0.50, between 0.19 and 0.65"),
    ],
)
def test_a_score_has_two_digits_or_as_many_as_tell_its_side(score: float, said: str):
    """0.6491 must not read as 0.65 where 0.65 decides."""
    digits = digits_for(SHIPPED, score)

    assert f"{score_text(score, digits)}, {side_text(score, SHIPPED, digits)}" == said


def test_a_threshold_close_to_1_is_not_written_as_1():
    """Nothing could be at or above it."""
    strict = Threshold(policy="fpr_0.001", forged_at=0.9987, authentic_below=0.2)

    assert side_text(0.999, strict, digits_for(strict, 0.999)) == "at or above 0.999"


unit = st.integers(0, 1_000_000).map(lambda millionths: millionths / 1_000_000)


@given(score=unit, marks=st.tuples(unit, unit))
def test_what_is_shown_is_on_the_side_that_decided(score: float, marks: tuple[float, float]):
    """Whatever the score and the thresholds, to six digits."""
    low, high = sorted(marks)
    threshold = Threshold(policy="p", forged_at=high, authentic_below=low)
    digits = digits_for(threshold, score)

    shown = Threshold(policy="p", forged_at=round(high, digits), authentic_below=round(low, digits))
    assert shown.decide(round(score, digits)) == threshold.decide(score)


@pytest.mark.parametrize(
    ("policy", "text"),
    [
        ("fpr_0.05", "5 % false-alarm threshold"),
        ("fpr_0.001", "0.1 % false-alarm threshold"),
        ("house", "threshold house"),
        ("none", "the model sets no threshold"),
        ("fpr_high", "threshold fpr_high"),
    ],
)
def test_a_policy_is_named_in_words(policy: str, text: str):
    """Its name in the manifest is for machines."""
    assert text == policy_text(policy)


# People and frames


def test_faces_in_one_frame_are_different_people_and_others_may_be_the_same():
    """A cut begins new tracks, which may be the same person again."""
    sampled = np.arange(32) * 0.3125 + 0.156
    first = verdicts.scores([-3.0] * 10, time_s=sampled[:10])
    later = verdicts.scores([-3.0] * 10, track=1, time_s=sampled[12:22], left=700.0)
    beside = verdicts.scores([-3.0] * 10, track=2, time_s=sampled[:10], left=900.0)

    def seen(*parts: Any) -> str:
        found = parts[0].concat(list(parts))
        return words.seen(verdicts.verdict(verdicts.judgement(found, sampled, 10.0)))

    assert seen(first) == "1 person, 32 sampled frames"
    assert seen(first, later) == "1 to 2 people, 32 sampled frames"
    assert seen(first, beside) == "2 people, 32 sampled frames"
    assert seen(first, later, beside) == "2 to 3 people, 32 sampled frames"
    assert words.seen(verdicts.faceless()) == "no person, 32 sampled frames"


def test_frames_of_a_second_pass_and_lost_frames_are_said():
    """A reader must know how much of the clip was looked at."""
    plain = verdicts.authentic()
    twice = made(plain, frames_by_pass=(32, 24), frames_asked=56, frames_decoded=56)
    lost = made(plain, frames_asked=32, frames_decoded=30, frames_replaced=0)

    assert words.seen(twice) == (
        "1 person, 32 sampled frames, then 24 more around the moments that scored highest"
    )
    assert words.seen(lost) == "1 person, 30 sampled frames of 32 wanted"


@pytest.mark.parametrize(
    ("hidden", "changes", "note"),
    [
        (0, {}, None),
        (3, {}, "Of 32 faces 3 covered in part."),
        (
            20,
            {"decisive": False, "reason": "occluded: 20 of 32 faces are covered in part"},
            "It cannot show this authentic: occluded: 20 of 32 faces are covered in part.",
        ),
        (
            0,
            {"decisive": False, "score": None, "reason": "only 2 faces sampled, 3 are needed"},
            "It may not decide: only 2 faces sampled, 3 are needed.",
        ),
    ],
)
def test_a_track_says_what_hides_its_face(hidden: int, changes: dict[str, Any], note: str | None):
    """Also where it is few faces, and decides nothing."""
    (track,) = verdicts.authentic().tracks
    samples: tuple[Sample, ...] = tuple(
        one.model_copy(update={"view": "occluded" if place < hidden else "clear"})
        for place, one in enumerate(track.samples)
    )

    assert words.track_note(track.model_copy(update={"samples": samples, **changes})) == note


# Errors


@pytest.mark.parametrize(
    ("figures", "short", "part"),
    [
        (
            {"strangers_flagged": (0.202, 0.1704, 0.2366), "forgeries_caught": (0.65, 0.58, 0.72)},
            "Wrong about 1 in 5 strangers, and misses 1 in 3 made forgeries:",
            "never seen forged (95 % interval 17 to 24 %), and missed 35 % of made forgeries",
        ),
        ({"strangers_flagged": (0.012,)}, "Wrong about 1 in 83 strangers:", "called 1.2 % of"),
        (
            {"strangers_flagged": (0.0, 0.0, 0.006)},
            "Wrong about fewer than 1 in 166 strangers:",
            "called 0 % of",
        ),
        ({"strangers_flagged": (0.6,)}, "Wrong about 6 in 10 strangers:", "called 60 % of"),
        ({}, "How often it is wrong about strangers is not known from this verdict:", "card"),
    ],
)
def test_the_models_own_figures_say_how_often_it_is_wrong(
    figures: dict[str, Any], short: str, part: str
):
    """In the first glance, in words that need no statistics."""
    said = words.errors(made(verdicts.forged(), figures=ModelFigures(**figures)))

    assert said is not None
    assert (said.short, part in said.figures) == (short, True)


def test_no_error_rate_is_said_where_no_model_judged():
    """Without a face, and of a model that was never trained."""
    untrained = verdicts.forged().model_copy(update={"warnings": ("untrained_model: never",)})

    assert words.errors(verdicts.faceless()) is None
    assert words.errors(untrained) is None
