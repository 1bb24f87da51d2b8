"""Forged pictures on disk: each authentic face of a split, drawn anew by a fitted renderer.

    OUT/METHOD-KEY/render.json      what KEY is the hash of: the renderer's file, the picture format
    OUT/METHOD-KEY/faces/           the forged pictures, as large as the authentic ones
    OUT/METHOD-KEY/SPLIT.csv        their index

The folder is a cache: pictures that are there are kept, so that an interrupted run goes on, and
another renderer gets another folder.  What is random in a picture is seeded by the name of the
authentic one and the variant's number.  Pictures are stored without loss: outside the mask a
forgery has exactly its twin's pixels, so no second compression tells the two apart.

Read beside the authentic faces (`--data REALS --data OUT/…/train.csv`): a forgery has its real's
name, person, compression and split, and training pairs each real with a forgery of itself.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from PIL import Image as Picture

from ralf.kernels.atomic_files import replace_text
from ralf.train.data.index import Index, IndexFault, Row
from ralf.train.data.pictures import Frame, seeded_by
from ralf.train.data.pool import VARIANT, Pool
from ralf.train.data.processes import results
from ralf.train.forge.pixels import Image
from ralf.train.forge.renderers.stored import load
from ralf.train.recipe import Data

RECIPE = "render.json"
VERSION = 1
"""Raised when the same renderer would draw other pictures: it is part of the key."""
SHARE = 16
"""Pictures that a process takes at a time."""
OnProgress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class RenderRequest:
    """What to render."""

    renderer: Path
    split: str
    out: Path
    variants: int = 1
    limit: int | None = None
    """Only so many authentic pictures."""
    workers: int = 0
    """Processes; 0 works in this one."""


def render(
    index: Index, request: RenderRequest, *, on_progress: OnProgress | None = None
) -> tuple[Index, Path]:
    """The forgeries' index, and where it lies."""
    if request.variants < 1:
        raise IndexFault(f"variants should be at least 1, got {request.variants}")
    pool = _authentic(index, request.split)
    stills = [frame for video in pool.real for frame in video][: request.limit]
    if faceless := [still.path for still in stills if pool.pictures.face(still) is None]:
        raise IndexFault(
            f"{len(faceless)} pictures have no box and five points, {faceless[0]} first: "
            "`ralf data prepare` finds them"
        )
    folder = _folder(request)
    rows: list[Row] = []
    tasks = [_Task(still, variant) for variant in range(request.variants) for still in stills]
    setup = _Setup(index, request.split, request.renderer, folder)
    make, opened = _Forger(setup, pool).make, partial(_opened, setup)
    for done, row in enumerate(results(make, opened, tasks, request.workers, share=SHARE), 1):
        rows.append(row)
        if on_progress is not None:
            on_progress(done, len(tasks), row.path)
    made = Index(folder, tuple(rows))
    return made, made.save(folder / f"{request.split}.csv")


def _folder(request: RenderRequest) -> Path:
    """The folder of this renderer's pictures, made where it is missing."""
    stored = load(request.renderer)
    recipe = {
        "renderer": stored.renderer.name,
        "renderer_sha256": stored.sha256,
        "format": "lossless webp",
        "version": VERSION,
    }
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:8]
    folder = request.out / f"{stored.renderer.name}-{key}"
    (folder / "faces").mkdir(parents=True, exist_ok=True)
    replace_text(folder / RECIPE, json.dumps(recipe | {"trained": stored.record}, indent=1) + "\n")
    return folder


@dataclass(frozen=True)
class _Task:
    still: Frame
    variant: int

    @property
    def name(self) -> str:
        """Seeds what is random."""
        return f"{self.still.name}{VARIANT}{self.variant}"

    @property
    def stem(self) -> str:
        # The geometry is part of it: pictures that were prepared anew are rendered anew.
        row = self.still.row
        said = f"{self.name} {row.box} {row.five} {row.mesh.rpartition('::')[2]}"
        digest = hashlib.sha256(said.encode()).hexdigest()[:10]
        return f"{Path(self.still.path).stem[:40]}-{digest}"


@dataclass(frozen=True)
class _Setup:
    """What a process needs to render any task."""

    index: Index
    split: str
    renderer: Path
    folder: Path


def _opened(setup: _Setup) -> Callable[[_Task], Row]:
    return _Forger(setup, _authentic(setup.index, setup.split)).make


class _Forger:
    """The faces, the renderer and the folder of one process."""

    def __init__(self, setup: _Setup, pool: Pool) -> None:
        self.setup, self.pool = setup, pool
        self.family = load(setup.renderer).renderer.as_family()

    def make(self, task: _Task) -> Row:
        """The task's forged picture, where it is missing, and its row."""
        still, folder = task.still, self.setup.folder
        path = folder / "faces" / f"{task.stem}.webp"
        face = self.pool.pictures.face(still)
        assert face is not None  # `render` has looked
        if not path.exists():
            rng = seeded_by(f"{task.name}+{self.family.name}")
            image = self.pool.pictures.picture(still)
            _store(self.pool.forgery(still, image, face, self.family, rng)[0], path)
        real = self.setup.index.anywhere(still.row)
        return replace(
            real,
            method=self.family.name,
            label=1,
            kind="image",
            path=path.relative_to(folder).as_posix(),
            video=real.video + (f"{VARIANT}{task.variant}" if task.variant else ""),
            frame=still.number,
            # Databases keep their points elsewhere than in the row.
            box=real.box or tuple(float(x) for x in face.box),
            five=real.five or tuple(float(x) for x in face.five.ravel()),
        )


def _authentic(index: Index, split: str) -> Pool:
    """The split's authentic faces, which are also the donors."""
    return Pool(index.where(label=0), Data(), split, ram_bytes=0)


def _store(image: Image, path: Path) -> None:
    """The picture, written whole or not at all."""
    staging = path.with_name(f".{path.name}.part")
    # Quality 0 means the least effort here: a fifth larger than the best, and 30 times as quick.
    Picture.fromarray(image).save(staging, "WEBP", lossless=True, quality=0, method=0)
    staging.rename(path)
