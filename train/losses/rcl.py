"""An RCL-inspired loss: natural faces drawn together around a centre, forgeries kept out.

RCL-inspired, not RCL: of "Real-centric Consistency Learning" only the abstract can be had, so its
words are used, the formulas written out here are ours, and its results are not claimed.

Sample level, "forgery semantical-based pairing".  Batches are `kindred`: each natural face beside
its own forgery, and each two neighbours forged in the same way, so that neither a person nor a
picture gives the label away, and a way of forging is seen on several people.

Feature level.  A face is projected to a unit vector z; `c` is the centre of natural faces, a moving
average over batches and processes that no gradient moves.

    hard positives   the k natural faces farthest from c, and two made of each:
                     beyond  norm(c + (1 + β)(z − c)), 0 ≤ β ≤ `beyond`: past the margin
                     mixed   norm(λ z + (1 − λ) z′), of two hard ones
    hard negatives   the k forgeries nearest to c, and one made of each:
                     fused   norm(γ z + (1 − γ) c), `fused` ≤ γ ≤ 1: nearer to c, still forged

Supervised contrastive margin loss, the mean over an anchor's positives p of

    −log e^((s_p − m)/T) / (e^((s_p − m)/T) + Σ_n e^(s_n/T))        s: cosine with the anchor

    anchor a natural face   positives: the other natural ones, c, those made
                            negatives: all forgeries, those made
    anchor a forgery        positives: those forged in the same way
                            negatives: all natural faces, its own source among them

Forgeries of two different ways are not compared: nothing says that they are alike.  Made vectors
carry gradient to the faces they are made of.  What is drawn (β, λ, γ) is a function of the step, so
a resumed run draws the same.  All of it is FP32.
"""

from typing import Annotated, Any, Literal, NamedTuple

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
from ralf.train.recipe import Count, Loss, Positive, Recipe, Share


class RclLoss(Loss):
    """Of the RCL-inspired detector; this file's head says what each figure does."""

    kind: Literal["rcl"] = "rcl"
    weight: Annotated[float, Field(ge=0, le=1e6)] = 0.2
    """Of the contrastive part, beside cross entropy. [X]"""
    weight_kindred: Annotated[float, Field(ge=0, le=1e6)] = 0.5
    """Of forgeries as anchors, beside natural faces as anchors. [X]"""
    width: Annotated[int, Field(ge=2)] = 128
    """Numbers a face is projected to; the projection is for training alone."""
    temperature: Positive = 0.1
    margin: Annotated[float, Field(ge=0, le=2)] = 0.2
    """By how much, in cosine, a positive must be nearer than it needs to be. [X]"""
    hard: Count = 5
    """Natural faces farthest from their centre, and forgeries nearest to it, that are mined."""
    beyond: Annotated[float, Field(ge=0, le=10)] = 0.5
    """Hard positives are pushed up to this share farther from the centre."""
    fused: Share = 0.5
    """Hard negatives keep at least this share of themselves; the rest is the centre."""
    centre_momentum: Share = 0.99


