"""Videos become faces: the right one, by the contract, resumable, nothing dropped in silence."""

import csv
import hashlib
import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from demo.samples import forged, portraits
from ralf.kernels.manifest import Finder, InputContract, Sampling
from ralf.train.data import prepare as module
from ralf.train.data.batches import Batches
from ralf.train.data.extract import Extractor, FileTask, PrepareOptions
from ralf.train.data.index import Index, IndexFault, Row, load
from ralf.train.data.layouts import read
from ralf.train.data.prepare import prepare
from ralf.train.forge.video import animate, encode
from ralf.train.recipe import HELD_OUT, Augment, Data
from ralf.worker.contract import Sampling as Asked
from ralf.worker.media.crops import cut_one
from ralf.worker.media.decode_pyav import PyavDecoder
from ralf.worker.media.mtcnn import Mtcnn
from ralf.worker.media.probe import probe
from ralf.worker.media.types import Clip
from ralf.worker.settings import Settings

CONTRACT = InputContract(
    size=96, finder=Finder(long_side=320, min_face=40), sampling=Sampling(max_frames=3)
)
STILL = {"seconds": 0.4, "fps": 10, "size": (320, 240), "grain": 0.0}
PEOPLE = portraits()
ONE, TWO = (PEOPLE[name] for name in ("tim-kaine.jpg", "joe-neguse.jpg"))


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """A plain dataset: a real, its forgery, a film of nobody, and a file that is no film."""
    root = tmp_path_factory.mktemp("films") / "own"
    for folder in ("real", "fake"):
        (root / folder).mkdir(parents=True)
    encode(animate(ONE.image, seed=1, **STILL), root / "real/kaine.mp4")
    fake = forged(ONE, HELD_OUT)
    encode(animate(fake, seed=1, **STILL), root / "fake/kaine_x.mp4")
    grey = np.full((64, 96, 3), 128, np.uint8)
    encode([grey] * 3, root / "real/nobody.mp4")
    (root / "real/broken.mp4").write_bytes(b"not a film")
    return root


@pytest.fixture(scope="module")
def prepared(films, tmp_path_factory) -> Index:
    return prepare(read(films), tmp_path_factory.mktemp("out"), CONTRACT)


def outcomes(root) -> dict[str, dict[str, str]]:
    with (root / "videos.csv").open() as file:
        return {row["path"]: row for row in csv.DictReader(file)}


def test_every_video_ends_in_the_table(prepared):
    """With what was found, or why nothing was."""
    found = outcomes(prepared.root)

    assert {"real/kaine.mp4", "fake/kaine_x.mp4", "real/nobody.mp4", "real/broken.mp4"} == set(
        found
    )
    assert tuple(found["real/kaine.mp4"][k] for k in ("decoded", "kept", "reason")) == (
        "3",
        "3",
        "",
    )
    assert found["real/nobody.mp4"]["reason"] == "no_faces"
    assert found["real/broken.mp4"]["reason"].split(":")[0] in (
        "container_unsupported", "corrupt_media",
    )  # fmt: skip


def test_labels_people_and_frames_are_kept(prepared):
    """A face is a row of its video."""
    fakes = [row for row in prepared if row.label]

    assert (len(fakes), len(prepared) - len(fakes)) == (3, 3)
    assert {"own:kaine"} == {row.target for row in prepared}
    assert all(row.kind == "image" and row.face_px > 40 for row in prepared)
    assert len({row.frame for row in fakes}) == 3


def test_a_face_remembers_how_strongly_its_video_was_compressed(films, prepared, tmp_path):
    """In the table too; a table without the column keeps its name."""
    row = next(row for row in prepared if row.path.startswith("faces/kaine"))
    film = films / ("fake/kaine_x.mp4" if row.label else "real/kaine.mp4")
    expected = probe(film, Settings()).bits_per_pixel
    unknown = Index(prepared.root, tuple(replace(row, bits_per_pixel=0.0) for row in prepared))
    text = unknown.save(tmp_path / "new.csv").read_text().splitlines()
    assert text[0].endswith(",bits_per_pixel,marked")
    old = [line.rsplit(",", 2)[0] for line in text]
    (tmp_path / "old.csv").write_text("\n".join(old))

    assert row.bits_per_pixel == pytest.approx(expected, abs=1e-6)
    again = load(prepared.save(tmp_path / "index.csv"))
    assert [row.bits_per_pixel for row in again] == [row.bits_per_pixel for row in prepared]
    assert load(tmp_path / "old.csv").sha256 == unknown.sha256 != prepared.sha256


