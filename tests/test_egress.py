"""What may be reached: every trick to reach something else ends before a connection is made."""

import ipaddress
import itertools
import socket
import ssl
import subprocess
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ralf.worker.service.egress import Egress, EgressDenied, EgressFailed, system_resolve
from ralf.worker.service.url_policy import Target, read_url, refusal
from ralf.worker.settings import Settings
from tests.web import PUBLIC, Request, Web, for_ever, reply, serving

NAMES = {
    "public.example": [PUBLIC],
    "two.example": [PUBLIC, "2606:2800:220:1::1"],
    "127-0-0-1.nip.example": ["127.0.0.1"],
    "mixed.example": [PUBLIC, "10.0.0.5"],
    "mapped.example": ["::ffff:192.168.0.1"],
    "metadata.example": ["169.254.169.254"],
    "linklocal.example": ["fe80::1%eth0"],
    "xn--bcher-kva.example": [PUBLIC],
}

TRICKS = {
    "loopback": "http://127.0.0.1:{port}/",
    "other loopback": "http://127.8.8.8:{port}/",
    "decimal": "http://2130706433:{port}/",
    "octal": "http://0177.0.0.1:{port}/",
    "octal in one": "http://017700000001:{port}/",
    "hex": "http://0x7f000001:{port}/",
    "dotted hex": "http://0x7f.0x0.0x0.0x1:{port}/",
    "short": "http://127.1:{port}/",
    "short hex": "http://0x7f.1:{port}/",
    "padded": "http://127.000.000.001:{port}/",
    "overflowing": "http://4425673729:{port}/",
    "zero": "http://0:{port}/",
    "unspecified": "http://0.0.0.0:{port}/",
    "IPv6 loopback": "http://[::1]:{port}/",
    "IPv6 unspecified": "http://[::]:{port}/",
    "IPv6 mapped": "http://[::ffff:127.0.0.1]:{port}/",
    "IPv6 mapped in hex": "http://[0:0:0:0:0:ffff:7f00:1]:{port}/",
    "IPv6 compatible": "http://[::127.0.0.1]:{port}/",
    "NAT64": "http://[64:ff9b::7f00:1]:{port}/",
    "local NAT64": "http://[64:ff9b:1::7f00:1]:{port}/",
    "6to4": "http://[2002:7f00:1::]:{port}/",
    "Teredo": "http://[2001:0:7f00:1::80ff:fffe]:{port}/",
    "ISATAP": "http://[2606:4700::5efe:7f00:1]:{port}/",
    "unique local": "http://[fd12:3456::1]:{port}/",
    "site local": "http://[fec0::1]:{port}/",
    "IPv6 multicast": "http://[ff02::1]:{port}/",
    "zone id": "http://[fe80::1%25lo]:{port}/",
    "fullwidth digits": "http://１２７.0.0.1:{port}/",
    "ideographic dots": "http://127。0。0。1:{port}/",
    "circled digits": "http://①②⑦.⓪.⓪.①:{port}/",
    "Arabic digits": "http://١٢٧.0.0.1:{port}/",
    "soft hyphen": "http://local\u00adhost:{port}/",
    "zero width": "http://local\u200bhost:{port}/",
    "circled letters": "http://ⓛⓞⓒⓐⓛⓗⓞⓢⓣ:{port}/",
    "trailing dot": "http://127.0.0.1.:{port}/",
    "localhost": "http://localhost:{port}/",
    "LocalHost": "http://LocalHost:{port}/",
    "localhost dot": "http://localhost.:{port}/",
    "name of loopback": "http://127-0-0-1.nip.example:{port}/",
    "one private record": "http://mixed.example:{port}/",
    "mapped record": "http://mapped.example:{port}/",
    "metadata record": "http://metadata.example:{port}/",
    "scoped record": "http://linklocal.example:{port}/",
    "user": "http://public.example@127.0.0.1:{port}/",
    "user and password": "http://public.example:80@127.0.0.1:{port}/",
    "user behind backslash": "http://public.example\\@127.0.0.1:{port}/",
    "encoded at": "http://public.example%40127.0.0.1:{port}/",
    "percent in host": "http://127%2e0%2e0%2e1:{port}/",
    "backslashes": "http:\\\\127.0.0.1:{port}\\",
    "three slashes": "http:///127.0.0.1:{port}/",
    "fragment": "http://127.0.0.1:{port}#@public.example/",
    "two ports": "http://public.example:80:{port}/",
    "empty port": "http://public.example:/",
    "tab": "http://127.0.0.1\t:{port}/",
    "newline": "http://127.0.0.\n1:{port}/",
    "leading space": " http://127.0.0.1:{port}/",
    "NUL": "http://public.example\0.127.0.0.1:{port}/",
    "header injection": "http://public.example:{port}/\r\nX-Injected: 1\r\n\r\nGET /second",
    "header injection in host": "http://public.example\r\nX-Injected: 1:{port}/",
    "private 10": "http://10.0.0.1:{port}/",
    "private 172": "http://172.16.0.1:{port}/",
    "private 192": "http://192.168.1.1:{port}/",
    "CGNAT": "http://100.64.0.1:{port}/",
    "link local": "http://169.254.10.10:{port}/",
    "multicast": "http://224.0.0.1:{port}/",
    "broadcast": "http://255.255.255.255:{port}/",
    "benchmark network": "http://198.18.0.1:{port}/",
    "metadata": "http://169.254.169.254:{port}/latest/meta-data/",
    "metadata in decimal": "http://2852039166:{port}/",
    "metadata mapped": "http://[::ffff:a9fe:a9fe]:{port}/",
    "metadata IPv6": "http://[fd00:ec2::254]:{port}/",
    "metadata at a public address": "http://168.63.129.16:{port}/",
    "another port": "http://public.example:6379/",
    "port zero": "http://public.example:0/",
    "port too large": "http://public.example:65616/",
    "gopher": "gopher://127.0.0.1:{port}/_SLAVEOF",
    "ftp": "ftp://127.0.0.1:{port}/x",
    "file by host": "file://127.0.0.1:{port}/etc/passwd",
    "data": "data:video/mp4;base64,AAAA",
}


