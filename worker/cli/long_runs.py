"""The commands that run for hours: backfill, stream; chaos, fuzz.

Nothing heavy is imported until a command runs.
"""

import argparse
from typing import TYPE_CHECKING, Any

from ralf.worker.cli.queue import answering, redis_option

if TYPE_CHECKING:
    from ralf.worker.client import Client


def commands(subparsers: Any) -> None:
    """Add them all."""
    for add in (_backfill, _stream, _chaos, _fuzz):
        add(subparsers)


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
        "same command continues. The report is one JSON document on stdout.",
        epilog="exit codes: 0 every row has a verdict; 4 some rows failed; 5 the ledger or the "
        "manifest cannot be used; 130 stopped",
    )
    backfill.add_argument(
        "manifest",
        metavar="MANIFEST",
        help="a CSV with the column uri, and id, tenant, tag, old_label, old_score, old_model if "
        "you have them",
    )
    backfill.add_argument(
        "--ledger",
        metavar="FILE",
        help="keep the result of every row in this file; with the same file the command continues, "
        "with a new one it judges everything again (default: MANIFEST.ledger)",
    )
    backfill.add_argument(
        "--in-flight",
        type=_count,
        default=64,
        metavar="N",
        help="have at most N jobs in the queue at once",
    )
    backfill.add_argument(
        "--retry-failed",
        nargs="?",
        const="all",
        metavar="CODES",
        help="judge failed rows once more: all of them, or those with these codes, such as "
        "fetch_failed,job_timeout",
    )
    _file_options(backfill)
    backfill.add_argument("--tenant", default="default", help="tenant of the rows that name none")
    backfill.add_argument(
        "--model",
        metavar="NAME",
        help="judge with this model, NAME or NAME@VERSION (default: the workers' own)",
    )
    backfill.add_argument(
        "--max-frames",
        type=_count,
        metavar="N",
        help="judge at most N frames of each video (default: what the model says)",
    )
    redis_option(backfill)
    backfill.set_defaults(run=answering(_run_backfill))


def _file_options(backfill: argparse.ArgumentParser) -> None:
    """What `backfill` compares with, and what it writes."""
    backfill.add_argument(
        "--old",
        metavar="FILE",
        help="compare with these earlier verdicts: a CSV with id (or uri), label, score, model, "
        "such as --results wrote, or verdicts as JSON lines, matched by tag",
    )
    backfill.add_argument(
        "--report", metavar="FILE", help="write the report into this JSON file as well"
    )
    backfill.add_argument(
        "--results", metavar="FILE", help="write the result of every row into this CSV"
    )


def _run_backfill(client: "Client", args: argparse.Namespace) -> int:
    from ralf.worker.cli.backfill import run

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
        help="least length of a segment (default: %(default)g)",
    )
    live.add_argument(
        "--lag",
        choices=("drop", "wait"),
        help="when judging is too slow, drop the oldest waiting segment, or let the source wait "
        "(default: drop, for files wait)",
    )
    live.add_argument(
        "--keep", type=_count, default=16, metavar="N", help="let at most N segments wait on disk"
    )
    live.add_argument(
        "--give-up",
        type=_seconds,
        default=300.0,
        metavar="SECONDS",
        help="end after so long without a connection (default: %(default)g)",
    )
    live.add_argument(
        "--reencode",
        action="store_true",
        help="encode the video again (H.264), for streams whose key frames are too rare",
    )


def _stream(subparsers: Any) -> None:
    stream = subparsers.add_parser(
        "stream",
        help="judge a live stream through the queue, segment by segment",
        description="Cuts a live stream at its key frames and submits the segments as one session; "
        "prints the rolling verdict. The address is yours and not checked against private "
        "networks: never pass on one that a user gave.",
        epilog="Ctrl-C ends the session and prints its final verdict; a second Ctrl-C does not "
        "wait for that. Exit codes: 0 the stream ended; 5 the source could not be read.",
    )
    stream.add_argument(
        "source",
        metavar="URL",
        help="the stream: rtsp(s), http(s) (HLS or MPEG-TS), tcp, udp, a camera or a file",
    )
    stream.add_argument(
        "--session",
        required=True,
        metavar="NAME",
        help="your name of the stream, such as live-1; the same name and folder continue it",
    )
    stream.add_argument("--tenant", default="default", help="whose session it is")
    stream.add_argument(
        "--dir",
        metavar="DIR",
        help="write segments into this folder, which the workers must reach (default: "
        "NAME.segments)",
    )
    stream.add_argument(
        "--uri-prefix",
        metavar="URL",
        help="let workers fetch the segments from this address, such as https://host/live "
        "(default: as files)",
    )
    stream.add_argument(
        "--in-flight",
        type=_count,
        default=4,
        metavar="N",
        help="have at most N segments in the queue at once",
    )
    stream.add_argument(
        "--json", action="store_true", help="print each rolling verdict as a line of JSON"
    )
    live_options(stream)
    redis_option(stream)
    stream.set_defaults(run=answering(_run_stream))


def _run_stream(client: "Client", args: argparse.Namespace) -> int:
    from ralf.worker.cli.stream import run

    return run(client, args)


def _chaos(subparsers: Any) -> None:
    chaos = subparsers.add_parser(
        "chaos",
        help="test: kill processes of a service of its own at random, and prove that no job is "
        "lost",
    )
    chaos.add_argument("--jobs", type=int, default=300, metavar="N", help="submit N jobs")
    chaos.add_argument(
        "--workers",
        type=int,
        default=3,
        metavar="N",
        help="start N workers, two or more; the last takes priority high",
    )
    chaos.add_argument(
        "--share",
        action="store_true",
        help="let the workers of priority default share one child process",
    )
    chaos.add_argument(
        "--seed", type=int, default=0, metavar="N", help="choose another mix of jobs and faults"
    )
    chaos.add_argument(
        "--minutes",
        type=float,
        metavar="N",
        help="give up after N minutes (default: 10, with --default-timings 60)",
    )
    chaos.add_argument(
        "--default-timings",
        action="store_true",
        help="use the leases and delays of production, which takes longer",
    )
    chaos.set_defaults(run=_run_chaos)


def _run_chaos(args: argparse.Namespace) -> int:
    from ralf.worker.chaos.run import run

    return run(args)


def _fuzz(subparsers: Any) -> None:
    fuzz = subparsers.add_parser(
        "fuzz",
        help="test: judge damaged files, and report each that ends without a named error",
    )
    fuzz.add_argument(
        "--mutants", type=int, default=10_000, metavar="N", help="judge N damaged files in all"
    )
    fuzz.add_argument(
        "--minutes",
        type=float,
        default=30.0,
        metavar="N",
        help="stop after N minutes (default: %(default)g)",
    )
    fuzz.add_argument(
        "--seed", type=int, default=0, metavar="N", help="choose another series of damaged files"
    )
    fuzz.add_argument(
        "--children", type=int, default=2, metavar="N", help="judge in N child processes"
    )
    fuzz.add_argument(
        "--folder",
        default="fuzz",
        metavar="DIR",
        help="write results and the reported files there; the same folder continues a run",
    )
    fuzz.add_argument(
        "--only", type=int, metavar="NUMBER", help="make and judge this one damaged file again"
    )
    fuzz.set_defaults(run=_run_fuzz)


def _run_fuzz(args: argparse.Namespace) -> int:
    from ralf.worker.chaos.fuzz import run

    return run(args)
