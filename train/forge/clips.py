"""Made clips: stills set in motion and encoded, real and forged twins, as a dataset of videos.

A detector that was trained on stills is deployed on video.  Where no forged videos are at hand,
made clips are the nearest thing.  Each still moves (pan, zoom, turn, mild bending, sensor noise),
once as it is and once forged before it moves, and goes through a real encoder at each CRF that is
asked for.  Twins share motion, size and encoder settings, so that only the forgery differs.

    stills ─▶ make_clips ─▶ videos and their index ─▶ `ralf data prepare` ─▶ calibrate, evaluate

All randomness is seeded by the still's name, so that one more still changes no other clip.  Clips
that exist already are kept, so that an interrupted run goes on.  Made clips cannot show a forgery
that flickers or slips, because the forged still moves as one, nor real reenactment.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from ralf.train.data.index import REAL, Index, IndexFault, Row
from ralf.train.data.pictures import Frame
from ralf.train.data.pool import Pool
from ralf.train.forge.families import FAMILIES, Family, ForgeryFamily, of
from ralf.train.forge.pixels import Image
from ralf.train.forge.renderers.stored import load
from ralf.train.forge.video import animate, encode
from ralf.train.recipe import Data

INDEX = "index.csv"
FPS = 12.5
SIZES = ((480, 480), (640, 480), (480, 640), (720, 576))
TALL = (0.5, 1.15)
"""Least and greatest height of the portrait over that of the frame: faces of 120 to 330 pixels."""
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

    def __post_init__(self) -> None:
        if unknown := set(self.families) - set(FAMILIES):
            raise IndexFault(f"no family {sorted(unknown)}; known: {', '.join(FAMILIES)}")
        if not 1 <= self.each <= len(self.ways):
            raise IndexFault(
                f"asked for {self.each} forged clips a still of {len(self.ways)} families and "
                "renderers: name some, and at most as many clips"
            )
        if len({way.name for way in self.ways}) < len(self.ways):
            raise IndexFault("two renderers of one name would write the same clips: give one")
        if not self.crfs or not all(0 <= crf <= 51 for crf in self.crfs):
            raise IndexFault(f"CRFs should lie in 0 to 51, got {self.crfs}")

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
    limit: int | None = None,
    workers: int = 0,
    on_progress: OnProgress | None = None,
) -> Index:
    """The clips of a split's real stills, and the index of them, also written to OUT/index.csv."""
    pool = Pool(index, Data(), split, ram_bytes=0)
    stills = [video[0] for video in pool.real][:limit]
    if not stills:
        raise IndexFault(f"split {split!r} has no real pictures to set in motion")
    make = partial(_make_all, index, split, options, out)
    tasks = [_StillTask(still, number, options) for number, still in enumerate(stills)]
    rows: list[Row] = []
    for done, made in enumerate(_run(make, tasks, workers), 1):
        rows += made
        if on_progress is not None:
            on_progress(done, len(tasks), made[0].path)
    order = {task.still.path: place for place, task in enumerate(tasks)}
    rows.sort(key=lambda row: (order[row.group], row.path))
    found = Index(out, tuple(replace(row, group="") for row in rows))
    found.save(out / INDEX)
    return found


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


def _run(
    make: Callable[[Sequence[_StillTask]], list[list[Row]]], tasks: list[_StillTask], workers: int
) -> Iterator[list[Row]]:
    """The rows of each still, in order."""
    if workers == 0:
        yield from (make([task])[0] for task in tasks)
        return
    shares = [tasks[place : place + 8] for place in range(0, len(tasks), 8)]
    with ProcessPoolExecutor(workers, get_context("spawn")) as processes:
        for made in processes.map(make, shares):
            yield from made


_pool: tuple[tuple[Path, str], Pool] | None = None


def _make_all(
    index: Index, split: str, options: ClipOptions, out: Path, tasks: Sequence[_StillTask]
) -> list[list[Row]]:
    """The clips of some stills; each process opens the pool of donors once."""
    global _pool
    if _pool is None or _pool[0] != (index.root, split):
        _pool = ((index.root, split), Pool(index, Data(), split, ram_bytes=0))
    return [_clips(task, _pool[1], out) for task in tasks]


def _clips(task: _StillTask, pool: Pool, out: Path) -> list[Row]:
    still = task.still
    face = pool.pictures.face(still)
    if face is None:
        raise IndexFault(
            f"{still.path} has no box and five points, so nothing can be blended into it: "
            "`ralf data prepare` finds them"
        )
    rows = []
    for way in (None, *task.ways):
        for crf in task.options.crfs:
            name = way.name if way else REAL
            path = out / f"crf{crf}" / name / f"{_stem(still)}.mp4"
            rows.append(_row(still, name, crf, path.relative_to(out).as_posix()))
            if path.exists():
                continue
            image = pool.pictures.picture(still)
            if way is not None:
                image = pool.forgery(still, image, face, way, _seeded(f"{still.name}+{name}"))
            _write(image, path, crf, still.name, task.options.seconds)
    return rows


def _write(image: Image, path: Path, crf: int, name: str, seconds: float) -> None:
    """The clip, written whole or not at all; its motion depends on the still's name alone."""
    # A generator of its own, so that the family changes nothing about the motion.
    rng = _seeded(f"{name} moves")
    size = SIZES[rng.integers(len(SIZES))]
    frames = animate(
        image,
        seconds=seconds,
        fps=FPS,
        size=size,
        seed=int(rng.integers(2**31)),
        tall=float(rng.uniform(*TALL)),
        grain=float(rng.uniform(0.5, 3)),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_name(f".{path.name}.part.mp4")
    encode(frames, partial_path, crf=crf, fps=FPS, preset="veryfast")
    partial_path.rename(path)


def _row(still: Frame, method: str, crf: int, path: str) -> Row:
    row = still.row
    return Row(
        dataset=f"{row.dataset}_clips",
        method=method,
        compression=f"crf{crf}",
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


def _seeded(name: str) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big"))
