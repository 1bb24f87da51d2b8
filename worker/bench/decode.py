"""`ralf bench decode`: the same frames of each clip by PyAV and by DALI, alone and side by side.

For every clip named, in one run and in turns: PyAV on all threads, DALI with one clip under way,
and DALI with several (copies of it).  The record has frames read a second, not frames wanted,
since a decoder goes through all from a keyframe on; how far DALI's pixels lie from PyAV's; what
the rule of routing.py would choose; and the rates that the rule's constants stand for.

On a GPU that is NVDEC; without one DALI's software decoder, which takes VP9 and MJPEG.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ralf.kernels.bench.record import Record, Timing, interleave, machine
from ralf.worker.contract import Sampling
from ralf.worker.media.decode_dali import DaliDecoder, dali_version
from ralf.worker.media.decode_pyav import PyavDecoder
from ralf.worker.media.probe import probe
from ralf.worker.media.routing import route
from ralf.worker.media.sampling import frames_read, plan
from ralf.worker.media.types import Clip, Decoder
from ralf.worker.runtime import cores, why_no_dali
from ralf.worker.settings import Settings


def run_decode(args: argparse.Namespace) -> int:
    """Print the record."""
    settings = Settings.from_environment()
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    lacking = why_no_dali(device) if device != "cpu" else ""
    if dali_version() is None or lacking:
        print(f"ralf bench: {lacking or 'DALI is not installed'}", file=sys.stderr)
        return 2
    pyav = PyavDecoder(chunk_bytes=settings.gpu_chunk_bytes, threads=cores(settings))
    dali = DaliDecoder(pyav, device=device, chunk_bytes=settings.gpu_chunk_bytes)
    sampling = Sampling(mode="uniform", max_frames=args.frames)
    clips = {Path(name).name: Clip(probe(name, settings), sampling) for name in args.clips}
    taken = {name: clip for name, clip in clips.items() if not dali.refusal(clip.probe)}
    print(record(clips, taken, pyav, dali, at_once=args.at_once, repeats=args.repeats).dump())
    return 0


def record(
    clips: dict[str, Clip],
    taken: dict[str, Clip],
    pyav: PyavDecoder,
    dali: DaliDecoder,
    *,
    at_once: int,
    repeats: int,
) -> Record:
    """Every clip's ways timed in turns; `taken` are those that DALI decodes itself."""
    ways: dict[str, Callable[[], int]] = {}
    for name, clip in clips.items():
        ways[f"{name}: pyav"] = partial(drained, pyav, [clip])
    for name, clip in taken.items():
        ways[f"{name}: dali"] = partial(drained, dali, [clip])
        ways[f"{name}: dali, {at_once} at once"] = partial(drained, dali, [clip] * at_once)
    timings = interleave(ways, repeats=repeats)
    facts = {name: clip_facts(clip, dali, pyav.threads) for name, clip in clips.items()}
    for name, clip in taken.items():
        facts[name] |= rates(clip, name, timings, at_once)
        facts[name] |= distance(pyav, dali, clip)
    return Record(
        theme="decode",
        machine=machine(),
        conditions={
            "device": torch.cuda.get_device_name(dali.device) if dali.backend == "mixed" else "cpu",
            "dali": dali_version(),
            "backend": dali.backend,
            "threads": pyav.threads,
            "at_once": at_once,
            "seconds": "for all the frames wanted of one clip, or of as many as are at once",
        },
        timings=timings,
        ratios={
            f"{name}: pyav / dali, {at_once} at once": round(
                # PyAV's time is of one clip, DALI's of all that are at once.
                at_once
                * timings[f"{name}: pyav"].median_s
                / timings[f"{name}: dali, {at_once} at once"].median_s,
                2,
            )
            for name in taken
        },
        facts=facts,
    )


def drained(decoder: Decoder, clips: Sequence[Clip]) -> int:
    """Frames that came out; each chunk is let go of at once."""
    return sum(len(frames) for frames in decoder.decode(clips))


def clip_facts(clip: Clip, dali: DaliDecoder, threads: int) -> dict[str, Any]:
    """What the clip is, and where it would go on an idle machine."""
    found, wanted = clip.probe, plan(clip)
    way = route(found, wanted, cores=threads)
    return {
        "codec": f"{found.codec} {found.width}×{found.height} {found.pixel_format}",
        "colour": f"{found.colour_space}/{found.colour_range}",
        "frames": found.frame_count,
        "keyframes": len(found.keyframes),
        "wanted": len(wanted),
        "read": frames_read(found, wanted),
        "dali_refuses": dali.refusal(found),
        "route": f"{way.decoder}: {way.why}",
    }


def rates(clip: Clip, name: str, timings: dict[str, Timing], at_once: int) -> dict[str, float]:
    """Frames read a second by each way."""
    read = frames_read(clip.probe, plan(clip))
    several = f"dali, {at_once} at once"
    return {
        f"{way}_frames_s": round(times * read / timings[f"{name}: {way}"].median_s, 1)
        for way, times in (("pyav", 1), ("dali", 1), (several, at_once))
    }


def distance(pyav: PyavDecoder, dali: DaliDecoder, clip: Clip) -> dict[str, float]:
    """How far the two decoders' pixels lie apart, in levels of 255."""
    mean, most, frames = 0.0, 0.0, 0
    both = (
        chain.from_iterable(part.pixels for part in decoder.decode([clip]))
        for decoder in (pyav, dali)
    )
    for one, other in zip(*both, strict=True):
        # Differences of uint8 would wrap around below 0.
        apart = np.abs(one.cpu().numpy().astype(np.int16) - other.cpu().numpy())
        mean, most, frames = mean + float(apart.mean()), max(most, float(apart.max())), frames + 1
    return {"levels_apart_mean": round(mean / frames, 4), "levels_apart_most": most}
