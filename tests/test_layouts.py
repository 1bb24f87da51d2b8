"""Every layout becomes the same table: labels, people, splits, and who leaks across them."""

import hashlib
import io
import json
from pathlib import Path

import lmdb
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from demo.samples import portraits
from ralf.kernels.manifest import InputContract
from ralf.train.data.batches import Batches
from ralf.train.data.check import check, refuse_leaks
from ralf.train.data.index import REAL, Index, IndexFault, Row, leaks, load, split_by_identity
from ralf.train.data.layouts import LAYOUTS, licence_of, read, read_all
from ralf.train.data.layouts.deepfakebench import LmdbPictures, five_points
from ralf.train.data.layouts.face_table import read_groups
from ralf.train.recipe import Data


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def by_video(index: Index) -> dict[str, Row]:
    return {f"{row.method}/{row.video}": row for row in index}


def ff(root: Path, splits: str, raw: str = "raw") -> Index:
    """A miniature FaceForensics++: two pairs, one for training and one for testing."""
    touch(root, *(f"original_sequences/youtube/{raw}/videos/{n}.mp4" for n in ("071", "054")))
    touch(root, *(f"original_sequences/youtube/c23/videos/{n}.mp4" for n in ("071", "000")))
    touch(root, "manipulated_sequences/Deepfakes/c23/videos/071_054.mp4")
    touch(root, "manipulated_sequences/NeuralTextures/c23/videos/000_003.mp4")
    touch(root, "manipulated_sequences/Deepfakes/masks/videos/071_054.mp4")
    touch(root, "original_sequences/actors/c23/videos/01__exit.mp4")
    touch(root, "manipulated_sequences/DeepFakeDetection/c23/videos/02_01__exit__ABCDEFGH.mp4")
    write(root / splits / "train.json", [["071", "054"]])
    write(root / splits / "val.json", [])
    write(root / splits / "test.json", [["000", "003"]])
    return read(root)


@pytest.mark.parametrize("splits", ["splits", "dataset/splits", "."])
@pytest.mark.parametrize("raw", ["raw", "c0"])
def test_faceforensics_wherever_its_lists_lie(tmp_path, splits, raw):
    """Split files in either place, raw under either name, the target before the source."""
    rows = by_video(ff(tmp_path, splits, raw))
    fake = rows["Deepfakes/071_054"]

    assert (
        fake.label, fake.split, fake.target, fake.source, fake.compression,
    ) == (1, "train", "ffpp:071", "ffpp:054", "c23")  # fmt: skip
    assert fake.masks == "manipulated_sequences/Deepfakes/masks/videos/071_054.mp4"
    assert rows["NeuralTextures/000_003"].split == "test"
    assert (
        rows["real/054"].split, rows["real/054"].label, rows["real/054"].compression,
    ) == ("train", 0, "raw")  # fmt: skip


def test_dfd_is_a_test_set_of_its_own_people(tmp_path):
    """It lies inside FaceForensics++ and shares no identity with it."""
    rows = by_video(ff(tmp_path, "splits"))
    fake = rows["DeepFakeDetection/02_01__exit__ABCDEFGH"]

    assert (
        fake.dataset, fake.split, fake.target, fake.source,
    ) == ("dfd", "test", "dfd:02", "dfd:01")  # fmt: skip
    assert (rows["real/01__exit"].dataset, rows["real/01__exit"].label) == ("dfd", 0)


def test_a_half_written_split_list_is_refused(tmp_path):
    """Two of the three lists would leave the third's videos without a split, silently."""
    ff(tmp_path, "splits")
    (tmp_path / "splits/val.json").unlink()

    with pytest.raises(IndexFault, match=r"no val\.json"):
        read(tmp_path)


