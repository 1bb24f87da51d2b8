"""Several light parents around one child that walks their clips together, on a real Redis."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ralf.worker.contract import Media, Sampling, Verdict
from ralf.worker.media.decode_pyav import PyavDecoder
from ralf.worker.pipeline import Ask, analyze
from ralf.worker.runtime import Parts, with_decoder
from ralf.worker.service.models import LoadedModels, load
from ralf.worker.settings import Settings
from tests.clips import face_clip
from tests.redis_server import RedisServer
from tests.workers import QUICK, Service

JOBS = 2
FRAMES = 120
CHUNK = 2 * 3 * 320 * 180
"""Two frames: a clip takes many turns, so that all jobs are under way at the same time."""
PATIENCE_S = 300.0
"""Whole walks, on a machine that may have much else to do."""
SAMPLING = Sampling(mode="uniform", max_frames=FRAMES)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory, astronaut: np.ndarray) -> list[Path]:
    """One face and two, 120 frames each."""
    folder = tmp_path_factory.mktemp("clips")
    return [
        face_clip(
            folder / f"{count}.mp4", [astronaut] * count, 4.8, size=(320, 180), face_height=0.6
        )
        for count in range(1, JOBS + 1)
    ]


@pytest.fixture
def service(
    redis_server: RedisServer, eager_models: Path, clips: list[Path], tmp_path: Path
) -> Iterator[Service]:
    """Two parents and one child, with the model that accuses."""
    settings = replace(
        QUICK,
        models_dir=str(eager_models),
        model="eager",
        device="cpu",
        threads=1,
        chunk_bytes=CHUNK,
        file_roots=(str(clips[0].parent),),
        hang_s=300.0,
    )
    service = Service(redis_server.url, settings)
    service.shared = tmp_path / "gpu0"
    try:
        for _ in range(JOBS):
            shared = ("--shared", str(service.shared), "--capacity", str(JOBS))
            service.worker(*shared)
        yield service
    finally:
        service.close()


def said(verdict: Verdict) -> dict:
    """What a verdict says of its clip, whoever asked and however long it took."""
    whole = verdict.model_dump(exclude={"job_id", "tenant", "finished_at", "made"})
    return {**whole, "faces": verdict.made.faces, "frames": verdict.made.frames_decoded}


def test_a_kill_in_mid_batch_loses_no_job(
    service: Service, clips: list[Path], eager_parts: Parts, one_thread: None
):
    """kill -9 with all jobs under way: each ends in the verdict that it would have alone."""
    jobs = killed_in_mid_batch(service, clips)

    assert [service.status(job).state for job in jobs] == ["succeeded"] * JOBS
    assert [service.status(job).attempts for job in jobs] == [2] * JOBS
    assert service.redis.hlen(service.store.key("quarantine")) == 0
    parts = with_decoder(eager_parts, PyavDecoder(chunk_bytes=CHUNK, threads=1))
    for job, clip in zip(jobs, clips, strict=True):
        verdict, expected = service.store.verdict(job), analyze(clip, parts, ask=Ask(SAMPLING))[0]
        assert verdict is not None
        assert said(expected.model_copy(update={"tag": verdict.tag})) == said(verdict)


def killed_in_mid_batch(service: Service, clips: list[Path]) -> list[str]:
    """A job for each clip; the child is killed while each waits in the middle of its clip."""
    for_ever = "hold:/there/is/no/such/file"
    jobs = [
        service.submit(
            "hold_analysis", for_ever, media=Media(uri=f"file://{clip}"), sampling=SAMPLING
        )
        for clip in clips
    ]
    patiently(lambda: all(0 < percent(service, job) < 100 for job in jobs))
    assert service.shared is not None
    os.kill(int((service.shared / "pid").read_text()), signal.SIGKILL)
    patiently(lambda: all(ended(service, job) for job in jobs))
    return jobs


def ended(service: Service, job: str) -> bool:
    """Whether nothing more happens to it."""
    return service.status(job).state in ("succeeded", "failed", "quarantined")


def patiently(true: Callable[[], bool]) -> None:
    """Wait for it."""
    end = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < end, f"not within {PATIENCE_S} s"
        time.sleep(0.02)


def percent(service: Service, job: str) -> float:
    """How far the job is, zero where nothing is known."""
    progress = service.status(job).progress
    return 0.0 if progress is None else progress.percent


def test_only_a_child_of_several_jobs_batches(eager_models: Path):
    """With one job at a time the engine is called straight."""
    settings = Settings(models_dir=str(eager_models), model="eager", device="cpu", threads=1)
    alone, together = (
        LoadedModels(settings, load=lambda s, m, t=t: load(s, m, together=t)) for t in (False, True)
    )
    for models in (alone, together):
        models.open()

    assert type(alone._own.engine).__name__ == "TorchEngine"
    assert type(together._own.engine).__name__ == "Batcher"
