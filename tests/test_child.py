"""The warm child, as a real process at the other end of a real socket."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ralf.worker import settings as settings_module
from ralf.worker import telemetry
from ralf.worker.chaos import bodies
from ralf.worker.contract import Evidence, Job, Media, Progress, Verdict, dump
from ralf.worker.errors import (
    Cancelled,
    DecoderCrashed,
    GpuFatal,
    GpuOom,
    ModelUnavailable,
    TooLong,
)
from ralf.worker.service import child as child_module
from ralf.worker.service import jobs, messages, sandbox
from ralf.worker.service.child import ChildJob, ParentConnection
from ralf.worker.service.child_process import ChildProcess
from ralf.worker.service.child_supervisor import ChildSupervisor
from ralf.worker.settings import Settings
from tests import waiting
from tests.documents import a_verdict
from tests.waiting import LONG_S, PATIENCE_S

SETTINGS = Settings(child_max_jobs=3)
FOR_EVER = f"sleep:{LONG_S:g}"
"""The tag of a job that is cancelled, never waited for."""


def document(job_id: str, tag: str | None = None) -> str:
    """A job as JSON."""
    media = Media(uri="file:///nowhere.mp4")
    return dump(Job(job_id=job_id, token="t", media=media, tag=tag, submitted_at=datetime.now(UTC)))


def ask(job_id: str, body: str, *, tag: str | None = None, **more: Any) -> messages.Run:
    """A Run of a test body."""
    return messages.Run(
        job_id=job_id, function=bodies.PREFIX + body, path="", job=document(job_id, tag), **more
    )


@contextmanager
def child(settings: Settings = SETTINGS, **more: Any) -> Iterator[ChildProcess]:
    """A child with the test bodies, ready."""
    link = ChildProcess(settings, bodies="test", **more)
    try:
        link.open()
        until(link, lambda said: link.ready is not None)
        yield link
    finally:
        link.close()


def until(
    link: ChildProcess, enough: Callable[[list[messages.Message]], bool]
) -> list[messages.Message]:
    """Everything the child says until it is enough, or until it has gone."""
    said: list[messages.Message] = []
    end = time.monotonic() + PATIENCE_S
    while not enough(said):
        heard = link.wait(end - time.monotonic())
        if heard is None:
            return said
        said += heard
        assert time.monotonic() < end, f"the child said only {said}"
    return said


def answer(link: ChildProcess, run: messages.Run) -> messages.Done | messages.Failed:
    """Run one job to its answer."""
    link.send(run)
    last = until(link, answered)[-1]
    assert isinstance(last, messages.Done | messages.Failed)
    return last


def joined(link: ChildProcess) -> list[messages.Message]:
    """Wait until the child has obeyed all that this link said so far; what it said meanwhile."""
    link.send(messages.Hello())
    return until(link, lambda said: "Ready" in kinds(said))


def alive(pid: int) -> bool:
    """Whether the process runs; one that nobody has waited for yet does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def answered(said: list[messages.Message]) -> bool:
    """Whether the job has its answer."""
    return bool(said) and isinstance(said[-1], messages.Done | messages.Failed)


def kinds(said: list[messages.Message]) -> list[str]:
    """The names of what was said."""
    return [type(message).__name__ for message in said]


@pytest.fixture(scope="module")
def shared_link() -> Iterator[ChildProcess]:
    """One child for the tests that leave it well."""
    with child(replace(SETTINGS, child_max_jobs=10_000)) as link:
        yield link


def test_one_child_runs_a_thousand_jobs(shared_link: ChildProcess):
    """Warm means that the second job starts where the first one ended."""
    pid = shared_link.pid
    for number in range(1000):
        done = answer(shared_link, ask(f"j{number}", "trivial"))
        assert isinstance(done, messages.Done)

    assert (pid, f"j{number}") == (shared_link.pid, done.job_id)
    assert Verdict.model_validate_json(done.verdict).job_id == "j999"
    assert Evidence() == Evidence.model_validate_json(done.evidence)


