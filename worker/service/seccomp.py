"""A seccomp filter: the system calls that the child process may not make.

A classic BPF program that the kernel runs before each system call.  It lists what is refused and
lets everything else pass: what torch, CUDA and FFmpeg call changes with their versions, so a list
of what they need would break at an upgrade.  A refused call fails with EPERM.  A call of another
architecture than this machine's, such as 32-bit x86, kills the process; x32's calls are refused.

The filter needs no privilege, holds for every later thread and process, and cannot be removed.
libseccomp would assemble the same program, but no Python wheel brings it along.
"""

import ctypes
import os
import platform
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

NUMBERS: Mapping[str, tuple[int, int]] = {
    # name: its number on x86_64 and on aarch64; -1 where the call does not exist
    # networks: a socket can reach Redis, the metadata service and other processes
    "socket": (41, 198),
    "connect": (42, 203),
    "socketpair": (53, 199),
    # other processes of the same user
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424),
    "kcmp": (312, 272),
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "prlimit64": (302, 261),
    "setpriority": (141, 140),
    "ioprio_set": (251, 30),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    # other programs
    "execve": (59, 221),
    "execveat": (322, 281),
    # namespaces and mounts: they open code of the kernel that only administrators need
    "unshare": (272, 97),
    "setns": (308, 268),
    "clone": (56, 220),
    "clone3": (435, 435),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "acct": (163, 89),
    # parts of the kernel in which many of its faults were found
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "fanotify_init": (300, 262),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "lookup_dcookie": (212, 18),
    "vmsplice": (278, 75),
    "personality": (135, 92),
    "modify_ldt": (154, -1),
    "syslog": (103, 116),
    # System V's and POSIX' queues, memory and locks are shared by all processes of a user
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "msgget": (68, 186),
    "msgsnd": (69, 189),
    "msgrcv": (70, 188),
    "msgctl": (71, 187),
    "semget": (64, 190),
    "semop": (65, 193),
    "semtimedop": (220, 192),
    "semctl": (66, 191),
    "mq_open": (240, 180),
    "mq_unlink": (241, 181),
    # the machine
    "reboot": (169, 142),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "iopl": (172, -1),
    "ioperm": (173, -1),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "ioctl": (16, 29),
}
PROGRAMS = ("execve", "execveat")
"""Refused only after the model is loaded: loading may run a compiler."""

_NEW_NAMESPACES = 0x7E020080
"""CLONE_NEWTIME, NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID and NEWNET."""
_AF_UNIX, _SOCK_STREAM, _SOCK_SEQPACKET = 1, 1, 5
# They put characters into a terminal's input, as if its user had typed them.
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C

_PLACE = {"x86_64": 0, "aarch64": 1}
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32_BIT = 0x40000000
_SECCOMP = {"x86_64": 317, "aarch64": 277}
_SET_MODE_FILTER, _TSYNC = 1, 1
_EPERM, _ENOSYS = 1, 38
_ALLOW, _ERRNO, _KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000
# BPF: load a word, and with a constant, jump if equal, jump if at least, return
_LOAD, _AND, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
"""Where these are in the kernel's struct seccomp_data."""


@dataclass(frozen=True)
class Only:
    """An argument of a call, and the values with which the call may pass."""

    argument: int
    values: tuple[int, ...]
    mask: int = 0xFFFFFFFF
    """Of its lower 32 bits; the arguments looked at are not wider, or the kernel cuts them."""


@dataclass(frozen=True)
class NoneOf(Only):
    """An argument, and the values with which the call is refused."""


