"""Many resizes as matrix products against the CPU's own 8-bit kernel, one by one."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ralf.kernels.manifest import InputContract
from ralf.worker.media import resample
from ralf.worker.media.crops import cut, cut_one, regions
from ralf.worker.media.resample import cut_all, shrunk
from ralf.worker.media.types import Faces, Frames
from tests.scenes import frames_of, scene

CONTRACTS = [
    InputContract(size=64),
    InputContract(size=33, margin=1.0, padding="zero"),
    InputContract(size=128, margin=2.0),
    InputContract(size=96, squeeze=True, padding="zero"),
]
PICTURES = frames_of([scene(200, 150, [(20, 10, 60), (120, 40, 40)], seed) for seed in range(3)])


def faces_at(boxes: np.ndarray, seed: int = 0) -> Faces:
    """Faces with those boxes, spread over three frames."""
    frame = np.random.default_rng(seed).integers(0, 3, len(boxes))
    return Faces(
        boxes=boxes.astype(np.float32),
        landmarks=np.zeros((len(boxes), 5, 2), np.float32),
        confidence=np.ones(len(boxes), np.float32),
        frame=frame,
    )


def all_at_once(frames: Frames, faces: Faces, contract: InputContract) -> torch.Tensor:
    """What cut() does on a device."""
    where = regions(faces.boxes, contract)
    return cut_all(frames.pixels, faces.frame, where, contract.size, contract.padding)


def apart(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """How many levels lie between them, pixel by pixel."""
    assert one.dtype == other.dtype == torch.uint8
    assert one.shape == other.shape
    return (one.short() - other.short()).abs()


@settings(deadline=None, max_examples=40)
@given(
    contract=st.sampled_from(CONTRACTS),
    boxes=st.lists(
        st.tuples(
            st.floats(-60, 260, width=32),
            st.floats(-60, 210, width=32),
            st.floats(0.5, 200, width=32),
            st.floats(0.5, 200, width=32),
        ),
        min_size=1,
        max_size=6,
    ),
)
def test_all_faces_at_once_are_each_face_alone(contract: InputContract, boxes: list):
    """Inside, over the edge or wholly outside; shrunk or enlarged: the same bits, bar a few."""
    x, y, width, height = np.array(boxes).T
    faces = faces_at(np.stack([x, y, x + width, y + height], 1))
    differs = apart(all_at_once(PICTURES, faces, contract), cut(PICTURES, faces, contract))

    assert differs.max() <= 1
    assert (differs > 0).float().mean() <= 1e-3


def test_down_to_a_quarter_the_sums_are_exact():
    """In whatever order they are added: bit for bit, on pixels without any pattern."""
    pixels = torch.randint(0, 256, (3, 3, 300, 400), dtype=torch.uint8)
    frames = frames_of(pixels.permute(0, 2, 3, 1).numpy())
    start = np.random.default_rng(1).uniform(-20, 150, (40, 2))
    faces = faces_at(np.concatenate([start, start + np.linspace(5, 190, 40)[:, None]], 1))
    contract = InputContract(size=64)

    assert apart(all_at_once(frames, faces, contract), cut(frames, faces, contract)).max() == 0


def test_groups_bound_the_memory_and_change_nothing(monkeypatch: pytest.MonkeyPatch):
    """Large faces go few at a time, and come back in their order."""
    sides = np.array([150.0, 8, 90, 30, 200, 12, 60])
    faces = faces_at(np.stack([sides * 0, sides * 0, sides, sides], 1))
    contract = CONTRACTS[2]
    together = all_at_once(PICTURES, faces, contract)
    monkeypatch.setattr(resample, "GROUP_BYTES", 3 * 4 * 40 * 40)

    assert torch.equal(together, all_at_once(PICTURES, faces, contract))
    groups = list(resample._groups(regions(faces.boxes, contract), 150, 200))
    assert len(groups) > 3
    assert sorted(np.concatenate(groups).tolist()) == list(range(7))


def test_no_face_is_no_crop():
    """A batch of none, of the right shape."""
    assert tuple(all_at_once(PICTURES, Faces.none(), CONTRACTS[0]).shape) == (0, 3, 64, 64)


@pytest.mark.parametrize("size", [(180, 320), (100, 177), (90, 160), (360, 640), (47, 1)])
@pytest.mark.parametrize("interleaved", [True, False])
def test_reduced_copies_are_those_of_the_cpus_kernel(size: tuple[int, int], interleaved: bool):
    """Whatever the memory layout of the frames."""
    pixels = torch.randint(0, 256, (2, 3, 360, 640), dtype=torch.uint8)
    if interleaved:
        pixels = pixels.contiguous(memory_format=torch.channels_last)
    expected = F.interpolate(pixels, size=size, mode="bilinear", antialias=True)
    differs = apart(shrunk(pixels, *size), expected)

    assert differs.max() <= 1
    assert (differs > 0).float().mean() <= 1e-3
    assert tuple(shrunk(pixels[:0], *size).shape) == (0, 3, *size)


@pytest.mark.gpu
@pytest.mark.parametrize("contract", CONTRACTS, ids=str)
def test_a_device_cuts_what_the_cpu_cuts(contract: InputContract):
    """Within one level, and nearly everywhere to the bit."""
    start = np.random.default_rng(2).uniform(-30, 150, (30, 2))
    faces = faces_at(np.concatenate([start, start + np.linspace(4, 190, 30)[:, None]], 1))
    there = Frames(
        PICTURES.clip, PICTURES.pixels.cuda(), PICTURES.times_s, PICTURES.indices, decoder="made"
    )
    crops = cut(there, faces, contract)
    differs = apart(crops.cpu(), cut(PICTURES, faces, contract))
    one = cut_one(there.pixels[int(faces.frame[0])], faces.boxes[0], contract)

    assert crops.is_cuda
    assert differs.max() <= 1
    assert (differs > 0).float().mean() <= 1e-3
    assert apart(one, crops[0]).max() <= 1
    assert apart(shrunk(there.pixels, 70, 90).cpu(), shrunk(PICTURES.pixels, 70, 90)).max() <= 1