def test_progress_is_told_while_the_job_runs(shared_link: ChildProcess):
    """The parent hears the percentage and the clip's length before the end."""
    shared_link.send(ask("slow", "sleep", tag=FOR_EVER))
    said = until(shared_link, lambda said: kinds(said).count("Advanced") >= 3)
    shared_link.send(messages.Cancel(job_id="slow"))
    until(shared_link, answered)
    advanced = [message for message in said if isinstance(message, messages.Advanced)]
    percents = [Progress.model_validate_json(message.progress).percent for message in advanced]

    assert kinds(said)[:2] == ["Started", "Advanced"]
    assert 0 <= percents[0] < percents[-1] < 100
    assert {LONG_S} == {message.seconds for message in advanced}


def test_a_partial_verdict_comes_with_the_first_chunk_and_then_now_and_then(
    monkeypatch: pytest.MonkeyPatch,
):
    """Not with the last chunk: the verdict itself is next."""
    monkeypatch.setattr(child_module, "PARTIAL_EVERY_S", LONG_S)
    ours, theirs = socket.socketpair()
    job = ChildJob(
        ParentConnection(theirs), messages.Run(job_id="j1", function="f", path="", job="")
    )
    asked = []

    def partial() -> Verdict:
        asked.append(1)
        return a_verdict(partial=True)

    def told(percent: float) -> messages.Message:
        job.report(Progress(stage="analyze", percent=percent), 9.0, partial)
        (message,) = messages.receive(ours, messages.Inbox()) or ()
        return message

    with ours, theirs:
        first, second = told(10), told(20)
        job.partial_at -= LONG_S
        third = told(30)
        job.partial_at -= LONG_S
        last = told(100)

    assert [bool(message.partial) for message in (first, second, third, last)] == [
        True,
        False,
        True,
        False,
    ]
    assert len(asked) == 2
    assert Verdict.model_validate_json(first.partial).partial


def test_a_cancelled_job_stops_at_its_next_progress(shared_link: ChildProcess):
    """Long before its own end, with the child alive."""
    shared_link.send(ask("long", "sleep", tag=FOR_EVER))
    until(shared_link, lambda said: "Started" in kinds(said))
    shared_link.send(messages.Cancel(job_id="long"))
    said = until(shared_link, answered)

    assert isinstance(said[-1], messages.Failed)
    assert said[-1].code == "cancelled"
    assert isinstance(answer(shared_link, ask("next", "trivial")), messages.Done)


def test_a_greeting_is_answered_during_a_job(shared_link: ChildProcess):
    """The talking thread is not the working one."""
    shared_link.send(ask("busy", "sleep", tag=FOR_EVER))
    until(shared_link, lambda said: "Started" in kinds(said))
    joined(shared_link)
    shared_link.send(messages.Cancel(job_id="busy"))

    assert isinstance(until(shared_link, answered)[-1], messages.Failed)


def test_an_unknown_function_is_refused_by_the_child_too(shared_link: ChildProcess):
    """The list is checked on both sides of the socket."""
    failed = answer(shared_link, ask("j", "trivial").model_copy(update={"function": "os.system"}))

    assert isinstance(failed, messages.Failed)
    assert failed.code == "bad_request" and "os.system" in failed.message


def test_a_crash_is_the_end_of_the_child_and_not_of_the_parent():
    """abort() leaves an end of file, the signal's name, and a stack for whoever looks into it."""
    with child() as link:
        link.send(ask("j", "crash"))
        said = until(link, answered)

        assert kinds(said) == ["Started"]
        assert link.detach() == "died of SIGABRT"
        assert "crash" in link.last_output()

        link.open()
        until(link, lambda said: link.ready is not None)
        assert isinstance(answer(link, ask("j2", "trivial")), messages.Done)


def test_a_hung_child_dies_by_kill():
    """It hears nothing; SIGKILL needs no hearing."""
    with child() as link:
        link.send(ask("j", "hang"))
        until(link, lambda said: "Started" in kinds(said))
        link.send(messages.Cancel(job_id="j"))
        assert link.wait(0.3) == []
        link.kill()

        assert until(link, answered) == []
        assert link.detach() == "died of SIGKILL"


