"""The paper's tables for whatever data is at hand, with the published rows where it is the same.

    intra            every figure, by dataset and compression, by method       Table 1
    cross            AUC and EER on each dataset                               Table 2
    robustness       the change of AUC under each perturbation                 Table 3
    ablation         one row a model: losses left out                          Table 4
    backbone         one row a model: classifiers                              Table 5
    pooling          one row a model: global pooling, by dataset               Table 6
    false_positives  reals called forged: by dataset, size, colour, condition
    aggregation      frames and means to score a video by
    card             what stands on the model's card
    detectors        models side by side: seen and unseen forgeries, robustness, cost, speed

A table is rows of text under columns; it prints itself and is kept as JSON with the figures whole.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from ralf.train.data.index import Index, IndexFault
from ralf.train.evaluate import papers
from ralf.train.evaluate.conditions import CLEAN, DEEPERFORENSICS, TABLE_3, all_conditions
from ralf.train.evaluate.judge import Judge, Result, Watch, evaluate, examples_for, result, score
from ralf.train.evaluate.metrics import RATES, Metrics, share_interval
from ralf.worker.scores import calibrated

Kind = Literal[
    "intra", "cross", "robustness", "ablation", "backbone", "pooling", "false_positives",
    "aggregation", "card", "detectors",
]  # fmt: skip
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Ask:
    """What is judged, apart from the models and the data."""

    split: str = "test"
    families: tuple[str, ...] = ()
    """Blended from every real face; () judges the forgeries on disk alone."""
    conditions: tuple[str, ...] = ()
    """For robustness and false_positives; () is the table's own choice."""
    frames: int | None = None
    limit: int | None = None
    replicates: int = 1000
    watch: Watch | None = None


