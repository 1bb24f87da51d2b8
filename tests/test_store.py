"""The moves of a job through Redis, each on a real server."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from redis.client import Pipeline
from redis.exceptions import ResponseError
from rq import Queue
from rq.job import Job as RqJob
from rq.serializers import JSONSerializer

from ralf.worker.contract import (
    Callback,
    EvidencePolicy,
    Failure,
    Media,
    Progress,
    SessionPart,
)
from ralf.worker.service.connection import connect
from ralf.worker.service.deliver import Outbox
from ralf.worker.service.janitor import Janitor
from ralf.worker.service.records import Claim
from ralf.worker.service.store import Store
from ralf.worker.settings import Settings
from tests.documents import READY, a_failure, a_job, a_verdict, an_evidence
from tests.redis_server import RedisServer

pytestmark = pytest.mark.each_redis
SETTINGS = Settings(heartbeat_ttl_s=30.0, janitor_every_s=5.0)
QUEUE = "rq:queue:ralf-default"


@pytest.fixture
def store(redis) -> Store:
    return Store(redis, SETTINGS)


def pop(store: Store, priority: str = "default") -> str | None:
    """What RQ's dequeue does."""
    queue = f"rq:queue:ralf-{priority}"
    job_id = store.redis.lmove(queue, f"{queue}:intermediate")
    return job_id and job_id.decode()


def claim(store: Store, worker: str = "w", **options) -> Claim:
    """Pop the next job and begin it."""
    job_id = pop(store)
    assert job_id is not None, "no job was next"
    claimed = store.begin(job_id, worker, **options)
    assert claimed is not None
    return claimed


def snapshot(store: Store) -> dict[bytes, object]:
    """All of Redis; a hash as its fields, since its dump has them in any order."""
    redis = store.redis
    return {
        key: redis.hgetall(key) if redis.type(key) == b"hash" else redis.dump(key)
        for key in redis.keys("*")
    }


class TestSubmit:
    def test_rq_reads_the_job_and_nothing_is_pickled(self, store, redis):
        """RQ's own classes find an id and a function's name, as JSON."""
        store.submit([a_job()])

        found, queue = Queue.dequeue_any(
            [Queue("ralf-default", connection=redis)], None, redis, serializer=JSONSerializer
        )
        assert found.id == "j1"
        assert (
            found.func_name,
            found.args,
            found.kwargs,
        ) == ("ralf.worker.service.jobs.moderate", ["j1"], {})
        assert "ralf-default" == found.origin == queue.name
        assert redis.lrange(f"{QUEUE}:intermediate", 0, -1) == [b"j1"]
        assert Queue("ralf-default", connection=redis) in Queue.all(connection=redis)
        assert json.loads(redis.hget("rq:job:j1", "data")) == [
            "ralf.worker.service.jobs.moderate",
            None,
            ["j1"],
            {},
        ]

    def test_the_same_token_and_body_is_the_same_job(self, store):
        """However often it is sent, and under which id."""
        first = store.submit([a_job()])[0]
        again = store.submit([a_job(job_id="other", traceparent="0" * 55)])[0]

        assert (first.existing, again.existing) == (False, True)
        assert "j1" == first.job_id == again.job_id
        assert store.counts().waiting["default"] == 1

    def test_another_body_is_a_conflict_that_names_its_fields(self, store):
        """And stores nothing."""
        store.submit([a_job()])
        before = snapshot(store)
        reply = store.submit([a_job(job_id="o", tag="x", media=Media(uri="https://a.b/c"))])[0]

        assert reply.conflict == ("media", "tag")
        assert reply.job_id == "j1"
        assert before == snapshot(store)

    def test_a_token_belongs_to_its_tenant(self, store):
        """Two tenants may use the same one."""
        replies = store.submit([a_job("1", tenant="a"), a_job("2", tenant="b", token="t1")])

        assert [reply.existing for reply in replies] == [False, False]

    def test_many_at_once_with_one_token_store_one_job(self, store):
        """The race that idempotency is for."""
        with ThreadPoolExecutor(8) as pool:
            replies = list(pool.map(lambda n: store.submit([a_job(job_id=f"j{n}")])[0], range(40)))

        assert sum(not reply.existing for reply in replies) == 1
        assert len({reply.job_id for reply in replies}) == 1
        assert store.counts().waiting["default"] == 1

    def test_a_token_outlives_its_job_by_its_time(self, store, redis):
        """It has no end while the job runs, however long that takes."""
        store.submit([a_job()])
        running = redis.ttl("ralf:token:default:t1")
        store.end(claim(store), a_verdict())

        assert running == -1
        assert SETTINGS.token_ttl_s == redis.ttl("ralf:token:default:t1")


