"""The RCL-inspired loss: mining against a search, what is made, the loss by hand, the centre."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from ralf.kernels.networks import build
from ralf.train.loop.initial_weights import make_network
from ralf.train.loop.step import objective
from ralf.train.losses.objective import Moment, OneClass
from ralf.train.losses.rcl import (
    Draws,
    ProjectionCentre,
    RclLoss,
    RclObjective,
    fused_negatives,
    made_positives,
    margin_loss,
    mine,
)
from tests.training import MadeBatches, environment, tiny

MOMENT = Moment(step=3, epoch=0, epochs=1, progress=0.0)
NORTH = torch.tensor([0.0, 1.0])


def directions(*degrees: float) -> Tensor:
    """Unit vectors of the plane, so far from north."""
    angle = torch.tensor(degrees) * math.pi / 180
    return torch.stack((angle.sin(), angle.cos()), 1)


def sphere(count: int, width: int = 6) -> Tensor:
    """Unit vectors in any direction."""
    return F.normalize(torch.randn(count, width), dim=1)


@given(count=st.integers(1, 12), faces=st.integers(1, 9), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_mining_picks_what_a_search_over_all_picks(count: int, faces: int, seed: int):
    """One after the other, the nearest, or farthest, that is left."""
    torch.manual_seed(seed)
    vectors, centre = sphere(faces), sphere(1)[0]
    for nearest in (True, False):
        left, picked = list(range(faces)), []
        while left and len(picked) < count:
            angles = {row: math.acos(float((vectors[row] @ centre).clamp(-1, 1))) for row in left}
            best = (min if nearest else max)(angles, key=lambda row: angles[row])
            picked.append(best)
            left.remove(best)

        assert picked == mine(vectors, centre, count, nearest=nearest).tolist()


def test_a_hard_positive_is_pushed_beyond_its_margin():
    """Farther from the centre on the same side: by nothing at no draw, most at the greatest."""
    hard = directions(30, 60)
    none = made_positives(hard, NORTH, Draws(*torch.zeros(3, 2)), beyond=0.5)
    most = made_positives(hard, NORTH, Draws(*torch.ones(3, 2)), beyond=0.5)
    pushed = F.normalize(NORTH + 1.5 * (hard - NORTH), dim=1)

    torch.testing.assert_close(none[:2], hard)
    torch.testing.assert_close(most[:2], pushed)
    assert (most[:2] @ NORTH < hard @ NORTH).all()


def test_a_mixed_positive_lies_between_two_hard_ones():
    """Half of each is half way."""
    hard = directions(20, 60)
    halves = Draws(*torch.full((3, 2), 0.5))

    torch.testing.assert_close(made_positives(hard, NORTH, halves, 0.5)[2:], directions(40, 40))


def test_a_hard_negative_moves_toward_the_centre_and_stays_its_own():
    """Never more than half of it is the centre."""
    hard = directions(40, 100)
    fused = fused_negatives(hard, NORTH, Draws(*torch.zeros(3, 2)), least=0.5)
    kept = fused_negatives(hard, NORTH, Draws(*torch.ones(3, 2)), least=0.5)

    torch.testing.assert_close(fused, directions(20, 50))
    torch.testing.assert_close(kept, hard)


def test_draws_are_a_function_of_the_step():
    """A resumed run draws what the first would have drawn."""
    cpu = torch.device("cpu")
    one, again, other = (Draws.of(step, 5, cpu) for step in (7, 7, 8))

    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one.beyond, other.beyond)


def test_the_margin_loss_of_a_case_by_hand():
    """Two anchors, one with two positives, one with none: the second does not count."""
    anchors, positives = directions(0, 90), directions(60, 30)
    negatives = directions(90, 120)
    chosen = torch.tensor([[True, True], [False, False]])
    wrong = math.exp(0 / 0.5) + math.exp(-0.5 / 0.5)
    each = []
    for cosine in (0.5, math.sqrt(3) / 2):
        right = math.exp((cosine - 0.1) / 0.5)
        each.append(-math.log(right / (right + wrong)))
    found = margin_loss(anchors, positives, chosen, negatives, temperature=0.5, margin=0.1)

    assert found.item() == pytest.approx(sum(each) / 2, rel=1e-5)


def test_without_positives_the_loss_is_zero_and_not_nan():
    """A batch in which no two are forged alike."""
    anchors = sphere(3).requires_grad_()
    none = torch.zeros(3, 3, dtype=torch.bool)
    loss = margin_loss(anchors, anchors, none, sphere(2), temperature=0.1, margin=0.2)
    loss.backward()

    assert 0 == loss.item()
    assert anchors.grad is not None and not anchors.grad.any()


def test_its_gradient_is_that_of_finite_differences():
    """Through anchors, positives and negatives."""
    torch.manual_seed(0)
    vectors = [torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (3, 5, 4)]
    chosen = torch.rand(3, 5) > 0.4

    assert torch.autograd.gradcheck(
        lambda a, p, n: margin_loss(a, p, chosen, n, temperature=0.5, margin=0.2), vectors
    )


def test_cosines_far_apart_do_not_overflow():
    """At a small temperature e^(s/T) is beyond FP32."""
    anchors = directions(0)
    loss = margin_loss(
        anchors, directions(180), torch.ones(1, 1).bool(), anchors, temperature=0.01, margin=0.2
    )

    assert loss.item() == pytest.approx(220)


def test_the_centre_follows_natural_faces_on_the_sphere():
    """The first batch is its first place; later ones move it by their share."""
    centre = ProjectionCentre(2, momentum=0.75)
    empty = centre.position.clone()
    centre.see(directions(20, 40))
    first = centre.position.clone()
    centre.see(directions(90))
    mean = directions(20, 40).mean(0)

    assert not empty.any()
    torch.testing.assert_close(first, directions(30)[0])
    torch.testing.assert_close(
        centre.position, F.normalize(0.75 * 0.25 * mean + 0.25 * directions(90)[0], dim=0)
    )


RANKED = """
import sys
import torch
from pydantic import ValidationError
from ralf.train.losses.rcl import ProjectionCentre
from ralf.train.loop.distributed import joined
with joined(torch.device("cpu")) as ranks:
    torch.manual_seed(5)
    faces = torch.nn.functional.normalize(torch.randn(3, 7, 4), dim=2)
    centre = ProjectionCentre(4, 0.9)
    for batch in faces:
        # Five natural faces here, two there: a mean of means would weigh them alike.
        centre.see(batch[:5] if ranks.first else batch[5:])
    torch.save(centre.position, f"{sys.argv[1]}/{ranks.rank}.pt")
