"""How many frames a long clip gets, and what they cost."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ralf.worker.contract import Sampling, Span
from ralf.worker.errors import TooManyPixels
from ralf.worker.media.probe import probe
from ralf.worker.media.sampling import for_long_clip, plan
from ralf.worker.media.types import Clip, Probe
from ralf.worker.pipeline import Ask, analyze
from ralf.worker.runtime import Parts
from tests.test_routing import probed

OWN = Sampling(mode="uniform", max_frames=32)


def lasting(seconds: float) -> Probe:
    """A clip of one frame a second, a keyframe in ten."""
    times = np.arange(0, seconds, 1.0)
    return probed(
        times_s=times,
        frame_count=len(times),
        duration_s=seconds,
        keyframes=np.arange(0, len(times), 10),
    )


@pytest.mark.parametrize(
    ("seconds", "frames"), [(8, 32), (320, 32), (321, 33), (1800, 180), (7200, 300)]
)
def test_a_long_clip_gets_a_frame_each_ten_seconds(seconds: float, frames: int):
    """Up to the most that a job may have; a short one keeps the model's own."""
    found = for_long_clip(OWN, lasting(seconds), most_frames=300, most_pixels=1e12)

    assert frames == found.max_frames
    gaps = np.diff(lasting(seconds).times_s[plan(Clip(lasting(seconds), found))])
    assert frames == 300 or gaps.max() <= 11


def test_more_frames_than_can_be_paid_for_are_not_taken():
    """Halved until they can, and never fewer than the model's own."""
    clip = lasting(1800)
    frame = clip.coded_width * clip.coded_height

    few = for_long_clip(OWN, clip, most_frames=300, most_pixels=700.0 * frame)
    own = for_long_clip(OWN, clip, most_frames=300, most_pixels=1.0)

    assert 32 < few.max_frames < 180
    assert OWN == own


@pytest.mark.parametrize("mode", ["keyframes", "fps"])
def test_other_modes_stay(mode: str):
    """They are denser with the clip's length by themselves."""
    given = OWN.model_copy(update={"mode": mode})

    assert given == for_long_clip(given, lasting(7200), most_frames=300, most_pixels=1e12)


def that_pays_for(frames: int, path: Path, parts: Parts) -> Parts:
    """The same parts with a limit of so many of the clip's frames."""
    found = probe(path, parts.settings)
    limit = frames * found.coded_width * found.coded_height
    return replace(parts, settings=replace(parts.settings, max_decode_pixels=limit))


def test_what_costs_too_much_to_decode_is_refused_before_it_begins(
    clip_of_none: Path, tiny_parts: Parts, monkeypatch: pytest.MonkeyPatch
):
    """By the frames that would be read, whatever the file's size."""
    parts = that_pays_for(2, clip_of_none, tiny_parts)
    monkeypatch.setattr(type(parts.decoder), "decode", lambda *_: pytest.fail("it decodes"))

    with pytest.raises(TooManyPixels, match="RALF_MAX_DECODE_PIXELS"):
        analyze(clip_of_none, parts)


def test_a_span_alone_is_paid_for(clip_of_none: Path, tiny_parts: Parts):
    """The beginning of a clip that is too much as a whole."""
    parts = that_pays_for(2, clip_of_none, tiny_parts)
    start = Sampling(max_frames=1, spans=(Span(start_ms=0, end_ms=40),))

    verdict, _ = analyze(clip_of_none, parts, ask=Ask(sampling=start))

    assert 1 == verdict.made.frames_asked
