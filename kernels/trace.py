"""A network as torch.export traces it: what every builder starts from; and what they end with.

Any batch from 1 to the largest; our own ops taken apart into the plain products that they mean,
since no compiler but torch knows them.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ralf.kernels import dct

OPS = ("destruct", "destruct_residual")


@dataclass(frozen=True)
class Built:
    """A plan, and what its builder did."""

    content: bytes
    seconds: float
    options: dict[str, Any]


def trace(network: nn.Module, most: int, *others: Tensor) -> torch.export.ExportedProgram:
    """The network for batches of 1 to `most`; `others` are example inputs beside the crops."""
    side = int(network.size)  # type: ignore[arg-type]
    device = next(network.parameters()).device
    # Two, where batches vary: tracing takes a batch of one for a constant.
    count = 2 if most > 1 else 1
    crops = torch.zeros((count, 3, side, side), dtype=torch.uint8, device=device)
    batch = {0: torch.export.Dim("batch", min=1, max=most)} if most > 1 else {}
    examples = (crops, *others)
    # A variadic forward takes what comes after the crops as one tuple.
    shapes = (batch, tuple(batch for _ in others)) if others else (batch,)
    traced = torch.export.export(network, examples, dynamic_shapes=shapes)
    table = torch.export.default_decompositions()
    for name in OPS:
        table[getattr(torch.ops.ralf, name).default] = getattr(dct, f"{name}_reference")
    plain: torch.export.ExportedProgram = traced.run_decompositions(table)
    return plain
