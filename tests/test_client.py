"""The client as a backend sees it: idempotent, following, and plain about what went wrong."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import jsonschema
import pytest
from redis import Redis
from redis.exceptions import RedisError

from ralf.worker.client import (
    AsyncClient,
    Client,
    IdempotencyConflict,
    InvalidRequest,
    JobFailed,
    NotFinished,
    NotFound,
    QueueUnavailable,
    TimedOut,
    UnreadableDocument,
    connect,
    request,
)
from ralf.worker.contract import (
    Callback,
    EvidencePolicy,
    Job,
    Media,
    Progress,
    Sampling,
    SessionPart,
)
from ralf.worker.service.store import Store
from ralf.worker.settings import Settings
from tests.documents import a_failure, a_verdict, an_evidence
from tests.redis_server import RedisServer
from tests.test_store import claim

URI = "https://media.example/1.mp4"


@pytest.fixture
def client(redis_url):
    client = connect(redis_url, settings=Settings())
    yield client
    client.close()


def rewrite(store: Store, redis: Redis, job_id: str, change: Callable[[str], str]) -> None:
    """Change a stored verdict as another version of Ralf would have written it."""
    key = store.key("verdict", job_id)
    before = redis.get(key).decode()
    after = change(before)
    assert after != before
    redis.set(key, after, keepttl=True)


class TestSubmit:
    def test_the_job_in_redis_is_what_was_asked_for(self, client, store):
        """Every option reaches the worker, as a document that fits the exported schema."""
        deadline = datetime.now(UTC) + timedelta(hours=1)
        options = {
            "tag": "post-9",
            "tenant": "acme",
            "priority": "high",
            "sampling": Sampling(mode="fps", fps=2),
            "max_tracks": 4,
            "deadline": deadline,
            "callback": Callback(url="https://hooks.example/x", secret_id="s2"),
            "evidence": EvidencePolicy(residuals=False),
            "session": SessionPart(session_id="live", number=3, offset_ms=18_000),
            "model": "ralf-small",
            "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        }
        submission = client.submit(URI, token="u-1", **options)
        job = store.job(submission.job_id)

        assert (submission.state, submission.existing) == ("queued", False)
        assert (job.media, job.token) == (Media(uri=URI), "u-1")
        assert {name: getattr(job, name) for name in options} == options
        jsonschema.validate(job.model_dump(mode="json", by_alias=True), Job.model_json_schema())

    def test_a_second_time_gives_the_stored_job_and_then_its_verdict(self, client, store):
        """Whoever asks, whenever."""
        first = client.submit(URI, token="u-1")
        second = client.submit(URI, token="u-1")
        store.end(claim(store), a_verdict())
        third = client.submit(URI, token="u-1")

        assert first.job_id == second.job_id == third.job_id
        assert (second.existing, second.verdict) == (True, None)
        assert (third.state, third.verdict) == ("succeeded", a_verdict())

    def test_a_conflict_says_which_fields_differ_and_what_to_do(self, client):
        """And which job holds the token."""
        job_id = client.submit(URI, token="u-1", tag="a").job_id
        with pytest.raises(IdempotencyConflict, match=r"'u-1'.*tag; send the same body") as caught:
            client.submit(URI, token="u-1", tag="b")

        assert (caught.value.fields, caught.value.job_id) == (("tag",), job_id)

    def test_what_does_not_fit_the_contract_is_refused_before_it_is_sent(self, client, store):
        """By the name of its field."""
        with pytest.raises(InvalidRequest, match=r"tenant.*'no spaces'"):
            client.submit(URI, token="u-1", tenant="no spaces")
        with pytest.raises(InvalidRequest, match="deadline"):
            client.submit(URI, token="u-1", deadline=datetime(2030, 1, 1))

        assert store.counts().waiting["default"] == 0

    @pytest.mark.parametrize(
        "fields",
        [
            {"media": "https://b.example/1.mp4?X-Sig=hunter2" + "&x" * 3000},
            {"callback": "ftp://me:hunter2@b.example/1.mp4?sig=hunter2"},
            {"media": Media(uri=URI), "sampling": "https://me:hunter2@b.example/?a"},
        ],
    )
    def test_a_refusal_shows_nothing_that_makes_a_url_a_credential(self, fields):
        """Backends log what is raised."""
        with pytest.raises(InvalidRequest) as refused:
            request(**{"media": URI, "token": "u", **fields})

        assert "hunter2" not in str(refused.value)
        assert "b.example" in str(refused.value)

    def test_many_go_in_some_round_trips_and_keep_their_order(self, client, store):
        """Repeats among them included."""
        sent = [request(URI, token=f"u-{n % 1100}") for n in range(1200)]
        submissions = client.submit_many(iter(sent))

        assert [job.job_id for job in sent[:1100]] == [s.job_id for s in submissions[:1100]]
        assert [s.job_id for s in submissions[1100:]] == [s.job_id for s in submissions[:100]]
        assert sum(s.existing for s in submissions) == 100
        assert store.counts().waiting["default"] == 1100

    def test_after_a_conflict_among_many_all_can_be_sent_again(self, client, store):
        """What was stored stays."""
        client.submit(URI, token="u-1", tag="other")
        sent = [request(URI, token=f"u-{n}") for n in range(3)]
        with pytest.raises(IdempotencyConflict):
            client.submit_many(sent)
        mended = [sent[0], request(URI, token="u-1", tag="other"), sent[2]]

        assert len(client.submit_many(mended)) == 3
        assert store.counts().waiting["default"] == 3


class TestResult:
    def test_it_is_the_verdict_and_its_pictures(self, client, store):
        """Once there are any."""
        job_id = client.submit(URI, token="u").job_id
        store.end(claim(store), a_verdict(), evidence=an_evidence())

        assert client.result(job_id) == a_verdict()
        assert client.evidence(job_id) == an_evidence()

    def test_a_verdict_of_the_next_version_is_read(self, client, store, redis):
        """Workers are upgraded before backends, and may add fields."""
        job_id = client.submit(URI, token="u").job_id
        store.end(claim(store), a_verdict())
        rewrite(store, redis, job_id, lambda text: text.replace('{"schema"', '{"new":1,"schema"'))

        assert client.result(job_id) == a_verdict()

    def test_a_verdict_that_cannot_be_read_is_a_client_error(self, client, store, redis):
        """Not pydantic's error: every error of the client is a ClientError."""
        job_id = client.submit(URI, token="u").job_id
        store.end(claim(store), a_verdict())
        rewrite(store, redis, job_id, lambda text: text.replace("ralf.verdict/1", "ralf.verdict/2"))

        with pytest.raises(UnreadableDocument, match=r"Verdict cannot be read \(schema"):
            client.result(job_id)

    def test_it_says_that_the_job_has_not_ended(self, client):
        """And how to wait."""
        job_id = client.submit(URI, token="u").job_id
        with pytest.raises(NotFinished, match=r"is queued; give result\(\) a timeout"):
            client.result(job_id)

    def test_it_waits_as_long_as_it_is_told(self, client, store, monkeypatch):
        """And wakes with the end, not with a clock."""
        monkeypatch.setattr("ralf.worker.client.POLL_S", 600.0)
        job_id = client.submit(URI, token="u").job_id
        running = claim(store)
        ending = threading.Timer(0.3, store.end, (running, a_verdict()))
        ending.start()
        verdict = client.result(job_id, timeout=120)
        ending.join()

        assert verdict == a_verdict()
        assert client.result(job_id, timeout=120) == a_verdict()

    def test_it_gives_up_in_time_and_the_job_goes_on(self, client):
        """TimedOut is a NotFinished."""
        job_id = client.submit(URI, token="u").job_id
        with pytest.raises(TimedOut, match=r"0\.1 s, it goes on"):
            client.result(job_id, timeout=0.1)

    def test_a_failure_is_raised_by_its_name(self, client, store):
        """With the worker's own words."""
        job_id = client.submit(URI, token="u").job_id
        store.end(claim(store), a_failure("corrupt_media", "no frame decodes"))
        with pytest.raises(JobFailed, match=r"corrupt_media.*no frame decodes") as caught:
            client.result(job_id)

        assert (caught.value.code, caught.value.status.state) == ("corrupt_media", "failed")

    def test_an_unknown_or_forgotten_one_says_so(self, client, store, redis):
        """And how long things are kept."""
        job_id = client.submit(URI, token="u").job_id
        store.end(claim(store), a_verdict())
        redis.delete(f"ralf:verdict:{job_id}")

        with pytest.raises(NotFound, match="30 days"):
            client.result("nobody")
        with pytest.raises(NotFound, match="30 days and is gone"):
            client.result(job_id)
        with pytest.raises(NotFound, match="retain"):
            client.evidence(job_id)


