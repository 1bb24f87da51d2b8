"""Mouth and lower face drawn anew, as lip-sync tools, NeuralTextures and talking heads make them.

    face without its lower part + lines of lips and jaw ─▶ U-Net ─▶ the lower part
    to forge:  the lines as another person's expression has them ─▶ light, hull, paste

The network sees of the lower part only lines: outer lips, opening of the mouth, jaw.  It learns
from faces with a mesh of 468 points, where there are some.  A face with five points gets the mean
mesh, whose mouth is closed: a network that was trained on such faces alone follows lines badly.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image as Picture
from PIL import ImageDraw
from pydantic import Field
from torch import Tensor, nn

from ralf.train.forge.families import ForgeryTask, Joined
from ralf.train.forge.landmarks import (
    CHIN,
    FIVE,
    FaceGeometry,
    Points,
    applied,
    fill,
    fit,
    grown_steadily,
    hull,
)
from ralf.train.forge.mesh import INNER_LIPS, MEAN, expression_of, mesh_of, with_expression
from ralf.train.forge.pixels import Image, Pixels
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

OUTER_LIPS = [61, 146, 91, 181, 84, 17, 314, 405, 321, 375, 291, 409, 270, 269, 267, 0, 37, 39, 40]
OUTER_LIPS += [185]
JAW = [454, 323, 361, 288, 397, 365, 379, 378, 400, 377, 152, 148, 176, 149, 150, 136, 172, 58, 132]
JAW += [93, 234]
NOSE_BRIDGE, NOSE_BASE = 168, 2
LOWER = np.flatnonzero(MEAN[:, 1] > MEAN[NOSE_BASE, 1])
"""The points below the nose: the same ones for each face, or a clip would flicker."""
LINES = (([*OUTER_LIPS, OUTER_LIPS[0]]), ([*INNER_LIPS, INNER_LIPS[0]]), JAW)
"""Each is a plane of what the network sees: lips around, the opening around, ear to ear."""
ROOM = 0.15
"""How much further than the jaw is hidden, in lengths of the face: a jaw may drop, and what is
hidden must not tell where it was."""
REACH = (1.05, 1.3)
"""How much larger than that the hidden part is drawn."""
FINER = 4
"""Lines are drawn so many times larger and then reduced: lips move by less than a pixel."""
FIRST_ROW = 3 / 8
"""Nothing above this part of the crop is hidden."""


class LipSyncOptions(RendererOptions):
    """The lip-sync's choices; 5 million weights at width 32, for 128 px and a GPU."""

    width: Count = 24
    lr: Annotated[float, Field(gt=0)] = 4e-4
    mouth: Annotated[float, Field(ge=0)] = 3.0
    """How much more a pixel at the lips counts than one of the cheeks."""


