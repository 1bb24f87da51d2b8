"""Which file may import which, and which file owns a heavy library, read from the imports."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import numpy as np
import pytest

from tests.clips import face_clip

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {
    "kernels": {"kernels"},
    "worker": {"worker", "kernels"},
    "train": {"train", "worker", "kernels"},
}
OWNERS = {
    "triton": {
        "kernels/dct_triton.py",
        "kernels/dct_quarters_triton.py",
        "kernels/residual_triton.py",
    },
    "torch_tensorrt": {"kernels/build_trt.py"},
    "onnx": {"kernels/export.py", "kernels/quantise.py"},
    "onnxruntime": {"kernels/export.py"},
    "tensorrt": {"kernels/engine_trt.py"},
    "tensorrt_rtx": {"kernels/build_rtx.py", "kernels/engine_trt.py"},
    "nvidia": {"worker/media/decode_dali.py"},
    "timm": {"kernels/networks/backbones.py"},
    "sklearn": {"train/evaluate/metrics.py", "train/evaluate/figures.py"},
    "fsspec": {"worker/service/fetch.py"},
    "av": {
        "worker/media/decode_pyav.py",
        "worker/media/live.py",
        "worker/media/probe.py",
        "worker/cli/annotate.py",
        "worker/chaos/mutants.py",
        "train/forge/video.py",
        "tests/clips.py",
    },
}
TORCH_FREE = {
    "worker/contract.py",
    "worker/errors.py",
    "worker/settings.py",
    "worker/client.py",
    "worker/verdict.py",
    "worker/page/page.py",
    "kernels/manifest.py",
    "kernels/artifact.py",
    "kernels/registry.py",
    "kernels/cli.py",
    "kernels/atomic_files.py",
    "kernels/plans.py",
    "kernels/machine.py",
    "worker/telemetry.py",
    "worker/drift.py",
    *(path.relative_to(ROOT).as_posix() for path in (ROOT / "worker/service").glob("*.py")),
}


PROGRAMS = ("worker/cli/", "worker/chaos/", "worker/bench/")
"""Programs around the worker: they may import all of it, and no other file imports them."""
PROGRAMS_IMPORTED = {
    # Only a process started with `--bodies test` loads the test jobs.
    ("worker/service/jobs.py", "worker/chaos/bodies.py"),
    ("ralf/__main__.py", "worker/cli/main.py"),
}


def sources(*rooms: str) -> list[Path]:
    """Every Python file of the rooms; by default of the three rooms and the tests."""
    rooms = rooms or (*ROOMS, "tests")
    return sorted(path for room in rooms for path in (ROOT / room).rglob("*.py") if path.is_file())


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and module of each import, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno} uses a relative import"
            if node.module:
                yield node.lineno, node.module
                yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def imported_files(text: str) -> set[str]:
    """The files of ours that the code imports when it runs, inside functions and by name too.

    What stands under `if TYPE_CHECKING` is only for the type checker.
    """
    found: set[str | None] = set()
    nodes: list[ast.AST] = [ast.parse(text)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            nodes += node.orelse
            continue
        nodes += ast.iter_child_nodes(node)
        match node:
            case ast.Import(names=names):
                found |= {file_of(alias.name) for alias in names}
            case ast.ImportFrom(module=str(module), names=names):
                found |= {file_of(f"{module}.{alias.name}") or file_of(module) for alias in names}
            case ast.Call(args=[ast.Constant(value=str(module)), *_]) if "import_module" in (
                ast.unparse(node.func)
            ):
                found.add(file_of(module))
    return {name for name in found if name}


def file_of(module: str) -> str | None:
    """The file of a module of ours; None for other modules and for names inside a module."""
    if not module.startswith("ralf."):
        return None
    name = module.removeprefix("ralf.").replace(".", "/")
    return next((f for f in (f"{name}.py", f"{name}/__init__.py") if (ROOT / f).is_file()), None)


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """The files of one import circle; [] when there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def faults() -> Iterator[str]:
    """Each import that points the wrong way, or takes a heavy library outside its owner."""
    for path in sources():
        name = path.relative_to(ROOT).as_posix()
        room = name.split("/")[0]
        for line, module in imports(path):
            ours = module.startswith("ralf.")
            top = module.removeprefix("ralf.").split(".")[0]
            if room in ROOMS and top in ROOMS and top not in ROOMS[room]:
                yield f"{name}:{line} {room} must not import {module}"
            if name.startswith("worker/media/") and module.startswith(
                ("ralf.worker.service", "ralf.worker.pipeline", "ralf.worker.runtime")
            ):
                yield f"{name}:{line} media must not import {module}"
            if name == "worker/pipeline.py" and module.startswith("ralf.worker.service"):
                yield f"{name}:{line} pipeline must not import {module}"
            if not ours and top in ROOMS:
                yield f"{name}:{line} import it as ralf.{module}"
            if top in OWNERS and name not in OWNERS[top] and room != "tests":
                yield f"{name}:{line} only {sorted(OWNERS[top])} may import {top}"
            if top == "av" and room == "tests" and name not in OWNERS["av"]:
                yield f"{name}:{line} video in tests is made by tests/clips.py"


