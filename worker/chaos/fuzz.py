"""`ralf fuzz`: damaged media through the real child process; every outcome must have a name.

Each mutant (mutants.py) is given to a confined child process with the real model, which judges it
as a worker would, and an image as `ralf scan` would.  Named outcomes are a valid verdict and the
codes of errors.Rejected, which docs and metrics list.  Every other one is a fault: an error
without a name, a death of the child, no answer within CLOCK_S, memory above its bound, a verdict
that is not valid.  Such a mutant is kept.

The folder holds all of it: `outcomes.jsonl`, one line for each mutant, and `kept/`.  A run that was
stopped goes on when it is started again with the same folder and seed, and `--only NUMBER` makes
one mutant again and judges it.
"""

import argparse
import contextlib
import hashlib
import json
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from itertools import count
from pathlib import Path

from pydantic import ValidationError

from ralf.worker import telemetry
from ralf.worker.chaos import bodies, mutants
from ralf.worker.contract import EvidencePolicy, Job, Media, Sampling, Verdict, dump
from ralf.worker.errors import Infrastructure, ModelUnavailable, Rejected, by_code
from ralf.worker.service import messages
from ralf.worker.service.child_process import ChildProcess
from ralf.worker.settings import Settings

CLOCK_S = 30.0
"""For one mutant of some kilobytes, on a machine that is busy with other things."""
MEMORY_BYTES = 1024**3
"""A child may grow by so much above its size once the model is loaded."""
WARM_S = 300.0
"""For the first file: the child loads its model for it."""
TELL_S = 10.0
NAMED = frozenset(code for code, kind in by_code().items() if issubclass(kind, Rejected))
LEDGER = "outcomes.jsonl"


@dataclass(frozen=True)
class Outcome:
    """What became of one mutant."""

    number: int
    original: str
    how: str
    outcome: str
    """`verdict`, a Rejected's code, or what went wrong."""
    ms: int
    detail: str = ""

    @property
    def named(self) -> bool:
        """Whether it is one that documents promise."""
        return self.outcome == "verdict" or self.outcome in NAMED


def run(args: argparse.Namespace) -> int:
    """Fuzz, print the table; 1 when an outcome has no name."""
    folder = Path(args.folder)
    # Of this process too only what is critical: a child starts anew every few hundred mutants.
    telemetry.configure(replace(Settings.from_environment(), log_level="critical"))
    files = mutants.originals()
    if args.only is not None:
        return _judge_one(files, mutants.mutant(files, args.seed, args.only), folder)
    ledger = Ledger(folder, args.seed)
    fuzz = Fuzz(files, ledger, most=args.mutants, minutes=args.minutes)
    began = time.monotonic()
    try:
        fuzz.run(args.children)
    finally:
        ledger.close()
        print(table(ledger.outcomes))
    unnamed = [one for one in ledger.outcomes if not one.named]
    print(
        f"{len(ledger.outcomes)} mutants, {fuzz.judged} of them now in "
        f"{time.monotonic() - began:.0f} s; {len(unnamed)} outcomes without a name"
        + (f", kept in {folder / 'kept'}" if unnamed else "")
    )
    return 1 if unnamed or fuzz.failed else 0


