"""One self-contained HTML page for a model on a split: its figures and what it learnt, in pictures.

A figure that a network cannot give, as a mask for a plain classifier, is left out and said to be.
"""

import base64
import html
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from ralf.train.data.evaluation_set import Examples
from ralf.train.evaluate.figures import (
    embedding_figure,
    features_of,
    mask_figure,
    png,
    reliability_figure,
    roc_figure,
    spectrum_figure,
    strips_figure,
)
from ralf.train.evaluate.judge import Judge, Result
from ralf.worker.scores import calibrated


def report(judge: Judge, examples: Examples, result: Result, path: Path, *, faces: int = 6) -> Path:
    """The page: every figure that this model can give, beside its numbers."""
    scores = result.scored
    chance = calibrated(scores.logit, judge.calibration)
    makers: list[tuple[str, Callable[[], Figure]]] = [
        ("Receiver operating characteristic, by frame", lambda: roc_figure(scores)),
        ("Reliability", lambda: reliability_figure(scores.forged, chance)),
    ]
    crops, names, forged = _some(examples, 400)
    if 0 < forged.sum() < len(forged):
        told = torch.from_numpy(forged)
        makers.append(("Spectrum", lambda: spectrum_figure(crops[~told], crops[told])))
    left_out = []
    network = judge.network
    if network is None:
        left_out.append("mask, embedding, strips: the engine shows no network")
    else:
        if isinstance(mask := getattr(network, "mask", None), Tensor):
            makers.append(("The learnt mask", lambda: mask_figure(mask)))
        else:
            left_out.append("mask: the network has none")
        batches = list(crops.split(16))
        if len(crops) >= 8:
            whole = lambda: embedding_figure(features_of(network, batches), names)  # noqa: E731
            makers.append(("Embedding, t-SNE", whole))
        shown = _one_of_each(names, faces)
        picked = [names[place] for place in shown]
        makers.append(("Faces", lambda: strips_figure(network, crops[shown], picked)))
    figures = [(title, png(make())) for title, make in makers]
    path.write_text(_page(judge, result, figures, left_out))
    return path


def _some(examples: Examples, most: int) -> tuple[Tensor, list[str], NDArray[np.bool_]]:
    """Evenly chosen examples, so that all ways of forging are among them."""
    count = min(most, len(examples.items))
    places = np.linspace(0, len(examples.items) - 1, count).astype(int)
    items = [examples.items[place] for place in places]
    crops = torch.stack([examples.crop(item) for item in items])
    return crops, [item.method for item in items], np.array([item.forged for item in items])


def _one_of_each(names: Sequence[str], most: int) -> list[int]:
    first = {name: place for place, name in reversed(list(enumerate(names)))}
    return sorted(first.values())[:most]


def _page(
    judge: Judge, result: Result, figures: list[tuple[str, bytes]], left_out: list[str]
) -> str:
    def cell(value: float) -> str:
        return "—" if np.isnan(value) else f"{value:.4f}"

    rows = [("frames", result.frames), ("videos", result.videos), *result.by_method.items()]
    table = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{m.real}+{m.forged}</td><td>{cell(m.auc)} "
        f"[{cell(m.auc_low)}, {cell(m.auc_high)}]</td><td>{cell(m.eer)}</td><td>{cell(m.ap)}</td>"
        f"<td>{cell(m.ece)}</td><td>{cell(m.brier)}</td></tr>"
        for name, m in rows
    )
    pictures = "".join(
        f'<section><h2>{html.escape(title)}</h2><img alt="{html.escape(title)}" '
        f'src="data:image/png;base64,{base64.b64encode(data).decode()}"></section>'
        for title, data in figures
    )
    missing = "".join(f"<li>{html.escape(reason)}</li>" for reason in left_out)
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(judge.name)}</title><style>"
        "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
        "img{max-width:100%}table{border-collapse:collapse;display:block;overflow-x:auto}"
        "th,td{text-align:right;padding:.2rem .7rem;border-bottom:1px solid #ccc}"
        "th:first-child{text-align:left}</style>"
        f"<h1>{html.escape(judge.name)}</h1><p>Condition: {html.escape(result.condition)}. "
        "Scores are P(forged); intervals are 95 %, by video.</p>"
        "<table><tr><th></th><th>real+forged</th><th>AUC</th><th>EER</th><th>AP</th><th>ECE</th>"
        f"<th>Brier</th></tr>{table}</table>{pictures}"
        + (f"<h2>Left out</h2><ul>{missing}</ul>" if missing else "")
        + "</html>\n"
    )
