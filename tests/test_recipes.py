"""Recipes: complete, printable, changed by name with their types checked."""

import inspect
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from ralf.kernels.manifest import InputContract, Network, held_out_family
from ralf.kernels.networks import options
from ralf.train.data.batches import Batches
from ralf.train.data.index import Index, Row
from ralf.train.forge.families import FAMILIES, REGISTRY
from ralf.train.losses.ralf import RalfLoss
from ralf.train.recipe import BLENDS, Augment, Data, Optimiser, Recipe, seen_families
from ralf.train.recipe_text import RecipeError, differences, from_json, names, override, to_json
from ralf.train.recipes import RECIPES, named


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_survives_json(name: str):
    """What a checkpoint stores is the recipe, whole."""
    recipe = named(name)

    assert recipe == from_json(to_json(recipe), Recipe)
    assert name == recipe.name


def test_the_papers_recipe_is_the_papers():
    """Section 4.3, and the authors' code where the paper is silent."""
    recipe = named("ralf_paper")
    loss = recipe.loss

    assert isinstance(loss, RalfLoss)
    assert (
        recipe.optimiser.lr,
        recipe.optimiser.kind,
        recipe.optimiser.weight_decay,
    ) == (1e-4, "adam", 0.0)
    assert (loss.rival_lr, loss.rival_betas) == (2e-4, (0.5, 0.999))
    assert (recipe.data.batch, recipe.data.pairing, recipe.data.frames) == (16, "balanced", 1)
    assert Augment(flip=0.5) == recipe.data.augment
    assert (
        recipe.schedule.epochs,
        recipe.schedule.shape,
        recipe.schedule.evaluate_every,
        recipe.schedule.select,
    ) == (100, "constant", 5, "bce")
    assert (recipe.data.input.squeeze, recipe.data.input.size) == (True, 256)
    assert (
        loss.weight_rec,
        loss.weight_freq,
        loss.weight_adv,
        loss.weight_emb,
        loss.weight_con,
    ) == (0.1, 1.0, 0.1, 0.1, 0.1)
    assert (loss.freq, loss.freq_scale, loss.perceptual) == ("magnitude", "unnormalised", "vgg19")
    assert (
        loss.radius_real,
        loss.radius_forged,
        loss.centre,
        loss.alpha,
    ) == (0.05, 1.5, "epoch", "epoch")
    assert (loss.centre_sums_forged, loss.centre_keeps_graph) == (False, False)
    assert (recipe.network.dimensions) == {
        "base": 32,
        "blocks": 8,
        "backbone": "xception",
        "size": 256,
    }


def test_the_classifier_alone_differs_from_ralf_small_only_in_network_and_loss():
    """A fair comparison has the same data and the same budget."""
    small, alone = named("ralf_small"), named("small_classifier")

    assert small.data == alone.data
    assert small.schedule == alone.schedule
    assert small.optimiser == alone.optimiser
    assert small.network.dimensions["backbone"] == alone.network.dimensions["backbone"]


@pytest.mark.parametrize("name", ["fdfl_small", "rcl_small"])
def test_the_other_small_detectors_have_the_same_data_and_budget(name: str):
    """All that differs is the network, the loss and, for rcl, who stands beside whom."""
    alone = named("small_classifier").replaced(notes=())
    changed = {line.split(":")[0] for line in differences(alone, named(name))}
    own = {"name", "notes", "network.build", "network.fusion", "network.gate", "data.pairing"}
    own.add("optimiser.rates")

    assert set() == {each for each in changed - own if not each.startswith("loss.")}


def test_every_family_is_one_that_blending_knows():
    """A recipe must not name what cannot be made, nor train on what is held out."""
    for name in RECIPES:
        data = named(name).data
        assert set() == {*data.families, *filter(None, [data.held_out])} - {*FAMILIES}
        assert data.held_out not in data.trained_families
    ours = named("ralf").data
    assert {*BLENDS} == {*ours.trained_families, ours.held_out}
    assert BLENDS == FAMILIES[: len(BLENDS)]


