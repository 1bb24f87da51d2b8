"""Workers as real processes on a real Redis: whatever dies, each job has one end."""

import hashlib
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from redis.connection import AbstractConnection
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from rq.command import send_stop_job_command
from rq.job import Job as RqJob
from rq.registry import FailedJobRegistry, StartedJobRegistry

from ralf.worker.chaos import bodies
from ralf.worker.contract import Media
from ralf.worker.service import jobs
from ralf.worker.service.child_process import ChildProcess
from ralf.worker.service.connection import GaveUp, connect
from ralf.worker.service.rq_worker import RalfWorker
from ralf.worker.service.store import Store
from tests.redis_server import RedisServer
from tests.waiting import LONG_S, PATIENCE_S, until
from tests.web import free_port, get
from tests.workers import FOR_EVER, QUICK, Service, a_worker, ended


@pytest.fixture
def make(redis_server: RedisServer) -> Iterator[Callable[..., Service]]:
    """Services with settings of their own."""
    made: list[Service] = []

    def one(**changes: Any) -> Service:
        made.append(Service(redis_server.url, replace(QUICK, **changes)))
        return made[-1]

    yield one
    for service in made:
        service.close()


@pytest.fixture(scope="module")
def service(redis_server: RedisServer) -> Iterator[Service]:
    """One worker for the tests that leave it well."""
    with_roots = replace(QUICK, file_roots=("/",), child_max_rss=2 * 1024**3)
    service = Service(redis_server.url, with_roots)
    try:
        service.worker()
        yield service
    finally:
        service.close()


# the ordinary way


def test_a_job_becomes_a_verdict_and_rq_is_left_tidy(service: Service):
    """RQ's registries say what ours say."""
    job_id = service.submit("trivial", "tagged")
    service.reaches(job_id, "succeeded")
    verdict = service.store.verdict(job_id)
    assert verdict is not None
    (key,) = service.redis.smembers(f"rq:workers:{service.queue}")
    until(lambda: service.redis.hget(key, "state") == b"idle")

    assert (verdict.job_id, verdict.tag) == (job_id, "tagged")
    assert service.redis.lrange(f"rq:queue:{service.queue}:intermediate", 0, -1) == []
    assert StartedJobRegistry(service.queue, connection=service.redis).get_job_ids() == []
    assert service.redis.hget(f"rq:job:{job_id}", "status") == b"finished"
    assert service.redis.hget(key, "current_job") is None
    assert service.redis.keys(f"rq:execution*:{job_id}*") == []


def test_the_fetched_file_reaches_the_child(service: Service, tmp_path: Path):
    """Fetched by the parent, read by the child, its hash in the verdict."""
    (tmp_path / "clip.mp4").write_bytes(b"x" * 12345)
    media = Media(uri=f"file://{tmp_path}/clip.mp4")
    job_id = service.submit("weigh", media=media)
    service.reaches(job_id, "succeeded", "failed")
    verdict = service.store.verdict(job_id)

    assert verdict is not None
    assert verdict.media.size_bytes == 12345


def test_a_denied_fetch_fails_at_once(service: Service):
    """Never retried."""
    job_id = service.submit("weigh", media=Media(uri="http://169.254.169.254/latest/meta-data"))
    status = service.reaches(job_id, "succeeded", "failed")

    assert status.failure is not None
    assert (status.failure.code, status.attempts) == ("fetch_denied", 1)


def test_progress_is_seen_while_the_job_runs(service: Service):
    """The client's status moves."""
    job_id = service.submit("sleep", FOR_EVER)
    first = service.runs(job_id).progress
    until(lambda: service.status(job_id).progress != first)
    later = service.status(job_id).progress
    service.store.cancel(job_id)

    assert first is not None and later is not None
    assert 0 <= first.percent < later.percent < 100
    assert service.reaches(job_id, "cancelled").attempts == 1


def test_a_transient_failure_is_retried_with_a_charge(service: Service):
    """The second attempt has its verdict."""
    job_id = service.submit("oom")
    status = service.reaches(job_id, "succeeded", "failed")

    assert (status.state, status.attempts) == ("succeeded", 2)


def test_a_lost_device_costs_the_child_and_a_retry(service: Service):
    """gpu_fatal: the context cannot be repaired, the job can be run again."""
    before = service.child()
    job_id = service.submit("poison")
    status = service.reaches(job_id, "succeeded", "failed")

    assert (status.state, status.attempts) == ("succeeded", 2)
    assert service.child() not in {0, before}


def test_the_parent_holds_no_torch(service: Service):
    """Its memory maps show no library of torch, av or CUDA."""
    maps = Path(f"/proc/{service.workers[0].pid}/maps").read_text()

    assert "python" in maps
    assert [name for name in ("libtorch", "libav", "libcuda", "numpy") if name in maps] == []


