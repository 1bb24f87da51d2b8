"""CUDA graphs with CUDA faked: one capture at a time in a process, each on its own device."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from ralf.kernels import cuda_graphs, trt_session
from ralf.kernels.cuda_graphs import Replay, capture


class FakeCuda:
    """torch.cuda with any number of devices; it fails where two captures overlap."""

    def __init__(self) -> None:
        self.current: list[torch.device] = []
        self.captured: list[tuple[torch.device, object]] = []
        self.replayed: list[torch.device] = []
        self.busy = threading.Lock()
        self.pools = 0

    def Stream(self, device: torch.device) -> SimpleNamespace:  # noqa: N802 - torch's name
        return SimpleNamespace(device=device, wait_stream=lambda other: None, cuda_stream=7)

    def current_stream(self, device: torch.device) -> SimpleNamespace:
        return self.Stream(device)

    @contextmanager
    def stream(self, stream: SimpleNamespace) -> Iterator[None]:
        with self.device(stream.device):
            yield

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        self.current.append(device)
        try:
            yield
        finally:
            self.current.pop()

    def graph_pool_handle(self) -> int:
        self.pools += 1
        return self.pools

    def CUDAGraph(self) -> SimpleNamespace:  # noqa: N802 - torch's name
        return SimpleNamespace(
            replay=lambda: self.replayed.append(self.current[-1]),
            capture_begin=self.begin,
            capture_end=self.busy.release,
        )

    def begin(self, pool: object = None, *, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local"
        assert self.busy.acquire(blocking=False), "two captures at once"
        # Inside the contexts of the device and of a stream of it.
        assert self.current[-1] == self.current[-2], "a stream of another device"
        self.captured.append((self.current[-1], pool))

    def synchronize(self, *_: object) -> None:
        raise AssertionError("a capture waits for the whole device")

    empty_cache = synchronize


class OnGpu:
    """A tensor that says it lies on a GPU."""

    def __init__(self, value: Tensor, device: torch.device) -> None:
        self.value, self.device = value, device

    def clone(self) -> "OnGpu":
        return OnGpu(self.value.clone(), self.device)

    def copy_(self, other: "OnGpu") -> None:
        self.value = other.value


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    """torch.cuda, faked."""
    fake = FakeCuda()
    monkeypatch.setattr(torch, "cuda", fake)
    cuda_graphs._pool.cache_clear()
    yield fake
    cuda_graphs._pool.cache_clear()


def test_a_graph_is_captured_and_replayed_on_the_device_of_its_inputs(cuda: FakeCuda):
    """Also where the current device is another one; each device has its own pool."""
    devices = [torch.device("cuda", index) for index in (0, 1)]
    for device in devices:
        made = Replay(lambda x: x, OnGpu(torch.zeros(2), device))  # type: ignore[arg-type]
        made(OnGpu(torch.ones(2), device))  # type: ignore[arg-type]

    assert [(devices[0], 1), (devices[1], 2)] == cuda.captured
    assert devices == cuda.replayed


def test_a_capture_that_fails_lets_the_next_one_in(cuda: FakeCuda):
    """What the function raised is what the caller sees."""
    device = torch.device("cuda", 0)
    with pytest.raises(ZeroDivisionError), capture(cuda.CUDAGraph(), device, cuda.Stream(device)):
        _ = 1 / 0
    with capture(cuda.CUDAGraph(), device, cuda.Stream(device)):
        assert cuda.busy.locked()

    assert 2 == len(cuda.captured) and not cuda.busy.locked() and [] == cuda.current


def test_two_threads_never_capture_at_once(cuda: FakeCuda):
    """The face finder's graphs and the engine's share one lock."""
    device, inside, let_go = torch.device("cuda", 0), threading.Event(), threading.Event()
    queue = trt_session.Queue(device)

    def hold() -> None:
        inside.set()
        let_go.wait(30)

    first = threading.Thread(target=lambda: queue.capture(hold))
    first.start()
    assert inside.wait(30)
    started = threading.Event()

    def also() -> None:
        started.set()
        with capture(torch.cuda.CUDAGraph(), device, cuda.Stream(device)):
            assert let_go.is_set(), "the first capture is not over"

    second = threading.Thread(target=also)
    second.start()
    assert started.wait(30)
    second.join(0.2)
    assert second.is_alive() and 1 == len(cuda.captured)
    let_go.set()
    first.join(30)
    second.join(30)

    assert 2 == len(cuda.captured) and not second.is_alive()


def test_a_plan_is_loaded_onto_its_own_device(cuda: FakeCuda):
    """TensorRT takes the current device, which may be another."""
    second = torch.device("cuda", 1)
    with trt_session.on_device(second):
        assert [second] == cuda.current
    with trt_session.on_device(torch.device("cpu")):
        assert [] == cuda.current
