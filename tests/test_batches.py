"""Batches: pure, balanced, paired, and telling nothing by their quality."""

import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as Picture
from pydantic import ValidationError
from scipy import ndimage
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import roc_auc_score

from demo.samples import portraits
from ralf.kernels.manifest import InputContract
from ralf.train.data.batches import REAL, Batches
from ralf.train.data.crop import Cut, region
from ralf.train.data.evaluation_set import Examples
from ralf.train.data.index import Index, IndexFault
from ralf.train.data.layouts import read
from ralf.train.data.layouts.face_table import BOX_COLUMNS, FIVE_COLUMNS
from ralf.train.data.pictures import Pictures, frames_of
from ralf.train.forge.families import FAMILIES
from ralf.train.forge.landmarks import FaceGeometry
from ralf.train.forge.upload_damage import UploadDamage, damaged, draw_damage, draw_upload
from ralf.train.recipe import Augment, Data
from ralf.worker.media.crops import cut_one
from tests.faces_on_disk import faces

PLAIN = Augment(flip=0.0)
HARD = Augment(
    flip=0.5, jpeg=0.3, h264=0.5, resize=0.5, blur=0.3, noise=0.3, colour=0.3, other=0.5,
    margins=(1.2, 1.5),
)  # fmt: skip
SMALL = InputContract(size=96)


def data(**choices: object) -> Data:
    return Data(**({"input": SMALL, "batch": 8, "augment": PLAIN, "frames": 2} | choices))


@pytest.fixture(scope="module")
def reals(tmp_path_factory) -> Index:
    return faces(tmp_path_factory.mktemp("reals") / "d")


@pytest.fixture(scope="module")
def copies(tmp_path_factory) -> Index:
    """A dataset whose forgeries are the very pictures that are called real."""
    return faces(tmp_path_factory.mktemp("copies") / "d", forgeries="copies")


def same(one, other) -> bool:
    tensors = ("crops", "forged", "pair", "family")
    return one.ids == other.ids and all(
        torch.equal(getattr(one, name), getattr(other, name)) for name in tensors
    )


def test_a_batch_is_a_function_of_seed_and_number_alone(reals):
    """In any order, from any copy, in another process's pickle: the same bits."""
    recipe = data(families=FAMILIES[:9], augment=HARD)
    one, two = Batches(reals, recipe, seed=5), Batches(reals, recipe, seed=5)
    two[9], two[0]
    unpickled = pickle.loads(pickle.dumps(two))

    assert same(one[3], two[3]) and same(one[3], unpickled[3])
    assert not torch.equal(one[3].crops, one[4].crops)
    assert not torch.equal(one[3].crops, Batches(reals, recipe, seed=6)[3].crops)


def test_workers_make_the_same_batches_in_the_same_order(reals):
    """Spawned processes read the shared pictures and change nothing."""
    batches = Batches(reals, data(families=("inner",)), seed=1)
    loader = torch.utils.data.DataLoader(
        batches, batch_size=None, sampler=range(2, 5), num_workers=2,
        multiprocessing_context="spawn",
    )  # fmt: skip

    assert all(same(batches[n + 2], made) for n, made in enumerate(loader))


def test_half_is_forged_and_pairs_point_at_their_reals(reals):
    """Row i + m/2 is made from row i."""
    batch = Batches(reals, data(families=("self_blend", "mouth")))[0]

    assert batch.forged.tolist() == [False] * 4 + [True] * 4
    assert batch.pair.tolist() == [-1] * 4 + [0, 1, 2, 3]
    assert batch.family.tolist()[:4] == [REAL] * 4
    for row in range(4):
        assert batch.ids[row + 4].startswith(batch.ids[row] + "+")
        far = (batch.crops[row].int() - batch.crops[row + 4].int()).abs().float().mean()
        assert 0 < far < 40


def test_forgeries_on_disk_that_no_batch_shows_are_counted(copies):
    """A recipe that blends every forgery leaves them unused; unless it says so, half is theirs."""
    on_disk = sum(row.split == "train" and row.label == 1 for row in copies)

    def unused(**changes):
        return Batches(copies, data(**changes)).unused_forgeries

    assert unused(families=("inner",), blended_share=1.0) == on_disk > 0
    assert unused(families=("inner",)) == unused(families=()) == 0
    batches = Batches(copies, data(families=("inner",)))
    shown = {batches.names[n] for number in range(8) for n in batches[number].family if n >= 0}
    assert {"inner", "copies"} == shown


