"""A platform's webhook receiver as chaos needs it: it writes everything down and is moody.

It listens twice on loopback.  What is pushed to the steady address is taken at once; the moody one
answers some pushes with 500 and lets others run into the pusher's timeout, each delivery at most
`moods` times, so that it gets through in the end.  Every push is checked as the standard says and
kept: when it came, its id, its body, whether its signature is right, what was answered.
"""

import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

from standardwebhooks import Webhook, WebhookVerificationError

Answer = Literal["taken", "failed", "stalled"]
MOODY_SHARE = 0.4
"""Of the pushes that may be refused still, so many are."""
THINK_S = 0.1
"""It takes up to so long over a push: a deliverer may be killed just then."""
MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class Receipt:
    """One push as it came in."""

    at: float
    id: str
    body: str
    signed: bool
    """Whether the signature is right for this id, time and body."""
    answer: Answer


class Receiver:
    """The log of one run, filled by the servers' threads."""

    def __init__(self, secret: str, *, moods: int, stall_s: float, seed: int = 0) -> None:
        self._hook = Webhook(secret)
        self._moods, self._stall_s = moods, stall_s
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._refused: Counter[str] = Counter()
        self._receipts: list[Receipt] = []
        self._open = 0
        self.steady = self.moody = ""
        """The addresses, while it is `listening`."""
        self.ports: tuple[int, ...] = ()

    @property
    def receipts(self) -> tuple[Receipt, ...]:
        """All that came in so far."""
        with self._lock:
            return tuple(self._receipts)

    @property
    def busy(self) -> bool:
        """Whether a push is written down and not yet answered."""
        with self._lock:
            return self._open > 0

    @contextmanager
    def listening(self) -> Iterator["Receiver"]:
        """Both addresses are up while the block runs."""
        with ExitStack() as stack:
            steady = stack.enter_context(_serving(self, moody=False))
            moody = stack.enter_context(_serving(self, moody=True))
            self.steady = f"http://127.0.0.1:{steady}/hook"
            self.moody = f"http://127.0.0.1:{moody}/hook"
            self.ports = (steady, moody)
            yield self

    def take(self, message_id: str, headers: dict[str, str], body: bytes, *, moody: bool) -> Answer:
        """Write a push down, and say how it is to be answered."""
        signed = True
        try:
            self._hook.verify(body.decode(), headers)
        except (WebhookVerificationError, ValueError):
            signed = False
        with self._lock:
            answer = self._mood(message_id) if moody else "taken"
            self._receipts.append(
                Receipt(time.time(), message_id, body.decode(errors="replace"), signed, answer)
            )
        return answer

    def think(self, answer: Answer) -> None:
        """What a receiver does before it answers; or for longer than the pusher waits."""
        with self._lock:
            self._open += 1
        time.sleep(self._stall_s if answer == "stalled" else self._random.uniform(0.0, THINK_S))
        with self._lock:
            self._open -= 1

    def _mood(self, message_id: str) -> Answer:
        if self._refused[message_id] >= self._moods or self._random.random() > MOODY_SHARE:
            return "taken"
        self._refused[message_id] += 1
        return self._random.choice(("failed", "failed", "stalled"))


@contextmanager
def _serving(receiver: Receiver, *, moody: bool) -> Iterator[int]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 10.0

        def do_POST(self) -> None:
            # A pusher that was killed in the middle of its push is what all this is about.
            with suppress(OSError):
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(min(length, MOST_BYTES))
                if len(body) == length:
                    self._answer(body)

        def _answer(self, body: bytes) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            answer = receiver.take(headers.get("webhook-id", ""), headers, body, moody=moody)
            receiver.think(answer)
            self.send_response(200 if answer == "taken" else 500)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Silent; the receipts are the log."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True)
    thread.start()
    try:
        yield int(server.server_address[1])
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
