"""The page's sentences about people and sampling, the model's errors, and what hides a face."""

from collections import Counter
from math import floor
from typing import Literal, NamedTuple

from ralf.worker.contract import Track, Verdict

View = Literal["occluded", "unusual_pose"]
VIEW_WORDS: dict[View, str] = {
    "occluded": "covered in part",
    "unusual_pose": "turned far or upside down",
}


class Errors(NamedTuple):
    """How often the model is wrong: in short, then with its figures."""

    short: str
    figures: str


def seen(verdict: Verdict) -> str:
    """How many people, in how many frames."""
    return f"{_people(verdict)}, {_frames(verdict)}"


def _people(verdict: Verdict) -> str:
    # Faces in one frame are different people.  Two tracks that never meet may be one person, before
    # and after a cut.
    times = Counter(sample.time_ms for track in verdict.tracks for sample in track.samples)
    least, most = max(times.values(), default=0), len(verdict.tracks)
    if any(warning.startswith("tracks_omitted") for warning in verdict.warnings):
        return f"{least} people or more"
    if least < most:
        return f"{least} to {most} people"
    return "no person" if not most else _count(most, "person", "people")


def _frames(verdict: Verdict) -> str:
    made = verdict.made
    looked = made.frames_decoded + made.frames_replaced
    if len(made.frames_by_pass) > 1 and looked >= made.frames_asked:
        first, *more = made.frames_by_pass
        return (
            f"{_count(first, 'sampled frame')}, then {sum(more)} more around the moments that "
            "scored highest"
        )
    text = _count(looked, "sampled frame")
    return text if looked >= made.frames_asked else f"{text} of {made.frames_asked} wanted"


def track_note(track: Track) -> str | None:
    """Why a track may not decide, or how many of its faces were hard to see."""
    if track.reason:
        meaning = "It may not decide" if track.score is None else "It cannot show this authentic"
        return f"{meaning}: {track.reason}." if not track.decisive else f"Note: {track.reason}."
    views = Counter(sample.view for sample in track.samples)
    parts = [f"{views[view]} {words}" for view, words in VIEW_WORDS.items() if views[view]]
    return f"Of {len(track.samples)} faces {' and '.join(parts)}." if parts else None


def errors(verdict: Verdict) -> Errors | None:
    """What the model's own figures say of its errors; None where no model judged."""
    untrained = any(warning.startswith("untrained_model") for warning in verdict.warnings)
    if verdict.label == "no_faces" or untrained:
        return None
    figures = verdict.made.figures
    flagged = figures.strangers_flagged if figures else None
    if flagged is None:
        return Errors(
            "How often it is wrong about strangers is not known from this verdict:",
            "see the model's card.",
        )
    rate, *interval = flagged
    between = f" (95 % interval {_range(interval[0], interval[1])})" if len(interval) == 2 else ""
    called = f"this model called {_percent(rate)} of authentic people it had never seen forged"
    caught = figures.forgeries_caught if figures else None
    short = f"Wrong about {_one_in(rate, interval[1] if len(interval) == 2 else rate)} strangers"
    if caught is None:
        return Errors(f"{short}:", f"{called}{between}. See the model's card.")
    missed, *reach = (1 - share for share in caught)
    return Errors(
        f"{short}, and misses {_one_in(missed, max(reach, default=missed))} made forgeries:",
        f"{called}{between}, and missed {_percent(missed)} of made forgeries in test clips. "
        "See the model's card.",
    )


def _one_in(rate: float, high: float) -> str:
    """A share as people say it; of none, the most that its interval allows."""
    if rate >= 0.4:
        return f"{round(10 * rate)} in 10"
    if rate > 0:
        return f"1 in {round(1 / rate)}"
    return f"fewer than 1 in {floor(1 / high)}" if high > 0 else "none of its test's"


def _range(low: float, high: float) -> str:
    return f"{_percent(low).removesuffix(' %')} to {_percent(high)}"


def _percent(share: float) -> str:
    """Whole percent; one digit below ten, where it matters."""
    return f"{100 * share:.{0 if share >= 0.1 or share == 0 else 1}f} %"


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"
