"""Cuts: seen where the scene changes, and not at pans, flashes, fades and moving faces."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from ralf.worker.contract import Sampling
from ralf.worker.media.cuts import BINS, GRID, same_shot, signatures
from ralf.worker.media.decode_pyav import PyavDecoder
from ralf.worker.media.probe import probe
from ralf.worker.media.tracks import Tracker
from ralf.worker.media.types import Clip, Faces
from ralf.worker.pipeline import Ask, analyze
from ralf.worker.runtime import Parts
from ralf.worker.settings import Settings
from tests.clips import Image, make_clip
from tests.scenes import backdrop, frames_of, portrait

SIZE = (320, 180)


def place(width: int, height: int, seed: int) -> PIL.Image.Image:
    """A backdrop in its own light."""
    tint = np.random.default_rng(seed).uniform(0.3, 1.3, 3)
    return PIL.Image.fromarray(lit(np.array(backdrop(width, height, seed)), tint))


def scene(seed: int) -> Image:
    """A place with colours of its own, and a person in the middle of it."""
    picture = place(*SIZE, seed)
    head = portrait(60, seed % 12)
    picture.paste(head, ((SIZE[0] - head.width) // 2, (SIZE[1] - head.height) // 2))
    return np.array(picture)


def cuts(pictures: list[Image]) -> list[int]:
    """Numbers of the pictures that begin another shot than the one before them shows."""
    shots = signatures(frames_of(pictures).pixels)
    return [n for n in range(1, len(shots)) if not same_shot(shots[n - 1 : n], shots[n])[0]]


def lit(picture: Image, gain: Any, lift: float = 0.0) -> Image:
    return np.clip(picture * gain + lift, 0, 255).astype(np.uint8)


def test_cuts_between_places_are_seen():
    """Forty places in a row, each shown three times; the person is always in the middle.

    Not all: places whose colours are alike are rather taken for one.
    """
    shown = [scene(seed) for seed in range(40) for _ in range(3)]

    found = cuts(shown)

    true = set(range(3, 120, 3))
    assert set(found) <= true
    assert len(found) >= 0.8 * len(true)


def test_what_a_codec_does_is_no_cut(tmp_path: Path):
    """Strong compression, and a keyframe in the middle of a shot."""
    pictures = [scene(seed) for seed in (1, 5) for _ in range(8)]
    path = make_clip(tmp_path / "clip.mp4", pictures, fps=10, quality=42, gop=3, exact=False)
    clip = Clip(probe(path, Settings()), Sampling(max_frames=16))
    frames = next(PyavDecoder(threads=1).decode([clip]))

    shown = list(frames.pixels.permute(0, 2, 3, 1).numpy())
    assert cuts(shown) == [8]


@pytest.mark.parametrize("step", [4, 60])
def test_a_pan_is_no_cut(step: int):
    """At 25 frames a second, and so fast that a fifth of the picture is new in each sample."""
    wide = np.array(backdrop(2000, SIZE[1], 3))

    assert cuts([wide[:, x : x + SIZE[0]] for x in range(0, 1600, step)]) == []


@pytest.mark.parametrize("seed", range(4))
def test_a_flash_is_no_cut(seed: int):
    """Two bright frames in the middle of a shot."""
    quiet = scene(seed)
    shown = [quiet, quiet, lit(quiet, 1.6, 40), lit(quiet, 1.3, 20), quiet]

    assert cuts(shown) == []


@pytest.mark.parametrize("ground", [0, 255])
def test_a_fade_is_no_cut(ground: int):
    """To black or to white, and back to the same place."""
    share = np.concatenate([np.linspace(1, 0, 12), np.linspace(0, 1, 12)])

    assert cuts([lit(scene(2), s, ground * (1 - s)) for s in share]) == []


def test_a_face_that_moves_is_no_cut():
    """A large head from one side to the other, sampled sparsely."""
    shown = []
    for x in (0, 60, 120, 180):
        picture = backdrop(*SIZE, 7)
        picture.paste(portrait(75), (x, 5))
        shown.append(np.array(picture))

    assert cuts(shown) == []


def test_a_switched_off_picture_says_nothing():
    """Nothing can be compared with black; what comes after it is compared with what came before."""
    black = np.zeros_like(scene(0))

    assert cuts([scene(0), black, scene(0)]) == []


def followed(pictures: list[Image], step_s: float = 0.5) -> list[int]:
    """The tracks of one face that is always in the middle."""
    count = len(pictures)
    faces = Faces(
        boxes=np.tile(np.float32([130, 50, 190, 130]), (count, 1)),
        landmarks=np.zeros((count, 5, 2), np.float32),
        confidence=np.ones(count, np.float32),
        frame=np.arange(count),
    )
    frames = frames_of(pictures, [step_s * n for n in range(count)])
    return Tracker().update(frames, faces).tolist()


def test_two_people_shown_in_turn_are_two_tracks():
    """At the same place and size; each goes on when its shot comes back."""
    one, other = scene(1), scene(5)

    assert followed([one, one, other, other, one, other]) == [0, 0, 1, 1, 0, 1]


def test_a_person_in_a_pan_a_flash_and_a_fade_is_one_track():
    """All of them in one shot."""
    quiet = scene(2)
    shown = [quiet, lit(quiet, 1.5, 30), quiet, lit(quiet, 0.3), lit(quiet, 0.05), quiet]

    assert len(set(followed(shown))) == 1


def test_a_clip_of_two_people_in_turn_has_two_tracks(tmp_path: Path, tiny_parts: Parts):
    """Decoded, found and followed for real: without the cut it was one track."""
    pictures = []
    for seed, variant in ((1, 0), (5, 3)):
        picture = place(640, 360, seed)
        picture.paste(portrait(110, variant), (230, 50))
        pictures += [np.array(picture)] * 10
    path = make_clip(tmp_path / "turns.mp4", pictures, fps=10, quality=20, exact=False)

    verdict, _ = analyze(path, tiny_parts, ask=Ask(sampling=Sampling(max_frames=8)))

    assert [4, 4] == [track.faces for track in verdict.tracks]
    assert verdict.tracks[0].end_ms < 1000 <= verdict.tracks[1].start_ms


def test_the_frames_of_a_chunk_are_signed_alone():
    """Whatever chunk a frame comes in; a chunk without frames is no error."""
    frames = frames_of([scene(seed) for seed in range(5)])

    alone = [signatures(frames.pixels[n : n + 1])[0] for n in range(5)]
    assert np.allclose(signatures(frames.pixels), alone, atol=1e-4)
    none = replace(frames, pixels=frames.pixels[:0], times_s=np.zeros(0), indices=np.zeros(0, int))
    assert signatures(none.pixels).shape == (0, GRID + BINS)
