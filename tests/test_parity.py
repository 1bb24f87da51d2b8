"""The same clip through two decoders, and on two devices: the same frames, faces and verdicts.

Without a GPU DALI's software decoder stands beside PyAV under one engine.  The tests marked gpu
are the whole of it: PyAV, the CPU's finder and engine against NVDEC and everything on the device.

    REQUIRE_GPU=1 REQUIRE_DALI=1 pytest -m 'gpu or dali' tests/test_parity.py
"""

from dataclasses import replace
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ralf.kernels.engine import budget_of
from ralf.worker.boxes import overlap
from ralf.worker.contract import Box, EvidencePolicy, Sampling, Track, Verdict
from ralf.worker.media.decode_dali import DaliDecoder
from ralf.worker.media.decode_pyav import PyavDecoder
from ralf.worker.media.probe import probe
from ralf.worker.media.types import Clip, Decoder
from ralf.worker.pipeline import Ask, analyze
from ralf.worker.runtime import Parts, load, with_decoder
from ralf.worker.settings import Settings
from tests.clips import face_clip, make_clip

LEVELS = 2.0
"""How far two decoders' pixels may lie apart on average; NVDEC's chroma is upsampled otherwise."""
OVERLAP = 0.9
"""Least overlap of a face's two boxes: a pixel or two."""
SCORE = 0.06
"""What another crop, a pixel off, may add to the engine's own budget: an untrained network's score
of a face of 42 pixels moves by up to 0.059 here."""
ASK = Ask(
    sampling=Sampling(mode="uniform", max_frames=4),
    evidence=EvidencePolicy(thumbnails=True),
)

VARIABLE = {
    "pts": [0, 90, 130, 400, 410, 700, 790, 900, 1500, 1600],
    "time_base": Fraction(1, 1000),
}
CODECS = ("libx264", "libx265", "libvpx-vp9")
HOW: dict[str, tuple[str, dict[str, Any]]] = {
    "BT.601": ("mp4", {"matrix": "bt601"}),
    "BT.709": ("mp4", {"matrix": "bt709"}),
    "untagged": ("mkv", {}),
    "rotated": ("mp4", {"rotation": 90, "matrix": "bt709"}),
    "mirrored": ("mp4", {"hflip": True}),
    "variable rate": ("mkv", {**VARIABLE, "matrix": "bt709"}),
    "full range": ("mp4", {"matrix": "bt709", "full_range": True}),
}


def people(folder: Path, name: str, how: str, portrait: np.ndarray, codec: str) -> Path:
    """Ten frames of two people, 320×180 or upright; turned so that the faces stand up."""
    ending, made = HOW[how]
    faces = [portrait, np.ascontiguousarray(portrait[:, ::-1])]
    if "rotation" in made:  # shown turned counter-clockwise, so stored turned clockwise
        faces = [np.ascontiguousarray(np.rot90(face, -1)) for face in faces]
    return face_clip(
        folder / f"{name}.{ending}",
        faces,
        1.0,
        size=(320, 180),
        fps=10,
        face_height=0.7,
        codec=codec,
        gop=6,
        **made,
    )


def levels_apart(path: Path, one: Decoder, other: Decoder) -> float:
    """Mean distance of the two decoders' pixels; they must give the same frames."""
    clip = Clip(probe(path, Settings()), Sampling(max_frames=12))
    parts = [list(decoder.decode([clip])) for decoder in (one, other)]
    numbers = [np.concatenate([part.indices for part in each]) for each in parts]
    np.testing.assert_array_equal(*numbers)
    mine, its = (torch.cat([part.pixels.cpu() for part in each]).float() for each in parts)
    return float((mine - its).abs().mean())


def colourful(folder: Path, how: str, codec: str) -> Path:
    """Frames in strong colours, 256×160: BT.709 read as BT.601 is five levels off."""
    ending, made = HOW[how]
    frames = len(made.get("pts", range(24)))
    return make_clip(folder / f"colours.{ending}", frames, size=(256, 160), codec=codec, **made)


def assert_same(one: Verdict, other: Verdict, budget: float) -> None:
    """Labels, tracks, faces and scores; not who made it or how long it took."""
    assert one.label == other.label and one.reason == other.reason
    assert one.media == other.media and one.threshold == other.threshold
    assert set(one.warnings) == set(other.warnings)
    assert one.made.frames_decoded == other.made.frames_decoded
    assert [t.track_id for t in one.tracks] == [t.track_id for t in other.tracks]
    for mine, its in zip(one.tracks, other.tracks, strict=True):
        assert_same_track(mine, its, budget)


def assert_same_track(one: Track, other: Track, budget: float) -> None:
    assert (one.faces, one.decisive) == (other.faces, other.decisive)
    assert abs(one.score_max - other.score_max) <= budget
    assert (one.score is None) == (other.score is None)
    assert one.score is None or abs(one.score - (other.score or 0.0)) <= budget
    for mine, its in zip(one.samples, other.samples, strict=True):
        assert mine.time_ms == its.time_ms
        assert overlap(*([corners(one.box)] for one in (mine, its)))[0, 0] >= OVERLAP
        assert abs(mine.score - its.score) <= budget


def corners(box: Box) -> tuple[float, float, float, float]:
    """The box as x0 y0 x1 y1."""
    return box.left, box.top, box.right, box.bottom


def budget(*parts: Parts) -> float:
    """In scores: a logit's budget moves a probability by a quarter of it at most."""
    return SCORE + sum(budget_of(each.artifact, each.engine.precision) / 4 for each in parts)


