"""From a job's URI to a local file: within policy, caps and time, whole or not at all."""

import errno
import hashlib
import itertools
import os
import socket
import stat
import time
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from ralf.worker.contract import Media
from ralf.worker.errors import (
    Cancelled,
    FetchDenied,
    FetchFailed,
    HashMismatch,
    JobError,
    TooLarge,
    UnreadableFile,
)
from ralf.worker.service import download
from ralf.worker.service import fetch as fetching
from ralf.worker.service.download import NO_PUBLIC_HOST
from ralf.worker.service.egress import Egress
from ralf.worker.service.fetch import Fetched, fetch, open_store
from ralf.worker.settings import Settings
from tests.test_egress import TRICKS, guarded
from tests.web import PUBLIC, Request, Web, for_ever, reply, serving

DATA = bytes(range(256)) * 1024
SHA = hashlib.sha256(DATA).hexdigest()
BROKEN_LIMITS = [
    ({"max_bytes": 1000}, TooLarge),
    ({"size_bytes": 5}, HashMismatch),
    ({"sha256": "0" * 64}, HashMismatch),
    ({"cancelled": lambda: True}, Cancelled),
]
"""What is asked of a fetch of DATA, and the error that must come of it."""


def get(
    uri: str, folder: Path, *, sha256=None, size_bytes=None, tenant="acme", **options
) -> Fetched:
    """fetch(), the settings given as keywords."""
    media = Media(uri=uri, sha256=sha256, size_bytes=size_bytes)
    names = ("cancelled", "egress", "store")
    given = {name: options.pop(name) for name in names if name in options}
    return fetch(media, folder, tenant=tenant, settings=Settings(**options), **given)


def near(web: Web, **settings) -> dict[str, object]:
    """Settings that let loopback be fetched from, by the real resolver and connector."""
    return {"fetch_ports": (web.port,), "allow_private_addresses": True} | settings


def ranged(data: bytes = DATA, *, breaks: list[int], **headers: str):
    """A server that hangs up after so many bytes of each answer, and knows Range."""
    left = iter(breaks)

    def answer(request: Request):
        asked = request.headers.get("range")
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        extra = {"Content_Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if asked else {}
        head, body = reply(206 if asked else 200, data[start:], **extra, **headers)
        return [head, body[: next(left, len(data))]]

    return answer


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch):
    monkeypatch.setattr(download, "PAUSE_S", 0.01)


@pytest.fixture
def web():
    with serving(lambda request: reply(200, DATA)) as web:
        yield web


@pytest.fixture
def folder(tmp_path) -> Path:
    """Where uploads are fetched to."""
    place = tmp_path / "job"
    place.mkdir()
    return place


class TestWeb:
    def test_gives_the_file_its_hash_and_size(self, web, folder):
        """Under a name nobody can guess, for our eyes only."""
        found = get(f"{web.url}/a.mp4", folder, sha256=SHA, size_bytes=len(DATA), **near(web))
        again = get(f"{web.url}/a.mp4", folder, **near(web))

        assert (found.sha256, found.size_bytes) == (SHA, len(DATA))
        assert found.path.read_bytes() == DATA
        assert found.path.parent == folder
        assert stat.S_IMODE(found.path.stat().st_mode) == 0o600
        assert found.path.name != again.path.name

    def test_a_chunked_answer_is_taken_too(self, folder):
        """Its size is known at its end."""
        body = (
            b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in (DATA[:10], DATA[10:])) + b"0\r\n\r\n"
        )
        with serving(
            lambda request: [b"HTTP/1.1 200 X\r\nTransfer-Encoding: chunked\r\n\r\n", body]
        ) as web:
            assert get(f"{web.url}/", folder, **near(web)).sha256 == SHA

    @pytest.mark.parametrize("trick", TRICKS)
    def test_every_trick_is_denied(self, web, folder, trick):
        """Nothing connects, nothing stays."""
        url = TRICKS[trick].format(port=web.port)
        roots = ("/",) if not url.startswith("file:") else ("/srv/uploads",)
        with pytest.raises(FetchDenied):
            get(url, folder, egress=guarded(web), file_roots=roots, fetch_ports=(80, web.port))

        assert web.connections == 0
        assert list(folder.iterdir()) == []

    @pytest.mark.parametrize(
        ("status", "error"),
        [
            *((status, FetchDenied) for status in (204, 206, 304, 400, 401, 403, 404, 410, 451)),
            *((status, FetchFailed) for status in (408, 425, 429, 500, 502, 503, 504)),
        ],
    )
    def test_the_status_decides_whether_to_try_again(self, folder, status, error):
        """The message names it, and not the query."""
        with serving(lambda request: reply(status, b"no")) as web:
            with pytest.raises(error, match=str(status)) as caught:
                get(f"{web.url}/a?X-Amz-Signature=secret", folder, **near(web))

        assert "secret" not in str(caught.value)
        assert len(web.requests) == 1
        assert list(folder.iterdir()) == []

    def test_a_refused_connection_may_be_tried_again(self, folder):
        """Nobody listens there now."""
        with serving(lambda request: []) as web:
            pass
        with pytest.raises(FetchFailed, match="could not be reached"):
            get(f"{web.url}/", folder, **near(web))

    def test_compressed_content_is_denied(self, folder):
        """It was not asked for, and may hide a bomb."""
        with serving(lambda request: reply(200, b"x", Content_Encoding="gzip")) as web:
            with pytest.raises(FetchDenied, match="compressed"):
                get(f"{web.url}/", folder, **near(web))

        assert web.requests[0].headers["accept-encoding"] == "identity"


