"""Segments of a stream folded by number: in any order, repeated, one face across the borders."""

import json
import math
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ralf.kernels.manifest import Aggregation, Calibration
from ralf.worker.contract import (
    Callback,
    FailedSegment,
    Gap,
    Segment,
    SessionPart,
    SessionVerdict,
    Track,
)
from ralf.worker.scores import calibrated, level
from ralf.worker.service import sessions
from ralf.worker.service.deliver import Outbox
from ralf.worker.service.store import Store
from ralf.worker.settings import Settings
from tests.documents import a_failure, a_job, a_track, a_verdict
from tests.test_store import pop

LENGTH_MS = 2000
LEFT, RIGHT = (0.1, 0.2, 0.3, 0.6), (0.6, 0.2, 0.8, 0.6)
CALLBACK = Callback(url="https://hooks.example/ralf")


def part(number: int, **fields) -> SessionPart:
    return SessionPart(session_id="live", number=number, offset_ms=number * LENGTH_MS, **fields)


def stored(*segments: tuple[int, list[Track]], **fields: str) -> dict[str, str]:
    """A session's hash with these segments, in order."""
    kept = {
        f"segment:{number}": sessions.digest(a_verdict(tracks), part(number))
        for number, tracks in segments
    }
    return {"revision": str(len(segments)), **kept, **fields}


def fold(*segments: tuple[int, list[Track]], **fields: str) -> SessionVerdict:
    return sessions.fold("default", "live", stored(*segments, **fields))


def through(scores: list[float], **options) -> Track:
    """A track from a segment's begin to its end."""
    step = (LENGTH_MS - 100) // max(1, len(scores) - 1)
    return a_track(scores, step_ms=step, **options)


def run(store: Store, name: str, segment: SessionPart, outcome, **fields) -> None:
    """Submit a segment's job and end it."""
    store.submit([a_job(name, session=segment, **fields)])
    claimed = store.begin(pop(store), "w")
    assert claimed is not None and claimed.job_id == f"j{name}"
    store.end(claimed, outcome)