def test_a_stored_face_is_cut_as_the_worker_would_cut_it(films, tmp_path):
    """From the stored file and from the video itself: the same crop but for the encoding."""
    index = read(films).where(video="kaine", label=0)
    made = prepare(index, tmp_path, CONTRACT, quality=0)
    clip = Clip(probe(films / "real/kaine.mp4", Settings()), Asked(max_frames=3))
    (frames,) = PyavDecoder(2**28).decode([clip])
    faces = Mtcnn(CONTRACT.finder).find(frames)
    for row, place in zip(made, range(len(faces)), strict=True):
        stored = np.array(Image.open(tmp_path / row.path))
        ours = cut_one(torch.from_numpy(stored.transpose(2, 0, 1).copy()), row.box, CONTRACT)
        served = cut_one(frames.pixels[faces.frame[place]], faces.boxes[place], CONTRACT)

        assert (ours.float() - served.float()).abs().mean() < 2.5


def test_prepared_faces_train(prepared):
    """The table that comes out is the table that goes in."""
    rows = tuple(replace(row, split="train") for row in prepared)
    recipe = Data(input=CONTRACT, batch=4, augment=Augment(flip=0), frames=3)
    batch = Batches(Index(prepared.root, rows), recipe)[0]

    assert batch.pair.tolist() == [-1, -1, 0, 1]
    assert load(prepared.root / "index.csv").rows == prepared.rows


def test_training_with_another_finder_is_refused(prepared):
    """Faces found otherwise are other faces."""
    rows = tuple(replace(row, split="train") for row in prepared)
    other = CONTRACT.model_copy(update={"finder": Finder(long_side=640, min_face=40)})

    with pytest.raises(IndexFault, match="prepare again"):
        Batches(Index(prepared.root, rows), Data(input=other, batch=2))
    joined = Index(prepared.root.parent, ()) + Index(prepared.root, rows)
    with pytest.raises(IndexFault, match="prepare again"):
        Batches(joined, Data(input=other, batch=2))


def test_a_stopped_run_goes_on(films, tmp_path, monkeypatch):
    """Finished videos are not decoded again; the table is the same."""
    index = read(films)
    worked = []

    def stopping(task, outcome):
        worked.append(outcome.path)
        if len(worked) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(index, tmp_path, CONTRACT, on_progress=lambda _, of, outcome: stopping(of, outcome))
    again = []
    made = prepare(
        index, tmp_path, CONTRACT, on_progress=lambda done, of, outcome: again.append(outcome.path)
    )

    assert not set(worked) & set(again) and len(worked) + len(again) == 4
    assert len(made) == 6


def test_another_contract_in_the_same_folder_is_refused(films, tmp_path):
    """Half of the faces would be cut otherwise."""
    none = Index(films, ())
    prepare(none, tmp_path, CONTRACT)

    with pytest.raises(IndexFault, match="another frames"):
        prepare(none, tmp_path, CONTRACT, frames=9)


def test_a_file_that_kills_its_process_is_named_and_the_rest_is_finished(
    films, prepared, tmp_path, monkeypatch
):
    """Spawned processes make the same rows as this one; the dead one takes none with it."""
    monkeypatch.setattr(module, "_work", _dies_on_the_forgery)
    rows = [row for row in read(films) if row.target == "own:kaine"]
    made = prepare(Index(films, tuple(rows[::-1])), tmp_path, CONTRACT, workers=1)
    found = outcomes(tmp_path)

    assert found["fake/kaine_x.mp4"]["reason"].startswith("decoder_crashed")
    assert {row for row in prepared if not row.label} == set(made)


def _dies_on_the_forgery(task: FileTask):
    if task.rows[0].label:
        (module._extractor.folder / "done" / f"{task.name}.begun").touch()
        os._exit(9)
    return module._extractor.work(task)


def two_people(root, box_of: int) -> Index:
    """A film of two, a small one at the left and a large one at the right, with a mask video."""
    views = [
        list(animate(portrait.image, size=(240, 240), seconds=0.3, fps=10, seed=2, tall=tall))
        for portrait, tall in ((ONE, 0.7), (TWO, 1.0))
    ]
    frames = [np.concatenate(pair, axis=1) for pair in zip(*views, strict=True)]
    encode(frames, root / "manipulated_sequences/Deepfakes/c23/videos/000_001.mp4")
    mask = np.zeros_like(frames[0])
    mask[:, 240 * box_of : 240 * (box_of + 1)] = 255
    encode([mask] * 3, root / "manipulated_sequences/Deepfakes/masks/videos/000_001.mp4")
    return read(root)


