"""Makes every video that a test uses, with PyAV's own encoders, in a few milliseconds.

Each frame shows its number as a row of black and white blocks, so that a test can tell which frame
a decoder returned.  Its colours move, so that a wrong matrix, range or rotation is visible.  RGB
becomes YUV by the textbook formula in numpy.  The product uses swscale for that, so the tests
compare its result with an independent one.

`make_clip` makes any clip, `face_clip` pastes portraits, `decode_all` is the plain reference
decoder.  Broken and hostile files are in tests/hostile.py.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]  # [h, w, 3] RGB

os.environ.setdefault("SVT_LOG", "0")  # otherwise the AV1 encoder prints on stderr

BITS = 10
BLOCK = 8
"""Side of one block of the number, in pixels: four chroma samples of 4:2:0."""
MATRICES = {
    "bt601": (0.299, 0.114, 6),
    "bt709": (0.2126, 0.0722, 1),
    "bt2020": (0.2627, 0.0593, 9),
    "smpte240m": (0.212, 0.087, 7),
}
"""Kr, Kb and FFmpeg's number of each matrix."""


def picture(number: int, width: int = 96, height: int = 64) -> Image:
    """One frame: smooth moving colours, its number at the top, a red block at the top left."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    phase = number * 0.37
    image = np.stack(
        [
            128 + 80 * np.sin(x / width * 4 + phase),
            128 + 80 * np.sin(y / height * 5 - phase * 0.7 + 1),
            128 + 80 * np.sin((x + y) / (width + height) * 6 + phase * 1.3 + 2),
        ],
        axis=2,
    )
    for bit in range(BITS):
        value = 235 if number >> bit & 1 else 20
        image[:BLOCK, BLOCK * (bit + 1) : BLOCK * (bit + 2)] = value
    image[:BLOCK, :BLOCK] = (210, 40, 40)
    return image.round().clip(0, 255).astype(np.uint8)


def number_of(pixels: Any) -> int:
    """Read the number in a picture; takes u8 [3, h, w], upright."""
    luma = np.asarray(pixels, dtype=np.float64)[:, 2 : BLOCK - 2].mean((0, 1))
    blocks = luma[BLOCK : BLOCK * (BITS + 1)].reshape(BITS, BLOCK)[:, 2:-2].mean(1)
    return int(sum(1 << bit for bit in range(BITS) if blocks[bit] > 128))


def pictures(count: int, width: int = 96, height: int = 64) -> Iterator[Image]:
    """The first `count` numbered frames."""
    return (picture(number, width, height) for number in range(count))


def yuv_frame(image: Image, pixel_format: str, matrix: str, full: bool) -> Any:
    """An av frame of planar YUV (8 or 10 bits; 4:2:0, 4:2:2 or 4:4:4) by the textbook formula."""
    kr, kb, _ = MATRICES[matrix]
    rgb = image.astype(np.float64) / 255
    y = kr * rgb[..., 0] + (1 - kr - kb) * rgb[..., 1] + kb * rgb[..., 2]
    u, v = (rgb[..., 2] - y) / (2 - 2 * kb), (rgb[..., 0] - y) / (2 - 2 * kr)
    across = 1 if "444" in pixel_format else 2
    down = 2 if "420" in pixel_format else 1
    ten = pixel_format.endswith("10le")
    scale = 4.0 if ten else 1.0
    height, width = y.shape
    frame = av.VideoFrame(width, height, pixel_format)
    for plane, values, chroma in zip(frame.planes, (y, u, v), (False, True, True), strict=True):
        if chroma:
            rows, columns = height // down, width // across
            whole = values[: rows * down, : columns * across]
            whole = whole.reshape(rows, down, columns, across).mean((1, 3))
            levels = whole * (255 if full else 224) + 128
        else:
            levels = values * 255 if full else values * 219 + 16
        kind = np.dtype("<u2") if ten else np.dtype("u1")
        row = np.zeros((plane.height, plane.line_size // kind.itemsize), kind)
        row[:, : plane.width] = (levels * scale).round().clip(0, 255 * scale)
        plane.update(row.tobytes())
    return frame


def _fast_frame(image: Image, pixel_format: str, matrix: str, full: bool) -> Any:
    """The same frame, made by swscale."""
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
    out = frame.reformat(
        format=pixel_format,
        dst_colorspace={"bt601": 5, "bt709": 1, "bt2020": 9, "smpte240m": 7}[matrix],
        dst_color_range=2 if full else 1,
        threads=1,
    )
    out.colorspace, out.color_range = 2, 0  # untagged, unless make_clip tags it
    return out


def _tag(holder: Any, matrix: str, transfer: int | None, full_range: bool) -> None:
    """Write the colour tags of a frame or of an encoder; `transfer` 16 is PQ, 18 is HLG."""
    named = matrix != "untagged"
    if named:
        holder.colorspace = MATRICES[matrix][2]
    if transfer is not None:
        holder.color_trc, holder.color_primaries = transfer, 9
    if named or full_range:
        holder.color_range = 2 if full_range else 1


def _options(codec: str, quality: int, gop: int, b_frames: int) -> dict[str, str]:
    """Options for the fastest encoding in one thread; `quality` 0 is the best."""
    match codec:
        case "libx264":
            return {
                "preset": "veryfast",
                "crf": str(quality),
                "x264-params": f"keyint={gop}:min-keyint=1:scenecut=0:bframes={b_frames}:b-adapt=0",
            }
        case "libx265":
            params = f"log-level=none:pools=1:keyint={gop}:min-keyint=1:bframes={b_frames}"
            return {
                "preset": "ultrafast",
                "crf": str(quality),
                "x265-params": f"{params}:b-adapt=0:scenecut=0",
            }
        case "libvpx" | "libvpx-vp9":
            return {"crf": str(max(4, quality)), "b": "2M", "deadline": "realtime", "cpu-used": "8"}
        case "libsvtav1":
            return {"preset": "12", "crf": str(max(1, quality)), "svtav1-params": "lp=1"}
        case _:
            step = str(max(1, quality // 8 + 1))
            return {"qmin": step, "qmax": step}


def make_clip(
    path: str | Path,
    frames: int | Iterable[Image] = 24,
    *,
    size: tuple[int, int] = (96, 64),
    codec: str = "libx264",
    fps: int | Fraction = 25,
    pts: Sequence[int] | None = None,
    time_base: Fraction | None = None,
    shift: int = 0,
    rotation: float = 0,
    hflip: bool = False,
    vflip: bool = False,
    matrix: str = "untagged",
    transfer: int | None = None,
    full_range: bool = False,
    pixel_format: str = "yuv420p",
    gop: int = 12,
    b_frames: int = 2,
    quality: int = 8,
    interlaced: bool = False,
    container: str | None = None,
    container_options: dict[str, str] | None = None,
    options: dict[str, str] | None = None,
    audio: bool = False,
    others: int = 0,
    metadata: dict[str, str] | None = None,
    exact: bool = True,
) -> Path:
    """Write a clip; the path's suffix chooses the container unless `container` names it.

    `pts` are in `time_base`; without them frames are 1/fps apart.  `shift` moves all packets by
    that many frames; below zero the clip starts at a negative time.  `rotation` is
    counter-clockwise, as a player applies it.  `matrix` and `full_range` set both how the picture
    is made and how it is tagged.  `audio` adds a silent track; `others` adds that many small video
    streams after the first.  Without `exact` swscale makes the YUV ten times as fast, which is
    needed for large clips of faces.
    """
    images = pictures(frames, *size) if isinstance(frames, int) else iter(frames)
    first = next(images)
    height, width = first.shape[:2]
    rate = Fraction(fps)
    named = matrix != "untagged"
    with av.open(
        str(path), "w", format=container, container_options=container_options or {}
    ) as file:
        chosen = _options(codec, quality, gop, b_frames)
        if interlaced:
            chosen["x264-params"] = f"{chosen.get('x264-params', '')}:tff=1:interlaced=1"
        stream: Any = file.add_stream(codec, rate=rate, options={**chosen, **(options or {})})
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        context = stream.codec_context
        context.thread_count, context.gop_size = 1, gop
        context.time_base = time_base or 1 / rate
        if codec in ("mpeg4", "libvpx"):
            context.max_b_frames = b_frames if codec == "mpeg4" else 0
        _tag(context, matrix, transfer, full_range)
        if rotation or hflip or vflip:
            stream.set_display_rotation(rotation, hflip=hflip, vflip=vflip)
        file.metadata.update(metadata or {})
        tracks = [_Sound(file)] if audio else []
        small = [_Small(file, rate) for _ in range(others)]
        unit = (1 / rate) / context.time_base
        move = 0

        def write(packet: Any) -> None:
            packet.pts += move
            packet.dts += move
            file.mux(packet)

        for number, image in enumerate(_chain(first, images)):
            convert = yuv_frame if exact else _fast_frame
            frame = convert(image, pixel_format, matrix if named else "bt601", full_range)
            _tag(frame, matrix, transfer, full_range)
            frame.time_base = context.time_base
            frame.pts = int(pts[number]) if pts is not None else int(number * unit)
            encoded = stream.encode(frame)
            move = int(shift * unit)
            for packet in encoded:
                write(packet)
            for track in (*tracks, *small):
                track.write(number, rate)
        for packet in stream.encode(None):
            write(packet)
        for track in (*tracks, *small):
            track.end()
    return Path(path)


def _chain(first: Image, rest: Iterable[Image]) -> Iterator[Image]:
    yield first
    yield from rest


class _Sound:
    """A silent audio track."""

    def __init__(self, file: Any) -> None:
        self.file = file
        codec = "libopus" if file.format.name == "webm" else "aac"
        self.stream = file.add_stream(codec, rate=48000)
        self.done = 0

    def write(self, number: int, rate: Fraction) -> None:
        while self.done < (number + 1) * 48000 / rate:
            frame = av.AudioFrame(format="fltp", layout="stereo", samples=960)
            for plane in frame.planes:
                plane.update(bytes(plane.buffer_size))
            frame.sample_rate, frame.pts = 48000, self.done
            self.done += 960
            self.file.mux(self.stream.encode(frame))

    def end(self) -> None:
        self.file.mux(self.stream.encode(None))


class _Small:
    """A 32×32 video stream that the product must ignore."""

    def __init__(self, file: Any, rate: Fraction) -> None:
        self.file = file
        self.stream = file.add_stream("mpeg4", rate=rate)
        self.stream.width = self.stream.height = 32
        self.stream.pix_fmt = "yuv420p"
        self.stream.codec_context.thread_count = 1

    def write(self, number: int, rate: Fraction) -> None:
        frame = yuv_frame(np.full((32, 32, 3), 255, np.uint8), "yuv420p", "bt601", False)
        frame.pts, frame.time_base = number, 1 / rate
        self.file.mux(self.stream.encode(frame))

    def end(self) -> None:
        self.file.mux(self.stream.encode(None))


def sound_only(path: str | Path, seconds: float = 1.0, cover: bool = False) -> Path:
    """Write an audio file, with a cover picture if `cover` is set."""
    with av.open(str(path), "w") as file:
        sound = _Sound(file)
        art: Any = None
        if cover:
            art = file.add_stream("mjpeg", rate=25)
            art.width = art.height = 64
            art.pix_fmt = "yuvj420p"
            art.disposition = av.stream.Disposition.attached_pic
            file.mux(art.encode(yuv_frame(picture(0, 96, 64)[:, :64], "yuvj420p", "bt601", True)))
        for number in range(round(seconds * 25)):
            sound.write(number, Fraction(25))
        sound.end()
    return Path(path)


def no_frames(path: str | Path) -> Path:
    """Write a valid container whose video stream has no frame."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        file.start_encoding()
    return Path(path)


