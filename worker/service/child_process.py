"""The parent's end of its child process: start it, exchange messages, end it.

Whether the child is fit for the next job, and when it is replaced, is in child_supervisor.py.

An exclusive child has a private folder and dies with its parent.  A shared child has a named
folder: the first parent spawns it under a lock, the others connect, and it exits when nobody has
been connected for a while.  The socket is bound and listens before the child starts, so connecting
never polls.  A second child may load beside the first (`start_next`) and then take its place
(`switch`), so that jobs go on meanwhile.

The process that may be killed is the one that the parent spawned or found by the pid file, never
one that the child names.  Nothing here judges a job.
"""

import contextlib
import fcntl
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import psutil
import structlog
from pydantic import ValidationError

import ralf
from ralf.worker import telemetry
from ralf.worker.service import messages, sandbox
from ralf.worker.service.jobs import Bodies
from ralf.worker.service.messages import EngineFacts
from ralf.worker.service.shadow import Comparison
from ralf.worker.service.work_dir import WorkDir
from ralf.worker.settings import Settings

log = structlog.get_logger()

SLOW = (
    "SLOW: it computes without a plan and without compiled kernels; build a plan on this GPU "
    "(ralf build --all), see docs/operations.md"
)
CHILD_MODULE = "ralf.worker.service.child"
JOB_PREFIX = "job-"
TAIL_LINES = 40
LINGER_S = 10.0
NEXT = ".next"
"""Ends the names of the files of a child that loads beside another."""
READ_OUT_S = 5.0
"""A dead child's stderr is read to its end; only a grandchild could keep it open for longer."""
# Shared children outlive the object that spawned them.  Without waitpid() one that has ended stays
# a zombie until this process ends.
_LEFT_RUNNING: list[int] = []
_ROOT = Path(ralf.__file__).resolve().parent.parent


def _reap() -> None:
    for pid in list(_LEFT_RUNNING):
        with contextlib.suppress(ChildProcessError):
            if os.waitpid(pid, os.WNOHANG) == (0, 0):
                continue
        _LEFT_RUNNING.remove(pid)


