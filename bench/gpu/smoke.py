"""Quick checks of every GPU part: one line of JSON each.  One that fails does not stop the rest.

    python bench/gpu/smoke.py [--device cuda|cpu]

On a CPU each check runs at a tiny size or says that it was skipped: that is the rehearsal.
"""

import argparse
import ctypes
import json
import os
import platform
import shutil
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

Facts = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    device = torch.device(parser.parse_args().device)
    for check in CHECKS:
        report(check, device)


def report(check: Callable[[torch.device], Facts], device: torch.device) -> None:
    """Run one check and print what came of it."""
    start = time.perf_counter()
    try:
        facts: Facts = {"ok": True, **check(device)}
    except Exception as error:  # noqa: BLE001 - the other checks must still run
        where = traceback.format_exc().splitlines()[-3:]
        facts = {"ok": False, "error": f"{type(error).__name__}: {error}"[:400], "where": where}
    seconds = round(time.perf_counter() - start, 2)
    print(json.dumps({"check": check.__name__, "s": seconds, **facts}), flush=True)


def milliseconds(run: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    """The mean time of one call, after three to warm up."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(3):
        run()
    wait()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    wait()
    return round(1000 * (time.perf_counter() - start) / repeats, 4)


def machine(device: torch.device) -> Facts:
    """Versions, and which libraries of the driver are there."""
    try:
        ctypes.CDLL("libnvcuvid.so.1")
        nvcuvid = True
    except OSError:
        nvcuvid = False
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cudnn": torch.backends.cudnn.version(),
        "gcc": shutil.which("gcc"),
        "nvcuvid": nvcuvid,
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }


def ceilings(device: torch.device) -> Facts:
    """How fast memory and matrix products are here: what every other figure is compared with."""
    on_gpu = device.type == "cuda"
    count, side = (2**28, 8192) if on_gpu else (2**22, 256)
    source = torch.empty(count, dtype=torch.float16, device=device).normal_()
    copy = torch.empty_like(source)
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    copying = milliseconds(lambda: copy.copy_(source), device)
    product = milliseconds(lambda: left @ right, device)
    return {
        "copy_TB_s": round(4 * count / copying / 1e9, 2),
        "matmul_TFLOP_s": round(2 * side**3 / product / 1e9, 1),
    }


def fused_destructor(device: torch.device) -> Facts:
    """Its error against the reference in FP64, and its time."""
    if device.type != "cuda":
        return {"skipped": "needs a GPU"}
    from ralf.kernels import dct, dct_triton

    facts: Facts = {}
    for side in (256, 224):
        crops = torch.randint(0, 256, (64, 3, side, side), dtype=torch.uint8, device=device)
        mask = torch.rand(side, side, device=device)

        def run(crops: Tensor = crops, mask: Tensor = mask) -> tuple[Tensor, Tensor]:
            return dct_triton.destruct(crops, mask, torch.float32, torch.float16)

        error = (run()[0] - dct.destruct_reference(crops, mask.double())).abs().max()
        facts[str(side)] = {"error": float(error), "ms": milliseconds(run, device)}
    return facts


def fused_block(device: torch.device) -> Facts:
    """The fused residual block against the plain one, level by level."""
    if device.type != "cuda":
        return {"skipped": "needs a GPU"}
    from ralf.kernels.networks.reconstructor import Residual
    from ralf.kernels.residual_triton import TILINGS, Weights, residual

    facts: Facts = {}
    for channels, side in ((32, 256), (64, 128)):
        block = Residual(channels).half().to(device).eval()
        block.to(memory_format=torch.channels_last)
        crops = torch.randn(64, channels, side, side, device=device).half()
        crops = crops.contiguous(memory_format=torch.channels_last)
        tiling = TILINGS[channels][0]
        run = partial(residual, crops, Weights.of(block, tiling.pixels), tiling)
        with torch.inference_mode():
            facts[f"{channels}@{side} {tiling}"] = {
                "error": float((run().float() - block(crops).float()).abs().max()),
                "fused_ms": milliseconds(run, device),
                "eager_ms": milliseconds(partial(block, crops), device),
            }
    return facts


def shipped_model_eager(device: torch.device) -> Facts:
    """The shipped model agrees with its golden file on this device."""
    from ralf.kernels.artifact import SHIPPED, resolve
    from ralf.kernels.engine import check_golden
    from ralf.kernels.engine_torch import TorchEngine

    engine = TorchEngine.of(resolve(SHIPPED, "ralf-small"), device, compiled=False)
    facts: Facts = {"golden_error": check_golden(engine)}
    for batch in (1, 8, 64) if device.type == "cuda" else (1,):
        crops = torch.randint(0, 256, (batch, 3, 256, 256), dtype=torch.uint8)
        facts[f"ms_{batch}"] = milliseconds(lambda: engine(crops), device, 5)  # noqa: B023
    return facts


def faces(count: int, height: int, width: int) -> Any:
    """Frames with three copies of a public-domain face on grey."""
    from skimage.data import astronaut

    from tests.scenes import frames_of

    face = astronaut()[0:256, 96:352]
    page = np.full((height, width, 3), 90, np.uint8)
    for column in range(3):
        left = 20 + 280 * column
        page[10:266, left : left + 256] = face
    return frames_of([page] * count)


def finder(device: torch.device) -> Facts:
    """The face finder finds the same faces on the device as on the CPU."""
    from ralf.kernels.manifest import Finder
    from ralf.worker.media.mtcnn import Mtcnn

    facts: Facts = {"cpu_faces_a_frame": len(Mtcnn(Finder()).find(faces(1, 540, 960)))}
    if device.type == "cuda":
        on_device, frames = Mtcnn(Finder(), "cuda"), faces(8, 540, 960)
        counts = [len(on_device.find(frames)) for _ in range(4)]
        facts |= {
            "faces": counts,
            "ok": counts == [8 * facts["cpu_faces_a_frame"]] * 4,
            "ms": milliseconds(lambda: on_device.find(frames), device, 5),
        }
    return facts


def captures_from_two_threads(device: torch.device) -> Facts:
    """Two finders capture CUDA graphs while a third thread allocates, launches and waits."""
    if device.type != "cuda":
        return {"skipped": "needs a GPU"}
    from ralf.kernels.manifest import Finder
    from ralf.worker.media.mtcnn import Mtcnn

    stop, errors = threading.Event(), list[str]()

    def disturb() -> None:
        while not stop.is_set():
            try:
                torch.empty(2**24, device=device).normal_().sum().item()
                torch.cuda.synchronize()
            except Exception as error:  # noqa: BLE001 - told in the record
                errors.append(f"disturb: {error}"[:200])
                return

    def find(offset: int) -> None:
        try:
            one = Mtcnn(Finder(), "cuda")
            for size in range(6):
                frames = faces(1 + size % 3, 400 + 16 * size + offset, 900)
                for _ in range(3):
                    one.find(frames)
        except Exception as error:  # noqa: BLE001 - told in the record
            errors.append(f"find: {type(error).__name__}: {error}"[:200])

    noise = threading.Thread(target=disturb)
    finders = [threading.Thread(target=find, args=(offset,)) for offset in (0, 8)]
    for thread in (noise, *finders):
        thread.start()
    for thread in finders:
        thread.join()
    stop.set()
    noise.join()
    return {"ok": not errors, "errors": errors}


def new_sizes_beside_running_work(device: torch.device) -> Facts:
    """A clip of a new size is recorded while another job's work is queued: does it wait for that?

    The calls of one size: plain, recorded, replayed, replayed.  The queued work takes about a
    second; if it is over when a call returns early in it, that call waited for the whole device.
    """
    if device.type != "cuda":
        return {"skipped": "needs a GPU"}
    from ralf.kernels.manifest import Finder
    from ralf.worker.media.mtcnn import Mtcnn

    one, side = Mtcnn(Finder(), "cuda"), torch.cuda.Stream(device)
    left = torch.randn(8192, 8192, device=device)
    one.find(faces(4, 360, 640))
    spent: dict[str, list[tuple[float, str]]] = {}
    for height in (376, 392, 408):
        frames, done = faces(4, height, 900), torch.cuda.Event()
        with torch.cuda.stream(side):
            for _ in range(50):
                left @ left
            done.record()
        times = []
        for _ in range(4):
            start = time.perf_counter()
            one.find(frames)
            took_ms = round(1000 * (time.perf_counter() - start), 2)
            times.append((took_ms, "work over" if done.query() else "work queued"))
        spent[str(height)] = times
        torch.cuda.synchronize()
    return {"ms": spent}


def compiled_once_for_all_threads(device: torch.device) -> Facts:
    """A second thread, of another number of threads, uses what the first one compiled."""
    from ralf.kernels.engine_cuda import OnCuda
    from ralf.kernels.networks import build

    network = build("ralf", base=4, blocks=1, backbone="tf_efficientnet_lite0", size=64)
    network = network.eval().requires_grad_(False).to(device)
    made = [0]

    def count(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        made[0] += 1
        return graph.forward

    run = OnCuda(network, device, side=64, buckets=(1, 8), backend=count)
    first = made[0]

    threads = torch.get_num_threads()

    def again() -> None:
        torch.set_num_threads(threads + 1)
        for batch in (1, 5, 8):
            run(torch.zeros(batch, 3, 64, 64, dtype=torch.uint8))

    thread = threading.Thread(target=again)
    thread.start()
    thread.join()
    torch.set_num_threads(threads)
    return {"graphs": [first, made[0]], "ok": first == made[0] == 2}


def export_for_builders(device: torch.device) -> Facts:
    """torch.export takes the network on this version of torch."""
    from ralf.kernels.export import exported
    from ralf.kernels.networks import build

    network = build("ralf", base=4, blocks=1, backbone="tf_efficientnet_lite0", size=64)
    exported(network.eval().requires_grad_(False).to(device), 8)
    return {}


CHECKS = (
    machine,
    ceilings,
    fused_destructor,
    fused_block,
    shipped_model_eager,
    finder,
    captures_from_two_threads,
    new_sizes_beside_running_work,
    compiled_once_for_all_threads,
    export_for_builders,
)

if __name__ == "__main__":
    main()
