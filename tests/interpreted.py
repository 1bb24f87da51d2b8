"""Triton kernels on a CPU: a process of its own, in which triton interprets instead of compiling.

Triton decides that when it is imported, and a machine with a GPU needs the compiler for the other
tests, so the switch must not reach this process.
"""

import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any


def _switch_on() -> None:
    assert "triton" not in sys.modules, "too late: triton has already decided to compile"
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    torch.set_num_threads(1)


class Interpreter:
    """Runs functions of the tests' modules in that process, one after the other."""

    def __init__(self) -> None:
        self._process = ProcessPoolExecutor(
            1, mp_context=get_context("spawn"), initializer=_switch_on
        )

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The function's result; arguments and result are pickled."""
        return self._process.submit(function, *arguments).result(timeout=500)

    def close(self) -> None:
        """End the process."""
        self._process.shutdown()
