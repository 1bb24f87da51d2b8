"""What signals and other threads tell the waiting parent.

A signal handler may run between any two instructions, so it does nothing but leave its order here
and wake the loop; so do RQ's listening thread and the thread that fetches.
"""

import contextlib
import os
import time


class Orders:
    """What signals and other threads tell the waiting parent; wake() ends its select()."""

    def __init__(self) -> None:
        self.stopping = False
        self.drain_since: float | None = None
        self.hurry = False
        self.stopped = ""
        """An operator killed the child (rq's stop-job, kill-horse): what for."""
        self.pulse = time.monotonic()
        """When the parent last looked around; /healthz is made of it."""
        self._read, self.write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self.write, False)

    def fileno(self) -> int:
        """For select()."""
        return self._read

    def wake(self) -> None:
        """From a signal handler or any thread."""
        with contextlib.suppress(BlockingIOError):
            os.write(self.write, b"\0")

    def drained(self) -> None:
        """Empty the pipe after it woke somebody."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._read, 4096)

    def close(self) -> None:
        """Close the pipe."""
        os.close(self._read)
        os.close(self.write)
