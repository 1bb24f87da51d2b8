"""Made clips: stills set in motion and encoded, real and forged twins, as a dataset of videos.

A detector that was trained on stills is deployed on video.  Where no forged videos are at hand,
made clips are the nearest thing.  Each still moves (pan, zoom, turn, mild bending, sensor noise),
once as it is and once forged before it moves, and goes through a real encoder at each CRF that is
asked for.  Twins share motion, size and encoder settings, so that only the forgery differs.

    stills ─▶ make_clips ─▶ videos and their index ─▶ `ralf data prepare` ─▶ calibrate, evaluate

All randomness is seeded by the still's name, so that one more still changes no other clip.  Clips
that exist already are kept, so that an interrupted run goes on.  By default the forged still moves
as one.  With `drift` each frame is forged anew, on landmarks that slip (train/forge/drift.py).
With `talk` a renderer that draws mouths moves them, frame by frame; the others forge as before.
`uploads` adds a clip that went through a phone's encoder, a scaling ladder and a platform's; both
are drawn by the still's name.  Made clips cannot show real reenactment.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from ralf.train.data.index import REAL, Index, IndexFault, Row
from ralf.train.data.pictures import Frame, seeded_by
from ralf.train.data.pool import Pool
from ralf.train.data.processes import results
from ralf.train.forge.drift import TURN, Drift, joined, talking
from ralf.train.forge.families import FAMILIES, Family, ForgeryFamily, Portrait, of
from ralf.train.forge.landmarks import FaceGeometry
from ralf.train.forge.pixels import Image, resize, to_u8
from ralf.train.forge.renderers.stored import load
from ralf.train.forge.video import animate, encode, recompress, surroundings
from ralf.train.recipe import Data

INDEX = "index.csv"
OPTIONS = "clips.json"
UPLOAD = "upload"
"""The compression of clips that went through several encoders."""
FPS = 12.5
CODECS = ("libx264", "libx265", "libvpx-vp9")
SIZES = ((480, 480), (640, 480), (480, 640), (720, 576))
TALL = (0.5, 1.15)
"""Least and greatest height of the portrait over that of the frame: faces of 120 to 330 pixels."""
SHARE = 8
"""Stills that a process takes at a time."""
OnProgress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class ClipOptions:
    """Which clips to make of each still."""

    families: tuple[Family, ...]
    renderers: tuple[Path, ...] = ()
    """Files of fitted renderers, which take turns with the families."""
    crfs: tuple[int, ...] = (23, 40)
    each: int = 1
    """Forged clips of each still at each CRF: the families take turns."""
    seconds: float = 1.3
    drift: bool = False
    """Forge each frame anew, on landmarks that slip, in colours that drift."""
    talk: bool = False
    """Let mouths that a renderer draws go from one person's expression to another's."""
    uploads: bool = False
    """One more clip of each, encoded by a phone and then by a platform."""

    def __post_init__(self) -> None:
        if unknown := set(self.families) - set(FAMILIES):
            raise IndexFault(f"no family {sorted(unknown)}; known: {', '.join(FAMILIES)}")
        if not 1 <= self.each <= len(self.ways):
            raise IndexFault(
                f"asked for {self.each} forged clips a still of {len(self.ways)} families and "
                "renderers: name some, and at most as many clips"
            )
        # A family may be listed again, to be drawn more often: each still has it once at most.
        fitted = [way.name for way in self.ways[len(self.families) :]]
        if len({*fitted} - {*self.families}) < len(fitted):
            raise IndexFault("two renderers of one name would write the same clips: give one")
        if self.talk and not any(way.speaks for way in self.ways):
            raise IndexFault(
                "clips can talk by a renderer that draws mouths alone: give a file of `ralf forge "
                "fit lip_sync` among the renderers, or do not ask to talk"
            )
        if not (self.crfs or self.uploads) or not all(0 <= crf <= 51 for crf in self.crfs):
            raise IndexFault(f"CRFs should lie in 0 to 51, got {self.crfs}")

    @property
    def compressions(self) -> tuple[str, ...]:
        """What the clips of each still are encoded as."""
        return (*(f"crf{crf}" for crf in self.crfs), *([UPLOAD] if self.uploads else []))

    @property
    def ways(self) -> tuple[ForgeryFamily, ...]:
        """Every way of forging: the families, then the renderers."""
        fitted = (load(path).renderer.as_family() for path in self.renderers)
        return (*map(of, self.families), *fitted)


def make_clips(
    index: Index,
    out: Path,
    options: ClipOptions,
    *,
    split: str,
    data: Data | None = None,
    limit: int | None = None,
    workers: int = 0,
    on_progress: OnProgress | None = None,
) -> Index:
    """The clips of a split's real stills, and the index of them, also written to OUT/index.csv.

    `data` says how faces are found and forged: the part of the recipe that is to be judged by them.
    """
    data = data or Data()
    pool = Pool(index, data, split, ram_bytes=0)
    stills = [video[0] for video in pool.real][:limit]
    if not stills:
        raise IndexFault(f"split {split!r} has no real pictures to set in motion")
    _record(out, options, tight=data.tight_pictures)
    make, opened = partial(_clips, pool, out), partial(_opened, index, split, data, out)
    tasks = [_StillTask(still, number, options) for number, still in enumerate(stills)]
    rows: list[Row] = []
    for done, made in enumerate(results(make, opened, tasks, workers, share=SHARE), 1):
        rows += made
        if on_progress is not None:
            on_progress(done, len(tasks), made[0].path)
    order = {task.still.path: place for place, task in enumerate(tasks)}
    rows.sort(key=lambda row: (order[row.group], row.path))
    found = Index(out, tuple(replace(row, group="") for row in rows))
    found.save(out / INDEX)
    return found


def _record(out: Path, options: ClipOptions, *, tight: bool) -> None:
    """Write down what makes the same clip another one; a folder begun otherwise is refused."""
    facts = {"seconds": options.seconds, "drift": options.drift}
    # Said only where it is so: folders of earlier versions do not have it.
    facts |= {"tight_pictures": True} if tight else {}
    facts |= {"talk": True} if options.talk else {}
    path = out / OPTIONS
    if path.exists() and (before := json.loads(path.read_text())) != facts:
        raise IndexFault(
            f"{out} was begun with {before}, now {facts} is asked for: take another folder, or "
            "empty it"
        )
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts) + "\n")


@dataclass(frozen=True)
class _StillTask:
    """One still and the ways it is forged."""

    still: Frame
    number: int
    options: ClipOptions

    @property
    def ways(self) -> tuple[ForgeryFamily, ...]:
        # In turn and not by chance: no family gets more than one clip more than another.
        ways, each = self.options.ways, self.options.each
        start = self.number * each
        return tuple(ways[(start + turn) % len(ways)] for turn in range(each))


def _opened(index: Index, split: str, data: Data, out: Path) -> Callable[[_StillTask], list[Row]]:
    return partial(_clips, Pool(index, data, split, ram_bytes=0), out)


def _clips(pool: Pool, out: Path, task: _StillTask) -> list[Row]:
    """The rows of a still's clips, which are made where they are missing."""
    still = task.still
    face = pool.pictures.face_to_forge(still)
    rows = []
    for way in (None, *task.ways):
        name = way.name if way else REAL
        paths = {
            compression: out / compression / name / f"{_stem(still)}.mp4"
            for compression in task.options.compressions
        }
        rows += [
            _row(still, name, compression, path.relative_to(out).as_posix())
            for compression, path in paths.items()
        ]
        missing = [path for path in paths.values() if not path.exists()]
        if not missing:
            continue
        image = pool.pictures.picture(still)
        portraits = [image] if way is None else _forged(task, pool, image, face, way)
        for path in missing:
            _write(portraits, image, path, still, task.options)
    return rows