class TestTurns:
    def test_one_tenants_ten_thousand_do_not_delay_anothers_ten(self, store):
        """Served in turn: the small tenant waits for as many of the large one's as its own."""
        store.submit([a_job(f"big-{n}", tenant="big") for n in range(10_000)])
        store.submit([a_job(f"small-{n}", tenant="small") for n in range(10)])
        served = []
        while sum(name.startswith("jsmall") for name in served) < 10:
            ended = claim(store)
            served.append(ended.job_id)
            store.end(ended, a_failure("fetch_denied"))

        assert len(served) <= 2 * 10 + 2  # and the two that were next before the small one came

    def test_rqs_list_holds_one_job_more_than_there_are_workers(self, store, redis):
        """Enough that none idles, few enough that turns are kept."""
        redis.sadd("rq:workers:ralf-default", *(f"rq:worker:{n}" for n in range(3)))
        store.submit([a_job(str(n)) for n in range(20)])
        filled = redis.llen(QUEUE)
        claim(store)

        assert 4 == filled == redis.llen(QUEUE)

    def test_priorities_have_queues_of_their_own(self, store):
        """A worker listens to one."""
        store.submit([a_job("1"), a_job("2", priority="high")])

        assert (pop(store, "high"), pop(store)) == ("j2", "j1")

    def test_a_tenants_turn_survives_its_last_job_being_cancelled(self, store, redis):
        """An empty list in the ring neither stops the ring nor gives two turns later."""
        store.submit([a_job(str(n), tenant=f"t{n % 2}") for n in range(6)])
        for n in (3, 5):
            store.cancel(f"j{n}")
        store.submit([a_job("7", tenant="t1")])

        assert len(set(redis.lrange("ralf:turn:default", 0, -1))) == redis.llen("ralf:turn:default")
        assert {"j0", "j1", "j2", "j4", "j7"} == {claim(store).job_id for _ in range(5)}


class TestBegin:
    def test_it_gives_the_job_and_shows_rq_that_it_started(self, store, redis):
        """The entry that RQ's dequeue left is gone, the lease runs."""
        job = a_job(callback=Callback(url="https://a.b/c"))
        store.submit([job])
        claimed = claim(store, now=100.0)

        assert (job, 1, 0, False, "w") == (
            claimed.job,
            claimed.attempt,
            claimed.retries,
            claimed.alone,
            claimed.worker,
        )
        assert redis.llen(f"{QUEUE}:intermediate") == 0
        assert redis.zscore("ralf:running:default", "j1") == 130.0
        assert RqJob.fetch("j1", redis, serializer=JSONSerializer).get_status() == "started"

    def test_it_needs_the_entry_of_a_dequeue(self, store):
        """A worker that was paused while its job went to another cannot take it."""
        store.submit([a_job()])

        assert store.begin("j1", "w") is None
        assert store.status("j1").state == "queued"

    def test_only_one_of_many_gets_the_job(self, store, redis):
        """Even when its entry was there twice."""
        store.submit([a_job()])
        redis.rpush(QUEUE, "j1")
        pop(store), pop(store)
        with ThreadPoolExecutor(8) as pool:
            claims = list(pool.map(lambda n: store.begin("j1", f"w{n}"), range(16)))

        assert sum(claimed is not None for claimed in claims) == 1
        assert redis.llen(f"{QUEUE}:intermediate") == 0

    def test_the_same_nonce_may_ask_again(self, store):
        """A reply lost on the way is not a job lost."""
        store.submit([a_job()])
        pop(store)

        assert store.begin("j1", "w", nonce="n") == store.begin("j1", "w", nonce="n")
        assert store.begin("j1", "w", nonce="m") is None
        assert store.status("j1").attempts == 1

    def test_a_job_past_its_deadline_expires_instead(self, store):
        """It has its end, and the worker nothing to do."""
        store.submit([a_job(deadline=datetime.fromtimestamp(50, UTC))], now=10.0)

        assert store.begin(pop(store), "w", now=60.0) is None
        assert (
            store.status("j1").state,
            store.status("j1").failure.code,
        ) == ("expired", "deadline_passed")

    def test_a_job_that_is_gone_leaves_no_entry(self, store, redis):
        """Somebody flushed it: there is nothing to run."""
        store.submit([a_job()])
        pop(store)
        redis.delete("ralf:job:j1")

        assert store.begin("j1", "w") is None
        assert redis.llen(f"{QUEUE}:intermediate") == 0

    def test_a_document_of_another_release_fails_by_name(self, store, redis):
        """Rather than in the worker's face, for ever."""
        store.submit([a_job()])
        redis.hset("ralf:job:j1", "document", json.dumps({"schema": "ralf.job/9"}))

        assert store.begin(pop(store), "w") is None
        assert (
            store.status("j1").state,
            store.status("j1").failure.code,
        ) == ("failed", "bad_request")


