"""What a training run is: a frozen, complete Recipe and its parts.

Nothing about a run is kept elsewhere: network and dimensions, how crops are cut, which pictures are
shown, losses and their weights, optimiser, schedule, precision, seed.  A recipe prints itself, is
stored as JSON in every checkpoint, and is changed only by name with its types checked
(ralf.train.recipe_text).  There is no configuration file to be merged over another.  A part refuses
nonsense when it is made, and names the field, what was expected and what came.

A loss's options stand beside the loss, in train/losses/; the recipe finds them by `loss.kind`.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    model_validator,
)

from ralf.kernels.manifest import USUALLY_HELD_OUT, InputContract, Network, held_out_family
from ralf.train import losses
from ralf.train.forge.families import REGISTRY, Family
from ralf.train.recipe_text import explained

HELD_OUT: Family = USUALLY_HELD_OUT
"""What our recipes hold out: it is made in another way than the rest.  What a given model has not
seen stands in its `trained` record: ralf.kernels.manifest.held_out_family reads it."""


BLENDS: tuple[Family, ...] = (
    "self_blend", "inner", "swap", "mouth", "eyes",
    "reenact", "resample", "smooth", "spectrum", "boundary",
)  # fmt: skip
"""The families of the first recipes, which draw no others: a new family changes no old batch."""


def seen_families(trained: Mapping[str, Any]) -> tuple[Family, ...]:
    """The families that a model was trained on, by its `trained` record: not the one held out."""
    unseen = held_out_family(trained)
    # Models published before the record listed them had seen the blends at most.
    listed = trained.get("families") or BLENDS
    return tuple(family for family in listed if family != unseen)


def _known(family: str) -> str:
    if family not in REGISTRY:
        raise ValueError(f"should be one of {', '.join(REGISTRY)}")
    return family


Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Known = Annotated[Family, AfterValidator(_known)]


def _part_rate(text: str) -> str:
    part, star, factor = text.partition("*")
    try:
        fine = bool(part and star) and 0 <= float(factor) < float("inf")
    except ValueError:
        fine = False
    if not fine:
        raise ValueError("should be PART*FACTOR with a factor of 0 or more, as gate*20")
    return text


PartRate = Annotated[str, AfterValidator(_part_rate)]
ENCODERS = ("jpeg", "libx264", "libx265", "libvpx-vp9")
DRAWN = "drawn"
"""The view with the encoding that data.augment drew."""


def _view(text: str) -> str:
    codec, colon, quality = text.partition(":")
    encoded = codec in ENCODERS and bool(colon) and quality.isdigit() and int(quality) <= 100
    if text not in ("none", DRAWN) and not encoded:
        raise ValueError(
            f"should be none, {DRAWN} or ENCODER:QUALITY, as libx264:40 or jpeg:30 (encoders: "
            f"{', '.join(ENCODERS)})"
        )
    return text


View = Annotated[str, AfterValidator(_view)]


class Part(BaseModel):
    """A part of a recipe: frozen; nothing unknown, no text for a number, no NaN, no infinity."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)

    def replaced(self, **changes: Any) -> Self:
        """The part with other values, checked as if it were made anew."""
        # Not model_copy(update=…), which checks nothing.
        return type(self)(**(dict(self) | changes))


class Augment(Part):
    """How crops are disturbed; each figure is a probability.

    Real and forged of a pair are disturbed alike, so that quality never gives the label away.
    """

    flip: Share = 0.5
    jpeg: Share = 0.0
    h264: Share = 0.0
    resize: Share = 0.0
    blur: Share = 0.0
    noise: Share = 0.0
    colour: Share = 0.0
    other: Share = 0.0
    """Another person's features, expression and skin, in another light, before the forging."""
    uploads: Share = 0.0
    """Encodings as uploads have them, in place of jpeg and h264: a phone and then a platform,
    H.264, H.265 or VP9, some in ten bits, through a scaling ladder and back."""
    requantised: Share = 0.0
    """JPEG at quality 8 to 16, last of all."""
    cut_off: Share = 0.0
    """Faces cut by the edge of the picture, as at a border of a frame or in a tight picture."""
    margins: tuple[Annotated[float, Field(ge=0.5, le=3)], ...] = ()
    """Crop margins drawn from, instead of the contract's one; () keeps the contract's."""


