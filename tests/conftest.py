"""Shared fixtures: hardware marks, a real Redis, small models, and a fixed random state."""

import importlib.util
import os
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import structlog
import torch

from ralf.kernels.artifact import publish, resolve
from ralf.kernels.registry import point_to
from ralf.kernels.untrained import publish_untrained
from ralf.worker.runtime import Parts, load
from ralf.worker.settings import Settings
from tests.clips import face_clip, make_clip
from tests.redis_server import own_redis, redis, redis_server, redis_url
from tests.workers import settings, store

__all__ = ["own_redis", "redis", "redis_server", "redis_url", "settings", "store"]

# No deadline: a slow example means a busy machine, not a fault.
hypothesis.settings.register_profile("ralf", deadline=None)
hypothesis.settings.load_profile("ralf")
REQUIRE_GPU = os.environ.get("REQUIRE_GPU") == "1"
REQUIRE_DALI = os.environ.get("REQUIRE_DALI") == "1"
REQUIRE_RTX = os.environ.get("REQUIRE_RTX") == "1"


def has_dali() -> bool:
    """Whether DALI is installed; importing it needs no GPU."""
    return bool(importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        if REQUIRE_GPU:
            pytest.fail("REQUIRE_GPU=1, and torch finds no CUDA device")
        pytest.skip("no CUDA device; REQUIRE_GPU=1 makes this an error")
    if item.get_closest_marker("dali") and not has_dali():
        if REQUIRE_DALI:
            pytest.fail("REQUIRE_DALI=1, and nvidia.dali is not installed")
        pytest.skip("no DALI; REQUIRE_DALI=1 makes this an error")
    if item.get_closest_marker("rtx") and not importlib.util.find_spec("tensorrt_rtx"):
        if REQUIRE_RTX:
            pytest.fail("REQUIRE_RTX=1, and tensorrt_rtx is not installed")
        pytest.skip("no TensorRT-RTX; REQUIRE_RTX=1 makes this an error")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests marked each_redis run on the installed Redis and on the bundled 6.2."""
    marked = metafunc.definition.get_closest_marker("each_redis")
    if marked and "redis_server" in metafunc.fixturenames:
        metafunc.parametrize(
            "redis_server", ["installed", "bundled"], indirect=True, scope="session"
        )


@pytest.fixture(autouse=True)
def _same_random_state() -> None:
    """Every test starts from the same random state."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _same_log() -> Iterator[None]:
    """Reset logging after each test, since a command that a test runs configures it."""
    yield
    structlog.reset_defaults()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Use one torch thread, so that sums have one order, also before and after a kill."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one model, `tiny`: the whole network, but very narrow and never trained."""
    folder = tmp_path_factory.mktemp("models")
    made = publish_untrained(folder, name="tiny", base=4, blocks=1, size=64, golden_crops=4)
    point_to(folder, "tiny", made.version)
    return folder


@pytest.fixture(scope="session")
def eager_models(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights with a manifest that calls nearly all faces forged."""
    folder = tmp_path_factory.mktemp("eager")
    tiny = resolve(tiny_models, "tiny")
    trusted = {"name": "eager", "untrained": False, "thresholds": {"fpr_0.05": 0.01}}
    files = {name: tiny.read(name) for name in tiny.manifest.files}
    made = publish(folder, tiny.manifest.model_copy(update=trusted), files)
    point_to(folder, "eager", made.version)
    return folder


@pytest.fixture(scope="session")
def tiny_parts(tiny_models: Path) -> Parts:
    """The pipeline's parts with the tiny model, on one thread."""
    return load(replace(Settings(), models_dir=str(tiny_models), threads=1), model="tiny")


@pytest.fixture(scope="session")
def eager_parts(eager_models: Path) -> Parts:
    """The pipeline's parts with the eager model."""
    return load(replace(Settings(), models_dir=str(eager_models), threads=1), model="eager")


@pytest.fixture(scope="session")
def astronaut() -> np.ndarray:
    """A public-domain portrait with one clear face, u8 [256, 256, 3]."""
    from skimage.data import astronaut

    return np.ascontiguousarray(astronaut()[0:256, 96:352])


@pytest.fixture(scope="session")
def clip_of_two(tmp_path_factory: pytest.TempPathFactory, astronaut: np.ndarray) -> Path:
    """Two seconds of two moving faces, H.264."""
    path = tmp_path_factory.mktemp("clips") / "two.mp4"
    portraits = [astronaut, np.ascontiguousarray(astronaut[:, ::-1])]
    return face_clip(path, portraits, 2.0, size=(640, 360), fps=10, face_height=0.6)


@pytest.fixture(scope="session")
def clip_of_none(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One second without any face."""
    return make_clip(tmp_path_factory.mktemp("clips") / "none.mp4", 10, fps=10)