def test_every_video_comes_round_before_any_comes_again(reals):
    """An epoch shows each real video as often as the recipe says."""
    batches = Batches(reals, data(families=("inner",), batch=4))
    shown = [name for n in range(len(batches)) for name in batches[n].ids[:2]]

    assert len(batches) == 3
    assert 6 == len(set(shown)) == len(shown)


def test_frames_of_a_film_are_drawn_anew_in_each_round(reals):
    """Two of a hundred, never always the first two."""
    row = reals.where(split="train").rows[0]
    film = Index(reals.root, tuple(replace(row, frame=n) for n in range(100)))
    batches = Batches(film, data(families=("inner",), frames=2))
    rounds = [{batches._frame_at(0, 2 * n + k).number for k in (0, 1)} for n in range(3)]

    assert all(len(drawn) == 2 for drawn in rounds)
    assert len(set.union(*rounds)) > 3 and set.union(*rounds) - {0, 1}


def test_nobody_is_swapped_with_themselves(reals):
    """Where all are one person there is no donor."""
    alone = Index(reals.root, tuple(replace(row, target="one") for row in reals))
    pool = Batches(alone, data(families=("swap",)), allow_leaks=True).pool
    frame = pool.real[0][0]
    face = pool.pictures.face(frame)

    assert face is not None
    assert [None] * 5 == [pool.donor(frame, face, np.random.default_rng(n)) for n in range(5)]


def test_the_order_of_faces_changes_with_seed_and_epoch(reals):
    """Each round is its own shuffle."""
    one, two = (Batches(reals, data(families=("inner",), batch=4), seed=seed) for seed in (1, 2))
    epoch = len(one)
    orders = [
        [name for n in range(first, first + epoch) for name in batches[n].ids[:2]]
        for batches, first in ((one, 0), (two, 0), (one, epoch))
    ]

    assert orders[0] != orders[1] and orders[0] != orders[2]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])


def test_balanced_batches_take_real_and_forged_apart(copies):
    """No pair is claimed where there is none."""
    batch = Batches(copies, data(pairing="balanced"))[0]

    assert int(batch.forged.sum()) == 4 and (batch.pair == -1).all()
    assert {"copies"} == {name.split("/")[1] for name in batch.ids[4:]}


def test_a_forgery_on_disk_stands_beside_its_own_target(copies):
    """Same person, same moment, same cut: here the same picture."""
    batches = Batches(copies, data(augment=PLAIN.replaced(flip=0.5, margins=(1.2, 1.4))))
    batch = batches[0]

    assert torch.allclose(batch.crops[:4].float(), batch.crops[4:].float(), atol=30)
    assert batches.names[int(batch.family[4])] == "copies"


def test_a_forgery_on_disk_is_of_the_same_moment(copies):
    """Of a film's frames the one nearest to the real face's own, of the same compression."""
    real = next(row for row in copies if row.split == "train" and not row.label)
    fake = next(row for row in copies if row.label and row.target == real.target)
    rows = [replace(real, frame=n, compression="c23") for n in (0, 31, 60)]
    rows += [replace(fake, frame=n, compression="c23") for n in (2, 30, 59)]
    rows += [replace(fake, frame=n, compression="c40") for n in (0, 31, 60)]
    pool = Batches(Index(copies.root, tuple(rows)), data()).pool
    partners = [pool.partner(frame, np.random.default_rng(0)) for frame in pool.real[0]]

    assert [2, 30, 59] == [partner.number for partner in partners if partner]
    assert {"c23"} == {partner.row.compression for partner in partners if partner}


def test_kindred_neighbours_are_forged_alike(reals):
    """Two faces, one way of forging, each forgery beside its own face; and not one way for all."""
    kindred = Batches(reals, data(pairing="kindred", families=("smooth", "inner", "eyes")))
    families = [kindred[number].family[4:] for number in range(6)]

    assert all(torch.equal(family[::2], family[1::2]) for family in families)
    assert len({int(family) for each in families for family in each}) == 3
    assert any(family[0] != family[2] for family in families)


def test_margins_are_drawn_and_crops_jitter_about_the_face(reals):
    """Each margin of the recipe as often as the others; without any, the contract's own cut."""
    batches = Batches(reals, data(families=("inner",), augment=HARD))
    rng = np.random.default_rng(0)
    cuts = [batches._cut(rng, flip=False) for _ in range(200)]
    wide = np.mean([cut.contract.margin == 1.5 for cut in cuts])

    assert {1.2, 1.5} == {cut.contract.margin for cut in cuts} and 0.4 < wide < 0.6
    assert 0.02 < np.std([cut.shift for cut in cuts]) < 0.04
    assert 0.03 < np.std([np.log(cut.grow) for cut in cuts]) < 0.05
    plain = Batches(reals, data(families=("inner",)))._cut(rng, flip=True)
    assert Cut(SMALL, flip=True) == plain


