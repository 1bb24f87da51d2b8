"""A recipe's network with its first weights."""

from collections.abc import Callable

import torch
from torch import nn

from kernels.networks import build
from train.recipe import Recipe


def make_network(recipe: Recipe) -> nn.Module:
    """The recipe's network with its first weights, the same for the same seed."""
    torch.manual_seed(recipe.seed)
    network = build(recipe.network.build, **recipe.network.dimensions)
    source = recipe.init.backbone
    if source is not None:
        fill = getattr(network, "initialise", None) or _fill_backbone(network)
        fill(None if source == "imagenet" else source, source == "imagenet")
    return network


def _fill_backbone(network: nn.Module) -> Callable[[str | None, bool], object]:
    from kernels.networks.backbones import Backbone, load_backbone

    backbone = network.backbone
    assert isinstance(backbone, Backbone)
    return lambda weights, pretrained: load_backbone(backbone, weights, pretrained)
