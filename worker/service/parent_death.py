"""End with the process that started us, however that process dies.

A supervisor that is killed with SIGKILL cannot stop what it started.  Linux can: a process may ask
for a signal at its parent's death, and keeps that request through exec.

    python -m ralf.worker.service.parent_death PARENT_PID SIGNAL COMMAND...    ask, then exec
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with(parent_pid: int, number: signal.Signals) -> None:
    """Get this signal when that process dies; exit at once if it is dead already."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    # It may have died before the request was made: then no signal comes.
    if os.getppid() != parent_pid:
        os._exit(0)


if __name__ == "__main__":
    die_with(int(sys.argv[1]), signal.Signals(int(sys.argv[2])))
    os.execv(sys.argv[3], sys.argv[3:])
