"""Images as clips: a still is a clip of one frame, an animated GIF, WebP or PNG a short video.

`probe_image` says what an image is, or that the file is none; ImageDecoder reads its frames.  An
image may come from anybody, so the format is decided by the first bytes, only four of Pillow's
readers may open it, and its size is checked before any pixel is decoded.

A photo may have more pixels than a video (RALF_MAX_STILL_PIXELS).  Where it does, it is reduced by
a whole number right after decoding, in a JPEG during it; Probe's width and height are the reduced
ones, so that boxes fit the frame that was judged.
"""

import math
import os
import stat
import struct
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from ralf.worker.errors import (
    CorruptMedia,
    NoVideoStream,
    TooLarge,
    TooLong,
    TooManyFrames,
    TooManyPixels,
    UnreadableFile,
)
from ralf.worker.media.probe import LEAST_SIDE, refuse_pixels
from ralf.worker.media.sampling import plan
from ralf.worker.media.types import Clip, Frames, Probe
from ralf.worker.settings import Settings

ENDINGS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif"})
MOST_FRAMES = 3000
"""Of an animation; each has to be decoded to reach the next."""
PASS_SECONDS = 60.0
DEFAULT_MS = 100.0
"""How long browsers show a frame that names no duration, or less than 20 ms."""
STILL = "uncalibrated_still: the model was calibrated on video; this score is of one picture"
ANIMATION = "uncalibrated_animation: the model was calibrated on video, this is an animated image"
DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    ZeroDivisionError,
    MemoryError,
    struct.error,
)
"""What Pillow's readers raise for damaged files; they promise no class of their own."""
TURNS = {2: (0, True), 3: (180, False), 4: (180, True), 5: (270, True)} | {
    6: (270, False),
    7: (90, True),
    8: (90, False),
}
"""EXIF's orientations as degrees counter-clockwise, and whether the picture is mirrored."""


def reduction(width: int, height: int, settings: Settings) -> int:
    """By how much both sides of a still are divided: to the pixels of the largest video."""
    return math.ceil(math.sqrt(width * height / (settings.max_width * settings.max_height)))


def format_of(head: bytes) -> str:
    """Pillow's name of the image format that begins with these bytes; empty: no image."""
    if head.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if head[:6] in (b"GIF87a", b"GIF89a"):
        return "GIF"
    return "WEBP" if head[:4] == b"RIFF" and head[8:12] == b"WEBP" else ""


def probe_image(path: str | Path, settings: Settings) -> Probe | None:
    """The facts of an image; None for any other file, also for one that cannot be read."""
    try:
        # Without O_NONBLOCK a pipe would wait for its writer.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        found = os.fstat(handle)
        head = os.read(handle, 16) if stat.S_ISREG(found.st_mode) else b""
    except OSError:
        return None
    finally:
        os.close(handle)
    format_name = format_of(head)
    if not format_name:
        return None
    if found.st_size > settings.max_bytes:
        raise TooLarge(f"{found.st_size} bytes; at most {settings.max_bytes} are taken")
    with _guarded(path, format_name, settings), _opened(path, format_name, settings) as image:
        times, duration_s = _times(image, format_name)
        turn, mirrored = TURNS.get(image.getexif().get(0x0112, 1), (0, False))
        still = len(times) == 1
        coded_width, coded_height = image.size
        shrunk = reduction(coded_width, coded_height, settings) if still else 1
        width, height = coded_width // shrunk, coded_height // shrunk
        notes = [STILL if still else ANIMATION]
        if shrunk > 1:
            notes.append(
                f"reduced_still: judged at {width}×{height} of {coded_width}×{coded_height} "
                "pixels; boxes are in pixels of the smaller; small faces may be missed"
            )
        return Probe(
            path=str(Path(path).absolute()),
            size_bytes=found.st_size,
            container="image",
            codec=format_name.lower(),
            stream_index=0,
            coded_width=coded_width,
            coded_height=coded_height,
            width=height if turn in (90, 270) else width,
            height=width if turn in (90, 270) else height,
            rotation=turn,
            mirrored=mirrored,
            pixel_format=image.mode.lower(),
            duration_s=duration_s,
            frame_rate=0.0 if still else len(times) / duration_s,
            variable_rate=not still and bool(np.ptp(np.diff([*times, duration_s])) > 1e-9),
            frame_count=len(times),
            times_s=times,
            # One only: a frame of an animation may change parts of the frame before it.
            keyframes=np.zeros(1, np.int64),
            start_s=0.0,
            colour_space="rgb",
            colour_range="pc",
            interlaced=False,
            warnings=tuple(notes),
        )


@contextmanager
def _opened(path: str | Path, format_name: str, settings: Settings) -> Iterator[Image.Image]:
    """The image, its size checked, nothing decoded; the file is closed whatever Pillow leaves."""
    with Path(path).open("rb") as file, _header(file, format_name) as image:
        width, height = image.size
        most = _most_pixels(settings)
        if width * height > most:
            raise TooManyPixels(
                f"{width}×{height} are {width * height} pixels; at most {most} are taken of a "
                "picture (RALF_MAX_STILL_PIXELS)"
            )
        shrunk = 1
        if _animated(image, format_name):
            refuse_pixels(width, height, settings)
        else:
            shrunk = reduction(width, height, settings)
        if min(width, height) // shrunk < LEAST_SIDE:
            raise NoVideoStream(
                f"expected a picture of {LEAST_SIDE}×{LEAST_SIDE} or more, got {width}×{height}"
            )
        yield image


