"""Does the residual lie where a forgery was put: AUC of its pixels inside the mask against outside.

Made forgeries know their mask.  For each of them the AUC says how often a pixel inside the mask has
a larger residual than one outside; the figure is the mean over faces.  A face's features have more
detail than cheeks and background, so the residual may be larger inside the mask without any
forgery: beside the figure stands the same AUC on the untouched face under the same mask.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ralf.kernels.manifest import RESIDUAL_INSIDE
from ralf.train.data.crop import Cut, region
from ralf.train.data.index import Index
from ralf.train.data.pictures import seeded_by
from ralf.train.evaluate.judge import JudgedModel, examples_for
from ralf.train.evaluate.metrics import auc, middle_95
from ralf.train.forge.families import FAMILIES, REGISTRY

FACES = 200
"""Forgeries that are looked at, evenly from all of the split."""
INSIDE, OUTSIDE = 0.5, 0.05
"""How much of a pixel is forged; what lies between is the mask's border."""
LEAST_SHARE = 0.01
"""Of the crop, inside and outside alike: a smaller part says little."""


class _Masked(NamedTuple):
    """A forgery, the face that it was made of, and where."""

    forged: Tensor  # u8 [3, s, s]
    untouched: Tensor  # u8 [3, s, s]
    inside: NDArray[np.bool_]  # [s, s]
    outside: NDArray[np.bool_]  # [s, s]


def residual_inside(
    model: JudgedModel,
    index: Index,
    split: str,
    families: Sequence[str] = FAMILIES,
    *,
    limit: int | None = None,
) -> dict[str, list[float]] | None:
    """The two figures, each with its interval; None where the network shows no residual."""
    explain = getattr(model.network, "explain", None)
    if explain is None:
        return None
    forged: list[float] = []
    untouched: list[float] = []
    for each in _masked(model, index.where(split=split, label=0), split, families, limit):
        with torch.no_grad():
            both = explain(torch.stack([each.forged, each.untouched])).residual
        for residual, found in zip(both, (forged, untouched), strict=True):
            found.append(_auc_inside(residual.mean(0).cpu().numpy(), each))
    if not forged:
        return None
    return {
        RESIDUAL_INSIDE: _with_interval(forged),
        f"{RESIDUAL_INSIDE} untouched": _with_interval(untouched),
    }


def _auc_inside(residual: NDArray[Any], each: _Masked) -> float:
    looked = each.inside | each.outside
    return auc(each.inside[looked], residual[looked].astype(np.float64))


def _with_interval(found: list[float]) -> list[float]:
    rng = np.random.default_rng(0)
    values = np.array(found)
    means = rng.choice(values, (1000, len(values))).mean(axis=1)
    return [float(values.mean()), *middle_95(means.tolist())]


def _masked(
    model: JudgedModel, reals: Index, split: str, families: Sequence[str], limit: int | None
) -> Iterator[_Masked]:
    """Forgeries of the reals, by families whose mask is what was forged."""
    # Where either side may be the forged one, the mask does not say which.
    masked = [name for name in families if name in REGISTRY and not REGISTRY[name].either_side]
    if not masked or not len(reals):
        return
    examples = examples_for(model, reals, split, families=masked, each=1, limit=limit)
    items = [item for item in examples.items if item.forged]
    places = np.linspace(0, len(items) - 1, min(FACES, len(items))).astype(int)
    cut = Cut(model.input)
    for item in (items[place] for place in places):
        image = examples.pool.pictures.picture(item.frame)
        face = examples.pool.pictures.face(item.frame)
        if face is None:
            continue
        part, moved = region(image, face, cut)
        assert item.family is not None
        # By the generator that the examples themselves use, so that both show the same forgery.
        rng = seeded_by(item.name)
        fake, mask = examples.pool.forgery(item.frame, part, moved, item.family, rng)
        grey = np.repeat((mask * 255).astype(np.uint8)[..., None], 3, axis=-1)
        share = cut.take(grey, moved)[0].numpy() / 255
        found = _Masked(
            cut.take(fake, moved), cut.take(part, moved), share > INSIDE, share < OUTSIDE
        )
        if min(found.inside.mean(), found.outside.mean()) >= LEAST_SHARE:
            yield found
