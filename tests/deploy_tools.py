"""Finds the programs that check a deployment, where `make deploy-tools` puts them or on the PATH.

`make deploy-check` runs the tests that need them, and there a missing program is a failure.  In
other runs these tests are skipped; only the Node examples run wherever there is a Node.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
PLACES = (ROOT / ".venv" / "bin", ROOT / ".venv" / "node" / "node_modules" / ".bin")
SEARCHED = os.pathsep.join([*map(str, PLACES), os.environ.get("PATH", "")])


def tool(name: str) -> str:
    """The path of the program; skips the test where the program is not needed."""
    required = os.environ.get("REQUIRE_DEPLOY_TOOLS") == "1"
    if not required and name != "node":
        pytest.skip("only make deploy-check runs this")
    found = shutil.which(name, path=SEARCHED)
    if found is None and required:
        pytest.fail(f"REQUIRE_DEPLOY_TOOLS=1, and there is no {name}; run: make deploy-tools")
    if found is None:
        pytest.skip(f"no {name} here; make deploy-check installs it")
    return found


def run(name: str, *arguments: str | Path, cwd: Path = ROOT) -> str:
    """Run the program and return its output; raises AssertionError with it when it fails."""
    program = tool(name)
    ran = subprocess.run(
        [program, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PATH": SEARCHED},
    )
    assert ran.returncode == 0, f"{name} {arguments}: {ran.stdout[-3000:]}{ran.stderr[-3000:]}"
    return ran.stdout
