"""A reviewer's part of the page: the form, and the draft of the labels that it fills in."""

from typing import Any

from ralf.worker.contract import FaceAt, TrackReview, Verdict
from ralf.worker.page.markup import Html, foreign, tag

FACES = 32
"""Places kept per track: as many as training samples."""
DECISIONS = (
    ("confirm", "Confirm the verdict"),
    ("overturn", "Overturn it"),
    ("second_review", "Needs a second review"),
)


def draft(verdict: Verdict) -> dict[str, Any]:
    """A ralf.review/1 document but for what the person adds: decision, labels, note, time."""
    tracks = []
    for track in verdict.tracks:
        step = max(1, -(-len(track.samples) // FACES))
        tracks.append(
            TrackReview(
                track_id=track.track_id,
                label="unsure",
                score=track.score,
                start_ms=track.start_ms,
                end_ms=track.end_ms,
                faces=tuple(
                    FaceAt(time_ms=sample.time_ms, frame=sample.frame, box=sample.box)
                    for sample in track.samples[::step]
                ),
            ).model_dump(mode="json")
        )
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


def form(verdict: Verdict) -> list[Html]:
    """The form is shown by the script, since without one it could not save."""
    lead = tag(
        "p",
        "Your labels are saved as a file on this device; nothing is sent. Training can read them.",
        class_="lead",
    )
    decision = tag(
        "fieldset",
        tag("legend", "The verdict"),
        tag("div", *(_radio("decision", *one, needed=True) for one in DECISIONS), class_="choices"),
    )
    note = tag(
        "label",
        "Note",
        tag("textarea", name="note", maxlength=4000, rows=3),
    )
    save = tag("p", tag("button", "Save labels as a file", type="submit"))
    saved = tag("p", id="review-saved", class_="soft", role="status")
    tracks = [_track(track.track_id, place) for place, track in enumerate(verdict.tracks)]
    return [
        lead,
        tag("noscript", tag("p", "Saving labels needs scripting; the rest of the page does not.")),
        tag("form", decision, *tracks, note, save, saved, id="review-form", hidden=True),
    ]


def _track(track_id: str, place: int) -> Html:
    return tag(
        "fieldset",
        tag("legend", "Track ", foreign(track_id)),
        tag(
            "div",
            _radio(f"label-{place}", "real", "Real"),
            _radio(f"label-{place}", "forged", "Forged"),
            _radio(f"label-{place}", "unsure", "Unsure", chosen=True),
            _check(f"wrong-{place}", "Wrong face"),
            _check(f"poor-{place}", "Poor quality"),
            class_="choices",
        ),
        class_="track-choices",
    )


def _radio(
    name: str, value: str, words: str, *, chosen: bool = False, needed: bool = False
) -> Html:
    box = tag("input", type="radio", name=name, value=value, checked=chosen, required=needed)
    return tag("label", box, words)


def _check(name: str, words: str) -> Html:
    return tag("label", tag("input", type="checkbox", name=name), words)
