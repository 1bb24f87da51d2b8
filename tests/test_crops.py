"""Crops against Pillow's, tracks against what a person would say."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from ralf.kernels.manifest import InputContract
from ralf.worker.media.crops import cut, cut_one, regions
from ralf.worker.media.tracks import Tracker
from ralf.worker.media.types import Faces, Frames
from tests.scenes import frames_of, scene

Seen = Sequence[Sequence[float]]  # boxes x0 y0 x1 y1, and confidence where there is a fifth


def faces_of(boxes: Sequence[Seen]) -> Faces:
    """Faces of a chunk, a list of boxes for each frame."""
    rows = [
        (row, *box, *((0.99,) if len(box) == 4 else ())) for row, s in enumerate(boxes) for box in s
    ]
    table = np.array(rows, np.float64).reshape(-1, 6)
    return Faces(
        boxes=table[:, 1:5].astype(np.float32),
        landmarks=np.zeros((len(table), 5, 2), np.float32),
        confidence=table[:, 5].astype(np.float32),
        frame=table[:, 0].astype(np.int64),
    )


def blank(times_s: Sequence[float]) -> Frames:
    """Frames without pixels worth the name: a tracker reads their times."""
    return frames_of(np.zeros((len(times_s), 2, 2, 3), np.uint8), times_s)


def follow(tracker: Tracker, boxes: Sequence[Seen], times_s: Sequence[float] = ()) -> list[int]:
    """Track ids of all boxes, in one chunk."""
    times = times_s or [k / 25 for k in range(len(boxes))]
    return tracker.update(blank(times), faces_of(boxes)).tolist()


def square(x: float, y: float, side: float = 100) -> tuple[float, float, float, float]:
    return (x - side / 2, y - side / 2, x + side / 2, y + side / 2)


# Crops


def by_pillow(
    picture: NDArray[np.uint8], box: Sequence[float], contract: InputContract
) -> NDArray[np.int16]:
    """The plain way: pad the frame widely, crop, resize."""
    x0, y0, x1, y1 = box
    width, height = x1 - x0, y1 - y0
    if not contract.squeeze:
        width = height = max(width, height) * contract.margin
    width, height = max(int(width + 0.5), 1), max(int(height + 0.5), 1)
    left = int(np.floor((x0 + x1 - width) / 2 + 0.5))
    top = int(np.floor((y0 + y1 - height) / 2 + 0.5))
    around = 700
    mode = "edge" if contract.padding == "edge" else "constant"
    padded = np.pad(picture, ((around, around), (around, around), (0, 0)), mode=mode)
    piece = padded[top + around :, left + around :][:height, :width]
    resized = Image.fromarray(piece).resize((contract.size, contract.size), Image.BILINEAR)
    return np.asarray(resized).astype(np.int16)


CONTRACTS = [
    InputContract(size=64),
    InputContract(size=33, margin=1.0, padding="zero"),
    InputContract(size=128, margin=2.0),
    InputContract(size=64, squeeze=True),
]
PICTURE = scene(200, 150, [(20, 10, 60), (120, 40, 40)])


@settings(deadline=None, max_examples=80)
@given(
    contract=st.sampled_from(CONTRACTS),
    x=st.floats(-60, 260, width=32),
    y=st.floats(-60, 210, width=32),
    width=st.floats(0.5, 200, width=32),
    height=st.floats(0.5, 200, width=32),
)
def test_a_crop_is_pillows_within_two_levels(contract, x, y, width, height):
    """Inside, over the edge or wholly outside; shrunk or enlarged; square or squeezed.

    Two levels of 255, and one nearly everywhere: both round to 8 bits after the columns and again
    after the rows, with weights of different precision.
    """
    box = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
    crop = cut_one(torch.from_numpy(PICTURE).permute(2, 0, 1), box, contract)
    apart = crop.permute(1, 2, 0).numpy().astype(np.int16) - by_pillow(PICTURE, box, contract)

    assert (3, contract.size, contract.size) == tuple(crop.shape)
    assert np.abs(apart).max() <= 2
    assert (np.abs(apart) > 1).mean() <= 0.01


@pytest.mark.parametrize("contract", CONTRACTS, ids=str)
def test_cutting_a_chunk_is_cutting_each_face(contract: InputContract):
    """Training's function and the worker's give the same bits, in the faces' order."""
    frames = frames_of([PICTURE, PICTURE[::-1], PICTURE[:, ::-1]])
    faces = faces_of([[square(60, 60)], [], [square(10, 20, 61), square(150, 140, 80)]])
    crops = cut(frames, faces, contract)

    assert torch.uint8 == crops.dtype
    assert crops.is_contiguous()
    for crop, box, frame in zip(crops, faces.boxes, faces.frame, strict=True):
        assert torch.equal(cut_one(frames.pixels[frame], box, contract), crop)


