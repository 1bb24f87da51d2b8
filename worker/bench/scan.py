"""`ralf bench scan` and `find`: the walk and its face finder against plain code, in one run.

scan: the plain way is the first version that one would write: decode every frame in order, run
facenet-pytorch's MTCNN with its defaults frame by frame at full resolution, crop and resize each
face, run the network in FP32 on one frame's faces at a time.  Both judge the same frames with the
same weights.

find: the same 1080p frames through our finder, through facenet-pytorch's MTCNN on copies reduced
as ours reduces them with its smallest face reduced alike, and through its defaults.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ralf.kernels.bench.record import Record, interleave, machine
from ralf.kernels.engine import pick_device
from ralf.kernels.engine_torch import restore
from ralf.kernels.manifest import Finder, InputContract
from ralf.worker import telemetry
from ralf.worker.boxes import overlap
from ralf.worker.contract import EvidencePolicy, Sampling
from ralf.worker.media.decode_pyav import PyavDecoder
from ralf.worker.media.mtcnn import Mtcnn
from ralf.worker.media.probe import probe
from ralf.worker.media.sampling import plan
from ralf.worker.media.types import Clip, Faces
from ralf.worker.pipeline import Ask, analyze
from ralf.worker.runtime import Parts, cores, load
from ralf.worker.settings import Settings

SAMPLE = Path("demo/out/clips/six_faces.mp4")
SAME_FACE = 0.7
"""Least overlap over union of one face found twice."""
EVERY = Sampling(mode="uniform", max_frames=300)
"""Each frame of a clip that has no more."""


def _clip(args: argparse.Namespace) -> Path:
    """The clip named, or the sample clip of six people; a usage error where there is none."""
    clip = Path(args.clip) if args.clip else SAMPLE
    if not clip.is_file():
        if Path("demo/samples.py").is_file():
            otherwise = "make the sample clips with: python -m demo.samples"
        else:  # demo/ is not installed
            otherwise = "run this in a checkout of the repository, which makes sample clips"
        print(f"ralf bench: no clip at {clip}; name one, or {otherwise}", file=sys.stderr)
        raise SystemExit(2)
    return clip


def run_find(args: argparse.Namespace) -> int:
    """Print the record of the finders."""
    from facenet_pytorch import MTCNN

    clip, settings, wanted = _clip(args), Settings.from_environment(), Finder()
    device = str(pick_device(args.device))
    torch.set_num_threads(cores(settings))
    found = probe(clip, settings)
    sampling = Sampling(mode="uniform", max_frames=args.frames)
    # So large that all frames come in one chunk: each way must get the same ones.
    decoder = PyavDecoder(chunk_bytes=2 * 2**30)
    frames = next(decoder.decode([Clip(found, sampling)]))
    ours = Mtcnn(wanted, device)
    full = list(frames.pixels.permute(0, 2, 3, 1).contiguous().numpy())
    copies = list(ours.reduced(frames.pixels).cpu().permute(0, 2, 3, 1).contiguous().numpy())
    # 12 pixels are what the first of MTCNN's networks takes.
    least = max(12, round(wanted.min_face * copies[0].shape[1] / found.width))
    alike = MTCNN(keep_all=True, min_face_size=least, device=device)
    plain = MTCNN(keep_all=True, device=device)
    frames = replace(frames, pixels=frames.pixels.to(device))  # where a device's decoder leaves it
    timings = interleave(
        {
            "ralf": lambda: ours.find(frames),
            "stock, same setting": lambda: [alike.detect(copy) for copy in copies],
            "stock, defaults": lambda: [plain.detect(frame) for frame in full],
        },
        repeats=args.repeats,
    )
    mine = timings["ralf"].median_s
    record = Record(
        theme="find",
        machine=machine(),
        conditions={
            "frames": f"{len(full)} of {found.width}×{found.height}",
            "finder": wanted.model_dump(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(device) if device != "cpu" else "cpu",
            "seconds": "for all frames",
        },
        timings=timings,
        ratios={
            f"{name} / ralf": round(timings[name].median_s / mine, 2)
            for name in ("stock, same setting", "stock, defaults")
        },
        facts=agreement(
            ours.find(frames),
            [alike.detect(copy)[0] for copy in copies],
            zoom=found.width / copies[0].shape[1],
        ),
    )
    print(record.dump())
    return 0


def agreement(ours: Faces, theirs: list[Any], zoom: float) -> dict[str, float]:
    """The share of facenet-pytorch's faces, of those large enough, that our finder finds too."""
    wanted = matched = 0
    for row, boxes in enumerate(theirs):
        mine = ours.boxes[ours.frame == row].astype(np.float64)
        whole = np.zeros((0, 4)) if boxes is None else boxes.astype(np.float64) * zoom
        large = whole[whole[:, 3] - whole[:, 1] >= Finder().min_face]
        wanted += len(large)
        matched += int((overlap(large, mine).max(1, initial=0) >= SAME_FACE).sum())
    share = round(matched / wanted, 4) if wanted else 1.0
    return {"faces": len(ours), "stock_faces": wanted, "agreement": share}