class Data(Part):
    """Which pictures the network sees, and how a batch is put together."""

    input: InputContract = InputContract()
    batch: Annotated[int, Field(ge=2)] = 32
    """Crops per step and process, half of them forged."""
    pairing: Literal["balanced", "paired", "kindred", "reals"] = "paired"
    """balanced: as many forged as real, drawn apart; paired: each real beside its own forgery;
    kindred: paired, and each two neighbours forged in the same way; reals: no forgeries at all."""
    frames: Count = 8
    """Frames a video gives to one epoch, drawn anew in each."""
    evaluation_frames: Count = 32
    """Frames a video gives to evaluation, spread evenly, the same every time."""
    augment: Augment = Augment()
    families: tuple[Known, ...] = ()
    """Pseudo-forgeries made from the reals; () uses only forgeries that are on disk.  The one held
    out is listed too, and left out of training."""
    shares: tuple[float, ...] = ()
    """How often each of the families is drawn, in their order; () draws them alike."""
    held_out: str | None = None
    """A family, or a method of forgeries on disk, that is never trained on: it judges what
    generalises."""
    also_held_out: tuple[str, ...] = ()
    """Methods of forgeries on disk that are never trained on either: whole generators, kept to be
    judged by."""
    tight_pictures: bool = False
    """For collections whose pictures end at the face: boxes and points come from the mesh where
    there is one, donors show their whole face, and while a face is forged the picture is mirrored
    beyond its edge, or the repeated edge would tell the forged half of a pair."""
    blended_share: Share = 0.5
    """The share of forgeries that are made by blending where some are on disk too."""
    methods: tuple[str, ...] = ()
    """Which forgeries on disk are trained on; () takes all but the one held out."""
    compression: str | None = None
    """Of a dataset that has several: which one is trained on; None takes all."""
    variants: Count | None = None
    """Each face is forged and damaged in so many ways only, which are kept on disk and shown again
    in turn, mirrored by chance; None makes every pair anew."""
    views: tuple[View, ...] = ()
    """Encodings in which each pair stands in one batch, as none,libx264:23,libx264:40: in place of
    those that augment draws, while all else of its damage is the same.  `drawn` leaves what was
    drawn.  A batch keeps its size and its cost, and shows fewer faces.  () shows each pair once."""
    epoch_of: Literal["reals", "videos"] = "reals"
    """reals: an epoch shows each real video's frames once.  videos: it has as many crops as all
    videos, real and forged, have frames."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.batch % 2:
            raise ValueError(f"data.batch {self.batch} should be even: half real, half forged")
        if self.variants is not None and self.pairing != "paired":
            raise ValueError(
                f"data.variants {self.variants} needs data.pairing paired, not {self.pairing}: "
                "pairs are kept, and other batches have none"
            )
        if self.views:
            self._refuse_views()
        if self.shares and (len(self.shares) != len(self.families) or min(self.shares) <= 0):
            raise ValueError(
                f"data.shares should be {len(self.families)} numbers above 0, one for each of "
                f"data.families; got {self.shares}.  None at all draws them alike"
            )
        if self.families == (self.held_out,):
            raise ValueError(
                f"data.held_out {self.held_out!r} is the only one of data.families: nothing is "
                "left to train on"
            )
        if self.families and self.held_out in REGISTRY and self.held_out not in self.families:
            self._list_the_held_out(self.held_out)
        return self

    def _refuse_views(self) -> None:
        each = 2 * len(self.views)
        if len(set(self.views)) < max(2, len(self.views)):
            raise ValueError(f"data.views should be two or more, each once; got {self.views}")
        if self.pairing == "reals" or self.batch % each:
            raise ValueError(
                f"data.views needs data.batch to be a multiple of {each}, a real and a forged crop "
                f"in each view, and another data.pairing than reals; got {self.batch} and "
                f"{self.pairing}"
            )

    def _list_the_held_out(self, family: Any) -> None:
        """Add the family held out to the list.  A recipe with and one without it in the list are
        then the same recipe, and holding out another family trains on this one again."""
        # The model is frozen for its users; it is still being made here.
        object.__setattr__(self, "families", (*self.families, family))
        if self.shares:
            object.__setattr__(self, "shares", (*self.shares, REGISTRY[family].share))

    @property
    def trained_families(self) -> tuple[Family, ...]:
        """The families that training makes: all but the one held out."""
        return tuple(family for family in self.families if family != self.held_out)

    @property
    def left_out(self) -> tuple[str, ...]:
        """All families and methods that neither training nor validation shows."""
        return (*([self.held_out] if self.held_out else []), *self.also_held_out)

    @property
    def unseen(self) -> str | None:
        """The family or method that judges what generalises: the one held out, else the usual
        family if the recipe does not train on it."""
        if self.held_out is not None:
            return self.held_out
        return None if HELD_OUT in self.families else HELD_OUT


class Optimiser(Part):
    """How weights are moved."""

    kind: Literal["adam", "adamw", "sgd"] = "adamw"
    lr: Positive = 3e-4
    betas: tuple[float, float] = (0.9, 0.999)
    """sgd takes the first as its momentum."""
    weight_decay: Share = 0.0
    """adamw leaves vectors (biases, norms) and what no_decay names out of it."""
    no_decay: tuple[str, ...] = ("mask",)
    """Parts of the network that keep their size whatever the decay: it would pull the frequency
    mask's logits to 0, a mask of one half, and shut a gate."""
    rates: tuple[PartRate, ...] = ()
    """PART*FACTOR: the learning rate of a part of the network over `lr`, as gate*20; 0 freezes it.
    A part is a parameter or a module by its dotted name or the end of it."""
    clip: Positive | None = 1.0
    """Largest norm of the whole gradient; None does not clip."""
    accumulate: Count = 1
    """Batches whose gradients are added before one step."""
    ema: Share | None = 0.999
    """Decay of the moving average of the weights, which is what gets judged and published."""
    norm_momentum: Share | None = None
    """How fast batch norms' statistics follow; None: as the backbone's library has it."""
    norms: Literal["batch", "running"] = "batch"
    """What batch norms normalise by while training: RunningBatchNorms in train/loop/optimise.py
    says what a batch's own statistics give away."""