def _judge_one(files: dict[str, bytes], made: mutants.Mutant, folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    path = mutants.write(folder, made)
    with contextlib.closing(Judge(files)) as judge:
        found = judge.judge(made)
    print(json.dumps({"path": str(path), **asdict(found)}, indent=2))
    return 0 if found.named else 1


class Ledger:
    """The outcomes so far, in memory and on disk; a folder belongs to one seed."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / LEDGER
        text = path.read_text() if path.exists() else ""
        # A run that was killed may have left half a line at the end.
        lines = text[: text.rfind("\n") + 1].splitlines()
        if lines and json.loads(lines[0]) != {"seed": seed}:
            raise Infrastructure(
                f"{path} belongs to the run {lines[0]}; use that seed, or another --folder"
            )
        self.outcomes = [Outcome(**json.loads(line)) for line in lines[1:]]
        path.write_text("".join(f"{line}\n" for line in lines or [json.dumps({"seed": seed})]))
        self._file = path.open("a")
        self._lock = threading.Lock()

    def add(self, found: Outcome, made: mutants.Mutant) -> None:
        """Write the outcome, and keep the mutant when its outcome has no name."""
        with self._lock:
            self.outcomes.append(found)
            self._file.write(json.dumps(asdict(found)) + "\n")
            self._file.flush()
        if not found.named:
            kept = self.folder / "kept"
            kept.mkdir(exist_ok=True)
            mutants.write(kept, made)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


@dataclass
class Fuzz:
    """Threads that take the next number, make its mutant and have it judged, until it is over."""

    files: dict[str, bytes]
    ledger: Ledger
    most: int
    minutes: float
    judged: int = 0
    failed: str = ""
    """Why a thread ended early."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, children: int) -> None:
        """Run to the last mutant or the end of the time; ModelUnavailable when no child works."""
        done = {one.number for one in self.ledger.outcomes}
        self._numbers: Iterator[int] = (n for n in count() if n not in done)
        self._end = time.monotonic() + 60 * self.minutes
        self._left = self.most - len(done)
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(children)]
        for thread in threads:
            thread.start()
        told = time.monotonic()
        while any(thread.is_alive() for thread in threads):
            threads[0].join(0.2)
            time.sleep(0.2)
            if time.monotonic() - told >= TELL_S:
                told = time.monotonic()
                self._tell()
        if self.failed:
            raise ModelUnavailable(f"the fuzzer's child process failed: {self.failed}")

    def _next(self) -> int | None:
        with self._lock:
            if self._left <= 0 or self.failed or time.monotonic() >= self._end:
                return None
            self._left -= 1
            self.judged += 1
            return next(self._numbers)

    def _work(self) -> None:
        try:
            with contextlib.closing(Judge(self.files)) as judge:
                judge.check_originals()
                while (number := self._next()) is not None:
                    made = mutants.mutant(self.files, self.ledger.seed, number)
                    self.ledger.add(judge.judge(made), made)
        except Exception as error:  # noqa: BLE001  the main thread reports it
            self.failed = f"{type(error).__name__}: {error}"

    def _tell(self) -> None:
        unnamed = sum(not one.named for one in self.ledger.outcomes)
        print(
            f"ralf: fuzz: {len(self.ledger.outcomes)} mutants, {unnamed} without a named outcome",
            file=sys.stderr,
            flush=True,
        )