class TestWatch:
    def test_it_follows_from_queued_to_the_end(self, client, store):
        """Each change once; the last has ended."""
        job_id = client.submit(URI, token="u").job_id
        steps = [Progress(stage="fetch", percent=5), Progress(stage="analyze", percent=60)]
        seen = []
        for status in client.watch(job_id, timeout=120):
            seen.append((status.state, status.progress and status.progress.stage))
            if len(seen) == 1:
                running = claim(store)
            elif len(seen) <= 3:
                store.beat(running, progress=steps[len(seen) - 2])
            elif len(seen) == 4:
                store.end(running, a_verdict())

        assert seen == [
            ("queued", None),
            ("running", None),
            ("running", "fetch"),
            ("running", "analyze"),
            ("succeeded", "analyze"),
        ]

    def test_a_job_that_has_ended_is_told_at_once(self, client, store):
        """There is nothing to wait for."""
        job_id = client.submit(URI, token="u").job_id
        store.end(claim(store), a_failure())

        assert [status.state for status in client.watch(job_id)] == ["failed"]

    def test_partial_verdicts_can_be_read_on_the_way(self, client, store):
        """None before there is one."""
        job_id = client.submit(URI, token="u").job_id
        running = claim(store)
        before = client.partial(job_id)
        store.beat(
            running,
            progress=Progress(stage="analyze", percent=9),
            partial=a_verdict(partial=True),
        )

        assert before is None
        assert client.partial(job_id) == a_verdict(partial=True)

    def test_it_polls_no_more_than_it_must(self, client, store, monkeypatch):
        """While nothing happens Redis is not asked."""
        job_id = client.submit(URI, token="u").job_id
        asked = []
        monkeypatch.setattr(
            client.store, "status", lambda job_id: asked.append(1) or store.status(job_id)
        )
        with pytest.raises(TimedOut):
            list(client.watch(job_id, timeout=0.5))

        assert len(asked) <= 3


