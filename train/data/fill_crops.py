"""Making every pair of a crop cache before a training asks for it, in several processes."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from ralf.train.data.batches import Batches
from ralf.train.data.index import Index, IndexFault
from ralf.train.data.processes import results
from ralf.train.recipe import Data

SHARE = 32
"""Pairs that a process makes at a time."""
OnProgress = Callable[[int, int, str], None]


def fill(index: Index, data: Data, out: Path, workers: int, on_progress: OnProgress) -> Path:
    """The folder of the pairs, which are all there at the end."""
    batches = Batches(index, data, crops=out)
    if batches.cache is None:
        raise IndexFault(
            "this recipe makes every pair anew, so there is nothing to keep: --set data.variants=4 "
            "forges each face in four ways"
        )
    make, opened = partial(_make, batches), partial(_opened, index, data, out)
    for done, _ in enumerate(results(make, opened, range(batches.pairs), workers, share=SHARE), 1):
        on_progress(done, batches.pairs, "")
    return batches.cache.folder


def _opened(index: Index, data: Data, out: Path) -> Callable[[int], None]:
    return partial(_make, Batches(index, data, crops=out))


def _make(batches: Batches, number: int) -> None:
    # Nothing is returned: the pair is in the cache, and is too large to send between processes.
    batches.variant(number)
