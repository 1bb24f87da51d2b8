"""The people in the clip: a row for each track, and the strongest frames with their residual."""

import re

from ralf.worker.contract import Evidence, Label, Picture, Track, Verdict
from ralf.worker.page.charts import axis, line
from ralf.worker.page.markup import Html, foreign, join, section, tag
from ralf.worker.wording import LABEL_WORDS, clock, score_text

STRONGEST = 6
JPEG_BASE64 = re.compile(r"/9j/[A-Za-z0-9+/]+={0,2}")
"""Anything else in a picture's place is left out: it would not be a picture."""


def tracks(verdict: Verdict, evidence: Evidence) -> list[Html]:
    if not verdict.tracks:
        return []
    residuals = any(picture.residual for picture in evidence.pictures)
    switch = tag(
        "label",
        tag("input", type="checkbox"),
        "Show on the thumbnails where the residual is strong",
        class_="switch",
    )
    rows = [_track(track, place, verdict, evidence) for place, track in enumerate(verdict.tracks)]
    return [
        section(
            "faces",
            "Faces",
            tag(
                "p",
                "Each face followed through the clip: one dot for each look, shaded where it "
                "stays at or above the threshold, hollow where it is too small to count.",
                class_="lead",
            ),
            switch if residuals else None,
            tag("div", *rows),
        )
    ]


def _track(track: Track, place: int, verdict: Verdict, evidence: Evidence) -> Html:
    forged_at, low = verdict.threshold.forged_at, verdict.threshold.authentic_below
    own = tuple(segment for segment in verdict.segments if segment.track_id == track.track_id)
    value: str = "no score"
    label: Label = "inconclusive"
    if track.score is not None:
        value = f"score {score_text(track.score, low, forged_at)}"
        label, _ = verdict.threshold.decide(track.score)
    seen = f"{track.faces} faces, {clock(track.start_ms)} to {clock(track.end_ms)}"
    pictures = sorted(
        (one for one in evidence.pictures if one.track_id == track.track_id),
        key=lambda one: one.time_ms,
    )
    thumbs = [tag("li", _thumb(picture)) for picture in pictures if _shows(picture.face)]
    return tag(
        "article",
        tag(
            "div",
            tag("h3", "Track ", foreign(track.track_id), id=f"track-{place}"),
            tag("span", value, class_=f"value {label}"),
            tag("span", LABEL_WORDS[label] if track.decisive else "May not decide", class_=label),
            tag("span", seen, class_="soft"),
            class_="track-head",
        ),
        tag("p", "Why not: ", foreign(track.reason), ".", class_="soft") if track.reason else None,
        tag(
            "div",
            tag(
                "div", tag("div", line(track, own, verdict), class_="plot"), axis(verdict.timeline)
            ),
            tag("ul", *thumbs, class_="thumbs") if thumbs else None,
            class_="track-body",
        ),
        class_="track",
        aria_labelledby=f"track-{place}",
    )


def _shows(base64_jpeg: str | None) -> bool:
    return base64_jpeg is not None and JPEG_BASE64.fullmatch(base64_jpeg) is not None


def _image(base64_jpeg: str, words: str, kind: str | None = None) -> Html:
    source = f"data:image/jpeg;base64,{base64_jpeg}"
    return tag("img", src=source, alt=words, class_=kind, width=256, height=256)


def _thumb(picture: Picture) -> Html:
    words = f"{picture.track_id} at {clock(picture.time_ms)}"
    residual = None
    if picture.residual is not None and _shows(picture.residual):
        residual = _image(picture.residual, f"residual of {words}", "residual")
    return join(residual, _image(picture.face, words, "plain"))


def strongest(verdict: Verdict, evidence: Evidence) -> list[Html]:
    usable = [picture for picture in evidence.pictures if _shows(picture.face)]
    if not usable:
        if not verdict.tracks:
            return []
        return [
            section(
                "strongest", "Strongest frames", tag("p", "No pictures were kept.", class_="lead")
            )
        ]
    best = sorted(usable, key=lambda picture: -picture.score)[:STRONGEST]
    return [
        section(
            "strongest",
            "Strongest frames",
            tag(
                "p",
                "The faces with the highest scores. Beside each, in orange, where what the network "
                "rebuilt differs most from what it saw: a hint where to look, not a mask of the "
                "forgery.",
                class_="lead",
            ),
            tag("div", *(_figure(picture, verdict) for picture in best), class_="frames"),
        )
    ]


def _figure(picture: Picture, verdict: Verdict) -> Html:
    words = f"{picture.track_id} at {clock(picture.time_ms)}"
    images = [_image(picture.face, f"Face of {words}")]
    if picture.residual is not None and _shows(picture.residual):
        images.append(_image(picture.residual, f"Residual over the face of {words}"))
    return tag(
        "figure",
        tag("div", *images, class_="pair"),
        tag(
            "figcaption",
            tag("b", score_text(picture.score, verdict.threshold.forged_at)),
            " · ",
            foreign(picture.track_id),
            f" · {clock(picture.time_ms)}",
        ),
    )
