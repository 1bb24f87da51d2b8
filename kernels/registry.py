"""Which version of a model is promoted, what may replace it, and which old versions may go.

    models/NAME/current    the promoted version, one line, replaced atomically
    models/NAME/history    one line an event, oldest first: version, time, event, remark

`promote` runs these checks, and each reports what was asked and what was found:

    engines   every target that the manifest declares has its engine
    metrics   no figure falls below the promoted version's by more than the manifest's margin
    limits    no figure is above the manifest's limit
    residual  (RALF with two streams) AUC falls when the residual is closed
    golden    the torch engine's logits on golden.npz are the reference's, within the budget

`force` overrides a check that fails; the history then keeps what it reported.  If another process
promotes a version between the checks and our own move, ours is refused.  `point_to` moves the
pointer without any check.

The history only grows, so a forced promotion stays on record.  A rollback is found by replaying the
events: a promotion pushes a version on a stack, a rollback pops one.  The event is written before
`current`.  If a process dies between the two, the last event names a version that `current` does
not; such an event did not happen, and the next writer removes it.

`collect` removes old versions.  It keeps the promoted one, the newest few, those of the last few
promotions, those that the caller spares (a waiting job pins them), and those that a running process
holds open (a file lock shows that).  With and without `apply` it computes the same list, so what it
shows is what it removes.

This file imports no torch; only the golden check does, when it runs.
"""

import shutil
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from math import inf, isnan
from pathlib import Path
from typing import Any, Literal

from ralf.kernels.artifact import (
    CURRENT,
    HISTORY,
    VERSION,
    Artifact,
    ArtifactError,
    Damaged,
    NotFound,
    current,
    open_artifact,
    resolve,
    sweep,
    versions,
)
from ralf.kernels.atomic_files import flush_folder, locked, replace_lines, unused
from ralf.kernels.manifest import held_out_family
from ralf.kernels.plans import covers

KEEP = 3
"""The newest versions, so many, are not removed."""
RECENT = 5
"""The versions of the last promotions, so many, are not removed."""
Kind = Literal["promoted", "rolled_back"]
_KINDS: dict[str, Kind] = {"promoted": "promoted", "rolled_back": "rolled_back"}


@dataclass(frozen=True)
class Event:
    """One line of the history: the promoted version changed."""

    version: str
    """The promoted version afterwards."""
    at: str = ""
    """UTC; empty where `current` is there and no history."""
    kind: Kind = "promoted"
    remark: str = ""
    """Which checks were overridden, and what they reported."""

    def line(self) -> str:
        """The line on disk."""
        # A tab or a line break in a remark would be read as another field or event.
        return "\t".join((self.version, self.at, self.kind, " ".join(self.remark.split())))

    @classmethod
    def parse(cls, line: str) -> "Event | None":
        """From a line; None where the line does not begin with a version."""
        # An older release wrote the version alone.
        version, at, kind, remark = (*line.rstrip("\n").split("\t"), "", "", "")[:4]
        if not VERSION.fullmatch(version):
            return None
        return cls(version, at, _KINDS.get(kind, "promoted"), remark)


def events(folder: Path) -> list[Event]:
    """The history, oldest first, without an event whose writer died before it wrote `current`."""
    now = current(folder)
    if now is None:
        return []
    path = folder / HISTORY
    lines = path.read_text().splitlines() if path.exists() else []
    written = [event for event in map(Event.parse, lines) if event is not None]
    # From the end, to keep as much as leads to the version that `current` names.
    for count in range(len(written), 0, -1):
        if promoted_stack(written[:count])[-1:] == [now]:
            return written[:count]
    return [Event(now)]


def promoted_stack(past: list[Event]) -> list[str]:
    """The versions that rollbacks would lead through; the last is the current one."""
    stack: list[str] = []
    for event in past:
        if event.kind == "rolled_back":
            stack = stack[:-1]
        elif stack[-1:] != [event.version]:
            stack = [*stack, event.version]
    return stack


