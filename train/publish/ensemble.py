"""Several published models become one that judges by the mean of their scores.

The members' weights are taken as they are, each with its calibration; the mean gets a calibration
of its own.  The ensemble is a model like any other: it is verified, promoted, built and served the
same way.

It refuses members whose crops are cut in different ways, since all of them score the same crop, and
members whose faces are pooled in different ways.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from ralf.kernels.artifact import Artifact, golden
from ralf.kernels.artifact import publish as write_version
from ralf.kernels.engine_torch import pack, restore
from ralf.kernels.manifest import Manifest, Network, held_out_family
from ralf.kernels.networks import build
from ralf.train.evaluate.judge import JudgedModel, model_of_network
from ralf.train.publish.calibrate import Calibrated
from ralf.train.publish.version import with_calibration
from ralf.train.recipe import seen_families
from ralf.train.recipe_text import differences


class EnsembleError(ValueError):
    """These models cannot make one ensemble."""


def draft_ensemble(members: Sequence[Artifact], name: str) -> tuple[Manifest, nn.Module]:
    """The ensemble's manifest, uncalibrated, and its network with the members' weights."""
    if len(members) < 2:
        raise EnsembleError(f"an ensemble has two members or more, got {len(members)}")
    # One crop is cut for all of them, so the first member's input contract must be everybody's.
    for other in members[1:]:
        refuse_unlike(members[0], other)
    first = members[0].manifest
    listed = [
        {
            "name": member.label,
            "network": member.manifest.network.model_dump(),
            "temperature": member.manifest.calibration.temperature,
            "shift": member.manifest.calibration.shift,
        }
        for member in members
    ]
    chosen = Network.model_validate(
        {"build": "ensemble", "size": first.input.size, "members": listed}
    )
    network = build(chosen.build, **chosen.dimensions).eval()
    for detector, member in zip(network.detectors, members, strict=True):  # type: ignore[arg-type]
        whole = restore(member.manifest, member.read("weights.safetensors"))
        detector.load_state_dict(whole.state_dict())
    manifest = Manifest(
        name=name,
        network=chosen,
        input=first.input,
        files={},
        aggregation=first.aggregation,
        policy=first.policy,
        error_budget={"logit": max(m.manifest.error_budget["logit"] for m in members)},
        targets=first.targets,
        trained={
            "recipe": "ensemble",
            "members": [member.label for member in members],
            "held_out": _unseen_by_all(members),
            "families": _seen_by_any(members),
        },
        untrained=any(member.manifest.untrained for member in members),
    )
    return manifest, network


def publish_ensemble(
    members: Sequence[Artifact], name: str, models: Path, calibrated: Calibrated | None = None
) -> Artifact:
    """The ensemble as a new version of the named model; golden crops are the first member's."""
    manifest, network = draft_ensemble(members, name)
    crops = golden(members[0]).crops
    draft, files = pack(network, with_calibration(manifest, calibrated), crops)
    text = _card(draft, members)
    return write_version(models, draft, {**files, "card.md": text.encode()})


def judge_of_members(members: Sequence[Artifact], name: str) -> JudgedModel:
    """The ensemble before it is published, to calibrate it by."""
    manifest, network = draft_ensemble(members, name)
    judge = model_of_network(name, network, manifest.input)
    return replace(judge, aggregation=manifest.aggregation, trained=manifest.trained)


def refuse_unlike(one: Artifact, other: Artifact) -> None:
    """EnsembleError where two models cut crops or pool faces in different ways."""
    for what in ("input", "aggregation"):
        unlike = differences(getattr(one.manifest, what), getattr(other.manifest, what))
        if unlike:
            raise EnsembleError(
                f"{one.label} and {other.label} differ in {what}: {'; '.join(unlike)}; an "
                "ensemble shows one crop to all its members and pools their mean"
            )


def _unseen_by_all(members: Sequence[Artifact]) -> str | None:
    """The family that every member held out; None where they differ, so that none is unseen."""
    families = {held_out_family(member.manifest.trained) for member in members}
    return families.pop() if len(families) == 1 else None


def _seen_by_any(members: Sequence[Artifact]) -> list[str]:
    """Every family that a member was trained on."""
    seen = [seen_families(member.manifest.trained) for member in members]
    return list(dict.fromkeys(family for families in seen for family in families))


def _card(draft: Manifest, members: Sequence[Artifact]) -> str:
    fitted = draft.calibration
    rows = [
        f"| {m.label} | {m.manifest.network.build} | {m.manifest.calibration.temperature:.4g} | "
        f"{m.manifest.calibration.shift:.4g} | {m.manifest.calibration.fitted_on} |"
        for m in members
    ]
    about = (
        "Scores faces by the mean of several detectors. What each was trained on, how well it does "
        "and where it fails is on its own card; nothing more is known about their mean."
    )
    formula = f"sigmoid((logit − {fitted.shift:.4g}) / {fitted.temperature:.4g})"
    lines = [
        f"# {draft.name}",
        "",
        *(
            ["**Untrained: a member was never trained, so these scores mean nothing.**", ""]
            * draft.untrained
        ),
        about,
        "",
        "| member | network | temperature | shift | fitted on |",
        "|---|---|---|---|---|",
        *rows,
        "",
        "logit = mean of (member's logit − shift) / temperature",
        "",
        f"P(forged) = {formula}, fitted on {fitted.fitted_on}.",
        *(f"- `{name}` {score:.4f}" for name, score in sorted(draft.thresholds.items())),
    ]
    if not draft.thresholds:
        lines.append("- no thresholds were fitted: `ralf calibrate` fits them")
    return "\n".join(lines) + "\n"
