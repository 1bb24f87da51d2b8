"""Overlap of boxes, and which belong together."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torchvision.ops import box_iou

from ralf.worker.boxes import overlap
from ralf.worker.media.tracks import cheapest


def test_overlap_is_torchvisions():
    rng = np.random.default_rng(0)
    a, b = (
        np.concatenate([at, at + rng.random((k, 2))], 1)
        for k, at in ((k, rng.random((k, 2))) for k in (5, 7))
    )

    assert overlap(a, b) == pytest.approx(box_iou(torch.tensor(a), torch.tensor(b)).numpy())


def test_boxes_without_area_share_nothing():
    assert overlap([[1, 1, 1, 1]], [[1, 1, 1, 1], [0, 0, 2, 2]]).tolist() == [[0, 0]]


def test_no_boxes_give_an_empty_table():
    assert overlap([], [[0, 0, 1, 1]]).shape == (0, 1)


@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (2, 0), (1, 1), (1, 4), (5, 1), (3, 4)])
def test_the_cheapest_assignment_is_scipys(shape: tuple[int, int]):
    """Also where one face, or none, is on a side and scipy is not asked."""
    cost = np.random.default_rng(1).random(shape)

    assert np.stack(cheapest(cost)).tolist() == np.stack(linear_sum_assignment(cost)).tolist()
