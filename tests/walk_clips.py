"""Make clips and a model for `ralf bench pipeline`: python -m tests.walk_clips FOLDER [SIDE]

long.mp4 is like a real upload: 21 s of 1080p with six people and a keyframe every ten seconds.
small/ holds the clips that a soak repeats: several codecs and sizes and a rotated clip, two seconds
each.  models/ holds an untrained model for machines that have none; it is as fast as a trained one.
With SIDE that model is a tiny one for crops of SIDE pixels.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from demo.samples import portraits
from ralf.kernels.registry import point_to
from ralf.kernels.untrained import publish_untrained
from tests.clips import Image, face_clip

SMALL: dict[str, dict[str, Any]] = {
    "h264_360.mp4": {"size": (640, 360)},
    "h264_480.mp4": {"size": (854, 480), "gop": 10},
    "phone.mp4": {"size": (640, 360), "rotation": 90},
    "hevc_360.mp4": {"size": (640, 360), "codec": "libx265"},
    "vp9_270.webm": {"size": (480, 270), "codec": "libvpx-vp9"},
}
NAME = "untrained"


def make(folder: Path, side: int | None = None) -> None:
    """Make the clips and the model."""
    people: list[Image] = [
        np.ascontiguousarray(one.image[: round(one.image.shape[1] * 1.1)])
        for one in portraits().values()
    ]
    (folder / "small").mkdir(parents=True, exist_ok=True)
    for name, kind in SMALL.items():
        path = folder / "small" / name
        face_clip(path, people[:2], 2.0, fps=15, face_height=0.55, **kind)
    six = [people[number % len(people)] for number in range(6)]
    face_clip(folder / "long.mp4", six, 21.0, gop=250, face_height=0.35)
    network = {} if side is None else {"base": 4, "blocks": 1, "size": side}
    made = publish_untrained(folder / "models", name=NAME, **network)
    point_to(folder / "models", NAME, made.version)


if __name__ == "__main__":
    make(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None)
