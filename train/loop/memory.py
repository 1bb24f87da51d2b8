"""Memory that is asked for again and again is kept, where glibc would give it back each time.

Every tensor of more than 32 MB is mapped anew and unmapped when it dies, and the kernel clears each
of its pages at the first touch: two fifths of the time of an evaluation on two cores.  A training
run has the same tensors at every step.  A worker does without: its memory is bounded, and shared.
"""

import ctypes
import sys

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3
"""mallopt's names for what it sets."""


def keep_freed() -> bool:
    """From now on this process maps no tensor apart; whether its C library could be told."""
    if not sys.platform.startswith("linux"):
        return False
    tell = getattr(ctypes.CDLL(None), "mallopt", None)
    wanted = ((MMAP_THRESHOLD, 1 << 30), (TRIM_THRESHOLD, (1 << 31) - 1), (TOP_PAD, 64 << 20))
    return tell is not None and all(tell(name, value) == 1 for name, value in wanted)
