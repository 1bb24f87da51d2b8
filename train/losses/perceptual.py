"""The fixed low-level features that RALF's contrastive loss compares faces in: VGG's first layers.

Five slices, as the authors cut them: relu1_1, relu1_2, conv2_1 before its ReLU, pool2, relu3_2.
VGG16 and VGG19 have the same layers up to there.  Pixels go in as 0..1, without ImageNet's mean
and deviation, again as the authors do.

Weights come from torchvision's hub, or from a safetensors file with torchvision's names; they are
not part of the checkpoint.  Random features (source None) are only for tests of the code; they are
the same each time.
"""

from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from ralf.train.recipe_text import RecipeError

CONVS = {0: (3, 64), 2: (64, 64), 5: (64, 128), 7: (128, 128), 10: (128, 256), 12: (256, 256)}
POOLS = frozenset({4, 9})
ENDS = (2, 4, 6, 10, 14)
"""Where each slice ends, in torchvision's numbering of `features`."""


class Perceptual(nn.Module):
    """VGG's `features`, layers 0 to 13."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        for layer, (incoming, outgoing) in CONVS.items():
            for name, shape in (("weight", (outgoing, incoming, 3, 3)), ("bias", (outgoing,))):
                tensor = _find(weights, f"{layer}.{name}")
                if tensor.shape != shape:
                    raise RecipeError(
                        f"perceptual layer {layer}.{name} should be {shape}, not "
                        f"{tuple(tensor.shape)}: is this torchvision's VGG16 or VGG19?"
                    )
                # Buffers, not parameters: nothing trains them, and no checkpoint holds them.
                self.register_buffer(f"{name}_{layer}", tensor.float(), persistent=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """The five features of images in 0..1, [m, 3, s, s]."""
        features: list[Tensor] = []
        x = images
        for layer in range(ENDS[-1]):
            # In torchvision's order a layer that is no convolution and no pool is a ReLU.
            if layer in CONVS:
                weight, bias = getattr(self, f"weight_{layer}"), getattr(self, f"bias_{layer}")
                x = F.conv2d(x, weight, bias, padding=1)
            else:
                x = F.max_pool2d(x, 2) if layer in POOLS else F.relu(x)
            if layer + 1 in ENDS:
                features.append(x)
        return features


def perceptual(kind: Literal["vgg16", "vgg19"], source: str | None) -> Perceptual:
    """The extractor with weights from `source`: imagenet, a safetensors file, or None."""
    if source is None:
        return Perceptual(_random())
    if source == "imagenet":
        return Perceptual(_from_hub(kind))
    if not Path(source).is_file():
        raise RecipeError(
            f"no perceptual weights at {source}: init.perceptual should be imagenet, none, or a "
            "safetensors file with torchvision's names"
        )
    return Perceptual(load_file(source))


def _find(weights: dict[str, Tensor], name: str) -> Tensor:
    for candidate in (name, f"features.{name}"):
        if candidate in weights:
            return weights[candidate]
    have = ", ".join(sorted(weights)[:4])
    raise RecipeError(f"perceptual weights lack {name} (have: {have}, …)")


def _from_hub(kind: Literal["vgg16", "vgg19"]) -> dict[str, Tensor]:
    from torchvision import models

    try:
        network = models.get_model(kind, weights="IMAGENET1K_V1")
    except OSError as error:
        raise RecipeError(
            f"{kind} could not be fetched from torchvision's hub ({error}): give a file with "
            "--set init.perceptual=FILE, or drop the term with --set weight_con=0"
        ) from error
    return dict(network.features.state_dict())


def _random() -> dict[str, Tensor]:
    # A generator of its own, so that the run's random numbers stay as they are.
    generator = torch.Generator().manual_seed(0)
    weights: dict[str, Tensor] = {}
    for layer, (incoming, outgoing) in CONVS.items():
        # He's scale: features keep their size through the ReLUs.
        scale = (2 / (incoming * 9)) ** 0.5
        weights[f"{layer}.weight"] = (
            torch.randn(outgoing, incoming, 3, 3, generator=generator) * scale
        )
        weights[f"{layer}.bias"] = torch.zeros(outgoing)
    return weights