class ChildProcess:
    """One parent's connection to one child, and later to the child that replaces it."""

    def __init__(
        self,
        settings: Settings,
        *,
        bodies: Bodies = "moderate",
        shared: Path | None = None,
        capacity: int = 1,
        beside: "ChildProcess | None" = None,
    ) -> None:
        """beside: load next to that child, for the same parent's jobs; see start_next()."""
        self.settings = settings
        self.bodies: Bodies = bodies
        self.shared = shared is not None
        self.capacity = capacity
        self.next: ChildProcess | None = None
        """The child that loads beside this one."""
        self._claim: TextIO | None = None
        self._suffix = NEXT if beside is not None else ""
        self._work_dir: WorkDir = beside._work_dir if beside else WorkDir(settings.work_dir)
        self.uploads = self._work_dir.path
        """Files of this parent's jobs are fetched into it; the child cannot read them there."""
        self.folder = shared or self._work_dir.path
        """Holds the child's socket, and the folders that the child may read and write."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in (sandbox.INBOX, sandbox.SCRATCH):
            (self.folder / name).mkdir(mode=0o700, exist_ok=True)
        if beside is None:
            self._sweep_inbox()
        self.ready: messages.Ready | None = None
        self.load_error = ""
        """Why the last child could not load its model."""
        self.pid = 0
        self.jobs_done = self.served = 0
        """Jobs of this parent in this child, and of all its parents."""
        self.first_rss = 0
        self.exit_code: int | None = None
        """Of the last child; None where it is not known."""
        self._process: subprocess.Popen[bytes] | None = None
        self._info: psutil.Process | None = None
        """Memory, processor time and the right process to kill, whoever spawned it."""
        self._connection: socket.socket | None = None
        self._inbox = messages.Inbox()
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._reader: threading.Thread | None = None

    def _sweep_inbox(self) -> None:
        """Remove the files of killed parents, whose own folders work_dir.py has removed."""
        for left in (self.folder / sandbox.INBOX).iterdir():
            owner = left.name.rpartition(f"-{JOB_PREFIX}")[0]
            if not (self.uploads.parent / owner).exists():
                shutil.rmtree(left, ignore_errors=True)

    @property
    def alive(self) -> bool:
        """Whether a child is connected, ready or not."""
        return self._connection is not None

    def fileno(self) -> int:
        """For select()."""
        if self._connection is None:
            raise ValueError("no child is connected")
        return self._connection.fileno()

    def open(self) -> None:
        """Connect to the child, spawn one if there is none, and greet it."""
        if self._connection is not None:
            return
        self.ready, self.load_error, self.first_rss = None, "", 0
        self.jobs_done = self.served = 0
        self._inbox = messages.Inbox()
        self._tail.clear()
        with self._locked():
            # A socket that another parent's next child has left is nobody's to connect to.
            self._connection = (None if self._suffix else self._connected()) or self._spawned()
        self.send(messages.Hello())

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.folder / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _connected(self) -> socket.socket | None:
        connection = socket.socket(socket.AF_UNIX)
        try:
            # Before the pid file is read: the number in a dead child's file may belong to another
            # program by now.
            connection.connect(str(self.folder / "socket"))
            info = psutil.Process(int((self.folder / "pid").read_text()))
        except (OSError, ValueError, psutil.Error):
            connection.close()
            return None
        self.pid, self._info = info.pid, info
        return connection

    def _spawned(self) -> socket.socket:
        _reap()
        path = self.folder / f"socket{self._suffix}"
        path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX) as listener:
            # bind() creates the file with the umask's mode.  A chmod() after it would leave a
            # moment in which others may connect.
            before = os.umask(0o177)
            try:
                listener.bind(str(path))
            finally:
                os.umask(before)
            listener.listen(64)
            self._process = subprocess.Popen(
                self._command(listener.fileno()),
                env=self._environment(),
                cwd=self.folder / sandbox.SCRATCH,
                pass_fds=(listener.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                # A shared child may outlive this parent; its pipe would then have no reader.
                stderr=None if self.shared else subprocess.PIPE,
                # A Ctrl-C in the terminal reaches the parent only, which drains first.
                start_new_session=True,
            )
            self.pid = self._process.pid
            self._info = psutil.Process(self.pid)
            # In one step, since processes.py reads the file without the lock.
            (self.folder / "pid.new").write_text(str(self.pid))
            (self.folder / "pid.new").replace(self.folder / f"pid{self._suffix}")
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(str(path))
        if self._process.stderr is not None:
            self._reader = threading.Thread(target=self._forward, daemon=True, name="child-stderr")
            self._reader.start()
        log.info("child.started", pid=self.pid)
        return connection

    def _command(self, descriptor: int) -> list[str]:
        # -P: it could write a module into its working folder, which the next child would import.
        command = [sys.executable, "-P", "-m", CHILD_MODULE]
        command += ["--socket-fd", str(descriptor), "--bodies", self.bodies]
        command += ["--folder", str(self.folder.absolute())]
        command += ["--capacity", str(self.capacity)]
        if self.shared:
            return [*command, "--linger", str(LINGER_S)]
        return [*command, "--parent", str(os.getpid())]

    def _environment(self) -> dict[str, str]:
        environment = sandbox.environment(self.settings, os.environ)
        path = environment.get("PYTHONPATH")
        # The child starts in another folder: a checkout would not be found from there.
        environment["PYTHONPATH"] = f"{_ROOT}{os.pathsep}{path}" if path else str(_ROOT)
        environment["TMPDIR"] = str((self.folder / sandbox.SCRATCH).absolute())
        return environment

    def _forward(self) -> None:
        """Copy the child's stderr to ours; its end is kept for the quarantine."""
        assert self._process is not None
        assert self._process.stderr is not None
        with self._process.stderr as pipe:
            for line in pipe:
                self._tail.append(line.decode(errors="replace").rstrip()[:300])
                # Our log may be closed; the child must not block on a pipe that nobody reads.
                with contextlib.suppress(OSError, ValueError, AttributeError):
                    sys.stderr.buffer.write(line)
                    sys.stderr.buffer.flush()

    def send(self, message: messages.Message) -> None:
        """Send; a child that has gone is noticed at the next receive()."""
        if self._connection is not None:
            with contextlib.suppress(OSError):
                self._connection.sendall(messages.encode(message))

    def place(self, folder: Path) -> Path:
        """Move a job's folder to where the child may read it; gives its new path."""
        # The folder of this parent in the name: several parents may share the child.
        return Path(
            shutil.move(folder, self.folder / sandbox.INBOX / f"{self.uploads.name}-{folder.name}")
        )

    def receive(self) -> list[messages.Message] | None:
        """What the child sent; None when it has gone. Call it when fileno() is readable."""
        if self._connection is None:
            return None
        try:
            received = messages.receive(self._connection, self._inbox)
        except messages.ProtocolError as error:
            log.error("child.misunderstood", error=str(error))
            # A child that breaks the protocol may be under the control of a hostile file.
            self.kill()
            return None
        for message in received or ():
            match message:
                case messages.Ready():
                    # Ready comes again after a promotion; the first size stays the measure.
                    self.first_rss = self.first_rss or self.rss()
                    self.ready = message
                case messages.Unready():
                    self.load_error = message.message
                case messages.Done() | messages.Failed():
                    self._count(message.served)
                case messages.Compared():
                    self._compared(message.document)
                case _:
                    pass
        return received

    def _compared(self, document: str) -> None:
        """It may come at any time, also between two jobs."""
        try:
            found = Comparison.model_validate_json(document)
        except ValidationError as error:
            log.warning("child.misunderstood", error=str(error)[:300])
            return
        telemetry.shadow_compared(found, self.settings)

    def _count(self, served: int) -> None:
        """The first job also takes memory that every later job uses again."""
        self.jobs_done += 1
        # A job that was cancelled before its turn was not served: its answer says 0.
        self.served = max(self.served, served)
        if self.jobs_done == 1:
            self.first_rss = max(self.first_rss, self.rss())

    def confinement(self) -> str:
        """What confines the child, what does not, and which models or plans it refused.

        One line; empty before the child is ready.
        """
        if self.ready is None:
            return ""
        held = [each.name for each in self.ready.facts.protections if each.holds]
        lacks = sandbox.missing(self.ready.facts.protections)
        refused = [f"{x.role} {x.model}: {x.why}" for x in self.ready.facts.refused]
        return (
            f"its child is confined by {', '.join(held)}; missing: {'; '.join(lacks) or 'nothing'}"
            + (f"; REFUSED: {'; '.join(refused)}" if refused else "")
        )

    def remarks(self) -> str:
        """What an operator should know of the ready child: what slows it, and what confines it."""
        facts = self.ready.facts if self.ready is not None else EngineFacts()
        slow = SLOW if facts.slow else ""
        return "; ".join(filter(None, (slow, self.confinement())))

    def wait(self, seconds: float) -> list[messages.Message] | None:
        """receive() after waiting for a message; [] when none came in time."""
        ready, _, _ = select.select([self], [], [], max(0.0, seconds))
        return self.receive() if ready else []

    def rss(self) -> int:
        """Resident bytes of the child; 0 when it has gone."""
        with contextlib.suppress(psutil.Error):
            return int(self._info.memory_info().rss) if self._info else 0
        return 0

    def cpu(self) -> float:
        """Processor seconds that the child has used; 0 when it has gone."""
        with contextlib.suppress(psutil.Error):
            if self._info:
                times = self._info.cpu_times()
                return float(times.user + times.system)
        return 0.0

    def recycle_reason(self) -> str:
        """Why this child should be replaced before its next job; empty: it should not."""
        settings = self.settings
        # The `> 0` of both conditions: a limit of 0 is no limit, and the first size may be unknown.
        most = settings.shared_child_max_jobs if self.shared else settings.child_max_jobs
        if self.served >= most > 0:
            return "jobs"
        if self.jobs_done and self.rss() > settings.child_max_rss_ratio * self.first_rss > 0:
            return "rss"
        # Another parent of this child has started one that compiled: this parent connects to it.
        if self.shared and self.uncompiled and self._pid_of_newest() != self.pid:
            return "uncompiled"
        return ""

    @property
    def uncompiled(self) -> bool:
        """Whether it follows a version that a new child would run faster, with a compiler."""
        facts = self.ready.facts if self.ready is not None else EngineFacts()
        return facts.slow and facts.loaded_late

    def _pid_of_newest(self) -> int:
        try:
            return int((self.folder / "pid").read_text())
        except (OSError, ValueError):
            return 0

    def start_next(self) -> bool:
        """Start a child beside this one, to switch() to when it is ready.

        False where another parent of a shared child is doing so, or has done so.
        """
        claim = (self.folder / f"lock{NEXT}").open("w")
        try:
            fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = self._pid_of_newest() == self.pid  # else it has done so already
        except OSError:
            mine = False
        if not mine:
            claim.close()
            return False
        self._claim = claim
        self.next = ChildProcess(
            self.settings,
            bodies=self.bodies,
            shared=self.folder if self.shared else None,
            capacity=self.capacity,
            beside=self,
        )
        self.next.open()
        return True

    def switch(self) -> None:
        """Go on with the next child, which is ready; this one is asked to exit.

        A shared child first ends the running jobs of its other parents.
        """
        fresh = self.next
        assert fresh is not None and fresh.ready is not None
        with self._locked():
            for name in ("socket", "pid"):
                (self.folder / f"{name}{NEXT}").replace(self.folder / name)
        self.retire()
        self.ready, self.pid, self.first_rss = fresh.ready, fresh.pid, fresh.first_rss
        self.jobs_done = self.served = 0
        self._process, self._info, self._reader = fresh._process, fresh._info, fresh._reader
        self._connection, self._inbox, self._tail = fresh._connection, fresh._inbox, fresh._tail
        self._release_next()

    def drop_next(self) -> str:
        """End the next child; says how it ended."""
        if self.next is None:
            return ""
        self.next.kill()
        how = self.next.detach()
        self._release_next()
        return how

    def _release_next(self) -> None:
        self.next = None
        if self._claim is not None:
            self._claim.close()
            self._claim = None

    def kill(self) -> None:
        """End the child now, whatever native code it is in. Does nothing when it is gone."""
        if self._info is not None:
            with contextlib.suppress(psutil.Error):
                self._info.kill()  # checks first that the process id was not given to another

    def detach(self) -> str:
        """Close the connection to a child that has gone or must go; says how it ended."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        self.ready = None
        status, self.exit_code = "left", None
        if self.shared:
            self._leave_running()
        elif self._process is not None:
            try:
                # It exits when its connection closes, but not while native code holds the
                # interpreter.
                code = self._process.wait(5.0)
            except subprocess.TimeoutExpired:
                self.kill()
                code = self._process.wait()
            self.exit_code = code
            status = f"died of {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
            # Its last lines may still be in the pipe, and the quarantine keeps them.
            if self._reader is not None:
                self._reader.join(READ_OUT_S)
            self._process = self._reader = None
        self.pid, self._info = 0, None
        return status

    @property
    def may_blame_file(self) -> bool:
        """Whether the last child's death can be due to the file that it was reading.

        SIGKILL comes from outside: an operator, or the kernel when the machine's memory is full.
        """
        return self.exit_code not in (None, -signal.SIGKILL)

    def last_output(self) -> str:
        """The end of the child's stderr."""
        return "\n".join(self._tail)

    def retire(self) -> None:
        """Ask the child to exit; the next open() spawns another."""
        self.send(messages.Shutdown())
        self.detach()

    def close(self) -> None:
        """At the parent's exit: an exclusive child is killed, its folder removed."""
        self.drop_next()
        if not self.shared:
            self.kill()
        self.detach()
        self._work_dir.close()

    def _leave_running(self) -> None:
        """A shared child outlives this parent's connection: it is only reaped later."""
        if self._process is not None:
            self.exit_code = self._process.poll()
            if self.exit_code is None:
                _LEFT_RUNNING.append(self._process.pid)
                self._process.returncode = 0  # or Popen warns that it was not waited for
            self._process = None
