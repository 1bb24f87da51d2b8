"""The detectors side by side: seen and unseen forgeries, clean and damaged pictures, and cost.

    seen      forgeries of the families that the recipes train on, blended into the split's reals
    unseen    forgeries of the family that none of them trains on
    less      the figure minus the first model's on the same faces, with the interval of that
              difference, which faces that are hard for all models do not widen

Models with the same input contract share their crops.  Speed is that of the FP32 network on this
machine, the models in turn.  The arithmetic is counted and not timed, on meta tensors, so that
nothing runs: a multiply-add is two operations, and only convolutions and matrix products count, as
is usual; our own destructor's are among them.

Notes below the table say what its figures show, and what the table cannot show.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ralf.kernels.bench.record import interleave, machine
from ralf.kernels.export import OPS
from ralf.kernels.manifest import held_out_family
from ralf.train.data.index import Index
from ralf.train.evaluate.conditions import CLEAN
from ralf.train.evaluate.judge import (
    JudgedModel,
    evaluation_of,
    examples_for,
    score_together,
)
from ralf.train.evaluate.metrics import Metrics, Scored, auc, measure, paired_bootstrap_interval
from ralf.train.evaluate.tables.table import Table, TableOptions, auc_cell
from ralf.train.forge.families import FAMILIES

CONDITIONS = ("h264=40", "jpeg=50", "blur:2")
TIMED = 8
"""How many crops speed is measured with."""
CANNOT = (
    "It cannot say which of them finds deepfakes best: every forgery here was made of the split's "
    "own faces by this project's blending, the unseen ones too, and nothing here was filmed. It is "
    "of one training run each: intervals are over faces, and another seed may move a model by as "
    "much. Models of the same budget of faces are not models at their best: what is large or has "
    "several losses to weigh may need more."
)


@dataclass(frozen=True)
class Comparison:
    """One model on the reals and some families, under one condition."""

    figures: Metrics
    less_first: float
    """Its AUC minus the first model's."""
    low: float
    high: float

    @property
    def difference(self) -> str:
        """In points of AUC."""
        span = f" [{100 * self.low:+.2f}, {100 * self.high:+.2f}]"
        return f"{100 * self.less_first:+.2f}" + ("" if np.isnan(self.low) else span)

    @property
    def verdict(self) -> str:
        """What the interval allows to say."""
        if self.low > 0:
            return "above it"
        return "below it" if self.high < 0 else "not distinguishable from it"


@dataclass(frozen=True)
class DetectorRow:
    """One model: what it is, and its figures under each condition, seen and unseen."""

    trained: Mapping[str, Any]
    parameters: int | None
    gflop: float | None
    faces_per_s: float
    parts: dict[str, tuple[Comparison, Comparison]]

    def head(self) -> tuple[str, ...]:
        """Weights, arithmetic, speed, and how long it was trained."""
        weights = f"{self.parameters / 1e6:.2f}" if self.parameters is not None else "—"
        gflop = f"{self.gflop:.2f}" if self.gflop is not None else "—"
        faces = self.trained.get("faces")
        trained = f"{faces:,} faces" if isinstance(faces, int) else "—"
        return weights, gflop, f"{self.faces_per_s:.1f}", trained


def detectors(models: Sequence[JudgedModel], index: Index, options: TableOptions) -> Table:
    """A row for each model, and below it one for each condition."""
    unseen = unseen_by_all(models)
    seen = tuple(family for family in options.families or FAMILIES if family != unseen)
    found = Table(
        f"Detectors side by side, split {options.split}; unseen: {unseen}",
        ("model and condition", "M weights", "GFLOP", "faces/s", "trained on", "seen AUC [95 %]",
         "unseen AUC [95 %]", "seen, less first [95 %]", "unseen, less first [95 %]"),
    )  # fmt: skip
    made = tuple(family for family in (*seen, unseen) if family in FAMILIES)
    scored = {
        condition: score_all(models, index, options, made, condition)
        for condition in (CLEAN, *(options.conditions or CONDITIONS))
    }
    # Forgeries on disk count by their own methods, beside the families that are made here.
    seen = tuple(method for method in scored[CLEAN][0].methods if method != unseen)
    speed, rows = _faces_per_s(models), {}
    for place, model in enumerate(models):
        counted = cost(model.network) if model.network is not None else None
        parts = {
            condition: _compare(
                model, scores[place], scores[0], (seen, (unseen,)), options.replicates
            )
            for condition, scores in scored.items()
        }
        row = DetectorRow(
            dict(model.trained),
            counted.parameters if counted else None,
            counted.gflop if counted else None,
            speed[model.name],
            parts,
        )
        rows[model.name] = row
        found.figures[model.name] = asdict(row)
        for condition, both in parts.items():
            found.evaluations.append(
                # Only for the CSV of videos: the intervals of the row come from _compare.
                evaluation_of(model, scored[condition][place], condition, replicates=0)
            )
            label = model.name if condition == CLEAN else f"  {condition}"
            head = row.head() if condition == CLEAN else ("",) * 4
            less = tuple(part.difference if place else "" for part in both)
            found.rows.append((label, *head, *(auc_cell(part.figures) for part in both), *less))
    found.figures["machine"] = machine()
    found.figures["asked"] = {
        "split": options.split, "seen": seen, "unseen": unseen, "limit": options.limit,
        "data_sha256": index.sha256, "less_first": models[0].name,
    }  # fmt: skip
    found.notes = [*_what_it_shows(rows, unseen), CANNOT]
    return found


