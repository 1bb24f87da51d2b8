""".ci/run: its last line and its exit code, with `make` and pytest replaced by small fakes.

The fake `make test` and the fake pytest write pytest's list of failed tests, as the real ones do.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIST = ".pytest_cache/v/cache/lastfailed"
FAKE = (
    """#!/usr/bin/env bash
if [ "${{0##*/}}" = make ] && [ "$1" != test ]; then exit 0; fi
mkdir -p .pytest_cache/v/cache
if [ -s {failed} ]; then cp {failed} """
    + LIST
    + """; exit 1; fi
rm -f """
    + LIST
    + """
exit {status}
"""
)


def executable(path: Path, text: str) -> None:
    """Write a program."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def outcome(folder: Path, first: list[str], again: list[str], status: int = 0) -> tuple[int, str]:
    """Exit code and last line of a run in which `first` fail in the suite and `again` alone."""
    shutil.copytree(ROOT / ".ci", folder / ".ci")
    for name, failing in (("first", first), ("again", again)):
        path = folder / name
        path.write_text(json.dumps(dict.fromkeys(failing, True)) if failing else "")
    tools = folder / "tools"
    executable(tools / "make", FAKE.format(failed="first", status=status))
    executable(folder / ".venv" / "bin" / "pytest", FAKE.format(failed="again", status=status))
    for name in ("promtool", "docker-compose"):
        executable(tools / name, "#!/bin/sh\n")
    run = subprocess.run(
        [folder / ".ci" / "run"],
        env=os.environ | {"PATH": f"{tools}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return run.returncode, (run.stdout.splitlines() or [""])[-1]


def test_a_run_without_failures_passes(tmp_path: Path):
    """And names no test."""
    assert outcome(tmp_path, [], []) == (0, "")


def test_what_could_not_be_resolved_is_said_at_the_end(tmp_path: Path):
    """A server that was not reached is no failure of ours, and no success either."""
    (tmp_path / ".not-resolved").write_text(
        "resolve: NOT CHECKED, a server was not reached: [gpu]\n"
    )

    code, line = outcome(tmp_path, [], [])

    assert (code, line) == (0, "ci: resolve: NOT CHECKED, a server was not reached: [gpu]")


def test_the_last_line_names_a_test_that_failed_once(tmp_path: Path):
    """The run passes; the test has to be repaired."""
    code, line = outcome(tmp_path, ["tests/a.py::one", "tests/b.py::two"], [])

    assert code == 0
    assert line.startswith("FLAKY: tests/a.py::one tests/b.py::two")


def test_a_test_that_fails_twice_fails_the_run(tmp_path: Path):
    """The test that passed alone is still named last."""
    (tmp_path / "both").mkdir()
    code, line = outcome(tmp_path / "both", ["tests/a.py::one"], ["tests/a.py::one"])
    assert (code, line) == (1, "FAILED TWICE: tests/a.py::one")

    (tmp_path / "one").mkdir()
    code, line = outcome(
        tmp_path / "one", ["tests/a.py::one", "tests/b.py::two"], ["tests/a.py::one"]
    )
    assert code == 1
    assert line.startswith("FLAKY: tests/b.py::two")


@pytest.mark.parametrize("status", [2, 137])
def test_a_run_that_fails_without_a_failed_test_is_not_repeated(tmp_path: Path, status: int):
    """Such as a fault in conftest.py, or a process that was killed."""
    assert outcome(tmp_path, [], [], status) == (1, "ci: the run failed although no test failed")


def test_a_suite_that_hangs_runs_once_more(tmp_path: Path):
    """`timeout` ends it with 124; the second time it passes."""
    timeout = "#!/bin/sh\nif [ ! -e hung ]; then touch hung; exit 124; fi\nshift 3\nexec "
    executable(tmp_path / "tools" / "timeout", timeout + '"$@"\n')
    code, line = outcome(tmp_path, [], [])

    assert code == 0
    assert line.startswith("ci: HUNG")
