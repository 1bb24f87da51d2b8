"""Pre-training without labels: real faces alone, frequencies taken out and given back.

Of RALF's reconstructor:

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

Of a classifier's backbone (loss.kind=masked), before it sees a label: the same rings, but it is the
backbone that sees the destroyed patch, and its last maps must say what is missing.  A 1 × 1
convolution gives the pixels of each place, of which the frequencies that were removed are taken:
only these are judged.  It is thrown away afterwards, and a classifier begins with `init.backbone` =
that run.

Validation reports, band by band, which share of the removed energy is given back: 1 is a perfect
reconstruction, 0 is what the destroyed picture already was, and less than 0 is worse than that.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from ralf.kernels.dct import CENTRE, dct2, idct2
from ralf.kernels.networks.backbones import Backbone, dtype_of, unit
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
USUAL = 3.0
"""A coefficient's usual size in pictures of 0..1, times its level: natural pictures have amplitudes
of one over the frequency, so a decoder that gives this times a number near 1 need not learn it."""
MOMENTUM = 0.99
"""How slowly the measured deviations follow."""


class PatchLoss(Loss):
    """What is cut out of the crops."""

    patch: Annotated[int, Field(ge=32, multiple_of=4)] = 128
    """Side of the squares that are cut out of each crop."""
    patches: Count = 4
    """How many of each crop and step."""


class MaskedLoss(PatchLoss):
    """Let a backbone find the frequencies that were taken out of real faces."""

    kind: Literal["masked"] = "masked"
    patches: Count = 1


class ReconstructLoss(PatchLoss):
    """Give real faces the frequencies back that were taken out."""

    kind: Literal["reconstruct"] = "reconstruct"
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
    by_ring: tuple[float, ...]
    """Where the whole band was taken out, and nothing else."""
    by_mask: tuple[float, ...] = ()
    """Where the detector's mask took it; () where there is no such mask."""

    def facts(self) -> dict[str, float | int | str | None]:
        """For the log."""
        found: dict[str, float | int | str | None] = {"faces": self.faces}
        for name, shares in (("mask", self.by_mask), ("ring", self.by_ring)):
            found |= {f"restored_{name}_{band + 1}": x for band, x in enumerate(shares)}
        return found

    def figure(self, select: str) -> float:
        """The figure that chooses the best weights; higher is better."""
        shares = self.by_mask or self.by_ring
        return sum(shares) / len(shares)

    @property
    def said(self) -> str:
        """For the terminal."""
        mask, ring = ("/".join(f"{x:.0%}" for x in each) for each in (self.by_mask, self.by_ring))
        by_mask = f"{mask} by the detector's mask, " if mask else ""
        return f"energy restored {by_mask}{ring} of whole bands"


