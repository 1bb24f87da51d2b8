"""The sample clips: a few seconds of video each, made from public-domain portraits.

    python -m demo.samples [FOLDER]

`make_samples` animates and encodes the portraits of demo/portraits.  Some stay untouched, others
are blended with an altered copy of themselves before they move.  A forged clip and its authentic
twin therefore share every frame's motion and every encoder setting.  truth.json says which clip is
which.  The same call gives the same files.  Nothing is downloaded, and no person's face is put on
another person.

The clips show how a verdict reads, not how often it is right: the shipped model judges all of them
rightly.  How often it errs stands on its card.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Picture

from ralf.train.forge.families import Family, Portrait, forge
from ralf.train.forge.landmarks import FaceGeometry
from ralf.train.forge.pixels import Image, blur, resize, to_u8
from ralf.train.forge.video import animate, encode
from ralf.train.recipe import HELD_OUT

PORTRAITS = Path(__file__).resolve().parent / "portraits"


@dataclass(frozen=True)
class Truth:
    """What a clip shows, as we made it."""

    file: str
    label: str
    """authentic, forged or no_faces."""
    faces: int
    portraits: tuple[str, ...]
    forged_faces: tuple[int, ...] = ()
    """Which of the portraits, from the left, are forged."""
    family: str | None = None
    note: str = ""


def portraits(folder: Path = PORTRAITS) -> dict[str, Portrait]:
    """Every portrait of a folder that holds faces.json, by file name."""
    listed = json.loads((folder / "faces.json").read_text())
    found = {}
    for name, face in listed.items():
        image = np.array(Picture.open(folder / name).convert("RGB"))
        geometry = FaceGeometry(np.array(face["box"], "f4"), np.array(face["five"], "f4"))
        found[name] = Portrait(image, geometry)
    return found


def forged(portrait: Portrait, family: Family = HELD_OUT, seed: int = 0) -> Image:
    """The portrait blended with an altered copy of itself."""
    if family == "swap":
        raise ValueError("a sample never puts one person's face on another's")
    return forge(portrait.image, portrait.face, family, np.random.default_rng(seed))[0]


def landscape(width: int, height: int, seed: int = 0) -> Image:
    """A hazy evening over four ridges: a picture without any face."""
    rng = np.random.default_rng(seed)
    rows = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
    picture = (1 - rows) * np.array([92, 124, 172], np.float32)
    picture = np.repeat(picture + rows * np.array([232, 188, 150], np.float32), width, axis=1)
    for depth in range(4):
        ridge = _ridge(rng, width) * (0.05 + 0.03 * depth) + 0.45 + 0.13 * depth
        below = np.clip((rows[..., 0] - ridge) * height, 0, 1)[..., None]
        shade = np.array([88, 96, 112], np.float32) * (1 - 0.24 * depth)
        rough = blur(rng.normal(0, 9 + 5 * depth, (height, width)).astype(np.float32), 0.8)
        picture += (shade + rough[..., None] - picture) * below
    return to_u8(picture)


def _ridge(rng: np.random.Generator, width: int) -> NDArray[np.float32]:
    """A skyline within about ±1: coarse hills and finer ones upon them."""
    line = np.zeros((1, width), np.float32)
    for octave in range(5):
        knots = rng.normal(0, 0.6**octave, (1, 4 * 2**octave)).astype(np.float32)
        line += resize(knots, 1, width, antialias=False)
    return line


def make_samples(
    out_dir: str | Path, folder: Path = PORTRAITS, family: Family = HELD_OUT
) -> list[Truth]:
    """Write the clips and truth.json into a folder; returns the truth."""
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    people = portraits(folder)
    names = sorted(people)
    alone, left, right, phone = (names[i % len(names)] for i in (5, 1, 6, 7))
    size, twin = (800, 600), 11
    encode(animate(people[alone].image, size=size, seed=twin), out / "authentic.mp4")
    fake = forged(people[alone], family, seed=3)
    encode(animate(fake, size=size, seed=twin), out / "forged.mp4")
    pair = (people[left].image, forged(people[right], family, seed=3))
    encode(_side_by_side(*pair), out / "two_faces.mp4")
    quiet = animate(landscape(960, 720), seconds=2, size=(640, 480), tall=1.3, bend=0, seed=2)
    encode(quiet, out / "no_faces.mp4")
    held = animate(people[phone].image, seconds=2, fps=30, size=(480, 854), tall=0.62, seed=7)
    turned = (np.rot90(frame, -1) for frame in held)
    encode(turned, out / "phone.mp4", fps=30, crf=28, rotation=90, colour="bt709")
    truth = [
        Truth("authentic.mp4", "authentic", 1, (alone,), note="untouched"),
        Truth("forged.mp4", "forged", 1, (alone,), (0,), family, "twin of authentic.mp4"),
        Truth("two_faces.mp4", "forged", 2, (left, right), (1,), family, "the right one is forged"),
        Truth("no_faces.mp4", "no_faces", 0, ()),
        Truth("phone.mp4", "authentic", 1, (phone,), note="upright by its rotation tag, BT.709"),
    ]
    document = {"schema": "ralf.samples/1", "clips": [asdict(clip) for clip in truth]}
    (out / "truth.json").write_text(json.dumps(document, indent=1) + "\n")
    return truth


def make_crowd(path: str | Path, folder: Path = PORTRAITS, seconds: float = 4.0) -> Path:
    """Six untouched people in one 1080p picture, for benchmarks."""
    people = list(portraits(folder).values())
    views = [
        animate(one.image, seconds=seconds, size=(640, 540), tall=0.8, seed=30 + number)
        for number, one in enumerate(people[i % len(people)] for i in range(6))
    ]
    frames = (
        np.vstack([np.hstack(row[:3]), np.hstack(row[3:])]) for row in zip(*views, strict=True)
    )
    return encode(frames, path)


def _side_by_side(left: Image, right: Image) -> Iterator[Image]:
    """Two people in one picture, as in a call."""
    views = (
        animate(image, seconds=2, size=(480, 480), seed=20 + number)
        for number, image in enumerate((left, right))
    )
    for pair in zip(*views, strict=True):
        yield np.concatenate(pair, axis=1)


if __name__ == "__main__":
    where = Path(sys.argv[1]) if len(sys.argv) > 1 else PORTRAITS.parent / "out" / "clips"
    make_samples(where)
    print(make_crowd(where / "six_faces.mp4").parent)
