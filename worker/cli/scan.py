"""`ralf scan`: files on disk, verdicts on the terminal, pages for people.

One bad file does not stop the others.  The exit code is the first of RANK that happened to a file:
a caller that asks for --fail-on must learn of a forged file, whatever its neighbours are.
"""

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pydantic import Field
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ralf.kernels.atomic_files import replace_text
from ralf.kernels.manifest import Finder
from ralf.worker import telemetry
from ralf.worker.contract import Evidence, EvidencePolicy, Output, Sampling, Verdict, dump
from ralf.worker.errors import JobError, RalfError
from ralf.worker.page.page import page
from ralf.worker.pipeline import Ask, Partial, analyze
from ralf.worker.runtime import Parts, load
from ralf.worker.settings import Settings
from ralf.worker.wording import LABEL_WORDS, clock

STYLES = {
    "likely_forged": "bold red",
    "likely_authentic": "bold cyan",
    "inconclusive": "bold yellow",
    "no_faces": "bold",
}
RANK = (0, 4, 5, 1)
"""Exit codes of one file, the last one first: see the module's docstring."""
ENDLESS = 1_000_000
"""Columns of a line that nobody sees on a terminal: a program that reads it wants whole names."""


class ScanError(Output):
    """Why a file has no verdict: what --json prints in the verdict's place."""

    schema_: Literal["ralf.scan_error/1"] = Field("ralf.scan_error/1", alias="schema")
    file: str
    code: str
    """The code that a job would end with; internal_error: an error in Ralf itself."""
    message: str


@dataclass(frozen=True)
class Scan:
    """One command, ready to judge: its options are checked and the model is loaded."""

    args: argparse.Namespace
    files: Sequence[Path]
    parts: Parts
    ask: Ask
    report: Callable[[Path], Path] | None

    def run(self) -> int:
        """Judge every file; returns the exit code."""
        return max((self._one(file) for file in self.files), key=RANK.index)

    def _one(self, file: Path) -> int:
        """Judge one file and show what came of it; returns the exit code for this file alone."""
        args = self.args
        try:
            with _bar(file, quiet=args.quiet or (args.json and not sys.stderr.isatty())) as show:
                verdict, evidence = analyze(file, self.parts, ask=self.ask, progress=show)
        except JobError as error:
            self._show_error(file, error.code, str(error))
            return 4
        except Exception as error:
            if isinstance(error, RalfError | OSError):  # not the file's fault: the next would fail
                raise
            traceback.print_exc()
            self._show_error(file, "internal_error", f"an error in Ralf itself: {error}")
            return 5
        verdict = verdict.model_copy(update={"tag": shown_name(file.name)})
        _show(file, verdict, as_json=args.json)
        if self.report is not None:
            _write_page(self.report(file), verdict, evidence)
        return _failed_on(args.fail_on, verdict)

    def _show_error(self, file: Path, code: str, message: str) -> None:
        name = shown_name(file)
        print(f"ralf: {name}: {code}: {message}", file=sys.stderr)
        if self.args.json:
            print(dump(ScanError(file=name, code=code, message=message)), flush=True)


def prepare(args: argparse.Namespace) -> Scan:
    """Check the options, then load the model."""
    files = [Path(name) for name in args.files]
    settings = Settings.from_environment()
    if args.models:
        settings = replace(settings, models_dir=args.models)
    # a person wants the verdict; the service's lines are for logs, and shown when asked for
    telemetry.configure(replace(settings, log_level=os.environ.get("RALF_LOG_LEVEL", "warning")))
    _check_min_face(args.min_face)
    report = _report_target(args.report, files)
    parts = load(settings, model=args.model, device=args.device, min_face=args.min_face)
    # pictures are only for the page
    wanted = EvidencePolicy(thumbnails=report is not None)
    ask = Ask(sampling=_sampling(args, parts), evidence=wanted)
    return Scan(args, files, parts, ask, report)


def _failed_on(policy: str | None, verdict: Verdict) -> int:
    forged = verdict.label == "likely_forged"
    doubtful = verdict.label != "likely_authentic"
    return int((policy == "forged" and forged) or (policy == "inconclusive" and doubtful))


def _usage(message: str) -> SystemExit:
    print(f"ralf scan: {message}", file=sys.stderr)
    return SystemExit(2)


def shown_name(file: Path | str) -> str:
    """A file's name as text: bytes that are no UTF-8, and controls, as a visible mark."""
    text = os.fsencode(file).decode(errors="replace")
    return "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in text)


def _check_min_face(asked: int | None) -> None:
    try:
        Finder() if asked is None else Finder(min_face=asked)
    except ValueError:
        raise _usage(f"--min-face should be 12 to 2000 pixels, got {asked}") from None