def conditions(*, pid: int, gpu: bool) -> dict[str, tuple[Only, ...]]:
    """The calls that pass with some arguments.

    gpu: CUDA's library makes Unix sockets for itself.  They may be made and not connected; on a CPU
    none may be made.
    """
    own = Only(0, (pid,))
    passing: dict[str, tuple[Only, ...]] = {
        "socketpair": (Only(0, (_AF_UNIX,)),),
        "kill": (own,),
        "tgkill": (own,),
        "rt_sigqueueinfo": (own,),
        "rt_tgsigqueueinfo": (own,),
        "prlimit64": (Only(0, (0, pid)),),
        "clone": (Only(0, (0,), _NEW_NAMESPACES),),
        "ioctl": (NoneOf(1, (_TIOCSTI, _TIOCLINUX)),),
    }
    if gpu:
        # Not datagrams: those can be sent to an address without connect().
        streams = Only(1, (_SOCK_STREAM, _SOCK_SEQPACKET), mask=0xF)
        passing["socket"] = (Only(0, (_AF_UNIX,)), streams)
    return passing


def program(
    names: Sequence[str], passing: Mapping[str, tuple[Only, ...]], machine: str
) -> list[tuple[int, int, int, int]]:
    """The filter as BPF: (code, jump if true, jump if false, constant) for each instruction."""
    code = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, _AUDIT_ARCH[machine]),
        (_RETURN, 0, 0, _KILL_PROCESS),
        (_LOAD, 0, 0, _NUMBER),
    ]
    if machine == "x86_64":
        code += [(_AT_LEAST, 0, 1, _X32_BIT), (_RETURN, 0, 0, _ERRNO | _EPERM)]
    for name in names:
        number = NUMBERS[name][_PLACE[machine]]
        if number < 0:
            continue
        # glibc takes ENOSYS as "an older kernel" and calls clone, whose flags are in a register.
        # Those of clone3 are in memory, where a filter cannot look.
        refusal = _ERRNO | (_ENOSYS if name == "clone3" else _EPERM)
        block = list(_judged(passing.get(name, ()), refusal))
        code += [(_EQUAL, 0, len(block), number), *block]
    return [*code, (_RETURN, 0, 0, _ALLOW)]


def _judged(checks: tuple[Only, ...], refusal: int) -> Iterator[tuple[int, int, int, int]]:
    """What happens to one call; the instructions always end in a return."""
    for check in checks:
        yield (_LOAD, 0, 0, _ARGUMENTS + 8 * check.argument)
        yield (_AND, 0, 0, check.mask)
        values, refuse = check.values, isinstance(check, NoneOf)
        for place, value in enumerate(values):
            # From here to the refusal there are the other values, and then it, or a jump over it.
            rest = len(values) - place - 1
            if refuse:
                yield (_EQUAL, rest, 0 if rest else 1, value)
            else:
                yield (_EQUAL, rest + 1, 0, value)
        yield (_RETURN, 0, 0, refusal)
    yield (_RETURN, 0, 0, _ALLOW if checks else refusal)


def why_not() -> str:
    """Why there is no filter for this machine; empty when there is one."""
    machine = platform.machine()
    if machine not in _PLACE:
        return f"there is a filter for {' and '.join(_PLACE)}, this machine is {machine}"
    return ""


def refuse(names: Sequence[str], *, gpu: bool = False) -> str:
    """Refuse these calls in all threads from now on; says why the kernel did not, or nothing.

    The process must have set no_new_privs.
    """
    reason = why_not()
    if reason:
        return reason
    machine = platform.machine()
    code = program(names, conditions(pid=os.getpid(), gpu=gpu), machine)
    filled = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *each) for each in code))
    # struct sock_fprog: how many instructions, and where they are.
    described = struct.pack("@HP", len(code), ctypes.addressof(filled))
    done = syscall(_SECCOMP[machine], _SET_MODE_FILTER, _TSYNC, described)
    if done == 0:
        return ""
    # A positive result is the thread that has another filter.
    return os.strerror(ctypes.get_errno()) if done < 0 else f"thread {done} has another filter"


def syscall(number: int, *arguments: int | bytes | None) -> int:
    """Make a system call for which libc has no function; ctypes.get_errno() says why it failed."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    # As whole words: half of a register would be undefined for a plain int.
    words = [ctypes.c_long(each) if isinstance(each, int) else each for each in arguments]
    return int(libc.syscall(ctypes.c_long(number), *words))
