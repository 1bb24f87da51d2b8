"""A webhook receiver: check the signature, handle each message once, answer fast.

    WEBHOOK_SECRETS="whsec_…" python docs/examples/webhook_receiver.py --port 8080

Prints one JSON line for each new message.  It accepts every secret in the list, separated by
spaces, which is how a secret is rotated.  It keeps the ids it has seen in a SQLite file, so that a
repeated message has no second effect, not even after a restart.  Put a TLS proxy before it.
"""

import argparse
import json
import os
import sqlite3
from http.server import BaseHTTPRequestHandler, HTTPServer

from standardwebhooks import Webhook, WebhookVerificationError

MOST_BYTES = 65536


def verified(secrets: list[str], body: bytes, headers: dict[str, str]) -> bool:
    """Whether one of the secrets signed this body less than five minutes ago."""
    for secret in secrets:
        try:
            Webhook(secret).verify(body, headers, json_parse=False)
        except (WebhookVerificationError, ValueError):  # ValueError: malformed headers
            continue
        return True
    return False


class Receiver(BaseHTTPRequestHandler):
    """Handles one webhook."""

    secrets: list[str]
    seen: sqlite3.Connection
    timeout = 10

    def do_POST(self) -> None:
        """Answer 2xx once the message is stored; after any other answer it is sent again."""
        size = self.headers.get("Content-Length", "")
        if not size.isdigit() or int(size) > MOST_BYTES:
            self._answer(413)
            return
        body = self.rfile.read(int(size))
        headers = {name.lower(): value for name, value in self.headers.items()}
        if not verified(self.secrets, body, headers):
            self._answer(401)
            return
        with self.seen:  # one transaction: the id is stored only if the effect succeeded
            new = self.seen.execute(
                "insert or ignore into seen values (?)", (headers["webhook-id"],)
            ).rowcount
            if new:
                handle(json.loads(body))
        self._answer(204)

    def _answer(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Print no access log, only messages."""


def handle(message: dict[str, object]) -> None:
    """Put your effect here.  The message is short: read the whole verdict by its job_id."""
    print(json.dumps(message), flush=True)


def main() -> None:
    """Serve webhooks until interrupted."""
    parser = argparse.ArgumentParser(description="Receive Ralf's webhooks.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--seen", default="seen.sqlite", help="the file that keeps the ids")
    options = parser.parse_args()
    Receiver.secrets = os.environ["WEBHOOK_SECRETS"].split()
    Receiver.seen = sqlite3.connect(options.seen)
    Receiver.seen.execute("create table if not exists seen (id text primary key)")
    with HTTPServer((options.host, options.port), Receiver) as server:
        print(json.dumps({"listening": server.server_address[1]}), flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
