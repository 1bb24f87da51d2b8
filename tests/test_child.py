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

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ralf.worker.chaos import bodies
from ralf.worker.contract import Evidence, Job, Media, Progress, Verdict, dump
from ralf.worker.errors import (
    BadRequest,
    Cancelled,
    DecoderCrashed,
    GpuFatal,
    GpuOom,
    ModelUnavailable,
    TooLong,
)
from ralf.worker.service import jobs, limits, messages, models, sandbox, slot, turnstile
from ralf.worker.service.child_process import Link
from ralf.worker.service.procfs import rss
from ralf.worker.service.turnstile import Peer, Visit
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
def child(settings: Settings = SETTINGS, **more: Any) -> Iterator[Link]:
    """A child with the test bodies, ready."""
    link = Link(settings, bodies="test", **more)
    try:
        link.open()
        until(link, lambda said: link.ready is not None)
        yield link
    finally:
        link.close()


def until(link: Link, enough: Callable[[list[messages.Message]], bool]) -> list[messages.Message]:
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


def answer(link: Link, run: messages.Run) -> messages.Done | messages.Failed:
    """Run one job to its answer."""
    link.say(run)
    last = until(link, answered)[-1]
    assert isinstance(last, messages.Done | messages.Failed)
    return last


def joined(link: Link) -> list[messages.Message]:
    """Wait until the child has obeyed all that this link said so far; what it said meanwhile."""
    link.say(messages.Ping(99))
    return until(link, lambda said: messages.Pong(99) in said)


def answered(said: list[messages.Message]) -> bool:
    """Whether the job has its answer."""
    return bool(said) and isinstance(said[-1], messages.Done | messages.Failed)


def kinds(said: list[messages.Message]) -> list[str]:
    """The names of what was said."""
    return [type(message).__name__ for message in said]


@pytest.fixture(scope="module")
def shared_link() -> Iterator[Link]:
    """One child for the tests that leave it well."""
    with child(replace(SETTINGS, child_max_jobs=10_000)) as link:
        yield link


def test_one_child_runs_a_thousand_jobs(shared_link: Link):
    """Warm means that the second job starts where the first one ended."""
    pid = shared_link.pid
    for number in range(1000):
        done = answer(shared_link, ask(f"j{number}", "trivial"))
        assert isinstance(done, messages.Done)

    assert (pid, f"j{number}") == (shared_link.pid, done.job_id)
    assert Verdict.model_validate_json(done.verdict).job_id == "j999"
    assert Evidence() == Evidence.model_validate_json(done.evidence)


def test_progress_is_told_while_the_job_runs(shared_link: Link):
    """The parent hears the percentage and the clip's length before the end."""
    shared_link.say(ask("slow", "sleep", tag=FOR_EVER))
    said = until(shared_link, lambda said: kinds(said).count("Advanced") >= 3)
    shared_link.say(messages.Cancel("slow"))
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
    monkeypatch.setattr(turnstile, "PARTIAL_EVERY_S", LONG_S)
    ours, theirs = socket.socketpair()
    visit = Visit(Peer(theirs), messages.Run("j1", "f", "", ""))
    asked = []

    def partial() -> Verdict:
        asked.append(1)
        return a_verdict(partial=True)

    def told(percent: float) -> messages.Message:
        visit.told = 0.0
        visit.report(Progress(stage="analyze", percent=percent), 9.0, partial)
        (message,) = messages.receive(ours, messages.Inbox()) or ()
        return message

    with ours, theirs:
        first, second = told(10), told(20)
        visit.judged -= LONG_S
        third = told(30)
        visit.judged -= LONG_S
        last = told(100)

    assert [bool(message.partial) for message in (first, second, third, last)] == [
        True,
        False,
        True,
        False,
    ]
    assert len(asked) == 2
    assert Verdict.model_validate_json(first.partial).partial


