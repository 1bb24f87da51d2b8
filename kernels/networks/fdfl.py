"""FDFL's network: a face judged by its pixels and by what a JPEG encoder would see of it.

    crops ─▶ stem ─▶ entry flow ──────────────────▶ fuse ─▶ middle and exit flow ─▶ one logit
      └────▶ spectrum ─▶ norm ─▶ mining block ────────┘
             [192, s/8, s/8]     [width, s/16, s/16]

The spectrum (`Spectrum`) is the first half of JPEG: YCbCr, blocks of 8 × 8, their DCT, and then
each frequency of each colour as a channel of its own, its blocks in their places.  The mining
block learns which of them matter: a convolution within each colour, one across them, pooling,
one weight for each channel.  The published description ends there; the rest is our choice:
the norms and activations between, the mining block's width (that of the spectrum), and the
fusion, which is a dimension, since the paper compares several and names none that we know of:

    gate        x + a·f, the factor a begins at `gate`: near zero it begins as the backbone, but
                at zero the mining block has no gradient either; the default
    sum         x + f
    concat      both side by side, one 1 × 1 convolution, norm, ReLU
    attention   a weight from 0 to 1 at each place and channel weighs pixels against frequencies
    none        x alone: the baseline for this branch

A fresh convolution in the middle of a trained backbone undoes its training.  Validation AUC from
the same warm backbone, 50 batches of 16 at 128 px, cross entropy alone or with the single-center
loss: none 0.84 and 0.74, gate 0.84 and 0.77, concat (with it) 0.39.

Numerics.  Spectrum and its norm are FP32.  A crop's DC lies within ±64 and coefficients in steps
of 1/16: so scaled, the variance of any frequency is a number that FP16 holds, and the norm's
statistics can be published (in 8-bit units the DC's variance may pass 65,504; in 0..1 that of the
highest frequencies sinks under FP16's smallest normal number).

At a side that is a multiple of 16 both streams have maps of a sixteenth of it.  Xception's first
convolutions are not padded and lose a border; later strides round up, which restores the size.

m: faces   s: side of a crop
"""

from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ralf.kernels.dct import basis
from ralf.kernels.networks.backbones import (
    Backbone,
    Features,
    NetworkError,
    Pool,
    dtype_of,
    lower_backbone,
    unit,
)
from ralf.kernels.networks.bands import in_fp32

BLOCK = 8
CHANNELS = 3 * BLOCK * BLOCK
LEVEL = 128 / 255
"""JPEG's level shift, for pixels of 0..1."""
SCALE = 16.0
"""Of coefficients of such pixels: see Numerics."""
# JPEG's (JFIF's) conversion from R, G, B to Y, Cb, Cr, full range.
YCBCR = (
    (0.299, 0.587, 0.114),
    (-0.168735892, -0.331264108, 0.5),
    (0.5, -0.418687589, -0.081312411),
)
Fusion = Literal["gate", "sum", "concat", "attention", "none"]
FUSIONS: tuple[Fusion, ...] = get_args(Fusion)


def block_dct() -> Tensor:
    """Kernels [192, 3, 8, 8]: at stride 8, a convolution that gives a JPEG's coefficients.

    Channel 64 p + 8 v + u is frequency v down and u across of plane p of Y, Cb, Cr.  Pixels come
    less LEVEL, as JPEG moves Y; the rows of Cb and Cr sum to zero, so that it changes neither.
    """
    # FP64 until the kernels are complete, so that they are rounded once.
    rows = basis(BLOCK, torch.float64, torch.device("cpu"))
    waves = torch.einsum("vy,ux->vuyx", rows, rows).reshape(1, BLOCK * BLOCK, 1, BLOCK, BLOCK)
    planes = torch.tensor(YCBCR, dtype=torch.float64).reshape(3, 1, 3, 1, 1)
    return (planes * waves).reshape(CHANNELS, 3, BLOCK, BLOCK)


