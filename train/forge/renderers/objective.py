"""What a renderer's drawing is compared by: pixels, structure, VGG16's features, a critic.

The critic is a small patch discriminator with a hinge loss: each of its outputs judges a patch of
about a third of the crop.  Without it and without features a drawing converges to the mean of all
likely faces, which is blurred; a detector would then learn blur.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from ralf.train.forge.renderers.renderer import Drawn, RendererOptions
from ralf.train.losses.perceptual import Perceptual

CRITIC_BEGINS = 0.25
"""When the critic begins, as a share of the training: first the drawing must look like a face."""


class Critic(nn.Module):
    """Patches of a picture [m, 3, h, w] → how real each looks [m, 1, h/4, w/4]."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        widths = (3, width, 2 * width, 4 * width)
        layers: list[nn.Module] = []
        for place, (incoming, outgoing) in enumerate(pairwise(widths)):
            stride = 2 if place < 2 else 1
            convolution = nn.Conv2d(incoming, outgoing, 4, stride, padding=1)
            layers += [spectral_norm(convolution), nn.LeakyReLU(0.2, inplace=True)]
        layers.append(spectral_norm(nn.Conv2d(widths[-1], 1, 3, padding=1)))
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        judged: Tensor = self.layers(images * 2 - 1)
        return judged


@dataclass
class Objective:
    """The terms that a renderer is trained by."""

    options: RendererOptions
    critic: Critic | None
    features: Perceptual | None

    def terms(self, drawn: Drawn, generator: torch.Generator, progress: float) -> dict[str, Tensor]:
        """Each term with its weight; training lowers their sum."""
        made, wanted, weights = drawn.made.float(), drawn.wanted.float(), self.options
        counts = torch.ones_like(wanted[:, :1]) if drawn.where is None else drawn.where
        found = {"l1": weights.l1 * _mean((made - wanted).abs(), counts)}
        if weights.ssim:
            apart = dissimilarity(made, wanted)
            near = F.interpolate(counts, apart.shape[2:], mode="area")
            found["ssim"] = weights.ssim * _mean(apart, near)
        # A quarter of the picture costs a quarter of the time; over steps, all of it is seen.
        part = _quarter(made.shape, generator)
        if self.features is not None and weights.features:
            features = _apart(self.features(made[part]), self.features(wanted[part]))
            found["features"] = weights.features * features
        if self.critic is not None and progress >= CRITIC_BEGINS:
            found["critic"] = -weights.critic * self.critic(made[part]).float().mean()
        return found

    def critic_term(
        self, drawn: Drawn, generator: torch.Generator, progress: float
    ) -> Tensor | None:
        """What the critic lowers; None while it has not begun."""
        if self.critic is None or progress < CRITIC_BEGINS:
            return None
        part = _quarter(drawn.made.shape, generator)
        real = self.critic(drawn.wanted[part]).float()
        made = self.critic(drawn.made.detach()[part]).float()
        return F.relu(1 - real).mean() + F.relu(1 + made).mean()


def dissimilarity(one: Tensor, other: Tensor, side: int = 7) -> Tensor:
    """(1 − SSIM) / 2 at every third pixel, [m, 3, ~h/3, ~w/3]; 0 for equal pictures."""
    # Neighbouring windows overlap, and say nearly the same.

    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, side, 3)

    a, b = mean(one), mean(other)
    spread_a, spread_b = mean(one * one) - a * a, mean(other * other) - b * b
    both = mean(one * other) - a * b
    light, structure = (2 * a * b + 1e-4), (2 * both + 9e-4)
    similar = light * structure / ((a * a + b * b + 1e-4) * (spread_a + spread_b + 9e-4))
    return ((1 - similar) / 2).clamp(0, 1)


def _mean(values: Tensor, counts: Tensor) -> Tensor:
    """The mean over pixels, each as much as it counts."""
    whole: Tensor = (values * counts).sum() / (counts.sum() * values.shape[1]).clamp(min=1)
    return whole


def _quarter(shape: torch.Size, generator: torch.Generator) -> tuple[slice, slice, slice, slice]:
    """A window of half the height and width, anywhere."""
    places = []
    for side in shape[2:]:
        half = max(16, side // 2)
        start = int(torch.randint(max(1, side - half + 1), (1,), generator=generator))
        places.append(slice(start, start + half))
    return (slice(None), slice(None), places[0], places[1])


def _apart(ours: list[Tensor], theirs: list[Tensor]) -> Tensor:
    """The mean difference of features, each layer relative to its own size."""
    parts = [
        (a - b).abs().mean() / b.abs().mean().clamp(min=1e-3)
        for a, b in zip(ours, theirs, strict=True)
    ]
    return torch.stack(parts).mean()
