"""The lip-sync: what its network sees, that it follows lines, and clips whose mouths move."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ralf.train.chain import CHAINS
from ralf.train.data.index import Index, IndexFault
from ralf.train.data.pool import Pool
from ralf.train.forge import clips
from ralf.train.forge.clips import ClipOptions, make_clips
from ralf.train.forge.drift import TURN, talking
from ralf.train.forge.families import REGISTRY, ForgeryTask, Joined, Portrait
from ralf.train.forge.landmarks import CHIN, FaceGeometry, Points, fill, five_of_mesh
from ralf.train.forge.mesh import INNER_LIPS, LOWER_INNER, MEAN, expression_of
from ralf.train.forge.renderers import stored
from ralf.train.forge.renderers.aligned import Alignment, Faces, aligned_faces
from ralf.train.forge.renderers.lip_sync import JAW, OUTER_LIPS, LipSync, lit_as, sketch
from ralf.train.forge.renderers.objective import Objective
from ralf.train.recipe import Data
from tests.faces_on_disk import faces
from tests.training import one_thread

SIZE = 32
OPTIONS = LipSync.Options(size=SIZE, width=8, batch=8)
SKIN, THROAT = np.float32([190, 150, 130]), np.float32([40, 10, 15])


def opened(by: float) -> Points:
    """The mean mesh, its lower lip and its jaw lower by so many eye distances."""
    x, y = MEAN.T
    lower = np.clip((y - MEAN[[13, 14], 1].mean()) / 0.006, 0, 1) * np.clip(
        1 - (x / 0.7) ** 2, 0, 1
    )
    return np.asarray(MEAN + by * lower[:, None] * np.float32([0, 1]), np.float32)


def painted(by: float, size: int = 220, unit: float = 48) -> Portrait:
    """Skin with a dark opening, as wide open as said, and where all that is."""
    mesh = np.asarray(opened(by) * unit + np.float32([size / 2, 0.37 * size]), np.float32)
    picture = np.full((size, size, 3), SKIN)
    picture += (THROAT - SKIN) * fill([mesh[INNER_LIPS]], size, size)[..., None]
    box = np.concatenate([mesh.min(axis=0), mesh.max(axis=0)])
    return Portrait(picture.astype(np.uint8), FaceGeometry(box, five_of_mesh(mesh), mesh))


def forged(renderer: LipSync, target: Portrait, donor: Portrait | None, seed: int = 0) -> Joined:
    rng = np.random.default_rng(seed)
    with torch.inference_mode():
        return renderer.make(ForgeryTask(target.image.astype(np.float32), target.face, rng, donor))


@pytest.fixture(scope="module")
def learnt() -> LipSync:
    """Trained for some seconds on painted faces alone."""
    one_thread()
    torch.manual_seed(0)
    renderer = LipSync(OPTIONS)
    shown = [painted(by) for by in np.linspace(0, 0.25, 16)]
    crops, five, mesh = [], [], []
    for portrait in shown:
        alignment = Alignment.of(portrait.face, SIZE, renderer.middle)
        crops.append(alignment.cut(portrait.image.astype(np.float32)).transpose(2, 0, 1))
        five.append(alignment.to_crop(portrait.face.five))
        mesh.append(alignment.to_crop(portrait.face.mesh))
    known = Faces(
        torch.from_numpy(np.stack(crops)).to(torch.uint8),
        torch.from_numpy(np.stack(five)),
        torch.from_numpy(np.stack(mesh)),
        tuple(map(str, range(16))),
    )
    renderer.learn_from(known)
    objective = Objective(OPTIONS, None, None)
    optimiser = torch.optim.Adam(renderer.parameters(), lr=4e-3)
    for step in range(150):
        generator = torch.Generator().manual_seed(step)
        batch = known.batch(renderer.choose(known, generator))
        drawn = renderer.draw(batch, generator, step / 150)
        optimiser.zero_grad()
        torch.stack(list(objective.terms(drawn, generator, 0.0).values())).sum().backward()
        optimiser.step()
    return renderer.eval()


@pytest.fixture(scope="module")
def reals(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return faces(tmp_path_factory.mktemp("reals") / "d", val=3)


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a network that draws something: its first weights."""
    torch.manual_seed(0)
    renderer = LipSync(LipSync.Options(size=SIZE, width=4))
    path = tmp_path_factory.mktemp("fitted") / "lip_sync.safetensors"
    stored.save(path, renderer, {"name": "lip_sync"})
    return path