# forged entries


@pytest.mark.parametrize(
    "data",
    [
        ["os.system", None, ["touch {path}"], {}],
        [jobs.MODERATE, None, ["{id}"], {}],
        [bodies.PREFIX + "trivial", None, ["{id}", "more"], {}],
        [bodies.PREFIX + "trivial", None, ["{id}"], {"sneaky": 1}],
        [bodies.PREFIX + "trivial", "an instance", ["{id}"], {}],
        {"not": "a list"},
    ],
)
def test_a_forged_entry_is_refused_failed_and_logged(service: Service, data: Any, tmp_path: Path):
    """Write access to Redis is not the right to run code."""
    job_id = uuid.uuid4().hex
    path = tmp_path / "touched"
    text = json.dumps(data).replace("{id}", job_id).replace("{path}", str(path))
    forge(service, job_id, text.encode())

    failed = FailedJobRegistry(service.queue, connection=service.redis)
    until(lambda: job_id in failed.get_job_ids())
    assert service.redis.hget(f"rq:job:{job_id}", "status") == b"failed"
    assert not path.exists()
    assert service.reaches(service.submit("trivial"), "succeeded").attempts == 1


def forge(service: Service, job_id: str, data: bytes) -> None:
    """An entry as an attacker would write it, with callbacks and retries."""
    service.redis.hset(
        f"rq:job:{job_id}",
        mapping={
            "data": data,
            "origin": service.queue,
            "status": "queued",
            "retries_left": "3",
            "success_callback_name": "os.abort",
            "failure_callback_name": "os.abort",
            "created_at": "2026-01-01T00:00:00.000000Z",
        },
    )
    service.redis.rpush(f"rq:queue:{service.queue}", job_id)


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def test_a_pickled_payload_is_never_loaded(service: Service, tmp_path: Path):
    """The payload is JSON or it is refused."""
    path, job_id = tmp_path / "touched", uuid.uuid4().hex
    forge(service, job_id, pickle.dumps((bodies.PREFIX + "trivial", None, (Bomb(path),), {})))
    failed = FailedJobRegistry(service.queue, connection=service.redis)
    until(lambda: job_id in failed.get_job_ids())

    assert not path.exists()


@pytest.mark.each_redis
@pytest.mark.parametrize("data", [b"[" * 60_000, b"[" * 1_000_000])
def test_a_payload_that_is_nested_too_deep_is_refused(service: Service, data: bytes):
    """Python's JSON raises RecursionError, which is no ValueError."""
    worker, job_id = service.workers[0].pid, uuid.uuid4().hex
    forge(service, job_id, data)
    failed = FailedJobRegistry(service.queue, connection=service.redis)
    until(lambda: job_id in failed.get_job_ids() or service.workers[0].poll() is not None)

    assert job_id in failed.get_job_ids()
    assert service.reaches(service.submit("trivial"), "succeeded").attempts == 1
    assert worker == service.workers[0].pid and service.workers[0].poll() is None


def test_a_forged_entry_for_a_real_job_gives_it_a_named_end(service: Service, tmp_path: Path):
    """Tampering is seen by the client, not hidden."""
    with service.suspended():
        job_id = service.submit("trivial")
        service.redis.hset(f"rq:job:{job_id}", "data", b'["os.system",null,["true"],{}]')
    status = service.reaches(job_id, "succeeded", "failed")

    assert status.failure is not None
    assert status.failure.code == "bad_request"
    assert "os.system" in status.failure.message


@pytest.mark.each_redis
def test_nonsense_in_the_queue_does_not_stop_the_worker(service: Service):
    """Ids of no job, of no shape, entries of another type."""
    for junk in (b"\xff\xfe", b"../../x", b"a" * 70, b"a\n", b"unknown"):
        service.redis.rpush(f"rq:queue:{service.queue}", junk)
    service.redis.set("rq:job:string", "not a hash")
    service.redis.rpush(f"rq:queue:{service.queue}", "string")

    assert service.reaches(service.submit("trivial"), "succeeded").attempts == 1
    until(lambda: not service.redis.lrange(f"rq:queue:{service.queue}:intermediate", 0, -1))


def test_an_entry_that_lost_its_hash_is_written_anew(service: Service):
    """Only RQ's copy is gone; the job is ours and still runs."""
    with service.suspended():
        job_id = service.submit("trivial")
        service.redis.delete(f"rq:job:{job_id}")

    assert service.reaches(job_id, "succeeded", "failed").state == "succeeded"


# what dies


