"""A network and a loss of another package: found by entry points, trained like ours."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ralf.kernels.manifest import Network
from ralf.train import losses
from ralf.train.loop.checkpoint import LAST, load
from ralf.train.loop.initial_weights import make_network
from ralf.train.loop.loop import Options, train
from ralf.train.loop.step import objective
from ralf.train.recipe import Data, Init, InputContract, Optimiser, Recipe, Schedule
from ralf.train.recipe_text import RecipeError, from_json, override, to_json
from ralf.train.recipes import named
from tests.training import MadeBatches, tiny

CODE = '''
from typing import ClassVar, Literal

from pydantic import Field
from torch import nn

from ralf.train.losses.objective import Objective, Terms
from ralf.train.recipe import Loss


class Flat(nn.Module):
    """A network without a backbone."""

    def __init__(self, *, width: int = 4, kind: Literal["max", "mean"] = "max", size: int = 32):
        super().__init__()
        self.size = size
        self.body = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(),
            nn.Linear(width, 1),
        )

    def forward(self, crops):
        return self.body(crops.float() / 255).squeeze(1)


class HingeLoss(Loss):
    kind: Literal["hinge"] = "hinge"
    margin: float = Field(default=1.0, gt=0)


class Hinge(Objective):
    options = HingeLoss

    def run(self, crops):
        return self.network(crops)

    def terms(self, seen, batch, moment):
        wanted = batch.forged.float() * 2 - 1
        hinge = (self.recipe.loss.margin - wanted * seen).relu().mean()
        return Terms(hinge, {"hinge": hinge}, seen)


def strange():
    from ralf.kernels.manifest import Network
    from ralf.train.recipe import Recipe

    return Recipe(name="strange", network=Network(build="flat"), loss=HingeLoss(margin=2.0))
'''
POINTS = """
[ralf.networks]
flat = strangers_detector:Flat

[ralf.losses]
hinge = strangers_detector:Hinge
bce = strangers_detector:Hinge

[ralf.recipes]
strange = strangers_detector:strange
ralf_small = strangers_detector:strange
"""


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Another package, installed: a module, and the metadata that an installer writes."""
    site = tmp_path / "site"
    metadata = site / "strangers_detector-1.0.dist-info"
    metadata.mkdir(parents=True)
    (site / "strangers_detector.py").write_text(CODE)
    (metadata / "METADATA").write_text("Name: strangers-detector\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(POINTS)
    monkeypatch.syspath_prepend(site)
    yield importlib.import_module("strangers_detector")
    sys.modules.pop("strangers_detector")


def recipe(module: object, **changes: object) -> Recipe:
    """The stranger's network and loss, at 32 pixels."""
    chosen: dict[str, object] = {
        "name": "strange",
        "network": Network(build="flat", size=32),
        "loss": module.HingeLoss(margin=0.5),  # type: ignore[attr-defined]
        "data": Data(input=InputContract(size=32), batch=8),
        "optimiser": Optimiser(lr=0.01),
        "schedule": Schedule(steps=2),
        "init": Init(backbone=None),
        "precision": "fp32",
    }
    return Recipe(**(chosen | changes))  # type: ignore[arg-type]


def test_it_trains_is_stored_and_read_back(stranger: object, tmp_path: Path):
    """Two steps; the checkpoint's recipe is the one that was trained."""
    asked = recipe(stranger)
    options = Options(quiet=True)
    outcome = train(asked, MadeBatches(), None, tmp_path, data_sha256="d" * 64, options=options)
    stored = load(tmp_path / LAST)

    assert ("finished", 2) == (outcome.ending, outcome.state.step)
    assert asked == stored.recipe == from_json(to_json(asked), Recipe)
    assert 0.5 == stored.recipe.loss.margin  # type: ignore[attr-defined]


def test_its_dimensions_and_options_are_set_by_name(stranger: object):
    """From its own signature and its own fields, with the same errors as ours."""
    changed = override(recipe(stranger), {"network.width": "8", "loss.margin": "2"})

    assert (8, 2.0) == (changed.network.dimensions["width"], changed.loss.margin)  # type: ignore[attr-defined]
    for name, text, said in (
        ("network.kind", "median", r"network\.kind should be 'max' or 'mean', not 'median'"),
        ("loss.margin", "0", r"loss\.margin should be greater than 0, not 0"),
        ("network.depth", "3", r"no 'network\.depth'.*network\.width"),
    ):
        with pytest.raises(RecipeError, match=said):
            override(recipe(stranger), {name: text})


def test_no_package_replaces_a_loss_of_ours(stranger: object):
    """The stranger's bce is not taken; an unknown loss is answered with every name."""
    assert "ralf.train.losses.objective" == losses.find("bce").__module__
    with pytest.raises(ValueError, match=r"bce, ralf, .*, rcl, hinge, not 'square'"):
        losses.find("square")


def test_its_recipe_is_known_by_name(stranger: object):
    """`ralf train` finds it; no package replaces a recipe of ours."""
    assert 2.0 == named("strange").loss.margin  # type: ignore[attr-defined]
    assert "ralf" == named("ralf_small").network.build
    with pytest.raises(RecipeError, match=r"no recipe 'odd'; known: .*ralf_paper.*strange"):
        named("odd")


def test_a_network_without_a_backbone_says_what_to_set(stranger: object):
    """Where first weights are asked for its backbone, and where a loss shapes its features."""
    with pytest.raises(RecipeError, match=r"flat has no backbone.*init\.backbone=none"):
        make_network(recipe(stranger, init=Init()))
    network = make_network(recipe(stranger))
    with pytest.raises(RecipeError, match="Flat has no backbone"):
        objective(tiny("rcl"), network)
