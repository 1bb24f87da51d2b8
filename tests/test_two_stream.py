"""RALF on the crop and on its residual by bands: what flows, what learns, and whether it acts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.fft import dctn, idctn
from torch import Tensor, nn

from ralf.kernels import export
from ralf.kernels.networks import build
from ralf.kernels.networks.backbones import NetworkError
from ralf.kernels.networks.bands import EDGES, ResidualBands, bands, fixed_mask, levels
from ralf.kernels.networks.ralf import GATE, Ralf
from ralf.train.chain import CHAINS, Chain, Training
from ralf.train.evaluate.judge import model_of_run
from ralf.train.evaluate.tables import table
from ralf.train.evaluate.tables.residual import ResidualFigures, residual_figures
from ralf.train.evaluate.tables.table import TableOptions
from ralf.train.loop.checkpoint import load
from ralf.train.loop.distributed import Compute
from ralf.train.loop.initial_weights import make_network
from ralf.train.loop.loop import Options, train
from ralf.train.loop.step import objective
from ralf.train.losses.objective import Moment
from ralf.train.publish.version import publish_run, without_residual
from ralf.train.recipe import Recipe
from ralf.train.recipe_text import RecipeError
from ralf.train.retrain import judging
from ralf.train.retrain.order import Retraining
from ralf.train.trainings import ChainRun
from tests.faces_on_disk import faces
from tests.training import MadeBatches, tiny

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL: dict[str, Any] = {
    "base": 4, "blocks": 1, "backbone": "tf_efficientnet_lite0", "size": 64, "sees": "bands",
    "keeps": 6.0,
}  # fmt: skip
NAN = float("nan")
FREE = {"loss.weight_adv": "0", "init.perceptual": "none"}
NARROW = {"network.base": "4", "network.blocks": "1"}


def small(**changes: Any) -> Ralf:
    network = build("ralf", **{**SMALL, **changes})
    assert isinstance(network, Ralf)
    return network.eval()


def crops(count: int, size: int = 64) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)


def recipe(name: str, **changes: str) -> Recipe:
    narrow = {} if name == "small_classifier" else NARROW
    return tiny(name, **{**narrow, "schedule.steps": "2", **changes})


def run_of(name: str, folder: Path, **changes: str) -> Path:
    """A short run."""
    chosen = recipe(name, **changes)
    train(
        chosen, MadeBatches(), [MadeBatches()[100]], folder, data_sha256="d" * 64,
        options=Options(quiet=True),
    )  # fmt: skip
    return folder


# bands


def test_a_level_means_the_same_detail_at_every_size():
    """The sum of both indices at 256 px; half the side, twice the step."""
    assert 510 == levels(256).max()
    assert torch.equal(levels(256)[::2, ::2], levels(128))


def test_bands_are_scipys_and_add_up_to_the_residual_without_light_and_colour():
    """Each coefficient above the lowest levels belongs to one band."""
    residual = torch.randn(2, 3, 32, 32)
    parts = ResidualBands(32).split(residual)
    spectrum = dctn(residual.double().numpy(), axes=(2, 3), norm="ortho")
    members = bands(32).numpy()
    expected = [idctn(spectrum * each, axes=(2, 3), norm="ortho") for each in members]

    np.testing.assert_allclose(parts.numpy(), np.stack(expected, 1), atol=1e-5)
    assert np.array_equal(members.sum(0), (levels(32) >= EDGES[0]).numpy())
    assert abs(float(parts.sum(1).mean())) < 1e-6


def test_each_band_and_colour_is_divided_by_its_own_deviation():
    """So a band whose residuals are a hundred times smaller counts as much."""
    split = ResidualBands(32)
    residual = torch.randn(1, 3, 32, 32) * torch.tensor([1.0, 0.1, 0.01])[:, None, None]
    own = split.split(residual)
    split.deviation.copy_(own.square().mean((0, 3, 4)).sqrt())

    torch.testing.assert_close(split(residual).square().mean((2, 3)), torch.ones(1, 12))


def test_the_fixed_mask_keeps_the_lowest_levels_and_a_share_of_the_rest():
    mask = fixed_mask(64, 6.0, 0.25).sigmoid()
    below = levels(64) < 6

    assert mask[below].min() > 0.99 and below.sum() == 3
    torch.testing.assert_close(mask[~below], torch.full_like(mask[~below], 0.25))


# the network


def test_it_begins_near_its_classifier_and_closed_it_is_that_classifier():
    """The gates begin at 0.1; closing them leaves the plain network to the bit."""
    network, faces = small(), crops(2)
    alone = build("classifier", backbone="tf_efficientnet_lite0", size=64).eval()
    alone.backbone.load_state_dict(network.classifier.state_dict())

    assert torch.equal(network.gate, torch.full_like(network.gate, GATE))
    assert torch.equal(alone(faces), network.ablated(faces, "closed"))
    assert not torch.equal(alone(faces), network(faces))


def test_every_part_has_a_gradient_from_the_first_step():
    """The older way, with gates at 0, gives the residual's stem and the guide exactly none."""

    def dry(network: Ralf) -> set[str]:
        network.train()(crops(4)).sum().backward()
        return {n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()}

    mute = dry(small(sees="both", keeps=0.0))
    own_head = {"residual_head.weight", "residual_head.bias"}

    assert "classifier.stem.conv_stem.weight" in mute and "attention.conv.weight" in mute
    assert own_head == dry(small())
    network = small().train()
    network.streams(crops(4)).residual.sum().backward()
    assert network.residual_head.weight.grad.abs().max() > 0


