"""The page: whole in one file, true to the verdict, and safe whatever is put into it."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ralf.worker.contract import Evidence, ModelFigures, Picture, Review, SessionPart, Verdict
from ralf.worker.page.charts import heat
from ralf.worker.page.page import NOTICE, UNSHOWABLE, environment, page
from ralf.worker.wording import LABEL_WORDS, clock, score_text
from tests import verdicts

ROOT = Path(__file__).resolve().parent.parent
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
SAMPLES = {
    "likely_forged": verdicts.forged,
    "likely_authentic": verdicts.authentic,
    "inconclusive": verdicts.undecided,
    "no_faces": verdicts.faceless,
}
HOSTILE = (
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</title></style><svg/onload=alert(1)>",
    "<!-- ]]> & &lt; ' \N{RIGHT-TO-LEFT OVERRIDE}gpj.exe \x00\x1b",
)


class Reader(HTMLParser):
    """What a browser would see: elements with their attributes, text by element, nesting."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((name, dict(attributes)))
        if name not in {"img", "input", "meta"}:
            self.open.append(name)

    def handle_startendtag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((name, dict(attributes)))

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name

    def handle_data(self, words: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", words))

    def of(self, name: str) -> list[dict[str, str | None]]:
        """The attributes of every element of that name."""
        return [attributes for found, attributes in self.elements if found == name]

    def text(self, *without: str) -> str:
        """All words that a person can read."""
        hidden = {"script", "style", "title", *without}
        return " ".join(words for name, words in self.texts if name not in hidden)

    def inside(self, name: str) -> list[str]:
        """The text of every element of that name."""
        return [words for found, words in self.texts if found == name]


def read(verdict: Verdict, evidence: Evidence | None = None) -> Reader:
    """The page of a verdict, with its sample pictures unless told."""
    return Reader(page(verdict, verdicts.evidence(verdict) if evidence is None else evidence))


@pytest.fixture(params=sorted(SAMPLES))
def sample(request: pytest.FixtureRequest) -> Verdict:
    """A verdict of each label."""
    verdict: Verdict = SAMPLES[request.param]()
    assert verdict.label == request.param
    return verdict


# One file, whole by itself


def test_nothing_is_fetched(sample: Verdict):
    """Every reference is inside the file, and the page's own policy forbids any other."""
    source = page(sample, verdicts.evidence(sample))
    seen = Reader(source)

    for name, attributes in seen.elements:
        for key in ("src", "href", "action", "srcset", "poster", "data", "formaction"):
            value = attributes.get(key)
            assert value is None or value.startswith("data:image/jpeg;base64,"), (name, key)
        for value in attributes.values():
            assert set(re.findall(r"url\(([^)]*)", value or "")) <= {
                "#no-face",
                "#not-sampled",
                "#not-counted",
            }
    assert "http://" not in source
    assert "https://" not in source
    assert "@import" not in source
    assert not set(dict.fromkeys(name for name, _ in seen.elements)) & {"link", "iframe", "object"}
    assert "default-src 'none'" in str(seen.of("meta")[1]["content"])


def test_the_policy_allows_this_script_and_style_and_no_other(sample: Verdict):
    """By their hashes; scripts that are data need none."""
    seen = read(sample)
    policy = str(seen.of("meta")[1]["content"])
    scripts = [words for name, words in seen.texts if name == "script"]
    styles = seen.inside("style")

    assert seen.of("script") == [{"type": "application/json", "id": "review-draft"}, {}]
    for rule, words in (("script-src", scripts[1]), ("style-src", styles[0])):
        digest = base64.b64encode(hashlib.sha256(words.encode()).digest()).decode()
        assert f"{rule} 'sha256-{digest}'" in policy
    assert not [a for _, a in seen.elements if "style" in a]


def test_elements_nest_and_ids_are_unique(sample: Verdict):
    """Every label, pattern and heading that is pointed at is there once."""
    seen = read(sample)
    ids = [attributes["id"] for _, attributes in seen.elements if "id" in attributes]
    pointed = [a["aria-labelledby"] for _, a in seen.elements if "aria-labelledby" in a]
    fills = re.findall(r"url\(#([^)]*)\)", " ".join(a.get("fill") or "" for _, a in seen.elements))

    assert seen.open == []
    assert len(ids) == len(set(ids))
    assert {*pointed, *fills} <= set(ids)


def test_headings_and_pictures_can_be_heard(sample: Verdict):
    """One h1, no level skipped, words for every picture and drawing."""
    seen = read(sample)
    levels = [int(name[1]) for name, _ in seen.elements if re.fullmatch(r"h[1-6]", name)]

    assert levels.count(1) == 1 and levels[0] == 1
    assert all(later - level <= 1 for level, later in pairwise(levels))
    assert all(attributes["alt"] for attributes in seen.of("img"))
    assert all(a["aria-label"] for a in seen.of("svg") if a.get("role") == "img")
    assert seen.of("html") == [{"lang": "en"}]
    assert any("width=device-width" in str(meta.get("content")) for meta in seen.of("meta"))


# True to the verdict


def test_the_verdict_is_said_in_words_with_its_notice(sample: Verdict):
    """Not a number alone, and always as an automated assessment."""
    seen = read(sample)

    assert [LABEL_WORDS[sample.label]] == seen.inside("h1")
    assert NOTICE in seen.text()
    assert sample.reason in seen.text()
    for warning in sample.warnings:
        assert warning.partition(": ")[2] in seen.text()


def test_the_score_shown_is_the_verdicts(sample: Verdict):
    """With the threshold beside it; none where there is none."""
    seen = read(sample)
    found = re.findall(r"^score (.*)$", "\n".join(seen.inside("text")), re.MULTILINE)

    wanted = [] if sample.score is None else [f"{sample.score:.2f}"]
    assert wanted == found
    if sample.label != "no_faces":
        assert f"likely forged from {sample.threshold.forged_at:g}" in seen.text()


def test_every_track_has_a_row_with_its_score_and_a_dot_for_each_sample():
    """In the verdict's order; a track that may not decide says why."""
    verdict = verdicts.forged()
    seen = read(verdict)
    values = [
        "no score" if t.score is None else f"score {score_text(t.score)}" for t in verdict.tracks
    ]
    spans = [words for words in seen.inside("span") if re.match(r"(no )?score\b", words)]
    small = [a for a in seen.of("circle") if a.get("class") == "face small"]
    dots = [a for a in seen.of("circle") if str(a.get("class")).startswith("face")]

    assert values == spans
    assert len(dots) == sum(len(track.samples) for track in verdict.tracks)
    assert len(small) == sum(not s.counted for track in verdict.tracks for s in track.samples) > 0
    assert "It may not decide:" in seen.text()
    assert str(verdict.tracks[2].reason) in seen.text()


def test_segments_stand_in_the_table_to_the_millisecond():
    """mm:ss.mmm, from, to and peak."""
    verdict = verdicts.forged()
    seen = read(verdict)
    times = [words for words in seen.inside("td") if re.fullmatch(r"\d\d:\d\d\.\d{3}", words)]

    assert len(verdict.segments) >= 1
    assert times == [
        clock(at) for s in verdict.segments for at in (s.start_ms, s.end_ms, s.peak_ms)
    ]
    assert seen.text().count("Stretches at or above") == 1


@pytest.mark.parametrize(
    ("time_ms", "text"),
    [(0, "00:00.000"), (61_007, "01:01.007"), (3_723_456, "1:02:03.456"), (999, "00:00.999")],
)
def test_times_read_as_minutes_and_seconds(time_ms: int, text: str):
    """Hours only where there are any."""
    assert text == clock(time_ms)


def test_the_strip_says_what_the_timeline_says(sample: Verdict):
    """Its bars, laid end to end, are the timeline's bins: scored, empty, unseen."""
    seen = read(sample)
    line = sample.timeline
    found: list[str] = []
    for words in seen.inside("title")[1:]:
        when, what = words.split(": ", 1)
        start, end = (_milliseconds(part) for part in when.split(" to "))
        found += [what] * ((end - start) // line.bin_ms)

    wanted = [
        f"score {score_text(score)}"
        if score is not None
        else {None: "not sampled", 0: "no face"}.get(faces, "faces that do not count")
        for score, faces in zip(line.score, line.faces, strict=True)
    ]
    assert wanted == found


def _milliseconds(text: str) -> int:
    minutes, seconds = text.split(":")
    return int(minutes) * 60_000 + round(float(seconds) * 1000)


def test_provenance_names_file_model_and_walk(sample: Verdict):
    """Hashes whole, versions, and the time of each stage."""
    words = read(sample).text()
    made, media = sample.made, sample.media

    for fact in (
        media.sha256,
        made.manifest_sha256,
        made.weights_sha256,
        made.version,
        made.engine,
        made.precision,
        made.device,
        made.decoder,
        made.colour_policy,
        media.codec,
    ):
        assert fact in words
    assert f"{media.width} × {media.height}" in words
    for stage, spent in made.stages_ms.items():
        assert stage.capitalize() in words
        assert f"{spent:,.1f} ms" in words


def test_the_strongest_faces_are_shown_large():
    """Six at most, strongest first."""
    verdict = verdicts.forged()
    seen = read(verdict, verdicts.evidence(verdict).model_copy(update={"frames": ()}))

    best = sorted((p.score for p in verdicts.evidence(verdict).pictures), reverse=True)[:6]
    assert [score_text(score) for score in best] == seen.inside("b")


@pytest.mark.parametrize(
    ("auc", "shown"), [(None, False), (0.5, False), (0.749, False), (0.75, True)]
)
def test_residuals_are_shown_only_where_the_verdict_proves_their_worth(
    auc: float | None, shown: bool
):
    """Also where older evidence has them: orange on a face reads as a finding."""
    verdict = verdicts.forged()
    figures = ModelFigures(residual_auc=auc)
    made = verdict.made.model_copy(update={"figures": figures})
    seen = read(verdict.model_copy(update={"made": made}), verdicts.evidence(verdict))

    alts = [str(a["alt"]) for a in seen.of("img")]
    assert (sum(alt.startswith("Residual over") for alt in alts) == 6) == shown
    assert any("esidual" in alt for alt in alts) == ("esidual" in seen.text()) == shown


def test_the_whole_frame_has_a_named_box_for_each_face():
    """Boxes lie where the verdict has them; the caption has each track's score."""
    verdict = verdicts.forged()
    seen = read(verdict)
    (frame,) = verdicts.evidence(verdict).frames
    boxes = [a for a in seen.of("rect") if str(a.get("class")).startswith("box ")]
    names = [words for words in seen.inside("text") if words.startswith("t")]

    assert ["t1", "t2", "t3"] == names
    for drawn, face in zip(boxes, frame.faces, strict=True):
        assert float(str(drawn["x"])) == pytest.approx(face.box.left * 640, abs=0.06)
        assert float(str(drawn["height"])) == pytest.approx(
            (face.box.bottom - face.box.top) * 360, abs=0.11
        )
    assert ["box likely_forged", "box likely_authentic", "box inconclusive"] == [
        a["class"] for a in boxes
    ]
    assert seen.inside("b")[:3] == [score_text(t.score) for t in verdict.tracks[:2]] + ["no score"]
    (picture,) = (a for a in seen.of("img") if str(a["alt"]).startswith("Whole frame"))
    assert str(picture["alt"]).endswith("t1, t2, t3")


def test_a_verdict_and_evidence_of_an_older_version_still_make_a_page():
    """Without whole frames, the model's figures, views and passes."""
    verdict = verdicts.forged()
    old = json.loads(verdict.model_dump_json(by_alias=True))
    del old["made"]["figures"], old["made"]["frames_by_pass"]
    for track in old["tracks"]:
        for one in track["samples"]:
            del one["view"], one["second_pass"]
    pictures = json.loads(verdicts.evidence(verdict).model_dump_json(by_alias=True))
    del pictures["frames"]

    seen = read(Verdict.model_validate(old), Evidence.model_validate(pictures))

    assert "Who was seen" not in seen.inside("h2")
    assert "is not known from this verdict" in seen.text()
    assert "3 people" in seen.text() and "sampled frames" in seen.text()


def test_a_page_without_pictures_is_whole(sample: Verdict):
    """Thumbnails were not wanted, or are gone after their seven days."""
    seen = read(sample, Evidence())

    assert seen.of("img") == []
    assert ("No pictures were kept." in seen.text()) == bool(sample.tracks)


@pytest.mark.skipif(BROWSER is None, reason="there is no chromium to print with")
def test_a_verdict_prints_on_three_pages_at_most(tmp_path: Path):
    """With two people, a third too small, pictures of all, warnings and a segment."""
    verdict = verdicts.forged()
    (tmp_path / "page.html").write_text(page(verdict, verdicts.evidence(verdict)))
    subprocess.run(
        [
            str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu",
            f"--user-data-dir={tmp_path / 'profile'}", "--no-pdf-header-footer",
            f"--print-to-pdf={tmp_path / 'page.pdf'}", (tmp_path / "page.html").as_uri(),
        ],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip

    pages = re.findall(rb"/Type\s*/Page\b", (tmp_path / "page.pdf").read_bytes())
    assert 1 <= len(pages) <= 3


def test_no_faces_shows_no_score_and_no_tracks():
    """Never a zero and never a half."""
    seen = read(verdicts.faceless())

    assert not re.search(r"\bscore \d", seen.text())
    assert seen.of("article") == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"partial": True}, "Partial: this speaks only for what had been looked at"),
        ({"warnings": ("untrained_model: never trained",)}, "Its scores mean nothing"),
        ({"session": SessionPart(session_id="live-7", number=3, offset_ms=12_000)}, "live-7"),
    ],
)
def test_what_a_reader_must_know_first_stands_in_the_header(changes: dict[str, Any], words: str):
    """Partial, untrained, a part of a stream."""
    plain, changed = verdicts.forged(), verdicts.forged().model_copy(update=changes)
    before, after = (page(v, Evidence()).split("</header>")[0] for v in (plain, changed))

    assert words not in before
    assert words in after