def test_a_cancelled_job_stops_at_its_next_progress(shared_link: Link):
    """Long before its own end, with the child alive."""
    shared_link.say(ask("long", "sleep", tag=FOR_EVER))
    until(shared_link, lambda said: "Started" in kinds(said))
    shared_link.say(messages.Cancel("long"))
    said = until(shared_link, answered)

    assert isinstance(said[-1], messages.Failed)
    assert said[-1].code == "cancelled"
    assert isinstance(answer(shared_link, ask("next", "trivial")), messages.Done)


def test_a_ping_is_answered_during_a_job(shared_link: Link):
    """The talking thread is not the working one."""
    shared_link.say(ask("busy", "sleep", tag=FOR_EVER))
    until(shared_link, lambda said: "Started" in kinds(said))
    joined(shared_link)
    shared_link.say(messages.Cancel("busy"))

    assert isinstance(until(shared_link, answered)[-1], messages.Failed)


def test_an_unknown_function_is_refused_by_the_child_too(shared_link: Link):
    """The list is checked on both sides of the socket."""
    failed = answer(shared_link, replace(ask("j", "trivial"), function="os.system"))

    assert isinstance(failed, messages.Failed)
    assert failed.code == "bad_request" and "os.system" in failed.message


def test_a_crash_is_the_end_of_the_child_and_not_of_the_parent():
    """abort() leaves an end of file, the signal's name, and a stack for whoever looks into it."""
    with child() as link:
        link.say(ask("j", "crash"))
        said = until(link, answered)

        assert kinds(said) == ["Started"]
        assert link.closed() == "died of SIGABRT"
        assert "crash" in link.last_words()

        link.open()
        until(link, lambda said: link.ready is not None)
        assert isinstance(answer(link, ask("j2", "trivial")), messages.Done)


def test_a_hung_child_dies_by_kill():
    """It hears nothing; SIGKILL needs no hearing."""
    with child() as link:
        link.say(ask("j", "hang"))
        until(link, lambda said: "Started" in kinds(said))
        link.say(messages.Cancel("j"))
        assert link.wait(0.3) == []
        link.kill()

        assert until(link, answered) == []
        assert link.closed() == "died of SIGKILL"


def test_a_lost_device_ends_the_child_after_it_said_so():
    """A poisoned CUDA context cannot be repaired, only left."""
    with child() as link:
        failed = answer(link, ask("j", "poison"))

        assert isinstance(failed, messages.Failed)
        assert (failed.code, failed.fatal) == ("gpu_fatal", True)
        assert until(link, lambda said: False) == []
        assert link.closed() == "exited with 70"


def test_a_child_is_worn_after_so_many_jobs_or_so_much_memory():
    """The parent replaces it between two jobs."""
    with child() as link:
        for number in range(3):
            assert link.worn() == ""
            answer(link, ask(f"j{number}", "trivial"))

        assert link.worn() == "jobs"
        link.retire()
        link.open()
        until(link, lambda said: link.ready is not None)
        answer(link, ask("k", "trivial"))
        answer(link, ask("leak", "leak", tag="leak:64"))
        assert link.worn() == "rss"


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
    settings = replace(SETTINGS, redis_url="redis://:s3cret@host/0", webhook_secrets=("a=s3cret",))
    with child(settings) as link:
        raw = Path(f"/proc/{link.pid}/environ").read_bytes()

    assert b"s3cret" not in raw
    assert set() == {part.split("=")[0] for part in raw.decode().split("\0")} & set(secrets)
    assert b"RALF_MAX_BYTES" in raw