def test_a_lost_device_ends_the_child_after_it_said_so():
    """A poisoned CUDA context cannot be repaired, only left."""
    with child() as link:
        failed = answer(link, ask("j", "poison"))

        assert isinstance(failed, messages.Failed)
        assert (failed.code, failed.fatal) == ("gpu_fatal", True)
        assert until(link, lambda said: False) == []
        assert link.detach() == "exited with 70"


def test_a_child_is_worn_after_so_many_jobs_or_so_much_memory():
    """The parent replaces it between two jobs."""
    with child() as link:
        for number in range(3):
            assert link.recycle_reason() == ""
            answer(link, ask(f"j{number}", "trivial"))

        assert link.recycle_reason() == "jobs"
        link.retire()
        link.open()
        until(link, lambda said: link.ready is not None)
        answer(link, ask("k", "trivial"))
        answer(link, ask("leak", "leak", tag="leak:64"))
        assert link.recycle_reason() == "rss"


def test_the_child_has_no_credentials(monkeypatch: pytest.MonkeyPatch):
    """Its environment holds listed names only, whatever the parent's holds."""
    secrets = {
        "AWS_SECRET_ACCESS_KEY": "s3cret",
        "GOOGLE_APPLICATION_CREDENTIALS": "/key.json",
        "RALF_REDIS_URL": "redis://:s3cret@host/0",
        "RALF_WEBHOOK_SECRETS": "default=whsec_s3cret",
        "KUBECONFIG": "/kube",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    settings = replace(
        SETTINGS,
        redis_url="redis://:s3cret@host/0",
        webhook_secrets=("a=s3cret",),
        plan_signing_key="s3cret",
        plan_public_key="the public half",
    )
    with child(settings) as link:
        raw = Path(f"/proc/{link.pid}/environ").read_bytes()

    assert b"s3cret" not in raw
    assert set() == {part.split("=")[0] for part in raw.decode().split("\0")} & set(secrets)
    assert b"RALF_MAX_BYTES" in raw
    assert b"RALF_PLAN_PUBLIC_KEY=the public half" in raw


def test_the_child_keeps_the_sandbox_promises():
    """No core files, few descriptors, bounded files; a network of its own where allowed."""
    with child() as link:
        limits = Path(f"/proc/{link.pid}/limits").read_text()
        mine, its = (Path(f"/proc/{who}/ns/net").readlink() for who in ("self", link.pid))
        if mine == its:  # what it said is read by a thread
            waiting.until(lambda: "network namespace" in link.last_output(), link.last_output)

    found = {line[:26].strip(): line[26:].split()[:2] for line in limits.splitlines()}
    assert found["Max core file size"] == ["0", "0"]
    assert [str(sandbox.FILE_BYTES)] * 2 == found["Max file size"]
    assert int(found["Max open files"][0]) <= sandbox.DESCRIPTORS


def test_the_child_has_no_capability_and_gains_none():
    """Not as root either, and not by a program that would have them."""
    with child() as link:
        lines = Path(f"/proc/{link.pid}/status").read_text().splitlines()

    status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    sets = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
    assert {"0" * 16} == {status[name] for name in sets}
    assert "1" == status["NoNewPrivs"]


@pytest.mark.parametrize("hidden", [False, True])
def test_a_process_that_refuses_inspection_shows_no_secret_to_its_own_user(hidden: bool):
    """Its environment, as the child of the same user would read it from /proc."""
    # Root would be shown everything, so both become another user; that alone makes a process
    # closed, and the first one opens itself again.
    other = "os.getuid() or os.setuid(65534)\n"
    code = (
        "import ctypes, os, sys; from ralf.worker.service.sandbox import refuse_inspection\n"
        f"{other}ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)\n"
        f"{'refuse_inspection()' if hidden else ''}\n"
        "print('ready', flush=True); sys.stdin.read()"
    )
    read = f"import os, sys\n{other}print(open(f'/proc/{{sys.argv[1]}}/environ').read())"
    with subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "SECRET": "s3cret"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == b"ready\n"
        told = subprocess.run(
            [sys.executable, "-c", read, str(process.pid)], capture_output=True, text=True
        )
        process.stdin.close()

    assert ("s3cret" in told.stdout) is not hidden
    assert ("Permission denied" in told.stderr) is hidden


def test_the_socket_is_private():
    """Nobody else on the machine may speak to the child."""
    with child() as link:
        folder, path = link.folder, link.folder / "socket"

        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not folder.exists()


def test_the_child_ignores_sigterm(tmp_path: Path):
    """A drain is the parent's decision; the job in the child ends as it would have."""
    release = tmp_path / "release"
    with child() as link:
        link.send(ask("j", "hold", tag=f"hold:{release}"))
        until(link, lambda said: "Advanced" in kinds(said))
        os.kill(link.pid, signal.SIGTERM)
        os.kill(link.pid, signal.SIGINT)
        until(link, lambda said: kinds(said).count("Advanced") >= 2)  # it lives and works on
        release.touch()

        assert isinstance(until(link, answered)[-1], messages.Done)


def test_the_child_dies_with_its_parent():
    """`kill -9` on the parent leaves nobody behind, not even a child in native code."""
    code = """
import sys, time
sys.path.insert(0, sys.argv[1])
from tests.test_child import *
link = ChildProcess(SETTINGS, bodies="test")
link.open()
until(link, lambda said: link.ready is not None)
link.send(ask("j", "hang"))
until(link, lambda said: "Started" in kinds(said))
print(link.pid, file=sys.stderr, flush=True)
time.sleep(600)
"""
    root = str(Path(__file__).resolve().parent.parent)
    with subprocess.Popen(
        [sys.executable, "-c", code, root],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=root,
    ) as parent:
        assert parent.stderr is not None
        pid = int(parent.stderr.readline())
        parent.kill()
    waiting.until(lambda: not alive(pid))


def test_parents_share_a_child_fairly_one_job_at_a_time(tmp_path: Path):
    """First come, first served; each hears of its own job only."""
    with child(shared=tmp_path / "gpu0") as first:
        others = [ChildProcess(SETTINGS, bodies="test", shared=tmp_path / "gpu0") for _ in range(2)]
        links = [first, *others]
        try:
            for link in others:
                link.open()
                until(link, lambda said, link=link: link.ready is not None)
            assert {first.pid} == {link.pid for link in links}
            heard: list[list[messages.Message]] = []
            for number, link in enumerate(links):
                link.send(ask(f"j{number}", "sleep", tag=FOR_EVER))
                heard.append(joined(link))
            until(first, lambda said: "Started" in kinds(heard[0] + said))
            for number, (link, following) in enumerate(pairwise(links)):
                assert following.wait(0) == []  # its turn has not come
                link.send(messages.Cancel(job_id=f"j{number}"))
                assert until(link, answered)[-1].job_id == f"j{number}"  # type: ignore[union-attr]
                assert until(following, lambda said: "Advanced" in kinds(said))[0] == (
                    messages.Started(job_id=f"j{number + 1}")
                )
            assert [kinds(messages) for messages in heard[1:]] == [["Ready"], ["Ready"]]
        finally:
            os.kill(first.pid, signal.SIGKILL)
            for link in others:
                link.close()


def test_a_shared_child_is_replaced_after_so_many_jobs_of_all_its_parents(tmp_path: Path):
    """A parent's own jobs say little: with four parents the child does four times as many."""
    settings = replace(SETTINGS, child_max_jobs=1, shared_child_max_jobs=4)
    with child(settings, shared=tmp_path / "gpu0") as first:
        second = ChildProcess(settings, bodies="test", shared=tmp_path / "gpu0")
        second.open()
        try:
            reasons = []
            for number in range(2):
                for link in (first, second):
                    answer(link, ask(f"j{number}", "trivial"))
                    reasons.append(link.recycle_reason())

            assert ["", "", "", "jobs"] == reasons
            assert (2, 2, 3, 4) == (
                first.jobs_done,
                second.jobs_done,
                first.served,
                second.served,
            )
        finally:
            os.kill(first.pid, signal.SIGKILL)
            second.close()


class SlowChild:
    """A child whose model takes so long to compile."""

    def __init__(self, settings: Settings, load_s: float) -> None:
        self.settings, self.load_s = settings, load_s
        self.ready: messages.Ready | None = None
        self.load_error, self.pid, self.alive = "", 1, True
        self.ended: list[str] = []

    def open(self) -> None:
        self.end = time.monotonic() + self.load_s

    def wait(self, seconds: float) -> list[messages.Message]:
        time.sleep(max(0.0, min(seconds, 0.05)))
        if time.monotonic() > self.end:
            self.ready = messages.Ready(facts=messages.EngineFacts(engine="torch"))
        return []

    def rss(self) -> int:
        return 1

    def kill(self) -> None:
        self.ended.append("killed")

    def detach(self) -> str:
        return "killed"


@pytest.mark.parametrize(
    ("device", "there", "comes_up"),
    [("cuda", False, True), ("auto", True, True), ("auto", False, False), ("cpu", True, False)],
)
def test_a_child_that_compiles_for_a_gpu_gets_the_time_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, there: bool, comes_up: bool
):
    """Minutes with torch.compile, where a CPU's child would be taken for stuck."""
    gpu = tmp_path / "nvidiactl"
    if there:
        gpu.touch()
    monkeypatch.setattr(settings_module, "GPU", gpu)
    settings = replace(
        SETTINGS, device=device, child_start_timeout_s=0.2, child_start_gpu_timeout_s=PATIENCE_S
    )
    slow: Any = SlowChild(settings, load_s=0.6)
    wakeup: Any = SimpleNamespace(stopping=False, pulse=0.0)
    supervisor = ChildSupervisor(slow, wakeup, telemetry.Metrics())
    if comes_up:
        supervisor.start()
        assert slow.ready is not None and not slow.ended
        return
    with pytest.raises(ModelUnavailable, match=r"not ready after 0\.2 s"):
        supervisor.start()
    assert ["killed"] == slow.ended