def record(folder: Path, version: str, kind: Kind, remark: str = "") -> None:
    """Make a version the promoted one; the caller holds the folder's lock."""
    at = datetime.now(UTC).isoformat(timespec="seconds")
    past = [*events(folder), Event(version, at, kind, remark)]
    # The history first: an event without its `current` can be recognised, the reverse cannot.
    replace_lines(folder / HISTORY, [event.line() for event in past])
    replace_lines(folder / CURRENT, [version])


# promotion


def point_to(models_dir: Path | str, name: str, version: str, *, remark: str = "") -> Artifact:
    """Make a version the promoted one without asking any check; its files are verified first."""
    root = Path(models_dir)
    artifact = resolve(root, f"{name}@{version}")
    with locked(root / name):
        _point(root / name, artifact, remark)
    return artifact


def _point(folder: Path, artifact: Artifact, remark: str = "") -> None:
    # The caller holds the lock.  Promoting the current version again is no event.
    if current(folder) != artifact.version:
        record(folder, artifact.version, "promoted", remark)


def rollback(models_dir: Path | str, name: str) -> Artifact:
    """Go back to the version promoted before the current one; it is verified first."""
    folder = Path(models_dir) / name
    if not folder.is_dir():
        raise NotFound(f"no model {name!r} in {models_dir}")
    with locked(folder):
        past = promoted_stack(events(folder))
        if len(past) < 2:
            now = past[-1] if past else "none"
            raise NotFound(f"{name}: nothing was promoted before the current version ({now})")
        if not (folder / past[-2]).is_dir():
            raise NotFound(f"{name}: the version before, {past[-2]}, was removed; promote another")
        artifact = open_artifact(folder / past[-2])
        record(folder, artifact.version, "rolled_back")
    return artifact


@dataclass(frozen=True)
class PromotionCheck:
    """One question at a promotion, and the answer."""

    name: Literal["engines", "metrics", "limits", "residual", "golden"]
    asked: str
    came: str
    passed: bool
    advice: str = ""
    """What to do if the check failed."""

    def __str__(self) -> str:
        mark = "passed" if self.passed else "REFUSED"
        advice = f"; {self.advice}" if self.advice and not self.passed else ""
        return f"{self.name} {mark}: asked {self.asked}; came {self.came}{advice}"


class NotPromoted(ArtifactError):
    """A check failed."""

    def __init__(self, label: str, checks: Collection[PromotionCheck]) -> None:
        self.checks = tuple(checks)
        failed = " | ".join(str(check) for check in checks if not check.passed)
        super().__init__(f"{label} was not promoted: {failed}; --force overrides and records it")


GoldenCheck = Callable[[Artifact], PromotionCheck]


def promote(
    models_dir: Path | str,
    name: str,
    version: str,
    *,
    force: bool = False,
    golden: GoldenCheck | None = None,
) -> tuple[Artifact, tuple[PromotionCheck, ...]]:
    """Make a version the promoted one if every check passes, or with `force` all the same."""
    root = Path(models_dir)
    artifact = resolve(root, f"{name}@{version}")
    # The checks run the network, so they do not hold the lock; another process's promotion
    # meanwhile shows by this value.
    before = current(root / name)
    checks = check(root, artifact, golden=golden)
    failed = [each for each in checks if not each.passed]
    if failed and not force:
        raise NotPromoted(artifact.label, checks)
    remark = "forced past " + " | ".join(map(str, failed)) if failed else ""
    with locked(root / name):
        if current(root / name) != before:
            raise ArtifactError(
                f"{name} was promoted by another process meanwhile, to "
                f"{current(root / name)}; promote again, to be compared with that version"
            )
        _point(root / name, artifact, remark)
    return artifact, checks


def check(
    models_dir: Path | str, artifact: Artifact, *, golden: GoldenCheck | None = None
) -> tuple[PromotionCheck, ...]:
    """What each check finds about this version in place of the promoted one."""
    return (
        _engines(artifact),
        _metrics(artifact, _promoted(Path(models_dir), artifact.name)),
        _limits(artifact),
        *_residual(artifact),
        (golden or check_golden_logits)(artifact),
    )