def test_a_long_and_crowded_verdict_stays_readable():
    """Four hours, bins of a minute, hours in the clock."""
    looked = [60.0 * n for n in range(240)]
    found = verdicts.scores([3.0] * 240, time_s=looked)
    judged = verdicts.judgement(found, looked, 14_400.0)

    seen = read(verdicts.verdict(judged, duration_s=14_400.0), Evidence())

    assert "4:00:00" in seen.inside("span")
    assert "not sampled" in seen.text()


# Safe


def hostile() -> tuple[Verdict, Evidence]:
    """Every string that comes from outside tries to break out."""
    plain = verdicts.forged()
    bad = " ".join(HOSTILE)
    tracks = tuple(
        track.model_copy(update={"track_id": bad + str(place), "reason": bad})
        for place, track in enumerate(plain.tracks)
    )
    verdict = plain.model_copy(
        update={
            "tag": bad,
            "tenant": bad,
            "reason": bad,
            "warnings": (*HOSTILE, f"code: {bad}", f"{bad}: x"),
            "tracks": tracks,
            "segments": tuple(s.model_copy(update={"track_id": bad}) for s in plain.segments),
            "threshold": plain.threshold.model_copy(update={"policy": bad}),
            "media": plain.media.model_copy(update={"container": bad, "codec": bad, "colour": bad}),
            "made": plain.made.model_copy(
                update={
                    "host": bad,
                    "finder": {bad: bad},
                    "detectors": {bad: 0.5},
                    "stages_ms": {bad: 1.0},
                }
            ),
        }
    )
    good = verdicts.face(0, heated=False)
    pictures = [
        Picture(track_id=bad + "0", time_ms=0, score=0.9, face=good, residual='/9j/" onload="x'),
        Picture(track_id=bad + "0", time_ms=0, score=0.9, face='x" onerror="alert(1)'),
        Picture(track_id=bad + "0", time_ms=0, score=0.9, face="PHN2Zz4="),
    ]
    return verdict, Evidence(pictures=tuple(pictures))