class TestEnd:
    def test_all_of_it_or_none(self, store, redis):
        """State, verdict, evidence, stream, outbox and times to live come in one step."""
        store.submit([a_job(tag="mine", callback=Callback(url="https://a.b/c"))])
        ended = claim(store)
        store.beat(ended, progress=Progress(stage="analyze", percent=50), partial=a_verdict())
        done = store.end(ended, a_verdict(), evidence=an_evidence())
        status = store.status("j1")

        assert done
        assert (
            status.state,
            status.label,
            status.score,
            status.tag,
        ) == ("succeeded", "likely_forged", 0.93, "mine")
        assert a_verdict() == store.verdict("j1")
        assert an_evidence() == store.evidence("j1")
        assert store.partial("j1") is None
        [(_, entry)] = redis.xrange("ralf:verdicts")
        assert entry[b"type"] == b"verdict.ready"
        assert json.loads(entry[b"data"]) == READY
        assert redis.zcard("ralf:outbox") == 1
        assert [
            redis.ttl(f"ralf:{kind}:j1") // 86400 for kind in ("job", "verdict", "evidence")
        ] == [30, 30, 7]
        assert store.counts().running == {"default": 0, "high": 0, "backfill": 0}

    def test_the_trace_reaches_the_stream_and_the_push(self, store, redis):
        """Whoever consumes the verdict can join it to the trace of the upload."""
        trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
        store.submit([a_job(traceparent=trace, callback=Callback(url="https://a.b/c"))])
        store.end(claim(store), a_verdict())
        [(_, entry)] = redis.xrange("ralf:verdicts")
        [push] = Outbox(store).take(1, 60.0)

        assert json.loads(entry[b"data"])["traceparent"] == trace
        assert push.data["traceparent"] == trace

    def test_the_second_end_changes_nothing(self, store):
        """Not from the same worker, nor with another outcome."""
        store.submit([a_job(callback=Callback(url="https://a.b/c"))])
        ended = claim(store)
        store.end(ended, a_verdict())
        before = snapshot(store)

        assert not store.end(ended, a_verdict(score=0.1))
        assert not store.end(ended, a_failure())
        assert store.retry(ended, a_failure()) == "lost"
        assert store.crashed(ended, code="decoder_crashed", message="") == "lost"
        assert "lost" == store.hand_back(ended) == store.beat(ended)
        assert store.cancel("j1") == "succeeded"
        assert before == snapshot(store)

    def test_of_many_at_once_one_is_kept(self, store, redis):
        """Whatever raced."""
        store.submit([a_job(callback=Callback(url="https://a.b/c"))])
        ended = claim(store)
        with ThreadPoolExecutor(8) as pool:
            done = list(
                pool.map(
                    lambda n: store.end(ended, a_verdict(score=n / 40), now=float(n)), range(40)
                )
            )

        assert sum(done) == 1
        assert done.index(True) / 40 == store.verdict("j1").score == store.status("j1").score
        assert (redis.xlen("ralf:verdicts"), redis.zcard("ralf:outbox")) == (1, 1)

    @pytest.mark.parametrize(
        ("code", "state"),
        [("cancelled", "cancelled"), ("deadline_passed", "expired"), ("corrupt_media", "failed")],
    )
    def test_a_failures_code_gives_the_state(self, store, code, state):
        """And its message and attempts are kept."""
        store.submit([a_job()])
        store.end(claim(store), a_failure(code, "why"))

        assert (state, code, "why", 1) == (
            store.status("j1").state,
            store.status("j1").failure.code,
            store.status("j1").failure.message,
            store.status("j1").failure.attempts,
        )

    def test_evidence_that_must_not_be_kept_is_not(self, store):
        """The client's policy, whatever the worker hands over."""
        store.submit([a_job(evidence=EvidencePolicy(retain=False))])
        store.end(claim(store), a_verdict(), evidence=an_evidence())

        assert store.verdict("j1") is not None
        assert store.evidence("j1") is None

    def test_nothing_is_pushed_without_a_callback_for_it(self, store, redis):
        """The stream has it all the same."""
        store.submit([a_job("1"), a_job("2", callback=Callback(url="https://a.b", events=()))])
        store.end(claim(store), a_verdict())
        store.end(claim(store), a_failure())

        assert (redis.xlen("ralf:verdicts"), redis.zcard("ralf:outbox")) == (2, 0)


