"""What the child gives up before it touches hostile media, and what other processes hide from it.

The child needs a local file, the model's folder and a device; nothing else.  It gets an
environment of listed names only, no core files, bounded files and descriptors, no capability and
no way to gain one, and, where the host allows it, a network namespace with no network in it.  The
processes that hold credentials close their memory and their environment to it.  The address space
is left unbounded: CUDA reserves far more of it than it uses, so RLIMIT_AS would kill honest jobs;
the parent watches the resident size instead.

All of it happens in the child, before any thread starts: a user namespace cannot be entered later.
"""

import ctypes
import os
import resource
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

from ralf.worker.service.parent_death import die_with
from ralf.worker.settings import Settings

KEPT = (
    "PATH",
    "LANG",
    "LC_ALL",
    "TZ",
    "TMPDIR",
    "PYTHONPATH",
    "PYTHONHASHSEED",
    "VIRTUAL_ENV",
    "LD_LIBRARY_PATH",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_MODULE_LOADING",
    "NVIDIA_VISIBLE_DEVICES",
    "NVIDIA_DRIVER_CAPABILITIES",
    "TRITON_CACHE_DIR",
    "TORCHINDUCTOR_CACHE_DIR",
)
"""Variables of the parent that the child may see; credentials have no name here."""

FILE_BYTES = 1024**3
"""The most that the child may write to one file: compiled kernels in a cache, nothing else."""
DESCRIPTORS = 1024

_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 4, 24, 38
_CAPABILITIES = 64
"""More than Linux has: to drop one that does not exist fails, and harms nothing."""
_CAPABILITY_VERSION = 0x20080522


def environment(settings: Settings, outside: Mapping[str, str]) -> dict[str, str]:
    """The child's whole environment."""
    kept = {name: outside[name] for name in KEPT if name in outside}
    kept |= settings.to_environment(child=True)
    # The child has another working directory: what was a path from ours must not be one from its.
    for name in ("RALF_MODELS_DIR", "RALF_MODEL"):
        if os.sep in kept[name] or (name == "RALF_MODELS_DIR" and kept[name]):
            kept[name] = str(Path(kept[name]).absolute())
    return kept


def enter(parent_pid: int | None) -> list[str]:
    """Give up what is not needed; returns a sentence for each thing the host did not allow.

    With parent_pid the child dies when that process does, whatever native code it is in.
    """
    missing: list[str] = []
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a drain is the parent's decision
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _bound(resource.RLIMIT_CORE, 0)
    _bound(resource.RLIMIT_FSIZE, FILE_BYTES)
    _bound(resource.RLIMIT_NOFILE, DESCRIPTORS)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write past the bound is an OSError
    if not sys.platform.startswith("linux"):
        return ["no network namespace and no death signal: they are Linux's"]
    libc = ctypes.CDLL(None, use_errno=True)
    if not _leave_network(libc):
        missing.append(
            f"no network namespace of its own ({os.strerror(ctypes.get_errno())}); "
            "allow user namespaces, or block the worker's child at the host's firewall"
        )
    if not _drop_privileges(libc):
        missing.append(f"it keeps its capabilities ({os.strerror(ctypes.get_errno())})")
    if parent_pid is not None:
        # Last: entering a user namespace and changing capabilities both clear the death signal.
        die_with(parent_pid, signal.SIGKILL)
    return missing


def refuse_inspection() -> None:
    """Close this process's memory and environment to other processes of the same user.

    A worker process has the address of Redis and the keys of the stores.  Its child has the same
    user; without this, code in the child could read them from /proc or attach with ptrace.
    """
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def _drop_privileges(libc: ctypes.CDLL) -> bool:
    """No capability, and none by running another program; whether the kernel did it."""
    for number in range(_CAPABILITIES):
        libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    nothing = (ctypes.c_uint32 * 6)()
    dropped = libc.capset(header, nothing) == 0
    return bool(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 and dropped)


def _bound(limit: int, value: int) -> None:
    hard = resource.getrlimit(limit)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    # The hard limit too: the child could raise a soft one again.
    resource.setrlimit(limit, (value, value))


def _leave_network(libc: ctypes.CDLL) -> bool:
    """A namespace without an interface that is up; as ourselves where that is allowed."""
    user, group = os.getuid(), os.getgid()
    if libc.unshare(_CLONE_NEWNET) == 0:
        return True
    if libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) != 0:
        return False
    for path, text in (
        # The kernel takes a gid_map from an unprivileged process only after this.
        ("/proc/self/setgroups", "deny"),
        ("/proc/self/uid_map", f"{user} {user} 1"),
        ("/proc/self/gid_map", f"{group} {group} 1"),
    ):
        try:
            with open(path, "w") as file:  # noqa: PTH123  procfs wants one plain write
                file.write(text)
        except OSError:
            break  # the process works on as the overflow user; files it may read stay readable
    return True
