"""Bands of frequency: a coefficient's level, a fixed mask, and a signed residual band by band.

A coefficient's level is the sum of its two indices (down and across) in the DCT of a square of
256 px; at another side both indices are scaled, so a level means the same detail in pixels of the
crop whatever is transformed.  Levels run from 0 (the mean) to 510 (a checkerboard of pixels).
RALF's loss weighs frequencies by the same number.

    band 1    levels 6 to 24      the shape of eyes, nose and mouth
    band 2          24 to 64      wrinkles, lashes, hair
    band 3          64 to 128     skin
    band 4         128 to 510     grain, and what encoders leave

Below level 6 lie light and colour, which a fixed mask keeps and no band holds.
"""

import math
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from ralf.kernels.dct import dct2, idct2

EDGES = (6.0, 24.0, 64.0, 128.0)
"""The level where each band begins; the last one ends with the spectrum."""
COLOURS = 3
KEPT = 0.999
"""What a fixed mask keeps of a coefficient that it is to keep: a sigmoid never reaches 1."""
LEAST = 1e-4
"""The smallest deviation that a band is divided by: a fortieth of an 8-bit step."""


def levels(size: int) -> Tensor:
    """Every coefficient's level, FP64 [size, size]."""
    index = torch.arange(size, dtype=torch.float64) * (256 / size)
    return index[:, None] + index[None, :]


def bands(size: int) -> Tensor:
    """Which coefficients belong to each band, 0 or 1 in FP32 [bands, size, size]."""
    level = levels(size)
    ends = (*EDGES[1:], math.inf)
    inside = [(level >= low) & (level < high) for low, high in zip(EDGES, ends, strict=True)]
    return torch.stack(inside).float()


def fixed_mask(size: int, keeps: float, leaves: float) -> Tensor:
    """A mask before its sigmoid: all of what lies below level `keeps`, and of the rest a share."""
    below = levels(size) < keeps
    return torch.where(below, math.log(KEPT / (1 - KEPT)), math.log(leaves / (1 - leaves))).float()


def in_fp32(device: str) -> torch.autocast | nullcontext[None]:
    """Autocast off: its bf16 has steps as large as a residual."""
    # torch.autocast raises for device types without autocast, such as meta.
    known = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if known else nullcontext()


class ResidualBands(nn.Module):
    """A signed residual as pictures of its bands, each over its deviation on real faces."""

    deviation: Tensor
    members: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        # Measured while the reconstructor is trained, and published with the weights.
        self.register_buffer("deviation", torch.ones(len(EDGES), COLOURS))
        self.register_buffer("members", bands(size)[:, None], persistent=False)

    @property
    def channels(self) -> int:
        """How many pictures of one colour come out."""
        return len(EDGES) * COLOURS

    def split(self, residual: Tensor) -> Tensor:
        """[m, 3, s, s] to its bands, FP32 [m, bands, 3, s, s]; they add up to it without the
        levels below the first."""
        with in_fp32(residual.device.type):
            spectrum = dct2(residual.float())[:, None] * self.members.float()
            parted: Tensor = idct2(spectrum)
            return parted

    def forward(self, residual: Tensor) -> Tensor:
        """[m, 3, s, s] → FP32 [m, bands · 3, s, s]."""
        deviation = self.deviation.float().clamp(min=LEAST)[:, :, None, None]
        return (self.split(residual) / deviation).flatten(1, 2)