def celeb(root: Path, first: str = "1 Celeb-real/id0_0000.mp4") -> None:
    touch(root, "Celeb-real/id0_0000.mp4", "Celeb-real/id1_0000.mp4", "YouTube-real/00170.mp4")
    touch(root, "Celeb-synthesis/id0_id1_0000.mp4", "Celeb-synthesis/id1_id0_0003.mp4")
    listed = [first, "1 Youtube-real/00170.mp4", "0 Celeb-synthesis/id0_id1_0000.mp4"]
    write(root / "List_of_testing_videos.txt", "\n".join(listed) + "\n")


def test_celeb_df_is_flipped(tmp_path):
    """Its list says 1 for real; here 1 is forged.  Either spelling of YouTube is the same."""
    celeb(tmp_path)
    rows = by_video(read(tmp_path))
    fake = rows["Celeb-synthesis/id0_id1_0000"]

    assert (
        fake.label, fake.split, fake.target, fake.source,
    ) == (1, "test", "celeb:id0", "celeb:id1")  # fmt: skip
    assert (rows["real/youtube-00170"].label, rows["real/youtube-00170"].split) == (0, "test")
    assert (rows["real/id1_0000"].label, rows["real/id1_0000"].split) == (0, "train")


def test_celeb_df_unpacked_into_videos_and_with_methods(tmp_path):
    """Some tools put a videos/ between; Celeb-DF++ has folders of methods below."""
    touch(tmp_path, "Celeb-real/videos/id0_0000.mp4", "YouTube-real/videos/00170.mp4")
    touch(tmp_path, "Celeb-synthesis/videos/FaceSwap/id0_id1_0000.mp4")
    write(tmp_path / "List_of_testing_videos.txt", "1 Celeb-real/id0_0000.mp4\n")
    rows = by_video(read(tmp_path))

    assert (rows["real/id0_0000"].split, rows["real/id0_0000"].label) == ("test", 0)
    assert rows["FaceSwap/id0_id1_0000"].label == 1
    assert rows["real/youtube-00170"].split == "train"


def test_a_celeb_df_list_that_was_flipped_already_is_refused(tmp_path):
    """A list in which 0 means real would turn every label round."""
    celeb(tmp_path, first="0 Celeb-real/id0_0000.mp4")

    with pytest.raises(IndexFault, match="1 means real"):
        read(tmp_path)


def test_celeb_df_leaks_its_people_and_check_says_so(tmp_path):
    """Its test list is not identity-disjoint; training on it is refused unless told."""
    celeb(tmp_path)
    index = read(tmp_path)

    assert [leak.name for leak in check(index).leaks] == ["celeb:id0", "celeb:id1"]
    with pytest.raises(IndexFault, match="identity celeb:id0 is in test and train"):
        refuse_leaks(index)
    assert len(refuse_leaks(index, allowed=True)) == 2
    assert leaks(split_by_identity(index)) == []


def test_dfdc_is_grouped_by_the_original(tmp_path):
    """A forgery and its original stay together; the test set comes from labels.csv."""
    part = tmp_path / "dfdc_train_part_0"
    write(
        part / "metadata.json",
        {
            "a.mp4": {"label": "FAKE", "split": "train", "original": "b.mp4"},
            "b.mp4": {"label": "REAL", "split": "train", "original": None},
        },
    )
    write(tmp_path / "test/labels.csv", "filename,label\nc.mp4,1\n")
    rows = by_video(read(tmp_path))

    assert rows["dfdc/a"].group == rows["real/b"].group == "dfdc:b"
    assert rows["dfdc/a"].path == "dfdc_train_part_0/a.mp4"
    assert (rows["dfdc/c"].split, rows["dfdc/c"].label) == ("test", 1)


