"""How weights move: parameter groups, rate, batch norms, moving average, precision.

All of it follows from the recipe and the step.  So a resumed run needs only the step, the weights,
their average and the optimiser's moments.
"""

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ralf.kernels.machine import cpu_has_bf16
from ralf.train.recipe import Optimiser, Recipe, Schedule
from ralf.train.recipe_text import RecipeError


def belongs(name: str, part: str) -> bool:
    """Whether a parameter is that part of the network, or of it."""
    return f".{part}." in f".{name}."


def rate_factors(choice: Optimiser, network: nn.Module) -> dict[str, float]:
    """Each parameter's factor on the rate, by name; of several that fit the last one counts."""
    names = [name for name, _ in network.named_parameters()]
    found = dict.fromkeys(names, 1.0)
    for text in choice.rates:
        part, _, factor = text.partition("*")
        fitting = [name for name in names if belongs(name, part)]
        if not fitting:
            tops = sorted({name.split(".")[0] for name in names})
            raise RecipeError(
                f"optimiser.rates names {part!r}, and the network has no such part; it has "
                f"{', '.join(tops)}"
            )
        found |= dict.fromkeys(fitting, float(factor))
    return found


def freeze(choice: Optimiser, network: nn.Module) -> None:
    """Parameters whose rate is 0 need no gradient, so none is computed for them."""
    factors = rate_factors(choice, network)
    for name, parameter in network.named_parameters():
        if factors[name] == 0:
            parameter.requires_grad_(False)


def optimiser(
    choice: Optimiser, network: nn.Module, own: Iterable[nn.Parameter]
) -> torch.optim.Optimizer:
    """The main optimiser over the network and what the loss itself learns."""
    factors = rate_factors(choice, network)
    # Decayed before kept: the order in which stored optimisers number their parameters.
    chosen: dict[tuple[float, bool], list[nn.Parameter]] = {(1.0, True): [], (1.0, False): []}
    chosen[1.0, False] += own
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        # Adam's decay is part of the gradient and, in the papers that use it, spares nothing.
        named = any(belongs(name, part) for part in choice.no_decay)
        decayed = choice.kind != "adamw" or not (parameter.ndim < 2 or named)
        chosen.setdefault((factors[name], decayed), []).append(parameter)
    groups: list[dict[str, Any]] = [
        {
            "params": parameters,
            "weight_decay": choice.weight_decay if decayed else 0.0,
            "lr": choice.lr * factor,
            "factor": factor,
        }
        for (factor, decayed), parameters in chosen.items()
        if parameters
    ]
    if choice.kind == "sgd":
        momentum = choice.betas[0]
        return torch.optim.SGD(groups, lr=choice.lr, momentum=momentum, nesterov=momentum > 0)
    kind = torch.optim.AdamW if choice.kind == "adamw" else torch.optim.Adam
    return kind(groups, lr=choice.lr, betas=choice.betas)


def rate(schedule: Schedule, step: int, steps: int) -> float:
    """The share of the full rate that step (from 0) of so many steps is taken at."""
    warm = math.ceil(schedule.warmup * steps)
    if step < warm:
        # Never 0: a step at rate 0 would teach nothing.
        return (step + 1) / (warm + 1)
    if schedule.shape == "constant":
        return 1.0
    done = (step - warm) / max(1, steps - warm)
    return schedule.floor + (1 - schedule.floor) * (1 + math.cos(math.pi * min(1.0, done))) / 2


SKIP, LEAST = 5, 4096
"""In a map of more than LEAST places only every fifth is counted: it saves time, and the statistics
are near enough."""


class RunningBatchNorms:
    """A network's batch norms, normalising by their running statistics while it trains.

    In a paired batch each forgery stands beside the real face that it was made from.  The batch's
    own mean tells a network what the two have in common, and so what they have not: it learns to
    compare, which a worker scoring one face cannot do.  Its loss falls while what is served gets
    worse: after 76,000 faces the small classifier had AUC 0.977 on batches of the validation people
    by the batch's own statistics, and 0.827 by the running ones.

    What a batch adds to the statistics is used from the next step on.
    """

    def __init__(self, network: nn.Module) -> None:
        self.layers = [layer for layer in network.modules() if isinstance(layer, _BatchNorm)]
        self.seen: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for number, layer in enumerate(self.layers):
            layer.register_forward_hook(partial(self._note, number))

    def hold(self) -> None:
        """Call before each step: network.train() sets the norms to training too."""
        for layer in self.layers:
            layer.eval()

    @torch.no_grad()
    def _note(self, number: int, layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        if not output.requires_grad:  # a validation, not a step
            return
        places = inputs[0].movedim(1, -1).flatten(0, -2)
        some = places[:: SKIP if len(places) > LEAST else 1].float()
        # In FP32: bf16 would lose the difference of two numbers that are nearly equal.  It can
        # still fall below 0 by rounding, hence the clamp.
        mean, square = some.mean(0), (some * some).mean(0)
        self.seen.setdefault(number, []).append((mean, (square - mean * mean).clamp(min=0)))

    @torch.no_grad()
    def follow(self) -> None:
        """After each step: move the statistics by each layer's momentum."""
        for number, found in self.seen.items():
            layer = self.layers[number]
            share = layer.momentum or 0.0
            means, variances = zip(*found, strict=True)
            for kept, new in ((layer.running_mean, means), (layer.running_var, variances)):
                if kept is not None:
                    kept.lerp_(torch.stack(new).mean(0), share)
        self.seen.clear()


class MovingAverage:
    """The mean of recent weights: of every floating tensor in the network's state.

    Early on the decay is smaller, so that the average is not of the first random weights.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.state = {name: tensor.clone() for name, tensor in network.state_dict().items()}

    @torch.no_grad()
    def follow(self, network: nn.Module, step: int) -> None:
        """Take in the weights after step (from 0)."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        mine: list[Tensor] = []
        theirs: list[Tensor] = []
        for name, tensor in network.state_dict().items():
            if tensor.is_floating_point():
                mine.append(self.state[name])
                theirs.append(tensor)
            else:
                # A counter has no mean.
                self.state[name].copy_(tensor)
        torch._foreach_lerp_(mine, theirs, share)


def computed_in(recipe: Recipe, device: torch.device) -> torch.dtype:
    """The precision of products on this device: what the recipe asks, or FP32 where a CPU has no
    bf16 in hardware (emulated, it is slower than FP32) or FP16 is asked of a CPU."""
    if device.type == "cuda":
        wanted = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        return wanted[recipe.precision]
    return torch.bfloat16 if recipe.precision == "bf16" and cpu_has_bf16() else torch.float32