def test_every_import_follows_the_rooms():
    """train → worker → kernels, service → pipeline → media, and one owner a heavy library."""
    found = list(faults())

    assert found == []


def test_every_import_of_a_file_leads_away_from_it():
    """Two files that import each other, even inside functions, are one file cut in two."""
    graph = {
        (name := path.relative_to(ROOT).as_posix()): {
            imported
            for imported in imported_files(path.read_text())
            if (name, imported) not in PROGRAMS_IMPORTED
        }
        for path in sources(*ROOMS)
    }
    assert sum(map(len, graph.values())) > 500

    assert circle(graph) == []


def test_every_import_of_a_program_comes_from_a_program():
    """Commands, chaos and benches use the worker; the worker does not need them."""
    found = {
        (name, imported)
        for path in (*sources(*ROOMS), *(ROOT / "ralf").glob("*.py"))
        if not (name := path.relative_to(ROOT).as_posix()).startswith(PROGRAMS)
        for imported in imported_files(path.read_text())
        if imported.startswith(PROGRAMS)
    }

    assert found == PROGRAMS_IMPORTED


def test_the_search_for_circles_sees_every_kind_of_import():
    """At the top, inside a function, by name; but nothing that only a type checker reads."""
    text = """
from typing import TYPE_CHECKING
import ralf.kernels.dct
if TYPE_CHECKING:
    from ralf.kernels import engine
else:
    from ralf.kernels import manifest
def later():
    from ralf.worker.errors import JobError
    import_module("ralf.worker.service.jobs")
"""
    assert imported_files(text) == {
        "kernels/dct.py",
        "kernels/manifest.py",
        "worker/errors.py",
        "worker/service/jobs.py",
    }
    assert sorted(set(circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}))) == ["b", "c"]
    assert circle({"a": {"b"}, "b": {"c"}}) == []


def test_every_import_rule_names_files_that_exist():
    """Otherwise a renamed file would lose its rule without notice."""
    named = TORCH_FREE.union(*OWNERS.values())

    assert sorted(name for name in named if not (ROOT / name).is_file()) == []


def test_the_walk_over_imports_sees_something():
    """A check that reads no file would always pass."""
    assert len(sources()) > 10


def test_each_room_is_installed_under_the_one_name():
    """`kernels`, `worker` and `train` alone are names that others use too."""
    import ralf.kernels

    assert Path(ralf.kernels.__file__).resolve() == ROOT / "kernels" / "__init__.py"


def modules_after(statement: str) -> set[str]:
    """Top-level modules loaded by a fresh interpreter that runs the statement."""
    code = f"import sys\n{statement}\nprint(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(run.stdout.split())


PYTHONS = {name.lstrip("_") for name in sys.stdlib_module_names}
HEAVY = {"torch", "av", "numpy", "timm", "scipy", "fsspec", "torchvision", "rich"}


@pytest.mark.parametrize(
    "module",
    sorted("ralf." + name.removesuffix(".py").replace("/", ".") for name in TORCH_FREE),
)
def test_a_light_module_loads_no_torch(module: str):
    """Parents, clients and helpers start fast and hold no CUDA context."""
    loaded = modules_after(f"import {module}")

    assert set() == loaded & {"torch", "av", "timm", "torchvision"}


def test_the_client_needs_only_redis_rq_and_pydantic():
    """A backend imports it without any other library, light or heavy."""
    loaded = modules_after("import ralf.client") - modules_after("pass")
    of_pydantic = {"pydantic_core", "annotated_types", "typing_extensions", "typing_inspection"}
    of_redis = {"cryptography"}  # looked for by the Redis client, needed by nobody
    allowed = {"ralf", "redis", "rq", "pydantic"} | of_pydantic | of_redis
    foreign = {name for name in loaded if name.lstrip("_") not in PYTHONS | allowed}

    assert "pydantic" in loaded
    assert set() == {name for name in foreign if not name.startswith("_sysconfigdata")}


def test_help_imports_no_torch():
    """`ralf --help` is instant."""
    run = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "ralf", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = {line.split("|")[-1].strip().split(".")[0] for line in run.stderr.splitlines()}

    assert set() == loaded & HEAVY
    assert "scan" in run.stdout


def test_a_scan_imports_nothing_that_it_does_not_use(
    tmp_path: Path, tiny_models: Path, astronaut: np.ndarray
):
    """Torch's compiler, torchvision, timm and scipy took half of the time of a short scan."""
    clip = face_clip(tmp_path / "one.mp4", [astronaut], 1.0, size=(320, 240), fps=5)
    scan = ["scan", "--json", "--models", str(tiny_models), "--model", "tiny", str(clip)]
    code = f"import sys\nfrom ralf.__main__ import main\nmain({scan})\nprint(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    verdict, modules = run.stdout.splitlines()
    loaded = set(modules.split())

    assert 1 == len(json.loads(verdict)["tracks"])
    assert {"torch", "ralf.kernels.networks.efficientnet_lite"} <= loaded
    assert set() == loaded & {"torch._dynamo", "torchvision", "timm", "scipy", "triton", "onnx"}
