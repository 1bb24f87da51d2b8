"""Training a renderer on the authentic faces of the train split, and on no others.

    aligned faces ─▶ batch by number ─▶ draw ─▶ objective ─▶ weights;  the critic learns after it

A batch follows from the seed and the step's number, so a training that was interrupted goes on as
if it had not been.  Its checkpoint lies beside the file that it will write, and is removed when
that file is there.  The training ends after so many steps, or after so many minutes over all
commands; the rate falls by whichever is nearer its end.
"""

import json
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor

from ralf.kernels.machine import cpu_has_bf16
from ralf.train.data.index import Index
from ralf.train.forge.renderers.aligned import Faces, aligned_faces
from ralf.train.forge.renderers.objective import Critic, Objective
from ralf.train.forge.renderers.renderer import Drawn, Renderer, RendererOptions
from ralf.train.forge.renderers.stored import HEADER, header, kind, load, replace_file, save
from ralf.train.loop.checkpoint import commit, pack_optimiser, unpack_optimiser
from ralf.train.loop.loop import Interrupt
from ralf.train.losses.perceptual import Perceptual
from ralf.train.recipe_text import RecipeError, differences, from_json

SPLIT = "train"
CHECKPOINT = "ralf.renderer-checkpoint/1"
SAVE_EVERY_S = 120.0
LOG_EVERY = 100
"""Steps between two entries in the record of losses."""
FLOOR = 0.05
"""Where the rate ends, as a share of the first one."""
Ending = Literal["finished", "out_of_time", "interrupted"]


class FitError(ValueError):
    """A training cannot go on."""


