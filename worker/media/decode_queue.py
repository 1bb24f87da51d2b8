"""Requests for frames from several threads, decoded together by whichever thread is free.

First come, first served.  A request is one chunk: a long clip queues anew for each of its chunks,
so it does not delay short clips.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ralf.worker.media.types import Probe
from ralf.worker.shared_work import SharedWork


@dataclass(eq=False)
class FrameRequest:
    """Frames wanted of one clip, and then their pixels or an error."""

    probe: Probe
    data: NDArray[np.uint8] = field(repr=False)
    wanted: NDArray[np.int64]
    file: bytes = b""
    """The name by which a failure of this file is remembered."""
    known: bool = False
    """DALI has decoded an earlier chunk of this clip, so another clip is the likelier to fail."""
    pixels: Tensor | None = field(default=None, repr=False)  # u8 [n, 3, h, w]
    error: str = ""

    @property
    def answered(self) -> bool:
        """Whether it has pixels or an error."""
        return self.pixels is not None or bool(self.error)

    @property
    def bytes(self) -> int:
        """The size of its decoded pixels."""
        return 3 * len(self.wanted) * self.probe.width * self.probe.height


class DecodeQueue:
    """Collects requests of all threads; `decode` answers a batch of them."""

    def __init__(
        self, decode: Callable[[Sequence[FrameRequest]], None], most: int, most_bytes: int
    ) -> None:
        self.decode, self.most, self.most_bytes = decode, most, most_bytes
        self.waiting: deque[FrameRequest] = deque()
        self.shared = SharedWork(self._take, self._answer)

    def ask(self, requests: Sequence[FrameRequest]) -> None:
        """Return when each request has its pixels or its error."""
        with self.shared.changed:
            self.waiting.extend(requests)
        self.shared.until(lambda: all(request.answered for request in requests))

    def _answer(self, batch: Sequence[FrameRequest]) -> None:
        try:
            self.decode(batch)
        finally:
            # Whatever happened, no thread may wait for an answer that never comes.
            for request in batch:
                if not request.answered:
                    request.error = "the batch was given up"

    def _take(self) -> list[FrameRequest]:
        """As many of the first requests as fit in one batch, and one at least."""
        # Never empty: the calling thread's request has no answer, and no other thread is working.
        # The first goes even where it is larger than the room, or it would wait for ever.
        batch = [self.waiting.popleft()]
        room = self.most_bytes - batch[0].bytes
        while self.waiting and len(batch) < self.most and self.waiting[0].bytes <= room:
            batch.append(self.waiting.popleft())
            room -= batch[-1].bytes
        return batch