@pytest.mark.parametrize(
    ("engine", "device", "slow"),
    [
        ("torch-eager", "cuda:0", True),
        ("torch", "cuda:0", False),
        ("trt", "cuda:0", False),
        ("torch", "cpu", False),
    ],
)
def test_a_gpu_without_plan_and_compiler_is_called_slow(engine: str, device: str, slow: bool):
    """/readyz repeats it, since everything works and only the speed is missing."""
    link = ChildProcess(SETTINGS, bodies="test")
    try:
        assert not link.remarks().startswith("SLOW")
        link.ready = messages.Ready(facts=messages.EngineFacts(engine=engine, device=device))
        assert link.remarks().startswith("SLOW: ") is slow
        assert "its child is confined by" in link.remarks()
    finally:
        link.close()


def test_a_job_is_told_of_its_company_and_a_blamed_one_runs_alone(tmp_path: Path):
    """With two at a time a crash has two suspects, unless one of them had to be alone."""
    shared = tmp_path / "gpu0"
    with child(shared=shared, capacity=2) as first:
        second = ChildProcess(SETTINGS, bodies="test", shared=shared)
        second.open()
        try:
            first.send(ask("a", "sleep", tag=FOR_EVER))
            until(first, lambda said: "Started" in kinds(said))
            second.send(ask("b", "trivial"))
            said = until(second, answered)
            assert messages.OtherJobs(count=1) in said
            second.send(ask("c", "trivial", alone=True))
            assert kinds(joined(second)) == ["Ready"]  # it waits until nobody else runs
            first.send(messages.Cancel(job_id="a"))
            assert isinstance(until(second, answered)[-1], messages.Done)

            said = until(first, answered)
            assert [m.count for m in said if isinstance(m, messages.OtherJobs)] == [1, 0]
            assert kinds(said)[-1] == "Failed"
        finally:
            os.kill(first.pid, signal.SIGKILL)
            second.close()


