"""`ralf serve --http`: uploads, answers, limits and who may call, on a real Redis; the test is the
worker.  Every answer is compared with the server's own OpenAPI document."""

import contextlib
import errno
import hashlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import jsonschema
import pytest

from ralf.__main__ import main
from ralf.worker import client as queue
from ralf.worker.chaos import bodies
from ralf.worker.contract import Progress, Verdict
from ralf.worker.errors import Infrastructure
from ralf.worker.http import server
from ralf.worker.http.access import OPEN, Access, Address, Refused
from ralf.worker.http.documents import openapi
from ralf.worker.http.uploads import Uploads
from ralf.worker.service import download, embedded, processes, sandbox
from ralf.worker.service.connection import connect
from ralf.worker.service.processes import as_environment
from ralf.worker.service.store import Store
from ralf.worker.settings import Settings, SettingsError
from tests.documents import a_failure, a_job, a_verdict, an_evidence
from tests.test_store import claim
from tests.waiting import PATIENCE_S, until
from tests.web import free_port
from tests.workers import QUICK

ROOT = Path(__file__).resolve().parent.parent
CLIP = b"a clip " * 1000
TOKEN = "a-token-of-some-length"
BOUNDARY = "b0undary"


@dataclass
class Answer:
    """What came back."""

    status: int
    headers: Mapping[str, str]
    text: str

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.text)


class Caller:
    """Calls a server, and holds each answer against its OpenAPI document."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.folder = url, folder
        self.host = urlsplit(url).netloc
        self.document = openapi(token_needed=False)

    def __call__(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        line = http.client.HTTPConnection(self.host, timeout=PATIENCE_S)
        with contextlib.closing(line):
            line.request(method, path, body, dict(headers or {}))
            got = line.getresponse()
            answer = Answer(got.status, dict(got.getheaders()), got.read().decode())
        self._compare(method, path.partition("?")[0], answer)
        return answer

    def upload(self, body: bytes = CLIP, /, **fields: str) -> Answer:
        """The file in a form."""
        headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
        return self("POST", "/jobs", form(file=body, **fields), headers)

    @property
    def kept(self) -> list[Path]:
        """The uploads on disk, whole or not."""
        return sorted(p for p in self.folder.iterdir() if p.suffix != ".job" and p.name != "lock")

    def _compare(self, method: str, path: str, answer: Answer) -> None:
        """Its status is listed, and its body fits the schema."""
        route = re.sub(r"^/jobs/[^/]+", "/jobs/{job_id}", path)
        operation = self.document["paths"].get(route, {}).get(method.lower())
        if operation is None:
            return
        described = operation["responses"][str(answer.status)]
        ((kind, content),) = described["content"].items()
        assert answer.headers["Content-Type"].startswith(kind)
        if kind == "application/json":
            whole = {"components": self.document["components"], **content["schema"]}
            jsonschema.validate(answer.json, whole, jsonschema.Draft202012Validator)
        assert set(described.get("headers", ())) <= set(answer.headers)


def form(**parts: bytes | str) -> bytes:
    """A multipart body, its parts in this order."""
    text = b""
    for name, value in parts.items():
        file = '; filename="clip.mp4"' if name == "file" else ""
        head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'
        text += head.encode() + (value if isinstance(value, bytes) else value.encode()) + b"\r\n"
    return text + f"--{BOUNDARY}--\r\n".encode()


@pytest.fixture
def opened(redis_url: str, tmp_path: Path) -> Iterator[Callable[..., Caller]]:
    """Opens servers on the suite's Redis, with settings."""
    with contextlib.ExitStack() as stack:

        def open_one(**changes: Any) -> Caller:
            settings = Settings(redis_url=redis_url, **changes)
            folder = tmp_path / f"uploads-{len(list(tmp_path.iterdir()))}"
            uploads = stack.enter_context(Uploads.opened(folder))
            address = Address("127.0.0.1", 0)
            return Caller(
                stack.enter_context(server.serving(settings, uploads, address)), uploads.folder
            )

        yield open_one


