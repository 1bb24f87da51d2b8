"""Tables 1 to 6 of RALF's paper for the data at hand, with its published rows (../papers.py).

A published row is shown only where our data is the same dataset at the same compression.
"""

from collections.abc import Sequence

from ralf.train.data.index import Index
from ralf.train.evaluate import papers
from ralf.train.evaluate.conditions import (
    CLEAN,
    DEEPERFORENSICS,
    REQUANTISED,
    TABLE_3,
    all_conditions,
)
from ralf.train.evaluate.judge import Evaluation, JudgedModel
from ralf.train.evaluate.metrics import RATES
from ralf.train.evaluate.tables.table import (
    Table,
    TableOptions,
    auc_cell,
    datasets_of,
    evaluate_with,
    percent,
)


def intra(models: Sequence[JudgedModel], index: Index, options: TableOptions) -> Table:
    """Every figure for every part of the data, and a row for each way of forging."""
    rates = tuple(f"TPR@{100 * rate:g}%" for rate in RATES)
    found = Table(
        f"Table 1: within a dataset, split {options.split}",
        ("model and data", "faces", "AUC [95 %]", "video AUC [95 %]", "EER", "AP", "acc",
         *rates, "ECE", "Brier"),
    )  # fmt: skip
    parts = datasets_of(index, options.split)
    for dataset, compression in parts if len(parts) == 1 else [*parts, ("all", "")]:
        here = index.where(dataset=dataset, compression=compression)
        for model in models:
            each = evaluate_with(options, model, index if dataset == "all" else here)
            label = f"{model.name} {dataset} {compression}".rstrip()
            found.add(label, each)
            found.rows.append(_whole_row(label, each))
            found.rows += [
                (f"  {name}", str(m.forged), auc_cell(m), "", percent(m.eer), percent(m.ap),
                 *[""] * (3 + len(rates)))
                for name, m in each.by_method.items()
            ]  # fmt: skip
        for name, (accuracy, auc) in papers.INTRA.get((dataset, compression), {}).items():
            shown, right = ("—" if v is None else f"{v:.2f}" for v in (auc, accuracy))
            cells = ("", shown, "", "", "", right, *[""] * (2 + len(rates)))
            found.rows.append((f"published: {name} {dataset} {compression}", *cells))
            # Assigned and not appended, here and below: it stands once, after any number of rows.
            found.notes = [papers.PROTOCOL]
    return found


def _whole_row(label: str, each: Evaluation) -> tuple[str, ...]:
    m = each.frames
    numbers = f"{m.real}+{m.forged}"
    head = (label, numbers, auc_cell(m), auc_cell(each.videos), percent(m.eer), percent(m.ap))
    rates = tuple(percent(value) for value in m.tpr_at_fpr)
    return (*head, percent(m.accuracy), *rates, f"{m.ece:.3f}", f"{m.brier:.3f}")


def cross(models: Sequence[JudgedModel], index: Index, options: TableOptions) -> Table:
    """Each dataset on its own."""
    found = Table(
        f"Table 2: across datasets, split {options.split}",
        ("model and data", "faces", "AUC [95 %]", "EER", "video AUC [95 %]", "video EER"),
    )
    for dataset in sorted({name for name, _ in datasets_of(index, options.split)}):
        for model in models:
            each = evaluate_with(options, model, index.where(dataset=dataset))
            label = f"{model.name} {dataset}"
            found.add(label, each)
            f, v = each.frames, each.videos
            cells = (
                f"{f.real}+{f.forged}",
                auc_cell(f),
                percent(f.eer),
                auc_cell(v),
                percent(v.eer),
            )
            found.rows.append((label, *cells))
        for name, (auc, eer) in papers.CROSS.get(dataset, {}).items():
            cells = ("", f"{auc:.2f}", f"{eer:.2f}", "", "")
            found.rows.append((f"published: {name} {dataset}, trained on c40", *cells))
            found.notes = [papers.PROTOCOL]
    return found


def robustness(models: Sequence[JudgedModel], index: Index, options: TableOptions) -> Table:
    """The clean AUC, and how far each condition takes it down."""
    conditions = options.conditions or (
        *all_conditions((*DEEPERFORENSICS, "jpeg", "light")),
        *REQUANTISED,
        *TABLE_3,
    )
    found = Table(
        f"Table 3: under perturbations, split {options.split}",
        ("model and condition", "AUC [95 %]", "change", "video AUC", "change"),
    )
    for model in models:
        clean = evaluate_with(options, model, index)
        for condition in (CLEAN, *conditions):
            each = clean if condition == CLEAN else evaluate_with(options, model, index, condition)
            label = f"{model.name} {condition}"
            found.add(label, each)
            found.rows.append((
                label, auc_cell(each.frames), f"{100 * (each.frames.auc - clean.frames.auc):+.2f}",
                percent(each.videos.auc), f"{100 * (each.videos.auc - clean.videos.auc):+.2f}",
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


def ablation(models: Sequence[JudgedModel], index: Index, options: TableOptions) -> Table:
    """Models with losses left out."""
    return _by_model("Table 4: what is left out", papers.ABLATION, models, index, options)


def backbone(models: Sequence[JudgedModel], index: Index, options: TableOptions) -> Table:
    """Models with different classifiers."""
    return _by_model("Table 5: backbones", papers.BACKBONE, models, index, options)


def _by_model(
    title: str,
    rows: dict[str, float],
    models: Sequence[JudgedModel],
    index: Index,
    options: TableOptions,
) -> Table:
    """One row for each model, on the whole split."""
    found = Table(
        f"{title}, split {options.split}", ("model", "weights", "AUC [95 %]", "video AUC")
    )
    for model in models:
        each = evaluate_with(options, model, index)
        found.add(model.name, each)
        count = sum(p.numel() for p in model.network.parameters()) if model.network else 0
        size = f"{count / 1e6:.1f} M" if count else ""
        found.rows.append((model.name, size, auc_cell(each.frames), auc_cell(each.videos)))
    if {(row.dataset, row.compression) for row in index} == {("ffpp", "c40")}:
        found.rows += [(f"published: {name}", "", f"{auc:.2f}", "") for name, auc in rows.items()]
        found.notes.append(papers.PROTOCOL)
    return found


def pooling(models: Sequence[JudgedModel], index: Index, options: TableOptions) -> Table:
    """Models with different global pooling, by dataset."""
    found = cross(models, index, options)
    found.title = f"Table 6: global pooling, split {options.split}"
    # Table 2's published rows are of another experiment.
    found.rows = [row for row in found.rows if not row[0].startswith("published")]
    for dataset, compression in datasets_of(index, options.split):
        if dataset == "ffpp" and compression != "c40":
            continue
        for name, auc in papers.POOLING.get(dataset, {}).items():
            found.rows.append((f"published: {name} {dataset}", "", f"{auc:.2f}", "", "", ""))
            found.notes = [papers.PROTOCOL]
    return found
