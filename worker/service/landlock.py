"""Landlock: which files a process may open, and that it reaches no network and no other process.

A process restricts itself, without any privilege; what it starts is restricted too.  Each version
of the kernel's interface (ABI) can restrict more:

    ABI 1   Linux 5.13   opening, creating and removing files
    ABI 2   Linux 5.19   moving files between folders
    ABI 3   Linux 6.2    truncating files
    ABI 4   Linux 6.7    TCP: connect and bind
    ABI 5   Linux 6.10   ioctl on devices
    ABI 6   Linux 6.12   signals to other processes, and their abstract Unix sockets

Not restricted: stat(), so that a process can still find out which paths exist, and Unix sockets
that have a path.
"""

import ctypes
import os
import stat
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ralf.worker.service.seccomp import syscall

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
"""The same numbers on every architecture."""
_ASK_VERSION = 1
_PATH_BENEATH = 1

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = (1 << bit for bit in range(4))
_MAKE_CHAR, _MAKE_BLOCK = 1 << 6, 1 << 11
_REFER, _TRUNCATE, _IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
_BITS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
"""How many rights to files each ABI knows; later ones know as many as 5."""
_TCP = 0b11
_SCOPES = 0b11
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV
"""Rights that a rule for a single file may have."""

_kept: list[int] = []
"""A rule for a path in /proc holds while its entry is in memory: open descriptors keep it there."""


@dataclass
class Paths:
    """What may be opened.  A folder stands for everything below it."""

    read: list[Path] = field(default_factory=list)
    """Read, and run as a program."""
    write: list[Path] = field(default_factory=list)
    """Also written, created and removed."""
    devices: list[Path] = field(default_factory=list)
    """Read, written and controlled by ioctl()."""


def version() -> int:
    """The kernel's ABI; 0 where it has no Landlock or did not start it."""
    asked = syscall(_CREATE_RULESET, None, 0, _ASK_VERSION)
    return max(asked, 0)


def restrict(paths: Paths, abi: int) -> str:
    """Restrict this thread and those that it starts; says why the kernel did not, or nothing.

    Call it before other threads start.  The process must have set no_new_privs.
    """
    known = (1 << _BITS[min(abi, 5)]) - 1
    words = [known] + ([_TCP] if abi >= 4 else []) + ([_SCOPES] if abi >= 6 else [])
    attributes = struct.pack(f"={len(words)}Q", *words)
    ruleset = syscall(_CREATE_RULESET, attributes, len(attributes), 0)
    if ruleset < 0:
        return os.strerror(ctypes.get_errno())
    try:
        reading = _EXECUTE | _READ_FILE | _READ_DIR
        writing = known & ~(_EXECUTE | _MAKE_CHAR | _MAKE_BLOCK | _IOCTL_DEV)
        control = _READ_FILE | _WRITE_FILE | _READ_DIR | _IOCTL_DEV
        for rights, granted in (
            (reading, paths.read),
            (writing, paths.write),
            (control, paths.devices),
        ):
            _grant(ruleset, granted, rights & known)
        if syscall(_RESTRICT_SELF, ruleset, 0) < 0:
            return os.strerror(ctypes.get_errno())
    finally:
        os.close(ruleset)
    return ""


def _grant(ruleset: int, paths: Iterable[Path], rights: int) -> None:
    for path in paths:
        try:
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue  # there is nothing that it could open
        folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        rule = struct.pack("=Qi", rights if folder else rights & _OF_FILES, descriptor)
        syscall(_ADD_RULE, ruleset, _PATH_BENEATH, rule, 0)
        if path.is_relative_to("/proc"):
            _kept.append(descriptor)
        else:
            os.close(descriptor)
