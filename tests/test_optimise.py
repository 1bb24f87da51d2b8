"""Running batch norms: a face alone while training, statistics that follow all the same."""

import torch
from torch import nn

from ralf.train.loop.optimise import RunningBatchNorms


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