def _promoted(root: Path, name: str) -> Artifact | None:
    """The version to be replaced; None where there is none, or where its files are damaged."""
    now = current(root / name)
    if now is None:
        return None
    # A damaged version must not prevent the promotion that replaces it.
    with suppress(Damaged):
        return open_artifact(root / name / now)
    return None


def _engines(artifact: Artifact) -> PromotionCheck:
    targets = artifact.manifest.targets
    asked = f"engines for {', '.join(targets) or 'nothing'}"
    try:
        lacking = {target: found for target in targets if not (found := covers(artifact, target))}
    except (ValueError, Damaged) as error:
        advice = "correct the manifest or build again"
        return PromotionCheck("engines", asked, str(error), False, advice)
    if not lacking:
        return PromotionCheck("engines", asked, "all", True)
    came = "; ".join(f"{target}: {found.reason}" for target, found in lacking.items())
    return PromotionCheck("engines", asked, came, False)


def _metrics(artifact: Artifact, against: Artifact | None) -> PromotionCheck:
    if against is None or against.version == artifact.version:
        return PromotionCheck(
            "metrics", "nothing: no other version in place that reads", "nothing", True
        )
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
        return PromotionCheck("metrics", asked, came, True)
    new, old = (held_out_family(each.manifest.trained) for each in (artifact, against))
    unseen = sorted(name for name in floors if name.endswith("held out"))
    if new != old and unseen:
        asked = f"{', '.join(unseen)} on the family {old}, which {against.version} held out"
        advice = f"train with data.held_out={old}: figures on two families cannot be compared"
        return PromotionCheck("metrics", asked, f"figures on the family {new}", False, advice)
    # A figure that was not measured for this version counts as worse.
    worse = {name for name, floor in floors.items() if not ours.get(name, -inf) >= floor}
    shown = sorted(worse or floors)  # the figures that are good enough would only hide the others
    beside = against.version
    asked = ", ".join(f"{n} at least {floors[n]:.4f} ({beside}: {theirs[n]:.4f})" for n in shown)
    came = ", ".join(f"{n} {f'{ours[n]:.4f}' if n in ours else 'not measured'}" for n in shown)
    advice = "train further, or measure it on the same test data: ralf evaluate"
    return PromotionCheck("metrics", asked, came, not worse, advice)


def _limits(artifact: Artifact) -> PromotionCheck:
    """Figures that no version may exceed, whatever was promoted before."""
    limits, found = artifact.manifest.limits, figures(artifact.manifest.metrics)
    measured = {
        name: most
        for pattern, most in limits.items()
        for name in found
        if fnmatchcase(name, pattern)
    }
    if not measured:
        asked = ", ".join(limits) or "nothing"
        return PromotionCheck("limits", asked, "none of them was measured", True)
    high = {name: most for name, most in measured.items() if found[name] > most}
    asked = ", ".join(f"{name} at most {most:g}" for name, most in (high or measured).items())
    came = ", ".join(f"{name} {found[name]:.4f}" for name in high or measured)
    advice = "train on more kinds of people, or calibrate with them among the reals"
    return PromotionCheck("limits", asked, came, not high, advice)


def _residual(artifact: Artifact) -> tuple[PromotionCheck, ...]:
    """A RALF of two streams is promoted under that name only where its residual is at work."""
    if artifact.manifest.network.dimensions.get("sees") != "bands":
        return ()
    asked = "closing the residual costs AUC on the family held out, its 95 % interval above 0"
    measured = artifact.manifest.metrics.get("residual", {}).get("closed", {})
    cost = measured.get("costs held out")
    came, passed = "not measured", False
    if isinstance(cost, list | tuple) and len(cost) == 3 and None not in cost:
        came, passed = f"{cost[0]:+.4f} [{cost[1]:+.4f}, {cost[2]:+.4f}]", cost[1] > 0
    advice = (
        "ralf retrain measures it; or publish the classifier inside: ralf publish RUN "
        "--without-residual"
    )
    return (PromotionCheck("residual", asked, came, passed, "" if passed else advice),)


