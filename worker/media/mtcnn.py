"""Find faces: MTCNN as one batched program, over all frames of a chunk at once.

    frames → reduced copy → integral picture ┬→ pyramid → P-Net → candidates → NMS
                                             ├→ 24×24 crops → R-Net → NMS
                                             └→ 48×48 crops → O-Net → NMS → faces

Every resize that MTCNN needs, for levels and crops alike, is a gather from one integral picture
(pyramid.py), without a loop over boxes.  The networks see exactly the pixels that facenet-pytorch's
own loop would show them, so both find the same faces.

Size.  Faces are searched on a copy whose longer side is `finder.long_side`; only the model's crops
are cut from full resolution.  Where `finder.min_face` would be smaller than P-Net's window of 12
pixels on that copy, the copy is made larger.  Enlarging a reduced copy would cost P-Net the same
and show it less.  Frames are never enlarged.

Boxes and landmarks are in pixels of the source.  Boxes may reach beyond the frame's edges.
All in FP32: on a CPU with bf16 in hardware, P-Net and R-Net are slower in it, and O-Net would save
only 5 to 10 % of the whole.  Memory is bounded: a few frames at a time, large levels in bands,
candidates in batches, and a maximum of candidates per frame.
On a CPU frames run side by side, one to a core (kernels/cpu_threads.py).

A GPU finds the same faces in fixed shapes, FP16 and with one transfer (mtcnn_cuda.py).  It uses
the steps here where a frame has more candidates than the largest fixed shape.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ralf.kernels.cpu_threads import side_by_side
from ralf.kernels.manifest import Finder
from ralf.kernels.networks.mtcnn import pretrained
from ralf.worker.media.mtcnn_boxes import batched_nms, corners, moved, placed, regressed, squared
from ralf.worker.media.mtcnn_cuda import ACCEPT, MOST_FRAMES, FixedShapeMtcnn, Found
from ralf.worker.media.pyramid import WINDOW, all_windows, bands, crops, integral, shrink
from ralf.worker.media.resample import shrunk
from ralf.worker.media.types import Faces, Frames

# How much goes through at once: what stays in a CPU's caches (four times as much takes 1.3 × as
# long a frame), or what fills a GPU.
PIXELS_A_PASS = {"cpu": 640 * 400, "cuda": 64 * 640 * 360}  # of reduced copies
PIXELS_A_BAND = {"cpu": 640 * 400, "cuda": 64 * 640 * 360}  # of one level of the pyramid
PIXELS_SIDE_BY_SIDE = 960 * 540  # a larger copy goes alone, and spreads over the cores inside
CROPS_A_PASS = {"cpu": 64, "cuda": 4096}
# Of one frame after P-Net, and after R-Net; 310 faces side by side give 6,500 and 720.
MOST_PROPOSED, MOST_REFINED = 16_384, 2048


class Candidates(NamedTuple):
    """k boxes between two steps, in pixels of the reduced copy."""

    boxes: Tensor  # f32 [k, 4]
    score: Tensor  # f32 [k]
    frame: Tensor  # i64 [k]

    def take(self, rows: Tensor) -> "Candidates":
        """Those rows, in that order."""
        return Candidates(self.boxes[rows], self.score[rows], self.frame[rows])


def reduced_size(height: int, width: int, finder: Finder) -> tuple[int, int]:
    """Height and width of the copy that faces are searched on."""
    longest = max(height, width, 1)
    scale = min(1.0, max(finder.long_side / longest, WINDOW / finder.min_face))
    return max(1, round(height * scale)), max(1, round(width * scale))


def smallest_wins(found: Candidates, threshold: float) -> NDArray[np.bool_]:
    """Greedy NMS by overlap over the *smaller* box, within each frame; True where a box stays.

    A box is dropped when a kept, better one of its frame overlaps it.  Repeating "dropped when any
    better box not dropped overlaps" until nothing changes gives the same answer without walking
    over boxes: the best is settled in the first round, and each round settles at least one more.
    """
    boxes, score, frame = (t.cpu().numpy() for t in found)
    keep = np.ones(len(boxes), bool)
    for of_frame in _framewise(frame):
        rows = of_frame[np.argsort(-score[of_frame], kind="stable")]
        mine = boxes[rows]
        area = np.prod(mine[:, 2:] - mine[:, :2] + 1, axis=1)
        start = np.maximum(mine[:, None, :2], mine[None, :, :2])
        end = np.minimum(mine[:, None, 2:], mine[None, :, 2:])
        shared = np.prod(np.maximum(end - start + 1, 0), axis=2)
        beats = np.triu(shared > threshold * np.minimum(area[:, None], area[None]), 1)
        stays = np.ones(len(rows), bool)
        while not np.array_equal(stays, now := ~(beats & stays[:, None]).any(0)):
            stays = now
        keep[rows] = stays
    return keep


def _framewise(frame: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Rows of each frame that has any."""
    order = np.argsort(frame, kind="stable")
    yield from (rows for rows in np.split(order, np.flatnonzero(np.diff(frame[order])) + 1))