@pytest.fixture
def call(opened: Callable[..., Caller]) -> Caller:
    """A server with settings as they come."""
    return opened()


class TestSubmitting:
    def test_a_file_becomes_a_job_that_names_it_on_disk(self, call: Caller, store: Store):
        """202 and Location; the worker finds the same bytes."""
        made = call.upload(token="upload-1", tag="post 1", sampling='{"max_frames": 4}')
        job = store.job(made.json["job_id"])

        assert made.status == 202
        assert (
            made.headers["Location"] == f"/jobs/{made.json['job_id']}" == made.json["links"]["self"]
        )
        assert job is not None and job.sampling is not None
        assert (job.tenant, job.token, job.tag) == ("http", "upload-1", "post 1")
        assert job.sampling.max_frames == 4
        assert Path(unquote(urlsplit(job.media.uri).path)).read_bytes() == CLIP
        assert (job.media.sha256, job.media.size_bytes) == (sha256(CLIP), len(CLIP))
        assert call.kept[0].stat().st_mode & 0o077 == 0

    def test_the_same_token_and_file_is_the_same_job(self, call: Caller):
        """However often it is sent; one file is kept."""
        first, again = (call.upload(token="t").json for _ in range(2))

        assert (first["existing"], again["existing"]) == (False, True)
        assert first["job_id"] == again["job_id"]
        assert len(call.kept) == 1

    def test_the_same_token_with_another_file_or_field_is_a_conflict(self, call: Caller):
        """The job that is there keeps its file, the other one leaves none."""
        call.upload(token="t")
        before = call.kept
        for other in (call.upload(b"another", token="t"), call.upload(token="t", tag="other")):
            assert (other.status, other.json["code"]) == (409, "token_conflict")
        assert call.kept == before

    def test_a_whole_body_and_a_url_are_taken_too(self, call: Caller, store: Store):
        """Fields stand in the query, or in the JSON; without a token the server makes one."""
        raw = call("POST", "/jobs?tag=a+b&max_tracks=2", CLIP, {"Content-Type": "video/mp4"})
        body = json.dumps({"url": "https://media.example/1.mp4?Signature=s", "tag": "u"})
        url = call("POST", "/jobs", body, {"Content-Type": "application/json"})
        jobs = [store.job(answer.json["job_id"]) for answer in (raw, url)]

        assert (raw.status, url.status) == (202, 202)
        assert jobs[0] is not None and jobs[1] is not None
        assert (jobs[0].tag, jobs[0].max_tracks) == ("a b", 2)
        assert jobs[1].media.uri == "https://media.example/1.mp4?Signature=s"
        assert len({raw.json["token"], url.json["token"]}) == 2

    def test_an_upload_is_on_disk_before_it_is_whole(self, call: Caller):
        """It is not collected in memory."""
        with sending(call, length=8 << 20) as line:
            line.sendall(bytes(6 << 20))
            until(lambda: call.kept and call.kept[0].stat().st_size > 5 << 20)
            line.sendall(bytes(2 << 20))
            assert line.recv(12) == b"HTTP/1.1 202"

    def test_an_upload_stays_when_the_queue_fails_under_it(
        self, call: Caller, monkeypatch: pytest.MonkeyPatch
    ):
        """The job may be stored: the answer has the token with which to send it again."""

        def fail(*_: object, **__: object) -> None:
            raise queue.QueueUnavailable("no answer")

        with monkeypatch.context() as patch:
            patch.setattr(queue.Client, "submit", fail)
            failed = call.upload()
        again = call.upload(token=failed.json["token"])

        assert (failed.status, again.status, len(call.kept)) == (503, 202, 1)