def test_a_dropped_crop_leaves_the_residual_alone_to_decide():
    """And its stem without a gradient."""
    network = small().train()
    network.streams(crops(4), plain=False).logit.sum().backward()

    assert network.classifier.stem.conv_stem.weight.grad is None
    assert network.residual.conv_stem.weight.grad.abs().max() > 0


@pytest.mark.parametrize("how", ["closed", "alone", "shuffled", "identity"])
def test_each_part_that_is_closed_changes_the_logit(how: str):
    network, faces = small(), crops(4)
    nn.init.normal_(network.reconstructor.leave.weight, std=0.2)

    assert not torch.allclose(network(faces), network.ablated(faces, how), atol=1e-6)


def test_a_residual_without_a_crop_beside_it_cannot_be_closed():
    with pytest.raises(NetworkError, match="no second stream"):
        small(sees="residual").ablated(crops(1), "closed")
    with pytest.raises(NetworkError, match="no head for the residual"):
        small(sees="both").streams(crops(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lowered_it_agrees_with_fp32_and_the_bands_stay_exact(dtype: torch.dtype):
    network, faces = small(), crops(2)
    expected = network(faces)
    lowered = network.lower(dtype).to(memory_format=torch.channels_last)

    assert torch.float32 == lowered(faces).dtype == lowered.bands.deviation.dtype
    assert (lowered(faces) - expected).abs().max() < 0.05 * max(1, expected.abs().max())


@pytest.mark.parametrize("dtype", [torch.float16])
def test_its_onnx_graph_gives_its_logits(dtype: torch.dtype, tmp_path: Path):
    """As the builder exports it, also with weights in FP16; ONNX Runtime runs it."""
    pytest.importorskip("onnxruntime")
    network, faces = small(size=32), crops(3, 32)
    expected = network(faces).detach().numpy()
    lowered = network.lower(dtype) if dtype is torch.float16 else network
    precision = "fp16" if dtype is torch.float16 else "fp32"
    export.write_onnx(lowered, tmp_path / "n.onnx", most=4, precision=precision)
    got = export.logits(export.session(tmp_path / "n.onnx"), faces.numpy())

    np.testing.assert_allclose(expected, got, atol=1e-3 if dtype is torch.float32 else 0.05)


# training


def test_the_residual_keeps_what_it_learnt_when_a_better_classifier_is_filled_in(tmp_path: Path):
    """A warm start fills the plain branch alone: each stem reads something else."""
    first = run_of("residual_stream", tmp_path / "residual")
    better = run_of("small_classifier", tmp_path / "classifier", seed="3")
    began = {"init.network": str(first), "init.backbone": str(better)}
    network = make_network(recipe("two_stream", **began))
    before, plain = model_of_run(first).network, model_of_run(better).network

    for part in ("residual", "guide", "attention", "residual_head", "reconstructor"):
        for name, tensor in before.get_submodule(part).state_dict().items():
            assert torch.equal(tensor, network.get_submodule(part).state_dict()[name]), name
    assert torch.equal(plain.backbone.head.weight, network.classifier.head.weight)
    assert torch.equal(plain.backbone.stem[0].weight, network.classifier.stem[0].weight)


def test_the_older_network_keeps_its_residuals_stem_too(tmp_path: Path):
    """sees=both: there the classifier's own stem reads the residual."""
    first = run_of("ralf_small_cpu", tmp_path / "both", **FREE)
    better = run_of("small_classifier", tmp_path / "classifier", seed="3")
    began = {"init.network": str(first), "init.backbone": str(better)}
    network = make_network(recipe("ralf_small_cpu", **FREE, **began))
    before, plain = model_of_run(first).network, model_of_run(better).network

    assert torch.equal(before.classifier.stem[0].weight, network.classifier.stem[0].weight)
    assert torch.equal(before.guide[0].weight, network.guide[0].weight)
    assert torch.equal(plain.backbone.stem[0].weight, network.plain[0].weight)


def test_frozen_parts_stay_and_gates_move_twenty_times_as_fast(tmp_path: Path):
    """Reconstructor and mask to the bit; a gate's first step of Adam is its rate."""
    chosen = recipe("two_stream", **{"schedule.steps": "1", "optimiser.ema": "none"})
    before = make_network(chosen).state_dict()
    run_of("two_stream", tmp_path / "run", **{"schedule.steps": "1", "optimiser.ema": "none"})
    after = load(tmp_path / "run" / "last.safetensors").part("network")
    moved = (after["gate"] - before["gate"]).abs().max().item()
    plain = (after["classifier.head.bias"] - before["classifier.head.bias"]).abs().item()

    for name, tensor in before.items():
        if name == "mask" or name.startswith("reconstructor."):
            assert torch.equal(tensor, after[name]), name
    assert moved == pytest.approx(20 * plain, rel=0.01)


def test_the_residual_has_a_loss_of_its_own_and_the_crop_is_dropped_as_asked():
    """0.3 of the batches; the draw is from torch's generator, which a checkpoint keeps."""
    chosen = recipe("two_stream")
    network = make_network(chosen).train()
    loss, batch = objective(chosen, network), MadeBatches()[0]
    asked: list[bool] = []
    network.streams = lambda crops, *, plain: asked.append(plain)  # type: ignore[method-assign]
    for _ in range(400):
        loss.run(batch.crops)
    del network.streams
    terms = loss.terms(loss.run(batch.crops), batch, Moment(0, 0, 1, 0.0))

    assert 0.25 < 1 - np.mean(asked) < 0.35
    torch.testing.assert_close(terms.total, terms.parts["bce"] + terms.parts["bce_residual"])


def test_a_free_mask_pays_for_what_it_keeps_beyond_its_budget():
    """Nothing else in the loss rewards taking frequencies away."""
    more = {"loss.weight_budget": "2", "loss.budget": "0.4", "optimiser.rates": "mask*30"}
    chosen = recipe("two_stream", **more)
    network = make_network(chosen).train()
    loss, batch = objective(chosen, network), MadeBatches()[0]
    terms = loss.terms(loss.run(batch.crops), batch, Moment(0, 0, 1, 0.0))
    parts = {name: float(part.detach()) for name, part in terms.parts.items()}
    terms.parts["kept"].backward(retain_graph=True)

    assert parts["kept"] == pytest.approx(0.5, abs=0.01)
    assert (network.mask.grad[levels(32) >= 6] > 0).all()
    rest = float(terms.total.detach()) - parts["bce"] - parts["bce_residual"]
    assert rest == pytest.approx(2 * (parts["kept"] - 0.4), abs=1e-4)


def test_the_residual_alone_is_what_its_own_training_is_judged_by(tmp_path: Path):
    """Not the sum of both, in which it has no part yet."""
    chosen = recipe("residual_stream")
    network = make_network(chosen).eval()
    nn.init.constant_(network.residual_head.weight, 0)
    nn.init.constant_(network.residual_head.bias, 0.5)
    judged = objective(chosen, network).judge(
        None, [MadeBatches()[100]], Compute(torch.device("cpu"))
    )

    assert judged is not None and judged.facts()["auc"] == 0.5


def test_two_streams_need_a_network_that_has_them():
    chosen = recipe("small_classifier")
    loss = recipe("two_stream").loss
    with pytest.raises(RecipeError, match="sees=bands"):
        objective(chosen.replaced(loss=loss), make_network(chosen))


# is it at work?


@pytest.mark.parametrize("sees", ["bands", "both"])
def test_the_classifier_inside_is_published_with_the_logits_of_the_closed_network(
    sees: str, tmp_path: Path
):
    """The weights are converted; the recipe's notes, and so the card, say why."""
    recipe = "two_stream" if sees == "bands" else "ralf_small_cpu"
    run = run_of(recipe, tmp_path / "run", **(FREE if sees == "both" else {}))
    closed = without_residual(run, tmp_path / "closed", "Closing it costs nothing.")
    inside = model_of_run(closed)
    whole, pictures = model_of_run(run).network, crops(3, 32)
    artifact = publish_run(closed, "small-classifier", tmp_path / "models")

    with torch.inference_mode():
        expected = whole.ablated(pictures, "closed")
    torch.testing.assert_close(expected, inside.score(pictures))
    assert "classifier" == artifact.manifest.network.build
    assert "Closing it costs nothing." in artifact.read("card.md").decode()
    with pytest.raises(ValueError, match="holds a plain classifier"):
        without_residual(closed, tmp_path / "again", "")


def test_the_table_tells_what_each_part_costs_by_person(tmp_path: Path):
    """A residual that decides alone costs its AUC when it is closed; a dead one costs nothing."""
    index = faces(tmp_path / "faces", val=8)
    run = run_of("two_stream", tmp_path / "run")
    model = model_of_run(run)
    options = TableOptions(split="val", families=("inner", "boundary"), replicates=50)
    figures = residual_figures(model, index, options).views
    made = table("residual", [model], index, options)
    nn.init.zeros_(model.network.gate)
    dead = residual_figures(model, index, options)

    assert ["whole", "closed", "alone", "shuffled", "identity"] == list(figures)
    assert 5 == len(made.rows)
    cost = figures["whole"]["held out"] - figures["closed"]["held out"]
    assert figures["closed"]["costs held out"][0] == pytest.approx(cost)
    assert [0, 0, 0] == dead.views["closed"]["costs held out"] and not dead.earned


@pytest.mark.parametrize("cost", [(0.03, 0.01, 0.05), (0.03, -0.01, 0.07), (NAN, NAN, NAN)])
def test_a_residual_that_is_not_at_work_publishes_the_classifier_under_its_own_name(
    cost: tuple[float, float, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The interval decides; the two are never called by one another's names."""
    steps = {"classifier": recipe("small_classifier"), "detector": recipe("two_stream")}
    chain = Chain(
        "tiny",
        tuple((Training(name, each.name),) for name, each in steps.items()),
        control="classifier",
    )
    for name, each in steps.items():
        run_of(each.name, tmp_path / name)
    index = faces(tmp_path / "faces", val=8)
    training = ChainRun(chain, (), index, tmp_path, device="cpu")
    asked: list[str] = []

    def measured(model: Any, index: Any, options: Any, control: Any) -> ResidualFigures:
        asked.extend((model.name, options.split, control.name))
        return ResidualFigures({"closed": {"costs held out": list(cost)}})

    monkeypatch.setattr(judging, "residual_figures", measured)
    step = judging.residual_step(
        Retraining(training, "ralf-mine", Path("models"), say=lambda text: None)
    )
    assert step is not None
    facts = step.work({})
    inside = load(Path(facts["folder"]) / "best.safetensors").recipe.network.build

    assert ["detector", "val", "classifier"] == asked
    assert step.still_there(facts) and json.loads(json.dumps(facts, allow_nan=False)) == facts
    if cost[1] > 0:
        assert (True, "ralf-mine", "ralf") == (facts["earned"], facts["name"], inside)
    else:
        assert (False, "small-classifier", "classifier") == (facts["earned"], facts["name"], inside)
    plain = Chain("plain", ((Training("train", "small_classifier"),),))
    other = ChainRun(plain, (), index, tmp_path)
    assert judging.residual_step(Retraining(other, "x", Path("models"))) is None


def test_the_chain_trains_the_residual_before_the_crop_and_a_control_beside_it():
    """Each training begins with the one before; the classifier fills the plain branch."""
    chain, run = CHAINS["ralf_two_streams"], Path("runs/x")
    recipes = {each.name: chain.recipe(run, each, {}) for each in chain.trainings}
    names = [[each.name for each in stage] for stage in chain.stages]

    assert [
        ["reconstructor", "classifier"],
        ["residual"],
        ["joint", "control"],
        ["detector"],
    ] == names
    assert "runs/x/reconstructor" == recipes["residual"].init.network
    assert (
        "runs/x/classifier" == recipes["residual"].init.backbone == recipes["control"].init.network
    )
    assert "runs/x/residual" == recipes["joint"].init.network
    assert "runs/x/joint" == recipes["detector"].init.network
    assert "mask*30" in recipes["detector"].optimiser.rates
    assert recipes["detector"].loss.weight_budget > 0
    for name in ("residual", "joint"):
        assert {"reconstructor*0", "mask*0"} <= {*recipes[name].optimiser.rates}
    assert recipes["reconstructor"].network == recipes["joint"].network
    assert not recipes["reconstructor"].data.trained_families


def test_a_run_that_makes_no_detector_is_not_published(tmp_path: Path):
    """The reconstructor's heads are random."""
    run = run_of("reconstructor", tmp_path / "run", **{"loss.patch": "32"})
    with pytest.raises(ValueError, match="makes no detector"):
        publish_run(run, "x", tmp_path / "models")
