"""How signal handlers and other threads reach the parent's loop.

A signal handler may run between any two instructions, so it only sets a flag here and wakes the
loop.  RQ's listening thread and the thread that fetches do the same.
"""

import contextlib
import os
import time


class Wakeup:
    """Flags for the parent's loop, and a pipe that ends its select()."""

    def __init__(self) -> None:
        self.stopping = False
        self.drain_since: float | None = None
        self.hand_back_now = False
        """A second signal came: the running job goes back to the queue at once."""
        self.operator_kill = ""
        """An operator killed the child: the RQ command, stop-job or kill-horse."""
        self.blocked = ""
        """Why the worker can take no job now, such as a full disk; /readyz depends on it."""
        self.pulse = time.monotonic()
        """When the loop turned last; /healthz depends on it."""
        self._read, self.write = os.pipe()
        # A signal handler must not block on a full pipe.  A byte that does not fit is not needed:
        # those in the pipe end the select() already.
        os.set_blocking(self._read, False)
        os.set_blocking(self.write, False)

    def must_leave(self, grace_s: float) -> bool:
        """Whether the grace of a drain is over, or a second signal came."""
        since = self.drain_since
        over = since is not None and time.monotonic() - since > grace_s
        return over or self.hand_back_now

    def fileno(self) -> int:
        """For select()."""
        return self._read

    def wake(self) -> None:
        """End the select(); from a signal handler or any thread."""
        with contextlib.suppress(BlockingIOError):
            os.write(self.write, b"\0")

    def clear(self) -> None:
        """Empty the pipe after it woke the loop."""
        with contextlib.suppress(BlockingIOError):
            # One read: what is left over only ends the next select() too.
            os.read(self._read, 4096)

    def close(self) -> None:
        """Close the pipe."""
        os.close(self._read)
        os.close(self.write)
