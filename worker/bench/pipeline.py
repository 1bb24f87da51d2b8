"""`ralf bench pipeline`: whole clips a second, stage by stage, against the plain way in one run.

ralf: each clip by analyze(), one after another, and several at once as a GPU's child walks them.
plain: what one writes first on the same device: PyAV, facenet-pytorch's MTCNN with its defaults
frame by frame at full resolution, the network in FP32 eager, one frame's faces at a time.  Both
look at the same frames and run the same weights.

strides: the same clips with faces sought in each Nth frame only, every frame sampled, and whether
the verdicts change.

soak: thousands of clips through one process.  Does its memory, the device's, the number of open
files or the time per clip grow?  A leak is a slope whose 95 % interval is above zero and whose size
matters.

A stage's time is the wall time its caller waited: on a GPU, cutting is queued, and its work is
waited for in score.
"""

import argparse
import itertools
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from ralf.kernels.bench.record import Record, interleave, machine
from ralf.worker import telemetry
from ralf.worker.batcher import Batcher
from ralf.worker.bench.gauges import Gauges, held
from ralf.worker.bench.scan import PlainWay
from ralf.worker.contract import EvidencePolicy, Sampling, Verdict
from ralf.worker.media.probe import probe
from ralf.worker.media.stride import StridedFinder
from ralf.worker.pipeline import Ask, analyze
from ralf.worker.runtime import Parts, load, together
from ralf.worker.settings import Settings

QUIET = EvidencePolicy(thumbnails=False)  # as scan --json
STRIDE, DENSE_FPS = 4, 20.0
"""The rate is high, because frames that are far apart are all searched (stride.py)."""
WARM_UP = 0.1
BLOCKS = 20


def run_pipeline(args: argparse.Namespace) -> int:
    """Print the record."""
    settings = Settings.from_environment()
    telemetry.configure(settings)
    clips = [Path(name) for name in args.clips]
    missing = [str(clip) for clip in clips if not clip.is_file()]
    if missing or args.at_once < 1 or args.repeats < 1:
        print(f"ralf bench: no clip at {missing}, or a count below 1", file=sys.stderr)
        return 2
    parts = load(settings, model=args.model, device=args.device)
    print(measured(clips, parts, args).dump())
    return 0