class Schedule(Part):
    """How long, and how fast at which time."""

    epochs: Count = 30
    steps: Count | None = None
    """Optimiser steps in all; overrides epochs."""
    shape: Literal["cosine", "constant"] = "cosine"
    warmup: Share = 0.05
    """Share of the steps in which the rate rises from 0."""
    floor: Share = 0.01
    """Where the cosine ends, as a share of the rate."""
    evaluate_every: Count = 1
    """Epochs between two validations."""
    patience: int | None = None
    """Validations without a better one before the run stops early; None never stops."""
    select: Literal["auc", "bce", "restored", "last"] = "auc"
    """Which figure on the validation split says which weights are best; the test split is never
    used.  restored is the reconstructor's: the removed energy that it gives back.  last takes the
    newest: for a rate that falls to its floor, judged by a split too small to choose."""


class Init(Part):
    """Where first weights come from."""

    backbone: str | None = "imagenet"
    """imagenet (from timm's hub), a safetensors file with timm's names, the folder of a run or of a
    published version with the same backbone (of several, commas between: the mean of their
    weights), or None: random."""
    network: str | None = None
    """The folder of a run or version with the same network, or of several, whose judged weights to
    go on from; a backbone other than ImageNet's is filled in after it, into what judges the crop
    itself: the stems of RALF's residual and guide keep what they learnt."""
    perceptual: str | None = "imagenet"
    """imagenet (from torchvision's hub), a safetensors file with torchvision's names, or None."""


class Loss(Part):
    """What a loss's options have in common; each file in train/losses/ adds its own."""

    kind: str
    consistency: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    """Weight of what draws the verdicts on one picture in several encodings (data.views) together:
    the Jensen-Shannon divergence of their probabilities, 0 to ln 2."""


def _by_kind(given: Any) -> Any:
    """A stored loss as the options of its kind, which may belong to another package."""
    if not isinstance(given, dict):
        return given
    options: type[Loss] = losses.find(given.get("kind")).options
    try:
        # By way of JSON, where a list may stand for a tuple.
        return options.model_validate_json(json.dumps(given))
    except ValidationError as error:
        raise ValueError(explained(error, "loss")) from error


class Recipe(Part):
    """A whole training run."""

    name: str
    network: Network
    # SerializeAsAny: pydantic would store only the fields of Loss itself, without the options.
    # BeforeValidator: Loss itself would refuse the options as fields that it does not have.
    loss: Annotated[SerializeAsAny[Loss], BeforeValidator(_by_kind)]
    data: Data = Data()
    optimiser: Optimiser = Optimiser()
    schedule: Schedule = Schedule()
    init: Init = Init()
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """What products are computed in; weights and their steps stay FP32.  bf16 falls back to fp32,
    said in the log, on a processor that has no bf16 in hardware."""
    seed: int = 0
    notes: tuple[str, ...] = Field(default=(), repr=False)
    """Why the choices are what they are; goes on the card."""

    @model_validator(mode="after")
    def _sizes_agree(self) -> Self:
        size = self.network.dimensions.get("size")
        if size is not None and size != self.data.input.size:
            raise ValueError(
                f"network.size {size} and data.input.size {self.data.input.size} should be the "
                "same: set both"
            )
        return self

    @model_validator(mode="after")
    def _can_compare(self) -> Self:
        if self.loss.consistency and not self.data.views:
            raise ValueError(
                f"loss.consistency {self.loss.consistency} compares views of a picture, and there "
                "is one of each: set data.views, for instance to none,libx264:23,libx264:40"
            )
        return self

    @model_validator(mode="after")
    def _can_choose(self) -> Self:
        chosen, restores = self.schedule.select, self.loss.kind in ("reconstruct", "masked")
        if chosen != "last" and restores != (chosen == "restored"):
            fitting = "restored" if restores else "auc or bce"
            raise ValueError(
                f"schedule.select {chosen!r} should be {fitting} or last with loss.kind "
                f"{self.loss.kind!r}"
            )
        return self
