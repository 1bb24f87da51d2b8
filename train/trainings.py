"""Running the trainings of a chain: one in this process, or several as processes of their own.

How one training goes, and how it goes on after an interruption, is in ralf.train.loop.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ralf.kernels.engine import pick_device
from ralf.train.chain import Chain, Training
from ralf.train.command_line import INTERRUPTED
from ralf.train.data.batches import Batches
from ralf.train.data.evaluation_set import validation_batches
from ralf.train.data.index import Index
from ralf.train.loop.distributed import ALONE, Ranks
from ralf.train.loop.loop import Options, TrainingOutcome, caught, train
from ralf.train.recipe import Recipe

# Of Linux's <sys/prctl.h>; Python's library has no name for it.
_PR_SET_PDEATHSIG = 1
Facts = dict[str, Any]


class Interrupted(Exception):
    """Training was asked to stop; its checkpoint is whole."""


class TrainingFailed(RuntimeError):
    """A training's processes ended otherwise than a training ends."""


@dataclass(frozen=True)
class ChainRun:
    """A chain on one machine: its data, its folder, its devices."""

    chain: Chain
    data: tuple[str, ...]
    index: Index
    """What `data` holds."""
    run: Path
    changes: Mapping[str, str] = field(default_factory=dict)
    """Fields of the recipes, as --set gives them."""
    device: str = "auto"
    processes: int | None = None
    """Of each training; None: what the chain says."""
    options: Options = field(default_factory=Options)
    allow_leaks: bool = False

    @property
    def crops(self) -> Path:
        """Where pairs of crops are kept, for recipes with data.variants."""
        return self.run / "crops"

    def folder(self, training: Training) -> Path:
        """Where a training lies."""
        return self.chain.folder(self.run, training.name)

    @property
    def last_folder(self) -> Path:
        """Where the training lies that gets published."""
        return self.folder(self.chain.last)

    def recipe(self, training: Training) -> Recipe:
        """A training's whole recipe."""
        return self.chain.recipe(self.run, training, self.changes)

    @property
    def last_recipe(self) -> Recipe:
        """The recipe of the training that gets published."""
        return self.recipe(self.chain.last)

    @property
    def room(self) -> int:
        """How many processes may work at the same time."""
        return self.processes or all_processes(self.device)

    def processes_of(self, stage: Sequence[Training]) -> int:
        """How many processes each training of a stage has: one, when several share the machine."""
        if len(stage) > 1:
            return 1
        if self.processes is not None:
            return self.processes
        return all_processes(self.device) if self.chain.every_device else 1

    def train(self, stage: Sequence[Training]) -> list[Facts]:
        """Train a stage, or go on with it; what `ralf train` would print of each training."""
        processes = self.processes_of(stage)
        # Trainings of one stage run in turn, in this process, where there is room for one only.
        if processes == 1 and (len(stage) == 1 or self.room == 1):
            return [self._in_this_process(training) for training in stage]
        return train_together(
            [self._command(training, place, processes) for place, training in enumerate(stage)]
        )

    def _in_this_process(self, training: Training) -> Facts:
        options = self.options
        if len(self.chain.trainings) > 1:  # --minutes is each training's, not all the chain's
            options = replace(options, started_s=None)
        outcome = train_on(
            self.index,
            self.recipe(training),
            self.folder(training),
            device=pick_device(self.device),
            options=options,
            allow_leaks=self.allow_leaks,
            crops=self.crops,
        )
        if outcome.ending == "interrupted":
            raise Interrupted(f"stopped at step {outcome.state.step}")
        return outcome_facts(outcome, self.folder(training))

    def _command(self, training: Training, place: int, processes: int) -> "TrainCommand":
        device = self.device
        if processes == 1 and pick_device(device).type == "cuda":
            # By turns, where a stage has more trainings than the machine has GPUs.
            device = f"cuda:{place % torch.cuda.device_count()}"
        words = [training.recipe, "--data", *self.data, "--out", str(self.folder(training))]
        words += ["--device", device, "--workers", str(self.options.workers)]
        if self.options.minutes is not None:
            words += ["--minutes", str(self.options.minutes)]
        for name, text in self.chain.changes(self.run, training, self.changes).items():
            words += ["--set", f"{name}={text}"]
        words += ["--crops", str(self.crops)]
        words += ["--allow-leaks"] if self.allow_leaks else []
        return TrainCommand(tuple(words), processes)


