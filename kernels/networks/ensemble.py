"""Several detectors as one: the mean of their logits, each on its own calibrated scale.

    crops ─▶ member 1 ─▶ (logit − shift) / temperature ─┐
        └──▶ member 2 ─▶ …                              ├─▶ mean ─▶ one logit
        └──▶ member k ─▶ …                             ─┘

One detector's logit of 2 may be another's of 5, so each is brought to its own calibration first;
the mean is calibrated anew, as any model's logits are.  To everything else it is a network like
the others: one set of weights, one logit a face, plans, golden crops.  `members` gives the
logits that the mean was taken of.  Pictures come from the first member that has any.

It refuses members of different crops, and ensembles within ensembles.
"""

from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from ralf.kernels.manifest import Network, Strict
from ralf.kernels.networks import build
from ralf.kernels.networks.backbones import NetworkError


class Member(Strict):
    """One detector, as the manifest holds it."""

    name: str
    """NAME@VERSION of the model that it was."""
    network: Network
    temperature: float = 1.0
    shift: float = 0.0


class Ensemble(nn.Module):
    """The detector; `members` are what the manifest's `network` holds, one for each."""

    temperature: Tensor
    shift: Tensor

    def __init__(self, *, members: list[dict[str, Any]], size: int = 256) -> None:
        super().__init__()
        listed = [_member(each) for each in members]
        self.names = tuple(member.name for member in listed)
        # One named twice would only have twice the weight.
        if len(listed) < 2 or len(set(self.names)) < len(listed):
            raise NetworkError(f"an ensemble has two different members or more, got {self.names}")
        self.size = size
        self.detectors = nn.ModuleList(_built(member, size) for member in listed)
        # From the manifest, in FP32: the weights' file would round them to FP16.
        for name in ("temperature", "shift"):
            values = torch.tensor([getattr(member, name) for member in listed])
            self.register_buffer(name, values, persistent=False)
        shown = [each for each in self.detectors if hasattr(each, "explain")]
        # Set only where a member has it, because engines ask with hasattr.
        if shown:
            self.explain = shown[0].explain

    @property
    def cam_layer(self) -> nn.Module:
        """Where Grad-CAM looks: the first member's last maps."""
        layer: nn.Module = self.detectors[0].cam_layer  # type: ignore[assignment]
        return layer

    def members(self, crops: Tensor) -> Tensor:
        """Each member's calibrated logit of being forged, [m, k]."""
        said = torch.stack([detector(crops) for detector in self.detectors], 1)
        return (said - self.shift) / self.temperature

    def forward(self, crops: Tensor) -> Tensor:
        """Crops u8, or floats of 0..1, [m, 3, s, s] RGB → logits [m] of being forged."""
        return self.members(crops).mean(1)

    def lower(self, dtype: torch.dtype) -> "Ensemble":
        """Each member as it lowers itself."""
        for detector in self.detectors:
            detector.lower(dtype)  # type: ignore[operator]
        return self


def _member(given: dict[str, Any]) -> Member:
    try:
        return Member.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise NetworkError(f"an ensemble's member: {where}: {first['msg']}") from error


def _built(member: Member, size: int) -> nn.Module:
    if member.network.build == "ensemble":
        raise NetworkError(f"{member.name} is an ensemble: name its members instead")
    network = build(member.network.build, **member.network.dimensions)
    if network.size != size:
        raise NetworkError(f"{member.name} takes crops of {network.size} px, not {size}")
    return network
