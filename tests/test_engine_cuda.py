"""Compiled networks in buckets: nothing is compiled twice, or late, and eager is always there."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from structlog.testing import capture_logs
from torch import Tensor, nn

from ralf.kernels.artifact import resolve
from ralf.kernels.choose_engine import load, make
from ralf.kernels.engine import check_golden
from ralf.kernels.engine_cuda import OnCuda, buckets_of
from ralf.kernels.engine_torch import TorchEngine, offers
from ralf.kernels.untrained import patterns

CPU = torch.device("cpu")
SIDE = 8


class Small(nn.Module):
    """A logit a crop, a memory that may be too small, and a memory of the batches it ran."""

    def __init__(self, holds: int = 1000) -> None:
        super().__init__()
        self.holds = holds
        self.weight = nn.Parameter(torch.rand(3 * SIDE * SIDE))

    def forward(self, crops: Tensor) -> Tensor:
        return (crops.float().flatten(1) * self.weight).sum(1)


class Compiler:
    """A backend of torch.compile that counts what it is asked for, and may refuse or run out."""

    def __init__(self, refuses: Callable[[int], Exception | None] = lambda batch: None) -> None:
        self.refuses = refuses
        self.batches: list[int] = []
        self.ran: list[int] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        [batch] = [len(x) for x in inputs if x.dtype == torch.uint8]
        self.batches.append(batch)
        if (error := self.refuses(batch)) is not None:
            raise error

        def program(*arguments: Tensor) -> object:
            self.ran.append(batch)
            return graph(*arguments)

        return program


def crops_of(count: int) -> Tensor:
    """Noise."""
    return torch.randint(0, 256, (count, 3, SIDE, SIDE), dtype=torch.uint8)


def runner(network: nn.Module, compiler: Compiler, **options: object) -> OnCuda:
    """On the CPU, with that compiler."""
    torch.compiler.reset()
    return OnCuda(network.eval(), CPU, side=SIDE, backend=compiler, **options)


def test_each_bucket_is_compiled_once_and_before_the_first_job():
    """Whatever number comes, in whatever memory layout."""
    network, compiler = Small(), Compiler()
    made = runner(network, compiler)
    assert [1, 8, 64] == compiler.batches
    compiler.ran.clear()
    for crops in (crops_of(1), crops_of(7), crops_of(73), crops_of(16)[::2], crops_of(9).mT):
        with torch.no_grad():
            torch.testing.assert_close(made(crops), network(crops))

    with torch.inference_mode():
        made(crops_of(8))

    assert [1, 8, 64] == compiler.batches
    assert [1, 8, 64, 8, 1, 8, 8, 1, 8] == compiler.ran
    assert made.compiled


@pytest.mark.parametrize("threads", [1, 3])
def test_a_thread_with_another_number_of_threads_compiles_nothing(threads: int):
    """torch guards its programs by that number, which belongs to the calling thread."""
    network, compiler = Small(), Compiler()
    made = runner(network, compiler)
    failed: list[BaseException] = []

    def job() -> None:
        try:
            torch.get_num_threads()
            torch.set_num_threads(threads)
            for count in (1, 5, 64):
                crops = crops_of(count)
                with torch.no_grad():
                    torch.testing.assert_close(made(crops), network(crops))
        except BaseException as error:  # told below
            failed.append(error)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        caller = threading.Thread(target=job)
        caller.start()
        caller.join(60)
    finally:
        torch.set_num_threads(before)

    assert [] == failed and not caller.is_alive()
    assert [1, 8, 64] == compiler.batches


def test_two_models_of_one_class_have_a_program_each():
    """A reload or a shadow beside the current model costs neither its programs."""
    compiler = Compiler()
    first = runner(Small(), compiler)
    others = [OnCuda(Small().eval(), CPU, side=SIDE, backend=compiler) for _ in range(3)]
    known = list(compiler.batches)
    for made in (first, *others, first):
        for count in (1, 8, 64):
            with torch.no_grad():
                expected = made.network(crops := crops_of(count))
            torch.testing.assert_close(made(crops), expected)

    assert known == compiler.batches


def test_a_compiler_that_fails_leaves_an_eager_engine_and_a_line():
    """One, not one a bucket."""
    network = Small()
    compiler = Compiler(lambda batch: RuntimeError("ptxas died\nof something") if batch else None)
    with capture_logs() as events:
        made = runner(network, compiler)
    crops = crops_of(5)

    assert ["engine.compile_failed"] == [event["event"] for event in events]
    assert "ptxas died" in events[0]["reason"] and "\n" not in events[0]["reason"]
    assert not made.compiled
    with torch.no_grad():
        torch.testing.assert_close(made(crops), network(crops))


def test_a_halved_batch_runs_eagerly_and_compiles_nothing():
    """64 has a program and then no room: two calls of 32, which have none."""
    network, compiler = Small(), Compiler()
    made = runner(network, compiler)
    whole, made.program = made.program, None
    calls: list[int] = []

    def short_of_memory(crops: Tensor) -> Tensor:
        calls.append(len(crops))
        if len(crops) > 40:
            raise torch.OutOfMemoryError("no room for 64")
        return whole(crops)

    made.program = short_of_memory
    crops = crops_of(64)
    with torch.no_grad():
        torch.testing.assert_close(made(crops), network(crops))

    assert [64] == calls
    assert (1, 8, 32) == made.batching.buckets
    assert [1, 8, 64] == compiler.batches


def test_what_does_not_fit_is_learnt_while_loading():
    """Not by the first job that brings a full batch."""

    class Large(Small):
        def forward(self, crops: Tensor) -> Tensor:
            if len(crops) > 20:
                raise torch.OutOfMemoryError("no room")
            return super().forward(crops)

    made = OnCuda(Large().eval(), CPU, side=SIDE, compiled=False)

    assert (1, 8, 16) == made.batching.buckets
    assert not made.compiled


def test_buckets_end_at_the_largest_batch_asked_for():
    """RALF's usual ones below it."""
    assert [(1, 8, 64), (1, 8, 16), (1, 8), (1, 4), (1,)] == [
        buckets_of(most) for most in (64, 16, 8, 4, 1)
    ]


def test_a_gpu_offers_the_network_compiled_and_eager(tiny_models: Path):
    """By the names that `ralf build --all` times and fastest.json keeps."""
    tiny = resolve(tiny_models, "tiny")

    assert ["torch-fp16", "torch-eager-fp16"] == offers(tiny.manifest, torch.device("cuda", 0))
    assert "torch" == make(tiny, CPU, "torch-eager-fp32").name


@pytest.mark.gpu
def test_on_a_gpu_every_way_agrees_with_the_reference(tiny_models: Path):
    """Compiled and eager, any number of crops, from the CPU or the device, within the budget."""
    tiny = resolve(tiny_models, "tiny")
    device = torch.device("cuda", 0)
    fast, eager = load(tiny, "cuda"), TorchEngine.of(tiny, device, "fp16", compiled=False)
    crops = torch.from_numpy(patterns(70, 64, seed=3))

    assert ("torch", "torch-eager") == (fast.name, eager.name)
    check_golden(eager)
    budget = tiny.manifest.error_budget["logit"]
    for count in (1, 5, 70):
        expected = eager(crops[:count])
        torch.testing.assert_close(fast(crops[:count]), expected, rtol=0, atol=budget)
        torch.testing.assert_close(fast(crops[:count].to(device)), expected, rtol=0, atol=budget)
