"""The cascade in fixed shapes against the steps that it replaces, and against facenet-pytorch."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torchvision.ops import box_iou, nms

from ralf.kernels.cuda_graphs import Replay
from ralf.kernels.manifest import Finder
from ralf.worker.boxes import overlap
from ralf.worker.media import mtcnn_cuda
from ralf.worker.media.mtcnn import Candidates, Mtcnn, smallest_wins
from ralf.worker.media.mtcnn_boxes import (
    first_rows,
    overlap_of_smaller,
    overlap_of_union,
    rows_of,
    survivors,
)
from ralf.worker.media.mtcnn_cuda import Capacity, FixedShapeMtcnn
from ralf.worker.media.types import Faces, Frames
from tests.scenes import frames_of, portrait, scene
from tests.test_mtcnn import composites, stock

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _light(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, for small tensors; and no frame more than there are, where it is a CPU's."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(mtcnn_cuda, "LEAST_FRAMES", 1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def chunks() -> list[Frames]:
    """Upright 720p, square crowds, small portraits, and eight people in a 1080p clip."""
    _, _, upright, _, square, small, people = composites()
    return [upright, square, part(small, 8), part(people, 2)]


def part(frames: Frames, count: int) -> Frames:
    """The first few of them."""
    return Frames(
        frames.clip, frames.pixels[:count], frames.times_s[:count], frames.indices[:count]
    )


@pytest.fixture(scope="module")
def steps() -> Mtcnn:
    return Mtcnn(Finder())


@pytest.fixture(scope="module")
def fixed() -> Mtcnn:
    return Mtcnn(Finder(), fixed=torch.float32)


def agreement(one: Faces, other: Faces, least: float) -> tuple[int, int, int]:
    """How many of one's faces there are, are in the other, and are in the other only."""
    matched = extra = 0
    for row in {*one.frame.tolist(), *other.frame.tolist()}:
        mine, theirs = (f.boxes[f.frame == row].astype(float) for f in (one, other))
        shared = overlap(mine, theirs) if len(mine) and len(theirs) else np.zeros((0, 0))
        matched += int((shared.max(1, initial=0) >= least).sum())
        extra += len(theirs) - int((shared.max(0, initial=0) >= least).sum())
    return len(one), matched, extra


def test_the_fixed_shapes_find_the_same_faces(chunks: list[Frames], steps: Mtcnn, fixed: Mtcnn):
    """In FP32: no face more or less, and each where it was."""
    close = [agreement(steps.find(chunk), fixed.find(chunk), 0.7) for chunk in chunks]
    wanted, matched, extra = np.sum(close, 0)

    assert wanted >= 50
    assert matched >= 0.99 * wanted
    assert extra <= 0.01 * wanted


def test_fp16_finds_them_too(chunks: list[Frames], steps: Mtcnn):
    """The dtype of a GPU, emulated: its rounding costs no face, and moves few boxes by a tenth."""
    half = Mtcnn(Finder(), fixed=torch.float16)
    some = [part(chunks[1], 2), part(chunks[2], 4)]
    close = [agreement(steps.find(chunk), half.find(chunk), 0.8) for chunk in some]
    wanted, matched, extra = np.sum(close, 0)

    assert wanted == 12
    assert matched >= 0.99 * wanted
    assert extra <= 0.01 * wanted


def test_facenet_pytorch_finds_the_same(chunks: list[Frames], fixed: Mtcnn):
    """The outside oracle, on the same copies: every large enough face of its list."""
    wanted = matched = 0
    for chunk in chunks[1:3]:
        faces = fixed.find(chunk)
        for row, (boxes, _) in enumerate(stock(fixed, chunk)):
            large = boxes[boxes[:, 3] - boxes[:, 1] >= 48]
            mine = faces.boxes[faces.frame == row].astype(float)
            wanted += len(large)
            matched += int((overlap(large, mine).max(1, initial=0) >= 0.7).sum())

    assert wanted >= 20
    assert matched >= 0.99 * wanted


