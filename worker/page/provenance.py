"""What the verdict was made of and with: file, model, walk, time."""

import json
from typing import Any

from ralf.worker.contract import Verdict
from ralf.worker.page.markup import Html, foreign, join, tag
from ralf.worker.wording import score_text


def groups(verdict: Verdict) -> list[Html]:
    media, made = verdict.media, verdict.made
    rate = "variable" if media.variable_rate else "constant"
    total = sum(made.stages_ms.values())
    return [
        _group(
            "File",
            ("SHA-256", tag("span", media.sha256, class_="hash")),
            ("Size", f"{media.size_bytes:,} bytes"),
            ("Container", media.container),
            ("Codec", f"{media.codec}, {media.pixel_format}, {media.colour}"),
            ("Frame", f"{media.width} × {media.height}, turned {media.rotation}°"),
            ("Frames", f"{media.frames} at {media.frame_rate:g}/s ({rate})"),
            ("Length", f"{media.duration_ms} ms"),
            ("Job", verdict.job_id or "none"),
            ("Tag", verdict.tag or "none"),
            ("Tenant", verdict.tenant or "none"),
        ),
        _group(
            "Model",
            ("Name", f"{made.model} {made.version}"),
            ("Manifest", tag("span", made.manifest_sha256, class_="hash")),
            ("Weights", tag("span", made.weights_sha256, class_="hash")),
            *((f"· {name}", score_text(score)) for name, score in made.detectors.items()),
            ("Calibration", _plain(made.calibration)),
            ("Aggregation", _plain(made.aggregation)),
            ("Policy", f"{verdict.threshold.policy}: {_plain(_bounds(verdict))}"),
        ),
        _group(
            "Walk",
            ("Engine", f"{made.engine}, {made.precision}, {made.device}"),
            ("Decoder", f"{made.decoder}, {made.colour_policy}"),
            ("Sampling", _plain(made.sampling.model_dump(exclude_defaults=False))),
            ("Finder", _plain(made.finder)),
            ("Frames", f"{made.frames_asked} asked, {made.frames_decoded} decoded"),
            ("", f"{made.frames_replaced} replaced by a neighbour"),
            ("Host", f"{made.host}, attempt {made.attempt}"),
        ),
        _group(
            "Time",
            *((stage.capitalize(), f"{spent:,.1f} ms") for stage, spent in made.stages_ms.items()),
            ("Together", f"{total:,.1f} ms"),
        ),
    ]


def _bounds(verdict: Verdict) -> dict[str, float]:
    threshold = verdict.threshold
    return {"forged_at": threshold.forged_at, "authentic_below": threshold.authentic_below}


def _group(heading: str, *rows: tuple[str, object]) -> Html:
    inside = [join(tag("dt", foreign(name)), tag("dd", foreign(value))) for name, value in rows]
    return tag("div", tag("h3", heading), tag("dl", *inside))


def _plain(values: dict[str, Any]) -> str:
    """Settings as words; what is not set is left out."""
    said = (
        f"{name} {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}"
        for name, value in values.items()
        if value not in (None, (), [], "")
    )
    return ", ".join(said)
