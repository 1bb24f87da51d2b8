"""The service's commands as a person types them, against a real Redis; once with all of it."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from standardwebhooks import Webhook

from ralf.__main__ import main
from ralf.worker.chaos import bodies
from ralf.worker.cli import queue
from ralf.worker.cli import service as commands
from ralf.worker.client import Client, connect
from ralf.worker.contract import Callback, Media, SessionPart, Verdict
from ralf.worker.service.deliver import Outbox
from ralf.worker.service.embedded import embedded
from ralf.worker.service.records import Status
from ralf.worker.settings import Settings
from tests.documents import a_failure, a_job, a_verdict, an_evidence
from tests.test_deliver import OLD
from tests.test_store import claim
from tests.web import Request, Web, reply, serving
from tests.workers import ended

ROOT = Path(__file__).resolve().parent.parent
URI = "https://media.example/1.mp4"


@dataclass
class Typed:
    """What a command answered."""

    code: int
    lines: list[Any]
    said: str

    @property
    def line(self) -> Any:
        """The only one."""
        (line,) = self.lines
        return line


@pytest.fixture
def ralf(redis_url, monkeypatch, capsys):
    """Type a command at the suite's Redis."""
    monkeypatch.setenv("RALF_REDIS_URL", redis_url)

    def typed(*words: str) -> Typed:
        code = main(words)
        out, err = capsys.readouterr()
        lines = [json.loads(line) if line.startswith("{") else line for line in out.splitlines()]
        return Typed(code, lines, err)

    return typed


class TestAsking:
    def test_a_job_is_submitted_once_and_followed_to_its_verdict(
        self, ralf, store, tmp_path, monkeypatch
    ):
        """submit, status, watch, result and its page."""
        made = ralf("submit", URI, "--tag", "post-9", "--tenant", "acme").line
        again = ralf("submit", URI, "--tag", "post-9", "--tenant", "acme").line
        job_id = made["job_id"]
        queued = ralf("status", job_id).line
        early = ralf("result", job_id)
        running = claim(store)
        verdict = a_verdict(job_id=job_id, tag="post-9")
        seen, status = threading.Event(), Client.status

        def read(client: Client, job_id: str) -> Status:
            try:
                return status(client, job_id)
            finally:
                seen.set()

        def end_when_watched() -> None:
            seen.wait(60)
            store.end(running, verdict, evidence=an_evidence())

        monkeypatch.setattr(Client, "status", read)
        ending = threading.Thread(target=end_when_watched)
        ending.start()
        watched = ralf("watch", job_id, "--wait", "60")
        ending.join()
        page = tmp_path / "page.html"
        result = ralf("result", job_id, "--report", str(page))

        assert (made["existing"], again["existing"], again["job_id"]) == (False, True, job_id)
        assert (queued["state"], queued["tag"], queued["tenant"]) == ("queued", "post-9", "acme")
        assert early.code == 2 and "timeout" in early.said
        assert [line["state"] for line in watched.lines] == ["running", "succeeded"]
        assert Verdict.model_validate(result.line) == verdict
        assert "<html" in page.read_text()

    def test_a_job_that_waits_for_its_retry_says_why_and_until_when(self, ralf, store):
        """In the status, for programs, and in the message of `result`, for people."""
        job_id = ralf("submit", URI).line["job_id"]
        store.retry(claim(store), a_failure(), delay_s=60.0)
        status = ralf("status", job_id).line
        result = ralf("result", job_id)

        assert (status["state"], status["failure"]) == ("queued", None)
        assert status["last_failure"] == {
            "code": "fetch_failed",
            "message": "the server answered 503",
            "attempts": 1,
        }
        assert 50 < status["next_attempt_at"] - time.time() <= 60
        assert result.code == 2
        assert "attempt 1 ended with fetch_failed: the server answered 503" in result.said
        assert "the next is due at 20" in result.said

    def test_a_token_is_not_the_uri_which_may_be_a_credential(self, ralf, redis):
        """Nor too long for one."""
        signed = URI + "?X-Amz-Signature=" + "a" * 600
        made = ralf("submit", signed, URI, "--token", "batch")

        assert [line["state"] for line in made.lines] == ["queued", "queued"]
        assert not [key for key in redis.keys("ralf:token:*") if b"Signature" in key]
        assert len(redis.keys("ralf:token:default:batch:*")) == 2

    def test_options_reach_the_job(self, ralf, store):
        """As the worker reads them."""
        words = ["--priority", "high", "--max-frames", "9", "--stop-early", "0.9"]
        push = ["--callback", "https://hooks.example/x", "--secret-id", "s2"]
        made = ralf("submit", URI, "--token", "u", *words, *push).line
        job = store.job(made["job_id"])

        assert job is not None
        assert (job.priority, job.token) == ("high", "u")
        assert job.sampling is not None and job.sampling.max_frames == 9
        assert job.stop_early is not None and job.stop_early.score == 0.9
        assert job.callback == Callback(url="https://hooks.example/x", secret_id="s2")

    @pytest.mark.parametrize(
        "words",
        [
            "status nothing",
            "result nothing",
            "watch nothing",
            "cancel nothing",
            f"submit {URI} --max-frames 0",
            f"submit {URI} --stop-early 2",
            f"submit {URI} --callback ftp://hooks.example/",
            f"submit {URI} --tenant ../x",
        ],
    )
    def test_a_question_that_makes_no_sense_exits_2(self, ralf, words):
        """One line, no traceback, nothing stored."""
        typed = ralf(*words.split())

        assert (typed.code, typed.lines) == (2, [])
        assert typed.said.startswith("ralf: ")

    def test_a_token_with_another_body_is_a_conflict(self, ralf):
        """And says which field differs."""
        ralf("submit", URI, "--token", "u")
        typed = ralf("submit", URI, "--token", "u", "--tag", "other")

        assert typed.code == 2
        assert "tag" in typed.said

    @pytest.mark.parametrize(("code", "exits"), [("corrupt_media", 4), ("fetch_failed", 5)])
    def test_a_job_without_a_verdict_says_whose_fault_it_is(self, ralf, store, code, exits):
        """4 where the same bytes would fail again, 5 where they might not."""
        job_id = ralf("submit", URI).line["job_id"]
        store.end(claim(store), a_failure(code, "because"))
        typed = ralf("result", job_id)

        assert (typed.code, typed.lines) == (exits, [])
        assert code in typed.said and "because" in typed.said

    def test_waiting_in_vain_is_no_fault_of_the_media(self, ralf):
        """5, and the job goes on."""
        job_id = ralf("submit", URI).line["job_id"]

        assert ralf("result", job_id, "--wait", "0.2").code == 5
        assert ralf("cancel", job_id).line == {"job_id": job_id, "state": "cancelled"}
        assert ralf("result", job_id).code == 4


