"""`make demo`: moderate the sample clips through a real queue; print verdicts, write their pages.

Starts a Redis, one worker, one deliverer and a receiver for webhooks on this machine, and ends all
of them.  Each clip is submitted as a backend would submit it.  Its verdict is read from the stream
and compared with the webhook that the receiver got.
"""

import json
import secrets
import sys
import tempfile
import threading
import time
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from standardwebhooks import Webhook

from demo.samples import make_samples
from ralf.kernels.artifact import ArtifactError, resolve
from ralf.kernels.atomic_files import replace_text
from ralf.worker.client import Client, connect
from ralf.worker.contract import Callback, Verdict
from ralf.worker.page.page import page
from ralf.worker.runtime import models_dir
from ralf.worker.service.embedded import embedded
from ralf.worker.settings import Settings

HERE = Path(__file__).resolve().parent
OUT = HERE / "out"
PATIENCE_S = 600.0


def main() -> int:
    """Run the demo; 1 when a verdict or its webhook is missing, 2 without the model."""
    given = Settings.from_environment()
    try:
        resolve(models_dir(given), given.model)
    except ArtifactError as error:
        say(str(error))
        return 2
    OUT.mkdir(exist_ok=True)
    say("making the sample clips")
    truth = make_samples(OUT / "clips")
    secret = "whsec_" + b64encode(secrets.token_bytes(32)).decode()
    with tempfile.TemporaryDirectory(prefix="ralf-demo-") as work, receiver(secret) as inbox:
        settings = replace(
            given,
            work_dir=work,
            file_roots=(str(OUT / "clips"),),
            webhook_secrets=(f"*/default={secret}",),
            allow_private_addresses=True,  # the receiver is on this machine
            fetch_ports=(inbox.port,),
            log_level="warning",
        )
        say("starting Redis, a worker and a deliverer; loading and checking the model")
        with embedded(settings) as service:
            client = connect(service.redis_url)
            missing = moderate(client, [clip.file for clip in truth], inbox)
    truths = {clip.file: clip.label for clip in truth}
    print(f"\nwhat the clips really are: {json.dumps(truths)}")
    print(f"pages: {OUT.relative_to(Path.cwd()) if OUT.is_relative_to(Path.cwd()) else OUT}/*.html")
    return 1 if missing else 0


def say(text: str) -> None:
    """Print a line of progress on stderr."""
    print(f"· {text}", file=sys.stderr, flush=True)


class Inbox:
    """The webhooks that arrived with a valid signature, by job."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.pushed: dict[str, dict[str, Any]] = {}
        self.arrived = threading.Condition()

    def put(self, data: dict[str, Any]) -> None:
        with self.arrived:
            self.pushed[data["job_id"]] = data
            self.arrived.notify_all()

    def wait_for(self, job_id: str, seconds: float) -> dict[str, Any] | None:
        with self.arrived:
            self.arrived.wait_for(lambda: job_id in self.pushed, seconds)
            return self.pushed.get(job_id)


@contextmanager
def receiver(secret: str) -> Iterator[Inbox]:
    """Run a backend's endpoint; it refuses every webhook without a valid signature."""
    check = Webhook(secret)

    class Endpoint(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            try:
                inbox.put(check.verify(body, dict(self.headers))["data"])
                self.send_response(204)
            except Exception as error:  # noqa: BLE001 - whatever is wrong with it, refuse it
                say(f"refused a webhook: {error}")
                self.send_response(400)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    inbox = Inbox(server.server_port)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield inbox
    finally:
        server.shutdown()
        server.server_close()


def moderate(client: Client, files: list[str], inbox: Inbox) -> int:
    """Submit the clips, print their verdicts; returns how many of them are missing."""
    callback = Callback(url=f"http://127.0.0.1:{inbox.port}/ralf")
    jobs = {}
    for name in files:
        uri = (OUT / "clips" / name).as_uri()
        made = client.submit(uri, token=f"demo-{time.time_ns()}", tag=name, callback=callback)
        jobs[made.job_id] = name
    print(f"{'clip':16} {'verdict':18} {'score':>6}  {'webhook':7} reason")
    missing = 0
    for verdict in from_stream(client, set(jobs)):
        job_id = verdict.job_id or ""
        push = inbox.wait_for(job_id, 30)
        agreed = push is not None and push["label"] == verdict.label
        missing += not agreed
        score = "–" if verdict.score is None else f"{verdict.score:.3f}"
        print(
            f"{jobs[job_id]:16} {verdict.label:18} {score:>6}  {'yes' if agreed else 'NO':7} "
            f"{verdict.reason}",
            flush=True,
        )
        for warning in verdict.warnings:
            print(f"{'':16} ! {warning}", flush=True)
        replace_text(OUT / f"{jobs[job_id]}.html", page(verdict, client.evidence(job_id)))
    return missing


def from_stream(client: Client, waiting: set[str]) -> Iterator[Verdict]:
    """Yield verdicts as the stream announces them, until every job has ended."""
    stream, last = client.store.key("verdicts"), "0"
    deadline = time.monotonic() + PATIENCE_S
    while waiting and time.monotonic() < deadline:
        for _, entries in client.store.redis.xread({stream: last}, block=1000) or ():
            for entry, fields in entries:
                last = entry
                job_id = fields[b"job_id"].decode()
                if job_id in waiting:
                    waiting.discard(job_id)
                    yield client.result(job_id)
    if waiting:
        raise SystemExit(f"no verdict within {PATIENCE_S:.0f} s for {sorted(waiting)}")


if __name__ == "__main__":
    sys.exit(main())
