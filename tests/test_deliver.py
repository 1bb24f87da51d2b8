"""Pushes: signed, retried by the clock, never to where they must not go."""

import base64
import email.utils
import hashlib
import hmac
import itertools
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
from redis.exceptions import ConnectionError as NoConnection
from standardwebhooks import Webhook, WebhookVerificationError
from structlog.testing import capture_logs

from ralf.worker import telemetry
from ralf.worker.contract import Callback
from ralf.worker.service import deliver
from ralf.worker.service.deliver import Deliverer, Outbox, Secrets, webhook_body
from ralf.worker.service.records import Delivery
from ralf.worker.service.store import Store
from ralf.worker.settings import Settings, SettingsError
from tests.documents import READY, a_failure, a_job, a_verdict
from tests.test_egress import TRICKS, guarded
from tests.test_store import claim
from tests.waiting import LONG_S, until
from tests.web import Request, Web, for_ever, reply, serving

ROOT = Path(__file__).resolve().parent.parent
DELAYS_S = Settings().webhook_delays_s


def a_secret(seed: int, size: int = 32) -> str:
    """A signing secret."""
    return "whsec_" + base64.b64encode(bytes([seed]) * size).decode()


OLD, NEW = a_secret(1), a_secret(2)


class Clock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def end_one(store: Store, url: str, name: str = "1", *, now: float | None = None, **fields) -> None:
    """A job that ends with a verdict (or the given outcome), and wants it pushed."""
    outcome = fields.pop("outcome", a_verdict())
    callback = Callback(url=url, secret_id=fields.pop("secret_id", "main"))
    store.submit([a_job(name, callback=callback, tag="mine", **fields)], now=now)
    assert store.end(claim(store, now=now), outcome, now=now)


def deliverer(store: Store, web: Web | None = None, clock=None, **settings) -> Deliverer:
    """One that may push to loopback; no jitter."""
    ports = {"fetch_ports": (web.port,)} if web else {}
    given = (
        {"webhook_secrets": (f"*/main={OLD}",), "allow_private_addresses": True} | ports | settings
    )
    return Deliverer(store, Settings(**given), clock=clock, jitter=lambda: 1.0)


def next_due(store: Store) -> float | None:
    """When the next delivery is due; None when there is none."""
    first = store.redis.zrange("ralf:outbox", 0, 0, withscores=True)
    return float(first[0][1]) if first else None


def due_at(store: Store) -> float:
    """When the one delivery is due."""
    at = next_due(store)
    assert at is not None
    return at


@contextmanager
def pushing(pusher: Deliverer) -> Iterator[threading.Event]:
    """It runs in a thread until the event, which the end of the block sets too."""
    stop = threading.Event()
    running = threading.Thread(target=pusher.run_forever, args=(stop,))
    running.start()
    try:
        yield stop
    finally:
        stop.set()
        running.join()