@dataclass
class Table:
    """Rows under columns, and all figures behind them."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list, repr=False)

    def __str__(self) -> str:
        lines = [self.columns, *self.rows]
        widths = [max(len(line[place]) for line in lines) for place in range(len(self.columns))]
        text = [self.title, ""]
        for line in lines:
            first, *rest = (cell for cell in line)
            cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
            text.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
        return "\n".join([*text, *(f"note: {note}" for note in self.notes)])

    def save(self, path: Path) -> Path:
        """As JSON; numbers are not rounded."""
        facts = {"title": self.title, "notes": self.notes, "figures": self.figures}
        path.write_text(json.dumps(facts, indent=1) + "\n")
        return path


def table(kind: Kind, judges: Sequence[Judge], index: Index, ask: Ask = Ask()) -> Table:
    """The table of that name."""
    from ralf.train.evaluate.table_aggregation import aggregation  # they build on this module
    from ralf.train.evaluate.table_card import card
    from ralf.train.evaluate.table_detectors import detectors

    makers: dict[str, Callable[[Sequence[Judge], Index, Ask], Table]] = {
        "intra": intra,
        "cross": cross,
        "robustness": robustness,
        "ablation": lambda *all_: by_model("Table 4: what is left out", papers.ABLATION, *all_),
        "backbone": lambda *all_: by_model("Table 5: backbones", papers.BACKBONE, *all_),
        "pooling": pooling,
        "false_positives": false_positives,
        "aggregation": aggregation,
        "card": card,
        "detectors": detectors,
    }
    if kind not in makers:
        raise ValueError(f"no table {kind!r}; there are {', '.join(makers)}")
    return makers[kind](judges, index, ask)


def _percent(value: float) -> str:
    return "—" if np.isnan(value) else f"{100 * value:.2f}"


def _auc(found: Metrics) -> str:
    span = f" [{_percent(found.auc_low)}, {_percent(found.auc_high)}]"
    return _percent(found.auc) + ("" if np.isnan(found.auc_low) else span)


def _judged(judge: Judge, index: Index, ask: Ask, condition: str = CLEAN) -> Result:
    return evaluate(
        judge, index, ask.split, families=ask.families, condition=condition,
        frames=ask.frames, limit=ask.limit, replicates=ask.replicates, watch=ask.watch,
    )  # fmt: skip


def _parts(index: Index, split: str) -> list[tuple[str, str]]:
    """Datasets and compressions of a split; one that has no real face stands with none."""
    rows = index.where(split=split)
    found = sorted({(row.dataset, row.compression) for row in rows if not row.label})
    if not found:
        raise IndexFault(f"split {split!r} has no real faces to judge against")
    return found


def _take(found: Table, label: str, each: Result) -> None:
    found.results.append(each)
    found.figures[label] = {
        "frames": asdict(each.frames),
        "videos": asdict(each.videos),
        "by_method": {name: asdict(figures) for name, figures in each.by_method.items()},
    }


def intra(judges: Sequence[Judge], index: Index, ask: Ask) -> Table:
    """Every figure for every part of the data, and a row for each way of forging."""
    rates = tuple(f"TPR@{100 * rate:g}%" for rate in RATES)
    found = Table(
        f"Table 1: within a dataset, split {ask.split}",
        ("model and data", "faces", "AUC [95 %]", "video AUC [95 %]", "EER", "AP", "acc",
         *rates, "ECE", "Brier"),
    )  # fmt: skip
    parts = _parts(index, ask.split)
    for dataset, compression in parts if len(parts) == 1 else [*parts, ("all", "")]:
        here = index.where(dataset=dataset, compression=compression)
        for judge in judges:
            each = _judged(judge, index if dataset == "all" else here, ask)
            label = f"{judge.name} {dataset} {compression}".rstrip()
            _take(found, label, each)
            found.rows.append(_whole_row(label, each))
            found.rows += [
                (f"  {name}", str(m.forged), _auc(m), "", _percent(m.eer), _percent(m.ap),
                 *[""] * (3 + len(rates)))
                for name, m in each.by_method.items()
            ]  # fmt: skip
        for name, (accuracy, auc) in papers.INTRA.get((dataset, compression), {}).items():
            shown, right = ("—" if v is None else f"{v:.2f}" for v in (auc, accuracy))
            cells = ("", shown, "", "", "", right, *[""] * (2 + len(rates)))
            found.rows.append((f"published: {name} {dataset} {compression}", *cells))
            found.notes = [papers.PROTOCOL]
    return found


def _whole_row(label: str, each: Result) -> tuple[str, ...]:
    m = each.frames
    numbers = f"{m.real}+{m.forged}"
    head = (label, numbers, _auc(m), _auc(each.videos), _percent(m.eer), _percent(m.ap))
    rates = tuple(_percent(value) for value in m.tpr_at_fpr)
    return (*head, _percent(m.accuracy), *rates, f"{m.ece:.3f}", f"{m.brier:.3f}")


def cross(judges: Sequence[Judge], index: Index, ask: Ask) -> Table:
    """Each dataset on its own."""
    found = Table(
        f"Table 2: across datasets, split {ask.split}",
        ("model and data", "faces", "AUC [95 %]", "EER", "video AUC [95 %]", "video EER"),
    )
    for dataset in sorted({name for name, _ in _parts(index, ask.split)}):
        for judge in judges:
            each = _judged(judge, index.where(dataset=dataset), ask)
            label = f"{judge.name} {dataset}"
            _take(found, label, each)
            f, v = each.frames, each.videos
            cells = (f"{f.real}+{f.forged}", _auc(f), _percent(f.eer), _auc(v), _percent(v.eer))
            found.rows.append((label, *cells))
        for name, (auc, eer) in papers.CROSS.get(dataset, {}).items():
            cells = ("", f"{auc:.2f}", f"{eer:.2f}", "", "")
            found.rows.append((f"published: {name} {dataset}, trained on c40", *cells))
            found.notes = [papers.PROTOCOL]
    return found


def robustness(judges: Sequence[Judge], index: Index, ask: Ask) -> Table:
    """The clean AUC, and how far each condition takes it down."""
    conditions = ask.conditions or (
        *all_conditions((*DEEPERFORENSICS, "jpeg", "light")),
        "rescale:2",
    )
    found = Table(
        f"Table 3: under perturbations, split {ask.split}",
        ("model and condition", "AUC [95 %]", "change", "video AUC", "change"),
    )
    for judge in judges:
        clean = _judged(judge, index, ask)
        for condition in (CLEAN, *conditions):
            each = clean if condition == CLEAN else _judged(judge, index, ask, condition)
            label = f"{judge.name} {condition}"
            _take(found, label, each)
            found.rows.append((
                label, _auc(each.frames), f"{100 * (each.frames.auc - clean.frames.auc):+.2f}",
                _percent(each.videos.auc), f"{100 * (each.videos.auc - clean.videos.auc):+.2f}",
            ))  # fmt: skip
    if {(row.dataset, row.compression) for row in index} == {("ffpp", "c23")}:
        for name, changes in papers.ROBUSTNESS.items():
            found.rows += [
                (f"published: {name} {condition}", "", f"{change:+.2f}", "", "")
                for condition, change in zip(TABLE_3, changes, strict=True)
            ]
        found.notes.append(papers.PROTOCOL)
    found.notes.append("pixelation is DeeperForensics' JPEG, which is none; jpeg is true JPEG")
    return found


def by_model(
    title: str, rows: dict[str, float], judges: Sequence[Judge], index: Index, ask: Ask
) -> Table:
    """One row a model, on the whole split."""
    found = Table(f"{title}, split {ask.split}", ("model", "weights", "AUC [95 %]", "video AUC"))
    for judge in judges:
        each = _judged(judge, index, ask)
        _take(found, judge.name, each)
        count = sum(p.numel() for p in judge.network.parameters()) if judge.network else 0
        size = f"{count / 1e6:.1f} M" if count else ""
        found.rows.append((judge.name, size, _auc(each.frames), _auc(each.videos)))
    if {(row.dataset, row.compression) for row in index} == {("ffpp", "c40")}:
        found.rows += [(f"published: {name}", "", f"{auc:.2f}", "") for name, auc in rows.items()]
        found.notes.append(papers.PROTOCOL)
    return found


def pooling(judges: Sequence[Judge], index: Index, ask: Ask) -> Table:
    """Models of different global pooling, by dataset."""
    found = cross(judges, index, ask)
    found.title = f"Table 6: global pooling, split {ask.split}"
    found.rows = [row for row in found.rows if not row[0].startswith("published")]
    for dataset, compression in _parts(index, ask.split):
        if dataset == "ffpp" and compression != "c40":
            continue
        for name, auc in papers.POOLING.get(dataset, {}).items():
            found.rows.append((f"published: {name} {dataset}", "", f"{auc:.2f}", "", "", ""))
            found.notes = [papers.PROTOCOL]
    return found


def false_positives(judges: Sequence[Judge], index: Index, ask: Ask) -> Table:
    """How many real faces the model's threshold calls forged, and whose."""
    found = Table(
        f"Real faces called forged, split {ask.split}",
        ("model, condition and faces", "faces", "called forged", "rate [95 %]"),
    )
    for judge in judges:
        for condition in (CLEAN, *(ask.conditions or ("h264=23", "h264=40", "jpeg=50", "light:3"))):
            each, groups = called_forged(judge, index, ask, condition)
            found.results.append(each)
            for name, (events, of) in groups.items():
                label = f"{judge.name} {condition} {name}"
                low, high = share_interval(events, of)
                found.figures[label] = {"faces": of, "forged": events, "interval": [low, high]}
                span = f"{_percent(events / of)} [{_percent(low)}, {_percent(high)}]"
                found.rows.append((label, str(of), str(events), span))
    found.notes.append("rates in percent, with Clopper and Pearson's interval")
    return found


