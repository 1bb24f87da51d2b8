"""Images as clips of one frame: what is scored, what is said of it, and what is refused."""

import io
import os
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ralf.worker.contract import EvidencePolicy, Sampling, Verdict
from ralf.worker.errors import CorruptMedia, JobError, NoVideoStream, TooLarge, TooManyPixels
from ralf.worker.local import for_file
from ralf.worker.media.still import ImageDecoder, probe_image
from ralf.worker.media.types import Clip
from ralf.worker.page.page import page
from ralf.worker.pipeline import Ask, analyze
from ralf.worker.runtime import Parts
from ralf.worker.settings import Settings

FORMATS = {"face.jpg": "JPEG", "face.png": "PNG", "face.webp": "WEBP", "face.gif": "GIF"}


def judged(path: Path, parts: Parts) -> Verdict:
    """The verdict on an image; its page is made too."""
    parts, ask = for_file(path, parts, Ask(evidence=EvidencePolicy(thumbnails=True)))
    verdict, evidence = analyze(path, parts, ask=ask)
    assert "<html" in page(verdict, evidence)
    return verdict


def pixels(path: Path) -> list[np.ndarray]:
    """Every frame as the finder gets it, u8 [h, w, 3]."""
    probe = probe_image(path, Settings())
    assert probe is not None
    clip = Clip(probe, Sampling(mode="uniform", max_frames=300))
    chunks = ImageDecoder(Settings()).decode([clip])
    return [chunk.pixels[0].permute(1, 2, 0).numpy() for chunk in chunks]


@pytest.mark.parametrize("name", FORMATS)
def test_a_portrait_is_scored_as_one_frame(
    name: str, tmp_path: Path, astronaut: np.ndarray, eager_parts: Parts
):
    """One face decides, and a warning says that stills were never calibrated."""
    Image.fromarray(astronaut).save(tmp_path / name)
    verdict = judged(tmp_path / name, eager_parts)

    assert "likely_forged" == verdict.label
    assert (1, 1) == (len(verdict.tracks), verdict.made.frames_decoded)
    assert (FORMATS[name].lower(), 0) == (verdict.media.codec, verdict.media.duration_ms)
    assert 1 == sum(text.startswith("uncalibrated_still:") for text in verdict.warnings)
    assert 1 == verdict.made.aggregation["min_faces"]


@pytest.mark.parametrize("name", ["face.gif", "face.webp", "face.png"])
def test_an_animation_is_judged_as_video(
    name: str, tmp_path: Path, astronaut: np.ndarray, eager_parts: Parts
):
    """Ten frames of 100 ms; one face followed through them."""
    frames = [Image.fromarray(np.roll(astronaut, step, 1)) for step in range(0, 20, 2)]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], duration=100)
    verdict = judged(tmp_path / name, eager_parts)

    assert (10, 1000) == (verdict.media.frames, verdict.media.duration_ms)
    assert (1, 10) == (len(verdict.tracks), verdict.tracks[0].faces)
    assert any(text.startswith("uncalibrated_animation:") for text in verdict.warnings)
    assert 3 == verdict.made.aggregation["min_faces"]


def test_a_video_is_walked_as_before(clip_of_two: Path, tiny_parts: Parts):
    """The same parts and options, untouched."""
    ask = Ask()

    assert (tiny_parts, ask) == for_file(clip_of_two, tiny_parts, ask)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_is_turned_upright(orientation: int, tmp_path: Path, astronaut: np.ndarray):
    """As its EXIF orientation says; the verdict's rotation agrees with what was done."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    tall = astronaut[:, :128]
    Image.fromarray(tall).save(tmp_path / "a.png", exif=exif)
    probe = probe_image(tmp_path / "a.png", Settings())
    (shown,) = pixels(tmp_path / "a.png")
    turned = np.rot90(tall, probe.rotation // 90)

    assert (probe.height, probe.width) == shown.shape[:2]
    assert np.array_equal(turned[:, ::-1] if probe.mirrored else turned, shown)


def test_modes_that_are_not_rgb_become_rgb(tmp_path: Path):
    """Transparent is white; 16 bits are scaled, not clipped; CMYK and palettes are converted."""
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    Image.new("RGBA", (64, 64), (200, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("CMYK", (64, 64), (0, 0, 0, 0)).save(tmp_path / "ink.jpg")

    assert np.allclose(ramp / 257, pixels(tmp_path / "deep.png")[0][..., 0], atol=1)
    assert (pixels(tmp_path / "clear.png")[0] == 255).all()
    assert (pixels(tmp_path / "ink.jpg")[0] > 250).all()


def png(width: int, height: int) -> bytes:
    """A PNG that promises so many pixels and brings few bytes."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))]
    parts += [(b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize(
    ("sides", "error"),
    [
        ((30000, 30000), TooManyPixels),  # Pillow's own limit
        ((12000, 10001), TooManyPixels),  # ours, where Pillow only warns
        ((3_000_000, 31), NoVideoStream),  # too narrow once it is reduced
        ((8, 8), NoVideoStream),
        ((200, 200), CorruptMedia),  # fewer pixels than promised
    ],
)
def test_a_picture_of_a_bad_size_is_refused(
    sides: tuple[int, int], error: type[JobError], tmp_path: Path, tiny_parts: Parts
):
    """Too large ones before a pixel is decoded."""
    (tmp_path / "a.png").write_bytes(png(*sides))
    with pytest.raises(error):
        judged(tmp_path / "a.png", tiny_parts)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "palette.png", "deep.png"])