def test_the_preview_of_dfdc(tmp_path):
    """dataset.json names label, set and people."""
    touch(tmp_path, "original_videos/1/1_000.mp4")
    write(
        tmp_path / "dataset.json",
        {
            "method_A/1/1_2_A.mp4": {
                "label": "fake", "set": "test", "target_id": 1, "swapped_id": 2,
                "original": "original_videos/1/1_000.mp4",
            },
            "original_videos/1/1_000.mp4": {"label": "real", "set": "train"},
        },
    )  # fmt: skip
    rows = by_video(read(tmp_path))

    assert (
        rows["method_A/1_2_A"].target, rows["method_A/1_2_A"].source, rows["method_A/1_2_A"].split,
    ) == ("dfdcp:1", "dfdcp:2", "test")  # fmt: skip
    assert rows["real/1_000"].target == "dfdcp:1"
    assert rows["method_A/1_2_A"].group == rows["real/1_000"].group == "dfdcp:1_000"


def test_deeperforensics_takes_its_reals_from_faceforensics(tmp_path):
    """Actors before a wall are not the real class; targets are FaceForensics++'s people."""
    root = tmp_path / "DeeperForensics-1.0"
    touch(root, "manipulated_videos/end_to_end/071_W012.mp4", "source_videos/W012/x.mp4")
    write(root / "lists/splits/train.txt", "071_W012.mp4\n")
    alone = read(root)

    assert any("no real videos" in note for note in alone.notes)

    touch(tmp_path, "ff/original_sequences/youtube/c23/videos/071.mp4")
    rows = by_video(read(root))

    assert (
        rows["real/071"].target, rows["real/071"].split, rows["real/071"].label,
    ) == ("ffpp:071", "train", 0)  # fmt: skip
    assert (
        rows["end_to_end/071_W012"].target,
        rows["end_to_end/071_W012"].source,
        rows["end_to_end/071_W012"].label,
    ) == ("ffpp:071", "deeper:W012", 1)


def test_wild_deepfake_is_folders_of_frames(tmp_path):
    """There are no videos: a folder of pictures is a sequence, and folders say the split."""
    touch(tmp_path, "real_train/1/real/0/1.png", "real_train/1/real/0/2.png")
    touch(tmp_path, "fake_test/7/fake/3/1.png")
    rows = list(read(tmp_path))

    assert [(row.label, row.split, row.kind) for row in rows] == [
        (0, "train", "frames"),
        (1, "test", "frames"),
    ]
    assert rows[0].path == "real_train/1/real/0"


def listed(frame: str) -> dict[str, object]:
    return {"label": "said twice", "frames": [frame]}


BENCH = {
    "FaceForensics++": {
        "FF-real": {"train": {"c23": {"071": listed("FF\\frames\\071\\000.png")}}},
        "FF-DF": {"train": {"c23": {"071_054": listed("FF\\frames\\071_054\\012.png")}}},
    },
    "Celeb-DF-v2": {
        "CelebDFv2_fake": {"test": {"id0_id1_0000": listed("C/frames/v/003.png")}},
        "CelebDFv2_real": {"test": {"00170": listed("C/frames/00170/003.png")}},
    },
}


def test_deepfake_bench_json_with_and_without_compression(tmp_path):
    """Backslashes, a level for compression or none, and labels by name."""
    write(tmp_path / "FaceForensics++.json", BENCH)
    rows = by_video(read(tmp_path / "FaceForensics++.json"))
    fake = rows["FF-DF/071_054"]

    assert (fake.path, fake.compression, fake.frame) == ("FF/frames/071_054/012.png", "c23", 12)
    assert (fake.target, fake.source, fake.label) == ("ffpp:071", "ffpp:054", 1)
    assert rows["real/071"].label == 0
    assert (
        rows["CelebDFv2_fake/id0_id1_0000"].target,
        rows["CelebDFv2_fake/id0_id1_0000"].compression,
    ) == ("celeb:id0", "")
    assert rows["real/00170"].target == "celeb:youtube00170"


