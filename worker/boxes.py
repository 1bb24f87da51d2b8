"""How much two boxes overlap, for tracks, streams and training.

Boxes are x0 y0 x1 y1 in any unit.  The finder's networks have the same for tensors on a device,
where a box also counts its last pixel (media/mtcnn_boxes.py).
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def overlap(a: ArrayLike, b: ArrayLike) -> NDArray[np.float64]:
    """Intersection over union of each box of a [n, 4] with each box of b [m, 4]: [n, m]."""
    first, second = (np.asarray(boxes, np.float64).reshape(-1, 4) for boxes in (a, b))
    start = np.maximum(first[:, None, :2], second[None, :, :2])
    end = np.minimum(first[:, None, 2:], second[None, :, 2:])
    shared = np.prod(np.maximum(end - start, 0), axis=2)
    either = _area(first)[:, None] + _area(second)[None] - shared
    # Two boxes without any area share nothing; without the guard they would give 0 / 0.
    return np.asarray(shared / np.maximum(either, np.finfo(np.float64).tiny))


def _area(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.prod(np.maximum(boxes[:, 2:] - boxes[:, :2], 0), axis=1))