def _forged(
    task: _StillTask, pool: Pool, image: Image, face: FaceGeometry, way: ForgeryFamily
) -> list[Image]:
    """The forged still; where it drifts or talks, one for each frame of the clip."""
    still, options = task.still, task.options
    rng, frames = seeded_by(f"{still.name}+{way.name}"), max(1, round(options.seconds * FPS))
    donors = _donors(pool, still, face, frames, rng) if options.talk and way.speaks else None
    if not options.drift and donors is None:
        return [pool.forgery(still, image, face, way, rng)[0]]
    drift = Drift(seeded_by(f"{still.name}+{way.name} drifts"), FPS)
    slips = list(drift.slips(face, frames)) if options.drift else []
    faces = [slip.face for slip in slips] or [face] * frames
    if donors is None:
        # The first face is the one that the donor is chosen by; it is not shown.
        made = pool.forgeries(still, image, (face, *faces), way, rng)
        next(made)
    else:
        made = pool.forgeries(still, image, faces, way, rng, donors=donors)
    if not slips:
        return [forged for forged, _ in made]
    return [joined(image, *each, slip) for each, slip in zip(made, slips, strict=True)]


def _donors(
    pool: Pool, still: Frame, face: FaceGeometry, frames: int, rng: np.random.Generator
) -> list[Portrait] | None:
    """Who is talking in each frame; None where there are no two other people."""
    asked = 2 + frames // TURN[0]  # enough where each turn is as short as it can be
    drawn = (pool.donor(still, face, rng, any_mouth=True) for _ in range(asked))
    found = [donor for donor in drawn if donor is not None]
    return talking(found, frames, rng) if len(found) > 1 else None