def test_the_second_crash_quarantines_with_what_is_needed(service: Service):
    """The child dies twice; the worker stays, and the stack is kept."""
    worker, job_id = service.workers[0].pid, service.submit("crash")
    status = service.reaches(job_id, "quarantined")
    entry = json.loads(service.redis.hget(service.store.key("quarantine"), job_id) or b"{}")

    assert status.attempts == 2
    assert status.failure is not None
    assert status.failure.code == "decoder_crashed"
    assert "SIGABRT" in entry["crashes"][0]["message"]
    assert "crash" in entry["crashes"][0]["detail"]
    assert [crash["alone"] for crash in entry["crashes"]] == [True, True]
    assert service.workers[0].pid == worker and service.workers[0].poll() is None
    assert service.reaches(service.submit("trivial"), "succeeded").attempts == 1


def test_a_crash_at_the_first_attempt_only_is_forgiven(service: Service):
    """One crash is retried."""
    status = service.reaches(service.submit("crash_once"), "succeeded", "quarantined")

    assert (status.state, status.attempts) == ("succeeded", 2)


def test_a_child_killed_in_the_middle_of_a_job_is_replaced(service: Service):
    """kill -9 on the child: the same worker runs the job again."""
    job_id = service.submit("sleep_once", FOR_EVER)
    service.runs(job_id)
    os.kill(service.child(), signal.SIGKILL)
    status = service.reaches(job_id, "succeeded", "quarantined")

    assert (status.state, status.attempts) == ("succeeded", 2)


@pytest.mark.each_redis
def test_a_child_killed_from_outside_is_not_blamed_on_its_file(service: Service, tmp_path: Path):
    """Another tenant may have the same bytes; and a quick success clears what they were blamed."""
    (tmp_path / "clip.mp4").write_bytes(b"x" * 321)
    media = Media(uri=f"file://{tmp_path}/clip.mp4")
    files = f"{service.store.prefix}crashes:workers:*"
    job_id = service.submit("hold_file", "hold:/no/such/file", media=media)
    service.runs(job_id)
    os.kill(service.child(), signal.SIGKILL)
    status = service.reaches(job_id, "succeeded", "quarantined")
    assert (status.state, status.attempts) == ("succeeded", 2)
    assert service.redis.keys(files) == []

    sha = hashlib.sha256(b"x" * 321).hexdigest()
    service.redis.sadd(service.store.key("crashes", "workers", sha), "another-worker")
    service.reaches(service.submit("weigh", media=media), "succeeded")
    assert service.redis.keys(files) == []


def own_mounts() -> bool:
    """Whether this machine lets a test mount a small disk of its own."""
    return subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode == 0


def fill(folder: Path) -> None:
    """Use up the disk's inodes."""
    for number in range(1000):
        (folder / str(number)).touch()


@pytest.mark.each_redis
@pytest.mark.skipif(not own_mounts(), reason="the kernel allows no mount in a user namespace")
def test_a_full_work_disk_charges_no_job(make: Callable[..., Service], tmp_path: Path):
    """Jobs go back to the queue and the worker is not ready, until there is room again."""
    (tmp_path / "clip.mp4").write_bytes(b"x" * 1000)
    disk, port = tmp_path / "disk", free_port()
    disk.mkdir()
    service = make(work_dir=str(disk), file_roots=(str(tmp_path),), http_port=port)
    mount = f"mount -t tmpfs -o size=4m,nr_inodes=100 tmpfs {disk} && exec "
    worker = service.worker(prefix=["unshare", "-rm", "sh", "-c", mount + '"$0" "$@"'])
    inside = Path(f"/proc/{worker.pid}/root{disk}")
    filler = inside / "filler"
    filler.mkdir()
    with pytest.raises(OSError, match="No space left"):
        fill(filler)
    media = Media(uri=f"file://{tmp_path}/clip.mp4")
    jobs = [service.submit("weigh", media=media) for _ in range(3)]
    until(lambda: "worker.blocked" in service.said() or worker.poll() is not None)
    until(lambda: get(port, "/readyz")[0] == 503)
    stored = [service.redis.hgetall(service.store.key("job", job)) for job in jobs]

    assert worker.poll() is None, service.said()
    assert {fields[b"state"] for fields in stored} == {b"queued"}
    assert {fields[b"retries"] for fields in stored} == {b"0"}
    shutil.rmtree(filler)
    assert {service.reaches(job, "succeeded", "failed").state for job in jobs} == {"succeeded"}
    assert service.redis.keys(f"{service.store.prefix}crashes:*") == []
    code, ready = get(port, "/readyz")
    assert code == 200
    assert "its child is confined by capabilities, memory_closed" in ready


