"""The table for choosing a video's score: how many frames, and which mean of their logits.

Every frame is scored once.  Each row then pools some of the frames by one rule, as the worker
would.  The interval is of the AUC by video.  All rows are of the same videos, so a difference
that is smaller than the interval may still be real.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ralf.kernels.manifest import Aggregation
from ralf.train.data.index import Index
from ralf.train.evaluate.judge import JudgedModel
from ralf.train.evaluate.metrics import Scored, measure
from ralf.train.evaluate.tables.table import (
    Table,
    TableOptions,
    auc_cell,
    evaluate_with,
    percent,
)

RULES = (
    Aggregation(track="mean"),
    Aggregation(track="trimmed_mean"),
    Aggregation(track="top_half_mean"),
    Aggregation(track="top_k_mean", k=3),
    Aggregation(track="top_k_mean", k=1),
)
FRAMES = (1, 2, 4, 8, 16, 32)


def aggregation(models: Sequence[JudgedModel], index: Index, options: TableOptions) -> Table:
    """AUC and error by video for each number of frames and each rule."""
    found = Table(
        f"Aggregation: what stands for a video, split {options.split}",
        ("model, frames and rule", "videos", "AUC [95 %]", "EER"),
    )
    for model in models:
        # No intervals here: only the scores are used, and each row below has its own interval.
        each = evaluate_with(options, model, index, replicates=0)
        found.add(model.name, each)
        most = max(Counter(each.scored.video).values())
        for frames in (count for count in FRAMES if count <= most):
            part = each.scored.where(evenly_spread(each.scored, frames))
            # Of one frame every mean is the same.
            for rule in RULES if frames > 1 else RULES[:1]:
                pooled = part.pooled(rule)
                m = measure(pooled, model.calibration, replicates=options.replicates)
                name = rule.track + (f" {rule.k}" if rule.track == "top_k_mean" else "")
                label = f"{model.name} {frames} {name}"
                found.figures[label] = {"auc": m.auc, "low": m.auc_low, "high": m.auc_high,
                                        "eer": m.eer, "videos": len(pooled)}  # fmt: skip
                found.rows.append((label, str(len(pooled)), auc_cell(m), percent(m.eer)))
    return found


def evenly_spread(scored: Scored, frames: int) -> NDArray[np.bool_]:
    """Which rows are among `frames` frames of each video, evenly spread over it."""
    kept = np.zeros(len(scored), bool)
    counts, seen = Counter(scored.video), dict.fromkeys(scored.video, 0)
    for row, video in enumerate(scored.video):
        of, place = counts[video], seen[video]
        seen[video] += 1
        # The middles of equal parts: one frame is the video's middle and not its first.
        wanted = np.floor((np.arange(min(frames, of)) + 0.5) * of / min(frames, of)).astype(int)
        kept[row] = place in wanted
    return kept
