"""FDFL's losses: cases worked out by hand, gradients by finite differences, and what is refused."""

import math
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from ralf.kernels.networks import build
from ralf.train.loop.checkpoint import BEST, load
from ralf.train.loop.initial_weights import make_network
from ralf.train.loop.loop import Options, train
from ralf.train.loop.step import objective
from ralf.train.losses.fdfl import (
    FdflLoss,
    FdflObjective,
    centre_loss,
    single_centre_loss,
    triplet_loss,
)
from ralf.train.losses.objective import Moment, OneClass
from ralf.train.recipe_text import RecipeError
from tests.training import MadeBatches, tiny

MOMENT = Moment(step=0, epoch=0, epochs=1, progress=0.0)
FORGED = torch.tensor([False, False, True, True])
FACES = torch.tensor([[3.0, 4.0], [0.0, 1.0], [0.0, 4.0], [8.0, 6.0]])
"""5, 1, 4 and 10 from the origin."""


def test_the_single_centre_loss_of_a_case_by_hand():
    """M_nat 3, M_man 7, margin 5: 3 + (3 − 7 + 5); with margin 1 the hinge is shut: 3."""
    origin = torch.zeros(2)
    open_, shut = (
        single_centre_loss(FACES, FORGED, origin, margin / math.sqrt(2)) for margin in (5.0, 1.0)
    )

    assert open_.item() == pytest.approx(3 + 1)
    assert shut.item() == pytest.approx(3)


def test_the_margin_grows_with_the_root_of_the_width():
    """m √D: four times as many features, twice the margin."""
    wide = torch.zeros(4, 8)
    wide[:, :2] = FACES
    narrow = single_centre_loss(FACES, FORGED, torch.zeros(2), 10.0)
    broad = single_centre_loss(wide, FORGED, torch.zeros(8), 10.0)

    assert (broad - narrow).item() == pytest.approx(10 * math.sqrt(2))


def test_distances_are_from_the_centre():
    """Moving all by the same vector changes nothing."""
    centre = torch.tensor([0.7, -1.3])
    here = single_centre_loss(FACES, FORGED, torch.zeros(2), 0.3)
    there = single_centre_loss(FACES + centre, FORGED, centre, 0.3)

    torch.testing.assert_close(here, there)


@pytest.mark.parametrize("margin", [0.0, 0.3, 3.0])
def test_gradients_are_those_of_finite_differences(margin: float):
    """To features and centre, hinge open and shut; of all three losses."""
    torch.manual_seed(3)
    features = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    centre = torch.randn(5, dtype=torch.float64, requires_grad=True)
    both = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    forged = torch.arange(6) >= 3

    assert torch.autograd.gradcheck(
        lambda x, c: single_centre_loss(x, forged, c, margin), (features, centre)
    )
    assert torch.autograd.gradcheck(lambda x, c: centre_loss(x, forged, c), (features, both))
    assert torch.autograd.gradcheck(lambda x: triplet_loss(x, forged, margin), (features,))


def test_at_distance_zero_all_is_finite():
    """Every face on the centre, and on every other."""
    features = torch.ones(4, 3, requires_grad=True)
    centre = torch.ones(3, requires_grad=True)
    losses = [
        single_centre_loss(features, FORGED, centre, 0.3),
        centre_loss(features, FORGED, torch.stack((centre, centre))),
        triplet_loss(features, FORGED, 0.3),
    ]
    torch.stack(losses).sum().backward()

    assert [0.3 * math.sqrt(3), 0, 0.3 * math.sqrt(3)] == pytest.approx(
        [loss.item() for loss in losses]
    )
    assert features.grad is not None and features.grad.isfinite().all()
    assert centre.grad is not None and centre.grad.isfinite().all()


def test_half_precision_features_are_measured_in_fp32():
    """A distance of a thousand small steps does not drown."""
    features = torch.full((4, 1024), 0.01).half()
    found = single_centre_loss(features, FORGED, torch.zeros(1024), 0.0)

    assert torch.float32 == found.dtype
    assert found.item() == pytest.approx(0.32, rel=1e-3)


@pytest.mark.parametrize("forged", [torch.zeros(4).bool(), torch.ones(4).bool()])
def test_a_batch_of_one_class_is_refused(forged: Tensor):
    """Not biased: the message counts both."""
    with pytest.raises(OneClass, match=r"at least 1 real and 1 forged.*got (4 and 0|0 and 4)"):
        single_centre_loss(FACES, forged, torch.zeros(2), 0.3)


def test_a_triplet_needs_two_of_a_class():
    """One alone has no other to be near to."""
    with pytest.raises(OneClass, match="at least 2 real and 2 forged"):
        triplet_loss(FACES, torch.tensor([False, True, True, True]), 0.3)


def test_the_centre_loss_of_a_case_by_hand():
    """Half the mean of squared distances, each from its own class's centre."""
    centres = torch.tensor([[0.0, 1.0], [0.0, 4.0]])
    found = centre_loss(FACES, FORGED, centres)

    assert found.item() == pytest.approx((9 + 9 + 0 + 0 + 0 + 64 + 4) / 4 / 2)


def test_the_triplet_loss_is_what_a_search_over_all_triplets_finds():
    """The farthest of the same class, the nearest of the other, one face after the other."""
    torch.manual_seed(1)
    features = torch.randn(8, 3)
    forged = torch.arange(8) % 2 == 1
    margin = 0.4 * math.sqrt(3)
    hinges = []
    for a in range(8):
        apart = [(features[a] - features[b]).norm().item() for b in range(8)]
        same = max(d for b, d in enumerate(apart) if forged[b] == forged[a])
        other = min(d for b, d in enumerate(apart) if forged[b] != forged[a])
        hinges.append(max(0.0, same - other + margin))

    assert triplet_loss(features, forged, 0.4).item() == pytest.approx(sum(hinges) / 8)


