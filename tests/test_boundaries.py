"""The rooms' arrows and the heavy libraries' owners, read from the imports themselves."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {
    "kernels": {"kernels"},
    "worker": {"worker", "kernels"},
    "train": {"train", "worker", "kernels"},
}
OWNERS = {
    "triton": {"kernels/dct_triton.py", "kernels/residual_triton.py"},
    "torch_tensorrt": {"kernels/build_trt.py"},
    "onnx": {"kernels/export.py"},
    "onnxruntime": {"kernels/export.py"},
    "tensorrt": {"kernels/engine_trt.py"},
    "tensorrt_rtx": {"kernels/build_rtx.py", "kernels/engine_trt.py"},
    "nvidia": {"worker/media/decode_dali.py"},
    "timm": {"kernels/networks/backbones.py"},
    "fsspec": {"worker/service/fetch.py"},
    "av": {
        "worker/media/decode_pyav.py",
        "worker/media/probe.py",
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
    "kernels/models_cli.py",
    "kernels/atomic_files.py",
    "kernels/plans.py",
    "kernels/plan_store.py",
    "worker/telemetry.py",
    "worker/drift.py",
    *(path.relative_to(ROOT).as_posix() for path in (ROOT / "worker/service").glob("*.py")),
}


def sources() -> list[Path]:
    """Every Python file of the three rooms and the tests."""
    return sorted(
        path for room in (*ROOMS, "tests") for path in (ROOT / room).rglob("*.py") if path.is_file()
    )


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
    allowed = {"ralf", "redis", "rq", "pydantic"} | of_pydantic
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
