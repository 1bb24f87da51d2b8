"""Animation and encoding: motion that twins share, real encoders, files the worker can read."""

import numpy as np
import pytest
from skimage.data import astronaut

from ralf.train.forge.video import animate, encode, recompress
from ralf.worker.contract import Sampling
from ralf.worker.media.decode_pyav import PyavDecoder
from ralf.worker.media.probe import probe
from ralf.worker.media.types import Clip
from ralf.worker.settings import Settings

SMALL = {"seconds": 0.4, "fps": 10, "size": (96, 64)}


def face() -> np.ndarray:
    return np.ascontiguousarray(astronaut()[0:220:2, 110:330:2])


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2)))


def test_the_same_seed_moves_alike_and_another_does_not():
    """A clip can be made again, bit for bit."""
    one, again = (np.stack(list(animate(face(), seed=3, **SMALL))) for _ in range(2))
    other = np.stack(list(animate(face(), seed=4, **SMALL)))

    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


def test_frames_have_the_size_and_number_asked_for():
    """Width comes first, as players say it."""
    frames = list(animate(face(), **SMALL))

    assert (4, (64, 96, 3), np.uint8) == (len(frames), frames[0].shape, frames[0].dtype)


def test_a_forged_twin_differs_only_where_the_portrait_does():
    """The same seed moves an altered portrait exactly as the untouched one."""
    altered = face().copy()
    altered[40:60, 45:65] = 255
    still = {"pan": 0, "zoom": 0, "turn_deg": 0, "bend": 0, "background": np.zeros_like(face())}
    pairs = zip(animate(face(), **SMALL, **still), animate(altered, **SMALL, **still), strict=True)
    changed = [np.abs(a.astype(int) - b).max(axis=-1) > 0 for a, b in pairs]

    assert all(0.01 < part.mean() < 0.1 for part in changed)


def test_a_portrait_without_motion_is_itself():
    """Resampled at its own size, with nothing moving, no pixel of its middle changes."""
    image = face()
    frame = next(
        animate(image, seconds=0.1, size=(110, 110), pan=0, zoom=0, turn_deg=0, bend=0, grain=0)
    )

    assert np.abs(frame[10:-10, 10:-10].astype(int) - image[10:-10, 10:-10]).max() <= 1


@pytest.mark.parametrize("codec", ["libx264", "libx265", "libvpx-vp9", "mpeg4"])
def test_recompression_keeps_shape_and_order(codec: str):
    """Every encoder returns as many frames as it was given, each nearest to its own."""
    frames = np.stack([np.roll(face()[:97, :95], 9 * k, axis=1) for k in range(3)])
    out = recompress(frames, 20, codec)

    assert frames.shape == out.shape
    for k in range(3):
        assert k == int(np.argmax([psnr(out[k], frame) for frame in frames]))


def test_a_higher_crf_loses_more():
    """Quality falls from crf to crf."""
    quality = [psnr(recompress([face()], crf)[0], face()) for crf in (15, 25, 35, 45)]

    assert quality == sorted(quality, reverse=True)
    assert quality[0] - quality[-1] > 8


def test_nothing_to_encode_is_refused(tmp_path):
    """An empty clip is the caller's mistake."""
    with pytest.raises(ValueError, match="at least one frame"):
        encode([], tmp_path / "none.mp4")
    with pytest.raises(ValueError, match="at least one image"):
        recompress([], 23)


def test_a_frame_of_another_size_is_refused(tmp_path):
    """Silently scaling it would hide a bug."""
    with pytest.raises(ValueError, match="every frame should be u8 64×48"):
        encode(
            [np.zeros((48, 64, 3), np.uint8), np.zeros((32, 64, 3), np.uint8)], tmp_path / "a.mp4"
        )


def decoded(path) -> tuple:
    """The file as the worker sees it: its probe and frames [n, h, w, 3]."""
    facts = probe(path, Settings())
    chunks = PyavDecoder(2**28).decode([Clip(facts, Sampling(max_frames=300))])
    return facts, np.concatenate([chunk.pixels.permute(0, 2, 3, 1).numpy() for chunk in chunks])


@pytest.mark.parametrize("colour", ["untagged", "bt709"])
def test_what_is_encoded_is_what_the_worker_decodes(tmp_path, colour):
    """Number, size, time and colour survive, whichever matrix the file is tagged with."""
    frames = np.stack(list(animate(face(), **SMALL)))
    facts, seen = decoded(encode(frames, tmp_path / "a.mp4", fps=10, crf=12, colour=colour))

    assert (facts.frame_count, facts.width, facts.height) == (4, 96, 64)
    assert pytest.approx([0, 0.1, 0.2, 0.3], abs=1e-3) == list(facts.times_s)
    assert psnr(frames, seen) > 34
    assert pytest.approx(frames.mean(axis=(0, 1, 2)), abs=2) == seen.mean(axis=(0, 1, 2))


def test_a_rotation_tag_turns_the_picture_upright(tmp_path):
    """A phone stores its picture lying down and says so."""
    frames = np.stack(list(animate(face(), **SMALL)))
    lying = [np.rot90(frame, -1) for frame in frames]
    facts, seen = decoded(encode(lying, tmp_path / "a.mp4", fps=10, crf=12, rotation=90))

    assert (facts.rotation, facts.width, facts.height) == (90, 96, 64)
    assert psnr(frames, seen) > 34


def test_frames_may_come_at_uneven_times(tmp_path):
    """Variable rate: presentation times in milliseconds."""
    frames = list(animate(face(), **SMALL))
    facts, _ = decoded(encode(frames, tmp_path / "a.mp4", fps=10, times=[0, 40, 200, 210]))

    assert pytest.approx([0, 0.04, 0.2, 0.21], abs=2e-3) == list(facts.times_s)