@pytest.mark.each_redis
def test_a_work_folder_that_is_away_charges_no_job(make: Callable[..., Service], tmp_path: Path):
    """As a full disk, on any machine: the folder is moved away while the worker runs."""
    (tmp_path / "clip.mp4").write_bytes(b"x" * 1000)
    work = tmp_path / "work"
    work.mkdir()
    service = make(work_dir=str(work), file_roots=(str(tmp_path),))
    worker = service.worker()
    (folder,) = work.iterdir()
    folder.rename(tmp_path / "away")
    job_id = service.submit("weigh", media=Media(uri=f"file://{tmp_path}/clip.mp4"))
    until(lambda: "worker.blocked" in service.said() or worker.poll() is not None)
    (tmp_path / "away").rename(folder)

    assert service.reaches(job_id, "succeeded", "failed", "quarantined").state == "succeeded"
    assert service.redis.hget(service.store.key("job", job_id), "retries") == b"0"
    assert service.redis.keys(f"{service.store.prefix}crashes:*") == []


def test_a_worker_killed_in_the_middle_of_a_job_loses_nothing(make: Callable[..., Service]):
    """kill -9 on the parent: its child dies too, another worker ends the job."""
    service = make(heartbeat_ttl_s=3.0)
    first = service.worker()
    child = service.child()
    job_id = service.submit("sleep_once", FOR_EVER)
    service.runs(job_id)
    first.kill()
    first.wait()
    service.worker()
    status = service.reaches(job_id, "succeeded", "quarantined")

    assert (status.state, status.attempts) == ("succeeded", 2)
    until(lambda: not Path(f"/proc/{child}").exists())


def test_rqs_record_of_a_worker_that_never_beats_expires_with_its_lease(redis_server, monkeypatch):
    """Else it would count as a worker for a minute more, or for ever where it had expired."""
    service = Service(redis_server.url, QUICK)
    child = ChildProcess(service.settings, bodies="test")
    worker = RalfWorker(service.store, child, priority="default", table=jobs.table("test"))
    monkeypatch.setattr(worker.beats, "start", lambda: None)
    left = []
    try:
        worker.supervisor.start()
        worker.bootstrap()
        left.append(service.redis.ttl(worker.key))
        for body in ("trivial", "no_such_body"):
            service.submit(body)
            service.redis.delete(worker.key)
            job, queue = worker.dequeue_job_and_maintain_ttl(None)
            worker.execute_job(job, queue)
            left.append(service.redis.ttl(worker.key))
        service.redis.delete(worker.key)
        worker.set_state("suspended")
        left.append(service.redis.ttl(worker.key))
    finally:
        worker.unsubscribe()
        child.close()
        worker.wakeup.close()
        service.close()

    assert all(0 < seconds <= QUICK.heartbeat_ttl_s for seconds in left), left


def test_a_hang_is_ended_though_it_hears_nothing(make: Callable[..., Service]):
    """No progress for hang_s: killed, counted, quarantined at the second."""
    service = make(hang_s=0.6)
    service.worker()
    status = service.reaches(service.submit("hang"), "quarantined")

    assert status.failure is not None
    assert (status.failure.code, status.attempts) == ("job_timeout", 2)
    assert "no progress" in status.failure.message


def test_a_busy_child_gets_longer_and_ends_all_the_same(make: Callable[..., Service]):
    """Native code that holds the interpreter's lock is ended as well."""
    service = make(hang_s=0.5)
    service.worker()
    status = service.reaches(service.submit("spin"), "quarantined")

    assert status.failure is not None
    assert status.failure.code == "job_timeout"
    assert "busy all the while" in status.failure.message


def test_a_job_gets_the_time_of_its_length_and_no_more(make: Callable[..., Service]):
    """The child tells the clip's seconds; the limit is clamped between least and most."""
    service = make(
        timeout_base_s=0.1, timeout_per_video_s=0.01, timeout_least_s=0.3, timeout_most_s=60.0
    )
    service.worker()
    status = service.reaches(service.submit("sleep", "sleep:30"), "quarantined", "succeeded")

    assert status.failure is not None
    assert "ran for more than 0.4 s, which is what a clip of 30 s gets" in status.failure.message


def test_a_child_above_its_memory_bound_is_killed_in_the_job(make: Callable[..., Service]):
    """Before the machine's own killer picks a victim."""
    service = make(child_max_rss=1024**2)
    service.worker()
    status = service.reaches(service.submit("sleep", FOR_EVER), "quarantined")

    assert status.failure is not None
    assert status.failure.code == "decoder_crashed"
    assert "bytes" in status.failure.message


def test_a_child_is_recycled_after_its_jobs(make: Callable[..., Service]):
    """Between two jobs, without a job noticing."""
    service = make(child_max_jobs=2, cancel_grace_s=PATIENCE_S)
    service.worker()
    children = set()
    for _ in range(4):
        job_id = service.submit("sleep", FOR_EVER)
        service.runs(job_id)
        children.add(service.child())
        service.store.cancel(job_id)
        assert service.reaches(job_id, "cancelled").attempts == 1

    assert len(children) == 2


