"""`ralf backfill`: judge a list of videos again through the queue, behind all uploads.

    manifest.csv ─▶ rows without an end ─▶ jobs of priority backfill ─▶ ends ─▶ ledger ─▶ report
                    in batches             at most --in-flight          polled

The manifest is read as a stream, twice: once to count its rows and once to send them.  What is in
memory is bounded by --in-flight.  A row's token is made from the ledger's campaign, the row's id
and its attempt, so whatever was sent before a kill is found again and not judged twice.
"""

import csv
import hashlib
import json
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any, TextIO
from urllib.parse import urlsplit, urlunsplit

from ralf.kernels.atomic_files import replace_text
from ralf.worker.cli.ledger import End, Ledger, Old
from ralf.worker.client import (
    Client,
    IdempotencyConflict,
    InvalidRequest,
    QueueUnavailable,
    request,
)
from ralf.worker.contract import Job, Sampling, Verdict
from ralf.worker.errors import RalfError
from ralf.worker.service.records import Status

BATCH = 200
POLL_S = 0.5
SAID_EVERY_S, LOGGED_EVERY_S = 1.0, 60.0
"""How often progress is shown on a terminal, and in a log."""
RATE_OVER_S = 300.0
RETRY_MOST_S = 30.0


class BadManifest(RalfError):
    """The list cannot be read."""


@dataclass(frozen=True)
class Row:
    """One line of the manifest."""

    id: str
    uri: str
    tenant: str
    tag: str | None
    old: Old | None
    attempt: int = 1


@dataclass(frozen=True)
class Options:
    """What a row's job is made of; they belong to the ledger."""

    tenant: str = "default"
    model: str | None = None
    max_frames: int | None = None

    def job(self, row: Row, campaign: str) -> Job:
        """The request; the same for the same row and attempt, as its token demands."""
        # The id by its hash: a token has 256 characters, and an id may have more.
        name = hashlib.sha256(row.id.encode()).hexdigest()[:32]
        return request(
            row.uri,
            token=f"backfill:{campaign}:{name}:{row.attempt}",
            tag=row.tag,
            tenant=row.tenant,
            priority="backfill",
            model=self.model,
            sampling=None if self.max_frames is None else Sampling(max_frames=self.max_frames),
        )


def read_manifest(path: Path, options: Options) -> Iterator[Row]:
    """Its rows, one at a time; the first line names the columns."""
    for line in _table(path, wants="uri"):
        uri = line["uri"].strip()
        uri = uri if "://" in uri or not uri else Path(uri).resolve().as_uri()
        tenant = line.get("tenant") or options.tenant
        row_id = line.get("id") or _id_of(uri, tenant)
        old = _old(row_id, line, "old_") if line.get("old_label") else None
        yield Row(row_id, uri, tenant, line.get("tag") or None, old)


def read_old(path: Path, options: Options) -> Iterator[Old]:
    """Earlier verdicts: a CSV with id or uri, or verdicts as JSON lines, known by their tag."""
    if path.suffix.lower() in (".jsonl", ".ndjson", ".json"):
        with _opened(path) as file:
            for number, text in enumerate(file, 1):
                try:
                    verdict = Verdict.model_validate_json(text)
                except ValueError as error:
                    raise BadManifest(f"{path}:{number} should be a verdict: {error}") from error
                made = f"{verdict.made.model}@{verdict.made.version}"
                yield Old(verdict.tag or verdict.job_id or "", verdict.label, verdict.score, made)
        return
    for line in _table(path, wants="label"):
        if not line["label"]:  # a row that failed then
            continue
        row_id = line.get("id") or _id_of(line.get("uri", ""), line.get("tenant") or options.tenant)
        yield _old(row_id, line, "")


def _table(path: Path, *, wants: str) -> Iterator[dict[str, str]]:
    with _opened(path) as file:
        try:
            table = csv.DictReader(file, restval="")
            if wants not in (table.fieldnames or ()):
                raise BadManifest(
                    f"{path} should be a CSV whose first line names the column {wants}, "
                    f"got {', '.join(table.fieldnames or ()) or 'an empty file'}"
                )
            yield from table
        except (csv.Error, UnicodeDecodeError) as error:
            raise BadManifest(f"{path}, after line {table.line_num}: {error}") from error


