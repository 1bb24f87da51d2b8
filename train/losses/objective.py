"""What the loop asks of a loss, whatever the detector; and the plainest one.

The loop knows nothing of a detector's losses.  It calls an Objective three times for each batch:

    seen   = objective.run(crops)               one forward pass, with gradients
    rival  = objective.rival(seen, batch)       the loss of an opponent (a discriminator), or None
    terms  = objective.terms(seen, batch, at)   the network's loss: named parts and their sum

The opponent's optimiser steps between the second and the third, so the network is always judged by
the opponent as it is now.  Whatever an objective owns (opponents, centres) lies in its state_dict
and so in the checkpoint.  Labels: forged is True, logits are of P(forged).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Protocol

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ralf.kernels.networks.ralf import Ralf
from ralf.train.loop.distributed import Compute
from ralf.train.recipe import Loss, Recipe
from ralf.train.recipe_text import RecipeError


class Batch(Protocol):
    """What the loop reads of a batch; ralf.train.data.batches makes them."""

    # Properties and not plain fields: a protocol's fields can be set, and those of a frozen class,
    # such as the loop's OnDevice, cannot.

    @property
    def crops(self) -> Tensor:
        """u8 [m, 3, s, s] RGB."""

    @property
    def forged(self) -> Tensor:
        """bool [m]."""

    @property
    def pair(self) -> Tensor:
        """int64 [m]: for a forgery the row of the real face it was made from, or −1."""

    @property
    def family(self) -> Tensor:
        """int64 [m]: how it was forged."""

    @property
    def ids(self) -> list[str]:
        """What each face is called."""


@dataclass(frozen=True)
class Moment:
    """When in the run a batch comes."""

    step: int
    epoch: int
    epochs: int
    progress: float
    """Steps done over steps in all, 0 to 1."""


@dataclass(frozen=True)
class Terms:
    """One batch's loss: the sum that is followed back, and its parts before weighting."""

    total: Tensor
    parts: dict[str, Tensor]
    logit: Tensor  # [m]


class Judgement(Protocol):
    """What a validation found."""

    def facts(self) -> dict[str, float | int | str | None]:
        """For the log."""

    def figure(self, select: str) -> float:
        """The figure that chooses the best weights; higher is better."""

    @property
    def said(self) -> str:
        """For the terminal."""


class Objective(nn.Module):
    """A detector's loss."""

    options: ClassVar[type[Loss]] = Loss
    """What a recipe may say of this loss."""
    makes_detector: ClassVar[bool] = True
    """Whether a network that was trained by it can judge; one that cannot is not published."""

    def __init__(self, recipe: Recipe, network: nn.Module) -> None:
        super().__init__()
        self.recipe = recipe
        # In a list, where torch does not find it: as an attribute the network would be registered,
        # and its weights would lie in the loss's state_dict and checkpoint a second time.
        self._network = [network]

    @property
    def network(self) -> Any:
        """The network in training."""
        return self._network[0]

    def run(self, crops: Tensor) -> Any:
        """All that the terms need, from one forward pass."""
        raise NotImplementedError

    def rival(self, seen: Any, batch: Batch) -> Tensor | None:
        """The opponent's loss on what was seen; its gradient reaches the opponent alone."""
        return None

    def terms(self, seen: Any, batch: Batch, moment: Moment) -> Terms:
        """The network's loss."""
        raise NotImplementedError

    def rival_optimiser(self) -> torch.optim.Optimizer | None:
        """What steps the opponent; None where there is none."""
        return None

    def learnt(self) -> Iterable[nn.Parameter]:
        """The loss's own parameters that the main optimiser moves (a learnt centre)."""
        return ()

    def epoch_ended(self) -> None:
        """Called after the last step of each epoch."""

    def judge(
        self, weights: dict[str, Tensor] | None, batches: Iterable[Batch], compute: Compute
    ) -> Judgement | None:
        """Judge the validation split in the loss's own way; None: as a detector, by its logits."""
        return None


class BceLoss(Loss):
    """Binary cross entropy alone: for plain classifiers."""

    kind: Literal["bce"] = "bce"
    smoothing: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Targets become smoothing/2 and 1 − smoothing/2."""


class BceObjective(Objective):
    """Binary cross entropy of a plain classifier."""

    options = BceLoss

    def run(self, crops: Tensor) -> Tensor:
        """The logits."""
        logits: Tensor = self.network(crops)
        return logits

    def terms(self, seen: Tensor, batch: Batch, moment: Moment) -> Terms:
        """One part."""
        loss = self.recipe.loss
        assert isinstance(loss, BceLoss)
        bce = cross_entropy(seen, batch.forged, loss.smoothing)
        return Terms(bce, {"bce": bce}, seen)


def cross_entropy(logit: Tensor, forged: Tensor, smoothing: float = 0.0) -> Tensor:
    """Equation 10, over the batch's mean: label 1 is forged."""
    target = forged.float() * (1 - smoothing) + smoothing / 2
    return F.binary_cross_entropy_with_logits(logit.float(), target)


def disagreement(logit: Tensor, views: int) -> Tensor:
    """How far the verdicts on one picture in several views lie apart, the mean over the pictures.

    The Jensen-Shannon divergence of their probabilities of being forged: 0 where all agree, ln 2
    where they contradict one another.  In nats, as cross entropy is, and bounded, so that a few
    faces with large logits do not decide.  Rows as ralf.train.data.batches orders them.
    """
    each = exact(logit).reshape(2, views, -1).sigmoid()
    apart: Tensor = _entropy(each.mean(1)) - _entropy(each).mean(1)
    return apart.mean()


def _entropy(share: Tensor) -> Tensor:
    # Clamped: the logarithm's slope at 0 is infinite.
    share = share.clamp(1e-6, 1 - 1e-6)
    return -share * share.log() - (1 - share) * (1 - share).log()


def drawn_together(terms: Terms, recipe: Recipe) -> Terms:
    """The terms of any loss, with loss.consistency where the recipe has it."""
    weight = recipe.loss.consistency
    if not weight:
        return terms
    apart = disagreement(terms.logit, len(recipe.data.views))
    parts = {**terms.parts, "consistency": apart}
    return Terms(terms.total + weight * apart, parts, terms.logit)


class OneClass(ValueError):
    """A batch lacks a class that its loss compares with the other."""


def refuse_one_class(forged: Tensor, least: int = 1) -> None:
    """OneClass unless the batch has so many real and so many forged faces."""
    count = int(forged.sum())
    if min(count, len(forged) - count) < least:
        raise OneClass(
            f"this loss needs at least {least} real and {least} forged faces in every batch, got "
            f"{len(forged) - count} and {count}: use batches as ralf.train.data.batches makes them"
        )


def exact(features: Tensor) -> Tensor:
    """At least FP32, whatever the network runs in."""
    # Promoted and not cast, so that FP64 features, as gradient checks use, stay FP64.
    return features.to(torch.promote_types(features.dtype, torch.float32))


def feature_width(network: Any) -> int:
    """How many features the network's backbone gives; refused where it has no backbone."""
    backbone = getattr(network, "backbone", None)
    width = getattr(backbone, "width", None)
    if not isinstance(width, int):
        raise RecipeError(
            f"this loss shapes the features of network.backbone, and {type(network).__name__} has "
            "no backbone with a width: choose another loss or another network"
        )
    return width


def with_bands(network: nn.Module, kind: str) -> Ralf:
    """The network; refused where it has no residual by bands, which that kind of loss trains."""
    if not isinstance(network, Ralf) or network.bands is None:
        raise RecipeError(f"loss.kind={kind} needs network.build=ralf with network.sees=bands")
    return network
