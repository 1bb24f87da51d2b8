"""A recipe's network with its first weights.

The backbone may come from timm's hub, from a file in timm's names, or from a training (the folder
of a run, or of a published version).  Then it gets the judged weights of that training, whatever
network they belong to, so that a detector can begin where a plain classifier ended.  Before that,
all of the network may come from a training of the same network.  Several folders may be named, with
commas between: the mean of their weights is taken, which is useful where they began alike.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ralf.kernels.artifact import MANIFEST, open_artifact
from ralf.kernels.engine_torch import restore
from ralf.kernels.manifest import Network, held_out_family
from ralf.kernels.networks import build
from ralf.kernels.networks.backbones import FAMILIES, Backbone, load_backbone
from ralf.train.forge.families import REGISTRY
from ralf.train.loop.checkpoint import CheckpointError, judged, load, weights
from ralf.train.recipe import Recipe, seen_families
from ralf.train.recipe_text import RecipeError, differences

OWNERS = ("backbone.", "classifier.")
"""What our networks call their backbone."""
IMAGENET = "imagenet"
"""The default backbone, from timm's hub.  It does not replace the one of init.network."""


def make_network(recipe: Recipe) -> nn.Module:
    """The recipe's network with its first weights, the same for the same seed."""
    # Seeded here and not once per process, so that every process begins with the same weights.
    torch.manual_seed(recipe.seed)
    network = build(recipe.network.build, **recipe.network.dimensions)
    for named in (recipe.init.network, recipe.init.backbone):
        for folder in map(Path, named.split(",") if named else ()):
            if folder.is_dir():
                _refuse_seen(folder, recipe)
    if recipe.init.network is not None:
        network.load_state_dict(_mean(recipe.init.network, lambda run: _network_of(run, recipe)))
    source = recipe.init.backbone
    # Into a network that is trained already only what judges the crop itself is filled.
    if source is not None and (recipe.init.network is None or source != IMAGENET):
        trained = "initialise_plain" if recipe.init.network is not None else "initialise"
        fill = (
            getattr(network, trained, None)
            or getattr(network, "initialise", None)
            or _fill_backbone(network, recipe)
        )
        with _file(source) as weights:
            fill(weights, source == IMAGENET)
    return network


def backbone_of(folder: Path) -> dict[str, Tensor]:
    """The backbone of a run's or a version's weights, in timm's names."""
    of, trained = trained_weights(folder)
    kind = of.dimensions.get("backbone")
    found = {
        name.removeprefix(owner): tensor
        for owner in OWNERS
        for name, tensor in trained.items()
        if name.startswith(owner)
    }
    if kind not in FAMILIES or not found:
        raise CheckpointError(f"{folder} holds {of.build}: no backbone in it")
    # Into timm's names, so that a training's backbone and timm's own are filled in by one function.
    named = {}
    for name, tensor in found.items():
        part, _, rest = name.partition(".")
        named[f"{FAMILIES[kind].head}.{rest}" if part == "head" else rest] = tensor.contiguous()
    return named


def _network_of(folder: Path, recipe: Recipe) -> dict[str, Tensor]:
    """All weights of a run or a version of the recipe's network."""
    of, trained = trained_weights(folder)
    if of != recipe.network:
        raise CheckpointError(
            f"init.network {folder} holds another network than this recipe's: "
            + "; ".join(differences(of, recipe.network))
        )
    return trained


def _refuse_seen(folder: Path, recipe: Recipe) -> None:
    """RecipeError where the folder's training saw the family that this recipe holds out."""
    held_out = recipe.data.held_out
    # Nothing says which forgeries on disk a training saw: all but the one that it held out.
    made = held_out in REGISTRY
    if (folder / MANIFEST).is_file():
        manifest = open_artifact(folder).manifest
        other = held_out_family(manifest.trained) != held_out
        seen = held_out in seen_families(manifest.trained) if made else other
        seen = seen and not manifest.untrained
    else:
        before = load(judged(folder)).recipe.data
        seen = held_out in before.trained_families if made else held_out != before.held_out
        # A training on reals alone saw no forgery.
        seen = seen and before.pairing != "reals"
    # Weights that were trained on it would carry it into a model whose card calls it unseen.
    if held_out is not None and seen:
        raise RecipeError(
            f"{folder} was trained on {held_out}, which data.held_out leaves out: begin from "
            "weights that held it out too, or hold out another family"
        )


def trained_weights(folder: Path) -> tuple[Network, dict[str, Tensor]]:
    """The network of a run or of a published version, and its judged weights."""
    if (folder / MANIFEST).is_file():
        artifact = open_artifact(folder)
        network = restore(artifact.manifest, artifact.read("weights.safetensors"))
        return artifact.manifest.network, network.state_dict()
    checkpoint = load(judged(folder))
    return checkpoint.recipe.network, weights(checkpoint)


def _mean(named: str, of: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean over the runs that are named; counters, which are no weights, are the first's."""
    runs = [Path(run) for run in named.split(",")]
    first, *rest = [of(run) for run in runs]
    for run, other in zip(runs[1:], rest, strict=True):
        if {name: x.shape for name, x in other.items()} != {n: x.shape for n, x in first.items()}:
            raise CheckpointError(
                f"{run} and {runs[0]} trained different networks: no mean of both"
            )
    return {
        name: torch.stack([tensor, *(other[name] for other in rest)]).mean(0)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in first.items()
    }


@contextmanager
def _file(source: str) -> Iterator[str | None]:
    """The file to fill from; a run's backbone is written out for as long as it is read."""
    if not all(Path(part).is_dir() for part in source.split(",")):
        yield None if source == IMAGENET else source
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{Path(source).name}.safetensors"
        save_file(_mean(source, backbone_of), path)
        yield str(path)


def _fill_backbone(network: nn.Module, recipe: Recipe) -> Callable[[str | None, bool], object]:
    backbone = getattr(network, "backbone", None)
    if not isinstance(backbone, Backbone):
        raise RecipeError(
            f"network {recipe.network.build} has no backbone that {recipe.init.backbone} could "
            "fill: begin from random weights with init.backbone=none, or from a run of the same "
            "network with init.network=RUN"
        )
    return lambda weights, pretrained: load_backbone(backbone, weights, pretrained)