def test_the_child_keeps_the_sandbox_promises():
    """No core files, few descriptors, bounded files; a network of its own where allowed."""
    with child() as link:
        limits = Path(f"/proc/{link.pid}/limits").read_text()
        mine, its = (Path(f"/proc/{who}/ns/net").readlink() for who in ("self", link.pid))
        if mine == its:  # what it said is read by a thread
            waiting.until(lambda: "network namespace" in link.last_words(), link.last_words)

    found = {line[:26].strip(): line[26:].split()[:2] for line in limits.splitlines()}
    assert found["Max core file size"] == ["0", "0"]
    assert [str(sandbox.FILE_BYTES)] * 2 == found["Max file size"]
    assert int(found["Max open files"][0]) <= sandbox.DESCRIPTORS


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
        link.say(ask("j", "hold", tag=f"hold:{release}"))
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
link = Link(SETTINGS, bodies="test")
link.open()
until(link, lambda said: link.ready is not None)
link.say(ask("j", "hang"))
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
    waiting.until(lambda: rss(pid) == 0)


def test_parents_share_a_child_fairly_one_job_at_a_time(tmp_path: Path):
    """First come, first served; each hears of its own job only."""
    with child(shared=tmp_path / "gpu0") as first:
        others = [Link(SETTINGS, bodies="test", shared=tmp_path / "gpu0") for _ in range(2)]
        links = [first, *others]
        try:
            for link in others:
                link.open()
                until(link, lambda said, link=link: link.ready is not None)
            assert {first.pid} == {link.pid for link in links}
            heard: list[list[messages.Message]] = []
            for number, link in enumerate(links):
                link.say(ask(f"j{number}", "sleep", tag=FOR_EVER))
                heard.append(joined(link))
            until(first, lambda said: "Started" in kinds(heard[0] + said))
            for number, (link, following) in enumerate(pairwise(links)):
                assert following.wait(0) == []  # its turn has not come
                link.say(messages.Cancel(f"j{number}"))
                assert until(link, answered)[-1].job_id == f"j{number}"  # type: ignore[union-attr]
                assert until(following, lambda said: kinds(said).count("Advanced") == 1)[0] == (
                    messages.Started(f"j{number + 1}")
                )
            assert [kinds(messages) for messages in heard[1:]] == [["Pong"], ["Pong"]]
        finally:
            os.kill(first.pid, signal.SIGKILL)
            for link in others:
                link.close()


def test_a_job_is_told_of_its_company_and_a_blamed_one_runs_alone(tmp_path: Path):
    """With two at a time a crash has two suspects, unless one of them had to be alone."""
    shared = tmp_path / "gpu0"
    with child(shared=shared, capacity=2) as first:
        second = Link(SETTINGS, bodies="test", shared=shared)
        second.open()
        try:
            first.say(ask("a", "sleep", tag=FOR_EVER))
            until(first, lambda said: "Started" in kinds(said))
            second.say(ask("b", "trivial"))
            said = until(second, answered)
            assert messages.Company(1) in said
            second.say(ask("c", "trivial", alone=True))
            assert kinds(joined(second)) == ["Pong"]  # it waits until nobody else runs
            first.say(messages.Cancel("a"))
            assert isinstance(until(second, answered)[-1], messages.Done)

            said = until(first, answered)
            assert [m.others for m in said if isinstance(m, messages.Company)] == [1, 0]
            assert kinds(said)[-1] == "Failed"
        finally:
            os.kill(first.pid, signal.SIGKILL)
            second.close()


def test_a_model_that_is_not_there_is_said_once_and_ends_the_child(tmp_path: Path):
    """The parent gets the reason, not a dead socket."""
    link = Link(replace(SETTINGS, models_dir=str(tmp_path), model="absent"))
    try:
        link.open()
        until(link, lambda said: bool(link.refusal))

        assert "absent" in link.refusal
        assert until(link, lambda said: False) == []
        assert link.closed() == "exited with 5"
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
    frames = messages.encode(run) + messages.encode(messages.Ping(3))
    inbox = messages.Inbox()
    parts = [frames[at : at + size] for at in range(0, len(frames), size)]

    assert [run, messages.Ping(3)] == [message for part in parts for message in inbox.feed(part)]


