"""The service's processes as a supervisor sees them: checks, metrics, exits, one machine's all."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from redis import Redis

from ralf.worker.chaos import bodies
from ralf.worker.contract import Media
from ralf.worker.service import processes
from ralf.worker.service.connection import connect
from ralf.worker.service.embedded import embedded
from ralf.worker.service.health import Health, queue_counts, serving_at
from ralf.worker.service.processes import QUICK_DEATHS, ProcessFailed, Supervisor, as_environment
from ralf.worker.service.store import Store
from ralf.worker.settings import Settings
from ralf.worker.telemetry import Metrics
from tests.documents import a_job
from tests.waiting import LONG_S, until
from tests.web import Piece, Request, free_port, get, reply, serving
from tests.workers import QUICK, a_worker, ended

ROOT = Path(__file__).resolve().parent.parent


def test_the_checks_follow_the_loop_and_the_child():
    """Live from progress; ready only with a checked model."""
    pulse, ready = [time.monotonic()], [False]
    health = Health(Settings(), pulse=lambda: pulse[0], ready=lambda: ready[0])
    with serving_at("127.0.0.1", 0, health, Metrics()) as port:
        assert [get(port, path)[0] for path in ("/healthz", "/readyz")] == [200, 503]
        ready[0] = True
        assert get(port, "/readyz") == (200, "ready\n")
        pulse[0] -= 3 * Settings().heartbeat_s + 1
        assert [get(port, path)[0] for path in ("/healthz", "/readyz")] == [503, 503]
        assert get(port, "/etc/passwd?x=<script>") == (
            404,
            "there are /metrics, /healthz and /readyz\n",
        )


def test_metrics_show_the_queue_as_redis_has_it(redis_url: str):
    """Text that Prometheus' own parser reads; names in its conventions."""
    store = Store(connect(redis_url), QUICK)
    store.submit([a_job("1"), a_job("2", priority="high")])
    metrics = Metrics()
    metrics.watch_queue(queue_counts(store))
    with serving_at("127.0.0.1", 0, Health(QUICK, pulse=time.monotonic), metrics) as port:
        status, text = get(port, "/metrics")
    store.redis.close()
    families = {family.name: family for family in text_string_to_metric_families(text)}

    assert status == 200
    assert {s.labels["priority"]: s.value for s in families["ralf_queued_jobs"].samples} == {
        "high": 1,
        "default": 1,
        "backfill": 0,
    }
    assert families["ralf_redis_up"].samples[0].value == 1
    assert families["ralf_queue_oldest_age_seconds"].samples[0].value >= 0
    assert {"ralf_jobs", "ralf_child_restarts", "ralf_quarantined_jobs", "ralf_outbox_due"} <= set(
        families
    )
    assert [name for name in families if not name.startswith("ralf_")] == []


def test_settings_survive_the_way_through_an_environment():
    """What embedded() starts sees exactly what it was given."""
    settings = replace(
        QUICK, file_roots=("/a", "/b"), allow_private_addresses=True, webhook_secrets=("d=whsec_x",)
    )
    environment = as_environment(settings, {"PATH": "/bin", "RALF_MODEL": "other"})
    read = Settings.from_environment(environment)

    assert [
        f.name for f in fields(read) if getattr(read, f.name) != getattr(settings, f.name)
    ] == []
    assert environment["PATH"] == "/bin"


def test_embedded_serves_and_leaves_nothing_behind():
    """A real Redis and a worker while the block runs; afterwards neither process nor socket."""
    with embedded(QUICK, bodies="test") as service:
        store = Store(connect(service.redis_url), service.settings)
        job = a_job("1", tag="hello")
        store.submit([job], function=bodies.PREFIX + "trivial")
        until(lambda: store.verdict(job.job_id) is not None)
        verdict = store.verdict(job.job_id)
        store.redis.close()
        pids = dict(service.pids)

    assert verdict is not None
    assert verdict.tag == "hello"
    assert set(pids) == {"redis-0", "worker-0", "worker-1", "deliverer-0"}
    assert [name for name, pid in pids.items() if Path(f"/proc/{pid}").exists()] == []
    assert not Path(service.redis_url.removeprefix("unix://")).exists()