def figures(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Every figure by its name, nested ones as outer.inner; of [value, low, high] the value."""
    found: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            found |= figures(value, f"{prefix}{name}.")
            continue
        first = value[0] if isinstance(value, list | tuple) and value else value
        # True and False are ints in Python.
        if isinstance(first, int | float) and not isinstance(first, bool) and not isnan(first):
            found[prefix + name] = float(first)
    return found


def check_golden_logits(artifact: Artifact) -> PromotionCheck:
    """Every golden crop through the torch engine on the CPU in FP32: the same on any machine."""
    from ralf.kernels.choose_engine import load
    from ralf.kernels.engine import EngineError, budget_of, check_golden

    asked = "logits of golden.npz as the reference says them"
    try:
        asked += f", within {budget_of(artifact, 'fp32'):g}"
        error = check_golden(load(artifact, "cpu", precision="fp32", golden_crops=1))
    except EngineError as failure:
        return PromotionCheck("golden", asked, str(failure), False, "publish the model again")
    return PromotionCheck("golden", asked, f"within {error:.6f}", True)


# removing old versions


@dataclass(frozen=True)
class CollectedVersion:
    """One version: kept or removed, and why."""

    version: str
    kept: str
    """Why it is kept; empty where it is removed."""
    bytes: int = 0


def collect(
    models_dir: Path | str,
    name: str,
    *,
    keep: int = KEEP,
    recent: int = RECENT,
    spared: Mapping[str, str] | None = None,
    apply: bool = False,
) -> list[CollectedVersion]:
    """Which versions are kept and which are not, oldest first; `apply` removes the latter.

    spared: versions (or their first digits) to keep, each with the reason.
    """
    folder = Path(models_dir) / name
    if not versions(models_dir, name):
        raise NotFound(f"no model {name!r} in {models_dir}")
    with locked(folder):
        if apply:
            sweep(folder)
        reasons = _reasons(folder, versions(models_dir, name), keep, recent, spared or {})
        return [_collect_one(folder / version, why, apply) for version, why in reasons.items()]


def _reasons(
    folder: Path, have: list[str], keep: int, recent: int, spared: Mapping[str, str]
) -> dict[str, str]:
    """Each version, oldest first, with why it is kept."""
    past = [event.version for event in events(folder)]
    # A later reason replaces an earlier one, so the strongest is shown, and promoted comes last.
    reasons = dict.fromkeys(have, "")
    for prefix, why in spared.items():
        # An empty prefix would keep every version.
        reasons |= {v: why for v in have if prefix and v.startswith(prefix)}
    # [-0:] would be all of them.
    reasons |= dict.fromkeys(have[-keep:] if keep > 0 else [], f"among the {keep} newest")
    lately = set(past[-recent:] if recent > 0 else [])
    reasons |= {v: f"in the last {recent} promotions" for v in have if v in lately}
    now = current(folder)
    return reasons | ({now: "promoted"} if now in reasons else {})


def _collect_one(path: Path, why: str, apply: bool) -> CollectedVersion:
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    found = CollectedVersion(path.name, why, size)
    if why:
        return found
    # Removed while the lock is held: a process that opens the version now gets an error.
    with unused(path) as free:
        if not free:
            return replace(found, kept="held by a running process")
        if apply:
            remove(path)
    return found


def remove(path: Path) -> None:
    """Remove a version in one step; the caller holds the lock on the model's folder."""
    # No version has such a name, so it is not opened half removed; `sweep` finds it after a crash.
    gone = path.with_name(f".old-{path.name}")
    path.rename(gone)
    flush_folder(gone.parent)
    shutil.rmtree(gone)
