"""MTCNN for a GPU: every step has a fixed shape, and one transfer ends it.

    copies → P-Net over the whole pyramid of all frames → the best `proposed` cells of each frame
           → NMS → `distinct` → R-Net → NMS → `refined` → O-Net → NMS → one table to the host

mtcnn.py asks the device after each step how many candidates are left, and makes the next step that
large; on a GPU each question costs more than the step.  Here each frame has a fixed capacity for
candidates, unused places are masked, and NMS is a fixed number of rounds over a matrix of overlaps.
So nothing is asked, and the whole run can be recorded as a CUDA graph.

Capacity.  How many candidates each step had comes back with the faces.  Where the capacity was too
small, or NMS had not settled, the answer is thrown away and the chunk is run again with the next
larger capacity; beyond the largest, the caller runs mtcnn.py's own steps.  The next chunk starts
with the smallest capacity that would have been enough for this one.

The networks run in the dtype that is asked for, FP16 on a GPU; resizes are exact, and boxes,
scores and overlaps are FP32.  It also runs on a CPU, slower than mtcnn.py's steps, so that the two
can be compared anywhere.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ralf.kernels.cuda_graphs import Replay
from ralf.kernels.networks.mtcnn import pretrained
from ralf.worker.media.mtcnn_boxes import (
    corners,
    first_rows,
    moved,
    overlap_of_smaller,
    overlap_of_union,
    placed,
    regressed,
    rows_of,
    squared,
    survivors,
)
from ralf.worker.media.pyramid import Windows, all_windows, crops, integral, shrink

ACCEPT = (0.6, 0.7, 0.7)  # least P(face) after P-, R- and O-Net
ROUNDS = 16  # of NMS; the longest chain seen in pictures is below ten
COLUMNS = 16  # of the table: box, landmarks, score, whether it stays
MOST_FRAMES = 32
LEAST_FRAMES = 4  # a chunk is filled up to 4, 8, 16 or 32 frames
CROPS_A_PASS = 8192
PAIRS_A_PASS = 2**26  # of boxes whose overlap is asked at once: 256 MB a matrix
MOST_RECORDED = 12  # graphs kept: sizes of copies × capacities × frame counts in use lately


class Capacity(NamedTuple):
    """The most candidates a frame may have before and after P-Net's NMS, and after R-Net's."""

    proposed: int
    distinct: int
    refined: int


# A frame of eight people has some 650, 236 and 70; one of 105 faces 2,900, 1,200 and 490.
CAPACITIES = (Capacity(512, 160, 64), Capacity(1024, 320, 128), Capacity(4096, 1536, 768))


class Found(NamedTuple):
    """What a pass over some copies found; k faces, in pixels of the copies."""

    boxes: NDArray[np.float32]  # [k, 4]
    score: NDArray[np.float32]  # [k]
    frame: NDArray[np.int64]  # [k]
    landmarks: NDArray[np.float32]  # [k, 5, 2]


class FixedShapeMtcnn:
    """MTCNN in fixed shapes over copies of any size; recorded once per size on a GPU."""

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        capacities: tuple[Capacity, ...] = CAPACITIES,
    ) -> None:
        self.device, self.dtype, self.capacities = device, dtype, capacities
        self.nets = tuple(net.to(dtype) for net in pretrained(device))
        self._replays: OrderedDict[tuple[object, ...], Callable[..., Tensor] | None] = OrderedDict()
        self._start: dict[tuple[int, int, float], int] = {}
        self._one_at_a_time = threading.Lock()  # a graph has one set of buffers

    def find(self, copies: Tensor, least: float) -> Found | None:
        """Faces of u8 [n,3,h,w], n up to MOST_FRAMES; None where no capacity is enough."""
        n, _, height, width = copies.shape
        windows = all_windows(height, width, least, self.device)
        if n == 0 or not len(windows.boxes):
            return _nothing()
        padded, key = _padded(copies), (height, width, least)
        with self._one_at_a_time:
            number = self._start.get(key, 0)
            while number < len(self.capacities):
                table = self._run(padded, windows, self.capacities[number], key).cpu().numpy()
                faces, full = _split(table, len(padded))
                fits = [full.within(capacity) for capacity in self.capacities]
                self._start[key] = fits.index(True) if any(fits) else number
                if full.settled and fits[number]:
                    return _kept(faces[:n])
                number = max(number + 1, fits.index(True) if any(fits) else len(self.capacities))
        return None

    @torch.inference_mode()
    def _run(self, copies: Tensor, windows: Windows, capacity: Capacity, shape: object) -> Tensor:
        """The table, on the device.  The second time a shape comes, the run is recorded.

        The recording reads the windows at their addresses, so it keeps them alive.
        """
        if self.device.type != "cuda":
            return self.table(copies, windows, capacity)
        key = (len(copies), shape, capacity)
        if key not in self._replays:
            self._replays[key] = None
        elif self._replays[key] is None:
            self._replays[key] = Replay(lambda some: self.table(some, windows, capacity), copies)
        self._replays.move_to_end(key)
        if len(self._replays) > MOST_RECORDED:
            self._replays.popitem(last=False)
        replay = self._replays[key]
        return self.table(copies, windows, capacity) if replay is None else replay(copies)

    def table(self, copies: Tensor, windows: Windows, capacity: Capacity) -> Tensor:
        """n × refined rows of COLUMNS, flat, and then how many candidates each step had."""
        sums = integral(copies)
        boxes, alive, proposed, calm = self._propose(sums, windows, capacity)
        boxes, alive, distinct, calmer = self._refine(sums, boxes, alive, capacity)
        rows, refined, calmest = self._judge(sums, boxes, alive, capacity)
        state = torch.stack([proposed, distinct, refined, (calm & calmer & calmest).long()])
        return torch.cat([rows.flatten(), state.float()])

    def _propose(
        self, sums: Tensor, windows: Windows, capacity: Capacity
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """P-Net over the pyramid; NMS within each level, then across a frame's levels."""
        logits, offsets = [], []
        for level in windows.levels:
            logit, offset = self.nets[0](shrink(sums, level, 0, level.height).to(self.dtype))
            logits.append(logit.flatten(1))
            offsets.append(offset.flatten(2))
        logit = torch.cat(logits, 1).float()
        # Counted before topk cuts them, or a capacity that is too small would go unnoticed.
        cells = (logit.sigmoid() >= ACCEPT[0]).sum(1).amax()
        logit, cell = logit.topk(min(capacity.proposed, logit.shape[1]), dim=1)
        boxes = windows.boxes[cell]
        alive, calm = _by_frames(
            _nms_twice, boxes, logit.sigmoid() >= ACCEPT[0], windows.level[cell]
        )
        offset = rows_of(torch.cat(offsets, 2).transpose(1, 2), cell).float()
        boxes = _each(squared, _each(regressed, boxes, offset))
        return boxes, alive, cells, calm

    def _refine(
        self, sums: Tensor, boxes: Tensor, alive: Tensor, capacity: Capacity
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """R-Net over every candidate of every frame."""
        distinct = alive.sum(1).amax()
        rows, alive = first_rows(alive, capacity.distinct)
        boxes = rows_of(boxes, rows)
        logit, offset = self._run_network(1, sums, boxes, 24)
        boxes, alive, (offset,) = _ranked(ACCEPT[1], sums, boxes, alive, logit, offset)
        alive, calm = _by_frames(_nms, boxes, alive)
        boxes = _each(squared, _each(moved, boxes, offset))
        return boxes, alive, distinct, calm

    def _judge(
        self, sums: Tensor, boxes: Tensor, alive: Tensor, capacity: Capacity
    ) -> tuple[Tensor, Tensor, Tensor]:
        """O-Net over the remaining candidates: the rows of the table."""
        refined = alive.sum(1).amax()
        rows, alive = first_rows(alive, capacity.refined)
        boxes = rows_of(boxes, rows)
        logit, offset, points = self._run_network(2, sums, boxes, 48)
        boxes, alive, (offset, points, logit) = _ranked(
            ACCEPT[2], sums, boxes, alive, logit, offset, points, logit
        )
        points = _each(placed, points, boxes)
        boxes = _each(moved, boxes, offset)
        stays, calm = _by_frames(_nms_by_smaller, boxes, alive)
        parts = [boxes, points.flatten(2), logit.sigmoid()[..., None], stays.float()[..., None]]
        return torch.cat(parts, 2), refined, calm

    def _run_network(self, net: int, sums: Tensor, boxes: Tensor, side: int) -> list[Tensor]:
        """R- or O-Net's answers for boxes [n,k,4], FP32, each [n,k,…]."""
        n, k, _ = boxes.shape
        covered, _ = corners(boxes.flatten(0, 1), sums.shape[1] - 1, sums.shape[2] - 1)
        frame = torch.arange(n, device=boxes.device)[:, None].expand(n, k).flatten()
        answers = [
            self.nets[net](crops(sums, frame[some], covered[some], side).to(self.dtype))
            for some in _slices(n * k, CROPS_A_PASS)
        ]
        whole = [torch.cat(part).float() for part in zip(*answers, strict=True)]
        return [part.view(n, k, *part.shape[1:]) for part in whole]


def _ranked(
    accept: float, sums: Tensor, boxes: Tensor, alive: Tensor, logit: Tensor, *more: Tensor
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Everything in order of the network's answer, and which rows the network accepts."""
    _, some = corners(boxes.flatten(0, 1), sums.shape[1] - 1, sums.shape[2] - 1)
    alive = alive & some.view_as(alive) & (logit.sigmoid() > accept)
    # NMS takes its boxes in order of confidence, so unused places go to the end.
    order = logit.masked_fill(~alive, float("-inf")).argsort(dim=1, descending=True, stable=True)
    return rows_of(boxes, order), rows_of(alive, order), [rows_of(one, order) for one in more]


def _each(change: Callable[..., Tensor], *parts: Tensor) -> Tensor:
    """A change of k boxes, for those of n frames."""
    n, k = parts[0].shape[:2]
    changed = change(*(part.flatten(0, 1) for part in parts))
    return changed.view(n, k, *changed.shape[1:])


def _nms(boxes: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
    return survivors(overlap_of_union(boxes), alive, 0.7, ROUNDS)


def _nms_by_smaller(boxes: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
    return survivors(overlap_of_smaller(boxes), alive, 0.7, ROUNDS)


def _nms_twice(boxes: Tensor, alive: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """Within each level of the pyramid, then across all."""
    overlap = overlap_of_union(boxes)
    apart = level[:, :, None] != level[:, None]
    alive, calm = survivors(overlap.masked_fill(apart, 0), alive, 0.5, ROUNDS)
    alive, calmer = survivors(overlap, alive, 0.7, ROUNDS)
    return alive, calm & calmer


def _by_frames(nms: Callable[..., tuple[Tensor, Tensor]], *parts: Tensor) -> tuple[Tensor, Tensor]:
    """NMS a few frames at a time where a matrix of all overlaps would be large."""
    at_once = max(1, PAIRS_A_PASS // parts[0].shape[1] ** 2)
    frames = _slices(len(parts[0]), at_once)
    done = [nms(*(part[some] for part in parts)) for some in frames]
    return torch.cat([stays for stays, _ in done]), torch.stack([calm for _, calm in done]).all()


def _slices(count: int, at_once: int) -> Iterator[slice]:
    yield from (slice(first, first + at_once) for first in range(0, count, at_once))


class _Needed(NamedTuple):
    """The candidates of the fullest frame before each limit, and whether NMS settled."""

    proposed: int
    distinct: int
    refined: int
    settled: bool

    def within(self, capacity: Capacity) -> bool:
        """Whether no candidate would have been dropped."""
        return all(had <= most for had, most in zip(self[:3], capacity, strict=True))


def _padded(copies: Tensor) -> Tensor:
    """Filled with black frames up to one of a few counts, so that a few graphs are enough."""
    count = LEAST_FRAMES
    while count < len(copies):
        count *= 2
    black = copies.new_zeros((count - len(copies), *copies.shape[1:]))
    return torch.cat([copies, black])


def _split(table: NDArray[np.float32], n: int) -> tuple[NDArray[np.float32], _Needed]:
    proposed, distinct, refined, settled = table[-4:].tolist()
    needed = _Needed(int(proposed), int(distinct), int(refined), bool(settled))
    return table[:-4].reshape(n, -1, COLUMNS), needed


def _kept(faces: NDArray[np.float32]) -> Found:
    frame, row = np.nonzero(faces[..., -1])
    kept = faces[frame, row]
    return Found(kept[:, :4], kept[:, 14], frame.astype(np.int64), kept[:, 4:14].reshape(-1, 5, 2))


def _nothing() -> Found:
    return _kept(np.zeros((0, 1, COLUMNS), np.float32))
