"""RALF the way its papers' authors run it: the baseline of `ralf bench engine` and `dct`.

The same network with the same weights, and none of this project's optimisations:
- the DCT by an FFT of reordered samples (Makhoul's), un-normalised, as the common packages do it;
- the three scales fused as drawn in the paper: resized to one size, concatenated, convolved;
- FP32, eager, channels first, residuals as separate operations.

Its logits are those of `Ralf` within FP32's rounding (tests/test_bench_baseline.py).  Written from
the papers' equations; not their code.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ralf.kernels.networks.backbones import unit
from ralf.kernels.networks.ralf import Ralf
from ralf.kernels.networks.reconstructor import ScaleFusion


def dct(samples: Tensor) -> Tensor:
    """Un-normalised DCT-II along the last axis, 2 Σ x cos: even samples, then odd ones reversed,
    through an FFT, and a quarter-sample turn."""
    size = samples.shape[-1]
    reordered = torch.cat((samples[..., 0::2], samples[..., 1::2].flip(-1)), -1)
    coefficients: Tensor = (torch.fft.fft(reordered) * _turn(size, -1, samples)).real
    return 2 * coefficients


def idct(coefficients: Tensor) -> Tensor:
    """Inverse of dct."""
    size = coefficients.shape[-1]
    mirrored = coefficients.flip(-1).roll(1, -1)
    mirrored = torch.cat((torch.zeros_like(mirrored[..., :1]), mirrored[..., 1:]), -1)
    spectrum = torch.complex(coefficients, -mirrored) / 2 * _turn(size, 1, coefficients)
    reordered = torch.fft.irfft(spectrum[..., : size // 2 + 1], n=size)
    samples = torch.empty_like(reordered)
    samples[..., 0::2] = reordered[..., : (size + 1) // 2]
    samples[..., 1::2] = reordered[..., (size + 1) // 2 :].flip(-1)
    return samples


def _turn(size: int, sign: int, like: Tensor) -> Tensor:
    angle = torch.arange(size, dtype=like.dtype, device=like.device) * (sign * math.pi / 2 / size)
    return torch.complex(angle.cos(), angle.sin())


def dct2(image: Tensor) -> Tensor:
    """Both axes."""
    return dct(dct(image).mT).mT


def idct2(spectrum: Tensor) -> Tensor:
    """Inverse of dct2."""
    return idct(idct(spectrum).mT).mT


class Concatenated(nn.Module):
    """Fuse as it is defined: every map at this scale's size, one 1×1 convolution of them all."""

    def __init__(self, fuse: ScaleFusion) -> None:
        super().__init__()
        self.scale = fuse.scale
        weights: list[Tensor] = [part.get_parameter("weight") for part in fuse.parts]
        whole = nn.Conv2d(sum(w.shape[1] for w in weights), weights[0].shape[0], 1)
        with torch.no_grad():
            whole.weight.copy_(torch.cat(weights, dim=1))
            # The only part that has a bias.
            whole.get_parameter("bias").copy_(fuse.parts[2].get_parameter("bias"))
        self.whole, self.body = whole, fuse.body

    def forward(self, *maps: Tensor) -> Tensor:
        size = maps[self.scale].shape[-2:]
        same: list[Tensor] = [
            m if m.shape[-2:] == size else interpolate(m, size=size) for m in maps
        ]
        fused: Tensor = self.body(self.whole(torch.cat(same, dim=1)))
        return fused


class AuthorsWay(Ralf):
    """Ralf as its authors run it, with the logits of the network that it was made of."""

    @classmethod
    def of(cls, network: Ralf, **dimensions: object) -> "AuthorsWay":
        """The same weights, on the same device; `dimensions` are those the network was built by."""
        way = cls(**dimensions)  # type: ignore[arg-type]
        way.load_state_dict(network.state_dict())
        fuses = way.reconstructor.fuses
        for index, fuse in enumerate(fuses):
            assert isinstance(fuse, ScaleFusion)
            fuses[index] = Concatenated(fuse)
        return way.to(network.mask.device).eval().requires_grad_(False)

    def destroy(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        """By FFT."""
        image = unit(crops)
        destroyed = idct2(dct2(image) * self.mask.sigmoid())
        return destroyed, (image - destroyed).abs()