def test_a_restart_of_redis_in_the_middle_of_a_job_costs_nothing(tmp_path: Path):
    """kill -9 on Redis with AOF on: the job ends once, with its verdict."""
    server, release = RedisServer(aof=True), tmp_path / "release"
    server.start()
    service = Service(server.url, QUICK)
    try:
        service.worker()
        job_id = service.submit("hold", f"hold:{release}")
        service.runs(job_id)
        server.kill()
        until(lambda: "redis.unreachable" in service.said())
        server.start()
        release.touch()
        status = service.reaches(job_id, "succeeded", "failed", "quarantined")

        assert (status.state, status.attempts) == ("succeeded", 1)
        assert service.redis.xlen(service.store.key("verdicts")) == 1
        assert service.reaches(service.submit("trivial"), "succeeded").attempts == 1
    finally:
        service.close()
        server.stop()


@contextmanager
def silent(server: RedisServer) -> Iterator[None]:
    """Redis takes connections and answers nothing, as behind a dead switch."""
    assert server.process is not None
    server.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        server.process.send_signal(signal.SIGCONT)


def test_a_hung_child_is_killed_while_redis_is_silent(own_redis: RedisServer):
    """The loop that judges the run does not wait for Redis."""
    service = Service(own_redis.url, replace(QUICK, hang_s=3.0))
    try:
        service.worker()
        child, job_id = service.child(), service.submit("hang")
        service.reaches(job_id, "running")
        with silent(own_redis):
            until(lambda: not Path(f"/proc/{child}").exists())
        status = service.reaches(job_id, "quarantined", "succeeded")

        assert status.failure is not None and status.failure.code == "job_timeout"
    finally:
        service.close()


def test_a_worker_exits_in_time_while_redis_is_silent(own_redis: RedisServer):
    """SIGTERM, the grace, and out, though the job cannot be handed back; its lease runs out."""
    service = Service(own_redis.url, replace(QUICK, grace_s=1.0, hang_s=LONG_S))
    try:
        worker = service.worker()
        job_id = service.submit("hang")
        service.reaches(job_id, "running")
        child = service.child()
        with silent(own_redis):
            worker.send_signal(signal.SIGTERM)
            assert ended(worker) == 0
        assert not Path(f"/proc/{child}").exists()
        # Redis may have read the hand-back when it woke up; else the lease runs out.
        assert service.status(job_id).state in {"running", "queued"}
        service.store.cancel(job_id)
    finally:
        service.close()


def turned_s_ago(port: int) -> float:
    """How long ago the loop turned, as /healthz says."""
    found = re.search(r"turned ([\d.]+) s ago", get(port, "/healthz")[1])
    assert found is not None
    return float(found[1])


def test_an_idle_worker_is_live_while_redis_is_silent(own_redis: RedisServer):
    """A restart of every pod mends no Redis; the loop turns, and that is what /healthz says."""
    port = free_port()
    service = Service(own_redis.url, replace(QUICK, http_port=port))
    try:
        worker = service.worker()
        service.beats(2)  # it has begun its loop
        with silent(own_redis):
            for _ in range(3):  # a loop that waits for Redis turns once a minute
                until(lambda: turned_s_ago(port) > 0.4)
                until(lambda: turned_s_ago(port) < 0.4)
        assert worker.poll() is None
        assert service.reaches(service.submit("trivial"), "succeeded", "queued") is not None
    finally:
        service.close()


def test_a_busy_worker_is_live_and_ready_while_redis_is_silent(
    own_redis: RedisServer, tmp_path: Path
):
    """Its child works on, so Kubernetes must neither restart it nor take it off the list."""
    port, release = free_port(), tmp_path / "release"
    service = Service(own_redis.url, replace(QUICK, http_port=port, hang_s=LONG_S))
    try:
        worker = service.worker()
        job_id = service.submit("hold", f"hold:{release}")
        service.runs(job_id)
        with silent(own_redis):
            until(lambda: "redis.unreachable" in service.said())
            until(lambda: turned_s_ago(port) < 0.4)
            assert [get(port, path)[0] for path in ("/healthz", "/readyz")] == [200, 200]
            # The verdict is made, and waits for Redis: the loop turns all the same.
            release.touch()
            before = service.said().count("redis.unreachable")
            until(lambda: service.said().count("redis.unreachable") > before + 1)
            until(lambda: turned_s_ago(port) < 0.4)
            assert [get(port, path)[0] for path in ("/healthz", "/readyz")] == [200, 200]
        assert service.reaches(job_id, "succeeded", "quarantined").attempts == 1
        assert worker.poll() is None
    finally:
        service.close()