def _opened(path: Path) -> TextIO:
    try:
        # utf-8-sig: spreadsheets write a mark before the first column's name.
        return path.open(newline="", encoding="utf-8-sig")
    except OSError as error:
        raise BadManifest(f"cannot read {path}: {error.strerror}") from error


def _old(row_id: str, line: dict[str, str], prefix: str) -> Old:
    score = line.get(f"{prefix}score")
    try:
        number = float(score) if score else None
    except ValueError:
        raise BadManifest(f"{prefix}score should be a number, got {score!r}") from None
    return Old(row_id, line[f"{prefix}label"], number, line.get(f"{prefix}model") or None)


def _id_of(uri: str, tenant: str) -> str:
    return hashlib.sha256(f"{tenant}\0{uri}".encode()).hexdigest()[:32]


def _shown(uri: str) -> str:
    """The URI without what makes it a credential: user, query and fragment."""
    parts = urlsplit(uri)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


class Backfill:
    """One run over one manifest."""

    def __init__(
        self, client: Client, ledger: Ledger, options: Options, manifest: Path, in_flight: int
    ) -> None:
        self._client, self._ledger, self._options = client, ledger, options
        self._manifest, self._in_flight = manifest, in_flight
        self._waiting: dict[str, tuple[Row, str]] = {}
        """Rows by id that have a job, and its id."""
        self._lost: list[Row] = []
        """Rows whose jobs Redis has forgotten: they are sent again."""
        self._counts = ledger.counts()
        self._total = 0
        self._ended: deque[tuple[float, int]] = deque()
        self._said_at = 0.0
        self.stopping = False

    def run(self) -> bool:
        """Send rows and write their ends until all have one; False when it was told to stop."""
        self._total = sum(1 for _ in read_manifest(self._manifest, self._options))
        rows, delay = read_manifest(self._manifest, self._options), 1.0
        ready: list[Row] = []
        while not self.stopping:
            room = self._in_flight - len(self._waiting)
            ready += self._next(rows, room - len(ready))
            try:
                self._send(ready[:room])
                del ready[:room]
                moved = self._collect()
                delay = 1.0
            except QueueUnavailable as error:
                print(f"\nralf: {error}; trying again in {delay:.0f} s", file=sys.stderr)
                self._pause(delay)
                delay = min(RETRY_MOST_S, 2 * delay)
                continue
            self._say()
            if not (ready or moved or self._waiting or self._lost):
                break
            if not moved:
                self._pause(POLL_S)
        self._say(last=True)
        return not self.stopping

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self.stopping and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, 0.2))  # a signal's handler does not end a sleep

    def _next(self, rows: Iterator[Row], wanted: int) -> list[Row]:
        """As many rows without an end as are wanted, or some more; none when none are left."""
        found: list[Row] = []
        while len(found) < wanted and not self.stopping:
            listed, self._lost = self._lost or list(islice(rows, BATCH)), []
            if not listed:
                break
            found += self._open(listed)
            self._say()  # the rows that an earlier run ended may be millions
        return found

    def _open(self, rows: list[Row]) -> list[Row]:
        """Those without an end, each once, with the attempt and the old verdict of the ledger."""
        ids = list({row.id for row in rows})
        known, old = self._ledger.attempts(ids), self._ledger.old(ids)
        found: dict[str, Row] = {}
        for row in rows:
            state, attempt = known.get(row.id, ("again", 1))
            if state == "again":
                before = row.old or old.get(row.id)
                found.setdefault(row.id, replace(row, old=before, attempt=attempt))
        return list(found.values())

    def _send(self, rows: list[Row]) -> None:
        """Submit them; one that is refused ends here."""
        jobs: dict[str, tuple[Row, Job]] = {}
        for row in rows:
            if row.id in self._waiting:  # the manifest has it twice
                continue
            try:
                job = self._options.job(row, self._ledger.campaign)
                jobs[job.token] = (row, job)
            except InvalidRequest as error:
                self._write([_failed(row, "", "invalid_request", str(error))])
        while jobs:
            try:
                made = self._client.submit_many(job for _, job in jobs.values())
            except IdempotencyConflict as error:
                row, _ = jobs.pop(error.token)
                self._write([_failed(row, error.job_id, "conflict", str(error))])
                continue
            for (row, _), submission in zip(jobs.values(), made, strict=True):
                self._waiting[row.id] = (row, submission.job_id)
            return

    def _collect(self) -> int:
        """Write the ends of jobs that have ended; gives their number."""
        with self._client.reaching():
            found = self._client.store.ends([job_id for _, job_id in self._waiting.values()])
        rows = {job_id: row for row, job_id in self._waiting.values()}
        ends = []
        for job_id, (status, verdict) in found.items():
            row = rows[job_id]
            if status is None:
                self._lost.append(row)
                del self._waiting[row.id]
            else:
                ends.append(_end(row, status, verdict))
        self._write(ends)
        for end in ends:
            del self._waiting[end.id]
        # After the ledger has them on the disk.
        with self._client.reaching():
            self._client.store.release([end.job_id for end in ends])
        return len(found)

    def _write(self, ends: list[End]) -> None:
        written = self._ledger.write(ends)
        for end in written:
            self._counts[end.state] += 1
            self._counts["changed"] += end.old_label not in (None, end.label) and not end.code
        if written:
            self._ended.append((time.monotonic(), len(written)))

    def _say(self, *, last: bool = False) -> None:
        """One line of progress, on a terminal always the same."""
        on_terminal = sys.stderr.isatty()
        now, every = time.monotonic(), SAID_EVERY_S if on_terminal else LOGGED_EVERY_S
        if not last and now - self._said_at < every:
            return
        self._said_at = now
        done = self._counts["judged"] + self._counts["failed"]
        line = f"ralf: {done:,} of {self._total:,} rows ({100 * done / max(1, self._total):.1f} %)"
        line += f", {self._counts['failed']:,} failed, {self._counts['changed']:,} labels changed"
        if (rate := self._rate(now)) > 0:
            left = max(0, self._total - done) / rate
            end = datetime.now(UTC) + timedelta(seconds=left)
            line += f", {rate:.2f} rows/s, ends about {end:%Y-%m-%d %H:%M} UTC"
        ends = "\n" if last or not on_terminal else ""
        print(f"\r{line}\x1b[K" if on_terminal else line, end=ends, file=sys.stderr, flush=True)

    def _rate(self, now: float) -> float:
        """Rows a second over the last minutes."""
        while self._ended and now - self._ended[0][0] > RATE_OVER_S:
            self._ended.popleft()
        if len(self._ended) < 2:
            return 0.0
        since = self._ended[0][0]
        return sum(n for _, n in list(self._ended)[1:]) / max(1e-3, now - since)


