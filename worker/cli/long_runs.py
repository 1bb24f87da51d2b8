"""The commands that run for hours: backfill, stream.

Nothing heavy is imported until a command runs.
"""

import argparse
from typing import Any

from ralf.worker.cli.service import answering, client_at, redis_option


def commands(subparsers: Any) -> None:
    """Add them all."""
    _backfill(subparsers)
    _stream(subparsers)


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"should be 1 or more, got {text}")
    return number


def _backfill(subparsers: Any) -> None:
    backfill = subparsers.add_parser(
        "backfill",
        help="judge an archive again, behind all uploads",
        description="Judges every row of a manifest again through the queue, with the priority "
        "backfill: workers take such a job only when no upload waits. Stop it at any time; the "
        "same command goes on. The report is one JSON document on stdout.",
        epilog="exit codes: 0 every row has a verdict; 4 some rows failed; 5 the ledger or the "
        "manifest cannot be used; 130 stopped",
    )
    backfill.add_argument(
        "manifest",
        help="CSV with the column uri, and id, tenant, tag, old_label, old_score, old_model if "
        "you have them",
    )
    backfill.add_argument("--ledger", metavar="FILE", help="where ends are kept (MANIFEST.ledger)")
    backfill.add_argument(
        "--in-flight",
        type=_count,
        default=64,
        metavar="N",
        help="jobs queued at once (%(default)s)",
    )
    backfill.add_argument(
        "--retry-failed",
        nargs="?",
        const="all",
        metavar="CODES",
        help="give failed rows one more attempt: all, or codes such as fetch_failed,job_timeout",
    )
    backfill.add_argument(
        "--old",
        metavar="FILE",
        help="earlier verdicts to compare with: CSV with id (or uri), label, score, model, such "
        "as --results wrote, or verdicts as JSON lines, matched by tag",
    )
    backfill.add_argument("--report", metavar="FILE", help="write the report as JSON too")
    backfill.add_argument("--results", metavar="FILE", help="write every row's end as CSV")
    backfill.add_argument("--tenant", default="default", help="of rows that name none")
    backfill.add_argument("--model", metavar="NAME", help="name or name@version (the worker's)")
    backfill.add_argument("--max-frames", type=_count, metavar="N")
    redis_option(backfill)
    backfill.set_defaults(run=answering(_run_backfill))


def _run_backfill(args: argparse.Namespace) -> int:
    from ralf.worker.cli.backfill import run

    with client_at(args) as client:
        return run(client, args)


def _seconds(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"should be more than 0 seconds, got {text}")
    return number


def live_options(parser: argparse.ArgumentParser) -> None:
    """How a live source is read; `scan --live` has them too."""
    live = parser.add_argument_group("live source")
    live.add_argument(
        "--segment",
        type=_seconds,
        default=6.0,
        metavar="SECONDS",
        help="least length (%(default)g)",
    )
    live.add_argument(
        "--lag",
        choices=("drop", "wait"),
        help="when judging is too slow: drop the oldest segments (live sources), or let the "
        "source wait (files)",
    )
    live.add_argument(
        "--keep", type=_count, default=16, metavar="N", help="segments that may wait (%(default)s)"
    )
    live.add_argument(
        "--give-up", type=_seconds, default=300.0, metavar="SECONDS", help="without a connection"
    )
    live.add_argument(
        "--reencode", action="store_true", help="decode and encode, where key frames are too rare"
    )


def _stream(subparsers: Any) -> None:
    stream = subparsers.add_parser(
        "stream",
        help="judge a live stream through the queue, segment by segment",
        description="Cuts a live stream at its key frames and submits the segments as one session; "
        "prints the rolling verdict. The address is yours and not checked against private "
        "networks: never pass on one that a user gave.",
        epilog="Ctrl-C ends the session with its final verdict, a second one at once.",
    )
    stream.add_argument(
        "source", metavar="URL", help="rtsp(s), http(s) (HLS or TS), tcp, udp, a camera or a file"
    )
    stream.add_argument("--session", required=True, metavar="NAME", help="such as live-1")
    stream.add_argument("--tenant", default="default")
    stream.add_argument(
        "--dir", metavar="DIR", help="where segments wait (NAME.segments); workers must reach it"
    )
    stream.add_argument(
        "--uri-prefix",
        metavar="URL",
        help="where workers fetch DIR from, such as https://host/live",
    )
    stream.add_argument(
        "--in-flight", type=_count, default=4, metavar="N", help="jobs at once (%(default)s)"
    )
    stream.add_argument("--json", action="store_true", help="each verdict as a line of JSON")
    live_options(stream)
    redis_option(stream)
    stream.set_defaults(run=answering(_run_stream))


def _run_stream(args: argparse.Namespace) -> int:
    from ralf.worker.cli.stream import run

    with client_at(args) as client:
        return run(client, args)
