"""What a learned renderer is: a network, its options, how it is trained and how it forges.

To add one, write a subclass of Renderer in a file of its own, with its options beside it, and one
line in KINDS in stored.py.  It says three things:

    draw     what it makes of a batch of authentic faces while it is trained, and what it should
             have made; fit.py compares the two and moves the weights
    make     how it forges one face, like a family's function in ralf.train.forge.families
    learn_from   (optional) what it notes about all faces before the first step

A fitted renderer is a ForgeryFamily like any other (`as_family`), so everything that forges by a
family forges by a renderer.  It is trained on the train split's authentic faces alone.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ralf.train.forge.families import ForgeryFamily, ForgeryTask, Joined
from ralf.train.forge.renderers.aligned import MIDDLE, FaceBatch, Faces
from ralf.train.recipe import Count, Part, Positive

Weight = Annotated[float, Field(ge=0)]


class RendererOptions(Part):
    """What all renderers have to choose; each adds its own fields."""

    size: Annotated[int, Field(ge=32, multiple_of=16)] = 96
    """Side in pixels of what the network draws."""
    steps: Annotated[int, Field(ge=0)] = 4000
    batch: Count = 24
    faces: Count = 40_000
    """Most faces that it is trained on, spread evenly over the split: all are held in memory."""
    lr: Positive = 5e-4
    l1: Weight = 1.0
    """Weight of the mean absolute difference."""
    ssim: Weight = 0.3
    """Weight of the structural dissimilarity."""
    features: Weight = 0.02
    """Weight of VGG16's features, where their weights are given."""
    critic: Weight = 0.02
    """Weight of a small patch discriminator, from a quarter of the training on; 0: none."""
    seed: Annotated[int, Field(ge=0)] = 0


@dataclass(frozen=True)
class Drawn:
    """What a renderer drew while training, and what it should have drawn."""

    made: Tensor  # f32 [m, 3, h, w], about 0 to 1
    wanted: Tensor  # f32 [m, 3, h, w], 0 to 1
    where: Tensor | None = None  # f32 [m, 1, h, w]: how much each pixel's difference counts


class Renderer(nn.Module, ABC):
    """A network that draws faces; see the file's head."""

    name: ClassVar[str]
    """Also the method of the forgeries that it makes."""
    Options: ClassVar[type[RendererOptions]] = RendererOptions
    needs_donor: ClassVar[bool] = False
    speaks: ClassVar[bool] = False
    """As in ForgeryFamily."""
    middle: ClassVar[complex] = MIDDLE
    """Where on the mean face the middle of its crops is."""

    def __init__(self, options: RendererOptions) -> None:
        super().__init__()
        self.options = options

    @property
    def side(self) -> int:
        """Side of the aligned faces that it is trained on."""
        return self.options.size

    def begin_from(self, path: Path) -> bool:
        """Take first weights from something else than a renderer's file; False: not known here."""
        return False

    def learn_from(self, faces: Faces) -> None:
        """Note what is needed of all faces, in buffers, before the first step."""

    def choose(self, faces: Faces, generator: torch.Generator) -> Tensor:
        """The places of the faces of one batch."""
        return torch.randint(len(faces), (self.options.batch,), generator=generator)

    @abstractmethod
    def draw(self, batch: FaceBatch, generator: torch.Generator, progress: float) -> Drawn:
        """One training batch; all randomness comes from the generator, which lives on the CPU.

        `progress` goes from 0 to 1 over the training.
        """

    @abstractmethod
    def make(self, task: ForgeryTask) -> Joined:
        """The picture with its face forged; all randomness comes from `task.rng`."""

    def as_family(self) -> ForgeryFamily:
        """The renderer as a way of forging."""
        whole: dict[Any, float] = {"face": 1.0}
        return ForgeryFamily(
            self.name, 1.0, whole, self.needs_donor, False, self._make, self.speaks
        )

    def _make(self, task: ForgeryTask) -> Joined:
        with torch.inference_mode():
            return self.make(task)


def begin(network: nn.Module) -> None:
    """First weights with which signals keep their size through leaky ReLUs; torch's own shrink
    them by a half at each layer, and a deep network then draws one grey for hundreds of steps."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(layer.weight, a=0.1)
            if isinstance(layer, nn.ConvTranspose2d):
                # torch counts its taps as out·k²; each pixel is made of in·k²/4 of them.
                layer.weight.data *= 2 * (layer.out_channels / layer.in_channels) ** 0.5
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    for layer in network.modules():
        if isinstance(layer, Block):
            layer.body[2].get_parameter("weight").data *= 0.1


class Block(nn.Module):
    """Two 3×3 convolutions around an identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.LeakyReLU(0.1, inplace=True),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = x + self.body(x)
        return added


def upwards(incoming: int, outgoing: int, way: str) -> nn.Module:
    """Twice the size."""
    relu = nn.LeakyReLU(0.1, inplace=True)
    if way == "shuffle":
        wide = nn.Conv2d(incoming, 4 * outgoing, 3, padding=1)
        return nn.Sequential(wide, relu, nn.PixelShuffle(2))
    if way == "transposed":
        return nn.Sequential(nn.ConvTranspose2d(incoming, outgoing, 4, 2, padding=1), relu)
    enlarge = nn.Upsample(scale_factor=2, mode="nearest")
    return nn.Sequential(enlarge, nn.Conv2d(incoming, outgoing, 3, padding=1), relu)


def moved(faces: Tensor, generator: torch.Generator) -> Tensor:
    """Faces mirrored by chance, a little turned, scaled and shifted."""
    many = len(faces)
    angle, scale = uniform(generator, (many,), -0.17, 0.17), uniform(generator, (many,), 0.93, 1.07)
    mirror = (torch.rand(many, generator=generator) < 0.5) * -2.0 + 1.0
    place = torch.zeros(many, 2, 3)
    place[:, 0, 0], place[:, 0, 1] = mirror * scale * angle.cos(), scale * angle.sin()
    place[:, 1, 0], place[:, 1, 1] = -mirror * scale * angle.sin(), scale * angle.cos()
    place[:, :, 2] = uniform(generator, (many, 2), -0.06, 0.06)
    at = F.affine_grid(place.to(faces.device), list(faces.shape), align_corners=False)
    return F.grid_sample(faces, at, "bilinear", "reflection", align_corners=False)


def patches(faces: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """A patch of each face, anywhere, mirrored by chance: [m, 3, side, side]."""
    room = faces.shape[-1] - side + 1
    places = torch.randint(room, (len(faces), 2), generator=generator).tolist()
    mirrored = (torch.rand(len(faces), generator=generator) < 0.5).tolist()
    cut = [
        face[:, top : top + side, left : left + side]
        for face, (top, left) in zip(faces, places, strict=True)
    ]
    return torch.stack(
        [patch.flip(-1) if mirror else patch for patch, mirror in zip(cut, mirrored, strict=True)]
    )


def uniform(generator: torch.Generator, shape: tuple[int, ...], low: float, high: float) -> Tensor:
    """Uniform numbers from a generator on the CPU."""
    return torch.rand(shape, generator=generator) * (high - low) + low
