"""What the child gives up before it touches hostile media, and what other processes hide from it.

The child needs the current jobs' files, the model's folder, its own code and a device; nothing
else.  It gets an environment of listed names only, no core files, bounded files and descriptors, no
capability and no way to gain one, a network namespace with no network in it where the host allows
that, and two restrictions that need no privilege: a filter of system calls (seccomp.py), and a list
of the files that it may open (landlock.py).  The processes that hold credentials close their memory
and their environment to it, and so does each child to the others.  The address space is left
unbounded: CUDA reserves far more of it than it uses, so RLIMIT_AS would kill honest jobs.  On a CPU
RLIMIT_DATA bounds what the child may write to; the parent also watches the resident size.

All of it happens in the child, before any thread starts: a user namespace cannot be entered later,
and Landlock holds for one thread and what it starts.

    python -m ralf.worker.service.sandbox       enter it, print what holds here as JSON, and end
"""

import contextlib
import ctypes
import json
import os
import platform
import resource
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import ralf
from ralf.worker.service import landlock, seccomp
from ralf.worker.service.messages import Protection
from ralf.worker.service.parent_death import die_with
from ralf.worker.settings import Settings, SettingsError

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
LEAST_MEMORY = 1024**3
"""A child must be able to start, so that the parent can say which bound its job broke."""
INBOX, SCRATCH = "inbox", "scratch"
"""In the child's folder: the current jobs' files, which it may read; and what it may write."""

_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 4, 24, 38
_CAPABILITIES = 64
"""More than Linux has: to drop one that does not exist fails, and harms nothing."""
_CAPABILITY_VERSION = 0x20080522

_SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin", "/nix/store", "/sys")
_SYSTEM_FILES = (
    "/etc/ld.so.cache",
    "/etc/ld.so.preload",
    "/etc/localtime",
    "/etc/timezone",
    "/etc/nsswitch.conf",
    "/etc/passwd",
    "/etc/group",
    "/etc/ssl/openssl.cnf",
    "/etc/pki/tls/openssl.cnf",
    "/etc/crypto-policies",
    "/dev/zero",
    "/dev/random",
    "/dev/urandom",
)
_PROC = ("self", "cpuinfo", "meminfo", "stat", "version", "filesystems", "devices", "modules")
_PROC_FOLDERS = ("sys", "driver/nvidia")
_DEVICES = ("nvidia*", "nvhost*", "nvmap", "dxg", "dri")


def environment(settings: Settings, outside: Mapping[str, str]) -> dict[str, str]:
    """The child's whole environment."""
    kept = {name: outside[name] for name in KEPT if name in outside}
    kept |= settings.to_environment(child=True)
    # The child has another working directory: what was a path from ours must not be one from its.
    for name in ("RALF_MODELS_DIR", "RALF_MODEL"):
        if os.sep in kept[name] or (name == "RALF_MODELS_DIR" and kept[name]):
            kept[name] = str(Path(kept[name]).absolute())
    return kept