"""


def test_two_processes_have_the_centre_of_all_their_faces(tmp_path: Path):
    """Sums and counts are those of both, over gloo; each ends where one process would."""
    (tmp_path / "ranked.py").write_text(RANKED)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    said = subprocess.run(
        [sys.executable, *command, str(tmp_path / "ranked.py"), str(tmp_path)],
        env=environment() | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)},
        capture_output=True,
        text=True,
        timeout=450,
    )
    assert said.returncode == 0, said.stderr[-3000:]
    torch.manual_seed(5)
    alone = ProjectionCentre(4, 0.9)
    for batch in F.normalize(torch.randn(3, 7, 4), dim=2):
        alone.see(batch)

    for rank in (0, 1):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), alone.position)


def made(**changes: str) -> RclObjective:
    """The objective of a tiny classifier."""
    recipe = tiny("rcl", **changes)
    torch.manual_seed(0)
    found = objective(recipe, build(recipe.network.build, **recipe.network.dimensions))
    assert isinstance(found, RclObjective)
    return found


def test_it_trains_network_and_projection_together():
    """One joint backward; the centre is no parameter, and lies in the checkpoint."""
    judged = made()
    batch = MadeBatches()[0]
    terms = judged.terms(judged.run(batch.crops), batch, MOMENT)
    terms.total.backward()
    parts = terms.parts

    assert {"bce", "con", "kindred"} == parts.keys()
    assert all(part > 0 for part in parts.values())
    expected = parts["bce"] + 0.2 * (parts["con"] + 0.5 * parts["kindred"])
    torch.testing.assert_close(terms.total, expected)
    assert all(p.grad is not None and p.grad.any() for p in judged.learnt())
    assert "centre.total" in judged.state_dict()
    assert "centre.total" not in dict(judged.named_parameters())


def test_natural_faces_on_their_centre_and_forgeries_opposite_cost_little():
    """What the loss asks for is its minimum; the other way round it is dear."""
    judged = made()
    near, far = directions(0, 5, -5), directions(175, 180, 185)
    draws = Draws.of(0, 5, torch.device("cpu"))
    judged.centre = ProjectionCentre(2, 0.9)
    judged.centre.see(near)
    good = judged._natural(near, far, draws)
    bad = judged._natural(torch.cat((near[:1], far[1:])), near, draws)

    assert good < 0.01
    assert bad > 1


def test_only_those_forged_in_the_same_way_attract_each_other():
    """Two families on two sides: near their own, they cost less than mixed."""
    judged = made()
    forged, natural = directions(90, 92, 180, 182), directions(0)
    apart = judged._kindred(forged, natural, torch.tensor([0, 0, 1, 1]))
    mixed = judged._kindred(forged, natural, torch.tensor([0, 1, 0, 1]))
    alone = judged._kindred(forged, natural, torch.tensor([0, 1, 2, 3]))

    assert apart < mixed
    assert alone == 0


def test_a_batch_of_one_class_is_refused():
    """There is nothing to keep apart."""
    judged = made()
    batch = MadeBatches()[0]
    seen = judged.run(batch.crops)
    object.__setattr__(batch, "forged", torch.ones(8).bool())

    with pytest.raises(OneClass, match="got 0 and 8"):
        judged.terms(seen, batch, MOMENT)


def test_autocast_leaves_it_in_fp32():
    """Cosines at a temperature of a tenth would lose two digits in bf16."""
    judged = made()
    batch = MadeBatches()[0]
    seen = judged.run(batch.crops)
    plain = judged.terms(seen, batch, MOMENT).parts["con"]
    judged.centre.total.zero_()
    with torch.autocast("cpu", torch.bfloat16):
        inside = judged.terms(seen, batch, MOMENT).parts["con"]

    assert torch.equal(plain, inside)


def test_nonsense_is_refused_when_the_loss_is_made():
    """By name."""
    with pytest.raises(ValidationError, match=r"temperature\s+Input should be greater than 0"):
        RclLoss(temperature=0)
    with pytest.raises(ValidationError, match=r"hard\s+Input should be greater than or equal to 1"):
        RclLoss(hard=0)


def test_no_weight_of_detector_or_projection_begins_without_a_gradient():
    """Nothing here is behind a gate that begins shut."""
    recipe = tiny("rcl_small")
    network = make_network(recipe).train()
    loss, batch = objective(recipe, network), MadeBatches()[0]
    loss.terms(loss.run(batch.crops), batch, MOMENT).total.backward()
    named = [*network.named_parameters(), *loss.named_parameters()]

    assert [] == [name for name, p in named if p.grad is None or not p.grad.any()]
