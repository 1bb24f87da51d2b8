"""What a training run is: a frozen, complete Recipe and its parts.

Nothing about a run lives elsewhere: network and dimensions, how crops are cut, which pictures are
shown, losses and their weights, optimiser, schedule, precision, seed.  A recipe prints itself, is
stored as JSON in every checkpoint, and is changed only by name with its types checked
(ralf.train.recipe_text).  There is no configuration file to be merged over another.  Nonsense is
refused when a part is made.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from ralf.kernels.manifest import USUALLY_HELD_OUT, InputContract, Network, held_out_family
from ralf.train.recipe_checks import above_zero, at_least, between
from ralf.train.recipe_losses import BceLoss, FdflLoss, RalfLoss, RclLoss
from ralf.train.recipe_text import RecipeError

Family = Literal[
    "self_blend",
    "inner",
    "swap",
    "mouth",
    "eyes",
    "reenact",
    "resample",
    "smooth",
    "spectrum",
    "boundary",
]
"""A way of making pseudo-forgeries; ralf.train.forge.families says what each is and makes it."""
FAMILIES: tuple[Family, ...] = get_args(Family)
HELD_OUT: Family = USUALLY_HELD_OUT
"""What our recipes hold out: it is made in another way than the rest.  What a given model has not
seen stands in its `trained` record: ralf.kernels.manifest.held_out_family reads it."""


def seen_families(trained: Mapping[str, Any]) -> tuple[Family, ...]:
    """Every family but the one that a model's `trained` record says was held out."""
    unseen = held_out_family(trained)
    return tuple(family for family in FAMILIES if family != unseen)


@dataclass(frozen=True)
class Augment:
    """How crops are disturbed; each figure is a probability.

    Real and forged of a pair are disturbed alike, so that quality never tells the label.
    """

    flip: float = 0.5
    jpeg: float = 0.0
    h264: float = 0.0
    resize: float = 0.0
    blur: float = 0.0
    noise: float = 0.0
    colour: float = 0.0
    other: float = 0.0
    """Another person's features, expression and skin, in another light, before the forging."""
    margins: tuple[float, ...] = ()
    """Crop margins drawn from, instead of the contract's one; () keeps the contract's."""

    def __post_init__(self) -> None:
        for name in ("flip", "jpeg", "h264", "resize", "blur", "noise", "colour", "other"):
            between(f"augment.{name}", getattr(self, name), 0, 1)
        for margin in self.margins:
            between("augment.margins", margin, 1, 3)


@dataclass(frozen=True)
class Data:
    """Which pictures the network sees, and how a batch is put together."""

    input: InputContract = field(default_factory=InputContract)
    batch: int = 32
    """Crops per step and process, half of them forged."""
    pairing: Literal["balanced", "paired", "kindred"] = "paired"
    """balanced: as many forged as real, drawn apart; paired: each real beside its own forgery;
    kindred: paired, and each two neighbours forged in the same way."""
    frames: int = 8
    """Frames a video gives to one epoch, drawn anew in each."""
    evaluation_frames: int = 32
    """Frames a video gives to evaluation, spread evenly, the same every time."""
    augment: Augment = Augment()
    families: tuple[Family, ...] = ()
    """Pseudo-forgeries made from the reals; () uses only forgeries that are on disk."""
    shares: tuple[float, ...] = ()
    """How often each of the families is drawn, in their order; () draws them alike."""
    held_out: Family | None = None
    """A family never trained on, used only to judge what generalises."""
    blended_share: float = 1.0
    """Of the forgeries in a batch, how many are made by blending where some are on disk too."""

    def __post_init__(self) -> None:
        at_least("data.batch", self.batch, 2)
        if self.batch % 2:
            raise RecipeError(f"data.batch {self.batch} should be even: half real, half forged")
        at_least("data.frames", self.frames, 1)
        at_least("data.evaluation_frames", self.evaluation_frames, 1)
        between("data.blended_share", self.blended_share, 0, 1)
        if self.shares and (len(self.shares) != len(self.families) or min(self.shares) <= 0):
            raise RecipeError(
                f"data.shares should be {len(self.families)} numbers above 0, one for each of "
                f"data.families; got {self.shares}.  None at all draws them alike"
            )
        if self.held_out is not None and self.held_out in self.families:
            raise RecipeError(
                f"data.held_out {self.held_out!r} is trained on too: take it out of data.families"
            )

    @property
    def unseen(self) -> Family | None:
        """The family that judges what generalises: the one held out, else the usual one if the
        recipe does not train on it."""
        if self.held_out is not None:
            return self.held_out
        return None if HELD_OUT in self.families else HELD_OUT