@pytest.mark.parametrize("lean", ["\\", "/"])
@pytest.mark.parametrize("width", [np.int32, np.int64])
def test_deepfake_bench_lmdb_of_either_lean_and_width(tmp_path, lean, width):
    """Keys with either separator; landmarks of whichever machine's integers."""
    picture = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    points = np.arange(162).reshape(81, 2).astype(width)
    folder = tmp_path / "FaceForensics++_lmdb"
    with lmdb.open(str(folder), map_size=2**20) as store, store.begin(write=True) as into:
        names = {"FF/frames/071/000.png": buffer.getvalue(), "FF/landmarks/071/000.npy": points}
        for name, value in names.items():
            key = f"FaceForensics++\\{name}".replace("/", lean)
            into.put(key.encode(), bytes(value))
    write(tmp_path / "FaceForensics++.json", BENCH)
    row = by_video(read(tmp_path / "FaceForensics++.json"))["real/071"]
    store = LmdbPictures(folder)

    assert (row.kind, row.path) == ("lmdb", "FaceForensics++_lmdb::FF/frames/071/000.png")
    assert np.array_equal(picture, store.picture("FF/frames/071/000.png"))
    five = store.landmarks("FF/frames/071/000.png")
    assert five is not None and np.array_equal(points[30], five[2])
    assert pytest.approx(points[36:42].mean(axis=0)) == five[0]
    with pytest.raises(IndexFault, match="has no"):
        store.picture("FF/frames/071/999.png")
    store.close()


def test_landmarks_of_another_length_are_refused():
    """Read as the wrong type they would be noise."""
    with pytest.raises(IndexFault, match="648, 1296"):
        five_points(b"0" * 700)


def test_plain_folders_with_and_without_splits(tmp_path):
    """real/ and fake/, videos or pictures or folders of pictures."""
    touch(tmp_path, "a/real/x.mp4", "a/fake/x_y.mp4", "a/fake/gan/z/1.png", "a/fake/gan/z/2.png")
    rows = by_video(read(tmp_path / "a"))

    assert (
        rows["fake/x_y"].target, rows["fake/x_y"].source, rows["fake/x_y"].kind,
    ) == ("a:x", "a:y", "video")  # fmt: skip
    assert rows["gan/gan/z"].kind == "frames"
    touch(tmp_path, "b/train/real/x.png", "b/test/fake/y.png")
    assert {("train", 0, "image"), ("test", 1, "image")} == {
        (row.split, row.label, row.kind) for row in read(tmp_path / "b")
    }


def test_a_table_of_faces(tmp_path):
    """faces.csv with geometry, and with the least it may have."""
    columns = "file,source,identity,split,box_x0,box_y0,box_x1,box_y1," + ",".join(
        f"{p}_{a}" for p in ("eye_l", "eye_r", "nose", "mouth_l", "mouth_r") for a in "xy"
    )
    line = "a.jpg,voteview,doe_jane,val,1,2,3,4,1,1,2,1,1.5,2,1,3,2,3"
    write(tmp_path / "faces.csv", f"{columns}\n{line}\n")
    touch(tmp_path, "faces/a.jpg")
    np.savez(tmp_path / "landmarks.npz", files=np.array(["a.jpg"]))
    (row,) = read(tmp_path).rows

    assert (
        row.dataset, row.target, row.split, row.label, row.path,
    ) == ("voteview", "doe_jane", "val", 0, "faces/a.jpg")  # fmt: skip
    assert row.box == (1, 2, 3, 4) and row.mesh == "a.jpg"
    face = row.geometry()
    assert face is not None and pytest.approx([1.5, 2]) == face.five[2]


def review(sha256: str, decided: str, label: str) -> dict[str, object]:
    box = {"left": 0.1, "top": 0.2, "right": 0.3, "bottom": 0.4}
    track = {
        "label": label, "score": 0.5, "start_ms": 0, "end_ms": 100,
        "faces": [{"time_ms": 0, "frame": 3, "box": box}],
    }  # fmt: skip
    return {
        "schema": "ralf.review/1", "media_sha256": sha256, "model": "m", "version": "v",
        "label": "likely_forged", "score": 0.9, "decision": "confirm",
        "tracks": [
            {**track, "track_id": "t1"},
            {**track, "track_id": "t2", "label": "unsure"},
            {**track, "track_id": "t3", "wrong_face": True},
        ],
        "reviewed_at": decided,
    }  # fmt: skip


