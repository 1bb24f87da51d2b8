"""Many clips through one process: does its memory, the device's or its time per clip grow?

After each clip the process's memory, the device's, the number of open files and the clip's time
are recorded.  The first tenth is left out, while caches fill and libraries choose their kernels.
The rest is cut into BLOCKS and a line is fitted through the blocks' means, because neighbouring
clips are not independent.  A leak is a slope whose 95 % interval is above zero and whose size
matters.
"""

import itertools
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from ralf.worker.bench.gauges import held
from ralf.worker.pipeline import Ask, analyze
from ralf.worker.runtime import Parts

WARM_UP = 0.1
BLOCKS = 20


@dataclass(frozen=True)
class Slope:
    """Growth per thousand clips, with its 95 % interval, and the level it starts from."""

    per_thousand: float
    low: float
    high: float
    mean: float


def slope(values: Sequence[float] | NDArray[np.float64]) -> Slope:
    """The slope of one quantity, recorded after each clip."""
    later = np.asarray(values, np.float64)[int(len(values) * WARM_UP) :]
    blocks = [block for block in np.array_split(later, BLOCKS) if len(block)]
    # A line through two points has no error, and so no interval.
    if len(blocks) < 3:
        raise ValueError(f"a slope needs at least 3 clips after the warm-up, got {len(blocks)}")
    ends = np.cumsum([len(block) for block in blocks])
    middles = ends - np.array([len(block) for block in blocks]) / 2
    means = np.array([block.mean() for block in blocks])
    grown, reach = 0.0, 0.0
    if np.ptp(means) > 0:  # SciPy has no error (NaN) for a line that is flat
        line = stats.linregress(middles, means)
        grown = float(line.slope)
        reach = float(stats.t.ppf(0.975, len(blocks) - 2)) * float(line.stderr)
    figures = (1000 * grown, 1000 * (grown - reach), 1000 * (grown + reach), float(later.mean()))
    return Slope(*(round(figure, 3) for figure in figures))


def soak(
    clips: Sequence[Path],
    parts: Parts,
    ask: Ask,
    *,
    count: int,
    at_once: int,
    most_s: float = 3600.0,
) -> dict[str, list[float]]:
    """`count` walks over the clips in turn, `at_once` at a time; what was held after each.

    No walk starts after most_s.
    """
    recorded: dict[str, list[float]] = {}
    lock, numbers = threading.Lock(), itertools.count()
    end = time.monotonic() + most_s

    def walks() -> None:
        while time.monotonic() < end:
            with lock:
                number = next(numbers)
            if number >= count:
                return
            start = time.perf_counter()
            analyze(clips[number % len(clips)], parts, ask=ask)
            spent = time.perf_counter() - start
            with lock:
                # Under the lock, so that the same place of each list is the same clip.
                for name, value in {**held(parts.engine.device), "clip_s": spent}.items():
                    recorded.setdefault(name, []).append(value)

    with ThreadPoolExecutor(at_once) as pool:
        for walk in [pool.submit(walks) for _ in range(at_once)]:
            # Raises what the walk raised; leaving the pool does not.
            walk.result()
    return recorded