class TestJoin:
    def test_a_face_goes_on_across_a_border(self):
        """One track, on the stream's clock."""
        verdict = fold((0, [through([0.1] * 5)]), (1, [through([0.1] * 5)]))

        assert [track.segments for track in verdict.tracks] == [(0, 1)]
        assert (verdict.tracks[0].start_ms, verdict.tracks[0].end_ms) == (0, 3900)
        assert (verdict.tracks[0].track_id, verdict.tracks[0].faces) == ("0.t1", 10)

    def test_faces_too_few_in_each_segment_decide_together(self):
        """By the level of all of them, as one clip would have."""
        scores = [0.95, 0.6, 0.9, 0.85]
        verdict = fold((0, [through(scores[:2])]), (1, [through(scores[2:])]))
        logits = np.array([math.log(p / (1 - p)) for p in scores])
        expected = calibrated(np.array([level(logits, Aggregation())]), Calibration())[0]

        assert verdict.score == pytest.approx(expected, abs=2e-6)
        assert verdict.label == "likely_forged"
        assert verdict.tracks[0].decisive

    def test_a_long_authentic_past_does_not_dilute_a_forged_minute(self):
        """The session is never below its strongest segment."""
        past = [(number, [through([0.02] * 5)]) for number in range(30)]
        verdict = fold(*past, (30, [through([0.97] * 5)]))

        assert len(verdict.tracks) == 1
        assert (verdict.label, verdict.score) == ("likely_forged", 0.97)

    def test_a_listed_segment_forbids_likely_authentic(self):
        """A minute within one part of the stream, whose track is authentic on the whole."""
        quiet = [(number, [through([0.02] * 5)]) for number in range(3)]
        worst = Segment(start_ms=400, end_ms=900, track_id="t1", score=0.91, peak_ms=600)
        doubtful = a_verdict([through([0.02] * 5, score=0.1)], segments=(worst,))
        stream = stored(*quiet)
        assert sessions.fold("d", "live", stream).label == "likely_authentic"

        stream["segment:1"] = sessions.digest(doubtful, part(1))
        verdict = sessions.fold("d", "live", stream)

        assert (verdict.label, verdict.score) == ("inconclusive", 0.1)
        assert "1.t1 scored 0.91 from 00:02.400 to 00:02.900" in verdict.reason

    def test_a_stretch_across_a_border_forbids_likely_authentic(self):
        """One high face at the end of a segment and one at the begin of the next."""
        past = [0.02] * 20
        one = fold((0, [through([*past, 0.95], score=0.1)]), (1, [through([*past], score=0.1)]))
        both = fold(
            (0, [through([*past, 0.95], score=0.1)]), (1, [through([0.95, *past], score=0.1)])
        )

        assert ("likely_authentic", "inconclusive") == (one.label, both.label)

    def test_a_hidden_face_makes_no_stream_authentic(self):
        """Its track has a score and may not decide."""
        hidden = through([0.02] * 5).model_copy(update={"decisive": False, "reason": "occluded"})
        verdict = fold((0, [hidden]), (1, [hidden]))

        assert (verdict.label, verdict.tracks[0].decisive) == ("inconclusive", False)

    def test_a_digest_of_an_older_worker_is_folded(self):
        """It says nothing of segments."""
        old = json.loads(sessions.digest(a_verdict([through([0.02] * 5)]), part(0)))
        del old["peak"]

        assert (
            sessions.fold("d", "live", {"segment:0": json.dumps(old)}).label == "likely_authentic"
        )

    @pytest.mark.parametrize(
        ("first", "second"),
        [
            (through([0.1] * 5, box=LEFT), through([0.1] * 5, box=RIGHT)),
            (a_track([0.1] * 3, step_ms=100), through([0.1] * 5)),
            (through([0.1] * 5), a_track([0.1] * 3, start_ms=1600, step_ms=100)),
        ],
        ids=["elsewhere", "left before the border", "came after the border"],
    )
    def test_another_face_is_another_track(self, first, second):
        """It must be near in place and time."""
        assert len(fold((0, [first]), (1, [second])).tracks) == 2

    def test_a_missing_segment_parts_a_track_until_it_comes(self):
        """And then joins it."""
        first, second, third = ((n, [through([0.1] * 5)]) for n in range(3))

        assert len(fold(first, third).tracks) == 2
        assert len(fold(first, third, second).tracks) == 1

    def test_two_faces_stay_two(self):
        """Each goes on from the one it overlaps most, whatever the order they are listed in."""
        near = (0.15, 0.2, 0.35, 0.6)
        verdict = fold(
            (0, [through([0.1] * 5, box=LEFT), through([0.9] * 5, box=RIGHT, name="t2")]),
            (1, [through([0.9] * 5, box=RIGHT), through([0.1] * 5, box=near, name="t2")]),
        )

        assert sorted(track.score for track in verdict.tracks) == [0.1, 0.9]
        assert all(track.segments == (0, 1) for track in verdict.tracks)

    def test_one_track_is_not_joined_to_two(self):
        """The better overlap has it."""
        near = (0.14, 0.2, 0.34, 0.6)
        verdict = fold(
            (0, [through([0.1] * 5, box=LEFT)]),
            (1, [through([0.1] * 5, box=near), through([0.2] * 5, box=LEFT, name="t2")]),
        )
        joined = next(track for track in verdict.tracks if track.segments == (0, 1))

        assert len(verdict.tracks) == 2
        assert joined.score == 0.2