def test_groups_are_read_for_figures_alone_and_never_with_the_index(tmp_path):
    """groups.csv beside faces.csv: person → column → group; no row of the index carries them."""
    (tmp_path / "faces").mkdir()
    table = "file,identity,split\na.jpg,anna,train\na2.jpg,anna,train\nb.jpg,ben,val\n"
    (tmp_path / "faces.csv").write_text(table)
    before = read(tmp_path).sha256
    groups = tmp_path / "groups.csv"
    groups.write_text("file,split,age,region\na.jpg,train,20-29,East\nb.jpg,val,60-69,West\n")

    assert {"age": "20-29", "region": "East"} == read_groups(tmp_path)["anna"]
    assert {row.target for row in read(tmp_path)} == set(read_groups(tmp_path))
    assert before == read(tmp_path).sha256
    for wrong, said in (
        ("file,age\na.jpg,20-29\na2.jpg,60-69\n", "anna into two groups"),
        ("file,age\nc.jpg,20-29\n", "c.jpg, which faces.csv does not"),
        ("file,split\na.jpg,train\n", "one for each grouping"),
    ):
        groups.write_text(wrong)
        with pytest.raises(IndexFault, match=said):
            read_groups(tmp_path)


def test_reviewers_labels_find_their_media_by_hash(tmp_path):
    """The latest review counts; unsure tracks and wrong faces are left out, and said."""
    touch(tmp_path, "media/clip.mp4")
    sha256 = hashlib.sha256(b"x").hexdigest()
    write(tmp_path / "1.json", review(sha256, "2026-01-02T00:00:00Z", "forged"))
    write(tmp_path / "2.json", review(sha256, "2026-01-01T00:00:00Z", "real"))
    write(tmp_path / "3.json", review("0" * 64, "2026-01-01T00:00:00Z", "real"))
    index = read(tmp_path)
    (row,) = index.rows

    assert (
        row.label, row.path, row.frame, row.marked,
    ) == (1, "media/clip.mp4", 3, (0.1, 0.2, 0.3, 0.4))  # fmt: skip
    # A box is in pixels, and the pixels are not read here.
    assert row.box == ()
    assert any("2 tracks left out" in note for note in index.notes)
    assert any("no media for 1 reviews" in note for note in index.notes)


def test_what_is_no_layout_is_refused_with_those_that_are(tmp_path):
    """The message says what each layout is recognised by."""
    touch(tmp_path, "holiday/beach.txt")
    with pytest.raises(IndexFault, match="in no known layout") as caught:
        read(tmp_path / "holiday")

    assert all(layout.name in str(caught.value) for layout in LAYOUTS)
    with pytest.raises(IndexFault, match="no data at"):
        read(tmp_path / "nowhere")


def test_an_index_is_the_same_after_saving(tmp_path):
    """Rows, hash and paths survive; the hash does not know their order."""
    index = ff(tmp_path, "splits")
    again = load(index.save(tmp_path / "index.csv"))

    assert index.rows == again.rows
    assert index.sha256 == again.sha256 == Index(tmp_path, index.rows[::-1]).sha256
    assert index.sha256 != Index(tmp_path, index.rows[1:]).sha256
    assert again.rows == read(tmp_path).rows  # index.csv is found first


def test_two_datasets_become_one_table(tmp_path):
    """Paths of the second are still found; leaks are seen across both."""
    ff(tmp_path / "ff", "splits")
    touch(tmp_path / "own", "real/x.mp4", "fake/x_y.mp4")
    whole = read_all([tmp_path / "ff", tmp_path / "own"])

    assert all(Path(whole.whole_path(row)).exists() for row in whole)