def test_hostile_strings_stay_text():
    """No element, no handler and no script comes from them; they are shown as they are."""
    verdict, evidence = hostile()
    calm = read(verdicts.forged(), Evidence())

    seen = read(verdict, evidence)

    assert seen.open == []
    assert len(seen.of("script")) == 2
    assert len(seen.of("style")) == len(seen.of("title")) - len(calm.of("title")) + 1 == 1
    assert not [key for _, a in seen.elements for key in a if key.startswith("on")]
    assert {name for name, _ in seen.elements} <= {name for name, _ in calm.elements} | {
        "img",
        "figure",
        "figcaption",
        "b",
        "p",
    }
    assert HOSTILE[0] in seen.text()
    assert {a["src"] for a in seen.of("img")} == {
        f"data:image/jpeg;base64,{verdicts.face(0, heated=False)}"
    }
    assert not UNSHOWABLE.search(page(verdict, evidence))


def test_hostile_strings_reach_the_labels_unharmed():
    """The script's data holds them, and cannot be ended by them."""
    verdict, evidence = hostile()
    source = page(verdict, evidence)

    draft = json.loads(read(verdict, evidence).inside("script")[0])

    assert draft["tag"] == verdict.tag
    assert [track["track_id"] for track in draft["tracks"]] == [t.track_id for t in verdict.tracks]
    assert "<script>alert" not in source
    assert source.count("</script>") == 2