def test_what_was_held_out_is_read_from_what_was_trained():
    """One function for calibration, tables, card and promotion; older models held out boundary."""
    assert "swap" == held_out_family({"held_out": "swap"})
    assert held_out_family({"held_out": None}) is None
    assert "boundary" == held_out_family({"recipe": "ralf_small_cpu", "faces": 3200})
    assert {*BLENDS} - {"swap"} == {*seen_families({"held_out": "swap"})}
    assert BLENDS == seen_families({"held_out": None})
    made = {"held_out": "swap", "families": ["face_swap", "mouth"]}
    assert ("face_swap", "mouth") == seen_families(made)


def test_a_recipe_without_a_held_out_family_is_judged_by_one_it_does_not_make():
    """Forgeries on disk alone: boundary is unseen.  All ten families: none is."""
    assert "boundary" == named("xception").data.unseen
    assert Data(families=FAMILIES).unseen is None
    assert "swap" == Data(families=("inner",), held_out="swap").unseen


def test_overrides_reach_every_part_by_name():
    """A bare name that only one part has needs no prefix."""
    changed = override(
        named("ralf_small"),
        {
            "epochs": "20",
            "optimiser.lr": "3e-4",
            "network.base": "8",
            "margins": "1.2,1.4",
            "families": "self_blend,swap",
            "shares": "2,1",
            "held_out": "none",
            "finder.min_face": "30",
            "con_pairs": "no",
            "patience": "4",
            "init.perceptual": "vgg.safetensors",
            "rival_betas": "0.4,0.9",
        },
    )

    assert changed.schedule.epochs == 20
    assert changed.optimiser.lr == 3e-4
    assert changed.network.dimensions["base"] == 8
    assert changed.data.augment.margins == (1.2, 1.4)
    assert changed.data.families == ("self_blend", "swap")
    assert changed.data.shares == (2.0, 1.0)
    assert changed.data.held_out is None
    assert changed.data.input.finder.min_face == 30
    assert isinstance(changed.loss, RalfLoss)
    assert not changed.loss.con_pairs
    assert changed.loss.rival_betas == (0.4, 0.9)
    assert changed.schedule.patience == 4
    assert changed.init.perceptual == "vgg.safetensors"


def test_sizes_that_must_agree_are_set_together():
    """Neither of the two alone would pass."""
    changed = override(named("ralf"), {"network.size": "128", "data.input.size": "128"})

    assert (changed.network.dimensions["size"], changed.data.input.size) == (128, 128)
    with pytest.raises(RecipeError, match="set both"):
        override(named("ralf"), {"network.size": "128"})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"epochs": "ten"}, "epochs should be a valid integer, not 'ten'"),
        ({"epochs": "1.5"}, "a valid integer"),
        ({"optimiser.lr": "fast"}, "a valid number, not 'fast'"),
        ({"optimiser.kind": "lion"}, "optimiser.kind should be 'adam', 'adamw' or 'sgd', not"),
        ({"con_pairs": "maybe"}, "loss.con_pairs should be a valid boolean, not 'maybe'"),
        ({"rival_betas": "0.5"}, r"loss\.rival_betas\.1 is missing"),
        ({"batch": "7"}, "even"),
        ({"kind": "ralf"}, "loss.kind or optimiser.kind"),
        ({"epoch": "3"}, "known: .*schedule.epochs"),
        ({"margin": "9"}, "data.input.margin should be less than or equal to 3, not 9"),
        ({"flip": "1.5"}, "data.augment.flip should be less than or equal to 1, not 1.5"),
        ({"optimiser.lr": "nan"}, "optimiser.lr should be a finite number, not nan"),
        ({"optimiser.lr": "inf"}, "finite"),
        ({"weight_con": "-1"}, "loss.weight_con should be greater than or equal to 0, not -1"),
        ({"weight_freq": "nan"}, "loss.weight_freq should be a finite number"),
        ({"clip": "0"}, "optimiser.clip should be greater than 0, not '0'"),
        ({"radius_real": "2"}, "below"),
        ({"families": "boundary", "shares": "1"}, "nothing is left to train on"),
        ({"families": "inner"}, "shares should be 1 numbers above 0"),
        (
            {"families": "inner,magic"},
            r"families\.1 should be one of self_blend, inner.*, not 'magic'",
        ),
        (
            {"network.deep": "3"},
            r"no 'network\.deep'.*network\.pool, network\.guided, network\.sees",
        ),
        ({"network.pool": "median"}, "network.pool should be 'max' or 'mean', not 'median'"),
        ({"network.guided": "a bit"}, "network.guided should be a valid boolean"),
    ],
)
def test_nonsense_is_refused_with_what_was_expected(changes: dict[str, str], said: str):
    """The message names the field, what came, and what would do."""
    with pytest.raises(RecipeError, match=said):
        override(named("ralf_small"), changes)