def _end(row: Row, status: Status, verdict: Verdict | None) -> End:
    if status.state != "succeeded":
        failure = status.failure
        code = failure.code if failure else status.state
        return _failed(row, status.job_id, code, failure.message if failure else "")
    old = row.old or Old("", None, None, None)
    return End(
        id=row.id,
        uri=_shown(row.uri),
        state="judged",
        attempt=row.attempt,
        job_id=status.job_id,
        label=status.label,
        score=status.score,
        model=None if verdict is None else f"{verdict.made.model}@{verdict.made.version}",
        old_label=old.label,
        old_score=old.score,
        old_model=old.model,
    )


def _failed(row: Row, job_id: str, code: str, message: str) -> End:
    return End(row.id, _shown(row.uri), "failed", row.attempt, job_id, code=code, message=message)


def run(client: Client, args: Any) -> int:
    """The command; 0 when every row has a verdict, 4 when some have none, 130 when stopped."""
    options = Options(args.tenant, args.model, args.max_frames)
    manifest = Path(args.manifest)
    place = Path(args.ledger or f"{manifest}.ledger")
    with closing(Ledger(place, vars(options))) as ledger:
        if args.old:
            ledger.keep_old(read_old(Path(args.old), options))
        if args.retry_failed:
            codes = [] if args.retry_failed == "all" else args.retry_failed.split(",")
            again = ledger.ask_again(codes)
            print(f"ralf: {again:,} failed rows are judged again", file=sys.stderr)
        backfill = Backfill(client, ledger, options, manifest, args.in_flight)

        def stop(_: int, __: FrameType | None) -> None:
            backfill.stopping = True

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            complete = backfill.run()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        report = {**ledger.report(), "manifest": str(manifest), "complete": complete}
        if args.results:
            ledger.write_results(Path(args.results))
        if args.report:
            replace_text(Path(args.report), json.dumps(report, indent=1) + "\n")
        print(json.dumps(report), flush=True)
        if not complete:
            print("ralf: stopped; the same command continues from here", file=sys.stderr)
            return 130
        return 4 if report["failed"] else 0
