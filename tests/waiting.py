"""Wait until a condition is true, long enough for a busy machine.

A test that sleeps for a fixed time, or that demands a result within a short time, fails on a slow
machine although nothing is wrong.  So a test waits for the condition itself.  A delay that must not
pass during the test is LONG_S, which is longer than any test.
"""

import time
from collections.abc import Callable

PATIENCE_S = 60.0
LONG_S = 600.0


def until(true: Callable[[], object], shown: Callable[[], object] = lambda: "") -> None:
    """Return when `true()` is true; after PATIENCE_S the test fails and prints `shown()`."""
    end = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < end, f"not within {PATIENCE_S} s: {shown()}"
        time.sleep(0.02)