def test_both_halves_of_a_pair_wear_the_same(copies):
    """The same picture called real and forged comes out the same, whatever it went through."""
    batches = Batches(copies, data(augment=HARD.replaced(noise=0.0), batch=16))
    for number in range(4):
        batch = batches[number]

        assert torch.equal(batch.crops[:8], batch.crops[8:])


def test_the_share_of_blends_among_forgeries(copies):
    """Half from disk, half made, where the recipe says so."""
    recipe = data(families=("inner",), blended_share=0.5, batch=8)
    batches = Batches(copies, recipe)
    made = np.concatenate([batches[n].family[4:].numpy() for n in range(12)])

    assert 0.25 < np.mean(made == FAMILIES.index("inner")) < 0.75


def test_validation_is_never_trained_on(reals):
    """Batches of a split hold only its people, swaps' donors too."""
    batches = Batches(reals, data(families=("swap",)))
    people = {frames[0].row.target for frames in batches.pool.real}
    held = {row.target for row in reals.where(split="val")}
    donors = batches.pool
    face = donors.pictures.face(donors.real[0][0])
    found = [donors.donor(donors.real[0][0], face, np.random.default_rng(n)) for n in range(20)]

    assert people and held and not people & held
    assert all(donor is not None for donor in found)


def test_a_leak_is_refused_unless_told(reals):
    """Training on people who are validated on is not begun by accident."""
    rows = tuple(replace(row, target="one") for row in reals)
    leaking = Index(reals.root, rows)

    with pytest.raises(IndexFault, match="identity one is in train and val"):
        Batches(leaking, data(families=("inner",)))
    Batches(leaking, data(families=("inner",)), allow_leaks=True)


def test_nothing_to_train_on_says_what_to_do(reals, tmp_path):
    """No forgeries, no geometry, no pictures: three different errors."""
    with pytest.raises(IndexFault, match=r"set data\.families"):
        Batches(reals, data())
    bare = Index(reals.root, tuple(replace(row, box=(), five=()) for row in reals))
    with pytest.raises(IndexFault, match="data prepare"):
        Batches(bare, data(families=("inner",)))[0]
    video = Index(reals.root, tuple(replace(row, kind="video") for row in reals))
    with pytest.raises(IndexFault, match="data prepare"):
        Batches(video, data(families=("inner",)))


def test_a_broken_picture_is_named_and_never_replaced(tmp_path):
    """Silently showing another would give it a wrong label."""
    index = faces(tmp_path / "d")
    first = index.rows[0]
    Path(index.whole_path(first)).write_bytes(b"not a picture")
    frames = [frame for video in frames_of(index).values() for frame in video]
    pictures = Pictures(index, frames)
    broken = next(frame for frame in frames if frame.path == first.path)

    with pytest.raises(IndexFault, match=first.path):
        pictures.picture(broken)


def test_pictures_beyond_the_budget_are_read_from_disk(reals):
    """Less memory, the same batches."""
    recipe = data(families=("inner",))

    assert same(Batches(reals, recipe)[0], Batches(reals, recipe, ram_bytes=60_000)[0])


def test_a_crop_of_a_portrait_is_the_workers_crop():
    """Training cuts what serving cuts: same function, same contract, by way of the region."""
    portrait = next(iter(portraits().values()))
    contract = InputContract(size=256)
    image, face = region(portrait.image, portrait.face, Cut(contract))
    ours = Cut(contract).take(image, face)
    whole = torch.from_numpy(portrait.image.transpose(2, 0, 1).copy())
    served = cut_one(whole, portrait.face.box, contract)

    assert torch.equal(served, ours)


def test_a_face_at_the_edge_is_padded_alike():
    """The region keeps to the picture, so padding is still the worker's."""
    portrait = next(iter(portraits().values()))
    left = int(portrait.face.box[0])
    image = np.ascontiguousarray(portrait.image[:, left + 20 :])
    face = portrait.face.scaled(1, 1, left=left + 20)
    contract = InputContract(size=256, margin=1.5)
    part, moved = region(image, face, Cut(contract))
    ours = Cut(contract).take(part, moved)
    served = cut_one(torch.from_numpy(image.transpose(2, 0, 1).copy()), face.box, contract)

    assert torch.equal(served, ours)
    assert (ours[:, :, 0] == ours[:, :, 3]).float().mean() > 0.9


def test_flipping_mirrors_pixels_and_points():
    """The crop is mirrored last, both halves of a pair alike."""
    portrait = next(iter(portraits().values()))
    plain = Cut(SMALL).take(portrait.image, portrait.face)

    assert torch.equal(plain.flip(-1), Cut(SMALL, flip=True).take(portrait.image, portrait.face))