class TestPush:
    def test_a_receiver_can_verify_it(self, store):
        """With the library, and by the standard's text alone."""
        with serving(lambda request: reply(204)) as web:
            end_one(store, f"{web.url}/hook?token=t")
            assert deliverer(store, web).run_once() == 1
        [request] = web.requests
        headers = request.headers
        signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + request.body
        key = base64.b64decode(OLD.removeprefix("whsec_"))
        by_hand = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()

        assert headers["webhook-signature"] == f"v1,{by_hand}"
        said = Webhook(OLD).verify(request.body, headers)
        assert (request.method, request.path) == ("POST", "/hook?token=t")
        assert headers["content-type"] == "application/json"
        assert set(said) == {"type", "timestamp", "data"}
        assert said["type"] == "verdict.ready"
        assert datetime.fromisoformat(said["timestamp"]).tzinfo is not None
        assert said["data"] == READY
        assert headers["webhook-id"].startswith("msg_")
        with pytest.raises(WebhookVerificationError):
            Webhook(OLD).verify(request.body + b" ", headers)

    @pytest.mark.parametrize("status", [200, 201, 204, 299])
    def test_any_2xx_settles_it(self, store, redis, status):
        """Nothing of it is left."""
        with serving(lambda request: reply(status)) as web:
            end_one(store, web.url)
            deliverer(store, web).run_once()

        assert next_due(store) is None
        assert not redis.keys("ralf:delivery:*")
        assert Outbox(store).dead() == []

    def test_during_a_rotation_both_secrets_sign(self, store):
        """A receiver may know either."""
        with serving(lambda request: reply(204)) as web:
            end_one(store, web.url)
            secrets = (f"*/main={OLD}", f"*/other={a_secret(3)}", f"*/main={NEW}")
            deliverer(store, web, webhook_secrets=secrets).run_once()
        [request] = web.requests

        assert len(request.headers["webhook-signature"].split(" ")) == 2
        for secret in (OLD, NEW):
            assert Webhook(secret).verify(request.body, request.headers)
        with pytest.raises(WebhookVerificationError):
            Webhook(a_secret(3)).verify(request.body, request.headers)

    def test_without_its_secret_nothing_is_sent(self, store):
        """A dead letter says which one is missing; with it, redelivery works."""
        with serving(lambda request: reply(204)) as web:
            end_one(store, web.url, secret_id="theirs")
            deliverer(store, web).run_once()
            [letter] = Outbox(store).dead()

            assert web.connections == 0
            assert "no secret 'theirs'" in letter.error
            assert Outbox(store).redeliver(letter.id)
            deliverer(store, web, webhook_secrets=(f"*/theirs={NEW}",)).run_once()

        assert len(web.requests) == 1

    def test_a_secret_signs_for_its_own_tenant_only(self, store):
        """Another's job may name it, and is pushed unsigned to nobody; * is for everyone."""
        secrets = (f"acme/main={OLD}", f"*/shared={NEW}")
        with serving(lambda request: reply(204)) as web:
            for name, tenant, secret_id in (
                ("1", "acme", "main"),
                ("2", "globex", "main"),
                ("3", "globex", "shared"),
            ):
                end_one(store, web.url, name, tenant=tenant, secret_id=secret_id)
            deliverer(store, web, webhook_secrets=secrets).run_once()
            bodies = [json.loads(request.body)["data"]["job_id"] for request in web.requests]

        [letter] = Outbox(store).dead()
        assert sorted(bodies) == ["j1", "j3"]
        assert letter.subject == "j2"
        assert "no secret 'main' for tenant globex" in letter.error

    @pytest.mark.parametrize(
        "entry",
        [
            "main",
            "*/main=",
            f"={OLD}",
            f"main={OLD}",
            f"/main={OLD}",
            f"*/={OLD}",
            "*/main=hunter2",
            "*/main=whsec_!",
            f"*/main={a_secret(1, 23)}",
        ],
    )
    def test_a_secret_that_is_none_stops_the_start(self, store, entry):
        """The message does not repeat it."""
        with pytest.raises(SettingsError, match="entry 2 should be") as caught:
            deliverer(store, webhook_secrets=(f"*/main={OLD}", entry))

        assert "hunter2" not in str(caught.value)

    def test_unpadded_base64_is_a_secret_too(self):
        """As other tools print it."""
        padded, bare = Secrets([f"*/a={OLD}"]), Secrets([f"*/a={OLD.rstrip('=')}"])
        at = datetime(2026, 1, 1, tzinfo=UTC)

        assert OLD.endswith("=")
        assert padded.sign("t", "a", "m", at, "x") == bare.sign("t", "a", "m", at, "x") != ""

    def test_logs_and_metrics_show_neither_secret_nor_path(self, store):
        """The host is enough to find it."""
        count = telemetry.METRICS.deliveries.labels("delivered")._value
        before = count.get()
        with serving(lambda request: reply(204)) as web:
            end_one(store, f"{web.url}/path-secret?token=query-secret")
            with capture_logs() as lines:
                deliverer(store, web).run_once()
        [line] = lines

        assert line["event"] == "webhook.delivered"
        assert (line["subject"], line["attempt"], line["status"]) == ("j1", 1, 204)
        assert line["host"] == web.url
        assert "-secret" not in str(line)
        assert count.get() == before + 1

    def test_a_long_message_is_cut_to_fit(self):
        """Whatever its characters weigh."""
        said = a_delivery(data={"message": '"é\n' * 5000, "job_id": "j1"})
        text = webhook_body(said, 1000)
        body = json.loads(text)

        assert 996 <= len(text.encode()) <= 1000
        assert body["data"]["message"].endswith("…")
        assert body["data"]["message"][:-1] in said.data["message"]
        assert webhook_body(a_delivery(data={"x": "y" * 1000}), 1000) is None

    def test_what_cannot_fit_is_a_dead_letter(self, store):
        """With the bound."""
        with serving(lambda request: reply(204)) as web:
            end_one(store, web.url)
            deliverer(store, web, webhook_max_body=50).run_once()

        assert web.connections == 0
        assert "more than 50 bytes" in Outbox(store).dead()[0].error