def names(host: str) -> list[str]:
    """A resolver that knows a few names, and localhost as the system does."""
    if host == "localhost":
        return system_resolve(host)
    if host not in NAMES:
        raise socket.gaierror(socket.EAI_NONAME, "not known")
    return NAMES[host]


def get(egress: Egress, url: str, *, seconds: float = 60.0, **options) -> bytes:
    """One GET, its whole body."""
    with egress.request(
        "GET",
        egress.target(url),
        headers={},
        deadline=time.monotonic() + seconds,
        allowance=options.pop("allowance", 1 << 20),
        **options,
    ) as answer:
        return b"".join(iter(lambda: answer.read(4096), b""))


@pytest.fixture
def web():
    with serving(lambda request: reply(200, b"hello")) as web:
        yield web


def guarded(web: Web, **options) -> Egress:
    """The guard as it is in production, but that every connection it makes ends at the server."""
    settings = Settings(fetch_ports=(80, 443, web.port), **options.pop("settings", {}))
    return Egress(settings, **({"resolve": names, "connect": web.leading_to()} | options))


class TestTricks:
    @pytest.mark.parametrize("trick", TRICKS)
    def test_is_refused_and_nothing_connects(self, web, trick):
        """The server that would have answered was never called."""
        with pytest.raises(EgressDenied):
            get(guarded(web), TRICKS[trick].format(port=web.port))

        assert (web.connections, web.requests) == (0, [])

    @pytest.mark.parametrize("url", ["http://public.example/", "http://bücher.example/a?b=c"])
    def test_the_same_guard_lets_a_public_name_through(self, web, url):
        """So that the tests above can fail."""
        assert get(guarded(web), url) == b"hello"
        assert web.connections == 1

    @pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
    def test_allow_private_addresses_lifts_the_check(self, web, host):
        """And reaches loopback by the real resolver and connector."""
        egress = Egress(Settings(fetch_ports=(web.port,), allow_private_addresses=True))

        assert get(egress, f"http://{host}:{web.port}/") == b"hello"

    @pytest.mark.parametrize(
        "trick",
        [
            "decimal",
            "short",
            "user",
            "tab",
            "header injection",
            "another port",
            "gopher",
            "metadata",
            "metadata mapped",
            "metadata IPv6",
            "metadata record",
            "metadata at a public address",
        ],
    )
    def test_it_lifts_nothing_else(self, web, trick):
        """Text, port and cloud metadata are judged still."""
        egress = guarded(web, settings={"allow_private_addresses": True})
        with pytest.raises(EgressDenied):
            get(egress, TRICKS[trick].format(port=web.port))

        assert web.connections == 0


