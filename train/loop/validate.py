"""Judge the validation split in the middle of training: one figure chooses the weights.

The batches are the same every time; each process judges its share, and all logits are gathered.
Only the validation split is given here, never the test split.  The full tables are made by
ralf.train.evaluate.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from ralf.train.evaluate.metrics import auc
from ralf.train.loop.distributed import Compute
from ralf.train.losses.objective import Batch


@dataclass(frozen=True)
class Validation:
    """The figures of one validation."""

    faces: int
    auc: float
    bce: float
    family_auc: dict[str, float]
    """Each way of forging against all reals."""

    def facts(self) -> dict[str, float | int | str | None]:
        """For the log."""
        families = {f"auc_{family}": value for family, value in self.family_auc.items()}
        return {"faces": self.faces, "auc": self.auc, "bce": self.bce, **families}

    def figure(self, select: str) -> float:
        """The figure that chooses the best weights; higher is better."""
        return -self.bce if select == "bce" else self.auc

    @property
    def said(self) -> str:
        """For the terminal."""
        return f"validation AUC {self.auc:.4f}  BCE {self.bce:.4f}  {self.faces} faces"


@torch.no_grad()
def judge_validation(
    network: nn.Module,
    weights: dict[str, Tensor] | None,
    batches: Iterable[Batch],
    compute: Compute,
) -> Validation:
    """Judge the network on the split, with `weights` in place of its own where they are given."""
    rows: list[np.ndarray] = []
    was_training = network.training
    network.eval()
    for batch in compute.share(batches):
        crops = batch.crops.to(compute.device).contiguous(memory_format=torch.channels_last)
        with compute.autocast():
            # Averaged weights are judged in place of the network's own, and not copied into it.
            logit = functional_call(network, weights or {}, (crops,))
        columns = (logit.float().cpu(), batch.forged.cpu(), batch.family.cpu())
        rows.append(np.stack([column.numpy().astype(np.float64) for column in columns], axis=1))
    network.train(was_training)
    mine = np.concatenate(rows) if rows else np.zeros((0, 3))
    names = getattr(batches, "names", ())
    return _judge(np.concatenate(compute.ranks.gather(mine)), names)


def _judge(rows: np.ndarray[Any, np.dtype[np.float64]], names: Sequence[str]) -> Validation:
    logit, forged, family = rows[:, 0], rows[:, 1] == 1, rows[:, 2].astype(int)
    if forged.all() or not forged.any():
        raise ValueError(
            f"validation should hold real and forged faces, got {int(forged.sum())} forged of "
            f"{len(forged)}"
        )
    bce = float(np.mean(np.logaddexp(0, np.where(forged, -logit, logit))))
    families = {
        names[each] if each < len(names) else f"family_{each}": auc(forged[chosen], logit[chosen])
        for each in sorted(set(family[forged].tolist()))
        for chosen in [~forged | (family == each)]
    }
    return Validation(len(rows), auc(forged, logit), bce, families)
