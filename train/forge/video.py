"""Make video: set a still portrait in motion, encode frames to a file or in memory.

`animate` pans, zooms, turns and slightly bends a portrait, like a hand-held phone and a living
head, so that frames differ as those of an upload do.  A forged portrait that is animated with the
same seed moves exactly as its authentic twin.  `recompress` runs images through a real encoder and
decoder in memory; training uses it for H.264.  No other file of training encodes video.

Encoders run on one thread: their output then does not depend on the machine's number of cores.
An empty list of frames and frames of different sizes are refused.
"""

from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
from numpy.typing import NDArray

from ralf.train.forge.pixels import Image, Pixels, blur, grid, remap, resize, spread, to_u8

Colour = Literal["untagged", "bt709"]
ROW = 64
"""Pixels that swscale's vectors take at once, or a multiple of it."""
DECODERS = {"libx264": "h264", "libx265": "hevc", "libvpx-vp9": "vp9", "mpeg4": "mpeg4"}


def _options(codec: str, crf: float, preset: str) -> dict[str, str]:
    """Each encoder's own names for quality and speed."""
    if codec == "libvpx-vp9":
        return {"crf": str(crf), "b": "0", "deadline": "realtime", "cpu-used": "8"}
    if codec == "mpeg4":
        return {"qmin": str(max(1, round(crf / 3))), "qmax": str(max(1, round(crf / 3)))}
    more = {
        # With B-frames x264's macroblock tree gives different output from run to run.
        "libx264": {"x264-params": "mbtree=0"},
        "libx265": {"x265-params": "log-level=none:pools=1"},
    }
    return {"crf": str(crf), "preset": preset, **more.get(codec, {})}


def _even(image: Image) -> Image:
    """Chroma at half size needs even sides; the last row or column is repeated."""
    height, width = image.shape[:2]
    tall = np.concatenate([image, image[-1:]]) if height % 2 else image
    return np.concatenate([tall, tall[:, -1:]], axis=1) if width % 2 else tall


def encode(
    frames: Iterable[Image],
    path: str | Path,
    *,
    codec: str = "libx264",
    crf: float = 23,
    fps: float | Fraction = 25,
    gop: int = 50,
    pixel_format: str = "yuv420p",
    preset: str = "veryfast",
    rotation: int = 0,
    colour: Colour = "untagged",
    times: Sequence[int] | None = None,
) -> Path:
    """Write frames, u8 RGB [h, w, 3], to a video file; the suffix names the container.

    `rotation` is what a player must apply, in degrees counter-clockwise.  `times` are
    presentation times in milliseconds, for variable rate; else frames are 1/fps apart.
    """
    path = Path(path)
    rate = Fraction(fps).limit_denominator(1001)
    iterator = iter(frames)
    first = next(iterator, None)
    if first is None:
        raise ValueError(f"expected at least one frame for {path.name}, got none")
    height, width = _even(first).shape[:2]
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=rate, options=_options(codec, crf, preset))
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        stream.codec_context.gop_size = gop
        stream.codec_context.thread_count = 1
        stream.codec_context.time_base = Fraction(1, 1000) if times is not None else 1 / rate
        if colour == "bt709":
            stream.codec_context.colorspace = av.video.reformatter.Colorspace.ITU709
        if rotation:
            stream.set_display_rotation(rotation)
        for number, image in enumerate(_chain(first, iterator)):
            frame = _frame(image, (height, width), pixel_format, colour)
            frame.pts = times[number] if times is not None else number
            frame.time_base = stream.codec_context.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def _chain(first: Image, rest: Iterator[Image]) -> Iterator[Image]:
    yield first
    yield from rest


def _frame(image: Image, size: tuple[int, int], pixel_format: str, colour: Colour) -> Any:
    """One image as the encoder takes it."""
    even = _even(image)
    if even.shape[:2] != size or image.dtype != np.uint8:
        raise ValueError(
            f"every frame should be u8 {size[1]}×{size[0]}, got {image.dtype} {image.shape}"
        )
    # swscale's result in ten bits is not the same every time at the right edge of a row that its
    # vectors do not fill, so the row is filled up and the rest cut off again.
    spare = -size[1] % ROW if pixel_format.endswith("le") else 0
    filled = np.pad(even, ((0, 0), (0, spare), (0, 0)), mode="edge")
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(filled), format="rgb24")
    matrix = "ITU709" if colour == "bt709" else "ITU601"
    out: Any = frame.reformat(format=pixel_format, dst_colorspace=matrix)
    if spare:
        out = _narrowed(out, size[1])
    if colour == "bt709":
        out.colorspace = av.video.reformatter.Colorspace.ITU709
    return out


