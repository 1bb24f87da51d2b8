"""Depthwise convolutions with quick gradients: the same gradients as torch's own."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ralf.train.loop.cpu_speed import QuickDepthwise, _Depthwise


def gradients(x: Tensor, weight: Tensor, stride: int, padding: int, quick: bool) -> list[Tensor]:
    """Output and both gradients under a fixed, uneven loss."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    if quick:
        y = _Depthwise.apply(x, weight, stride, (padding, padding))
    else:
        y = F.conv2d(x, weight, None, stride, padding, 1, x.shape[1])
    (y * torch.linspace(-1, 1, y.numel()).reshape(y.shape).to(y.dtype)).sum().backward()
    return [y.detach(), x.grad, weight.grad]


@settings(deadline=None, max_examples=60)
@given(
    taps=st.tuples(st.sampled_from([3, 5]), st.sampled_from([1, 2]), st.integers(0, 2)),
    shape=st.tuples(st.just(2), st.integers(2, 9), st.integers(6, 17), st.integers(6, 17)),
    seed=st.integers(0, 99),
)
def test_gradients_equal_torchs_own(taps, shape, seed):
    """In FP64, for every size, odd ones too."""
    (side, stride, padding), channels = taps, shape[1]
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=draw, dtype=torch.float64)
    weight = torch.randn(channels, 1, side, side, generator=draw, dtype=torch.float64)
    plain = gradients(x, weight, stride, padding, quick=False)
    quick = gradients(x, weight, stride, padding, quick=True)
    for expected, actual in zip(plain, quick, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(("side", "stride"), [(3, 2), (5, 1), (5, 2)])
def test_under_autocast_it_is_taken_and_no_further_from_the_truth(side, stride):
    """bfloat16's error against FP64 is no more than a half above that of torch's own kernels."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 24, 20, 20, generator=draw)
    weight = torch.randn(24, 1, side, side, generator=draw)
    truth = gradients(x.double(), weight.double(), stride, 1, quick=False)
    errors = []
    for mode in (False, True):
        leaf, taps = x.clone().requires_grad_(), weight.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            if mode:
                with QuickDepthwise():
                    y = F.conv2d(leaf, taps, None, stride, 1, 1, 24)
                assert "_Depthwise" in type(y.grad_fn).__name__
            else:
                y = F.conv2d(leaf, taps, None, stride, 1, 1, 24)
        (y.float() * torch.linspace(-1, 1, y.numel()).reshape(y.shape)).sum().backward()
        errors.append(
            [
                float((a - b).norm() / b.norm())
                for a, b in zip((leaf.grad, taps.grad), truth[1:], strict=True)
            ]
        )
    for plain, quick in zip(*errors, strict=True):
        assert quick < 1.5 * plain + 1e-3


@pytest.mark.parametrize(
    "call",
    [
        lambda x: F.conv2d(x, torch.ones(8, 8, 3, 3, dtype=x.dtype)),
        lambda x: F.conv2d(x, torch.ones(8, 1, 7, 7, dtype=x.dtype), groups=8),
        lambda x: F.conv2d(x, torch.ones(8, 1, 3, 3, dtype=x.dtype), dilation=2, groups=8),
        lambda x: F.conv2d(x, torch.ones(16, 1, 3, 3, dtype=x.dtype), groups=8),
        lambda x: F.conv2d(x, torch.ones(8, 1, 3, 3, dtype=x.dtype), padding="same", groups=8),
        lambda x: F.conv2d(
            x, torch.ones(8, 1, 3, 3, dtype=x.dtype), torch.ones(8, dtype=x.dtype), groups=8
        ),
    ],
)
def test_other_convolutions_are_left_alone(call):
    """Whole ones, larger taps, dilated, more outputs than inputs, padded by name, biased."""
    x = torch.randn(1, 8, 12, 12, dtype=torch.bfloat16, requires_grad=True)
    with QuickDepthwise():
        y = call(x)
    assert "_Depthwise" not in type(y.grad_fn).__name__
    torch.testing.assert_close(y, call(x))


def test_in_fp32_torchs_own_kernels_stay():
    """They are as quick, and results of old runs do not change by a bit."""
    x = torch.randn(1, 8, 12, 12, requires_grad=True)
    with QuickDepthwise():
        y = F.conv2d(x, torch.ones(8, 1, 3, 3), stride=2, groups=8)
    assert "_Depthwise" not in type(y.grad_fn).__name__


ALLOCATES = """
import resource, sys
import torch
from ralf.train.loop.cpu_speed import keep_freed
if sys.argv[1] == "kept":
    assert keep_freed()
for turn in range(40):
    if turn == 5:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(48 << 20, dtype=torch.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    """Pages that 35 tensors of 48 MB fault in, after five that warm up."""
    done = subprocess.run(
        [sys.executable, "-c", ALLOCATES, how],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's mallopt")
def test_a_tensor_that_comes_again_takes_the_pages_of_the_last():
    """As it comes, each is mapped anew; kept, two or three of thirty-five."""
    assert faults("kept") * 4 < faults("as it comes")
