"""The page's three drawings as inline SVG: the score's band, the strip over time, a track's line.

Positions along time are percentages and heights are pixels, so the drawings stretch with the page
without stretching their lines and patterns.  Colour is never alone: height, hatching, a dashed
threshold and words say the same.  Blue to orange, which the colour-blind tell apart.
"""

from collections.abc import Iterator
from itertools import groupby, pairwise
from statistics import median

from ralf.worker.contract import Segment, Threshold, Timeline, Track, Verdict
from ralf.worker.page.markup import Html, join, tag
from ralf.worker.wording import clock, score_text

STRIP_PX = 96
LINE_PX = 64
PAD_PX = 5

RGB = tuple[int, int, int]
BLUE, PALE_BLUE = (33, 102, 172), (171, 205, 230)
PALE_GREY, WARM_GREY = (214, 219, 224), (228, 218, 205)
PALE_ORANGE, ORANGE = (250, 184, 108), (179, 71, 0)


def heat(score: float, threshold: Threshold) -> str:
    """The score's colour: blue below the band, grey inside, orange from the threshold on."""
    low, forged_at = threshold.authentic_below, threshold.forged_at
    if score >= forged_at:
        return _between(PALE_ORANGE, ORANGE, score - forged_at, 1 - forged_at)
    if score < low:
        return _between(BLUE, PALE_BLUE, score, low)
    return _between(PALE_GREY, WARM_GREY, score - low, forged_at - low)


def _between(start: RGB, end: RGB, done: float, whole: float) -> str:
    part = done / whole if whole > 0 else 1.0
    mixed = (round(a + (b - a) * part) for a, b in zip(start, end, strict=True))
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def percent(part: float, whole: float) -> str:
    """A position along the clip."""
    return f"{100 * min(max(part / whole, 0.0), 1.0):.3f}%"


def scale(verdict: Verdict) -> Html:
    """The band from 0 to 1: where the verdict changes, and where this score lies."""
    low, forged_at = verdict.threshold.authentic_below, verdict.threshold.forged_at
    zones = (("authentic", 0.0, low), ("open", low, forged_at), ("forged", forged_at, 1.0))
    drawn = [
        tag(
            "rect",
            class_=f"zone {name}",
            x=percent(start, 1),
            width=percent(end - start, 1),
            y=26,
            height=10,
        )
        for name, start, end in zones
    ]
    edges = sorted({low, forged_at})
    drawn += [
        tag("line", class_="edge", x1=percent(at, 1), x2=percent(at, 1), y1=22, y2=40)
        for at in edges
    ]
    label = f"From 0 to 1; likely forged from {forged_at:g}."
    if verdict.score is not None:
        at, words = percent(verdict.score, 1), score_text(verdict.score, low, forged_at)
        side = "start" if verdict.score < 0.15 else "end" if verdict.score > 0.85 else "middle"
        drawn += [
            tag("line", class_="needle", x1=at, x2=at, y1=20, y2=42),
            tag("text", f"score {words}", class_="needle-text", x=at, y=14, text_anchor=side),
        ]
        label += f" This score is {words}."
    return _drawing(44, label, *drawn)


def strip(verdict: Verdict) -> Html:
    """The clip in bins: a bar as high and as warm as its strongest face."""
    line, threshold = verdict.timeline, verdict.threshold
    bars = [_bar(line, start, end, threshold) for start, end in _alike(line)]
    height = _height(threshold.forged_at, STRIP_PX)
    mark = tag("line", class_="bar-line", x1="0%", x2="100%", y1=height, y2=height)
    return _drawing(STRIP_PX, _strip_words(verdict), _patterns(), *bars, mark)


def _alike(line: Timeline) -> Iterator[tuple[int, int]]:
    """Runs of bins that look the same, from start up to but not including end."""
    start = 0
    for _, run in groupby(zip(line.score, line.faces, strict=True), key=_kind):
        end = start + len(list(run))
        yield start, end
        start = end


def _kind(one: tuple[float | None, int | None]) -> object:
    score, faces = one
    return score if score is not None else "unseen" if faces is None else "none" if not faces else 1


def _bar(line: Timeline, start: int, end: int, threshold: Threshold) -> Html:
    score, faces = line.score[start], line.faces[start]
    bins = len(line.faces)
    when = f"{clock(start * line.bin_ms)} to {clock(end * line.bin_ms)}"
    top, fill, words = 0.0, "", ""
    if score is not None:
        top, fill = _height(score, STRIP_PX), heat(score, threshold)
        words = f"score {score_text(score, threshold.forged_at)}"
    elif faces is None:
        fill, words = "url(#not-sampled)", "not sampled"
    elif faces == 0:
        fill, words = "url(#no-face)", "no face"
    else:
        fill, words = "url(#not-counted)", "faces that do not count"
    return tag(
        "rect",
        tag("title", f"{when}: {words}"),
        x=percent(start, bins),
        width=percent(end - start, bins),
        y=f"{top:.1f}",
        height=f"{STRIP_PX - top:.1f}",
        fill=fill,
    )


