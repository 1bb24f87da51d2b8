"""Where the time of a reconstructor's block goes, level by level, by the device's own clock.

What it could be instead is measured by `ralf bench residual` and `ralf bench engine`.

    python bench/gpu/levers.py [--device cuda|cpu]

One line of JSON a measurement.  On a CPU one tiny block is measured: that is the rehearsal.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from ralf.kernels.networks.reconstructor import Reconstructor, Residual
from ralf.kernels.residual_blocks import BLOCKS, by_cudnn, convolution_relu, use

RECONSTRUCTOR_FLOP = 127e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    device = torch.device(parser.parse_args().device)
    on_gpu = device.type == "cuda"
    levels = ((32, 256), (64, 128), (128, 64), (16, 256), (8, 256)) if on_gpu else ((8, 32),)
    with torch.inference_mode():
        for channels, side in levels:
            measure_level(channels, side, 64 if on_gpu else 1, device)
        measure_reconstructor(device)


def measure_level(channels: int, side: int, batch: int, device: torch.device) -> None:
    """One block's parts, and the block in each way that could be faster."""
    block = half(Residual(channels), device)
    crops = torch.randn(batch, channels, side, side, device=device)
    crops = crops.to(block_dtype(device)).contiguous(memory_format=torch.channels_last)
    first = next(module for module in block.modules() if isinstance(module, nn.Conv2d))
    weight, bias = first.weight, first.bias
    flop = batch * 2 * 9 * channels * channels * side * side
    ways: dict[str, tuple[Callable[[], object], int]] = {
        "copy": (crops.clone, 0),
        "convolution without bias": (lambda: torch.conv2d(crops, weight, None, 1, 1), flop),
        "convolution with bias": (lambda: torch.conv2d(crops, weight, bias, 1, 1), flop),
        "convolution, bias and ReLU": (lambda: convolution_relu(crops, weight, bias), flop),
        "block": (lambda: block(crops), 2 * flop),
        "block, ReLU by cuDNN": (lambda: by_cudnn(block, crops), 2 * flop),
    }
    for name, (run, work) in ways.items():
        report(f"{channels}@{side} {name}", run, device, work)


def measure_reconstructor(device: torch.device) -> None:
    """The whole network, plain and with each option for its blocks."""
    on_gpu = device.type == "cuda"
    batch, side = (64, 256) if on_gpu else (1, 32)
    for blocks in BLOCKS:
        network = half(Reconstructor(32, 8) if on_gpu else Reconstructor(8, 1), device)
        if blocks != "plain" and not use(network, blocks, side):
            continue
        crops = torch.rand(batch, 3, side, side, device=device)
        run = partial(network, crops)
        report(f"reconstructor, blocks={blocks}", run, device, int(RECONSTRUCTOR_FLOP * batch))


def block_dtype(device: torch.device) -> torch.dtype:
    return torch.float16 if device.type == "cuda" else torch.float32


def half(network: nn.Module, device: torch.device) -> nn.Module:
    """In FP16 on a GPU, channels last."""
    network = network.to(device, block_dtype(device)).eval()
    return network.to(memory_format=torch.channels_last)


def report(name: str, run: Callable[[], object], device: torch.device, flop: int) -> None:
    """Print one measurement; a way that fails is noted."""
    try:
        spent = milliseconds(run, device)
        told = {"what": name, "ms": round(spent, 4), "TFLOP_s": round(flop / spent / 1e9, 1)}
    except Exception as error:  # noqa: BLE001 - the other ways must still be measured
        told = {"what": name, "error": f"{type(error).__name__}: {error}"[:300]}
    print(json.dumps(told), flush=True)


def milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """The mean time of one call by the device's own clock."""
    if device.type != "cuda":
        run()
        start = time.perf_counter()
        run()
        return 1000 * (time.perf_counter() - start)
    for _ in range(3):
        run()
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start_event.record()
    for _ in range(20):
        run()
    end_event.record()
    torch.cuda.synchronize()
    return float(start_event.elapsed_time(end_event)) / 20


if __name__ == "__main__":
    main()
