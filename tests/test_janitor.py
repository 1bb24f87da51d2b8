"""Whatever a dead process left is found, and put back once."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from structlog.testing import capture_logs

from ralf.worker.contract import Callback, SessionPart
from ralf.worker.service.connection import connect
from ralf.worker.service.janitor import Janitor, SweepReport
from ralf.worker.service.store import Store
from ralf.worker.settings import Settings
from ralf.worker.telemetry import Metrics
from tests.documents import a_failure, a_job, a_verdict
from tests.redis_server import RedisServer
from tests.test_store import QUEUE, claim, pop
from tests.waiting import until

pytestmark = pytest.mark.each_redis
SETTINGS = Settings(heartbeat_ttl_s=30.0, janitor_every_s=5.0)


@pytest.fixture
def store(redis) -> Store:
    return Store(redis, SETTINGS)


@pytest.fixture
def janitor(store) -> Janitor:
    return Janitor(store, SETTINGS)


def test_a_clean_house_is_left_as_it_is(store, janitor, redis):
    """Jobs that wait, run or have ended are nobody's business."""
    store.submit([a_job(str(n)) for n in range(5)], now=100.0)
    store.end(claim(store, now=100.0), a_verdict(), now=101.0)
    claim(store, now=101.0)
    before = {key: redis.dump(key) for key in redis.keys("*")}

    assert not janitor.run_once(now=105.0)
    assert before == {key: redis.dump(key) for key in redis.keys("*")}


def test_a_killed_workers_job_runs_again_within_a_minute(store, janitor):
    """30 s of lease and a sweep each 5 s; the job goes to the next worker at once."""
    store.submit([a_job()], now=100.0)
    claim(store, now=100.0)
    early = janitor.run_once(now=129.0)
    report = janitor.run_once(now=130.0 + SETTINGS.janitor_every_s)

    assert not early
    assert report.lost == {"j1": "retried"}
    assert claim(store, now=136.0).alone


def test_the_jobs_that_a_sweep_ends_are_counted(store):
    """A killed worker counts nothing any more, and the alert on worker_lost reads this counter."""
    metrics = Metrics()
    janitor = Janitor(store, SETTINGS, metrics=metrics)
    late = datetime.fromtimestamp(150.0, UTC)
    store.submit([a_job("1"), a_job("2", deadline=late)], now=100.0)
    for begun in (100.0, 200.0):
        claim(store, now=begun)
        janitor.run_once(now=begun + 60.0)

    def counted(outcome: str, code: str) -> float:
        return metrics.jobs.labels(outcome, code)._value.get()

    assert store.status("j1").state == "quarantined"
    assert counted("crashed", "worker_lost") == 1
    assert counted("quarantined", "worker_lost") == 1
    assert counted("expired", "deadline_passed") == 1


def test_a_job_that_cannot_be_moved_does_not_hide_the_others(store, janitor, redis):
    """The sweep says which one it is, and finds the rest."""
    store.submit([a_job("1"), a_job("2")], now=100.0)
    for _ in range(2):
        claim(store, now=100.0)
    redis.rpush("ralf:crashes:job:j1", "not a number")
    report = janitor.run_once(now=200.0)

    assert report.lost == {"j1": "stuck", "j2": "retried"}


def test_after_an_outage_a_running_job_is_not_taken_for_lost(store):
    """Nobody could beat, nor sweep: who runs may say so first; who is dead is found later."""
    janitor = Janitor(store, replace(SETTINGS, janitor_every_s=1.0))

    def swept(now: float) -> dict[str, str]:
        report = janitor.run_if_due(now)
        assert report is not None
        return report.lost

    store.submit([a_job("1"), a_job("2")], now=100.0)
    well, dead = claim(store, now=100.0), claim(store, now=100.0)
    swept(101.0)
    after_the_outage = swept(160.0)
    assert store.beat(well, now=161.0) == "go_on"
    soon, later = swept(174.0), swept(176.0)

    assert (after_the_outage, soon) == ({}, {})
    assert later == {dead.job_id: "retried"}


def test_a_clock_that_goes_back_stops_neither_sweeps_nor_leases(store, janitor):
    """By an hour: what was due soon is due soon, and a dead worker's job is found in a lease."""
    store.submit([a_job("1"), a_job("2")], now=4000.0)
    dead, late = claim(store, now=4000.0), claim(store, now=4000.0)
    store.retry(late, a_failure("fetch_failed"), delay_s=10.0, now=4000.0)
    assert janitor.run_if_due(4001.0) is not None
    found = [janitor.run_if_due(400.0 + seconds) for seconds in range(0, 36, 5)]
    swept = [report for report in found if report is not None]

    assert len(swept) == len(found)
    assert [job for report in swept for job in report.due] == ["j2"]
    assert [report.lost for report in swept if report.lost] == [{dead.job_id: "retried"}]