JSON = {"Content-Type": "application/json"}
FORM = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
VIDEO = {"Content-Type": "video/mp4"}
BAD: dict[str, tuple[str, bytes, dict[str, str], int, str]] = {
    "no bytes": ("/jobs", b"", VIDEO, 400, "no bytes"),
    "an empty file": ("/jobs", form(file=b""), FORM, 400, "no bytes"),
    "curl -d": ("/jobs", b"x", {"Content-Type": "application/x-www-form-urlencoded"}, 415, "-F"),
    "a file URL": ("/jobs", b'{"url": "file:///etc/passwd"}', JSON, 400, "url"),
    "no URL": ("/jobs", b'{"token": "t"}', JSON, 400, "url"),
    "broken JSON": ("/jobs", b"{", JSON, 400, "Invalid JSON"),
    "long JSON": ("/jobs", b" " * 70_000, JSON, 413, "65536"),
    "an unknown field": ("/jobs", form(file=CLIP, tenant="acme"), FORM, 400, "tenant"),
    "an unknown query": ("/jobs?tenant=acme", CLIP, VIDEO, 400, "tenant"),
    "a URL and a file": ("/jobs", form(file=CLIP, url="https://a.example/"), FORM, 400, "url"),
    "a form without file": ("/jobs", form(token="t"), FORM, 400, "file"),
    "two files": ("/jobs", form(file=CLIP)[:-14] + form(file=CLIP), FORM, 400, "twice"),
    "a form that is none": ("/jobs", b"nothing", FORM, 400, "form"),
    "a form cut off": ("/jobs", form(file=CLIP)[:-200], FORM, 400, "form"),
    "a long field": ("/jobs", form(file=CLIP, tag="x" * 70_000), FORM, 413, "65536"),
    "many parts": ("/jobs", form(**{f"f{n}": "x" for n in range(40)}), FORM, 400, "parts"),
    "no JSON in a field": ("/jobs", form(file=CLIP, sampling="{"), FORM, 400, "sampling"),
    "deep JSON in a field": ("/jobs", form(file=CLIP, sampling="[" * 60_000), FORM, 400, "JSON"),
    "deep JSON": ("/jobs", b'{"sampling": ' + b"[" * 60_000, JSON, 400, "recursion"),
    "half a character": ("/jobs", b'{"tag": "\\ud800"}', JSON, 400, "Invalid JSON"),
    "an image": ("/jobs", b"x", {"Content-Type": "image/png"}, 415, "video"),
    "a backfill": ("/jobs?priority=backfill", CLIP, VIDEO, 400, "priority"),
    "another hash": ("/jobs", form(file=CLIP, sha256="0" * 64), FORM, 422, "SHA-256"),
    "another hash of a body": (f"/jobs?sha256={'0' * 64}", CLIP, VIDEO, 422, "SHA-256"),
    "too large": ("/jobs", bytes(200_000), VIDEO, 413, "100000"),
    "too large in a form": ("/jobs", form(file=bytes(200_000)), FORM, 413, "100000"),
}