class TestReport:
    def test_missing_numbers_are_runs(self):
        """A number far off costs no more than one near."""
        verdict = fold((0, []), (2, []), (10**9, []), last=str(10**9 + 5))

        assert verdict.missing == (
            Gap(first=1, last=1),
            Gap(first=3, last=10**9 - 1),
            Gap(first=10**9 + 1, last=10**9 + 5),
        )
        assert not verdict.complete

    def test_numbers_count_from_0_unless_the_lowest_starts_the_clock(self):
        """A list that begins at 1 is whole."""
        late_start = sessions.digest(
            a_verdict(), SessionPart(session_id="live", number=1, offset_ms=0)
        )

        assert fold((1, [])).missing == (Gap(first=0, last=0),)
        assert sessions.fold("d", "live", {"segment:1": late_start}).missing == ()

    def test_an_empty_session_says_so(self):
        """No verdict yet is not no faces."""
        assert fold().label == "inconclusive"
        assert fold((0, [])).label == "no_faces"
        assert fold((0, [through([0.9] * 2)])).label == "inconclusive"

    def test_models_that_changed_on_the_way_are_named(self):
        """Their scores are not quite comparable."""
        kept = stored((0, []))
        kept["segment:1"] = sessions.digest(a_verdict(version="00000000"), part(1))
        verdict = sessions.fold("default", "live", kept)

        assert verdict.warnings == (
            "mixed_models: segments were scored by ralf-small@00000000, ralf-small@3f9c2a1b",
        )

    def test_one_face_through_a_long_stream_is_one_track(self):
        """However many borders it crosses."""
        verdict = fold(*((number, [through([0.1] * 3)]) for number in range(800)))

        assert (verdict.segments, len(verdict.tracks), verdict.missing) == (800, 1, ())


class TestEnds:
    def test_each_end_folds_and_emits(self, store, redis):
        """The rolling verdict is on the stream beside the segment's own."""
        run(store, "1", part(0), a_verdict([through([0.1] * 5)], label="likely_authentic"))
        run(store, "2", part(1, last=True), a_verdict([through([0.1] * 5)]))
        entries = [entry for _, entry in redis.xrange("ralf:verdicts")]
        rolling = [json.loads(e[b"data"]) for e in entries if e[b"type"] == b"session.updated"]

        assert [(r["segments"], r["complete"]) for r in rolling] == [(1, False), (2, True)]
        assert rolling[-1]["label"] == "likely_authentic"
        assert redis.zcard("ralf:sessions:changed") == 0
        assert redis.ttl("ralf:session:default:live") > 86_000

    def test_the_alert_comes_with_the_segment_that_crosses_and_once(self, store, redis):
        """By webhook and on the stream, under one id."""
        outbox = Outbox(store)
        run(store, "1", part(0), a_verdict([through([0.5] * 5)]), callback=CALLBACK)
        before = [d.event for d in outbox.take(9, 0.0)]
        for number in (1, 2, 3):
            verdict = a_verdict([through([0.95] * 5)])
            run(store, f"{number + 1}", part(number), verdict, callback=CALLBACK)
        alerts = [d for d in outbox.take(9, 0.0) if d.event == "session.alert"]

        assert before == ["verdict.ready"]
        assert [(d.subject, d.data["segments"], d.data["label"]) for d in alerts] == [
            ("live", 2, "likely_forged")
        ]
        types = [entry[b"type"] for _, entry in redis.xrange("ralf:verdicts")]
        assert types.count(b"session.alert") == 1

    def test_a_repeated_segment_changes_nothing_but_the_report(self, store, redis):
        """The first verdict of a number counts."""
        run(store, "1", part(0), a_verdict([through([0.1] * 5)]))
        first = redis.hget("ralf:session:default:live", "verdict")
        run(store, "2", part(0), a_verdict([through([0.99] * 5)]))
        before = SessionVerdict.model_validate_json(first)
        after = SessionVerdict.model_validate_json(
            redis.hget("ralf:session:default:live", "verdict")
        )

        assert after.repeated == (0,)
        assert after == before.model_copy(update={"repeated": (0,), "revision": 2})

    def test_a_failed_segment_is_reported_until_one_of_its_number_succeeds(self, store):
        """Whichever came first."""
        key = store.key("session", "default", "live")

        def reported() -> tuple[FailedSegment, ...]:
            return sessions.fold("default", "live", store.hash(key)).failed

        run(store, "1", part(0), a_failure("corrupt_media"))
        after_failure = reported()
        run(store, "2", part(0), a_verdict())
        run(store, "3", part(0), a_failure("corrupt_media"))

        assert after_failure == (FailedSegment(number=0, code="corrupt_media"),)
        assert reported() == ()

    def test_a_cancelled_segment_is_reported_by_the_janitors_fold(self, store):
        """It had no worker to fold it."""
        store.submit([a_job(session=part(0))])
        store.cancel("j1")

        assert store.fold_session("default", "live").failed == (
            FailedSegment(number=0, code="cancelled"),
        )

    def test_tenants_do_not_share_a_session(self, store):
        """They choose its name themselves."""
        for tenant in ("a", "b"):
            run(store, tenant, part(0), a_verdict(), tenant=tenant)

        assert store.hash(store.key("session", "a", "live"))["revision"] == "1"
        assert store.fold_session("c", "live") is None

    def test_a_fold_of_an_older_state_is_not_written(self, store, redis):
        """A segment came in between: read again."""
        run(store, "1", part(0), a_verdict())
        folded = redis.hget("ralf:session:default:live", "verdict")

        assert store.call("fold", None, "default", "live", 0, "{}", "{}", "0") == 0
        assert redis.hget("ralf:session:default:live", "verdict") == folded

    def test_a_fold_is_emitted_once(self, store, redis):
        """Whoever folds it again."""
        run(store, "1", part(0), a_verdict())
        length = redis.xlen("ralf:verdicts")
        for _ in range(3):
            store.fold_session("default", "live")

        assert redis.xlen("ralf:verdicts") == length

    def test_many_that_end_at_once_are_all_folded(self, store):
        """Eight workers on one stream."""
        jobs = [a_job(str(n), session=part(n, last=n == 39)) for n in range(40)]
        store.submit(jobs)
        claims = [store.begin(pop(store), "w") for _ in jobs]
        random.shuffle(claims)
        with ThreadPoolExecutor(8) as pool:
            ends = list(pool.map(lambda c: store.end(c, a_verdict([through([0.1] * 5)])), claims))
        verdict = store.fold_session("default", "live")

        assert all(ends)
        assert (verdict.segments, verdict.complete, len(verdict.tracks)) == (40, True, 1)