class TestOperating:
    def test_a_quarantined_job_is_looked_into_and_run_again_or_dropped(self, ralf, store):
        """list, show, retry, drop."""
        store.submit([a_job("1"), a_job("2")])
        for _ in range(4):
            store.crashed(claim(store), code="decoder_crashed", message="it died", detail="abort")
        listed = ralf("quarantine", "list").lines
        shown = ralf("quarantine", "show", "j1").line
        retried, dropped = ralf("quarantine", "retry", "j1"), ralf("quarantine", "drop", "j2")

        assert {line["job_id"] for line in listed} == {"j1", "j2"}
        assert shown["job"]["schema"] == "ralf.job/1"
        assert [crash["detail"] for crash in shown["crashes"]] == ["abort", "abort"]
        assert (retried.code, dropped.code) == (0, 0)
        assert store.counts().waiting["default"] == 1
        assert ralf("quarantine", "list").lines == []
        assert [ralf("quarantine", what, "j1").code for what in ("show", "retry", "drop")] == [
            2
        ] * 3

    def test_dead_letters_are_listed_redelivered_and_dropped(self, ralf, store):
        """And endpoints that said they are gone are listed and used again."""
        outbox = Outbox(store)
        for name in ("1", "2"):
            store.submit([a_job(name, callback=Callback(url="https://hooks.example/x"))])
            store.end(claim(store), a_verdict())
        for delivery in outbox.take(9, 60.0):
            outbox.bury(delivery.id, "it never answered")
        outbox.disable_endpoint("acme", "https://hooks.example/x")
        dead = ralf("deliver", "--dead").lines
        one, other = (line["id"] for line in dead)
        again, dropped = ralf("deliver", "--redeliver", one), ralf("deliver", "--drop", other)

        assert {line["error"] for line in dead} == {"it never answered"}
        assert (again.lines, dropped.lines) == ([one], [other])
        assert ralf("deliver", "--dead").lines == []
        assert store.counts().outbox == 1
        assert ralf("deliver", "--redeliver", other).code == 2
        assert ralf("deliver", "--disabled").line["tenant"] == "acme"
        assert ralf("deliver", "--enable", "acme", "https://hooks.example/x").lines == ["enabled"]
        assert ralf("deliver", "--disabled").lines == []

    def test_one_sweep_says_what_it_put_back(self, ralf, store, redis):
        """A job that is in no list."""
        store.submit([a_job("1")])
        redis.delete(f"rq:queue:{store.queue('default')}")

        assert ralf("janitor", "--once").line["rescued"] == ["j1"]
        assert ralf("janitor", "--once").line["rescued"] == []


