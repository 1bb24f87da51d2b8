"""The tables that `ralf evaluate --table` makes, for whatever data is at hand.

    intra            every figure, by dataset and compression, by method       Table 1
    cross            AUC and EER on each dataset                               Table 2
    robustness       the change of AUC under each perturbation                 Table 3
    ablation         one row for each model: losses left out                   Table 4
    backbone         one row for each model: classifiers                       Table 5
    pooling          one row for each model: global pooling, by dataset        Table 6
    false_positives  reals called forged: by dataset, size, colour, condition
    aggregation      numbers of frames and means to score a video by
    card             the figures on the model's card
    detectors        models side by side: seen and unseen forgeries, robustness, cost, speed
    residual         RALF whole and with its residual closed, alone, shuffled: is it at work?

Table 1 to 6 are those of RALF's paper (paper.py); its published rows stand beside ours where the
data is the same.  A new table is a function in a file here and a line in `MAKERS`.
"""

from collections.abc import Callable, Mapping, Sequence

from ralf.train.data.index import Index
from ralf.train.evaluate.judge import JudgedModel
from ralf.train.evaluate.tables.aggregation import aggregation
from ralf.train.evaluate.tables.card import card
from ralf.train.evaluate.tables.detectors import detectors
from ralf.train.evaluate.tables.false_positives import false_positives
from ralf.train.evaluate.tables.paper import (
    ablation,
    backbone,
    cross,
    intra,
    pooling,
    robustness,
)
from ralf.train.evaluate.tables.residual import residual
from ralf.train.evaluate.tables.table import Table, TableOptions

MAKERS: Mapping[str, Callable[[Sequence[JudgedModel], Index, TableOptions], Table]] = {
    "intra": intra,
    "cross": cross,
    "robustness": robustness,
    "ablation": ablation,
    "backbone": backbone,
    "pooling": pooling,
    "false_positives": false_positives,
    "aggregation": aggregation,
    "card": card,
    "detectors": detectors,
    "residual": residual,
}


def table(kind: str, models: Sequence[JudgedModel], index: Index, options: TableOptions) -> Table:
    """The table of that name."""
    if kind not in MAKERS:
        raise ValueError(f"no table {kind!r}; there are {', '.join(MAKERS)}")
    return MAKERS[kind](models, index, options)
