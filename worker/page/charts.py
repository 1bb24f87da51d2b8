"""What the page's three drawings show: the score's scale, the strip over time, a track's line.

Here are positions, colours and words; template.html draws them as inline SVG.  Positions along
time are percentages and heights are pixels, so a drawing stretches with the page without
stretching its lines and patterns.  Colour is never alone: height, hatching, a dashed threshold
and words say the same.  Blue to orange is a pair that colour-blind people can tell apart.
"""

from collections.abc import Iterator
from itertools import groupby, pairwise
from statistics import median
from typing import NamedTuple

from ralf.worker.contract import Segment, Threshold, Timeline, Track, Verdict
from ralf.worker.wording import clock, score_text, side_text

STRIP_PX = 96
LINE_PX = 64
PADDING_PX = 5
GAP_STEPS = 3.5
"""Two dots further apart than so many usual steps are not joined: the face was away."""

RGB = tuple[int, int, int]
BLUE, PALE_BLUE = (33, 102, 172), (171, 205, 230)
PALE_GREY, WARM_GREY = (214, 219, 224), (228, 218, 205)
PALE_ORANGE, ORANGE = (250, 184, 108), (179, 71, 0)


class Span(NamedTuple):
    """A piece of the horizontal axis, with the name of its style."""

    name: str
    x: str
    width: str


class Needle(NamedTuple):
    """Where the score is on the scale."""

    x: str
    text: str
    anchor: str


class Scale(NamedTuple):
    """The scale from 0 to 1, its zones and this verdict's score."""

    zones: list[Span]
    edges: list[str]
    needle: Needle | None
    description: str


class Bar(NamedTuple):
    """One bar of the strip: a run of time bins that show the same."""

    x: str
    width: str
    y: str
    height: str
    fill: str
    title: str


class Strip(NamedTuple):
    """The clip in time bins, each as high and as warm as its strongest face."""

    bars: list[Bar]
    threshold_y: float
    description: str


class Dot(NamedTuple):
    """One sampled face."""

    x: str
    y: str
    fill: str
    counted: bool


class Line(NamedTuple):
    """One track's scores over the whole clip."""

    shades: list[Span]
    threshold_y: float
    polylines: list[str]
    dots: list[Dot]
    description: str


def heat(score: float, threshold: Threshold) -> str:
    """The score's colour: blue below the band, grey inside, orange from the threshold on."""
    low, forged_at = threshold.authentic_below, threshold.forged_at
    label = threshold.decide(score)
    if label == "likely_forged":
        return _between(PALE_ORANGE, ORANGE, score - forged_at, 1 - forged_at)
    if label == "likely_authentic":
        return _between(BLUE, PALE_BLUE, score, low)
    return _between(PALE_GREY, WARM_GREY, score - low, forged_at - low)


def _between(start: RGB, end: RGB, done: float, whole: float) -> str:
    # A threshold at 0 or 1, or without a grey band, leaves a range of no width.
    part = done / whole if whole > 0 else 1.0
    mixed = (round(a + (b - a) * part) for a, b in zip(start, end, strict=True))
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def percent(part: float, whole: float) -> str:
    """A position along the clip."""
    return f"{100 * min(max(part / whole, 0.0), 1.0):.3f}%"


def scale(verdict: Verdict, digits: int) -> Scale:
    """The scale from 0 to 1: where the label changes, and where this score is."""
    low, forged_at = verdict.threshold.authentic_below, verdict.threshold.forged_at
    zones = (("authentic", 0.0, low), ("open", low, forged_at), ("forged", forged_at, 1.0))
    description, needle = f"From 0 to 1; likely forged from {forged_at:.{digits}f}.", None
    if verdict.score is not None:
        text = score_text(verdict.score, digits)
        # Near an end of the scale the text would leave the page if it were centred.
        anchor = "start" if verdict.score < 0.15 else "end" if verdict.score > 0.85 else "middle"
        needle = Needle(percent(verdict.score, 1), text, anchor)
        description += f" This score is {text}."
    return Scale(
        zones=[
            Span(name, percent(start, 1), percent(end - start, 1)) for name, start, end in zones
        ],
        edges=[percent(at, 1) for at in sorted({low, forged_at})],
        needle=needle,
        description=description,
    )


def strip(verdict: Verdict, digits: int) -> Strip:
    """The clip in time bins."""
    timeline, threshold = verdict.timeline, verdict.threshold
    return Strip(
        bars=[
            _bar(timeline, start, end, threshold, digits) for start, end in _equal_runs(timeline)
        ],
        threshold_y=_height(threshold.forged_at, STRIP_PX),
        description=_strip_words(verdict, digits),
    )


def _equal_runs(timeline: Timeline) -> Iterator[tuple[int, int]]:
    """Runs of bins that show the same, from start up to but not including end."""
    start = 0
    for _, run in groupby(zip(timeline.score, timeline.faces, strict=True), key=_shows):
        end = start + len(list(run))
        yield start, end
        start = end


