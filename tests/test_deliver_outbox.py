"""Deliveries: made by a job's end, taken for a while, settled once."""

from dataclasses import replace

import pytest

from ralf.worker.contract import Callback
from ralf.worker.service.deliver import Outbox
from ralf.worker.service.store import Store
from ralf.worker.settings import Settings
from tests.documents import READY, a_failure, a_job, a_verdict
from tests.test_store import claim

pytestmark = pytest.mark.each_redis
CALLBACK = Callback(url="https://hooks.example/ralf", secret_id="main")


@pytest.fixture
def outbox(redis) -> Outbox:
    return Outbox(Store(redis, Settings()))


def end_one(outbox: Outbox, name: str = "1", *, now: float = 100.0) -> None:
    """A job that ends with a verdict and wants it pushed."""
    outbox.store.submit([a_job(name, callback=CALLBACK, tag="mine")], now=now)
    outbox.store.end(claim(outbox.store, now=now), a_verdict(), now=now)


def test_an_end_makes_one_delivery_with_what_the_receiver_needs(outbox):
    """Thin: the verdict is fetched by the job's id."""
    end_one(outbox)
    [delivery] = outbox.take(10, 30.0, now=100.0)

    assert delivery.event == "verdict.ready"
    assert (delivery.url, delivery.secret_id) == (CALLBACK.url, "main")
    assert (delivery.subject, delivery.attempts, delivery.created_at) == ("j1", 1, 100.0)
    assert dict(delivery.data) == READY


def test_a_failure_is_pushed_with_its_code(outbox):
    """Under the other event."""
    outbox.store.submit([a_job(callback=CALLBACK)])
    outbox.store.end(claim(outbox.store), a_failure("corrupt_media", "no frame"))
    [delivery] = outbox.take(1, 30.0)

    assert delivery.event == "verdict.failed"
    assert (delivery.data["state"], delivery.data["code"]) == ("failed", "corrupt_media")


def test_the_id_depends_on_what_it_says_only(outbox, redis):
    """Another Redis, another day: the same job's end has the same id, another job's another."""
    end_one(outbox)
    first = outbox.take(1, 30.0, now=100.0)[0].id
    redis.flushall()
    end_one(outbox, now=900.0)
    end_one(outbox, "2", now=900.0)
    ids = {delivery.subject: delivery.id for delivery in outbox.take(2, 30.0, now=900.0)}

    assert first == ids["j1"] != ids["j2"]
    assert first.startswith("msg_")


def test_a_taken_delivery_comes_back_when_its_deliverer_dies(outbox):
    """After its lease, its attempts counted."""
    end_one(outbox)
    first = outbox.take(10, 30.0, now=100.0)
    meanwhile = outbox.take(10, 30.0, now=129.0)
    again = outbox.take(10, 30.0, now=130.0)

    assert (len(first), meanwhile, len(again)) == (1, [], 1)
    assert again[0].attempts == 2


def test_a_delivered_one_is_gone(outbox, redis):
    """And cannot be put off or buried by a slow deliverer."""
    end_one(outbox)
    [delivery] = outbox.take(1, 30.0, now=100.0)
    outbox.delivered(delivery.id)
    outbox.postpone(delivery.id, 105.0, "timeout")
    outbox.bury(delivery.id, "timeout")

    assert outbox.take(10, 30.0, now=1e9) == outbox.dead() == []
    assert not redis.keys("ralf:delivery:*")


def test_an_untried_one_loses_one_attempt_however_often_it_is_given_back(outbox):
    """The answer may be lost and the same be sent again; fewer than none would wait for a day."""
    end_one(outbox)
    [delivery] = outbox.take(1, 30.0, now=100.0)
    outbox.put_off(delivery.id, 101.0)
    outbox.put_off(delivery.id, 101.0)

    assert outbox.take(1, 30.0, now=101.0)[0].attempts == 1


def test_a_postponed_one_is_due_then(outbox):
    """Not before."""
    end_one(outbox)
    [delivery] = outbox.take(1, 30.0, now=100.0)
    outbox.postpone(delivery.id, 400.0, "answered 503")

    assert outbox.take(1, 30.0, now=399.0) == []
    assert outbox.take(1, 30.0, now=400.0)[0].error == "answered 503"


def test_dead_letters_are_listed_redelivered_and_dropped(outbox):
    """They are kept until somebody decides."""
    for name in "12":
        end_one(outbox, name)
    for place, delivery in enumerate(outbox.take(2, 30.0, now=100.0)):
        outbox.bury(delivery.id, "gave up", now=200.0 + place)
    later, earlier = outbox.dead()

    assert [later.error, earlier.error] == ["gave up", "gave up"]
    assert outbox.redeliver(earlier.id, now=300.0)
    assert not outbox.redeliver(earlier.id, now=300.0)
    assert [d.attempts for d in outbox.take(5, 30.0, now=300.0)] == [1]
    assert outbox.drop(later.id)
    assert not outbox.drop(later.id)
    assert outbox.dead() == []


def test_a_disabled_endpoint_stays_so_until_enabled(outbox):
    """For its tenant only."""
    outbox.disable_endpoint("a", "https://x.y/z", now=1.0)

    assert outbox.endpoint_disabled("a", "https://x.y/z")
    assert not outbox.endpoint_disabled("b", "https://x.y/z")
    assert outbox.disabled_endpoints() == [("a", "https://x.y/z")]
    assert outbox.enable_endpoint("a", "https://x.y/z")
    assert not outbox.endpoint_disabled("a", "https://x.y/z")


def test_only_the_latest_dead_letters_are_kept(redis):
    """An endpoint that never answers does not fill Redis."""
    outbox = Outbox(Store(redis, replace(Settings(), dead_letters_max=2)))
    for number in range(4):
        end_one(outbox, str(number), now=float(number))
        (delivery,) = outbox.take(1, 60.0, now=float(number))
        outbox.bury(delivery.id, "gone", now=float(number))

    assert [letter.subject for letter in outbox.dead()] == ["j3", "j2"]
    assert len(redis.keys("ralf:delivery:*")) == 2
