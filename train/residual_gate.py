"""A RALF of two streams is published as RALF only where its residual is at work.

Closing the residual must cost AUC on the family held out, with a 95 % interval over people above 0.
Otherwise the plain classifier inside is published, under its own name: the two are never called by
one another's.  Beside it stand the figures of a control: a classifier trained for about the same
minutes that never had a residual.
"""

from collections.abc import Mapping
from pathlib import Path

from ralf.kernels.engine import pick_device
from ralf.train.evaluate.judge import model_of_run
from ralf.train.evaluate.tables.residual import residual_figures
from ralf.train.evaluate.tables.table import TableOptions
from ralf.train.loop.checkpoint import has_checkpoint
from ralf.train.publish import without_residual
from ralf.train.resumable import Facts, Step
from ralf.train.retraining import Retraining
from ralf.train.trainings import ChainRun

CLOSED = "without_residual"
"""The folder of the plain classifier inside, in the run's folder."""


def residual_step(order: Retraining) -> Step | None:
    """The step that decides what is published; None where the chain trains no second stream."""
    training, name, split = order.training, order.name, order.calibrate_on
    network, chain = training.last_recipe.network, training.chain
    if network.build != "ralf" or network.dimensions.get("sees") != "bands":
        return None
    return Step(
        "residual",
        {"split": split, "control": chain.control, "name": name, "otherwise": chain.classifier},
        lambda done: _decide(order.with_forgeries(done)),
        f"closing it costs AUC on the family held out, or {chain.classifier} is published",
        still_there=lambda facts: has_checkpoint(Path(facts["folder"])),
    )


def _decide(order: Retraining) -> Facts:
    """What each part of the network is worth on the split's people; which run is published."""
    training, name, split, say = order.training, order.name, order.calibrate_on, order.say
    chain, folder = training.chain, training.last_folder
    device = str(pick_device(training.device))
    named = [each for each in chain.trainings if each.name == chain.control]
    control = model_of_run(training.folder(named[0]), device=device) if named else None
    found = residual_figures(
        model_of_run(folder, device=device), training.index, TableOptions(split=split), control
    )
    value, low, high = found.views["closed"]["costs held out"]
    said = f"{value:+.4f} [{low:+.4f}, {high:+.4f}] of the AUC on the family held out"
    say(f"residual: closing it costs {said}")
    if not found.earned:
        why = f"Trained as RALF. Closing the residual costs {said}: this is the classifier alone."
        folder = without_residual(folder, training.run / CLOSED, why)
        say(f"residual: not at work, so the classifier is published, as {chain.classifier}")
    return {
        "folder": str(folder),
        "earned": found.earned,
        "name": name if found.earned else chain.classifier,
        "views": found.as_json(),
    }


def published_folder(training: ChainRun, done: Mapping[str, Facts]) -> Path:
    """The run that is published."""
    return Path(done["residual"]["folder"]) if "residual" in done else training.last_folder
