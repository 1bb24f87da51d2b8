"""Scores crops; for an ensemble it also keeps what each of its detectors alone would decide.

The mean of the members decides.  Beside it each member's own logits are kept, and turned into a
score of the video by the same rule: the level of the strongest track that may decide.  An engine
that gives only the mean, as a TensorRT plan does, has no members to list, and the verdict says so.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ralf.kernels.engine import Engine
from ralf.kernels.engine_torch import TorchEngine
from ralf.kernels.manifest import Aggregation, Calibration
from ralf.worker.batcher import engine_behind
from ralf.worker.scores import Scores, video_score

NO_CALIBRATION = Calibration()
"""Members' logits are calibrated already."""


class FaceScorer:
    """Scores one walk's crops, and keeps the logits of an ensemble's members."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        inner = engine_behind(engine)
        self._ensemble = inner if isinstance(inner, TorchEngine) and inner.detectors else None
        self._members: list[NDArray[np.float32]] = []

    @property
    def warning(self) -> str | None:
        """Where an ensemble's members cannot be listed, the warning that says so."""
        if self._ensemble or self.engine.artifact.manifest.network.build != "ensemble":
            return None
        return f"detectors_unlisted: {self.engine.name} gives the ensemble's mean alone"

    def __call__(self, crops: Tensor) -> NDArray[np.float32]:
        """Crops u8 [m, 3, s, s] → logits [m]."""
        if self._ensemble is None:
            return self.engine(crops).numpy().astype(np.float32)
        # Not through the Batcher, which gives one logit a crop and no members.
        logits = self._ensemble.members(crops)
        self._members.append(logits.numpy())
        return logits.mean(1).numpy()

    def member_scores(self, scores: Scores, aggregation: Aggregation) -> dict[str, float]:
        """The video's score by each member; `scores` has one row for each crop scored so far."""
        if self._ensemble is None or not self._members:
            return {}
        by_member = np.concatenate(self._members).T
        found = (
            (name, video_score(replace(scores, logit=logits), NO_CALIBRATION, aggregation))
            for name, logits in zip(self._ensemble.detectors, by_member, strict=True)
        )
        return {name: score for name, score in found if score is not None}