def a_delivery(**fields) -> Delivery:
    given = {
        "id": "msg_1",
        "event": "verdict.failed",
        "tenant": "acme",
        "subject": "j1",
        "url": "https://hooks.example/x",
        "secret_id": "main",
        "data": {},
        "created_at": 100.0,
        "attempts": 1,
    }
    return Delivery(**(given | fields))


class TestRetries:
    def test_ten_attempts_by_the_schedule_then_a_dead_letter(self, store, clock):
        """Same id and body each time; the time and its signature are new."""
        with serving(lambda request: reply(500)) as web:
            end_one(store, web.url, now=clock.now, outcome=a_failure("corrupt_media", "no frame"))
            pusher, waits = deliverer(store, web, clock), []
            while next_due(store) is not None:
                assert pusher.run_once() == 1
                at = next_due(store)
                if at is not None:
                    waits.append(at - clock.now)
                    clock.now = at
        requests = web.requests
        minute, hour = 60, 3600

        assert waits == [
            *(5, 5 * minute, 30 * minute),
            *(2 * hour, 5 * hour, 10 * hour, 14 * hour, 20 * hour, 24 * hour),
        ]
        assert len(requests) == 10
        assert len({request.headers["webhook-id"] for request in requests}) == 1
        assert len({request.body for request in requests}) == 1
        assert len({request.headers["webhook-timestamp"] for request in requests}) == 10
        [letter] = Outbox(store).dead()
        assert "gave up after 10 attempts; the last: answered 500" in letter.error

    def test_nothing_is_pushed_before_it_is_due(self, store, clock):
        """Not even a second."""
        with serving(lambda request: reply(500)) as web:
            end_one(store, web.url, now=clock.now)
            pusher = deliverer(store, web, clock)
            pusher.run_once()
            clock.now += 4.9
            early = pusher.run_once()
            clock.now += 0.1

            assert (early, pusher.run_once()) == (0, 1)

    def test_retries_are_spread_by_ten_percent(self, store):
        """Many that fail together do not come back together."""
        jitter = Deliverer(store, Settings())._jitter
        draws = [jitter() for _ in range(200)]

        assert 0.9 <= min(draws) < 0.93
        assert 1.07 < max(draws) <= 1.1

    @pytest.mark.parametrize("status", [300, 301, 302, 307, 308, 304])
    def test_a_redirect_is_a_failure_and_is_not_followed(self, store, clock, status):
        """Its target may be anywhere."""
        with serving(lambda request: reply(status, Location="/other")) as web:
            end_one(store, web.url, now=clock.now)
            deliverer(store, web, clock).run_once()

        assert len(web.requests) == 1
        assert due_at(store) == clock.now + DELAYS_S[0]

    @pytest.mark.parametrize(
        ("status", "said", "wait"),
        [
            (429, "120", 120),
            (503, "120", 120),
            (502, "60", 60),
            (504, "60", 60),
            (429, "1", DELAYS_S[0]),
            (503, "0", DELAYS_S[0]),
            (429, "99999999999", 86400),
            (429, "soon", DELAYS_S[0]),
            (429, "-5", DELAYS_S[0]),
            (429, email.utils.formatdate(1_000_090, usegmt=True), 90),
            (429, email.utils.formatdate(900_000, usegmt=True), DELAYS_S[0]),
            (500, "120", DELAYS_S[0]),
            (400, "120", DELAYS_S[0]),
        ],
    )
    def test_retry_after_is_honoured_from_who_is_busy(self, store, clock, status, said, wait):
        """Never sooner than the schedule, never over a day."""
        with serving(lambda request: reply(status, Retry_After=said)) as web:
            end_one(store, web.url, now=clock.now)
            deliverer(store, web, clock).run_once()

        assert due_at(store) == clock.now + wait

    def test_gone_disables_the_endpoint_for_its_tenant(self, store, clock):
        """No connection is made to it until somebody enables it."""
        with serving(lambda request: reply(410)) as web:
            for name, tenant in (("1", "acme"), ("2", "acme"), ("3", "other")):
                end_one(store, web.url, name, now=clock.now, tenant=tenant)
                deliverer(store, web, clock).run_once()
            outbox = Outbox(store)
            errors = {letter.subject: letter.error for letter in outbox.dead()}

            assert len(web.requests) == 2
            assert "410 Gone" in errors["j1"]
            assert "answered 410 before" in errors["j2"]
            assert outbox.disabled_endpoints() == [("acme", web.url), ("other", web.url)]
            outbox.enable_endpoint("acme", web.url)
            second = next(letter for letter in outbox.dead() if letter.subject == "j2")
            outbox.redeliver(second.id, now=clock.now)
            deliverer(store, web, clock).run_once()

        assert len(web.requests) == 3

    def test_silence_is_a_failure_after_the_timeout(self, store, clock):
        """All of it: name, connection, TLS, answer."""
        endless = itertools.chain([b"HTTP/1.1 200 X\r\n"], for_ever(b"A: b\r\n", 0.2))
        with serving(lambda request: endless) as web:
            end_one(store, web.url, now=clock.now)
            deliverer(store, web, clock, webhook_timeout_s=0.3).run_once()

        assert due_at(store) == clock.now + DELAYS_S[0]

    def test_an_answer_that_never_ends_is_left(self, store):
        """Its status was said; its body is nobody's business."""
        endless = itertools.chain([b"HTTP/1.1 200 X\r\n\r\n"], for_ever(b"x" * 1000, 0.02))
        with serving(lambda request: endless) as web:
            end_one(store, web.url)
            deliverer(store, web).run_once()

        assert next_due(store) is None