def test_embedded_keeps_its_data_where_it_is_told(tmp_path: Path):
    """With a folder the queue outlives the block; Redis is set as `ralf doctor` wants it."""
    for attempt in range(2):
        with embedded(QUICK, bodies="test", deliver=False, data=tmp_path) as service:
            with Redis.from_url(service.redis_url) as redis:
                assert redis.incr("kept") == attempt + 1
                assert redis.config_get("append*")["appendonly"] == "yes"
                assert redis.config_get("append*")["appendfsync"] == "always"


def test_embedded_dies_with_whoever_started_it():
    """kill -9 leaves no server behind."""
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from tests.test_serve import *\n"
        "with embedded(QUICK, bodies='test', deliver=False) as service:\n"
        "    print(*service.pids.values(), flush=True); time.sleep(600)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(ROOT)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
    ) as owner:
        assert owner.stdout is not None
        pids = owner.stdout.readline().split()
        owner.kill()

    assert len(pids) == 3
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


def test_a_process_that_does_not_start_says_so(tmp_path: Path):
    """And what was started before it is stopped."""
    settings = replace(QUICK, models_dir=str(tmp_path), model="absent")
    with pytest.raises(ProcessFailed, match="ended with 5"):
        with embedded(settings, deliver=False):
            pass


def test_workers_that_start_while_redis_is_down_are_started_until_it_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Each ends at once then; without that reason a worker is given up after a few quick ends."""
    monkeypatch.setattr(processes, "PAUSE_AFTER_DEATH_S", 0.01)
    supervisor = Supervisor(Settings(), tmp_path, logged=True)
    redis, worker = supervisor.add("redis"), supervisor.add("worker")
    redis.command, worker.command = [sys.executable, "-c", "pass"], ["false"]
    redis.not_before = time.monotonic() + LONG_S
    supervisor.tend()
    until(lambda: supervisor.tend() or worker.starts > 2 * QUICK_DEATHS)
    assert worker.quick_deaths == 0
    redis.command, redis.not_before = ["sleep", str(LONG_S)], 0.0
    try:
        with pytest.raises(ProcessFailed, match="worker-0 ends with 1 each time"):
            until(lambda: supervisor.tend() or False)
    finally:
        supervisor.stop("worker", "redis")


def test_a_janitor_alone_sweeps_and_stops_on_sigterm(redis_url: str):
    """`ralf janitor`: a put-off job comes back without any worker."""
    settings = replace(QUICK, redis_url=redis_url)
    process = subprocess.Popen(
        [sys.executable, "-m", "ralf", "janitor"],
        env=as_environment(settings, os.environ),
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
    )
    try:
        store = Store(connect(redis_url), settings)
        store.submit([a_job("1")])
        store.redis.delete(f"rq:queue:{store.queue('default')}")
        until(lambda: store.redis.llen(f"rq:queue:{store.queue('default')}") == 1)
        store.redis.close()
        process.send_signal(signal.SIGTERM)
        assert ended(process) == 0
    finally:
        process.kill()
        process.wait()


@contextmanager
def at_work(settings: Settings) -> Iterator[tuple["subprocess.Popen[bytes]", Store]]:
    """A worker process with test bodies that has registered, and its store; gone afterwards."""
    process, store = a_worker(settings), Store(connect(settings.redis_url), settings)
    try:
        until(lambda: store.counts().workers["default"] == 1)
        yield process, store
    finally:
        store.redis.close()
        process.kill()
        process.wait()


def test_a_worker_tells_its_metrics_and_is_ready_after_its_child(redis_url: str):
    """The port of Settings; counts go up as jobs end."""
    settings = replace(QUICK, redis_url=redis_url, http_port=free_port())
    with at_work(settings) as (process, store):
        assert get(settings.http_port, "/readyz")[0] == 200
        store.submit([a_job("1")], function=bodies.PREFIX + "trivial")
        wanted = 'ralf_jobs_total{code="",outcome="succeeded"} 1.0'
        until(lambda: wanted in get(settings.http_port, "/metrics")[1])
        text = get(settings.http_port, "/metrics")[1]
        process.terminate()
        assert ended(process) == 0

    assert "ralf_ready 1.0" in text
    assert 'ralf_engine_info{decoder="",device="",engine="test"' in text
    assert "ralf_child_rss_bytes" in text


def test_a_draining_worker_is_live_and_not_ready(redis_url: str):
    """It ends its job, whose file comes when the test lets it, and would take no other."""
    let = threading.Event()

    def file(_: Request) -> Iterator[Piece]:
        whole = reply(200, b"x" * 1000)
        let.wait(LONG_S)
        yield from whole

    with serving(file) as web:
        settings = replace(
            QUICK,
            redis_url=redis_url,
            http_port=free_port(),
            fetch_ports=(web.port,),
            allow_private_addresses=True,
            grace_s=LONG_S,
        )
        job = a_job("1", media=Media(uri=f"{web.url}/clip.mp4"))
        with at_work(settings) as (process, store):
            store.submit([job], function=bodies.PREFIX + "weigh")
            until(lambda: web.requests)
            before = get(settings.http_port, "/readyz")[0]
            process.terminate()
            until(lambda: get(settings.http_port, "/readyz")[0] == 503)
            live = get(settings.http_port, "/healthz")[0]
            let.set()
            code = ended(process)
            verdict = store.verdict("j1")

    assert (before, live, code) == (200, 200, 0)
    assert verdict is not None
    assert verdict.media.size_bytes == 1000


def test_a_second_sigterm_while_the_process_ends_does_not_make_it_a_death(redis_url: str):
    """Python puts the signals' defaults back before it is gone; supervisors ask twice."""
    code = (
        "import signal, sys; from ralf.worker.service.serve import run_janitor\n"
        "from ralf.worker.settings import Settings\n"
        "run_janitor(Settings.from_environment())\n"
        "sys.exit(99 * (signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN))"
    )
    settings = replace(QUICK, redis_url=redis_url)
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=as_environment(settings, os.environ),
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
    )
    with Redis.from_url(redis_url) as redis:
        until(lambda: redis.exists("ralf:swept"))
    process.terminate()

    assert ended(process) == 0


