"""A web server on loopback that answers exactly what a test tells it to, with bytes and pauses."""

import contextlib
import itertools
import socket
import socketserver
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

Piece = bytes | float
"""Bytes to send, or seconds to wait."""
PUBLIC = "93.184.216.34"
"""Stands for any public address; `leading_to` connects it to the test's server."""


@dataclass(frozen=True)
class Request:
    """A request that arrived."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes = field(repr=False)


def reply(status: int = 200, body: bytes = b"", /, **headers: str) -> list[Piece]:
    """A whole HTTP response; in header names write _ for -."""
    given = {"Content-Length": str(len(body))}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    head = "".join(f"{name}: {value}\r\n" for name, value in given.items())
    return [f"HTTP/1.1 {status} X\r\n{head}\r\n".encode(), body]


def for_ever(*pieces: Piece) -> Iterator[Piece]:
    """Repeat the pieces until the other side hangs up; the answer never ends by itself, so that a
    test does not depend on the speed of the machine."""
    return itertools.cycle(pieces)


class Web:
    """What the server saw: connections and requests."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.connections = 0
        self.requests: list[Request] = []

    @property
    def url(self) -> str:
        """The server's address, without a slash at the end."""
        return f"http://127.0.0.1:{self.port}"

    def leading_to(self, seen: list[str] | None = None) -> Callable[..., socket.socket]:
        """A connect function that always connects to this server, whatever address it is given."""

        def connect(address: str, port: int, timeout: float) -> socket.socket:
            if seen is not None:
                seen.append(address)
            return socket.create_connection(("127.0.0.1", self.port), timeout)

        return connect


@contextlib.contextmanager
def serving(
    answer: Callable[[Request], Iterable[Piece]], tls: ssl.SSLContext | None = None
) -> Iterator[Web]:
    """Serve on a free port while the block runs."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            web.connections += 1
            line: Any = self.request
            try:
                if tls is not None:
                    line = tls.wrap_socket(self.request, server_side=True)
                with contextlib.closing(line):
                    line.settimeout(60)
                    request = _read(line)
                    web.requests.append(request)
                    for piece in answer(request):
                        if isinstance(piece, bytes):
                            line.sendall(piece)
                        elif closing.wait(piece):
                            break
            except (OSError, ValueError):
                pass  # the other side hung up, which many of these tests expect

    closing = threading.Event()

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        block_on_close = False

    with Server(("127.0.0.1", 0), Handler) as server:
        web = Web(server.server_address[1])
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield web
        closing.set()
        server.shutdown()
        thread.join()


def _read(line: socket.socket) -> Request:
    head = b""
    while b"\r\n\r\n" not in head:
        part = line.recv(65536)
        if not part:
            raise ValueError("hung up before the request was whole")
        head += part
    text, _, body = head.partition(b"\r\n\r\n")
    first, *rest = text.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (h.partition(":") for h in rest)}
    while len(body) < int(headers.get("content-length", 0)):
        body += line.recv(65536)
    method, path, _ = first.split(" ")
    return Request(method, path, headers, body)


def get(port: int, path: str) -> tuple[int, str]:
    """Status and body."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def free_port() -> int:
    """A port that nobody has."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
