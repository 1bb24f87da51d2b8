"""Who may become the promoted version, and which versions may go.

Promotion passes three gates, and each says what was asked and what came:

    engines   every target that the manifest declares has its engine
    metrics   no figure falls below the promoted version's by more than the manifest's margin
    golden    the torch engine's logits on golden.npz are the reference's, within the budget

One that is overridden by force stays in the history, with what it had said.  Somebody else's
promotion between the weighing and ours is noticed, and ours refused.

Collecting removes old versions.  Kept are the promoted one, the newest few, those that the last
few promotions named, those that somebody spares (a waiting job pins them), and those that a running
process holds open.  That is seen by a lock, where the file system has locks between machines.
Looking and removing are two calls of one function, so what is shown is what goes.

Nothing here imports torch; the golden gate does when it is asked.
"""

import shutil
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import inf, isnan
from pathlib import Path
from typing import Any, Literal

from ralf.kernels import history
from ralf.kernels.artifact import (
    Artifact,
    ArtifactError,
    NotFound,
    open_artifact,
    point,
    resolve,
    sweep,
    versions,
)
from ralf.kernels.atomic_files import Damaged, flush_folder, locked, unused
from ralf.kernels.manifest import held_out_family
from ralf.kernels.plans import covers

KEEP = 3
"""Newest versions that collecting leaves alone."""
RECENT = 5
"""Last promotions whose versions collecting leaves alone."""


@dataclass(frozen=True)
class Gate:
    """One question at a promotion."""

    name: Literal["engines", "metrics", "golden"]
    asked: str
    came: str
    passed: bool
    advice: str = ""
    """How to go on where it did not pass."""

    def __str__(self) -> str:
        mark = "passed" if self.passed else "REFUSED"
        advice = f"; {self.advice}" if self.advice and not self.passed else ""
        return f"{self.name} {mark}: asked {self.asked}; came {self.came}{advice}"


class Refused(ArtifactError):
    """A gate did not pass."""

    def __init__(self, label: str, gates: Collection[Gate]) -> None:
        self.gates = tuple(gates)
        shut = " | ".join(str(gate) for gate in gates if not gate.passed)
        super().__init__(f"{label} was not promoted: {shut}; --force overrides and records it")


Prove = Callable[[Artifact], Gate]


def promote(
    models_dir: Path | str,
    name: str,
    version: str,
    *,
    force: bool = False,
    prove: Prove | None = None,
) -> tuple[Artifact, tuple[Gate, ...]]:
    """Make a version the promoted one if every gate passes, or all the same when forced."""
    root = Path(models_dir)
    artifact = resolve(root, f"{name}@{version}")
    before = history.current(root / name)
    gates = weigh(root, artifact, prove=prove)
    shut = [gate for gate in gates if not gate.passed]
    if shut and not force:
        raise Refused(artifact.label, gates)
    remark = "forced past " + " | ".join(map(str, shut)) if shut else ""
    with locked(root / name):
        if history.current(root / name) != before:
            raise ArtifactError(
                f"{name} was promoted by somebody else meanwhile, to "
                f"{history.current(root / name)}; promote again to be weighed against it"
            )
        point(root / name, artifact, remark)
    return artifact, gates


def weigh(
    models_dir: Path | str, artifact: Artifact, *, prove: Prove | None = None
) -> tuple[Gate, ...]:
    """What each gate says of this version in place of the promoted one."""
    return (
        _engines(artifact),
        _metrics(artifact, _promoted(Path(models_dir), artifact.name)),
        (prove or golden_gate)(artifact),
    )


def _promoted(root: Path, name: str) -> Artifact | None:
    """The version to be replaced; None where there is none, or it is past reading."""
    now = history.current(root / name)
    if now is None:
        return None
    with suppress(Damaged):
        return open_artifact(root / name / now)
    return None


def _engines(artifact: Artifact) -> Gate:
    targets = artifact.manifest.targets
    asked = f"engines for {', '.join(targets) or 'nothing'}"
    try:
        lacking = {target: found for target in targets if not (found := covers(artifact, target))}
    except (ValueError, Damaged) as error:
        return Gate("engines", asked, str(error), False, "mend the manifest or build again")
    if not lacking:
        return Gate("engines", asked, "all", True)
    came = "; ".join(f"{target}: {found.reason}" for target, found in lacking.items())
    return Gate("engines", asked, came, False)


