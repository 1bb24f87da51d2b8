"""A webhook receiver: check the signature, take each message once, answer fast.

    WEBHOOK_SECRETS="whsec_…" python docs/examples/webhook_receiver.py --port 8080

Prints one JSON line for each new message.  Several secrets, separated by spaces, are all accepted:
so a secret is rotated.  Ids that were seen are kept in a SQLite file, so that a push which is
repeated, even after a restart, has no second effect.  Put TLS before it.
"""

import argparse
import json
import os
import sqlite3
from http.server import BaseHTTPRequestHandler, HTTPServer

from standardwebhooks import Webhook, WebhookVerificationError

MOST_BYTES = 65536


def verified(secrets: list[str], body: bytes, headers: dict[str, str]) -> bool:
    """Whether one of the secrets made one of the signatures, less than five minutes ago."""
    for secret in secrets:
        try:
            Webhook(secret).verify(body, headers, json_parse=False)
        except (WebhookVerificationError, ValueError):  # ValueError: headers that are no signature
            continue
        return True
    return False


class Receiver(BaseHTTPRequestHandler):
    """One push."""

    secrets: list[str]
    seen: sqlite3.Connection
    timeout = 10

    def do_POST(self) -> None:
        """2xx says that the message is ours now; anything else, and it comes again."""
        size = self.headers.get("Content-Length", "")
        if not size.isdigit() or int(size) > MOST_BYTES:
            self._answer(413)
            return
        body = self.rfile.read(int(size))
        headers = {name.lower(): value for name, value in self.headers.items()}
        if not verified(self.secrets, body, headers):
            self._answer(401)
            return
        with self.seen:  # one transaction: the id is kept only if the effect was made
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
        """Only messages are printed."""


def handle(message: dict[str, object]) -> None:
    """Your effect. The message is thin: get the verdict by its job_id where you need all of it."""
    print(json.dumps(message), flush=True)


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description="Receive Ralf's webhooks.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--seen", default="seen.sqlite", help="where ids are kept")
    options = parser.parse_args()
    Receiver.secrets = os.environ["WEBHOOK_SECRETS"].split()
    Receiver.seen = sqlite3.connect(options.seen)
    Receiver.seen.execute("create table if not exists seen (id text primary key)")
    with HTTPServer((options.host, options.port), Receiver) as server:
        print(json.dumps({"listening": server.server_address[1]}), flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