def test_the_mouth_is_drawn_as_the_donors_lines_say(learnt: LipSync):
    """A closed mouth opens, an open one closes; the rest of the lower face stays skin."""
    closed, wide = painted(0.0), painted(0.25)
    middle, top = np.rint(wide.face.mesh[13]).astype(int)
    column = slice(top - 8, top + 32), slice(middle - 2, middle + 3)

    def dark(target: Portrait, donor: Portrait) -> float:
        """How much darker than skin the middle of the mouth is; the mean of some draws."""
        made = [forged(learnt, target, donor, seed).image[column] for seed in range(6)]
        return float((SKIN - np.stack(made)).clip(0).mean())

    stays_open = dark(wide, wide)
    assert stays_open > 10
    assert dark(closed, wide) > 0.6 * stays_open
    # A share of the face's own expression is left.
    assert dark(wide, closed) < 0.6 * stays_open
    chin_x, chin_y = np.rint(closed.face.mesh[CHIN] - [0, 12]).astype(int)
    chin = forged(learnt, closed, wide).image[chin_y, chin_x]
    assert np.abs(chin - SKIN).max() < 30


def test_a_forgery_lies_below_the_nose_and_holds_the_whole_mouth(learnt: LipSync):
    """By any draw; eyes and nose are the real ones to the bit."""
    target, donor = painted(0.05), painted(0.2)
    mesh = target.face.mesh
    for seed in range(12):
        made = forged(learnt, target, donor, seed)
        changed = np.abs(made.image - target.image).max(axis=-1)
        nose_tip = int(mesh[4, 1])
        assert made.mask[:nose_tip].max() == changed[:nose_tip].max() == 0
        x, y = np.rint(mesh[OUTER_LIPS].mean(axis=0)).astype(int)
        assert made.mask[y, x] > 0.95
        assert changed[made.mask == 0].max() == 0
        assert np.abs(np.diff(made.mask, axis=0)).max() < 0.85  # feathered


def test_a_face_without_a_mesh_or_a_donor_gets_a_drawn_mouth(learnt: LipSync):
    """Users' data has five points alone."""
    target = painted(0.0)
    bare = Portrait(target.image, FaceGeometry(target.face.box, target.face.five))
    for donor in (None, bare, painted(0.2)):
        one, other = (forged(learnt, bare, donor, seed).image for seed in (0, 1))
        assert np.abs(one - bare.image).max() > 5 and not np.array_equal(one, other)


def test_the_network_sees_nothing_of_what_is_hidden_and_leaves_the_rest():
    """Two faces that differ there alone get the same lower face."""
    renderer = LipSync(OPTIONS).eval()
    one = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    planes = torch.from_numpy(sketch(at(MEAN), [at(MEAN)], SIZE, 1.1))[None].float() / 255
    hidden, lines = planes[:, :1].round(), planes[:, 1:]
    other = torch.where(hidden > 0, 1 - one, one)
    with torch.no_grad():
        drawn, again = renderer(one, hidden, lines), renderer(other, hidden, lines)

    assert 0.15 < hidden.mean() < 0.6
    assert torch.allclose(drawn, again, atol=1e-5)
    assert torch.equal(torch.where(hidden > 0, 0, drawn), torch.where(hidden > 0, 0, one))


def at(mesh: Points, size: int = SIZE) -> Points:
    """A mesh on the mean face as it lies in the lip-sync's crop."""
    middle = np.float32([LipSync.middle.real, LipSync.middle.imag])
    return np.asarray((mesh - middle) * size / 2.8 + size / 2 - 0.5, np.float32)


def test_lines_lie_on_the_mesh_and_all_that_may_move_is_hidden():
    """A plane for each line; a jaw that drops by a fifth of an eye distance leaves nothing."""
    size = 96
    told = sketch(at(MEAN, size), [at(MEAN, size)], size, 1.1)
    assert told.shape == (4, size, size)
    for plane, line in zip(told[1:], (OUTER_LIPS, INNER_LIPS, JAW), strict=True):
        x, y = np.rint(at(MEAN, size)[line]).astype(int).T
        assert plane[y, x].min() > 60 and 0.002 < (plane > 60).mean() < 0.06
    x, y = np.rint(at(opened(0.2), size)).astype(int).T
    below = MEAN[:, 1] > MEAN[2, 1]
    assert told[0][y[below], x[below]].min() == 255
    assert told[0][: int(at(MEAN, size)[4, 1])].max() == 0  # the tip of the nose is seen
    lower = [np.nonzero(sketch(at(mesh, size), [at(MEAN, size)], size, 1.1)[2])[0].max()
             for mesh in (MEAN, opened(0.2))]  # fmt: skip
    assert lower[1] - lower[0] == pytest.approx(0.2 * size / 2.8, abs=1.5)