class TestGuard:
    def test_every_trick_is_a_dead_letter(self, store, clock):
        """And the server was never called."""
        tricks = {name: url for name, url in TRICKS.items() if re.match("https?://", url)}
        with serving(lambda request: reply(204)) as web:
            for number, name in enumerate(tricks):
                url = tricks[name].format(port=web.port)
                end_one(store, url, str(number), now=clock.now)
            settings = Settings(webhook_secrets=(f"*/main={OLD}",))
            pusher = Deliverer(store, settings, egress=guarded(web), clock=clock)
            while next_due(store) is not None:
                pusher.run_once()
                clock.now += 30

        assert web.connections == 0
        letters = Outbox(store).dead()
        assert len(letters) == len(tricks) > 24
        assert all(letter.error.startswith("forbidden: ") for letter in letters)
        assert {letter.attempts for letter in letters} == {1}

    def test_the_same_guard_pushes_to_a_public_name(self, store):
        """So that the test above can fail."""
        with serving(lambda request: reply(204)) as web:
            end_one(store, f"http://public.example:{web.port}/hook")
            settings = Settings(webhook_secrets=(f"*/main={OLD}",))
            Deliverer(store, settings, egress=guarded(web)).run_once()

        assert web.requests[0].headers["host"] == f"public.example:{web.port}"

    def test_the_hosts_of_uploads_do_not_bound_webhooks(self, store):
        """RALF_FETCH_HOSTS is about fetching."""
        with serving(lambda request: reply(204)) as web:
            end_one(store, web.url)
            deliverer(store, web, fetch_hosts=("media.example",)).run_once()

        assert len(web.requests) == 1