@given(st.text())
@settings(deadline=None)
def test_any_text_comes_out_as_it_went_in(words: str):
    """As content and as an attribute, but for what no page can show."""
    template = environment().from_string('<p title="{{ words }}">{{ words }}</p>')
    seen = Reader(template.render(words=words))

    safe = UNSHOWABLE.sub("\N{REPLACEMENT CHARACTER}", words)
    assert "".join(seen.inside("p")) == safe
    assert seen.of("p") == [{"title": safe}]


@given(st.recursive(st.text() | st.none() | st.integers(), st.lists, max_leaves=5))
@settings(deadline=None)
def test_data_for_the_script_comes_back_and_holds_no_markup(value: Any):
    """Whatever is in it."""
    held = environment().from_string("{{ value | tojson }}").render(value=value)

    assert json.loads(held) == value
    assert not set("<>&") & set(held)


# A person's labels


def test_the_draft_becomes_a_review_that_training_can_read(sample: Verdict):
    """What the script adds is the decision, the labels, the note and the time."""
    draft = json.loads(read(sample).inside("script")[0])
    review = Review.model_validate(
        {**draft, "decision": "overturn", "note": "lips", "reviewed_at": "2025-11-20T08:00:00Z"}
    )

    assert (sample.media.sha256, sample.made.version) == (review.media_sha256, review.version)
    assert (sample.label, sample.score) == (review.label, review.score)
    assert [t.track_id for t in sample.tracks] == [t.track_id for t in review.tracks]
    for track, said in zip(sample.tracks, review.tracks, strict=True):
        assert said.label == "unsure"
        assert [(s.time_ms, s.frame, s.box) for s in track.samples] == [
            (f.time_ms, f.frame, f.box) for f in said.faces
        ]


