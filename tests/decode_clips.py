"""Make clips for `ralf bench decode`: python -m tests.decode_clips FOLDER

A textured background moves under film grain, so that decoding costs as much as with a camera's
video.  Each clip is made by one process; sixteen cores make them all in about a minute.
"""

import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter

from tests.clips import Image, make_clip


@dataclass(frozen=True)
class Kind:
    """The properties of one clip; by default 21 s at 25 frames a second."""

    name: str
    size: tuple[int, int] = (1920, 1080)
    codec: str = "libx264"
    gop: int = 250
    frames: int = 525


KINDS = (
    Kind("h264_1080_gop250.mp4"),
    Kind("h264_1080_gop25.mp4", gop=25),
    Kind("h264_540_gop250.mp4", (960, 540)),
    Kind("h264_240_gop250.mp4", (426, 240)),
    Kind("h264_1080_3s.mp4", frames=75),
    Kind("hevc_1080_gop250.mp4", codec="libx265"),
    Kind("vp9_1080_gop250.webm", codec="libvpx-vp9"),
)


def camera(width: int, height: int, count: int) -> Iterator[Image]:
    """Soft shapes that move by two pixels a frame, with grain."""
    random = np.random.default_rng(0)
    large = (height + 2 * count + 16, width + 2 * count + 16, 3)
    ground = gaussian_filter(random.standard_normal(large).astype(np.float32), (6, 6, 0))
    ground = 128 + 40 * ground / ground.std()
    grain = random.normal(0, 5, (height + 16, width + 16, 1)).astype(np.float32)
    for number in range(count):
        y, x = random.integers(0, 16, 2)
        moved = ground[2 * number :, number:][:height, :width]
        image = moved + grain[y : y + height, x : x + width]
        yield image.clip(0, 255).astype(np.uint8)


def make(folder: Path, kind: Kind) -> Path:
    """Write one clip."""
    return make_clip(
        folder / kind.name,
        camera(*kind.size, kind.frames),
        codec=kind.codec,
        gop=kind.gop,
        quality=21,
        matrix="bt709",
        exact=False,
        options={"b": "8M"} if kind.codec == "libvpx-vp9" else None,
    )


def main() -> None:
    """Make all clips in parallel."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor() as pool:
        for path in pool.map(make, [folder] * len(KINDS), KINDS):
            print(path, path.stat().st_size)


if __name__ == "__main__":
    main()
