"""From scores to a judgement: what a level is, what may decide, and when."""

from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit
from scipy.stats import trim_mean

from ralf.kernels.manifest import Aggregation, Calibration, Manifest, Network
from ralf.worker.contract import Threshold
from ralf.worker.scores import level
from ralf.worker.verdict import (
    MAX_SAMPLES,
    MAX_TRACKS,
    Judgement,
    Scores,
    calibrated,
    judge,
    threshold_for,
)

KINDS = get_args(Aggregation.model_fields["track"].annotation)
MANIFEST = Manifest(
    name="sample",
    network=Network(build="ralf"),
    files={},
    aggregation=Aggregation(min_faces=3, min_face_px=48),
    thresholds={"fpr_0.05": 0.6, "low": 0.3},
)
logits = st.floats(-12, 12, allow_nan=False, width=32)
bars = st.floats(0.45, 9)  # a logit whose probability is above 0.6
aggregations = st.builds(Aggregation, track=st.sampled_from(KINDS), k=st.integers(1, 6))


def faces(
    logit: Any, *, track: Any = 0, time_s: Any = None, face_px: Any = 100.0, left: float = 10.0
) -> Scores:
    """Scores of one row per logit; half a second apart unless told."""
    logit = np.asarray(logit, np.float64)
    m = len(logit)
    time_s = np.arange(m) * 0.5 if time_s is None else np.asarray(time_s, np.float64)
    return Scores(
        time_s=time_s,
        frame=np.rint(time_s * 25).astype(np.int64),
        box=np.tile(np.array([left, 20.0, left + 100, 140.0]), (m, 1)),
        face_px=np.broadcast_to(np.asarray(face_px, np.float64), (m,)).copy(),
        confidence=np.full(m, 0.99),
        track=np.broadcast_to(np.asarray(track, np.int64), (m,)).copy(),
        logit=logit,
    )


def judged(scores: Scores, looked_s: Any = None, **changes: Any) -> Judgement:
    """The judgement on a clip of 640 × 360 as long as its faces."""
    looked = scores.time_s if looked_s is None else np.asarray(looked_s, np.float64)
    duration = changes.pop("duration_s", float(looked.max(initial=0.0)) + 0.25)
    manifest = MANIFEST.model_copy(update=changes)
    return judge(scores, looked, width=640, height=360, duration_s=duration, manifest=manifest)


# Scores


def test_scores_that_disagree_in_length_are_refused():
    """The message names the column and both shapes."""
    good = faces([1.0, 2.0])
    columns = {name: getattr(good, name) for name in vars(good)}
    columns["track"] = np.zeros(3, np.int64)

    with pytest.raises(ValueError, match=r"track should have shape \(2,\).*got \(3,\)"):
        Scores(**columns)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_logit_that_is_no_number_is_refused(bad: float):
    """A broken engine must not become a verdict."""
    with pytest.raises(ValueError, match="logit should be finite"):
        faces([1.0, bad])


def test_parts_put_together_hold_every_row():
    """Nothing at all is an ordinary part."""
    both = Scores.concat([faces([1.0]), Scores.none(), faces([2.0, 3.0], track=7)])

    assert both.logit.tolist() == [1.0, 2.0, 3.0]
    assert both.track.tolist() == [0, 7, 7]
    assert len(Scores.concat([])) == 0


# The level of a track