class TestRunning:
    def test_a_beat_extends_the_lease_and_hears_cancel(self, store, redis):
        """Within a beat of the asking."""
        store.submit([a_job()])
        running = claim(store, now=100.0)
        first = store.beat(running, now=120.0)
        state = store.cancel("j1")

        assert (first, state, store.beat(running, now=121.0)) == ("go_on", "running", "cancel")
        assert redis.zscore("ralf:running:default", "j1") == 151.0
        assert store.status("j1").cancelling

    def test_progress_and_what_was_seen_so_far_can_be_read(self, store):
        """While it runs."""
        store.submit([a_job()])
        progress = Progress(stage="analyze", percent=40, faces=3, score=0.5)
        store.beat(claim(store), progress=progress, partial=a_verdict(partial=True))

        assert progress == store.status("j1").progress
        assert store.partial("j1").partial

    def test_a_void_claim_changes_nothing(self, store):
        """A worker that comes back after its lease finds its job with another."""
        store.submit([a_job()])
        stale = claim(store, now=100.0)
        store.call("lost", 131.0)
        fresh = claim(store, worker="v", now=132.0)
        before = snapshot(store)

        assert store.beat(stale, now=133.0) == "lost"
        assert not store.end(stale, a_verdict())
        assert before == snapshot(store)
        assert store.end(fresh, a_verdict())


class TestRetry:
    def test_it_waits_longer_each_time_and_then_fails(self, store, redis):
        """Twice, after about 15 s and about 120 s."""
        store.submit([a_job()], now=0.0)
        delays = []
        for attempt in (1, 2):
            running = claim(store, now=1000.0)
            assert (attempt, attempt - 1) == (running.attempt, running.retries)
            assert store.retry(running, a_failure(), now=1000.0) == "retried"
            delays.append(redis.zscore("ralf:due", "j1") - 1000)
            assert pop(store) is None
            store.call("due", 2000.0)
        last = store.retry(claim(store), a_failure())

        assert 12 <= delays[0] <= 18 and 96 <= delays[1] <= 144
        assert (last, store.status("j1").state) == ("failed", "failed")
        assert (
            store.status("j1").failure.code,
            store.status("j1").failure.attempts,
        ) == ("fetch_failed", 3)

    def test_a_waiting_retry_tells_how_the_last_attempt_failed_and_when_the_next_is(self, store):
        """The verdict that comes after it does not erase what happened before."""
        store.submit([a_job()], now=0.0)
        before = store.status("j1")
        store.retry(claim(store, now=1000.0), a_failure(), delay_s=15.0, now=1001.0)
        waiting = store.status("j1")
        store.call("due", 1016.0)
        again = claim(store, now=1017.0)
        running = store.status("j1")
        store.end(again, a_verdict(), now=1018.0)
        ended = store.status("j1")

        assert (before.last_failure, before.next_attempt_at) == (None, None)
        first = Failure(code="fetch_failed", message="the server answered 503", attempts=1)
        assert (waiting.state, waiting.failure) == ("queued", None)
        assert (waiting.last_failure, waiting.next_attempt_at) == (first, 1016.0)
        assert (running.last_failure, running.next_attempt_at) == (first, None)
        assert (ended.last_failure, ended.failure) == (first, None)

    def test_a_crash_before_the_next_attempt_is_told_too_and_handing_back_is_no_failure(
        self, store
    ):
        """With the second attempt handed back, the first one's crash is still the last failure."""
        store.submit([a_job()], now=0.0)
        running = claim(store, now=1000.0)
        store.crashed(running, code="decoder_crashed", message="signal 11", now=1001.0)
        crashed = store.status("j1")
        store.hand_back(claim(store, now=1002.0), delay_s=5.0, now=1003.0)
        handed_back = store.status("j1")

        assert crashed.last_failure == Failure(
            code="decoder_crashed", message="signal 11", attempts=1
        )
        assert crashed.next_attempt_at == 1001.0
        assert handed_back.last_failure == crashed.last_failure
        assert handed_back.next_attempt_at == 1008.0

    def test_handing_back_costs_nothing_and_keeps_the_place(self, store):
        """A drained worker's job is the next of all."""
        store.submit([a_job(str(n)) for n in range(9)])
        given_back = claim(store)
        outcome = store.hand_back(given_back)
        order = [claim(store) for _ in range(4)]

        assert outcome == "retried"
        assert [running.job_id for running in order] == ["j0", "j1", "j2", "j3"]
        assert (order[0].retries, order[0].attempt) == (0, 2)

    def test_a_cancelled_job_does_not_come_back(self, store):
        """Handed back, retried or crashed: it ends."""
        for n, give in enumerate(
            (
                store.hand_back,
                lambda running: store.retry(running, a_failure()),
                lambda running: store.crashed(running, code="decoder_crashed", message=""),
            )
        ):
            store.submit([a_job(str(n))])
            running = claim(store)
            store.cancel(running.job_id)

            assert "cancelled" == give(running) == store.status(running.job_id).state


