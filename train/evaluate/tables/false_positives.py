"""The table of real faces that a model calls forged, and of the groups that they belong to."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ralf.train.data.evaluation_set import Example, Examples
from ralf.train.data.index import Index
from ralf.train.evaluate.conditions import CLEAN
from ralf.train.evaluate.judge import (
    Evaluation,
    JudgedModel,
    evaluation_of,
    examples_for,
    score_examples,
)
from ralf.train.evaluate.metrics import share_interval
from ralf.train.evaluate.tables.table import Table, TableOptions, percent

CONDITIONS = ("h264=23", "h264=40", "jpeg=50", "light:3")
SIZES = ((96, "under 96 px"), (256, "96 to 255 px"), (10**9, "256 px and more"))
TURNED = 0.2
"""In eye distances: further from the eyes' middle than this, the nose's tip shows a turned head."""
GREY = 8
"""A picture whose channels differ by no more than this is greyscale."""


def false_positives(models: Sequence[JudgedModel], index: Index, options: TableOptions) -> Table:
    """How many real faces the model's threshold calls forged, and whose."""
    found = Table(
        f"Real faces called forged, split {options.split}",
        ("model, condition and faces", "faces", "called forged", "rate [95 %]"),
    )
    for model in models:
        for condition in (CLEAN, *(options.conditions or CONDITIONS)):
            each, groups = called_forged(model, index, options, condition)
            found.evaluations.append(each)
            for name, (events, of) in groups.items():
                label = f"{model.name} {condition} {name}"
                low, high = share_interval(events, of)
                found.figures[label] = {"faces": of, "forged": events, "interval": [low, high]}
                span = f"{percent(events / of)} [{percent(low)}, {percent(high)}]"
                found.rows.append((label, str(of), str(events), span))
    found.notes.append("rates in percent, with Clopper and Pearson's interval")
    return found


def called_forged(
    model: JudgedModel, index: Index, options: TableOptions, condition: str
) -> tuple[Evaluation, dict[str, tuple[int, int]]]:
    """The split's reals judged; for each group of them, how many are called forged, of how many."""
    examples = examples_for(
        model, index.where(label=0), options.split, condition=condition, frames=options.frames,
        limit=options.limit,
    )  # fmt: skip
    scored = score_examples(model, examples, options.on_progress)
    wrong = scored.probability(model.calibration) >= model.threshold
    groups = np.array([groups_of(item, examples) for item in examples.items])
    members = {n: (groups == n).any(axis=1) for n in sorted(set(groups.ravel().tolist()) - {""})}
    counts = {name: (int(wrong[own].sum()), int(own.sum())) for name, own in members.items()}
    # No bootstrap: with reals alone the AUC is NaN, and so would be its interval.
    return evaluation_of(model, scored, condition, replicates=0), counts


def size_of(item: Example, examples: Examples) -> str:
    """How large its face was where it came from, in words; empty: not known."""
    face = examples.pool.pictures.face(item.frame)
    size = item.frame.row.face_px or (int(min(face.box[2:] - face.box[:2])) if face else 0)
    return next(name for most, name in SIZES if size < most) if size else ""


def groups_of(item: Example, examples: Examples) -> tuple[str, ...]:
    """What a face counts under: all, its dataset, its size, its pose, colour or grey."""
    row, pictures = item.frame.row, examples.pool.pictures
    face, sized = pictures.face(item.frame), size_of(item, examples)
    pose = ""
    if face is not None:
        # The nose's tip moves away from the middle of the eyes as the head turns.
        off = abs(face.five[2, 0] - face.five[:2, 0].mean()) / face.eye_distance
        pose = "turned" if off > TURNED else "frontal"
    # Every fourth pixel is enough to tell colour from grey.
    pixels: NDArray[np.int_] = pictures.picture(item.frame)[::4, ::4].astype(int)
    grey = np.abs(pixels - pixels[..., 1:2]).max() <= GREY
    return "all", row.dataset, sized, pose, "greyscale" if grey else "colour"
