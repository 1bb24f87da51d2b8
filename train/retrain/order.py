"""What was asked of one `ralf retrain`, and the folder that it works in."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ralf.kernels.engine import pick_device
from ralf.train.chain import Chain, MadeClips
from ralf.train.data.index import Index
from ralf.train.data.layouts import read_all
from ralf.train.publish.version import Target
from ralf.train.recipe_text import to_json
from ralf.train.retrain.resumable import Facts, Say
from ralf.train.trainings import ChainRun

LEAST_PEOPLE = 30
"""With 30 people a false-positive rate of 0 still means anything up to 12 %."""
RENDER = "render"
"""The step that puts the data and the rendered forgeries into one index."""


@dataclass(frozen=True)
class Retraining:
    """What was asked of one `ralf retrain`."""

    training: ChainRun
    name: str
    models: Path
    targets: tuple[Target, ...] = ("cpu",)
    calibrate_on: str = "val"
    evaluate_on: str = "test"
    conditions: tuple[str, ...] = ("clean",)
    """Damage put on the calibration split, on both classes alike."""
    golden_from: tuple[str, ...] = ()
    """Collections whose faces may ship; none: patterns that show nobody."""
    least_people: int = LEAST_PEOPLE
    """Real people whom the splits to calibrate and to evaluate on should have at least."""
    groups: tuple[Path, ...] = ()
    """Tables of people's groups, to count errors by on the card."""
    force: bool = False
    say: Say = print

    @property
    def run(self) -> Path:
        """The folder of everything that is made on the way."""
        return self.training.run

    @property
    def index(self) -> Index:
        """The data."""
        return self.training.index

    @property
    def torch_device(self) -> str:
        """The device as torch names it."""
        return str(pick_device(self.training.device))

    def with_forgeries(self, done: Mapping[str, Facts]) -> "Retraining":
        """The same on the data with the rendered forgeries, where the chain renders some."""
        if RENDER not in done:
            return self
        path = done[RENDER]["index"]
        return replace(self, training=replace(self.training, data=(path,), index=read_all([path])))

    @property
    def clips(self) -> MadeClips | None:
        """The clips to calibrate and measure on; None: the data itself."""
        return self.training.chain.clips


def default_run(chain: Chain, changes: Mapping[str, str], index: Index, name: str) -> Path:
    """The same folder for the same recipes on the same data, so that the same command goes on."""
    # With an empty path: where the run lies must not change its name.
    recipes = [chain.recipe(Path(), training, changes) for training in chain.trainings]
    asked = "\0".join([*map(to_json, recipes), index.sha256])
    digest = hashlib.sha256(asked.encode()).hexdigest()[:8]
    return Path("runs") / f"{name}-{recipes[-1].name}-{digest}"
