"""`ralf bench residual`: one level of the reconstructor by the ways that might make it faster.

The same stack of residual blocks, the same FP16 input on the device: eager in both layouts, with
cuDNN trying its algorithms and with its fused ReLU, compiled by torch with that, without it and
with its own search, and by Triton under each listed tiling; the record names the fastest.  The
predictions are in kernels/PERFORMANCE.md; the verdicts go there too.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial

import torch
from torch import Tensor, nn

from ralf.kernels.batching import LARGEST
from ralf.kernels.bench.record import Record, gpu_facts, interleave, machine, settle, short_name
from ralf.kernels.dct import FusedKernelError
from ralf.kernels.engine import pick_device
from ralf.kernels.networks.reconstructor import Residual, stack
from ralf.kernels.residual_blocks import by_cudnn

EAGER = "eager, channels last"
Way = Callable[[], Tensor]


def run_residual(args: argparse.Namespace) -> int:
    """Print the record."""
    device = pick_device(args.device)
    batch = args.batch or (LARGEST if device.type == "cuda" else 1)
    torch.manual_seed(0)
    plain = stack(args.channels, args.blocks).half().to(device).eval().requires_grad_(False)
    # A copy: `to` changes the layout of a module's own weights.
    last = deepcopy(plain)
    last.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    shape = (batch, args.channels, args.size, args.size)
    x = torch.randn(shape, device=device).half().contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        ways: dict[str, Way] = {EAGER: partial(last, x), **on_cuda(plain, last, x)}
        expected = last(x).float()
        errors = {n: float((way().float() - expected).abs().max()) for n, way in ways.items()}
        timings = interleave(
            ways, repeats=args.repeats, warmups=2, calls=args.calls, settle=settle(device)
        )
    # Two convolutions a block, 9 taps each, and a product is a multiplication and an addition.
    flop = batch * args.blocks * 2 * 9 * args.channels**2 * args.size**2 * 2
    record = Record(
        theme="residual",
        machine=machine() | gpu_facts(device),
        conditions={
            "input": f"FP16 {list(shape)}",
            "blocks": args.blocks,
            "seconds": "for all blocks",
            "calls a turn": args.calls,
        },
        timings=timings,
        ratios={
            f"{EAGER} / {name}": round(timings[EAGER].median_s / timing.median_s, 2)
            for name, timing in timings.items()
            if name != EAGER
        },
        facts={
            "TFLOP/s": {n: round(flop / t.median_s / 1e12, 2) for n, t in timings.items()},
            f"largest difference to {EAGER}": errors,
            "fastest": min(timings, key=lambda name: timings[name].median_s),
        },
    )
    record.save(args.out, short_name(device))
    return 0


def on_cuda(plain: nn.Module, last: nn.Module, x: Tensor) -> dict[str, Way]:
    """What is only worth trying on a GPU."""
    if x.device.type != "cuda":
        return {}

    def searching() -> Tensor:
        with cudnn_searches():
            made: Tensor = last(x)
        return made

    with_relu = switched(last)
    ways: dict[str, Way] = {
        "eager, channels first": partial(plain, x.contiguous()),
        "eager, cuDNN searching": searching,
        "eager, cuDNN's ReLU": partial(with_relu, x),
        "torch.compile": partial(torch.compile(last, dynamic=False), x),
        "torch.compile, cuDNN's ReLU": partial(torch.compile(with_relu, dynamic=False), x),
        "torch.compile, searching": partial(
            torch.compile(last, dynamic=False, mode="max-autotune-no-cudagraphs"), x
        ),
    }
    return ways | fused(last, x)


def switched(blocks: nn.Module) -> nn.Module:
    """A copy whose first convolutions run with bias and ReLU as one call of cuDNN's."""
    made = deepcopy(blocks)
    for block in made.modules():
        if isinstance(block, Residual):
            block.instead = by_cudnn
    return made


def fused(blocks: nn.Module, x: Tensor) -> dict[str, Way]:
    """The Triton blocks under each tiling that fits, where triton is; one that fails is told."""
    try:
        from ralf.kernels.residual_triton import TILINGS, Tiling, Weights, residual
    except ImportError as error:
        say(f"fused blocks left out: {error}")
        return {}
    residuals = [block for block in blocks.modules() if isinstance(block, Residual)]

    def way(tiling: Tiling) -> Way:
        weights = [Weights.of(block, tiling.pixels) for block in residuals]

        def run() -> Tensor:
            y = x
            for block in weights:
                y = residual(y, block, tiling)
            return y

        return run

    ways: dict[str, Way] = {}
    for tiling in TILINGS.get(x.shape[1], ()):
        if tiling.pixels * tiling.groups > x.shape[3]:
            continue
        name, run = f"fused {tiling}", way(tiling)
        try:
            run()
        except FusedKernelError as error:
            say(f"{name} left out: {error}")
            continue
        ways[name] = run
    return ways


def say(line: str) -> None:
    """Progress."""
    print(f"ralf bench: {line}", file=sys.stderr, flush=True)


@contextmanager
def cudnn_searches() -> Iterator[None]:
    """cuDNN times its algorithms at each new shape."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