class TestPinning:
    def test_the_second_answer_of_a_rebinding_name_is_never_asked_for(self, web):
        """The connection goes to the address that was judged."""
        answers, seen = [[PUBLIC], ["127.0.0.1"]], []
        egress = guarded(web, resolve=lambda _: answers.pop(0), connect=web.leading_to(seen))
        get(egress, "http://rebind.example/")

        assert seen == [PUBLIC]
        assert answers == [["127.0.0.1"]]
        assert web.requests[0].headers["host"] == "rebind.example"

    def test_the_next_request_asks_and_judges_anew(self, web):
        """A redirect is one."""
        answers = [[PUBLIC], ["127.0.0.1"]]
        egress = guarded(web, resolve=lambda _: answers.pop(0))
        get(egress, "http://rebind.example/")
        with pytest.raises(EgressDenied, match=r"rebind.example is at 127.0.0.1"):
            get(egress, "http://rebind.example/")

        assert web.connections == 1

    def test_the_next_address_is_tried_when_one_does_not_answer(self, web):
        """In the resolver's order."""
        seen = []

        def connect(address: str, port: int, timeout: float) -> socket.socket:
            seen.append(address)
            if address == PUBLIC:
                raise ConnectionRefusedError("nobody there")
            return web.leading_to()(address, port, timeout)

        assert get(guarded(web, connect=connect), "http://two.example/") == b"hello"
        assert NAMES["two.example"] == seen

    def test_what_is_sent_names_host_and_nothing_of_ours(self, web):
        """No cookie, no credentials; the port only where it is not the scheme's."""
        get(guarded(web), f"http://public.example:{web.port}/a%20b?c=ü")
        [request] = web.requests

        assert request.path == "/a%20b?c=%C3%BC"
        assert request.headers == {
            "host": f"public.example:{web.port}",
            "connection": "close",
            "user-agent": "ralf",
        }


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> str:
    """A self-signed certificate of secure.example with its key, made for this run."""
    folder = tmp_path_factory.mktemp("tls")
    both = folder / "both.pem"
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 "
        "-subj /CN=secure.example -addext subjectAltName=DNS:secure.example"
    )
    try:
        run = subprocess.run(
            [*command.split(), "-keyout", folder / "key.pem", "-out", folder / "cert.pem"],
            capture_output=True,
        )
    except FileNotFoundError:
        pytest.skip("no openssl program to make a certificate with")
    assert run.returncode == 0, run.stderr
    both.write_bytes((folder / "cert.pem").read_bytes() + (folder / "key.pem").read_bytes())
    return str(both)


class TestTls:
    @pytest.fixture
    def secure(self, certificate):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        asked: list[str | None] = []
        context.sni_callback = lambda _, name, __: asked.append(name)
        with serving(lambda request: reply(200, b"secret"), tls=context) as web:
            yield web, asked

    def trusting(self, web: Web, certificate: str | None) -> Egress:
        resolve = {"secure.example": [PUBLIC], "other.example": [PUBLIC]}.__getitem__
        tls = ssl.create_default_context(cafile=certificate)
        return Egress(Settings(), resolve=resolve, connect=web.leading_to(), tls=tls)

    def test_the_certificate_is_checked_against_the_name(self, secure, certificate):
        """Though the connection goes to an address."""
        web, asked = secure

        assert get(self.trusting(web, certificate), "https://secure.example/") == b"secret"
        assert asked == ["secure.example"]
        assert web.requests[0].headers["host"] == "secure.example"

    @pytest.mark.parametrize(
        ("host", "trusted"), [("other.example", True), ("secure.example", False)]
    )
    def test_another_name_or_an_unknown_issuer_is_no_connection(
        self, secure, certificate, host, trusted
    ):
        """And no request is sent."""
        web, _ = secure
        with pytest.raises(EgressFailed, match="certificate verify failed"):
            get(self.trusting(web, certificate if trusted else None), f"https://{host}/")

        assert web.requests == []