class TestRefusing:
    @pytest.mark.parametrize("name", BAD)
    def test_a_bad_request_has_a_named_answer_and_leaves_no_file(
        self, name: str, opened: Callable[..., Caller], store: Store
    ):
        """Nor a job."""
        call = opened(max_bytes=100_000)
        path, body, headers, status, words = BAD[name]
        answer = call("POST", path, body, headers)

        assert (answer.status, words in answer.json["message"]) == (status, True), answer.text
        assert call.kept == []
        assert sum(store.counts().waiting.values()) == 0

    def test_an_upload_of_no_stated_length_is_cut_at_the_cap(self, opened: Callable[..., Caller]):
        """Chunked: the cap holds while it comes, before it is written."""
        call = opened(max_bytes=100_000)
        answer = call("POST", "/jobs", iter([bytes(60_000)] * 3), VIDEO)

        assert (answer.status, call.kept) == (413, [])

    def test_an_upload_that_breaks_off_leaves_nothing(self, call: Caller, store: Store):
        """The caller hangs up in the middle."""
        with sending(call, length=10_000_000) as line:
            line.sendall(bytes(1_000_000))
            until(lambda: call.kept)
        until(lambda: not call.kept)

        assert sum(store.counts().waiting.values()) == 0

    def test_an_upload_of_which_nothing_comes_is_broken_off(
        self, call: Caller, monkeypatch: pytest.MonkeyPatch
    ):
        """A caller that sends nothing must not hold a place for ever."""
        monkeypatch.setattr(server, "SILENT_S", 0.2)
        with sending(call, length=10_000_000) as line:
            assert line.recv(12) == b"HTTP/1.1 408"
        until(lambda: not call.kept)

    def test_an_upload_that_comes_too_slowly_is_broken_off(
        self, call: Caller, monkeypatch: pytest.MonkeyPatch
    ):
        """The worker's own least rate, 32,768 bytes a second, holds here too."""
        monkeypatch.setattr(download, "RATE_WINDOW_S", 0.05)
        with sending(call, length=10_000_000) as line:
            line.sendall(b"x")
            answered = threading.Event()

            def drip() -> None:
                with contextlib.suppress(OSError):
                    while not answered.wait(0.02):
                        line.sendall(b"x")

            dripping = threading.Thread(target=drip)
            dripping.start()
            assert line.recv(12) == b"HTTP/1.1 408"
            answered.set()
            dripping.join()
        until(lambda: not call.kept)

    def test_a_full_disk_is_said_and_leaves_nothing(
        self, call: Caller, monkeypatch: pytest.MonkeyPatch
    ):
        """Not as a fault of the caller's."""

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(download.UploadFile, "write", full)
        answer = call.upload()

        assert (answer.status, "No space" in answer.json["message"]) == (507, True)
        assert call.kept == []

    def test_only_so_many_uploads_come_at_once(self, opened: Callable[..., Caller]):
        """The next is told when to try again, and is taken once there is a place."""
        call = opened(http_uploads_at_once=1)
        with sending(call, length=1000):
            until(lambda: call.kept)
            refused = call.upload()
        until(lambda: not call.kept)

        assert (refused.status, refused.json["code"]) == (429, "too_many_uploads")
        assert int(refused.headers["Retry-After"]) > 0
        until(lambda: call.upload().status == 202)

    def test_no_job_is_taken_while_the_queue_or_the_folder_is_full(
        self, opened: Callable[..., Caller]
    ):
        """Said before the upload is read."""
        short, small = opened(http_queue_max=1), opened(http_uploads_bytes=len(CLIP))
        answers = [short.upload(), short.upload(), small.upload(), small.upload(b"x")]

        assert [answer.status for answer in answers] == [202, 429, 429, 202]
        assert answers[1].json["code"] == "queue_full"
        assert answers[2].json["code"] == "uploads_full"

    def test_a_path_or_method_that_does_not_exist_is_said_in_json(self, call: Caller):
        """As every other error."""
        missing, wrong = call("GET", "/nothing"), call("PATCH", "/jobs")

        assert (missing.status, wrong.status, wrong.headers["Allow"]) == (404, 405, "POST")
        assert missing.json["code"] == "not_found"
        assert wrong.json["code"] == "method_not_allowed"


