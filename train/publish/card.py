"""A model's card: what it was trained on, how well it does, where it fails; a page of Markdown.

Everything on it comes from the checkpoint, the index and the figures that were measured.  The card
says so where something was not measured.  It names the licence of each collection where this
project knows it, and says so where it does not.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ralf.kernels.manifest import (
    RESIDUAL_INSIDE,
    WORTH_SHOWING,
    Calibration,
    Manifest,
    held_out_family,
)
from ralf.train.data.layouts import licence_of
from ralf.train.recipe import Recipe
from ralf.train.recipe_text import differences
from ralf.train.recipes import RECIPES


class CountedRow(Protocol):
    """What the card reads from a row of the index."""

    @property
    def dataset(self) -> str: ...
    @property
    def method(self) -> str: ...
    @property
    def split(self) -> str: ...


@dataclass(frozen=True)
class Portion:
    """So many videos or pictures of one collection, method and split."""

    dataset: str
    method: str
    split: str
    count: int


def portions(rows: Iterable[CountedRow]) -> tuple[Portion, ...]:
    """The index, counted."""
    counts = Counter((row.dataset, row.method, row.split) for row in rows)
    return tuple(Portion(*key, count) for key, count in sorted(counts.items()))


def card(
    manifest: Manifest,
    recipe: Recipe,
    data: Sequence[Portion],
    *,
    golden_source: str,
    failures: Sequence[str] = (),
    forced: str = "",
) -> str:
    """The card's text; `forced` names an earlier version that was promoted past a check."""
    trained = manifest.trained
    sections = {
        f"# {manifest.name}": _summary(manifest, recipe),
        "## What it was trained and judged on": _trained_on(recipe, data, manifest.trained),
        "## How well it does": _figures(manifest),
        "## What a score means": _meaning(manifest),
        "## Where it fails": _failures(recipe, [*defects(manifest.metrics), *failures]),
        "## Not for": (
            "Deciding alone about a person. A score is one piece of evidence for a reviewer; the "
            "page shows where to look. It says nothing about sound, text, or generated scenes."
        ),
        "## How it was made": _made(recipe, trained, golden_source, forced),
    }
    return "\n\n".join(f"{title}\n\n{text.strip()}" for title, text in sections.items()) + "\n"


def _summary(manifest: Manifest, recipe: Recipe) -> str:
    dimensions = ", ".join(f"{k} {v}" for k, v in manifest.network.dimensions.items())
    how = "the box squeezed" if manifest.input.squeeze else f"{manifest.input.margin:g} × the face"
    text = (
        "Scores faces cut from video for forgery. "
        f"Network `{manifest.network.build}` ({dimensions}); recipe `{recipe.name}`; "
        f"crops of {manifest.input.size} px, {how}."
    )
    return f"**Untrained: its scores mean nothing.**\n\n{text}" if manifest.untrained else text


def _trained_on(recipe: Recipe, data: Sequence[Portion], trained: Mapping[str, Any]) -> str:
    if not data:
        return "Not recorded: the index was not given when this was published."
    lines = ["| collection | method | split | count |", "|---|---|---|---|"]
    lines += [f"| {p.dataset} | {p.method} | {p.split or '–'} | {p.count} |" for p in data]
    licences = {p.dataset: licence_of(p.dataset) for p in data}
    lines += ["", "Licences:", *(f"- {name}: {text}" for name, text in sorted(licences.items()))]
    families = ", ".join(recipe.data.trained_families)
    if families:
        lines += ["", f"Forgeries made from the reals by blending: {families}."]
    if families and (unseen := held_out_family(trained)) is not None:
        lines += [f"Never trained on, kept for judging: {unseen}."]
    return "\n".join(lines)


def _figures(manifest: Manifest) -> str:
    rows = list(_flat(manifest.metrics))
    if not rows:
        return "Not measured."
    return "\n".join(
        ["| figure | value | 95 % interval |", "|---|---|---|"]
        + [f"| {name} | {value} | {interval} |" for name, value, interval in rows]
    )


def _flat(metrics: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str, str]]:
    """Figures as rows of name, value, interval; three numbers are a value and its interval."""
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name} ")
        elif isinstance(value, list | tuple) and len(value) == 3:
            yield prefix + name, f"{value[0]:.4g}", f"{value[1]:.4g} to {value[2]:.4g}"
        elif isinstance(value, float):
            yield prefix + name, f"{value:.4g}", "–"
        else:
            yield prefix + name, str(value), "–"