def test_a_worker_that_beats_keeps_its_job(store, janitor):
    """However long it takes."""
    store.submit([a_job()], now=0.0)
    running = claim(store, now=0.0)
    for at in range(10, 600, 10):
        assert store.beat(running, now=float(at)) == "go_on"
        assert not janitor.run_once(now=at + 9.0)


def test_a_job_that_loses_two_workers_is_quarantined(store, janitor):
    """It is the likely cause."""
    store.submit([a_job()], now=0.0)
    outcomes = []
    for at in (100.0, 200.0):
        claim(store, now=at)
        outcomes.append(janitor.run_once(now=at + 31.0).lost["j1"])

    assert outcomes == ["retried", "quarantined"]
    assert store.status("j1").failure.code == "worker_lost"


def test_a_lost_worker_whose_child_had_company_is_not_counted(store, janitor, redis):
    """As the record says."""
    store.submit([a_job()], now=0.0)
    store.beat(claim(store, now=0.0), alone=False, now=1.0)
    janitor.run_once(now=40.0)

    assert redis.get("ralf:crashes:job:j1") is None


def test_a_popped_job_that_nobody_began_comes_back(store, janitor, redis):
    """After 15 s by the janitor's own watch; RQ's takes over a minute."""
    store.submit([a_job()], now=0.0)
    pop(store)
    passes = [janitor.run_once(now=at).reclaimed for at in (100.0, 105.0, 110.0, 115.0)]

    assert passes == [(), (), (), ("j1",)]
    assert redis.llen(f"{QUEUE}:intermediate") == 0
    assert claim(store).job_id == "j1"


def test_a_slow_worker_still_begins_what_it_popped(store, janitor):
    """The watch starts anew with each pop."""
    store.submit([a_job()], now=0.0)
    pop(store)
    janitor.run_once(now=100.0)
    store.hand_back(store.begin("j1", "w", now=110.0), now=112.0)
    pop(store)

    assert not janitor.run_once(now=114.0).reclaimed
    assert store.begin("j1", "w", now=114.5) is not None


@pytest.mark.parametrize("end", ["cancel", "flush"])
def test_an_entry_of_a_job_that_is_no_more_is_swept(store, janitor, redis, end):
    """Ended or gone: nothing to run."""
    store.submit([a_job()])
    pop(store)
    if end == "flush":
        redis.delete("ralf:job:j1")
    else:
        store.cancel("j1")
        redis.rpush(f"{QUEUE}:intermediate", "j1")
    janitor.run_once()

    assert redis.llen(f"{QUEUE}:intermediate") == 0
    assert redis.zcard("ralf:waiting:default") == 0


def test_a_put_off_job_is_next_when_its_time_has_come(store, janitor):
    """Not before."""
    store.submit([a_job()], now=0.0)
    store.retry(claim(store, now=0.0), a_failure(), delay_s=15.0, now=100.0)

    assert not janitor.run_once(now=114.0)
    assert janitor.run_once(now=115.0).due == ("j1",)
    assert claim(store, now=115.0).retries == 1


@pytest.mark.parametrize("place", ["list", "popped", "pending", "turn", "rq job"])
def test_a_queued_job_in_no_list_is_found(store, janitor, redis, place):
    """Whatever lost it: an eviction, a hand on the keys, RQ's own tools."""
    store.submit([a_job(str(n)) for n in range(4)])
    if place == "popped":
        pop(store)
    key = {
        "list": QUEUE,
        "popped": f"{QUEUE}:intermediate",
        "pending": "ralf:pending:default:default",
        "turn": "ralf:turn:default",
        "rq job": QUEUE,
    }[place]
    redis.delete(key, *(["rq:job:j0"] if place == "rq job" else []))
    janitor.run_once()

    assert {"j0", "j1", "j2", "j3"} == {claim(store).job_id for _ in range(4)}
    assert not janitor.run_once()


def test_rqs_view_is_rebuilt(store, janitor, redis):
    """A job whose RQ hash is gone is popped by RQ and dropped silently: it comes back whole."""
    store.submit([a_job()], now=0.0)
    redis.delete("rq:job:j1")
    pop(store)
    janitor.run_once(now=10.0)
    janitor.run_once(now=30.0)

    assert redis.hget("rq:job:j1", "status") == b"queued"
    assert b"ralf.worker.service.jobs.moderate" in redis.hget("rq:job:j1", "data")


def test_a_queued_job_expires_at_its_deadline(store, janitor, redis):
    """Pushed like any end."""
    deadline = datetime.fromtimestamp(500, UTC)
    store.submit([a_job(deadline=deadline, callback=Callback(url="https://a.b/c"))], now=100.0)

    assert not janitor.run_once(now=499.0)
    assert janitor.run_once(now=500.0).expired == ("j1",)
    assert store.status("j1").state == "expired"
    assert (redis.llen(QUEUE), redis.zcard("ralf:outbox")) == (0, 1)