def _narrowed(frame: Any, width: int) -> Any:
    """The left part of a planar frame of two bytes a value."""
    out: Any = av.VideoFrame(width, frame.height, frame.format.name)
    for source, target in zip(frame.planes, out.planes, strict=True):
        taken = 2 * (width if source.width == frame.width else width // 2)
        rows = np.zeros((target.height, target.line_size), np.uint8)
        rows[:, :taken] = np.frombuffer(source, np.uint8).reshape(-1, source.line_size)[:, :taken]
        target.update(rows.tobytes())
    return out


def recompress(
    images: Sequence[Image] | Image,
    crf: float,
    codec: str = "libx264",
    *,
    gop: int = 12,
    preset: str = "superfast",
    pixel_format: str = "yuv420p",
) -> Image:
    """The images [n, h, w, 3] after a real encoder and decoder, as one short clip in memory.

    Frames after the first of each `gop` are predicted from the one before, as in an upload.  A
    `pixel_format` of yuv420p10le has ten bits, as newer phones record; VP9 here has eight only.
    """
    if not len(images):
        raise ValueError("expected at least one image to recompress, got none")
    height, width = images[0].shape[:2]
    size = _even(images[0]).shape[:2]
    encoder: Any = av.CodecContext.create(codec, "w")
    encoder.width, encoder.height, encoder.pix_fmt = size[1], size[0], pixel_format
    encoder.time_base, encoder.gop_size, encoder.thread_count = Fraction(1, 25), gop, 1
    # Without B-frames and look-ahead, so that a frame is predicted from the one before it.
    tune = {"tune": "zerolatency"} if codec in ("libx264", "libx265") else {}
    encoder.options = {**_options(codec, crf, preset), **tune}
    decoder: Any = av.CodecContext.create(DECODERS[codec], "r")
    decoder.thread_count = 1
    decoded: list[Any] = []
    for number, image in enumerate(images):
        frame = _frame(image, (size[0], size[1]), pixel_format, "untagged")
        frame.pts = number
        for packet in encoder.encode(frame):
            decoded += decoder.decode(packet)
    for packet in encoder.encode(None):
        decoded += decoder.decode(packet)
    decoded += decoder.decode(None)
    if len(decoded) != len(images):
        raise RuntimeError(f"{codec} returned {len(decoded)} of {len(images)} frames")
    out = [frame.to_ndarray(format="rgb24")[:height, :width] for frame in decoded]
    return np.stack(out)


class Motion:
    """Smooth paths over time, each a sum of two slow waves within ±1."""

    def __init__(self, rng: np.random.Generator, shape: tuple[int, ...]) -> None:
        self.rate = rng.uniform(0.15, 0.6, (2, *shape))  # Hz
        self.phase = rng.uniform(0, 2 * np.pi, (2, *shape))

    def at(self, time_s: float) -> NDArray[np.float64]:
        waves = np.sin(2 * np.pi * self.rate * time_s + self.phase)
        return np.asarray(0.6 * waves[0] + 0.4 * waves[1])


def surroundings(portrait: Image, width: int, height: int) -> Image:
    """A background where no scene is given: the portrait itself, enlarged and blurred."""
    small = resize(portrait.astype(np.float32), 24, 24)
    return to_u8(blur(resize(blur(small, 3), height, width, "bicubic"), 4))


def animate(
    portrait: Image | Sequence[Image],
    *,
    seconds: float = 3.0,
    fps: float = 25,
    size: tuple[int, int] = (960, 720),
    seed: int = 0,
    background: Image | None = None,
    centre: tuple[float, float] = (0.5, 0.5),
    tall: float = 1.0,
    pan: float = 0.03,
    zoom: float = 0.05,
    turn_deg: float = 3.0,
    bend: float = 0.008,
    grain: float = 1.0,
) -> Iterator[Image]:
    """Frames of a portrait in motion, u8 [h, w, 3]; `size` is width, height.

    The portrait is at `centre`, `tall` times as high as the frame, over `background`.  `pan` and
    `bend` are parts of its height; `grain` is the sensor's noise in grey levels.  The same seed
    gives any portrait the same motion.  Several portraits of one size are shown one a frame.
    """
    portraits = [portrait] if isinstance(portrait, np.ndarray) else list(portrait)
    width, height = size
    rng = np.random.default_rng(seed)
    scene = surroundings(portraits[0], width, height) if background is None else background
    base = resize(scene.astype(np.float32), height, width)
    camera, head = Motion(rng, (4,)), Motion(rng, (5, 5, 2))
    noise = rng.normal(0, grain, (height + 64, width + 64, 1)).astype(np.float32)
    for number in range(max(1, round(seconds * fps))):
        pose = _Pose(camera.at(number / fps), pan, zoom, turn_deg)
        knots = (bend * head.at(number / fps)).astype(np.float32)
        at = _seen_by(pose, (height, width), centre, tall) + spread(knots, height, width)
        seen = _compose(portraits[min(number, len(portraits) - 1)], base, at)
        y, x = rng.integers(0, 64, 2)
        seen += noise[y : y + height, x : x + width]
        yield to_u8(seen)


class _Pose:
    """Where the portrait stands in one frame: shift, scale and angle."""

    def __init__(self, wave: NDArray[np.float64], pan: float, zoom: float, turn_deg: float) -> None:
        self.shift = pan * wave[:2]
        self.scale = float(np.exp(zoom * wave[2]))
        angle = np.deg2rad(turn_deg) * wave[3]
        self.turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])


def _seen_by(
    pose: _Pose, size: tuple[int, int], centre: tuple[float, float], tall: float
) -> Pixels:
    """The point of the portrait that each pixel shows: from its middle, in parts of its height."""
    height, width = size
    middle = np.array([centre[0] * width - 0.5, centre[1] * height - 0.5], np.float32)
    at = (grid(height, width) - middle) / np.float32(height * tall)
    turned: Pixels = at @ (pose.turn / pose.scale).T.astype(np.float32)
    turned -= pose.shift.astype(np.float32)
    return turned


def _compose(portrait: Image, base: Pixels, at: Pixels) -> Pixels:
    """One frame: the portrait at its pose, its edges feathered into the scene."""
    rows, columns = portrait.shape[:2]
    edge = np.array([columns / rows, 1.0], np.float32) / 2 - np.abs(at)
    alpha = np.clip(np.minimum(edge[..., :1], edge[..., 1:]) / np.float32(0.04), 0, 1)
    middle = np.array([columns / 2, rows / 2], np.float32) - np.float32(0.5)
    seen = remap(portrait.astype(np.float32), at * np.float32(rows) + middle)
    seen -= base
    seen *= alpha
    seen += base
    return seen
