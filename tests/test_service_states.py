"""Any interleaving of clients, workers, crashes and the janitor: nothing lost, one end each.

Hypothesis plays the client, several workers that die, stall and come back with void claims, the
janitor, and time, against the real scripts; after every step all of Redis is checked against what
must hold, and at the end the house is run empty.
"""

from collections import Counter
from datetime import UTC, datetime

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)
from redis import Redis

from ralf.worker.contract import ENDED, Callback
from ralf.worker.service.janitor import Janitor
from ralf.worker.service.records import Claim
from ralf.worker.service.store import PRIORITIES, Store
from ralf.worker.settings import Settings
from tests.documents import a_failure, a_job, a_verdict

SETTINGS = Settings(retries=1, heartbeat_ttl_s=30.0)
TENANTS = ("a", "b")
CALLBACK = Callback(url="https://hooks.example/ralf")


class House:
    """All of Redis at one moment, in one round trip."""

    def __init__(self, redis: Redis, names: list[str]) -> None:
        with redis.pipeline() as pipe:
            for name in names:
                pipe.hgetall(f"ralf:job:{name}")
                pipe.get(f"ralf:verdict:{name}")
            pipe.xrange("ralf:verdicts")
            pipe.zrange("ralf:outbox", 0, -1)
            pipe.zrange("ralf:due", 0, -1)
            for priority in PRIORITIES:
                pipe.zrange(f"ralf:waiting:{priority}", 0, -1)
                pipe.zrange(f"ralf:running:{priority}", 0, -1)
                pipe.lrange(f"ralf:turn:{priority}", 0, -1)
                pipe.lrange(f"rq:queue:ralf-{priority}", 0, -1)
                pipe.lrange(f"rq:queue:ralf-{priority}:intermediate", 0, -1)
                pipe.smembers(f"ralf:stale:{priority}")
                for tenant in TENANTS:
                    pipe.lrange(f"ralf:pending:{priority}:{tenant}", 0, -1)
            replies = iter(pipe.execute())
        self.jobs = {name: (next(replies), next(replies)) for name in names}
        self.told = Counter(entry[b"job_id"].decode() for _, entry in next(replies))
        outbox = next(replies)
        self.places = Counter(next(replies))
        self.waiting, self.running = set(), set()
        self.turns, self.tenants_waiting = [], []
        for _ in PRIORITIES:
            self.waiting |= {member.decode() for member in next(replies)}
            running = next(replies)
            self.running |= {member.decode() for member in running}
            self.turns.append([tenant.decode() for tenant in next(replies)])
            lists = [running, next(replies), next(replies)]
            stale = next(replies)  # entries of expired jobs, which nobody will take
            pending = {
                tenant: [job_id for job_id in next(replies) if job_id not in stale]
                for tenant in TENANTS
            }
            self.tenants_waiting.append({name for name, ids in pending.items() if ids})
            for ids in (*lists, *pending.values()):
                self.places.update(ids)
        self.places = Counter({name.decode(): n for name, n in self.places.items()})
        with redis.pipeline() as pipe:
            for member in outbox:
                pipe.hget(f"ralf:delivery:{member.decode()}", "subject")
            self.pushed = Counter(subject.decode() for subject in pipe.execute())

    def state(self, name: str) -> bytes:
        return self.jobs[name][0][b"state"]

    def ended(self, name: str) -> bool:
        return self.state(name).decode() in ENDED


