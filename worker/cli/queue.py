"""The commands of the queue's clients: submit, status, result, cancel, watch.  Answers are JSON on
stdout, one document a line.  Exit codes: 2 for a wrong request, 4 for a job that ended without a
verdict, 5 where it may be tried again.

`ralf serve --embedded` writes its address to a file of the user's own, as long as it runs.  Only
commands read it, and only where neither --redis nor RALF_REDIS_URL names a Redis; a backend always
names its own.

Nothing heavy is imported until a command runs.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ralf.kernels.atomic_files import replace_text

if TYPE_CHECKING:
    from ralf.worker.client import Client

Run = Callable[["Client", argparse.Namespace], int]
"""A command, given the client of the queue that --redis or RALF_REDIS_URL names."""
CLIENT_CODES = (
    "Exit codes: 0 done; 2 a wrong request, no such job, or a job that has not ended; 4 the job "
    "ended without a verdict; 5 another try may succeed: Redis does not answer, the time of --wait "
    "is over, or what the job needed was out of reach."
)


def commands(subparsers: Any) -> None:
    """Add them all."""
    for add in (_submit, _ask):
        add(subparsers)


def answering(run: Run) -> Callable[[argparse.Namespace], int]:
    """Wrap a client's command: exit 2 for a wrong request, 4 for a job that has no verdict and
    would have none if it ran again, else what other errors give."""

    def answer(args: argparse.Namespace) -> int:
        from pydantic import ValidationError

        from ralf.worker import client
        from ralf.worker.contract import first_fault
        from ralf.worker.errors import Interrupted, by_code

        try:
            with _client_at(args) as connected:
                return run(connected, args)
        except ValidationError as error:
            print(f"ralf: {first_fault(error)}", file=sys.stderr)
            return 2
        # Before NotFinished, its base: this one may be tried again, so it exits with 5.
        except client.TimedOut:
            raise
        except client.JobFailed as error:
            # Another run may succeed: 5, not 4.
            if issubclass(by_code().get(error.code, object), Interrupted):
                raise
            print(f"ralf: {error}", file=sys.stderr)
            return 4
        except (
            client.InvalidRequest,
            client.IdempotencyConflict,
            client.NotFound,
            client.NotFinished,
        ) as error:
            print(f"ralf: {error}", file=sys.stderr)
            return 2

    return answer


@contextmanager
def _client_at(args: argparse.Namespace) -> Iterator["Client"]:
    """The client at --redis or RALF_REDIS_URL, closed at the end."""
    from ralf.worker.client import connect

    client = connect(address_of(args))
    try:
        yield client
    finally:
        client.close()


def address_of(args: argparse.Namespace) -> str | None:
    """--redis; or, where RALF_REDIS_URL names none, the service that runs here; else None."""
    from ralf.worker.settings import values_of

    if args.redis or "RALF_REDIS_URL" in values_of(os.environ):
        return str(args.redis) if args.redis else None
    return served_here()


def redis_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--redis", metavar="URL", help="use the Redis at this address instead of RALF_REDIS_URL"
    )


def print_document(document: Any) -> None:
    """One line of JSON, at once."""
    print(json.dumps(document, default=str), flush=True)


def _serving_file() -> Path:
    private = os.environ.get("XDG_RUNTIME_DIR")
    folder = Path(private) if private and Path(private).is_dir() else Path(tempfile.gettempdir())
    return folder / f"ralf-serving-{os.getuid()}"


@contextmanager
def announced(url: str) -> Iterator[None]:
    """Let commands of this user find the service at that socket while the block runs."""
    file = _serving_file()
    # In a shared folder the name may be another user's, who cannot be replaced: commands then need
    # the address, which `serve` prints.
    with suppress(OSError):
        replace_text(file, url)
    try:
        yield
    finally:
        # A service that was started later has put its own address there.
        if served_here() == url:
            file.unlink(missing_ok=True)


def served_here() -> str | None:
    """The address of the embedded service that this user runs here; None where there is none."""
    try:
        # No link is followed: it could lead to a file of ours that somebody else has chosen.
        with os.fdopen(
            os.open(_serving_file(), os.O_RDONLY | os.O_NOFOLLOW), encoding="utf-8"
        ) as file:
            if os.fstat(file.fileno()).st_uid != os.getuid():
                return None
            url = file.read().strip()
    except (OSError, UnicodeDecodeError):
        return None
    return url if Path(url.removeprefix("unix://")).is_socket() else None


def _submit(subparsers: Any) -> None:
    submit = subparsers.add_parser(
        "submit",
        help="put videos into the queue; print their jobs, or with --wait their verdicts",
        epilog=CLIENT_CODES,
    )
    submit.add_argument(
        "uris",
        nargs="+",
        metavar="URI",
        help="an http(s), s3, gs or file URI, or a path, that the workers can read",
    )
    submit.add_argument(
        "--token",
        help="your own id of the upload: sent again, it finds the same job; with several URIs it "
        "is the beginning of each token (default: made from the URI)",
    )
    submit.add_argument("--tag", help="your own text, which the verdict repeats")
    submit.add_argument("--tenant", default="default", help="whose job it is; tenants take turns")
    submit.add_argument(
        "--priority",
        choices=("high", "default", "backfill"),
        default="default",
        help="high has workers of its own; backfill waits until no other job does",
    )
    submit.add_argument(
        "--max-frames",
        type=int,
        metavar="N",
        help="judge at most N frames of each video (default: what the model says)",
    )
    submit.add_argument(
        "--stop-early",
        type=float,
        metavar="SCORE",
        help="stop once one person's score over 8 faces is SCORE (0 to 1) or more (default: judge "
        "the whole video)",
    )
    submit.add_argument(
        "--callback", metavar="URL", help="push the end of the job to this address as a webhook"
    )
    submit.add_argument(
        "--secret-id",
        default="default",
        metavar="ID",
        help="which secret of RALF_WEBHOOK_SECRETS signs the webhook",
    )
    submit.add_argument(
        "--wait",
        type=float,
        metavar="SECONDS",
        help="wait up to so many seconds for each job, and print its verdict",
    )
    redis_option(submit)
    submit.set_defaults(run=answering(_run_submit))


def _run_submit(client: "Client", args: argparse.Namespace) -> int:
    from ralf.worker.client import request
    from ralf.worker.contract import Callback, EarlyStop, Sampling, dump

    uris = [_uri(name) for name in args.uris]
    tokens = _tokens(args.token, uris)
    sampling = None if args.max_frames is None else Sampling(max_frames=args.max_frames)
    stop_early = None if args.stop_early is None else EarlyStop(score=args.stop_early)
    callback = Callback(url=args.callback, secret_id=args.secret_id) if args.callback else None
    asked = [
        request(
            uri,
            token=token,
            tag=args.tag,
            tenant=args.tenant,
            priority=args.priority,
            sampling=sampling,
            stop_early=stop_early,
            callback=callback,
        )
        for uri, token in zip(uris, tokens, strict=True)
    ]
    # Every request was checked above, so that none is sent when one of them is wrong.
    submissions = client.submit_many(asked)
    if args.wait is None:
        for uri, made in zip(uris, submissions, strict=True):
            print_document(
                {
                    "job_id": made.job_id,
                    "state": made.state,
                    "existing": made.existing,
                    "uri": uri,
                }
            )
        return 0
    for made in submissions:
        print(dump(client.result(made.job_id, timeout=args.wait)), flush=True)
    return 0


def _uri(name: str) -> str:
    """Make a path a file: URI; anything with a scheme stays as it is."""
    return name if "://" in name else Path(name).resolve().as_uri()


def _tokens(token: str | None, uris: list[str]) -> list[str]:
    """One for each; from the URI's hash, since a URI may be long, and signed: a credential."""
    if token is not None and len(uris) == 1:
        return [token]
    prefix = token or "uri"
    return [f"{prefix}:{hashlib.sha256(uri.encode()).hexdigest()[:32]}" for uri in uris]