def test_cancel_ends_a_queued_job_and_asks_a_running_one(client, store):
    """An ended one stays; an unknown one is NotFound."""
    queued, running, ended = (client.submit(URI, token=f"u-{n}").job_id for n in range(3))
    assert client.cancel(queued) == "cancelled"
    assert claim(store).job_id == running
    store.end(claim(store), a_verdict())

    assert client.cancel(running) == "running"
    assert client.status(running).cancelling
    assert client.cancel(ended) == "succeeded"
    with pytest.raises(NotFound):
        client.cancel("nobody")


def test_sessions_are_read_and_followed(client, store):
    """Until the last segment's fold."""
    with pytest.raises(NotFound, match="live"):
        client.session("live")
    for number in range(2):
        part = SessionPart(
            session_id="live", number=number, offset_ms=2000 * number, last=number == 1
        )
        client.submit(URI, token=f"u-{number}", session=part)
    store.end(claim(store), a_verdict())
    seen = []
    for verdict in client.watch_session("live", timeout=120):
        seen.append((verdict.segments, verdict.complete))
        if len(seen) == 1:
            store.end(claim(store), a_verdict())

    assert seen == [(1, False), (2, True)]
    assert client.session("live").complete


def test_without_redis_it_says_what_to_check(tmp_path):
    """And that sending again is safe."""
    client = connect(f"unix://{tmp_path}/none.sock", settings=Settings())
    with pytest.raises(QueueUnavailable, match=r"RALF_REDIS_URL.*never stored twice"):
        client.submit(URI, token="u")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("CONFIG", "SET", "min-replicas-to-write", "1"), "NOREPLICAS"),
        (("REPLICAOF", "127.0.0.1", "1"), "(?i)replica"),
        (("ACL", "SETUSER", "default", "-evalsha"), "(?i)no permissions"),
    ],
)
def test_what_redis_refuses_is_a_client_error(own_redis: RedisServer, command, said):
    """Whatever its reason, a backend catches ClientError; the URL is not in the message."""
    client = connect(own_redis.url, settings=Settings())
    client.submit(URI, token="t")
    with Redis.from_url(own_redis.url) as redis:
        redis.execute_command(*command)
    with pytest.raises(QueueUnavailable, match=said) as raised:
        client.submit(f"{URI}?signature=secret", token="u")
    client.close()

    assert "secret" not in str(raised.value)