@pytest.mark.parametrize(
    "body",
    [
        b"not json",
        b"[]",
        b'{"type":"eval"}',
        b'{"type":"ping"}',
        b'{"type":"ping","number":"1"}',
        b'{"type":"ping","number":true}',
        b'{"type":"ping","number":1,"more":2}',
        json.dumps({"type": "done", "job_id": "j", "verdict": {}, "evidence": ""}).encode(),
    ],
)
def test_what_is_not_in_the_protocol_is_refused(body: bytes):
    """A child that hostile media has taken over can say only these words."""
    with pytest.raises(messages.WireError):
        messages.decode(body)


def test_a_frame_that_would_fill_the_memory_is_refused_by_its_length():
    """Before a byte of it is kept."""
    with pytest.raises(messages.WireError, match="at most"):
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


# which model a job is walked with


class Published:
    """A models folder as far as the shelf sees it, and what was loaded from it."""

    def __init__(self, version: str) -> None:
        self.version = version
        self.broken: set[str] = set()
        self.unreadable = False
        self.loads: list[str | None] = []

    def promoted(self, settings: Settings) -> str | None:
        """What `current` names."""
        if self.unreadable:
            raise OSError("current is a folder")
        return self.version

    def load(self, settings: Settings, model: str | None) -> Any:
        """Parts that know their own version."""
        self.loads.append(model)
        name, _, version = (model or settings.model).partition("@")
        version = version or self.version
        if version in self.broken:
            raise ModelUnavailable(f"{version} fails its golden check")
        manifest = SimpleNamespace(name=name, reference=None)
        engine = SimpleNamespace(name="torch", precision="fp32", device="cpu")
        return SimpleNamespace(
            artifact=SimpleNamespace(version=version, manifest=manifest),
            engine=engine,
            decoder=SimpleNamespace(name="pyav"),
        )


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> Published:
    """Version aaaaaaaa, looked for at each job."""
    monkeypatch.setattr(models, "LOOK_EVERY_S", 0.0)
    return Published("aaaaaaaa")


def shelved(published: Published, **settings: Any) -> models.Shelf:
    """An open shelf over it."""
    made = models.Shelf(
        replace(SETTINGS, **settings),
        load=published.load,
        promoted=published.promoted,
        aside=lambda work: work(),
    )
    made.open()
    return made


def version_of(made: models.Shelf, model: str | None = None, tenant: str = "default") -> str:
    """The version that a job is walked with."""
    asked = {"model": model, "tenant": tenant}
    parts: Any = made.of(Job.model_validate_json(document("j")).model_copy(update=asked))
    return str(parts.artifact.version)


def test_a_promotion_is_followed_between_two_jobs(published: Published):
    """Loaded beside the old one, then in its place."""
    made = shelved(published)
    assert made.follow() is None
    published.version = "bbbbbbbb"
    facts = made.follow()

    assert facts is not None
    assert facts["version"] == "bbbbbbbb"
    assert version_of(made) == "bbbbbbbb"


def test_a_promoted_model_that_does_not_load_leaves_the_old_one(
    published: Published, monkeypatch: pytest.MonkeyPatch
):
    """Told, not tried again and again, and tried again later: the reason may have passed."""
    made = shelved(published)
    published.version, published.broken = "bbbbbbbb", {"bbbbbbbb"}
    told, again = made.follow(), made.follow()
    assert told is not None
    assert [("promoted", "ralf-small@bbbbbbbb", "bbbbbbbb fails its golden check")] == [
        (each["role"], each["model"], each["why"]) for each in told["refused"]
    ]
    assert (None, "aaaaaaaa", "aaaaaaaa") == (again, told["version"], version_of(made))
    assert published.loads.count("ralf-small@bbbbbbbb") == 1
    monkeypatch.setattr(slot, "RETRY_S", 0.0)
    published.version = "cccccccc"
    published.broken = {"cccccccc"}
    assert made.follow() is not None
    published.broken = set()
    healed = made.follow()
    assert healed is not None
    assert ("cccccccc", []) == (healed["version"], healed["refused"])


