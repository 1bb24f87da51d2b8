"""`ralf bench residual`: one level of the reconstructor by the ways that might make it faster.

The same stack of residual blocks, the same FP16 input on the device: eager in both layouts, with
cuDNN trying its algorithms, compiled by torch with and without its own search, and as fused Triton
blocks.  The predictions are in kernels/PERFORMANCE.md; the verdicts go there too.
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
from ralf.kernels.engine import pick_device
from ralf.kernels.networks.reconstructor import Residual, stack

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

    ways: dict[str, Way] = {
        "eager, channels first": partial(plain, x.contiguous()),
        "eager, cuDNN searching": searching,
        "torch.compile": partial(torch.compile(last, dynamic=False), x),
        "torch.compile, searching": partial(
            torch.compile(last, dynamic=False, mode="max-autotune-no-cudagraphs"), x
        ),
    }
    return ways | fused(last, x)


def fused(blocks: nn.Module, x: Tensor) -> dict[str, Way]:
    """The Triton blocks, where triton is and takes these shapes."""
    try:
        from ralf.kernels.residual_triton import Weights, residual
    except ImportError as error:
        print(f"ralf bench: fused blocks left out: {error}", file=sys.stderr)
        return {}
    weights = [Weights.of(block) for block in blocks.children() if isinstance(block, Residual)]

    def run() -> Tensor:
        y = x
        for block in weights:
            y = residual(y, block)
        return y

    return {"fused": run}


@contextmanager
def cudnn_searches() -> Iterator[None]:
    """cuDNN times its algorithms at each new shape."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
