"""The table whose figures stand on a model's card, from one run over all of its data.

    stills    every person of the split, real, forged on disk, and forged by some of the families
              in turn: AUC over the generators trained on, over the one held out, and by generator;
              by the size of the face; reals called forged by collection and, where groups are
              given, by group
    damaged   the same pictures under each condition; all generators then take turns
    clips     made clips (forge/clips.py) that were prepared, where the data has some: the same by
              video, pooled and calibrated as a verdict is; at each CRF, and all of them together
    check     real faces of other people: the share called forged at the model's threshold; all
              people, whatever the limit
    residual  does what the network shows lie where a forgery was put (evaluate/localisation.py)

Calibration is judged as it is served: clips at their own compression, clean stills by the plain
curve, the reals together weighing as much as the forgeries.  A damaged still has no clip whose
compression could be known, so it has no calibration error here.  Beside the error stands the one
that chance alone gives so few rows.  The figures are flat, a value and its 95 % interval each, as
`ralf publish --metrics` takes them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ralf.kernels.manifest import held_out_family, never_trained_on
from ralf.train.data.evaluation_set import Examples
from ralf.train.data.index import Index
from ralf.train.evaluate.conditions import CLEAN, REQUANTISED
from ralf.train.evaluate.judge import JudgedModel, evaluation_of, examples_for, score_examples
from ralf.train.evaluate.localisation import residual_inside
from ralf.train.evaluate.metrics import (
    Scored,
    at_even_odds,
    concatenated,
    ece,
    ece_by_chance,
    measure,
    share_interval,
)
from ralf.train.evaluate.tables.false_positives import called_forged, groups_of, size_of
from ralf.train.evaluate.tables.table import Table, TableOptions, evaluate_with, percent
from ralf.train.forge.families import FAMILIES

Figures = dict[str, list[float] | float]
CONDITIONS = (CLEAN, "h264=23", "h264=40", *REQUANTISED)
CLEAN_FAMILIES = 4
"""How many of the blended families forge each clean picture, in turn."""
CLIPS = "_clips"
CHECK = "check"


def card(models: Sequence[JudgedModel], index: Index, options: TableOptions) -> Table:
    """The card's figures of each model."""
    found = Table(
        f"For the card, split {options.split}; held out: {_held_out(models)}",
        ("model and figure", "value", "low", "high"),
    )
    clips = Index(index.root, tuple(row for row in index if row.dataset.endswith(CLIPS)))
    stills = Index(index.root, tuple(row for row in index if not row.dataset.endswith(CLIPS)))
    conditions = options.conditions or CONDITIONS
    for model in models:
        figures: Figures = {}
        judging = _Judging(model, options, found, figures)
        for condition in conditions:
            judging.stills(stills, condition)
        judging.clips(clips)
        if len(stills.where(split=CHECK, label=0)):
            for condition in conditions:
                _strangers(figures, model, stills, options, condition)
        located = residual_inside(
            model, stills, options.split, options.families or FAMILIES, limit=options.limit
        )
        figures |= located or {}
        # What promotion compares (manifest.margins), by the name that every model has.
        figures[f"{options.split}_auc"] = figures[f"crop {conditions[0]} auc seen"]
        found.figures[model.name] = figures
        for name, value in figures.items():
            cells = [value] if isinstance(value, float) else value
            shown = [percent(cell) for cell in cells] + [""] * (3 - len(cells))
            found.rows.append((f"{model.name} {name}", *shown))
    found.notes.append("in percent; AUC's intervals by bootstrap over faces, rates' by Clopper")
    return found


def _held_out(models: Sequence[JudgedModel]) -> str:
    """The family that each model held out; named once where it is the same for all."""
    families = {model.name: held_out_family(model.trained) or "none" for model in models}
    if len(set(families.values())) == 1:
        return next(iter(families.values()))
    return ", ".join(f"{family} ({name})" for name, family in families.items())