def _metrics(artifact: Artifact, against: Artifact | None) -> Gate:
    if against is None or against.version == artifact.version:
        return Gate("metrics", "nothing: no other version in place that reads", "nothing", True)
    margins = artifact.manifest.margins
    ours, theirs = figures(artifact.manifest.metrics), figures(against.manifest.metrics)
    floors = {
        name: value - margin
        for pattern, margin in margins.items()
        for name, value in theirs.items()
        if fnmatchcase(name, pattern)
    }
    if not floors:
        asked = f"{', '.join(margins) or 'nothing'} of {against.version}"
        came = f"{against.version} has none of them: nothing to compare"
        return Gate("metrics", asked, came, True)
    new, old = (held_out_family(each.manifest.trained) for each in (artifact, against))
    unseen = sorted(name for name in floors if name.endswith("held out"))
    if new != old and unseen:
        asked = f"{', '.join(unseen)} on the family {old}, which {against.version} held out"
        advice = f"train with data.held_out={old}: figures on two families cannot be compared"
        return Gate("metrics", asked, f"figures on the family {new}", False, advice)
    worse = {name for name, floor in floors.items() if not ours.get(name, -inf) >= floor}
    shown = sorted(worse or floors)  # what is fine needs no words beside what is not
    beside = against.version
    asked = ", ".join(f"{n} at least {floors[n]:.4f} ({beside}: {theirs[n]:.4f})" for n in shown)
    came = ", ".join(f"{n} {f'{ours[n]:.4f}' if n in ours else 'not measured'}" for n in shown)
    advice = "train further, or measure it on the same test data: ralf evaluate"
    return Gate("metrics", asked, came, not worse, advice)


def figures(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Every figure by name, dots leading inwards; of [value, low, high] the value."""
    found: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            found |= figures(value, f"{prefix}{name}.")
            continue
        first = value[0] if isinstance(value, list | tuple) and value else value
        if isinstance(first, int | float) and not isinstance(first, bool) and not isnan(first):
            found[prefix + name] = float(first)
    return found


def golden_gate(artifact: Artifact) -> Gate:
    """Every golden crop through the torch engine on the CPU, in FP32: on any machine the same."""
    from ralf.kernels.engine import EngineError, budget_of, check_golden, load

    asked = "logits of golden.npz as the reference says them"
    try:
        asked += f", within {budget_of(artifact, 'fp32'):g}"
        error = check_golden(load(artifact, "cpu", precision="fp32", golden_crops=1))
    except EngineError as failure:
        return Gate("golden", asked, str(failure), False, "publish the model again")
    return Gate("golden", asked, f"within {error:.6f}", True)


# what may go


@dataclass(frozen=True)
class Place:
    """What collecting makes of one version."""

    version: str
    kept: str
    """Why it stays; empty where it goes."""
    bytes: int = 0


def collect(
    models_dir: Path | str,
    name: str,
    *,
    keep: int = KEEP,
    recent: int = RECENT,
    spared: Mapping[str, str] | None = None,
    apply: bool = False,
) -> list[Place]:
    """What stays and what goes, oldest first; with `apply` it has gone afterwards.

    spared: versions (or their first digits) that stay, each with the reason.
    """
    folder = Path(models_dir) / name
    if not versions(models_dir, name):
        raise NotFound(f"no model {name!r} in {models_dir}")
    with locked(folder):
        if apply:
            sweep(folder)
        rule = _rule(folder, versions(models_dir, name), keep, recent, spared or {})
        return [_visit(folder / version, why, apply) for version, why in rule.items()]


def _rule(
    folder: Path, have: list[str], keep: int, recent: int, spared: Mapping[str, str]
) -> dict[str, str]:
    """Each version, oldest first, with why it stays."""
    past = [event.version for event in history.events(folder)]
    rule = dict.fromkeys(have, "")
    for prefix, why in spared.items():
        rule |= {v: why for v in have if prefix and v.startswith(prefix)}
    rule |= dict.fromkeys(have[-keep:] if keep > 0 else [], f"among the {keep} newest")
    lately = set(past[-recent:] if recent > 0 else [])
    rule |= {v: f"in the last {recent} promotions" for v in have if v in lately}
    now = history.current(folder)
    return rule | ({now: "promoted"} if now in rule else {})


def _visit(path: Path, why: str, apply: bool) -> Place:
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    place = Place(path.name, why, size)
    if why:
        return place
    with unused(path) as free:
        if not free:
            return replace(place, kept="held by a running process")
        if apply:
            remove(path)
    return place


def remove(path: Path) -> None:
    """Take a version away, all of it at once; the caller holds the lock on the model's folder."""
    gone = path.with_name(f".old-{path.name}")
    path.rename(gone)
    flush_folder(gone.parent)
    shutil.rmtree(gone)