def test_crops_reach_below_the_jaw():
    """An alignment with another middle shows that point of the mean face in its middle."""
    portrait = painted(0.25)
    alignment = Alignment.of(portrait.face, 96, LipSync.middle)
    five = alignment.to_crop(portrait.face.five)

    assert alignment.to_picture(five) == pytest.approx(portrait.face.five, abs=1e-3)
    assert alignment.to_crop(portrait.face.mesh)[:, 1].max() < 0.96 * 96
    assert at(MEAN, 96)[OUTER_LIPS] == pytest.approx(
        Alignment.of(painted(0).face, 96, LipSync.middle).to_crop(painted(0).face.mesh)[OUTER_LIPS],
        abs=1.5,
    )


def test_it_learns_from_faces_with_a_mesh_where_there_are_some(reals: Index):
    """Without any from all, with the mean mesh; batches are then of all."""
    bare = aligned_faces(reals, "train", SIZE, middle=LipSync.middle)
    some = bare.mesh.clone()
    some[3] = torch.from_numpy(at(MEAN))
    generator = torch.Generator().manual_seed(0)
    chosen = {}
    for name, known in (("bare", bare), ("some", replace(bare, mesh=some))):
        renderer = LipSync(OPTIONS)
        renderer.learn_from(known)
        batches = [renderer.choose(known, generator) for _ in range(8)]
        chosen[name] = set(torch.cat(batches).tolist())
        drawn = renderer.draw(known.batch(batches[0]), generator, 0.0)
        assert drawn.made.shape == drawn.wanted.shape and drawn.where.amax() > 1

    assert chosen == {"bare": set(range(len(bare))), "some": {3}}


def test_skin_keeps_its_mean_colour_whatever_the_mouth_does():
    """A copy that is darker comes back as bright, without the mouth's darkness being counted."""
    closed, wide = painted(0.0, 96, 34), painted(0.25, 96, 34)
    darker = wide.image.astype(np.float32) * 0.8
    drawn = lit_as(darker, closed.image.astype(np.float32), closed.face.mesh, wide.face.mesh)
    x, y = np.rint(closed.face.mesh[CHIN] - [0, 6]).astype(int)
    assert drawn[y, x] == pytest.approx(SKIN, abs=2)


def test_no_renderer_has_the_name_of_a_family():
    """Tables, held-out lists and clips tell forgeries apart by that name."""
    assert not set(stored.KINDS) & set(REGISTRY)


# Mouths that move


def test_a_talking_donor_goes_smoothly_from_one_expression_to_the_next():
    """Within 16 to 32 frames; position and size of the head are the first donor's."""
    donors = [painted(by) for by in (0.0, 0.25, 0.1)]
    said = talking(donors, 80, np.random.default_rng(0))
    gap = np.array([lip_gap(each.face) for each in said])
    own = [lip_gap(each.face) for each in donors]
    reached = int(np.argmax(gap))

    assert gap[0] == pytest.approx(own[0], abs=0.02)
    assert gap[reached] == pytest.approx(own[1], abs=0.05) and TURN[0] <= reached <= TURN[1]
    assert gap[-1] == pytest.approx(own[2], abs=0.05) and np.abs(np.diff(gap)).max() < 0.05
    upper = [each.face.mesh[[33, 263]] for each in (said[0], said[-1])]
    assert upper[0] == pytest.approx(upper[1], abs=2.0)
    # Without meshes there are expressions too: drawn ones.
    bare = [Portrait(d.image, FaceGeometry(d.face.box, d.face.five)) for d in donors]
    drawn = [lip_gap(each.face) for each in talking(bare, 80, np.random.default_rng(0))]
    assert np.ptp(drawn) > 0.02


def lip_gap(face: FaceGeometry) -> float:
    expression = expression_of(face, np.random.default_rng(0))
    return float((MEAN + expression)[LOWER_INNER, 1] - (MEAN + expression)[13, 1])


