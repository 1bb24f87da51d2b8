"""The parent's end of the line to the warm child: spawn it, talk to it, end it.

An exclusive child has its own private folder and dies with its parent.  A shared child lives in a
named folder: whoever comes first spawns it under a lock, the others connect, and it leaves when
nobody has been connected for a while.  The socket is bound, and listens, before the child starts,
so connecting never polls.

The process id that may be killed is the one that we got from the spawn, never one that the child
claims.  Nothing here judges a job: it says what the child said, that it is gone, and how it went.
"""

import contextlib
import fcntl
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import structlog
from pydantic import ValidationError

import ralf
from ralf.worker import telemetry
from ralf.worker.service import messages, sandbox
from ralf.worker.service.jobs import Bodies
from ralf.worker.service.procfs import cpu, rss
from ralf.worker.service.shadow import Comparison
from ralf.worker.service.work_dir import OwnFolder
from ralf.worker.settings import Settings

log = structlog.get_logger()

TAIL_LINES = 40
LINGER_S = 10.0
READ_OUT_S = 5.0
"""A dead child's stderr is read to its end; only a grandchild could keep it open for longer."""
_LEFT_ALIVE: list[int] = []
_ROOT = Path(ralf.__file__).resolve().parent.parent


def _reap() -> None:
    for pid in list(_LEFT_ALIVE):
        with contextlib.suppress(ChildProcessError):
            if os.waitpid(pid, os.WNOHANG) == (0, 0):
                continue
        _LEFT_ALIVE.remove(pid)


