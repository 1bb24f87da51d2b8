"""Crops of several jobs in one batch: fair, apart, and with the logits of each job alone."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ralf.kernels.artifact import Artifact
from ralf.kernels.engine import EngineError
from ralf.kernels.manifest import Precision
from ralf.worker.batcher import SHARE, Batcher, engine_behind
from ralf.worker.contract import Sampling
from ralf.worker.errors import Cancelled
from ralf.worker.media.decode_pyav import PyavDecoder
from ralf.worker.pipeline import Ask, Partial, analyze
from ralf.worker.runtime import Parts, together, with_decoder
from ralf.worker.service.jobs import as_job_error
from tests.clips import face_clip

SIDE = 64


@dataclass
class Gated:
    """An engine that scores when it is let, and remembers whose crops were in each batch.

    A crop's first pixel is its job's number, and its logit.
    """

    artifact: Artifact
    max_batch: int = 16
    name: str = "gated"
    precision: Precision = "fp32"
    device: str = "cpu"
    gate: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    batches: list[list[int]] = field(default_factory=list)
    started: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    fails: Callable[[list[int]], Exception | None] = lambda jobs: None

    def __call__(self, crops: Tensor) -> Tensor:
        jobs = [int(crop[0, 0, 0]) for crop in crops]
        self.batches.append(jobs)
        self.started.release()
        assert self.gate.acquire(timeout=60)
        error = self.fails(jobs)
        if error is not None:
            raise error
        return torch.tensor([float(job) for job in jobs])


@pytest.fixture
def gated(tiny_parts: Parts) -> Gated:
    return Gated(tiny_parts.artifact)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as pool:
        yield pool


def crops_of(job: int, count: int) -> Tensor:
    """Crops that carry their job's number."""
    return torch.full((count, 3, SIDE, SIDE), job, dtype=torch.uint8)


def queued(batcher: Batcher, count: int) -> None:
    """Wait until so many requests stand in line."""
    for _ in range(6000):
        if len(batcher._waiting) >= count:
            return
        threading.Event().wait(0.01)
    raise AssertionError(f"{len(batcher._waiting)} wait, not {count}")


def line_up(
    batcher: Batcher, engine: Gated, threads: ThreadPoolExecutor, counts: list[int]
) -> list["Future[Tensor]"]:
    """Jobs 1, 2, … ask one after another, while a first one, job 0, is being scored."""
    asked = [threads.submit(batcher, crops_of(0, 1))]
    assert engine.started.acquire(timeout=60)
    for job, count in enumerate(counts, start=1):
        asked.append(threads.submit(batcher, crops_of(job, count)))
        queued(batcher, job)
    return asked


def let(engine: Gated, times: int = 1000) -> None:
    """Open the gate."""
    for _ in range(times):
        engine.gate.release()


def test_what_waits_together_is_scored_together(gated: Gated, threads: ThreadPoolExecutor):
    """One batch, and everyone's own logits."""
    batcher = Batcher(gated)
    asked = line_up(batcher, gated, threads, [3, 5, 2])
    let(gated)

    assert [one.result(60).tolist() for one in asked] == [[0.0], [1.0] * 3, [2.0] * 5, [3.0] * 2]
    assert gated.batches == [[0], [1] * 3 + [2] * 5 + [3] * 2]
    assert (batcher.served.batches, batcher.served.crops, batcher.served.shared) == (2, 11, 1)


def test_a_huge_job_takes_its_turn_only(gated: Gated, threads: ThreadPoolExecutor):
    """Ten jobs of four crops behind one of 400: all ten are over with its first forty crops."""
    batcher = Batcher(gated)
    asked = line_up(batcher, gated, threads, [400, *[4] * 10])
    let(gated)
    answers = [one.result(60) for one in asked]

    assert [len(answer) for answer in answers] == [1, 400, *[4] * 10]
    last = max(number for number, jobs in enumerate(gated.batches) if set(jobs) - {0, 1})
    seen = sum(jobs.count(1) for jobs in gated.batches[: last + 1])
    assert seen <= 40
    assert max(map(len, gated.batches)) == gated.max_batch
    assert all(jobs.count(1) <= SHARE for jobs in gated.batches[1:last])


def test_one_who_comes_late_waits_for_one_turn_of_the_others(
    gated: Gated, threads: ThreadPoolExecutor
):
    """Not for all that they have left."""
    batcher = Batcher(gated)
    asked = line_up(batcher, gated, threads, [200, 200])
    let(gated, 3)
    for _ in range(3):
        assert gated.started.acquire(timeout=60)
    late = threads.submit(batcher, crops_of(9, 2))
    queued(batcher, 3)
    let(gated)
    late.result(60)
    for one in asked:
        one.result(60)
    number = next(number for number, jobs in enumerate(gated.batches) if 9 in jobs)

    assert number <= 5


def test_alone_it_is_the_engines_own_batches(gated: Gated):
    """No split that the engine would not make, and nothing for nobody."""
    let(gated)
    batcher = Batcher(gated)

    assert len(batcher(crops_of(7, 40))) == 40
    assert [len(jobs) for jobs in gated.batches] == [16, 16, 8]
    assert len(batcher(crops_of(7, 0))) == 0
    assert len(gated.batches) == 3


