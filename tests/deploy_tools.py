"""The programs that check a deployment: found where `make deploy-tools` puts them, or on the PATH.

A machine that lacks one skips what needs it; with REQUIRE_DEPLOY_TOOLS=1 that is a failure.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
PLACES = (ROOT / ".venv" / "bin", ROOT / ".venv" / "node" / "node_modules" / ".bin")


def tool(name: str) -> str:
    """The program, or a skip."""
    path = os.pathsep.join([*map(str, PLACES), os.environ.get("PATH", "")])
    found = shutil.which(name, path=path)
    if found is None:
        if os.environ.get("REQUIRE_DEPLOY_TOOLS") == "1":
            pytest.fail(f"REQUIRE_DEPLOY_TOOLS=1, and there is no {name}; run: make deploy-tools")
        pytest.skip(f"no {name} here; `make deploy-tools` installs it")
    return found


def run(name: str, *arguments: str | Path, cwd: Path = ROOT) -> str:
    """What it says; an AssertionError with it when it does not like what it sees."""
    program = tool(name)
    path = os.pathsep.join([*map(str, PLACES), os.environ.get("PATH", "")])
    told = subprocess.run(
        [program, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PATH": path},
        timeout=120,
    )
    assert told.returncode == 0, f"{name} {arguments}: {told.stdout[-3000:]}{told.stderr[-3000:]}"
    return told.stdout