def test_a_busy_redis_is_a_client_error(own_redis: RedisServer):
    """Another's endless script."""
    client = connect(own_redis.url, settings=Settings())
    client.submit(URI, token="t")
    with Redis.from_url(own_redis.url) as redis, Redis.from_url(own_redis.url) as other:
        redis.config_set("lua-time-limit", "10")
        endless = threading.Thread(target=suppressed, args=(other, "while true do end"))
        endless.start()
        time.sleep(0.2)
        with pytest.raises(QueueUnavailable, match="BUSY"):
            client.status("j")
        redis.script_kill()
        endless.join()
    client.close()


def suppressed(redis: Redis, script: str) -> None:
    """Run it, whatever becomes of it."""
    with suppress(RedisError):
        redis.eval(script, 0)


def test_a_silent_redis_costs_no_more_than_the_timeout():
    """It accepts connections and says nothing, as a paused machine does."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(64)
        client = connect(f"redis://127.0.0.1:{silent.getsockname()[1]}", timeout=1.0)
        start = time.monotonic()
        with pytest.raises(QueueUnavailable, match="RALF_REDIS_URL"):
            client.submit(URI, token="t")
        took = time.monotonic() - start
        client.close()

    assert took < 30.0  # three retries inside three retries of 5 s took 83 s


def test_a_full_redis_refuses_submissions_and_lets_what_runs_end(client, store, redis):
    """No job is half stored, no verdict lost."""
    job_id = client.submit(URI, token="u").job_id
    running = claim(store)
    redis.config_set("maxmemory", "1")
    try:
        with pytest.raises(QueueUnavailable, match="out of memory"):
            client.submit(URI, token="v")
        order = store.beat(running, progress=Progress(stage="analyze", percent=50))
        ended = store.end(running, a_verdict())
    finally:
        redis.config_set("maxmemory", "0")

    assert (order, ended) == ("go_on", True)
    assert client.result(job_id) == a_verdict()
    assert not redis.exists("ralf:token:default:v")


def test_the_asyncio_twin_does_the_same(redis_url, store):
    """In threads, so that the loop goes on."""

    async def walk() -> list[str]:
        client = AsyncClient(Client(Redis.from_url(redis_url)))
        submission = await client.submit(URI, token="u")
        again = await client.submit_many([request(URI, token="u")])
        assert again[0].job_id == submission.job_id
        states = []
        async for status in client.watch(submission.job_id, timeout=120):
            states.append(status.state)
            if status.state == "queued":
                running = await asyncio.to_thread(claim, store)
            elif status.state == "running":
                assert await client.partial(submission.job_id) is None
                await asyncio.to_thread(store.beat, running, partial=a_verdict(partial=True))
                assert await client.partial(submission.job_id) == a_verdict(partial=True)
                await asyncio.to_thread(store.end, running, a_verdict(), evidence=an_evidence())
        assert await client.result(submission.job_id) == a_verdict()
        assert await client.evidence(submission.job_id) == an_evidence()
        assert await client.cancel(submission.job_id) == "succeeded"
        assert (await client.status(submission.job_id)).ended
        with pytest.raises(NotFound):
            await client.session("none")
        part = SessionPart(session_id="live", number=0, offset_ms=0, last=True)
        await client.submit(URI, token="s", session=part)
        await asyncio.to_thread(lambda: store.end(claim(store), a_verdict()))
        rolling = [verdict async for verdict in client.watch_session("live", timeout=120)]
        assert [verdict.complete for verdict in rolling] == [True]
        await client.close()
        return states

    assert asyncio.run(walk()) == ["queued", "running", "succeeded"]
