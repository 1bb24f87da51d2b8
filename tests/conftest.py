"""Shared fixtures: the GPU mark, a real Redis, and the random state put back after each test."""

import os
import random

import numpy as np
import pytest
import torch

from tests.redis_server import redis, redis_server, redis_url

__all__ = ["redis", "redis_server", "redis_url"]

REQUIRE_GPU = os.environ.get("REQUIRE_GPU") == "1"


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        if REQUIRE_GPU:
            pytest.fail("REQUIRE_GPU=1, and torch finds no CUDA device")
        pytest.skip("no CUDA device; REQUIRE_GPU=1 makes this an error")


@pytest.fixture(autouse=True)
def _same_random_state() -> None:
    """No test leaves its seed to the next."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