class TestReading:
    def test_a_job_is_followed_to_its_verdict_and_page(self, call: Caller, store: Store):
        """queued, running with progress, succeeded; what is read is what the worker stored."""
        made = call.upload(tag="post <1>").json
        path, page = made["links"]["self"], made["links"]["page"]
        queued, early = call("GET", path).json, call("GET", page)
        running = claim(store)
        store.beat(running, progress=Progress(stage="analyze", percent=40, frames_done=4))
        seen = call("GET", path).json
        verdict = a_verdict(job_id=made["job_id"], tag="post <1>")
        store.end(running, verdict, evidence=an_evidence())
        done, written = call("GET", path).json, call("GET", page)

        assert (queued["state"], queued["verdict"], early.status) == ("queued", None, 202)
        assert (seen["state"], seen["progress"]["percent"]) == ("running", 40)
        assert (done["state"], Verdict.model_validate(done["verdict"])) == ("succeeded", verdict)
        assert written.status == 200 and "post &lt;1&gt;" in written.text
        assert "sandbox" in written.headers["Content-Security-Policy"]

    def test_a_job_without_a_verdict_says_why(self, call: Caller, store: Store):
        """In JSON and as a page; what the failure says is text, not markup."""
        made = call.upload().json
        failure = a_failure("corrupt_media", "no <b>video</b>")
        store.end(claim(store), failure)
        job, page = call("GET", made["links"]["self"]).json, call("GET", made["links"]["page"])

        assert (job["state"], job["failure"]["code"]) == ("failed", "corrupt_media")
        assert page.status == 409 and "no &lt;b&gt;video&lt;/b&gt;" in page.text

    def test_a_job_that_is_tried_again_says_how_it_failed(self, call: Caller, store: Store):
        """And when it is next tried."""
        made = call.upload().json
        store.retry(claim(store), a_failure("fetch_failed", "503"), delay_s=60)
        job = call("GET", made["links"]["self"]).json

        assert (job["state"], job["last_failure"]["code"]) == ("queued", "fetch_failed")
        assert job["next_attempt_at"] > job["submitted_at"]

    def test_wait_answers_when_the_job_ends(self, call: Caller, store: Store):
        """And not after more than a minute."""
        made = call.upload().json
        running = claim(store)
        ending = threading.Timer(0.5, store.end, (running, a_verdict(job_id=made["job_id"])))
        ending.start()
        waited = call("GET", made["links"]["self"] + "?wait=60").json
        ending.join()

        assert waited["state"] == "succeeded"
        assert call("GET", made["links"]["self"] + "?wait=61").status == 400

    def test_a_job_can_be_cancelled(self, call: Caller):
        """A queued one at once; a second time changes nothing."""
        made = call.upload().json
        states = [call("DELETE", made["links"]["self"]).json["state"] for _ in range(2)]

        assert states == ["cancelled", "cancelled"]

    def test_only_jobs_that_came_by_http_are_shown(self, call: Caller, store: Store):
        """Others have callers with rights of their own."""
        store.submit([a_job("1", tenant="acme")])
        answers = [
            call(*request)
            for request in (("GET", "/jobs/j1"), ("DELETE", "/jobs/j1"), ("GET", "/jobs/j1/page"))
        ]

        assert [answer.status for answer in answers] == [404, 404, 404]
        status = store.status("j1")
        assert status is not None and status.state == "queued"

    def test_health_follows_the_queue(self, call: Caller, store: Store):
        """No workers is not well."""
        before = call("GET", "/healthz").status
        store.redis.sadd(f"rq:workers:{store.queue('default')}", "w")

        assert (before, call("GET", "/healthz").status) == (503, 200)


class TestKeeping:
    def test_an_upload_is_deleted_after_its_job_and_not_before(
        self, call: Caller, store: Store, monkeypatch: pytest.MonkeyPatch
    ):
        """A retry of the job reads it again."""
        monkeypatch.setattr(server, "SWEEP_S", 0.05)
        ends, goes_on = (call.upload(token=name).json for name in ("a", "b"))
        first = claim(store)
        claim(store)
        assert first.job_id == ends["job_id"]
        store.end(first, a_verdict(job_id=ends["job_id"]))
        until(lambda: len(call.kept) == 1)
        status = store.status(goes_on["job_id"])
        assert status is not None and status.state == "running"
        assert {path.suffix for path in call.folder.iterdir()} == {".media", ".job", ""}

    def test_an_old_upload_is_deleted_and_its_job_cancelled(self, call: Caller, store: Store):
        """A job that is still queued would only find that its file is gone."""
        made = call.upload().json
        client = queue.Client(store.redis, Settings())
        uploads = Uploads(call.folder)
        young = uploads.sweep(lambda _: False, client.cancel, ttl_s=3600)
        old = uploads.sweep(lambda _: False, client.cancel, ttl_s=-1)

        assert (young, old, call.kept) == (0, 1, [])
        assert client.status(made["job_id"]).state == "cancelled"

    def test_a_server_that_starts_again_removes_what_was_not_whole(self, tmp_path: Path):
        """And leaves whole uploads to their jobs; two servers never share a folder."""
        for name in ("media-half", "a.media", "a.job"):
            (tmp_path / name).write_text("j1")
        with Uploads.opened(tmp_path) as uploads:
            left = sorted(path.name for path in tmp_path.iterdir())
            with pytest.raises(Infrastructure, match="another server"):
                with Uploads.opened(tmp_path):
                    pass

        assert left == ["a.job", "a.media", "lock"]
        assert uploads.sweep(lambda job: job == "j1", print, 3600) == 1

    def test_workers_get_the_folder_for_this_tenant_and_not_the_token(self, tmp_path: Path):
        """Their environment is open to their user."""
        settings = Settings(http_token=TOKEN, file_roots=("/srv",))
        for_workers = Uploads(tmp_path).for_workers(settings)

        assert for_workers.file_roots == ("/srv", f"http={tmp_path}")
        assert TOKEN not in str(as_environment(for_workers, {"RALF_HTTP_TOKEN": TOKEN}))


