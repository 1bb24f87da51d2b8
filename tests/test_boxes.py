"""Overlap of boxes."""

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from ralf.worker.boxes import overlap


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