def enter(settings: Settings, folder: Path, parent_pid: int | None) -> list[Protection]:
    """Give up what is not needed; returns what holds now, and what the host did not allow.

    folder holds the child's INBOX and SCRATCH.  With parent_pid the child dies when that process
    does, whatever native code it is in.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a drain is the parent's decision
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _bound(resource.RLIMIT_CORE, 0)
    _bound(resource.RLIMIT_FSIZE, FILE_BYTES)
    _bound(resource.RLIMIT_NOFILE, DESCRIPTORS)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write past the bound is an OSError
    if not sys.platform.startswith("linux"):
        return [Protection(name="linux", holds=False, found="nothing else confines it here")]
    libc = ctypes.CDLL(None, use_errno=True)
    gpu = _has_gpu(settings)
    alone = _leave_network(libc)
    privileges = _drop_privileges(libc)
    memory = _bound_memory(settings, gpu)
    if settings.sandbox == "off":
        off = "switched off by RALF_SANDBOX=off"
        files = Protection(name="landlock", holds=False, found=off)
        calls = Protection(name="seccomp", holds=False, found=off)
    else:
        files = _restrict_files(readable(settings, folder), writable(folder, gpu))
        calls = _filter_calls(gpu)
    closed = refuse_inspection()
    if parent_pid is not None:
        # Last: entering a user namespace and changing capabilities both clear the death signal.
        die_with(parent_pid, signal.SIGKILL)
    return [privileges, closed, calls, files, _network(alone, calls, files), memory]


def forbid_programs(settings: Settings) -> Protection:
    """After the model is loaded: the child starts no other program."""
    found = "switched off by RALF_SANDBOX=off"
    if settings.sandbox != "off":
        found = seccomp.refuse(seccomp.PROGRAMS)
    return Protection(name="programs", holds=not found, found=found or "it starts no program")


def missing(protections: Iterable[Protection]) -> list[str]:
    """A sentence for each protection that does not hold."""
    return [f"{each.name}: {each.found}" for each in protections if not each.holds]


def why_refused(settings: Settings, protections: Iterable[Protection]) -> str:
    """Why this child may not work; empty unless RALF_SANDBOX=required asks for more."""
    lacks = missing(protections)
    if settings.sandbox != "required" or not lacks:
        return ""
    return (
        f"RALF_SANDBOX=required, but on this host the child is not confined: {'; '.join(lacks)}. "
        "Use Linux 5.13 or later with Landlock among its security modules (`ralf doctor` shows "
        "what holds), or set RALF_SANDBOX=auto"
    )


def refuse_inspection() -> Protection:
    """Close this process's memory and environment to other processes of the same user.

    A worker process has the address of Redis and the keys of the stores.  Its child has the same
    user; without this, code in the child could read them from /proc or attach with ptrace.
    """
    done = False
    if sys.platform.startswith("linux"):
        done = ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) == 0
    found = "its memory is closed to processes of its user" if done else "its memory is open"
    return Protection(name="memory_closed", holds=done, found=found)


def memory_allowed(settings: Settings) -> int:
    """Above so many bytes a child is killed in the middle of a job."""
    if settings.child_max_rss:
        return settings.child_max_rss
    # In a container the first figure is the host's memory, but the kernel enforces the cgroup's.
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # no cgroup, or "max"
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    # Below the limit: at the limit the kernel sends SIGKILL, and that end names no reason and
    # counts against no file.
    return int(0.8 * total)


# what may be opened


def readable(settings: Settings, folder: Path) -> list[Path]:
    """The code, the libraries, the models, and the current jobs' files."""
    found = [*map(Path, _SYSTEM), *map(Path, _SYSTEM_FILES), *_code()]
    found += [Path("/proc", name) for name in (*_PROC, *_PROC_FOLDERS)]
    found += [Path(each) for each in os.environ.get("LD_LIBRARY_PATH", "").split(":") if each]
    models = Path(settings.models_dir) if settings.models_dir else _shipped()
    found += [models, *([Path(settings.model)] if os.sep in settings.model else [])]
    return [*found, *map(Path, settings.sandbox_read), folder / INBOX]


def writable(folder: Path, gpu: bool) -> list[Path]:
    """Its scratch folder, and on a GPU the caches of compiled kernels."""
    if not gpu:
        return [folder / SCRATCH]
    caches = []
    with contextlib.suppress(RuntimeError):  # a user without an entry has no home
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        caches += [cache / "ralf", Path.home() / ".nv/ComputeCache"]
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        caches += [Path(os.environ[name])] if os.environ.get(name) else []
    for each in caches:
        with contextlib.suppress(OSError):  # what cannot be made cannot be written either
            each.mkdir(parents=True, exist_ok=True)
    return [folder / SCRATCH, *caches]


def _code() -> Iterator[Path]:
    """Python, its libraries and ours; not the rest of a checkout, which may hold secrets."""
    package = Path(ralf.__file__).resolve().parent
    checkout = package.parent if (package.parent / "pyproject.toml").exists() else None
    yield from (package, *(each.resolve() for each in package.iterdir() if each.is_dir()))
    yield from (Path(sys.prefix), Path(sys.base_prefix))
    yield from (Path(each) for each in sys.path if each and Path(each).resolve() != checkout)


