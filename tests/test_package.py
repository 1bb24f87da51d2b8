"""The package as others install it: one import name, and everything that it needs inside."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the unpacked wheel."""
    # From a copy: setuptools leaves a build/ folder behind, which the next wheel would take in.
    source = tmp_path_factory.mktemp("source")
    for name in ("ralf", "kernels", "worker", "train"):
        shutil.copytree(ROOT / name, source / name, symlinks=True)
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source / name)
    wheels = tmp_path_factory.mktemp("wheels")
    site = tmp_path_factory.mktemp("site")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
    build = ("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels), str(source))
    subprocess.run([*pip, *build], check=True)
    (wheel,) = wheels.glob("*.whl")
    subprocess.run(
        [*pip, "install", "--no-deps", "--no-index", "--target", str(site), str(wheel)], check=True
    )
    return site


def run(code: str, *, site: Path, folder: Path) -> str:
    """What a program in the folder prints that finds the wheel."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_a_backend_with_its_own_worker_module_can_import_the_client(
    installed: Path, tmp_path: Path
):
    """Ralf takes no other name than its own."""
    for name in ("worker", "kernels", "train"):
        (tmp_path / f"{name}.py").write_text("MINE = True\n")
    printed = run(
        "import kernels, train, worker\n"
        "import ralf, ralf.client, ralf.kernels.manifest, ralf.train.recipe\n"
        "assert worker.MINE and kernels.MINE and train.MINE\n"
        "print(ralf.__file__, ralf.client.connect.__name__)",
        site=installed,
        folder=tmp_path,
    )

    assert printed.split() == [str(installed / "ralf" / "__init__.py"), "connect"]
    assert {path.name for path in installed.iterdir() if "-" not in path.name} <= {"ralf", "bin"}


def test_the_wheel_carries_every_file_that_the_code_reads(installed: Path):
    """Modules, Lua scripts, the page's style: all but what is only for a checkout."""
    only_in_a_checkout = {".pyc", ".md", ".sh"}
    here = {
        path.relative_to(ROOT).as_posix()
        for room in ("kernels", "worker", "train")
        for path in (ROOT / room).rglob("*.*")
        if path.is_file() and path.suffix not in only_in_a_checkout
    }
    there = {
        path.relative_to(installed / "ralf").as_posix()
        for room in ("kernels", "worker", "train")
        for path in (installed / "ralf" / room).rglob("*.*")
        if path.is_file() and path.suffix not in only_in_a_checkout
    }

    assert "worker/service/lua/claims.lua" in here
    assert here == there


def test_the_installed_command_runs_outside_a_checkout(installed: Path, tmp_path: Path):
    """`python -m ralf` and the child's module are found in the wheel."""
    start = "runpy.run_module('ralf', run_name='__main__')"
    code = f"import runpy, sys; sys.argv = ['ralf', '--version']; {start}"
    stopped = "import ralf.worker.service.child_process as c; print(c._ROOT)"

    with pytest.raises(subprocess.CalledProcessError):  # a guard: the check below can fail
        run("import no_such_module", site=installed, folder=tmp_path)
    assert run(f"try:\n {code}\nexcept SystemExit: pass", site=installed, folder=tmp_path)
    assert run(stopped, site=installed, folder=tmp_path).strip() == str(installed)
