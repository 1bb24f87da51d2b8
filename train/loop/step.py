"""One step of training, for any detector: forward, the rival's step, backward, average, move.

    for each batch of the step:  forward → rival's step → terms → backward
    then once:                   average over processes → guard → clip → optimiser → moving average

With one batch a step (the usual case) the rival steps before the terms are computed, as published;
with several it learns from all of them and steps with the network.  Gradients are sums over batches
divided by their number, so k batches of m faces are one of k·m for every term that is a mean.
"""

import json
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ralf.train import losses
from ralf.train.loop.checkpoint import pack_optimiser, unpack_optimiser
from ralf.train.loop.cpu_speed import QuickDepthwise
from ralf.train.loop.distributed import Compute, Ranks
from ralf.train.loop.optimise import (
    MovingAverage,
    RunningBatchNorms,
    computed_in,
    freeze,
    optimiser,
    rate,
)
from ralf.train.losses.objective import Batch, Moment, Objective, drawn_together
from ralf.train.recipe import Recipe


@dataclass(frozen=True)
class OnDevice:
    """A batch where the network is."""

    crops: Tensor
    forged: Tensor
    pair: Tensor
    family: Tensor
    ids: list[str]


def on_device(batch: Batch, device: torch.device) -> OnDevice:
    """The batch moved, its crops channels-last."""
    crops = batch.crops.to(device, non_blocking=True)
    return OnDevice(
        crops.contiguous(memory_format=torch.channels_last),
        batch.forged.to(device, non_blocking=True),
        batch.pair.to(device, non_blocking=True),
        # Left on the CPU: only the RCL-inspired loss reads it, and moves it itself.
        batch.family,
        list(batch.ids),
    )


def objective(recipe: Recipe, network: nn.Module) -> Objective:
    """The objective that the recipe's loss names."""
    found: Objective = losses.find(recipe.loss.kind)(recipe, network)
    return found


