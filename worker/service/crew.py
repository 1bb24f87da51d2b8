"""Several parents around one child, as one process: what the container of a GPU runs.

A parent has one job at a time, most of which it waits for a fetch; a GPU wants more than one. So
`ralf worker --parents 4 --high 1` starts four of them with one folder, in which they share one
child (see link.py); one takes the jobs of priority high.  The first answers at settings.http_port,
the next at the port after it, and so on.

They live and die together: a signal goes to all, and when one ends by itself, or its loop turns no
more, the others drain and the crew ends with an error, so that whoever supervises the container
starts it anew.  Nothing is lost by that: jobs are handed back, and a killed parent's are found by
the janitor.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType

import structlog

from ralf.worker import telemetry
from ralf.worker.contract import Priority
from ralf.worker.service.jobs import Bodies
from ralf.worker.service.serve import BROKEN, as_environment
from ralf.worker.settings import Settings

log = structlog.get_logger()

LOOK_S = 0.2
ASK_EVERY_S = 15.0
ANSWER_S = 5.0
STRIKES = 3
"""So many unhealthy answers in a row, and a parent is taken for stuck."""
SPARE_S = 30.0
"""After the grace a parent still kills its child and writes to Redis."""


class Crew:
    """The parents of one child."""

    def __init__(
        self,
        settings: Settings,
        priorities: Sequence[Priority],
        *,
        capacity: int,
        folder: Path,
        bodies: Bodies,
    ) -> None:
        self._settings = settings
        many = range(len(priorities))
        self.ports = [settings.http_port and settings.http_port + n for n in many]
        self.stopping = 0.0
        command = [sys.executable, "-m", "ralf.worker.service.serve", "--parent", str(os.getpid())]
        command += ["worker", "--bodies", bodies, "--shared", str(folder)]
        command += ["--capacity", str(capacity), "--priority"]
        self.members = [
            subprocess.Popen(
                [*command, priority],
                env=as_environment(replace(settings, http_port=port), os.environ),
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # a Ctrl-C reaches only us, and we tell them
            )
            for priority, port in zip(priorities, self.ports, strict=True)
        ]
        self._strikes = [0] * len(priorities)
        self._asked = time.monotonic()

    def tell(self, number: int, _: FrameType | None = None) -> None:
        """Pass a signal on; the first SIGTERM drains, the second hands back at once."""
        self.stopping = self.stopping or time.monotonic()
        for member in self.members:
            if member.poll() is None:
                member.send_signal(number)

    def watch(self) -> int:
        """Until all have ended; 0 when they ended because they were told to, and well."""
        worst = 0
        while any(member.poll() is None for member in self.members):
            time.sleep(LOOK_S)
            if self.stopping:
                self._hurry()
                continue
            self._see_to_health()
            fallen = [member for member in self.members if member.poll() is not None]
            if fallen:
                log.error("crew.broken", pid=fallen[0].pid, code=fallen[0].returncode)
                worst = fallen[0].returncode if fallen[0].returncode > 0 else BROKEN
                self.tell(signal.SIGTERM)
        return worst or max((abs(member.returncode) for member in self.members), default=0)

    def _hurry(self) -> None:
        """One that does not leave after its grace is killed; its job's lease runs out."""
        if time.monotonic() - self.stopping > self._settings.grace_s + SPARE_S:
            for member in self.members:
                if member.poll() is None:
                    member.kill()

    def _see_to_health(self) -> None:
        """Kill a parent whose loop no longer turns; a starting one answers nothing yet."""
        if not self.ports[0] or time.monotonic() - self._asked < ASK_EVERY_S:
            return
        self._asked = time.monotonic()
        for index, port in enumerate(self.ports):
            self._strikes[index] = 0 if healthy(port) else self._strikes[index] + 1
            if self._strikes[index] >= STRIKES and self.members[index].poll() is None:
                log.error("crew.stuck", pid=self.members[index].pid, port=port)
                self.members[index].kill()


def healthy(port: int) -> bool:
    """Whether the parent there says that its loop turns, or nobody listens there yet."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=ANSWER_S) as told:
            return bool(told.status == 200)
    except urllib.error.HTTPError:
        return False
    except urllib.error.URLError as error:
        return isinstance(error.reason, ConnectionRefusedError)
    except OSError:  # it took the question and gave no answer
        return False


def run_crew(
    settings: Settings,
    priorities: Sequence[Priority],
    *,
    capacity: int | None = None,
    bodies: Bodies = "moderate",
) -> int:
    """Start one parent for each priority named, stop them; the exit status.

    capacity is how many jobs the child works on at once; as many as there are parents, if not said.
    """
    telemetry.configure(settings)
    with tempfile.TemporaryDirectory(prefix="crew-", dir=settings.work_dir or None) as folder:
        crew = Crew(
            settings,
            priorities,
            capacity=capacity or len(priorities),
            folder=Path(folder),
            bodies=bodies,
        )
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, crew.tell)
        return crew.watch()
