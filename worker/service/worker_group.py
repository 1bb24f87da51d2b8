"""Several workers that share one child: what the container of a GPU runs.

A worker process has one job at a time and mostly waits for its fetch; a GPU wants more jobs than
that.  So `ralf worker --parents 4 --high 1` starts four workers with one folder, in which they
share one child (see child_process.py); one of them takes the jobs of priority high.  The first
answers at settings.http_port, the next at the port after it, and so on.

They start and end together.  A signal goes to all.  When one ends by itself, or its loop hangs, the
others drain and the group ends with an error, so that the container is started again.  Nothing is
lost by that: jobs are handed back, and the janitor finds those of a killed worker.
"""

import contextlib
import signal
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
from ralf.worker.service.processes import BROKEN, Supervisor
from ralf.worker.service.sandbox import refuse_inspection
from ralf.worker.service.work_dir import WorkDir
from ralf.worker.settings import Settings

log = structlog.get_logger()

WATCH_S = 0.2
ASK_EVERY_S = 15.0
ANSWER_S = 5.0
BAD_ANSWERS = 3
"""After this many unhealthy answers in a row a worker is taken for stuck."""
KILL_SPARE_S = 30.0
"""A worker that has not left this long after its grace is killed."""


class WorkerGroup:
    """The workers of one child."""

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
        self._supervisor = Supervisor(settings, folder)
        self._stopping_since = 0.0
        many = range(len(priorities))
        # 0 stays 0, which serves no page; 0 + n would name a port.
        self._ports = [settings.http_port and settings.http_port + n for n in many]
        self._bad_answers = [0] * len(priorities)
        self._asked = time.monotonic()
        for priority, port in zip(priorities, self._ports, strict=True):
            self._supervisor.add(
                "worker",
                *("--bodies", bodies, "--capacity", str(capacity), "--priority", priority),
                settings=replace(settings, http_port=port),
                restart=False,
                shared=folder,
            )
        self._supervisor.tend()

    def pass_on(self, number: int, _: FrameType | None = None) -> None:
        """Send a signal to all; the first SIGTERM drains, the second hands back at once."""
        # The first signal counts: a second must not extend the time.
        self._stopping_since = self._stopping_since or time.monotonic()
        for worker in self._supervisor.processes:
            self._supervisor.signal(worker, number)

    def watch(self) -> int:
        """Until all have ended; 0 when a signal ended them, and all ended well."""
        worst = 0
        workers = self._supervisor.processes
        while any(worker.pid for worker in workers):
            time.sleep(WATCH_S)
            if self._stopping_since:
                self._kill_late_ones()
                continue
            self._kill_stuck_ones()
            for worker in workers:
                code = worker.exit_code
                if code is not None and not worst:
                    log.error("group.broken", worker=worker.name, code=code)
                    # 0 is a failure too here: the worker left without a signal.
                    worst = code if code > 0 else BROKEN
            if worst:
                self.pass_on(signal.SIGTERM)
        return worst or max((abs(worker.exit_code or 0) for worker in workers), default=0)

    def _kill_late_ones(self) -> None:
        """The lease of a killed worker's job runs out, and another worker runs it."""
        if time.monotonic() - self._stopping_since > self._settings.grace_s + KILL_SPARE_S:
            for worker in self._supervisor.processes:
                self._supervisor.signal(worker, signal.SIGKILL)

    def _kill_stuck_ones(self) -> None:
        """Kill a worker whose loop hangs; one that is starting does not answer yet."""
        if not self._ports[0] or time.monotonic() - self._asked < ASK_EVERY_S:
            return
        self._asked = time.monotonic()
        for index, (worker, port) in enumerate(
            zip(self._supervisor.processes, self._ports, strict=True)
        ):
            self._bad_answers[index] = 0 if healthy(port) else self._bad_answers[index] + 1
            if self._bad_answers[index] >= BAD_ANSWERS and worker.pid:
                log.error("group.stuck", worker=worker.name, port=port)
                self._supervisor.signal(worker, signal.SIGKILL)


def healthy(port: int) -> bool:
    """Whether the worker there answers that its loop runs, or nothing listens there yet."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=ANSWER_S) as answer:
            return bool(answer.status == 200)
    except urllib.error.HTTPError:
        return False
    except urllib.error.URLError as error:
        return isinstance(error.reason, ConnectionRefusedError)
    except OSError:  # it accepted the connection and gave no answer
        return False


def run_group(
    settings: Settings,
    priorities: Sequence[Priority],
    *,
    capacity: int | None = None,
    bodies: Bodies = "moderate",
) -> int:
    """Run one worker for each priority named, until a signal; gives the exit status.

    capacity: how many jobs the child works on at once; by default as many as there are workers.
    """
    refuse_inspection()
    telemetry.configure(settings)
    # The jobs' files lie in it while the child reads them: it must go even after a SIGKILL.
    folder = WorkDir(settings.work_dir)
    with contextlib.closing(folder):
        group = WorkerGroup(
            settings,
            priorities,
            capacity=capacity or len(priorities),
            folder=folder.path,
            bodies=bodies,
        )
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, group.pass_on)
        return group.watch()