class TestCrash:
    def test_the_second_one_alone_quarantines(self, store):
        """With what each left behind."""
        store.submit([a_job()])
        first = store.crashed(
            claim(store), code="decoder_crashed", message="signal 11", detail="segfault at 0"
        )
        running = claim(store)
        second = store.crashed(running, code="job_timeout", message="ran over 120 s")

        assert (first, second) == ("retried", "quarantined")
        assert running.alone
        assert (
            store.status("j1").state,
            store.status("j1").failure.code,
        ) == ("quarantined", "job_timeout")

    def test_company_is_not_blamed_and_runs_alone_next(self, store, redis):
        """Of several jobs in a child that died none is counted."""
        store.submit([a_job()])
        store.crashed(claim(store, alone=False), code="decoder_crashed", message="", alone=False)

        assert redis.get("ralf:crashes:job:j1") is None
        assert claim(store).alone

    def test_a_run_that_was_to_be_alone_counts_in_any_case(self, store):
        """So a job cannot crash for ever."""
        store.submit([a_job()])
        outcomes = [
            store.crashed(claim(store), code="decoder_crashed", message="", alone=False)
            for _ in range(3)
        ]

        assert outcomes == ["retried", "retried", "quarantined"]

    def test_a_file_is_counted_across_jobs(self, store):
        """The same bytes under another token in another worker; neither job is run again."""
        store.submit([a_job("1"), a_job("2")])
        outcomes = [
            store.crashed(
                claim(store, worker=worker), code="decoder_crashed", message="", file_sha="f" * 64
            )
            for worker in ("w1", "w2")
        ]

        assert outcomes == ["retried", "quarantined"]
        assert store.begin(pop(store), "w") is None
        assert store.status("j1").state == "quarantined"

    def test_success_clears_the_count(self, store, redis):
        """The file was not to blame; its hash comes with the verdict, whether or not a beat did."""
        store.submit([a_job()])
        store.crashed(claim(store), code="decoder_crashed", message="", file_sha="f" * 64)
        before = redis.keys("ralf:crashes:*")
        redis.hset("ralf:job:j1", "file_sha", "")
        store.end(claim(store), a_verdict(), file_sha="f" * 64)

        assert (len(before), redis.keys("ralf:crashes:*")) == (2, [])

    def test_one_worker_alone_blocks_no_file(self, store):
        """Its machine may be to blame: another tenant's job with the same bytes has its tries."""
        store.submit([a_job("1"), a_job("2", tenant="other")])
        for _ in range(2):
            running = claim(store)
            outcome = store.crashed(running, code="decoder_crashed", message="", file_sha="f" * 64)

        assert (running.job_id, outcome) == ("j2", "retried")

    def test_a_child_killed_from_outside_blames_no_file(self, store, redis):
        """The job is counted, since it may be what uses the memory up; the bytes are not."""
        store.submit([a_job("1"), a_job("2", tenant="other")])
        outcomes = [
            store.crashed(
                claim(store, worker=worker),
                code="decoder_crashed",
                message="the child died of SIGKILL",
                file_sha="f" * 64,
                blame_file=False,
            )
            for worker in ("w1", "w2")
        ]

        assert outcomes == ["retried", "retried"]
        assert redis.keys("ralf:crashes:workers:*") == []

    def test_a_lost_worker_blames_no_file(self, store, redis):
        """A machine that lost its power says nothing about the clip."""
        store.submit([a_job()])
        running = claim(store, now=1000.0)
        store.beat(running, file_sha="f" * 64, now=1000.0)
        Janitor(store, store.settings).run_once(now=1000.0)
        Janitor(store, store.settings).run_once(now=1100.0)
        Janitor(store, store.settings).run_once(now=1200.0)

        assert store.status("j1").state == "queued"
        assert redis.keys("ralf:crashes:*") == [b"ralf:crashes:job:j1"]

    def test_a_hash_that_was_only_claimed_is_not_charged(self, store, redis):
        """Else one tenant could have another's file put into quarantine, unseen."""
        theirs = Media(uri="https://evil.example/a", sha256="e" * 64)
        store.submit([a_job(tenant="evil", media=theirs)])
        for worker in ("w1", "w2"):
            running = claim(store, worker=worker)
            store.crashed(running, code="decoder_crashed", message="")
        own = Media(uri="https://a.b/c", sha256="e" * 64)
        store.submit([a_job("own", tenant="honest", media=own)])

        assert store.status("j1").state == "quarantined"
        assert redis.keys("ralf:crashes:workers:*") == []
        assert claim(store).job_id == "jown"

    def test_a_file_known_to_crash_is_not_run(self, store, redis):
        """When the client named its hash."""
        redis.sadd(f"ralf:crashes:workers:{'e' * 64}", "w1", "w2")
        store.submit([a_job(media=Media(uri="https://a.b/c", sha256="e" * 64))])

        assert store.begin(pop(store), "w") is None
        assert store.status("j1").state == "quarantined"