@dataclass(frozen=True)
class _Judging:
    """One model's figures while they are made."""

    model: JudgedModel
    options: TableOptions
    table: Table
    figures: Figures

    def stills(self, stills: Index, condition: str) -> None:
        """Every still of the split under one condition, real and forged."""
        clean, name = condition == CLEAN, f"crop {condition}"
        model, options, figures = self.model, self.options, self.figures
        examples = examples_for(
            model, stills, options.split,
            families=options.families or FAMILIES, condition=condition,
            # A thousand people forged in ten ways under five conditions would take hours.
            each=CLEAN_FAMILIES if clean else 1, in_turn=not clean,
            frames=options.frames, limit=options.limit,
        )  # fmt: skip
        scored = score_examples(model, examples, options.on_progress)
        each = evaluation_of(model, scored, condition, options.replicates)
        self.table.add(f"{model.name} {condition}", each)
        _figures(figures, name, scored, model, options, calibrated=clean)
        for method, one in each.by_method.items():
            figures[f"{name} auc {method}"] = [one.auc, one.auc_low, one.auc_high]
        if clean:
            self._by_size(scored, examples)
            self._real_groups(scored, examples)
        before, after = (figures.get(f"crop {each} auc seen") for each in (CLEAN, condition))
        if not clean and isinstance(before, list) and isinstance(after, list):
            figures[f"{name} auc lost"] = before[0] - after[0]

    def _by_size(self, scored: Scored, examples: Examples) -> None:
        """AUC by the size of the face where it came from."""
        sizes = np.array([size_of(item, examples) for item in examples.items])
        for size in sorted(set(sizes.tolist()) - {""}):
            part = scored.where(sizes == size)
            if part.forged.any() and not part.forged.all():
                m = measure(part, replicates=self.options.replicates)
                self.figures[f"crop {CLEAN} {size} auc"] = [m.auc, m.auc_low, m.auc_high]

    def _real_groups(self, scored: Scored, examples: Examples) -> None:
        """Reals called forged by collection, size, pose and colour; by group, beside the others.

        A group is compared with the people who have another value of the same column.
        """
        real = [row for row, item in enumerate(examples.items) if not item.forged]
        items = [examples.items[row] for row in real]
        wrong = scored.probability(self.model.calibration)[real] >= self.model.threshold
        of_each = np.array([groups_of(item, examples) for item in items])
        for name in sorted(set(of_each.ravel().tolist()) - {"", "all"}):
            own = (of_each == name).any(axis=1)
            self.figures[f"real {name} false positives"] = _share(wrong[own])
        known = [self.options.groups.get(Path(item.frame.path).name, {}) for item in items]
        for column in sorted({column for each in known for column in each}):
            values = np.array([each.get(column, "") for each in known])
            for value in sorted(set(values.tolist()) - {""}):
                own, others = values == value, (values != value) & (values != "")
                if others.any():
                    name = f"group {column} {value}"
                    self.figures[f"{name} false positives"] = _share(wrong[own])
                    self.figures[f"{name} others false positives"] = _share(wrong[others])

    def clips(self, clips: Index) -> None:
        """Made clips by video, at each compression and all together."""
        model, options, figures = self.model, self.options, self.figures
        videos: list[Scored] = []
        # Clips lie on disk as videos, real and forged: nothing is blended into them here.
        for rate in sorted({row.compression for row in clips.where(split=options.split)}):
            each = evaluate_with(options, model, clips.where(compression=rate), CLEAN, families=())
            self.table.add(f"{model.name} clips {rate}", each)
            videos.append(each.scored.pooled(model.aggregation))
            _figures(figures, f"clip {rate}", videos[-1], model, options)
        if not videos:
            return
        every = concatenated(videos)
        if len(videos) > 1:
            _figures(figures, "clip any", every, model, options)
        for method in every.methods:
            m = measure(every.against_all_reals(method), replicates=options.replicates)
            figures[f"clip any auc {method}"] = [m.auc, m.auc_low, m.auc_high]


def _figures(
    figures: Figures,
    name: str,
    scored: Scored,
    model: JudgedModel,
    options: TableOptions,
    *,
    calibrated: bool = True,
) -> None:
    """AUC on the generators seen and on the one held out; calibration and threshold on the seen."""
    unseen, never = held_out_family(model.trained), never_trained_on(model.trained)
    methods: Callable[[str], bool]
    for group, methods in (
        ("seen", lambda method: method not in never),
        ("held out", lambda method: method in ("real", unseen)),
    ):
        part = scored.where(np.array([methods(video[1]) for video in scored.video], bool))
        # Without a family held out the second group is the reals alone, which have no AUC.
        if not part.forged.any() or part.forged.all():
            continue
        m = measure(
            part, model.calibration, replicates=options.replicates, threshold=model.threshold
        )
        figures[f"{name} auc {group}"] = [m.auc, m.auc_low, m.auc_high]
        if group == "seen":
            figures |= _at_threshold(name, part, model, calibrated=calibrated)


def _at_threshold(name: str, scored: Scored, model: JudgedModel, *, calibrated: bool) -> Figures:
    """Calibration error, and how much the threshold calls forged."""
    probability = scored.probability(model.calibration)
    above = probability >= model.threshold
    figures: Figures = {
        f"{name} false positives": _share(above[~scored.forged]),
        f"{name} forgeries caught": _share(above[scored.forged]),
    }
    if calibrated:
        even = at_even_odds(scored.forged)
        figures[f"{name} ece"] = ece(scored.forged, probability, weight=even)
        figures[f"{name} ece by chance"] = ece_by_chance(probability, weight=even)
    return figures


def _strangers(
    figures: Figures, model: JudgedModel, index: Index, options: TableOptions, condition: str
) -> None:
    # Error rates of a few per cent need every person there is, whatever the limit.
    all_people = replace(options, split=CHECK, limit=None)
    _, groups = called_forged(model, index, all_people, condition)
    for group, (events, of) in groups.items():
        if group == "all":
            figures[f"other people {condition} false positives"] = _rate(events, of)
        elif condition == CLEAN:
            figures[f"other people {condition} {group} false positives"] = _rate(events, of)


def _share(above: NDArray[np.bool_]) -> list[float]:
    return _rate(int(above.sum()), len(above))


def _rate(events: int, of: int) -> list[float]:
    return [events / of, *share_interval(events, of)]