def test_an_unknown_recipe_names_the_known():
    """A typo is answered with the list."""
    with pytest.raises(RecipeError, match=r"ralf_paper.*xception"):
        named("ralf_big")


def test_json_with_a_missing_or_unknown_name_is_refused():
    """A recipe that was guessed back together is not the one that was trained."""
    text = to_json(named("xception"))

    with pytest.raises(RecipeError, match=r"schedule\.epoch is not known"):
        from_json(text.replace('"epochs"', '"epoch"'), Recipe)
    with pytest.raises(RecipeError, match="kind"):
        from_json(text.replace('"kind": "bce"', '"kind": "hinge"'), Recipe)


def test_a_run_from_before_a_field_was_there_opens_with_its_default():
    """Which means what was done before; what never had a default is asked for."""
    old = json.loads(to_json(named("ralf")))
    del old["data"]["shares"], old["optimiser"]["norms"]

    opened = from_json(json.dumps(old), Recipe)

    assert (opened.data.shares, opened.optimiser.norms) == ((), "batch")
    del old["network"]
    with pytest.raises(RecipeError, match="network is missing"):
        from_json(json.dumps(old), Recipe)


@pytest.mark.parametrize(
    ("part", "choice", "said"),
    [
        (Optimiser, {"kind": "lion"}, "kind.*'adam', 'adamw' or 'sgd'.*'lion'"),
        (RalfLoss, {"freq": "bogus"}, "freq.*'difference' or 'magnitude'.*'bogus'"),
        (Optimiser, {"accumulate": 1.5}, "accumulate.*valid integer.*1.5"),
        (Data, {"batch": "32"}, "batch.*valid integer.*'32'"),
        (Data, {"bach": 32}, "bach.*not permitted"),
    ],
)
def test_a_part_refuses_the_wrong_type_and_the_wrong_word(part, choice, said: str):
    """The error names the field, what was expected and what came."""
    with pytest.raises(ValidationError, match=f"(?s){said}"):
        part(**choice)


def test_stored_nonsense_is_refused_with_its_whole_name():
    """A loss's fields too, though the loss is looked up by its kind."""
    text = to_json(named("ralf"))

    with pytest.raises(RecipeError, match=r"loss\.freq should be .*, not 'bogus'"):
        from_json(text.replace('"freq": "difference"', '"freq": "bogus"'), Recipe)
    with pytest.raises(RecipeError, match=r"data\.batch should be a valid integer, not '32'"):
        from_json(text.replace('"batch": 32', '"batch": "32"'), Recipe)


def test_what_the_network_takes_can_be_set_whatever_the_recipe_says_of_it():
    """The ablations of the paper's Table 6 need no code."""
    asked = {"network.pool": "mean", "network.guided": "false", "network.sees": "both"}
    changed = override(named("ralf"), asked)

    assert {"pool": "mean", "guided": False, "sees": "both"}.items() <= (
        changed.network.dimensions.items()
    )
    assert changed == from_json(to_json(changed), Recipe)
    assert "network.fusion" in names(named("fdfl"))


def test_another_family_can_be_held_out_by_name():
    """Training then makes the one that was held out before, by its own share."""
    changed = override(named("ralf_small"), {"data.held_out": "swap"}).data

    assert {*BLENDS} - {"swap"} == {*changed.trained_families}
    assert "swap" == changed.unseen
    shares = dict(zip(changed.families, changed.shares, strict=True))
    assert {name: REGISTRY[name].share for name in BLENDS} == shares
    assert BLENDS == override(named("ralf"), {"held_out": "none"}).data.trained_families


