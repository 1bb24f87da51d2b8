"""A verdict and its evidence as one HTML file that a person can check, print and send on.

The page reads these two documents and nothing else.  It fetches nothing: style, script and
pictures are inside, and its own Content-Security-Policy forbids the rest.  It reads whole without
scripting; the one script (page/page.js) only saves a reviewer's labels as a file.

That file is a `ralf.review/1` document (ralf.worker.contract.Review, docs/review.schema.json): the
decision (confirm, overturn, second_review), a note, and for each track real, forged or unsure,
wrong_face, poor_quality, and where its faces lie in the file named by media_sha256, so that
training can cut them again.  A track that the reviewer did not touch is `unsure`.
"""

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files

from ralf.worker.contract import Evidence, Verdict
from ralf.worker.page.charts import axis, legend, scale, strip
from ralf.worker.page.markup import Html, data, foreign, join, section, tag
from ralf.worker.page.provenance import groups
from ralf.worker.page.review import draft, form
from ralf.worker.page.tracks import strongest, tracks
from ralf.worker.wording import LABEL_WORDS, clock, score_text

NOTICE = (
    "This is an automated assessment, not proof. It says how much the faces look like forgeries "
    "that the model knows; it can be wrong either way. A person should look before anyone acts."
)


def page(verdict: Verdict, evidence: Evidence) -> str:
    """The whole page."""
    style, script = _asset("page.css"), _asset("page.js")
    title = f"{LABEL_WORDS[verdict.label]} · {_subject(verdict)}"
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="robots", content="noindex"),
        tag("title", title),
        tag("style", style),
    )
    body = tag(
        "body",
        tag("main", *_sections(verdict, evidence)),
        tag("script", data(draft(verdict)), type="application/json", id="review-draft"),
        tag("script", script),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _sections(verdict: Verdict, evidence: Evidence) -> list[Html]:
    return [
        _header(verdict),
        *_warnings(verdict),
        _over_time(verdict),
        *tracks(verdict, evidence),
        *strongest(verdict, evidence),
        *_segments(verdict),
        section("review", "Review", *form(verdict)),
        section("provenance", "How this was made", tag("div", *groups(verdict), class_="made")),
        tag(
            "footer",
            f"Ralf {verdict.made.ralf} · {verdict.schema_} · finished ",
            verdict.finished_at.isoformat(timespec="seconds"),
        ),
    ]


@cache
def _asset(name: str) -> Html:
    return Html(files("ralf.worker.page").joinpath(name).read_text(encoding="utf-8"))


def _hash(source: str) -> str:
    digest = hashlib.sha256(source.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _subject(verdict: Verdict) -> str:
    return verdict.tag or verdict.job_id or f"file {verdict.media.sha256[:12]}"


def _header(verdict: Verdict) -> Html:
    score = None
    if verdict.label != "no_faces":
        score = tag("div", scale(verdict), _band_words(verdict), class_="band")
    return tag(
        "header",
        tag("p", "Automated assessment of ", foreign(_subject(verdict)), class_="kicker"),
        tag("h1", LABEL_WORDS[verdict.label]),
        *_cautions(verdict),
        score,
        tag("p", foreign(verdict.reason), class_="reason"),
        tag("p", NOTICE, class_="notice"),
        _facts(verdict),
        class_=verdict.label,
    )


def _band_words(verdict: Verdict) -> Html:
    low, forged_at = verdict.threshold.authentic_below, verdict.threshold.forged_at
    words = [
        "calibrated P(forged)" if verdict.score is not None else "no face may decide: no score",
        f"likely authentic below {low:g}",
        f"likely forged from {forged_at:g}",
        f"policy {verdict.threshold.policy}",
    ]
    return tag("ul", *(tag("li", word) for word in words), class_="band-words")


def _cautions(verdict: Verdict) -> list[Html]:
    """What a reader must know before the verdict itself."""
    said = []
    if any(warning.startswith("untrained_model") for warning in verdict.warnings):
        said.append("The model was never trained. Its scores mean nothing; this is a dry run.")
    if verdict.partial:
        said.append("Partial: this speaks only for what had been looked at when it was written.")
    return [tag("p", tag("strong", words), class_="caution", role="note") for words in said]


def _facts(verdict: Verdict) -> Html:
    made, session = verdict.made, verdict.session
    facts: list[tuple[str, object]] = [
        ("Length", clock(verdict.media.duration_ms)),
        (
            "Frames looked at",
            f"{made.frames_decoded + made.frames_replaced} of {made.frames_asked}",
        ),
        ("Faces scored", made.faces),
        ("Tracks", len(verdict.tracks)),
        ("Model", f"{made.model} {made.version}"),
    ]
    if session is not None:
        facts.insert(0, ("Stream", f"{session.session_id}, segment {session.number}"))
        facts.insert(1, ("Begins at", clock(session.offset_ms)))
    rows = [tag("div", tag("dt", name), tag("dd", foreign(value))) for name, value in facts]
    return tag("dl", *rows, class_="facts")


def _warnings(verdict: Verdict) -> list[Html]:
    if not verdict.warnings:
        return []
    rows = []
    for warning in verdict.warnings:
        code, colon, words = warning.partition(": ")
        named = colon and re.fullmatch(r"[a-z0-9_]+", code)
        said = join(foreign(words), " ", tag("code", code)) if named else foreign(warning)
        rows.append(tag("li", said))
    return [section("noted", "Warnings", tag("ul", *rows, class_="warnings"))]


def _over_time(verdict: Verdict) -> Html:
    step_s = verdict.timeline.bin_ms / 1000
    lead = f"The strongest face at each moment, in steps of {step_s:g} s. Dashed: the threshold."
    return section(
        "over-time",
        "Over time",
        tag("p", lead, class_="lead"),
        tag("div", tag("div", strip(verdict), class_="plot"), axis(verdict.timeline)),
        legend(verdict.threshold),
    )


def _segments(verdict: Verdict) -> list[Html]:
    if not verdict.tracks:
        return []
    heading = "Stretches at or above the threshold"
    if not verdict.segments:
        return [section("stretches", heading, tag("p", "None.", class_="lead"))]
    names = ("From", "To", "Track", "Score", "Peak at")
    rows = [
        tag(
            "tr",
            tag("td", clock(segment.start_ms), class_="time"),
            tag("td", clock(segment.end_ms), class_="time"),
            tag("td", foreign(segment.track_id)),
            tag("td", score_text(segment.score, verdict.threshold.forged_at)),
            tag("td", clock(segment.peak_ms), class_="time"),
            tag("td", f"{(segment.end_ms - segment.start_ms) / 1000:.3f} s", class_="time length"),
        )
        for segment in verdict.segments
    ]
    last = tag("th", "Length", scope="col", class_="length")
    table = tag(
        "table",
        tag("thead", tag("tr", *(tag("th", name, scope="col") for name in names), last)),
        tag("tbody", *rows),
    )
    return [section("stretches", heading, tag("div", table, class_="scroll"))]