def _sampling(args: argparse.Namespace, parts: Parts) -> Sampling | None:
    """The model's own sampling with what the command line changes; None where it changes none."""
    if args.sampling is None and args.max_frames is None:
        return None
    wanted = parts.default_sampling.model_dump()
    if args.max_frames is not None:
        most = parts.settings.max_frames
        if not 1 <= args.max_frames <= most:
            raise _usage(f"--max-frames should be 1 to {most}, got {args.max_frames}")
        wanted["max_frames"] = args.max_frames
    if args.sampling is not None:
        mode, _, rate = args.sampling.partition(":")
        if mode not in ("uniform", "keyframes", "fps") or (mode == "fps") != bool(rate):
            raise _usage(f"--sampling should be uniform, keyframes or fps:N, got {args.sampling}")
        wanted["mode"] = mode
        try:
            wanted["fps"] = float(rate) if rate else None
            return Sampling(**wanted)
        except ValueError:
            raise _usage(f"--sampling fps:N wants 0 < N ≤ 120, got {rate}") from None
    return Sampling(**wanted)


def _report_target(target: str | None, files: Sequence[Path]) -> Callable[[Path], Path] | None:
    """Where each file's page goes; refuses a place that cannot be written before any work."""
    if target is None:
        return None
    place = Path(target)
    several = len(files) > 1 or place.is_dir() or target.endswith("/")
    if several:
        if place.is_file():
            raise _usage(f"--report wants a folder for several files, {target} is a file")
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _usage(f"--report: cannot make the folder {target}: {error.strerror}") from None
    folder = place if several else place.parent
    if not folder.is_dir():
        raise _usage(f"--report: there is no folder {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise _usage(f"--report: the folder {folder} may not be written to")
    pages = _page_names(files)
    targets = {file: folder / pages[file] if several else place for file in files}
    for page_at in targets.values():
        if any(page_at.resolve() == file.resolve() for file in files):
            raise _usage(f"--report: {page_at} is one of the files to judge")
    return targets.__getitem__


def _page_names(files: Sequence[Path]) -> dict[Path, str]:
    """A name for each file's page; files of one name, from several folders, are numbered."""
    names: dict[Path, str] = {}
    for file in dict.fromkeys(files):
        name, number = f"{file.name}.html", 1
        while name in names.values():
            number += 1
            name = f"{file.name}.{number}.html"
        names[file] = name
    return names


def _write_page(place: Path, verdict: Verdict, evidence: Evidence) -> None:
    replace_text(place, page(verdict, evidence))
    print(f"page: {place}", file=sys.stderr)


@contextmanager
def _bar(file: Path, *, quiet: bool) -> Iterator[Callable[[Partial], None]]:
    if quiet or not sys.stderr.isatty():
        yield lambda _partial: None
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(shown_name(file.name), total=None, note="")

        def show(partial: Partial) -> None:
            at = partial.progress
            score = "" if at.score is None else f", score {at.score:.2f}"
            progress.update(
                task,
                completed=at.frames_done,
                total=at.frames_total,
                note=f"{at.faces} faces{score}",
            )

        yield show


def _show(file: Path, verdict: Verdict, *, as_json: bool) -> None:
    if as_json:
        print(dump(verdict), flush=True)
        return
    on_terminal = sys.stdout.isatty()
    console = Console(highlight=False, width=None if on_terminal else ENDLESS)
    word, style = LABEL_WORDS[verdict.label].lower(), STYLES[verdict.label]
    score = "" if verdict.score is None else f"  score {verdict.score:.3f}"
    line = Text.assemble(f"{shown_name(file)}: ", (word, style), score)
    line.append(f"  (forged at {verdict.threshold.forged_at:.3f}, {verdict.threshold.policy})")
    console.print(line)
    console.print(Text(f"  {verdict.reason}"))
    if verdict.tracks:
        console.print(_tracks(verdict))
    for warning in verdict.warnings:
        console.print(Text(f"  ! {warning}"))
    made, media = verdict.made, verdict.media
    console.print(
        Text(
            f"  {media.codec} {media.width}×{media.height}, {clock(media.duration_ms)}; "
            f"{made.frames_decoded} of {made.frames_asked} frames, {made.faces} faces; "
            f"{made.model}@{made.version}, {made.engine} {made.precision} on {made.device}; "
            + ", ".join(f"{stage} {ms / 1000:.2f} s" for stage, ms in made.stages_ms.items()),
            style="dim",
        )
    )


def _tracks(verdict: Verdict) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2))
    for name in ("  face", "from", "to", "samples", "score", "strongest", ""):
        table.add_column(name, justify="left" if name in ("  face", "") else "right")
    for track in verdict.tracks:
        table.add_row(
            f"  {track.track_id}",
            clock(track.start_ms),
            clock(track.end_ms),
            str(track.faces),
            "–" if track.score is None else f"{track.score:.3f}",
            f"{track.score_max:.3f}",
            track.reason or "",
        )
    return table