@dataclass(frozen=True)
class Optimiser:
    """How weights are moved."""

    kind: Literal["adam", "adamw", "sgd"] = "adamw"
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.999)
    """sgd takes the first as its momentum."""
    weight_decay: float = 0.0
    """adamw leaves vectors (biases, norms) and the frequency mask out of it."""
    clip: float | None = 1.0
    """Largest norm of the whole gradient; None does not clip."""
    accumulate: int = 1
    """Batches whose gradients are added before one step."""
    ema: float | None = 0.999
    """Decay of the moving average of the weights, which is what gets judged and published."""
    norm_momentum: float | None = None
    """How fast batch norms' statistics follow; None: as the backbone's library has it."""
    norms: Literal["batch", "running"] = "batch"
    """What batch norms normalise by while training; see train.norms for what a batch gives away."""

    def __post_init__(self) -> None:
        at_least("optimiser.accumulate", self.accumulate, 1)
        above_zero("optimiser.lr", self.lr)
        between("optimiser.weight_decay", self.weight_decay, 0, 1)
        if self.clip is not None:
            above_zero("optimiser.clip", self.clip)
        if self.ema is not None:
            between("optimiser.ema", self.ema, 0, 1)
        if self.norm_momentum is not None:
            between("optimiser.norm_momentum", self.norm_momentum, 0, 1)


@dataclass(frozen=True)
class Schedule:
    """How long, and how fast at which time."""

    epochs: int = 30
    steps: int | None = None
    """Optimiser steps in all; overrides epochs."""
    shape: Literal["cosine", "constant"] = "cosine"
    warmup: float = 0.05
    """Share of the steps in which the rate rises from 0."""
    floor: float = 0.01
    """Where the cosine ends, as a share of the rate."""
    evaluate_every: int = 1
    """Epochs between looks at the validation split."""
    patience: int | None = None
    """Looks without a better one before the run stops early; None never stops."""
    select: Literal["auc", "bce", "last"] = "auc"
    """What on the validation split says which weights are best; test is never looked at.  last
    takes the newest: for a rate that falls to its floor, judged by a split too small to choose."""

    def __post_init__(self) -> None:
        at_least("schedule.epochs", self.epochs, 1)
        at_least("schedule.evaluate_every", self.evaluate_every, 1)
        if self.steps is not None:
            at_least("schedule.steps", self.steps, 1)
        between("schedule.warmup", self.warmup, 0, 1)
        between("schedule.floor", self.floor, 0, 1)


@dataclass(frozen=True)
class Init:
    """Where first weights come from."""

    backbone: str | None = "imagenet"
    """imagenet (from timm's hub), a safetensors file with timm's names, the folder of a run or of a
    published version with the same backbone (of several, commas between: the mean of their
    weights), or None: random."""
    network: str | None = None
    """The folder of a run or version with the same network, or of several, whose judged weights to
    go on from; a backbone other than ImageNet's is filled in after it, so that either half of a
    detector can be the better trained one."""
    perceptual: str | None = "imagenet"
    """imagenet (from torchvision's hub), a safetensors file with torchvision's names, or None."""


@dataclass(frozen=True)
class Recipe:
    """A whole training run."""

    name: str
    network: Network
    loss: RalfLoss | BceLoss | FdflLoss | RclLoss
    data: Data = Data()
    optimiser: Optimiser = Optimiser()
    schedule: Schedule = Schedule()
    init: Init = Init()
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """What products are computed in; weights and their steps stay FP32.  bf16 falls back to fp32,
    said in the log, on a processor that has no bf16 in hardware."""
    seed: int = 0
    notes: tuple[str, ...] = field(default=(), repr=False)
    """Why the choices are what they are; goes on the card."""

    def __post_init__(self) -> None:
        size = self.network.dimensions.get("size")
        if size is not None and size != self.data.input.size:
            raise RecipeError(
                f"network.size {size} and data.input.size {self.data.input.size} should be the "
                "same: set both"
            )
