"""A restorer's pass, as GFPGAN and the like make after a swap: face down, and up by a network.

    face ÷ 2 to 4, softened, noisy ─▶ enlarged to half size ─▶ residual blocks at a quarter
         ─▶ sub-pixel shuffle to full size ─▶ + the enlarged input ─▶ pasted back

The network invents the lost texture; what it invents is smooth and regular where skin is not.
"""

from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ralf.train.forge.families import ForgeryTask, Joined
from ralf.train.forge.pixels import Pixels, blur, jpeg, resize
from ralf.train.forge.renderers.aligned import Alignment, FaceBatch, crop_pixels, crop_tensor
from ralf.train.forge.renderers.paste import paste
from ralf.train.forge.renderers.renderer import (
    Block,
    Drawn,
    Renderer,
    RendererOptions,
    begin,
    patches,
    uniform,
)
from ralf.train.recipe import Count

FACTORS = (2.0, 4.0)
CHUNKS = 4
"""A batch is cut into so many parts, each reduced by its own factor."""


class RestorerOptions(RendererOptions):
    """The restorer's choices."""

    size: Annotated[int, Field(ge=32, multiple_of=16)] = 64
    """Side of the patches of faces that it is trained on; it draws faces of any size."""
    width: Count = 40
    blocks: Count = 6


class Restorer(Renderer):
    """A residual network with sub-pixel shuffles."""

    name = "restorer"
    Options = RestorerOptions
    options: RestorerOptions

    def __init__(self, options: RendererOptions) -> None:
        super().__init__(options)
        assert isinstance(options, RestorerOptions)
        self.options = options
        width = options.width
        self.enter = nn.Conv2d(12, width, 3, padding=1)
        self.trunk = nn.Sequential(*(Block(width) for _ in range(options.blocks)))
        self.grow = nn.Sequential(
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.PixelShuffle(2),
            nn.LeakyReLU(0.1),
            nn.Conv2d(width // 2, width, 3, padding=1),
            nn.PixelShuffle(2),
            nn.LeakyReLU(0.1),
        )
        self.leave = nn.Conv2d(width // 4, 3, 3, padding=1)
        begin(self)
        # At first it gives its input, enlarged.
        self.leave.weight.data *= 0.05

    @property
    def side(self) -> int:
        """Faces in about the resolution in which they are pasted."""
        return max(176, self.options.size)

    def forward(self, small: Tensor) -> Tensor:
        """Faces at half size [m, 3, s/2, s/2] → [m, 3, s, s]; s/2 is even."""
        at_quarter = F.pixel_unshuffle(small * 2 - 1, 2)
        entered = self.enter(at_quarter)
        added = self.leave(self.grow(entered + self.trunk(entered)))
        enlarged = F.interpolate(small, scale_factor=2, mode="bicubic", align_corners=False)
        drawn: Tensor = enlarged + added.float()
        return drawn

    def draw(self, batch: FaceBatch, generator: torch.Generator, progress: float) -> Drawn:
        """Patches from reduced ones."""
        wanted = patches(batch.crops, self.options.size, generator)
        parts = [_reduced(part, generator) for part in wanted.chunk(CHUNKS)]
        return Drawn(self(torch.cat(parts)), wanted)

    def make(self, task: ForgeryTask) -> Joined:
        """The face reduced and restored, in the picture's own resolution."""
        rng, alignment = task.rng, Alignment.native(task.face, multiple=16)
        seen = alignment.cut(task.image)
        half = alignment.size // 2
        small = _spoilt(seen, rng.uniform(*FACTORS), rng)
        at_half = np.clip(resize(small, half, half, "bicubic", antialias=False), 0, 255)
        drawn = crop_pixels(self(crop_tensor(at_half)))
        return paste(task.image, task.face, alignment, drawn, rng, colours=False)


def _spoilt(image: Pixels, factor: float, rng: np.random.Generator) -> Pixels:
    """The picture smaller, as a swap's output or a weak upload is."""
    side = max(12, round(image.shape[0] / factor))
    small = resize(blur(image, rng.uniform(0, 0.5) * factor), side, side)
    small = small + rng.normal(0, rng.uniform(0, 3), small.shape).astype(np.float32)
    return jpeg(small, int(rng.integers(60, 96))) if rng.random() < 0.3 else small


def _reduced(faces: Tensor, generator: torch.Generator) -> Tensor:
    """The same in training: reduced by one factor, noisy, at half size."""
    size = faces.shape[-1]
    factor = float(uniform(generator, (), *FACTORS))
    side = max(8, round(size / factor))
    small = F.interpolate(faces, (side, side), mode="bilinear", antialias=True)
    level = uniform(generator, (len(faces), 1, 1, 1), 0, 3 / 255)
    noise = torch.randn(small.shape, generator=generator) * level
    small = (small + noise.to(small.device)).clamp(0, 1)
    return F.interpolate(small, (size // 2, size // 2), mode="bicubic").clamp(0, 1)
