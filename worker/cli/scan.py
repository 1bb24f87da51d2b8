"""`ralf scan`: videos and images in, verdicts on the terminal, pages for people.

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
from ralf.worker.cli.outputs import Targets, targets, usage
from ralf.worker.cli.sources import STDIN, Source, sources
from ralf.worker.contract import Evidence, EvidencePolicy, Label, Output, Sampling, Verdict, dump
from ralf.worker.errors import JobError, RalfError
from ralf.worker.local import for_file
from ralf.worker.pipeline import Ask, Partial, analyze
from ralf.worker.runtime import Parts, load
from ralf.worker.settings import Settings
from ralf.worker.wording import LABEL_WORDS, clock, digits_of, policy_text, score_text

STYLES = {
    "likely_forged": "bold red",
    "likely_authentic": "bold cyan",
    "inconclusive": "bold yellow",
    "no_faces": "bold",
}
RANK = (0, 4, 5, 1)
"""Exit codes of one file, the last one first: see the module's docstring."""
ENDLESS = 1_000_000
"""Columns where stdout is no terminal: a program reads the lines and needs whole names."""


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
    settings: Settings
    sources: Sequence[Source]
    parts: Parts
    ask: Ask
    targets: Targets

    def run(self) -> int:
        """Judge every source; returns the exit code."""
        return max((self._one(source) for source in self.sources), key=RANK.index)

    def _one(self, source: Source) -> int:
        """Judge one and show what came of it; returns the exit code for this one alone."""
        place = ""
        try:
            with source.opened(self.settings) as (path, sha256):
                place = "" if source.path else str(path)
                return self._judge(source, path, sha256)
        except JobError as error:
            # The name of a temporary file says nothing to a person.
            message = str(error).replace(place, source.shown) if place else str(error)
            self._show_error(source, error.code, message)
            return 4
        except Exception as error:
            if isinstance(error, RalfError | OSError):  # not the file's fault: the next would fail
                raise
            traceback.print_exc()
            self._show_error(source, "internal_error", f"an error in Ralf itself: {error}")
            return 5

    def _judge(self, source: Source, path: Path, sha256: str | None) -> int:
        args = self.args
        parts, ask = for_file(path, self.parts, replace(self.ask, sha256=sha256))
        with _bar(source.tag, quiet=args.quiet or (args.json and not sys.stderr.isatty())) as show:
            verdict, evidence = analyze(path, parts, ask=ask, progress=show)
        verdict = verdict.model_copy(update={"tag": source.tag})
        print_verdict(source.shown, verdict, as_json=args.json)
        self._write(source, verdict, evidence)
        outcomes = (
            failed_on(args.fail_on, verdict.label),
            self._annotate(source, path, verdict, ask),
        )
        return max(outcomes, key=RANK.index)

    def _annotate(self, source: Source, path: Path, verdict: Verdict, ask: Ask) -> int:
        """Write the video with boxes where it is asked for; the verdict stands without it too."""
        if (video := self.targets.videos.get(source)) is None:
            return 0
        # Only this option needs the encoder and the fonts.
        from ralf.worker.cli.annotate import annotate

        try:
            annotate(path, video, verdict, self.settings, ask.probed)
        except JobError as error:
            print(f"ralf: {source.shown}: no video: {error.code}: {error}", file=sys.stderr)
            return 4
        print(f"video: {video}", file=sys.stderr)
        return 0

    def _write(self, source: Source, verdict: Verdict, evidence: Evidence) -> None:
        """The files that the options ask for."""
        if (document := self.targets.documents.get(source)) is not None:
            replace_text(document, dump(verdict) + "\n")
            print(f"verdict: {document}", file=sys.stderr)
        for place in self.targets.pages.get(source, ()):
            # Only a page needs its template and charts, which take time to import.
            from ralf.worker.page.page import page

            replace_text(place, page(verdict, evidence))
            print(f"page: {place}", file=sys.stderr)

    def _show_error(self, source: Source, code: str, message: str) -> None:
        print(f"ralf: {source.shown}: {code}: {message}", file=sys.stderr)
        if self.args.json:
            print(dump(ScanError(file=source.shown, code=code, message=message)), flush=True)


def prepare(args: argparse.Namespace) -> Scan:
    """Check the options, then load the model."""
    if args.files.count(STDIN) > 1 or (STDIN in args.files and sys.stdin.isatty()):
        raise usage("- reads one video from standard input, which should be a pipe or a file")
    settings = configured(args)
    # Before the model is loaded, which takes seconds: a wrong option is reported at once.
    listed = sources(args.files)
    writes = targets(
        listed, report=args.report, output_dir=args.output_dir, annotated=args.annotated
    )
    # pictures are only for the page
    parts, ask = loaded(args, settings, pictures=bool(writes.pages))
    return Scan(args, settings, listed, parts, ask, writes)