def test_a_photo_of_more_pixels_than_a_video_is_reduced(
    name: str, tmp_path: Path, astronaut: np.ndarray
):
    """By a whole number, upright, with a warning; the same picture as one that was small."""
    small = Image.fromarray(astronaut).resize((384, 512))
    large = small.resize((768, 1024), Image.Resampling.NEAREST)
    if name == "palette.png":
        large, small = large.quantize(64), large.quantize(64).convert("RGB").reduce(2)
    if name == "deep.png":
        wide = np.asarray(large.convert("L")).astype(np.uint16) * 257
        large, small = Image.fromarray(wide), small.convert("L").convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    large.save(tmp_path / name, exif=exif, **({"quality": 98} if name == "a.jpg" else {}))
    settings = Settings(max_width=512, max_height=384)
    probe = probe_image(tmp_path / name, settings)
    assert probe is not None
    clip = Clip(probe, Sampling(mode="uniform", max_frames=300))
    (frame,) = ImageDecoder(settings).decode([clip])
    shown = frame.pixels[0].permute(1, 2, 0).numpy().astype(int)

    assert (512, 384) == (probe.width, probe.height)
    assert (768, 1024) == (probe.coded_width, probe.coded_height)
    assert "reduced_still: judged at 384×512 of 768×1024 pixels" in probe.warnings[1]
    assert np.abs(np.rot90(np.asarray(small).astype(int), 3) - shown).mean() < 2.5


def test_a_photo_of_48_megapixels_is_judged(
    tmp_path: Path, astronaut: np.ndarray, eager_parts: Parts
):
    """As phones take them: on the half, with the one face that a camera has recorded."""
    photo = Image.new("RGB", (8000, 6000), "grey")
    photo.paste(Image.fromarray(astronaut).resize((2048, 2048)), (3000, 2000))
    photo.save(tmp_path / "photo.jpg", quality=80)
    verdict = judged(tmp_path / "photo.jpg", eager_parts)
    (track,) = verdict.tracks

    assert (4000, 3000) == (verdict.media.width, verdict.media.height)
    assert 1 == sum(text.startswith("reduced_still:") for text in verdict.warnings)
    assert 1 == track.faces


def test_an_animation_has_the_size_limits_of_a_video(tmp_path: Path):
    """Each of its frames is decoded whole, so it is not reduced."""
    frames = [Image.new("RGB", (200, 100), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:])
    with pytest.raises(TooManyPixels, match="RALF_MAX_WIDTH"):
        probe_image(tmp_path / "a.webp", Settings(max_width=128, max_height=128))


@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_image_is_corrupt_media_and_nothing_else(
    name: str, tmp_path: Path, astronaut: np.ndarray, tiny_parts: Parts
):
    """Cut anywhere or with random bytes in it: a verdict or a named error, never an accident."""
    buffer, rng = io.BytesIO(), np.random.default_rng(5)
    Image.fromarray(astronaut).resize((64, 64)).save(buffer, FORMATS[name])
    whole, path, refused = buffer.getvalue(), tmp_path / name, 0
    for turn in range(60):
        data = bytearray(whole)
        if turn % 2:
            data = data[: rng.integers(16, len(data))]
        else:
            for place in rng.integers(12, len(data), 12):
                data[place] = rng.integers(256)
        path.write_bytes(data)
        try:
            pixels(path)
        except JobError:
            refused += 1

    assert refused >= 10


def test_what_is_no_image_is_left_to_the_other_probe(tmp_path: Path, clip_of_none: Path):
    """A video, a missing file, a folder, and a pipe without a writer, which must not wait."""
    os.mkfifo(tmp_path / "pipe.png")
    for path in (clip_of_none, tmp_path / "absent.png", tmp_path, tmp_path / "pipe.png"):
        assert probe_image(path, Settings()) is None


def test_a_large_file_is_refused_before_it_is_read(tmp_path: Path):
    """By the cap on uploads."""
    (tmp_path / "a.png").write_bytes(png(64, 64))
    with pytest.raises(TooLarge):
        probe_image(tmp_path / "a.png", replace(Settings(), max_bytes=10))
