"""Pictures with faces, made by changing and pasting skimage's astronaut."""

from collections.abc import Sequence

import numpy as np
import skimage.data
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter

from ralf.kernels.manifest import Sampling as ModelSampling
from ralf.worker.contract import Sampling
from ralf.worker.media.types import Clip, Frames, Probe

Picture = NDArray[np.uint8]  # [h, w, 3] RGB

HEAD = (150, 0, 300, 210)
"""The astronaut's head and shoulders; the face itself is about 90 pixels high."""
FACE_SHARE = 0.43
"""Height of the face divided by the height of HEAD."""


def portrait(face_px: int, variant: int = 0) -> Image.Image:
    """The head with a face of about `face_px` pixels, in one of twelve variants."""
    head = Image.fromarray(skimage.data.astronaut()).crop(HEAD)
    scale = face_px / FACE_SHARE / head.height
    head = head.resize((round(head.width * scale), round(head.height * scale)), Image.BICUBIC)
    if variant % 2:
        head = head.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    change = variant // 2 % 6
    if change == 1:
        head = head.filter(ImageFilter.GaussianBlur(face_px / 60))
    elif change == 2:
        head = ImageEnhance.Brightness(head).enhance(0.6)
    elif change == 3:
        head = ImageEnhance.Color(head).enhance(0.0)
    elif change == 4:
        head = ImageEnhance.Contrast(head).enhance(0.7)
    elif change == 5:
        head = head.rotate(12, Image.BICUBIC, fillcolor=(90, 90, 90))
    return head


def backdrop(width: int, height: int, seed: int = 0) -> Image.Image:
    """Soft colours with a little noise, in which no face can be found."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(40, 200, (5, 8, 3), dtype=np.uint8))
    soft = np.asarray(small.resize((width, height), Image.BICUBIC), np.float32)
    noisy = soft + rng.normal(0, 3, (height, width, 1))
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def scene(width: int, height: int, faces: Sequence[tuple[int, int, int]], seed: int = 0) -> Picture:
    """A frame with portraits pasted in, one variant after another; faces are (x, y, size)."""
    picture = backdrop(width, height, seed)
    for number, (x, y, face_px) in enumerate(faces):
        picture.paste(portrait(face_px, number + seed), (x, y))
    return np.array(picture)


def frames_of(pictures: Sequence[Picture] | Picture, times_s: Sequence[float] = ()) -> Frames:
    """The pictures as a decoder would return them, at 25 a second unless times are given."""
    pixels = torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2)
    n, _, height, width = pixels.shape
    times = np.array(times_s, np.float64) if len(times_s) else np.arange(n) / 25
    probe = Probe(
        path="made.mp4",
        size_bytes=1,
        container="mov,mp4,m4a,3gp,3g2,mj2",
        codec="h264",
        stream_index=0,
        coded_width=width,
        coded_height=height,
        width=width,
        height=height,
        rotation=0,
        pixel_format="yuv420p",
        duration_s=float(n),
        frame_rate=25.0,
        variable_rate=False,
        frame_count=n,
        times_s=times,
        keyframes=np.zeros(1, np.int64),
        start_s=0.0,
        colour_space="bt709",
        colour_range="tv",
        interlaced=False,
    )
    sampling = Sampling(**ModelSampling().model_dump())
    return Frames(Clip(probe, sampling), pixels, times, np.arange(n), asked=n, total=n)
