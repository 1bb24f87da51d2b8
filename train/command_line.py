"""What the commands of this room share: how one is added and refuses, options as text, progress.

Exit codes: 0 done, 1 training diverged or a condition does not hold, 2 cannot be done as asked, 130
interrupted (the same command goes on).
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
Run = Callable[[argparse.Namespace], int]
OK, DIVERGED, USAGE = 0, 1, 2
INTERRUPTED = 130
"""Asked to stop, with a whole checkpoint saved: 128 + SIGINT, as shells report an interrupted
command."""
# What `--help` says of options that several commands have.
DATA = "folders in a known layout, or index files; docs/training.md lists the layouts"
ONLY = "take only rows with these values, such as method=real,swap; may be given several times"
WORKERS = "work in N processes beside this one; 0: in this one alone"


def add_command(verbs: Commands, name: str, summary: str, run: Run) -> argparse.ArgumentParser:
    """A command that says the same in the list of commands and in its own help, and refuses in one
    line."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        name, help=summary, description=summary[0].upper() + summary[1:] + "."
    )
    parser.set_defaults(run=refusing(run))
    return parser


def add_models_option(parser: argparse.ArgumentParser) -> None:
    """The folder of models."""
    parser.add_argument(
        "--models", type=Path, metavar="DIR",
        help="folder of models (default: RALF_MODELS_DIR, else the one that ships with Ralf)",
    )  # fmt: skip


def refusing(run: Run) -> Run:
    """The command, with its refusals as one line on stderr and an exit code."""

    def run_and_refuse(args: argparse.Namespace) -> int:
        from ralf.kernels.artifact import ArtifactError
        from ralf.kernels.engine import EngineError
        from ralf.train.loop.checkpoint import CheckpointError
        from ralf.train.loop.cpu_speed import keep_freed
        from ralf.train.loop.step import Diverged

        # Here and not where the package is imported: a worker, whose memory is bounded, must not.
        keep_freed()
        try:
            return run(args)
        except Diverged as error:
            print(f"ralf: {error}", file=sys.stderr)
            return DIVERGED
        # Recipes, indexes, networks and calibration refuse with subclasses of ValueError.
        except (ValueError, CheckpointError, ArtifactError, EngineError) as error:
            print(f"ralf: {error}", file=sys.stderr)
            return USAGE

    return run_and_refuse


def listed(text: str) -> tuple[str, ...]:
    """A,B as a tuple."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def changes_of(given: Sequence[str]) -> dict[str, str]:
    """What `--set NAME=VALUE`, repeated, asks to change."""
    from ralf.train.recipe_text import RecipeError

    pairs = [change.partition("=") for change in given]
    if bad := [name for name, equals, _ in pairs if not equals]:
        raise RecipeError(f"--set takes NAME=VALUE, not {bad[0]!r}")
    return {name: text for name, _, text in pairs}


class Move(Protocol):
    """Takes how many are done, of how many, and what was done last."""

    def __call__(self, done: int, of: int, what: str = "", /) -> None: ...


@contextmanager
def progress() -> Iterator[Move]:
    """The function to call after each piece of work: a bar on stderr, about twenty lines in all
    where that is no terminal."""
    if not sys.stderr.isatty():
        yield _print_some
        return
    # Only where a bar is drawn: a pipe or a log file needs no rich.
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (BarColumn(20), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None)

        def move(done: int, of: int, what: str = "") -> None:
            bar.update(task, completed=done, total=of, description=escape(what[:80]))

        yield move


def _print_some(done: int, of: int, what: str = "") -> None:
    """A log should show that the work goes on, and no more."""
    if done == of or done % max(1, of // 20) == 0:
        print(f"{done}/{of} {what}".rstrip(), file=sys.stderr)