@pytest.mark.parametrize("guilty", [1, 2, 4])
def test_an_error_goes_to_the_job_that_owns_it(
    gated: Gated, threads: ThreadPoolExecutor, guilty: int
):
    """A shared batch that fails is halved until the owner is alone; the others are scored."""
    gated.fails = lambda jobs: ValueError("poisoned") if guilty in jobs else None
    batcher = Batcher(gated)
    asked = line_up(batcher, gated, threads, [4, 4, 4, 4])
    let(gated)

    for job, one in enumerate(asked):
        if job == guilty:
            with pytest.raises(ValueError, match="poisoned"):
                one.result(60)
        else:
            assert set(one.result(60).tolist()) == {float(job)}
    assert [guilty] * 4 in gated.batches


def test_a_batch_too_large_for_the_memory_is_halved(gated: Gated, threads: ThreadPoolExecutor):
    """Nobody's fault: the halves fit, and every job has its logits."""
    gated.fails = lambda jobs: torch.OutOfMemoryError("8 at most") if len(jobs) > 8 else None
    asked = line_up(Batcher(gated), gated, threads, [4, 4, 4, 4])
    let(gated)

    assert [len(one.result(60)) for one in asked] == [1, 4, 4, 4, 4]


def test_one_job_that_is_too_large_alone_is_told_so(gated: Gated, threads: ThreadPoolExecutor):
    """It gets gpu_oom, for which the job's body halves its chunks; what it had in line goes."""
    gated.fails = lambda jobs: torch.OutOfMemoryError("full") if jobs.count(1) > 4 else None
    batcher = Batcher(gated)
    asked = line_up(batcher, gated, threads, [100, 4])
    let(gated)

    with pytest.raises(torch.OutOfMemoryError) as caught:
        asked[1].result(60)
    assert as_job_error(caught.value).code == "gpu_oom"
    assert len(asked[2].result(60)) == 4
    assert not batcher._waiting


def test_crops_of_another_shape_are_refused_before_they_join(gated: Gated):
    """A caller's mistake costs nobody a batch."""
    with pytest.raises(EngineError, match="takes crops"):
        Batcher(gated)(torch.zeros((2, 3, 8, 8), dtype=torch.uint8))
    assert gated.batches == []


def test_it_says_of_itself_what_the_engine_says(tiny_parts: Parts):
    """The verdict's provenance is the engine's, and what explains is the engine."""
    parts = together(tiny_parts)
    one, other = parts.engine, tiny_parts.engine

    assert isinstance(one, Batcher)
    assert (one.name, one.precision, one.device) == (other.name, other.precision, other.device)
    assert engine_behind(one) is other is engine_behind(other)


# with whole walks


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory, astronaut) -> list[Path]:
    """Clips of one, two and three faces: chunks of different numbers of crops."""
    folder = tmp_path_factory.mktemp("together")
    return [
        face_clip(
            folder / f"{count}.mp4",
            [astronaut] * count,
            1.0,
            size=(480, 270),
            fps=12,
            face_height=0.5,
        )
        for count in (1, 2, 3)
    ]


def walk(path: Path, parts: Parts, progress: Callable[[Partial], None] | None = None) -> tuple:
    """What a verdict says of the clip, without the times it took."""
    ask = Ask(sampling=Sampling(mode="uniform", max_frames=8))
    verdict, evidence = analyze(path, parts, ask=ask, progress=progress)
    made = verdict.made.model_copy(update={"stages_ms": {}})
    return verdict.model_copy(update={"made": made, "finished_at": None}), evidence


def test_each_verdict_is_what_it_would_be_alone(clips: list[Path], eager_parts: Parts, one_thread):
    """Bit for bit on a CPU: score, boxes, tracks, segments, and the pictures of the evidence."""
    parts = together(small_chunks(eager_parts))
    expected = [walk(clip, small_chunks(eager_parts)) for clip in clips]
    start = threading.Barrier(6)

    def at_once(clip: Path) -> tuple:
        torch.set_num_threads(1)
        start.wait(60)
        return walk(clip, parts)

    with ThreadPoolExecutor(6) as pool:
        got = list(pool.map(at_once, clips * 2))

    assert expected * 2 == got
    assert isinstance(parts.engine, Batcher)
    assert all(evidence.pictures and evidence.frames for _, evidence in got)
    # Whether two of them met at the engine is up to the clock; the tests above make jobs meet.
    assert parts.engine.served.crops == 2 * (8 + 16 + 24)


def small_chunks(parts: Parts) -> Parts:
    """Two frames at a time, so that walks meet often."""
    return with_decoder(parts, PyavDecoder(chunk_bytes=2 * 3 * 480 * 270, threads=1))


def test_cancelling_one_walk_leaves_the_others_alone(clips: list[Path], eager_parts: Parts):
    """It stops between two chunks; the others' verdicts are what they would be."""
    parts = together(small_chunks(eager_parts))
    expected = walk(clips[2], parts)

    def cancel(partial: Partial) -> None:
        if partial.progress.frames_done >= 4:
            raise Cancelled

    def cancelled(clip: Path) -> bool:
        with pytest.raises(Cancelled):
            walk(clip, parts, cancel)
        return True

    with ThreadPoolExecutor(3) as pool:
        others = [pool.submit(walk, clips[2], parts) for _ in range(2)]
        assert pool.submit(cancelled, clips[1]).result(60)

        assert [expected] * 2 == [other.result(60) for other in others]