def test_no_faces_give_no_crops():
    """A batch of zero, of the right shape."""
    crops = cut(frames_of([PICTURE]), Faces.none(), InputContract(size=64))

    assert tuple(crops.shape) == (0, 3, 64, 64)


def test_the_margin_is_around_the_longer_side_and_the_middle():
    """A box of 40×60 at margin 1.5 is a square of 90 around the same middle."""
    box = np.array([[100.0, 100, 140, 160]])

    assert regions(box, InputContract(margin=1.5)).tolist() == [[75, 85, 165, 175]]
    assert regions(box, InputContract(squeeze=True)).tolist() == [[100, 100, 140, 160]]


def test_outside_the_frame_is_edge_or_black():
    """A white frame stays white with edge padding; with zero padding half of it is black."""
    white = torch.full((3, 50, 50), 255, dtype=torch.uint8)
    box = (-20, 5, 20, 45)

    assert cut_one(white, box, InputContract(size=40, margin=1.0)).min() == 255
    half = cut_one(white, box, InputContract(size=40, margin=1.0, padding="zero"))
    assert half[:, :, :19].max() == 0
    assert half[:, :, 21:].min() == 255


def test_a_fine_pattern_does_not_alias():
    """One-pixel stripes shrunk five times become grey, not stripes."""
    stripes = torch.zeros(3, 400, 400, dtype=torch.uint8)
    stripes[:, :, ::2] = 255
    crop = cut_one(stripes, (40, 40, 360, 360), InputContract(size=64, margin=1.0))

    assert (crop.float() - 127.5).abs().max() < 12


def test_a_box_that_is_no_box_is_refused():
    """NaN would become some crop or other."""
    image = torch.zeros(3, 9, 9, dtype=torch.uint8)

    with pytest.raises(ValueError, match="finite"):
        cut_one(image, (0, 0, float("nan"), 5), InputContract())
    with pytest.raises(ValueError, match=r"u8 \[3,h,w\]"):
        cut_one(image.float(), (0, 0, 5, 5), InputContract())


# Tracks


def test_a_face_that_moves_keeps_its_track():
    """Two people walk past each other on two heights."""
    boxes = [[square(100 + 20 * k, 100), square(500 - 20 * k, 220)] for k in range(20)]

    assert follow(Tracker(), boxes) == [0, 1] * 20


def test_close_faces_are_joined_by_the_best_total():
    """The nearest pair first would leave the other two apart; the assignment joins both."""
    boxes = [[square(100, 100), square(140, 100)], [square(125, 100), square(165, 100)]]

    assert follow(Tracker(), boxes) == [0, 1, 0, 1]


def test_a_good_match_is_not_given_up_for_two_bad_ones():
    """One face stays, one leaves and one comes: that is three tracks, not two that jump."""
    boxes = [[square(100, 100), square(100, 145)], [square(100, 100), square(100, 55)]]

    assert follow(Tracker(), boxes) == [0, 1, 0, 2]


def test_a_face_missed_for_a_moment_is_the_same_one():
    """Two frames without it."""
    boxes = [[square(100, 100)], [], [], [square(110, 100)]]

    assert follow(Tracker(), boxes) == [0, 0]


def test_a_face_gone_for_long_is_another():
    """Missed in more than three looked-at frames and for more than two seconds."""
    here = square(100, 100)

    assert follow(Tracker(), [[here], [], [], [], [], [here]], [0, 1, 2, 3, 4, 5]) == [0, 1]
    assert follow(Tracker(), [[here], [], [], [], [], [here]], [0, 0.3, 0.6, 1, 1.3, 1.6]) == [0, 0]
    assert follow(Tracker(), [[here], [], [], [here]], [0, 20, 40, 60]) == [0, 0]


@pytest.mark.parametrize(
    ("gap_s", "moved", "grown", "same"),
    [
        (0.04, 45, 1.0, True),
        (0.04, 60, 1.0, False),
        (0.04, 0, 1.5, False),
        (1.0, 90, 1.0, True),
        (30.0, 140, 1.0, True),
        (30.0, 160, 1.0, False),
        (30.0, 0, 1.9, True),
        (30.0, 0, 2.1, False),
        (3600.0, 400, 1.0, False),
    ],
)
def test_what_counts_as_the_same_place_grows_with_time_and_stops(gap_s, moved, grown, same):
    """A cut to a face elsewhere, or at another size, begins a track, however long the gap."""
    boxes = [[square(500, 500, 100)], [square(500 + moved, 500, 100 * grown)]]

    assert [0, 0 if same else 1] == follow(Tracker(), boxes, [0, gap_s])