def test_progress_and_lease_survive_a_silence_of_redis(own_redis: RedisServer, tmp_path: Path):
    """Shorter than the lease: the job goes on, and its verdict is stored once."""
    service, release = Service(own_redis.url, QUICK), tmp_path / "release"
    try:
        service.worker()
        job_id = service.submit("hold", f"hold:{release}")
        service.runs(job_id)
        with silent(own_redis):
            until(lambda: "redis.unreachable" in service.said())
        release.touch()

        assert service.reaches(job_id, "succeeded", "quarantined").attempts == 1
        assert service.redis.xlen(service.store.key("verdicts")) == 1
    finally:
        service.close()


@pytest.mark.each_redis
def test_a_job_that_ends_before_it_runs_is_counted(make: Callable[..., Service]):
    """Its deadline passed, its file is blocked, it cannot be read: alerts read these counts."""
    port = free_port()
    service = make(http_port=port)
    store, past = service.store, datetime.now(UTC) + timedelta(seconds=0.1)
    late = service.submit("trivial", deadline=past)
    blocked = service.submit("trivial", media=Media(uri="file:///a.mp4", sha256="f" * 64))
    service.redis.sadd(store.key("crashes", "workers", "f" * 64), "w1", "w2")
    odd = service.submit("trivial")
    service.redis.hset(store.key("job", odd), "document", "{}")
    until(lambda: datetime.now(UTC) > past)
    # No janitor sweeps: it would end the first one itself.
    service.settings = replace(service.settings, janitor_every_s=LONG_S)
    service.worker()
    ends = {late: "expired", blocked: "quarantined", odd: "failed"}
    for job_id, state in ends.items():
        service.reaches(job_id, state)

    for labels in (
        'code="deadline_passed",outcome="expired"',
        'code="decoder_crashed",outcome="quarantined"',
        'code="bad_request",outcome="failed"',
    ):
        sample = f"ralf_jobs_total{{{labels}}} 1.0"
        until(lambda sample=sample: sample in get(port, "/metrics")[1])


# cancel, deadline, stop


def test_a_running_job_is_cancelled_politely(make: Callable[..., Service]):
    """It stops at its next progress; the child lives on."""
    service = make(cancel_grace_s=PATIENCE_S)
    service.worker()
    child, job_id = service.child(), service.submit("sleep", FOR_EVER)
    service.runs(job_id)
    assert service.store.cancel(job_id) == "running"
    service.reaches(job_id, "cancelled")

    assert service.reaches(service.submit("trivial"), "succeeded").attempts == 1
    assert service.child() == child


def test_a_hang_is_cancelled_by_force(service: Service):
    """Who does not hear is killed after a short grace, and not counted as a crash."""
    job_id = service.submit("hang")
    service.reaches(job_id, "running")
    service.store.cancel(job_id)
    status = service.reaches(job_id, "cancelled")

    assert status.attempts == 1
    assert service.redis.exists(service.store.key("crashes", "job", job_id)) == 0
    assert service.reaches(service.submit("trivial"), "succeeded").attempts == 1


def test_a_deadline_that_passes_in_the_run_expires_the_job(service: Service):
    """deadline_passed, not a verdict that nobody waits for."""
    deadline = datetime.now(UTC) + timedelta(seconds=1)
    status = service.reaches(service.submit("sleep", FOR_EVER, deadline=deadline), "expired")

    assert status.failure is not None
    assert (status.state, status.failure.code) == ("expired", "deadline_passed")


def test_an_operator_stops_a_job_with_rqs_own_command(service: Service):
    """send_stop_job_command kills the child; the job is cancelled, the worker stays."""
    job_id = service.submit("hang")
    service.reaches(job_id, "running")
    until(lambda: StartedJobRegistry(service.queue, connection=service.redis).get_job_ids())
    worker = service.redis.hget(f"rq:job:{job_id}", "worker_name") or b""
    until(lambda: service.redis.hget(f"rq:worker:{worker.decode()}", "current_job"))
    send_stop_job_command(service.redis, job_id)

    assert service.reaches(job_id, "cancelled").attempts == 1
    assert service.reaches(service.submit("trivial"), "succeeded").attempts == 1


def test_rq_suspend_holds_the_worker(service: Service):
    """No job is taken while it lasts; heartbeats go on."""
    with service.suspended():
        job_id = service.submit("trivial")
        service.beats(2)
        assert service.status(job_id).state == "queued"
        assert service.registered() == {service.workers[0].pid}
    service.reaches(job_id, "succeeded")


def test_heartbeats_go_on_during_a_job_whatever_its_timeout(service: Service):
    """RQ's worker and execution, and our lease, are each moved on at every beat."""
    job_id = service.submit("sleep", FOR_EVER)
    service.runs(job_id)
    started = StartedJobRegistry(service.queue, connection=service.redis).key
    until(lambda: service.redis.zrange(started, 0, -1))
    leases = service.store.key("running", "default")
    (key,) = service.redis.smembers(f"rq:workers:{service.queue}")
    (execution,) = service.redis.zrange(started, 0, -1)
    for _ in range(3):
        now = service.store.now()
        service.beats(2)
        assert service.redis.ttl(key) > 0
        until(lambda now=now: service.redis.zscore(started, execution) >= int(now) + 20)
        until(lambda now=now: service.redis.zscore(leases, job_id) > now + 20)
    service.store.cancel(job_id)

    assert service.reaches(job_id, "cancelled").attempts == 1


