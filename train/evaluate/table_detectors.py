"""The detectors side by side: what each sees, seen and unseen, worn and clean, and what it costs.

    seen      forgeries of the families that the recipes train on, blended into the split's reals
    unseen    those of the family that none of them trains on
    less      the same less that of the first model, on the same faces, with the interval of the
              difference: faces that are hard for all do not blur it

Crops that several models want cut alike are made once and shown to all.  Speed is of the FP32
network on this machine, the models in turn; the arithmetic is counted, not timed.

What the table shows is said beneath it, by its own figures; and what it cannot show.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ralf.kernels.bench.record import interleave, machine
from ralf.kernels.manifest import held_out_family
from ralf.train.data.index import Index
from ralf.train.evaluate.conditions import CLEAN
from ralf.train.evaluate.cost import cost
from ralf.train.evaluate.judge import Judge, examples_for, result, scored
from ralf.train.evaluate.metrics import Metrics, Scored, auc, measure, paired_bootstrap_interval
from ralf.train.evaluate.tables import Ask, Table, _auc
from ralf.train.forge.families import FAMILIES

CONDITIONS = ("h264=40", "jpeg=50", "blur:2")
TIMED = 8
"""Crops of which the speed is taken."""
CANNOT = (
    "It cannot say which of them finds deepfakes best: every forgery here was made of the split's "
    "own faces by this project's blending, the unseen ones too, and nothing here was filmed. It is "
    "of one training run each: intervals are over faces, and another seed may move a model by as "
    "much. Models of the same budget of faces are not models at their best: what is large or has "
    "several losses to weigh may need more."
)


@dataclass(frozen=True)
class Part:
    """One model on the reals and some families, under one condition."""

    figures: Metrics
    less_first: float
    """Its AUC less the first model's."""
    low: float
    high: float

    @property
    def difference(self) -> str:
        """In points of AUC."""
        span = f" [{100 * self.low:+.2f}, {100 * self.high:+.2f}]"
        return f"{100 * self.less_first:+.2f}" + ("" if np.isnan(self.low) else span)

    @property
    def verdict(self) -> str:
        """What the interval lets be said."""
        if self.low > 0:
            return "above it"
        return "below it" if self.high < 0 else "not to be told from it"


@dataclass(frozen=True)
class Row:
    """One model: what it is, and how it does under each condition, seen and unseen."""

    trained: Mapping[str, Any]
    parameters: int | None
    gflop: float | None
    faces_per_s: float
    parts: dict[str, tuple[Part, Part]]

    def head(self) -> tuple[str, ...]:
        """Weights, arithmetic, speed, and how long it was trained."""
        weights = f"{self.parameters / 1e6:.2f}" if self.parameters is not None else "—"
        gflop = f"{self.gflop:.2f}" if self.gflop is not None else "—"
        faces = self.trained.get("faces")
        trained = f"{faces:,} faces" if isinstance(faces, int) else "—"
        return weights, gflop, f"{self.faces_per_s:.1f}", trained


def detectors(judges: Sequence[Judge], index: Index, ask: Ask) -> Table:
    """A row a model, and one for each condition."""
    unseen = unseen_by_all(judges)
    seen = tuple(family for family in ask.families or FAMILIES if family != unseen)
    found = Table(
        f"Detectors side by side, split {ask.split}; unseen: {unseen}",
        ("model and condition", "M weights", "GFLOP", "faces/s", "trained on", "seen AUC [95 %]",
         "unseen AUC [95 %]", "seen, less first [95 %]", "unseen, less first [95 %]"),
    )  # fmt: skip
    said = {
        condition: everyone(judges, index, ask, (*seen, unseen), condition)
        for condition in (CLEAN, *(ask.conditions or CONDITIONS))
    }
    speed, rows = _faces_per_s(judges), {}
    for place, judge in enumerate(judges):
        counted = cost(judge.network) if judge.network is not None else None
        parts = {
            condition: _compared(judge, scores[place], scores[0], (seen, (unseen,)), ask.replicates)
            for condition, scores in said.items()
        }
        row = Row(
            dict(judge.trained),
            counted.parameters if counted else None,
            counted.gflop if counted else None,
            speed[judge.name],
            parts,
        )
        rows[judge.name] = row
        found.figures[judge.name] = asdict(row)
        for condition, both in parts.items():
            found.results.append(result(judge, said[condition][place], condition, replicates=0))
            label = judge.name if condition == CLEAN else f"  {condition}"
            head = row.head() if condition == CLEAN else ("",) * 4
            less = tuple(part.difference if place else "" for part in both)
            found.rows.append((label, *head, *(_auc(part.figures) for part in both), *less))
    found.figures["machine"] = machine()
    found.figures["asked"] = {
        "split": ask.split, "seen": seen, "unseen": unseen, "limit": ask.limit,
        "data_sha256": index.sha256, "less_first": judges[0].name,
    }  # fmt: skip
    found.notes = [*_shown(rows, unseen), CANNOT]
    return found


