"""Operations on boxes between MTCNN's networks: k boxes, x0 y0 x1 y1 in pixels of the copy.

The shapes depend only on the number of boxes, and no operation reads a number back from the device,
so all of them can be recorded in a CUDA graph; `batched_nms` is the exception.

Of torchvision only the compiled operator is loaded.  Importing the package takes more than a
second, because it brings torch's compiler with it.
"""

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from ralf import install_hint

# Above so many numbers torchvision takes the groups one by one; so do we, for the same boxes.
ONE_BY_ONE_FROM = {"cpu": 4000, "cuda": 100_000}


def _load_operators() -> None:
    """Register torch.ops.torchvision.nms; the package may be imported too, before or after."""
    spec = find_spec("torchvision")
    folders = (spec.submodule_search_locations if spec else None) or ()
    # _C.so up to torchvision 0.28, _C_stable.so after.
    libraries = [found for folder in folders for found in sorted(Path(folder).glob("_C*.so"))]
    if not libraries:
        raise ImportError(
            f"torchvision is not installed, or without its operators: {install_hint('cpu')}",
            name="torchvision",
        )
    for library in libraries:
        torch.ops.load_library(library)  # type: ignore[no-untyped-call]


_load_operators()


def batched_nms(boxes: Tensor, scores: Tensor, group: Tensor, most: float) -> Tensor:
    """Rows of the boxes that no better box of their group overlaps by more than `most`, best first.

    The rows are those of torchvision's function of the same name (a test compares them).
    """
    nms = torch.ops.torchvision.nms
    if not len(boxes):
        return torch.empty(0, dtype=torch.int64, device=boxes.device)
    if boxes.numel() <= ONE_BY_ONE_FROM[boxes.device.type]:
        # Each group in a place of its own, so that one call serves all.
        apart = group.to(boxes) * (boxes.max() + 1)
        rows: Tensor = nms(boxes + apart[:, None], scores, most)
        return rows
    kept = []
    for one in group.unique():  # type: ignore[no-untyped-call]
        rows = (group == one).nonzero().flatten()
        kept.append(rows[nms(boxes[rows], scores[rows], most)])
    rows = torch.cat(kept).sort().values
    return rows[scores[rows].sort(descending=True).indices]


def squared(boxes: Tensor) -> Tensor:
    """Each box as the square around its centre with its longer side."""
    size = boxes[:, 2:] - boxes[:, :2]
    side = size.amax(1, keepdim=True)
    start = boxes[:, :2] + size * 0.5 - side * 0.5
    return torch.cat([start, start + side], 1)


def regressed(boxes: Tensor, offsets: Tensor) -> Tensor:
    """Proposals corrected by P-Net, whose offsets are in units of the window."""
    # Without the + 1 of `moved`: facenet-pytorch counts pixels differently after P-Net.
    return boxes + offsets * (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)


def moved(boxes: Tensor, offsets: Tensor) -> Tensor:
    """Boxes corrected by R- or O-Net; the pixel grid is counted with both ends in."""
    size = boxes[:, 2:] - boxes[:, :2] + 1
    return boxes + offsets * size.repeat(1, 2)


def placed(points: Tensor, boxes: Tensor) -> Tensor:
    """O-Net's landmarks [k,5,2], fractions of the box it saw, in pixels."""
    start = boxes[:, None, :2]
    # Less one as in facenet-pytorch, whose boxes count from one.
    return start - 1 + points * (boxes[:, None, 2:] - start + 1)


def corners(boxes: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """The pixels a box covers, i64 [k,4] within the picture, and whether there are any [k].

    Boxes count from one and hold both ends, as facenet-pytorch's do.
    """
    whole = boxes.trunc().long()
    start = whole[:, :2].clamp(min=1) - 1
    end = torch.stack([whole[:, 2].clamp(max=width), whole[:, 3].clamp(max=height)], 1)
    some = (end > start).all(1)
    # A box outside the picture gets one pixel, so that every row has a crop; `some` drops it later.
    start = torch.minimum(start, end.clamp(min=1) - 1)
    return torch.cat([start, torch.maximum(end, start + 1)], 1), some


def overlap_of_union(boxes: Tensor) -> Tensor:
    """[n,k,4] → [n,k,k]: what two boxes share, over what they cover together."""
    area = (boxes[..., 2:] - boxes[..., :2]).prod(-1)
    shared = _shared(boxes, 0.0)
    return shared / (area[:, :, None] + area[:, None] - shared)


def overlap_of_smaller(boxes: Tensor) -> Tensor:
    """[n,k,4] → [n,k,k]: what two boxes share, over the smaller; both ends count."""
    area = (boxes[..., 2:] - boxes[..., :2] + 1).prod(-1)
    return _shared(boxes, 1.0) / torch.minimum(area[:, :, None], area[:, None])


def _shared(boxes: Tensor, end: float) -> Tensor:
    """Area that each two boxes of a picture share; `end` 1.0 counts both ends in."""
    sides = []
    for low, high in ((0, 2), (1, 3)):
        start, stop = boxes[..., low], boxes[..., high]
        start = torch.maximum(start[:, :, None], start[:, None])
        sides.append((torch.minimum(stop[:, :, None], stop[:, None]) - start + end).clamp_(min=0))
    return sides[0].mul_(sides[1])


def survivors(
    overlap: Tensor, alive: Tensor, threshold: float, rounds: int
) -> tuple[Tensor, Tensor]:
    """Greedy NMS within each picture, boxes [n,k] in order of confidence.

    A box is dropped when a kept, better one overlaps it.  Repeating "dropped when any better box
    not dropped overlaps" gives that answer once nothing changes any more: the best box is settled
    in the first round, and each round settles at least one more.  Chains are short, so a fixed
    number of rounds does; whether it did comes back too, as a tensor.
    """
    k = alive.shape[1]
    rank = torch.arange(k, device=alive.device)
    beats = (overlap > threshold) & (rank[:, None] < rank) & alive[:, :, None]
    stays = before = alive
    for _ in range(rounds):
        before, stays = stays, alive & ~(beats & stays[:, :, None]).any(1)
    return stays, (before == stays).all()


def first_rows(stays: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Rows of the first `count` that stay, [n,count], and which of those there are."""
    k = stays.shape[1]
    rank = torch.arange(k, device=stays.device)
    # topk and not nonzero, whose number of rows would have to be asked of the device.
    rows = torch.where(stays, rank, k).topk(min(count, k), dim=1, largest=False).values
    return rows.clamp(max=max(k - 1, 0)), rows < k


def rows_of(values: Tensor, rows: Tensor) -> Tensor:
    """values [n,k,…] at rows [n,c] → [n,c,…]."""
    shape = (*rows.shape, *values.shape[2:])
    return values.gather(1, rows.view(*rows.shape, *(1,) * (values.ndim - 2)).expand(shape))