def test_clips_talk_by_the_renderer_alone(
    reals: Index, untrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The mouth goes on from frame to frame, little by little; the others stand."""
    shown: dict[str, list[np.ndarray]] = {}
    animate = clips.animate

    def watched(portraits: list[np.ndarray], **how: Any) -> Iterator[np.ndarray]:
        shown[f"{name} {len(shown)}"] = [each.astype(int) for each in portraits]
        return animate(portraits, **how)

    monkeypatch.setattr(clips, "animate", watched)
    made = {}
    for name in ("talks", "still"):
        options = ClipOptions(
            ("smooth",), (untrained,), crfs=(30,), each=2, seconds=0.8, talk=name != "still"
        )
        made[name] = make_clips(reals, tmp_path / name, options, split="val", limit=1)
    files = {
        name: {row.method: (index.root / row.path).read_bytes() for row in index}
        for name, index in made.items()
    }

    assert {"real", "smooth", "lip_sync"} == set(files["talks"])
    assert files["talks"]["lip_sync"] != files["still"]["lip_sync"]
    assert all(files["talks"][name] == files["still"][name] for name in ("real", "smooth"))
    assert [1, 1, 1, 1, 1, 10] == sorted(map(len, shown.values()))
    frames = max(shown.values(), key=len)
    steps = [np.abs(one - two).sum() for one, two in pairwise(frames)]
    whole = np.abs(frames[-1] - frames[0]).sum()
    assert sum(step > 0 for step in steps) >= 5 and max(steps) < whole


def test_a_wish_to_talk_needs_a_mouth_and_is_written_down(
    reals: Index, untrained: Path, tmp_path: Path
):
    """Blends cannot; a folder of silent clips is not mixed with talking ones."""
    with pytest.raises(IndexFault, match="forge fit lip_sync"):
        ClipOptions(("smooth",), talk=True)
    silent = ClipOptions((), (untrained,), crfs=(40,), seconds=0.1)
    make_clips(reals, tmp_path, silent, split="val", limit=1)
    with pytest.raises(IndexFault, match="another folder"):
        make_clips(reals, tmp_path, replace(silent, talk=True), split="val", limit=1)


def test_with_nobody_else_a_mouth_is_drawn_all_the_same(reals: Index, untrained: Path):
    """No blend stands in under the renderer's name; where there is another person, it is asked."""
    asked: list[ForgeryTask] = []
    family = stored.load(untrained).renderer.as_family()

    def make(task: ForgeryTask) -> Joined:
        asked.append(task)
        made = family.make(task)
        assert isinstance(made, Joined)
        return made

    val = [row for row in reals if row.split == "val"]
    for rows in (val[:1], val):
        pool = Pool(Index(reals.root, tuple(rows)), Data(), "val", ram_bytes=0)
        still = pool.real[0][0]
        image, face = pool.pictures.picture(still), pool.pictures.face(still)
        assert face is not None
        rng = np.random.default_rng(0)
        pool.forgery(still, image, face, replace(family, make=make), rng)

    assert [task.donor is None for task in asked] == [True, False]


def test_a_mouths_donor_looks_the_same_way_and_may_say_anything(reals: Index):
    """Eyes and nose decide; for a swap the corners of the mouth count as much."""
    one, turned, smiling = (row for row in reals if row.split == "val")
    five = np.array(one.five).reshape(5, 2)
    nose, mouth = five.copy(), five.copy()
    nose[2, 0] += 8
    mouth[3:, 1] += 25
    rows = (
        one,
        replace(turned, five=tuple(nose.ravel())),
        replace(smiling, five=tuple(mouth.ravel())),
    )
    pool = Pool(Index(reals.root, rows), Data(), "val", ram_bytes=0)
    still = next(video[0] for video in pool.real if video[0].row.path == one.path)
    face = pool.pictures.face(still)
    assert face is not None
    shapes = {}
    for any_mouth in (False, True):
        donor = pool.donor(still, face, np.random.default_rng(0), any_mouth=any_mouth)
        assert donor is not None
        away = donor.face.five - donor.face.five[0]
        shapes[any_mouth] = away / np.linalg.norm(away[1]) * np.linalg.norm(five[1] - five[0])

    own = five - five[0]
    assert np.abs(shapes[True][:3] - own[:3]).max() < 0.5 < np.abs(shapes[True] - own).max()
    assert np.abs(shapes[False][3:] - own[3:]).max() < 0.5


def test_chains_that_let_clips_talk_fit_a_renderer_that_can():
    """One that calibration may see."""
    talking_chains = [chain for chain in CHAINS.values() if chain.clips and chain.clips.talk]
    assert {"shipped", "shipped_gpu"} <= {chain.name for chain in talking_chains}
    for chain in talking_chains:
        assert any(stored.kind(f.renderer).speaks and not f.held_out for f in chain.fits)
