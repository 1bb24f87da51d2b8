"""Occluded faces and unusual poses: seen, said in the track's reason, never authentic."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from ralf.kernels.manifest import Finder
from ralf.worker.media.mtcnn import Mtcnn
from ralf.worker.media.views import CLEAR, OCCLUDED, UNUSUAL_POSE, views_of
from tests.scenes import frames_of
from tests.test_verdict import faces, judged

PORTRAITS = sorted((Path(__file__).parent.parent / "demo" / "portraits").glob("*.jpg"))


def views(pictures: list[Image.Image]) -> list[list[int]]:
    """The views of all faces that the finder finds, picture by picture."""
    found = []
    for picture in pictures:
        frames = frames_of([np.asarray(picture)])
        seen = Mtcnn(Finder()).find(frames)
        found.append(views_of(frames, seen).tolist())
    return found


def masked(picture: Image.Image) -> Image.Image:
    """A light blue mask over mouth and chin, by the finder's points."""
    seen = Mtcnn(Finder()).find(frames_of([np.asarray(picture)]))
    left, right, nose, mouth_left, mouth_right = seen.landmarks[0]
    eyes, mouth = (left + right) / 2, (mouth_left + mouth_right) / 2
    wide, down = (right - left) * 0.85, mouth - eyes
    covered = picture.copy()
    corners = [nose, nose + wide, mouth + wide * 0.7 + down * 0.6]
    corners += [mouth - wide * 0.7 + down * 0.6, nose - wide]
    ImageDraw.Draw(covered).polygon([tuple(map(float, c)) for c in corners], fill=(150, 200, 225))
    return covered


@pytest.fixture(scope="module")
def portraits() -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in PORTRAITS]


def test_ordinary_portraits_are_clear(portraits: list[Image.Image]):
    """Official portraits in the public domain."""
    assert len(portraits) >= 8
    assert {CLEAR} == {view for found in views(portraits) for view in found}


def test_faces_upside_down_have_an_unusual_pose(portraits: list[Image.Image]):
    """Of those that are found at all, though the finder gives them upright points."""
    found = [view for views_ in views([p.rotate(180) for p in portraits]) for view in views_]

    assert len(found) >= 1
    assert found.count(UNUSUAL_POSE) >= 0.8 * len(found)


def test_most_masks_are_seen(portraits: list[Image.Image]):
    """Of those that are found at all."""
    found = [view for views_ in views([masked(p) for p in portraits]) for view in views_]

    assert len(found) >= 2
    assert found.count(OCCLUDED) >= 0.6 * len(found)


@pytest.mark.parametrize(("view", "word"), [(OCCLUDED, "occluded"), (UNUSUAL_POSE, "unusual pose")])
def test_a_hidden_face_makes_no_verdict_authentic(view: int, word: str):
    """It says why; the same faces seen clearly are authentic."""
    clear, hidden = faces([-5.0] * 6), faces([-5.0] * 6)
    hidden.view[:4] = view

    result = judged(hidden)

    assert judged(clear).label == "likely_authentic"
    assert (result.label, result.score) == ("inconclusive", judged(clear).score)
    assert word in result.reason and word in (result.tracks[0].reason or "")
    assert not result.tracks[0].decisive


def test_a_hidden_face_may_still_be_forged():
    """What is seen of it counts against it."""
    hidden = faces([5.0] * 6)
    hidden.view[:] = OCCLUDED

    assert judged(hidden).label == "likely_forged"


def test_a_clear_face_beside_a_hidden_one_decides_with_a_warning():
    """The hidden one does not count."""
    hidden = faces([-5.0] * 6, track=1, left=300.0)
    hidden.view[:] = OCCLUDED
    result = judged(type(hidden).concat([faces([-5.5] * 6), hidden]))

    assert result.label == "likely_authentic"
    assert any(text.startswith("unclear_track") for text in result.warnings)