class TestCancel:
    @pytest.mark.parametrize("place", ["pending", "list", "popped", "due"])
    def test_a_queued_job_ends_at_once_wherever_it_waits(self, store, redis, place):
        """And is in no list any more."""
        if place == "pending":
            store.submit([a_job("a"), a_job("b")])
        store.submit([a_job()])
        if place == "popped":
            pop(store)
        if place == "due":
            store.retry(claim(store), a_failure())

        assert "cancelled" == store.cancel("j1") == store.status("j1").state
        assert store.status("j1").failure.code == "cancelled"
        places = ("ralf:pending:default:default", QUEUE, f"{QUEUE}:intermediate")
        assert not any(b"j1" in redis.lrange(key, 0, -1) for key in places)
        assert redis.zscore("ralf:due", "j1") is None

    def test_an_unknown_job_is_none(self, store):
        """Not an error here."""
        assert store.cancel("nobody") is None


def test_counts_say_what_waits_runs_and_for_how_long(store):
    """The figures of metrics and autoscaling; a backfill waits on purpose and has no age."""
    store.submit([a_job("9", priority="backfill")], now=10.0)
    store.submit([a_job("1")], now=100.0)
    store.submit([a_job("2"), a_job("3", priority="high")], now=160.0)
    claim(store, now=161.0)
    counts = store.counts(now=170.0)

    assert counts.waiting == {"default": 1, "high": 1, "backfill": 1}
    assert counts.running == {"default": 1, "high": 0, "backfill": 0}
    assert counts.oldest_s == 10.0


def test_two_prefixes_share_a_redis_and_nothing_else(redis):
    """Keys and queues of their own."""
    one, two = Store(redis, Settings(redis_prefix="a:")), Store(redis, Settings(redis_prefix="b:"))
    one.submit([a_job()])

    assert two.status("j1") is None
    assert one.status("j1").state == "queued"
    assert [redis.llen(f"rq:queue:{name}default") for name in ("a-", "b-")] == [1, 0]


def test_a_client_rides_out_a_restart_of_redis():
    """kill -9 with the append-only file on: nothing acknowledged is lost, callers only wait."""
    server = RedisServer(aof=True)
    server.start()
    try:
        store = Store(connect(server.url, attempts=40), SETTINGS)  # it may come back slowly
        store.submit([a_job("1")])
        running = claim(store)
        server.kill()
        back = threading.Timer(0.5, server.start)
        back.start()
        order = store.beat(running)
        back.join()

        assert order == "go_on"
        assert store.end(running, a_verdict())
        assert store.status("j1").state == "succeeded"
    finally:
        server.stop()


def test_a_submission_survives_a_redis_that_lost_its_script(store, redis, monkeypatch):
    """Restarted after redis-py gave it the script and before the jobs came."""
    load = Pipeline.load_scripts
    flushed = []

    def load_and_lose(self: Pipeline) -> None:
        load(self)
        if not flushed:
            flushed.append(redis.script_flush())

    monkeypatch.setattr(Pipeline, "load_scripts", load_and_lose)
    made = store.submit([a_job("1"), a_job("2")])

    assert flushed
    assert [one.state for one in made] == ["queued", "queued"]


def test_redis_clock_decides_what_is_late(store):
    """Only tests pass a time of their own."""
    store.submit([a_job(deadline=datetime.now(UTC) - timedelta(seconds=5))])

    assert store.begin(pop(store), "w") is None


class TestCap:
    def test_one_tenant_cannot_hold_every_worker(self, redis):
        """At its cap its jobs wait, others go on; each end lets one more through."""
        store = Store(redis, replace(SETTINGS, tenant_running_max=2))
        store.submit([a_job(f"a{n}", tenant="a") for n in range(5)])
        store.submit([a_job(f"b{n}", tenant="b") for n in range(2)])
        running = {}
        while job_id := pop(store) or (store.refill("default") and pop(store)):
            running[job_id] = store.begin(job_id, "w")
        at_cap = sorted(running)
        store.end(running["ja0"], a_verdict())
        store.retry(running["ja1"], a_failure("fetch_failed"), delay_s=60.0)
        store.refill("default")
        following = [pop(store), pop(store), store.refill("default")]

        assert at_cap == ["ja0", "ja1", "jb0", "jb1"]
        assert following == ["ja2", "ja3", 0]


