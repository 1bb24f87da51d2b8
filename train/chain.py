"""Trainings that build on one another, declared: which recipe each follows, and whose weights it
begins with.

    CHAINS["shipped"]    classifier ─▶ two branches of it ─▶ their mean is the detector's backbone
    CHAINS["ralf_two_streams"]
        reconstructor, on reals alone ─▶ residual ─▶ joint ─▶ detector, its mask free
        classifier ─────────────────────────┴──────▶ control, a classifier of the same minutes

Any recipe's name is a chain of one training.  Trainings of one stage do not depend on each other,
so they run at the same time.  ralf.train.trainings runs them; what follows the last one
(calibration, figures, publishing) is in ralf.train.retrain.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ralf.train.recipe import Recipe
from ralf.train.recipe_text import RecipeError, override
from ralf.train.recipes import named


@dataclass(frozen=True)
class Training:
    """One training of a chain."""

    name: str
    recipe: str
    changes: Mapping[str, str] = field(default_factory=dict)
    """Fields of the recipe by name, as `ralf train --set` takes them."""
    network_from: tuple[str, ...] = ()
    """Earlier trainings: it begins with the mean of their weights."""
    backbone_from: tuple[str, ...] = ()
    """Earlier trainings: its backbone begins with the mean of theirs."""


@dataclass(frozen=True)
class MadeClips:
    """Calibrate and measure on clips made of the data's stills, as uploads are: see forge.clips."""

    crfs: tuple[int, ...] = (23, 40)
    seconds: float = 1.3
    frames: int = 8
    """Faces cut from each clip."""
    drift: bool = False
    uploads: bool = False
    """As in ClipOptions: forged frame by frame; one more clip of each, encoded several times."""
    held_out_turns: int = 3
    """How often the held-out family is drawn for the test clips, where each other is drawn once."""


@dataclass(frozen=True)
class Chain:
    """Trainings in the order of their stages; the last one is what gets published."""

    name: str
    stages: tuple[tuple[Training, ...], ...]
    every_device: bool = False
    """Train each on all GPUs, or on two CPU cores; else in one process."""
    clips: MadeClips | None = None
    """None: calibrate and measure on the data itself."""
    control: str | None = None
    """A training without a residual, of about the same minutes: what RALF is compared with."""
    classifier: str = "small-classifier"
    """The name to publish by where closing the residual costs nothing: then the plain classifier
    inside is published, which is no RALF."""

    def __post_init__(self) -> None:
        earlier: set[str] = set()
        for stage in self.stages:
            for training in stage:
                if unknown := {*training.network_from, *training.backbone_from} - earlier:
                    raise RecipeError(
                        f"{training.name} of chain {self.name} begins with {sorted(unknown)}, "
                        "which no earlier stage trains"
                    )
            earlier |= {training.name for training in stage}
        if self.control is not None and self.control not in earlier:
            raise RecipeError(f"chain {self.name} trains no {self.control!r} to compare with")
        if len(self.stages[-1]) != 1 or len(earlier) != len(self.trainings):
            raise RecipeError(f"chain {self.name} should end in one training, each name once")

    @property
    def trainings(self) -> tuple[Training, ...]:
        """All of them."""
        return tuple(training for stage in self.stages for training in stage)

    @property
    def last(self) -> Training:
        """The one that gets published."""
        return self.stages[-1][0]

    def folder(self, run: Path, training: str) -> Path:
        """Where a training lies: the run itself when it is the only one."""
        return run if len(self.trainings) == 1 else run / training

    def changes(self, run: Path, training: Training, asked: Mapping[str, str]) -> dict[str, str]:
        """All that a training changes in its recipe; `asked` has the last word.

        A name with a training's before it ("classifier:lr") is meant for that training alone.
        """
        begins = {
            f"init.{part}": ",".join(str(self.folder(run, name)) for name in names)
            for part, names in (
                ("network", training.network_from),
                ("backbone", training.backbone_from),
            )
            if names
        }
        known = {each.name for each in self.trainings}
        chosen: dict[str, str] = {}
        for name, text in asked.items():
            which, colon, rest = name.rpartition(":")
            if colon and which not in known:
                raise RecipeError(f"no training {which!r} in {self.name}: {', '.join(known)}")
            if which in ("", training.name):
                chosen[rest] = text
        return {**training.changes, **begins, **chosen}

    def recipe(self, run: Path, training: Training, asked: Mapping[str, str]) -> Recipe:
        """A training's whole recipe."""
        return override(named(training.recipe), self.changes(run, training, asked))


