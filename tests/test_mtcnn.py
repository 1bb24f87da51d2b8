"""The finder against facenet-pytorch's own: the same networks, resizes, NMS, and faces."""

import io
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from facenet_pytorch import MTCNN
from facenet_pytorch.models.mtcnn import ONet, PNet, RNet
from facenet_pytorch.models.utils.detect_face import nms_numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from PIL import Image

import ralf.kernels.networks.mtcnn as networks
import ralf.worker.media.mtcnn as finder_module
from demo.samples import portraits as known_people
from ralf.kernels.cpu_threads import side_by_side
from ralf.kernels.manifest import Finder
from ralf.kernels.networks.mtcnn import WeightsMissing, pretrained, weights_path
from ralf.worker.boxes import overlap
from ralf.worker.contract import Sampling
from ralf.worker.media.decode_pyav import PyavDecoder
from ralf.worker.media.mtcnn import Candidates, Mtcnn, reduced_size, smallest_wins
from ralf.worker.media.mtcnn_boxes import batched_nms
from ralf.worker.media.probe import probe
from ralf.worker.media.pyramid import Level, bands, crops, integral, pyramid, shrink
from ralf.worker.media.types import Clip, Faces, Frames
from ralf.worker.settings import Settings
from tests.clips import face_clip
from tests.scenes import backdrop, frames_of, portrait, scene

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def finder() -> Mtcnn:
    return Mtcnn(Finder())