def packet_places(path: str | Path) -> list[tuple[int, int]]:
    """Offset in the file and length of each video packet, in decoding order."""
    data = Path(path).read_bytes()
    with av.open(str(path)) as file:
        packets = [bytes(packet) for packet in file.demux(video=0) if packet.size]
    return [(data.index(packet), len(packet)) for packet in packets]


@dataclass(frozen=True)
class Shown:
    """One frame as the reference decoder returns it."""

    time_s: float
    pixels: Image  # [3, h, w], not rotated
    key: bool


def video_bytes(path: str | Path) -> int:
    """The size of all packets of the first video stream."""
    with av.open(str(path)) as file:
        return sum(packet.size for packet in file.demux(video=0))


def decode_all(path: str | Path, stream: int = 0, **colour: Any) -> list[Shown]:
    """Decode every frame the plain way: FFmpeg chooses the demuxer, one thread, no seek.

    Times are relative to the first frame.  `colour` is passed to swscale, which otherwise follows
    the tags.  A packet that does not decode is skipped, as a player skips it.
    """
    flags = av.video.reformatter.Interpolation
    kind = flags.BILINEAR | flags.ACCURATE_RND | flags.FULL_CHR_H_INT
    with av.open(str(path)) as file:
        video = file.streams.video[stream]
        video.codec_context.thread_count = 1
        shown = []
        for packet in file.demux(video):
            try:
                frames = packet.decode()
            except av.error.InvalidDataError:
                continue
            for frame in frames:
                pixels = frame.to_ndarray(format="rgb24", interpolation=kind, **colour)
                shown.append((frame.time, pixels.transpose(2, 0, 1), frame.key_frame))
    start = shown[0][0]
    return [Shown(time - start, np.ascontiguousarray(pixels), key) for time, pixels, key in shown]