def _shows(one: tuple[float | None, int | None]) -> object:
    score, faces = one
    if score is not None:
        return score
    return "not sampled" if faces is None else "faces" if faces else "no face"


def _bar(timeline: Timeline, start: int, end: int, threshold: Threshold, digits: int) -> Bar:
    score, faces = timeline.score[start], timeline.faces[start]
    bins = len(timeline.faces)
    top = 0.0
    if score is not None:
        top, fill = _height(score, STRIP_PX), heat(score, threshold)
        words = f"score {score_text(score, digits)}"
    elif faces is None:
        fill, words = "url(#not-sampled)", "not sampled"
    elif faces == 0:
        fill, words = "url(#no-face)", "no face"
    else:
        fill, words = "url(#not-counted)", "faces that do not count"
    return Bar(
        x=percent(start, bins),
        width=percent(end - start, bins),
        y=f"{top:.1f}",
        height=f"{STRIP_PX - top:.1f}",
        fill=fill,
        title=f"{clock(start * timeline.bin_ms)} to {clock(end * timeline.bin_ms)}: {words}",
    )


def _height(score: float, height: int) -> float:
    """y of a score: 1 at the top, 0 just above the ground, so that a low bar is still seen."""
    return PADDING_PX + (1 - score) * (height - 2 * PADDING_PX)


def _strip_words(verdict: Verdict, digits: int) -> str:
    timeline = verdict.timeline
    scored = [(score, place) for place, score in enumerate(timeline.score) if score is not None]
    if not scored:
        return "No face was scored at any time."
    best, place = max(scored)
    not_sampled = sum(faces is None for faces in timeline.faces) / len(timeline.faces)
    return (
        f"Strongest score over time: {score_text(best, digits)} at "
        f"{clock(place * timeline.bin_ms)}; {not_sampled:.0%} of the clip was not sampled."
    )


def legend(threshold: Threshold, digits: int) -> list[tuple[str, str]]:
    """Words and fill of each kind of bar in the strip."""
    low, forged_at = threshold.authentic_below, threshold.forged_at
    high, middle, least = (1 + forged_at) / 2, (low + forged_at) / 2, low / 3
    return [
        (side_text(one, threshold, digits), heat(one, threshold))
        for one in ((high, middle, least) if low < forged_at else (high, least))
    ] + [
        ("no face", "url(#no-face)"),
        ("faces too small", "url(#not-counted)"),
        ("not sampled", "url(#not-sampled)"),
    ]


def axis(timeline: Timeline) -> list[str]:
    """Five times under a drawing; with tenths where the clip is short."""
    span_ms = timeline.bin_ms * len(timeline.faces)
    digits = 1 if span_ms < 40_000 else 0
    return [clock(span_ms * part // 4, digits) for part in range(5)]


def line(track: Track, segments: list[Segment], verdict: Verdict, digits: int) -> Line:
    """One track's scores; its segments shaded, the faces that do not count hollow."""
    span_ms = max(len(verdict.timeline.faces) * verdict.timeline.bin_ms, 1)
    threshold = verdict.threshold
    return Line(
        shades=[
            Span(
                "shade",
                percent(segment.start_ms, span_ms),
                percent(segment.end_ms - segment.start_ms, span_ms),
            )
            for segment in segments
        ],
        threshold_y=_height(threshold.forged_at, LINE_PX),
        polylines=_polylines(track, span_ms),
        dots=[
            Dot(
                x=percent(sample.time_ms, span_ms),
                y=f"{_height(sample.score, LINE_PX):.1f}",
                fill=heat(sample.score, threshold) if sample.counted else "none",
                counted=sample.counted,
            )
            for sample in track.samples
        ],
        description=(
            f"{track.faces} faces from {clock(track.start_ms, 1)} to {clock(track.end_ms, 1)}; "
            f"highest {score_text(track.score_max, digits)}."
        ),
    )


def _polylines(track: Track, span_ms: int) -> list[str]:
    """The dots joined by lines, but not over a time when the face was away."""
    gaps = [later.time_ms - sample.time_ms for sample, later in pairwise(track.samples)]
    # By the listed samples: a long track is thinned, so its steps are longer than the clip's.
    longest = GAP_STEPS * median(gaps) if gaps else 0
    pieces: list[list[str]] = [[]]
    for place, sample in enumerate(track.samples):
        if place and gaps[place - 1] > longest:
            pieces.append([])
        # SVG takes no percentages here, so the template's viewBox is 1000 wide.
        x = 1000 * sample.time_ms / span_ms
        pieces[-1].append(f"{x:.1f},{_height(sample.score, LINE_PX):.1f}")
    return [" ".join(points) for points in pieces]