class Service(RuleBasedStateMachine):
    """The store under everything that may happen to it."""

    claims = Bundle("claims")

    def __init__(self, redis: Redis) -> None:
        super().__init__()
        redis.flushall()
        self.redis = redis
        self.store = Store(redis, SETTINGS)
        self.janitor = Janitor(self.store, SETTINGS)
        self.now = 1000.0
        self.tokens: dict[tuple[str, str], str] = {}
        self.jobs: dict[str, tuple[str, str]] = {}  # id → priority, tenant
        self.popped: list[str] = []
        self.ended: dict[str, tuple[object, ...]] = {}
        self.misplaced: set[str] = set()
        self.made = 0

    # clients

    @rule(
        tokens=st.lists(st.sampled_from(["t1", "t2", "t3", "t4"]), min_size=1, max_size=4),
        tenant=st.sampled_from(TENANTS),
        priority=st.sampled_from(PRIORITIES),
        tag=st.sampled_from([None, None, "x"]),
        deadline=st.sampled_from([None, None, 1020, 1100]),
    )
    def submit(self, tokens, tenant, priority, tag, deadline):
        jobs = []
        for token in tokens:
            self.made += 1
            jobs.append(
                a_job(
                    str(self.made),
                    token=token,
                    tenant=tenant,
                    priority=priority,
                    tag=tag,
                    deadline=deadline and datetime.fromtimestamp(deadline, UTC),
                    callback=CALLBACK,
                )
            )
        for job, reply in zip(jobs, self.store.submit(jobs, now=self.now), strict=True):
            first = self.tokens.setdefault((tenant, job.token), job.job_id)
            assert reply.job_id == first
            assert reply.existing == (first != job.job_id)
            if first == job.job_id:
                self.jobs[first] = (priority, tenant)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def cancel(self, data):
        job_id = data.draw(st.sampled_from(sorted(self.jobs)))
        before = self.store.status(job_id)
        state = self.store.cancel(job_id, now=self.now)
        assert state == ("cancelled" if before.state == "queued" else before.state)
        self.misplaced.discard(job_id)

    # workers

    @rule(priority=st.sampled_from(PRIORITIES))
    def pop(self, priority):
        """RQ's dequeue; a worker that dies now never begins."""
        queue = f"rq:queue:ralf-{priority}"
        job_id = self.redis.lmove(queue, f"{queue}:intermediate")
        if job_id:
            self.popped.append(job_id.decode())

    @precondition(lambda self: self.popped)
    @rule(target=claims, data=st.data(), alone=st.booleans())
    def begin(self, data, alone):
        """By whoever popped it, however long ago that was."""
        claim = self.claim(data.draw(st.sampled_from(sorted(set(self.popped)))), alone)
        return multiple() if claim is None else claim

    @rule(target=claims, priority=st.sampled_from(PRIORITIES))
    def take(self, priority):
        """A healthy worker pops and begins."""
        already = len(self.popped)
        self.pop(priority)
        claim = self.claim(self.popped[-1], True) if len(self.popped) > already else None
        return multiple() if claim is None else claim

    def claim(self, job_id: str, alone: bool) -> Claim | None:
        self.popped.remove(job_id)
        before = self.store.status(job_id)
        claim = self.store.begin(job_id, "w", alone=alone, now=self.now)
        if claim is not None:
            assert before.state == "queued"
            assert claim.attempt == before.attempts + 1
            self.misplaced.discard(job_id)
        return claim

    @rule(claim=claims)
    def beat(self, claim: Claim):
        held = self.holds(claim)
        assert (self.store.beat(claim, now=self.now) == "lost") == (not held)

    @rule(claim=claims, score=st.sampled_from([0.1, 0.9]))
    def succeed(self, claim: Claim, score):
        held = self.holds(claim)
        assert self.store.end(claim, a_verdict(score=score), now=self.now) == held

    @rule(claim=claims, code=st.sampled_from(["corrupt_media", "cancelled", "deadline_passed"]))
    def fail(self, claim: Claim, code):
        held = self.holds(claim)
        assert self.store.end(claim, a_failure(code), now=self.now) == held

    @rule(claim=claims)
    def retry(self, claim: Claim):
        held = self.holds(claim)
        outcome = self.store.retry(claim, a_failure(), now=self.now)
        assert (outcome == "lost") == (not held)
        if held and claim.retries >= SETTINGS.retries:
            assert outcome == "failed"

    @rule(claim=claims, target=claims)
    def hand_back(self, claim: Claim):
        """And another worker takes what is next, often the same."""
        held = self.holds(claim)
        assert (self.store.hand_back(claim, now=self.now) == "lost") == (not held)
        return self.take(claim.job.priority)

    @rule(claim=claims, alone=st.booleans())
    def crash(self, claim: Claim, alone):
        held = self.holds(claim)
        outcome = self.store.crashed(
            claim, code="decoder_crashed", message="signal 11", alone=alone, now=self.now
        )
        assert (outcome == "lost") == (not held)

    # what befalls them

    @rule(seconds=st.sampled_from([1.0, 16.0, 31.0, 200.0]))
    def time_passes(self, seconds):
        """Between two sweeps; whoever had popped and not begun may still try later."""
        self.janitor.run_once(now=self.now)
        self.now += seconds
        self.janitor.run_once(now=self.now)
        self.misplaced.clear()

    @precondition(lambda self: not self.misplaced)
    @rule(priority=st.sampled_from(PRIORITIES))
    def lose_a_list_entry(self, priority):
        """A hand on the keys, or RQ's BLPOP: the job is in no list until the next sweep."""
        job_id = self.redis.lpop(f"rq:queue:ralf-{priority}")
        if job_id:
            self.misplaced.add(job_id.decode())

    # what must hold after every step

    @invariant()
    def all_is_well(self):
        seen = House(self.redis, sorted(self.jobs))
        ended = {job_id: seen.jobs[job_id] for job_id in self.jobs if seen.ended(job_id)}

        # A job that has not ended is in exactly one place.
        expected = set(self.jobs) - set(ended) - self.misplaced
        assert seen.places == Counter(expected)
        # The counts that autoscaling and the search for orphans rest on are right.
        assert seen.waiting == {j for j in self.jobs if seen.state(j) == b"queued"}
        assert seen.running == {j for j in self.jobs if seen.state(j) == b"running"}
        # An ended job never changes.
        assert {job_id: ended[job_id] for job_id in self.ended} == self.ended
        self.ended = ended
        # Each end is told once, on the stream and by webhook.
        assert seen.told == seen.pushed == Counter(ended.keys())
        # Whoever waits has one turn.
        for turn, tenants in zip(seen.turns, seen.tenants_waiting, strict=True):
            assert len(turn) == len(set(turn))
            assert tenants <= set(turn)

    def teardown(self):
        """Run empty, every job that was submitted has its one end."""
        for _ in range(4 * len(self.jobs) + 4):
            if len(self.ended) == len(self.jobs):
                break
            self.time_passes(200.0)
            for priority in PRIORITIES:
                self.pop(priority)
            for job_id in self.popped:
                claim = self.store.begin(job_id, "w", now=self.now)
                if claim:
                    self.store.end(claim, a_verdict(), now=self.now)
            self.popped.clear()
            self.all_is_well()
        assert set(self.ended) == set(self.jobs) == set(self.tokens.values())

    def holds(self, claim: Claim) -> bool:
        """Whether the claim still runs its job, read from Redis."""
        state, nonce = self.redis.hmget(f"ralf:job:{claim.job_id}", "state", "claim")
        return state == b"running" and nonce == claim.nonce.encode()


def test_no_interleaving_loses_a_job_or_ends_it_twice(redis):
    """The promise of the service, played through by hypothesis."""
    run_state_machine_as_test(
        lambda: Service(redis),
        settings=settings(
            max_examples=40,
            stateful_step_count=50,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
