"""A recipe's network with its first weights.

The backbone may come from timm's hub, from a file in timm's names, or from a run of ours: then it
takes that run's judged weights, whatever network they belong to, so that a detector can begin
where its classifier alone ended.  Before that, all of the network may come from a run of ours.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from kernels.networks import build
from train.recipe import Recipe
from train.recipe_text import differences

OWNERS = ("backbone.", "classifier.")
"""What networks of ours call their backbone."""


def make_network(recipe: Recipe) -> nn.Module:
    """The recipe's network with its first weights, the same for the same seed."""
    torch.manual_seed(recipe.seed)
    network = build(recipe.network.build, **recipe.network.dimensions)
    if recipe.init.network is not None:
        _go_on(network, recipe, Path(recipe.init.network))
    source = recipe.init.backbone
    if source is not None:
        fill = getattr(network, "initialise", None) or _fill_backbone(network)
        with _file(source) as weights:
            fill(weights, source == "imagenet")
    return network


def _go_on(network: nn.Module, recipe: Recipe, run: Path) -> None:
    """All weights of a run that trained the same network."""
    from train.checkpoint import CheckpointError, load
    from train.publish import judged, weights

    checkpoint = load(judged(run))
    theirs, mine = checkpoint.recipe.network, recipe.network
    if theirs != mine:
        raise CheckpointError(
            f"init.network {run} trained another network than this recipe's: "
            + "; ".join(differences(theirs, mine))
        )
    network.load_state_dict(weights(checkpoint))


@contextmanager
def _file(source: str) -> Iterator[str | None]:
    """The file to fill from; a run's backbone is written out for as long as it is read."""
    if not Path(source).is_dir():
        yield None if source == "imagenet" else source
        return
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{Path(source).name}.safetensors"
        save_file(backbone_of(Path(source)), path)
        yield str(path)


def backbone_of(run: Path) -> dict[str, Tensor]:
    """The backbone of a run's judged weights, in timm's names."""
    from kernels.networks.backbones import FAMILIES
    from train.checkpoint import CheckpointError, load
    from train.publish import judged, weights

    checkpoint = load(judged(run))
    kind = checkpoint.recipe.network.dimensions.get("backbone")
    found = {
        name.removeprefix(owner): tensor
        for owner in OWNERS
        for name, tensor in weights(checkpoint).items()
        if name.startswith(owner)
    }
    if kind not in FAMILIES or not found:
        raise CheckpointError(f"{run} trained {checkpoint.recipe.network.build}: no backbone in it")
    named = {}
    for name, tensor in found.items():
        part, _, rest = name.partition(".")
        named[f"{FAMILIES[kind].head}.{rest}" if part == "head" else rest] = tensor.contiguous()
    return named


def _fill_backbone(network: nn.Module) -> Callable[[str | None, bool], object]:
    from kernels.networks.backbones import Backbone, load_backbone

    backbone = network.backbone
    assert isinstance(backbone, Backbone)
    return lambda weights, pretrained: load_backbone(backbone, weights, pretrained)