class Mtcnn:
    """Finds the faces of a chunk of frames; the same code on CPU and CUDA."""

    name = "mtcnn"

    def __init__(
        self,
        finder: Finder,
        device: str | torch.device = "cpu",
        *,
        fixed: torch.dtype | None = None,
    ) -> None:
        """`fixed`: use mtcnn_cuda.py with this dtype; CUDA always does, in FP16 if None."""
        self.finder = finder
        self.device = torch.device(device)
        if fixed is None and self.device.type == "cuda":
            fixed = torch.float16
        self.fixed_shapes = None if fixed is None else FixedShapeMtcnn(self.device, fixed)
        self.nets = pretrained(self.device)
        self._pixels = PIXELS_A_PASS["cpu" if fixed is None else "cuda"]
        self._band = PIXELS_A_BAND[self.device.type]
        self._crops = CROPS_A_PASS[self.device.type]

    def find(self, frames: Frames) -> Faces:
        """Every face of the chunk: frame by frame, the most confident first within one."""
        n, _, height, width = frames.pixels.shape
        rows, columns = reduced_size(height, width, self.finder)
        at_once = max(1, self._pixels // (rows * columns))
        if self.fixed_shapes is not None:
            at_once = min(at_once, MOST_FRAMES)
        passes = [
            partial(self._pass, frames.pixels[first : first + at_once], first)
            for first in range(0, n, at_once)
        ]
        beside = self.fixed_shapes is None and rows * columns <= PIXELS_SIDE_BY_SIDE
        found = side_by_side(passes) if beside else [one() for one in passes]
        if not found:
            return Faces.none()
        return Faces(
            boxes=np.concatenate([faces.boxes for faces in found]),
            landmarks=np.concatenate([faces.landmarks for faces in found]),
            confidence=np.concatenate([faces.confidence for faces in found]),
            frame=np.concatenate([faces.frame for faces in found]),
        )

    def reduced(self, pixels: Tensor) -> Tensor:
        """u8 [n,3,h,w] → the copy that faces are searched on, u8 on the finder's device."""
        size = reduced_size(pixels.shape[2], pixels.shape[3], self.finder)
        pixels = pixels.to(self.device, non_blocking=True)
        if size == tuple(pixels.shape[2:]):
            return pixels
        if self.fixed_shapes is not None:  # torch has no 8-bit kernel for this on CUDA
            return shrunk(pixels, *size)
        return F.interpolate(pixels, size=size, mode="bilinear", antialias=True)

    @torch.inference_mode()
    def _pass(self, pixels: Tensor, first: int) -> Faces:
        """The faces of a few frames; `first` is the row of the first one in its chunk."""
        _, _, height, width = pixels.shape
        copy = self.reduced(pixels)
        _, _, rows, columns = copy.shape
        least = self.finder.min_face * max(rows, columns) / max(height, width)
        found = self.fixed_shapes.find(copy, least) if self.fixed_shapes is not None else None
        boxes, score, frame, points = found or self._in_steps(copy, least)
        zoom = np.array([width / columns, height / rows], np.float32)
        order = np.lexsort((-score, frame))
        return Faces(
            boxes=(boxes * np.tile(zoom, 2))[order],
            landmarks=(points * zoom)[order],
            confidence=score[order],
            frame=frame[order] + first,
        )

    def _in_steps(self, copy: Tensor, least: float) -> Found:
        """Each step as large as the one before left it."""
        sums = integral(copy)
        found, landmarks = self._judge(sums, self._refine(sums, self._propose(sums, least)))
        keep = smallest_wins(found, 0.7)
        return Found(*(part.cpu().numpy()[keep] for part in (*found, landmarks)))

    def _propose(self, sums: Tensor, least: float) -> Candidates:
        """P-Net over the pyramid; NMS within each level, then across the levels of a frame."""
        n, height, width = sums.shape[0], sums.shape[1] - 1, sums.shape[2] - 1
        windows = all_windows(height, width, least, sums.device)
        # Empty parts first: a copy smaller than P-Net's window has no level, and cat refuses an
        # empty list.
        logits, offsets = [sums.new_zeros((n, 0))], [sums.new_zeros((n, 4, 0))]
        for level in windows.levels:
            for rows in bands(level, self._band // n):
                logit, offset = self.nets.pnet(shrink(sums, level, *rows))
                logits.append(logit.flatten(1))
                offsets.append(offset.flatten(2))
        probability = torch.cat(logits, 1).sigmoid()
        # At least here, but more than below for R- and O-Net, as in facenet-pytorch.
        frame, cell = (probability >= ACCEPT[0]).nonzero().unbind(1)
        found = Candidates(windows.boxes[cell], probability[frame, cell], frame)
        offset = torch.cat(offsets, 2)[frame, :, cell]

        chosen = _strongest(found, MOST_PROPOSED)
        found, offset, level_of = found.take(chosen), offset[chosen], windows.level[cell[chosen]]
        alone = batched_nms(*found[:2], found.frame * len(windows.levels) + level_of, 0.5)
        found, offset = found.take(alone), offset[alone]
        alone = batched_nms(*found, 0.7)
        found, offset = found.take(alone), offset[alone]
        return found._replace(boxes=squared(regressed(found.boxes, offset)))

    def _refine(self, sums: Tensor, found: Candidates) -> Candidates:
        """R-Net over every candidate of every frame."""
        covered, some = corners(found.boxes, sums.shape[1] - 1, sums.shape[2] - 1)
        answers = [
            self.nets.rnet(crops(sums, found.frame[batch], covered[batch], 24))
            for batch in _batches(len(covered), self._crops)
        ]
        logit, offset = (torch.cat(part) for part in zip(*answers, strict=True))
        found = found._replace(score=logit.sigmoid())
        passed = ((found.score > ACCEPT[1]) & some).nonzero().flatten()
        found, offset = found.take(passed), offset[passed]
        alone = batched_nms(*found, 0.7)
        alone = alone[_strongest(found.take(alone), MOST_REFINED)]
        found, offset = found.take(alone), offset[alone]
        return found._replace(boxes=squared(moved(found.boxes, offset)))

    def _judge(self, sums: Tensor, found: Candidates) -> tuple[Candidates, Tensor]:
        """O-Net over the remaining candidates: the faces before the last NMS, with landmarks."""
        covered, some = corners(found.boxes, sums.shape[1] - 1, sums.shape[2] - 1)
        answers = [
            self.nets.onet(crops(sums, found.frame[batch], covered[batch], 48))
            for batch in _batches(len(covered), self._crops)
        ]
        logit, offset, points = (torch.cat(part) for part in zip(*answers, strict=True))
        found = found._replace(score=logit.sigmoid())
        passed = ((found.score > ACCEPT[2]) & some).nonzero().flatten()
        found, offset, points = found.take(passed), offset[passed], points[passed]
        # By the boxes that O-Net saw, before its own correction moves them.
        landmarks = placed(points, found.boxes)
        return found._replace(boxes=moved(found.boxes, offset)), landmarks


def _batches(count: int, at_once: int) -> Iterator[slice]:
    """Bounded runs over `count` rows; one empty run where there are none."""
    yield from (slice(i, i + at_once) for i in range(0, max(count, 1), at_once))


def _strongest(found: Candidates, most: int) -> Tensor:
    """Rows of the best `most` of each frame, in their old order; nearly always all of them."""
    everyone = torch.arange(len(found.frame), device=found.frame.device)
    if len(everyone) <= most:
        return everyone
    order = found.score.argsort(descending=True, stable=True)
    order = order[found.frame[order].argsort(stable=True)]
    frame = found.frame[order]
    rank = everyone - torch.searchsorted(frame, frame)
    return order[rank < most].sort().values
