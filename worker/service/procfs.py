"""What the kernel knows of a process: its memory and its processor time, read at each turn.

Where there is no /proc both are 0, and the limits that need them do not bite.
"""

import os

_PAGE = os.sysconf("SC_PAGE_SIZE")
_TICKS = os.sysconf("SC_CLK_TCK")


def rss(pid: int) -> int:
    """Resident bytes of a process; 0 when it has gone."""
    try:
        with open(f"/proc/{pid}/statm") as file:  # noqa: PTH123  read each turn, kept cheap
            return int(file.read().split()[1]) * _PAGE
    except (OSError, IndexError, ValueError):
        return 0


def cpu(pid: int) -> float:
    """Processor seconds of a process, its own and the kernel's for it; 0 when it has gone."""
    try:
        with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123
            after_name = file.read().rpartition(")")[2].split()
        return (int(after_name[11]) + int(after_name[12])) / _TICKS
    except (OSError, IndexError, ValueError):
        return 0.0