def test_the_recipes_chances_are_what_is_drawn():
    """Over many draws each kind of damage comes as often as the recipe says."""
    rng = np.random.default_rng(0)
    drawn = [draw_damage(HARD.replaced(jpeg=0.3), rng, face_px=200) for _ in range(3000)]
    share = {
        "flip": np.mean([damage.flip for damage in drawn]),
        "h264": np.mean([damage.codec.startswith("lib") for damage in drawn]),
        "jpeg": np.mean([damage.codec == "jpeg" for damage in drawn]),
        "resize": np.mean([damage.scale < 1 for damage in drawn]),
        "blur": np.mean([damage.blur > 0 for damage in drawn]),
        "noise": np.mean([damage.noise > 0 for damage in drawn]),
        "other": np.mean([damage.identity_seed is not None for damage in drawn]),
    }
    wanted = {"flip": 0.5, "h264": 0.5, "jpeg": 0.3, "resize": 0.5, "blur": 0.3, "noise": 0.3,
              "other": 0.5}  # fmt: skip

    assert pytest.approx(wanted, abs=0.04) == share
    assert UploadDamage() == draw_damage(PLAIN, rng, face_px=200)


def test_each_wear_does_what_it_says():
    """Size, blur, noise, encoders: measured on a portrait."""
    image = next(iter(portraits().values())).image[80:280, 100:300]
    rng = np.random.default_rng(0)

    assert np.array_equal(image, damaged(image, UploadDamage(), rng))
    assert damaged(image, UploadDamage(scale=0.5), rng).shape == (100, 100, 3)
    assert sharp(damaged(image, UploadDamage(blur=1.2), rng)) < sharp(image)
    assert sharp(damaged(image, UploadDamage(noise=8), rng)) > sharp(image)
    assert sharp(damaged(image, UploadDamage(codec="libx264", quality=40), rng)) < sharp(image)
    grey = damaged(image, UploadDamage(saturation=0), rng)
    assert np.abs(np.diff(grey.astype(int), axis=-1)).max() <= 1


def sharp(image: np.ndarray) -> float:
    return float(ndimage.laplace(image.mean(axis=-1)).var())


def quality(crop: torch.Tensor, ring: bool) -> list[float]:
    """Sharpness, blockiness, noise, colour and border of a crop: nothing of what it shows."""
    pixels = crop.permute(1, 2, 0).numpy().astype(np.float32)
    grey = pixels.mean(axis=-1)
    edge = np.ones_like(grey, bool)
    if ring:
        width = len(grey) // 12
        edge[width:-width, width:-width] = False
    fine = ndimage.laplace(grey)[edge]
    steps = np.abs(np.diff(grey, axis=1))
    onto = [np.abs(np.diff(grey[k::8].mean(axis=0))).mean() for k in range(8)]
    return [
        np.log(fine.var() + 1e-3),
        float(np.median(np.abs(fine))),
        float(steps[:, 7::8].mean() - steps.mean()) if not ring else 0.0,
        float(np.std(onto)) if not ring else 0.0,
        float(pixels[edge].mean()),
        float(pixels[edge].std()),
        float(np.ptp(pixels[edge].mean(axis=0))),
        float((np.abs(np.diff(grey, axis=1)[edge[:, 1:]]) < 0.5).mean()),
        float((pixels[:, 0] == pixels[:, 1]).mean()),
        float((pixels[0] == pixels[1]).mean()),
    ]


def told_apart(batches: Batches, count: int, *, ring: bool) -> float:
    """How well a forest on quality alone tells forged from real in batches it has not seen."""
    seen = [batches[number] for number in range(count)]
    half = count // 2
    features = [[quality(crop, ring) for crop in batch.crops] for batch in seen]
    forged = [batch.forged.numpy() for batch in seen]
    forest = RandomForestClassifier(100, min_samples_leaf=4, random_state=0)
    forest.fit(np.concatenate(features[:half]), np.concatenate(forged[:half]))
    chance = forest.predict_proba(np.concatenate(features[half:]))[:, 1]
    return float(roc_auc_score(np.concatenate(forged[half:]), chance))


def test_quality_does_not_tell_the_label(copies):
    """With the same pictures on both sides, whatever is learnt is the pipeline's own doing."""
    batches = Batches(copies, data(augment=HARD, batch=16, pairing="paired"), seed=3)

    assert 0.4 < told_apart(batches, 24, ring=False) < 0.6


