"""`ralf bench pipeline`: whole clips a second, stage by stage, against the plain way in one run.

ralf: each clip by analyze(), one after another, and several at once as a GPU's child walks them.
plain: what one writes first on the same device: PyAV, facenet-pytorch's MTCNN with its defaults
frame by frame at full resolution, the network in FP32 eager, one frame's faces at a time.  Both
look at the same frames and run the same weights.

strides: the same clips with faces sought in each Nth frame only, every frame sampled, and whether
the verdicts change.  soak: thousands of clips, and the slopes of what the process holds (soak.py).

A stage's time is the wall time its caller waited: on a GPU, cutting is queued, and its work is
waited for in score.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ralf.kernels.bench.record import Record, interleave, machine
from ralf.worker import telemetry
from ralf.worker.batcher import Batcher
from ralf.worker.bench.gauges import Gauges
from ralf.worker.bench.scan import PlainWay
from ralf.worker.bench.soak import slope, soak
from ralf.worker.contract import EvidencePolicy, Sampling, Verdict
from ralf.worker.media.probe import probe
from ralf.worker.media.stride import StridedFinder
from ralf.worker.pipeline import Ask, analyze
from ralf.worker.runtime import Parts, load, together
from ralf.worker.settings import Settings

QUIET = EvidencePolicy(thumbnails=False)  # as scan --json
STRIDE, DENSE_FPS = 4, 20.0
"""The rate is high, because frames that are far apart are all searched (stride.py)."""


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
