"""The package as others install it: one import name, and everything that it needs inside."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ralf.kernels.artifact import SHIPPED, resolve
from ralf.train.cli import commands as train
from ralf.worker.cli.main import LIBRARIES, NEEDS, parser
from tests.clips import face_clip

ROOT = Path(__file__).resolve().parent.parent


def pip(*words: str) -> None:
    """Run pip, quietly."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*command, *words], check=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built as `pip wheel` builds it."""
    # From a copy: setuptools leaves a build/ folder behind, which the next wheel would take in.
    source = tmp_path_factory.mktemp("source")
    for name in ("ralf", "kernels", "worker", "train", "models"):
        shutil.copytree(ROOT / name, source / name, symlinks=True)
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source / name)
    wheels = tmp_path_factory.mktemp("wheels")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels), str(source))
    (built,) = wheels.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the unpacked wheel."""
    site = tmp_path_factory.mktemp("site")
    pip("install", "--no-deps", "--no-index", "--target", str(site), str(wheel))
    return site


def environment(folder: Path, wheel: Path) -> Path:
    """A fresh virtual environment with the wheel and no other library; its folder of packages."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    pip("--python", str(python), "install", "--no-deps", "--no-index", str(wheel))
    (site,) = folder.glob("lib/python*/site-packages")
    return site


@pytest.fixture(scope="module")
def with_cpu(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel and every library that is installed here."""
    folder = tmp_path_factory.mktemp("with-cpu")
    libraries = Path(np.__file__).parent.parent
    environment(folder, wheel).joinpath("libraries.pth").write_text(f"{libraries}\n")
    return folder / "bin"


@pytest.fixture(scope="module")
def without_extras(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel, what it depends on without any extra, and nothing else."""
    folder = tmp_path_factory.mktemp("without-extras")
    site = environment(folder, wheel)
    wanted = list(project()["dependencies"])
    linked: set[str] = set()
    while wanted:
        needed = Requirement(wanted.pop())
        if needed.name in linked or (needed.marker and not needed.marker.evaluate({"extra": ""})):
            continue
        linked.add(needed.name)
        found = distribution(needed.name)
        wanted += found.requires or []
        for name in {path.parts[0] for path in found.files or () if path.parts[0] != ".."}:
            if not (site / name).exists():
                (site / name).symlink_to(str(found.locate_file(name)))
    return folder / "bin"


def project() -> dict:
    """pyproject.toml's [project]."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


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


def test_an_installed_copy_scans_with_the_shipped_model(
    with_cpu: Path, tmp_path: Path, astronaut: np.ndarray
):
    """From any folder, with no setting: the wheel carries the model, checked file by file."""
    clip = face_clip(tmp_path / "one.mp4", [astronaut], 0.4, size=(320, 240), fps=5)
    scan = subprocess.run(
        [with_cpu / "ralf", "scan", "--json", clip.name],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "RALF_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    made = json.loads(scan.stdout)["made"]
    shipped = resolve(SHIPPED, "ralf-small")

    assert (made["model"], made["version"]) == ("ralf-small", shipped.version)
    assert made["faces"] > 0
    assert "" == scan.stderr
    where = "import ralf.kernels.artifact as a; print(a.SHIPPED)"
    python = [with_cpu / "python", "-c", where]
    printed = subprocess.run(python, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert Path(printed.stdout.strip()).is_relative_to(with_cpu.parent)


ARGUMENTS = {
    "scan": "none.mp4",
    "stream": "none.mp4 --session s",
    "bench": "queue",
    "models": "list",
    "build": "ralf-small",
    "data": "check .",
    "forge": "render --with r --data none --out out",
    "train": "ralf_small",
    "retrain": "ralf_small --data none --name mine",
    "publish": "out --name mine",
    "calibrate": "mine",
    "ensemble": "a b --name mine",
    "evaluate": "out --data none",
    "figures": "mine --data none --out out",
}
NO_REDIS = "--redis redis://127.0.0.1:1"
CORE = {
    "submit": f"https://cdn.example/1.mp4 {NO_REDIS}",
    "status": f"job {NO_REDIS}",
    "result": f"job {NO_REDIS}",
    "cancel": f"job {NO_REDIS}",
    "watch": f"job {NO_REDIS}",
    "quarantine": f"list {NO_REDIS}",
    "backfill": f"none.csv {NO_REDIS}",
    "doctor": "--json",
}


def bare(folder: Path, command: str, arguments: str) -> tuple[int, str]:
    """The exit code and the last line of stderr of a command that was installed without extras."""
    ended = subprocess.run(
        [folder / "ralf", command, *arguments.split()],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "Traceback" not in ended.stderr, ended.stderr
    return ended.returncode, (ended.stderr.splitlines() or [""])[-1]


def test_without_extras_each_command_names_the_one_that_it_needs(without_extras: Path):
    """Exit code 5 and one line, before anything is started; the queue's commands need no extra."""
    commands = re.findall(r"^    ([a-z]+) ", parser([train]).format_help(), re.MULTILINE)
    assert sorted(commands) == sorted([*NEEDS, *CORE])

    for command, extra in NEEDS.items():
        code, message = bare(without_extras, command, ARGUMENTS.get(command, ""))
        assert code == 5, (command, message)
        assert message.startswith(f"ralf: {command} needs "), message
        assert f"pip install 'PATH[{extra}]'" in message
    for command, arguments in CORE.items():
        _, message = bare(without_extras, command, arguments)
        assert "not installed" not in message, (command, message)
    assert "redis" in bare(without_extras, "submit", CORE["submit"])[1].lower()


def test_the_extras_named_are_those_that_bring_the_libraries():
    """Each distribution of an extra, by the module that it installs."""
    provided: dict[str, set[str]] = {}
    for module, names in packages_distributions().items():
        for name in names:
            provided.setdefault(canonicalize_name(name), set()).add(module)
    extras = project()["optional-dependencies"]
    for extra, modules in LIBRARIES.items():
        wanted = {canonicalize_name(Requirement(line).name) for line in extras[extra]}
        # The extra `build` has TensorRT by the extra `rtx`.
        left = set(modules) - {"tensorrt_rtx"}
        for name in wanted - {"ralf-moderation"}:
            named = left & provided.get(name, {name.replace("-", "_")})
            assert len(named) == 1, (extra, name)
            left -= named
        assert left == set(), extra
