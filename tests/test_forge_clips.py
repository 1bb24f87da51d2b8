"""Made clips: twins that differ in the forgery alone, as a dataset that can be prepared."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from ralf.kernels.manifest import Finder, InputContract
from ralf.train.data.index import Index, IndexFault, load
from ralf.train.data.pool import Pool
from ralf.train.data.prepare import prepare
from ralf.train.forge.clips import ClipOptions, make_clips
from ralf.train.forge.drift import Drift, joined
from ralf.train.forge.pixels import blur
from ralf.train.recipe import Data
from tests.clips import decode_all
from tests.faces_on_disk import faces

QUICK = ClipOptions(families=("boundary", "smooth"), crfs=(23, 40), seconds=0.4)


@pytest.fixture(scope="module")
def stills(tmp_path_factory) -> Index:
    return faces(tmp_path_factory.mktemp("stills") / "d", val=3)


@pytest.fixture(scope="module")
def made(stills, tmp_path_factory) -> Index:
    return make_clips(stills, tmp_path_factory.mktemp("made"), QUICK, split="val")


def frames(index: Index, row) -> np.ndarray:
    return np.stack(
        [shown.pixels.transpose(1, 2, 0) for shown in decode_all(index.whole_path(row))]
    )


def test_each_still_gives_a_real_and_a_forged_clip_at_each_rate(made):
    """The families take turns; people and splits go along."""
    listed = [(row.method, row.compression) for row in made]

    assert 12 == len(made)
    assert {"real": 6, "boundary": 4, "smooth": 2} == {
        method: [name for name, _ in listed].count(method) for method, _ in listed
    }
    assert {"crf23", "crf40"} == {compression for _, compression in listed}
    assert all(row.split == "val" and row.target and row.kind == "video" for row in made)
    assert all((row.method == "real") == (row.label == 0) for row in made)


def test_twins_move_alike_and_differ_at_the_face(made):
    """Size, number of frames and the frame's border are the same; its middle is not."""
    real, fake = (
        next(row for row in made if row.method in methods and row.compression == "crf23")
        for methods in (("real",), ("boundary", "smooth"))
    )
    assert real.video == fake.video
    one, two = frames(made, real).astype(int), frames(made, fake).astype(int)

    assert one.shape == two.shape and len(one) == 5
    apart = np.abs(one - two).mean(axis=(0, 3))
    height, width = apart.shape
    inside = apart[height // 3 : 2 * height // 3, width // 3 : 2 * width // 3].mean()
    assert inside > 2 * apart[:8].mean()


def test_a_higher_rate_makes_a_smaller_file(made, tmp_path):
    """CRF reaches the encoder."""
    sizes = {}
    for row in made:
        path = made.root / row.path
        sizes.setdefault((row.video, row.method), {})[row.compression] = path.stat().st_size

    assert all(both["crf40"] < both["crf23"] / 2 for both in sizes.values())


def test_a_broken_off_run_goes_on_and_ends_the_same(stills, made, tmp_path):
    """What is there is kept; what is missing is made, to the bit, by several processes too."""
    first = make_clips(stills, tmp_path, QUICK, split="val", limit=1)
    kept = {row.path: (tmp_path / row.path).stat().st_mtime_ns for row in first}
    (tmp_path / first.rows[0].path).unlink()
    again = make_clips(stills, tmp_path, QUICK, split="val", workers=1)

    assert made.rows == again.rows == load(tmp_path / "index.csv").rows
    for row in made:
        assert (made.root / row.path).read_bytes() == (tmp_path / row.path).read_bytes()
    remade = first.rows[0].path
    assert all(
        (tmp_path / path).stat().st_mtime_ns == time
        for path, time in kept.items()
        if path != remade
    )
    assert not list(tmp_path.rglob("*.part.mp4"))


def test_clips_are_forged_as_the_recipe_says_that_they_judge(stills, tmp_path):
    """Of faces found by its contract, on pictures that end at the face; not mixed with others."""
    data = Data(input=InputContract(finder=Finder(min_face=32)), tight_pictures=True)
    prepared = replace(stills, root=tmp_path / "stills")
    shutil.copytree(stills.root, prepared.root)
    contract = {"contract": data.input.model_dump(mode="json")}
    (prepared.root / "prepare.json").write_text(json.dumps(contract))
    quick = replace(QUICK, crfs=(40,))
    made = make_clips(prepared, tmp_path / "made", quick, split="val", data=data, limit=1)

    assert 2 == len(made)
    with pytest.raises(IndexFault, match="finder"):
        make_clips(prepared, tmp_path / "others", quick, split="val", limit=1)
    with pytest.raises(IndexFault, match=r"begun with .*tight_pictures"):
        make_clips(stills, tmp_path / "made", quick, split="val", limit=1)


def test_the_worker_finds_the_faces_in_them(made, tmp_path):
    """`ralf data prepare` takes the index as it is; each row keeps its label and its rate."""
    crops = prepare(made, tmp_path, InputContract(size=64), frames=2)

    assert {(row.video, row.method, row.compression) for row in made} == {
        (row.video, row.method, row.compression) for row in crops
    }
    assert 24 == len(crops)
    assert all(row.box and row.five for row in crops)


def test_landmarks_slip_smoothly_and_colours_drift_on_the_forged_part_alone(stills):
    """Frame by frame a little further, never far; outside the mask the picture is the real one."""
    pool = Pool(stills, Data(), "val", ram_bytes=0)
    still = pool.real[0][0]
    real, face = pool.pictures.picture(still), pool.pictures.face(still)
    assert face is not None
    slips = [list(Drift(np.random.default_rng(4), 12.5).slips(face, 6)) for _ in range(2)]
    places = np.stack([slip.face.five for slip in slips[0]]) / face.eye_distance
    steps = np.linalg.norm(np.diff(places, axis=0), axis=-1)
    faces = [slip.face for slip in slips[0]]
    made = list(pool.forgeries(still, real, faces, "boundary", np.random.default_rng(1)))
    shown = [joined(real, *each, slip) for each, slip in zip(made, slips[0], strict=True)]

    assert np.array_equal(slips[0][3].face.five, slips[1][3].face.five)
    assert 0 < steps.min() and steps.max() < 0.08
    assert np.abs(places - face.five / face.eye_distance).max() < 0.2
    for image, (_, mask) in zip(shown, made, strict=True):
        assert np.array_equal(image[blur(mask, 4) < 1e-4], real[blur(mask, 4) < 1e-4])
    changes = [
        np.abs(one.astype(int) - two)[mask > 0.5].mean()
        for one, two, (_, mask) in zip(shown, shown[1:], made, strict=False)
    ]
    assert all(0.1 < change < 12 for change in changes)


def test_a_clip_that_drifts_is_made_alike_twice_and_unlike_a_steady_one(stills, tmp_path):
    """And its real twin is the steady one's, to the bit."""
    files = {}
    for name, drift in (("one", True), ("two", True), ("steady", False)):
        options = ClipOptions(("boundary",), crfs=(23,), seconds=0.2, drift=drift)
        index = make_clips(stills, tmp_path / name, options, split="val", limit=1)
        files[name] = {row.method: (index.root / row.path).read_bytes() for row in index}

    assert files["one"] == files["two"]
    assert files["one"]["real"] == files["steady"]["real"]
    assert files["one"]["boundary"] != files["steady"]["boundary"]


def test_an_upload_went_through_several_encoders_alike_for_both_twins(stills, tmp_path):
    """One more compression; twins have one size; the worker's decoder reads them all."""
    options = ClipOptions(("boundary",), crfs=(), seconds=0.2, uploads=True)
    index = make_clips(stills, tmp_path, options, split="val", limit=2)
    facts = {}
    for row in index:
        facts.setdefault(row.video, set()).add(frames(index, row).shape)
        assert 2 == len(frames(index, row))

    assert {"upload"} == {row.compression for row in index}
    assert 4 == len(index) and all(1 == len(found) for found in facts.values())


def test_a_folder_begun_with_other_options_is_refused(stills, tmp_path):
    """Its clips would be kept, and the others would be made otherwise."""
    options = ClipOptions(("boundary",), crfs=(23,), seconds=0.1)
    make_clips(stills, tmp_path, options, split="val", limit=1)
    with pytest.raises(IndexFault, match="another folder"):
        make_clips(stills, tmp_path, replace(options, drift=True), split="val", limit=1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"families": ("warp",)}, "no family"),
        ({"families": ()}, "name some"),
        ({"families": ("smooth",), "each": 2}, "at most as many"),
        ({"families": ("smooth",), "crfs": (60,)}, "0 to 51"),
    ],
)
def test_wishes_that_cannot_be_met_are_refused(wrong, message):
    """Before anything is made."""
    with pytest.raises(IndexFault, match=message):
        ClipOptions(**wrong)


def test_a_split_without_reals_is_refused(stills, tmp_path):
    """With the split's name."""
    with pytest.raises(IndexFault, match="'check' has no real"):
        make_clips(stills, tmp_path, QUICK, split="check")
