"""How labels, scores and times are written for people: on the terminal, on the page, in reasons."""

from ralf.worker.contract import Label

LABEL_WORDS: dict[Label, str] = {
    "likely_forged": "Likely forged",
    "likely_authentic": "Likely authentic",
    "inconclusive": "Inconclusive",
    "no_faces": "No faces",
}
SCORE_DIGITS = 6
"""Scores are rounded before they are compared, so that the score shown is the one that decided."""


def score_text(score: float, *marks: float) -> str:
    """The score in three digits, or in as many as keep it on its side of every mark."""
    if 0 < score < 0.0005:
        return "<0.001"
    if score >= 0.9995:
        return ">0.999"
    for digits in range(3, SCORE_DIGITS):
        text = f"{score:.{digits}f}"
        if all((float(text) >= mark) == (score >= mark) for mark in marks):
            return text
    return f"{score:.{SCORE_DIGITS}f}"


def clock(time_ms: int, digits: int = 3) -> str:
    """A time as mm:ss.mmm, with hours before it where there are any."""
    whole, rest = divmod(time_ms, 1000)
    minutes, seconds = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    start = f"{hours}:" if hours else ""
    # Cut and not rounded: 59.97 s with one digit would become 60.0 s of the same minute.
    fraction = f".{rest:03d}"[: digits + 1] if digits else ""
    return f"{start}{minutes:02d}:{seconds:02d}{fraction}"
