"""Many small tasks on the same data, in this process or in several that each open the data once."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, TypeVar

import torch

Task = TypeVar("Task")
Result = TypeVar("Result")
Work = Callable[[Task], Result]


def results(
    work: Work[Task, Result],
    opened: Callable[[], Work[Task, Result]],
    tasks: Sequence[Task],
    workers: int,
    *,
    share: int,
) -> Iterator[Result]:
    """What `work` gives for each task, in order; with 0 workers this process does it.

    Else so many processes take `share` tasks at a time; each calls `opened` once, for a `work` of
    its own.
    """
    if workers == 0:
        yield from map(work, tasks)
        return
    shares = [tasks[first : first + share] for first in range(0, len(tasks), share)]
    # Not forked: torch's threads do not survive a fork.
    spawn = get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, initializer=_start, initargs=(opened,)) as processes:
        for made in processes.map(_do, shares):
            yield from made


_work: Callable[[Any], Any] | None = None


def _start(opened: Callable[[], Callable[[Any], Any]]) -> None:
    global _work
    torch.set_num_threads(1)
    _work = opened()


def _do(tasks: Sequence[Any]) -> list[Any]:
    assert _work is not None
    return [_work(task) for task in tasks]
