"""RALF: take frequencies out of a face, put authentic ones back, judge by the difference.

    crops ─▶ destruct ─▶ destroyed ─▶ reconstruct ─▶ rebuilt
      x                     │                           │
      └──── |x − destroyed| ┴─▶ guide stem ─▶ attention │
      ├──── |x − rebuilt| ──────▶ main stem ──── × ◀────┘ ─▶ rest ─▶ global pool ─▶ one logit
      └─ sees=both: x ─▶ plain stem ──────────── + ◀ gate

The mask is one learnt matrix for all three colours, half open at the start.  A real face should
come back as it was; a forged one should not, and the guide shows where something was taken out.
Equations are those of the paper (eq. 1 for the destructor); the logit is of *forged*, where the
paper's is of real.

As published the classifier reads the residual alone.  The other two ways are ours:

    both    the crop itself enters too, by a stem of its own, and the residual is let in through one
            learnt gate a channel, which is zero at first: so the detector begins as its classifier
            alone.  A gate at zero also gives the residual's stem no gradient, and in what was
            trained this way the gates never opened
    bands   the crop enters by the classifier's own stem; the *signed* residual, by bands of
            frequency over their deviation on real faces (bands.py), by a stem of its own, through
            gates that begin at 0.1.  A second head judges the residual alone by the same rest, so
            that it has a loss of its own; it takes no part in the logit

`ablated` judges with a part of it closed, to show whether the residual is at work.

Numerics.  Images, residuals, mask and head are FP32 whatever the convolutions run in: the
residual is a small difference of two large numbers, so it is taken first and rounded after.
On CUDA in half precision the filter's products are FP16 too, summed in FP32 (see dct_triton).
In bf16 (8 bits) only the reconstructor runs, 90 % of the arithmetic.  Measured with the small
dimensions, a pretrained classifier and eight portraits, logits of 0.7 to 2.0, against FP32:
the reconstructor in bf16 moves a logit by at most 0.007, the classifier too by 0.25.

m: faces   s: side of a crop   c: base
"""

from copy import deepcopy
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from ralf.kernels.destructor import split
from ralf.kernels.networks.backbones import (
    Backbone,
    NetworkError,
    Pool,
    dtype_of,
    load_backbone,
    lower_backbone,
    stem_of,
    unit,
)
from ralf.kernels.networks.bands import ResidualBands, fixed_mask
from ralf.kernels.networks.reconstructor import Reconstructor

Sees = Literal["residual", "both", "bands"]
SEES: tuple[Sees, ...] = get_args(Sees)
Ablation = Literal["closed", "alone", "shuffled", "identity"]
"""closed: the residual is not let in; alone: the crop is not; shuffled: each face gets another
one's residual; identity: the mask takes nothing away."""
GATE = 0.1
"""Where the gates of sees=bands begin: not at 0, so that the residual's stem has a gradient."""


class Trace(NamedTuple):
    """Every intermediate value that training uses, FP32."""

    image: Tensor  # [m, 3, s, s] 0..1
    destroyed: Tensor  # [m, 3, s, s]
    rebuilt: Tensor  # [m, 3, s, s]
    embedding: Tensor  # [m, 4c] mean of the deepest encoder's map
    attention: Tensor  # [m, 1, ~s/2, ~s/2] 0..1; ones where unguided
    logit: Tensor  # [m] of being forged


class Streams(NamedTuple):
    """What training with sees=bands reads, FP32."""

    logit: Tensor  # [m] of both streams
    residual: Tensor  # [m] of the residual alone, by its own head


class Explanation(NamedTuple):
    """Pictures for a reviewer, FP32."""

    destroyed: Tensor  # [m, 3, s, s] about 0..1
    rebuilt: Tensor  # [m, 3, s, s] about 0..1
    residual: Tensor  # [m, 3, s, s] |x − rebuilt|
    attention: Tensor  # [m, 1, ~s/2, ~s/2] 0..1