def test_a_refused_version_is_forgotten_once_the_old_one_is_promoted_again(published: Published):
    """The metric goes down, and promoting the mended version is followed at once."""
    made = shelved(published)
    published.version, published.broken = "bbbbbbbb", {"bbbbbbbb"}
    made.follow()
    published.version, published.broken = "aaaaaaaa", set()
    told = made.follow()
    assert told is not None
    assert ([], "aaaaaaaa") == (told["refused"], told["version"])
    published.version = "bbbbbbbb"
    assert (made.follow() or {})["version"] == "bbbbbbbb"


def test_jobs_go_on_with_the_old_version_while_the_new_one_loads(published: Published):
    """And one that was promoted away meanwhile is not put in place."""
    late: list[Callable[[], None]] = []
    made = models.Shelf(
        SETTINGS, load=published.load, promoted=published.promoted, aside=late.append
    )
    made.open()
    published.version = "bbbbbbbb"
    assert [made.follow(), made.follow()] == [None, None]
    assert (version_of(made), len(late)) == ("aaaaaaaa", 1)
    published.version = "cccccccc"
    late.pop()()
    made.follow()
    assert version_of(made) == "aaaaaaaa"
    made.follow()
    late.pop()()
    assert (made.follow() or {})["version"] == version_of(made) == "cccccccc"


def test_a_current_file_that_does_not_read_leaves_the_old_one(published: Published):
    """It is somebody's mistake, and no reason to stop serving."""
    made = shelved(published)
    published.unreadable = True
    assert [made.follow(), version_of(made)] == [None, "aaaaaaaa"]
    published.version, published.unreadable = "bbbbbbbb", False
    assert (made.follow() or {})["version"] == "bbbbbbbb"


def test_a_canary_serves_its_tenants_until_it_is_promoted(published: Published):
    """Its verdicts say so; a pin of another version is obeyed; promoted, it is loaded once."""
    made = shelved(published, canary="bbbbbbbb:acme,other")
    assert version_of(made) == "aaaaaaaa"
    assert version_of(made, tenant="acme") == version_of(made, "ralf-small", "acme") == "bbbbbbbb"
    assert version_of(made, "ralf-small@aaaaaaaa", "acme") == "aaaaaaaa"
    told = warnings_of(made, "bbbbbbbb")
    assert [True] == ["ralf-small@bbbbbbbb is not promoted" in text for text in told]
    assert () == warnings_of(made, "aaaaaaaa")
    published.version = "bbbbbbbb"
    made.follow()
    assert (version_of(made), warnings_of(made, "bbbbbbbb")) == ("bbbbbbbb", ())
    assert published.loads == [None, "ralf-small@bbbbbbbb"]


def test_a_canary_that_does_not_load_leaves_its_tenants_to_the_promoted_one(published: Published):
    """Loudly; the worker serves."""
    published.broken = {"bbbbbbbb"}
    made = models.Shelf(
        replace(SETTINGS, canary="bbbbbbbb:acme"), load=published.load, promoted=published.promoted
    )

    assert ["canary"] == [each["role"] for each in made.open()["refused"]]
    assert version_of(made, tenant="acme") == "aaaaaaaa"


def test_a_shadow_sees_its_share_of_the_promoted_ones_jobs(published: Published):
    """Not a canary's, not a pinned job's, and none once it is promoted itself."""
    made = shelved(published, shadow="bbbbbbbb", shadow_share=1.0, canary="cccccccc:acme")
    job = Job.model_validate_json(document("j"))
    served = made.of(job)
    shadow: Any = made.shadow_of(job, served)
    assert "bbbbbbbb" == shadow.artifact.version
    canaried = job.model_copy(update={"tenant": "acme"})
    assert made.shadow_of(canaried, made.of(canaried)) is None
    assert made.shadow_of(job, None) is None
    published.version = "bbbbbbbb"
    made.follow()
    assert made.shadow_of(job, made.of(job)) is None


