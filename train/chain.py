"""Trainings that build on one another, declared: which recipe each follows, and whose weights it
begins with.

    CHAINS["shipped"]    renderers ─▶ head ─▶ small ─▶ whole ─▶ two branches ─▶ from their mean, the
                         detector
    CHAINS["shipped_masked"]     the same, its backbone pre-trained on reals without a label
    CHAINS["ralf_two_streams"]
        reconstructor, on reals alone ─▶ residual ─▶ joint ─▶ detector, its mask free
        classifier ─────────────────────────┴──────▶ control, a classifier of the same minutes

Any recipe's name is a chain of one training.  Trainings of one stage do not depend on each other,
so they run at the same time.  ralf.train.trainings runs them; what follows the last one
(calibration, figures, publishing) is in ralf.train.retrain.steps.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
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
    talk: bool = False
    uploads: bool = False
    """As in ClipOptions: forged frame by frame; mouths that move; one more clip of each, encoded
    several times."""
    stills: int | None = None
    """Of each split, evenly over the collections; None takes all."""
    held_out_turns: int = 3
    """How often the held-out family is drawn for the test clips, where each other is drawn once."""


@dataclass(frozen=True)
class RendererFit:
    """One learned renderer, fitted before the trainings: see train/forge/renderers."""

    renderer: str
    minutes: float
    changes: Mapping[str, str] = field(default_factory=dict)
    """Its options by name, as `ralf forge fit --set` takes them."""
    held_out: bool = False
    """Draws for the test split alone: a whole generator that nothing is trained or chosen on."""
    variants: int = 1
    """Forgeries of each face of the train split; the others have one."""


@dataclass(frozen=True)
class Chain:
    """Trainings in the order of their stages; the last one is what gets published."""

    name: str
    stages: tuple[tuple[Training, ...], ...]
    fits: tuple[RendererFit, ...] = ()
    """Their forgeries are put beside the data, before the first training."""
    minutes: float | None = None
    """What fits and trainings take together, on the machine that the chain is meant for; None: not
    known, and `--minutes` then bounds each training."""
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
        fitted = {fit.renderer for fit in self.fits}
        if len(fitted) != len(self.fits) or fitted & earlier:
            raise RecipeError(f"chain {self.name} should fit each renderer once, by its own name")

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
        left_out = ",".join(fit.renderer for fit in self.fits if fit.held_out)
        rendered = {"data.also_held_out": left_out} if left_out else {}
        begins = {
            f"init.{part}": ",".join(str(self.folder(run, name)) for name in names)
            for part, names in (
                ("network", training.network_from),
                ("backbone", training.backbone_from),
            )
            if names
        }
        everything, own = self._asked(training.name, asked)
        return {**rendered, **training.changes, **begins, **everything, **own}

    def options(self, fit: RendererFit, asked: Mapping[str, str]) -> dict[str, str]:
        """All that a fit changes in its renderer's options; NAME=VALUE alone means trainings."""
        return {**fit.changes, **self._asked(fit.renderer, asked)[1]}

    def _asked(self, of: str, asked: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
        """What is asked of all trainings, and of this training or renderer alone."""
        known = [*(each.name for each in self.trainings), *(fit.renderer for fit in self.fits)]
        everything: dict[str, str] = {}
        own: dict[str, str] = {}
        for name, text in asked.items():
            which, colon, rest = name.rpartition(":")
            if colon and which not in known:
                raise RecipeError(f"no training {which!r} in {self.name}: {', '.join(known)}")
            if which in ("", of):
                (own if colon else everything)[rest] = text
        return everything, own

    def scaled(self, minutes: float | None) -> "Chain":
        """The same chain for so many minutes: fits and steps shrink and grow alike."""
        if minutes is None or self.minutes is None:
            return self
        if minutes <= 0:
            raise RecipeError(f"--minutes should be above 0, got {minutes:g}")
        factor = minutes / self.minutes

        def shorter(training: Training) -> Training:
            steps = self.recipe(Path(), training, {}).schedule.steps
            if steps is None:
                raise RecipeError(f"{training.name} of chain {self.name} should count in steps")
            scaled = {"schedule.steps": str(max(1, round(steps * factor)))}
            return replace(training, changes={**training.changes, **scaled})

        return replace(
            self,
            stages=tuple(tuple(map(shorter, stage)) for stage in self.stages),
            fits=tuple(replace(fit, minutes=fit.minutes * factor) for fit in self.fits),
            minutes=minutes,
        )

    def recipe(self, run: Path, training: Training, asked: Mapping[str, str]) -> Recipe:
        """A training's whole recipe."""
        return override(named(training.recipe), self.changes(run, training, asked))


# For every training of a shipped chain: damage as uploads have it, pictures that end at the face.
# uploads at 0.3: at 0.5 making a batch takes half as long again.
_SEEN = {
    "data.blended_share": "0.5",
    "data.tight_pictures": "true",
    "data.augment.uploads": "0.3",
    "data.augment.requantised": "0.1",
    "data.augment.cut_off": "0.2",
    "data.augment.margins": "1.0,1.15,1.3,1.45",
}
# The convolutions: without them only norms and head are left to move.
_FEW = "conv_stem*0,conv_dw*0,conv_pw*0,conv_pwl*0,conv_head*0"


def _shipped(name: str, *, steps: tuple[int, ...], batch: int, minutes: float,
             fits: tuple[RendererFit, ...]) -> Chain:  # fmt: skip
    """A classifier whose weights are the mean of two that parted late in training.

    At 128 px first, a few weights and then all; at full size last.  `steps` are those of head,
    small, whole, each branch, and detector.  The mean of two is a better start than either, and
    costs nothing at inference.
    """
    head, small, whole, branch, last = map(str, steps)
    shared = {**_SEEN, "data.batch": str(batch)}
    at_128 = {**shared, "network.size": "128", "input.size": "128", "data.variants": "4"}
    newest = {"schedule.select": "last"}
    gentle = {**shared, **newest, "optimiser.lr": "3e-4", "optimiser.ema": "0.995"}
    trainings = (
        # Few weights: random ones in the head would else upset what ImageNet taught the others.
        Training("head", "small_classifier", {
            **at_128, **newest, "schedule.steps": head, "optimiser.rates": _FEW,
            "optimiser.lr": "2e-3", "optimiser.ema": "0.95",
        }),
        # An arm that has stopped getting better gives its time to the others.
        Training("small", "small_classifier", {
            **at_128, "schedule.steps": small, "schedule.select": "auc", "schedule.patience": "4",
            "optimiser.lr": "6e-4", "optimiser.ema": "0.995",
        }, network_from=("head",)),
        # Another size is another network: only its backbone, which has the head, goes on.
        Training("whole", "small_classifier", {
            **shared, **newest, "schedule.steps": whole, "optimiser.ema": "0.99",
        }, backbone_from=("small",)),
    )  # fmt: skip
    # Two seeds are two orders of batches from the same weights: far enough apart that the mean
    # helps, near enough that a mean of weights is still a working network.
    branches = tuple(
        Training(
            f"branch{seed}", "small_classifier",
            {**gentle, "schedule.steps": branch, "data.augment.other": "0.7", "seed": seed},
            network_from=("whole",),
        )
        for seed in ("31", "32")
    )  # fmt: skip
    detector = Training(
        "detector", "small_classifier",
        {**gentle, "schedule.steps": last, "optimiser.lr": "1e-4"},
        network_from=tuple(each.name for each in branches),
    )  # fmt: skip
    return Chain(
        name, (*((each,) for each in trainings), branches, (detector,)),
        every_device=True, clips=MadeClips(stills=60, talk=True, uploads=True),
        fits=fits, minutes=minutes,
    )  # fmt: skip


def _with_masked(name: str, of: Chain, steps: int, minutes: float) -> Chain:
    """Another chain whose backbone first learns on reals without a label, at 128 px."""
    (head,), *others = of.stages
    real = {key: text for key, text in _SEEN.items() if key != "data.blended_share"}
    masked = Training("masked", "masked_backbone", {
        **real, "network.size": "128", "input.size": "128", "schedule.steps": str(steps),
        "data.batch": of.last.changes["data.batch"],
    })  # fmt: skip
    begun = replace(head, backbone_from=(masked.name,))
    return replace(of, name=name, stages=((masked,), (begun,), *others), minutes=minutes)


def _with_ralf(name: str, of: Chain, minutes: float) -> Chain:
    """The classifier of another chain, and then RALF's arm with that as its crop's classifier.

    The other chain's detector is the control.
    """
    both = {**_SEEN, "data.batch": of.last.changes["data.batch"]}
    gentle = {**both, "optimiser.lr": "2e-4", "optimiser.ema": "0.995"}
    real = {name: text for name, text in _SEEN.items() if name != "data.blended_share"}
    arm = (
        Training("ralf_reconstructor", "reconstructor", real),
        Training("residual", "residual_stream", both, ("ralf_reconstructor",), (of.last.name,)),
        Training("joint", "two_stream", gentle, ("residual",)),
    )
    return replace(
        of, name=name, stages=(*of.stages, *((each,) for each in arm)),
        control=of.last.name, minutes=minutes,
    )  # fmt: skip


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


_CPU = _shipped(
    "shipped",
    steps=(300, 3600, 900, 550, 200),
    batch=16,
    minutes=117,
    fits=(
        RendererFit("autoencoder", 18),
        RendererFit("restorer", 5),
        RendererFit("lip_sync", 12),
        RendererFit("reconstructor", 4, held_out=True),
    ),
)
CHAINS = {
    chain.name: chain
    for chain in (
        # Makes the model that ships, from ImageNet's weights, on two idle CPU cores.  The version
        # in models/ came of an earlier chain: its card says of which.
        _CPU,
        # The same on one large GPU: larger batches, the autoencoder and lip-sync at 128 px.
        _shipped(
            "shipped_gpu",
            steps=(300, 4500, 2500, 900, 300),
            batch=64,
            minutes=29,
            fits=(
                RendererFit(
                    "autoencoder", 6, {"size": "128", "batch": "96", "width": "48",
                                       "steps": "60000"}
                ),
                RendererFit("restorer", 1, {"batch": "96"}),
                RendererFit(
                    "lip_sync", 4, {"size": "128", "batch": "64", "width": "32",
                                    "steps": "60000"}
                ),
                RendererFit("reconstructor", 1, {"batch": "96"}, held_out=True),
            ),
        ),
        # The residual at work, or the classifier inside: the chain decides which.
        _with_ralf("shipped_ralf", _CPU, 322),
        # 1500 steps of two processes see 48,000 faces; what they bring is not measured.
        _with_masked("shipped_masked", _CPU, 1500, 132),
        _two_streams(),
    )
}  # fmt: skip


def chain_of(name: str) -> Chain:
    """The chain of that name, or of that one recipe."""
    if name in CHAINS:
        return CHAINS[name]
    try:
        named(name)
    except RecipeError as error:
        raise RecipeError(f"{error}; chains of several: {', '.join(CHAINS)}") from error
    return Chain(name, ((Training("train", name),),))
