"""The reconstructor: a coarse-to-fine U-Net that gives a destroyed face its frequencies back.

After MIMO-UNet: three scales at once.  The image enters at full, half and quarter size; each scale
has its own stack of residual blocks going down (encoders) and coming up (decoders), 1×, 2× and 4×
`base` channels wide.  No batch norm anywhere.  As RALF uses it, one output at full size, and the
network gives only what is added to its input: out = z + destroyed.

    image ──▶ enter ─▶ E0 ─────────────── fuse0 ──▶ D0 ─▶ leave ─▶ z
      ½   ──▶ shallow ─▶ gate ─▶ E1 ───── fuse1 ──▶ D1 ─▲
      ¼   ──▶ shallow ─▶ gate ─▶ E2 ──▶ D2 ────────▲       fuse: all three scales together

B: batch   h, w: height, width of a full-size map, multiples of 4   c: base
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ralf.kernels.networks.backbones import dtype_of


class Rebuilt(NamedTuple):
    """The rebuilt image, and the deepest encoder's map, whose mean is the face's embedding."""

    image: Tensor  # [B, 3, h, w]
    encoded: Tensor  # [B, 4c, h/4, w/4]


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, relu: bool = True) -> nn.Module:
    """A padded convolution with bias, and a ReLU behind it where asked."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2)
    return nn.Sequential(layer, nn.ReLU(inplace=True)) if relu else layer


def deconv(inputs: int, outputs: int) -> nn.Module:
    """Twice the size: a transposed 4×4 convolution and a ReLU."""
    layer = nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1)
    return nn.Sequential(layer, nn.ReLU(inplace=True))


def half(image: Tensor) -> Tensor:
    """Nearest neighbour at half the size."""
    return interpolate(image, scale_factor=0.5, mode="nearest")


def double(image: Tensor) -> Tensor:
    """Nearest neighbour at twice the size."""
    return interpolate(image, scale_factor=2.0, mode="nearest")


class Residual(nn.Module):
    """Two 3×3 convolutions around an identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(width, width, 3), conv(width, width, 3, relu=False))
        # Other kernels for the same block, on CUDA; ralf.kernels.residual_blocks sets it.
        self.instead: Callable[[Residual, Tensor], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.instead is not None and not torch.compiler.is_exporting():
            return self.instead(self, x)
        added: Tensor = self.body(x) + x
        return added


def stack(width: int, blocks: int) -> nn.Module:
    """One scale's encoder or decoder."""
    return nn.Sequential(*(Residual(width) for _ in range(blocks)))


class Shallow(nn.Module):
    """Shallow features of a reduced image at its own scale, the image itself among them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv(3, width // 4, 3),
            conv(width // 4, width // 2, 1),
            conv(width // 2, width // 2, 3),
            # Three fewer: the image's own channels are put beside them.
            conv(width // 2, width - 3, 1),
        )
        self.merge = conv(width, width, 1, relu=False)

    def forward(self, image: Tensor) -> Tensor:
        merged: Tensor = self.merge(torch.cat((image, self.body(image)), dim=1))
        return merged


class FeatureAttention(nn.Module):
    """MIMO-UNet's: the scale above plus a convolution of its product with our own features."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.merge = conv(width, width, 3, relu=False)

    def forward(self, above: Tensor, own: Tensor) -> Tensor:
        gated: Tensor = above + self.merge(above * own)
        return gated


class ScaleFusion(nn.Module):
    """The three encoders' maps as one scale's share for its decoder.

    By definition a 1×1 convolution of the maps resized to one size and concatenated.  Resizing
    by nearest neighbour commutes with it, so each map is convolved at its own, smaller size and
    the 7c full-size channels never exist.
    """

    def __init__(self, base: int, scale: int) -> None:
        super().__init__()
        self.scale = scale
        width = base << scale
        widths = [base << i for i in range(3)]
        whole = nn.Conv2d(sum(widths), width, 1)
        # The parts add up to one convolution, so only one of them has a bias.
        self.parts = nn.ModuleList(nn.Conv2d(c, width, 1, bias=c == widths[-1]) for c in widths)
        with torch.no_grad():  # the fan-in is that of the whole
            for part, weight in zip(self.parts, torch.split(whole.weight, widths, 1), strict=True):
                part.get_parameter("weight").copy_(weight)
            self.parts[2].get_parameter("bias").copy_(whole.get_parameter("bias"))
        self.body = nn.Sequential(nn.ReLU(inplace=True), conv(width, width, 3, relu=False))

    def forward(self, *maps: Tensor) -> Tensor:
        # From the smallest map on, so that each sum is made before it is enlarged.
        total = self.parts[2](maps[2])
        for finer in (1, 0):
            if finer >= self.scale:
                total = self.parts[finer](maps[finer]) + double(total)
            else:
                total = self.parts[finer](half(maps[finer])) + total
        fused: Tensor = self.body(total)
        return fused


class Reconstructor(nn.Module):
    """R: destroyed image in, rebuilt image out; `base` channels, `blocks` a stack."""

    def __init__(self, base: int = 32, blocks: int = 8) -> None:
        super().__init__()
        # Shallow's first convolution has base / 2 channels.
        if base < 4 or base % 2 or blocks < 1:
            raise ValueError(f"base should be even and ≥ 4, blocks ≥ 1, got {base} and {blocks}")
        c1, c2, c4 = base, 2 * base, 4 * base
        self.enter = conv(3, c1, 3)
        self.down = nn.ModuleList([conv(c1, c2, 3, stride=2), conv(c2, c4, 3, stride=2)])
        self.encoders = nn.ModuleList(stack(c, blocks) for c in (c1, c2, c4))
        self.shallow = nn.ModuleList([Shallow(c2), Shallow(c4)])
        self.gates = nn.ModuleList([FeatureAttention(c2), FeatureAttention(c4)])
        self.fuses = nn.ModuleList([ScaleFusion(base, 0), ScaleFusion(base, 1)])
        self.decoders = nn.ModuleList(stack(c, blocks) for c in (c1, c2, c4))
        self.up = nn.ModuleList([deconv(c2, c1), deconv(c4, c2)])
        self.joins = nn.ModuleList([conv(2 * c1, c1, 1), conv(2 * c2, c2, 1)])
        self.leave = conv(c1, 3, 3, relu=False)

    def forward(self, destroyed: Tensor) -> Rebuilt:
        """Destroyed image [B, 3, h, w] about 0..1; the convolutions in their weights' dtype."""
        image = destroyed.to(dtype_of(self))
        image2 = half(image)
        image4 = half(image2)
        e0 = self.encoders[0](self.enter(image))
        e1 = self.encoders[1](self.gates[0](self.down[0](e0), self.shallow[0](image2)))
        e2 = self.encoders[2](self.gates[1](self.down[1](e1), self.shallow[1](image4)))
        share0 = self.fuses[0](e0, e1, e2)
        share1 = self.fuses[1](e0, e1, e2)
        z = self.up[1](self.decoders[2](e2))
        z = self.up[0](self.decoders[1](self.joins[1](torch.cat((z, share1), dim=1))))
        z = self.leave(self.decoders[0](self.joins[0](torch.cat((z, share0), dim=1))))
        # The sum keeps the destroyed image's own precision: z is small, the image is not.
        return Rebuilt(z + destroyed, e2)
