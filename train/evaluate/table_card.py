"""The table whose figures stand on a model's card: what was asked of it, in one run.

    stills    forgeries blended into every real face of the split, clean and through H.264:
              AUC over the families trained on and over the one held out, and by family
    clips     made clips (forge/clips.py) that were prepared, where the data has some: the same by
              video, pooled and calibrated as a verdict is; at each CRF, and all of them as one
    check     real faces of other people: the share called forged at the model's threshold, and
              where clean by size, colour and pose; all of them, whatever the limit

Calibration is judged at even odds, as it was fitted: the reals weigh what the forgeries do; beside
its error stands the one that so few rows would show if every score were true.  The figures are
kept flat, a value and its 95 % interval, as `ralf publish --metrics` takes them.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from ralf.kernels.manifest import held_out_family
from ralf.train.data.index import Index
from ralf.train.evaluate.conditions import CLEAN
from ralf.train.evaluate.judge import Judge, Result, evaluate
from ralf.train.evaluate.metrics import (
    Scored,
    at_even_odds,
    concatenated,
    ece,
    ece_by_chance,
    measure,
    share_interval,
)
from ralf.train.evaluate.tables import Ask, Table, _percent, _take, called_forged
from ralf.train.forge.families import FAMILIES
from ralf.worker.scores import calibrated

Figures = dict[str, list[float] | float]
CONDITIONS = ("clean", "h264=23", "h264=40")
CLIPS = "_clips"
CHECK = "check"


def card(judges: Sequence[Judge], index: Index, ask: Ask) -> Table:
    """The card's figures of each model."""
    found = Table(
        f"For the card, split {ask.split}; held out: {_held_out(judges)}",
        ("model and figure", "value", "low", "high"),
    )
    clips = Index(index.root, tuple(row for row in index if row.dataset.endswith(CLIPS)))
    stills = Index(index.root, tuple(row for row in index if not row.dataset.endswith(CLIPS)))
    for judge in judges:
        figures: Figures = {}
        for condition in ask.conditions or CONDITIONS:
            each = _judged(judge, stills, ask, condition, ask.families or FAMILIES)
            _take(found, f"{judge.name} {condition}", each)
            _figures(figures, f"crop {condition}", each.scored, judge, ask)
            for name, one in each.by_method.items():
                figures[f"crop {condition} auc {name}"] = [one.auc, one.auc_low, one.auc_high]
        videos: list[Scored] = []
        for rate in sorted({row.compression for row in clips.where(split=ask.split)}):
            each = _judged(judge, clips.where(compression=rate), ask, CLEAN, ())
            _take(found, f"{judge.name} clips {rate}", each)
            videos.append(each.scored.pooled(judge.aggregation))
            _figures(figures, f"clip {rate}", videos[-1], judge, ask)
        if len(videos) > 1:
            _figures(figures, "clip any", concatenated(videos), judge, ask)
        if len(stills.where(split=CHECK, label=0)):
            for condition in ask.conditions or CONDITIONS:
                _false_positives(figures, judge, stills, ask, condition)
        # What promotion compares (manifest.margins), by the name that every model has.
        figures[f"{ask.split}_auc"] = figures[f"crop {(ask.conditions or CONDITIONS)[0]} auc seen"]
        found.figures[judge.name] = figures
        for name, value in figures.items():
            cells = [value] if isinstance(value, float) else value
            shown = [_percent(cell) for cell in cells] + [""] * (3 - len(cells))
            found.rows.append((f"{judge.name} {name}", *shown))
    found.notes.append("in percent; AUC's intervals by bootstrap over faces, rates' by Clopper")
    return found


def _held_out(judges: Sequence[Judge]) -> str:
    """What each model held out; once where it is the same for all."""
    families = {judge.name: held_out_family(judge.trained) or "none" for judge in judges}
    if len(set(families.values())) == 1:
        return next(iter(families.values()))
    return ", ".join(f"{family} ({name})" for name, family in families.items())


def _judged(
    judge: Judge, index: Index, ask: Ask, condition: str, families: Sequence[str]
) -> Result:
    return evaluate(
        judge, index, ask.split, families=families, condition=condition, frames=ask.frames,
        limit=ask.limit, replicates=ask.replicates, watch=ask.watch,
    )  # fmt: skip


def _figures(figures: Figures, name: str, scored: Scored, judge: Judge, ask: Ask) -> None:
    """AUC on the families seen and on the one held out; calibration and threshold on the seen."""
    unseen = held_out_family(judge.trained)
    methods: Callable[[str], bool]
    for group, methods in (
        ("seen", lambda method: method != unseen),
        ("held out", lambda method: method in ("real", unseen)),
    ):
        part = scored.where(np.array([methods(video[1]) for video in scored.video], bool))
        if not part.forged.any() or part.forged.all():
            continue
        m = measure(part, judge.calibration, replicates=ask.replicates, threshold=judge.threshold)
        figures[f"{name} auc {group}"] = [m.auc, m.auc_low, m.auc_high]
        if group == "seen":
            figures |= _at_threshold(name, part, judge)


def _at_threshold(name: str, scored: Scored, judge: Judge) -> Figures:
    """How far the score may be believed, and what the threshold calls forged."""
    probability = calibrated(scored.logit, judge.calibration)
    above = probability >= judge.threshold
    reals, forged = above[~scored.forged], above[scored.forged]
    even = at_even_odds(scored.forged)
    return {
        f"{name} ece": ece(scored.forged, probability, weight=even),
        f"{name} ece by chance": ece_by_chance(probability, weight=even),
        f"{name} false positives": _share(reals),
        f"{name} forgeries caught": _share(forged),
    }


def _false_positives(
    figures: Figures, judge: Judge, index: Index, ask: Ask, condition: str
) -> None:
    everyone = replace(ask, split=CHECK, limit=None)
    _, groups = called_forged(judge, index, everyone, condition)
    for group, (events, of) in groups.items():
        if group == "all":
            figures[f"other people {condition} false positives"] = _rate(events, of)
        elif condition == CLEAN:
            figures[f"other people {condition} {group} false positives"] = _rate(events, of)


def _share(above: "np.ndarray") -> list[float]:
    return _rate(int(above.sum()), len(above))


def _rate(events: int, of: int) -> list[float]:
    return [events / of, *share_interval(events, of)]
