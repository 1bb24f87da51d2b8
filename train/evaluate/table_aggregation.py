"""The table that chooses a video's score: how many frames, and which mean of their logits.

Every frame is scored once; each row then pools some of them by one rule, as the worker would.
The interval is of the AUC by video; rows are drawn from the same videos, so a difference within
it may still be real, and one beyond it surely is.
"""

from collections.abc import Sequence

import numpy as np

from ralf.kernels.manifest import Aggregation
from ralf.train.data.index import Index
from ralf.train.evaluate.judge import Judge, evaluate
from ralf.train.evaluate.metrics import Scored, measure
from ralf.train.evaluate.tables import Ask, Table, _auc, _percent, _take

RULES = (
    Aggregation(track="mean"),
    Aggregation(track="trimmed_mean"),
    Aggregation(track="top_half_mean"),
    Aggregation(track="top_k_mean", k=3),
    Aggregation(track="top_k_mean", k=1),
)
FRAMES = (1, 2, 4, 8, 16, 32)


def aggregation(judges: Sequence[Judge], index: Index, ask: Ask) -> Table:
    """AUC and error by video for each number of frames and each rule."""
    found = Table(
        f"Aggregation: what stands for a video, split {ask.split}",
        ("model, frames and rule", "videos", "AUC [95 %]", "EER"),
    )
    for judge in judges:
        each = evaluate(
            judge, index, ask.split, families=ask.families, frames=ask.frames, limit=ask.limit,
            replicates=0, watch=ask.watch,
        )  # fmt: skip
        _take(found, judge.name, each)
        most = max(_counts(each.scored).values())
        for frames in (count for count in FRAMES if count <= most):
            part = each.scored.where(spread(each.scored, frames))
            for rule in RULES if frames > 1 else RULES[:1]:
                pooled = part.pooled(rule)
                m = measure(pooled, judge.calibration, replicates=ask.replicates)
                name = rule.track + (f" {rule.k}" if rule.track == "top_k_mean" else "")
                label = f"{judge.name} {frames} {name}"
                found.figures[label] = {"auc": m.auc, "low": m.auc_low, "high": m.auc_high,
                                        "eer": m.eer, "videos": len(pooled)}  # fmt: skip
                found.rows.append((label, str(len(pooled)), _auc(m), _percent(m.eer)))
    return found


def spread(scored: Scored, frames: int) -> "np.ndarray":
    """Which rows are among `frames` of each video's, evenly spread."""
    kept = np.zeros(len(scored), bool)
    counts, seen = _counts(scored), dict.fromkeys(scored.video, 0)
    for row, video in enumerate(scored.video):
        of, place = counts[video], seen[video]
        seen[video] += 1
        wanted = np.floor((np.arange(min(frames, of)) + 0.5) * of / min(frames, of)).astype(int)
        kept[row] = place in wanted
    return kept


def _counts(scored: Scored) -> dict[tuple[str, str, str, str], int]:
    found: dict[tuple[str, str, str, str], int] = {}
    for video in scored.video:
        found[video] = found.get(video, 0) + 1
    return found
