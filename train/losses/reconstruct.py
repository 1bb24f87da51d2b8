"""Pre-training of RALF's reconstructor: real faces alone, frequencies taken out and given back.

    crops ─▶ patches ─▶ DCT ─▶ × mask ─▶ inverse DCT ─▶ reconstructor ─▶ compared, band by band
                               rings at first: a band drawn for each patch is taken out whole;
                               then more and more patches with the mask of the detector

The reconstructor is convolutional, so it learns on small squares what it does on whole crops.  The
loss is, band by band, the energy of the error over the energy that was removed: otherwise the low
frequencies, a thousand times as strong, would be all that it learns.  Absolute differences were
tried in place of energies: after 4,500 patches nothing was restored at all, since as long as signs
cannot be told the least absolute error is to add nothing.

On the patches with the detector's mask it also measures how far real faces are from their
reconstruction, by band and colour: the detector divides its residuals by that.

Validation reports, band by band, which share of the removed energy is given back: 1 is a perfect
reconstruction, 0 is what the destroyed picture already was, and less than 0 is worse than that.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from ralf.kernels.dct import CENTRE, dct2, idct2
from ralf.kernels.networks.backbones import unit
from ralf.kernels.networks.bands import EDGES, bands, fixed_mask, in_fp32, levels
from ralf.train.loop.distributed import Compute
from ralf.train.losses.objective import Batch, Judgement, Moment, Objective, Terms, with_bands
from ralf.train.recipe import Count, Loss, Recipe, Share
from ralf.train.recipe_text import RecipeError

LOWEST, HIGHEST = EDGES[0], 300.0
"""Between these levels a ring begins."""
NARROW, WIDE = 1.3, 4.0
"""Where a ring ends over where it begins."""
UNTOUCHED = 0.01
"""The share of its own energy that a band's error is held against where nothing was removed."""
MOMENTUM = 0.99
"""How slowly the measured deviations follow."""


class ReconstructLoss(Loss):
    """Give real faces the frequencies back that were taken out."""

    kind: Literal["reconstruct"] = "reconstruct"
    patch: Annotated[int, Field(ge=32, multiple_of=4)] = 128
    """Side of the squares that are cut out of each crop."""
    patches: Count = 4
    """How many of each crop and step."""
    rings: Share = 0.5
    """The share of the training that has ring masks alone."""
    ramp: Share = 0.3
    """The share after it in which the detector's mask takes over; the rest has that mask alone."""


def ring_masks(level: Tensor, draws: Tensor) -> Tensor:
    """A mask for each row of draws [n, 2] of 0..1: a ring of levels is 0, all else is 1."""
    low = LOWEST * (HIGHEST / LOWEST) ** draws[:, 0]
    high = low * NARROW * (WIDE / NARROW) ** draws[:, 1]
    inside = (level >= low[:, None, None]) & (level < high[:, None, None])
    return (~inside).float()


def destroyed_by(image: Tensor, masks: Tensor) -> Tensor:
    """Images of 0..1 [n, 3, p, p] by a mask each [n, p, p], as ralf.kernels.dct defines it."""
    kept = idct2(dct2(image - CENTRE) * masks[:, None])
    return kept + CENTRE * masks[:, None, :1, :1]


@dataclass(frozen=True)
class Restored:
    """How much of the removed energy is given back, by band from low to high."""

    faces: int
    by_mask: tuple[float, ...]
    """Where the detector's mask took it."""
    by_ring: tuple[float, ...]
    """Where the whole band was taken out, and nothing else."""

    def facts(self) -> dict[str, float | int | str | None]:
        """For the log."""
        found: dict[str, float | int | str | None] = {"faces": self.faces}
        for name, shares in (("mask", self.by_mask), ("ring", self.by_ring)):
            found |= {f"restored_{name}_{band + 1}": x for band, x in enumerate(shares)}
        return found

    def figure(self, select: str) -> float:
        """The figure that chooses the best weights; higher is better."""
        return sum(self.by_mask) / len(self.by_mask)

    @property
    def said(self) -> str:
        """For the terminal."""
        mask, ring = ("/".join(f"{x:.0%}" for x in each) for each in (self.by_mask, self.by_ring))
        return f"energy restored {mask} by the detector's mask, {ring} of whole bands"