def _header(file: BinaryIO, format_name: str) -> Image.Image:
    """The image without its pixels; Pillow warns of large ones, for which we have our own cap."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(file, formats=[format_name])


def _most_pixels(settings: Settings) -> int:
    """Pillow opens no picture of more than twice its own limit, whatever the setting says."""
    return min(settings.max_still_pixels, 2 * (Image.MAX_IMAGE_PIXELS or 0))


def _animated(image: Image.Image, format_name: str) -> bool:
    # A JPEG with several pictures (MPO) is a still with its preview or depth, no animation.
    return format_name != "JPEG" and bool(getattr(image, "is_animated", False))


@contextmanager
def _guarded(path: str | Path, format_name: str, settings: Settings) -> Iterator[None]:
    """Whatever Pillow raises inside becomes an error of worker/errors.py."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata
            # Pillow raises its error only above twice the limit, and warns below.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooManyPixels(
            f"more than the {_most_pixels(settings)} pixels that are taken of a picture "
            "(RALF_MAX_STILL_PIXELS)"
        ) from error
    except PermissionError as error:
        raise UnreadableFile(f"cannot read {path}: {error.strerror}") from error
    except DAMAGED as error:
        raise CorruptMedia(f"this {format_name} image cannot be decoded: {error}") from error


def _times(image: Image.Image, format_name: str) -> tuple[NDArray[np.float64], float]:
    """When each frame begins, and how long the whole is; a still lasts no time."""
    if not _animated(image, format_name):
        return np.zeros(1), 0.0
    began, at = time.monotonic(), 0.0
    times: list[float] = []
    while True:
        try:
            image.seek(len(times))
        except EOFError:
            break
        # Pillow's WebP reader gives a frame's duration only once the frame is loaded.
        image.load()
        times.append(at / 1000)
        shown = float(image.info.get("duration") or 0.0)
        at += shown if shown >= 20 else DEFAULT_MS
        if len(times) > MOST_FRAMES:
            raise TooManyFrames(f"an animated image of more than {MOST_FRAMES} frames")
        if time.monotonic() - began > PASS_SECONDS:
            raise TooLong(f"reading {len(times)} frames took more than {PASS_SECONDS:g} s")
    image.seek(0)
    return (np.zeros(1), 0.0) if len(times) == 1 else (np.asarray(times), at / 1000)


@dataclass
class ImageDecoder:
    """A Decoder for what probe_image has accepted."""

    settings: Settings
    name: str = "pillow"

    def halved(self) -> "ImageDecoder":
        """The same: a frame is decoded alone anyway."""
        return self

    def decode(self, clips: Sequence[Clip]) -> Iterator[Frames]:
        """One frame a chunk."""
        for clip in clips:
            yield from self.frames(clip, plan(clip))

    def frames(self, clip: Clip, wanted: NDArray[np.int64]) -> Iterator[Frames]:
        """These frames of one clip, in order."""
        probe = clip.probe
        what = (probe.path, probe.codec.upper(), self.settings)
        with ExitStack() as stack:
            with _guarded(*what):
                image = stack.enter_context(_opened(*what))
            for done, number in enumerate(wanted, 1):
                with _guarded(*what):
                    if probe.frame_count > 1:
                        image.seek(int(number))
                    # Not around the yield: an error of the caller's must not become corrupt_media.
                    frame = torch.from_numpy(_rgb(self._fitting(image, probe)))
                    pixels = frame.permute(2, 0, 1)[None].contiguous()
                    del frame
                yield Frames(
                    clip=clip,
                    pixels=pixels,
                    times_s=probe.times_s[number : number + 1],
                    indices=np.array([number]),
                    asked=done,
                    total=len(wanted),
                    decoder=self.name,
                )

    def _fitting(self, image: Image.Image, probe: Probe) -> Image.Image:
        """A still at the size that its Probe names, not yet turned; others as they are."""
        if probe.frame_count > 1:
            return image
        shrunk = reduction(image.width, image.height, self.settings)
        if shrunk == 1:
            return image
        size = image.width // shrunk, image.height // shrunk
        # PNG's reader finds the orientation only now; the reduced picture keeps it.
        image.getexif()
        # libjpeg halves while it decodes, so the whole picture is never in memory.
        image.draft(None, size)
        # Entries of a palette cannot be averaged.
        if image.mode in {"P", "PA", "1"}:
            image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        return image.resize(size, Image.Resampling.BOX)


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    """Upright u8 [h, w, 3]; transparent parts are white, as most viewers show them."""
    picture = ImageOps.exif_transpose(image)
    if picture.mode.startswith("I"):  # 16 bits a pixel: convert() would clip them, not scale
        # 65,535 / 257 is 255.
        deep = np.asarray(picture).astype(np.float64)
        picture = Image.fromarray((deep / 257).clip(0, 255).round().astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        ground = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(ground, picture)
    return np.array(picture.convert("RGB"))
