"""One self-contained HTML page for a model on a split: its figures and what it learnt, in pictures.

A figure that a network cannot give, such as a mask for a plain classifier, is listed as left out.
"""

import base64
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from ralf.train.data.evaluation_set import Examples
from ralf.train.data.index import Index
from ralf.train.evaluate.conditions import CLEAN
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
from ralf.train.evaluate.judge import (
    Evaluation,
    JudgedModel,
    evaluation_of,
    examples_for,
    score_examples,
)
from ralf.train.evaluate.tables.table import TableOptions

TEMPLATE = Path(__file__).with_name("page.html")


def write_page(
    model: JudgedModel, examples: Examples, evaluation: Evaluation, path: Path, *, faces: int = 6
) -> Path:
    """The page: every figure that this model can give, beside its numbers."""
    scores = evaluation.scored
    chance = scores.probability(model.calibration)
    makers: list[tuple[str, Callable[[], Figure]]] = [
        ("Receiver operating characteristic, by frame", lambda: roc_figure(scores)),
        ("Reliability", lambda: reliability_figure(scores.forged, chance)),
    ]
    crops, names, forged = _some(examples, 400)
    if 0 < forged.sum() < len(forged):
        is_forged = torch.from_numpy(forged)
        makers.append(("Spectrum", lambda: spectrum_figure(crops[~is_forged], crops[is_forged])))
    left_out = []
    network = model.network
    if network is None:
        left_out.append("mask, embedding, strips: the engine shows no network")
    else:
        if isinstance(mask := getattr(network, "mask", None), Tensor):
            makers.append(("The learnt mask", lambda: mask_figure(mask)))
        else:
            left_out.append("mask: the network has none")
        batches = list(torch.split(crops, 16))
        if len(crops) >= 8:
            whole = lambda: embedding_figure(features_of(network, batches), names)  # noqa: E731
            makers.append(("Embedding, t-SNE", whole))
        shown = _one_of_each(names, faces)
        picked = [names[place] for place in shown]
        makers.append(("Faces", lambda: strips_figure(network, crops[shown], picked)))
    figures = [(title, png(make())) for title, make in makers]
    path.write_text(_page(model, evaluation, figures, left_out))
    return path


def _some(examples: Examples, most: int) -> tuple[Tensor, list[str], NDArray[np.bool_]]:
    """Evenly chosen examples, so that all ways of forging are among them."""
    count = min(most, len(examples.items))
    places = np.linspace(0, len(examples.items) - 1, count).astype(int)
    items = [examples.items[place] for place in places]
    crops = torch.stack([examples.crop(item) for item in items])
    return crops, [item.method for item in items], np.array([item.forged for item in items])


def _one_of_each(names: Sequence[str], most: int) -> list[int]:
    # Backwards, so that the first example of each name is the one that stays.
    first = {name: place for place, name in reversed(list(enumerate(names)))}
    return sorted(first.values())[:most]


def _page(
    model: JudgedModel,
    evaluation: Evaluation,
    figures: list[tuple[str, bytes]],
    left_out: list[str],
) -> str:
    found = [("frames", evaluation.frames), ("videos", evaluation.videos)]
    # StrictUndefined: a misspelt name in the template is an error and not an empty cell.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["cell"] = lambda value: "—" if np.isnan(value) else f"{value:.4f}"
    return environment.from_string(TEMPLATE.read_text()).render(
        model=model.name,
        condition=evaluation.condition,
        rows=[*found, *evaluation.by_method.items()],
        figures=[(title, base64.b64encode(data).decode()) for title, data in figures],
        left_out=left_out,
    )


def write_pages(
    models: Sequence[JudgedModel], index: Index, options: TableOptions, folder: Path
) -> list[Path]:
    """A page of figures for each model on the whole split; none where nothing is forged."""
    made = []
    for model in models:
        examples = examples_for(
            model,
            index,
            options.split,
            families=options.families,
            frames=options.frames,
            limit=options.limit,
        )
        found = evaluation_of(model, score_examples(model, examples), CLEAN, options.replicates)
        if found.frames.forged > 0:
            made.append(write_page(model, examples, found, folder / f"{model.name}.html"))
    return made
