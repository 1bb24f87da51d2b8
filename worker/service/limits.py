"""When a run has had enough: its time, its silence, its memory, its deadline.  Pure arithmetic.

The time is clamp(base + per second of video × its seconds, least, most); until the child has told
the clip's length it is the most.  It counts from the job's turn in the child, not from the fetch.

Silence alone is not a hang: on a slow machine one chunk of frames may take minutes.  A child that
says nothing for hang_s and has hardly used the processor meanwhile is blocked and will stay so;
one that computes gets BUSY_FACTOR times as long, and its time above all.
"""

import contextlib
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from ralf.worker.errors import DeadlinePassed, DecoderCrashed, Hung, JobError
from ralf.worker.settings import Settings

BUSY_FACTOR = 5
BUSY_SHARE = 0.05
"""Of one core, over the silence."""


@dataclass
class Pace:
    """How a run goes; times are time.monotonic()'s."""

    started: float | None = None
    """When its turn in the child came."""
    progressed: float = 0.0
    cpu: float = 0.0
    """Processor seconds of the child when it progressed last."""
    seconds: float = 0.0
    """The clip's length; 0 while it is not known."""


def time_allowed(settings: Settings, seconds: float) -> float:
    """How long a clip of so many seconds may take; 0 is a length that nobody knows yet."""
    if seconds <= 0:
        return settings.timeout_most_s
    wanted = settings.timeout_base_s + settings.timeout_per_video_s * seconds
    return min(max(wanted, settings.timeout_least_s), settings.timeout_most_s)


def memory_allowed(settings: Settings) -> int:
    """Above so many bytes a child is killed in the middle of a job."""
    if settings.child_max_rss:
        return settings.child_max_rss
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # no cgroup, or "max"
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return int(0.8 * total)


def overrun(
    settings: Settings,
    pace: Pace,
    *,
    now: float,
    cpu: float,
    rss: int,
    rss_allowed: int,
    deadline: datetime | None,
) -> JobError | None:
    """What the run must be ended for, if for anything."""
    if deadline is not None and datetime.now(UTC) >= deadline:
        return DeadlinePassed(f"the deadline {deadline} passed while the job ran")
    if pace.started is None:
        return None
    allowed = time_allowed(settings, pace.seconds)
    if now - pace.started > allowed:
        length = f"a clip of {pace.seconds:g} s" if pace.seconds else "any clip"
        return Hung(f"ran for more than {allowed:g} s, which is what {length} gets")
    silence = now - pace.progressed
    if silence > settings.hang_s:
        busy = cpu - pace.cpu > BUSY_SHARE * silence
        if not busy or silence > BUSY_FACTOR * settings.hang_s:
            how = "busy all the while" if busy else "and idle"
            return Hung(f"no progress for {silence:.1f} s, {how}; the child was killed")
    if rss > rss_allowed:
        return DecoderCrashed(f"its child held {rss} bytes; at most {rss_allowed} are allowed")
    return None