def run_scan(args: argparse.Namespace) -> int:
    """Print the record; the ratio is what counts."""
    clip = _clip(args)
    settings = Settings.from_environment()
    telemetry.configure(settings)
    parts = load(settings, model=args.model, device="cpu")
    sampling = Sampling(mode="uniform", max_frames=args.frames)
    facts = probe(clip, settings)
    if facts.frame_count > EVERY.max_frames:
        print(
            f"ralf bench: {facts.frame_count} frames; the plain way decodes every one, so name a "
            f"clip of at most {EVERY.max_frames}",
            file=sys.stderr,
        )
        raise SystemExit(2)
    plain = PlainWay(parts, sampling)
    found: dict[str, Any] = {}

    ask = Ask(sampling=sampling, evidence=EvidencePolicy(thumbnails=False))  # as scan --json

    def ours() -> None:
        verdict, _ = analyze(clip, parts, ask=ask)
        found["faces"], found["stages_ms"] = verdict.made.faces, verdict.made.stages_ms

    def theirs() -> None:
        found["plain_faces"] = plain(clip)

    timings = interleave({"ralf": ours, "plain": theirs}, repeats=args.repeats)
    record = Record(
        theme="scan",
        machine=machine(),
        conditions={
            "clip": f"{facts.codec} {facts.width}×{facts.height}, {facts.duration_s:.2f} s",
            "frames": args.frames,
            "model": f"{parts.artifact.manifest.name}@{parts.artifact.version}",
            "network": parts.artifact.manifest.network.model_dump(),
            "precision": parts.engine.precision,
            "threads": torch.get_num_threads(),
        },
        timings=timings,
        ratios={"plain / ralf": round(timings["plain"].median_s / timings["ralf"].median_s, 2)},
        facts=found,
    )
    print(record.dump())
    return 0


class PlainWay:
    """Stock parts, put together without optimisation; returns the number of faces found.

    every: decode every frame and throw away all but the wanted, as the plain way does.
    """

    def __init__(self, parts: Parts, sampling: Sampling, *, every: bool = True) -> None:
        from facenet_pytorch import MTCNN

        manifest, self.device = parts.artifact.manifest, parts.engine.device
        self.finder = MTCNN(keep_all=True, device=self.device)
        self.network = restore(manifest, parts.artifact.read("weights.safetensors")).to(self.device)
        self.contract: InputContract = manifest.input
        self.sampling, self.settings = sampling, parts.settings
        self.decoded = EVERY if every else sampling
        self.decoder = PyavDecoder(chunk_bytes=64 * 2**20, threads=cores(parts.settings))
        self.stages_ms: dict[str, float] = {}

    @torch.no_grad()
    def __call__(self, clip: Path) -> int:
        found = probe(clip, self.settings)
        wanted = set(plan(Clip(found, self.sampling)).tolist())
        faces = 0
        chunks = self.decoder.decode([Clip(found, self.decoded)])
        while (chunk := self._timed("decode", partial(next, chunks, None))) is not None:
            for row, index in enumerate(chunk.indices.tolist()):
                if index not in wanted:
                    continue
                image = Image.fromarray(chunk.pixels[row].permute(1, 2, 0).numpy())
                boxes, _ = self._timed("find", partial(self.finder.detect, image))
                if boxes is None:
                    continue
                self._timed("score", partial(self._scored, image, boxes))
                faces += len(boxes)
        return faces

    def _timed(self, stage: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        done = work()
        spent = (time.perf_counter() - start) * 1000
        self.stages_ms[stage] = self.stages_ms.get(stage, 0.0) + spent
        return done

    def _scored(self, image: Image.Image, boxes: np.ndarray[Any, Any]) -> torch.Tensor:
        crops = torch.stack([self._crop(image, box) for box in boxes])
        logits: torch.Tensor = self.network(crops.to(self.device)).cpu()
        return logits

    def _crop(self, image: Image.Image, box: np.ndarray[Any, Any]) -> torch.Tensor:
        centre, side = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]).max() * self.contract.margin
        x, y = centre - side / 2
        crop = image.crop((round(x), round(y), round(x + side), round(y + side)))
        resized = crop.resize((self.contract.size,) * 2, Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1)