def train_on(
    index: Index,
    recipe: Recipe,
    run: Path,
    *,
    device: torch.device | str = "cpu",
    ranks: Ranks = ALONE,
    options: Options | None = None,
    allow_leaks: bool = False,
    crops: Path | None = None,
) -> TrainingOutcome:
    """Train a recipe on the data's train split, judged by its val split; goes on from `run`."""
    options = options or Options()
    batches = Batches(
        index, recipe.data, "train", recipe.seed, allow_leaks=allow_leaks, crops=crops
    )
    if batches.unused_forgeries and ranks.first and not options.quiet:
        print(
            f"ralf: {batches.unused_forgeries} forged videos of split train are not trained on: "
            "data.blended_share is 1; --set blended_share=0.5 mixes them in",
            file=sys.stderr,
        )
    return train(
        recipe,
        batches,
        validation_batches(index, recipe.data),
        run,
        data_sha256=index.sha256,
        device=device,
        ranks=ranks,
        options=options,
    )


def outcome_facts(outcome: TrainingOutcome, run: Path) -> Facts:
    """What `ralf train` prints at the end."""
    state = outcome.state
    return {
        "run": str(run),
        "ending": outcome.ending,
        "step": state.step,
        "faces": state.faces,
        "best": state.best,
        "best_step": state.best_step,
        "validation": outcome.validation.facts() if outcome.validation else None,
    }


def all_processes(device: str) -> int:
    """A process for each GPU, or for each of two CPU cores."""
    if pick_device(device).type == "cuda":
        return torch.cuda.device_count()
    return min(2, os.cpu_count() or 1)


@dataclass(frozen=True)
class TrainCommand:
    """`ralf train` in processes of its own."""

    arguments: tuple[str, ...]
    processes: int = 1

    @property
    def words(self) -> list[str]:
        """What is started: under torchrun where there are several processes."""
        together = ["-m", "torch.distributed.run", "--standalone"]
        launch = [*together, f"--nproc-per-node={self.processes}"] if self.processes > 1 else []
        return [sys.executable, *launch, "-m", "ralf", "train", *self.arguments]


def train_together(commands: Sequence[TrainCommand]) -> list[Facts]:
    """Run trainings at the same time, and give what each printed.

    When one fails or a signal comes, the others are asked to stop, which they do between two steps
    with a whole checkpoint: none is left running alone.
    """
    # One thread each: sums come in a fixed order, and processes that share cores do not fight for
    # them.  A value that the user has set wins.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    with caught() as interrupt, _children(commands, environment) as children:
        asked_to_stop = False
        while None in (codes := [child.poll() for child in children]):
            failed = any(code not in (None, 0) for code in codes)
            if (failed or interrupt.asked) and not asked_to_stop:
                asked_to_stop = True
                _signal(children)
            time.sleep(0.1)
        # Read only after the end: progress goes to stderr, and the line of facts on stdout is far
        # too short to fill a pipe and block a training.
        said = [child.communicate()[0] for child in children]
    if interrupt.asked:
        raise Interrupted("stopped")
    broken = [
        (child.returncode, " ".join(command.words[1:]))
        for command, child in zip(commands, children, strict=True)
        if child.returncode not in (0, INTERRUPTED)
    ]
    if broken:
        # One that was killed by our own signal ended so because another had failed.
        code, words = min(broken, key=lambda each: each[0] == -signal.SIGTERM)
        raise TrainingFailed(f"exit code {code} of {words}")
    if any(child.returncode == INTERRUPTED for child in children):
        raise Interrupted("stopped")
    # The facts are on the last line; what libraries print to stdout comes before it.
    return [json.loads(text.splitlines()[-1]) for text in said]


@contextmanager
def _children(
    commands: Sequence[TrainCommand], environment: Mapping[str, str]
) -> Iterator[list["subprocess.Popen[str]"]]:
    """The processes, none of which outlives this block or, on Linux, this process."""
    children: list[subprocess.Popen[str]] = []
    try:
        children.extend(_start(command, environment) for command in commands)
        yield children
    finally:
        _signal(children)
        for child in children:
            child.__exit__(None, None, None)  # closes its pipe and waits


def _start(command: TrainCommand, environment: Mapping[str, str]) -> "subprocess.Popen[str]":
    libc = ctypes.CDLL(None)
    # If this process is killed, its trainings must stop too: the same command, typed again, trains
    # in their folders.  Between fork and exec this is one system call, so threads do not matter.
    linux = sys.platform == "linux"
    return subprocess.Popen(
        command.words,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        # A session of its own: Ctrl-C reaches this process alone, which passes it on once.
        start_new_session=True,
        preexec_fn=(lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)) if linux else None,  # noqa: PLW1509
    )


def _signal(children: Sequence["subprocess.Popen[str]"]) -> None:
    for child in children:
        if child.poll() is None:
            child.terminate()
