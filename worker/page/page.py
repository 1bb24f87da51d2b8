"""A verdict and its evidence as one HTML file that a person can check, print and send on.

The page reads these two documents and nothing else.  It loads nothing from anywhere: style, script
and pictures are inside the file, and its own Content-Security-Policy forbids the rest.  It can be
read in full without scripts; the one script (page.js) only saves a reviewer's labels as a file.

That file is a `ralf.review/1` document (ralf.worker.contract.Review, docs/review.schema.json): the
decision (confirm, overturn, second_review), a note, and for each track real, forged or unsure,
wrong_face, poor_quality, and where its faces are in the file named by media_sha256, so that
training can cut them again.  A track that the reviewer did not touch is `unsure`.

Here is what the page says; template.html is its layout, charts.py computes its drawings, words.py
writes the sentences about people, sampling and errors.  Jinja2 escapes every value, because file
names, tags and reasons may come from an attacker.
"""

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ralf.kernels.manifest import WORTH_SHOWING
from ralf.worker.contract import (
    Evidence,
    FaceAt,
    FaceInFrame,
    Picture,
    Track,
    TrackReview,
    Verdict,
    WholeFrame,
)
from ralf.worker.page import charts, words
from ralf.worker.wording import LABEL_WORDS, clock, digits_of, policy_text, score_text

NOTICE = (
    "This is an automated assessment, not proof. It says how much the faces look like forgeries "
    "that the model knows; it can be wrong either way. A person should look before anyone acts."
)
STRONGEST = 6
"""Pictures shown large."""
FACES_FOR_REVIEW = 32
"""Places kept per track in a review: as many as training samples."""
# /9j/ is how FF D8 FF, a JPEG's first bytes, begins in base64.
JPEG_BASE64 = re.compile(r"/9j/[A-Za-z0-9+/]+={0,2}")
"""Anything else in a picture's place is left out: it would not be a picture."""
UNSHOWABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
"""Control characters and half surrogates: no page can show them, and some browsers stop there."""


def page(verdict: Verdict, evidence: Evidence) -> str:
    """The whole page."""
    style, script = _asset("page.css"), _asset("page.js")
    digits = digits_of(verdict)
    pictures = _usable(evidence.pictures, residuals=_residuals_point(verdict))
    return (
        environment()
        .get_template("template.html")
        .render(
            verdict=verdict,
            subject=verdict.tag or verdict.job_id or f"file {verdict.media.sha256[:12]}",
            label_words=LABEL_WORDS,
            notice=NOTICE,
            style=Markup(style),
            script=Markup(script),
            policy=(
                # By hash, because 'unsafe-inline' would also run what an attacker had put into a
                # value.
                f"default-src 'none'; img-src data:; style-src {_hash(style)}; "
                f"script-src {_hash(script)}; base-uri 'none'; form-action 'none'"
            ),
            cautions=_cautions(verdict),
            facts=_facts(verdict),
            errors=words.errors(verdict),
            digits=digits,
            policy_words=policy_text(verdict.threshold.policy),
            warnings=[_split_warning(warning) for warning in verdict.warnings],
            frames=[
                _frame(frame, verdict, digits) for frame in evidence.frames if _is_jpeg(frame.jpeg)
            ],
            scale=charts.scale(verdict, digits),
            strip=charts.strip(verdict, digits),
            axis=charts.axis(verdict.timeline),
            legend=charts.legend(verdict.threshold, digits),
            tracks=[_track(track, verdict, pictures, digits) for track in verdict.tracks],
            has_residuals=any(picture.residual for picture in pictures),
            strongest=sorted(pictures, key=lambda picture: -picture.score)[:STRONGEST],
            provenance=_provenance(verdict),
            draft=review_draft(verdict),
        )
    )


