"""Run Triton kernels on a CPU, in a separate process in which Triton interprets them.

Triton decides at its import whether it compiles or interprets.  On a machine with a GPU the other
tests need the compiler, so the test process itself must not set the switch.
"""

import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any


def _switch_on() -> None:
    assert "triton" not in sys.modules, "too late: triton was imported and will compile"
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    torch.set_num_threads(1)


class Interpreter:
    """Runs functions of test modules in that process, one after the other."""

    def __init__(self) -> None:
        self._process = ProcessPoolExecutor(
            1, mp_context=get_context("spawn"), initializer=_switch_on
        )

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run the function there and return its result; arguments and result are pickled."""
        return self._process.submit(function, *arguments).result(timeout=500)

    def close(self) -> None:
        """End the process."""
        self._process.shutdown()