def test_the_form_has_a_field_for_all_that_the_script_reads():
    """Names in the script and in the form are the same; the form needs the script to show."""
    verdict = verdicts.forged()
    seen = read(verdict)
    script = seen.inside("script")[1]
    names = {str(a["name"]) for a in (*seen.of("input"), *seen.of("textarea")) if "name" in a}
    read_by_script = set(re.findall(r"given\.(?:get|has)\([\"`]([a-z-]+)", script))

    assert {re.sub(r"\d+$", "", name) for name in names} == read_by_script
    assert {"label-0", "wrong-0", "poor-0", "label-2"} <= names
    assert set(re.findall(r"getElementById\(\"([^\"]+)\"", script)) <= {
        str(a.get("id")) for _, a in seen.elements
    }
    assert seen.of("form") == [{"id": "review-form", "hidden": None}]
    assert len(seen.of("noscript")) == 1


# Colour


def luminance(colour: str) -> float:
    """WCAG's relative luminance of #rrggbb."""
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    """WCAG's contrast ratio, 1 to 21."""
    bright, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def themes() -> Iterator[dict[str, str]]:
    """The colours by name: light, then dark."""
    css = (ROOT / "worker/page/page.css").read_text()
    for block in re.findall(r":root \{(.*?)\}", css, re.DOTALL):
        yield dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", block))


def test_text_stands_out_from_its_ground():
    """WCAG AA, in the light and in the dark."""
    found = list(themes())

    assert len(found) == 2
    for theme in found:
        for ink in ("ink", "soft", "forged", "authentic", "open"):
            assert contrast(theme[ink], theme["paper"]) >= 4.5, (ink, theme[ink])
        assert contrast(theme["ink"], theme["caution"]) >= 4.5


def test_the_hue_turns_at_the_threshold_and_darkens_above_it():
    """From blue to orange, the pair that the colour-blind tell apart."""
    threshold = verdicts.THRESHOLD
    cold, warm = heat(0.2, threshold), heat(0.8, threshold)

    assert int(cold[5:7], 16) > int(cold[1:3], 16)
    assert int(warm[1:3], 16) > int(warm[5:7], 16)
    strong = [luminance(heat(score, threshold)) for score in (0.62, 0.7, 0.8, 0.9, 1.0)]
    assert strong == sorted(strong, reverse=True)
