"""Videos become a table of faces: in parallel, resumable, nothing dropped in silence.

    index ─▶ tasks ─▶ Extractor, several processes ─▶ faces/, done/ ─▶ index.csv, videos.csv

Faces are found and will be cut by the contract of the model that trains on them; prepare.json holds
it, another contract in the same folder is refused, and so is training with another.  videos.csv has
a row for each file: frames asked, decoded, faces found, kept, and why none were.  A run that was
stopped goes on after the last file it finished.  A file that kills its process is tried again
alone; if it kills that too, it is named, and the rest is finished.
"""

import csv
import json
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, fields
from pathlib import Path

import torch

from ralf.kernels.manifest import InputContract
from ralf.train.data.extract import Extractor, Outcome, Task, Way
from ralf.train.data.index import Index, IndexFault, Row
from ralf.train.data.pictures import frames_of
from ralf.train.data.pool import PREPARED

OnProgress = Callable[[int, int, Outcome], None]
VIDEOS, INDEX = "videos.csv", "index.csv"
Done = tuple[Task, Outcome, list[Row]]


def prepare(
    index: Index,
    out: Path,
    contract: InputContract,
    *,
    frames: int | None = None,
    workers: int = 0,
    device: str = "cpu",
    quality: int = 98,
    on_progress: OnProgress | None = None,
) -> Index:
    """Faces of every row that has none yet, in `out`; returns their index, which lies there too.

    workers 0 works in this process.  A row whose face is known already is taken as it is.
    """
    way = Way(contract, frames or contract.sampling.max_frames, quality)
    (out / "faces").mkdir(parents=True, exist_ok=True)
    (out / "done").mkdir(exist_ok=True)
    _settle(out, way)
    known = [row for row in index if row.kind == "lmdb" or (row.kind == "image" and row.box)]
    tasks = list(_tasks(index, {id(row) for row in known}))
    finished = {task.name: _read(out / "done" / f"{task.name}.json") for task in tasks}
    waiting = [task for task in tasks if finished[task.name] is None]
    for task in waiting:
        _begun(out, task.name).unlink(missing_ok=True)
    for number, (task, outcome, rows) in enumerate(_run(waiting, way, out, workers, device)):
        _write(out / "done" / f"{task.name}.json", outcome, rows)
        finished[task.name] = (outcome, rows)
        if on_progress is not None:
            on_progress(len(tasks) - len(waiting) + number + 1, len(tasks), outcome)
    ended = [each for each in finished.values() if each is not None]
    rows = [index.anywhere(row) for row in known] + [row for _, part in ended for row in part]
    made = Index(out, tuple(rows), index.notes)
    made.save(out / INDEX)
    _save_outcomes(out / VIDEOS, [outcome for outcome, _ in ended])
    return made


def _settle(out: Path, way: Way) -> None:
    """Note how this folder is prepared; another way than before is refused."""
    said = {"contract": way.contract.model_dump(mode="json"), "frames": way.frames}
    said["quality"] = way.quality
    path = out / PREPARED
    if path.exists() and (before := json.loads(path.read_text())) != said:
        changed = sorted(name for name in said if before.get(name) != said[name])
        raise IndexFault(
            f"{out} was begun with another {', '.join(changed)}: take another folder, or empty it"
        )
    path.write_text(json.dumps(said, indent=1) + "\n")


def _tasks(index: Index, known: set[int]) -> Iterator[Task]:
    """Rows of one file together: reviews have many, all else one."""
    files: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in index:
        if id(row) not in known:
            reviewed = row.kind == "video" and row.frame >= 0
            name = "" if reviewed else row.video
            key = (row.path if row.kind == "video" else name, *row.key[:3])
            files.setdefault(key, []).append(row)
    for rows in files.values():
        first = rows[0]
        if first.kind == "video":
            masks = str(index.root / first.masks) if first.masks else ""
            yield Task(index.whole_path(first), tuple(rows), masks)
            continue
        frames = next(iter(frames_of(Index(index.root, tuple(rows))).values()))
        paths = (Path(frame.path) for frame in frames)
        whole = tuple(str(path if path.is_absolute() else index.root / path) for path in paths)
        yield Task(index.whole_path(first), tuple(rows), pictures=whole)


def _run(tasks: list[Task], way: Way, out: Path, workers: int, device: str) -> Iterator[Done]:
    """Every task's end, as it comes."""
    if workers == 0:
        extractor = Extractor(way, out, device=device)
        for task in tasks:
            yield (task, *extractor.work(task))
        return
    left = {task.name: task for task in tasks}
    while left:
        try:
            for done in _pool(left.values(), way, out, workers, device):
                del left[done[0].name]
                yield done
        except BrokenProcessPool as error:
            # Some file killed its process, and what else was under way went with it.
            suspects = [task for name, task in left.items() if _begun(out, name).exists()]
            if not suspects:
                raise IndexFault("worker processes die before they begin a file") from error
            for task in suspects:
                yield from _alone(task, way, out, device)
                del left[task.name]


def _alone(task: Task, way: Way, out: Path, device: str) -> Iterator[Done]:
    try:
        yield from _pool([task], way, out, 1, device)
    except BrokenProcessPool:
        _begun(out, task.name).unlink(missing_ok=True)
        yield task, Outcome(task.rows[0].path, reason="decoder_crashed: it kills its process"), []


def _pool(tasks: Iterable[Task], way: Way, out: Path, workers: int, device: str) -> Iterator[Done]:
    spawn = multiprocessing.get_context("spawn")
    setup = (way, out, device)
    with ProcessPoolExecutor(workers, spawn, initializer=_begin, initargs=setup) as pool:
        running = {pool.submit(_work, task): task for task in tasks}
        for future in as_completed(running):
            yield (running[future], *future.result())


_here: Extractor | None = None


def _begin(way: Way, out: Path, device: str) -> None:
    global _here
    torch.set_num_threads(1)
    _here = Extractor(way, out, device=device)


def _work(task: Task) -> tuple[Outcome, list[Row]]:
    assert _here is not None
    _begun(_here.folder, task.name).touch()
    ended = _here.work(task)
    _begun(_here.folder, task.name).unlink()
    return ended


def _begun(out: Path, name: str) -> Path:
    """A mark that stands while a process works on a file."""
    return out / "done" / f"{name}.begun"


def _write(path: Path, outcome: Outcome, rows: list[Row]) -> None:
    partial = path.with_suffix(".part")
    said = {"outcome": asdict(outcome), "rows": [asdict(row) for row in rows]}
    partial.write_text(json.dumps(said))
    partial.rename(path)


def _read(path: Path) -> tuple[Outcome, list[Row]] | None:
    if not path.exists():
        return None
    said = json.loads(path.read_text())
    rows = []
    for row in said["rows"]:
        row["box"], row["five"] = tuple(row["box"]), tuple(row["five"])
        rows.append(Row(**row))
    return Outcome(**said["outcome"]), rows


def _save_outcomes(path: Path, outcomes: list[Outcome]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([field.name for field in fields(Outcome)])
        writer.writerows(list(asdict(outcome).values()) for outcome in outcomes)
