"""Making every pair of a crop cache before a training asks for it, in several processes."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch

from ralf.train.data.batches import Batches
from ralf.train.data.index import Index, IndexFault
from ralf.train.recipe import Data

SHARE = 32
"""Pairs that a process makes at a time."""
OnProgress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class _Setup:
    """What a process needs to make any pair."""

    index: Index
    data: Data
    out: Path

    def batches(self) -> Batches:
        return Batches(self.index, self.data, crops=self.out)


_batches: Batches | None = None


def fill(index: Index, data: Data, out: Path, workers: int, on_progress: OnProgress) -> Path:
    """The folder of the pairs, which are all there at the end."""
    setup = _Setup(index, data, out)
    batches = setup.batches()
    if batches.cache is None:
        raise IndexFault(
            "this recipe makes every pair anew, so there is nothing to keep: --set data.variants=4 "
            "forges each face in four ways"
        )
    shares = [
        range(first, min(first + SHARE, batches.pairs)) for first in range(0, batches.pairs, SHARE)
    ]
    done = 0
    for made in _run(setup, batches, shares, workers):
        done += made
        on_progress(done, batches.pairs, "")
    return batches.cache.folder


def _run(setup: _Setup, batches: Batches, shares: list[range], workers: int) -> Iterator[int]:
    if workers == 0:
        yield from (_make_all(batches, share) for share in shares)
        return
    spawn = get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, initializer=_start, initargs=(setup,)) as processes:
        yield from processes.map(_make_share, shares)


def _start(setup: _Setup) -> None:
    global _batches
    torch.set_num_threads(1)
    _batches = setup.batches()


def _make_share(share: range) -> int:
    assert _batches is not None
    return _make_all(_batches, share)


def _make_all(batches: Batches, share: Iterable[int]) -> int:
    return len([batches.variant(number) for number in share])