def test_the_border_of_a_blend_does_not_tell_the_label(reals):
    """A pair shares padding, jitter and damage: around the face a forgery is the real picture."""
    families = ("inner", "mouth", "smooth", "resample")
    batches = Batches(reals, data(augment=HARD, batch=16, families=families), seed=4)

    assert 0.4 < told_apart(batches, 24, ring=True) < 0.6


def test_a_quality_that_does_tell_would_be_seen(copies):
    """The check can fail: blur on one side only is told apart."""
    batches = Batches(copies, data(augment=HARD, batch=16), seed=3)
    whole = Batches.__getitem__

    class Tells(Batches):
        def __getitem__(self, number):
            batch = whole(batches, number)
            for row in range(8, 16):
                blurred = ndimage.gaussian_filter(batch.crops[row].numpy(), (0, 1, 1))
                batch.crops[row] = torch.from_numpy(blurred)
            return batch

    tells = Tells.__new__(Tells)

    assert told_apart(tells, 12, ring=False) > 0.7


def test_evaluation_is_the_same_every_time(reals):
    """And a forgery is the same under every condition, but for the condition."""
    recipe = data(families=("inner", "mouth"), evaluation_frames=4)
    one, two = (list(Examples(reals, recipe, "val")) for _ in range(2))

    assert all(same(a, b) for a, b in zip(one, two, strict=True))
    clean, damaged_faces = (
        Examples(reals, recipe, "val", condition=condition)[0].crops.float()
        for condition in ("clean", "jpeg=60")
    )
    assert 0.2 < (clean - damaged_faces).abs().mean() < 12


def test_evaluation_with_every_family_and_the_one_held_out(reals):
    """Each real once, each family once for each real; the held-out family on request."""
    recipe = data(families=("inner", "mouth"), held_out="boundary")
    everything = Examples(reals, recipe, "val", families=("inner", "boundary"), each=None)
    methods = [item.method for item in everything.items]

    assert {m: methods.count(m) for m in set(methods)} == {"real": 2, "inner": 2, "boundary": 2}
    assert ("portraits", "boundary", "", "tim-kaine") in {item.video for item in everything.items}


def test_the_look_while_training_blends_each_real_once(reals):
    """Families take turns, so that both classes are as many and every family is seen."""
    row = reals.where(split="val").rows[0]
    film = Index(reals.root, tuple(replace(row, frame=n) for n in range(6)))
    recipe = data(families=("inner", "mouth", "smooth"), evaluation_frames=6)
    methods = [item.method for item in Examples(film, recipe, "val").items]

    assert {"real": 6, "inner": 2, "mouth": 2, "smooth": 2} == {
        name: methods.count(name) for name in set(methods)
    }


def test_some_families_forge_each_real_face_and_each_family_equally_many(reals):
    """A face is never forged twice by one family."""
    row = reals.where(split="val").rows[0]
    film = Index(reals.root, tuple(replace(row, frame=n) for n in range(6)))
    recipe = data(families=("inner", "mouth", "smooth"), evaluation_frames=6)
    items = [item for item in Examples(film, recipe, "val", each=2).items if item.forged]
    methods = [item.method for item in items]

    assert len({item.name for item in items}) == len(items) == 12
    assert {name: methods.count(name) for name in methods} == dict.fromkeys(recipe.families, 4)


def test_in_turn_each_generator_on_disk_gives_its_share_of_the_forged_videos(reals):
    """Three generators of six videos each: every third video of each."""
    row = reals.where(split="val").rows[0]
    forged = tuple(
        replace(row, video=f"{method}-{n}", label=1, method=method)
        for method in ("one", "two", "three")
        for n in range(6)
    )
    index = Index(reals.root, (*reals.where(split="val").rows, *forged))
    kept = {
        in_turn: Counter(
            item.method
            for item in Examples(
                index, data(families=()), "val", families=(), in_turn=in_turn
            ).items
            if item.forged
        )
        for in_turn in (False, True)
    }

    assert kept[False] == dict.fromkeys(("one", "two", "three"), 6)
    assert kept[True] == dict.fromkeys(("one", "two", "three"), 2)


def test_a_clean_real_face_is_judged_as_it_is_served(reals):
    """Evaluation's crop is the worker's, whatever the size of the picture."""
    examples = Examples(reals, data(families=()), "val")
    item = examples.items[0]
    image, face = (
        getattr(examples.pool.pictures, what)(item.frame) for what in ("picture", "face")
    )
    served = cut_one(torch.from_numpy(image.transpose(2, 0, 1).copy()), face.box, SMALL)

    assert torch.equal(served, examples.crop(item))


