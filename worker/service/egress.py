"""The guarded HTTP client: the only way to the network for uploads and webhooks.

A URL comes from a tenant, so it may point to any host.  Its text, its host and port, and every
address of its name are judged (url_policy.py), each time anew and also at each redirect, since a
redirect is only one more URL.  One address that is not public refuses the whole name.

The name is resolved once and the connection goes to that address: a second answer (DNS rebinding)
is never asked for.  TLS still checks the certificate against the name.  No proxy is used and no
cookie kept.  A deadline bounds the whole exchange, IDLE_S each silence, an allowance the bytes.

allow_private_addresses lifts the check of the address only, and not for cloud metadata.
"""

import io
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from http.client import HTTPConnection, HTTPException, HTTPResponse
from types import TracebackType
from typing import Any, Self, cast

from ralf.worker.errors import RalfError
from ralf.worker.service.url_policy import EgressDenied, Target, read_url, refusal
from ralf.worker.settings import Settings

__all__ = [
    "AddressDenied",
    "Answer",
    "Egress",
    "EgressDenied",
    "EgressFailed",
    "Target",
    "UnknownHost",
]

CONNECT_S = 10.0
IDLE_S = 20.0
"""The longest silence; the deadline bounds what trickles."""
# How often `watch` is called while nothing comes, and the most that drain() may take.
WAIT_S = 1.0
AGENT = "ralf"
# All of a name's addresses are judged; only so many are tried.
MOST_ADDRESSES = 16

NO_SUCH_NAME = frozenset({socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)})
"""The resolver's final answers; the others are its own troubles."""

Resolve = Callable[[str], Sequence[str]]
"""A name's addresses; raises OSError."""
Connect = Callable[[str, int, float], socket.socket]
"""An address, a port and at most so many seconds."""


class AddressDenied(EgressDenied):
    """The host's address is forbidden; the message has it, and is for the operator only."""


class EgressFailed(RalfError):
    """The network or the other side failed; asking again may help."""


class UnknownHost(EgressFailed):
    """The resolver says that there is no such name; until it says so, asking again may help."""


def system_resolve(host: str) -> list[str]:
    """The system resolver's answer, each address once."""
    # Without a type each address would come once for every kind of socket.
    infos = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(info[4][0]) for info in infos))


def tcp_connect(address: str, port: int, timeout_s: float) -> socket.socket:
    """A connection to an address; nothing is looked up."""
    return socket.create_connection((address, port), timeout_s)


@lru_cache(maxsize=1)
def _system_tls() -> ssl.SSLContext:
    """The system's certificate authorities, read once: that takes longer than many a download."""
    return ssl.create_default_context()


class _BoundedSocket:
    """A socket with a deadline, an idle bound and an allowance of bytes, for http.client.

    Its owner closes the socket; http.client must not, since it reads on after its own close().
    """

    def __init__(
        self, sock: socket.socket, deadline: float, allowance: int, watch: Callable[[], None]
    ) -> None:
        self.sock, self.deadline, self.allowance, self.watch = sock, deadline, allowance, watch

    def _arm(self, since: float) -> None:
        now = time.monotonic()
        if now >= self.deadline:
            raise TimeoutError("took longer than is allowed in all")
        if now - since >= IDLE_S:
            raise TimeoutError(f"said nothing for {IDLE_S:g} s")
        self.watch()
        # Short, so that the next round calls watch again.
        self.sock.settimeout(min(WAIT_S, self.deadline - now))

    def _patiently(self, act: Callable[[], int]) -> int:
        since = time.monotonic()
        while True:
            self._arm(since)
            try:
                return act()
            except TimeoutError:
                continue

    def sendall(self, data: bytes) -> None:
        # Not sock.sendall(): after a timeout it does not say how much was sent.
        rest = memoryview(data)
        while rest:
            part = rest
            rest = rest[self._patiently(lambda part=part: self.sock.send(part)) :]  # type: ignore[misc]

    def receive(self, buffer: Any) -> int:
        got = self._patiently(lambda: self.sock.recv_into(buffer))
        self.allowance -= got
        if self.allowance < 0:
            raise OSError("sent more than was agreed")
        return got

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(_SocketReader(self), 1 << 16)

    def close(self) -> None:
        """The owner closes it."""


class _SocketReader(io.RawIOBase):
    def __init__(self, line: _BoundedSocket) -> None:
        self._line = line

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._line.receive(buffer)


