"""Learned renderers: what they are trained on, how they forge, and the pictures they leave."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from scipy.fft import dctn, idctn

from demo.samples import portraits
from ralf.__main__ import main
from ralf.kernels.artifact import models_folder, resolve
from ralf.kernels.manifest import InputContract
from ralf.train.data.batches import Batches
from ralf.train.data.index import Index, IndexFault, load
from ralf.train.data.layouts import read_all
from ralf.train.data.pool import VARIANT, Pool
from ralf.train.forge.clips import ClipOptions, make_clips
from ralf.train.forge.families import Joined, forge
from ralf.train.forge.landmarks import FIVE, FaceGeometry
from ralf.train.forge.pixels import grid
from ralf.train.forge.renderers import stored
from ralf.train.forge.renderers.aligned import Alignment, aligned_faces
from ralf.train.forge.renderers.fit import FitError, FitRequest, Fitted, fit
from ralf.train.forge.renderers.paste import hull_mask, inner, matched, paste
from ralf.train.forge.renderers.reconstructor import weakened, weakening
from ralf.train.forge.renderers.render import RenderRequest, render
from ralf.train.loop.loop import Interrupt
from ralf.train.losses.perceptual import perceptual
from ralf.train.recipe import Data
from ralf.train.recipe_text import RecipeError, override
from tests.faces_on_disk import faces
from tests.training import one_thread

TINY = {"size": "32", "steps": "3", "batch": "6"}
SMALLER = {
    "autoencoder": {"width": "4", "code": "4"},
    "restorer": {"width": "8", "blocks": "1"},
    "reconstructor": {"base": "4", "blocks": "1"},
    "lip_sync": {"width": "4"},
}
FACE = FaceGeometry(
    np.array([60, 40, 160, 180], np.float32),
    FIVE @ np.array([[0.96, 0.28], [-0.28, 0.96]], np.float32) * 40 + np.float32(100),
)


@pytest.fixture(scope="module")
def reals(tmp_path_factory) -> Index:
    return faces(tmp_path_factory.mktemp("reals") / "d", val=3)


def wanted(name: str, out, **changes: str) -> FitRequest:
    options = stored.kind(name).Options()
    return FitRequest(name, override(options, TINY | SMALLER.get(name, {}) | changes), out)


@pytest.fixture(scope="module")
def fitted_kind(reals, tmp_path_factory):
    """Each kind trained once for a few steps."""
    made: dict[str, FitRequest] = {}

    def of(name: str) -> FitRequest:
        if name not in made:
            one_thread()
            asked = wanted(name, tmp_path_factory.mktemp("fitted") / f"{name}.safetensors")
            fit(reals, asked)
            made[name] = asked
        return made[name]

    return of


@pytest.fixture(scope="module", params=sorted(stored.KINDS))
def fitted(fitted_kind, request) -> FitRequest:
    return fitted_kind(request.param)


def picture() -> np.ndarray:
    return np.random.default_rng(0).uniform(60, 200, (220, 220, 3)).astype(np.float32)


def test_alignment_is_the_similarity_that_moves_the_points_onto_the_mean_face():
    """A mean face that was turned, scaled and shifted comes back to the crop's own place."""
    alignment = Alignment.of(FACE, 96)
    five = alignment.to_crop(FACE.five)

    across = five[1] - five[0]
    assert across[1] == pytest.approx(0, abs=1e-3) and across[0] == pytest.approx(96 / 2.8, 1e-3)
    assert alignment.to_picture(five) == pytest.approx(FACE.five, abs=1e-3)
    assert alignment.scale == pytest.approx(96 / 2.8 / 40, 1e-3)


def test_a_crop_that_is_put_back_is_the_picture():
    """The way there and back loses little more than resampling does."""
    y, x = np.mgrid[:220, :220].astype(np.float32)
    image = np.stack([100 + 50 * np.sin(x / 15), 90 + y / 3, 128 + 40 * np.cos(y / 20)], -1)
    alignment = Alignment.of(FACE, 96)
    window = alignment.window(image.shape)
    back = alignment.put_back(alignment.cut(image.astype(np.float32)), window)

    corner = np.array([window[1].start, window[0].start], np.float32)
    at = alignment.to_crop(grid(*back.shape[:2]) + corner)
    inside = ((at > 3) & (at < 92)).all(axis=-1)
    assert inside.sum() > 5000
    assert np.abs(back - image[window])[inside].mean() < 1.0


