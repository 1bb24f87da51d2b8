"""The loss of RALF with two streams: the crop beside its residual, and the residual alone.

    L = L_C(both streams) + λ L_C(the residual alone) + λ_b max(kept − budget, 0)

The residual has a loss of its own because the crop learns faster: left alone, cross entropy falls
by the crop and the residual stays what it was.  For the same reason the crop's features are dropped
on a share of the batches.  Trained first with streams=residual, the residual has something to say
when the crop comes in.

Nothing in cross entropy rewards taking frequencies away, so a free mask drifts open.  The last term
is for training with a free mask: what it keeps above the lowest levels, the mean over the bands of
its mean in each, should not exceed the budget.
"""

from collections.abc import Iterable
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ralf.kernels.networks.bands import bands
from ralf.kernels.networks.ralf import Ralf, Streams
from ralf.train.loop.distributed import Compute
from ralf.train.loop.validate import judge_validation
from ralf.train.losses.objective import (
    Batch,
    Judgement,
    Moment,
    Objective,
    Terms,
    cross_entropy,
    with_bands,
)
from ralf.train.recipe import Loss, Recipe, Share

Weight = Annotated[float, Field(ge=0, le=1e6)]


class TwoStreamLoss(Loss):
    """Cross entropy of both streams, and of the residual alone."""

    kind: Literal["two_stream"] = "two_stream"
    streams: Literal["both", "residual"] = "both"
    """residual: the crop takes no part, and validation judges the residual alone too."""
    weight_residual: Weight = 1.0
    """Of the residual's own cross entropy, beside that of both."""
    drop_plain: Share = 0.3
    """The share of batches without the crop's own features."""
    budget: Share = 0.5
    """What a free mask may keep above the lowest levels."""
    weight_budget: Weight = 0.0
    """Of what it keeps beyond that; only for a mask that is free."""


class ResidualAlone(nn.Module):
    """The network as its residual's own head judges."""

    def __init__(self, network: Ralf) -> None:
        super().__init__()
        self.network = network

    def forward(self, crops: Tensor) -> Tensor:
        """Logits [m]."""
        return self.network.residual_logit(crops)


class TwoStreamObjective(Objective):
    """Over RALF's network with sees=bands."""

    options = TwoStreamLoss
    bands: Tensor

    def __init__(self, recipe: Recipe, network: nn.Module) -> None:
        super().__init__(recipe, network)
        assert isinstance(recipe.loss, TwoStreamLoss)
        self.loss = recipe.loss
        size = with_bands(network, self.loss.kind).size
        self.register_buffer("bands", bands(size), persistent=False)

    def run(self, crops: Tensor) -> Streams:
        """Both logits; of the residual alone, one twice."""
        network = self.network
        if self.loss.streams == "residual":
            logit = network.residual_logit(crops)
            return Streams(logit, logit)
        # From torch's own generator, whose state is part of a checkpoint.
        plain = bool(torch.rand(()) >= self.loss.drop_plain)
        found: Streams = network.streams(crops, plain=plain)
        return found

    def terms(self, seen: Streams, batch: Batch, moment: Moment) -> Terms:
        """Both cross entropies, and what the mask keeps."""
        loss, parts = self.loss, {"bce": cross_entropy(seen.logit, batch.forged)}
        total = parts["bce"]
        if loss.streams == "both":
            parts["bce_residual"] = cross_entropy(seen.residual, batch.forged)
            total = total + loss.weight_residual * parts["bce_residual"]
        if loss.weight_budget:
            parts["kept"] = self.kept()
            total = total + loss.weight_budget * F.relu(parts["kept"] - loss.budget)
        return Terms(total, parts, seen.logit)

    def kept(self) -> Tensor:
        """The mean over the bands of what the mask keeps in each."""
        mask: Tensor = self.network.mask.float().sigmoid()
        each = (self.bands * mask).sum((1, 2)) / self.bands.sum((1, 2))
        return each.mean()

    def judge(
        self, weights: dict[str, Tensor] | None, batches: Iterable[Batch], compute: Compute
    ) -> Judgement | None:
        """Where the residual alone is trained, the residual alone is judged."""
        if self.loss.streams == "both":
            return None
        named: dict[str, Any] = {f"network.{name}": x for name, x in (weights or {}).items()}
        return judge_validation(ResidualAlone(self.network), named, batches, compute)
