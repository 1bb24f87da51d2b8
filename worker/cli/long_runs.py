"""The commands that run for hours: backfill.

Nothing heavy is imported until a command runs.
"""

import argparse
from typing import Any

from ralf.worker.cli.service import answering, client_at, redis_option


def commands(subparsers: Any) -> None:
    """Add them all."""
    _backfill(subparsers)


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