def test_an_enlarged_crop_stays_within_a_pictures_values():
    """Bicubic overshoot below 0 has no logarithm, and colour transfer takes one."""
    y, x = np.mgrid[:220, :220]
    image = np.where(((x // 6 + y // 6) % 2 == 0)[..., None], 0, 255).astype(np.float32)
    image = np.repeat(image, 3, axis=-1)
    alignment = Alignment.of(FACE, 160)
    real = alignment.cut(image)
    assert alignment.scale > 1 and real.min() >= 0 and real.max() <= 255
    for seed in range(24):
        made = matched(real[::-1], real, inner(alignment, FACE), np.random.default_rng(seed))
        assert np.isfinite(made).all()


def test_a_face_at_the_pictures_edge_is_cut_and_one_outside_is_refused():
    """Tight crops end above the brows; a face that is not in its picture has wrong points."""
    image = picture()
    edge = FACE.scaled(1, 1, 60, 70)
    assert Alignment.of(edge, 64).cut(image[:120, :120]).shape == (64, 64, 3)
    far = FACE.scaled(1, 1, -900, 0)
    with pytest.raises(IndexFault, match="outside its picture"):
        Alignment.of(far, 64).cut(image)


def test_only_the_train_splits_authentic_faces_are_shown(tmp_path):
    """Forged rows and other splits never reach a renderer."""
    index = faces(tmp_path / "d", val=3, forgeries="copies")

    train = {row.target for row in index if row.split == "train"}
    found = aligned_faces(index, "train", 32)
    assert len(found) == sum(row.split == "train" and not row.label for row in index)
    assert set(found.people) == train
    assert len(aligned_faces(index, "train", 32, most=2)) == 2


def test_colours_are_moved_to_the_real_ones_by_every_way():
    """Mean colours agree after most transfers; a tenth of the draws leaves them."""
    real = picture()[:64, :64]
    drawn = real * np.float32([0.7, 0.9, 1.2]) + 10
    where = np.ones((64, 64), bool)

    def off(image: np.ndarray) -> float:
        return np.abs(image.mean((0, 1)) - real.mean((0, 1))).max()

    apart = [off(matched(drawn, real, where, np.random.default_rng(seed))) for seed in range(24)]
    before = off(drawn)
    assert np.median(apart) < 0.25 * before
    assert max(apart) <= before + 1e-3


def test_a_pasted_crop_changes_its_mask_alone_and_fades_at_the_border():
    """Nothing is drawn beyond the hull, nor beyond the crop's own edge."""
    image = picture()
    alignment = Alignment.of(FACE, 64)
    for seed in range(8):
        joined = paste(image, FACE, alignment, np.zeros((64, 64, 3), np.float32),
                       np.random.default_rng(seed), colours=False)  # fmt: skip
        assert isinstance(joined, Joined)
        change = np.abs(joined.image - image).max(axis=-1)
        assert change[joined.mask == 0].max() == 0
        assert change[joined.mask > 0.9].min() > 20
        assert 0.05 < joined.mask.mean() < 0.4
        steps = np.abs(np.diff(joined.mask, axis=1)).max()
        assert steps < 0.85  # a hull without feathering steps by 1


def test_masks_differ_in_reach_and_softness():
    """Some end above the brows, some hold the whole face; none is empty."""
    window = (slice(0, 220), slice(0, 220))
    areas = [hull_mask(FACE, window, np.random.default_rng(seed)).sum() for seed in range(20)]

    assert max(areas) > 1.5 * min(areas) > 0
    assert inner(Alignment.of(FACE, 64), FACE).mean() > 0.1


def test_a_fitted_renderer_says_what_it_was_trained_on(fitted, reals):
    """The record stands in the file: data, split, steps, losses, cost."""
    found = stored.load(fitted.out)

    assert found.record["data_sha256"] == reals.sha256 and found.record["split"] == "train"
    assert found.record["steps"] == 3 and found.record["people"] == 5
    assert found.record["losses"][0]["step"] == 0 and found.record["losses"][0]["l1"] > 0
    assert found.record["minutes"] >= 0
    assert not list(fitted.out.parent.glob("*.checkpoint"))


def test_a_fitted_renderer_forges_as_a_family_does(fitted):
    """Inside its mask, repeatably, and differently for another draw."""
    family = stored.load(fitted.out).renderer.as_family()
    image = picture().astype(np.uint8)

    def made(seed: int) -> tuple[np.ndarray, np.ndarray]:
        return forge(image, FACE, family, np.random.default_rng(seed))

    (one, mask), (again, _), (other, _) = made(0), made(0), made(1)
    assert np.array_equal(one, again) and not np.array_equal(one, other)
    change = np.abs(one.astype(int) - image).max(axis=-1)
    assert change[mask == 0].max() == 0 and change[mask > 0.5].mean() > 0.5


def test_the_same_command_again_changes_nothing(fitted, reals):
    """A file that is there is kept; other options or data under its name are refused."""
    before = fitted.out.read_bytes()
    done = fit(reals, fitted)
    assert done.ending == "finished" and fitted.out.read_bytes() == before
    with pytest.raises(FitError, match="lr: "):
        fit(reals, replace(fitted, options=fitted.options.replaced(lr=0.1)))
    with pytest.raises(FitError, match="other data"):
        fit(Index(reals.root, reals.rows[:-1]), fitted)


class _After(Interrupt):
    """An interruption that comes after so many questions."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    @property
    def asked(self) -> bool:  # type: ignore[override]
        self.left -= 1
        return self.left < 0


@pytest.mark.usefixtures("one_thread")
def test_an_interrupted_training_ends_with_the_same_weights(fitted, reals, tmp_path):
    """The checkpoint holds all that the next step needs."""
    asked = replace(fitted, out=tmp_path / "again.safetensors", interrupt=_After(2))
    broken = fit(reals, asked)
    assert (broken.ending, broken.step, broken.sha256) == ("interrupted", 2, "")
    assert not asked.out.exists()
    whole: Fitted = fit(reals, replace(asked, interrupt=Interrupt()))

    assert whole.step == 3
    one, other = (stored.load(path).renderer.state_dict() for path in (fitted.out, asked.out))
    for name, tensor in one.items():
        assert torch.allclose(tensor, other[name], atol=2e-3), name


def test_a_time_box_ends_a_training(reals, tmp_path):
    """--minutes counts over all commands; the file says how many steps there were."""
    asked = replace(wanted("autoencoder", tmp_path / "a.safetensors", steps="100000"), minutes=0.0)
    done = fit(reals, asked)

    assert done.ending == "out_of_time" and done.record["steps"] == 0
    assert asked.out.exists()


@pytest.mark.usefixtures("one_thread")
def test_training_lowers_the_difference(reals, tmp_path):
    """Five faces are learnt by heart within seconds."""
    asked = wanted("autoencoder", tmp_path / "a.safetensors", steps="100", lr="3e-3", width="8",
                    code="16", critic="0", ssim="0")  # fmt: skip
    first = fit(reals, replace(asked, options=asked.options.replaced(steps=1),
                               out=tmp_path / "first.safetensors"))  # fmt: skip
    crops = aligned_faces(reals, "train", 32)

    def apart(path) -> float:
        renderer = stored.load(path).renderer
        batch = crops.batch(torch.arange(len(crops)))
        with torch.no_grad():
            codes = renderer.encoder(batch.crops)
            return min((d(codes) - batch.crops).abs().mean().item() for d in renderer.decoders)

    fit(reals, asked)
    assert first.step == 1
    assert apart(asked.out) < 0.7 * apart(tmp_path / "first.safetensors")


@pytest.mark.usefixtures("one_thread")
def test_vgg_features_and_first_weights_can_be_given(fitted, reals, tmp_path):
    """The features' term is in the losses; the first weights are those of the file."""
    asked = replace(fitted, out=tmp_path / "b.safetensors", features=perceptual("vgg16", None),
                    init=fitted.out, options=fitted.options.replaced(steps=1, lr=1e-9))  # fmt: skip
    done = fit(reals, asked)

    assert done.record["losses"][0]["features"] > 0 and done.record["init"] == str(fitted.out)
    one, other = (stored.load(path).renderer.state_dict() for path in (fitted.out, asked.out))
    assert all(torch.allclose(one[name], other[name], atol=1e-5) for name in one)


def test_files_that_are_no_renderer_are_refused(reals, tmp_path):
    """With what was expected."""
    wrong = tmp_path / "x.safetensors"
    wrong.write_bytes(b"nothing")
    with pytest.raises(RecipeError, match="cannot be read"):
        stored.load(wrong)
    with pytest.raises(RecipeError, match="known: autoencoder, restorer"):
        stored.kind("hologram")


def test_the_native_crop_has_the_pictures_own_resolution():
    """What is not reduced keeps its texture; very large faces are bounded."""
    for factor, side in ((0.5, 64), (1.0, 112), (4.0, 256)):
        alignment = Alignment.native(FACE.scaled(factor, factor), multiple=16)
        assert alignment.size == side
    assert Alignment.native(FACE, multiple=16).scale == pytest.approx(1, rel=0.1)


def test_what_is_weakened_is_the_frequencies_of_the_mask():
    """An outside transform agrees; the mean stays."""
    faces_ = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    masks = np.stack([weakening(32, np.random.default_rng(seed)) for seed in range(2)])
    out = weakened(faces_, torch.from_numpy(masks)).numpy()
    for face, mask, made in zip(faces_.numpy(), masks, out, strict=True):
        wanted = idctn(
            dctn(face - 0.5, axes=(1, 2), norm="ortho") * mask, axes=(1, 2), norm="ortho"
        )
        assert made == pytest.approx(wanted + 0.5, abs=1e-5)
        assert made.mean() == pytest.approx(face.mean(), abs=1e-5) and mask.min() < 0.6


def test_the_reconstructor_begins_from_a_detectors(tmp_path):
    """The shipped RALF's reconstructor, with its own dimensions; others are refused by name."""
    version = resolve(models_folder(), "ralf-small").path
    options = stored.kind("reconstructor").Options()
    network = resolve(models_folder(), "ralf-small").manifest.network
    base, blocks = (network.dimensions[name] for name in ("base", "blocks"))
    renderer = stored.kind("reconstructor")(options.replaced(base=base, blocks=blocks))
    assert renderer.begin_from(version)
    with safe_open(version / "weights.safetensors", "pt") as file:
        weight = file.get_tensor("reconstructor.enter.0.weight").float()
    assert torch.equal(renderer.network.enter[0].weight, weight)
    # Its mask halves everything; a whole face would come out twice as bright.
    portrait = next(iter(portraits().values()))
    drawn, mask = forge(portrait.image, portrait.face, renderer.eval().as_family(),
                        np.random.default_rng(0))  # fmt: skip
    inside = mask > 0.9
    assert abs(drawn[inside].mean() / portrait.image[inside].mean() - 1) < 0.1
    with pytest.raises(RecipeError, match="another reconstructor"):
        stored.kind("reconstructor")(options.replaced(base=base + 2)).begin_from(version)


def test_the_restorer_begins_as_a_plain_enlargement():
    """Training starts from bicubic interpolation, not from noise."""
    renderer = stored.kind("restorer")(stored.kind("restorer").Options())
    small = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        drawn = renderer(small)
    plain = torch.nn.functional.interpolate(small, scale_factor=2, mode="bicubic")
    assert drawn.shape == plain.shape and (drawn - plain).abs().mean() < 0.15


# Pictures on disk


@pytest.fixture(scope="module")
def rendered(reals, fitted_kind, tmp_path_factory):
    """Two variants of each validation face, and where their index lies."""
    out = tmp_path_factory.mktemp("rendered")
    asked = RenderRequest(fitted_kind("autoencoder").out, "val", out, variants=2)
    made, path = render(reals, asked)
    return asked, made, path


def test_each_real_gets_its_variants_and_the_index_pairs_them(rendered, reals):
    """Same person, video, split and compression; another method and label."""
    _, made, path = rendered
    val = [row for row in reals if row.split == "val"]

    assert len(made) == 2 * len(val) and load(path).rows == made.rows
    assert {row.method for row in made} == {"autoencoder"} and all(row.label for row in made)
    for real in val:
        own = [row for row in made if row.video.partition(VARIANT)[0] == real.video]
        assert [row.target for row in own] == [real.target] * 2
        assert [row.box for row in own] == [real.box] * 2
        one, two = (np.asarray(Image.open(made.whole_path(row))) for row in own)
        whole = np.asarray(Image.open(reals.whole_path(real)).convert("RGB"))
        assert one.shape == two.shape == whole.shape
        assert not np.array_equal(one, two) and not np.array_equal(one, whole)
        # Without loss: the corner, which no mask reaches, is the real one's to the bit.
        assert np.array_equal(one[:20, :20], whole[:20, :20])


def test_what_is_there_is_kept_and_another_renderer_gets_another_folder(
    rendered, reals, fitted_kind, tmp_path
):
    """An interrupted run goes on, by several processes too, and ends the same."""
    asked, made, path = rendered
    first = path.parent / made.rows[0].path
    others = {row.path: (path.parent / row.path).stat().st_mtime_ns for row in made.rows[1:]}
    picture_before = first.read_bytes()
    first.unlink()
    again, _ = render(reals, replace(asked, workers=1))

    assert again.rows == made.rows and first.read_bytes() == picture_before
    assert others == {name: (path.parent / name).stat().st_mtime_ns for name in others}
    assert not list(path.parent.rglob("*.part"))
    facts = json.loads((path.parent / "render.json").read_text())
    assert facts["renderer_sha256"] == stored.load(asked.renderer).sha256
    other = tmp_path / "other.safetensors"
    fit(reals, wanted("autoencoder", other, seed="1", steps="1"))
    _, elsewhere = render(reals, replace(asked, renderer=other, variants=1, limit=1))
    assert elsewhere.parent != path.parent


def test_training_pairs_each_real_with_a_forgery_of_itself(rendered, reals):
    """Two pictures of one person: each gets the forgery that was made from it."""
    _, made, path = rendered
    rows = (*reals.rows, *made.elsewhere(path.parent))
    one_person = tuple(replace(row, target="portraits:somebody") for row in rows)
    pool = Pool(
        Index(reals.root, one_person), Data(input=InputContract(size=32)), "val", ram_bytes=0
    )
    for frames in pool.real:
        partners = {
            pool.partner(frames[0], np.random.default_rng(seed)).row.video for seed in range(12)
        }
        assert partners == {frames[0].row.video, f"{frames[0].row.video}{VARIANT}1"}


def test_batches_show_rendered_forgeries_beside_blended_ones(rendered, reals):
    """As many as blended_share leaves."""
    _, _, path = rendered
    index = read_all([reals.root, path])
    data = Data(input=InputContract(size=32), batch=8, families=("smooth",), blended_share=0.5)
    batches = Batches(index, data, "val")
    batch = [batches[number] for number in range(6)]
    shown = {batches.names[int(n)] for one in batch for n in one.family[one.forged]}

    assert shown == {"smooth", "autoencoder"}
    assert all((one.pair[one.forged] >= 0).all() for one in batch)


def test_made_clips_take_renderers_in_turn_with_families(reals, fitted_kind, tmp_path):
    """A rendered twin is a clip like any other."""
    renderer = fitted_kind("autoencoder").out
    options = ClipOptions(("smooth",), (renderer,), crfs=(40,), seconds=0.1)
    made = make_clips(reals, tmp_path, options, split="val")

    assert sorted(row.method for row in made) == ["autoencoder"] + 3 * ["real"] + 2 * ["smooth"]
    with pytest.raises(IndexFault, match="one name"):
        ClipOptions((), (renderer, renderer))


def test_the_commands_train_and_render(reals, tmp_path, capsys):
    """`ralf forge fit` prints one JSON line, `ralf forge render` the index."""
    out = tmp_path / "r.safetensors"
    sets = [f"{name}={text}" for name, text in (TINY | SMALLER["autoencoder"]).items()]
    options = [word for each in sets for word in ("--set", each)]
    command = ["forge", "fit", "autoencoder", "--data", str(reals.root), "--out", str(out)]
    assert main([*command, "--device", "cpu", *options, "--steps", "1"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["ending"], facts["steps"], facts["split"]) == ("finished", 1, "train")
    command = ["forge", "render", "--data", str(reals.root), "--with", str(out), "--split", "val"]
    assert main([*command, "--out", str(tmp_path / "made"), "--limit", "1"]) == 0
    assert len(load(capsys.readouterr().out.strip())) == 1