scores = st.lists(st.sampled_from([0.01, 0.3, 0.7, 0.95]), min_size=1, max_size=4)
segment = st.lists(st.tuples(scores, st.sampled_from([LEFT, RIGHT])), max_size=2)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(segments=st.lists(segment, min_size=1, max_size=5), data=st.data())
def test_no_order_and_no_repeat_changes_the_verdict(redis, segments, data):
    """Commutative and repeatable: only the report of what came late or twice may differ."""
    verdicts = [
        a_verdict([through(s, box=box, name=f"t{n}") for n, (s, box) in enumerate(tracks)])
        for tracks in segments
    ]
    order = data.draw(st.permutations(range(len(verdicts))))
    repeats = data.draw(st.lists(st.sampled_from(range(len(verdicts))), max_size=3))
    folds = []
    for numbers in (list(range(len(verdicts))), [*order, *repeats]):
        redis.flushall()
        store = Store(redis, Settings())
        for place, number in enumerate(numbers):
            run(store, str(place), part(number), verdicts[number])
        kept = store.hash(store.key("session", "default", "live"))
        folds.append(SessionVerdict.model_validate_json(kept["verdict"]))
    straight, shuffled = folds

    assert shuffled.repeated == tuple(sorted(set(repeats)))
    assert straight.late == ()
    told = {"revision": 0, "late": (), "repeated": ()}
    assert straight.model_copy(update=told) == shuffled.model_copy(update=told)
    assert (straight.score is not None) == any(track.decisive for track in straight.tracks)


def test_late_segments_are_those_that_a_higher_number_overtook(redis):
    """In the order of their ends."""
    store = Store(redis, Settings())
    for place, number in enumerate([0, 3, 1, 4, 2]):
        run(store, str(place), part(number), a_verdict())
    kept = store.hash(store.key("session", "default", "live"))

    assert sessions.fold("default", "live", kept).late == (1, 2)