def test_counts_are_held_against_the_published(tmp_path):
    """A miniature of FaceForensics++ differs from the whole, and a missing file is named."""
    index = ff(tmp_path, "splits")
    (tmp_path / "original_sequences/youtube/c23/videos/071.mp4").unlink()
    found = check(index)

    assert not found.fine
    assert "original_sequences/youtube/c23/videos/071.mp4" in found.missing
    assert (1, 1000) in {
        (count.found, count.expected) for count in found.counts if count.what == "Deepfakes c23"
    }
    assert "differs" in str(found)
    assert (0, 1000) in {
        (count.found, count.expected) for count in found.counts if count.what == "FaceShifter c23"
    }


def test_a_test_set_without_its_forgeries_is_said_to_lack_them(tmp_path):
    """Nothing of a kind is a count too: none of 501."""
    write(tmp_path / "dataset.json", {"original_videos/1/1.mp4": {"label": "real", "set": "test"}})
    touch(tmp_path, "original_videos/1/1.mp4")
    told = {count.what: (count.found, count.expected) for count in check(read(tmp_path)).counts}

    assert told["test real"] == (1, 276)
    assert told["test forged"] == (0, 501)


def in_split(split: str, **facts: str) -> Row:
    fine = {"dataset": "d", "method": "m", "path": "p", "kind": "video", "label": 1}
    return Row(**{**fine, "video": split, "split": split, **facts})


@pytest.mark.parametrize(
    ("both", "said"),
    [
        ({"target": "d:1"}, "identity d:1"),
        ({"source": "d:1"}, "identity d:1"),
        ({"group": "g"}, "group g"),
        ({"video": "v"}, "video d/m/v"),
    ],
)
def test_each_kind_of_leak_is_found(both, said):
    """A face, whose face was put on it, an original, and the video itself."""
    rows = [in_split("train", **both), in_split("test", **both)]

    assert [f"{said} is in test and train"] == [str(leak) for leak in leaks(rows)]
    assert leaks([in_split("train", **both), in_split("", **both)]) == []


def test_one_persons_target_is_anothers_source(tmp_path):
    """Seen on one side as the face, on the other as who was put onto it."""
    rows = [in_split("train", target="d:1"), in_split("val", source="d:1", target="d:2")]

    assert [leak.name for leak in leaks(rows)] == ["d:1"]


def test_compressions_of_one_video_are_one_video():
    """A c23 in training and its c40 in test are a leak."""
    rows = [in_split("train", video="v", compression="c23")]
    rows += [in_split("test", video="v", compression="c40")]

    assert ["video"] == [leak.what for leak in leaks(rows)]


def test_pictures_in_an_lmdb_train_with_their_landmarks(tmp_path):
    """DeepfakeBench's crops: pixels and five points from the store, blended and batched."""
    portrait = next(iter(portraits().values()))
    image = np.asarray(Image.fromarray(portrait.image).resize((256, 256)))
    five = portrait.face.five * [256 / portrait.image.shape[1], 256 / portrait.image.shape[0]]
    points = np.zeros((81, 2), np.int64)
    points[36:42], points[42:48], points[[30, 48, 54]] = five[0], five[1], five[2:]
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    with lmdb.open(str(tmp_path / "Own_lmdb"), map_size=2**22) as store:
        with store.begin(write=True) as into:
            into.put(b"Own\\O\\frames\\1\\000.png", buffer.getvalue())
            into.put(b"Own\\O\\landmarks\\1\\000.npy", points.tobytes())
    videos = {"Own": {"Own_Real": {"train": {"1": listed("O\\frames\\1\\000.png")}}}}
    write(tmp_path / "Own.json", videos)
    recipe = Data(input=InputContract(size=64), batch=2, families=("inner",))
    index = read(tmp_path / "Own.json")

    # As in `ralf train`: two pools of one store at a time.
    for batches in [Batches(each, recipe) for each in (index, index.elsewhere(tmp_path / "o"))]:
        frame = batches.pool.real[0][0]
        face = batches.pool.pictures.face(frame)
        assert np.array_equal(image, batches.pool.pictures.picture(frame))
        assert face is not None and np.abs(face.five - five).max() < 1
        assert batches[0].forged.tolist() == [False, True]