class TestPatience:
    @pytest.mark.parametrize(
        "slow",
        [
            ([b"H"], [600.0]),
            ([b"HTTP/1.1 200 X\r\n"], [b"X-A: 1\r\n", 0.2]),
            ([b"HTTP/1.1 200 X\r\nContent-Length: 1000000\r\n\r\n"], [b"x", 0.05]),
            ([], [b"HTTP/1.1 100 Continue\r\n\r\n", 0.05]),
        ],
        ids=["silent", "headers", "body", "100 Continue"],
    )
    def test_who_trickles_is_cut_off_at_the_deadline(self, slow):
        """However often a byte comes; left alone it would come for ever."""
        first, then = slow
        with serving(lambda request: itertools.chain(first, for_ever(*then))) as web:
            with pytest.raises(EgressFailed, match="longer than is allowed"):
                get(guarded(web), "http://public.example/", seconds=0.4)

    def test_a_silence_is_cut_off_before_the_deadline(self, monkeypatch):
        """After IDLE_S."""
        monkeypatch.setattr("ralf.worker.service.egress.IDLE_S", 0.3)
        monkeypatch.setattr("ralf.worker.service.egress.WAIT_S", 0.1)
        with serving(lambda request: [600.0]) as web:
            with pytest.raises(EgressFailed, match="said nothing"):
                get(guarded(web), "http://public.example/")

    def test_more_bytes_than_agreed_are_not_read(self):
        """Headers and framing count too."""
        endless = [b"HTTP/1.1 200 X\r\nTransfer-Encoding: chunked\r\n\r\n"]
        with serving(lambda request: endless + [b"1\r\nx\r\n" * 1000] * 1000) as web:
            with pytest.raises(EgressFailed, match="more than was agreed"):
                get(guarded(web), "http://public.example/", allowance=100_000)

    @pytest.mark.parametrize(
        "broken",
        [
            [b"HTTP/1.1 200 X\r\nContent-Length: 100\r\n\r\nshort"],
            [b"HTTP/1.1 200 X\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab"],
            [b"HTTP/1.1 200 X\r\nTransfer-Encoding: chunked\r\n\r\nnonsense\r\n"],
        ],
    )
    def test_a_body_that_breaks_off_is_an_error(self, broken):
        """Never half a file taken for a whole one."""
        with serving(lambda request: broken) as web:
            with pytest.raises(EgressFailed, match="broke off"):
                get(guarded(web), "http://public.example/")

    @pytest.mark.parametrize("junk", [b"", b"\0\1\2\3\r\n\r\n", b"SSH-2.0-x\r\n", b"X" * 70_000])
    def test_what_is_not_http_is_an_error(self, junk):
        """Not a crash."""
        with serving(lambda request: [junk]) as web:
            with pytest.raises(EgressFailed, match="did not answer"):
                get(guarded(web), "http://public.example/")

    def test_a_resolver_that_hangs_is_left_behind(self, web):
        """It has a thread of its own."""
        answered = threading.Event()
        egress = guarded(web, resolve=lambda _: answered.wait(600) and [])
        try:
            with pytest.raises(EgressFailed, match="could not be resolved in time"):
                get(egress, "http://public.example/", seconds=0.2)
        finally:
            answered.set()

    def test_an_unknown_name_may_be_asked_again(self, web):
        """DNS may be back."""
        with pytest.raises(EgressFailed, match=r"nobody.example could not be resolved"):
            get(guarded(web), "http://nobody.example/")

    def test_watch_is_called_while_nothing_comes(self):
        """What it raises goes through as it is."""

        class Enough(Exception):
            pass

        began = time.monotonic()

        def watch() -> None:
            if time.monotonic() - began > 0.2:
                raise Enough

        with serving(lambda request: [600.0]) as web:
            with pytest.raises(Enough):
                get(guarded(web), "http://public.example/", watch=watch)


