"""`ralf scan --live`: a live stream judged in this process, with a rolling verdict.

    source ─▶ segments on disk ─▶ verdict of each ─▶ fold ─▶ rolling verdict, printed
              at most --keep      one at a time

A segment's file is removed once it is judged.  Reading and judging are two threads, so a live
source does not wait for a slow model: Reader drops the oldest segments and says so.
"""

import argparse
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ralf.worker.cli.outputs import usage
from ralf.worker.cli.scan import RANK, configured, failed_on, loaded
from ralf.worker.cli.stream import reader_of, say, show, stopping_in_order
from ralf.worker.contract import SessionPart, SessionVerdict
from ralf.worker.errors import JobError, RalfError
from ralf.worker.media.live import BadSource, Cutter, Reader, Segment, Source
from ralf.worker.pipeline import Ask, analyze
from ralf.worker.runtime import Parts
from ralf.worker.service.sessions import digest, fold

NAME, TENANT = "live", "default"
WAIT_S = 0.5


@dataclass
class Rolling:
    """Judges segments one after the other and keeps what the rolling verdict is made of."""

    parts: Parts
    ask: Ask
    show: Callable[[SessionVerdict], None]
    code: int = 0
    """5 after an error in Ralf itself, else 0."""
    _stored: dict[str, str] = field(default_factory=dict)
    """The same fields as a session in Redis has: that is what fold() reads."""
    _revision: int = 0
    verdict: SessionVerdict | None = None
    """The last one that was shown."""

    def take(self, segment: Segment) -> None:
        """Judge one, remove its file and show the verdict so far."""
        part = SessionPart(
            session_id=NAME, number=segment.number, offset_ms=segment.offset_ms, last=segment.last
        )
        try:
            verdict, _ = analyze(segment.path, self.parts, ask=self.ask)
            self._stored[f"segment:{segment.number}"] = digest(verdict, part)
        except JobError as error:
            self._failed(segment, error.code, str(error).replace(str(segment.path), "its file"))
        except Exception as error:
            if isinstance(error, RalfError | OSError):  # the next segment would fail too
                raise
            traceback.print_exc()
            self._failed(segment, "internal_error", f"an error in Ralf itself: {error}")
            self.code = 5
        finally:
            segment.path.unlink(missing_ok=True)
        self._stored[f"order:{segment.number}"] = str(segment.number)
        if segment.last:
            self._stored["last"] = str(segment.number)
        self._fold()

    def end(self, last: int) -> None:
        """The stream has ended with this number, as no segment said: show it as complete."""
        if self.verdict is not None and "last" not in self._stored:
            self._stored["last"] = str(last)
            self._fold()

    def _failed(self, segment: Segment, code: str, message: str) -> None:
        self._stored[f"failed:{segment.number}"] = code
        say(f"segment {segment.number} has no verdict: {code}: {message}")

    def _fold(self) -> None:
        self._revision += 1
        self._stored["revision"] = str(self._revision)
        self.verdict = fold(TENANT, NAME, self._stored)
        self.show(self.verdict)


def run(args: argparse.Namespace) -> int:
    """The command; its exit code, by the rules of `ralf scan`."""
    _check(args)
    settings = configured(args)
    with tempfile.TemporaryDirectory(
        # The reader may still write into it after a second Ctrl-C.
        prefix="ralf-",
        dir=settings.work_dir or None,
        ignore_cleanup_errors=True,
    ) as folder:
        try:
            cutter = Cutter(Path(folder), NAME, seconds=args.segment)
            reader = reader_of(args, cutter)
        except BadSource as error:
            say(str(error))
            return 4
        parts, ask = loaded(args, settings, pictures=False)
        rolling = Rolling(parts, ask, lambda verdict: show(verdict, as_json=args.json))
        if not args.quiet:
            say(f"reading {Source(args.source).shown}; Ctrl-C ends it")
        interrupted = _judge_all(reader, rolling)
        if reader.dropped:
            say(f"{reader.dropped} segments were dropped")
        if not interrupted and not reader.error:
            rolling.end(cutter.number - 1)
    return _code(args.fail_on, reader.error, rolling, interrupted=interrupted)


def _judge_all(reader: Reader, rolling: Rolling) -> bool:
    """Until the source has ended and each segment is judged; whether a second signal cut it off."""

    def at_once() -> None:
        raise KeyboardInterrupt

    try:
        with stopping_in_order(reader, at_once):
            reader.start()
            while True:
                ended = reader.ended  # before the take: a segment may come between the two
                segment = reader.take(WAIT_S)
                if segment is not None:
                    rolling.take(segment)
                elif ended:
                    return False
    except KeyboardInterrupt:
        return True
    finally:
        reader.stopping = True


def _code(policy: str | None, error: str, rolling: Rolling, *, interrupted: bool) -> int:
    if error:
        say(error)
    if interrupted:
        say("interrupted")
        return 130
    verdict = rolling.verdict
    if verdict is None or not verdict.segments:
        say("no segment was judged")
    bad = bool(error) or verdict is None or not verdict.segments
    outcomes = (rolling.code, 4 if bad else 0, failed_on(policy, verdict.label) if verdict else 0)
    return max(outcomes, key=RANK.index)


def _check(args: argparse.Namespace) -> None:
    if len(args.files) != 1:
        raise usage(f"--live reads one source, got {len(args.files)}")
    for option in ("report", "output_dir", "annotated"):
        if getattr(args, option) is not None:
            name = option.replace("_", "-")
            raise usage(f"--{name} writes about whole files; it cannot be combined with --live")
    (args.source,) = args.files
