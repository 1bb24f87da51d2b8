"""`ralf stream`: a live stream as one session of segments, judged by the workers of the queue.

    source ─▶ segments on disk ─▶ jobs of one session, in order ─▶ rolling verdict, printed
              at most --keep       at most --in-flight

A segment's file is removed when its job has ended.  The folder keeps the next number and the
stream's clock, so that the same command goes on with the same session after any end.
"""

import json
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

from ralf.kernels.atomic_files import replace_text
from ralf.worker.client import Client, IdempotencyConflict, NotFound, QueueUnavailable
from ralf.worker.contract import SessionPart, SessionVerdict, dump
from ralf.worker.errors import RalfError
from ralf.worker.media.live import Cutter, Reader, Segment, Source, left_over
from ralf.worker.wording import LABEL_WORDS

FOLD_S = 10.0
"""A worker folds a session at once; the janitor, at its next sweep, where that failed."""
WAIT_S = 0.5
RETRY_MOST_S = 30.0


class BadSession(RalfError):
    """The session cannot be continued from this folder."""


@dataclass(frozen=True)
class Place:
    """The folder of one session: its segments, and what the next process must know."""

    folder: Path
    name: str
    run: str = field(default_factory=lambda: uuid.uuid4().hex)
    """In tokens: a later session of the same name in another folder has other jobs."""

    def keep(self, state: dict[str, Any]) -> None:
        """Write the state."""
        replace_text(self._state, json.dumps(state) + "\n")

    @property
    def _state(self) -> Path:
        return self.folder / f"{self.name}.json"

    def read(self) -> dict[str, Any] | None:
        """Next number, clock and start; None for a new folder."""
        if not self._state.exists():
            return None
        stored: dict[str, Any] = json.loads(self._state.read_text())
        return stored

    def write(self, segment: Segment, began: float) -> None:
        """That this one is being sent."""
        state = {"next": segment.number + 1, "offset_ms": segment.offset_ms, "began": began}
        self.keep({**state, "run": self.run})


class Stream:
    """Sends segments in order and shows the session's verdict."""

    def __init__(
        self,
        client: Client,
        reader: Reader,
        place: Place,
        *,
        tenant: str,
        in_flight: int,
        uri_prefix: str | None,
        show: Callable[[SessionVerdict], None],
    ) -> None:
        self._client, self._reader, self._place, self._show = client, reader, place, show
        self._tenant, self._in_flight, self._uri_prefix = tenant, in_flight, uri_prefix
        self._flying: dict[str, Segment] = {}
        self._held: Segment | None = None
        """Taken, and not yet sent."""
        self._closed = False
        """The session's last segment was sent."""
        self._shown, self._complete = -1, False
        self.hurry = False
        """Do not wait for jobs that have not ended."""

    def run(self) -> None:
        """Until the source has ended and so have all jobs."""
        delay = 1.0
        while not self.hurry:
            # Before the take: the last segment may come between the two.
            ended = self._reader.ended
            try:
                taken = self._send()
                self._collect()
                self._tell()
                delay = 1.0
            except QueueUnavailable as error:
                say(f"{error}; trying again in {delay:.0f} s")
                time.sleep(delay)
                delay = min(RETRY_MOST_S, 2 * delay)
                continue
            if ended and not (taken or self._held or self._flying):
                break
        self._await_fold()

    def _await_fold(self) -> None:
        """Show the session with its last segment: it is folded a moment after the job's end."""
        end = time.monotonic() + FOLD_S
        while True:
            with suppress(QueueUnavailable):
                self._tell()
            if self.hurry or self._complete or not self._closed or time.monotonic() > end:
                return
            time.sleep(WAIT_S)

    def _send(self) -> bool:
        """The next segment, if there is one and few are under way."""
        if len(self._flying) >= self._in_flight:
            time.sleep(WAIT_S)
            return False
        segment = self._held or self._reader.take(WAIT_S)
        if segment is None:
            return False
        self._held = segment
        uri = segment.path.resolve().as_uri()
        if self._uri_prefix is not None:
            uri = f"{self._uri_prefix.rstrip('/')}/{segment.path.name}"
        name = self._place.name
        part = SessionPart(
            session_id=name, number=segment.number, offset_ms=segment.offset_ms, last=segment.last
        )
        self._place.write(segment, self._reader.began)
        try:
            job_id = self._client.submit(
                uri,
                token=f"stream:{self._place.run}:{segment.number}",
                tenant=self._tenant,
                session=part,
            ).job_id
        except IdempotencyConflict as error:  # sent by an earlier process, as the last one
            job_id = error.job_id
        self._flying[job_id], self._held = segment, None
        self._closed = segment.last
        return True

    def _collect(self) -> None:
        """Remove the files of jobs that have ended."""
        with self._client.reaching():
            found = self._client.store.ends(list(self._flying))
        for job_id, (status, _) in found.items():
            segment = self._flying.pop(job_id)
            segment.path.unlink(missing_ok=True)
            if status is None or status.state != "succeeded":
                why = status.failure if status else None
                said = f"{why.code}: {why.message}" if why else "it is no longer known"
                say(f"segment {segment.number} has no verdict: {said}")

    def _tell(self) -> None:
        try:
            verdict = self._client.session(self._place.name, tenant=self._tenant)
        except NotFound:  # no segment has ended yet
            return
        if verdict.revision != self._shown:
            self._shown, self._complete = verdict.revision, verdict.complete
            self._show(verdict)