def _write(
    portraits: Sequence[Image], real: Image, path: Path, still: Frame, options: ClipOptions
) -> None:
    """The clip, written whole or not at all; its motion depends on the still's name alone."""
    # A generator of its own, so that the family changes nothing about the motion.
    rng, compression = seeded_by(f"{still.name} moves"), path.relative_to(path.parents[2]).parts[0]
    size = SIZES[rng.integers(len(SIZES))]
    upload = seeded_by(f"{still.name} upload") if compression == UPLOAD else None
    frames = animate(
        portraits,
        background=surroundings(real, *size) if len(portraits) > 1 else None,
        seconds=options.seconds,
        fps=FPS,
        size=size if upload is None else (size[0] * 3 // 2, size[1] * 3 // 2),
        seed=int(rng.integers(2**31)),
        tall=float(rng.uniform(*TALL)),
        grain=float(rng.uniform(0.5, 3)),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_name(f".{path.name}.part.mp4")
    if upload is None:
        crf = int(compression.removeprefix("crf"))
        encode(frames, partial_path, crf=crf, fps=FPS, preset="veryfast")
    else:
        _encode_upload(np.stack(list(frames)), size, upload, partial_path)
    partial_path.rename(path)


def _encode_upload(
    frames: Image, size: tuple[int, int], rng: np.random.Generator, path: Path
) -> None:
    """Frames [n, h, w, 3] as a phone records them, and then as a platform serves them."""
    phone, bits = rng.choice(["libx264", "libx265"], p=[0.6, 0.4]), rng.random()
    pixels = "yuv420p10le" if bits < 0.3 else "yuv420p"
    shown = recompress(
        frames, float(rng.uniform(18, 28)), phone, gop=30, preset="ultrafast", pixel_format=pixels
    )
    rung = float(rng.choice([1.0, 2 / 3, 1 / 2]))
    tall, wide = (2 * round(side * rung / 2) for side in reversed(size))
    shown = _scaled(shown, tall, wide)
    codec, crf = str(rng.choice(CODECS, p=[0.5, 0.25, 0.25])), float(rng.uniform(18, 42))
    again, second = rng.random() < 0.3, float(rng.uniform(18, 35))
    if again:  # the small copy is taken up and shared once more, at full size
        shown = _scaled(recompress(shown, second, gop=30), size[1], size[0])
    # VP9 counts to 63.
    crf = 1.3 * crf + 2 if codec == "libvpx-vp9" else crf
    encode(shown, path, codec=codec, crf=round(crf), fps=FPS, preset="veryfast")


def _scaled(frames: Image, height: int, width: int) -> Image:
    if frames.shape[1:3] == (height, width):
        return frames
    return np.stack([to_u8(resize(each.astype(np.float32), height, width)) for each in frames])


def _row(still: Frame, method: str, compression: str, path: str) -> Row:
    row = still.row
    return Row(
        dataset=f"{row.dataset}_clips",
        method=method,
        compression=compression,
        split=row.split,
        video=_stem(still),
        target=row.target,
        label=int(method != REAL),
        path=path,
        kind="video",
        group=still.path,
    )


def _stem(still: Frame) -> str:
    return f"{Path(still.path).stem}-{hashlib.sha256(still.name.encode()).hexdigest()[:6]}"
