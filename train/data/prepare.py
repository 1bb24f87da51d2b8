"""Videos become a table of faces: in parallel, resumable, with an outcome for every file.

    index ─▶ tasks ─▶ Extractor, several processes ─▶ faces/, done/ ─▶ index.csv, videos.csv

Faces are found by the input contract of the model that will be trained on them.  prepare.json
holds the contract; another one is refused, both here and in training.  videos.csv has a row for
each file: frames asked for, decoded, faces found, faces kept, and the reason where there are none.
A run that was stopped goes on after the last file that it finished.  A file that kills its process
is tried again alone.  If it kills that process too, its outcome says so, and the rest is finished.
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
from ralf.train.data.extract import Extractor, FileOutcome, FileTask, PrepareOptions
from ralf.train.data.index import Index, IndexFault, Row
from ralf.train.data.pictures import frames_of
from ralf.train.data.pool import PREPARED

OnProgress = Callable[[int, int, FileOutcome], None]
VIDEOS, INDEX = "videos.csv", "index.csv"
Ended = tuple[FileTask, FileOutcome, list[Row]]


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

    With 0 workers this process does the work.  A row whose face is known is taken as it is.
    """
    options = PrepareOptions(contract, frames or contract.sampling.max_frames, quality)
    (out / "faces").mkdir(parents=True, exist_ok=True)
    (out / "done").mkdir(exist_ok=True)
    _record_options(out, options)
    known = [row for row in index if row.kind == "lmdb" or (row.kind == "image" and row.box)]
    tasks = list(_tasks(index, {id(row) for row in known}))
    finished = {task.name: _read(out / "done" / f"{task.name}.json") for task in tasks}
    waiting = [task for task in tasks if finished[task.name] is None]
    for task in waiting:
        _begun_mark(out, task.name).unlink(missing_ok=True)
    for number, (task, outcome, rows) in enumerate(
        _run_tasks(waiting, options, out, workers, device)
    ):
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


def _record_options(out: Path, options: PrepareOptions) -> None:
    """Write down how this folder is prepared; other options than before are refused."""
    facts = {"contract": options.contract.model_dump(mode="json"), "frames": options.frames}
    facts["quality"] = options.quality
    path = out / PREPARED
    if path.exists() and (before := json.loads(path.read_text())) != facts:
        changed = sorted(name for name in facts if before.get(name) != facts[name])
        raise IndexFault(
            f"{out} was begun with another {', '.join(changed)}: take another folder, or empty it"
        )
    path.write_text(json.dumps(facts, indent=1) + "\n")


def _tasks(index: Index, known: set[int]) -> Iterator[FileTask]:
    """One task for each file, with all of its rows: only reviews have several."""
    files: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in index:
        if id(row) not in known:
            reviewed = row.kind == "video" and row.frame >= 0
            name = "" if reviewed else row.video
            # Pictures of one video are one task, so that their faces are followed over time.
            key = (row.path if row.kind == "video" else name, *row.key[:3])
            files.setdefault(key, []).append(row)
    for rows in files.values():
        first = rows[0]
        if first.kind == "video":
            masks = str(index.root / first.masks) if first.masks else ""
            yield FileTask(index.whole_path(first), tuple(rows), masks)
            continue
        frames = next(iter(frames_of(Index(index.root, tuple(rows))).values()))
        paths = (Path(frame.path) for frame in frames)
        whole = tuple(str(path if path.is_absolute() else index.root / path) for path in paths)
        yield FileTask(index.whole_path(first), tuple(rows), pictures=whole)


def _run_tasks(
    tasks: list[FileTask], options: PrepareOptions, out: Path, workers: int, device: str
) -> Iterator[Ended]:
    """Every task with its outcome, in the order in which they end."""
    if workers == 0:
        extractor = Extractor(options, out, device=device)
        for task in tasks:
            yield (task, *extractor.work(task))
        return
    left = {task.name: task for task in tasks}
    while left:
        try:
            for done in _run_in_processes(left.values(), options, out, workers, device):
                del left[done[0].name]
                yield done
        except BrokenProcessPool as error:
            # Some file killed its process, and the pool lost all other running files with it.
            # The pool does not say which file killed it; the marks on disk do.
            suspects = [task for name, task in left.items() if _begun_mark(out, name).exists()]
            if not suspects:
                raise IndexFault("worker processes die before they begin a file") from error
            for task in suspects:
                yield from _run_alone(task, options, out, device)
                del left[task.name]


def _run_alone(task: FileTask, options: PrepareOptions, out: Path, device: str) -> Iterator[Ended]:
    try:
        yield from _run_in_processes([task], options, out, 1, device)
    except BrokenProcessPool:
        _begun_mark(out, task.name).unlink(missing_ok=True)
        yield (
            task,
            FileOutcome(task.rows[0].path, reason="decoder_crashed: it kills its process"),
            [],
        )


def _run_in_processes(
    tasks: Iterable[FileTask], options: PrepareOptions, out: Path, workers: int, device: str
) -> Iterator[Ended]:
    # Not forked: torch's threads do not survive a fork.
    spawn = multiprocessing.get_context("spawn")
    setup = (options, out, device)
    with ProcessPoolExecutor(workers, spawn, initializer=_start_process, initargs=setup) as pool:
        running = {pool.submit(_work, task): task for task in tasks}
        for future in as_completed(running):
            yield (running[future], *future.result())


_extractor: Extractor | None = None


def _start_process(options: PrepareOptions, out: Path, device: str) -> None:
    global _extractor
    torch.set_num_threads(1)
    _extractor = Extractor(options, out, device=device)


def _work(task: FileTask) -> tuple[FileOutcome, list[Row]]:
    assert _extractor is not None
    _begun_mark(_extractor.folder, task.name).touch()
    ended = _extractor.work(task)
    _begun_mark(_extractor.folder, task.name).unlink()
    return ended


def _begun_mark(out: Path, name: str) -> Path:
    """A file that exists while a process works on a task."""
    return out / "done" / f"{name}.begun"


def _write(path: Path, outcome: FileOutcome, rows: list[Row]) -> None:
    partial = path.with_suffix(".part")
    facts = {"outcome": asdict(outcome), "rows": [asdict(row) for row in rows]}
    partial.write_text(json.dumps(facts))
    partial.rename(path)


def _read(path: Path) -> tuple[FileOutcome, list[Row]] | None:
    if not path.exists():
        return None
    facts = json.loads(path.read_text())
    rows = []
    for row in facts["rows"]:
        # .get: an earlier release wrote no marks.
        row |= {name: tuple(row.get(name, ())) for name in ("box", "five", "marked")}
        rows.append(Row(**row))
    return FileOutcome(**facts["outcome"]), rows


def _save_outcomes(path: Path, outcomes: list[FileOutcome]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([field.name for field in fields(FileOutcome)])
        writer.writerows(list(asdict(outcome).values()) for outcome in outcomes)