class LipSync(Renderer):
    """A U-Net at half, quarter, eighth and sixteenth of the crop."""

    name = "lip_sync"
    Options = LipSyncOptions
    options: LipSyncOptions
    speaks = True
    middle = complex(0, 0.75)
    """Lower than others': an opened jaw must lie within the crop."""

    def __init__(self, options: RendererOptions) -> None:
        super().__init__(options)
        assert isinstance(options, LipSyncOptions)
        self.options = options
        widths = [options.width * factor for factor in (1, 2, 4, 8)]
        planes = 4 * (3 + 1 + len(LINES))
        self.enter = nn.Sequential(
            nn.PixelUnshuffle(2), nn.Conv2d(planes, widths[0], 3, padding=1), nn.LeakyReLU(0.1)
        )
        self.down = nn.ModuleList(
            nn.Sequential(nn.Conv2d(wide, wider, 3, 2, padding=1), nn.LeakyReLU(0.1), Block(wider))
            for wide, wider in pairwise(widths)
        )
        self.deepest = Block(widths[-1])
        self.up = nn.ModuleList(
            upwards(wider, wide, "transposed") for wider, wide in pairwise(widths[::-1])
        )
        self.join = nn.ModuleList(
            nn.Sequential(nn.Conv2d(2 * wide, wide, 3, padding=1), nn.LeakyReLU(0.1), Block(wide))
            for wide in widths[-2::-1]
        )
        self.leave = nn.Sequential(nn.Conv2d(widths[0], 12, 3, padding=1), nn.PixelShuffle(2))
        begin(self)
        # At first it draws grey.
        self.leave[0].get_parameter("weight").data *= 0.1
        # The faces to learn from and a sketch of each, for training alone.  On the CPU, where
        # batches are chosen.
        self.known = torch.zeros(0, dtype=torch.int64)
        self.sketches = torch.zeros(0, 1 + len(LINES), options.size, options.size)

    def forward(self, faces: Tensor, hidden: Tensor, lines: Tensor) -> Tensor:
        """Faces [m, 3, s, s], what is hidden of them [m, 1, s, s], lines [m, 3, s, s] → the faces
        with the hidden part drawn."""
        x = self.enter(torch.cat(((faces * 2 - 1) * (1 - hidden), hidden, lines), dim=1))
        beside: list[Tensor] = []
        for down in self.down:
            beside.append(x)
            x = down(x)
        x = self.deepest(x)
        for up, join in zip(self.up, self.join, strict=True):
            x = join(torch.cat((up(x), beside.pop()), dim=1))
        drawn = self.leave(x).float() * 0.5 + 0.5
        whole: Tensor = faces + (drawn - faces) * hidden
        return whole

    def learn_from(self, faces: Faces) -> None:
        """Choose those with a mesh, where there are some, and sketch each.

        Once and not in each step: a sketch takes a millisecond, in which a GPU draws ten faces.
        """
        meshed, size = faces.meshed.cpu(), self.options.size
        self.known = meshed if len(meshed) else torch.arange(len(faces))
        rng = np.random.default_rng(self.options.seed)
        self.sketches = torch.empty(len(self.known), 1 + len(LINES), size, size, dtype=torch.uint8)
        for place, number in enumerate(self.known.tolist()):
            mesh = _mesh(faces.mesh[number].cpu().numpy(), faces.five[number].cpu().numpy())
            told = sketch(mesh, [mesh], size, float(rng.uniform(*REACH)))
            self.sketches[place] = torch.from_numpy(told)

    def choose(self, faces: Faces, generator: torch.Generator) -> Tensor:
        """Faces whose lines are known."""
        places = torch.randint(len(self.known), (self.options.batch,), generator=generator)
        return self.known[places]

    def draw(self, batch: FaceBatch, generator: torch.Generator, progress: float) -> Drawn:
        """Faces with their own lines; what is compared begins above the noses."""
        size = self.options.size
        told = self.sketches[torch.searchsorted(self.known, batch.chosen.cpu())]
        planes = told.to(batch.crops.device).float() / 255
        both = moved(torch.cat((batch.crops, planes), dim=1), generator)
        faces, hidden, lines = torch.tensor_split(both, (3, 4), dim=1)
        made = self(faces, hidden, lines)
        lips = lines[:, :2].amax(dim=1, keepdim=True)
        near = F.max_pool2d(lips, 2 * (size // 24) + 1, stride=1, padding=size // 24)
        counts = hidden * (1 + self.options.mouth * near)
        below = slice(int(size * FIRST_ROW), None)
        return Drawn(made[:, :, below], faces[:, :, below], counts[:, :, below])

    def make(self, task: ForgeryTask) -> Joined:
        """The lower face with the donor's expression; with any where there is no donor."""
        face, rng = task.face, task.rng
        strength, kept = (np.float32(rng.uniform(*of)) for of in ((0.7, 1.2), (0, 0.3)))
        donor = FaceGeometry(face.box, face.five) if task.donor is None else task.donor.face
        before = mesh_of(face)
        after = with_expression(before, strength * expression_of(donor, rng), kept)
        alignment = Alignment.of(face, self.options.size, self.middle)
        seen = alignment.cut(task.image)
        own, new = alignment.to_crop(before), alignment.to_crop(after)
        told = sketch(new, [own, new], alignment.size, float(np.mean(REACH)))
        planes = torch.from_numpy(told)[None].float() / 255
        drawn = crop_pixels(self(crop_tensor(seen), planes[:, :1], planes[:, 1:]))
        part = hull(np.concatenate([before[LOWER], after[LOWER]]))
        return paste(
            task.image, face, alignment, lit_as(drawn, seen, own, new), rng,
            colours=False, softest=15, part=part,
        )  # fmt: skip


def _mesh(mesh: Points, five: Points) -> Points:
    """A face's mesh in its crop; the mean mesh laid over its five points where it has none."""
    return applied(fit(FIVE, five), MEAN) if np.isnan(mesh).any() else mesh


def sketch(shown: Points, lain: Sequence[Points], size: int, reach: float) -> Image:
    """What the network is told: what is hidden, then each of LINES; [4, s, s], 0 to 255.

    The lines are those of the mesh `shown`.  Hidden is all that lies below the noses of `lain`.
    """
    below = np.concatenate([mesh[LOWER] for mesh in lain])
    down = ROOM * (shown[CHIN] - shown[NOSE_BRIDGE])
    polygon = grown_steadily(hull(np.concatenate([below, below + down])), reach)
    planes = np.empty((1 + len(LINES), size, size), np.uint8)
    for place, points in enumerate((polygon, *(shown[line] for line in LINES))):
        canvas = Picture.new("L", (FINER * size, FINER * size))
        pen = ImageDraw.Draw(canvas)
        corners = [(float(x), float(y)) for x, y in (points + 0.5) * FINER - 0.5]
        if place:
            pen.line(corners, fill=255, width=max(1, FINER * size // 64))
        else:
            pen.polygon(corners, fill=255)
        planes[place] = np.asarray(canvas.reduce(FINER))
    planes[0, : int(size * FIRST_ROW)] = 0
    return planes


def lit_as(drawn: Pixels, seen: Pixels, own: Points, new: Points) -> Pixels:
    """The drawn crop with the mean colour that the lower face's skin has in the one that is seen.

    Without the mouth: an open one is darker than a closed one, and the skin would pay for it.
    """
    size = seen.shape[0]
    skin = fill([hull(own[LOWER])], size, size) * fill([hull(new[LOWER])], size, size)
    mouths = fill([grown_steadily(hull(mesh[OUTER_LIPS]), 1.25) for mesh in (own, new)], size, size)
    where = (skin > 0.5) & (mouths < 0.5)
    if where.sum() < 16:  # a profile: next to no skin is left to compare
        return drawn
    return np.asarray(drawn + (seen[where].mean(axis=0) - drawn[where].mean(axis=0)), np.float32)