@dataclass(frozen=True)
class FitRequest:
    """One training of a renderer."""

    name: str
    options: RendererOptions
    out: Path
    minutes: float | None = None
    """Over all commands; None: only the steps end it."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    init: Path | None = None
    """First weights: a renderer's file, or what the renderer's own `begin_from` reads."""
    features: Perceptual | None = None
    say: Callable[[str], None] = lambda text: None
    interrupt: Interrupt = field(default_factory=Interrupt)


@dataclass(frozen=True)
class Fitted:
    """How a command ended."""

    ending: Ending
    step: int
    sha256: str
    """Of the file; "" while there is only a checkpoint."""
    record: dict[str, Any]


def fit(index: Index, request: FitRequest) -> Fitted:
    """Train, or go on; a file that is there already is kept, and said to be done."""
    if request.out.exists():
        stored = load(request.out)
        _refuse_other(request, stored.renderer.options, stored.record)
        if stored.record["data_sha256"] != index.sha256:
            raise FitError(
                f"{request.out} was trained on other data: name another --out, or remove it"
            )
        request.say(f"{request.out} is there already")
        return Fitted("finished", stored.record["steps"], stored.sha256, stored.record)
    # Before the first weights are drawn, the critic's among them.
    torch.manual_seed(request.options.seed)
    renderer = kind(request.name)(request.options)
    reals = aligned_faces(
        index, SPLIT, renderer.side, middle=renderer.middle, most=request.options.faces
    )
    request.say(f"{len(reals)} authentic faces of split {SPLIT}, {renderer.side} px")
    training = _Training(index, request, renderer, reals)
    ending = training.go()
    if ending == "interrupted":
        return Fitted(ending, training.step, "", training.record())
    record = training.record()
    digest = save(request.out, renderer.to("cpu"), record)
    _checkpoint(request.out).unlink(missing_ok=True)
    return Fitted(ending, training.step, digest, record)


def _checkpoint(out: Path) -> Path:
    return out.with_name(f"{out.name}.checkpoint")


def _refuse_other(request: FitRequest, stored: RendererOptions, record: dict[str, Any]) -> None:
    """FitError where a file or a checkpoint is not of the training that is asked for."""
    if record["name"] != request.name:
        raise FitError(f"{request.out} is a {record['name']}, not a {request.name}")
    # More steps or minutes change how long a training goes on, not what it is.
    asked = request.options.replaced(steps=stored.steps)
    if changed := differences(stored, asked):
        raise FitError(
            f"{request.out} was begun with other options (stored → asked): {'; '.join(changed)}; "
            "name another --out, or ask for what is stored"
        )


class _Training:
    """Renderer, critic and optimisers, and the steps that move them."""

    def __init__(self, index: Index, request: FitRequest, renderer: Renderer, faces: Faces) -> None:
        self.request, self.options, self.renderer = request, request.options, renderer
        self.data_sha256, self.people = index.sha256, len(set(faces.people))
        self.step, self.seconds, self.losses = 0, 0.0, list[dict[str, float]]()
        device = request.device
        self.critic = Critic().to(device) if self.options.critic else None
        self._begin()
        renderer.learn_from(faces)
        self.faces = faces.to(device)
        renderer.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        moving = [weight for weight in renderer.parameters() if weight.requires_grad]
        self.main = torch.optim.Adam(moving, lr=self.options.lr, betas=(0.5, 0.999))
        self.rival = (
            torch.optim.Adam(self.critic.parameters(), lr=2e-4, betas=(0.5, 0.999))
            if self.critic
            else None
        )
        features = request.features.to(device) if request.features else None
        self.objective = Objective(self.options, self.critic, features)
        self._resume()

    def _begin(self) -> None:
        """The first weights."""
        init = self.request.init
        if init is None:
            return
        if not self.renderer.begin_from(init):
            stored = load(init)
            if stored.renderer.name != self.renderer.name:
                raise FitError(f"--init {init} is a {stored.renderer.name}")
            try:
                self.renderer.load_state_dict(stored.renderer.state_dict())
            except RuntimeError as error:
                raise FitError(f"--init {init} has other dimensions: {error}") from error

    def go(self) -> Ending:
        """Steps until an end; the last thing done is a checkpoint, where the end is not final."""
        self._started = self._saved = time.monotonic()
        before = self.seconds
        self.renderer.train()
        while True:
            self.seconds = before + time.monotonic() - self._started
            if self.request.interrupt.asked:
                self._save()
                return "interrupted"
            if self.step >= self.options.steps:
                return "finished"
            if self.request.minutes is not None and self.seconds >= 60 * self.request.minutes:
                return "out_of_time"
            if time.monotonic() - self._saved > SAVE_EVERY_S:
                self._save()
            self._step()

    @property
    def progress(self) -> float:
        """How much of the training is done, 0 to 1."""
        done = self.step / max(1, self.options.steps)
        if self.request.minutes is not None:
            done = max(done, self.seconds / max(1e-6, 60 * self.request.minutes))
        return min(1.0, done)

    def _step(self) -> None:
        generator = torch.Generator().manual_seed(self.options.seed * 1_000_003 + self.step)
        rate = self.options.lr * (FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * self.progress)) / 2)
        for group in self.main.param_groups:
            group["lr"] = rate
        batch = self.faces.batch(self.renderer.choose(self.faces, generator))
        with self._precision():
            drawn = self.renderer.draw(batch, generator, self.progress)
            terms = self.objective.terms(drawn, generator, self.progress)
        self.main.zero_grad(set_to_none=True)
        total = torch.stack(list(terms.values())).sum()
        if not torch.isfinite(total):
            raise FitError(f"step {self.step}: the loss is {total.item()}; lower lr")
        total.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.renderer.parameters(), 1.0)
        self.main.step()
        critic = self._critic_step(drawn, generator)
        if self.step % LOG_EVERY == 0:
            found = {name: float(value.detach()) for name, value in terms.items()} | critic
            self.losses.append({"step": self.step, **{n: round(v, 5) for n, v in found.items()}})
            shown = " ".join(f"{name} {value:.4f}" for name, value in found.items())
            self.request.say(f"step {self.step} of {self.options.steps}: {shown}")
        self.step += 1

    def _critic_step(self, drawn: Drawn, generator: torch.Generator) -> dict[str, float]:
        if self.rival is None:
            return {}
        with self._precision():
            term = self.objective.critic_term(drawn, generator, self.progress)
        if term is None:
            return {}
        self.rival.zero_grad(set_to_none=True)
        term.backward()  # type: ignore[no-untyped-call]
        self.rival.step()
        return {"rival": float(term.detach())}

    def _precision(self) -> AbstractContextManager[Any]:
        kind = self.request.device.type
        quick = kind == "cuda" or cpu_has_bf16()
        return torch.autocast(kind, torch.bfloat16) if quick else nullcontext()

    def record(self) -> dict[str, Any]:
        """What the file says of its training."""
        return {
            "name": self.renderer.name,
            "data_sha256": self.data_sha256,
            "split": SPLIT,
            "faces": len(self.faces),
            "people": self.people,
            "steps": self.step,
            "minutes": round(self.seconds / 60, 2),
            "device": str(self.request.device),
            "init": str(self.request.init) if self.request.init else None,
            "features": self.request.features is not None,
            "commit": commit(),
            "losses": self.losses,
        }

    def _save(self) -> None:
        """Write the checkpoint."""
        tensors = {f"renderer.{name}": t for name, t in self.renderer.state_dict().items()}
        scalars = {}
        parts: list[tuple[str, torch.optim.Optimizer | None]] = [
            ("main", self.main), ("rival", self.rival)
        ]  # fmt: skip
        for name, optimiser in parts:
            if optimiser is not None:
                moments, scalars[name] = pack_optimiser(name, optimiser)
                tensors |= moments
        if self.critic is not None:
            tensors |= {f"critic.{name}": t for name, t in self.critic.state_dict().items()}
        document = {
            "schema": CHECKPOINT,
            "options": self.options.model_dump(mode="json"),
            "record": self.record(),
            "seconds": self.seconds,
            "optimisers": scalars,
        }
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        data = safetensors.torch.save(plain, metadata={HEADER: json.dumps(document)})
        replace_file(_checkpoint(self.request.out), data)
        self._saved = time.monotonic()

    def _resume(self) -> None:
        """Go on from the checkpoint, where there is one."""
        path = _checkpoint(self.request.out)
        if not path.exists():
            return
        document, tensors = header(path, CHECKPOINT)
        record = document["record"]
        stored = from_json(json.dumps(document["options"]), type(self.options))
        _refuse_other(self.request, stored, record)
        if record["data_sha256"] != self.data_sha256:
            raise FitError(f"{path} was begun on other data: name another --out, or remove it")

        def part(name: str) -> dict[str, Tensor]:
            start = f"{name}."
            return {n[len(start) :]: t for n, t in tensors.items() if n.startswith(start)}

        try:
            self.renderer.load_state_dict(part("renderer"))
            if self.critic is not None:
                self.critic.load_state_dict(part("critic"))
        except RuntimeError as error:
            raise RecipeError(f"{path} does not fit this version: {error}") from error
        unpack_optimiser(self.main, part("main"), document["optimisers"]["main"])
        if self.rival is not None:
            unpack_optimiser(self.rival, part("rival"), document["optimisers"]["rival"])
        self.step, self.seconds = record["steps"], document["seconds"]
        self.losses = record["losses"]
        self.request.say(f"goes on at step {self.step}")