def made(shape: str, centre: str = "faces") -> FdflObjective:
    """The objective of a tiny FDFL."""
    recipe = tiny("fdfl", **{"loss.shape": shape, "loss.centre": centre})
    torch.manual_seed(0)
    network = build(recipe.network.build, **recipe.network.dimensions)
    found = objective(recipe, network)
    assert isinstance(found, FdflObjective)
    return found


@pytest.mark.parametrize(
    ("shape", "learnt"),
    [("single_centre", [(1, 1280)]), ("centre", [(2, 1280)]), ("triplet", []), ("none", [])],
)
def test_every_shape_trains_beside_cross_entropy(shape: str, learnt: list[tuple[int, ...]]):
    """The paper's loss and those it is compared with; only a centre is learnt."""
    judged = made(shape)
    batch = MadeBatches()[0]
    terms = judged.terms(judged.run(batch.crops), batch, MOMENT)
    terms.total.backward()
    parts = dict(terms.parts)
    cross = parts.pop("bce")

    assert learnt == [tuple(p.shape) for p in judged.learnt()]
    assert all(p.grad is not None and p.grad.any() for p in judged.learnt())
    assert list(parts) == ([] if shape == "none" else [shape])
    torch.testing.assert_close(terms.total, cross + 0.5 * sum(parts.values(), torch.zeros(())))


@pytest.mark.parametrize("shape", ["single_centre", "centre"])
def test_a_centre_starts_at_the_first_batchs_faces(shape: str):
    """Natural ones first, forged ones too where there are two; later batches do not move it so."""
    judged = made(shape)
    first, second = MadeBatches()[0], MadeBatches()[1]
    seen = judged.run(first.crops)
    judged.terms(seen, first, MOMENT)
    means = [seen.embedding[~first.forged].mean(0), seen.embedding[first.forged].mean(0)]
    placed = judged.centre.detach().clone()
    judged.terms(judged.run(second.crops), second, MOMENT)

    torch.testing.assert_close(placed, torch.stack(means[: len(placed)]).detach())
    assert torch.equal(placed, judged.centre)
    assert {"centre", "placed"} == set(judged.state_dict())


def test_a_resumed_run_keeps_its_centre():
    """What the checkpoint holds is not placed anew."""
    judged, resumed = made("single_centre"), made("single_centre")
    batch = MadeBatches()[0]
    judged.terms(judged.run(batch.crops), batch, MOMENT)
    resumed.load_state_dict(judged.state_dict())
    other = MadeBatches()[1]
    resumed.terms(resumed.run(other.crops), other, MOMENT)

    assert torch.equal(judged.centre, resumed.centre)


def test_as_published_the_centre_starts_at_standard_normals():
    """And is not placed."""
    judged = made("single_centre", "random")
    before = judged.centre.detach().clone()
    batch = MadeBatches()[0]
    judged.terms(judged.run(batch.crops), batch, MOMENT)

    assert before.std().item() == pytest.approx(1, abs=0.1)
    assert torch.equal(before, judged.centre)


def test_nonsense_is_refused_when_the_loss_is_made():
    """By name."""
    with pytest.raises(ValidationError, match=r"margin\s+Input should be .* or equal to 0"):
        FdflLoss(margin=-1)
    with pytest.raises(ValidationError, match=r"weight\s+Input should be a finite number"):
        FdflLoss(weight=float("nan"))


def test_the_frequencies_have_a_loss_of_their_own_and_pixels_are_dropped_as_asked():
    """Its weight counts; 0.3 of the batches; a network without that head is refused."""
    own = {"loss.weight_frequencies": "2", "loss.drop_plain": "0.3", "loss.shape": "none"}
    recipe = tiny("fdfl_small", **{"network.alone": "true"}, **own)
    network, batch = make_network(recipe).train(), MadeBatches()[0]
    loss = objective(recipe, network)
    terms = loss.terms(loss.run(batch.crops), batch, MOMENT)
    torch.testing.assert_close(terms.total, terms.parts["bce"] + 2 * terms.parts["bce_frequencies"])
    terms.parts["bce_frequencies"].backward()
    assert network.alone.weight.grad.any() and network.mining.leave.weight.grad.any()
    assert network.fuse.factor.grad is None
    asked: list[bool] = []
    network.streams = lambda crops, *, plain: asked.append(plain)  # type: ignore[method-assign]
    for _ in range(400):
        loss.run(batch.crops)
    assert 0.2 < 1 - sum(asked) / 400 < 0.4
    bare = tiny("fdfl_small", **own)
    with pytest.raises(RecipeError, match=r"network\.alone=true"):
        objective(bare, make_network(bare))


def test_a_plain_classifiers_run_fills_the_pixels_stream(tmp_path: Path):
    """The warm start: the backbone to the bit, the frequencies' part as it was drawn."""
    run = tmp_path / "classifier"
    train(
        tiny("small_classifier", seed="3", **{"schedule.steps": "1", "optimiser.ema": "none"}),
        MadeBatches(), [MadeBatches()[100]], run, data_sha256="d" * 64,
        options=Options(quiet=True),
    )  # fmt: skip
    warm = make_network(tiny("fdfl_small", **{"init.backbone": str(run)}))
    cold = make_network(tiny("fdfl_small"))
    trained = load(run / BEST).part("network")

    for name, tensor in warm.backbone.state_dict().items():
        assert torch.equal(trained[f"backbone.{name}"], tensor), name
    assert torch.equal(cold.mining.leave.weight, warm.mining.leave.weight)
