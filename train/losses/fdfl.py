"""FDFL's loss: cross entropy, and one more that shapes the pooled features.

    L = L_C + λ L_sc        L_sc = M_nat + max(M_nat − M_man + m √D, 0)

M_nat and M_man are the mean distances of the batch's natural and manipulated faces from one
learnt centre C, D the features' number.  Natural faces are drawn together; forged ones, which have
nothing in common, need only lie m √D farther out.  C is a parameter like any other, moved by the
same optimiser.

It starts at the first batch's natural faces (`loss.centre=random`: at standard normals, as
published).  Drawn at random it lies √D and more from every face, and the first hundreds of steps
carry all of them there together.  Drawn close to zero it pulls natural faces to features of zero,
and their logit is then the bias alone.  On one batch of eight, in 15 steps, cross entropy stalled
at 0.31, about half of ln 2; from the faces' mean it came to 0.01.

The losses that the paper compares with, by `loss.shape`: center loss (a centre for each class, half
the mean squared distance), triplet (each face, the farthest of its class, the nearest of the other,
the same margin), or none.

A distance is a norm whose slope at zero is zero, never NaN.  A batch without one of the classes
has no such loss and is refused: to leave the term out would be a bias without a warning.
"""

import math
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ralf.train.loop.distributed import here
from ralf.train.losses.objective import (
    Batch,
    Moment,
    Objective,
    Terms,
    cross_entropy,
    exact,
    feature_width,
    refuse_one_class,
)
from ralf.train.recipe import Loss, Recipe, Share
from ralf.train.recipe_text import RecipeError


class FdflLoss(Loss):
    """FDFL's: cross entropy, and a loss that gives the features a shape."""

    kind: Literal["fdfl"] = "fdfl"
    shape: Literal["single_centre", "centre", "triplet", "none"] = "single_centre"
    """single_centre is the paper's; the others are what it is compared with there."""
    weight: Annotated[float, Field(ge=0, le=1e6)] = 0.5
    """λ, of the shaping loss. [R]"""
    centre: Literal["faces", "random"] = "faces"
    """Where a centre starts: at the first batch's faces of its class, or, as published, at
    standard normals."""
    margin: Annotated[float, Field(ge=0, le=1e3)] = 0.3
    """m, in roots of the features' number: how much farther forged faces lie than natural ones
    (single_centre), or than the nearest of the same class (triplet)."""
    weight_frequencies: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    """Of the cross entropy of the frequencies alone; above 0 it needs network.alone=true."""
    drop_plain: Share = 0.0
    """The share of batches without the pixels' maps; only with weight_frequencies."""


def single_centre_loss(features: Tensor, forged: Tensor, centre: Tensor, margin: float) -> Tensor:
    """L_sc of features [m, D]; the margin is in units of √D."""
    refuse_one_class(forged)
    distance: Tensor = torch.linalg.vector_norm(exact(features) - centre, dim=1)
    natural, manipulated = distance[~forged].mean(), distance[forged].mean()
    return natural + F.relu(natural - manipulated + margin * math.sqrt(features.shape[1]))


def centre_loss(features: Tensor, forged: Tensor, centres: Tensor) -> Tensor:
    """Half the mean squared distance of each face from its class's centre; centres [2, D]."""
    return (exact(features) - centres[forged.long()]).square().sum(1).mean() / 2


def triplet_loss(features: Tensor, forged: Tensor, margin: float) -> Tensor:
    """Each face, its farthest of the same class, its nearest of the other: a hinge."""
    refuse_one_class(forged, least=2)
    exactly = exact(features)
    # Differences, not the quadratic form: it is exact where two faces are one.
    distance = torch.linalg.vector_norm(exactly[:, None] - exactly[None, :], dim=2)
    alike = forged[:, None] == forged[None, :]
    farthest = torch.where(alike, distance, -math.inf).amax(1)
    nearest = torch.where(alike, math.inf, distance).amin(1)
    return F.relu(farthest - nearest + margin * math.sqrt(features.shape[1])).mean()


class FdflObjective(Objective):
    """Over a network whose trace(crops) gives embedding and logit."""

    options = FdflLoss
    placed: Tensor

    def __init__(self, recipe: Recipe, network: nn.Module) -> None:
        super().__init__(recipe, network)
        assert isinstance(recipe.loss, FdflLoss)
        self.loss = recipe.loss
        if self.loss.weight_frequencies and getattr(network, "alone", None) is None:
            raise RecipeError(
                "loss.weight_frequencies needs a head for the frequencies alone: "
                "network.build=fdfl with network.alone=true"
            )
        self.centre: nn.Parameter | None = None
        if self.loss.shape in ("single_centre", "centre"):
            count = 2 if self.loss.shape == "centre" else 1
            self.centre = nn.Parameter(torch.randn(count, feature_width(network)))
            # A buffer, so that a resumed run does not place its centre a second time.
            self.register_buffer("placed", torch.tensor(self.loss.centre == "random"))

    def run(self, crops: Tensor) -> Any:
        """Embedding and logit, and the frequencies' own logit where it has a loss."""
        if not self.loss.weight_frequencies:
            return self.network.trace(crops)
        # From torch's own generator, whose state is part of a checkpoint.
        plain = bool(torch.rand(()) >= self.loss.drop_plain)
        return self.network.streams(crops, plain=plain)

    def learnt(self) -> list[nn.Parameter]:
        """The centre, or centres."""
        return [] if self.centre is None else [self.centre]

    def terms(self, seen: Any, batch: Batch, moment: Moment) -> Terms:
        """Cross entropy, that of the frequencies alone, and what shapes the features."""
        loss, parts = self.loss, {"bce": cross_entropy(seen.logit, batch.forged)}
        total = parts["bce"]
        if (shape := self._shaped(seen.embedding, batch.forged)) is not None:
            parts[loss.shape] = shape
            total = total + loss.weight * shape
        if loss.weight_frequencies:
            parts["bce_frequencies"] = cross_entropy(seen.frequencies, batch.forged)
            total = total + loss.weight_frequencies * parts["bce_frequencies"]
        return Terms(total, parts, seen.logit)

    def _shaped(self, features: Tensor, forged: Tensor) -> Tensor | None:
        loss = self.loss
        if loss.shape == "triplet":
            return triplet_loss(features, forged, loss.margin)
        if self.centre is None:
            return None
        if not self.placed:
            self._place(exact(features.detach()), forged)
        if loss.shape == "centre":
            return centre_loss(features, forged, self.centre)
        return single_centre_loss(features, forged, self.centre[0], loss.margin)

    @torch.no_grad()
    def _place(self, features: Tensor, forged: Tensor) -> None:
        """Each centre to the mean of its class, real first, over all processes."""
        assert self.centre is not None
        refuse_one_class(forged)
        for place, member in enumerate((~forged, forged)[: len(self.centre)]):
            total, count = here().total(features[member].sum(0)), here().total(member.sum())
            self.centre[place] = total / count
        self.placed.fill_(True)
