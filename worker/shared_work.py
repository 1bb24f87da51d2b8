"""Work that several threads want done and one of them does for all, without a thread of its own.

Each thread waits for its own answer.  While no thread is working, one of those that wait takes the
next batch, whether or not its own requests are in it.  Requests that arrive meanwhile become the
batch after it.  So a busy machine works in large batches, and an idle one starts at once.  The
scorer (batcher.py) and the GPU's decoder (media/decode_dali.py) work this way.
"""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Batch = TypeVar("Batch")


class SharedWork(Generic[Batch]):
    """`take` makes the next batch, called with the lock held; `work` does it, without the lock."""

    def __init__(self, take: Callable[[], Batch], work: Callable[[Batch], None]) -> None:
        self.take, self.work = take, work
        self.changed = threading.Condition()
        """The lock of whatever `take` reads."""
        self.busy = False

    def until(self, answered: Callable[[], bool]) -> None:
        """Return once `answered`; until then wait for others' work, or work for all."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: answered() or not self.busy)
                if answered():
                    return
                batch = self.take()
                # After take(): if that raises, the others must not wait for a batch that is
                # not worked on.
                self.busy = True
            try:
                self.work(batch)
            finally:
                with self.changed:
                    self.busy = False
                    # All, not one: the one that wakes may have its answer and leave, and the others
                    # would sleep on.
                    self.changed.notify_all()