def _height(score: float, height: int) -> float:
    """y of a score: 1 at the top, 0 just above the ground, so that a low bar is still seen."""
    return PAD_PX + (1 - score) * (height - 2 * PAD_PX)


def _patterns() -> Html:
    """What fills the bins without a score; defined once, used by the legend too."""
    hatch = tag("path", class_="hatch", d="M-2,2 l4,-4 M0,8 l8,-8 M6,10 l4,-4")
    return tag(
        "defs",
        _pattern("no-face", tag("rect", class_="hatch-ground", width=8, height=8), hatch),
        _pattern("not-sampled", tag("rect", class_="unseen", width=8, height=8)),
        _pattern(
            "not-counted",
            tag("rect", class_="hatch-ground", width=8, height=8),
            tag("circle", class_="dot", cx=4, cy=4, r=1.4),
        ),
    )


def _pattern(name: str, *inside: Html) -> Html:
    return tag("pattern", *inside, id=name, width=8, height=8, patternUnits="userSpaceOnUse")


def _strip_words(verdict: Verdict) -> str:
    line = verdict.timeline
    scored = [(score, place) for place, score in enumerate(line.score) if score is not None]
    if not scored:
        return "No face was scored at any time."
    best, place = max(scored)
    unseen = sum(faces is None for faces in line.faces) / len(line.faces)
    return (
        f"Strongest score over time: {score_text(best, verdict.threshold.forged_at)} at "
        f"{clock(place * line.bin_ms)}; {unseen:.0%} of the clip was not sampled."
    )


def legend(threshold: Threshold) -> Html:
    """What the strip's fills mean, in words beside a swatch of each."""
    low, forged_at = threshold.authentic_below, threshold.forged_at
    entries = [
        (f"at or above {forged_at:g}", heat((1 + forged_at) / 2, threshold)),
        *(
            [(f"{low:g} to {forged_at:g}", heat((low + forged_at) / 2, threshold))]
            if low < forged_at
            else []
        ),
        (f"below {low:g}", heat(low / 3, threshold)),
        ("no face", "url(#no-face)"),
        ("faces too small", "url(#not-counted)"),
        ("not sampled", "url(#not-sampled)"),
    ]
    swatch = [
        tag(
            "li",
            tag(
                "svg",
                tag("rect", width=16, height=16, fill=fill),
                width=16,
                height=16,
                aria_hidden="true",
            ),
            words,
        )
        for words, fill in entries
    ]
    return tag("ul", *swatch, class_="legend")


def axis(timeline: Timeline) -> Html:
    """Five times under a drawing; tenths where the clip is short."""
    span_ms = timeline.bin_ms * len(timeline.faces)
    digits = 1 if span_ms < 40_000 else 0
    marks = [tag("span", clock(span_ms * part // 4, digits)) for part in range(5)]
    return tag("div", *marks, class_="axis", aria_hidden="true")


def line(track: Track, segments: tuple[Segment, ...], verdict: Verdict) -> Html:
    """One track's scores over the whole clip; its segments shaded, its uncounted faces hollow."""
    span = max(len(verdict.timeline.faces) * verdict.timeline.bin_ms, 1)
    threshold = verdict.threshold
    shades = [
        tag(
            "rect",
            class_="shade",
            x=percent(segment.start_ms, span),
            width=percent(segment.end_ms - segment.start_ms, span),
            height=LINE_PX,
        )
        for segment in segments
    ]
    height = _height(threshold.forged_at, LINE_PX)
    mark = tag("line", class_="bar-line", x1="0%", x2="100%", y1=height, y2=height)
    dots = [
        tag(
            "circle",
            class_="face" if sample.counted else "face small",
            cx=percent(sample.time_ms, span),
            cy=f"{_height(sample.score, LINE_PX):.1f}",
            r=3,
            fill=heat(sample.score, threshold) if sample.counted else "none",
        )
        for sample in track.samples
    ]
    words = (
        f"{track.faces} faces from {clock(track.start_ms)} to {clock(track.end_ms)}; "
        f"highest {score_text(track.score_max, threshold.forged_at)}."
    )
    return _drawing(LINE_PX, words, *shades, mark, _polyline(track, span), *dots)


def _polyline(track: Track, span: int) -> Html:
    """The dots joined, but not over a time when the face was away."""
    gaps = [later.time_ms - sample.time_ms for sample, later in pairwise(track.samples)]
    longest = 3.5 * median(gaps) if gaps else 0
    pieces: list[list[str]] = [[]]
    for place, sample in enumerate(track.samples):
        if place and gaps[place - 1] > longest:
            pieces.append([])
        x = 1000 * sample.time_ms / span
        pieces[-1].append(f"{x:.1f},{_height(sample.score, LINE_PX):.1f}")
    lines = [
        tag("polyline", points=" ".join(points), vector_effect="non-scaling-stroke")
        for points in pieces
    ]
    return tag(
        "svg",
        *lines,
        class_="joined",
        viewBox=f"0 0 1000 {LINE_PX}",
        preserveAspectRatio="none",
        width="100%",
        height=LINE_PX,
    )


def _drawing(height: int, words: str, *inside: Html) -> Html:
    return tag("svg", join(*inside), role="img", aria_label=words, width="100%", height=height)