def warnings_of(made: models.Shelf, version: str) -> tuple[str, ...]:
    """What the shelf adds to a verdict by that version."""
    verdict = a_verdict()
    by = verdict.made.model_copy(update={"model": "ralf-small", "version": version})
    verdict = verdict.model_copy(update={"made": by, "warnings": ()})
    return made.marked(verdict, Job.model_validate_json(document("j"))).warnings


def test_a_pinned_setting_is_not_followed(published: Published):
    """Who names a version wants that version."""
    made = shelved(published, model="ralf-small@aaaaaaaa")
    published.version = "bbbbbbbb"

    assert made.follow() is None
    assert version_of(made) == "aaaaaaaa"


def test_a_job_may_pin_a_model_which_stays_loaded(published: Published):
    """The last one; the worker's own is never dropped for it."""
    made = shelved(published)
    assert [version_of(made, "ralf-small@dddddddd") for _ in range(3)] == ["dddddddd"] * 3
    assert version_of(made, "ralf-small") == version_of(made) == "aaaaaaaa"
    assert published.loads == [None, "ralf-small@dddddddd"]


def test_a_pin_that_cannot_be_loaded_is_the_jobs_fault(published: Published):
    """bad_request, never retried; not a crash of the child."""
    made = shelved(published)
    published.broken = {"dddddddd"}

    with pytest.raises(BadRequest, match="golden check"):
        version_of(made, "ralf-small@dddddddd")


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


# when a run has had enough


@given(st.floats(0, 1e6), st.floats(0, 1e6))
def test_the_time_allowed_grows_with_the_clip_within_its_bounds(one: float, other: float):
    """clamp(60 + 0.5 × seconds, 120, 1800); an unknown length gets the most."""
    settings = Settings()
    allowed = limits.time_allowed(settings, one)

    assert limits.time_allowed(settings, 0) == 1800
    assert 120 <= allowed <= 1800
    if 0 < other <= one:
        assert limits.time_allowed(settings, other) <= allowed
    if 120 <= one <= 3480:
        assert allowed == pytest.approx(60 + 0.5 * one)


@pytest.mark.parametrize(
    ("silent_s", "cpu_s", "code"),
    [
        (59, 0, None),
        (61, 0, "job_timeout"),
        (61, 30, None),
        (299, 200, None),
        (301, 250, "job_timeout"),
    ],
)
def test_silence_is_a_hang_sooner_when_nothing_is_computed(
    silent_s: float, cpu_s: float, code: str | None
):
    """A slow machine is not a hung one."""
    pace = limits.Pace(started=1000.0, progressed=1000.0, cpu=50.0)
    fault = limits.overrun(
        Settings(),
        pace,
        now=1000.0 + silent_s,
        cpu=50.0 + cpu_s,
        rss=1,
        rss_allowed=2,
        deadline=None,
    )

    assert (fault and fault.code) == code


def test_before_its_turn_a_job_has_no_time_to_lose():
    """It waits in a shared child's line; only its deadline counts there."""
    pace = limits.Pace()
    args: dict[str, Any] = {"now": 1e6, "cpu": 0.0, "rss": 3, "rss_allowed": 2}
    late = datetime(2020, 1, 1, tzinfo=UTC)

    assert limits.overrun(Settings(), pace, **args, deadline=None) is None
    fault = limits.overrun(Settings(), pace, **args, deadline=late)
    assert fault is not None
    assert fault.code == "deadline_passed"


def test_a_relative_models_folder_is_still_found_by_the_child(monkeypatch: pytest.MonkeyPatch):
    """It runs in another working directory."""
    environment = sandbox.environment(Settings(models_dir="models", model="./mine"), {})

    assert environment["RALF_MODELS_DIR"] == str(Path("models").absolute())
    assert environment["RALF_MODEL"] == str(Path("mine").absolute())
    assert sandbox.environment(Settings(), {})["RALF_MODELS_DIR"] == ""