# draining


def test_sigterm_lets_the_job_end(make: Callable[..., Service], tmp_path: Path):
    """Within the grace; the exit is clean and RQ forgets the worker."""
    port, release = free_port(), tmp_path / "release"
    service = make(grace_s=LONG_S, http_port=port)
    worker = service.worker()
    job_id = service.submit("hold", f"hold:{release}")
    service.runs(job_id)
    worker.send_signal(signal.SIGTERM)
    until(lambda: get(port, "/readyz")[0] == 503)  # it drains, and the job still runs
    assert service.status(job_id).state == "running"
    release.touch()

    assert ended(worker) == 0, service.said()
    status = service.status(job_id)
    assert (status.state, status.attempts) == ("succeeded", 1), service.said()
    assert service.registered() == set()


def test_an_idle_worker_stops_at_once_and_takes_nothing(make: Callable[..., Service]):
    """It has nothing to be given grace for; what comes later waits for another worker."""
    service = make(grace_s=LONG_S)
    worker = service.worker()
    worker.send_signal(signal.SIGTERM)
    assert ended(worker) == 0, service.said()
    job_id = service.submit("trivial")

    assert service.redis.lrange(f"rq:queue:{service.queue}", 0, -1) == [job_id.encode()]
    assert service.status(job_id).state == "queued"


@pytest.mark.parametrize("error", [GaveUp("no answer within 6 s"), RedisConnectionError("closed")])
def test_the_command_thread_outlives_a_redis_that_is_away(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch, error: RedisError
):
    """RQ ends the thread on what is not a ConnectionError; then no stop-job arrives any more."""
    service = Service(redis_server.url, QUICK)
    child = ChildProcess(service.settings, bodies="test")
    worker = RalfWorker(service.store, child, priority="default", table=jobs.table("test"))
    waits: list[float] = []
    monkeypatch.setattr("rq.worker.base.time.sleep", waits.append)

    worker._pubsub_exception_handler(error, None, None)

    assert [2.0] == waits
    child.close()
    worker.wakeup.close()
    service.close()


def test_a_stopped_worker_leaves_no_thread_listening(redis_server: RedisServer):
    """RQ's own waits on in a thread, and takes its connection apart from another one."""
    service = Service(redis_server.url, QUICK)
    child = ChildProcess(service.settings, bodies="test")
    worker = RalfWorker(service.store, child, priority="default", table=jobs.table("test"))
    worker.bootstrap()
    listener = worker.pubsub_thread
    listening = listener.is_alive()
    worker.teardown()
    child.close()
    worker.wakeup.close()
    service.close()

    assert listening
    assert not listener.is_alive()
    assert worker.pubsub.connection is None


@pytest.mark.parametrize(("grace", "again"), [(0.5, False), (LONG_S, True)])
def test_a_job_that_does_not_end_in_time_is_handed_back_uncharged(
    make: Callable[..., Service], grace: float, again: bool
):
    """When the grace is over, or at once on a second SIGTERM; even one that hangs."""
    service = make(grace_s=grace, hang_s=LONG_S)
    worker = service.worker()
    job_id = service.submit("hang")
    service.reaches(job_id, "running")
    worker.send_signal(signal.SIGTERM)

    def stopped() -> bool:
        if again:  # two that come at once are one to the process
            worker.send_signal(signal.SIGTERM)
        return worker.poll() is not None

    until(stopped)
    assert worker.wait() == 0, service.said()
    assert service.status(job_id).state == "queued"
    stored = service.redis.hgetall(service.store.key("job", job_id))
    assert stored[b"retries"] == b"0"
    assert service.redis.exists(service.store.key("crashes", "job", job_id)) == 0
    assert service.store.cancel(job_id) == "cancelled"


# several parents, one child


def test_a_crash_in_company_blames_nobody(make: Callable[..., Service], tmp_path: Path):
    """Both are run again; the guilty one alone, where it is counted twice and put aside."""
    service = make()
    service.shared = tmp_path / "gpu0"
    for _ in range(2):
        service.worker("--shared", str(service.shared), "--capacity", "2")
    innocent = service.submit("sleep_once", FOR_EVER)
    service.runs(innocent)
    guilty = service.submit("crash", "crash:0.4")
    service.reaches(guilty, "quarantined", "succeeded")
    assert service.reaches(innocent, "succeeded", "quarantined").state == "succeeded"
    entry = json.loads(service.redis.hget(service.store.key("quarantine"), guilty) or b"{}")
    assert [crash["alone"] for crash in entry["crashes"]] == [False, True, True]


