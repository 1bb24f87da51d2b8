"""RALF's loss, equations 2 to 12: one function for each, and the objective that adds them up.

    L = L_C + λ_R (L_1 + λ_freq L_freq + λ_adv L_adv) + α λ_emb L_emb + λ_con L_con          (12)

Real faces alone teach the reconstructor to rebuild (L_1, L_freq); forged ones must stay apart, in
the embedding (L_emb) and in how badly they are rebuilt (L_con); all reconstructions must look real
to a discriminator (L_adv).  What each reaches: L_emb the mask and the encoder; L_1, L_freq, L_adv
and L_con mask, encoder and decoder; L_C everything but the discriminator; L_disc it alone.

L_freq at the paper's weight means the un-normalised DCT (torch_dct's and SciPy's default),
whose coefficients are 2n times the orthonormal ones, √2 more in row and column 0 each.  Our DCT is
orthonormal, so W carries these factors; tests/test_losses_ralf.py proves it equal.

Labels come as an explicit mask; forged is True.  A batch without reals or without forgeries makes
its terms zero, not NaN.  Distances are in FP32 whatever the network runs in.
"""

import math
from typing import Annotated, Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from ralf.kernels.dct import dct2
from ralf.kernels.networks.bands import levels
from ralf.train.loop.distributed import here
from ralf.train.losses.objective import Batch, Moment, Objective, Terms, cross_entropy
from ralf.train.losses.perceptual import perceptual
from ralf.train.recipe import Loss, Positive, Recipe, Share

Weight = Annotated[float, Field(ge=0, le=1e6)]

PERCEPTUAL_WEIGHTS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1.0)
BANDS = ((1, 1e-4), (8, 1e-2), (128, 1.0), (320, 10.0))
"""W by the sum of both indices at 256²: below 1, below 8, …; the rest weighs LAST."""
LAST = 100.0


class RalfLoss(Loss):
    """The loss of RALF, equations 2 to 12 of the paper."""

    kind: Literal["ralf"] = "ralf"
    weight_rec: Weight = 0.1
    weight_freq: Weight = 1.0
    weight_adv: Weight = 0.1
    weight_emb: Weight = 0.1
    weight_con: Weight = 0.1
    freq: Literal["difference", "magnitude"] = "difference"
    """difference: |W(F(x~) − F(x))|, equation 5; magnitude: |W|F(x~)| − W|F(x)||, their code."""
    freq_scale: Literal["unnormalised", "ortho"] = "unnormalised"
    """The scale of the DCT that weight_freq is meant for."""
    freq_weighted: bool = True
    """False: W is one everywhere (a row of the paper's Table 4)."""
    radius_real: Annotated[float, Field(ge=0)] = 0.05
    radius_forged: float = 1.5
    centre: Literal["epoch", "step"] = "step"
    """When the centre of real faces moves: once an epoch to their mean, or each step a little."""
    centre_momentum: Share = 0.99
    """Only for centre=step."""
    centre_sums_forged: bool = False
    """The upload's bug: the sum runs over all faces, the count over the real ones only."""
    centre_keeps_graph: bool = False
    """The upload's other bug: sums are not detached, so each step's graph lives for the epoch."""
    alpha: Literal["epoch", "step", "one"] = "step"
    """How the weight of the embedding loss grows from 0 to 1: by whole epochs, by steps, not."""
    perceptual: Literal["vgg19", "vgg16"] = "vgg19"
    con_pairs: bool = True
    """Equation 6 for each real and the forgery made from it; False: of the two batch means."""
    con_eps: Share = 1e-3
    """Keeps the ratio of equation 6 finite where a forgery is reconstructed well."""
    con_patch: Annotated[int, Field(ge=16)] | None = None
    """Side of the square that equation 6 is taken on, at a place drawn each step; None: all."""
    rival_lr: Positive = 2e-4
    """The discriminator's own Adam."""
    rival_betas: tuple[float, float] = (0.5, 0.999)

    @model_validator(mode="after")
    def _radii_ascend(self) -> Self:
        if not self.radius_real < self.radius_forged:
            raise ValueError(
                f"loss.radius_real {self.radius_real} should be below "
                f"loss.radius_forged {self.radius_forged}"
            )
        return self


