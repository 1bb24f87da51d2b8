"""What a network costs: its parameters, and the arithmetic of one face.

Counted on meta tensors, so nothing runs.  A multiply-add counts as two operations.  Only
convolutions and matrix products count, as is usual; our own destructor's are among them.
"""

from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ralf.kernels.export import OPS


class Cost(NamedTuple):
    """Of one network."""

    parameters: int
    gflop: float
    """A face."""


def cost(network: nn.Module) -> Cost:
    """Counted on a copy, for one crop of the network's own size."""
    bare = deepcopy(network).to("meta").eval()
    side = int(network.size)  # type: ignore[arg-type]
    crop = torch.zeros((1, 3, side, side), dtype=torch.uint8, device="meta")
    # The counter takes an operator that it has no formula for as free, and ours are custom ones.
    ours = {getattr(torch.ops.ralf, name): _destructor for name in OPS}
    with FlopCounterMode(display=False, custom_mapping=ours) as counter, torch.no_grad():
        bare(crop)
    parameters = sum(weights.numel() for weights in bare.parameters())
    return Cost(parameters, counter.get_total_flops() / 1e9)


def _destructor(image: torch.Size, mask: torch.Size, *_: Any, **__: Any) -> int:
    """Two products there and two back, for each plane."""
    height, width = mask
    planes = image.numel() // (height * width)
    return planes * 4 * height * width * (height + width)