def say(message: str) -> None:
    """A line for the person, on stderr."""
    print(f"ralf: {message}", file=sys.stderr, flush=True)


def show(verdict: SessionVerdict, *, as_json: bool) -> None:
    """The rolling verdict: one line."""
    if as_json:
        print(dump(verdict), flush=True)
        return
    score = "" if verdict.score is None else f"  score {verdict.score:.2f}"
    missing = sum(gap.last - gap.first + 1 for gap in verdict.missing)
    gaps = f", {missing} missing" if missing else ""
    end = ", complete" if verdict.complete else ""
    label = LABEL_WORDS[verdict.label].lower()
    line = f"{verdict.session_id}: {label}{score}  ({verdict.segments} segments{gaps}{end})"
    print(f"{line}  {verdict.reason}", flush=True)


def reader_of(args: Any, cutter: Cutter, began: float = 0.0) -> Reader:
    """The thread that reads the source, by the options that `stream` and `scan --live` share."""
    source = Source(args.source)
    source.check()
    # A file can wait; what is live goes on whether it is read or not.
    live = source.camera or source.scheme != "file"
    return Reader(
        source,
        cutter,
        keep=args.keep,
        lag=args.lag or ("drop" if live else "wait"),
        give_up_s=args.give_up,
        reencode=args.reencode,
        say=say,
        began=began,
    )


@contextmanager
def stopping_in_order(reader: Reader, at_once: Callable[[], None]) -> Iterator[None]:
    """The first signal ends the source and waits for verdicts, the second waits no longer."""

    def stop(_: int, __: FrameType | None) -> None:
        if reader.stopping:
            at_once()
        reader.stopping = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(client: Client, args: Any) -> int:
    """The command; 0 when the stream ended, 5 when the source could not be read."""
    name, folder = args.session, Path(args.dir or f"{args.session}.segments")
    folder.mkdir(parents=True, exist_ok=True)
    place = Place(folder, name)
    state = place.read()
    if state is None:
        try:
            client.session(name, tenant=args.tenant)
        except NotFound:
            state = {"next": 0, "offset_ms": 0, "began": 0.0, "run": place.run}
            place.keep(state)
        else:
            raise BadSession(
                f"session {name} has segments already, and {folder} does not know their numbers; "
                "name its folder with --dir, or begin another session"
            )
    place = replace(place, run=state["run"])
    number, offset_ms = state["next"], state["offset_ms"]
    for segment in left_over(folder, name):
        number, offset_ms = max(number, segment.number + 1), max(offset_ms, segment.offset_ms)
    if number:
        offset_ms += round(1000 * args.segment)
    cutter = Cutter(folder, name, seconds=args.segment, number=number, offset_ms=offset_ms)
    reader = reader_of(args, cutter, state["began"])
    stream = Stream(
        client,
        reader,
        place,
        tenant=args.tenant,
        in_flight=args.in_flight,
        uri_prefix=args.uri_prefix,
        show=lambda verdict: show(verdict, as_json=args.json),
    )

    def at_once() -> None:
        stream.hurry = True

    with stopping_in_order(reader, at_once):
        reader.start()
        stream.run()
    reader.stopping = True
    if reader.dropped:
        say(f"{reader.dropped} segments were dropped")
    if reader.error:
        raise BadSession(reader.error)
    return 0