@given(st.lists(logits, min_size=1, max_size=40))
@settings(deadline=None)
def test_levels_agree_with_plain_numpy(values: list[float]):
    """Each aggregation is what its name says: a mean of the upper part of the sorted logits."""
    x = np.sort(np.array(values))
    m = len(x)

    assert level(x, Aggregation(track="mean")) == pytest.approx(np.mean(x))
    assert level(x, Aggregation(track="top_half_mean")) == pytest.approx(np.mean(x[m // 2 :]))
    assert level(x, Aggregation(track="top_k_mean", k=3)) == pytest.approx(np.mean(x[-3:]))
    assert level(x, Aggregation(track="trimmed_mean")) == pytest.approx(np.mean(x[m // 5 :]))


@given(st.lists(logits, min_size=1, max_size=30), st.data(), aggregations)
@settings(deadline=None)
def test_raising_a_logit_never_lowers_the_level(
    values: list[float], data: st.DataObject, aggregation: Aggregation
):
    """Whatever the aggregation."""
    place = data.draw(st.integers(0, len(values) - 1))
    raised = list(values)
    raised[place] += data.draw(st.floats(0, 20))

    assert level(np.array(values), aggregation) <= level(np.array(raised), aggregation)


@given(st.lists(logits, min_size=1, max_size=30), st.floats(1e-6, 20), aggregations)
@settings(deadline=None)
def test_a_face_at_the_level_or_above_never_lowers_it(
    values: list[float], above: float, aggregation: Aggregation
):
    """More forged evidence never counts against forgery."""
    before = level(np.array(values), aggregation)

    assert before <= level(np.array([*values, before + above]), aggregation)


@given(
    st.lists(logits, min_size=1, max_size=30), st.floats(1e-9, 9), st.floats(1e-9, 20), aggregations
)
@settings(deadline=None)
def test_a_face_above_the_bar_never_takes_a_level_below_the_bar(
    values: list[float], below: float, above: float, aggregation: Aggregation
):
    """Even a face weaker than the track cannot turn a forged track into another."""
    bar = level(np.array(values), aggregation) - below

    assert bar <= level(np.array([*values, bar + above]), aggregation)


def test_trimming_both_ends_would_let_forged_evidence_lower_the_level():
    """Why trimmed_mean trims the low end only: the example of the module's docstring."""
    before = [0.0] * 8 + [9.0]

    assert trim_mean(before, 0.1) == 1.0
    assert trim_mean([*before, 1.0], 0.1) == 0.125


# The whole judgement


@st.composite
def clips(draw: st.DrawFn) -> Scores:
    """Faces of up to four tracks on up to twelve frames."""
    rows = draw(st.lists(st.tuples(logits, st.integers(0, 3), st.integers(0, 11)), max_size=30))
    return faces(
        [row[0] for row in rows],
        track=[row[1] for row in rows],
        time_s=[row[2] * 0.5 for row in rows],
    )


@given(clips(), st.data(), aggregations)
@settings(max_examples=60, deadline=None)
def test_raising_logits_never_lowers_a_score(
    scores: Scores, data: st.DataObject, aggregation: Aggregation
):
    """Neither the video's, nor a track's, nor what the timeline shows."""
    lift = np.array(
        data.draw(st.lists(st.floats(0, 9), min_size=len(scores), max_size=len(scores)))
    )
    raised = faces(scores.logit + lift, track=scores.track, time_s=scores.time_s)
    before = judged(scores, aggregation=aggregation)
    after = judged(raised, aggregation=aggregation)

    assert (before.score or 0) <= (after.score or 0)
    assert all(a.score_max <= b.score_max for a, b in zip(before.tracks, after.tracks, strict=True))
    assert all(
        (a.score or 0) <= (b.score or 0) for a, b in zip(before.tracks, after.tracks, strict=True)
    )
    line = zip(before.timeline.score, after.timeline.score, strict=True)
    assert all(a == b if a is None else a <= b for a, b in line)


@given(clips(), st.integers(0, 4), st.integers(0, 11), st.floats(1e-5, 9), aggregations)
@settings(max_examples=60, deadline=None)
def test_a_further_forged_face_never_lowers_a_score(
    scores: Scores, track: int, frame: int, above: float, aggregation: Aggregation
):
    """At or above its track's level, in a known track or in a new one."""
    own = scores.logit[scores.track == track]
    base = level(own, aggregation) if len(own) else 0.0
    more = Scores.concat([scores, faces([base + above], track=track, time_s=[frame * 0.5])])
    looked = np.arange(12) * 0.5
    before = judged(scores, looked, aggregation=aggregation)
    after = judged(more, looked, aggregation=aggregation)

    assert before.score is None or before.score <= (after.score or 0)
    names = {name: number for number, name in after.track_names.items()}
    for number, name in before.track_names.items():
        was = next(t.score for t in before.tracks if t.track_id == name)
        now = next(t.score for t in after.tracks if names[t.track_id] == number)
        assert was is None or was <= (now or 0)


@given(clips(), st.sampled_from([0, 1, 2, 3, 9]), st.integers(0, 11), bars, aggregations)
@settings(max_examples=60, deadline=None)
def test_a_forged_face_never_takes_the_forged_label_away(
    scores: Scores, track: int, frame: int, logit: float, aggregation: Aggregation
):
    """A face at or above the threshold, even one weaker than its track."""
    scores = Scores.concat([scores, faces([0.5, 1.0, 2.0, 3.0], track=9)])
    more = Scores.concat([scores, faces([logit], track=track, time_s=[frame * 0.5])])
    assert judged(scores, aggregation=aggregation).label == "likely_forged"
    assert expit(logit) >= MANIFEST.thresholds["fpr_0.05"]

    assert judged(more, aggregation=aggregation).label == "likely_forged"


@given(clips(), st.randoms())
@settings(max_examples=40, deadline=None)
def test_the_order_of_the_rows_means_nothing(scores: Scores, random: Any):
    """So the segments of a stream may be folded in any order."""
    order = list(range(len(scores)))
    random.shuffle(order)
    mixed = scores.take(np.array(order, np.int64))

    assert judged(scores) == judged(mixed)


def test_the_score_is_the_calibrated_level_of_the_strongest_track():
    """SciPy's sigmoid of (level − shift) / temperature."""
    calibration = Calibration(temperature=2.5, shift=0.75)
    scores = Scores.concat([faces([4.0, 1.0, 3.0, -9.0]), faces([-1.0] * 4, track=1)])

    result = judged(scores, calibration=calibration)

    assert result.score == pytest.approx(expit((3.5 - 0.75) / 2.5), abs=1e-6)
    assert result.label == "likely_forged"
    assert "t1, the strongest of 2 tracks" in result.reason
    assert result.score == result.tracks[0].score


@given(st.lists(logits, min_size=1), st.floats(0.1, 9), st.floats(-5, 5))
@settings(deadline=None)
def test_calibration_is_the_sigmoid_of_scipy(values: list[float], temperature: float, shift: float):
    """To the digits that are kept, without overflow at the ends."""
    found = calibrated(np.array(values), Calibration(temperature=temperature, shift=shift))

    wanted = expit((np.array(values) - shift) / temperature)
    assert np.abs(wanted - found).max() <= 1e-6
    assert calibrated(np.array([-1e6, 1e6]), Calibration()).tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("logit", "label"),
    [(2.0, "likely_forged"), (0.0, "inconclusive"), (-3.0, "likely_authentic")],
)
def test_the_threshold_policy_decides_the_label(logit: float, label: str):
    """At or above forged_at; below `low`; between the two nobody knows."""
    result = judged(faces([logit] * 5))

    assert label == result.label
    assert result.threshold == Threshold(policy="fpr_0.05", forged_at=0.6, authentic_below=0.3)


def test_a_score_on_the_threshold_is_forged():
    """At or above, to the digit that is shown."""
    assert judged(faces([0.0] * 4), thresholds={"fpr_0.05": 0.5}).label == "likely_forged"


def test_without_low_there_is_no_grey_band():
    """Below forged_at is then authentic."""
    result = judged(faces([0.3] * 4), thresholds={"fpr_0.05": 0.6})

    assert result.label == "likely_authentic"
    assert result.threshold.authentic_below == result.threshold.forged_at == 0.6


def test_a_model_without_thresholds_says_so():
    """0.5 decides, and a warning tells that nothing supports it."""
    result = judged(faces([0.3] * 4), thresholds={})

    assert result.threshold == Threshold(policy="none", forged_at=0.5, authentic_below=0.5)
    assert [w for w in result.warnings if w.startswith("no_threshold: ")]


def test_an_unknown_policy_is_refused_with_what_there_is():
    """`low` is a bound, not a policy."""
    with pytest.raises(ValueError, match=r"'fpr_0.2'; it has: fpr_0.01, fpr_0.05"):
        threshold_for({"fpr_0.05": 0.6, "fpr_0.01": 0.9, "low": 0.2}, "fpr_0.2")
    with pytest.raises(ValueError, match="'low'"):
        threshold_for({"fpr_0.05": 0.6, "low": 0.2}, "low")


# Too little to judge


def test_no_faces_is_an_ordinary_outcome():
    """Looked and found none: no score, never 0.5."""
    result = judged(Scores.none(), [0.5, 1.0, 1.5])

    assert (result.label, result.score) == ("no_faces", None)
    assert "3 frames" in result.reason
    assert () == result.tracks == result.segments


def test_without_a_look_nothing_is_claimed():
    """No frame is not the same as no face."""
    result = judged(Scores.none(), [], duration_s=3.0)

    assert (result.label, result.score) == ("inconclusive", None)
    assert set(result.timeline.faces) == {None}


def test_too_few_faces_are_inconclusive_with_a_reason():
    """Two faces of three needed: shown, but without a score."""
    result = judged(faces([8.0, 8.0]))

    assert (result.label, result.score) == ("inconclusive", None)
    assert "only 2 faces sampled, 3 are needed" in result.reason
    assert (
        result.tracks[0].decisive,
        result.tracks[0].score,
        result.tracks[0].faces,
    ) == (False, None, 2)
    assert result.tracks[0].score_max > 0.999
    assert result.segments == ()


def test_too_small_faces_do_not_count():
    """They are shown, marked, and named in the reason and a warning."""
    result = judged(faces([8.0] * 6, face_px=[47, 47, 47, 47, 48, 90]))

    assert (result.label, result.score) == ("inconclusive", None)
    assert "2 of 6 faces at least 48 px, 3 are needed" in result.reason
    assert [s.counted for s in result.tracks[0].samples] == [False] * 4 + [True] * 2
    assert any(w.startswith("small_faces: 4 of 6 faces") for w in result.warnings)


def test_an_authentic_verdict_does_not_hide_a_short_forged_face():
    """A track that may not decide is warned of when it reaches the threshold."""
    result = judged(Scores.concat([faces([-5.0] * 6), faces([6.0, 6.0], track=1)]))

    assert result.label == "likely_authentic"
    assert [w for w in result.warnings if w.startswith("undecided_track: t2 reaches 0.99")]


# Tracks and samples


def test_tracks_are_named_by_first_appearance():
    """Left to right where two begin in the same frame; the finder's own numbers do not matter."""
    late = faces([1.0] * 3, track=2, time_s=[1.0, 1.5, 2.0])
    right = faces([1.0] * 3, track=4, left=300.0)
    left = faces([1.0] * 3, track=9, left=10.0)

    result = judged(Scores.concat([late, right, left]))

    assert dict(result.track_names) == {9: "t1", 4: "t2", 2: "t3"}
    assert [track.track_id for track in result.tracks] == ["t1", "t2", "t3"]
    assert (result.tracks[2].start_ms, result.tracks[2].end_ms) == (1000, 2000)


def test_boxes_are_fractions_of_the_frame():
    """A box that leaves the frame is cut at its edge."""
    scores = faces([1.0] * 3, left=-20.0)

    box = judged(scores).tracks[0].samples[0].box

    assert pytest.approx((box.left, box.top, box.right, box.bottom), abs=1e-5) == (
        0.0,
        20 / 360,
        80 / 640,
        140 / 360,
    )


def test_what_is_listed_is_bounded_but_all_is_judged():
    """20 tracks, one of 1000 faces: the strongest stay, the peak too."""
    many = [faces([float(n)] * 3, track=n) for n in range(20)]
    long = faces(np.full(1000, 10.0), track=50, time_s=np.arange(1000) * 0.01)
    long.logit[777] = 30.0

    result = judged(Scores.concat([*many, long]))

    assert len(result.tracks) == MAX_TRACKS
    assert max(len(track.samples) for track in result.tracks) == MAX_SAMPLES
    assert [w for w in result.warnings if w.startswith("tracks_omitted: the 16 strongest of 21")]
    assert result.score == pytest.approx(expit(19.0))
    biggest = max(result.tracks, key=lambda track: track.faces)
    assert biggest.faces == 1000
    assert max(biggest.samples, key=lambda s: s.score).time_ms == 7770


# Segments


def segments(values: list[float], **more: Any) -> list[tuple[int, int]]:
    """Start and end of each segment of one track, half a second a face."""
    return [(s.start_ms, s.end_ms) for s in judged(faces(values), **more).segments]


def test_a_stretch_reaches_half_way_to_its_neighbours():
    """Faces 3 to 6 of 10 are forged: from the middle before to the middle after."""
    assert segments([-4, -4, -4, 4, 4, 4, 4, -4, -4, -4]) == [(1250, 3250)]


def test_one_low_face_breaks_no_segment_and_one_high_face_makes_none():
    """Two of three neighbours must agree."""
    assert segments([4, 4, 4, -4, 4, 4, -4, -4, -4, -4]) == [(0, 2750)]
    assert segments([-4, -4, -4, 4, -4, -4, -4, -4]) == []


def test_a_face_that_goes_away_ends_its_segment():
    """More than three steps unseen; a shorter gap is bridged."""
    looked = np.arange(20) * 0.5
    gone = faces([4.0] * 8, time_s=[0, 0.5, 1, 1.5, 5, 5.5, 6, 6.5])
    hidden = faces([4.0] * 8, time_s=[0, 0.5, 1, 1.5, 3, 3.5, 4, 4.5])

    parted = judged(gone, looked).segments
    whole = judged(hidden, looked).segments

    assert [(s.start_ms, s.end_ms) for s in parted] == [(0, 1750), (4750, 6750)]
    assert [(s.start_ms, s.end_ms) for s in whole] == [(0, 4750)]


def test_a_segment_names_its_peak_and_stays_above_the_threshold():
    """The peak is a face's own time; the score is that of the stretch."""
    (segment,) = judged(faces([-4, 1, 2, 7, 1, 1, -4, -4])).segments

    assert (segment.track_id, segment.peak_ms) == ("t1", 1500)
    assert 0.6 <= segment.score < expit(7)


@given(clips())
@settings(max_examples=60, deadline=None)
def test_segments_lie_in_the_clip_and_on_decisive_tracks(scores: Scores):
    """Forward in time, at or above the threshold, around their peak."""
    result = judged(scores)
    decisive = {track.track_id for track in result.tracks if track.decisive}
    end = round(1000 * (scores.time_s.max(initial=0.0) + 0.25))

    for segment in result.segments:
        assert segment.track_id in decisive
        assert 0 <= segment.start_ms <= segment.peak_ms <= segment.end_ms <= end
        assert segment.start_ms < segment.end_ms
        assert result.threshold.forged_at <= segment.score + 1e-6


# Timeline


def test_the_timeline_tells_unseen_from_empty():
    """Looked and scored, looked and found none, not looked at."""
    scores = faces([2.0, 3.0], time_s=[0.5, 1.0], track=[0, 1])

    line = judged(scores, [0.5, 1.0, 1.5, 6.0], duration_s=10.0).timeline

    assert line.bin_ms == 100
    at = {
        time: (line.score[time // 100], line.faces[time // 100]) for time in range(0, 10_000, 100)
    }
    assert at[500] == (pytest.approx(expit(2.0), abs=1e-6), 1)
    assert at[1000] == (pytest.approx(expit(3.0), abs=1e-6), 1)
    assert at[1500] == at[6000] == at[6900] == (None, 0)
    assert at[3500] == at[7100] == at[9900] == (None, None)


@given(st.floats(0, 200_000), st.lists(st.floats(0, 1), max_size=20))
@settings(max_examples=60, deadline=None)
def test_a_timeline_has_few_bins_and_reaches_the_end(duration: float, where: list[float]):
    """At most 240 from a blink to two days, and each look colours its own bin."""
    looked = np.array(where) * duration
    line = judged(Scores.none(), looked, duration_s=duration).timeline

    assert 1 <= len(line.faces) == len(line.score) <= 240
    assert line.bin_ms * len(line.faces) >= int(duration * 1000)
    for time in looked:
        place = min(int(round(time * 1000) // line.bin_ms), len(line.faces) - 1)
        assert line.faces[place] == 0


def test_small_faces_colour_nothing():
    """Seen, but not scored."""
    line = judged(faces([9.0] * 4, face_px=20)).timeline

    assert set(line.score) == {None}
    assert set(line.faces) == {1}


# Folding segments of a stream


def test_segments_of_a_stream_judge_as_the_whole():
    """Two halves put together give what the whole gives, whichever came first."""
    whole = faces(np.linspace(-3, 5, 40))
    halves = [whole.take(np.arange(20)), whole.take(np.arange(20, 40))]

    assert judged(whole) == judged(Scores.concat(halves[::-1]))


# What lies between the frames


def test_a_segment_above_the_threshold_forbids_likely_authentic():
    """200 s of a face that scores 0.98, in two hours of one that scores 0.05."""
    logit = np.full(300, -3.0)
    logit[5:14] = 4.0

    result = judged(faces(logit, time_s=np.arange(300) * 24.0 + 12))

    assert result.score is not None and result.score < 0.3
    assert [(132_000 - 1000, 324_000 + 1000)] == [(s.start_ms, s.end_ms) for s in result.segments]
    assert "inconclusive" == result.label
    assert "below 0.30; but t1 scored 0.98 from 02:11.000 to 05:25.000." in result.reason


@given(st.lists(logits, min_size=3, max_size=60))
@settings(deadline=None)
def test_no_authentic_verdict_lists_a_segment(values: list[float]):
    """Whatever the scores."""
    result = judged(faces(values))

    assert not (result.label == "likely_authentic" and result.segments)


@pytest.mark.parametrize(("step_s", "warns"), [(9.9, False), (10.5, True), (225.0, True)])
def test_long_gaps_between_frames_are_told(step_s: float, warns: bool):
    """A forgery of ten seconds must not pass unseen without a word."""
    result = judged(faces([-3.0] * 8, time_s=np.arange(8) * step_s))

    assert round(step_s * 1000) == result.longest_gap_ms
    assert warns == any(text.startswith("sparse_sampling: up to") for text in result.warnings)


def test_a_single_frame_of_a_long_clip_is_told():
    """There is no gap between one frame and another, and all the same a long time unseen."""
    result = judged(faces([-3.0], time_s=[30.0]), duration_s=60.0)

    assert any(text.startswith("sparse_sampling: up to 60.0 s") for text in result.warnings)
