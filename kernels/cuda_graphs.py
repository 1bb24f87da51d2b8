"""A function of fixed shapes, recorded once as a CUDA graph and replayed from then on.

Hundreds of small kernels cost more to launch than to run; a graph launches them all at once.  The
function must not ask the device for a number, nor copy from the host, and must give one tensor.

What a replay gives lives until the next replay of any graph on that device: all of them share one
pool of memory, so that a graph for each of many shapes costs the memory of the largest.  Callers
replay one at a time, and read the result before they let the next one in.

Every capture in this process goes through `capture`, with one lock for all: torch allows one
capture at a time in a process, and two at once (face finder and engine, or a reload beside a
running job) break each other.

`capture` does what torch.cuda.graph does after it has waited for the whole device and emptied its
cache.  That wait would hold up every running job for each new size of clip, and nothing needs it:
the recording only launches into its own stream.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

WARM_UPS = 2
_capturing = threading.Lock()


@contextmanager
def capture(graph: Any, device: torch.device, stream: Any, *pool: Any) -> Iterator[None]:
    """Record the work inside as this graph, on this stream of this device."""
    # The stream is given because torch's default one belongs to the device of the first capture.
    with _capturing, torch.cuda.device(device), torch.cuda.stream(stream):
        # thread_local: other threads (a decoder) may allocate and copy during the capture.
        graph.capture_begin(*pool, capture_error_mode="thread_local")
        try:
            yield
        finally:
            graph.capture_end()


class Replay:
    """The recorded function; called with tensors shaped as the example's."""

    def __init__(self, run: Callable[..., Tensor], *example: Tensor) -> None:
        self._device = device = example[0].device
        # A replay reads the addresses that were recorded, so the caller's tensors would not do.
        self._inputs = tuple(one.clone() for one in example)
        here = torch.cuda.current_stream(device)
        aside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        aside.wait_stream(here)
        with torch.cuda.stream(aside):  # libraries choose their kernels and take their memory
            for _ in range(WARM_UPS):
                run(*self._inputs)
        here.wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with capture(self._graph, device, aside, _pool(device)):
            self._output = run(*self._inputs)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The same work on other values; read the result before the next replay."""
        for place, value in zip(self._inputs, inputs, strict=True):
            place.copy_(value)
        with torch.cuda.device(self._device):  # a graph runs on the current device's stream
            self._graph.replay()
        return self._output


@lru_cache(maxsize=16)
def _pool(device: torch.device) -> Any:
    return torch.cuda.graph_pool_handle()
