"""The residual's figure: high where it shows the forgery, even where it shows nothing of it."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from ralf.kernels.manifest import InputContract
from ralf.train.data.index import Index
from ralf.train.evaluate.judge import JudgedModel
from ralf.train.evaluate.localisation import residual_inside
from tests.faces_on_disk import faces

FORGED, UNTOUCHED = "residual inside the mask auc", "residual inside the mask auc untouched"


class Shown(NamedTuple):
    residual: Tensor


class Knowing(nn.Module):
    """Its residual is the difference from the untouched face, which is the second crop."""

    def explain(self, crops: Tensor) -> Shown:
        return Shown((crops.float() - crops[1:].float()).abs())


class Detail(nn.Module):
    """Its residual is fine detail, forged or not."""

    def explain(self, crops: Tensor) -> Shown:
        grey = crops.float()
        return Shown(nn.functional.pad((grey[..., 1:] - grey[..., :-1]).abs(), (0, 1)))


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> Index:
    return faces(tmp_path_factory.mktemp("data") / "d", val=4)


def judged(network: nn.Module | None) -> JudgedModel:
    return JudgedModel(
        name="m", score=lambda crops: torch.zeros(len(crops)), input=InputContract(size=64),
        network=network,
    )  # fmt: skip


def test_a_residual_that_knows_the_untouched_face_lies_inside_the_mask(index):
    """And of the untouched face it shows nothing: even chances."""
    found = residual_inside(judged(Knowing()), index, "val")

    assert found is not None
    assert found[FORGED][0] > 0.75 and found[UNTOUCHED][0] == 0.5
    low, high = found[FORGED][1:]
    assert low <= found[FORGED][0] <= high


def test_a_residual_of_plain_detail_is_the_same_without_a_forgery(index):
    """The figure beside it tells that it does not find forgeries but features."""
    found = residual_inside(judged(Detail()), index, "val", ("inner", "self_blend"))

    assert found is not None
    assert found[FORGED][0] == pytest.approx(found[UNTOUCHED][0], abs=0.12)


def test_a_network_without_a_residual_has_no_figure(index):
    """A plain classifier, and an engine that shows no network."""
    for network in (None, nn.Identity()):
        assert residual_inside(judged(network), index, "val") is None
    assert residual_inside(judged(Knowing()), index, "test") is None
