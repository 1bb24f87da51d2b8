"""Running batch norms: a face alone while training, statistics that follow all the same."""

import pytest
import torch
from torch import nn

from ralf.train.loop.optimise import RunningBatchNorms, freeze, optimiser, rate_factors
from ralf.train.recipe import Optimiser
from ralf.train.recipe_text import RecipeError


def small() -> nn.Sequential:
    """A convolution, a norm that has seen something, another convolution."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.1), nn.Conv2d(4, 2, 3))
    network[1].running_mean.normal_()
    network[1].running_var.uniform_(0.5, 2)
    return network.train()


def test_a_face_is_seen_alike_whoever_stands_beside_it():
    """In training mode; a plain batch norm gives its neighbours away."""
    faces = torch.rand(4, 3, 8, 8)
    plain, running = small(), small()
    RunningBatchNorms(running).hold()

    torch.testing.assert_close(running(faces)[:1], running(faces[:1]))
    assert not torch.allclose(plain(faces)[:1], plain(faces[:1]), atol=1e-3)


def test_statistics_follow_the_batches_as_a_plain_norms_would():
    """After the step, not within it: the weights' gradients need what they were computed by."""
    faces = torch.rand(8, 3, 16, 16)
    plain, running = small(), small()
    norms = RunningBatchNorms(running)
    before = running[1].running_mean.clone()
    plain(faces)
    norms.hold()
    running(faces).sum().backward()

    assert torch.equal(before, running[1].running_mean)
    norms.follow()
    torch.testing.assert_close(plain[1].running_mean, running[1].running_mean)
    # the plain one divides by n - 1
    torch.testing.assert_close(plain[1].running_var, running[1].running_var, rtol=1e-3, atol=0)
    norms.follow()
    torch.testing.assert_close(plain[1].running_mean, running[1].running_mean)


def test_large_maps_are_sampled_and_validation_moves_nothing():
    """A fifth of the places is near enough; without gradients nothing is learnt."""
    faces = torch.rand(8, 3, 48, 48)
    plain, running = small(), small()
    norms = RunningBatchNorms(running)
    norms.hold()
    before = running[1].running_mean.clone()
    with torch.no_grad():
        running(faces)
    norms.follow()

    assert torch.equal(before, running[1].running_mean)
    plain(faces)
    running(faces)
    norms.follow()
    assert (plain[1].running_mean - running[1].running_mean).abs().max() < 0.01
    torch.testing.assert_close(plain[1].running_var, running[1].running_var, rtol=0.02, atol=0)


def test_several_batches_of_a_step_count_once_together():
    """As their mean."""
    one, other = torch.rand(8, 3, 16, 16), torch.rand(8, 3, 16, 16)
    apart, together = small(), small()
    norms = RunningBatchNorms(apart)
    norms.hold()
    apart(one)
    apart(other)
    norms.follow()
    together(torch.cat((one, other)))

    torch.testing.assert_close(together[1].running_mean, apart[1].running_mean)


class Parts(nn.Module):
    """A gate, a mask and a head, beside a `gates` that is something else."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.ones(4, 1, 1))
        self.mask = nn.Parameter(torch.zeros(8, 8))
        self.rest = nn.ModuleDict({"head": nn.Linear(4, 2), "gates": nn.Linear(2, 2)})


def groups(network: nn.Module, **choice: object) -> dict[str, tuple[float, float]]:
    """Each parameter's rate and decay, by name."""
    made = Optimiser(lr=1e-3, weight_decay=0.1, **choice)  # type: ignore[arg-type]
    freeze(made, network)
    found = optimiser(made, network, ())
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    return {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in found.param_groups
        for parameter in group["params"]
    }


def test_each_part_has_the_rate_and_the_decay_that_the_recipe_names():
    """A whole part of a dotted name; of two that fit, the last; 0 freezes."""
    network = Parts()
    found = groups(
        network, rates=("gate*20", "mask*0", "rest*0.5", "rest.head*2"), no_decay=("mask", "gate")
    )

    assert {
        "gate": (0.02, 0.0),
        "rest.head.weight": (0.002, 0.1),
        "rest.head.bias": (0.002, 0.0),
        "rest.gates.weight": (0.0005, 0.1),
        "rest.gates.bias": (0.0005, 0.0),
    } == found
    assert not network.mask.requires_grad and network.gate.requires_grad


def test_without_rates_the_groups_are_those_of_older_runs():
    """Decayed first, then spared: stored moments are numbered in this order."""
    network = Parts()
    found = optimiser(Optimiser(weight_decay=0.1), network, ())

    assert [0.1, 0.0] == [group["weight_decay"] for group in found.param_groups]
    assert [3, 3] == [len(group["params"]) for group in found.param_groups]
    assert found.param_groups[0]["params"][0] is network.gate


def test_a_rate_of_no_part_is_refused():
    with pytest.raises(RecipeError, match=r"names 'gats', .* it has gate, mask, rest"):
        rate_factors(Optimiser(rates=("gats*20",)), Parts())
    for wrong in ("gate", "gate*", "*2", "gate*-1", "gate*nan"):
        with pytest.raises(ValueError, match=r"PART\*FACTOR"):
            Optimiser(rates=(wrong,))