class Judge:
    """One child process, replaced when it dies, hangs or grows."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self._files = files
        self._folder = tempfile.TemporaryDirectory(prefix="ralf-fuzz-")
        settings = Settings.from_environment()
        # Not the log of each refusal: there are thousands.
        self._settings = replace(settings, work_dir=self._folder.name, log_level="critical")
        self._child = ChildProcess(self._settings, bodies="test")
        self._warm_rss = 0

    def close(self) -> None:
        """End the child and remove the files."""
        self._child.close()
        self._folder.cleanup()

    def check_originals(self) -> None:
        """The good files are judged, or else the mutants' refusals would say nothing."""
        for name, data in self._files.items():
            found = self.judge(mutants.Mutant(0, name, "unchanged", data))
            expected = "container_unsupported" if name.endswith(".flv") else "verdict"
            if found.outcome != expected:
                raise RuntimeError(f"{name}, not damaged, ends as {found.outcome}: {found.detail}")

    def judge(self, made: mutants.Mutant) -> Outcome:
        """The outcome of one mutant in the child."""
        if self._child.alive and self._child.recycle_reason() == "jobs":
            self._child.retire()
        if not self._child.alive:
            self._child.open()
            self._warm_rss = 0
            # It loads its model for its first file, which is none of the mutants.
            name, data = next(iter(self._files.items()))
            outcome, detail = self._asked(mutants.Mutant(0, name, "unchanged", data), WARM_S)
            if outcome != "verdict":
                raise RuntimeError(f"{name}, not damaged, ends as {outcome}: {detail}")
        start = time.monotonic()
        outcome, detail = self._asked(made, CLOCK_S)
        ms = int(1000 * (time.monotonic() - start))
        return Outcome(made.number, made.original, made.how, outcome, ms, detail[:500])

    def _asked(self, made: mutants.Mutant, clock_s: float) -> tuple[str, str]:
        # As the worker does: a folder for the job, moved to where the confined child may read it.
        folder = Path(tempfile.mkdtemp(dir=self._child.uploads))
        try:
            name = mutants.write(folder, made).name
            folder = self._child.place(folder)
            return self._ask(_run_of(folder / name, made), clock_s)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _ask(self, job: messages.Run, clock_s: float) -> tuple[str, str]:
        child, end, sent = self._child, time.monotonic() + clock_s, False
        while True:
            if child.ready is not None and not sent:
                child.send(job)
                sent = True
            received = child.wait(min(0.5, max(0.0, end - time.monotonic())))
            if received is None:
                why = child.load_error or child.last_output()
                how = child.detach()
                return ("child could not load" if not sent else f"child {how}"), why
            for message in received:
                if isinstance(message, messages.Done | messages.Failed):
                    return self._answered(message, job.job_id)
            if time.monotonic() >= end:
                child.kill()
                child.detach()
                return f"no answer within {clock_s:g} s", ""

    def _answered(self, message: messages.Done | messages.Failed, job_id: str) -> tuple[str, str]:
        outcome, detail = _named(message, job_id)
        peak = _peak_rss(self._child.pid)
        self._warm_rss = self._warm_rss or peak
        grown = peak - self._warm_rss
        if grown > MEMORY_BYTES:
            outcome, detail = "too much memory", f"{grown} bytes more; its answer was {outcome}"
        # A peak never falls again, so the next mutants need a new child.
        if grown > MEMORY_BYTES or (isinstance(message, messages.Failed) and message.fatal):
            self._child.kill()
            self._child.detach()
        return outcome, detail


def _run_of(path: Path, made: mutants.Mutant) -> messages.Run:
    digest = hashlib.sha256(made.data).hexdigest()
    job = Job(
        job_id=f"mutant-{made.number}",
        token=str(made.number),
        media=Media(uri=path.as_uri()),
        sampling=Sampling(max_frames=4),
        evidence=EvidencePolicy(thumbnails=False, residuals=False),
        submitted_at=datetime.now(UTC),
    )
    return messages.Run(
        job_id=job.job_id,
        function=bodies.PREFIX + "judge",
        path=str(path),
        job=dump(job),
        sha256=digest,
    )


def _named(message: messages.Done | messages.Failed, job_id: str) -> tuple[str, str]:
    """The outcome and its detail; a verdict counts only if it is valid and about this job."""
    if isinstance(message, messages.Failed):
        if message.code in NAMED:
            return message.code, message.message
        # The kind of error too, so that the table tells one fault from another.
        return f"{message.code}: {message.message.partition(':')[0][:60]}", message.message
    try:
        verdict = Verdict.model_validate_json(message.verdict)
    except ValidationError as error:
        return "not a valid verdict", str(error)
    right = verdict.job_id == job_id
    return ("verdict", "") if right else ("another's verdict", str(verdict.job_id))


def _peak_rss(pid: int) -> int:
    """The most resident bytes that the process ever had; 0 where that is not known."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return 0


def table(outcomes: list[Outcome]) -> str:
    """One line for each outcome: how many, their share, the slowest, and of which files."""
    counts = Counter(one.outcome for one in outcomes)
    lines = [f"{'outcome':<40} {'mutants':>7} {'share':>6} {'slowest':>9}  made of"]
    for outcome, number in counts.most_common():
        those = [one for one in outcomes if one.outcome == outcome]
        made_of = Counter(one.original.rpartition(".")[2] for one in those)
        lines.append(
            f"{outcome if those[0].named else '! ' + outcome:<40} {number:>7} "
            f"{number / len(outcomes):>6.1%} {max(one.ms for one in those):>6} ms  "
            + ", ".join(f"{ending} {n}" for ending, n in made_of.most_common())
        )
    return "\n".join(lines)
