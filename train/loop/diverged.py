"""When a number stops being one: keep what is needed to find the cause, and stop.

A run that goes on after a NaN trains nothing and overwrites what was good.  The batch, the
terms, the gradients' names and the weights as they were before the step go into one folder; the
last checkpoint stays as it was.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ralf.train.losses.objective import Batch


class Diverged(Exception):
    """A loss or a gradient is not finite; the message says which, and where the evidence lies."""


def keep(
    run: Path,
    step: int,
    rank: int,
    *,
    batches: Sequence[Batch],
    terms: dict[str, float],
    norm: float,
    rate: float,
    network: nn.Module,
    objective: nn.Module,
) -> Diverged:
    """Write the evidence; the error to raise."""
    folder = run / f"diverged-{step:06d}-rank{rank}"
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for number, batch in enumerate(batches):
        for name in ("crops", "forged", "pair", "family"):
            tensors[f"{number}.{name}"] = getattr(batch, name).cpu().contiguous()
    save_file(tensors, folder / "batch.safetensors")
    save_file(_copy(network.state_dict()), folder / "network.safetensors")
    save_file(_copy(objective.state_dict()), folder / "loss.safetensors")
    bad_terms = [name for name, value in terms.items() if not _finite(value)]
    facts = {
        "step": step,
        "rate": rate,
        "gradient_norm": str(norm),
        "terms": {name: str(value) for name, value in terms.items()},
        "terms_not_finite": bad_terms,
        "gradients_not_finite": _bad(
            (name, p.grad) for name, p in network.named_parameters() if p.grad is not None
        ),
        "weights_not_finite": _bad(network.state_dict().items()),
        "loss_state_not_finite": _bad(objective.state_dict().items()),
        "ids": [list(batch.ids) for batch in batches],
    }
    (folder / "facts.json").write_text(json.dumps(facts, indent=2) + "\n")
    what = f"the terms {', '.join(bad_terms)}" if bad_terms else f"the gradient (norm {norm})"
    return Diverged(
        f"step {step}: {what} should be finite; the batch, weights and facts are in {folder}. "
        "Try a lower optimiser.lr, a longer schedule.warmup, or precision=fp32"
    )


def _finite(value: float) -> bool:
    return abs(value) < float("inf")


def _copy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}


def _bad(named: Iterable[tuple[str, Tensor]]) -> list[str]:
    return [
        name
        for name, tensor in named
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
    ]
