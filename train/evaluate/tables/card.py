"""The table whose figures stand on a model's card, from one run over all of its data.

    stills    forgeries blended into every real face of the split, clean and through H.264:
              AUC over the families trained on and over the one held out, and by family
    clips     made clips (forge/clips.py) that were prepared, where the data has some: the same by
              video, pooled and calibrated as a verdict is; at each CRF, and all of them together
    check     real faces of other people: the share called forged at the model's threshold, and
              for clean pictures by size, colour and pose; all people, whatever the limit

Calibration is judged as it was fitted: the reals together weigh as much as the forgeries.  Beside
the calibration error stands the error that chance alone gives so few rows.  The figures are flat,
a value and its 95 % interval each, as `ralf publish --metrics` takes them.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ralf.kernels.manifest import held_out_family
from ralf.train.data.index import Index
from ralf.train.evaluate.conditions import CLEAN
from ralf.train.evaluate.judge import JudgedModel
from ralf.train.evaluate.metrics import (
    Scored,
    at_even_odds,
    concatenated,
    ece,
    ece_by_chance,
    measure,
    share_interval,
)
from ralf.train.evaluate.tables.false_positives import called_forged
from ralf.train.evaluate.tables.table import Table, TableOptions, evaluate_with, percent
from ralf.train.forge.families import FAMILIES
from ralf.worker.scores import calibrated

Figures = dict[str, list[float] | float]
CONDITIONS = ("clean", "h264=23", "h264=40")
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
    conditions, families = options.conditions or CONDITIONS, options.families or FAMILIES
    for model in models:
        figures: Figures = {}
        for condition in conditions:
            each = evaluate_with(options, model, stills, condition, families=families)
            found.add(f"{model.name} {condition}", each)
            _figures(figures, f"crop {condition}", each.scored, model, options)
            for name, one in each.by_method.items():
                figures[f"crop {condition} auc {name}"] = [one.auc, one.auc_low, one.auc_high]
        videos: list[Scored] = []
        # Clips lie on disk as videos, real and forged: nothing is blended into them here.
        for rate in sorted({row.compression for row in clips.where(split=options.split)}):
            each = evaluate_with(options, model, clips.where(compression=rate), CLEAN, families=())
            found.add(f"{model.name} clips {rate}", each)
            videos.append(each.scored.pooled(model.aggregation))
            _figures(figures, f"clip {rate}", videos[-1], model, options)
        if len(videos) > 1:
            _figures(figures, "clip any", concatenated(videos), model, options)
        if len(stills.where(split=CHECK, label=0)):
            for condition in conditions:
                _false_positives(figures, model, stills, options, condition)
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


def _figures(
    figures: Figures, name: str, scored: Scored, model: JudgedModel, options: TableOptions
) -> None:
    """AUC on the families seen and on the one held out; calibration and threshold on the seen."""
    unseen = held_out_family(model.trained)
    methods: Callable[[str], bool]
    for group, methods in (
        ("seen", lambda method: method != unseen),
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
            figures |= _at_threshold(name, part, model)


def _at_threshold(name: str, scored: Scored, model: JudgedModel) -> Figures:
    """Calibration error, and how much the threshold calls forged."""
    probability = calibrated(scored.logit, model.calibration)
    above = probability >= model.threshold
    reals, forged = above[~scored.forged], above[scored.forged]
    even = at_even_odds(scored.forged)
    return {
        f"{name} ece": ece(scored.forged, probability, weight=even),
        f"{name} ece by chance": ece_by_chance(probability, weight=even),
        f"{name} false positives": _share(reals),
        f"{name} forgeries caught": _share(forged),
    }


def _false_positives(
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