def face_clip(
    path: str | Path,
    portraits: Sequence[Image],
    seconds: float = 4.0,
    *,
    size: tuple[int, int] = (1920, 1080),
    fps: int = 25,
    face_height: float = 0.4,
    **encoding: Any,
) -> Path:
    """Write a clip of portraits, side by side, that move smoothly over a soft background.

    Each portrait is scaled to `face_height` of the frame's height and moves on an ellipse inside
    its own column, so that no portrait covers another.  `encoding` is passed to make_clip.
    """
    width, height = size
    cells = len(portraits)
    tall = min(int(height * face_height), max(16, width // max(1, cells) * 9 // 10))
    scaled = [_scaled(portrait, tall) for portrait in portraits]
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    ground = np.stack([70 + 60 * x / width, 90 + 50 * y / height, 120 - 40 * x / width], axis=2)
    ground = ground.astype(np.uint8)

    def frames() -> Iterator[Image]:
        for number in range(round(seconds * fps)):
            image = ground.copy()
            for place, face in enumerate(scaled):
                angle = number / fps * 1.1 + place
                free_x, free_y = width // cells - face.shape[1], height - face.shape[0]
                left = width * place // cells + int(free_x * (0.5 + 0.5 * np.cos(angle)))
                top = int(free_y * (0.5 + 0.3 * np.sin(angle * 0.8)))
                left = min(max(left, 0), width - face.shape[1])
                image[top : top + face.shape[0], left : left + face.shape[1]] = face
            yield image

    return make_clip(
        path, frames(), fps=fps, **{"quality": 18, "gop": 50, "exact": False, **encoding}
    )


def _scaled(image: Image, height: int) -> Image:
    """Scale the image to a height, with its aspect ratio kept, by swscale's area filter."""
    width = max(2, round(image.shape[1] * height / image.shape[0]))
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image[..., :3]), format="rgb24")
    return frame.reformat(width=width, height=height, interpolation="AREA").to_ndarray()