@pytest.fixture(autouse=True)
def _one_thread():
    """Small tensors: a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("count", [0, 1, 900, 3000])
def test_the_boxes_that_stay_are_those_of_torchvision(count: int):
    """Few boxes at once, or many group by group; equal scores included."""
    start = torch.rand(count, 2) * 300
    boxes = torch.cat([start, start + 10 + torch.rand(count, 2) * 60], 1)
    scores, group = (torch.rand(count) * 50).round() / 50, torch.randint(0, 7, (count,))
    expected = torchvision.ops.batched_nms(boxes, scores, group, 0.5)

    assert batched_nms(boxes, scores, group, 0.5).tolist() == expected.tolist()
    assert (count > 10) == (len(expected) < count)


def composites() -> list[Frames]:
    """Chunks of equal frames: crowds in 1080p and 720p, upright phone video, portraits, and all
    public-domain portraits of the repository moving in an H.264 clip.

    Every second frame went through a hard JPEG, as a codec would leave it.
    """
    rng = np.random.default_rng(5)

    def crowd(width: int, height: int, seed: int) -> NDArray[np.uint8]:
        columns = max(2, width * 2 // height)
        cell = width // columns
        places = [
            (
                column * cell + int(rng.integers(0, 12)),
                row * height // 2 + int(rng.integers(0, 12)),
                int(rng.uniform(48, min(0.42 * height / 2, 0.58 * cell))),
            )
            for row in range(2)
            for column in range(columns)
        ]
        picture = scene(width, height, places, seed)
        return compressed(picture) if seed % 2 else picture

    sizes = [(1920, 1080, 3), (1280, 720, 4), (720, 1280, 3), (854, 480, 4), (480, 480, 4)]
    chunks = [
        frames_of([crowd(w, h, seed + 5 * k) for k in range(n)])
        for seed, (w, h, n) in enumerate(sizes)
    ]
    portraits = [np.array(portrait(160, variant).resize((266, 372))) for variant in range(12)]
    return [*chunks, frames_of(portraits), *people()]


def people() -> list[Frames]:
    """Eight people side by side in 1080p, six moments of two seconds, as the decoder gives them."""
    cut = [person.image[: round(person.image.shape[1] * 1.1)] for person in known_people().values()]
    with TemporaryDirectory() as folder:
        path = face_clip(Path(folder) / "people.mp4", cut, 2.0, fps=10, face_height=0.35)
        clip = Clip(probe(path, Settings()), Sampling(max_frames=6))
        return list(PyavDecoder(threads=1).decode([clip]))


def compressed(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The picture after a JPEG of low quality."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=30)
    return np.array(Image.open(file))


def stock(finder: Mtcnn, frames: Frames) -> list[tuple[np.ndarray, np.ndarray]]:
    """Boxes and landmarks of each frame by facenet-pytorch, on the same copy, in source pixels."""
    copy = finder.reduced(frames.pixels)
    zoom = np.array(frames.pixels.shape[3:1:-1]) / np.array(copy.shape[3:1:-1])
    least = finder.finder.min_face / float(zoom.max())
    theirs = MTCNN(keep_all=True, min_face_size=least)
    found = []
    for picture in copy.permute(0, 2, 3, 1).contiguous().numpy():
        boxes, _, points = theirs.detect(picture, landmarks=True)
        if boxes is None:
            found.append((np.zeros((0, 4)), np.zeros((0, 5, 2))))
        else:
            found.append((boxes.astype(float) * np.tile(zoom, 2), points.astype(float) * zoom))
    return found


def of_frame(faces: Faces, row: int) -> tuple[np.ndarray, np.ndarray]:
    mine = faces.frame == row
    return faces.boxes[mine].astype(float), faces.landmarks[mine].astype(float)


def test_the_networks_give_facenet_pytorchs_answers():
    """Same weights, same numbers, though widened, pooled and read out another way."""
    cascade = pretrained()
    pictures = (torch.randn(2, 3, 65, 84), torch.randn(5, 3, 24, 24), torch.randn(5, 3, 48, 48))
    with torch.inference_mode():
        for ours, theirs, x in zip(cascade, (PNet(), RNet(), ONet()), pictures, strict=True):
            expected, answer = theirs(x), ours(x)

            torch.testing.assert_close(answer[0].sigmoid(), expected[-1][:, 1], atol=2e-6, rtol=0)
            torch.testing.assert_close(answer[1], expected[0], atol=2e-6, rtol=0)
            if len(answer) == 3:
                points = expected[1].view(-1, 2, 5).transpose(1, 2)
                torch.testing.assert_close(answer[2], points, atol=2e-6, rtol=0)


@pytest.mark.parametrize("window", [2, 3])
@pytest.mark.parametrize("size", [(3, 3), (4, 7), (5, 6), (8, 9)])
def test_pooling_by_slices_is_max_pooling(size: tuple[int, int], window: int):
    """Odd and even sizes, the cut-off window at the end included."""
    x = torch.randn(2, 5, *size)

    assert torch.equal(F.max_pool2d(x, window, 2, ceil_mode=True), networks._pooled(x, window))


def test_missing_weights_say_what_to_install(monkeypatch):
    """The package is only where the files come from; without it the message names the command."""
    monkeypatch.setattr(networks, "find_spec", lambda name: None)

    with pytest.raises(WeightsMissing, match=r"pip install facenet-pytorch==2\.5\.3"):
        weights_path("pnet")


def test_loading_the_weights_does_not_import_their_package():
    """facenet-pytorch's own code never runs in the worker."""
    code = "import sys, ralf.worker.media.mtcnn as m; from ralf.kernels.manifest import Finder\n"
    code += "m.Mtcnn(Finder()); print('facenet_pytorch' in sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )

    assert run.stdout.strip() == "False"


