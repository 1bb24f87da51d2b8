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

As published the classifier reads the residual alone.  With sees="both" (ours, not the paper's) the
crop itself enters too, by a stem of its own, and the residual is let in through one learnt gate a
channel, which is zero at first: so the detector begins as its classifier alone.

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
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ralf.kernels.dct import destruct_reference
from ralf.kernels.destructor import destruct_residual
from ralf.kernels.networks.backbones import (
    Backbone,
    NetworkError,
    Pool,
    dtype_of,
    load_backbone,
    lower_backbone,
    unit,
)
from ralf.kernels.networks.reconstructor import Reconstructor

Sees = Literal["residual", "both"]


class Trace(NamedTuple):
    """Every intermediate value that training uses, FP32."""

    image: Tensor  # [m, 3, s, s] 0..1
    destroyed: Tensor  # [m, 3, s, s]
    rebuilt: Tensor  # [m, 3, s, s]
    embedding: Tensor  # [m, 4c] mean of the deepest encoder's map
    attention: Tensor  # [m, 1, ~s/2, ~s/2] 0..1; ones where unguided
    logit: Tensor  # [m] of being forged


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
    ) -> None:
        super().__init__()
        if sees not in ("residual", "both"):
            raise NetworkError(f"sees should be residual or both, got {sees!r}")
        # The reconstructor halves the image twice, and a backbone reduces it to a 32nd.
        if size < 32 or size % 4:
            raise NetworkError(f"size should be a multiple of 4, at least 32, got {size}")
        self.size = size
        self.mask = nn.Parameter(torch.zeros(size, size))  # before the sigmoid
        self.reconstructor = Reconstructor(base, blocks)
        self.classifier = Backbone(backbone, pool)
        # A copy: it reads another residual, so its norms need statistics of their own.
        self.guide = deepcopy(self.classifier.stem) if guided else None
        self.attention = SpatialAttention() if guided else None
        self.plain = deepcopy(self.classifier.stem) if sees == "both" else None
        if self.plain is not None:
            # The last norm has the stem's width in every family; the convolutions' names differ.
            *_, last = (part for part in self.plain if isinstance(part, nn.BatchNorm2d))
            self.gate = nn.Parameter(torch.zeros(last.num_features, 1, 1))

    def destroy(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        """The crops without what the mask takes away, FP32, and |x − that|."""
        mask = self.mask.float().sigmoid()
        if torch.compiler.is_exporting():
            # Plain products: our op exists only in torch, and torch 2.11 cannot decompose it after
            # the export (SpecViolationError: the basis is a constant that the program lacks).
            destroyed = destruct_reference(crops, mask)
            return destroyed, (unit(crops) - destroyed).abs()
        made: tuple[Tensor, Tensor]
        made = destruct_residual(crops, mask, self.filters_in_half(crops.device))
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
        dtype = dtype_of(self.classifier.stem)
        # Subtracted in FP32: rounding both first would leave mostly rounding of their difference.
        features = self.classifier.stem((image - rebuilt).abs().to(dtype))
        if self.guide is not None and self.attention is not None:
            attention = self.attention(self.guide(removed.to(dtype)))
            features = features * attention
        else:
            attention = torch.ones_like(features[:, :1])
        if self.plain is not None:
            plain = self.plain((image * 2 - 1).to(dtype))
            # `lower` leaves the gate in FP32, which would make the sum FP32 too.
            features = plain + self.gate.to(plain.dtype) * features
        logit = self.classifier.classify(features)
        embedding = encoded.float().mean((2, 3))
        return Trace(image, destroyed, rebuilt, embedding, attention.float(), logit)

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
            for part in (self.guide, self.attention, self.plain):
                if part is not None:
                    part.to(dtype)
        return self

    def initialise(
        self, weights: Path | str | None = None, pretrained: bool = False
    ) -> tuple[str, ...]:
        """Fill the classifier as load_backbone does, and the other stems like the main one."""
        left = load_backbone(self.classifier, weights, pretrained)
        # They were copied before the file was read, so they still hold the random weights.
        for stem in (self.guide, self.plain):
            if stem is not None:
                stem.load_state_dict(self.classifier.stem.state_dict())
        return left