def unseen_by_all(judges: Sequence[Judge]) -> str:
    """The family that none of the models was trained on; refused where there is no such one."""
    families = {judge.name: held_out_family(judge.trained) for judge in judges}
    found = set(families.values())
    if len(found) != 1 or None in found:
        raise ValueError(
            "the models should all have held out the same family, or none is unseen by all: "
            + ", ".join(f"{name} held out {family or 'none'}" for name, family in families.items())
        )
    return str(found.pop())


def everyone(
    judges: Sequence[Judge], index: Index, ask: Ask, families: Sequence[str], condition: str
) -> list[Scored]:
    """Each judge's scores; what several want cut alike is made once."""
    groups: dict[str, list[int]] = {}
    for place, judge in enumerate(judges):
        groups.setdefault(judge.input.model_dump_json(), []).append(place)
    found: dict[int, Scored] = {}
    for places in groups.values():
        examples = examples_for(
            judges[places[0]], index, ask.split,
            families=families, condition=condition, frames=ask.frames, limit=ask.limit,
        )  # fmt: skip
        logits: dict[int, list[Tensor]] = {place: [] for place in places}
        for number, batch in enumerate(examples):
            for place in places:
                logits[place].append(judges[place].score(batch.crops))
            if ask.watch is not None:
                ask.watch(number + 1, len(examples))
        for place in places:
            found[place] = scored(examples, torch.cat(logits[place]).numpy())
    return [found[place] for place in range(len(judges))]


def _compared(
    judge: Judge,
    mine: Scored,
    firsts: Scored,
    families: tuple[Sequence[str], Sequence[str]],
    replicates: int,
) -> tuple[Part, Part]:
    """Figures on seen and on unseen families, and how far they lie from the first model's."""

    def part(families: Sequence[str]) -> Part:
        one, other = _of(mine, families), _of(firsts, families)
        return Part(
            measure(one, judge.calibration, replicates=replicates, threshold=judge.threshold),
            auc(one.forged, one.logit) - auc(other.forged, other.logit),
            *paired_bootstrap_interval(one, other, auc, replicates=replicates),
        )

    seen, unseen = families
    return part(seen), part(unseen)


def _of(whole: Scored, families: Iterable[str]) -> Scored:
    """The reals, and the forgeries of these families; others on disk stand in the CSV alone."""
    wanted = set(families)
    return whole.where(np.array([video[1] in wanted for video in whole.video]) | ~whole.forged)


def _faces_per_s(judges: Sequence[Judge]) -> dict[str, float]:
    """All models in turn, a batch of the same size each."""

    def way(judge: Judge) -> Callable[[], object]:
        crops = torch.zeros((TIMED, 3, judge.input.size, judge.input.size), dtype=torch.uint8)
        return lambda: judge.score(crops)

    timings = interleave({judge.name: way(judge) for judge in judges}, repeats=5)
    return {name: TIMED / timing.median_s for name, timing in timings.items()}


def _shown(rows: Mapping[str, Row], unseen: str) -> list[str]:
    """What the intervals let be said, and nothing more."""
    first, *others = rows
    notes = []
    for place, of in enumerate(("families trained on", f"the unseen family {unseen}")):
        parts = {name: rows[name].parts[CLEAN][place] for name in others}
        words = [f"{name} {part.difference} ({part.verdict})" for name, part in parts.items()]
        notes += [f"On {of}, against {first}: {'; '.join(words)}."] if words else []
    budgets = {row.trained.get("faces") for row in rows.values() if "members" not in row.trained}
    if len(budgets) > 1:
        notes.append("The models were not trained on as many faces each: see the column.")
    how = (
        "AUC in percent over faces, 95 % by bootstrap over people; a difference is of the same "
        f"samples. faces/s in FP32, {torch.get_num_threads()} threads, in turn."
    )
    return [*notes, how]