def test_a_job_without_company_is_recorded_as_alone(make: Callable[..., Service], tmp_path: Path):
    """From its start, since a crash of the whole worker is charged by this record."""
    service = make()
    service.shared = tmp_path / "gpu0"
    for _ in range(2):
        service.worker("--shared", str(service.shared), "--capacity", "2")

    def alone(job_id: str) -> bytes | None:
        return service.redis.hget(service.store.key(f"job:{job_id}"), "alone")

    first = service.submit("sleep", FOR_EVER)
    until(lambda: alone(first) == b"1")
    second = service.submit("sleep", FOR_EVER)
    until(lambda: (alone(first), alone(second)) == (b"0", b"0"))
    service.store.cancel(second)
    until(lambda: alone(first) == b"1")


# what is said


def test_one_canonical_line_per_run_with_the_trace(make: Callable[..., Service]):
    """job.finished, once for each attempt, the traceparent on it."""
    service = make()
    service.worker()
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    job_id = service.submit("oom", traceparent=trace)
    service.reaches(job_id, "succeeded")
    lines = [line for line in service.stop() if line["event"] == "job.finished"]

    assert [line["outcome"] for line in lines] == ["retried", "succeeded"]
    assert {line["traceparent"] for line in lines} == {trace}
    assert {line["trace_id"] for line in lines} == {trace.split("-")[1]}
    assert [line["attempt"] for line in lines] == [1, 2]
    assert lines[0]["code"] == "gpu_oom"
    assert lines[1]["label"] == "no_faces"


def test_rq_itself_reads_our_entries(service: Service):
    """`rq info` and dashboards use this class."""
    job_id = service.submit("trivial")
    service.reaches(job_id, "succeeded")
    entry = RqJob.fetch(job_id, connection=service.redis, serializer="json")

    assert entry.func_name == bodies.PREFIX + "trivial"
    assert entry.origin == service.queue


def test_a_job_costs_few_round_trips(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch):
    """What a no-op costs is Redis and the socket; RQ's SimpleWorker asks Redis 18 times a job."""
    url = redis_server.url
    # no heartbeats: a slow machine has more of them for each job
    settings = replace(QUICK, redis_url=url, heartbeat_s=LONG_S, heartbeat_ttl_s=2.0 * LONG_S)
    service = Service(url, settings)
    service.store.redis.close()
    settings = service.settings
    service.store = Store(connect(url), settings, function=bodies.PREFIX + "trivial")
    sent = [0]
    send = AbstractConnection.send_packed_command

    def counted(self: AbstractConnection, *args: Any, **kwargs: Any) -> Any:
        sent[0] += threading.current_thread() is threading.main_thread()
        return send(self, *args, **kwargs)

    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    child = ChildProcess(settings, bodies="test")
    worker = RalfWorker(service.store, child, priority="default", table=jobs.table("test"))
    try:
        worker.supervisor.start()
        for number in range(50):
            service.submit("trivial", str(number))
        monkeypatch.setattr(AbstractConnection, "send_packed_command", counted)
        worker.work(burst=True, max_jobs=50)
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), handlers, strict=True):
            signal.signal(number, handler)
        child.close()
        worker.wakeup.close()
        verdicts = service.redis.xlen(service.store.key("verdicts"))
        service.close()

    assert verdicts == 50
    assert sent[0] / 50 < 8


def test_an_upload_waits_for_one_job_of_a_backfill_and_not_for_the_next(service, tmp_path):
    """The worker looks at its own queue first after each job."""
    gates = [tmp_path / name for name in ("first", "second")]
    first, second = [
        service.submit("hold", f"hold:{gate}", priority="backfill", tenant="archive")
        for gate in gates
    ]
    service.runs(first)
    upload = service.submit("trivial")
    gates[0].touch()
    service.reaches(upload, "succeeded")
    service.runs(second)
    gates[1].touch()
    end = service.reaches(second, "succeeded")

    begun = [service.status(job).started_at for job in (first, upload, second)]
    assert begun == sorted(begun) and service.status(first).ended_at <= begun[1]
    assert end.attempts == 1
    assert service.redis.exists(f"rq:wip:{service.store.queue('backfill')}") == 0


def test_a_worker_that_serves_the_backfill_alone_leaves_uploads(redis_server):
    """--priority backfill: for machines that are rented to work off an archive."""
    with closing(Service(redis_server.url, QUICK)) as service:
        upload = service.submit("trivial")
        archived = service.submit("trivial", priority="backfill")
        worker = a_worker(service.settings, "--priority", "backfill", "--burst")

        assert ended(worker) == 0
        assert service.status(archived).state == "succeeded"
        assert service.status(upload).state == "queued"