class TestCaps:
    def test_a_declared_size_above_the_cap_is_refused_at_once(self, folder):
        """Before its body comes."""
        with serving(lambda request: [reply(200, DATA)[0], 600.0]) as web:
            with pytest.raises(TooLarge, match="262144 bytes; at most 1000"):
                get(f"{web.url}/", folder, **near(web, max_bytes=1000))

        assert list(folder.iterdir()) == []

    def test_an_undeclared_size_is_capped_while_it_streams(self, folder):
        """The file that was begun is gone."""

        def endless(request: Request):
            return itertools.chain([b"HTTP/1.1 200 X\r\n\r\n"], itertools.repeat(DATA))

        with serving(endless) as web:
            with pytest.raises(TooLarge, match="more than the 1000000 bytes"):
                get(f"{web.url}/", folder, **near(web, max_bytes=1_000_000))

        assert list(folder.iterdir()) == []

    @pytest.mark.parametrize("size", [len(DATA) - 1, len(DATA) + 1, 0])
    def test_another_size_than_the_job_says_is_a_mismatch(self, web, folder, size):
        """Seen in the header, where there is one."""
        with pytest.raises(HashMismatch, match="the job says"):
            get(f"{web.url}/", folder, size_bytes=size, **near(web))

        assert list(folder.iterdir()) == []

    def test_another_hash_than_the_job_says_is_a_mismatch(self, web, folder):
        """And leaves nothing."""
        with pytest.raises(HashMismatch, match=SHA):
            get(f"{web.url}/", folder, sha256="0" * 64, **near(web))

        assert list(folder.iterdir()) == []

    def test_who_trickles_is_cut_off(self, folder):
        """A byte now and then does not buy time."""
        head = b"HTTP/1.1 200 X\r\nContent-Length: 1000000\r\n\r\n"
        with serving(lambda request: itertools.chain([head], for_ever(b"x", 0.05))) as web:
            with pytest.raises(FetchFailed, match=r"more than 0\.4 s"):
                get(f"{web.url}/", folder, **near(web, fetch_timeout_s=0.4))

        assert list(folder.iterdir()) == []

    def test_a_download_below_the_least_rate_is_broken_off(self, folder, monkeypatch):
        """Long before the time for the whole upload is over; the job is tried again later."""
        monkeypatch.setattr("ralf.worker.service.download.RATE_WINDOW_S", 0.3)
        head = b'HTTP/1.1 200 X\r\nContent-Length: 1000000\r\nETag: "1"\r\n\r\n'
        with serving(lambda request: itertools.chain([head], for_ever(b"x", 0.05))) as web:
            with pytest.raises(FetchFailed, match=r"at least 1000 a second are expected"):
                get(f"{web.url}/", folder, **near(web, fetch_least_rate=1000))

        assert len(web.requests) == 1  # it is not resumed: the server would be as slow again
        assert list(folder.iterdir()) == []

    def test_a_slow_download_above_the_least_rate_arrives(self, folder, monkeypatch):
        """Over several windows, with pauses between its parts."""
        monkeypatch.setattr("ralf.worker.service.download.RATE_WINDOW_S", 0.2)
        parts = [part for n in range(0, len(DATA), 4096) for part in (DATA[n : n + 4096], 0.05)]
        with serving(
            lambda request: [
                reply(200, DATA)[0],
                *parts[:40],
                b"".join(part for part in parts[40:] if isinstance(part, bytes)),
            ]
        ) as web:
            assert get(f"{web.url}/", folder, **near(web, fetch_least_rate=1)).size_bytes == len(
                DATA
            )

    def test_a_cancel_ends_it_even_while_nothing_comes(self, folder):
        """And removes what came."""
        began = time.monotonic()
        with serving(lambda request: [reply(200, DATA)[0], DATA[:1000], 600.0]) as web:
            with pytest.raises(Cancelled):
                get(
                    f"{web.url}/",
                    folder,
                    cancelled=lambda: time.monotonic() - began > 0.3,
                    **near(web),
                )

        assert list(folder.iterdir()) == []

    def test_a_full_disk_is_tried_again_elsewhere(self, web, folder, monkeypatch):
        """Not the job's fault."""

        def full(self, part: bytes) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("ralf.worker.service.download.UploadFile.write", full)
        with pytest.raises(FetchFailed, match="No space left"):
            get(f"{web.url}/", folder, **near(web))

        assert list(folder.iterdir()) == []


