"""`ralf bench dct`: the destructor by every way we know, side by side in one run.

Each way but the last two takes u8 crops and gives the destroyed image and |x − it|:
- authors, FFT FP32: as the papers' authors run it;
- products, FP32 and FP16: the reference of `ralf.kernels.dct`, in the network's dtypes;
- fused: dct_triton, on CUDA; with --tilings also under each tiling that is listed there, and by
  dct_quarters_triton ("fused quarters"), the planes in one share or in several on two streams.
And for scale: the FP16 chain alone, four products and a multiply of pixels already centred in
FP16, without the residual; and a copy of what the fused kernels read and write, which is as fast
as memory goes.

On CUDA a way's kernels are replayed as a graph, many a turn, so that what is timed is the device.
Largest errors against FP64 are measured on the same crops and stand beside the times.
"""

import argparse
from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import Tensor

from ralf.kernels.batching import LARGEST
from ralf.kernels.bench import baseline
from ralf.kernels.bench.record import (
    Record,
    captured,
    gpu_facts,
    interleave,
    machine,
    settle,
    short_name,
)
from ralf.kernels.dct import (
    FusedKernelError,
    basis,
    centred,
    destruct_reference,
    destruct_residual_reference,
    fusible,
)
from ralf.kernels.engine import EngineError, pick_device

Pair = tuple[Tensor, Tensor]
Way = Callable[[], Pair]
CALLS = 50
CHAIN, COPY = "FP16 chain alone", "copy"


def run_dct(args: argparse.Namespace) -> int:
    """Print the record."""
    device = pick_device(args.device)
    batch = args.batch or (LARGEST if device.type == "cuda" else 2)
    generator = torch.Generator().manual_seed(0)
    shape = (batch, 3, args.size, args.size)
    crops = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device)
    mask = torch.rand(args.size, args.size, generator=generator).to(device)
    ways: dict[str, Way] = {
        "authors, FFT FP32": lambda: by_fft(crops, mask),
        "products, FP32": lambda: destruct_residual_reference(crops, mask, False),
        "products, FP16": lambda: destruct_residual_reference(crops, mask, True),
        **fused_ways(crops, mask, args.tilings),
    }
    # Apart from the ways: their results are not the destroyed image, so they have no error.
    ends: dict[str, Callable[[], object]] = {
        CHAIN: chain(crops, mask.half()),
        COPY: copy(crops),
    }
    with torch.inference_mode():
        exact = destruct_reference(crops, mask.double())
        errors, failed = errors_of(ways, exact)
        # In FP64 it is the largest tensor here, and not needed while timing.
        del exact
        ran = {name: way for name, way in ways.items() if name in errors}
        timings = interleave(
            {name: captured(way, device) for name, way in {**ran, **ends}.items()},
            repeats=args.repeats,
            warmups=2,
            calls=CALLS if device.type == "cuda" else 1,
            settle=settle(device),
        )
    record = Record(
        theme="dct",
        machine=machine() | gpu_facts(device),
        conditions={
            "crops": f"u8 {list(crops.shape)}",
            "out": "destroyed FP32; residual in the products' dtype",
            "seconds": "for all crops",
            "calls a turn": CALLS if device.type == "cuda" else 1,
        },
        timings=timings,
        ratios=ratios({name: timing.median_s for name, timing in timings.items()}),
        facts={
            "largest error against FP64": errors,
            "bytes": moved(crops),
            **({"failed": failed} if failed else {}),
        },
    )
    record.save(args.out, short_name(device))
    return 0


def errors_of(ways: dict[str, Way], exact: Tensor) -> tuple[dict[str, float], dict[str, str]]:
    """Each way's largest error; and why a way has none: one that fails is no loss to the others."""
    errors, failed = {}, {}
    for name, way in ways.items():
        try:
            errors[name] = float((way()[0] - exact).abs().max())
        except FusedKernelError as error:
            failed[name] = str(error)
    return errors, failed


def ratios(median_s: dict[str, float]) -> dict[str, float]:
    """What each way costs over the best way of ours that ran."""
    ours = [name for name in median_s if name.startswith("fused")] or ["products, FP16"]
    best = min(ours, key=lambda name: median_s[name])
    others = (name for name in median_s if name != best)
    return {f"{name} / {best}": round(median_s[name] / median_s[best], 2) for name in others}


def by_fft(crops: Tensor, mask: Tensor) -> Pair:
    """The authors' way."""
    image = crops.float() / 255
    destroyed = baseline.idct2(baseline.dct2(image) * mask)
    return destroyed, (image - destroyed).abs()


def fused_ways(crops: Tensor, mask: Tensor, tilings: bool) -> dict[str, Way]:
    """The Triton kernels, where they run at all."""
    if crops.device.type != "cuda" or not fusible(crops, torch.float16):
        return {}
    try:
        from ralf.kernels import dct_quarters_triton, dct_triton
    except ImportError as error:
        raise EngineError(f"the fused kernels need triton: {error}") from error

    def way(destruct: Callable[..., tuple[Tensor, Tensor | None]], *how: object) -> Way:
        def run() -> Pair:
            made, apart = destruct(crops, mask, torch.float32, torch.float16, *how)
            assert apart is not None
            return made, apart

        return run

    ways = {"fused": way(dct_triton.destruct)}
    half = dct_triton.padded_half(crops.shape[-1])
    for candidate in dct_triton.CANDIDATES if tilings else ():
        sizes = asdict(candidate).values()
        if all(half % part[side] == 0 for part in sizes for side in ("rows", "chunk")):
            label = " ".join("×".join(str(number) for number in part.values()) for part in sizes)
            ways[f"fused {label}"] = way(dct_triton.destruct, candidate)
    quarters = tilings and half <= dct_quarters_triton.LARGEST
    for shares in dct_quarters_triton.SHARES if quarters else ():
        ways[f"fused quarters, shares: {shares}"] = way(dct_quarters_triton.destruct, shares)
    return ways


def chain(crops: Tensor, mask: Tensor) -> Callable[[], Tensor]:
    """Four FP16 products and a multiply, and nothing else."""
    matrix = basis(crops.shape[-1], torch.float16, crops.device)
    pixels = centred(crops, torch.float16)
    return lambda: matrix.T @ ((matrix @ pixels @ matrix.T) * mask) @ matrix


def copy(crops: Tensor) -> Callable[[], Pair]:
    """Reading the crops and writing both outputs, by torch's own kernels."""
    destroyed = torch.empty(crops.shape, dtype=torch.float32, device=crops.device)
    residual = torch.empty(crops.shape, dtype=torch.float16, device=crops.device)
    return lambda: (destroyed.copy_(crops), residual.copy_(crops))


def moved(crops: Tensor) -> int:
    """Bytes that must be read and written: u8 in, FP32 and FP16 out."""
    return crops.numel() * (1 + 4 + 2)