class ProjectionCentre(nn.Module):
    """Where natural faces lie on the sphere: a moving average, saved with the run."""

    total: Tensor

    def __init__(self, width: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("total", torch.zeros(width))

    @property
    def position(self) -> Tensor:
        """A unit vector; zero before the first batch.  The length of the average does not count,
        so neither does the weight that a young average lacks."""
        return F.normalize(self.total, dim=0)

    @torch.no_grad()
    def see(self, natural: Tensor) -> None:
        """Take in one batch's natural faces [n, width], those of all processes together."""
        total = here().total(natural.sum(0))
        count = here().total(torch.tensor(float(len(natural)), device=natural.device))
        # The count is above 0: terms() has refused a batch without natural faces.
        self.total = self.momentum * self.total + (1 - self.momentum) * total / count


class Draws(NamedTuple):
    """The chances of one step, each in 0..1, [k]."""

    beyond: Tensor
    mixed: Tensor
    fused: Tensor

    @classmethod
    def of(cls, step: int, count: int, device: torch.device) -> "Draws":
        """A function of the step; drawn on the CPU, so that every device draws alike."""
        chance = torch.rand(3, count, generator=torch.Generator().manual_seed(step))
        return cls(*chance.to(device))


def mine(faces: Tensor, centre: Tensor, count: int, *, nearest: bool) -> Tensor:
    """Rows of the faces [n, width] nearest to the centre by cosine, or farthest; best first."""
    count = min(count, len(faces))
    return (faces @ centre).topk(count, largest=nearest).indices


def made_positives(hard: Tensor, centre: Tensor, draws: Draws, beyond: float) -> Tensor:
    """Two made of each hard natural face [k, width]: beyond it, and between it and the next."""
    k = len(hard)
    push = 1 + beyond * draws.beyond[:k, None]
    share = draws.mixed[:k, None]
    farther = centre + push * (hard - centre)
    between = share * hard + (1 - share) * hard.roll(1, 0)
    return F.normalize(torch.cat((farther, between)), dim=1)


def fused_negatives(hard: Tensor, centre: Tensor, draws: Draws, least: float) -> Tensor:
    """One made of each hard forgery [k, width]: nearer to the centre."""
    kept = least + (1 - least) * draws.fused[: len(hard), None]
    return F.normalize(kept * hard + (1 - kept) * centre, dim=1)


def margin_loss(
    anchors: Tensor,
    positives: Tensor,
    chosen: Tensor,
    negatives: Tensor,
    *,
    temperature: float,
    margin: float,
) -> Tensor:
    """The supervised contrastive margin loss of unit vectors; chosen [anchors, positives] says
    which are positives of which.  Anchors without one do not count; without any it is zero."""
    against = torch.logsumexp(anchors @ negatives.T / temperature, 1, keepdim=True)
    wanted = (anchors @ positives.T - margin) / temperature
    # softplus(b − a) is −log(e^a / (e^a + e^b)), and does not overflow at a small temperature.
    each = torch.where(chosen, F.softplus(against - wanted), 0.0)
    number = chosen.sum(1)
    means = each.sum(1) / number.clamp(min=1)
    return means.sum() / (number > 0).sum().clamp(min=1)


class RclObjective(Objective):
    """Over a network whose trace(crops) gives embedding and logit."""

    options = RclLoss

    def __init__(self, recipe: Recipe, network: nn.Module) -> None:
        super().__init__(recipe, network)
        assert isinstance(recipe.loss, RclLoss)
        self.loss = recipe.loss
        wide = feature_width(network)
        # Contrastive learning judges a projection, so that the features keep what it throws away.
        self.project = nn.Sequential(
            nn.Linear(wide, wide // 4), nn.ReLU(), nn.Linear(wide // 4, self.loss.width)
        )
        self.centre = ProjectionCentre(self.loss.width, self.loss.centre_momentum)

    def run(self, crops: Tensor) -> Any:
        """Embedding and logit."""
        return self.network.trace(crops)

    def learnt(self) -> list[nn.Parameter]:
        """The projection."""
        return list(self.project.parameters())

    def terms(self, seen: Any, batch: Batch, moment: Moment) -> Terms:
        """Cross entropy, and the contrastive loss of natural and of forged anchors."""
        refuse_one_class(batch.forged)
        loss = self.loss
        # A cosine in bf16 has two or three digits, and a temperature of 0.1 makes its error ten
        # times as large.
        with torch.autocast(seen.embedding.device.type, enabled=False):
            faces = F.normalize(self.project(exact(seen.embedding)), dim=1)
            natural, forged = faces[~batch.forged], faces[batch.forged]
            self.centre.see(natural.detach())
            draws = Draws.of(moment.step, loss.hard, faces.device)
            parts = {
                "bce": cross_entropy(seen.logit, batch.forged),
                "con": self._natural(natural, forged, draws),
                "kindred": self._kindred(
                    forged, natural, batch.family.to(faces.device)[batch.forged]
                ),
            }
        total = parts["bce"] + loss.weight * (parts["con"] + loss.weight_kindred * parts["kindred"])
        return Terms(total, parts, seen.logit)

    def _natural(self, natural: Tensor, forged: Tensor, draws: Draws) -> Tensor:
        loss, centre = self.loss, self.centre.position
        far = natural[mine(natural, centre, loss.hard, nearest=False)]
        near = forged[mine(forged, centre, loss.hard, nearest=True)]
        extra = torch.cat((centre[None], made_positives(far, centre, draws, loss.beyond)))
        itself = torch.eye(len(natural), dtype=torch.bool, device=natural.device)
        chosen = torch.cat((~itself, itself.new_ones(len(natural), len(extra))), 1)
        fused = fused_negatives(near, centre, draws, loss.fused)
        return margin_loss(
            natural, torch.cat((natural, extra)), chosen, torch.cat((forged, fused)),
            temperature=loss.temperature, margin=loss.margin,
        )  # fmt: skip

    def _kindred(self, forged: Tensor, natural: Tensor, family: Tensor) -> Tensor:
        itself = torch.eye(len(forged), dtype=torch.bool, device=forged.device)
        alike = (family[:, None] == family[None, :]) & ~itself
        return margin_loss(
            forged, forged, alike, natural,
            temperature=self.loss.temperature, margin=self.loss.margin,
        )  # fmt: skip