def mean_of(values: Tensor, chosen: Tensor) -> Tensor:
    """The mean of the chosen values [m]; zero where none is, with no gradient."""
    # At least 1, and chosen by `where`: without a chosen row the mean is 0 and not 0 / 0, and a NaN
    # in a row that is not chosen stays out (a product with 0 would keep it).
    count = chosen.sum().clamp(min=1)
    return torch.where(chosen, values, torch.zeros_like(values)).sum() / count


def embedding_loss(
    embedding: Tensor, forged: Tensor, centre: Tensor, radius_real: float, radius_forged: float
) -> Tensor:
    """Equation 2: reals inside the small ball about the centre, forgeries outside the large."""
    distance = torch.linalg.vector_norm(embedding.float() - centre, dim=1)
    inside = mean_of(F.relu(distance - radius_real), ~forged)
    return inside + mean_of(F.relu(radius_forged - distance), forged)


def pixel_loss(rebuilt: Tensor, image: Tensor, forged: Tensor) -> Tensor:
    """Equation 4: mean absolute difference in 0..1, real faces only."""
    return mean_of((rebuilt.float() - image.float()).abs().flatten(1).mean(1), ~forged)


def band_weights(size: int) -> Tensor:
    """W of equation 5 [s, s]: higher frequencies weigh more.  Bands scale with the size."""
    level = levels(size)
    weights = torch.full((size, size), LAST, dtype=torch.float64)
    # From the widest band to the narrowest: each overwrites a part of the one before.
    for below, weight in reversed(BANDS):
        weights[level < below] = weight
    return weights


def unnormalised(size: int) -> Tensor:
    """Un-normalised over orthonormal DCT coefficients [s, s]."""
    factors = torch.full((size,), math.sqrt(2 * size), dtype=torch.float64)
    factors[0] = math.sqrt(4 * size)
    return factors[:, None] * factors[None, :]


def frequency_loss(
    rebuilt: Tensor, image: Tensor, forged: Tensor, weights: Tensor, magnitudes: bool
) -> Tensor:
    """Equation 5, real faces only: |W(F(x~) − F(x))|, or the authors' | W|F(x~)| − W|F(x)| |.

    Under autocast this stays FP32: un-normalised coefficients reach 4 n².
    """
    with torch.autocast(rebuilt.device.type, enabled=False):
        if magnitudes:
            difference = dct2(rebuilt.float()).abs() - dct2(image.float()).abs()
        else:
            difference = dct2(rebuilt.float() - image.float())
        return mean_of((weights * difference).abs().flatten(1).mean(1), ~forged)


def contrastive_loss(
    moved: Tensor, forged: Tensor, pair: Tensor, eps: float, by_pairs: bool
) -> Tensor:
    """Equation 6: how far reals move when rebuilt, over how far forgeries do, layer by layer.

    `moved` holds the distances, [layers, m].  By pairs, a forgery is held against the real face
    that it was made from; without pairs in the batch, and otherwise, against the mean of all reals.
    """
    weights = moved.new_tensor(PERCEPTUAL_WEIGHTS)
    partner = torch.where(forged, pair, -1)
    paired = partner >= 0
    if by_pairs and bool(paired.any()):
        return (weights @ (moved[:, partner[paired]] / (moved[:, paired] + eps))).mean()
    # The mean over no face is NaN, so a batch of one class has no ratio at all.
    if bool(forged.all()) or not bool(forged.any()):
        return moved.new_zeros(())
    return weights @ (moved[:, ~forged].mean(1) / (moved[:, forged].mean(1) + eps))


def discriminator_loss(on_real: Tensor, on_rebuilt: Tensor) -> Tensor:
    """Equation 7 on logits of "is a real photograph"; no reals: their half is zero."""
    real = F.softplus(-on_real).sum() / max(1, on_real.numel())
    return real + F.softplus(on_rebuilt).mean()


def adversarial_loss(on_rebuilt: Tensor) -> Tensor:
    """Equation 8: every reconstruction should pass for real."""
    return F.softplus(-on_rebuilt).mean()


def alpha(how: str, moment: Moment) -> float:
    """The growing weight of L_emb: 0 while the centre means nothing yet."""
    if how == "epoch":
        return moment.epoch / moment.epochs
    return 1.0 if how == "one" else moment.progress