LEADING_ASTRAY = {
    "loopback": "http://127.0.0.1:{port}/second",
    "no scheme": "//127.0.0.1:{port}/second",
    "decimal": "http://2130706433:{port}/second",
    "private": "http://10.0.0.1/second",
    "metadata": "http://169.254.169.254/latest/meta-data/",
    "private name": "http://127-0-0-1.nip.example/second",
    "user": "http://public.example@127.0.0.1:{port}/second",
    "file": "file:///etc/passwd",
    "ftp": "ftp://public.example/second",
    "gopher": "gopher://public.example/_second",
    "other port": "http://public.example:6379/second",
    "tab": "ht\ttp://127.0.0.1:{port}/second",
    "backslash": "\\\\127.0.0.1:{port}\\second",
    "nothing": "",
}


class TestRedirects:
    @pytest.mark.parametrize("lure", LEADING_ASTRAY)
    def test_one_that_leads_astray_is_denied(self, folder, lure):
        """Only the first request is made."""
        with serving(
            lambda request: reply(302, Location=LEADING_ASTRAY[lure].format(port=web.port))
        ) as web:
            with pytest.raises(FetchDenied):
                get("http://public.example/first", folder, egress=guarded(web))

        assert [request.path for request in web.requests] == ["/first"]
        assert web.connections == 1

    @pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
    def test_a_good_one_is_followed(self, folder, status):
        """Relative ones too."""

        def answer(request: Request):
            if request.path == "/first/a":
                return reply(status, Location="../second?sig=x")
            return reply(200, DATA)

        with serving(answer) as web:
            found = get("http://public.example/first/a", folder, egress=guarded(web))

        assert found.sha256 == SHA
        assert [request.path for request in web.requests] == ["/first/a", "/second?sig=x"]

    def test_a_name_that_is_rebound_between_two_is_denied(self, folder):
        """Each redirect is resolved and judged anew."""
        answers = [[PUBLIC], ["127.0.0.1"]]
        with serving(lambda request: reply(302, Location="/second")) as web:
            egress = guarded(web, resolve=lambda _: answers.pop(0))
            with pytest.raises(FetchDenied) as caught:
                get("http://rebind.example/first", folder, egress=egress)
            assert "not a public address" in str(caught.value.__cause__)

        assert [request.path for request in web.requests] == ["/first"]

    def test_a_tenant_cannot_tell_a_private_name_from_one_that_does_not_exist(self, web, folder):
        """Address, private name, unknown name, each also behind a redirect; only the cause says."""

        def resolve(name: str) -> list[str]:
            if name == "unknown.example":
                raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
            return ["10.1.2.3"] if name == "db.internal" else [PUBLIC]

        inside = ("10.1.2.3", "169.254.169.254", "db.internal", "unknown.example")
        told, causes = set(), set()
        for host in inside:
            with serving(lambda request, to=host: reply(302, Location=f"http://{to}/x")) as door:
                for uri in (f"http://{host}/x", "http://public.example/x"):
                    with pytest.raises(FetchDenied) as caught:
                        get(uri, folder, egress=guarded(door, resolve=resolve))
                    told.add(str(caught.value))
                    causes.add(str(caught.value.__cause__))

        assert told == {NO_PUBLIC_HOST}
        assert not any(host in NO_PUBLIC_HOST for host in inside)
        assert any("db.internal is at 10.1.2.3" in cause for cause in causes)

    def test_a_resolver_with_troubles_is_asked_again(self, web, folder):
        """Only its word that there is no such name is final."""

        def resolve(_: str) -> list[str]:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

        with pytest.raises(FetchFailed, match="could not be resolved"):
            get("http://cdn.example/x", folder, egress=guarded(web, resolve=resolve))

    def test_https_does_not_lead_to_http(self, folder):
        """What was secret on the way stays so."""
        target = Egress(Settings()).target
        intake = None
        mover = download.Download("https://a.example/", Egress(Settings()), Settings(), 0, intake)
        with pytest.raises(FetchDenied, match="from https to http"):
            mover._redirected(target("https://a.example/x?sig=1"), "http://a.example/x")

        assert mover._redirected(target("http://a.example/"), "https://b.example/").host == (
            "b.example"
        )

    @pytest.mark.parametrize(("most", "requests"), [(0, 1), (3, 4)])
    def test_their_number_is_bounded(self, folder, most, requests):
        """A loop ends."""
        with serving(lambda request: reply(302, Location="/again")) as web:
            with pytest.raises(FetchDenied, match=f"more than {most} redirects"):
                get(f"{web.url}/", folder, **near(web, fetch_redirects=most))

        assert len(web.requests) == requests