class TestHosts:
    def test_only_listed_hosts_are_reached_where_there_is_a_list(self, web):
        """A dot before it means everything below."""
        egress = guarded(web, hosts=("public.example", ".nip.example"))

        assert egress.target("https://PUBLIC.example/").host == "public.example"
        assert egress.target("https://a.nip.example/").host == "a.nip.example"
        for host in (
            "evil.example",
            "public.example.evil.example",
            "a.public.example",
            "nip.example",
        ):
            with pytest.raises(EgressDenied, match="RALF_FETCH_HOSTS"):
                egress.target(f"https://{host}/")

    def test_a_target_shows_no_query(self):
        """A signed URL's query is a credential."""
        target = read_url("https://Public.example/a/b.mp4?X-Signature=secret")

        assert str(target) == "https://public.example/a/b.mp4"
        assert "secret" not in repr(target)
        assert target.url == "https://public.example/a/b.mp4?X-Signature=secret"

    def test_a_user_in_the_url_is_named_as_the_reason(self):
        """And not repeated: it may be a password."""
        with pytest.raises(EgressDenied, match="user before its host") as caught:
            read_url("https://me:hunter2@media.example/x.mp4")

        assert "hunter2" not in str(caught.value)

    def test_an_error_shows_no_query(self):
        """Nor do messages."""
        with serving(lambda request: [b"junk"]) as web:
            with pytest.raises(EgressFailed) as caught:
                get(guarded(web), "http://public.example/x?sig=secret")

        assert "secret" not in str(caught.value)


private = st.sampled_from(
    ["10.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "192.168.0.0/16"]
).flatmap(
    lambda network: st.integers(0, ipaddress.ip_network(network).num_addresses - 1).map(
        lambda place: ipaddress.ip_network(network)[place]
    )
)
spellings = st.sampled_from(
    [
        str,
        lambda a: str(int(a)),
        lambda a: hex(int(a)),
        lambda a: f"0{int(a):o}",
        lambda a: ".".join(hex(part) for part in a.packed),
        lambda a: ".".join(f"0{part:o}" for part in a.packed),
        lambda a: f"{a.packed[0]}.{int(a) & 0xFFFFFF}",
        lambda a: f"[::ffff:{a}]",
        lambda a: f"[::{a}]",
        lambda a: f"[64:ff9b::{a}]",
        lambda a: f"[{ipaddress.IPv6Address(0x2002 << 112 | int(a) << 80)}]",
        lambda a: f"[{ipaddress.IPv6Address(0x2606_4700 << 96 | 0x5EFE << 32 | int(a))}]",
    ]
)


class TestProperties:
    @given(private, spellings)
    def test_no_spelling_of_a_private_address_passes(self, address, spell):
        """Refused as a text or as an address, and never looked up."""

        def asked(host: str) -> list[str]:
            raise AssertionError(f"{host} was looked up")

        egress = Egress(Settings(), resolve=asked, tls=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
        with pytest.raises(EgressDenied):
            egress.addresses(egress.target(f"http://{spell(address)}/"), time.monotonic() + 60)

    @given(st.ip_addresses())
    def test_what_passes_is_global_for_python_too(self, address):
        """The list here is stricter than the standard library's, never laxer."""
        if refusal(str(address)) == "":
            assert address.is_global
            assert not address.is_multicast

    @given(st.ip_addresses(v=4))
    def test_hiding_an_address_in_ipv6_changes_nothing(self, address):
        """Mapped and NAT64 are the address itself."""
        refused = bool(refusal(str(address)))

        assert refused == bool(refusal(f"::ffff:{address}")) == bool(refusal(f"64:ff9b::{address}"))

    @given(st.text(max_size=60))
    def test_reading_a_url_gives_a_plain_target_or_refuses(self, text):
        """Read again it is the same, and it holds nothing that could end a header."""
        try:
            target = read_url("http://" + text)
        except EgressDenied:
            return

        assert target == read_url(target.url)
        assert isinstance(target, Target)
        assert target.url.isascii()
        assert not set(target.url) & set("\r\n\t \\\0")


def test_requests_are_counted(web):
    """The oracle of all of the above sees a request when there is one."""
    get(guarded(web), "http://public.example/seen")

    assert [Request("GET", "/seen", web.requests[0].headers, b"")] == web.requests