class Stepper:
    """Network, loss, optimisers and averages of a run, and one step of all of them."""

    def __init__(
        self, recipe: Recipe, network: nn.Module, device: torch.device, ranks: Ranks, run: Path
    ) -> None:
        self.recipe, self.device, self.ranks, self.run = recipe, device, ranks, run
        self.dtype = computed_in(recipe, device)
        self.compute = Compute(device, self.dtype, ranks)
        self.quick = QuickDepthwise() if device.type == "cpu" else nullcontext()
        if ranks.world > 1 and device.type == "cuda":
            # SyncBatchNorm works on GPUs alone; on CPUs the statistics are averaged after the step.
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
        if recipe.optimiser.norm_momentum is not None:
            for layer in network.modules():
                if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                    layer.momentum = recipe.optimiser.norm_momentum
        freeze(recipe.optimiser, network)
        self.running_norms = (
            RunningBatchNorms(network) if recipe.optimiser.norms == "running" else None
        )
        self.network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        # After the network has moved: a loss may run it once to learn its width.
        self.objective = objective(recipe, self.network).to(device)
        self.main = optimiser(recipe.optimiser, self.network, self.objective.learnt())
        self.rival = self.objective.rival_optimiser()
        decay = recipe.optimiser.ema
        self.average = MovingAverage(self.network, decay) if decay else None
        # Only FP16 needs its loss scaled; disabled ones do nothing.
        half = self.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(device.type, enabled=half)
        self.rival_scaler = torch.amp.GradScaler(device.type, enabled=half)
        self.network.train()
        self.objective.train()

    @property
    def judged_weights(self) -> dict[str, Tensor] | None:
        """The weights that validation and publishing use; None: the network's own."""
        return self.average.state if self.average else None

    def step(self, batches: Sequence[Batch], moment: Moment, steps: int) -> dict[str, float]:
        """Take one step; the loss's terms, averaged over batches and processes."""
        if self.running_norms is not None:
            self.running_norms.hold()
        self.main.zero_grad(set_to_none=True)
        moved = [on_device(batch, self.device) for batch in batches]
        share = 1 / len(moved)
        sums: dict[str, Tensor] = {}
        for batch in moved:
            for name, value in self._backward(batch, moment, share, alone=len(moved) == 1).items():
                sums[name] = sums.get(name, torch.zeros((), device=self.device)) + value
        if self.rival is not None and len(moved) > 1:
            self._move_rival()
        # By hand and not by DistributedDataParallel: distributed.py says why.
        self.ranks.average_(self._gradients(self.main))
        # Before clipping: the clip is meant for the gradient's true size.
        self.scaler.unscale_(self.main)
        norm = self._clip()
        terms = self._averaged(sums, share)
        # The rate follows from the step alone, so that a run which goes on needs no scheduler.
        now = self.recipe.optimiser.lr * rate(self.recipe.schedule, moment.step, steps)
        # FP16's scaler expects an infinite gradient now and then, and skips that step itself.
        fine = torch.isfinite(norm) or self.scaler.is_enabled()
        if not (fine and all(abs(value) < float("inf") for value in terms.values())):
            raise diverged(
                self.run, moment.step, self.ranks.rank, batches=moved, terms=terms,
                norm=float(norm), rate=now, network=self.network, objective=self.objective,
            )  # fmt: skip
        self._move(now, moment.step)
        return terms | {"gradient_norm": float(norm), "lr": now}

    def _backward(
        self, batch: OnDevice, moment: Moment, share: float, *, alone: bool
    ) -> dict[str, Tensor]:
        """Forward and both backward passes of one batch; its terms, detached."""
        with self.compute.autocast(), self.quick:
            seen = self.objective.run(batch.crops)
            rival = self.objective.rival(seen, batch)
        parts: dict[str, Tensor] = {}
        if rival is not None:
            if self.rival is None:
                raise TypeError("an objective with a rival needs a rival_optimiser")
            if alone:
                self.rival.zero_grad(set_to_none=True)
            self.rival_scaler.scale(rival * share).backward()  # type: ignore[no-untyped-call]
            parts["rival"] = rival.detach().float()
            if alone:
                self._move_rival()
        with self.compute.autocast():
            terms = drawn_together(self.objective.terms(seen, batch, moment), self.recipe)
        self.scaler.scale(terms.total * share).backward()  # type: ignore[no-untyped-call]
        parts |= {name: part.detach().float() for name, part in terms.parts.items()}
        return {"total": terms.total.detach().float(), **parts}

    def _gradients(self, chosen: torch.optim.Optimizer) -> list[Tensor]:
        # Of the optimiser's groups and not of the network: what a loss learns itself (its centre,
        # its projection) must be averaged too.
        every = (p for group in chosen.param_groups for p in group["params"])
        return [p.grad for p in every if p.grad is not None]

    def _move_rival(self) -> None:
        assert self.rival is not None
        self.ranks.average_(self._gradients(self.rival))
        self.rival_scaler.step(self.rival)
        self.rival_scaler.update()
        self.rival.zero_grad(set_to_none=True)

    def _clip(self) -> Tensor:
        clip = self.recipe.optimiser.clip
        every = [p for group in self.main.param_groups for p in group["params"]]
        # An infinite bound clips nothing, but the guard and the log still need the norm.
        norm = nn.utils.clip_grad_norm_(every, clip if clip is not None else float("inf"))
        return norm.detach()

    def _averaged(self, sums: dict[str, Tensor], share: float) -> dict[str, float]:
        """The terms' means over batches and processes."""
        # One transfer for all of them, since the guard reads them at every step.  The sum is the
        # same on every process: one that raised alone would leave the others waiting for it.
        together = self.ranks.total(torch.stack(list(sums.values())) * share) / self.ranks.world
        return dict(zip(sums, together.tolist(), strict=True))

    def _move(self, now: float, step: int) -> None:
        for group in self.main.param_groups:
            # Stored runs from before parts had rates of their own have no factor.
            group["lr"] = now * group.get("factor", 1.0)
        self.scaler.step(self.main)
        self.scaler.update()
        if self.running_norms is not None:
            self.running_norms.follow()
        # Norms' running statistics are each process's own where they are not synchronised.  What is
        # left out, the number of batches seen, is an integer and the same everywhere.
        self.ranks.average_(b for b in self.network.buffers() if b.is_floating_point())
        if self.average is not None:
            self.average.follow(self.network, step)

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and scalars of all that a checkpoint must hold."""
        tensors = {f"network.{k}": v for k, v in self.network.state_dict().items()}
        tensors |= {f"loss.{k}": v for k, v in self.objective.state_dict().items()}
        if self.average is not None:
            tensors |= {f"average.{k}": v for k, v in self.average.state.items()}
        plain: dict[str, Any] = {
            "scalers": [self.scaler.state_dict(), self.rival_scaler.state_dict()]
        }
        for name, chosen in self._optimisers().items():
            packed, plain[name] = pack_optimiser(name, chosen)
            tensors |= packed
        return tensors, plain

    def unpack(self, parts: Any, plain: dict[str, Any]) -> None:
        """Put back what pack returned; parts(prefix) gives the tensors of a prefix."""
        self.network.load_state_dict(parts("network"))
        self.objective.load_state_dict(parts("loss"))
        if self.average is not None:
            for name, tensor in parts("average").items():
                self.average.state[name].copy_(tensor)
        for name, chosen in self._optimisers().items():
            unpack_optimiser(chosen, parts(name), plain[name])
        # A scaler that is not in use saves an empty state, and one in use refuses to load it.  CPUs
        # compute an FP16 recipe in FP32, so a run that moves to a GPU meets this.
        for scaler, state in zip((self.scaler, self.rival_scaler), plain["scalers"], strict=True):
            if state:
                scaler.load_state_dict(state)

    def _optimisers(self) -> dict[str, torch.optim.Optimizer]:
        return {"main": self.main} | ({"rival": self.rival} if self.rival is not None else {})


class Diverged(Exception):
    """A loss or a gradient is not finite; the message says which, and where the evidence lies."""


def diverged(
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
    """Write the evidence into a folder of its own; the error to raise.

    A run that goes on after a NaN trains nothing and overwrites what was good.  The batch, the
    terms, the names of the gradients and the weights before the step are kept; the last checkpoint
    stays as it was.
    """
    # A folder for each process: they all stop at this step, each with its own batch.
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
        # As text, here and in the terms: JSON has neither NaN nor infinity.
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
    # safetensors refuses tensors that share memory, and channels-last ones, which are not
    # contiguous.
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}


def _bad(named: Iterable[tuple[str, Tensor]]) -> list[str]:
    return [
        name
        for name, tensor in named
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
    ]