def test_only_the_largest_faces_are_followed():
    """Of five, three; the others get −1, and the tracker says that it overflowed."""
    tracker = Tracker(max_tracks=3)
    crowd = [square(200 * k + 100, 100, side) for k, side in enumerate((50, 90, 60, 80, 40))]

    assert follow(tracker, [crowd]) == [-1, 0, 2, 1, -1]
    assert tracker.overflowed
    assert follow(tracker, [crowd[1:4:2] + crowd[2:3]]) == [0, 1, 2]


def test_a_faint_face_gives_way_to_a_sure_one():
    """Size counts with the confidence."""
    pair = [(*square(100, 100, 100), 0.7), (*square(400, 100, 95), 0.99)]

    assert follow(Tracker(max_tracks=1), [pair]) == [-1, 0]


def test_a_slide_show_of_faces_does_not_use_the_tracks_up():
    """Forty cuts to another face each: the last one is followed like the first."""
    tracker = Tracker(max_tracks=2)
    boxes = [[square(100 + 300 * (k % 4), 100 + 300 * (k // 4 % 3))] for k in range(40)]

    assert list(range(40)) == follow(tracker, boxes)
    assert not tracker.overflowed


def test_frames_without_faces_and_chunks_without_frames_are_ordinary():
    """Nothing seen, nothing to say."""
    tracker = Tracker()

    assert follow(tracker, [[], []]) == []
    assert tracker.update(blank([]), Faces.none()).tolist() == []
    assert not tracker.overflowed


def test_a_tracker_that_may_follow_nothing_is_refused():
    """Zero tracks would silently score no face."""
    with pytest.raises(ValueError, match="1 or more, got 0"):
        Tracker(max_tracks=0)


@st.composite
def walks(draw: st.DrawFn) -> tuple[list[list[tuple[float, ...]]], list[float]]:
    """Up to 14 frames of up to 5 faces on a coarse grid, where ties and near misses are common."""
    place = st.integers(0, 8).map(lambda k: 40.0 * k)
    face = st.builds(
        lambda x, y, side, confidence: (*square(x, y, side), confidence),
        place,
        place,
        st.sampled_from([60.0, 80.0, 120.0]),
        st.sampled_from([0.75, 0.99]),
    )
    boxes = draw(st.lists(st.lists(face, max_size=5), min_size=1, max_size=14))
    gaps = draw(
        st.lists(st.sampled_from([0.03125, 0.5, 3.0]), min_size=len(boxes), max_size=len(boxes))
    )
    return boxes, np.cumsum(gaps).tolist()


@settings(deadline=None, max_examples=60)
@given(walk=walks(), cuts=st.sets(st.integers(1, 13)), most=st.sampled_from([1, 3, 16]))
def test_tracks_do_not_depend_on_the_borders_of_chunks(walk, cuts, most):
    """The same ids in one chunk and in many."""
    boxes, times = walk
    whole = follow(Tracker(most), boxes, times)
    borders = sorted({0, len(boxes), *(c for c in cuts if c < len(boxes))})
    chunked, tracker = [], Tracker(most)
    for start, end in pairwise(borders):
        chunked += follow(tracker, boxes[start:end], times[start:end])

    assert whole == chunked


@settings(deadline=None, max_examples=60)
@given(walk=walks(), seed=st.integers(0, 99), most=st.sampled_from([2, 16]))
def test_tracks_do_not_depend_on_the_order_of_faces(walk, seed, most):
    """And no two faces of one frame share a track, nor are more followed than may be."""
    boxes, times = walk
    boxes = [list(dict.fromkeys(frame)) for frame in boxes]  # equal faces cannot be told apart
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(len(frame)) for frame in boxes]
    straight = follow(Tracker(most), boxes, times)
    mixed = follow(
        Tracker(most), [[f[k] for k in o] for f, o in zip(boxes, orders, strict=True)], times
    )
    start = 0
    for order in orders:
        here = straight[start : start + len(order)]
        followed = [track for track in here if track >= 0]

        assert [here[k] for k in order] == mixed[start : start + len(order)]
        assert len(set(followed)) == len(followed) == min(len(here), most)
        start += len(order)