def test_rows_without_splits_are_told_how_to_get_them(tmp_path):
    """Reviews and plain folders have none; an empty split would say nothing of that."""
    row = Row(dataset="d", method=REAL, video="v", path="p.png", kind="image", label=0)

    with pytest.raises(IndexFault, match=r"no row has a split.*data index --split"):
        Batches(Index(tmp_path, (row,)), Data())


rows = st.builds(
    lambda target, source, video: Row(
        dataset="d", method="m", video=str(video), target=f"p{target}", source=f"p{source}",
        label=1, path="x", kind="video",
    ),
    st.integers(0, 30), st.integers(0, 30), st.integers(0, 100),
)  # fmt: skip


@given(st.lists(rows, min_size=1, max_size=40))
def test_drawn_splits_never_leak(found):
    """Whatever is tied together by people stays together, in whatever order it is listed."""
    unique = list({row.video: row for row in found}.values())
    index = Index(Path(), tuple(unique))
    drawn = split_by_identity(index, val=0.3, test=0.3)
    turned = split_by_identity(Index(Path(), tuple(unique[::-1])), val=0.3, test=0.3)

    assert leaks(drawn) == []
    assert {row.video: row.split for row in drawn} == {row.video: row.split for row in turned}


def test_celeb_df_folders_in_lower_case_keep_their_labels(tmp_path):
    """A download that was renamed must not turn forgeries into reals."""
    for folder, name in (("Celeb-real", "id0_0000"), ("celeb-synthesis", "id0_id1_0000")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{name}.mp4").touch()

    assert {row.video: row.label for row in read(tmp_path)} == {"id0_0000": 0, "id0_id1_0000": 1}


def test_a_table_without_a_required_column_is_refused_by_its_name(tmp_path):
    """Not by a traceback."""
    (tmp_path / "short.csv").write_text(
        "path,label,video,split,dataset,method\na.jpg,0,a,,d,real\n"
    )

    with pytest.raises(IndexFault, match=r"it has no column \['kind'\]"):
        read(tmp_path / "short.csv")


def test_a_split_that_came_out_empty_is_said():
    """The draw is by name, so one person fills one split; nobody asked for a test split here."""
    fine = {"dataset": "d", "method": "real", "label": 0, "path": "p", "kind": "video"}
    drawn = split_by_identity(Index(Path(), (Row(**fine, video="v"),)), val=0.4, test=0)
    empty = "val" if drawn.rows[0].split == "train" else "train"

    assert [note for note in drawn.notes if "is empty" in note] == [
        f"split '{empty}' is empty: with few people, ask for a larger share"
    ]


def test_a_row_that_contradicts_itself_is_refused():
    """Labels other than 0 and 1, splits nobody knows."""
    fine = {"dataset": "d", "method": "m", "video": "v", "path": "p", "kind": "video"}
    with pytest.raises(IndexFault, match="label"):
        Row(**fine, label=2)
    with pytest.raises(IndexFault, match="split"):
        Row(**fine, label=1, split="dev")


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        ("dfdc", "DFDC licence"),
        ("dfdc_preview", "DFDC licence"),
        ("dfd", "FaceForensics++ terms"),
        ("celeb_df_v2", "Celeb-DF terms"),
        ("fairface", "Kärkkäinen"),
        ("FFHQ", "never in weights that ship"),
        ("civilservice_clips", "public domain"),
        ("holiday", "not known"),
    ],
)
def test_a_dataset_has_the_licence_of_its_layout(dataset: str, words: str):
    """By the longest name that fits: "dfdc" also begins with "dfd"."""
    assert words in licence_of(dataset)
