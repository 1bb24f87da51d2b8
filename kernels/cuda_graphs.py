"""A function of fixed shapes, recorded once as a CUDA graph and replayed from then on.

Hundreds of small kernels cost more to launch than to run; a graph launches them all at once.  The
function must not ask the device for a number, nor copy from the host, and must give one tensor.

What a replay gives lives until the next replay of any graph: all of them share one pool of
memory, so that a graph for each of many shapes costs the memory of the largest.  Callers replay
one at a time, and read the answer before they let the next one in.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

WARM_UPS = 2


class Replay:
    """The recorded function; called with tensors shaped as the example's."""

    def __init__(self, run: Callable[..., Tensor], *example: Tensor) -> None:
        device = example[0].device
        self._inputs = tuple(one.clone() for one in example)
        here = torch.cuda.current_stream(device)
        aside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        aside.wait_stream(here)
        with torch.cuda.stream(aside):  # libraries choose their kernels and take their memory
            for _ in range(WARM_UPS):
                run(*self._inputs)
        here.wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        # other threads may allocate and copy meanwhile: only this one is held to the rules
        with torch.cuda.graph(self._graph, pool=_pool(), capture_error_mode="thread_local"):
            self._output = run(*self._inputs)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The same work on other values; read the answer before the next replay."""
        for place, value in zip(self._inputs, inputs, strict=True):
            place.copy_(value)
        self._graph.replay()
        return self._output


@lru_cache(maxsize=1)
def _pool() -> Any:
    return torch.cuda.graph_pool_handle()