def test_a_model_that_is_not_there_is_said_once_and_ends_the_child(tmp_path: Path):
    """The parent gets the reason, not a dead socket."""
    link = ChildProcess(replace(SETTINGS, models_dir=str(tmp_path), model="absent"))
    try:
        link.open()
        until(link, lambda said: bool(link.load_error))

        assert "absent" in link.load_error
        assert until(link, lambda said: False) == []
        assert link.detach() == "exited with 5"
    finally:
        link.close()


@given(
    st.builds(
        messages.Run,
        job_id=st.text(),
        function=st.text(),
        path=st.text(),
        job=st.text(),
        attempt=st.integers(),
        alone=st.booleans(),
    ),
    st.integers(1, 40),
)
def test_messages_come_out_as_they_went_in_however_the_bytes_are_cut(run: messages.Run, size: int):
    """A stream socket keeps no borders."""
    frames = messages.encode(run) + messages.encode(messages.Cancel(job_id="j"))
    inbox = messages.Inbox()
    parts = [frames[at : at + size] for at in range(0, len(frames), size)]

    assert [run, messages.Cancel(job_id="j")] == [m for part in parts for m in inbox.feed(part)]


@pytest.mark.parametrize(
    "body",
    [
        b"not json",
        b"[]",
        b'{"type":"eval"}',
        b'{"type":"cancel"}',
        b'{"type":"cancel","job_id":1}',
        b'{"type":"other_jobs","count":"1"}',
        b'{"type":"other_jobs","count":true}',
        b'{"type":"other_jobs","count":1,"more":2}',
        b"[" * 200_000,
        b'{"type":"ready","facts":' + b'{"references":' * 100_000,
        json.dumps({"type": "done", "job_id": "j", "verdict": {}, "evidence": ""}).encode(),
    ],
)
def test_what_is_not_in_the_protocol_is_refused(body: bytes):
    """A child that hostile media has taken over can say only these words."""
    with pytest.raises(messages.ProtocolError):
        messages.decode(body)