class Restoring(Objective):
    """What both trainings have in common; each says what restores, and which masks it takes."""

    makes_detector = False
    level: Tensor
    groups: Tensor

    def __init__(self, recipe: Recipe, network: nn.Module, size: int) -> None:
        super().__init__(recipe, network)
        assert isinstance(recipe.loss, PatchLoss)
        self.patch, self.patches = recipe.loss.patch, recipe.loss.patches
        if self.patch > size:
            raise RecipeError(f"loss.patch {self.patch} should be at most network.size {size}")
        level, own = levels(self.patch), bands(self.patch)
        # The levels below the bands are a group of the loss too, or the colours would drift.
        groups = torch.cat(((level < EDGES[0])[None].float(), own))
        for name, tensor in (("level", level), ("groups", groups)):
            self.register_buffer(name, tensor, persistent=False)

    def restore(
        self, destroyed: Tensor, masks: Tensor, weights: dict[str, Tensor] | None = None
    ) -> Tensor:
        """The pictures [n, 3, p, p] with the frequencies again that the masks [n, p, p] took, by
        those weights of the network or its own."""
        raise NotImplementedError

    def masks(
        self, count: int, progress: float, place: torch.Generator
    ) -> tuple[Tensor, Tensor | None]:
        """A mask for each patch, and which of them are the detector's, if it has one: rings."""
        draws = torch.rand(count, 2, generator=place).to(self.level.device)
        return ring_masks(self.level, draws), None

    def run(self, crops: Tensor) -> Tensor:
        """The crops themselves: which masks they get depends on the moment."""
        return crops

    def terms(self, seen: Tensor, batch: Batch, moment: Moment) -> Terms:
        """Each band's error, and their mean."""
        place = torch.Generator().manual_seed(moment.step)
        image = self._patches(seen, place)
        with in_fp32(image.device.type):
            masks, ours = self.masks(len(image), moment.progress, place)
            destroyed = destroyed_by(image, masks)
        rebuilt = self.restore(destroyed, masks)
        with in_fp32(image.device.type):
            error = dct2(rebuilt.float() - image)
            left, gone, whole = (
                self._energy(spectrum)
                for spectrum in (error, dct2(destroyed - image), dct2(image - CENTRE))
            )
            # A band of which nothing was removed must still be left as it is.
            each = left / (gone + UNTOUCHED * whole).clamp(min=1e-9)
            if ours is not None:
                self.measure(error.detach()[ours])
        names = ("below", *(f"band_{band + 1}" for band in range(len(EDGES))))
        parts = dict(zip(names, each, strict=True))
        return Terms(each.mean(), parts, seen.new_zeros(len(seen), dtype=torch.float32))

    def _energy(self, spectra: Tensor) -> Tensor:
        """Of spectra [n, 3, p, p] in each group of levels, [groups]."""
        return torch.einsum("gvu,vu->g", self.groups, spectra.square().mean((0, 1)))

    def _patches(self, crops: Tensor, place: torch.Generator) -> Tensor:
        """Squares of each crop at places of their own, 0..1."""
        side, most = self.patch, crops.shape[-1] - self.patch + 1
        cut = []
        for crop in crops:
            for top, left in torch.randint(most, (self.patches, 2), generator=place).tolist():
                cut.append(crop[:, top : top + side, left : left + side])
        return unit(torch.stack(cut))

    def measure(self, error: Tensor) -> None:
        """Take in the errors' spectra [n, 3, p, p] of patches with the detector's mask."""

    def judged_masks(self) -> Tensor:
        """The masks that validation takes: each whole band."""
        return 1 - self.groups[1:]

    @torch.no_grad()
    def judge(
        self, weights: dict[str, Tensor] | None, batches: Iterable[Batch], compute: Compute
    ) -> Judgement:
        """The share of removed energy that is given back to the middle of each real face."""
        masks, training = self.judged_masks(), self.network.training
        self.network.eval()
        # Per mask and band, removed and left; and the faces.
        sums = torch.zeros(2, len(masks), len(EDGES), device=compute.device, dtype=torch.float64)
        faces = torch.zeros((), device=compute.device)
        for batch in compute.share(batches):
            if bool(batch.forged.all()):
                continue
            image = unit(_middle(batch.crops[~batch.forged].to(compute.device), self.patch))
            faces += len(image)
            for row, mask in enumerate(masks):
                each = mask.expand(len(image), -1, -1)
                destroyed = destroyed_by(image, each)
                with compute.autocast():
                    rebuilt = self.restore(destroyed, each, weights)
                for place, picture in enumerate((destroyed, rebuilt.float())):
                    power = dct2(picture - image).double().square().sum((0, 1))
                    sums[place, row] += torch.einsum("gvu,vu->g", self.groups[1:].double(), power)
        self.network.train(training)
        removed, left = compute.ranks.total(sums)
        share = (1 - left / removed.clamp(min=1e-12)).cpu()
        # The masks of whole bands are the last ones.
        first = len(masks) - len(EDGES)
        rings = tuple(float(share[first + band, band]) for band in range(len(EDGES)))
        by_mask = tuple(map(float, share[0])) if first else ()
        return Restored(int(compute.ranks.total(faces)), rings, by_mask)


