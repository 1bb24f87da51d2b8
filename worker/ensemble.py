"""An ensemble's members in a verdict: what each detector alone would say of the video.

The mean of the members judges; what each of them said of every face is kept beside it, and judged
by the same rule: the level of the strongest track that may decide.  An engine that gives the mean
alone, as a plan does, has nothing to list, and the verdict says so.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ralf.kernels.engine import Engine
from ralf.kernels.engine_torch import TorchEngine
from ralf.kernels.manifest import Aggregation, Calibration
from ralf.worker.batcher import behind
from ralf.worker.scores import Scores, strongest

SAME = Calibration()
"""Members' logits come calibrated."""


class Panel:
    """One walk's scoring: logits to judge by, and what each member of an ensemble said."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        inner = behind(engine)
        self._ensemble = inner if isinstance(inner, TorchEngine) and inner.detectors else None
        self._said: list[NDArray[np.float32]] = []

    @property
    def unlisted(self) -> str | None:
        """A warning where an ensemble's members cannot be listed."""
        if self._ensemble or self.engine.artifact.manifest.network.build != "ensemble":
            return None
        return f"detectors_unlisted: {self.engine.name} gives the ensemble's mean alone"

    def __call__(self, crops: Tensor) -> NDArray[np.float32]:
        """Crops u8 [m, 3, s, s] → logits [m]."""
        if self._ensemble is None:
            return self.engine(crops).numpy().astype(np.float32)
        said = self._ensemble.members(crops)
        self._said.append(said.numpy())
        return said.mean(1).numpy()

    def scores(self, scores: Scores, aggregation: Aggregation) -> dict[str, float]:
        """The video's score by each member; the rows are those of all calls, in their order."""
        if self._ensemble is None or not self._said:
            return {}
        by_member = np.concatenate(self._said).T
        found = (
            (name, strongest(replace(scores, logit=said), SAME, aggregation))
            for name, said in zip(self._ensemble.detectors, by_member, strict=True)
        )
        return {name: score for name, score in found if score is not None}