def test_a_running_job_is_left_to_its_parent_at_its_deadline(store, janitor):
    """Which kills the child, and knows why."""
    store.submit([a_job(deadline=datetime.fromtimestamp(500, UTC))], now=490.0)
    claim(store, now=495.0)

    assert not janitor.run_once(now=505.0)
    assert janitor.run_once(now=530.0).lost == {"j1": "expired"}


def test_dead_workers_are_forgotten_and_living_ones_counted(janitor, redis):
    """RQ's entry of a killed worker stays until somebody cleans up."""
    redis.sadd("rq:workers:ralf-default", "rq:worker:alive", "rq:worker:dead")
    redis.sadd("rq:workers", "rq:worker:alive", "rq:worker:dead")
    redis.hset("rq:worker:alive", "state", "idle")
    redis.zadd("rq:wip:ralf-default", {"j1:e1": 50, "j2:e2": 5000})
    report = janitor.run_once(now=100.0)

    assert report.workers_forgotten == 1
    assert redis.smembers("rq:workers") == {b"rq:worker:alive"}
    assert redis.zrange("rq:wip:ralf-default", 0, -1) == [b"j2:e2"]


def test_a_worker_that_would_be_listed_for_ever_gets_a_lease(janitor, redis):
    """RQ wrote its record after the old one had expired, and it was killed before it could beat."""
    redis.sadd("rq:workers:ralf-default", "rq:worker:killed", "rq:worker:beating")
    redis.hset("rq:worker:killed", "state", "busy")
    redis.hset("rq:worker:beating", "state", "busy")
    redis.pexpire("rq:worker:beating", 5_000)
    janitor.run_once()

    assert 25_000 < redis.pttl("rq:worker:killed") <= 30_000
    assert redis.pttl("rq:worker:beating") <= 5_000


def test_a_session_left_unfolded_is_folded(store, janitor, redis):
    """Its worker died between the end and the fold."""
    store.submit([a_job(session=SessionPart(session_id="s", number=0, offset_ms=0))], now=0.0)
    pop(store)
    store.begin("j1", "w", nonce="n", now=0.0)
    store.call("finish", 1.0, "j1", "n", "failed", '{"code":"x"}', "{}", "", "", "")

    assert janitor.run_once(now=10.0).sessions_folded == 1
    assert redis.hget("ralf:session:default:s", "verdict") is not None
    assert not janitor.run_once(now=20.0)


def test_many_janitors_move_a_job_once(store, redis):
    """All at the same moment."""
    store.submit([a_job(str(n)) for n in range(20)], now=0.0)
    for _ in range(20):
        claim(store, now=0.0)
    reports = []
    threads = [
        threading.Thread(target=lambda: reports.append(Janitor(store, SETTINGS).run_once(now=31.0)))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sum(len(report.lost) for report in reports) == 20
    assert {claim(store).job_id for _ in range(20)} == {f"j{n}" for n in range(20)}
    assert pop(store) is None


def test_only_one_of_many_sweeps_in_its_time(store, janitor):
    """To save work."""
    reports = [janitor.run_if_due() for _ in range(5)]

    assert [report is not None for report in reports] == [True, False, False, False, False]


@contextmanager
def sweeping(janitor: Janitor) -> Iterator[list[dict[str, Any]]]:
    """The janitor in its thread while the block runs; gives what it logs."""
    stop = threading.Event()
    thread = threading.Thread(target=janitor.run_forever, args=(stop,))
    with capture_logs() as lines:
        thread.start()
        try:
            yield lines
        finally:
            stop.set()
            thread.join()


def test_it_goes_on_after_an_outage_of_redis():
    """And then finds what the outage left."""
    server = RedisServer(aof=True)
    server.start()
    settings = replace(SETTINGS, janitor_every_s=0.05, heartbeat_ttl_s=0.2)
    store = Store(connect(server.url, attempts=0), settings)
    try:
        store.submit([a_job()])
        claim(store)
        server.kill()
        with sweeping(Janitor(store, settings)) as lines:
            until(lambda: [line["event"] for line in lines].count("redis.unreachable") > 1)
            server.start()
            until(lambda: any(line["event"] == "janitor.swept" for line in lines))

        assert store.status("j1").state == "queued"
    finally:
        store.redis.close()
        server.stop()


def test_a_fault_of_ours_ends_one_sweep_and_not_the_janitor(store, monkeypatch):
    """It sweeps in a thread of the worker, whose end nobody would see."""
    settings = replace(SETTINGS, janitor_every_s=0.01)
    janitor, faults = Janitor(store, settings), [ValueError("what no sweep should meet")]
    run_once = janitor.run_once

    def fails_first(now: float | None = None) -> SweepReport:
        if faults:
            raise faults.pop()
        return run_once(now)

    monkeypatch.setattr(janitor, "run_once", fails_first)
    store.submit([a_job()], now=0.0)
    claim(store, now=0.0)
    with sweeping(janitor) as lines:
        until(lambda: any(line["event"] == "janitor.swept" for line in lines))

    assert lines[0]["event"] == "janitor.broke"
    assert lines[-1]["lost"] == {"j1": "retried"}
