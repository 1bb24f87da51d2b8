"""Batches that a device can hold: a few fixed sizes, and half of them when its memory runs out.

Compiled networks, plans and CUDA graphs are made for one batch size each, so any number of crops
is cut into those sizes, the buckets, and the last part is padded.  The cost of a bucket is about
its size plus a little for the call (on one H200 a RALF plan took 3.5 ms for 1 face, 33.8
for 32 and 61 for 64: 2.6 ms a call and 0.92 ms a face), so 9 faces are 8 and 1, not 64.

When a device runs out of memory, its largest bucket is halved for the rest of the process: the next
call would run out again.  Results of earlier parts are kept.  At a batch of one nothing can be
halved, and the device's own error goes to the caller, which decides about retries of the job.

Every engine that runs on a GPU uses this file; it has no code for any particular network.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

import structlog
import torch
from torch import Tensor

BUCKETS = (1, 8, 64)
LARGEST = BUCKETS[-1]
CPU_BATCH = 4
"""More at once leaves the caches: small RALF, two cores, 61 ms a face with 2 to 4, 73 with 8."""
CALL_COST = 3
"""What a call costs besides its faces, in faces."""

log = structlog.get_logger()


def default_batch(device: torch.device) -> int:
    """The largest batch, unless the caller asks for another."""
    return CPU_BATCH if device.type == "cpu" else LARGEST


class Batching:
    """The buckets of one engine, smaller after the device ran out of memory."""

    def __init__(self, buckets: Sequence[int] = BUCKETS) -> None:
        if not buckets or min(buckets) < 1:
            raise ValueError(f"buckets should be batch sizes of 1 or more, got {tuple(buckets)}")
        self.buckets = tuple(sorted(set(buckets)))

    @property
    def most(self) -> int:
        """The largest batch."""
        return self.buckets[-1]

    def __call__(self, crops: Tensor, score: Callable[[Tensor, int], Tensor]) -> Tensor:
        """Crops [m, ...] → one tensor [m, ...], m ≥ 1, in the cheapest sequence of buckets.

        `score(part, bucket)` gets up to `bucket` crops and returns a row for each, in order; rows
        of padding are cut off.  A part that did not fit is scored again in smaller buckets.
        """
        done: list[Tensor] = []
        start = 0
        while start < len(crops):
            # Asked anew for each part, since a halving changes the buckets.
            bucket = cover(len(crops) - start, self.buckets)[0]
            part = crops[start : start + bucket]
            try:
                done.append(score(part, bucket)[: len(part)])
            except torch.OutOfMemoryError:
                if bucket == 1:
                    raise
                self._halve(bucket)
            else:
                start += len(part)
        return torch.cat(done)

    def _halve(self, bucket: int) -> None:
        """Use no batch of this size again; another thread may have halved it meanwhile."""
        kept = {size for size in self.buckets if size < bucket}
        self.buckets = tuple(sorted(kept | {bucket // 2}))
        log.warning("engine.batch_halved", was=bucket, batch=self.most)
        # The failed attempt left memory in torch's cache, which the smaller batch may need.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@lru_cache(maxsize=4096)
def cover(count: int, buckets: tuple[int, ...]) -> tuple[int, ...]:
    """The buckets, largest first, that hold so many at the least cost; only the last is padded."""
    # Full largest buckets cost least a face, so only the rest needs a search.
    whole, left = divmod(count, buckets[-1])
    best: list[tuple[int, ...]] = [()]
    for few in range(1, left + 1):
        ways = [(size, *best[max(0, few - size)]) for size in buckets]
        best.append(min(ways, key=lambda way: (sum(way) + CALL_COST * len(way), len(way))))
    return (buckets[-1],) * whole + tuple(sorted(best[left], reverse=True))