class Answer:
    """A response whose body is still to be read; close it."""

    def __init__(self, target: Target, response: HTTPResponse, line: _BoundedSocket) -> None:
        self.target, self.status = target, response.status
        self._response, self._line = response, line
        self.length = response.length
        """Bytes of the body, where the server said."""
        self._read = 0

    def header(self, name: str) -> str:
        """The header's value, empty without it."""
        return self._response.headers.get(name) or ""

    def read(self, most: int) -> bytes:
        """Some bytes, as they come; b"" at the body's end. EgressFailed when it breaks off."""
        try:
            # read1 gives what has come; read would wait until there are `most` bytes.
            part = self._response.read1(most)
        except (OSError, HTTPException, ValueError) as error:
            raise EgressFailed(f"{self.target} broke off: {_named(error)}") from error
        self._read += len(part)
        # The end of the connection gives b"" too, also when it comes too early.
        if not part and self.length is not None and self._read < self.length:
            raise EgressFailed(f"{self.target} broke off: {self._read} of {self.length} bytes came")
        return part

    def drain(self, most: int) -> None:
        """Read and drop the body for a moment, so that the other side can finish sending."""
        self._line.deadline = min(self._line.deadline, time.monotonic() + WAIT_S)
        # The status is known already: a body that breaks off changes nothing.
        with suppress(EgressFailed):
            while self._read < most and self.read(most):
                pass

    def close(self) -> None:
        """Close the connection."""
        self._response.close()
        self._line.sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Egress:
    """The client; it holds no connection and is safe to share between threads."""

    def __init__(
        self,
        settings: Settings,
        *,
        hosts: Sequence[str] = (),
        resolve: Resolve = system_resolve,
        connect: Connect = tcp_connect,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._private = settings.allow_private_addresses
        self._ports = settings.fetch_ports
        self._hosts = tuple(host.lower() for host in hosts)
        self._resolve, self._connect = resolve, connect
        self._tls = tls

    def target(self, url: str) -> Target:
        """The URL, if its text, host and port are allowed; its name is not resolved yet."""
        target = read_url(url)
        if target.port not in self._ports:
            allowed = ", ".join(map(str, self._ports))
            raise EgressDenied(f"port {target.port} is not among the allowed {allowed}")
        if self._hosts and not any(
            target.host.endswith(host) if host.startswith(".") else target.host == host
            for host in self._hosts
        ):
            raise EgressDenied(f"{target.host} is not among the hosts of RALF_FETCH_HOSTS")
        return target

    def addresses(self, target: Target, deadline: float) -> list[str]:
        """The host's addresses, resolved once; raises EgressDenied if one is not allowed."""
        try:
            found = [str(ipaddress.ip_address(target.host))]
        except ValueError:
            found = self._resolved(target.host, deadline)
        for address in found:
            why = refusal(address, private=self._private)
            if why:
                raise AddressDenied(f"{target.host} is at {address}, {why}")
        return found[:MOST_ADDRESSES]

    def _resolved(self, host: str, deadline: float) -> list[str]:
        """The system's resolver has no deadline of its own: a thread waits for it."""
        found: list[Sequence[str] | OSError] = []

        def ask() -> None:
            try:
                found.append(self._resolve(host))
            except OSError as error:
                found.append(error)
            except UnicodeError as error:  # a label that no resolver takes
                found.append(socket.gaierror(socket.EAI_NONAME, str(error)))

        # A daemon: one that hangs is left behind, and the process can still end.
        asking = threading.Thread(target=ask, name="resolve", daemon=True)
        asking.start()
        asking.join(max(0.0, min(CONNECT_S, deadline - time.monotonic())))
        if not found:
            raise EgressFailed(f"{host} could not be resolved in time")
        if isinstance(found[0], OSError) or not found[0]:
            unknown = not found[0] or getattr(found[0], "errno", None) in NO_SUCH_NAME
            kind = UnknownHost if unknown else EgressFailed
            raise kind(f"{host} could not be resolved: {found[0] or 'no address'}")
        return list(found[0])

    def request(
        self,
        method: str,
        target: Target,
        *,
        headers: Mapping[str, str],
        deadline: float,
        allowance: int,
        body: bytes | None = None,
        watch: Callable[[], None] = lambda: None,
    ) -> Answer:
        """One exchange, up to the response's headers; redirects are left to the caller.

        deadline is by time.monotonic(); watch is called at least each second and may raise.
        """
        addresses = self.addresses(target, deadline)
        sock = self._connected(target, addresses, deadline, watch)
        try:
            connection = HTTPConnection(target.host, target.port)
            line = _BoundedSocket(sock, deadline, allowance, watch)
            # http.client only writes and parses: given a socket, it does not connect.
            connection.sock = cast(Any, line)
            # Without its own headers: Host must be as in the URL that was judged.
            connection.putrequest(method, target.path, skip_host=True, skip_accept_encoding=True)
            given = {
                "Host": target.authority,
                "Connection": "close",
                "User-Agent": AGENT,
                **headers,
            }
            if body is not None:
                given["Content-Length"] = str(len(body))
            for name, value in given.items():
                connection.putheader(name, value)
            connection.endheaders(body)
            return Answer(target, connection.getresponse(), line)
        except (OSError, HTTPException, ValueError) as error:
            sock.close()
            raise EgressFailed(f"{target} did not answer: {_named(error)}") from error
        except BaseException:  # what watch raised goes through
            sock.close()
            raise

    def _connected(
        self, target: Target, addresses: Sequence[str], deadline: float, watch: Callable[[], None]
    ) -> socket.socket:
        """To the first address that takes the connection."""
        last: Exception = TimeoutError("took longer than is allowed in all")
        for address in addresses:
            watch()
            left = min(CONNECT_S, deadline - time.monotonic())
            if left <= 0:
                break
            try:
                sock = self._connect(address, target.port, left)
            except OSError as error:
                last = error
                continue
            if target.scheme == "http":
                return sock
            try:
                # Never 0: the socket would be non-blocking, and the handshake would fail at once.
                sock.settimeout(max(0.001, min(CONNECT_S, deadline - time.monotonic())))
                return (self._tls or _system_tls()).wrap_socket(sock, server_hostname=target.host)
            except (OSError, ValueError) as error:
                sock.close()
                last = error
        raise EgressFailed(f"{target} could not be reached: {_named(last)}") from last


def _named(error: Exception) -> str:
    # http.client quotes what the server sent, which may be long.
    return f"{type(error).__name__}: {error}"[:200]
