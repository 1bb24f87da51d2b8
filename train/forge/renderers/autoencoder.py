"""Autoencoder swaps, as Deepfakes and DeepFaceLab make them.

    warped face ─▶ encoder, shared ─▶ code ─▶ decoder of the face's group ─▶ the straight face
    to forge:       a face ─▶ encoder ─▶ code ─▶ decoder of ANOTHER group ─▶ colours, mask, paste

Those tools train one decoder for each of two people.  Here a decoder belongs to a group of faces
that look alike (k-means over small thumbnails), so that it has a look of its own, as a person has.
Each decoder enlarges in its own way: sub-pixel shuffle, transposed convolution, nearest neighbour;
each leaves other traces.
"""

from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from scipy.cluster.vq import kmeans2
from torch import Tensor, nn

from ralf.train.forge.families import ForgeryTask, Joined
from ralf.train.forge.renderers.aligned import (
    Alignment,
    FaceBatch,
    Faces,
    crop_pixels,
    crop_tensor,
)
from ralf.train.forge.renderers.paste import paste
from ralf.train.forge.renderers.renderer import (
    Block,
    Drawn,
    Renderer,
    RendererOptions,
    begin,
    moved,
    upwards,
)
from ralf.train.recipe import Count

THUMBNAIL = 8
WAYS = ("shuffle", "transposed", "nearest")


class AutoencoderOptions(RendererOptions):
    """The autoencoder's choices."""

    decoders: Annotated[int, Field(ge=2, le=16)] = 3
    width: Count = 24
    code: Count = 24
    """Channels of the code, which is an eighth of the face wide and high."""
    alike: bool = True
    """Groups of faces that look alike; False draws groups by chance."""


class Encoder(nn.Module):
    """A face [m, 3, s, s] → its code [m, code, s/8, s/8]."""

    def __init__(self, width: int, code: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for incoming, outgoing in ((3, width), (width, 2 * width), (2 * width, 4 * width)):
            layers += [nn.Conv2d(incoming, outgoing, 5, 2, padding=2), nn.LeakyReLU(0.1)]
        self.layers = nn.Sequential(
            *layers, Block(4 * width), nn.Conv2d(4 * width, code, 3, padding=1)
        )

    def forward(self, faces: Tensor) -> Tensor:
        code: Tensor = self.layers(faces * 2 - 1)
        return code


class Decoder(nn.Module):
    """A code → a face of one group."""

    def __init__(self, width: int, code: int, way: str) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(code, 4 * width, 3, padding=1),
            nn.LeakyReLU(0.1),
            Block(4 * width),
            upwards(4 * width, 3 * width, way),
            Block(3 * width),
            upwards(3 * width, 2 * width, way),
            Block(2 * width),
            upwards(2 * width, width, way),
            nn.Conv2d(width, 3, 3, padding=1),
        )

    def forward(self, code: Tensor) -> Tensor:
        drawn: Tensor = self.layers(code)
        return drawn.float() * 0.5 + 0.5


class Autoencoder(Renderer):
    """One encoder, several decoders."""

    name = "autoencoder"
    Options = AutoencoderOptions
    options: AutoencoderOptions
    centres: Tensor

    def __init__(self, options: RendererOptions) -> None:
        super().__init__(options)
        assert isinstance(options, AutoencoderOptions)
        self.options = options
        self.encoder = Encoder(options.width, options.code)
        self.decoders = nn.ModuleList(
            Decoder(options.width, options.code, WAYS[place % len(WAYS)])
            for place in range(options.decoders)
        )
        begin(self)
        shape = (options.decoders, 3 * THUMBNAIL**2)
        self.register_buffer("centres", torch.zeros(shape))
        # Each training face's group, for training alone.  On the CPU, where batches are chosen.
        self.group = torch.zeros(0, dtype=torch.int64)

    def learn_from(self, faces: Faces) -> None:
        """Put each face into a group."""
        looks = torch.cat([look(part.float() / 255) for part in torch.split(faces.crops, 512)])
        many = self.options.decoders
        if self.options.alike and len(faces) >= 4 * many:
            centres, group = kmeans2(
                looks.cpu().numpy().astype(np.float64), many, minit="++", seed=self.options.seed
            )
        else:
            group = np.random.default_rng(self.options.seed).permutation(len(faces)) % many
            centres = np.stack([looks.cpu().numpy()[group == g].mean(axis=0) for g in range(many)])
        self.centres.copy_(torch.from_numpy(centres))
        self.group = torch.from_numpy(group.astype(np.int64))

    def choose(self, faces: Faces, generator: torch.Generator) -> Tensor:
        """As many faces of each group, group after group."""
        each = max(1, self.options.batch // self.options.decoders)
        chosen = []
        for number in range(self.options.decoders):
            members = torch.nonzero(self.group == number)[:, 0]
            # k-means may leave a group empty: its decoder then learns from everybody.
            members = members if len(members) else torch.arange(len(faces))
            chosen.append(members[torch.randint(len(members), (each,), generator=generator)])
        return torch.cat(chosen)

    def draw(self, batch: FaceBatch, generator: torch.Generator, progress: float) -> Drawn:
        """The straight faces from warped ones, each by its group's decoder."""
        wanted = moved(batch.crops, generator)
        codes = self.encoder(bent(wanted, generator)).chunk(self.options.decoders)
        made = [decode(code) for decode, code in zip(self.decoders, codes, strict=True)]
        return Drawn(torch.cat(made), wanted, oval(wanted))

    def make(self, task: ForgeryTask) -> Joined:
        """The face by the decoder of another group."""
        alignment = Alignment.of(task.face, self.options.size)
        seen = crop_tensor(alignment.cut(task.image))
        own = int((self.centres.float() - look(seen)).square().sum(dim=1).argmin())
        others = [number for number in range(self.options.decoders) if number != own]
        decode = self.decoders[others[task.rng.integers(len(others))]]
        drawn = crop_pixels(decode(self.encoder(seen)))
        return paste(task.image, task.face, alignment, drawn, task.rng)


def look(faces: Tensor) -> Tensor:
    """What groups are made by: a thumbnail, its colours counting as much as its shapes."""
    small = F.interpolate(faces, (THUMBNAIL, THUMBNAIL), mode="area")
    grey = small.mean(dim=1, keepdim=True)
    return torch.cat((grey, 3 * (small - grey)[:, ::2]), dim=1).flatten(1)


def oval(faces: Tensor) -> Tensor:
    """1 on the face, 0.15 around it: that part is never pasted."""
    size = faces.shape[-1]
    y, x = torch.meshgrid(*(torch.linspace(-1, 1, size, device=faces.device),) * 2, indexing="ij")
    inside = 1 - ((x / 0.85) ** 2 + (y / 0.98) ** 2)
    return (inside * 6).sigmoid().mul(0.85).add(0.15).expand(len(faces), 1, size, size)


def bent(faces: Tensor, generator: torch.Generator) -> Tensor:
    """Faces bent by a random field of 5 × 5 knots: the encoder then cannot copy pixels."""
    many, size = len(faces), faces.shape[-1]
    knots = torch.randn(many, 2, 5, 5, generator=generator).to(faces.device) * 0.045
    field = F.interpolate(knots, (size, size), mode="bicubic", align_corners=True)
    straight = torch.eye(2, 3, device=faces.device).expand(many, 2, 3)
    at = F.affine_grid(straight, list(faces.shape), align_corners=False)
    return F.grid_sample(
        faces, at + field.permute(0, 2, 3, 1), "bilinear", "reflection", align_corners=False
    )