def called_forged(
    judge: Judge, index: Index, ask: Ask, condition: str
) -> tuple[Result, dict[str, tuple[int, int]]]:
    """The split's reals judged; of each group of them how many are called forged, of how many."""
    examples = examples_for(
        judge, index.where(label=0), ask.split, condition=condition, frames=ask.frames,
        limit=ask.limit,
    )  # fmt: skip
    each = result(judge, score(judge, examples, ask.watch), condition, replicates=0)
    wrong = calibrated(each.scored.logit, judge.calibration) >= judge.threshold
    groups = _groups(examples)
    members = {n: (groups == n).any(axis=1) for n in sorted(set(groups.ravel().tolist()) - {""})}
    return each, {name: (int(wrong[own].sum()), int(own.sum())) for name, own in members.items()}


def _groups(examples: Any) -> np.ndarray:
    """What each face counts under: all, its dataset, its size, colour or grey, its pose."""
    rows = []
    for item in examples.items:
        row = item.frame.row
        face = examples.pool.pictures.face(item.frame)
        size = row.face_px or (int(min(face.box[2:] - face.box[:2])) if face else 0)
        bins = ((96, "under 96 px"), (256, "96 to 255 px"), (10**9, "256 px and more"))
        sized = next(name for most, name in bins if size < most) if size else ""
        pose = ""
        if face is not None:
            # The nose's tip stands off the middle of the eyes as the head turns.
            off = abs(face.five[2, 0] - face.five[:2, 0].mean()) / face.eye_distance
            pose = "turned" if off > 0.2 else "frontal"
        pixels = examples.pool.pictures.picture(item.frame)[::4, ::4].astype(int)
        grey = "greyscale" if np.abs(pixels - pixels[..., 1:2]).max() <= 8 else "colour"
        rows.append(("all", row.dataset, sized, pose, grey))
    return np.array(rows)