class Link:
    """One parent's connection to one child, and its next child after that one's end."""

    def __init__(
        self,
        settings: Settings,
        *,
        bodies: Bodies = "moderate",
        shared: Path | None = None,
        capacity: int = 1,
    ) -> None:
        self.settings = settings
        self.bodies: Bodies = bodies
        self.shared = shared is not None
        self.capacity = capacity
        self._own = OwnFolder(settings.work_dir)
        self.uploads = self._own.path
        """Where this parent's jobs are fetched to."""
        self.folder = shared or self._own.path
        """Where the child's socket lies."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.ready: messages.Ready | None = None
        self.refusal: str = ""
        """Why the last child could not load its model."""
        self.pid = 0
        self.jobs_done = 0
        self.first_rss = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None
        self._inbox = messages.Inbox()
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._reader: threading.Thread | None = None

    # its life

    @property
    def alive(self) -> bool:
        """Whether there is a child at the other end, ready or not."""
        return self._connection is not None

    def fileno(self) -> int:
        """For select()."""
        if self._connection is None:
            raise ValueError("there is no child to listen to")
        return self._connection.fileno()

    def open(self) -> None:
        """Connect to the child, spawning it where there is none, and say hello."""
        if self._connection is not None:
            return
        self.ready, self.refusal, self.jobs_done, self.first_rss = None, "", 0, 0
        self._inbox = messages.Inbox()
        self._tail.clear()
        with self._locked():
            self._connection = self._connected() or self._spawned()
        self.say(messages.Hello())

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.folder / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _connected(self) -> socket.socket | None:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(str(self.folder / "socket"))
            self.pid = int((self.folder / "pid").read_text())
        except (OSError, ValueError):
            connection.close()
            return None
        return connection

    def _spawned(self) -> socket.socket:
        _reap()
        path = self.folder / "socket"
        path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX) as listener:
            before = os.umask(0o177)
            try:
                listener.bind(str(path))
            finally:
                os.umask(before)
            listener.listen(64)
            self._process = subprocess.Popen(
                self._command(listener.fileno()),
                env=self._environment(),
                cwd=self.folder,
                pass_fds=(listener.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=None if self.shared else subprocess.PIPE,
                start_new_session=True,
            )
            self.pid = self._process.pid
            (self.folder / "pid.new").write_text(str(self.pid))
            (self.folder / "pid.new").replace(self.folder / "pid")
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(str(path))
        if self._process.stderr is not None:
            self._reader = threading.Thread(target=self._forward, daemon=True, name="child-stderr")
            self._reader.start()
        log.info("child.started", pid=self.pid)
        return connection

    def _command(self, descriptor: int) -> list[str]:
        command = [sys.executable, "-m", "ralf.worker.service.child"]
        command += ["--socket-fd", str(descriptor), "--bodies", self.bodies]
        command += ["--capacity", str(self.capacity)]
        if self.shared:
            return [*command, "--linger", str(LINGER_S)]
        return [*command, "--parent", str(os.getpid())]

    def _environment(self) -> dict[str, str]:
        environment = sandbox.environment(self.settings, os.environ)
        path = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = f"{_ROOT}{os.pathsep}{path}" if path else str(_ROOT)
        return environment

    def _forward(self) -> None:
        """The child's stderr goes to ours; its end is kept for the quarantine."""
        assert self._process is not None
        assert self._process.stderr is not None
        with self._process.stderr as pipe:
            for line in pipe:
                self._tail.append(line.decode(errors="replace").rstrip()[:300])
                # Our log may be gone; the child must not wait for ever on a pipe that nobody reads.
                with contextlib.suppress(OSError, ValueError, AttributeError):
                    sys.stderr.buffer.write(line)
                    sys.stderr.buffer.flush()

    # talking

    def say(self, message: messages.Message) -> None:
        """Send; a child that has gone is noticed at the next hear()."""
        if self._connection is not None:
            with contextlib.suppress(OSError):
                self._connection.sendall(messages.encode(message))

    def hear(self) -> list[messages.Message] | None:
        """What the child said; None when it has gone. Call when fileno() is readable."""
        if self._connection is None:
            return None
        try:
            received = messages.receive(self._connection, self._inbox)
        except messages.WireError as error:
            log.error("child.misunderstood", error=str(error))
            self.kill()
            return None
        for message in received or ():
            match message:
                case messages.Ready():
                    self.first_rss = self.first_rss or self.rss()
                    self.ready = message
                case messages.Unready():
                    self.refusal = message.message
                case messages.Done() | messages.Failed():
                    self._count()
                case messages.Compared():
                    self._compared(message.document)
                case _:
                    pass
        return received

    def _compared(self, document: str) -> None:
        """It may come at any time, also between two jobs; a child's word is checked first."""
        try:
            found = Comparison.model_validate_json(document)
        except ValidationError as error:
            log.warning("child.misunderstood", error=str(error)[:300])
            return
        telemetry.shadow_compared(found, self.settings)

    def _count(self) -> None:
        """Loading is not all: the first job takes the memory that every job takes."""
        self.jobs_done += 1
        if self.jobs_done == 1:
            self.first_rss = max(self.first_rss, self.rss())

    def wait(self, seconds: float) -> list[messages.Message] | None:
        """hear(), waiting for something to be said; [] when nothing was in time."""
        ready, _, _ = select.select([self], [], [], max(0.0, seconds))
        return self.hear() if ready else []

    def rss(self) -> int:
        """Resident bytes of the child."""
        return rss(self.pid) if self.pid else 0

    def cpu(self) -> float:
        """Processor seconds that the child has used."""
        return cpu(self.pid) if self.pid else 0.0

    def worn(self) -> str:
        """Why this child should be replaced before its next job; empty while it should not."""
        settings = self.settings
        if self.jobs_done >= settings.child_max_jobs > 0:
            return "jobs"
        if self.jobs_done and self.rss() > settings.child_max_rss_ratio * self.first_rss > 0:
            return "rss"
        return ""

    # its end

    def kill(self) -> None:
        """End the child now, whatever native code it is in. No-op when it is gone."""
        if self.pid and self._is_child():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def _is_child(self) -> bool:
        """Ours by birth, or, when shared, still the process that the pid file meant."""
        if self._process is not None and self._process.pid == self.pid:
            return self._process.poll() is None
        try:
            return b"ralf.worker.service.child" in Path(f"/proc/{self.pid}/cmdline").read_bytes()
        except OSError:
            return False

    def closed(self) -> str:
        """Let go of a child that has gone or must go; says how it went."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        self.ready = None
        status = "left"
        if self.shared:
            self._let_live()
        elif self._process is not None:
            try:
                code = self._process.wait(5.0)
            except subprocess.TimeoutExpired:
                self.kill()
                code = self._process.wait()
            status = f"died of {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
            if self._reader is not None:
                self._reader.join(READ_OUT_S)
            self._process = self._reader = None
        self.pid = 0
        return status

    def last_words(self) -> str:
        """The end of the child's stderr."""
        return "\n".join(self._tail)

    def retire(self) -> None:
        """Ask the child to leave and let go of it; its next open() is another child."""
        self.say(messages.Shutdown())
        self.closed()

    def close(self) -> None:
        """The parent's own end: an exclusive child is killed, its folder removed."""
        if not self.shared:
            self.kill()
        self.closed()
        self._own.close()

    def _let_live(self) -> None:
        """A shared child outlives this link: it is not waited for, only reaped later."""
        if self._process is not None:
            _LEFT_ALIVE.append(self._process.pid)
            self._process.returncode = 0  # or Popen complains that nobody waits
            self._process = None