class TestLongQueues:
    def test_a_thousand_deadlines_do_not_search_a_long_list(self, store, redis):
        """Each search of 20,000 entries would block Redis for about half a millisecond."""
        late = datetime.now(UTC) + timedelta(seconds=1000)
        jobs = [a_job(str(n), deadline=late if n % 20 == 0 else None) for n in range(20_000)]
        store.submit(jobs)
        redis.config_resetstat()
        expired = store.call("expire", store.now() + 2000)
        spent = redis.info("commandstats")["cmdstat_lrem"]["usec_per_call"]

        assert len(expired) == 1000
        assert spent < 50

    def test_an_expired_job_is_skipped_and_its_tenant_keeps_its_turn(self, store, redis):
        """Those that are left run in their order, and nothing stays behind."""
        late = datetime.now(UTC) + timedelta(seconds=1000)
        store.submit([a_job(str(n), deadline=late if 1 < n < 6 else None) for n in range(8)])
        store.call("expire", store.now() + 2000)
        store.cancel("j6")
        served = []
        while job_id := pop(store) or (store.refill("default") and pop(store)):
            claimed = store.begin(job_id, "w")
            served.append(job_id)
            store.end(claimed, a_verdict())
        store.refill("default")

        assert served == ["j0", "j1", "j7"]
        assert store.call("audit", None) == 0
        assert redis.keys("ralf:pending:*") + redis.keys("ralf:stale:*") == []


class TestAllOrNone:
    """An end is written whole or not at all, whatever lies in Redis."""

    def test_a_stream_that_takes_no_entry_leaves_the_job_running(self, store, redis):
        """Its last id was pushed to the end; once it is mended the same claim ends the job."""
        store.submit([a_job(callback=Callback(url="https://hooks.example/"))])
        running = claim(store)
        redis.xadd("ralf:verdicts", {"a": "b"}, id=f"{2**64 - 1}-{2**64 - 1}")
        before = snapshot(store)
        with pytest.raises(ResponseError):
            store.end(running, a_verdict())
        after = snapshot(store)
        redis.delete("ralf:verdicts")

        assert before == after
        assert store.end(running, a_verdict())
        assert (redis.xlen("ralf:verdicts"), redis.zcard("ralf:outbox")) == (1, 1)

    def test_a_cancelled_job_stays_queued_when_its_end_cannot_be_written(self, store, redis):
        """No move takes a job out of its place before its end is certain."""
        store.submit([a_job()])
        redis.xadd("ralf:verdicts", {"a": "b"}, id=f"{2**64 - 1}-{2**64 - 1}")
        before = snapshot(store)
        with pytest.raises(ResponseError):
            store.cancel("j1")

        assert before == snapshot(store)

    @pytest.mark.parametrize("field", ["callback", "session", "document"])
    @pytest.mark.parametrize("text", ["{not json", "7", "[[[[", '{"events": 1, "number": "x"}'])
    def test_what_is_not_json_does_not_keep_a_job_from_ending(self, store, redis, field, text):
        """A client may send anything; a part that cannot be used is left out."""
        store.submit([a_job()])
        running = claim(store)
        redis.hset("ralf:job:j1", field, text)

        assert store.end(running, a_verdict())
        assert redis.hget("ralf:job:j1", "state") == b"succeeded"
        assert (redis.xlen("ralf:verdicts"), redis.zcard("ralf:outbox")) == (1, 0)
        assert store.verdict("j1") is not None
        assert redis.zcard("ralf:running:default") == 0

    @pytest.mark.parametrize("key", ["rq:job:j1", "ralf:session:default:live"])
    def test_a_key_of_another_type_does_not_keep_a_job_from_ending(self, store, redis, key):
        """Who may write Redis may put anything anywhere."""
        part = SessionPart(session_id="live", number=1, offset_ms=0)
        store.submit([a_job(session=part)])
        running = claim(store)
        redis.delete(key)
        redis.set(key, "a string")

        assert store.end(running, a_verdict())
        assert store.status("j1").state == "succeeded"
        kinds = [entry[b"type"] for _, entry in redis.xrange("ralf:verdicts")]
        assert kinds.count(b"verdict.ready") == 1