class ReconstructObjective(Objective):
    """Over RALF's network with sees=bands; only its reconstructor learns."""

    options = ReconstructLoss
    makes_detector = False
    total: Tensor
    weight: Tensor
    level: Tensor
    groups: Tensor
    mask: Tensor

    def __init__(self, recipe: Recipe, network: nn.Module) -> None:
        super().__init__(recipe, network)
        assert isinstance(recipe.loss, ReconstructLoss)
        self.loss = recipe.loss
        side, size = self.loss.patch, with_bands(network, self.loss.kind).size
        if side > size:
            raise RecipeError(f"loss.patch {side} should be at most network.size {size}")
        dimensions = recipe.network.dimensions
        mask = fixed_mask(side, dimensions.get("keeps", 0.0), dimensions.get("leaves", 0.5))
        level, own = levels(side), bands(side)
        # The levels below the bands are a group of the loss too, or the colours would drift.
        groups = torch.cat(((level < EDGES[0])[None].float(), own))
        for name, tensor in (("level", level), ("groups", groups), ("mask", mask.sigmoid())):
            self.register_buffer(name, tensor, persistent=False)
        self.register_buffer("total", torch.zeros(len(EDGES), 3))
        self.register_buffer("weight", torch.zeros(()))

    def run(self, crops: Tensor) -> Tensor:
        """The crops themselves: which masks they get depends on the moment."""
        return crops

    def terms(self, seen: Tensor, batch: Batch, moment: Moment) -> Terms:
        """Each band's error, and their mean."""
        place = torch.Generator().manual_seed(moment.step)
        image = self._patches(seen, place)
        with in_fp32(image.device.type):
            masks, ours = self._masks(len(image), moment.progress, place)
            destroyed = destroyed_by(image, masks)
        rebuilt = self.network.reconstructor(destroyed).image
        with in_fp32(image.device.type):
            error = dct2(rebuilt.float() - image)
            left, gone, whole = (
                self._energy(spectrum)
                for spectrum in (error, dct2(destroyed - image), dct2(image - CENTRE))
            )
            # A band of which nothing was removed must still be left as it is.
            each = left / (gone + UNTOUCHED * whole).clamp(min=1e-9)
            self._measure(error.detach()[ours])
        names = ("below", *(f"band_{band + 1}" for band in range(len(EDGES))))
        parts = dict(zip(names, each, strict=True))
        return Terms(each.mean(), parts, seen.new_zeros(len(seen), dtype=torch.float32))

    def _energy(self, spectra: Tensor) -> Tensor:
        """Of spectra [n, 3, p, p] in each group of levels, [groups]."""
        return torch.einsum("gvu,vu->g", self.groups, spectra.square().mean((0, 1)))

    def _patches(self, crops: Tensor, place: torch.Generator) -> Tensor:
        """Squares of each crop at places of their own, 0..1."""
        side, most = self.loss.patch, crops.shape[-1] - self.loss.patch + 1
        cut = []
        for crop in crops:
            for top, left in torch.randint(most, (self.loss.patches, 2), generator=place).tolist():
                cut.append(crop[:, top : top + side, left : left + side])
        return unit(torch.stack(cut))

    def _masks(self, count: int, progress: float, place: torch.Generator) -> tuple[Tensor, Tensor]:
        """A mask for each patch, and which of them are the detector's."""
        loss, device = self.loss, self.mask.device
        done = (progress - loss.rings) / max(loss.ramp, 1e-6)
        draws = torch.rand(count, 3, generator=place).to(device)
        ours = draws[:, 2] < min(1.0, max(0.0, done))
        rings = ring_masks(self.level, draws[:, :2])
        return torch.where(ours[:, None, None], self.mask, rings), ours

    @torch.no_grad()
    def _measure(self, error: Tensor) -> None:
        """Take the residuals' spectra [n, 3, p, p] into the deviations that the network keeps."""
        if not len(error):
            return
        power = torch.einsum("gvu,ncvu->gc", self.groups[1:], error.square())
        # By Parseval the mean square of the band's pixels.
        mean = power / (len(error) * self.loss.patch**2)
        self.total.mul_(MOMENTUM).add_((1 - MOMENTUM) * mean)
        self.weight.mul_(MOMENTUM).add_(1 - MOMENTUM)
        self.network.bands.deviation.copy_((self.total / self.weight).sqrt())

    @torch.no_grad()
    def judge(
        self, weights: dict[str, Tensor] | None, batches: Iterable[Batch], compute: Compute
    ) -> Judgement:
        """The share of removed energy that is given back to the middle of each real face."""
        prefix, network = "reconstructor.", self.network
        named = (weights or {}).items()
        own = {k.removeprefix(prefix): x for k, x in named if k.startswith(prefix)}
        masks = torch.cat((self.mask[None], 1 - self.groups[1:]))
        # Per mask and band, removed and left; and the faces.
        sums = torch.zeros(2, len(masks), len(EDGES), device=compute.device, dtype=torch.float64)
        faces = torch.zeros((), device=compute.device)
        for batch in compute.share(batches):
            if bool(batch.forged.all()):
                continue
            image = unit(_middle(batch.crops[~batch.forged].to(compute.device), self.loss.patch))
            faces += len(image)
            for row, mask in enumerate(masks):
                destroyed = destroyed_by(image, mask.expand(len(image), -1, -1))
                with compute.autocast():
                    rebuilt = functional_call(network.reconstructor, own, (destroyed,)).image
                for place, picture in enumerate((destroyed, rebuilt.float())):
                    power = dct2(picture - image).double().square().sum((0, 1))
                    sums[place, row] += torch.einsum("gvu,vu->g", self.groups[1:].double(), power)
        removed, left = compute.ranks.total(sums)
        share = (1 - left / removed.clamp(min=1e-12)).cpu()
        rings = tuple(float(share[band + 1, band]) for band in range(len(EDGES)))
        return Restored(int(compute.ranks.total(faces)), tuple(map(float, share[0])), rings)


def _middle(crops: Tensor, side: int) -> Tensor:
    start = (crops.shape[-1] - side) // 2
    return crops[..., start : start + side, start : start + side]
