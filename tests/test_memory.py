"""Memory kept between steps: the kernel is asked for it once."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from ralf.train.loop.memory import keep_freed
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
        [sys.executable, "-c", PROGRAM, how],
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