class Spectrum(nn.Module):
    """Crops to [m, 192, s/8, s/8]: every block's DCT in YCbCr, a frequency a channel."""

    kernels: Tensor

    def __init__(self) -> None:
        super().__init__()
        # Constants of the format, not weights: made anew wherever the network is built.
        self.register_buffer("kernels", (block_dct() * SCALE).float(), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """Images of 0..1."""
        # Near white bf16's steps are as large as fine detail.
        with in_fp32(image.device.type):
            return F.conv2d(image.to(self.kernels.dtype) - LEVEL, self.kernels, stride=BLOCK)


class ChannelAttention(nn.Module):
    """A weight from 0 to 1 for each channel, from the means of all."""

    def __init__(self, width: int, squeezed: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(width, squeezed), nn.ReLU(), nn.Linear(squeezed, width), nn.Sigmoid()
        )

    def forward(self, maps: Tensor) -> Tensor:
        """The maps, weighed."""
        weights: Tensor = self.body(maps.mean((2, 3)))
        return maps * weights[:, :, None, None]


class MiningBlock(nn.Module):
    """Which frequencies matter, learnt: within a colour, across colours, then by channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.apart = _convolution(CHANNELS, CHANNELS, 3, groups=3)
        self.together = _convolution(CHANNELS, CHANNELS, 3)
        self.pool = nn.MaxPool2d(2)
        self.attention = ChannelAttention(CHANNELS, CHANNELS // 16)
        # The published block ends at the weights; the backbone's width needs one more convolution.
        self.leave = nn.Conv2d(CHANNELS, width, 1)

    def forward(self, spectrum: Tensor) -> Tensor:
        """[m, 192, s/8, s/8] → [m, width, s/16, s/16]."""
        maps = self.pool(self.together(self.apart(spectrum)))
        left: Tensor = self.leave(self.attention(maps))
        return left


class StreamFusion(nn.Module):
    """Two maps of one shape to one; the module's docstring says how."""

    def __init__(self, kind: Fusion, width: int, gate: float = 0.0) -> None:
        super().__init__()
        self.kind = kind
        if kind == "concat":
            self.merge = _convolution(2 * width, width, 1)
        elif kind == "attention":
            self.merge = nn.Sequential(nn.Conv2d(2 * width, width, 1), nn.Sigmoid())
        elif kind == "gate":
            self.factor = nn.Parameter(torch.full((width,), gate))

    def forward(self, pixels: Tensor, frequencies: Tensor) -> Tensor:
        """The input of the middle flow."""
        if self.kind == "sum":
            return pixels + frequencies
        if self.kind == "gate":
            return pixels + self.factor[:, None, None] * frequencies
        merged: Tensor = self.merge(torch.cat((pixels, frequencies), 1))
        if self.kind == "attention":
            return merged * pixels + (1 - merged) * frequencies
        return merged


class FdflStreams(NamedTuple):
    """What training reads where the frequencies have a loss of their own, FP32."""

    embedding: Tensor  # [m, c]
    logit: Tensor  # [m] of pixels and frequencies
    frequencies: Tensor  # [m] of the frequencies alone, by their own head


class Fdfl(nn.Module):
    """The detector; its dimensions are what the manifest's `network` holds."""

    def __init__(
        self,
        *,
        backbone: str = "xception",
        size: int = 256,
        fusion: Fusion = "gate",
        pool: Pool = "mean",
        gate: float = 0.0,
        alone: bool = False,
    ) -> None:
        """`gate` is where the factor of fusion=gate begins; 0 is what older runs began with.
        `alone` adds a head that judges the frequencies alone, for their own loss in training; it
        takes no part in the logit."""
        super().__init__()
        # Whole blocks of 8, and an even number of them: the mining block pools by 2.
        if size < 32 or size % (2 * BLOCK):
            raise NetworkError(f"size should be a multiple of 16, at least 32, got {size}")
        if fusion not in FUSIONS:
            raise NetworkError(f"fusion should be one of {', '.join(FUSIONS)}, got {fusion!r}")
        self.size = size
        self.backbone = Backbone(backbone, pool)
        self.spectrum: Spectrum | None = None
        if fusion != "none":
            width = self.backbone.family.channels
            self.spectrum = Spectrum()
            # Outside the mining block, which `lower` converts: the norm of the spectrum stays in
            # FP32.
            self.norm = nn.BatchNorm2d(CHANNELS)
            self.mining = MiningBlock(width)
            self.fuse = StreamFusion(fusion, width, gate)
        if alone and fusion == "none":
            raise NetworkError("alone=true judges the frequencies, and fusion=none has none")
        self.alone = nn.Linear(self.backbone.width, 1) if alone else None

    def trace(self, crops: Tensor) -> Features:
        """Crops u8, or floats of 0..1, [m, 3, s, s] RGB, and what losses read."""
        pixels, mined = self._maps(unit(crops))
        maps = pixels if mined is None else self.fuse(pixels, mined)
        return self.backbone.conclude(self.backbone.leave(maps))

    def streams(self, crops: Tensor, *, plain: bool = True) -> FdflStreams:
        """As trace, and the logit of the frequencies alone by the same middle and exit flow;
        without `plain` the pixels' maps are dropped, as training does now and then."""
        pixels, mined = self._maps(unit(crops))
        if self.alone is None or mined is None:
            raise NetworkError("no head for the frequencies alone: alone=true adds it")
        backbone = self.backbone
        maps = self.fuse(pixels if plain else torch.zeros_like(pixels), mined)
        embedding, logit = backbone.conclude(backbone.leave(maps))
        own = backbone.conclude(backbone.leave(mined)).embedding
        frequencies: Tensor = self.alone(own.to(dtype_of(self.alone)))
        return FdflStreams(embedding, logit, frequencies.squeeze(1).float())

    def _maps(self, image: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of images of 0..1, what is fused: the maps of the pixels, and of the frequencies."""
        backbone = self.backbone
        dtype = dtype_of(backbone.stem)
        pixels = backbone.enter(backbone.stem((image * 2 - 1).to(dtype)))
        if self.spectrum is None:
            return pixels, None
        return pixels, self.mining(self.norm(self.spectrum(image)).to(dtype))

    def forward(self, crops: Tensor) -> Tensor:
        """Crops u8, or floats of 0..1, [m, 3, s, s] RGB → logits [m] of being forged."""
        return self.trace(crops).logit

    def lower(self, dtype: torch.dtype) -> "Fdfl":
        """The convolutions in a smaller dtype; spectrum, its norm and the head stay in FP32."""
        lower_backbone(self.backbone, dtype)
        if self.spectrum is not None:
            self.mining.to(dtype)
            self.fuse.to(dtype)
        return self

    @property
    def cam_layer(self) -> nn.Module:
        """Where Grad-CAM looks."""
        return self.backbone.cam_layer


def _convolution(width: int, wide: int, side: int, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        # No bias: the norm behind it would subtract it again.
        nn.Conv2d(width, wide, side, padding=side // 2, groups=groups, bias=False),
        nn.BatchNorm2d(wide),
        nn.ReLU(inplace=True),
    )
