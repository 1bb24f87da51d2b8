"""Batches cut into buckets: in order, nothing lost, and smaller for good after running out."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs
from torch import Tensor

from ralf.kernels.batching import BUCKETS, CALL_COST, Batching, cover

SIZES = st.lists(st.integers(1, 64), min_size=1, max_size=4).map(lambda s: tuple(sorted(set(s))))


class Device:
    """Stands for a GPU that holds so many crops: doubles them, and keeps what it was given."""

    def __init__(self, holds: int = 1000) -> None:
        self.holds = holds
        self.seen: list[tuple[int, int]] = []

    def __call__(self, part: Tensor, bucket: int) -> Tensor:
        self.seen.append((len(part), bucket))
        if bucket > self.holds:
            raise torch.OutOfMemoryError(f"a batch of {bucket} does not fit")
        answers = torch.full((bucket, *part.shape[1:]), -1)
        answers[: len(part)] = part * 2
        return answers


@given(count=st.integers(1, 300), buckets=SIZES)
def test_any_number_is_covered_and_only_the_last_is_padded(count: int, buckets: tuple[int, ...]):
    """Largest first; without its last bucket a cover holds too few."""
    chosen = cover(count, buckets)

    assert set(chosen) <= set(buckets)
    assert list(chosen) == sorted(chosen, reverse=True)
    assert sum(chosen[:-1]) < count <= sum(chosen)


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (1, (1,)),
        (2, (1, 1)),
        (5, (8,)),
        (8, (8,)),
        (9, (8, 1)),
        (20, (8, 8, 8)),
        (57, (64,)),
        (64, (64,)),
        (65, (64, 1)),
        (200, (64, 64, 64, 8)),
    ],
)
def test_padding_is_weighed_against_calls(count: int, expected: tuple[int, ...]):
    """A call is worth three faces."""
    assert (CALL_COST, BUCKETS) == (3, (1, 8, 64))
    assert expected == cover(count, BUCKETS)


@given(count=st.integers(1, 200), buckets=SIZES, holds=st.integers(1, 80))
def test_every_crop_is_answered_once_and_in_order(count: int, buckets: tuple[int, ...], holds: int):
    """Whatever fits, and whatever does not."""
    crops, device, batching = torch.arange(count)[:, None], Device(holds), Batching(buckets)

    assert torch.equal(crops * 2, batching(crops, device))
    assert batching.most <= max(holds, 1) or not any(bucket > holds for _, bucket in device.seen)


def test_running_out_halves_the_batch_and_is_remembered():
    """64 does not fit, nor 32; 16 does, and nothing larger is tried again."""
    device, batching = Device(holds=20), Batching()
    with capture_logs() as events:
        batching(torch.arange(64)[:, None], device)
    first, device.seen = device.seen, []
    batching(torch.arange(40)[:, None], device)

    assert first == [(64, 64), (32, 32)] + [(16, 16)] * 4
    assert device.seen == [(16, 16), (16, 16), (8, 8)]
    assert (1, 8, 16) == batching.buckets
    assert [(64, 32), (32, 16)] == [(event["was"], event["batch"]) for event in events]


def test_parts_that_are_done_are_not_done_again():
    """Memory may run out in the middle, when others take it."""
    device, batching = Device(), Batching((4,))
    crops = torch.arange(12)[:, None]

    def less_after_the_first(part: Tensor, bucket: int) -> Tensor:
        answer = device(part, bucket)
        device.holds = 2
        return answer

    assert torch.equal(crops * 2, batching(crops, less_after_the_first))
    assert device.seen == [(4, 4), (4, 4), (2, 2), (2, 2), (2, 2), (2, 2)]


def test_a_single_crop_that_does_not_fit_is_the_callers_matter():
    """Nothing is left to halve; the device's own error comes through."""
    with pytest.raises(torch.OutOfMemoryError, match="batch of 1 does not fit"):
        Batching()(torch.zeros(5, 3), Device(holds=0))


@pytest.mark.parametrize("buckets", [(), (0, 8)])
def test_buckets_that_hold_nothing_are_refused(buckets: tuple[int, ...]):
    """A programming error, named as one."""
    with pytest.raises(ValueError, match="1 or more"):
        Batching(buckets)
