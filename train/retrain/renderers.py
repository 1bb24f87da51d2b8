"""The learned renderers of a chain: fitted on the data's reals; their forgeries put beside those.

    RUN/renderers/NAME.safetensors    a fitted renderer
    RUN/rendered/…                    its forgeries, as `ralf forge render` stores them
    RUN/rendered/index.csv            the data and all forgeries, which the trainings read

A renderer that is held out draws the test split alone, so that no training, no validation and no
calibration ever meets what it makes.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from ralf.kernels.engine import pick_device
from ralf.train.chain import RendererFit
from ralf.train.data.index import Index, Row
from ralf.train.forge.renderers.fit import FitRequest, fit
from ralf.train.forge.renderers.render import RenderRequest, render
from ralf.train.forge.renderers.stored import kind
from ralf.train.loop.loop import caught
from ralf.train.recipe_text import override, to_json
from ralf.train.retrain.order import RENDER, Retraining
from ralf.train.retrain.resumable import Facts, Step, Stopped
from ralf.train.trainings import Interrupted


def renderer_steps(order: Retraining) -> list[Step]:
    """A step for each renderer to fit, and one that renders."""
    fits = order.training.chain.fits
    if not fits:
        return []
    how = [[each.renderer, each.held_out, each.variants] for each in fits]
    return [
        *(_fit_step(order, each) for each in fits),
        Step(
            RENDER,
            {"how": how, "test": order.evaluate_on},
            lambda done: _render(order, done),
            "each face of the data forged by the renderers, in one index",
            still_there=lambda facts: _complete(Path(facts["index"])),
        ),
    ]


def fitted(order: Retraining, done: Mapping[str, Facts], *, held_out: bool) -> tuple[Path, ...]:
    """The files of the chain's renderers, with those held out or without."""
    return tuple(
        Path(done[_name(each)]["file"])
        for each in order.training.chain.fits
        if held_out or not each.held_out
    )


def _name(each: RendererFit) -> str:
    return f"fit {each.renderer}"


def _fit_step(order: Retraining, each: RendererFit) -> Step:
    training = order.training
    options = override(
        kind(each.renderer).Options(), training.chain.options(each, training.changes)
    )
    out = order.run / "renderers" / f"{each.renderer}.safetensors"

    def work(done: Mapping[str, Facts]) -> Facts:
        with caught() as interrupt, all_cores(training.room):
            request = FitRequest(
                each.renderer, options, out,
                minutes=each.minutes,
                device=pick_device(training.device),
                say=lambda text: order.say(f"{each.renderer}: {text}"),
                interrupt=interrupt,
            )  # fmt: skip
            found = fit(order.index, request)
        if found.ending == "interrupted":
            raise Interrupted(f"stopped at step {found.step} of {each.renderer}")
        seconds = 60 * found.record["minutes"]
        faces = found.step * options.batch
        rate = faces / seconds if seconds else 0.0
        order.say(f"{each.renderer}: {found.step} steps, {faces} faces, {rate:.0f} a second")
        return {"file": str(out), "sha256": found.sha256, "steps": found.step, "faces": faces}

    return Step(
        _name(each),
        {"options": to_json(options), "minutes": each.minutes, "data": order.index.sha256},
        work,
        f"{each.renderer} for {each.minutes:g} minutes, on the reals of split train",
        still_there=lambda facts: Path(facts["file"]).is_file(),
    )


@contextmanager
def all_cores(room: int) -> Iterator[None]:
    """Work that nothing runs beside may have every core; after it, what the user has set."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(before, min(room, os.cpu_count() or 1)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _render(order: Retraining, done: Mapping[str, Facts]) -> Facts:
    """All forgeries, and the index of them and the data."""
    folder = order.run / "rendered"
    workers = order.training.room if order.training.room > 1 else 0
    rows: list[Row] = [order.index.anywhere(row) for row in order.index]
    counts: Facts = {}
    for each in order.training.chain.fits:
        count = 0
        for split in _splits(order, each):
            request = RenderRequest(
                Path(done[_name(each)]["file"]), split, folder,
                variants=each.variants if split == "train" else 1, workers=workers,
            )  # fmt: skip
            made, _ = render(order.index, request)
            rows += [made.anywhere(row) for row in made]
            count += len(made)
        if not count:
            raise Stopped(
                f"faces for {each.renderer} to forge",
                f"no reals in splits {', '.join(_splits(order, each)) or 'named train and val'}",
                "draw splits with `ralf data index --split`",
            )
        counts[each.renderer] = count
        order.say(f"render: {count} forgeries by {each.renderer}")
    whole = Index(folder, tuple(rows)).save(folder / "index.csv")
    return {"index": str(whole), "forgeries": counts}


def _splits(order: Retraining, each: RendererFit) -> list[str]:
    """The splits that a renderer draws, of those that have reals."""
    wanted = {"train", "val", order.calibrate_on, order.evaluate_on}
    if each.held_out:
        wanted = {order.evaluate_on}
    there = {row.split for row in order.index if not row.label}
    return sorted(wanted & there)


def _complete(index: Path) -> bool:
    """Whether the index is there, and the pictures that it names were not removed."""
    return index.is_file() and any((index.parent).glob("*/faces/*.webp"))
