"""Chaos in short, against a real Redis; and its proof, which must be able to fail."""

import base64
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from redis import Redis
from standardwebhooks import Webhook

from ralf.worker.chaos.proof import Asked, SeenEnd, delivery_id, doubled, pid_of, prove
from ralf.worker.chaos.receiver import Receipt, Receiver
from ralf.worker.chaos.uploader import KINDS, mix
from ralf.worker.contract import Callback, State, Verdict
from ralf.worker.service.connection import connect
from ralf.worker.service.deliver import Deliverer
from ralf.worker.service.store import Store
from ralf.worker.settings import Settings
from tests.documents import a_failure, a_job, a_verdict
from tests.test_store import claim
from tests.waiting import LONG_S, PATIENCE_S, until

ROOT = Path(__file__).resolve().parent.parent
SECRET = "whsec_" + base64.b64encode(b"s" * 32).decode()
ENDS = frozenset({"succeeded", "failed"})


def chaos(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    """The command as an operator runs it; all that it writes goes into the folder."""
    return subprocess.Popen(
        [sys.executable, "-m", "ralf", "chaos", *arguments],
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def folder() -> Iterator[Path]:
    """Not pytest's tmp_path: a socket's path may have no more than 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="t-") as name:
        yield Path(name)


@pytest.mark.timeout(660)
def test_thirty_jobs_end_once_each_despite_every_fault(folder: Path):
    """Every kind of fault is injected, every job ends, nothing is wrong, nothing is left."""
    arguments = ("--jobs", "30", "--workers", "3", "--seed", "11", "--minutes", "10")
    with chaos(folder, *arguments) as run:
        out, said = run.communicate(timeout=LONG_S)
    figures = json.loads(out)

    assert figures["wrong"] == [], said
    assert run.returncode == 0
    assert sum(figures["ends"].values()) == 30
    assert set(figures["blows"]) == {
        *("child", "parent", "pause", "drain", "deliverer", "janitor", "redis")
    }
    assert figures["quarantined"] >= 2  # the one that crashes and the one that hangs
    assert figures["pushes"]["taken"] >= figures["pushes"]["ids"] > 10
    assert figures["recovery_s"]["all"]["n"] > 0
    assert list(folder.iterdir()) == []


def test_an_interrupted_run_leaves_no_process_and_no_folder(folder: Path):
    """SIGTERM in the middle of it, as Ctrl-C."""
    run = chaos(folder, "--jobs", "100")
    until(lambda: list(folder.glob("ralf-chaos-*/deliverer-0.log")))
    started = processes(str(folder))
    run.send_signal(signal.SIGTERM)
    run.communicate(timeout=2 * PATIENCE_S)

    assert run.returncode == 130
    assert len(started) >= 6
    # a child outlives its killed worker by the moment in which it sees its socket close
    until(lambda: processes(str(folder)) == [])
    assert list(folder.iterdir()) == []


def processes(mark: str) -> list[int]:
    """Those whose environment or command line holds the mark."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            text = (entry / "environ").read_bytes() + (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if mark.encode() in text:
            found.append(int(entry.name))
    return found


# the proof


class World:
    """Three jobs that ended well, pushed and written down; each test breaks one thing."""

    def __init__(self, redis: Redis) -> None:
        self.redis = redis
        self.store = Store(redis, replace(Settings(), webhook_secrets=(f"*/default={SECRET}",)))
        self.receipts: list[Receipt] = []
        self.seen: list[SeenEnd] = []
        callback = Callback(url="http://127.0.0.1:1/hook")
        jobs = [a_job(name, callback=callback) for name in "123"]
        self.asked = [
            Asked(job.token, "trivial", ENDS, True, True, (job.job_id, job.job_id)) for job in jobs
        ]
        self.store.submit(jobs)
        for _ in range(2):
            running = claim(self.store)
            self.store.end(running, verdict_of(running.job_id))
        self.store.end(claim(self.store), a_failure())
        self._push()

    def _push(self) -> None:
        """Take the outbox as the deliverer does."""
        deliverer = Deliverer(self.store, self.store.settings)
        for delivery in deliverer.outbox.take(10, 60.0):
            status = self.store.status(delivery.subject)
            assert status is not None
            body = json.dumps({"type": delivery.event, "data": dict(delivery.data)})
            self.receipts.append(Receipt(1.0, delivery.id, body, True, "taken"))
            deliverer.outbox.delivered(delivery.id)

    def wrong(self, hit: frozenset[int] = frozenset()) -> list[str]:
        """What the proof finds."""
        return prove(self.store, self.asked, self.receipts, seen=self.seen, hit=hit)


def verdict_of(job_id: str) -> Verdict:
    """Of the job's first attempt."""
    made = a_verdict()
    return made.model_copy(
        update={"job_id": job_id, "made": made.made.model_copy(update={"attempt": 1})}
    )


@pytest.fixture
def world(redis: Redis) -> World:
    return World(redis)


def test_a_world_in_order_is_proven(world: World):
    """Nothing is found where nothing is wrong."""
    assert world.wrong() == []


def _lose(world: World) -> None:
    world.redis.delete("ralf:job:j1")


def _end_twice(world: World) -> None:
    [(_, entry), *_] = world.redis.xrange("ralf:verdicts")
    world.redis.xadd("ralf:verdicts", entry)


def _forget_the_stream(world: World) -> None:
    world.redis.delete("ralf:verdicts")


def _reopen(world: World) -> None:
    world.redis.hset("ralf:job:j2", "state", "running")


def _end_otherwise(world: World) -> None:
    world.redis.hset("ralf:job:j2", "state", "cancelled")


def _change_after_the_end(world: World) -> None:
    status = world.store.status("j1")
    assert status is not None
    world.seen.append(SeenEnd("j1", "succeeded", status.ended_at))
    world.redis.hset("ralf:job:j1", "ended_at", "5.0")


def _drop_the_verdict(world: World) -> None:
    world.redis.delete("ralf:verdict:j1")


def _take_anothers_verdict(world: World) -> None:
    world.redis.copy("ralf:verdict:j2", "ralf:verdict:j1", replace=True)


def _two_jobs_for_a_token(world: World) -> None:
    world.asked[0] = replace(world.asked[0], answers=("j1", "j2"))


def _a_job_of_nobody(world: World) -> None:
    world.redis.copy("ralf:job:j1", "ralf:job:j9")


def _blame(world: World) -> None:
    crash = {"code": "worker_lost", "worker": "host-77-0123abcd", "message": "", "alone": True}
    world.redis.hset("ralf:job:j1", "crashes", json.dumps([crash]))


def _lose_a_push(world: World) -> None:
    world.receipts = [r for r in world.receipts if '"j1"' not in r.body]


def _never_take_a_push(world: World) -> None:
    world.receipts[0] = replace(world.receipts[0], answer="failed")


def _push_another_body(world: World) -> None:
    first = world.receipts[0]
    world.receipts.append(replace(first, body=first.body.replace("{", "{ ", 1)))


def _push_under_another_id(world: World) -> None:
    world.receipts.append(replace(world.receipts[0], id="msg_0"))


def _push_the_wrong_end(world: World) -> None:
    first = world.receipts[0]
    body = first.body.replace('"succeeded"', '"expired"').replace('"failed"', '"expired"')
    world.receipts[0] = replace(first, body=body)


def _push_unsigned(world: World) -> None:
    world.receipts[0] = replace(world.receipts[0], signed=False)


def _push_unasked(world: World) -> None:
    world.asked[0] = replace(world.asked[0], callback=False)


def _leave_in_a_list(world: World) -> None:
    world.redis.rpush("rq:queue:ralf-default:intermediate", "j1")


def _leave_in_the_outbox(world: World) -> None:
    world.redis.zadd("ralf:outbox", {"msg_1": 1.0})


def _leave_a_lease(world: World) -> None:
    world.redis.zadd("ralf:running:high", {"j1": 1.0})


@pytest.mark.parametrize(
    ("harm", "found"),
    [
        (_lose, "its job j1 is lost"),
        (_end_twice, "the stream has"),
        (_forget_the_stream, "the stream has"),
        (_reopen, "j2 (trivial) has not ended"),
        (_end_otherwise, "j2 (trivial) ended as cancelled"),
        (_change_after_the_end, "j1 changed after its end"),
        (_drop_the_verdict, "succeeded and has no verdict"),
        (_take_anothers_verdict, "has the verdict of j2"),
        (_two_jobs_for_a_token, "was given 2 jobs"),
        (_a_job_of_nobody, "job j9 is of no token"),
        (_blame, "is blamed for worker_lost"),
        (_lose_a_push, "was never taken"),
        (_never_take_a_push, "was never taken"),
        (_push_another_body, "2 bodies under one id"),
        (_push_under_another_id, "msg_0 is the id of no end"),
        (_push_the_wrong_end, "the push says"),
        (_push_unsigned, "a wrong signature"),
        (_push_unasked, "asked for no callback"),
        (_leave_in_a_list, "rq:queue:ralf-default:intermediate is left behind: j1"),
        (_leave_in_the_outbox, "ralf:outbox is left behind"),
        (_leave_a_lease, "ralf:running:high is left behind: j1"),
    ],
)
def test_the_proof_finds_the_harm(world: World, harm: Callable[[World], None], found: str):
    """One broken promise each."""
    harm(world)
    wrong = world.wrong()

    assert any(found in sentence for sentence in wrong), wrong


@pytest.mark.parametrize("left_ms", [200, 60_000])
def test_what_rq_forgets_by_itself_is_not_left_behind(world: World, left_ms: int):
    """The execution of a killed worker has a time to live, and is none of ours without one."""
    world.redis.zadd("rq:executions:j1", {"e1": 1.0})
    assert world.wrong() == ["rq:executions:j1 is left behind: e1"]
    world.redis.pexpire("rq:executions:j1", left_ms)

    assert world.wrong() == []


def test_a_crash_that_the_run_caused_is_no_blame(world: World):
    """The worker's pid is among the hit."""
    _blame(world)

    assert world.wrong(frozenset({77})) == []
    assert (pid_of("my-host-77-0123abcd"), pid_of("nonsense")) == (77, 0)


@pytest.mark.parametrize(("state", "event"), [("succeeded", "ready"), ("expired", "failed")])
def test_the_proof_computes_the_id_that_the_store_gives(redis: Redis, state: State, event: str):
    """Two implementations of one rule."""
    store = Store(redis, Settings())
    store.submit([a_job("1", callback=Callback(url="https://hooks.example/"), tenant="acme")])
    if state == "succeeded":
        store.end(claim(store), a_verdict())
    else:
        store.end(claim(store), a_failure(code="deadline_passed"))

    assert redis.exists(f"ralf:delivery:{delivery_id('acme', 'j1', state)}") == 1
    assert store.status("j1").state == state


# the receiver and the mix


def test_the_receiver_records_signatures_and_refuses_some_pushes():
    """A right signature and a wrong one; the unreliable address takes it after some refusals."""
    settings = replace(
        Settings(),
        webhook_secrets=(f"*/default={SECRET}",),
        allow_private_addresses=True,
        webhook_timeout_s=0.5,
    )
    receiver = Receiver(SECRET, refusals=2, stall_s=0.6, seed=1)
    with receiver.listening():
        for number in range(12):
            push(
                replace(settings, fetch_ports=receiver.ports), receiver.unreliable, f"msg_{number}"
            )
        bad = replace(settings, webhook_secrets=(f"*/default={other_secret()}",))
        push(replace(bad, fetch_ports=receiver.ports), receiver.steady, "msg_bad")
    receipts = receiver.receipts
    by_id = {name: [r for r in receipts if r.id == name] for name in {r.id for r in receipts}}

    assert {r.answer for r in receipts} == {"taken", "failed", "stalled"}
    assert all(pushed[-1].answer == "taken" and len(pushed) <= 3 for pushed in by_id.values())
    assert {r.id for r in receipts if not r.signed} == {"msg_bad"}
    assert doubled([*receipts, receipts[-1]]) == 1


def push(settings: Settings, url: str, message_id: str) -> None:
    """As the deliverer would, until it is taken."""
    from ralf.worker.service.records import Delivery

    deliverer = Deliverer(
        Store(connect("redis://127.0.0.1:1"), settings), settings, clock=time.time
    )
    deliverer.outbox.endpoint_disabled = lambda *_: False  # type: ignore[method-assign]
    delivery = Delivery(
        message_id, "verdict.ready", "t", "j1", url, "default", {"job_id": "j1"}, 1.0, 1
    )
    while deliverer.push(delivery).kind != "delivered":
        pass


def other_secret() -> str:
    """One that the receiver does not know."""
    secret = "whsec_" + base64.b64encode(b"o" * 32).decode()
    assert Webhook(secret) is not None
    return secret


@pytest.mark.parametrize("count", [len(KINDS), 30, 300])
def test_the_mix_has_every_kind(count: int):
    """In a random order, each by its share."""
    chosen = mix(count, random.Random(3))

    assert len(chosen) == count
    assert set(chosen) == set(KINDS)
    assert chosen != sorted(chosen)