def _meaning(manifest: Manifest) -> str:
    fitted = manifest.calibration
    formula = f"sigmoid((logit − {fitted.shift:.4g}) / {fitted.temperature:.4g})"
    lines = [f"P(forged) = {formula}, fitted on {fitted.fitted_on}, at even odds of both classes."]
    lines += by_compression(fitted)
    for name, score in sorted(manifest.thresholds.items()):
        meaning = (
            "below it: likely authentic"
            if name == "low"
            else f"at or above it: likely forged, at a false-positive rate of {name[4:]}"
        )
        lines.append(f"- `{name}` {score:.4f}: {meaning}")
    if not manifest.thresholds:
        lines.append("- no thresholds were fitted: verdicts are inconclusive")
    found = manifest.metrics.get("calibration", {}).get("thresholds", {})
    # Said beside the threshold itself: who takes the score also reads that it is weak.
    weak = sorted(name for name, each in found.items() if not each["supported"])
    if weak:
        lines.append(f"- too few faces support: {', '.join(weak)} (see the intervals)")
    return "\n".join(lines)


def by_compression(fitted: Calibration) -> list[str]:
    """How temperature and shift depend on a clip's compression, in lines of a card."""
    if not fitted.by_compression:
        return []
    points = (
        f"{point.bits_per_pixel:.3g} bits a pixel: shift {point.shift:.4g}, temperature "
        f"{point.temperature:.4g}"
        for point in fitted.by_compression
    )
    return [f"- for clips, by their compression and in between: {'; '.join(points)}"]


def _failures(recipe: Recipe, failures: Sequence[str]) -> str:
    known = [
        "Small faces, strong compression, low light and heavy make-up cost the most.",
        "Forgeries by methods unlike any it has seen: see the held-out figures, not the best ones.",
        "A bias of the collections above is a bias of the model: it was judged on no one else.",
    ]
    if recipe.data.families:
        known.append(
            "Trained on blended forgeries: whole synthetic faces without a border may pass."
        )
    return "\n".join(f"- {line}" for line in (*failures, *known))


GROUP, OTHERS = " false positives", " others false positives"
MUCH_MORE = 2.0
"""A group that is called forged more often than the others by more than this is a defect."""


def defects(metrics: Mapping[str, Any]) -> list[str]:
    """What the figures themselves call a fault of the model."""
    found = []
    for name in sorted(metrics):
        beside = metrics.get(name.removesuffix(GROUP) + OTHERS)
        if not name.startswith("group ") or beside is None or name.endswith(OTHERS):
            continue
        rate, low, high = metrics[name]
        if rate > MUCH_MORE * beside[0]:
            found.append(
                f"A defect: {name.removeprefix('group ').removesuffix(GROUP)} is called forged in "
                f"{rate:.1%} [{low:.1%}, {high:.1%}], the others in {beside[0]:.1%}."
            )
    located = metrics.get(RESIDUAL_INSIDE)
    if located is not None and located[0] < WORTH_SHOWING:
        found.append(
            f"Its residual does not show where a forgery is: AUC {located[0]:.2f} inside the mask "
            f"against outside, where {WORTH_SHOWING:g} would be worth showing."
        )
    return found


def without_places(recipe: Recipe) -> Recipe:
    """First weights by the names of their files or runs alone: paths may hold a user's name."""
    init = recipe.init
    names = {
        field: ",".join(Path(part).name for part in value.split(","))
        for field, value in init.model_dump().items()
        if value is not None
    }
    return recipe.replaced(init=init.replaced(**names))


def _made(recipe: Recipe, trained: Mapping[str, Any], golden_source: str, forced: str) -> str:
    facts = {
        "steps": trained.get("steps"),
        "faces seen": trained.get("faces"),
        "data": trained.get("data_sha256"),
        "commit": trained.get("commit") or "not recorded",
        "golden crops": golden_source,
    }
    lines = [f"- {name}: {value}" for name, value in facts.items()]
    # A reader knows the recipe by its name, so only what differs from it is listed.
    made = RECIPES.get(recipe.name)
    changed = differences(made(), without_places(recipe)) if made else []
    lines += [f"- changed from `{recipe.name}`: {each}" for each in changed]
    lines += [f"- {forced}"] if forced else []
    return "\n".join([*lines, "", "Why the recipe is so:", *(f"- {note}" for note in recipe.notes)])