def test_evaluation_frames_spread_over_the_whole_video(reals):
    """DeepfakeBench takes the first frames; ours are even."""
    row = reals.rows[0]
    rows = tuple(replace(row, split="val", frame=n, video="long") for n in range(100))
    examples = Examples(Index(reals.root, rows), data(evaluation_frames=4), "val", families=())

    assert [item.frame.number for item in examples.items] == [12, 37, 62, 87]


def test_a_picture_without_geometry_is_taken_as_a_crop(reals):
    """Datasets that come as crops have no box: they are only resized."""
    crop = Cut(SMALL).take(np.full((50, 40, 3), 7, np.uint8), None)

    assert tuple(crop.shape) == (3, 96, 96) and (crop == 7).all()


def test_a_box_outside_the_picture_is_refused():
    """It would be cut from nothing."""
    five = np.zeros((5, 2), np.float32)
    outside = FaceGeometry(np.array([500, 500, 600, 600], np.float32), five)

    with pytest.raises(IndexFault, match="lies outside 40×50"):
        region(np.zeros((50, 40, 3), np.uint8), outside, Cut(SMALL))


@pytest.mark.parametrize("pairing", ["paired", "balanced"])
def test_the_held_out_family_is_never_made(reals, pairing: str):
    """Nor stands one in for it: held out, self_blend is not what a swap without donor becomes."""
    recipe = data(families=("self_blend", "swap", "inner"), held_out="self_blend", pairing=pairing)
    batches = Batches(reals, recipe, seed=3)
    names = {batches.names[number] for n in range(6) for number in batches[n].family if number >= 0}

    assert {"swap", "inner"} == names
    assert "inner" == batches.pool.alone
    assert {"swap", "inner"} == {item.family for item in Examples(reals, recipe, "val").items} - {
        None
    }


def test_the_held_out_family_is_left_out_from_disk_too(reals):
    """Made clips carry their family as their method; validation while training leaves it out."""
    rows = tuple(replace(row, label=1, method="swap", video=row.video + "f") for row in reals)
    both = Index(reals.root, reals.rows + rows)
    recipe = data(families=("inner",), held_out="swap", blended_share=0.0)

    assert not Batches(both, recipe, allow_leaks=True).pool.forged
    assert "swap" not in {item.method for item in Examples(both, recipe, "val").items}
    asked = Examples(both, recipe, "val", families=())
    assert "swap" in {item.method for item in asked.items}


def test_families_are_drawn_by_the_recipes_shares(reals):
    """Six to one, within what chance allows; without shares, alike."""
    families = ("smooth", "inner")
    drawn = Batches(reals, data(batch=16, families=families, shares=(6.0, 1.0)), seed=5)
    kinds = [drawn._family(np.random.default_rng(seed)) for seed in range(700)]
    even = Batches(reals, data(batch=16, families=families), seed=5)
    alike = [even._family(np.random.default_rng(seed)) for seed in range(700)]

    assert 560 < kinds.count("smooth") < 640
    assert 290 < alike.count("smooth") < 410


@pytest.mark.parametrize("shares", [(1.0,), (1.0, 0.0), (1.0, -1.0), (1.0, 2.0, 3.0)])
def test_shares_that_fit_no_families_are_refused(shares):
    """One above 0 for each family."""
    with pytest.raises(ValidationError, match=r"data\.shares should be 2 numbers above 0"):
        data(families=("smooth", "inner"), shares=shares)


