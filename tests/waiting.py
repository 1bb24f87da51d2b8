"""Waiting for something to become true: long enough for a machine that is busy with other things.

A test that sleeps and then looks, or that says how soon something must be, fails on a slow machine
though nothing is wrong.  So tests wait for what they want to see, and what must not happen in time
is made so long that nobody waits for it (LONG_S).
"""

import time
from collections.abc import Callable

PATIENCE_S = 60.0
LONG_S = 600.0


def until(true: Callable[[], object], shown: Callable[[], object] = lambda: "") -> None:
    """Return once it is true; after PATIENCE_S the test fails, with what `shown` says."""
    end = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < end, f"not within {PATIENCE_S} s: {shown()}"
        time.sleep(0.02)