def unseen_by_all(models: Sequence[JudgedModel]) -> str:
    """The family that none of the models was trained on; refused where there is no such one."""
    families = {model.name: held_out_family(model.trained) for model in models}
    found = set(families.values())
    if len(found) != 1 or None in found:
        raise ValueError(
            "the models should all have held out the same family, or none is unseen by all: "
            + ", ".join(f"{name} held out {family or 'none'}" for name, family in families.items())
        )
    return str(found.pop())


def score_all(
    models: Sequence[JudgedModel],
    index: Index,
    options: TableOptions,
    families: Sequence[str],
    condition: str,
) -> list[Scored]:
    """Each model's scores; models with the same input contract share their crops."""
    groups: dict[str, list[int]] = {}
    for place, model in enumerate(models):
        groups.setdefault(model.input.model_dump_json(), []).append(place)
    found: dict[int, Scored] = {}
    for places in groups.values():
        examples = examples_for(
            models[places[0]], index, options.split,
            families=families, condition=condition, frames=options.frames, limit=options.limit,
        )  # fmt: skip
        group = [models[place] for place in places]
        found |= zip(places, score_together(group, examples, options.on_progress), strict=True)
    return [found[place] for place in range(len(models))]


def _compare(
    model: JudgedModel,
    mine: Scored,
    firsts: Scored,
    families: tuple[Sequence[str], Sequence[str]],
    replicates: int,
) -> tuple[Comparison, Comparison]:
    """Figures on seen and on unseen families, and their distance from the first model's."""

    def part(families: Sequence[str]) -> Comparison:
        one, other = _of(mine, families), _of(firsts, families)
        return Comparison(
            measure(one, model.calibration, replicates=replicates, threshold=model.threshold),
            auc(one.forged, one.logit) - auc(other.forged, other.logit),
            *paired_bootstrap_interval(one, other, auc, replicates=replicates),
        )

    seen, unseen = families
    return part(seen), part(unseen)


def _of(whole: Scored, families: Iterable[str]) -> Scored:
    """The reals, and the forgeries of these families; other forgeries appear in the CSV only."""
    wanted = set(families)
    return whole.where(np.array([video[1] in wanted for video in whole.video]) | ~whole.forged)


class Cost(NamedTuple):
    """Of one network."""

    parameters: int
    gflop: float
    """A face."""


def cost(network: nn.Module) -> Cost:
    """Counted on a copy, for one crop of the network's own size."""
    bare = deepcopy(network).to("meta").eval()
    side = int(network.size)  # type: ignore[arg-type]
    crop = torch.zeros((1, 3, side, side), dtype=torch.uint8, device="meta")
    # The counter takes an operator that it has no formula for as free, and ours are custom ones.
    ours = {getattr(torch.ops.ralf, name): _destructor for name in OPS}
    with FlopCounterMode(display=False, custom_mapping=ours) as counter, torch.no_grad():
        bare(crop)
    parameters = sum(weights.numel() for weights in bare.parameters())
    return Cost(parameters, counter.get_total_flops() / 1e9)


def _destructor(image: torch.Size, mask: torch.Size, *_: Any, **__: Any) -> int:
    """Two products there and two back, for each plane."""
    height, width = mask
    planes = image.numel() // (height * width)
    return planes * 4 * height * width * (height + width)


def _faces_per_s(models: Sequence[JudgedModel]) -> dict[str, float]:
    """All models in turn, so that a change of the machine's speed meets all of them alike."""

    def scoring(model: JudgedModel) -> Callable[[], object]:
        # Blank: what a crop shows does not change the time.
        crops = torch.zeros((TIMED, 3, model.input.size, model.input.size), dtype=torch.uint8)
        return lambda: model.score(crops)

    timings = interleave({model.name: scoring(model) for model in models}, repeats=5)
    return {name: TIMED / timing.median_s for name, timing in timings.items()}


def _what_it_shows(rows: Mapping[str, DetectorRow], unseen: str) -> list[str]:
    """What the intervals allow to say, and no more."""
    first, *others = rows
    notes = []
    for place, of in enumerate(("families trained on", f"the unseen family {unseen}")):
        parts = {name: rows[name].parts[CLEAN][place] for name in others}
        words = [f"{name} {part.difference} ({part.verdict})" for name, part in parts.items()]
        notes += [f"On {of}, against {first}: {'; '.join(words)}."] if words else []
    # An ensemble was not trained itself and has no budget to compare.
    budgets = {row.trained.get("faces") for row in rows.values() if "members" not in row.trained}
    if len(budgets) > 1:
        notes.append("The models were not trained on as many faces each: see the column.")
    how = (
        "AUC in percent over faces, 95 % by bootstrap over people; a difference is of the same "
        f"samples. faces/s in FP32, {torch.get_num_threads()} threads, in turn."
    )
    return [*notes, how]