@pytest.fixture(scope="module")
def two_collections(reals, tmp_path_factory) -> Index:
    """The portraits, and a second collection whose pictures end at the face, as one index."""
    root = tmp_path_factory.mktemp("tight") / "d"
    (root / "faces").mkdir(parents=True)
    lines = [",".join(["file", "identity", "split", *BOX_COLUMNS, *FIVE_COLUMNS])]
    for name, portrait in sorted(portraits().items()):
        left, top, right, bottom = (int(side) for side in portrait.face.box)
        part = portrait.image[top + (bottom - top) // 10 : bottom - 8, left + 8 : right - 8]
        moved = portrait.face.scaled(1, 1, left + 8, top + (bottom - top) // 10)
        Picture.fromarray(np.ascontiguousarray(part)).save(root / "faces" / name, quality=95)
        numbers = (f"{value:.1f}" for value in (*moved.box, *moved.five.ravel()))
        lines.append(",".join([name, f"tight {name}", "train", *numbers]))
    (root / "faces.csv").write_text("\n".join(lines))
    return reals + read(root)


def flat_run(crop: torch.Tensor) -> np.ndarray:
    """How many pixels repeat the outermost one, for each place of the crop's four borders."""
    pixels = crop.permute(1, 2, 0).numpy().astype(int)
    sides = (np.rot90(pixels, turns) for turns in range(4))
    equal = (np.abs(side - side[:1]).max(axis=-1) <= 2 for side in sides)
    return np.stack([np.cumprod(side, axis=0).sum(axis=0) for side in equal])


def runs_of_pairs(batches: Batches, number: int) -> tuple[np.ndarray, np.ndarray]:
    """flat_run of the real and of the forged halves, [pairs, side, place]."""
    half = batches.data.batch // 2
    seen = [batches[place].crops for place in range(number)]
    runs = np.stack([flat_run(crop) for crops in seen for crop in crops])
    paired = runs.reshape(number, 2, half, *runs.shape[1:])
    return np.concatenate(paired[:, 0]), np.concatenate(paired[:, 1])


def test_padding_does_not_tell_the_label_where_collections_are_mixed(two_collections):
    """Both halves of a pair are padded alike, in tight pictures and in those cut off here."""
    margins = (0.85, 1.0, 1.15, 1.3, 1.45)
    augment = Augment(flip=0.5, margins=margins, cut_off=0.5)
    recipe = data(batch=16, families=("mouth", "smooth"), augment=augment, tight_pictures=True)
    real, forged = runs_of_pairs(Batches(two_collections, recipe, seed=2), 8)
    padding = real.min(axis=2)

    assert 0.3 < (padding.max(axis=1) > 3).mean() < 0.95
    assert np.abs(padding - forged.min(axis=2)).max() <= 1
    wide = data(batch=16, families=("mouth",), augment=augment)
    alone = Index(two_collections.root, two_collections.rows[:8])
    cut = runs_of_pairs(Batches(alone, wide, seed=2), 4)[0].min(axis=2).max(axis=1)
    assert 0.2 < (cut > 3).mean()


def test_a_moved_copy_draws_no_streaks_at_the_edge_of_a_tight_picture(two_collections):
    """Mirrored beyond its edge while it is forged, a forgery's padding is as long as the real's.

    Without that, the copy's own repeated edge is seen as padding that begins inside the picture.
    """
    tight = Index(two_collections.root, two_collections.rows[8:])
    longer = []
    for mirrored in (True, False):
        recipe = data(batch=16, families=("boundary",), tight_pictures=mirrored)
        real, forged = runs_of_pairs(Batches(tight, recipe, seed=2, allow_leaks=True), 8)
        longer.append((forged > real + 1).mean() - (forged < real - 1).mean())

    assert longer[0] < 0.01 < longer[1]


def test_a_video_of_nobody_named_takes_another_video_as_donor(reals):
    """As everywhere else: where the data names nobody, each video is a person."""
    unnamed = replace(reals, rows=tuple(replace(row, target="") for row in reals))
    pool = Batches(unnamed, data(families=("swap",))).pool
    frame = pool.real[0][0]
    face = pool.pictures.face(frame)
    assert face is not None

    assert any(pool.donor(frame, face, np.random.default_rng(seed)) for seed in range(5))


def test_donors_show_their_whole_face_where_pictures_are_tight(two_collections):
    """Those that their picture cuts are taken only when there is no other."""
    for tight in (True, False):
        pool = Batches(two_collections, data(families=("swap",), tight_pictures=tight)).pool
        frame = pool.real[0][0]
        face = pool.pictures.face(frame)
        assert face is not None
        drawn = [pool.donor(frame, face, np.random.default_rng(seed)) for seed in range(20)]
        sizes = [donor.image.shape[:2] for donor in drawn if donor is not None]
        cut = [
            donor
            for donor in drawn
            if donor is not None and (np.concatenate(donor.face.outline("face")) < 0).any()
        ]
        assert sizes and (not cut if tight else cut)


def test_a_recipe_without_new_fields_gets_the_batches_it_always_got(reals):
    """No random number more is drawn for what is off: mean brightness of each crop, as it was."""
    known = (116.36, 129.43, 100.41, 83.97, 110.63, 127.79, 100.82, 83.97)
    augment = Augment(flip=0.5, margins=(1.2, 1.5))
    seen = Batches(reals, data(families=("inner", "swap"), augment=augment), seed=5)[0].crops

    assert pytest.approx(known, abs=0.05) == seen.float().mean(dim=(1, 2, 3)).tolist()


def test_a_whole_generator_of_forgeries_on_disk_can_be_held_out(copies):
    """By its method's name, in training and in validation; a name that nothing has is refused."""
    recipe = data(families=("inner",), held_out="copies")

    assert not Batches(copies, recipe).pool.forged
    assert "copies" not in {item.method for item in Examples(copies, recipe, "val").items}
    assert recipe.unseen == "copies" and recipe.trained_families == ("inner",)
    with pytest.raises(IndexFault, match=r"'copys' is no family .* on disk \(copies\)"):
        Batches(copies, data(families=("inner",), held_out="copys"))


def test_uploads_are_encoded_twice_through_a_ladder_and_requantised_last():
    """By the recipe's shares; a face keeps 56 px; the codecs are those of phones and platforms."""
    augment = Augment(h264=1.0, uploads=0.5, requantised=0.25)
    rng = np.random.default_rng(0)
    drawn = [draw_damage(augment, rng, face_px=140) for _ in range(600)]
    uploads = [each for each in drawn if [g for g in each.generations if g.codec != "jpeg"]]
    encodings = [g for each in uploads for g in each.generations if g.codec != "jpeg"]
    jpegs = [each.generations[-1] for each in drawn if each.generations]
    jpegs = [last for last in jpegs if last.codec == "jpeg"]

    assert 0.43 < len(uploads) / 600 < 0.57 and 0.19 < len(jpegs) / 600 < 0.31
    assert all(each.codec == ("none" if each in uploads else each.codec) for each in drawn)
    assert {8, 16} <= {round(last.quality) for last in jpegs} <= set(range(8, 17))
    assert {"libx264", "libx265", "libvpx-vp9"} == {each.codec for each in encodings}
    assert {True, False} == {each.ten_bit for each in encodings}
    assert not any(each.ten_bit and each.codec == "libvpx-vp9" for each in encodings)
    assert 56 / 140 - 1e-6 <= min(each.scale for each in encodings) < 1
    assert {1, 2, 3} == {len([g for g in e.generations if g.codec != "jpeg"]) for e in uploads}


@pytest.mark.parametrize("seed", range(6))
def test_an_upload_is_the_same_every_time_and_loses_with_each_generation(seed: int):
    """Encoders in memory are deterministic; what comes back has the size of the last generation."""
    image = portraits()["mark-takano.jpg"].image[:200, :180]
    generations = draw_upload(np.random.default_rng(seed), face_px=100)
    one, two = (
        damaged(image, UploadDamage(generations=generations), np.random.default_rng(0))
        for _ in range(2)
    )

    assert np.array_equal(one, two)
    scale = generations[-1].scale
    assert np.abs(np.array(one.shape[:2]) - np.array([200, 180]) * scale).max() <= 1
    back = np.asarray(Picture.fromarray(one).resize((180, 200)), int)
    assert 0.5 < np.abs(back - image).mean() < 30


def test_each_pair_stands_in_every_view_and_only_its_encoding_differs(reals):
    """Real crops of all faces in one view, then in the next; forged ones in the same order."""
    views = ("none", "libx264:23", "libx264:42")
    still = Augment(flip=0.5, noise=1.0, colour=1.0, h264=1.0)
    recipe = data(families=("inner",), augment=still, batch=12, views=views)
    batches = Batches(reals, recipe, seed=3)
    batch = batches[1]
    crops = batch.crops.float().unflatten(0, (2, len(views), 2))

    assert batch.ids[:2] == batch.ids[2:4] == batch.ids[4:6] and batch.ids[6:8] == batch.ids[8:10]
    assert batch.pair.tolist() == [-1] * 6 + [*range(6)]
    plain, fine, coarse = crops.unbind(1)
    changed = [(view - plain).abs().mean((2, 3, 4)) for view in (fine, coarse)]
    assert (0 < changed[0]).all() and (changed[0] < changed[1]).all() and (changed[1] < 30).all()
    # The other views change nothing about this one.
    other = Batches(reals, recipe.replaced(views=("jpeg:20", "drawn", "none")), seed=3)[1]
    assert torch.equal(batch.crops[:2], other.crops[4:6])
    once = Batches(reals, recipe.replaced(views=(), batch=4), seed=3)[1]
    assert torch.equal(once.crops[:2], other.crops[2:4])
    assert len(batches) == len(Batches(reals, data(families=("inner",), batch=4)))


def test_views_that_cannot_be_shown_are_refused():
    """By what a batch holds, and by name."""
    for choices, said in (
        ({"views": ("none", "jpeg:20"), "batch": 6}, "multiple of 4"),
        ({"views": ("none", "jpeg:20"), "pairing": "reals"}, "another data.pairing"),
        ({"views": ("none",)}, "two or more, each once"),
        ({"views": ("none", "none")}, "two or more, each once"),
        ({"views": ("none", "av1:20")}, "should be none, drawn or ENCODER:QUALITY"),
        ({"views": ("none", "jpeg")}, "should be none, drawn or ENCODER:QUALITY"),
    ):
        with pytest.raises(ValidationError, match=said):
            data(families=("inner",), **choices)