def _shipped() -> Path:
    """The models beside the code, where kernels/artifact.py looks for them."""
    return Path(ralf.__file__).resolve().parent.parent / "models"


def _restrict_files(read: list[Path], write: list[Path]) -> Protection:
    abi = landlock.version()
    threads = len(list(Path("/proc/self/task").iterdir()))
    if not abi:
        found = "this kernel has no Landlock, or it is not among its security modules"
        return Protection(name="landlock", holds=False, found=found)
    if threads > 1:
        found = f"{threads} threads run already, it would hold for one"
        return Protection(name="landlock", holds=False, found=found)
    devices = [each for name in _DEVICES for each in Path("/dev").glob(name)]
    paths = landlock.Paths(read=read, write=write, devices=[Path("/dev/null"), *devices])
    why = landlock.restrict(paths, abi)
    parts = ["files", *(["TCP"] if abi >= 4 else []), *(["signals"] if abi >= 6 else [])]
    return Protection(name="landlock", holds=not why, found=why or f"ABI {abi}: {', '.join(parts)}")


# what may be called, and used


def _filter_calls(gpu: bool) -> Protection:
    names = [name for name in seccomp.NUMBERS if name not in seccomp.PROGRAMS]
    why = seccomp.refuse(names, gpu=gpu)
    found = why or f"{len(names)} system calls are refused ({platform.machine()})"
    return Protection(name="seccomp", holds=not why, found=found)


def _network(alone: str, calls: Protection, files: Protection) -> Protection:
    """No way out: a namespace without one, or no call that makes a connection."""
    ways = [*([] if alone else ["a namespace of its own"])]
    ways += ["no connect()"] if calls.holds else []
    ways += ["no TCP"] if files.holds and "TCP" in files.found else []
    why = f"no network namespace of its own ({alone}), and nothing else keeps it from the network"
    return Protection(name="network", holds=bool(ways), found=", ".join(ways) or why)


def _drop_privileges(libc: ctypes.CDLL) -> Protection:
    """No capability, and none by running another program."""
    for number in range(_CAPABILITIES):
        libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    nothing = (ctypes.c_uint32 * 6)()
    dropped = libc.capset(header, nothing) == 0
    done = bool(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 and dropped)
    found = "none, and no_new_privs" if done else os.strerror(ctypes.get_errno())
    return Protection(name="capabilities", holds=done, found=found)


def _bound(limit: int, value: int) -> None:
    hard = resource.getrlimit(limit)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    # The hard limit too: the child could raise a soft one again.
    resource.setrlimit(limit, (value, value))


def _bound_memory(settings: Settings, gpu: bool) -> Protection:
    allowed = memory_allowed(settings)
    found = f"killed above {allowed >> 20} MiB resident"
    if not gpu:
        # More than what may be resident: a stack or a buffer counts here before it is used.  With
        # ralf-small loaded 1.2 GB counted, 1.0 GB were resident.
        most = max(allowed * 5 // 4, LEAST_MEMORY)
        _bound(resource.RLIMIT_DATA, most)
        found = f"{found}, allocations fail above {most >> 20} MiB"
    return Protection(name="memory", holds=True, found=found)


def _has_gpu(settings: Settings) -> bool:
    there = any(any(Path("/dev").glob(name)) for name in ("nvidia*", "nvhost*", "dxg"))
    return settings.device != "cpu" and there


def _leave_network(libc: ctypes.CDLL) -> str:
    """Enter a namespace without an interface that is up, as ourselves; or say why not."""
    user, group = os.getuid(), os.getgid()
    if libc.unshare(_CLONE_NEWNET) == 0:
        return ""
    if libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) != 0:
        return os.strerror(ctypes.get_errno())
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
    return ""


def main() -> None:
    """Try it in this process, which ends afterwards; prints each Protection as a line of JSON."""
    try:
        settings = Settings.from_environment()
    except SettingsError as error:
        sys.exit(str(error))
    held = [*enter(settings, Path("/nowhere"), None), forbid_programs(settings)]
    for each in held:
        print(json.dumps(each.model_dump()))


if __name__ == "__main__":
    main()