@settings(deadline=None, max_examples=25)
@given(h=st.integers(13, 60), w=st.integers(13, 60), y=st.integers(1, 70), x=st.integers(1, 70))
def test_a_level_of_the_pyramid_is_the_area_resize(h: int, w: int, y: int, x: int):
    """Windows of one integral picture are torch's `area`, at any size up or down."""
    picture = torch.randint(0, 256, (2, 3, h, w), dtype=torch.uint8)
    expected = (F.interpolate(picture.float(), size=(y, x), mode="area") - 127.5) / 128

    torch.testing.assert_close(
        shrink(integral(picture), Level(1.0, y, x), 0, y), expected, atol=1e-6, rtol=0
    )


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_crops_are_the_area_resizes_of_their_boxes(data: st.DataObject):
    """All boxes of all frames in one gather, each as a slice and a resize would give it."""
    picture = torch.randint(0, 256, (3, 3, 40, 50), dtype=torch.uint8)
    rows = data.draw(st.lists(st.tuples(st.integers(0, 39), st.integers(0, 49)), max_size=6))
    corners = [
        (x, y, data.draw(st.integers(x + 1, 50)), data.draw(st.integers(y + 1, 40)))
        for y, x in rows
    ]
    frame = [data.draw(st.integers(0, 2)) for _ in rows]
    got = crops(
        integral(picture),
        torch.tensor(frame, dtype=torch.int64),
        torch.tensor(corners, dtype=torch.int64).view(-1, 4),
        24,
    )

    assert (len(rows), 3, 24, 24) == tuple(got.shape)
    for k, (x0, y0, x1, y1) in enumerate(corners):
        cut = picture[frame[k] : frame[k] + 1, :, y0:y1, x0:x1].float()
        expected = (F.interpolate(cut, size=(24, 24), mode="area")[0] - 127.5) / 128
        torch.testing.assert_close(got[k], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("pixels", [1, 20 * 143, 31 * 143, 10**6])
@pytest.mark.parametrize("height", [13, 14, 96, 97])
def test_bands_of_a_level_give_its_whole_answer(height: int, pixels: int):
    """A level too large for memory is shown in parts, and no window is lost or seen twice."""
    pnet = pretrained().pnet
    sums = integral(torch.randint(0, 256, (1, 3, 97, 143), dtype=torch.uint8))
    level = Level(1.0, height, 143)
    with torch.inference_mode():
        whole = pnet(shrink(sums, level, 0, height))[0]
        parts = [pnet(shrink(sums, level, *rows))[0] for rows in bands(level, pixels)]

    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=0)


@settings(deadline=None, max_examples=60)
@given(
    boxes=arrays(
        np.float32, st.tuples(st.integers(0, 14), st.just(4)), elements=st.integers(0, 30)
    ),
    seed=st.integers(0, 99),
)
def test_the_last_nms_is_the_greedy_one(boxes: NDArray[np.float32], seed: int):
    """Settling all boxes at once gives what walking over them from the best does."""
    rng = np.random.default_rng(seed)
    boxes[:, 2:] += boxes[:, :2] + 1
    score = rng.permutation(len(boxes)).astype(np.float32)
    frame = rng.integers(0, 2, len(boxes))
    kept = smallest_wins(Candidates(*(torch.from_numpy(v) for v in (boxes, score, frame))), 0.7)
    for number in (0, 1):
        rows = np.flatnonzero(frame == number)
        expected = nms_numpy(boxes[rows], score[rows], 0.7, "Min") if len(rows) else rows

        assert set(rows[np.asarray(expected, int)]) == set(rows[kept[rows]])


def test_only_the_strongest_candidates_of_a_crowded_frame_go_on():
    """A frame made to flood the finder costs no more than the limit; its neighbour loses none."""
    score = torch.tensor([0.9, 0.7, 0.8, 0.95, 0.6, 0.65])
    frame = torch.tensor([0, 0, 0, 0, 1, 1])
    found = Candidates(torch.zeros(6, 4), score, frame)

    assert finder_module._strongest(found, 2).tolist() == [0, 3, 4, 5]


def test_it_finds_the_faces_that_facenet_pytorch_finds(finder: Mtcnn):
    """On the same copies at the same least size: 99 of 100 faces at IoU 0.7, and none besides."""
    matched = wanted = extra = 0
    for frames in composites():
        faces = finder.find(frames)
        for row, (boxes, points) in enumerate(stock(finder, frames)):
            large = (boxes[:, 2:] - boxes[:, :2]).max(1) >= 48
            mine, my_points = of_frame(faces, row)
            iou = overlap(boxes, mine)
            hit = large & (iou.max(1, initial=0) >= 0.7)
            wanted += int(large.sum())
            matched += int(hit.sum())
            extra += int((iou.max(0, initial=0) < 0.7).sum())
            apart = np.abs(points[hit] - my_points[iou[hit].argmax(1)]).max((1, 2))
            assert (apart <= 0.05 * (boxes[hit, 3] - boxes[hit, 1])).all()

    assert wanted >= 100, "the scenes should hold faces"
    assert matched >= 0.99 * wanted
    assert extra <= 0.01 * wanted


