"""What is put aside can be looked into, run again, or forgotten."""

from dataclasses import replace

import pytest

from ralf.worker.service.quarantine import Quarantine
from ralf.worker.service.store import Store
from ralf.worker.settings import Settings
from tests.documents import a_job, a_verdict
from tests.test_store import claim

pytestmark = pytest.mark.each_redis
FILE = "f" * 64


@pytest.fixture
def quarantine(redis) -> Quarantine:
    """One with job j1 in it."""
    store = Store(redis, Settings())
    store.submit([a_job(tenant="acme")])
    for at, code in ((100.0, "decoder_crashed"), (200.0, "job_timeout")):
        store.crashed(
            claim(store, worker=f"w{at:g}", now=at),
            code=code,
            message=f"{code} at {at:g}",
            detail="frame 7: signal 11",
            file_sha=FILE,
            now=at,
        )
    return Quarantine(store)


def test_an_entry_holds_what_is_needed_to_look_into_it(quarantine):
    """The job as submitted, its file, and each crash: when, where, how."""
    [entry] = quarantine.list()

    assert entry == quarantine.show("j1")
    assert (entry.job, entry.file_sha) == (a_job(tenant="acme"), FILE)
    assert (entry.code, entry.message, entry.at) == ("job_timeout", "job_timeout at 200", 200.0)
    assert [(c.code, c.worker, c.attempt, c.detail) for c in entry.crashes] == [
        ("decoder_crashed", "w100", 1, "frame 7: signal 11"),
        ("job_timeout", "w200", 2, "frame 7: signal 11"),
    ]


def test_it_outlives_the_job(quarantine):
    """Nothing in it expires."""
    assert quarantine.redis.ttl("ralf:quarantine") == -1


def test_a_retry_is_a_new_job_that_may_crash_anew(quarantine):
    """The ended one never changes; its file is given another chance."""
    store = quarantine.store
    submitted = quarantine.retry("j1")
    again = claim(store)
    outcome = store.crashed(again, code="decoder_crashed", message="", file_sha=FILE)

    assert submitted.job_id == again.job_id != "j1"
    assert store.status("j1").state == "quarantined"
    assert (again.job.media, again.job.tenant) == (a_job().media, "acme")
    assert outcome == "retried"
    assert quarantine.list() == []
    assert quarantine.retry("j1") is None


def test_asking_twice_gives_one_new_job(quarantine):
    """Whoever died between the two steps of a retry left the entry there."""
    entry = quarantine.redis.hget("ralf:quarantine", "j1")
    first = quarantine.retry("j1")
    quarantine.redis.hset("ralf:quarantine", "j1", entry)

    assert quarantine.retry("j1").job_id == first.job_id


def test_a_dropped_one_is_forgotten(quarantine):
    """Once."""
    assert quarantine.drop("j1")
    assert not quarantine.drop("j1")
    assert quarantine.show("j1") is None


def test_other_jobs_go_on(quarantine):
    """Only its own file is remembered."""
    quarantine.store.submit([a_job("2")])

    assert quarantine.store.end(claim(quarantine.store), a_verdict())


def test_only_the_latest_are_kept(redis):
    """A client that crashes workers all day does not fill Redis."""
    store = Store(redis, replace(Settings(), quarantine_max=2, quarantine_after=1))
    for number in range(4):
        store.submit([a_job(str(number))], now=float(number))
        store.crashed(claim(store, now=float(number)), code="hung", message="", now=float(number))

    assert [entry.job.job_id for entry in Quarantine(store).list()] == ["j3", "j2"]