class SpatialAttention(nn.Module):
    """CBAM's spatial attention, from the largest and the mean channel at each place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, features: Tensor) -> Tensor:
        summary = torch.cat((features.amax(1, keepdim=True), features.mean(1, keepdim=True)), 1)
        weights: Tensor = self.conv(summary).sigmoid()
        return weights


class Ralf(nn.Module):
    """The detector; its dimensions are what the manifest's `network` holds."""

    def __init__(
        self,
        *,
        base: int = 32,
        blocks: int = 8,
        backbone: str = "xception",
        size: int = 256,
        pool: Pool = "max",
        guided: bool = True,
        sees: Sees = "residual",
        keeps: float = 0.0,
        leaves: float = 0.5,
    ) -> None:
        """`keeps` and `leaves` say where the mask begins: it keeps all below that level (bands.py
        says what a level is), and that share of the rest."""
        super().__init__()
        if sees not in SEES:
            raise NetworkError(f"sees should be one of {', '.join(SEES)}, got {sees!r}")
        # The reconstructor halves the image twice, and a backbone reduces it to a 32nd.
        if size < 32 or size % 4:
            raise NetworkError(f"size should be a multiple of 4, at least 32, got {size}")
        if keeps < 0 or not 0 < leaves < 1:
            raise NetworkError(
                f"keeps should be 0 or more and leaves between 0 and 1, got {keeps} and {leaves}"
            )
        self.size = size
        self.sees = sees
        self.mask = nn.Parameter(fixed_mask(size, keeps, leaves))  # before the sigmoid
        self.reconstructor = Reconstructor(base, blocks)
        self.classifier = Backbone(backbone, pool)
        # A copy: it reads another residual, so its norms need statistics of their own.
        self.guide = deepcopy(self.classifier.stem) if guided else None
        self.attention = SpatialAttention() if guided else None
        self.plain = deepcopy(self.classifier.stem) if sees == "both" else None
        self.bands: ResidualBands | None = None
        if sees == "bands":
            self.bands = ResidualBands(size)
            self.residual = stem_of(backbone, self.bands.channels)
            self.residual_head = nn.Linear(self.classifier.width, 1)
        if sees != "residual":
            # The last norm has the stem's width in every family; the convolutions' names differ.
            norms = (x for x in self.classifier.stem if isinstance(x, nn.BatchNorm2d))
            *_, last = norms
            begin = GATE if sees == "bands" else 0.0
            self.gate = nn.Parameter(torch.full((last.num_features, 1, 1), begin))

    def destroy(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        """The crops without what the mask takes away, FP32, and |x − that|."""
        mask = self.mask.float().sigmoid()
        made: tuple[Tensor, Tensor]
        made = split(crops, mask, self.filters_in_half(crops.device))
        return made

    def filters_in_half(self, device: torch.device) -> bool:
        """Whether the filter's products run in FP16: on CUDA, where the convolutions do as well."""
        lowered = dtype_of(self.reconstructor) is torch.float16
        return device.type == "cuda" and (lowered or torch.is_autocast_enabled("cuda"))

    def trace(self, crops: Tensor) -> Trace:
        """Crops u8, or floats of 0..1, [m, 3, s, s] RGB, and all that is made of them."""
        return self.follow(crops, *self.destroy(crops))

    def follow(self, crops: Tensor, destroyed: Tensor, removed: Tensor) -> Trace:
        """The network after `destroy`, whose results a fused op may have computed."""
        image = unit(crops)
        rebuilt, encoded = self.reconstructor(destroyed)
        features, attention = self._read(image, rebuilt, removed)
        logit = self.classifier.classify(self._merged(self._plain(image), features))
        embedding = encoded.float().mean((2, 3))
        return Trace(image, destroyed, rebuilt, embedding, attention.float(), logit)

    def _read(self, image: Tensor, rebuilt: Tensor, removed: Tensor) -> tuple[Tensor, Tensor]:
        """The residual's features, weighed by the attention, and the attention."""
        dtype = dtype_of(self.classifier.stem)
        # Subtracted in FP32: rounding both first would leave mostly rounding of their difference.
        residual = image - rebuilt
        if self.bands is not None:
            features = self.residual(self.bands(residual).to(dtype))
        else:
            features = self.classifier.stem(residual.abs().to(dtype))
        if self.guide is None or self.attention is None:
            return features, torch.ones_like(features[:, :1])
        attention = self.attention(self.guide(removed.to(dtype)))
        return features * attention, attention

    def _plain(self, image: Tensor) -> Tensor | None:
        """The crop's own features; None where the classifier sees the residual alone."""
        stem = self.classifier.stem if self.bands is not None else self.plain
        return None if stem is None else stem((image * 2 - 1).to(dtype_of(stem)))

    def _merged(self, plain: Tensor | None, features: Tensor) -> Tensor:
        """What the rest of the classifier reads."""
        if plain is None:
            return features
        # `lower` leaves the gate in FP32, which would make the sum FP32 too.
        return plain + self.gate.to(plain.dtype) * features

    def streams(self, crops: Tensor, *, plain: bool = True) -> Streams:
        """The logits of both streams and of the residual alone; without `plain` the crop's own
        features are dropped from both, as training does now and then."""
        if self.bands is None:
            raise NetworkError(f"sees={self.sees} has no head for the residual alone: sees=bands")
        destroyed, removed = self.destroy(crops)
        image = unit(crops)
        features, _ = self._read(image, self.reconstructor(destroyed).image, removed)
        own = self._plain(image) if plain else torch.zeros_like(features)
        merged = self._merged(own, features)
        return Streams(self.classifier.classify(merged), self._judge_alone(features))

    def residual_logit(self, crops: Tensor) -> Tensor:
        """Logits [m] of the residual alone: by its own head where it has one."""
        destroyed, removed = self.destroy(crops)
        features, _ = self._read(unit(crops), self.reconstructor(destroyed).image, removed)
        return self._judge_alone(features)

    def _judge_alone(self, features: Tensor) -> Tensor:
        """The residual's features by the shared rest and their own head, FP32 [m]."""
        if self.bands is None:
            return self.classifier.classify(features)
        pooled = self.classifier.conclude(self.classifier.rest(features)).embedding
        logits: Tensor = self.residual_head(pooled.to(dtype_of(self.residual_head)))
        return logits.squeeze(1).float()

    def ablated(self, crops: Tensor, how: Ablation) -> Tensor:
        """Logits [m] with a part closed: is the residual at work?"""
        if self.sees == "residual":
            raise NetworkError("sees=residual has no second stream, so nothing can be closed")
        image = unit(crops)
        plain = self._plain(image)
        assert plain is not None
        if how == "closed":
            return self.classifier.classify(plain)
        if how == "alone":
            return self.residual_logit(crops)
        if how == "identity":
            destroyed, removed = image, torch.zeros_like(image)
        else:
            destroyed, removed = self.destroy(crops)
        rebuilt = self.reconstructor(destroyed).image
        features, _ = self._read(image, rebuilt, removed)
        if how == "shuffled":
            # Half a batch on: neighbours are often forgeries of one face.
            features = features.roll(max(1, len(features) // 2), 0)
        return self.classifier.classify(self._merged(plain, features))

    def forward(self, crops: Tensor) -> Tensor:
        """Crops u8, or floats of 0..1, [m, 3, s, s] RGB → logits [m] of being forged."""
        return self.trace(crops).logit

    def explain(self, crops: Tensor) -> Explanation:
        """The destroyed image, the rebuilt one, their difference, and the guide's attention."""
        trace = self.trace(crops)
        residual = (trace.image - trace.rebuilt).abs()
        return Explanation(trace.destroyed, trace.rebuilt, residual, trace.attention)

    def lower(self, dtype: torch.dtype) -> "Ralf":
        """Convolutions in a smaller dtype, where the logit stays accurate (see Numerics)."""
        self.reconstructor.to(dtype)
        # In bf16 the classifier alone moves a logit by 0.25.
        if dtype is torch.float16:
            lower_backbone(self.classifier, dtype)
            for name in ("guide", "attention", "plain", "residual"):
                part: nn.Module | None = getattr(self, name, None)
                if part is not None:
                    part.to(dtype)
        return self

    def initialise(
        self, weights: Path | str | None = None, pretrained: bool = False
    ) -> tuple[str, ...]:
        """Fill the classifier as load_backbone does, and the other stems of three colours like the
        main one."""
        left = load_backbone(self.classifier, weights, pretrained)
        # They were copied before the file was read, so they still hold the random weights.
        for stem in (self.guide, self.plain):
            if stem is not None:
                stem.load_state_dict(self.classifier.stem.state_dict())
        return left

    def initialise_plain(
        self, weights: Path | str | None = None, pretrained: bool = False
    ) -> tuple[str, ...]:
        """Fill what judges the crop itself, in a network that is trained already: the stems of the
        residual and of the guide keep what they learnt."""
        read = {name: x.clone() for name, x in self.classifier.stem.state_dict().items()}
        left = load_backbone(self.classifier, weights, pretrained)
        if self.plain is not None:
            self.plain.load_state_dict(self.classifier.stem.state_dict())
            self.classifier.stem.load_state_dict(read)
        return left

    @property
    def cam_layer(self) -> nn.Module:
        """Where Grad-CAM looks."""
        return self.classifier.cam_layer