class TestFairness:
    """Who used much of the workers waits behind who used little."""

    @pytest.fixture
    def workers(self, redis):
        """Two workers, so that RQ's list has room for four jobs."""
        redis.sadd("rq:workers:ralf-default", "w1", "w2")

    def test_a_small_tenant_passes_a_list_full_of_anothers_jobs(self, store, redis, workers):
        """And the jobs that gave way keep their order."""
        store.submit([a_job(str(n), tenant="large") for n in range(8)])
        started = [claim(store).job_id, claim(store).job_id]
        store.submit([a_job(f"s{n}", tenant="small") for n in range(2)])
        order = [claim(store).job_id for _ in range(8)]

        assert started == ["j0", "j1"]
        assert order[:2] == ["js0", "js1"]
        assert order[2:] == [f"j{n}" for n in range(2, 8)]
        assert redis.exists("ralf:rank:default") == 0

    def test_tenants_that_hold_nothing_are_served_as_they_come(self, store):
        """The last does not pass the first."""
        store.submit([a_job(str(n), tenant=f"t{n}") for n in range(6)])
        assert [claim(store).job_id for _ in range(6)] == [f"j{n}" for n in range(6)]

    def test_who_used_much_of_late_waits_and_it_is_forgotten(self, store, redis, workers):
        """Four minutes of two workers; an hour later both are equal again."""
        store.submit([a_job(str(n), tenant="heavy") for n in range(2)], now=0.0)
        for running in [claim(store, now=0.0), claim(store, now=0.0)]:
            store.end(running, a_verdict().model_copy(update={"job_id": running.job_id}), now=120.0)
        store.submit([a_job("h", tenant="heavy"), a_job("l", tenant="light")], now=121.0)
        both = [claim(store, now=122.0) for _ in range(2)]
        soon = [running.job_id for running in both]
        for running in both:
            store.end(running, a_failure("fetch_denied"), now=123.0)
        store.submit([a_job("h2", tenant="heavy"), a_job("l2", tenant="new")], now=3600.0)
        later = [claim(store, now=3600.0).job_id for _ in range(2)]

        assert (soon, later) == (["jl", "jh"], ["jh2", "jl2"])

    def test_a_job_waits_behind_new_ones_of_others_for_a_minute_at_most(self, store, redis):
        """However much its tenant used, and however many others come."""
        redis.hset("ralf:used:heavy", mapping={"seconds": 9999, "at": 1000.0})
        store.submit([a_job("h", tenant="heavy")], now=1000.0)
        store.submit([a_job("l", tenant="light")], now=1059.0)
        first = claim(store, now=1059.0).job_id
        store.submit([a_job("n", tenant="new")], now=1061.0)

        assert (first, claim(store, now=1062.0).job_id) == ("jl", "jh")

    def test_a_capped_tenant_gives_way_and_gets_no_more_than_its_cap(self, redis, workers):
        """The cap counts what is listed too."""
        capped = Store(redis, Settings(tenant_running_max=1))
        capped.submit([a_job(str(n), tenant="a") for n in range(3)])
        capped.submit([a_job("b", tenant="b")])

        assert redis.lrange(QUEUE, 0, -1) == [b"j0", b"jb"]

    def test_a_job_of_a_dead_worker_runs_before_all_that_wait(self, store):
        """Its client has waited for a lease already."""
        store.submit([a_job(str(n)) for n in range(5)], now=0.0)
        claim(store, now=0.0)
        store.call("lost", 60.0)

        assert claim(store, now=61.0).job_id == "j0"


class TestBackfill:
    def test_a_tenants_backfill_does_not_put_its_uploads_behind_those_of_others(self, store):
        """Its use of the workers counts for its own fairness only."""
        store.submit([a_job("1", tenant="archive", priority="backfill")], now=100.0)
        old = store.begin(pop(store, "backfill"), "w", now=100.0)
        store.end(old, a_verdict(), now=150.0)
        store.submit([a_job("2", tenant="archive")], now=150.0)
        store.submit([a_job("3", tenant="other")], now=150.5)

        assert (pop(store), pop(store)) == ("j2", "j3")

    def test_a_cap_on_a_tenants_jobs_counts_its_backfill_apart(self, redis):
        """Or its archive would hold all of them."""
        store = Store(redis, Settings(tenant_running_max=1))
        store.submit([a_job(n, priority="backfill") for n in "12"] + [a_job("3")])

        assert (pop(store, "backfill"), pop(store, "backfill")) == ("j1", None)
        assert pop(store) == "j3"

    def test_the_stream_says_which_verdicts_are_a_backfills(self, store, redis):
        """A consumer of uploads leaves them out."""
        store.submit([a_job("1", priority="backfill"), a_job("2")])
        store.end(store.begin(pop(store, "backfill"), "w"), a_verdict())
        store.end(claim(store), a_verdict())
        told = [json.loads(entry[b"data"]) for _, entry in redis.xrange("ralf:verdicts")]

        assert [data.get("priority") for data in told] == ["backfill", None]

    def test_what_a_ledger_has_is_kept_for_minutes_and_uploads_are_not_touched(self, store, redis):
        """A million verdicts that are kept for a month would fill Redis."""
        store.submit([a_job(n, priority="backfill") for n in "12"] + [a_job("3")])
        store.end(store.begin(pop(store, "backfill"), "w"), a_verdict())
        store.end(claim(store), a_verdict())
        store.release(["j1", "j2", "j3", "nobody"])

        soon = [redis.ttl(f"ralf:{key}") for key in ("job:j1", "verdict:j1", "token:default:t1")]
        assert all(0 < seconds <= 600 for seconds in soon)
        assert redis.ttl("ralf:job:j2") == -1  # it has not ended
        assert redis.ttl("ralf:verdict:j3") > 86400