class EmbeddingCentre(nn.Module):
    """Equation 3: where real faces lie in the embedding; moved by data, never by gradient."""

    position: Tensor
    total: Tensor
    count: Tensor

    def __init__(self, width: int, loss: RalfLoss) -> None:
        super().__init__()
        self.loss = loss
        self.register_buffer("position", torch.zeros(width))
        self.register_buffer("total", torch.zeros(width))
        self.register_buffer("count", torch.zeros(()))

    def see(self, embedding: Tensor, forged: Tensor) -> None:
        """Take in one batch [m, width]."""
        kept = embedding.float() if self.loss.centre_keeps_graph else embedding.detach().float()
        chosen = torch.ones_like(forged) if self.loss.centre_sums_forged else ~forged
        total = (kept * chosen[:, None]).sum(0)
        count = (~forged).sum().float()
        if self.loss.centre == "epoch":
            self.total = self.total + total
            self.count = self.count + count
            return
        # Before the test of the count: every process must take part in the sums, with reals or
        # without, or the others wait for it for ever.
        total, count = here().total(total.detach()), here().total(count)
        if count > 0:
            # A moving average that counts its own weight, so the first batch is its first centre.
            keep = self.loss.centre_momentum
            self.total = keep * self.total + (1 - keep) * total / count
            self.count = keep * self.count + (1 - keep)
            self.position = self.total / self.count

    def epoch_ended(self) -> None:
        """Once an epoch: the mean of what was seen in it, on every process."""
        if self.loss.centre == "epoch":
            total, count = here().total(self.total.detach()), here().total(self.count)
            if count > 0:
                self.position = total / count
            self.total, self.count = torch.zeros_like(total), torch.zeros_like(count)


class Discriminator(nn.Module):
    """RALF's opponent in training: it separates photographs of real faces from reconstructions.

    DCGAN's: 4×4 convolutions of stride 2, 8 to 256 channels at 256², then one logit.

    Its logit is of "is a real photograph", the one place where real is the positive answer,
    because equations 7 and 8 are written so.  It is thrown away after training.
    [R] No batch norm on the first layer, as DCGAN's authors advise.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = 3
        for level in range(max(1, int(math.log2(size / 4)))):
            wider = min(8 * 2**level, 256)
            # No bias before a batch norm, which would subtract it again; level 0 has no norm.
            layers.append(nn.Conv2d(width, wider, 4, stride=2, padding=1, bias=level == 0))
            layers += [nn.BatchNorm2d(wider)] if level else []
            layers.append(nn.LeakyReLU(0.2))
            width = wider
        self.body = nn.Sequential(*layers, nn.Conv2d(width, 1, 4))
        self.apply(_dcgan_init)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [m] of "is a real photograph"."""
        # One logit at powers of two; other sizes leave several, and their mean stands for all.
        logits: Tensor = self.body(images).float().flatten(1).mean(1)
        return logits


def _dcgan_init(layer: nn.Module) -> None:
    if isinstance(layer, nn.Conv2d):
        nn.init.normal_(layer.weight, 0.0, 0.02)
    elif isinstance(layer, nn.BatchNorm2d):
        nn.init.normal_(layer.weight, 1.0, 0.02)