@pytest.mark.dali
@pytest.mark.parametrize("how", ["BT.601", "rotated", "variable rate", "full range"])
def test_dalis_frames_give_pyavs_verdict(
    tmp_path: Path, astronaut: np.ndarray, tiny_parts: Parts, how: str
):
    """VP9, which DALI decodes without a GPU; the walk is the same but for the decoder."""
    path = people(tmp_path, "clip", how, astronaut, "libvpx-vp9")
    pyav = PyavDecoder(threads=1)
    dali = DaliDecoder(pyav, device="cpu")

    one, evidence = analyze(path, with_decoder(tiny_parts, pyav), ask=ASK)
    other, _ = analyze(path, with_decoder(tiny_parts, dali), ask=ASK)

    assert 2 == len(one.tracks) and 2 * one.made.frames_decoded == one.made.faces
    assert evidence.pictures
    assert ["pyav", "dali"] == [one.made.decoder, other.made.decoder]
    assert LEVELS >= levels_apart(path, pyav, dali)
    assert_same(one, other, budget(tiny_parts))


@pytest.mark.dali
def test_the_comparison_sees_colours_left_uncorrected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A test that cannot fail is none: BT.709 read as BT.601 is farther off than allowed."""
    path = colourful(tmp_path, "BT.709", "libvpx-vp9")
    pyav = PyavDecoder(threads=1)
    dali = DaliDecoder(pyav, device="cpu")
    right = levels_apart(path, pyav, dali)
    monkeypatch.setattr("ralf.worker.media.decode_dali.from_bt601", lambda space: None)

    assert right < LEVELS < levels_apart(path, pyav, dali)


@pytest.fixture(scope="module")
def on_gpu(tiny_models: Path) -> Parts:
    """The parts of a GPU worker, NVDEC for every clip that it takes."""
    settings = replace(Settings(), models_dir=str(tiny_models), threads=2, decoder="dali")
    return load(settings, model="tiny", device="cuda")


@pytest.fixture
def pair(tiny_parts: Parts, on_gpu: Parts) -> tuple[Parts, Parts]:
    """A CPU worker's parts and a GPU worker's."""
    return tiny_parts, on_gpu


@pytest.mark.gpu
@pytest.mark.dali
@pytest.mark.parametrize(("codec", "how"), [*product(CODECS, HOW)])
def test_a_gpu_gives_the_verdict_of_a_cpu(
    tmp_path: Path, pair: tuple[Parts, Parts], astronaut: np.ndarray, codec: str, how: str
):
    """NVDEC, finder and engine on the device against all of it on the CPU."""
    (tiny_parts, on_gpu), path = pair, people(tmp_path, "clip", how, astronaut, codec)

    one, _ = analyze(path, tiny_parts, ask=ASK)
    other, evidence = analyze(path, on_gpu, ask=ASK)

    taken = not (codec == "libvpx-vp9" and how == "full range")
    assert ("dali" if taken else "pyav") == other.made.decoder
    assert other.made.device.startswith("cuda") and evidence.pictures
    assert LEVELS >= levels_apart(path, tiny_parts.decoder, on_gpu.decoder)
    assert_same(one, other, budget(tiny_parts, on_gpu))


@pytest.mark.gpu
@pytest.mark.dali
@pytest.mark.parametrize(("codec", "how"), [*product(CODECS, HOW)])
def test_nvdecs_frames_are_pyavs(tmp_path: Path, on_gpu: Parts, codec: str, how: str):
    """Strong colours, every frame of a short clip, each the very frame that PyAV gives."""
    path = colourful(tmp_path, how, codec)

    assert LEVELS >= levels_apart(path, PyavDecoder(threads=1), on_gpu.decoder)


@pytest.mark.gpu
@pytest.mark.dali
def test_frames_stay_on_the_gpu(tmp_path: Path, astronaut: np.ndarray, on_gpu: Parts):
    """No copy through the host between the decoder and the finder."""
    path = people(tmp_path, "clip", "BT.709", astronaut, "libx264")
    clip = Clip(probe(path, Settings()), Sampling(max_frames=6))

    chunks = list(on_gpu.decoder.decode([clip]))

    assert all(chunk.pixels.is_cuda for chunk in chunks)
    assert all(chunk.pixels.is_contiguous() for chunk in chunks)


@pytest.mark.gpu
@pytest.mark.dali
def test_eight_clips_at_once_come_out_as_each_alone(
    tmp_path: Path, astronaut: np.ndarray, on_gpu: Parts
):
    """Codecs, sizes and turns mixed in one batch; one of them is no video at all."""
    paths = [
        people(tmp_path, f"{codec}{n}", how, astronaut, codec)
        for codec in ("libx264", "libx265")
        for n, how in enumerate(("BT.601", "BT.709", "rotated", "variable rate"))
    ]
    clips = [Clip(probe(path, Settings()), Sampling(max_frames=4)) for path in paths]
    broken = clips[3]
    data = bytearray(Path(broken.probe.path).read_bytes())
    data[len(data) // 4 : len(data) // 2] = bytes(len(data) // 2 - len(data) // 4)
    Path(broken.probe.path).write_bytes(data)

    together = list(on_gpu.decoder.decode(clips))

    for clip in clips:
        if clip is broken:
            continue
        mine = torch.cat([part.pixels for part in together if part.clip is clip])
        (alone,) = on_gpu.decoder.decode([clip])
        assert torch.equal(alone.pixels, mine)