def configured(args: argparse.Namespace) -> Settings:
    """The settings with what the options change, and the log set up for a person."""
    settings = Settings.from_environment()
    if args.models:
        settings = replace(settings, models_dir=args.models)
    # a person wants the verdict; the service's lines are for logs, and shown when asked for
    telemetry.configure(replace(settings, log_level=os.environ.get("RALF_LOG_LEVEL", "warning")))
    _check_min_face(args.min_face)
    return settings


def loaded(args: argparse.Namespace, settings: Settings, *, pictures: bool) -> tuple[Parts, Ask]:
    """The model, and what the options ask of each walk."""
    parts = load(settings, model=args.model, device=args.device, min_face=args.min_face)
    wanted = EvidencePolicy(thumbnails=pictures)
    return parts, Ask(sampling=_sampling(args, parts), evidence=wanted)


def failed_on(policy: str | None, label: Label) -> int:
    """The exit code that --fail-on gives a verdict of this label."""
    forged = label == "likely_forged"
    doubtful = label != "likely_authentic"
    return int((policy == "forged" and forged) or (policy == "inconclusive" and doubtful))


def _check_min_face(asked: int | None) -> None:
    try:
        # Built only to be checked: the bounds belong to the type.
        Finder() if asked is None else Finder(min_face=asked)
    except ValueError:
        raise usage(f"--min-face should be 12 to 2000 pixels, got {asked}") from None


def _sampling(args: argparse.Namespace, parts: Parts) -> Sampling | None:
    """The model's own sampling with what the command line changes; None where it changes none."""
    if args.sampling is None and args.max_frames is None:
        return None
    wanted = parts.default_sampling.model_dump()
    if args.max_frames is not None:
        most = parts.settings.max_frames
        if not 1 <= args.max_frames <= most:
            raise usage(f"--max-frames should be 1 to {most}, got {args.max_frames}")
        wanted["max_frames"] = args.max_frames
    if args.sampling is not None:
        mode, _, rate = args.sampling.partition(":")
        if mode not in ("uniform", "keyframes", "fps") or (mode == "fps") != bool(rate):
            raise usage(f"--sampling should be uniform, keyframes or fps:N, got {args.sampling}")
        wanted["mode"] = mode
        try:
            wanted["fps"] = float(rate) if rate else None
            return Sampling(**wanted)
        except ValueError:
            raise usage(f"--sampling fps:N wants 0 < N ≤ 120, got {rate}") from None
    return Sampling(**wanted)


@contextmanager
def _bar(name: str, *, quiet: bool) -> Iterator[Callable[[Partial], None]]:
    if quiet or not sys.stderr.isatty():
        yield lambda _partial: None
        return
    columns = (
        # A file's name may hold brackets, which rich would read as markup.
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(name, total=None, note="")

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


def print_verdict(name: str, verdict: Verdict, *, as_json: bool) -> None:
    """As a line of JSON, or for people."""
    if as_json:
        # At once: in a pipe Python would keep the line until its buffer is full.
        print(dump(verdict), flush=True)
        return
    on_terminal = sys.stdout.isatty()
    console = Console(highlight=False, width=None if on_terminal else ENDLESS)
    word, style = LABEL_WORDS[verdict.label].lower(), STYLES[verdict.label]
    digits, threshold = digits_of(verdict), verdict.threshold
    score = "" if verdict.score is None else f"  score {score_text(verdict.score, digits)}"
    line = Text.assemble(f"{name}: ", (word, style), score)
    line.append(f"  (forged at {threshold.forged_at:.{digits}f}, {policy_text(threshold.policy)})")
    console.print(line)
    console.print(Text(f"  {verdict.reason}"))
    if verdict.tracks:
        console.print(_tracks(verdict, digits))
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


def _tracks(verdict: Verdict, digits: int) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2))
    for name in ("  face", "from", "to", "samples", "score", "strongest", ""):
        table.add_column(name, justify="left" if name in ("  face", "") else "right")
    for track in verdict.tracks:
        table.add_row(
            f"  {track.track_id}",
            clock(track.start_ms),
            clock(track.end_ms),
            str(track.faces),
            "–" if track.score is None else score_text(track.score, digits),
            score_text(track.score_max, digits),
            track.reason or "",
        )
    return table
