"""Progress on stderr: a bar on a terminal, about twenty lines in all elsewhere."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Move(Protocol):
    """Takes how many are done, of how many, and what was done last."""

    def __call__(self, done: int, of: int, what: str = "", /) -> None: ...


@contextmanager
def progress() -> Iterator[Move]:
    """The function to call after each piece of work."""
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
