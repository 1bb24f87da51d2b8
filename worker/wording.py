"""How labels, scores and times are written for people: on the terminal, on the page, in reasons."""

import re

from ralf.worker.contract import Label, Threshold, Verdict

LABEL_WORDS: dict[Label, str] = {
    "likely_forged": "Likely forged",
    "likely_authentic": "Likely authentic",
    "inconclusive": "Inconclusive",
    "no_faces": "No faces",
}
SCORE_DIGITS = 6
"""Scores are rounded before they are compared, so that the score shown is the one that decided."""
USUAL_DIGITS = 2
NO_POLICY = "none"
"""The policy of a model whose manifest has no thresholds."""


def digits_for(threshold: Threshold, *scores: float) -> int:
    """The fewest digits, two at least, that show every score on its side of every threshold."""
    marks = (threshold.authentic_below, threshold.forged_at)
    compared = [(one, mark) for one in (*scores, *marks) for mark in marks]
    for digits in range(USUAL_DIGITS, SCORE_DIGITS):
        # A threshold of 0.998 must not be shown as 1.00.
        inside = all(0 < round(mark, digits) < 1 for mark in marks if 0 < mark < 1)
        if inside and all(
            (round(one, digits) >= round(mark, digits)) == (one >= mark) for one, mark in compared
        ):
            return digits
    return SCORE_DIGITS


def digits_of(verdict: Verdict) -> int:
    """In how many digits to show all scores of a verdict, so that each is on its side."""
    levels = [verdict.score, *(track.score for track in verdict.tracks)]
    levels += [segment.score for segment in verdict.segments]
    return digits_for(verdict.threshold, *(level for level in levels if level is not None))


def score_text(score: float, digits: int = USUAL_DIGITS) -> str:
    """The score as people write it; close to an end it says so, instead of 0 or 1."""
    least = 10**-digits
    if score > 0 and round(score, digits) == 0:
        return f"<{least:.{digits}f}"
    if round(score, digits) == 1:
        return f">{1 - least:.{digits}f}"
    return f"{score:.{digits}f}"


def side_text(score: float, threshold: Threshold, digits: int) -> str:
    """On which side of the thresholds the score is."""
    low, forged_at = (
        f"{mark:.{digits}f}" for mark in (threshold.authentic_below, threshold.forged_at)
    )
    return {
        "likely_forged": f"at or above {forged_at}",
        "likely_authentic": f"below {low}",
    }.get(threshold.decide(score), f"between {low} and {forged_at}")


def policy_text(policy: str) -> str:
    """A threshold's name in words: fpr_0.05 promises at most 5 % false alarms."""
    if rate := re.fullmatch(r"fpr_(0\.[0-9]{1,6})", policy):
        return f"{100 * float(rate[1]):g} % false-alarm threshold"
    if policy == NO_POLICY:
        return "the model sets no threshold"
    return f"threshold {policy}"


def clock(time_ms: int, digits: int = 3) -> str:
    """A time as mm:ss.mmm, with hours before it where there are any."""
    whole, rest = divmod(time_ms, 1000)
    minutes, seconds = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    start = f"{hours}:" if hours else ""
    # Cut and not rounded: 59.97 s with one digit would become 60.0 s of the same minute.
    fraction = f".{rest:03d}"[: digits + 1] if digits else ""
    return f"{start}{minutes:02d}:{seconds:02d}{fraction}"