class TestResume:
    @pytest.mark.parametrize(
        "validator",
        [{"ETag": '"v1"'}, {"Last_Modified": "Wed, 21 Oct 2015 07:28:00 GMT"}],
        ids=["ETag", "Last-Modified"],
    )
    def test_a_broken_download_goes_on_where_it_stopped(self, folder, validator):
        """Each byte comes once, and the hash is of the whole."""
        with serving(ranged(breaks=[100_000, 50_000], **validator)) as web:
            found = get(f"{web.url}/", folder, sha256=SHA, size_bytes=len(DATA), **near(web))

        assert found.path.read_bytes() == DATA
        asked = [request.headers.get("range") for request in web.requests]
        assert asked == [None, "bytes=100000-", "bytes=150000-"]
        assert web.requests[1].headers["if-range"] == next(iter(validator.values()))

    @pytest.mark.parametrize("validator", [{}, {"ETag": 'W/"v1"'}, {"ETag": "junk"}])
    def test_without_a_strong_name_for_the_version_it_does_not(self, folder, validator):
        """Two halves of two files are no file; the job is tried again instead."""
        with serving(ranged(breaks=[1000], **validator)) as web:
            with pytest.raises(FetchFailed, match="1000 of 262144 bytes came"):
                get(f"{web.url}/", folder, **near(web))

        assert len(web.requests) == 1
        assert list(folder.iterdir()) == []

    def test_a_file_that_changed_is_sent_whole_and_taken_anew(self, folder):
        """If-Range makes the server answer 200."""
        other = DATA[::-1]

        def answer(request: Request):
            if "range" not in request.headers:
                head, body = reply(200, DATA, ETag='"v1"')
                return [head, body[:1000]]
            return reply(200, other, ETag='"v2"')

        with serving(answer) as web:
            found = get(f"{web.url}/", folder, **near(web))

        assert found.path.read_bytes() == other
        assert found.sha256 == hashlib.sha256(other).hexdigest()

    @pytest.mark.parametrize(
        "headers",
        [
            {"Content_Range": "bytes 999-262143/262144", "ETag": '"v1"'},
            {"Content_Range": "bytes 1000-262143/262144", "ETag": '"v2"'},
            {"Content_Range": "nonsense", "ETag": '"v1"'},
            {"ETag": '"v1"'},
        ],
    )
    def test_a_wrong_continuation_is_not_taken(self, folder, headers):
        """Another byte, another version, or no word of it."""

        def answer(request: Request):
            if "range" in request.headers:
                return reply(206, DATA[1000:], **headers)
            head, body = reply(200, DATA, ETag='"v1"')
            return [head, body[:1000]]

        with serving(answer) as web:
            with pytest.raises(FetchFailed, match=r"another byte|changed while"):
                get(f"{web.url}/", folder, **near(web))

        assert list(folder.iterdir()) == []

    def test_it_goes_on_past_a_bad_moment_a_bounded_number_of_times(self, folder):
        """503 in the middle is a bad moment too."""
        count = itertools.count()

        def answer(request: Request):
            if next(count) in (1, 2):
                return reply(503)
            return ranged(breaks=[1000], ETag='"v1"')(request)

        with serving(answer) as web:
            with pytest.raises(FetchFailed, match="broke off"):
                get(f"{web.url}/", folder, **near(web))

        assert len(web.requests) == download.RESUMES + 1
        assert web.requests[-1].headers["range"] == f"bytes={1000 * (download.RESUMES - 2)}-"


