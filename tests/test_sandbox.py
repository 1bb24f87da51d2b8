"""The confined child under attack: what code in it tries, as an unprivileged user, is refused.

Each attack runs twice in a real process: with RALF_SANDBOX=off, where it must succeed, and with
RALF_SANDBOX=required.  Neither has a network namespace, as in most containers.
"""

import ctypes
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ralf.worker.contract import Verdict
from ralf.worker.service import landlock, messages, sandbox, seccomp
from ralf.worker.service.child_process import ChildProcess
from ralf.worker.service.serve import run_worker
from ralf.worker.settings import Settings, SettingsError
from tests import waiting
from tests.redis_server import RedisServer
from tests.test_child import SETTINGS, answer, ask, child
from tests.test_plan_signature import OURS

NOBODY = 65534
ROOT = Path(__file__).resolve().parent.parent
MACHINES = ("x86_64", "aarch64")
needs_landlock = pytest.mark.skipif(not landlock.version(), reason="this kernel has no Landlock")
needs_filter = pytest.mark.skipif(bool(seccomp.why_not()), reason=seccomp.why_not())

# Becomes nobody where the tests run as root, as CI does, after the imports: nobody may not read
# root's Python.  It allows anyone to trace it, which Yama would otherwise limit to descendants.
BEGIN = """
import ctypes, errno, json, os, signal, socket, subprocess, sys, threading
from pathlib import Path
import ralf.worker.service.sandbox as sandbox
from ralf.worker.service import landlock, seccomp
from ralf.worker.settings import Settings
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
if os.getuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
libc.prctl(4, 1, 0, 0, 0)
libc.prctl(0x59616D61, ctypes.c_long(-1), 0, 0, 0)
sandbox._leave_network = lambda libc: "not wanted in this test"
"""
VICTIM = BEGIN + "print('ready', flush=True); sys.stdin.read()"
# Each attack returns when it succeeded and raises OSError when it was refused.
ATTACKS = (
    BEGIN
    + """
given = json.loads(sys.argv[1])
folder, victim = Path(given["folder"]), given["victim"]

def checked(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")

def ask(family, where):
    with socket.socket(family) as client:
        client.connect(where)
        client.sendall(b"PING\\r\\n")
        assert client.recv(7) == b"+PONG\\r\\n"

def another_programs_output():
    assert subprocess.run(["/bin/echo", "hello"], capture_output=True).stdout == b"hello\\n"

def traced():
    checked(libc.ptrace(16, victim, 0, 0))
    os.waitpid(victim, 0x40000000)
    libc.ptrace(17, victim, 0, 0)

def copied_from_its_memory():
    from_here = (ctypes.c_size_t * 2)(ctypes.addressof(ctypes.create_string_buffer(8)), 0)
    checked(libc.process_vm_readv(victim, from_here, 0, from_here, 0, 0))

attacks = {
    "redis over TCP": lambda: ask(socket.AF_INET, ("127.0.0.1", given["port"])),
    "redis over its socket": lambda: ask(socket.AF_UNIX, given["socket"]),
    "a server of its own": lambda: socket.create_server(("127.0.0.1", 0)).close(),
    "the environment of a process": lambda: Path(f"/proc/{victim}/environ").read_bytes(),
    "the memory of a process": lambda: open(f"/proc/{victim}/mem", "rb").close(),
    "memory by process_vm_readv": copied_from_its_memory,
    "ptrace": traced,
    "a signal": lambda: os.kill(victim, signal.SIGCONT),
    "its limits": lambda: checked(libc.prlimit(victim, 7, None, (ctypes.c_long * 2)())),
    "another job's upload": (folder / "uploads/job-2/media").read_bytes,
    "the list of jobs": lambda: os.listdir(folder / "uploads"),
    "credentials in a file": (folder / "secrets/redis_url").read_bytes,
    "the pid of its child": lambda: (folder / "pid").write_text("1"),
    "a module for the next child": lambda: (folder / "torch.py").write_text("evil"),
    "another file in place of the upload": lambda: (folder / "inbox/job-1/media").write_text("x"),
    "removing the upload": lambda: os.truncate(folder / "inbox/job-1/media", 0),
    "another program": another_programs_output,
    "a namespace": lambda: checked(libc.unshare(0x10000000)),
}
allowed = {
    "its own upload": (folder / "inbox/job-1/media").read_bytes,
    "its scratch folder": lambda: (folder / "scratch/a").write_text("x"),
    "a folder and a rename there": lambda: (
        (folder / "scratch/b").mkdir(exist_ok=True),
        (folder / "scratch/a").rename(folder / "scratch/b/a")
    ),
    "its own state": lambda: Path("/proc/self/status").read_text(),
    "the processor": lambda: Path("/proc/cpuinfo").read_text(),
    "nothing": lambda: open("/dev/null", "r+b", buffering=0).write(b"x"),
    "threads": lambda: threading.Thread(target=print).start(),
    "a pair of sockets": lambda: socket.socketpair()[0].close(),
    "its own signal": lambda: os.kill(os.getpid(), signal.SIGCONT),
    "its own limits": lambda: checked(libc.prlimit(0, 7, None, (ctypes.c_long * 2)())),
}
settings = Settings(sandbox=given["mode"])
held = sandbox.enter(settings, folder, None)
libc.prctl(4, 1 if given["mode"] == "off" else 0, 0, 0, 0)
held.append(sandbox.forbid_programs(settings))
found = {"lacks": sandbox.missing(held)}
for name, attack in (allowed | attacks).items():
    try:
        attack()
        found[name] = ""
    except OSError as error:
        found[name] = errno.errorcode[error.errno]
print(json.dumps(found | {"allowed": list(allowed), "attacks": list(attacks)}))
"""
)


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A folder that nobody owns, as a worker process lays it out; pytest's is closed to others."""
    folder = Path(tempfile.mkdtemp(prefix="ralf-attack-"))
    for name in ("uploads/job-2/media", "inbox/job-1/media", "secrets/redis_url", "scratch/.keep"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("secret")
    if os.getuid() == 0:
        for each in (folder, *folder.rglob("*")):
            os.chown(each, NOBODY, NOBODY)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def victim() -> Iterator[int]:
    """A process of the same user that is not closed, such as tini in a container."""
    with subprocess.Popen(
        [sys.executable, "-c", VICTIM], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == b"ready\n"
        yield process.pid
        process.stdin.close()


@pytest.fixture(scope="module")
def attacked(place: Path, victim: int) -> Iterator[dict[str, dict[str, str]]]:
    """What became of each attack, unconfined and confined."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = RedisServer(port=port)
    server.start()
    server.socket.parent.chmod(0o755)
    server.socket.chmod(0o777)
    given = {"folder": str(place), "victim": victim, "port": port, "socket": str(server.socket)}
    try:
        yield {
            mode: json.loads(ran(ATTACKS, json.dumps({**given, "mode": mode})))
            for mode in ("off", "required")
        }
    finally:
        server.stop()


def ran(code: str, *arguments: str) -> str:
    """What this code prints in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_landlock
@needs_filter
def test_every_attack_from_inside_the_child_is_refused(attacked: dict[str, dict[str, str]]):
    """And each would succeed without the filter and Landlock: so the attack itself works."""
    free, confined = attacked["off"], attacked["required"]
    names = confined["attacks"]

    assert {name: free[name] for name in names if free[name]} == {}
    assert [name for name in names if confined[name] not in ("EPERM", "EACCES")] == []
    assert confined["lacks"] == []
    assert len(free["lacks"]) == 4  # the filter, Landlock, programs, and hence the network


@needs_landlock
@needs_filter
def test_what_the_child_needs_still_works(attacked: dict[str, dict[str, str]]):
    """Its upload, its scratch folder, threads, its own process."""
    confined = attacked["required"]

    assert {name: confined[name] for name in confined["allowed"] if confined[name]} == {}


# the filter


@needs_filter
def test_each_refused_system_call_is_refused_by_the_filter():
    """With an error number that the kernel itself never gives."""
    code = (
        BEGIN
        + """
seccomp._EPERM = seccomp._ENOSYS = 99
libc.prctl(38, 1, 0, 0, 0)
assert not seccomp.refuse(list(seccomp.NUMBERS))
place = 1 if os.uname().machine == "aarch64" else 0
arguments = {"clone": (seccomp._NEW_NAMESPACES,), "ioctl": (0, 0x5412), "socketpair": (2,)}
found = {}
for name, numbers in seccomp.NUMBERS.items():
    words = [ctypes.c_long(each) for each in arguments.get(name, (1, 0, 0, 0, 0))]
    result = libc.syscall(ctypes.c_long(numbers[place]), *words)
    found[name] = numbers[place] < 0 or (result == -1 and ctypes.get_errno() == 99)
x32 = libc.syscall(ctypes.c_long(0x40000000 + 39))
found["x32"] = place == 1 or (x32 == -1 and ctypes.get_errno() == 99)
print(json.dumps(found))
"""
    )
    found = json.loads(ran(code))

    assert len(found) > 80
    assert [name for name, refused in found.items() if not refused] == []


@needs_filter
@pytest.mark.skipif(platform.machine() != "x86_64", reason="another architecture has no int 0x80")
def test_a_call_of_32_bit_x86_kills_the_process():
    """Its numbers mean other calls, which the filter would let pass."""
    code = (
        "import mmap\n"
        + BEGIN
        + """
page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write(bytes([0xB8, 20, 0, 0, 0, 0xCD, 0x80, 0xC3]))  # mov eax, 20; int 0x80; ret
call = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
libc.prctl(38, 1, 0, 0, 0)
assert not seccomp.refuse(["socket"])
print("begins", flush=True)
print(call(), flush=True)
"""
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert done.stdout == "begins\n", done.stderr
    # SIGSEGV: a kernel without 32-bit calls at all.
    assert -done.returncode in (signal.SIGSYS, signal.SIGSEGV)


def decided(
    machine: str, name: str, *arguments: int, gpu: bool = False, arch: int | None = None
) -> int:
    """What the kernel's interpreter of BPF would return, written from its documentation."""
    code = seccomp.program(list(seccomp.NUMBERS), seccomp.conditions(pid=7, gpu=gpu), machine)
    place = MACHINES.index(machine)
    words = {0: seccomp.NUMBERS[name][place], 4: arch or seccomp._AUDIT_ARCH[machine]}
    words |= {16 + 8 * index: value for index, value in enumerate(arguments)}
    at, register = 0, 0
    while True:
        instruction, then, otherwise, constant = code[at]
        at += 1
        match instruction:
            case 0x20:
                register = words.get(constant, 0)
            case 0x54:
                register &= constant
            case 0x15:
                at += then if register == constant else otherwise
            case 0x35:
                at += then if register >= constant else otherwise
            case 0x06:
                return constant


@pytest.mark.parametrize("machine", MACHINES)
def test_the_filter_decides_by_arguments_where_a_call_has_good_uses(machine: str):
    """For both architectures, of which only one runs here."""
    passes, refused, absent = 0x7FFF0000, 0x00050001, 0x00050026
    new_user, thread = 0x10000000, 0x003D0F00

    assert decided(machine, "clone", thread) == passes
    assert decided(machine, "clone", thread | new_user) == refused
    assert decided(machine, "clone3", 0) == absent
    assert [decided(machine, "kill", pid) for pid in (7, 1, 0, 2**32 - 1)] == [passes] + 3 * [
        refused
    ]
    assert [decided(machine, "prlimit64", pid) for pid in (0, 7, 1)] == [passes, passes, refused]
    assert decided(machine, "ioctl", 0, 0x5413) == passes
    assert decided(machine, "ioctl", 0, 0x5412) == decided(machine, "ioctl", 0, 0x541C) == refused
    assert decided(machine, "socket", 1, 1) == refused
    assert decided(machine, "ptrace", arch=0x40000003) == 0x80000000


@pytest.mark.parametrize("machine", MACHINES)
def test_cuda_may_make_unix_sockets_and_connect_none(machine: str):
    """Streams only: a datagram goes to an address without a connection."""
    kinds = [(1, 1), (1, 5 | 0o2000000), (1, 2), (2, 1), (10, 1), (16, 3)]

    assert [decided(machine, "socket", *kind, gpu=True) == 0x7FFF0000 for kind in kinds] == [
        *(True, True),
        *(False, False, False, False),
    ]
    assert decided(machine, "connect", 3, gpu=True) == 0x00050001


@pytest.mark.parametrize(("machine", "token"), [("x86_64", 0xC000003E), ("aarch64", 0xC00000B7)])
def test_the_numbers_of_the_calls_are_those_of_libseccomp(machine: str, token: int):
    """Another table of the same numbers; Debian always has it."""
    try:
        library = ctypes.CDLL("libseccomp.so.2")
    except OSError:
        pytest.skip("there is no libseccomp to compare with")
    unknown = -1
    theirs = {
        name: library.seccomp_syscall_resolve_name_arch(token, name.encode())
        for name in seccomp.NUMBERS
    }
    ours = {name: both[MACHINES.index(machine)] for name, both in seccomp.NUMBERS.items()}

    # It gives other negative numbers to calls that this architecture does not have.
    differing = {
        name: (ours[name], number)
        for name, number in theirs.items()
        if number != unknown and max(number, -1) != ours[name]
    }
    assert differing == {}
    assert [name for name, number in theirs.items() if number == unknown] in (
        [],
        ["process_mrelease"],
    )


# Landlock, by what older kernels know


@needs_landlock
@pytest.mark.parametrize("abi", range(1, min(landlock.version(), 6) + 1))
def test_each_version_of_landlock_restricts_what_it_knows(abi: int, place: Path, victim: int):
    """Files always; moving them since 2, TCP since 4, signals since 6."""
    code = (
        BEGIN
        + """
folder, abi, victim = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
server = socket.create_server(("127.0.0.1", 0))
libc.prctl(38, 1, 0, 0, 0)
paths = landlock.Paths(read=[folder / "inbox"], write=[folder / "scratch"])
assert not landlock.restrict(paths, abi)
def moved():
    (folder / "scratch/c").mkdir(exist_ok=True)
    (folder / "scratch/x").write_text("x")
    (folder / "scratch/x").rename(folder / "scratch/c/x")
tries = {
    "read": (folder / "inbox/job-1/media").read_bytes,
    "write": lambda: (folder / "scratch/y").write_text("x"),
    "read another": (folder / "uploads/job-2/media").read_bytes,
    "change": lambda: (folder / "inbox/job-1/media").write_text("x"),
    "move": moved,
    "tcp": lambda: socket.socket().connect(server.getsockname()),
    "signal": lambda: os.kill(victim, signal.SIGCONT),
}
found = []
for name, one in tries.items():
    try:
        one()
        found.append(name)
    except OSError as error:
        pass
print(json.dumps(found))
"""
    )
    found = json.loads(ran(code, str(place), str(abi), str(victim)))
    since = {"move": abi >= 2, "tcp": abi < 4, "signal": abi < 6}

    assert found == ["read", "write", *(name for name, works in since.items() if works)]


# the child itself


def weighed(link: ChildProcess, path: Path) -> int | str:
    """The size of the file as the child sees it, or why it sees none."""
    said = answer(link, ask("j", "weigh").model_copy(update={"path": str(path)}))
    if isinstance(said, messages.Failed):
        return said.message
    return Verdict.model_validate_json(said.verdict).media.size_bytes


@needs_landlock
def test_a_child_reads_its_jobs_file_and_no_other():
    """Not one that its own parent, or another, is fetching; root's child neither."""
    with child() as link, child() as other:
        folders = [
            Path(tempfile.mkdtemp(prefix="job-", dir=each.uploads)) for each in (link, other)
        ]
        for folder in folders:
            (folder / "media").write_bytes(b"12345")
        before = weighed(link, folders[0] / "media")
        placed = link.place(folders[0])

        assert weighed(link, placed / "media") == 5
        assert not folders[0].exists()
        for refused in (before, weighed(link, folders[1] / "media")):
            assert "Permission denied" in str(refused)
        assert "Permission denied" in str(weighed(link, other.place(folders[1]) / "media"))


@needs_landlock
def test_a_shared_child_reads_what_its_parents_gave_it(tmp_path: Path):
    """The file lies with the child only while its job is there."""
    shared = tmp_path / "shared"
    with child(shared=shared) as link:
        job = Path(tempfile.mkdtemp(prefix="job-", dir=link.uploads))
        (job / "media").write_bytes(b"12345")
        before, placed = weighed(link, job / "media"), link.place(job)

        assert "Permission denied" in str(before)
        assert placed.is_relative_to(shared / "inbox")
        assert weighed(link, placed / "media") == 5


def test_the_files_of_a_killed_parent_are_removed_by_the_next(tmp_path: Path):
    """A shared child's folder outlives its parents; a living one's files stay."""
    shared = tmp_path / "shared"
    first = ChildProcess(SETTINGS, bodies="test", shared=shared)
    alive = first.place(Path(tempfile.mkdtemp(prefix="job-", dir=first.uploads)))
    left = alive.with_name("ralf-killed-job-1")
    left.mkdir()
    second = ChildProcess(SETTINGS, bodies="test", shared=shared)

    assert (alive.exists(), left.exists()) == (True, False)
    second.close()
    first.close()


def test_a_child_gets_no_more_memory_than_it_may_have():
    """An allocation fails at once; the parent would see the resident size half a second later."""
    with child(replace(SETTINGS, device="cpu", child_max_rss=1024**3)) as link:
        failed = answer(link, ask("j", "leak", tag="leak:2048"))

        assert isinstance(failed, messages.Failed)
        assert (failed.code, failed.fatal) == ("decoder_crashed", True)
        assert "MemoryError" in failed.message
        assert waiting.until(lambda: link.wait(0.1) is None) is None


# A kernel without Landlock, made by a filter that hides it; the child inherits the filter.
WITHOUT_LANDLOCK = """
import sys
from ralf.worker.service import seccomp, landlock
import ctypes
seccomp.NUMBERS = {**seccomp.NUMBERS, "landlock_create_ruleset": (444, 444)}
ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)
assert not seccomp.refuse(["landlock_create_ruleset"])
from tests.test_child import *
link = ChildProcess(replace(SETTINGS, sandbox=sys.argv[1]), bodies="test")
link.open()
until(link, lambda said: link.ready is not None or bool(link.load_error))
facts = link.ready.facts.protections if link.ready else ()
print(json.dumps([link.load_error, [each.name for each in facts if not each.holds]]))
link.close()
"""


@needs_filter
def test_a_worker_does_not_start_with_the_key_that_signs_plans(monkeypatch: pytest.MonkeyPatch):
    """Whoever takes over a worker must not be able to sign code for all others."""
    monkeypatch.setattr(sandbox, "refuse_inspection", lambda: None)  # it would hold for pytest too
    with pytest.raises(SettingsError, match="set RALF_PLAN_PUBLIC_KEY_FILE here"):
        run_worker(Settings(plan_signing_key=OURS.private))


def test_a_worker_that_requires_confinement_does_not_start_without_it():
    """The message says what is missing; without `required` the worker starts and says it too."""
    (refused, _), (error, lacks) = (
        json.loads(ran(WITHOUT_LANDLOCK, mode).splitlines()[-1]) for mode in ("required", "auto")
    )

    assert refused.startswith("RALF_SANDBOX=required, but on this host the child is not confined")
    assert "landlock: this kernel has no Landlock" in refused
    assert (error, lacks) == ("", ["landlock"])


def test_another_word_for_the_setting_is_refused():
    """A typo must not switch anything off."""
    with pytest.raises(SettingsError, match="auto or required or off, got 'on'"):
        Settings.from_environment({"RALF_SANDBOX": "on"})


@needs_landlock
@needs_filter
def test_the_child_reports_what_confines_it():
    """With it the parent answers /readyz, and logs it."""
    with child() as link:
        assert link.ready is not None
        held = {each.name: each.holds for each in link.ready.facts.protections}

    names = ["capabilities", "memory_closed", "seccomp", "landlock", "network", "memory"]
    assert held == dict.fromkeys([*names, "programs"], True)


def test_a_checkout_is_not_readable_as_a_whole():
    """Its deploy/secrets holds passwords; the rooms and the models are named one by one."""
    paths = sandbox.readable(Settings(), Path("/work/ralf-x"))

    assert ROOT not in [path.resolve() for path in paths]
    assert not any((ROOT / "deploy").is_relative_to(path) for path in paths)
    assert {ROOT / "worker", ROOT / "kernels", ROOT / "models"} <= set(paths)