@pytest.mark.parametrize("manipulated", [0, 1])
def test_masks_say_which_face_was_manipulated(tmp_path, manipulated):
    """Not the largest one, not the first one."""
    root = tmp_path / "ff"
    for part in ("Deepfakes/c23", "Deepfakes/masks"):
        (root / "manipulated_sequences" / part / "videos").mkdir(parents=True)
    index = two_people(root, manipulated)
    by_mask = prepare(index, tmp_path / "masked", CONTRACT)
    rows = (replace(row, masks="") for row in index)
    by_size = prepare(Index(root, tuple(rows)), tmp_path / "sized", CONTRACT)
    sizes = [np.mean([row.face_px for row in made]) for made in (by_mask, by_size)]

    assert len(by_mask) == len(by_size) == 3
    assert (sizes[0] < 0.9 * sizes[1]) if manipulated == 0 else (sizes[0] == sizes[1])


def test_a_reviewed_face_is_cut_again(films, tmp_path):
    """The box that a person looked at finds its face in the same frame."""
    shutil.copy(films / "real/kaine.mp4", tmp_path / "clip.mp4")
    extractor = Extractor(PrepareOptions(CONTRACT, 3), tmp_path)
    clip = extractor._clip(str(tmp_path / "clip.mp4"))
    (frames,) = extractor.decoder.decode([clip])
    box = extractor.finder.find(frames).boxes[0] / [320, 240, 320, 240]
    face = dict(zip(("left", "top", "right", "bottom"), map(float, box), strict=True))
    sha256 = hashlib.sha256((tmp_path / "clip.mp4").read_bytes()).hexdigest()
    number = int(frames.indices[0])
    track = {
        "track_id": "t1", "label": "forged", "score": 0.2, "start_ms": 0, "end_ms": 100,
        "faces": [{"time_ms": 0, "frame": number, "box": face}],
    }  # fmt: skip
    review = {
        "schema": "ralf.review/1", "media_sha256": sha256, "model": "m", "version": "v",
        "label": "likely_authentic", "score": 0.2, "decision": "overturn", "tracks": [track],
        "reviewed_at": "2026-01-01T00:00:00Z",
    }  # fmt: skip
    (tmp_path / "review.json").write_text(json.dumps(review))
    (row,) = prepare(read(tmp_path), tmp_path / "out", CONTRACT).rows

    assert (1, number, "reviewed") == (row.label, row.frame, row.method)
    assert row.face_px > 40 and len(row.five) == 10


def test_pictures_without_geometry_get_theirs(tmp_path):
    """A folder of frames and a single picture go through the same finder."""
    root = tmp_path / "pictures"
    (root / "real/clip").mkdir(parents=True)
    (root / "fake").mkdir()
    for number, frame in enumerate(animate(ONE.image, seed=1, **STILL)):
        Image.fromarray(frame).save(root / f"real/clip/{number}.png")
    Image.fromarray(TWO.image).save(root / "fake/one.png")
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(root / "fake/black.png")
    made = prepare(read(root), tmp_path / "out", CONTRACT)
    by_video = {row.video: row for row in made}

    assert sum(row.video == "clip" for row in made) == 3
    assert by_video["one"].box and not by_video["black"].box
    assert outcomes(tmp_path / "out")["fake/black.png"]["reason"] == "no_faces: kept as crops"


def test_a_row_whose_face_is_known_is_taken_as_it_is(tmp_path):
    """A table of faces needs no finder."""
    box, five = (1.0, 2.0, 3.0, 4.0), tuple(float(n) for n in range(10))
    row = Row(
        dataset="d", method="real", video="v", label=0, path="a.jpg", kind="image",
        box=box, five=five, mesh="a.jpg",
    )  # fmt: skip
    (made,) = prepare(Index(tmp_path / "old", (row,)), tmp_path / "new", CONTRACT).rows

    assert (box, five) == (made.box, made.five)
    assert str(tmp_path / "old/a.jpg") == made.path
    assert f"{tmp_path / 'old/landmarks.npz'}::a.jpg" == made.mesh