class TestLocal:
    @pytest.fixture
    def root(self, tmp_path) -> Path:
        root = tmp_path / "uploads"
        (root / "a").mkdir(parents=True)
        (root / "a" / "clip é.mp4").write_bytes(DATA)
        (tmp_path / "secret.txt").write_text("secret")
        return root

    def test_a_file_under_a_root_is_copied(self, root, folder):
        """What is judged is what was hashed, whoever changes the file later; %20 is decoded."""
        path = root / "a" / "clip é.mp4"
        found = get(path.as_uri(), folder, sha256=SHA, file_roots=(str(root),))
        path.write_bytes(b"another")

        assert found == Fetched(found.path, SHA, len(DATA))
        assert [found.path] == list(folder.iterdir())
        assert found.path.read_bytes() == DATA

    def test_a_link_within_the_roots_is_followed(self, root, folder, tmp_path):
        """A root may itself be one."""
        (root / "link.mp4").symlink_to(root / "a" / "clip é.mp4")
        (tmp_path / "roots").symlink_to(root)
        found = get((tmp_path / "roots" / "link.mp4").as_uri(), folder, file_roots=(str(root),))

        assert found.sha256 == SHA

    def test_what_is_outside_is_denied_however_it_is_named(self, root, folder, tmp_path):
        """Whether it exists or not, and without saying which."""
        (root / "out").symlink_to(tmp_path / "secret.txt")
        (root / "up").symlink_to(tmp_path)
        (tmp_path / "uploads-not").mkdir()
        said = set()
        for uri in (
            f"{root.as_uri()}/../secret.txt",
            f"{root.as_uri()}/%2e%2e/secret.txt",
            f"{root.as_uri()}/..%2fsecret.txt",
            f"{root.as_uri()}/out",
            f"{root.as_uri()}/up/secret.txt",
            f"{root.as_uri()}/up/nothing.txt",
            f"{tmp_path.as_uri()}/uploads-not",
            root.as_uri(),
            "file:///etc/passwd",
        ):
            with pytest.raises(FetchDenied) as caught:
                get(uri, folder, file_roots=(str(root),))
            said.add(str(caught.value))

        assert len(said) == 1

    @pytest.mark.parametrize(
        "uri",
        [
            "file://host{path}",
            "file://127.0.0.1{path}",
            "file:{path}",
            "file:relative.mp4",
            "file://{path}?x",
            "file://{path}#x",
            "file://{path}%00.mp4",
            "file://{path}%ff",
        ],
    )
    def test_only_one_way_of_writing_it_is_taken(self, root, folder, uri):
        """file:///path, with or without localhost."""
        with pytest.raises(FetchDenied):
            get(uri.format(path=root / "a" / "x"), folder, file_roots=(str(root),))

    def test_no_roots_means_no_files(self, root, folder):
        """The message says which setting is empty."""
        with pytest.raises(FetchDenied, match="RALF_FILE_ROOTS, which names none"):
            get((root / "a").as_uri(), folder)

    def test_what_is_not_a_regular_file_is_unreadable(self, root, folder):
        """A folder, a pipe (which does not block)."""
        os.mkfifo(root / "pipe")
        for name in ("a", "pipe"):
            with pytest.raises(UnreadableFile):
                get((root / name).as_uri(), folder, file_roots=(str(root),))

    def test_a_missing_file_is_tried_again(self, root, folder):
        """A spool that another machine fills may show it a moment later."""
        with pytest.raises(FetchFailed, match="does not exist"):
            get((root / "missing.mp4").as_uri(), folder, file_roots=(str(root),))

    def test_a_root_may_belong_to_one_tenant(self, root, folder):
        """As a bucket does; a folder without a tenant is for everyone."""
        (root / "clip.mp4").write_bytes(DATA)
        uri = (root / "clip.mp4").as_uri()
        for entry in (f"acme={root}", f"*={root}", str(root)):
            assert get(uri, folder, file_roots=(entry,)).sha256 == SHA
        with pytest.raises(FetchDenied, match="for this tenant"):
            get(uri, folder, file_roots=(f"acme={root}",), tenant="globex")

    def test_a_link_that_appears_after_the_look_is_not_followed(
        self, root, folder, tmp_path, monkeypatch
    ):
        """The open follows none, in the last place or in between."""
        monkeypatch.setattr(os.path, "realpath", os.path.normpath)
        (root / "out").symlink_to(tmp_path / "secret.txt")
        (root / "up").symlink_to(tmp_path)
        for name in ("out", "up/secret.txt"):
            with pytest.raises(UnreadableFile):
                get((root / name).as_uri(), folder, file_roots=(str(root),))

    def test_a_file_that_grows_while_it_is_read_is_tried_again(self, root, folder):
        """It is still being written."""
        path = root / "a" / "clip é.mp4"
        calls = itertools.count()

        def grow() -> bool:
            if next(calls) == 0:
                with path.open("ab") as file:
                    file.write(b"more")
            return False

        with pytest.raises(FetchFailed, match="changed while it was read"):
            get(path.as_uri(), folder, file_roots=(str(root),), cancelled=grow)

    @pytest.mark.parametrize(("asked", "error"), BROKEN_LIMITS)
    def test_caps_hash_and_cancel_hold_here_too(self, root, folder, asked, error):
        """And the file stays where it is."""
        path = root / "a" / "clip é.mp4"
        with pytest.raises(error):
            get(path.as_uri(), folder, file_roots=(str(root),), **asked)

        assert path.exists()