# all of it, with the real body


@dataclass
class Serving:
    """`ralf serve --embedded`, and who receives its pushes."""

    process: "subprocess.Popen[str]"
    url: str
    log: Path
    inbox: Web
    clip: Path

    @property
    def client(self) -> Client:
        return connect(self.url, settings=Settings())


@pytest.fixture(scope="module")
def served(
    eager_models: Path, clip_of_two: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Serving]:
    """The command itself, its small model in a real child; two frames a chunk."""
    folder = tmp_path_factory.mktemp("serve")
    log = folder / "stderr"
    with serving(lambda request: reply(404 if request.method == "GET" else 204)) as inbox:
        settings = {
            "RALF_FILE_ROOTS": str(clip_of_two.parent),
            "RALF_CHUNK_BYTES": str(2 * 640 * 360 * 3),
            "RALF_HEARTBEAT_S": "0.05",
            "RALF_WEBHOOK_SECRETS": f"*/default={OLD}",
            "RALF_ALLOW_PRIVATE_ADDRESSES": "1",
            "RALF_FETCH_PORTS": str(inbox.port),
            "RALF_THREADS": "1",
            "RALF_LOG_FORMAT": "json",
            "XDG_RUNTIME_DIR": str(folder),
        }
        with log.open("w") as stderr:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "ralf", "serve", "--embedded"),
                    *("--models", str(eager_models), "--model", "eager"),
                ],
                env={**os.environ, **settings},
                cwd=ROOT,
                stderr=stderr,
                text=True,
            )
        try:
            url = ""
            end = time.monotonic() + 150
            while not url and process.poll() is None and time.monotonic() < end:
                found = re.search(r"RALF_REDIS_URL=(\S+)", log.read_text())
                url = found[1] if found else ""
                time.sleep(0.05)
            assert url, log.read_text()
            yield Serving(process, url, log, inbox, clip_of_two)
        finally:
            process.terminate()
            ended(process)


