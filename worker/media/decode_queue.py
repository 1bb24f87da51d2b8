"""Orders for frames, from several threads, filled together: who finds nobody at it takes them all.

There is no thread that waits for orders and none to stop.  While one batch is decoded others gather
and are the next batch, so a loaded machine decodes in batches by itself and an idle one at once.
First come, first served, and an order is one chunk: a long clip stands in line anew for each of
its chunks, and holds no short one up.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ralf.worker.media.types import Probe


@dataclass(eq=False)
class Order:
    """Frames wanted of one clip, and what became of them."""

    probe: Probe
    data: NDArray[np.uint8] = field(repr=False)
    wanted: NDArray[np.int64]
    pixels: Tensor | None = field(default=None, repr=False)  # u8 [n, 3, h, w]
    error: str = ""

    @property
    def filled(self) -> bool:
        """Whether it has an answer."""
        return self.pixels is not None or bool(self.error)

    @property
    def bytes(self) -> int:
        """What it takes decoded."""
        return 3 * len(self.wanted) * self.probe.width * self.probe.height


class Batches:
    """Orders of all threads, filled together: whoever finds nobody at it takes all that wait."""

    def __init__(self, fill: Callable[[Sequence[Order]], None], most: int, most_bytes: int) -> None:
        self.fill, self.most, self.most_bytes = fill, most, most_bytes
        self.turn = threading.Condition()
        self.waiting: deque[Order] = deque()
        self.busy = False

    def ask(self, orders: Sequence[Order]) -> None:
        """Returns when each order has its pixels or its error."""
        with self.turn:
            self.waiting.extend(orders)
            while not all(order.filled for order in orders):
                if self.busy:
                    self.turn.wait()
                else:
                    self._fill_one()

    def _fill_one(self) -> None:
        """One batch, the condition let go of meanwhile; its orders leave with an answer always."""
        batch = self._taken()
        self.busy = True
        self.turn.release()
        try:
            self.fill(batch)
        finally:
            self.turn.acquire()
            self.busy = False
            for order in batch:
                if not order.filled:
                    order.error = "the batch was given up"
            self.turn.notify_all()

    def _taken(self) -> list[Order]:
        """First come, first served, as many as fit in one batch; one at least."""
        batch = [self.waiting.popleft()]
        room = self.most_bytes - batch[0].bytes
        while self.waiting and len(batch) < self.most and self.waiting[0].bytes <= room:
            batch.append(self.waiting.popleft())
            room -= batch[-1].bytes
        return batch
