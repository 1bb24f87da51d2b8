"""The platform's webhook receiver of a chaos run: it records every push, and fails some of them.

It listens on two ports of loopback.  The steady one takes every push at once; the unreliable one
answers some pushes with 500 and lets others run into the pusher's timeout, each delivery at most
`refusals` times, so that it gets through in the end.  Every push is checked as the standard says
and kept: when it came, its id, its body, whether its signature is right, what was answered.
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
REFUSED_SHARE = 0.4
"""Of the pushes that may still be refused, this share is."""
DELAY_S = 0.1
"""It takes up to this long over a push, so that a deliverer may be killed in between."""
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
    """The pushes of one run, recorded by the servers' threads."""

    def __init__(self, secret: str, *, refusals: int, stall_s: float, seed: int = 0) -> None:
        self._hook = Webhook(secret)
        self._refusals, self._stall_s = refusals, stall_s
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._refused: Counter[str] = Counter()
        self._receipts: list[Receipt] = []
        self._open = 0
        self.steady = self.unreliable = ""
        """The addresses, while it is `listening`."""
        self.ports: tuple[int, ...] = ()

    @property
    def receipts(self) -> tuple[Receipt, ...]:
        """All that came in so far."""
        with self._lock:
            return tuple(self._receipts)

    @property
    def busy(self) -> bool:
        """Whether a push is recorded and not yet answered."""
        with self._lock:
            return self._open > 0

    @contextmanager
    def listening(self) -> Iterator["Receiver"]:
        """Both addresses are up while the block runs."""
        with ExitStack() as stack:
            steady = stack.enter_context(_serving(self, unreliable=False))
            unreliable = stack.enter_context(_serving(self, unreliable=True))
            self.steady = f"http://127.0.0.1:{steady}/hook"
            self.unreliable = f"http://127.0.0.1:{unreliable}/hook"
            self.ports = (steady, unreliable)
            yield self

    def take(
        self, message_id: str, headers: dict[str, str], body: bytes, *, unreliable: bool
    ) -> Answer:
        """Record a push, and decide how to answer it."""
        signed = True
        try:
            self._hook.verify(body.decode(), headers)
        except (WebhookVerificationError, ValueError):
            signed = False
        with self._lock:
            answer = self._answer_of(message_id) if unreliable else "taken"
            # Before the answer: a push counts even if its deliverer is killed while it waits.
            self._receipts.append(
                Receipt(time.time(), message_id, body.decode(errors="replace"), signed, answer)
            )
        return answer

    def delay(self, answer: Answer) -> None:
        """Wait before the answer: a moment, or longer than the deliverer waits."""
        with self._lock:
            self._open += 1
        # Outside the lock: a stalled push must not hold up the others.
        time.sleep(self._stall_s if answer == "stalled" else self._random.uniform(0.0, DELAY_S))
        with self._lock:
            self._open -= 1

    def _answer_of(self, message_id: str) -> Answer:
        if self._refused[message_id] >= self._refusals or self._random.random() > REFUSED_SHARE:
            return "taken"
        self._refused[message_id] += 1
        return self._random.choice(("failed", "failed", "stalled"))


@contextmanager
def _serving(receiver: Receiver, *, unreliable: bool) -> Iterator[int]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 10.0

        def do_POST(self) -> None:
            # A deliverer may be killed in the middle of its push: then nothing is recorded.
            with suppress(OSError):
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(min(length, MOST_BYTES))
                if len(body) == length:
                    self._answer(body)

        def _answer(self, body: bytes) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            message_id = headers.get("webhook-id", "")
            answer = receiver.take(message_id, headers, body, unreliable=unreliable)
            receiver.delay(answer)
            self.send_response(200 if answer == "taken" else 500)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Silent: the receipts are the log."""

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