class TestTogether:
    def test_two_deliverers_push_one_record_once(self, store, redis_url):
        """Taking it is one script."""
        with serving(lambda request: [0.2, *reply(204)]) as web:
            for name in "12345":
                end_one(store, web.url, name)
            both = [deliverer(store, web) for _ in "ab"]
            threads = [threading.Thread(target=one.run_once) for one in both]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            both[0].run_once()
            while next_due(store) is not None:  # the fifth had to wait for its turn
                time.sleep(0.05)
                both[0].run_once()

        ids = [request.headers["webhook-id"] for request in web.requests]
        assert len(ids) == len(set(ids)) == 5

    def test_one_that_dies_in_between_leaves_it_to_another(self, store, clock):
        """After the lease, under the same id."""
        with serving(lambda request: reply(204)) as web:
            end_one(store, web.url, now=clock.now)
            [taken] = Outbox(store).take(1, 70.0, now=clock.now)
            clock.now += 69
            early = deliverer(store, web, clock).run_once()
            clock.now += 1
            deliverer(store, web, clock).run_once()

        assert early == 0
        assert [r.headers["webhook-id"] for r in web.requests] == [taken.id]

    def test_one_slow_endpoint_starves_no_other(self, store):
        """And what waits for it is not counted as tried."""
        let = threading.Event()

        def slowly(request: Request):
            let.wait(LONG_S)
            return reply(204)

        with serving(slowly) as slow, serving(lambda request: reply(204)) as fast:
            for number in range(60):
                end_one(store, slow.url, f"s{number}")
            for number in range(20):
                end_one(store, fast.url, f"f{number}")
            ports = (slow.port, fast.port)
            pusher = deliverer(store, fetch_ports=ports, webhook_timeout_s=LONG_S)
            with pushing(pusher) as stop:
                until(lambda: len(fast.requests) == 20)
                meanwhile = len(slow.requests)
                stop.set()
                let.set()

        assert meanwhile == deliver.SHARE["new"]
        waiting = Outbox(store).take(100, 1.0, now=time.time() + 3600)
        assert len(waiting) == 60 - len(slow.requests)
        assert {delivery.attempts for delivery in waiting} == {1}

    def test_an_endpoint_that_failed_gets_one_thread(self, store, clock, monkeypatch):
        """Until it answers well again; then it gets all it can use."""
        monkeypatch.setattr(deliver, "SLOW_S", LONG_S)
        down, let = threading.Event(), threading.Event()
        down.set()

        def answer(request: Request):
            let.wait(LONG_S)  # all that are pushed at a time are under way at a time
            return reply(500 if down.is_set() else 204)

        with serving(answer) as web:
            for number in range(12):
                end_one(store, web.url, str(number), now=clock.now)
            pusher = deliverer(store, web, clock, webhook_timeout_s=LONG_S)
            counts = []
            for _ in range(4):
                before = len(web.requests)
                let.clear()
                with ThreadPoolExecutor(deliver.THREADS) as pool:
                    pusher.take_due(pool)
                    let.set()
                counts.append(len(web.requests) - before)
                clock.now += 3000
                if len(counts) == 2:
                    down.clear()

        assert counts == [deliver.SHARE["new"], 1, 1, 11]
        assert next_due(store) is None

    def test_it_goes_on_when_redis_was_away(self, store, monkeypatch):
        """It says so and tries again."""
        monkeypatch.setattr(deliver, "POLL_S", 0.02)
        with serving(lambda request: reply(204)) as web:
            end_one(store, web.url)
            pusher = deliverer(store, web)
            take, failures = pusher.outbox.take, iter("12")

            def fails_twice(*arguments, **options):
                if next(failures, None):
                    raise NoConnection("gone")
                return take(*arguments, **options)

            monkeypatch.setattr(pusher.outbox, "take", fails_twice)
            with pushing(pusher):
                until(lambda: not store.counts().outbox)

        assert len(web.requests) == 1

    def test_it_is_live_only_while_its_own_loop_turns(self, store, monkeypatch):
        """A loop that is stuck in Redis beats no more."""
        beats, stuck = [], threading.Event()
        pusher = Deliverer(store, Settings(), beat=lambda: beats.append(time.monotonic()))
        take, turns = pusher.outbox.take, []

        def third_blocks(*given, **named):
            turns.append(1)
            if len(turns) == 3:
                stuck.wait(LONG_S)
            return take(*given, **named)

        monkeypatch.setattr(deliver, "POLL_S", 0.01)
        monkeypatch.setattr(pusher.outbox, "take", third_blocks)
        with pushing(pusher):
            until(lambda: len(turns) == 3)
            time.sleep(0.3)
            while_stuck = len(beats)
            stuck.set()
            until(lambda: len(beats) >= 5)

        assert while_stuck == 3

    def test_stopping_waits_for_the_push_under_way(self, store):
        """So it is not made twice for nothing."""
        with serving(lambda request: [0.5, *reply(204)]) as web:
            end_one(store, web.url)
            with pushing(deliverer(store, web)):
                until(lambda: web.requests)

        assert next_due(store) is None


