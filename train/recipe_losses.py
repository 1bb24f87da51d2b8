"""What each detector's loss can be told; train/losses/ computes them, the `kind` says which."""

from dataclasses import dataclass
from typing import Literal

from ralf.train.recipe_checks import above_zero, at_least, between
from ralf.train.recipe_text import RecipeError


@dataclass(frozen=True)
class RalfLoss:
    """The loss of RALF, equations 2 to 12 of the paper."""

    kind: Literal["ralf"] = "ralf"
    weight_rec: float = 0.1
    weight_freq: float = 1.0
    weight_adv: float = 0.1
    weight_emb: float = 0.1
    weight_con: float = 0.1
    freq: Literal["difference", "magnitude"] = "difference"
    """difference: |W(F(x~) − F(x))|, equation 5; magnitude: |W|F(x~)| − W|F(x)||, their code."""
    freq_scale: Literal["unnormalised", "ortho"] = "unnormalised"
    """The scale of the coefficients that weight_freq speaks of."""
    freq_weighted: bool = True
    """False: W is one everywhere (a row of the paper's Table 4)."""
    radius_real: float = 0.05
    radius_forged: float = 1.5
    centre: Literal["epoch", "step"] = "step"
    """When the centre of real faces moves: once an epoch to their mean, or each step a little."""
    centre_momentum: float = 0.99
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
    con_eps: float = 1e-3
    """Keeps the ratio of equation 6 finite where a forgery is reconstructed well."""
    con_patch: int | None = None
    """Side of the square that equation 6 is taken on, at a place drawn each step; None: all."""
    rival_lr: float = 2e-4
    """The discriminator's own Adam."""
    rival_betas: tuple[float, float] = (0.5, 0.999)

    def __post_init__(self) -> None:
        if not 0 <= self.radius_real < self.radius_forged:
            raise RecipeError(
                f"loss.radius_real {self.radius_real} should be below "
                f"loss.radius_forged {self.radius_forged}, neither negative"
            )
        for name in ("rec", "freq", "adv", "emb", "con"):
            between(f"loss.weight_{name}", getattr(self, f"weight_{name}"), 0, 1e6)
        between("loss.con_eps", self.con_eps, 0, 1)
        above_zero("loss.rival_lr", self.rival_lr)
        between("loss.centre_momentum", self.centre_momentum, 0, 1)
        if self.con_patch is not None:
            at_least("loss.con_patch", self.con_patch, 16)


@dataclass(frozen=True)
class BceLoss:
    """Binary cross entropy alone: for plain classifiers."""

    kind: Literal["bce"] = "bce"
    smoothing: float = 0.0
    """Targets become smoothing/2 and 1 − smoothing/2."""

    def __post_init__(self) -> None:
        between("loss.smoothing", self.smoothing, 0, 0.5)


@dataclass(frozen=True)
class FdflLoss:
    """FDFL's: cross entropy, and a loss that gives the features a shape."""

    kind: Literal["fdfl"] = "fdfl"
    shape: Literal["single_centre", "centre", "triplet", "none"] = "single_centre"
    """single_centre is the paper's; the others are what it is compared with there."""
    weight: float = 0.5
    """λ, of the shaping loss. [R]"""
    centre: Literal["faces", "random"] = "faces"
    """Where a centre starts: at the first batch's faces of its class, or, as published, at
    standard normals."""
    margin: float = 0.3
    """m, in roots of the features' number: how much farther forged faces lie than natural ones
    (single_centre), or than the nearest of the same class (triplet)."""

    def __post_init__(self) -> None:
        between("loss.weight", self.weight, 0, 1e6)
        between("loss.margin", self.margin, 0, 1e3)


@dataclass(frozen=True)
class RclLoss:
    """Of the RCL-inspired detector; train/losses/rcl.py says what each figure does."""

    kind: Literal["rcl"] = "rcl"
    weight: float = 0.2
    """Of the contrastive part, beside cross entropy. [X]"""
    weight_kindred: float = 0.5
    """Of forgeries as anchors, beside natural faces as anchors. [X]"""
    width: int = 128
    """Numbers a face is projected to; the projection is for training alone."""
    temperature: float = 0.1
    margin: float = 0.2
    """By how much, in cosine, a positive must be nearer than it needs to be. [X]"""
    hard: int = 5
    """Natural faces farthest from their centre, and forgeries nearest to it, that are mined."""
    beyond: float = 0.5
    """Hard positives are pushed up to this share farther from the centre."""
    fused: float = 0.5
    """Hard negatives keep at least this share of themselves; the rest is the centre."""
    centre_momentum: float = 0.99

    def __post_init__(self) -> None:
        between("loss.weight", self.weight, 0, 1e6)
        between("loss.weight_kindred", self.weight_kindred, 0, 1e6)
        at_least("loss.width", self.width, 2)
        above_zero("loss.temperature", self.temperature)
        between("loss.margin", self.margin, 0, 2)
        at_least("loss.hard", self.hard, 1)
        between("loss.beyond", self.beyond, 0, 10)
        between("loss.fused", self.fused, 0, 1)
        between("loss.centre_momentum", self.centre_momentum, 0, 1)