class RalfObjective(Objective):
    """Equation 12 over a network whose trace(crops) gives image, rebuilt, embedding and logit."""

    options = RalfLoss
    weights: Tensor

    def __init__(self, recipe: Recipe, network: nn.Module) -> None:
        super().__init__(recipe, network)
        assert isinstance(recipe.loss, RalfLoss)
        self.loss = recipe.loss
        size = recipe.data.input.size
        weights = band_weights(size) if self.loss.freq_weighted else torch.ones(size, size).double()
        if self.loss.freq_scale == "unnormalised":
            weights = weights * unnormalised(size)
        # Not in the checkpoint: it follows from the recipe.
        self.register_buffer("weights", weights.float(), persistent=False)
        self.centre = EmbeddingCentre(self._width(size), self.loss)
        self.discriminator = Discriminator(size) if self.loss.weight_adv else None
        self.features = (
            perceptual(self.loss.perceptual, recipe.init.perceptual)
            if self.loss.weight_con
            else None
        )

    def _width(self, size: int) -> int:
        """How wide the network's embedding is, from one blank crop."""
        parameter = next(self.network.parameters())
        blank = torch.zeros(1, 3, size, size, dtype=torch.uint8, device=parameter.device)
        training = self.network.training
        # In training mode a blank crop would move the batch norms' statistics.
        self.network.eval()
        with torch.no_grad():
            width = self.network.trace(blank).embedding.shape[1]
        self.network.train(training)
        return int(width)

    def run(self, crops: Tensor) -> Any:
        """The network's trace."""
        return self.network.trace(crops)

    def rival(self, seen: Any, batch: Batch) -> Tensor | None:
        """Equation 7."""
        if self.discriminator is None:
            return None
        self.discriminator.requires_grad_(True)
        real = seen.image[~batch.forged]
        on_real = self.discriminator(real) if len(real) else seen.logit.new_zeros(0)
        # Detached: the network must not learn from its opponent's own loss.
        return discriminator_loss(on_real, self.discriminator(seen.rebuilt.detach()))

    def terms(self, seen: Any, batch: Batch, moment: Moment) -> Terms:
        """Equations 11 and 12."""
        loss, forged = self.loss, batch.forged
        image = seen.image.detach()
        # Before L_emb, so that a centre that moves by steps is already at the first batch's reals
        # and not at zero when distances to it are measured.
        self.centre.see(seen.embedding, forged)
        parts = {
            "bce": cross_entropy(seen.logit, forged),
            "l1": pixel_loss(seen.rebuilt, image, forged),
        }
        if loss.weight_freq:
            parts["freq"] = frequency_loss(
                seen.rebuilt, image, forged, self.weights, loss.freq == "magnitude"
            )
        if loss.weight_emb:
            parts["emb"] = embedding_loss(
                seen.embedding, forged, self.centre.position.detach(),
                loss.radius_real, loss.radius_forged,
            )  # fmt: skip
        if self.discriminator is not None:
            # The network is judged by a discriminator that does not learn from this.
            self.discriminator.requires_grad_(False)
            parts["adv"] = adversarial_loss(self.discriminator(seen.rebuilt))
        if self.features is not None:
            parts["con"] = contrastive_loss(
                self._moved(*self._patch(moment.step, seen.rebuilt, image)),
                forged,
                batch.pair,
                loss.con_eps,
                loss.con_pairs,
            )
        return Terms(self._total(parts, alpha(loss.alpha, moment)), parts, seen.logit)

    def _total(self, parts: dict[str, Tensor], grown: float) -> Tensor:
        loss = self.loss
        weights = {
            "bce": 1.0,
            "l1": loss.weight_rec,
            "freq": loss.weight_rec * loss.weight_freq,
            "adv": loss.weight_rec * loss.weight_adv,
            "emb": grown * loss.weight_emb,
            "con": loss.weight_con,
        }
        return torch.stack([weights[name] * part for name, part in parts.items()]).sum()

    def _patch(self, step: int, *images: Tensor) -> list[Tensor]:
        """The same square of each, at full resolution: drawn from the step, so that a resumed run
        and every process draw alike."""
        side = self.loss.con_patch
        if side is None or side >= images[0].shape[-1]:
            return list(images)
        place = torch.Generator().manual_seed(step)
        top, left = torch.randint(images[0].shape[-1] - side + 1, (2,), generator=place).tolist()
        return [image[..., top : top + side, left : left + side] for image in images]

    def _moved(self, rebuilt: Tensor, image: Tensor) -> Tensor:
        """The mean absolute difference of each face's features, [layers, m]."""
        assert self.features is not None
        with torch.no_grad():
            # The photograph needs no gradient; this half of VGG's work runs forward alone.
            before = self.features(image)
        pairs = zip(self.features(rebuilt), before, strict=True)
        return torch.stack(
            [(one.float() - other.float()).abs().flatten(1).mean(1) for one, other in pairs]
        )

    def rival_optimiser(self) -> torch.optim.Optimizer | None:
        """The discriminator's own Adam."""
        if self.discriminator is None:
            return None
        return torch.optim.Adam(
            self.discriminator.parameters(), lr=self.loss.rival_lr, betas=self.loss.rival_betas
        )

    def epoch_ended(self) -> None:
        """Move the centre, where it moves once an epoch."""
        self.centre.epoch_ended()