def measured(clips: list[Path], parts: Parts, args: argparse.Namespace) -> Record:
    """Everything that was asked for, in one record."""
    ask = Ask(sampling=Sampling(mode="uniform", max_frames=args.frames), evidence=QUIET)
    shared = together(parts)
    # Rounded up: there must be at least as many walks as run at once.
    several = clips * -(-args.at_once // len(clips))
    plain = PlainWay(parts, ask.sampling or parts.default_sampling, every=False)
    facts: dict[str, Any] = {}

    def one_by_one() -> None:
        facts["ralf"] = summary([analyze(clip, parts, ask=ask)[0] for clip in clips])

    def at_once() -> None:
        with ThreadPoolExecutor(args.at_once) as pool:
            found = list(pool.map(lambda clip: analyze(clip, shared, ask=ask)[0], several))
        facts["at once"] = summary(found)

    def theirs() -> None:
        # It runs once a repeat: only the last one's times are kept.
        plain.stages_ms.clear()
        facts["plain"] = {"faces": sum(plain(clip) for clip in clips)}
        facts["plain"]["stages_ms"] = {
            k: round(v / len(clips), 1) for k, v in plain.stages_ms.items()
        }

    several_at_once = f"ralf, {args.at_once} at once"
    ways = {"ralf": one_by_one, several_at_once: at_once, "plain": theirs}
    with Gauges(parts.engine.device) as gauges:
        timings = interleave(ways, repeats=args.repeats)
    # Once more alone: the gauges above are a mean over all ways.
    with Gauges(parts.engine.device) as busy:
        at_once()
    lengths = {clip: probe(clip, parts.settings).duration_s for clip in clips}
    facts["rates"] = {
        name: rates(several if name == several_at_once else clips, timing.median_s, lengths)
        for name, timing in timings.items()
    }
    facts["used"] = {"all ways": gauges.used, "at once": busy.used}
    assert isinstance(shared.engine, Batcher)
    facts["batches"] = asdict(shared.engine.served)
    if args.stride:
        facts["stride"] = stride_effect(clips, parts)
    if args.soak:
        facts["soak"] = soak_slopes(clips, shared, ask, args)
    clips_s = {name: rate["clips_s"] for name, rate in facts["rates"].items()}
    return Record(
        theme="pipeline",
        machine=machine(),
        conditions=conditions(clips, parts, args),
        timings=timings,
        ratios={
            f"{name} / plain, clips a second": round(rate / clips_s["plain"], 2)
            for name, rate in clips_s.items()
            if name != "plain"
        },
        facts=facts,
    )


def rates(
    walked: Sequence[Path], seconds: float, lengths: Mapping[Path, float]
) -> dict[str, float]:
    """Clips, and seconds of video, in each second."""
    return {
        "clips_s": round(len(walked) / seconds, 3),
        "video_s_per_s": round(sum(lengths[clip] for clip in walked) / seconds, 2),
    }


def conditions(clips: Sequence[Path], parts: Parts, args: argparse.Namespace) -> dict[str, Any]:
    """What was run on what."""
    manifest, found = parts.artifact.manifest, [probe(clip, parts.settings) for clip in clips]
    device = torch.device(parts.engine.device)
    return {
        "clips": [
            f"{one.codec} {one.width}×{one.height}, {one.duration_s:.2f} s of {one.frame_count}"
            for one in found
        ],
        "frames": args.frames,
        "at_once": args.at_once,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "engine": f"{parts.engine.name} {parts.engine.precision}",
        "decoder": parts.decoder.name,
        "model": f"{manifest.name}@{parts.artifact.version}",
        "network": manifest.network.model_dump(),
        "threads": torch.get_num_threads(),
        "seconds": "for all clips once; at once, for as many as are at once",
    }


def summary(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Faces and labels, and each stage's mean milliseconds a clip."""
    stages: dict[str, float] = {}
    for verdict in verdicts:
        for stage, spent in verdict.made.stages_ms.items():
            stages[stage] = stages.get(stage, 0.0) + spent
    return {
        "faces": sum(verdict.made.faces for verdict in verdicts),
        "labels": [verdict.label for verdict in verdicts],
        "stages_ms": {stage: round(spent / len(verdicts), 1) for stage, spent in stages.items()},
    }


def stride_effect(clips: Sequence[Path], parts: Parts) -> dict[str, Any]:
    """Frames close together, faces sought in each and in each STRIDEth: what changes."""
    dense = Sampling(mode="fps", fps=DENSE_FPS, max_frames=parts.settings.max_frames)
    ask = Ask(sampling=dense, evidence=QUIET)
    settings = replace(parts.settings, find_every=STRIDE)
    sparse = replace(parts, finder=StridedFinder(parts.finder, STRIDE), settings=settings)
    dense_walks, sparse_walks = (
        [analyze(clip, some, ask=ask)[0] for clip in clips] for some in (parts, sparse)
    )
    pairs = list(zip(dense_walks, sparse_walks, strict=True))
    moved = [
        abs(one.score - other.score)
        for one, other in pairs
        if one.score is not None and other.score is not None
    ]
    return {
        "every": STRIDE,
        "find_ms": [
            round(sum(verdict.made.stages_ms["find"] for verdict in walks) / len(walks), 1)
            for walks in (dense_walks, sparse_walks)
        ],
        "faces": [sum(v.made.faces for v in walks) for walks in (dense_walks, sparse_walks)],
        "labels_changed": sum(one.label != other.label for one, other in pairs),
        "tracks_changed": sum(len(one.tracks) != len(other.tracks) for one, other in pairs),
        "score_moved_most": round(max(moved, default=0.0), 5),
    }


def soak_slopes(
    clips: Sequence[Path], parts: Parts, ask: Ask, args: argparse.Namespace
) -> dict[str, Any]:
    """The slopes of a soak, and what it used."""
    with Gauges(parts.engine.device) as gauges:
        noted = soak(
            clips,
            parts,
            ask,
            count=args.soak,
            at_once=args.at_once,
            most_s=args.soak_seconds,
        )
    return {
        "clips": len(noted["clip_s"]),
        "per_thousand_clips": {name: asdict(slope(values)) for name, values in noted.items()},
        "used": gauges.used,
    }


@dataclass(frozen=True)
class Slope:
    """Growth per thousand clips, with its 95 % interval, and the level it starts from."""

    per_thousand: float
    low: float
    high: float
    mean: float


def slope(values: Sequence[float] | NDArray[np.float64]) -> Slope:
    """The slope of one quantity, recorded after each clip.

    The first tenth is left out, while caches fill and libraries choose their kernels.  The rest is
    cut into BLOCKS and a line is fitted through the blocks' means, because neighbouring clips are
    not independent.
    """
    later = np.asarray(values, np.float64)[int(len(values) * WARM_UP) :]
    blocks = [block for block in np.array_split(later, BLOCKS) if len(block)]
    # A line through two points has no error, and so no interval.
    if len(blocks) < 3:
        raise ValueError(f"a slope needs at least 3 clips after the warm-up, got {len(blocks)}")
    ends = np.cumsum([len(block) for block in blocks])
    middles = ends - np.array([len(block) for block in blocks]) / 2
    means = np.array([block.mean() for block in blocks])
    grown, reach = 0.0, 0.0
    if np.ptp(means) > 0:  # SciPy has no error (NaN) for a line that is flat
        line = stats.linregress(middles, means)
        grown = float(line.slope)
        reach = float(stats.t.ppf(0.975, len(blocks) - 2)) * float(line.stderr)
    figures = (1000 * grown, 1000 * (grown - reach), 1000 * (grown + reach), float(later.mean()))
    return Slope(*(round(figure, 3) for figure in figures))


def soak(
    clips: Sequence[Path],
    parts: Parts,
    ask: Ask,
    *,
    count: int,
    at_once: int,
    most_s: float = 3600.0,
) -> dict[str, list[float]]:
    """`count` walks over the clips in turn, `at_once` at a time; what was held after each.

    No walk starts after most_s.
    """
    recorded: dict[str, list[float]] = {}
    lock, numbers = threading.Lock(), itertools.count()
    end = time.monotonic() + most_s

    def walks() -> None:
        while time.monotonic() < end:
            with lock:
                number = next(numbers)
            if number >= count:
                return
            start = time.perf_counter()
            analyze(clips[number % len(clips)], parts, ask=ask)
            spent = time.perf_counter() - start
            with lock:
                # Under the lock, so that the same place of each list is the same clip.
                for name, value in {**held(parts.engine.device), "clip_s": spent}.items():
                    recorded.setdefault(name, []).append(value)

    with ThreadPoolExecutor(at_once) as pool:
        for walk in [pool.submit(walks) for _ in range(at_once)]:
            # Raises what the walk raised; leaving the pool does not.
            walk.result()
    return recorded