def test_a_frame_of_4k_is_sought_on_a_copy_that_shows_its_smallest_face(finder: Mtcnn):
    """48 pixels are 12 on that copy, no fewer; stock on a 640 copy enlarged again agrees."""
    frames = frames_of([scene(3840, 2160, [(200, 100, 60), (1500, 300, 300), (2800, 900, 140)])])
    small = F.interpolate(frames.pixels, size=(360, 640), mode="bilinear", antialias=True)
    picture = small[0].permute(1, 2, 0).contiguous().numpy()
    boxes, _ = MTCNN(keep_all=True, min_face_size=8).detect(picture)

    assert reduced_size(2160, 3840, finder.finder) == (540, 960)
    found = finder.find(frames).boxes.astype(float)
    assert len(found) == 3
    assert (overlap(boxes.astype(float) * 6, found).max(1) >= 0.7).all()


@pytest.mark.parametrize(
    ("size", "finder", "expected"),
    [
        ((1080, 1920), Finder(), (360, 640)),
        ((1920, 1080), Finder(), (640, 360)),
        ((240, 320), Finder(), (240, 320)),
        ((4320, 7680), Finder(), (1080, 1920)),
        ((1080, 1920), Finder(min_face=24), (540, 960)),
        ((1080, 1920), Finder(min_face=12), (1080, 1920)),
        ((1, 4000), Finder(), (1, 1000)),
    ],
)
def test_the_copy_is_as_small_as_the_smallest_face_allows(size, finder, expected):
    """Longer side 640, more where a face of the least size would fall under 12 pixels."""
    assert expected == reduced_size(*size, finder)


def test_the_pyramid_ends_where_a_face_would_fill_the_frame():
    """The first level shows the least face at 12 pixels, the last the largest that fits."""
    levels = pyramid(360, 640, 16.0)

    assert tuple(levels[0]) == (0.75, 271, 481)
    assert 360 * levels[-1].scale >= 12 > 360 * levels[-1].scale * 0.709
    assert pyramid(11, 11, 12.0) == []


def test_boxes_are_in_pixels_of_the_source():
    """The same picture at twice the size gives the same faces at twice the place."""
    once = scene(640, 360, [(60, 40, 90), (380, 80, 70)])
    twice = np.kron(once, np.ones((2, 2, 1), np.uint8))
    small = Mtcnn(Finder(min_face=24)).find(frames_of([once]))
    large = Mtcnn(Finder(min_face=48)).find(frames_of([twice]))

    assert len(small) == 2
    # The enlarged picture comes back through a filter that blurs it a little.
    np.testing.assert_allclose(large.boxes, 2 * small.boxes, atol=4)
    np.testing.assert_allclose(large.landmarks, 2 * small.landmarks, atol=4)
    inside = (small.landmarks >= small.boxes[:, None, :2]) & (
        small.landmarks <= small.boxes[:, None, 2:]
    )
    assert inside.all()


def test_small_faces_are_found_on_request():
    """A face of 28 pixels in 1080p is nothing at the default and a face at min_face 20."""
    frames = frames_of([scene(1920, 1080, [(900, 500, 28)])])

    assert len(Mtcnn(Finder()).find(frames)) == 0
    assert len(Mtcnn(Finder(min_face=20)).find(frames)) == 1


