"""What all tables are made of: the options, the table itself, and how figures are written in it.

A table is rows of text under columns.  It prints itself, and it is saved as JSON with its figures
not rounded.
"""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ralf.train.data.index import Index, IndexFault
from ralf.train.evaluate.conditions import CLEAN
from ralf.train.evaluate.judge import Evaluation, JudgedModel, OnProgress, evaluate, write_videos
from ralf.train.evaluate.metrics import Metrics

GROUPS = ("age", "gender", "region")


@dataclass(frozen=True)
class TableOptions:
    """What is judged, apart from the models and the data."""

    split: str = "test"
    families: tuple[str, ...] = ()
    """Blended from every real face; () judges the forgeries on disk alone."""
    conditions: tuple[str, ...] = ()
    """() is the table's own choice."""
    frames: int | None = None
    limit: int | None = None
    replicates: int = 1000
    groups: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """File name → column → value, as age → 20-29: whom errors are counted by on the card."""
    on_progress: OnProgress | None = None


def read_groups(paths: Sequence[Path]) -> dict[str, dict[str, str]]:
    """The groups of people by file name, from tables with a column `file`.

    They serve to count errors by; nothing is trained on them.
    """
    found: dict[str, dict[str, str]] = {}
    for path in paths:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        columns = [name for name in rows[0] if name in GROUPS] if rows else []
        if not rows or "file" not in rows[0] or not columns:
            raise ValueError(
                f"{path} should be a CSV with the column file and some of {', '.join(GROUPS)}"
            )
        found |= {row["file"]: {name: row[name] for name in columns} for row in rows}
    return found


@dataclass
class Table:
    """Rows under columns, and all figures behind them."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    evaluations: list[Evaluation] = field(default_factory=list, repr=False)

    def __str__(self) -> str:
        lines = [self.columns, *self.rows]
        widths = [max(len(line[place]) for line in lines) for place in range(len(self.columns))]
        text = [self.title, ""]
        for line in lines:
            first, *rest = (cell for cell in line)
            cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
            text.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
        return "\n".join([*text, *(f"note: {note}" for note in self.notes)])

    def add(self, label: str, each: Evaluation) -> None:
        """Keep the figures of one evaluation under a label; rows are up to the table."""
        self.evaluations.append(each)
        self.figures[label] = {
            "frames": asdict(each.frames),
            "videos": asdict(each.videos),
            "by_method": {name: asdict(figures) for name, figures in each.by_method.items()},
        }

    def save(self, path: Path) -> Path:
        """As JSON; numbers are not rounded."""
        facts = {"title": self.title, "notes": self.notes, "figures": self.figures}
        path.write_text(json.dumps(facts, indent=1) + "\n")
        return path


def write_table(made: Table, kind: str, models: Sequence[JudgedModel], folder: Path) -> None:
    """The table as JSON, and for each model a CSV of its videos."""
    folder.mkdir(parents=True, exist_ok=True)
    made.save(folder / f"{kind}.json")
    for model in models:
        own = [each for each in made.evaluations if each.model == model.name]
        write_videos(folder / f"{model.name}-{kind}.csv", model, own)


def percent(value: float) -> str:
    """A share as a cell; a dash where there is none."""
    return "—" if np.isnan(value) else f"{100 * value:.2f}"


def auc_cell(found: Metrics) -> str:
    """AUC and its interval as a cell."""
    span = f" [{percent(found.auc_low)}, {percent(found.auc_high)}]"
    return percent(found.auc) + ("" if np.isnan(found.auc_low) else span)


def evaluate_with(
    options: TableOptions,
    model: JudgedModel,
    index: Index,
    condition: str = CLEAN,
    *,
    families: tuple[str, ...] | None = None,
    replicates: int | None = None,
) -> Evaluation:
    """The model on the split that the options name; families and replicates may be others."""
    return evaluate(
        model,
        index,
        options.split,
        families=options.families if families is None else families,
        condition=condition,
        frames=options.frames,
        limit=options.limit,
        replicates=options.replicates if replicates is None else replicates,
        on_progress=options.on_progress,
    )


def datasets_of(index: Index, split: str) -> list[tuple[str, str]]:
    """Dataset and compression of every real face of a split; refused where there is none."""
    rows = index.where(split=split)
    found = sorted({(row.dataset, row.compression) for row in rows if not row.label})
    if not found:
        raise IndexFault(f"split {split!r} has no real faces to judge against")
    return found