def test_a_crowd_takes_a_larger_room_and_the_next_chunk_starts_there(
    fixed: Mtcnn, monkeypatch: pytest.MonkeyPatch
):
    """Candidates that do not fit are never cut off in silence; a calm scene goes back."""
    capacities = (Capacity(24, 8, 4), Capacity(512, 160, 64))
    cascade = FixedShapeMtcnn(CPU, torch.float32, capacities)
    used: list[Capacity] = []
    table = cascade.table
    monkeypatch.setattr(
        cascade,
        "table",
        lambda some, windows, capacity: (used.append(capacity), table(some, windows, capacity))[1],
    )
    crowd = frames_of([scene(480, 270, [(10 + 110 * k, 20, 60) for k in range(4)])]).pixels
    empty = torch.zeros_like(crowd)
    counts = []
    for pixels in (crowd, crowd, empty, empty):
        found = cascade.find(pixels, 24.0)
        assert found is not None
        counts.append(len(found.boxes))

    assert counts == [4, 4, 0, 0]
    assert used == [capacities[0], capacities[1], capacities[1], capacities[1], capacities[0]]


def test_what_no_room_holds_goes_through_the_steps(steps: Mtcnn, monkeypatch: pytest.MonkeyPatch):
    """The same faces, by the slower way; so too where NMS would not come to rest."""
    frames = frames_of([scene(240, 270, [(10 + 110 * k, 20, 60) for k in range(2)])])
    expected = steps.find(frames)
    assert len(expected) == 2
    for capacity, rounds in ((Capacity(24, 8, 4), 16), (Capacity(256, 96, 48), 1)):
        monkeypatch.setattr(mtcnn_cuda, "ROUNDS", rounds)
        other = Mtcnn(Finder(), fixed=torch.float32)
        other.fixed_shapes = FixedShapeMtcnn(CPU, torch.float32, (capacity,))
        assert other.fixed_shapes.find(frames.pixels, 48.0) is None
        np.testing.assert_array_equal(expected.boxes, other.find(frames).boxes)


@pytest.mark.parametrize("shape", [(0, 90, 160), (2, 1, 1), (1, 11, 11), (1, 12, 12), (3, 49, 500)])
def test_no_frame_and_tiny_frames_are_ordinary(fixed: Mtcnn, shape: tuple[int, int, int]):
    """Whatever the shape, the answer is a Faces, here an empty one."""
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)

    assert len(fixed.find(frames_of(noise))) == 0


def test_frames_do_not_see_each_other(fixed: Mtcnn):
    """A chunk gives what its frames give, whatever fills the batch up."""
    pictures = [scene(320, 240, [(10, 10, 60), (170, 20, 80)], seed=k) for k in range(3)]
    together = fixed.find(frames_of(pictures))

    for row, picture in enumerate(pictures):
        alone = fixed.find(frames_of([picture]))
        mine = together.frame == row
        np.testing.assert_allclose(together.boxes[mine], alone.boxes, atol=1e-2)
        np.testing.assert_allclose(together.confidence[mine], alone.confidence, atol=1e-4)


# NMS and its parts


def some_boxes(seed: int, k: int, spread: float) -> NDArray[np.float32]:
    """k boxes in no order, many of them over each other."""
    rng = np.random.default_rng(seed)
    start, size = rng.uniform(0, spread, (k, 2)), rng.uniform(8, 40, (k, 2))
    return np.concatenate([start, start + size], 1).astype(np.float32)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 60), st.floats(5, 120), st.sampled_from([0.5, 0.7]))
