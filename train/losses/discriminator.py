"""RALF's opponent in training: tells photographs of real faces from reconstructions.

It is thrown away afterwards.  Its logit is of "is a real photograph", the one place where real
is the positive answer, because equations 7 and 8 are written so.
"""

import math

import torch.nn.functional as F
from torch import Tensor, nn


def discriminator_loss(on_real: Tensor, on_rebuilt: Tensor) -> Tensor:
    """Equation 7 on logits of "is a real photograph"; no reals: their half is zero."""
    real = F.softplus(-on_real).sum() / max(1, on_real.numel())
    return real + F.softplus(on_rebuilt).mean()


def adversarial_loss(on_rebuilt: Tensor) -> Tensor:
    """Equation 8: every reconstruction should pass for real."""
    return F.softplus(-on_rebuilt).mean()


class Discriminator(nn.Module):
    """DCGAN's: 4×4 convolutions of stride 2, 8 to 256 channels at 256², then one logit.

    [R] No batch norm on the first layer, as DCGAN's authors advise.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = 3
        for level in range(max(1, int(math.log2(size / 4)))):
            wider = min(8 * 2**level, 256)
            layers.append(nn.Conv2d(width, wider, 4, stride=2, padding=1, bias=level == 0))
            layers += [nn.BatchNorm2d(wider)] if level else []
            layers.append(nn.LeakyReLU(0.2))
            width = wider
        self.body = nn.Sequential(*layers, nn.Conv2d(width, 1, 4))
        self.apply(_dcgan_init)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [m] of "is a real photograph"."""
        return self.body(images).float().flatten(1).mean(1)


def _dcgan_init(layer: nn.Module) -> None:
    if isinstance(layer, nn.Conv2d):
        nn.init.normal_(layer.weight, 0.0, 0.02)
    elif isinstance(layer, nn.BatchNorm2d):
        nn.init.normal_(layer.weight, 1.0, 0.02)