def test_a_chunk_gives_what_its_frames_give(finder: Mtcnn):
    """Frames do not see each other, and the order within a frame is by confidence."""
    pictures = [
        scene(320, 240, [(10, 10, 60), (170, 20, 80)], seed=1),
        np.array(backdrop(320, 240)),
        scene(320, 240, [(60, 5, 90)], seed=2),
        scene(320, 240, [(5, 5, 50), (110, 5, 50), (215, 5, 50)], seed=3),
    ]
    together = finder.find(frames_of(pictures))

    assert together.frame.tolist() == [0, 0, 2, 3, 3, 3]
    for row, picture in enumerate(pictures):
        alone = finder.find(frames_of([picture]))
        mine = together.frame == row
        np.testing.assert_allclose(together.boxes[mine], alone.boxes, atol=1e-2)
        np.testing.assert_allclose(together.confidence[mine], alone.confidence, atol=1e-4)
        assert (np.diff(together.confidence[mine]) <= 0).all()


def test_memory_layout_of_the_pixels_makes_no_difference(finder: Mtcnn):
    """Decoders give interleaved pixels, other callers planes."""
    frames = frames_of([scene(400, 300, [(20, 20, 80), (220, 60, 70)])])
    planes = Frames(frames.clip, frames.pixels.contiguous(), frames.times_s, frames.indices)

    np.testing.assert_array_equal(finder.find(frames).boxes, finder.find(planes).boxes)


@pytest.mark.parametrize(
    "shape", [(0, 90, 160), (2, 1, 1), (1, 11, 11), (1, 12, 12), (1, 49, 500), (1, 3, 4000)]
)
def test_no_frame_and_tiny_frames_are_ordinary(finder: Mtcnn, shape: tuple[int, int, int]):
    """Whatever the shape, the answer is a Faces, here an empty one."""
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)

    assert len(finder.find(frames_of(noise))) == 0


def test_noise_and_flat_frames_have_no_faces(finder: Mtcnn):
    """No candidate at all, or thousands that come to nothing."""
    noise = np.random.default_rng(0).integers(0, 256, (270, 480, 3), dtype=np.uint8)

    assert len(finder.find(frames_of([noise, np.zeros_like(noise), noise // 2]))) == 0


def test_a_face_cut_by_the_edge_keeps_its_place(finder: Mtcnn):
    """The box may reach over the edge; it is not moved or cut."""
    picture = scene(480, 360, [(-34, 60, 100)])
    faces = finder.find(frames_of([picture]))
    (theirs,) = stock(finder, frames_of([picture]))

    assert len(faces) == 1
    assert faces.boxes[0, 0] < 0
    assert overlap(theirs[0], faces.boxes.astype(float)).max() >= 0.7


def test_a_frame_of_8k_is_ordinary(finder: Mtcnn):
    """7680×4320, a small and a large face."""
    picture = Image.new("RGB", (7680, 4320), (70, 90, 110))
    picture.paste(portrait(80), (5200, 3000))
    picture.paste(portrait(1400, 1), (600, 200))
    faces = finder.find(frames_of([np.array(picture)]))
    height = np.sort(faces.boxes[:, 3] - faces.boxes[:, 1])

    assert len(faces) == 2
    np.testing.assert_allclose(height, [80, 1400], rtol=0.35)


def test_frames_run_side_by_side_with_the_same_answer(finder: Mtcnn):
    """One lane or two, and torch's own setting is left as it was, for threads to come as well."""
    frames = frames_of([scene(320, 240, [(10, 10, 60), (170, 20, 80)], seed=k) for k in range(3)])
    alone = finder.find(frames)
    torch.set_num_threads(2)
    beside = finder.find(frames)
    with ThreadPoolExecutor(1) as later:
        counts = (torch.get_num_threads(), later.submit(torch.get_num_threads).result())

    np.testing.assert_array_equal(alone.boxes, beside.boxes)
    np.testing.assert_array_equal(alone.frame, beside.frame)
    assert counts == (2, 2)


def test_work_side_by_side_keeps_its_order_and_its_errors():
    """Results come in the order of the work; an error in a lane is the caller's."""
    torch.set_num_threads(2)

    assert side_by_side([partial(int, text) for text in "3141"]) == [3, 1, 4, 1]
    assert side_by_side([torch.get_num_threads] * 4) == [1] * 4
    with pytest.raises(ValueError, match="invalid literal"):
        side_by_side([partial(int, "1"), partial(int, "x")])