def test_commands_find_the_service_that_runs_here_by_themselves(
    served: Serving, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """`ralf submit` after `ralf serve --embedded`, as README prints it; another address wins."""
    monkeypatch.delenv("RALF_REDIS_URL", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(served.log.parent))
    code = main(["submit", str(served.clip), "--token", "no address", "--wait", "120"])
    verdict = json.loads(capsys.readouterr().out)
    monkeypatch.setenv("RALF_REDIS_URL", "unix:///nowhere/redis.sock")
    elsewhere = main(["status", verdict["job_id"]])

    assert (code, verdict["label"]) == (0, "likely_forged")
    assert elsewhere == 5
    assert "RALF_REDIS_URL" in capsys.readouterr().err


def test_an_address_is_announced_as_long_as_its_socket_is_served(
    redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Not one that nobody serves, nor after the end, nor through a link that somebody planted."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    before = queue.served_here()
    (tmp_path / "other").write_text(redis_url)
    with queue.announced(redis_url):
        during = queue.served_here()
        (file,) = tmp_path.glob("ralf-serving-*")
        with queue.announced("unix:///nowhere/redis.sock"):
            dead = queue.served_here()
        file.unlink()
        file.symlink_to(tmp_path / "other")
        planted = queue.served_here()
        file.unlink()
        file.write_text(redis_url)
    after = queue.served_here()

    assert (before, during, dead, planted, after) == (None, redis_url, None, None, None)


def pushed(inbox: Web, event: str, seconds: float = 60.0) -> list[dict[str, Any]]:
    """The messages of that kind, each with a signature that holds, once there is one."""
    end = time.monotonic() + seconds

    def found() -> list[dict[str, Any]]:
        posts: list[Request] = [r for r in list(inbox.requests) if r.method == "POST"]
        messages = [Webhook(OLD).verify(r.body, r.headers) for r in posts]
        return [message for message in messages if message["type"] == event]

    while not found() and time.monotonic() < end:
        time.sleep(0.05)
    return found()


def test_partial_verdicts_of_a_running_clip_reach_who_watches(
    eager_models: Path, clip_of_two: Path, tmp_path: Path
):
    """Pipeline, child, parent, Redis, client: the job waits until its partial verdict was seen."""
    settings = Settings(
        models_dir=str(eager_models),
        model="eager",
        threads=1,
        chunk_bytes=2 * 640 * 360 * 3,
        file_roots=(str(clip_of_two.parent),),
        heartbeat_s=0.05,
        hang_s=300.0,
    )
    seen, media = tmp_path / "seen", Media(uri=clip_of_two.as_uri())
    job = a_job("partials", media=media, tag=f"hold:{seen}")
    statuses: list[Status] = []
    with embedded(settings, bodies="test", deliver=False) as service:
        client = connect(service.redis_url, settings=service.settings)
        client.store.submit([job], function=bodies.PREFIX + "hold_analysis")
        for status in client.watch(job.job_id, timeout=240):
            statuses.append(status)
            if status.partial is not None:
                seen.touch()
        verdict = client.result(job.job_id)
        client.close()

    partials = [status.partial for status in statuses if status.partial is not None]
    progress = [status.progress for status in statuses if status.state == "running"]
    steps = [step for step in progress if step is not None]
    assert partials
    assert all(p.partial and p.job_id == verdict.job_id for p in partials)
    assert 0 < partials[0].made.frames_asked < verdict.made.frames_asked == 20
    assert [step.percent for step in steps] == sorted(step.percent for step in steps)
    assert any(0 < step.percent < 100 and step.score is not None for step in steps)
    assert not verdict.partial
    assert verdict.label == "likely_forged"


def test_a_job_that_may_stop_early_does_and_says_so(served: Serving, monkeypatch, capsys):
    """From the command line to the verdict."""
    monkeypatch.setenv("RALF_REDIS_URL", served.url)
    words = ["submit", str(served.clip), "--token", "early", "--stop-early", "0.01"]
    code = main([*words, "--wait", "120"])
    verdict = Verdict.model_validate_json(capsys.readouterr().out)

    assert code == 0
    assert verdict.partial
    assert 8 <= verdict.made.frames_asked < 20
    assert any(warning.startswith("stopped_early") for warning in verdict.warnings)


def test_a_stream_that_crosses_the_threshold_is_pushed_at_once(served: Serving):
    """Before its last segment, signed, and once."""
    client = served.client
    callback = Callback(url=f"{served.inbox.url}/ralf", events=("session.alert",))
    for number in range(2):
        client.submit(
            served.clip.as_uri(),
            token=f"segment-{number}",
            callback=callback,
            session=SessionPart(
                session_id="live", number=number, offset_ms=2000 * number, last=number == 1
            ),
        )
    *_, rolling = client.watch_session("live", timeout=120)
    alerts = pushed(served.inbox, "session.alert")
    client.close()

    assert (rolling.label, rolling.segments, rolling.complete) == ("likely_forged", 2, True)
    assert [alert["data"]["session_id"] for alert in alerts] == ["live"]
    assert alerts[0]["data"]["segments"] == 1
    assert alerts[0]["data"]["complete"] is False


def test_no_log_shows_a_signed_url_or_a_secret(served: Serving):
    """Not even where the fetch fails, or the push."""
    client = served.client
    made = client.submit(
        f"{served.inbox.url}/clip.mp4?X-Amz-Signature=hunter2",
        token="signed",
        callback=f"{served.inbox.url}/hook-hunter2",
    )
    (*_, status) = client.watch(made.job_id, timeout=120)
    assert pushed(served.inbox, "verdict.failed")
    client.close()
    log = served.log.read_text()

    assert status.failure is not None
    assert status.failure.code == "fetch_denied"
    assert '"event": "webhook.delivered"' in log
    assert made.job_id in log
    assert "hunter2" not in log + status.failure.message
    assert OLD.removeprefix("whsec_") not in log


def test_serving_ends_cleanly_on_sigterm(served: Serving):
    """The last of this file's: nothing stays behind."""
    served.process.send_signal(signal.SIGTERM)

    assert ended(served.process) == 0
    assert not Path(served.url.removeprefix("unix://")).exists()


def test_the_address_line_is_one_write(monkeypatch: pytest.MonkeyPatch):
    """Its workers write to the same stderr, and a line of theirs once stood inside it."""
    written: list[str] = []

    class Stderr:
        write = written.append

        def flush(self) -> None:
            """Nothing is kept back."""

    monkeypatch.setattr(sys, "stderr", Stderr())
    commands.say("serving; RALF_REDIS_URL=unix:///a")

    assert ["ralf: serving; RALF_REDIS_URL=unix:///a\n"] == written