class TestAccess:
    @pytest.mark.parametrize(
        ("host", "known"),
        [
            ("127.0.0.1:8080", True),
            ("localhost", True),
            ("LOCALHOST:1", True),
            ("[::1]:8080", True),
            ("192.0.2.7", True),
            ("ralf.example:443", True),
            ("evil.example", False),
            ("localhost.evil.example", False),
            ("evil.example#127.0.0.1", False),
            ("user@evil.example", False),
            ("[::1", False),
            ("", False),
        ],
    )
    def test_a_name_that_was_led_here_is_refused(self, host: str, known: bool):
        """DNS rebinding: the browser sends the other site's name."""
        access = Access("", ("Ralf.example",))
        refused = refusal(access, "GET", "/", {"Host": host})

        assert refused == (None if known else 403)

    @pytest.mark.parametrize(
        ("headers", "allowed"),
        [
            ({}, True),
            ({"Origin": "http://127.0.0.1:8080"}, True),
            ({"Origin": "http://127.0.0.1:8080", "Sec-Fetch-Site": "same-origin"}, True),
            ({"Origin": "http://127.0.0.1:9090"}, False),
            ({"Origin": "https://evil.example"}, False),
            ({"Origin": "null"}, False),
            ({"Sec-Fetch-Site": "cross-site"}, False),
        ],
    )
    def test_a_page_of_another_site_changes_nothing(self, headers: dict[str, str], allowed: bool):
        """It may read no answer either, which the browser sees to."""
        host = {"Host": "127.0.0.1:8080"}
        wanted = None if allowed else 403

        for method in ("POST", "DELETE"):
            assert refusal(Access(""), method, "/jobs", host | headers) == wanted

    def test_a_token_is_asked_for_wherever_a_job_is(self, opened: Callable[..., Caller]):
        """Not for the page itself; a wrong one is refused as none."""
        call = opened(http_token=TOKEN)
        made = call("POST", "/jobs", CLIP, VIDEO | {"Authorization": f"Bearer {TOKEN}"}).json
        path = made["links"]["self"]

        for method, where in (("POST", "/jobs"), ("GET", path), ("DELETE", path)):
            for sent in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN}):
                answer = call(method, where, None, sent)
                assert (answer.status, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
        assert {call("GET", where).status for where in OPEN - {"/healthz"}} == {200}
        assert call("GET", path, None, {"Authorization": f"bearer {TOKEN}"}).status == 200

    def test_a_pages_link_opens_that_page_alone_for_an_hour(self, monkeypatch: pytest.MonkeyPatch):
        """A browser sends no token when it follows a link."""
        access, host = Access(TOKEN), {"Host": "127.0.0.1"}
        link = access.page_query("/jobs/a/page")
        query = dict(part.split("=") for part in link[1:].split("&"))
        later = {**query, "until": str(int(query["until"]) + 9999)}

        def tried(path: str, query: Mapping[str, str], method: str = "GET") -> int | None:
            return refusal(access, method, path, host, query)

        assert tried("/jobs/a/page", query) is None
        assert tried("/jobs/b/page", query) == tried("/jobs/a", query) == 401
        assert tried("/jobs/a/page", later) == tried("/jobs/a/page", {}) == 401
        monkeypatch.setattr(time, "time", lambda: int(query["until"]) + 1)
        assert tried("/jobs/a/page", query) == 401
        assert Access("").page_query("/jobs/a/page") == ""

    @pytest.mark.parametrize(
        ("text", "token", "words"),
        [
            ("0.0.0.0:8080", "", "RALF_HTTP_TOKEN"),
            ("[::]:8080", "", "RALF_HTTP_TOKEN"),
            ("127.0.0.1:8080", "short", "16"),
            ("8080", "", "ADDRESS:PORT"),
            ("ralf.example:80", "", "ADDRESS:PORT"),
            ("127.0.0.1:99999", "", "ADDRESS:PORT"),
        ],
    )
    def test_an_address_without_its_token_is_refused(self, text: str, token: str, words: str):
        """Said before anything is started."""
        with pytest.raises((Infrastructure, SettingsError), match=words):
            Address.read(text).check(Settings(http_token=token))

    def test_other_addresses_are_taken(self):
        """Loopback without a token, all with one."""
        Address.read("[::1]:8080").check(Settings())
        Address.read("localhost:0").check(Settings())
        Address.read("0.0.0.0:8080").check(Settings(http_token=TOKEN))

    def test_no_answer_may_be_stored_framed_or_guessed(self, call: Caller):
        """Pages load nothing from elsewhere."""
        for path in ("/", "/healthz", "/nothing", "/upload.js"):
            headers = call("GET", path).headers
            assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
            assert "default-src 'none'" in headers["Content-Security-Policy"]
            assert (headers["Cache-Control"], headers["X-Content-Type-Options"]) == (
                "no-store",
                "nosniff",
            )


class TestDocument:
    def test_it_names_every_route_and_only_schemas_that_exist(self, call: Caller):
        """Its schemas are JSON Schema; every reference leads somewhere."""
        text = call("GET", "/openapi.json").text
        document = json.loads(text)
        schemas = document["components"]["schemas"]
        routes = {
            (resource.canonical, method.lower())
            for resource, method in routes_of()
            if method != "HEAD"
        }
        described = {(p, m) for p, item in document["paths"].items() for m in item if len(m) < 7}

        assert routes - described == {(path, "get") for path in OPEN - {"/healthz"}}
        assert described <= routes
        assert set(re.findall(r'"#/components/schemas/(\w+)"', text)) <= set(schemas)
        for schema in schemas.values():
            jsonschema.Draft202012Validator.check_schema(schema)

    def test_it_asks_for_the_token_where_the_server_does(self):
        """A generated client then sends it."""
        assert "security" not in openapi(token_needed=False)
        assert openapi(token_needed=True)["security"] == [{"token": []}]


class TestServing:
    @pytest.fixture(autouse=True)
    def _process_as_it_is(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """`serve` changes signals and rights of its process, here the suite's."""
        monkeypatch.setattr(sandbox, "refuse_inspection", lambda: None)
        monkeypatch.setattr(signal, "signal", lambda *_: None)

    @pytest.mark.parametrize(
        ("words", "code", "said"),
        [
            (["--http", "0.0.0.0:0"], 5, "RALF_HTTP_TOKEN"),
            (["--http", "8080"], 2, "ADDRESS:PORT"),
            (["--data", "folder"], 2, "--embedded"),
            (["--redis", "unix:///nothing.sock"], 5, "Redis does not answer"),
        ],
    )
    def test_what_cannot_be_served_is_said_before_anything_starts(
        self, words: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
    ):
        """One line, no traceback."""
        assert main(["serve", *words]) == code
        assert said in capsys.readouterr().err

    def test_the_lines_of_the_document_work_as_printed(
        self, tiny_models: Path, clip_of_two: Path, tmp_path: Path
    ):
        """A real server, queue, worker and curl, from the upload to the page and the end."""
        port = free_port()
        text = (ROOT / "docs/http.md").read_text()
        (block,) = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
        (tmp_path / "clip.mp4").write_bytes(clip_of_two.read_bytes())
        settings = replace(Settings(), models_dir=str(tiny_models), model="tiny", threads=1)
        environment = as_environment(
            settings, {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
        )
        environment |= {"PYTHONPATH": str(ROOT), "XDG_RUNTIME_DIR": str(tmp_path)}
        script = block.replace("8080", str(port)).replace("kill %1", "kill %1; wait %1")
        run = subprocess.run(
            ["bash", "-ec", script], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        log = (tmp_path / "serve.log").read_text()

        assert run.returncode == 0, run.stderr + log
        job = json.loads((tmp_path / "job.json").read_text())
        assert (job["state"], job["verdict"]["media"]["sha256"]) == (
            "succeeded",
            sha256(clip_of_two.read_bytes()),
        )
        assert "<html" in (tmp_path / "verdict.html").read_text()
        assert f"http://127.0.0.1:{port}" in log

    def test_without_embedded_it_serves_the_redis_that_is_configured(
        self, redis_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ):
        """The command ends when one of its processes does."""
        seen: list[Settings] = []

        @contextlib.contextmanager
        def on_redis(settings: Settings) -> Iterator[embedded.Embedded]:
            seen.append(settings)
            supervisor = processes.Supervisor(settings, Path())
            gone = supervisor.add("worker", restart=False)
            gone.popen = subprocess.Popen(["false"])
            gone.popen.wait()
            yield embedded.Embedded(settings, supervisor)

        monkeypatch.setattr(embedded, "on_redis", on_redis)
        code = main(["serve", "--redis", redis_url, "--http", "127.0.0.1:0"])

        said = capsys.readouterr().err
        assert (code, seen[0].redis_url) == (5, redis_url)
        assert "http://127.0.0.1:" in said and "worker-0 ended with 1" in said
        folder = Path(seen[0].file_roots[0].removeprefix("http="))
        assert not folder.exists()

    def test_workers_on_a_configured_redis_take_jobs_of_both_priorities(
        self, redis_url: str, store: Store
    ):
        """And are gone afterwards; the Redis is not."""
        with embedded.on_redis(replace(QUICK, redis_url=redis_url), bodies="test"):
            asked = [a_job("1"), a_job("2", priority="high")]
            store.submit(asked, function=bodies.PREFIX + "trivial")
            until(lambda: all(store.verdict(job.job_id) for job in asked))

        assert sum(store.counts().workers.values()) == 0


def sha256(data: bytes) -> str:
    """Of the bytes."""
    return hashlib.sha256(data).hexdigest()


def refusal(
    access: Access,
    method: str,
    path: str,
    headers: Mapping[str, str],
    query: Mapping[str, str] | None = None,
) -> int | None:
    """The status with which it refuses."""
    try:
        access.check(method, path, headers, query or {})
    except Refused as refused:
        return refused.status
    return None


@contextlib.contextmanager
def sending(call: Caller, length: int) -> Iterator[socket.socket]:
    """A request whose body the test sends itself."""
    host, _, port = call.host.partition(":")
    head = f"POST /jobs HTTP/1.1\r\nHost: {call.host}\r\nContent-Type: video/mp4\r\n"
    with socket.create_connection((host, int(port)), PATIENCE_S) as line:
        line.sendall(f"{head}Content-Length: {length}\r\n\r\n".encode())
        yield line


def routes_of() -> Iterator[tuple[Any, str]]:
    """Resource and method of each route."""
    redis = connect("unix:///nothing")
    app = server.Server(queue.Client(redis), Uploads(Path()), Settings()).app()
    redis.close()
    for route in app.router.routes():
        yield route.resource, route.method