def test_a_recipe_from_before_the_held_out_family_was_listed_is_the_same_recipe():
    """A run that was begun then goes on: nine families and shares, and the tenth held out."""
    old = json.loads(to_json(named("ralf_small")))
    for field in ("families", "shares"):
        old["data"][field].pop()

    assert "boundary" not in old["data"]["families"]
    assert named("ralf_small") == from_json(json.dumps(old), Recipe)


@given(
    lr=st.floats(1e-7, 1.0),
    epochs=st.integers(1, 1000),
    flip=st.floats(0, 1),
    clip=st.none() | st.floats(0.1, 10),
)
def test_what_override_is_told_is_what_the_recipe_holds(
    lr: float, epochs: int, flip: float, clip: float | None
):
    """Text and value mean the same, and JSON keeps both to the last bit."""
    changed = override(
        named("ralf"),
        {
            "optimiser.lr": repr(lr),
            "epochs": str(epochs),
            "flip": repr(flip),
            "clip": "none" if clip is None else repr(clip),
        },
    )

    assert (lr, epochs, flip, clip) == (
        changed.optimiser.lr,
        changed.schedule.epochs,
        changed.data.augment.flip,
        changed.optimiser.clip,
    )
    assert changed == from_json(to_json(changed), Recipe)


def test_differences_name_each_changed_field():
    """What a refusal to resume prints."""
    one = named("ralf")
    other = override(one, {"epochs": "7", "network.base": "16"})

    assert differences(one, other) == ["network.base: 32 → 16", "schedule.epochs: 40 → 7"]
    assert differences(one, one) == []


def test_every_name_that_is_listed_can_be_set():
    """The list an error prints holds no dead ends."""
    recipe = named("ralf")
    for name in names(recipe):
        last = name.split(".")[-1]
        value: object = recipe
        for key in name.split("."):
            value = getattr(value, key, options(recipe.network.build).get(key))
        if isinstance(value, inspect.Parameter):  # the recipe leaves it to the network
            changed = override(recipe, {name: str(value.default)})
            assert value.default == changed.network.dimensions[last], name
            continue
        if last in ("kind", "notes", "colour", "schema") or isinstance(value, tuple):
            continue
        assert recipe == override(recipe, {name: str(value)}), name


def test_a_printed_recipe_says_everything():
    """print(recipe) is the run's description."""
    text = str(named("ralf_small"))

    for field in ("lr=0.0004", "blocks=4", "held_out='boundary'", "margin=1.3", "weight_con=0.1"):
        assert field in text


def test_parts_refuse_nonsense_when_made():
    """Not only by way of override."""
    with pytest.raises(ValidationError, match="even"):
        Data(batch=3)
    with pytest.raises(ValidationError, match="set both"):
        named("ralf").replaced(data=Data(input=InputContract(size=64)))
    with pytest.raises(ValidationError, match="set both"):
        named("ralf").replaced(network=Network(build="ralf", size=64))


def test_the_papers_recipe_takes_the_authors_steps_on_their_data(tmp_path: Path):
    """FF++ as it is unpacked, with FaceShifter and three compressions: 225 batches an epoch."""
    methods = ("Deepfakes", "Face2Face", "FaceSwap", "NeuralTextures", "FaceShifter")
    rows = [
        Row(dataset="ffpp", method=method, compression=compression, split="train",
            video=f"{number:03d}", target=f"ffpp:{number:03d}", label=int(method != "real"),
            path="one.png", kind="image")
        for compression in ("raw", "c23", "c40")
        for method in ("real", *methods)
        for number in range(720)
    ]  # fmt: skip
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")

    recipe = named("ralf_paper")
    batches = Batches(Index(tmp_path, tuple(rows)), recipe.data)

    assert len(batches) == 225 and recipe.schedule.epochs * len(batches) == 22_500
    assert {"c23"} == {frames[0].row.compression for frames in batches.pool.real}
    assert {*methods} - {"FaceShifter"} == {frames[0].row.method for frames in batches.pool.forged}