class Bucket(MemoryFileSystem):
    """fsspec's own file system in memory, with a fault or two."""

    cachable = False
    faults: tuple[Exception, ...] = ()

    def cat_file(self, path, start=None, end=None, **options):
        if self.faults:
            fault, *rest = self.faults
            self.faults = tuple(rest)
            raise fault
        return super().cat_file(path, start=start, end=end, **options)


class TestStores:
    @pytest.fixture
    def bucket(self):
        bucket = Bucket()
        bucket.store.clear()
        bucket.pipe_file("/uploads/a/clip.mp4", DATA)
        yield bucket
        bucket.store.clear()

    def got(self, uri: str, folder: Path, bucket: Bucket, **options) -> Fetched:
        given = {"buckets": ("acme=s3://uploads", "*=gs://uploads"), "store": lambda *_: bucket}
        return get(uri, folder, **(given | options))

    @pytest.mark.parametrize("scheme", ["s3", "gs"])
    def test_an_object_comes_block_by_block(self, bucket, folder, scheme, monkeypatch):
        """Whole, hashed, private."""
        monkeypatch.setattr(fetching, "BLOCK", 100_000)
        found = self.got(f"{scheme}://uploads/a/clip.mp4", folder, bucket, sha256=SHA)

        assert found.path.read_bytes() == DATA
        assert found.size_bytes == len(DATA)
        assert stat.S_IMODE(found.path.stat().st_mode) == 0o600

    @pytest.mark.parametrize(
        ("uri", "tenant"),
        [
            ("s3://uploads/a/clip.mp4", "other"),
            ("s3://others/a/clip.mp4", "acme"),
            ("gs://others/a/clip.mp4", "acme"),
            ("s3://uploads/../others/clip.mp4", "acme"),
            ("s3://uploads/./clip.mp4", "acme"),
            ("s3://uploads", "acme"),
            ("s3://uploads/", "acme"),
            ("s3://UPLOADS/a/clip.mp4", "acme"),
            ("s3://user@uploads/a/clip.mp4", "acme"),
            ("s3://uploads:443/a/clip.mp4", "acme"),
            ("s3://uploads/a/clip.mp4\r\nx", "acme"),
            ("s3:uploads/a/clip.mp4", "acme"),
            ("gcs://uploads/a/clip.mp4", "acme"),
            ("s3://arn:aws:s3:::uploads/a/clip.mp4", "acme"),
        ],
    )
    def test_only_the_tenants_own_buckets_are_read(self, bucket, folder, uri, tenant):
        """The worker's credentials would open others; the store is not even asked."""
        with pytest.raises(FetchDenied):
            self.got(uri, folder, bucket, tenant=tenant, store=lambda *_: pytest.fail("asked"))

        assert list(folder.iterdir()) == []

    def test_a_bucket_for_everyone_is_named_by_a_star(self, bucket, folder):
        """For that scheme only."""
        assert self.got("gs://uploads/a/clip.mp4", folder, bucket, tenant="other").sha256 == SHA

    def test_what_is_missing_or_forbidden_is_denied(self, bucket, folder):
        """Trying again would not help."""
        bucket.faults = (PermissionError("no"),)
        for name in ("missing.mp4", "clip.mp4", ""):
            with pytest.raises(FetchDenied):
                self.got(f"s3://uploads/a/{name}", folder, bucket)

        assert list(folder.iterdir()) == []

    def test_a_block_that_fails_is_asked_for_again(self, bucket, folder):
        """A bounded number of times; the library's words stay out of the message."""
        bucket.faults = (OSError("x"), TimeoutError(), RuntimeError("odd"))
        found = self.got("s3://uploads/a/clip.mp4", folder, bucket)

        assert found.sha256 == SHA
        found.path.unlink()
        bucket.faults = (OSError("token=secret"),) * 20
        with pytest.raises(FetchFailed, match="the store failed with OSError") as caught:
            self.got("s3://uploads/a/clip.mp4", folder, bucket)

        assert "secret" not in str(caught.value)
        assert list(folder.iterdir()) == []

    def test_an_object_that_changes_meanwhile_is_tried_again(self, bucket, folder):
        """By its ETag, generation or date."""
        etags = iter("ab")
        bucket.info = lambda path: {"type": "file", "size": len(DATA), "ETag": next(etags)}
        with pytest.raises(FetchFailed, match="changed while it was fetched"):
            self.got("s3://uploads/a/clip.mp4", folder, bucket)

    @pytest.mark.parametrize(
        ("asked", "error"), [*BROKEN_LIMITS, ({"fetch_timeout_s": 0.0}, FetchFailed)]
    )
    def test_caps_hash_time_and_cancel_hold_here_too(self, bucket, folder, asked, error):
        """And nothing stays."""
        with pytest.raises(error):
            self.got("s3://uploads/a/clip.mp4", folder, bucket, **asked)

        assert list(folder.iterdir()) == []

    def test_a_missing_library_names_the_extra(self, monkeypatch):
        """The worker's operator has to act."""

        def absent(*_, **__):
            raise ImportError("Install s3fs to access S3")

        monkeypatch.setattr(fsspec, "filesystem", absent)
        with pytest.raises(FetchFailed, match=r"pip install '\.\[stores\]'"):
            open_store("s3", Settings(s3_endpoint="https://absent.example"))

    def test_the_endpoint_comes_from_the_settings_only(self, monkeypatch):
        """Neither the job nor a variable of another program chooses it."""
        opened = []
        monkeypatch.setattr(fsspec, "filesystem", lambda name, **options: opened.append(options))
        settings = Settings(s3_endpoint="https://s3.example", gs_endpoint="https://gs.example")
        open_store("s3", settings)
        open_store("gs", settings)
        fetching._opened_store.cache_clear()
        open_store("gs", Settings())
        fetching._opened_store.cache_clear()
        s3, gs, default = opened

        assert s3["client_kwargs"] == {"endpoint_url": "https://s3.example"}
        assert s3["config_kwargs"]["ignore_configured_endpoint_urls"]
        assert gs["endpoint_url"] == "https://gs.example"
        assert gs["access"] == "read_only"
        assert default["endpoint_url"] == "https://storage.googleapis.com"


def test_an_unknown_scheme_is_denied(folder):
    """With those that are known."""
    with pytest.raises(FetchDenied, match="expected https, http, s3, gs or file"):
        get("rtsp://camera.example/1", folder)


def test_every_failure_is_a_named_end(folder):
    """The parent maps job errors; anything else would be a fault of ours."""
    assert all(issubclass(kind, JobError) for kind in (FetchDenied, FetchFailed, TooLarge))