def test_a_frame_that_would_fill_the_memory_is_refused_by_its_length():
    """Before a byte of it is kept."""
    with pytest.raises(messages.ProtocolError, match="at most"):
        list(messages.Inbox().feed(b"\xff\xff\xff\xff"))


class AcceleratorError(RuntimeError):
    """Named like torch's."""


class OutOfMemoryError(RuntimeError):
    """Named like torch's."""


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (TooLong("x"), TooLong),
        (Cancelled(), Cancelled),
        (OutOfMemoryError("CUDA out of memory"), GpuOom),
        (AcceleratorError("CUDA error: an illegal memory access"), GpuFatal),
        (RuntimeError("CUDA error: device-side assert triggered"), GpuFatal),
        (ValueError("surprise"), DecoderCrashed),
    ],
)
def test_every_error_of_a_body_has_a_name(error: Exception, kind: type[Exception]):
    """What a library raises is translated once, at the border."""
    assert kind is type(jobs.as_job_error(error))


def test_out_of_device_memory_is_tried_once_more_with_half_the_batch(
    monkeypatch: pytest.MonkeyPatch,
):
    """Inside the child, before the queue hears of it."""
    sizes: list[int] = []

    def walk(task: jobs.Task, parts: Any) -> Any:
        sizes.append(parts.decoder.chunk_bytes)
        if parts.decoder.chunk_bytes > 64:
            raise OutOfMemoryError("CUDA out of memory")
        return "verdict"

    monkeypatch.setattr(jobs, "_analyze", walk)
    monkeypatch.setattr(jobs, "halved", lambda parts: parts_of(parts.decoder.chunk_bytes // 2))
    task: Any = None
    assert jobs.moderate(task, parts_of(100)) == "verdict"  # type: ignore[comparison-overlap]
    assert sizes == [100, 50]
    with pytest.raises(OutOfMemoryError):
        jobs.moderate(task, parts_of(1000))


def parts_of(chunk_bytes: int) -> Any:
    """Parts as far as the retry sees them."""
    return SimpleNamespace(decoder=SimpleNamespace(chunk_bytes=chunk_bytes))


def test_a_relative_models_folder_is_still_found_by_the_child(monkeypatch: pytest.MonkeyPatch):
    """It runs in another working directory."""
    environment = sandbox.environment(Settings(models_dir="models", model="./mine"), {})

    assert environment["RALF_MODELS_DIR"] == str(Path("models").absolute())
    assert environment["RALF_MODEL"] == str(Path("mine").absolute())
    assert sandbox.environment(Settings(), {})["RALF_MODELS_DIR"] == ""