def test_embedded_serves_both_priorities():
    """A job of priority high would wait for ever without a worker of its own."""
    with embedded(QUICK, bodies="test", deliver=False) as service:
        store = Store(connect(service.redis_url), service.settings)
        asked = [a_job("1"), a_job("2", priority="high")]
        store.submit(asked, function=bodies.PREFIX + "trivial")
        until(lambda: all(store.verdict(job.job_id) for job in asked))
        store.redis.close()


def test_embedded_starts_a_killed_deliverer_again():
    """And the queue goes on meanwhile."""
    with embedded(QUICK, bodies="test") as service:
        before = service.pids
        os.kill(before["deliverer-0"], signal.SIGKILL)
        dead = (0, before["deliverer-0"])
        until(lambda: service.ended() == "" and service.pids["deliverer-0"] not in dead)
        after = service.pids

    assert {name for name in before if before[name] != after[name]} == {"deliverer-0"}


def test_embedded_tells_which_part_has_ended():
    """Whoever runs it can stop instead of serving nobody."""
    with embedded(QUICK, bodies="test", deliver=False) as service:
        well = service.ended()
        os.kill(service.pids["worker-1"], signal.SIGKILL)
        until(lambda: service.ended() != "")

        assert well == ""
        assert service.ended() == "worker-1 ended with -9"