def test_rounds_over_a_matrix_are_greedy_nms(seed: int, k: int, spread: float, threshold: float):
    """torchvision's nms; boxes come in order of confidence, absent ones do not count."""
    boxes = torch.from_numpy(some_boxes(seed, k, spread))
    alive = torch.rand(k, generator=torch.Generator().manual_seed(seed)) < 0.8
    stays, calm = survivors(overlap_of_union(boxes[None]), alive[None], threshold, k + 1)
    there = alive.nonzero().flatten()
    expected = there[nms(boxes[there], -torch.arange(len(there)).float(), threshold)]

    assert calm
    assert expected.tolist() == stays[0].nonzero().flatten().tolist()


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 60), st.floats(5, 120))
def test_over_the_smaller_box_it_is_what_the_steps_do(seed: int, k: int, spread: float):
    """smallest_wins, itself tested against facenet-pytorch's."""
    boxes = torch.from_numpy(some_boxes(seed, k, spread))
    found = Candidates(boxes, -torch.arange(k).float(), torch.zeros(k, dtype=torch.int64))
    alive = torch.ones(1, k, dtype=torch.bool)
    stays, calm = survivors(overlap_of_smaller(boxes[None]), alive, 0.7, k + 1)

    assert calm
    assert smallest_wins(found, 0.7).tolist() == stays[0].tolist()


def test_too_few_rounds_are_told():
    """A chain in which each box beats the next takes as many rounds as it is long."""
    start = torch.arange(8.0)[:, None] * 10
    chain = torch.cat([start, start * 0, start + 30, start * 0 + 30], 1)[None]
    alive = torch.ones(1, 8, dtype=torch.bool)
    few, many = (survivors(overlap_of_union(chain), alive, 0.49, rounds) for rounds in (3, 9))

    assert box_iou(chain[0], chain[0])[0, 1].item() == pytest.approx(0.5)
    assert (bool(few[1]), bool(many[1])) == (False, True)
    assert many[0][0].tolist() == [True, False] * 4


def test_the_first_rows_that_stay_keep_their_order():
    """Fewer than asked leave empty places; more are cut."""
    stays = torch.tensor([[False, True, True, False, True], [False] * 5])
    rows, there = first_rows(stays, 2)

    assert rows[0].tolist() == [1, 2]
    assert there.tolist() == [[True, True], [False, False]]
    values = torch.arange(20).view(2, 5, 2)
    assert rows_of(values, rows)[0].tolist() == [[2, 3], [4, 5]]


# with a device


@pytest.mark.gpu
def test_a_device_finds_what_the_cpu_finds(chunks: list[Frames], steps: Mtcnn):
    """FP16, recorded: ninety-nine of a hundred faces in the same place, and no more besides."""
    there = Mtcnn(Finder(), "cuda")
    close = [
        agreement(steps.find(chunk), there.find(chunk), 0.7) for chunk in chunks for _ in range(3)
    ]
    wanted, matched, extra = np.sum(close, 0)

    assert wanted >= 3 * 50
    assert matched >= 0.99 * wanted
    assert extra <= 0.01 * wanted


@pytest.mark.gpu
def test_a_replay_gives_what_the_first_run_gave():
    """The first call of a shape is plain, the second records, the third replays: one answer."""
    frames = frames_of([scene(640, 360, [(20, 20, 90), (320, 40, 110)], seed) for seed in range(3)])
    finder = Mtcnn(Finder(), "cuda")
    first, *others = [finder.find(frames) for _ in range(4)]

    assert len(first) == 6
    for other in others:
        np.testing.assert_array_equal(first.boxes, other.boxes)


@pytest.mark.gpu
def test_many_sizes_in_turn_do_not_disturb_each_other():
    """More sizes than graphs are kept, twice over: evicted ones are recorded again."""
    finder = Mtcnn(Finder(), "cuda")
    pictures = [portrait(80).resize((200 + 8 * k, 260)) for k in range(16)]
    counts = [
        len(finder.find(frames_of([np.array(picture)]))) for _ in range(4) for picture in pictures
    ]

    assert counts[:16] * 4 == counts
    assert sum(counts[:16]) >= 15


@pytest.mark.gpu
def test_a_recorded_function_follows_its_input():
    """The graph computes again; it does not remember."""
    double = Replay(lambda x: x * 2, torch.zeros(4, device="cuda"))
    ones = torch.ones(4, device="cuda")

    assert double(ones).tolist() == [2.0] * 4
    assert double(ones * 3).tolist() == [6.0] * 4
