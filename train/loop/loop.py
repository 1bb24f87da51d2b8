"""The loop that trains every detector.

    batches[i] ─▶ step ─▶ … ─▶ end of an epoch ─▶ judge validation ─▶ best so far? keep it
                   └─ every two minutes, and at the end: last.safetensors

A batch is a pure function of the recipe's seed and of its number, so the step alone says where a
run stands.  Kill a run anywhere and type the same command: on a CPU the weights at the end are the
same bits (on CUDA with --deterministic).  A time budget, SIGTERM and Ctrl-C end a run between two
steps with a whole checkpoint; the next command goes on from it.

The loop knows no detector: networks come from ralf.kernels.networks, losses from ralf.train.losses.
Only the validation split chooses weights and stops a run early; the test split is never used here.
Under torchrun each process takes every n-th batch, and judges its share of the validation split.
"""

import dataclasses
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal, Protocol

import torch
from torch import nn

from ralf.train.loop.checkpoint import (
    BEST,
    LAST,
    Checkpoint,
    CheckpointError,
    State,
    commit,
    load,
    random_state,
    refuse_another_run,
    save,
    set_random_state,
)
from ralf.train.loop.distributed import ALONE, Ranks
from ralf.train.loop.initial_weights import make_network
from ralf.train.loop.run_log import RunLog
from ralf.train.loop.step import Stepper
from ralf.train.loop.validate import judge_validation
from ralf.train.losses.objective import Batch, Judgement, Moment
from ralf.train.recipe import Recipe
from ralf.train.recipe_text import to_json

LOG_EVERY = 20
"""Steps between two lines in the log."""
Ending = Literal["finished", "stopped_early", "out_of_time", "interrupted"]


class Interrupt:
    """Whether a signal has come."""

    asked = False


@contextmanager
def caught() -> Iterator[Interrupt]:
    """SIGTERM and the first Ctrl-C only set a flag; a second Ctrl-C ends at once.

    Outside the main thread Python takes no signals, and the flag stays down.
    """
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return

    def stop(number: int, frame: FrameType | None) -> None:
        if interrupt.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        interrupt.asked = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class BatchSource(Protocol):
    """Batches by number: the same number, the same batch, on any process, in any order."""

    def __len__(self) -> int:
        """Batches in one epoch."""

    def __getitem__(self, number: int) -> Batch:
        """Any number from 0 on; past the first epoch, the next one's."""


@dataclass(frozen=True)
class TrainingOutcome:
    """How a command ended."""

    ending: Ending
    state: State
    validation: Judgement | None
    """The last validation by this command."""


@dataclass(frozen=True)
class Options:
    """What concerns this command and not the run: nothing here changes the weights at the end."""

    minutes: float | None = None
    workers: int = 0
    """Processes that make batches; 0 makes them in the loop."""
    save_every_s: float = 120.0
    deterministic: bool = False
    quiet: bool = False
    """Nothing on stderr; the log in the run's folder is written all the same."""
    started_s: float | None = None
    """When the minutes began, on time.monotonic's clock; None: now."""


def train(
    recipe: Recipe,
    batches: BatchSource,
    validation: Iterable[Batch] | None,
    run: Path,
    *,
    data_sha256: str,
    device: torch.device | str = "cpu",
    ranks: Ranks = ALONE,
    options: Options = Options(),
    network: nn.Module | None = None,
) -> TrainingOutcome:
    """Train until the recipe ends, the time is up, or a signal comes; go on where `run` stopped."""
    run.mkdir(parents=True, exist_ok=True)
    _configure_torch(options.deterministic)
    found = load(run / LAST) if (run / LAST).exists() else None
    if found is None and (run / BEST).exists():
        # A new run here would overwrite the best weights of an older one.
        raise CheckpointError(f"{run} has {BEST} but no {LAST}: name another folder")
    if found is not None:
        refuse_another_run(found, recipe, data_sha256, ranks.world)
    stepper = Stepper(recipe, network or make_network(recipe), torch.device(device), ranks, run)
    with caught() as interrupt:
        training = _Training(
            stepper=stepper, batches=batches, validation=validation, data_sha256=data_sha256,
            options=options, found=found, interrupt=interrupt,
        )  # fmt: skip
        try:
            return training.go()
        finally:
            training.log.close()


def _configure_torch(deterministic: bool) -> None:
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic


class _Training:
    """The part of a run that one command does."""

    def __init__(
        self,
        *,
        stepper: Stepper,
        batches: BatchSource,
        validation: Iterable[Batch] | None,
        data_sha256: str,
        options: Options,
        found: Checkpoint | None,
        interrupt: Interrupt,
    ) -> None:
        recipe = stepper.recipe
        self.stepper, self.recipe, self.ranks, self.run = (
            stepper, recipe, stepper.ranks, stepper.run,
        )  # fmt: skip
        self.batches, self.validation_batches = batches, validation
        self.data_sha256, self.options, self.interrupt = data_sha256, options, interrupt
        self.commit = commit()
        each = recipe.optimiser.accumulate * self.ranks.world
        self.epoch_steps = max(1, len(batches) // each)
        self.steps = recipe.schedule.steps or recipe.schedule.epochs * self.epoch_steps
        # Rounded up: a last epoch that is cut short is an epoch.
        self.epochs = -(-self.steps // self.epoch_steps)
        self.state = found.state if found else State()
        self.validation: Judgement | None = None
        self.validation_s = 0.0
        self._started_s = time.monotonic()
        self._saved_s = self._started_s
        if found is not None:
            stepper.unpack(found.part, found.optimisers)
            set_random_state(found.random[self.ranks.rank], stepper.device)
        else:
            # Processes draw apart from each other: their batches differ, so should any dropout.
            torch.manual_seed(recipe.seed + self.ranks.rank)
        first = self.ranks.first
        self.log = RunLog(
            self.run if first else None,
            self.state.step,
            sys.stderr if first and not options.quiet else None,
        )
        self._announce()

    def _announce(self) -> None:
        recipe, state = self.recipe, self.state
        if self.ranks.first and not (self.run / "recipe.json").exists():
            (self.run / "recipe.json").write_text(to_json(recipe) + "\n")
        precision = str(self.stepper.dtype).removeprefix("torch.")
        weights = sum(p.numel() for p in self.stepper.network.parameters())
        self.log.record(
            "run", state.step, {"device": str(self.stepper.device), "precision": precision}
        )
        self.log.say(
            f"{recipe.name}: {weights / 1e6:.2f} M weights, {precision} on {self.stepper.device}, "
            f"step {state.step} of {self.steps} ({self.epoch_steps} an epoch)"
        )

    def go(self) -> TrainingOutcome:
        """Steps, validations and saves until something ends them."""
        feed = self._feed()
        ending: Ending | None = None
        while ending is None:
            interrupted, late, too_late_to_validate, due = self._agreed()
            # A validation saves too, so a save that is due at the same time is not made twice.
            if self._validation_due() and not too_late_to_validate:
                self._validate()
            elif due:
                self._save()
            # A validation that is due and left out for lack of time is done by the next command.
            late = late or (self._validation_due() and too_late_to_validate)
            ending = self._ending(interrupted, late)
            if ending is None:
                self._step(feed)
        finished = ending in ("finished", "stopped_early")
        self.state = dataclasses.replace(self.state, finished=finished)
        self._save()
        self.log.say(f"{ending.replace('_', ' ')} at step {self.state.step} of {self.steps}")
        return TrainingOutcome(ending, self.state, self.validation)

    def _ending(self, interrupted: bool, late: bool) -> Ending | None:
        patience = self.recipe.schedule.patience
        if late and self._validation_due():
            return "out_of_time"
        if self.state.step >= self.steps:
            return "finished"
        if patience is not None and self.state.validations_since_best >= patience:
            return "stopped_early"
        if interrupted:
            return "interrupted"
        return "out_of_time" if late else None

    def _agreed(self) -> list[bool]:
        """Interrupted, out of time, no time for a validation, time to save.

        True for all processes when it is for one: they must leave the loop, and take part in every
        sum over processes, together.
        """
        options, now_s = self.options, time.monotonic()
        left_s = float("inf")
        if options.minutes is not None:
            left_s = (options.started_s or self._started_s) + 60 * options.minutes - now_s
        mine = [
            self.interrupt.asked,
            left_s < 0,
            left_s < self.validation_s,
            now_s - self._saved_s >= options.save_every_s,
        ]
        if self.ranks.world == 1:
            return mine
        flags = torch.tensor(mine, dtype=torch.int32, device=self.stepper.device)
        return [bool(flag) for flag in self.ranks.total(flags).tolist()]

    def _feed(self) -> Iterator[Batch]:
        """This process's batches, from the step on where the run stands."""
        each = self.recipe.optimiser.accumulate
        world, rank = self.ranks.world, self.ranks.rank
        numbers = range(self.state.step * each * world + rank, self.steps * each * world, world)
        if self.options.workers == 0:
            return (self.batches[number] for number in numbers)
        loader: torch.utils.data.DataLoader[Batch] = torch.utils.data.DataLoader(
            self.batches,  # type: ignore[arg-type]
            batch_size=None,
            sampler=numbers,
            num_workers=self.options.workers,
            prefetch_factor=4,
            # Spawned, not forked: threads and a CUDA context do not survive a fork.
            multiprocessing_context="spawn",
            # Its own generator, so that making a loader leaves the run's random state alone.
            generator=torch.Generator(),
        )
        return iter(loader)

    def _step(self, feed: Iterator[Batch]) -> None:
        before_s = time.monotonic()
        batches = [next(feed) for _ in range(self.recipe.optimiser.accumulate)]
        waited_s = time.monotonic() - before_s
        step = self.state.step
        epoch = step // self.epoch_steps
        moment = Moment(step, epoch, self.epochs, step / self.steps)
        terms = self.stepper.step(batches, moment, self.steps)
        if (step + 1) % self.epoch_steps == 0:
            self.stepper.objective.epoch_ended()
        took_s = time.monotonic() - before_s
        faces = sum(len(batch.forged) for batch in batches) * self.ranks.world
        self.state = dataclasses.replace(
            self.state,
            step=step + 1,
            faces=self.state.faces + faces,
            seconds=self.state.seconds + took_s,
        )
        self._report(terms, epoch, faces / took_s, waited_s / took_s)

    def _report(self, terms: dict[str, float], epoch: int, rate: float, waited: float) -> None:
        step = self.state.step
        if step % LOG_EVERY == 0 or step in (1, self.steps):
            self.log.record(
                "train", step, {**terms, "faces_per_s": rate, "waited": waited, "epoch": epoch}
            )
        left_s = (self.steps - step) * self.state.seconds / step
        best = "" if self.state.best is None else f"  best {abs(self.state.best):.4f}"
        self.log.progress(
            f"epoch {epoch + 1}/{self.epochs}  step {step}/{self.steps}  "
            f"loss {terms['total']:.4f}  bce {terms.get('bce', float('nan')):.4f}  "
            f"{rate:.1f} faces/s  {left_s / 60:.0f} min left{best}"
        )

    def _validation_due(self) -> bool:
        step, every = self.state.step, self.recipe.schedule.evaluate_every
        ended = step % (every * self.epoch_steps) == 0 or step == self.steps
        return self.validation_batches is not None and ended and step > self.state.validated_step

    def _validate(self) -> None:
        """Judge the validation split; keep the weights if they are the best so far."""
        assert self.validation_batches is not None
        began_s = time.monotonic()
        stepper, batches = self.stepper, self.validation_batches
        weights, compute = stepper.judged_weights, stepper.compute
        found = self.validation = stepper.objective.judge(
            weights, batches, compute
        ) or judge_validation(stepper.network, weights, batches, compute)
        self.validation_s = time.monotonic() - began_s
        select = self.recipe.schedule.select
        figure, step, best = found.figure(select), self.state.step, self.state.best
        better = best is None or figure > best or select == "last"
        self.state = dataclasses.replace(
            self.state,
            validated_step=step,
            best=figure if better else self.state.best,
            best_step=step if better else self.state.best_step,
            validations_since_best=0 if better else self.state.validations_since_best + 1,
        )
        self.log.record("validation", step, {**found.facts(), "seconds": self.validation_s})
        self.log.say(
            f"epoch {step / self.epoch_steps:.4g}  {found.said}{'  best' if better else ''}"
        )
        if better and self.ranks.first:
            # The judged weights alone: what else it takes to train on lies in LAST.
            kept = weights or stepper.network.state_dict()
            judged = {f"network.{name}": tensor for name, tensor in kept.items()}
            save(self.run / BEST, self._checkpoint(judged, {}, ()))
        self._save()

    def _save(self) -> None:
        tensors, plain = self.stepper.pack()
        # Every process takes part, since each has random states of its own; the first one writes.
        states = self.ranks.gather(random_state(self.stepper.device))
        if self.ranks.first:
            save(self.run / LAST, self._checkpoint(tensors, plain, tuple(states)))
        self._saved_s = time.monotonic()

    def _checkpoint(
        self, tensors: dict[str, torch.Tensor], plain: dict[str, Any], states: tuple[str, ...]
    ) -> Checkpoint:
        metrics = {} if self.validation is None else {"validation": self.validation.facts()}
        return Checkpoint(
            recipe=self.recipe,
            state=self.state,
            tensors=tensors,
            random=states,
            optimisers=plain,
            data_sha256=self.data_sha256,
            commit=self.commit,
            metrics=metrics,
        )