class TestExamples:
    """What docs/webhooks.md shows, run as it is."""

    def test_the_receiver_takes_a_repeated_push_once_and_no_forged_one(self, store, tmp_path):
        """Over a restart of the receiver too."""
        seen = tmp_path / "seen.sqlite"
        end_one(store, "http://127.0.0.1:1/")
        [stored] = Outbox(store).take(1, 60.0)
        printed = []
        for secrets in (OLD, f"{NEW} {OLD}"):
            with subprocess.Popen(
                [
                    sys.executable,
                    ROOT / "docs" / "examples" / "webhook_receiver.py",
                    *("--port", "0", "--seen", seen),
                ],
                env={**os.environ, "WEBHOOK_SECRETS": secrets},
                stdout=subprocess.PIPE,
                text=True,
            ) as receiver:
                port = json.loads(receiver.stdout.readline())["listening"]
                push = a_delivery(**(vars(stored) | {"url": f"http://127.0.0.1:{port}/"}))
                ours = deliverer(store, fetch_ports=(port,))
                theirs = deliverer(
                    store, fetch_ports=(port,), webhook_secrets=(f"*/main={a_secret(9)}",)
                )
                results = [one.push(push) for one in (theirs, ours, ours)]
                receiver.terminate()
                printed += receiver.stdout.read().splitlines()

            assert [result.status for result in results] == [401, 204, 204]

        assert [json.loads(line)["data"]["job_id"] for line in printed] == ["j1"]

    def test_the_consumer_gets_each_entry_and_what_another_left(self, store, redis, redis_url):
        """Acknowledged after its effect."""
        end_one(store, "https://hooks.example/", "1")
        redis.xgroup_create("ralf:verdicts", "review", id="0")
        redis.xreadgroup("review", "died", {"ralf:verdicts": ">"})
        end_one(store, "https://hooks.example/", "2", outcome=a_failure())
        run = subprocess.run(
            [
                sys.executable,
                ROOT / "docs" / "examples" / "stream_consumer.py",
                *(redis_url, "--drain", "--idle-ms", "0"),
            ],
            capture_output=True,
            text=True,
            check=True,
            timeout=150,
        )
        entries = [json.loads(line) for line in run.stdout.splitlines()]

        assert [(e["job_id"], e["type"], e["data"]["state"]) for e in entries] == [
            ("j1", "verdict.ready", "succeeded"),
            ("j2", "verdict.failed", "failed"),
        ]
        assert redis.xpending("ralf:verdicts", "review")["pending"] == 0


class TestShares:
    """Threads are shared out by endpoint and by tenant."""

    def test_a_tenants_many_hanging_hosts_leave_threads_to_the_others(self, store):
        """40 hosts had 31 of 32 threads: each is new, then failing, and has one of its own."""
        pusher = deliverer(store)
        hosts = [f"acme https://host-{number}.example" for number in range(40)]
        admitted = [pusher._admitted(host, "acme") for host in hosts]
        other = [pusher._admitted("globex https://hooks.example", "globex") for _ in range(5)]

        assert admitted.count("") == deliver.TENANT_SHARE
        assert other == ["", "", "", "", "new"]

    def test_a_slow_endpoint_that_succeeds_keeps_some_threads(self, store, monkeypatch):
        """One that answers after 2.3 s fell from all threads to a single one."""
        monkeypatch.setattr(deliver, "SLOW_S", 0.0)
        with serving(lambda request: reply(204)) as web:
            end_one(store, web.url)
            pusher = deliverer(store, web)
            pusher.run_once()
        endpoint = f"default {web.url}"
        admitted = [pusher._admitted(endpoint, "default") for _ in range(8)]

        assert admitted.count("") == deliver.SHARE["slow"] == 6