def _from_classifiers(
    name: str, detector: str, *, classifier_steps: str, changes: Mapping[str, str]
) -> Chain:
    """A detector whose backbone is the mean of two classifiers that parted late in training.

    The mean of two is a better start than either, and costs nothing at inference.
    """
    shared = {"data.batch": "16", "schedule.select": "last"}
    later = {
        **shared,
        "schedule.steps": "1150",
        "schedule.evaluate_every": "16",
        "data.augment.other": "0.7",
        "optimiser.lr": "3e-4",
        "optimiser.ema": "0.995",
    }
    first = {
        **shared,
        "schedule.steps": classifier_steps,
        "schedule.evaluate_every": "5",
        "optimiser.ema": "0.99",
    }
    # Two seeds are two orders of batches from the same weights: far enough apart that the mean
    # helps, near enough that a mean of weights is still a working network.
    branches = tuple(
        Training(
            f"branch{seed}",
            "small_classifier",
            {**later, "seed": seed},
            network_from=("classifier",),
        )
        for seed in ("31", "32")
    )
    return Chain(
        name,
        (
            (Training("classifier", "small_classifier", first),),
            branches,
            (
                Training(
                    "detector",
                    detector,
                    changes,
                    backbone_from=tuple(branch.name for branch in branches),
                ),
            ),
        ),
        every_device=True,
        clips=MadeClips(),
    )


def _two_streams() -> Chain:
    """RALF on crop and residual, and a classifier of about the same minutes to compare it with.

    Core-minutes, from the processor time of a step at 256 px: reconstructor 40, classifier 60,
    residual 55, joint 107, detector 42; the control's 240 are what RALF's four trainings take.
    """
    crop = {"data.batch": "16", "schedule.select": "auc", "schedule.evaluate_every": "2"}
    # An arm that has stopped getting better gives its time to the others.
    arm = {**crop, "schedule.patience": "10"}
    gentle = {"optimiser.lr": "2e-4", "optimiser.ema": "0.995"}
    classifier = Training(
        "classifier", "small_classifier",
        {**arm, "schedule.steps": "3000", "optimiser.ema": "0.99"},
    )  # fmt: skip
    residual = Training(
        # In two processes, so 32 faces a step.
        "residual", "residual_stream", {**arm, "schedule.steps": "940"},
        network_from=("reconstructor",), backbone_from=("classifier",),
    )  # fmt: skip
    joint = Training("joint", "two_stream", gentle, network_from=("residual",))
    control = Training(
        "control", "small_classifier", {**arm, **gentle, "schedule.steps": "12000"},
        network_from=("classifier",),
    )  # fmt: skip
    # Last, and not for long: nothing but the budget rewards taking frequencies away.
    freed = Training(
        "detector", "two_stream",
        {
            **gentle,
            "optimiser.rates": "reconstructor*0,mask*30,gate*20",
            "loss.weight_budget": "1",
            "schedule.steps": "400",
            "optimiser.lr": "5e-5",
        },
        network_from=("joint",),
    )  # fmt: skip
    first = (Training("reconstructor", "reconstructor"), classifier)
    return Chain(
        "ralf_two_streams", (first, (residual,), (joint, control), (freed,)),
        every_device=True, clips=MadeClips(), control="control",
    )  # fmt: skip


CHAINS = {
    chain.name: chain
    for chain in (
        # Makes ralf-small anew, in about three hours on two CPU cores.  The version in models/ went
        # on from an earlier one for 100 steps: its card says so.
        _from_classifiers("shipped", "ralf_small_cpu", classifier_steps="3000", changes={}),
        # The larger one, for a GPU: declared, and never run.
        _from_classifiers(
            "shipped_gpu",
            "ralf_small",
            classifier_steps="4000",
            changes={"schedule.steps": "6000"},
        ),
        # RALF with its residual at work, or the classifier inside: the chain decides which.
        _two_streams(),
    )
}


def chain_of(name: str) -> Chain:
    """The chain of that name, or of that one recipe."""
    if name in CHAINS:
        return CHAINS[name]
    try:
        named(name)
    except RecipeError as error:
        raise RecipeError(f"{error}; chains of several: {', '.join(CHAINS)}") from error
    return Chain(name, ((Training("train", name),),))
