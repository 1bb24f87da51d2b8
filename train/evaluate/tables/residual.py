"""Is RALF's residual at work?  A network with two streams, whole and with a part of it closed.

    whole      as it is served
    closed     the residual is not let in: what the plain classifier inside finds
    alone      the residual without the crop
    shuffled   each face gets another face's residual
    identity   the mask takes nothing away, so nothing has to be rebuilt

What a view costs is the whole network's AUC minus its own on the same faces, with the interval of
that difference over samples of people.  A residual that earns its name costs AUC when it is closed,
on forgeries of the family that was held out too; `ralf retrain` publishes the classifier otherwise.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from ralf.kernels.manifest import held_out_family
from ralf.kernels.networks.ralf import Ablation, Ralf
from ralf.train.data.index import Index
from ralf.train.evaluate.judge import JudgedModel, examples_for, score_together
from ralf.train.evaluate.metrics import Scored, auc, paired_bootstrap_interval
from ralf.train.evaluate.tables.table import Table, TableOptions, percent
from ralf.train.recipe import seen_families

WHOLE = "whole"
VIEWS: tuple[Ablation, ...] = get_args(Ablation)
Figures = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class ResidualFigures:
    """What each view costs; each figure is a number, or a value with its 95 % interval."""

    views: Figures

    @property
    def earned(self) -> bool:
        """Whether closing the residual costs AUC on the family held out, beyond chance."""
        return bool(self.views["closed"]["costs held out"][1] > 0)

    def as_json(self) -> Figures:
        """The views without NaN, which JSON does not have: with one class or one person there is
        no interval, and none is above 0."""
        return {
            view: {
                name: None if not np.isfinite(value).all() else value
                for name, value in figures.items()
            }
            for view, figures in self.views.items()
        }


def residual(models: Sequence[JudgedModel], index: Index, options: TableOptions) -> Table:
    """A row for each model and view."""
    found = Table(
        f"The residual at work, split {options.split}",
        ("model and view", "seen AUC", "held-out AUC", "costs, seen [95 %]",
         "costs, held out [95 %]"),
    )  # fmt: skip
    for model in models:
        views = residual_figures(model, index, options).views
        found.figures[model.name] = views
        for view, figures in views.items():
            cells = (percent(figures["seen"]), percent(figures["held out"]))
            costs = [_points(figures.get(f"costs {part}")) for part in ("seen", "held out")]
            found.rows.append((f"{model.name} {view}", *cells, *costs))
    found.notes = ["AUC in percent over faces; 95 % by bootstrap over people, on the same faces."]
    return found


def residual_figures(
    model: JudgedModel, index: Index, options: TableOptions, control: JudgedModel | None = None
) -> ResidualFigures:
    """Every view of a model, and beside them a control that never had a residual."""
    network = model.network
    if not isinstance(network, Ralf) or network.sees == "residual":
        raise ValueError(
            f"{model.name} has no residual beside the crop: this table takes RALF with "
            "network.sees=bands or both"
        )
    judges = [model, *(_view(model, network, how) for how in VIEWS)]
    if control is not None:
        judges.append(replace(control, name="control", input=model.input))
    held_out, families = held_out_family(model.trained), options.families
    if not families:
        on_disk = bool(len(index.where(split=options.split, label=1)))
        families = () if on_disk else seen_families(model.trained)
        families = (*families, held_out) if held_out else families
    examples = examples_for(
        model, index, options.split,
        families=families, frames=options.frames, limit=options.limit,
    )  # fmt: skip
    people = tuple(item.frame.row.person for item in examples.items)
    scored = [
        replace(each, cluster=people)
        for each in score_together(judges, examples, options.on_progress)
    ]
    names = (WHOLE, *VIEWS, *(("control",) if control is not None else ()))
    found: Figures = {name: {} for name in names}
    for part in ("seen", "held out"):
        whole, *others = [_part(each, held_out, part) for each in scored]
        for name, each in zip(names, (whole, *others), strict=True):
            found[name][part] = auc(each.forged, each.logit)
            if name != WHOLE:
                span = paired_bootstrap_interval(whole, each, auc, replicates=options.replicates)
                found[name][f"costs {part}"] = [found[WHOLE][part] - found[name][part], *span]
    return ResidualFigures(found)


def _view(model: JudgedModel, network: Ralf, how: Ablation) -> JudgedModel:
    @torch.inference_mode()
    def score(crops: Tensor) -> Tensor:
        return network.ablated(crops.to(network.mask.device), how).float().cpu()

    return replace(model, name=how, score=score)


def _part(whole: Scored, held_out: str | None, part: str) -> Scored:
    """The reals, and the forgeries of the family held out or all others."""
    unseen = np.array([video[1] == held_out for video in whole.video])
    return whole.where((unseen == (part == "held out")) | ~whole.forged)


def _points(cost: Sequence[float] | None) -> str:
    if cost is None:
        return ""
    value, low, high = (100 * x for x in cost)
    return f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"
