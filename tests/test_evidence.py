"""Which faces and frames are kept for a reviewer: the strongest, few, and whom they show."""

import io
from base64 import b64decode

import numpy as np
import torch
from PIL import Image

from ralf.worker.contract import Box, Sample, Track
from ralf.worker.evidence import FRAMES, LONG_SIDE, StrongestFaces

CROP = torch.zeros((1, 3, 8, 8), dtype=torch.uint8)
BOX = Box(left=0.1, top=0.1, right=0.2, bottom=0.3)


def see(faces: StrongestFaces, time_s: float, logits: dict[int, float], frame: torch.Tensor):
    """One frame with these tracks' faces."""
    rows = len(logits)
    faces.add(
        np.array(list(logits), np.int64),
        np.full(rows, time_s),
        np.array(list(logits.values()), np.float32),
        CROP.repeat(rows, 1, 1, 1),
        lambda row: frame,
    )


def track(name: str, **scores_at: float) -> Track:
    """A track with samples at these milliseconds: at1000=0.7."""
    samples = tuple(
        Sample(time_ms=int(at[2:]), frame=0, box=BOX, face_px=80, confidence=0.99, score=score)
        for at, score in scores_at.items()
    )
    return Track(
        track_id=name, start_ms=0, end_ms=9000, faces=len(samples), score=0.5, score_max=0.9,
        decisive=True, samples=samples,
    )  # fmt: skip


def flat(level: int) -> torch.Tensor:
    """A frame of one grey."""
    return torch.full((3, 90, 160), level, dtype=torch.uint8)


def test_the_frame_that_shows_most_tracks_comes_first_and_no_other_where_it_shows_all():
    """t1 is strongest alone at 1 s, but at 2 s both are there."""
    faces = StrongestFaces()
    see(faces, 1.0, {0: 3.0}, flat(10))
    see(faces, 2.0, {0: 1.0, 1: 2.0}, flat(200))

    (frame,) = faces.frames([track("t1", at1000=0.9, at2000=0.7), track("t2", at2000=0.8)])

    assert 2000 == frame.time_ms
    assert ["t1", "t2"] == [face.track_id for face in frame.faces]
    assert abs(np.asarray(Image.open(io.BytesIO(b64decode(frame.jpeg)))).mean() - 200) < 2


def test_people_who_are_never_together_get_a_frame_each_in_order_of_time():
    """As after a cut."""
    faces = StrongestFaces()
    see(faces, 1.0, {0: 1.0}, flat(10))
    see(faces, 2.0, {1: 2.0}, flat(200))

    shown = faces.frames([track("t1", at1000=0.7), track("t2", at2000=0.8)])

    assert [(1000, "t1"), (2000, "t2")] == [(f.time_ms, f.faces[0].track_id) for f in shown]


def test_frames_are_few_and_small_however_many_people_and_pixels():
    """Noise of 4K, the worst case for JPEG: under 2 MB of base64 in all."""
    faces = StrongestFaces()
    rng = np.random.default_rng(0)
    noise = torch.from_numpy(rng.integers(0, 256, (3, 2160, 3840), np.uint8))
    for person in range(FRAMES + 2):
        see(faces, float(person), {person: 1.0}, noise)

    shown = faces.frames([track(f"t{n}", **{f"at{n}000": 0.7}) for n in range(FRAMES + 2)])

    assert FRAMES == len(shown)
    assert all((LONG_SIDE, 450) == (frame.width, frame.height) for frame in shown)
    assert sum(len(frame.jpeg) for frame in shown) < 2e6


def test_a_frame_is_kept_while_it_shows_the_strongest_face_of_a_track():
    """The one that was beaten is let go."""
    faces = StrongestFaces()
    see(faces, 1.0, {0: 1.0}, flat(10))
    see(faces, 2.0, {0: 5.0}, flat(200))

    assert () == faces.frames([track("t1", at1000=0.7)])
    assert 1 == len(faces.frames([track("t1", at1000=0.7, at2000=0.8)]))