class ReconstructObjective(Restoring):
    """Over RALF's network with sees=bands; only its reconstructor learns."""

    options = ReconstructLoss
    total: Tensor
    weight: Tensor
    mask: Tensor

    def __init__(self, recipe: Recipe, network: nn.Module) -> None:
        assert isinstance(recipe.loss, ReconstructLoss)
        super().__init__(recipe, network, with_bands(network, recipe.loss.kind).size)
        self.loss = recipe.loss
        dimensions = recipe.network.dimensions
        mask = fixed_mask(self.patch, dimensions.get("keeps", 0.0), dimensions.get("leaves", 0.5))
        self.register_buffer("mask", mask.sigmoid(), persistent=False)
        self.register_buffer("total", torch.zeros(len(EDGES), 3))
        self.register_buffer("weight", torch.zeros(()))

    def restore(
        self, destroyed: Tensor, masks: Tensor, weights: dict[str, Tensor] | None = None
    ) -> Tensor:
        """By the reconstructor, which is not told what was taken."""
        prefix = "reconstructor."
        named = (weights or {}).items()
        own = {k.removeprefix(prefix): x for k, x in named if k.startswith(prefix)}
        rebuilt: Tensor = functional_call(self.network.reconstructor, own, (destroyed,)).image
        return rebuilt

    def masks(self, count: int, progress: float, place: torch.Generator) -> tuple[Tensor, Tensor]:
        """Rings at first, then more and more often the detector's mask."""
        loss, device = self.loss, self.mask.device
        done = (progress - loss.rings) / max(loss.ramp, 1e-6)
        draws = torch.rand(count, 3, generator=place).to(device)
        ours = draws[:, 2] < min(1.0, max(0.0, done))
        rings = ring_masks(self.level, draws[:, :2])
        return torch.where(ours[:, None, None], self.mask, rings), ours

    @torch.no_grad()
    def measure(self, error: Tensor) -> None:
        """Take them into the deviations that the network keeps."""
        if not len(error):
            return
        power = torch.einsum("gvu,ncvu->gc", self.groups[1:], error.square())
        # By Parseval the mean square of the band's pixels.
        mean = power / (len(error) * self.patch**2)
        self.total.mul_(MOMENTUM).add_((1 - MOMENTUM) * mean)
        self.weight.mul_(MOMENTUM).add_(1 - MOMENTUM)
        self.network.bands.deviation.copy_((self.total / self.weight).sqrt())

    def judged_masks(self) -> Tensor:
        """The detector's, then each whole band."""
        return torch.cat((self.mask[None], super().judged_masks()))


class LastMaps(nn.Module):
    """A backbone's last maps, as they are before the pooling."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, image: Tensor) -> Tensor:
        """Of images about 0..1."""
        stem = self.backbone.stem
        maps: Tensor = self.backbone.rest(stem((image * 2 - 1).to(dtype_of(stem))))
        return maps


class MaskedObjective(Restoring):
    """Over a network whose backbone sees plain crops: it learns, and a decoder with it."""

    options = MaskedLoss

    def __init__(self, recipe: Recipe, network: nn.Module) -> None:
        super().__init__(recipe, network, recipe.data.input.size)
        backbone = getattr(network, "backbone", None)
        if not isinstance(backbone, Backbone):
            raise RecipeError(
                "loss.kind=masked trains network.backbone, and this network has none: "
                "network.build=classifier has"
            )
        stride = self._stride(backbone)
        self.decoder = nn.Sequential(
            nn.Conv2d(backbone.width, 3 * stride**2, 1), nn.PixelShuffle(stride)
        )
        # At first it adds nothing, which is better than random frequencies.
        for parameter in self.decoder.parameters():
            nn.init.zeros_(parameter)

    def _stride(self, backbone: Backbone) -> int:
        """How many pixels a place of the last maps stands for."""
        blank = torch.zeros(1, 3, self.patch, self.patch, device=backbone.head.weight.device)
        training = backbone.training
        # In training mode a blank picture would move the norms' statistics.
        with torch.no_grad():
            places = int(LastMaps(backbone.eval())(blank).shape[-1])
        backbone.train(training)
        if self.patch % places:
            raise RecipeError(
                f"loss.patch {self.patch} should be a multiple of what the backbone reduces it by, "
                "mostly 32"
            )
        return self.patch // places

    def learnt(self) -> Iterable[nn.Parameter]:
        """The decoder."""
        return self.decoder.parameters()

    def restore(
        self, destroyed: Tensor, masks: Tensor, weights: dict[str, Tensor] | None = None
    ) -> Tensor:
        """What the decoder reads in the backbone's last maps, where frequencies were taken."""
        own = {k: x for k, x in (weights or {}).items() if k.startswith("backbone.")}
        maps: Tensor = functional_call(LastMaps(self.network.backbone), own, (destroyed,))
        # Over the root of the width: Adam moves every weight alike, so a sum over all channels
        # would move too far in one step.
        decoded = self.decoder(maps / math.sqrt(maps.shape[1])).float()
        with in_fp32(destroyed.device.type):
            usual = USUAL / self.level.float().clamp(min=EDGES[0])
            return destroyed + idct2(dct2(decoded) * (usual * (1 - masks)[:, None]))


def _middle(crops: Tensor, side: int) -> Tensor:
    start = (crops.shape[-1] - side) // 2
    return crops[..., start : start + side, start : start + side]