@cache
def environment() -> Environment:
    """Jinja2 as the page needs it: everything escaped, a name that is missing is an error."""
    made = Environment(
        loader=PackageLoader("ralf.worker.page", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_showable,
    )
    made.filters |= {"clock": clock, "score": score_text}
    made.policies["json.dumps_kwargs"] = {}  # Jinja2 would sort the keys
    return made


def _showable(value: object) -> object:
    """What is put into the page: control characters become a visible mark."""
    if value is None:
        return ""
    # Style and script must stay as they are, or their hashes in the policy would not fit.
    if isinstance(value, Markup):
        return value
    return UNSHOWABLE.sub("\N{REPLACEMENT CHARACTER}", str(value))


@cache
def _asset(name: str) -> str:
    return files("ralf.worker.page").joinpath(name).read_text(encoding="utf-8")


def _hash(source: str) -> str:
    digest = hashlib.sha256(source.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _cautions(verdict: Verdict) -> list[str]:
    """What a reader must know before the verdict itself."""
    found = []
    if any(warning.startswith("untrained_model") for warning in verdict.warnings):
        found.append("The model was never trained. Its scores mean nothing; this is a dry run.")
    if verdict.partial:
        found.append("Partial: this speaks only for what had been looked at when it was written.")
    return found


def _facts(verdict: Verdict) -> list[tuple[str, object]]:
    """The short list under the verdict."""
    made, session = verdict.made, verdict.session
    facts: list[tuple[str, object]] = []
    if session is not None:
        facts.append(("Stream", f"{session.session_id}, segment {session.number}"))
        facts.append(("Begins at", clock(session.offset_ms)))
    return [
        *facts,
        ("Length", clock(verdict.media.duration_ms, 1)),
        ("Seen", words.seen(verdict)),
        ("Model", f"{made.model} {made.version}"),
    ]


def _split_warning(warning: str) -> tuple[str, str]:
    """A warning's code, empty where it has none, and its words."""
    code, colon, said = warning.partition(": ")
    if colon and re.fullmatch(r"[a-z0-9_]+", code):
        return code, said
    return "", warning


def _residuals_point(verdict: Verdict) -> bool:
    """Whether residuals were proved to point at forgeries; older verdicts do not say it."""
    figures = verdict.made.figures
    located = figures.residual_auc if figures else None
    return located is not None and located >= WORTH_SHOWING


def _frame(frame: WholeFrame, verdict: Verdict, digits: int) -> dict[str, Any]:
    """A whole frame with a box for each face, in pixels of the picture."""
    tracks = {track.track_id: track for track in verdict.tracks}
    return {
        "frame": frame,
        "boxes": [
            _box(face, tracks.get(face.track_id), frame, verdict, digits) for face in frame.faces
        ],
        # A name must be legible on a phone, where the frame is made smaller.
        "font_px": max(frame.width, frame.height) // 26,
    }


def _box(
    face: FaceInFrame, track: Track | None, frame: WholeFrame, verdict: Verdict, digits: int
) -> dict[str, Any]:
    left, right = face.box.left * frame.width, face.box.right * frame.width
    top, bottom = face.box.top * frame.height, face.box.bottom * frame.height
    score = track.score if track else None
    return {
        "name": face.track_id,
        # The track's, as everywhere else; the score of this one face may differ from it.
        "score": "no score" if score is None else score_text(score, digits),
        "label": "inconclusive" if score is None else verdict.threshold.decide(score),
        "x": round(left, 1),
        "y": round(top, 1),
        "width": round(max(right - left, 0), 1),
        "height": round(max(bottom - top, 0), 1),
    }


def _track(track: Track, verdict: Verdict, pictures: list[Picture], digits: int) -> dict[str, Any]:
    """One track's row: its score in words, its drawing, its thumbnails in order of time."""
    threshold = verdict.threshold
    value, label = "no score", "inconclusive"
    if track.score is not None:
        value = f"score {score_text(track.score, digits)}"
        label = threshold.decide(track.score)
    own = [segment for segment in verdict.segments if segment.track_id == track.track_id]
    shown = [one for one in pictures if one.track_id == track.track_id]
    return {
        "track": track,
        "value": value,
        "label": label,
        "note": words.track_note(track),
        "line": charts.line(track, own, verdict, digits),
        "pictures": sorted(shown, key=lambda one: one.time_ms),
    }


def _usable(pictures: Sequence[Picture], *, residuals: bool) -> list[Picture]:
    """Pictures with a face that is a JPEG; residuals that are none, or prove nothing, are left."""
    return [
        picture
        if residuals and _is_jpeg(picture.residual)
        else picture.model_copy(update={"residual": None})
        for picture in pictures
        if _is_jpeg(picture.face)
    ]


def _is_jpeg(base64_jpeg: str | None) -> bool:
    return base64_jpeg is not None and JPEG_BASE64.fullmatch(base64_jpeg) is not None


def _provenance(verdict: Verdict) -> list[tuple[str, list[tuple[str, object]]]]:
    """What the verdict was made of and with, in four groups of name and value."""
    media, made = verdict.media, verdict.made
    rate = "variable" if media.variable_rate else "constant"
    threshold = verdict.threshold.model_dump(include={"forged_at", "authentic_below"})
    return [
        (
            "File",
            [
                ("SHA-256", _hexadecimal(media.sha256)),
                ("Size", f"{media.size_bytes:,} bytes"),
                ("Container", media.container),
                ("Codec", f"{media.codec}, {media.pixel_format}, {media.colour}"),
                ("Frame", f"{media.width} × {media.height}, turned {media.rotation}°"),
                ("Frames", f"{media.frames} at {media.frame_rate:g}/s ({rate})"),
                ("Length", f"{media.duration_ms} ms"),
                ("Job", verdict.job_id or "none"),
                ("Tag", verdict.tag or "none"),
                ("Tenant", verdict.tenant or "none"),
            ],
        ),
        (
            "Model",
            [
                ("Name", f"{made.model} {made.version}"),
                ("Manifest", _hexadecimal(made.manifest_sha256)),
                ("Weights", _hexadecimal(made.weights_sha256)),
                *((f"· {name}", score_text(score)) for name, score in made.detectors.items()),
                ("Calibration", _settings_words(made.calibration)),
                ("Aggregation", _settings_words(made.aggregation)),
                ("Policy", f"{verdict.threshold.policy}: {_settings_words(threshold)}"),
            ],
        ),
        (
            "Walk",
            [
                ("Engine", f"{made.engine}, {made.precision}, {made.device}"),
                ("Decoder", f"{made.decoder}, {made.colour_policy}"),
                ("Sampling", _settings_words(made.sampling.model_dump())),
                ("Finder", _settings_words(made.finder)),
                ("Frames", f"{made.frames_asked} asked, {made.frames_decoded} decoded"),
                ("", f"{made.frames_replaced} replaced by a neighbour"),
                ("Host", f"{made.host}, attempt {made.attempt}"),
            ],
        ),
        (
            "Time",
            [
                *((name.capitalize(), f"{ms:,.1f} ms") for name, ms in made.stages_ms.items()),
                ("Together", f"{sum(made.stages_ms.values()):,.1f} ms"),
            ],
        ),
    ]


def _hexadecimal(digest: str) -> Markup:
    return Markup('<span class="hash">{}</span>').format(digest)


def _settings_words(values: dict[str, Any]) -> str:
    """Settings as words; what is not set is left out."""
    return ", ".join(
        f"{name} {_setting_text(value)}"
        for name, value in values.items()
        if value not in (None, (), [], "")
    )


def _setting_text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"  # the verdict has all digits
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def review_draft(verdict: Verdict) -> dict[str, Any]:
    """A ralf.review/1 document without what the person adds: decision, labels, note, time."""
    tracks = []
    for track in verdict.tracks:
        # Spread over the track, because the first faces alone would show one moment.
        step = max(1, -(-len(track.samples) // FACES_FOR_REVIEW))
        faces = tuple(
            FaceAt(time_ms=sample.time_ms, frame=sample.frame, box=sample.box)
            for sample in track.samples[::step]
        )
        review = TrackReview(
            track_id=track.track_id,
            label="unsure",
            score=track.score,
            start_ms=track.start_ms,
            end_ms=track.end_ms,
            faces=faces,
        )
        tracks.append(review.model_dump(mode="json"))
    return {
        "schema": "ralf.review/1",
        "job_id": verdict.job_id,
        "tag": verdict.tag,
        "media_sha256": verdict.media.sha256,
        "model": verdict.made.model,
        "version": verdict.made.version,
        "label": verdict.label,
        "score": verdict.score,
        "tracks": tracks,
    }