def _ask(subparsers: Any) -> None:
    """status, result, cancel, watch: one job each."""
    table: list[tuple[str, str, Run]] = [
        ("status", "print a job's state, progress and failure", _run_status),
        ("result", "print a job's verdict", _run_result),
        ("cancel", "cancel a job that has not ended", _run_cancel),
        ("watch", "print a job's state at each change, until it ends", _run_watch),
    ]
    for name, help_text, run in table:
        parser = subparsers.add_parser(name, help=help_text, epilog=CLIENT_CODES)
        parser.add_argument("job", metavar="JOB", help="the job's id, which `ralf submit` printed")
        if name == "result":
            parser.add_argument(
                "--wait",
                type=float,
                metavar="SECONDS",
                help="wait up to so many seconds for the verdict (default: do not wait)",
            )
            parser.add_argument(
                "--report", metavar="PAGE", help="write the verdict to this HTML page as well"
            )
        if name == "watch":
            parser.add_argument(
                "--wait",
                type=float,
                metavar="SECONDS",
                help="give up after so many seconds (default: never)",
            )
        redis_option(parser)
        parser.set_defaults(run=answering(run))


def _run_status(client: "Client", args: argparse.Namespace) -> int:
    print_document(client.status(args.job).model_dump(mode="json"))
    return 0


def _run_result(client: "Client", args: argparse.Namespace) -> int:
    from ralf.worker.contract import Evidence, dump

    verdict = client.result(args.job, timeout=args.wait)
    print(dump(verdict), flush=True)
    if args.report:
        from ralf.worker.page.page import page  # Jinja2: a backend may not have it

        # Not client.evidence(), which raises where none is kept: the page needs no pictures.
        kept = client.store.evidence(args.job)
        replace_text(Path(args.report), page(verdict, kept or Evidence()))
    return 0


def _run_cancel(client: "Client", args: argparse.Namespace) -> int:
    print_document({"job_id": args.job, "state": client.cancel(args.job)})
    return 0


def _run_watch(client: "Client", args: argparse.Namespace) -> int:
    for status in client.watch(args.job, timeout=args.wait):
        print_document(status.model_dump(mode="json"))
    return 0
