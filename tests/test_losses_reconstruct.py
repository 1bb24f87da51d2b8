"""The reconstructor's training: reals alone, rings, then the detector's mask; restored by band."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.fft import dctn

from ralf.kernels.dct import destruct_reference
from ralf.kernels.networks.bands import EDGES, levels
from ralf.train.chain import CHAINS
from ralf.train.data.batches import Batches
from ralf.train.loop.checkpoint import load
from ralf.train.loop.distributed import Compute
from ralf.train.loop.initial_weights import make_network
from ralf.train.loop.loop import Options, train
from ralf.train.loop.step import objective
from ralf.train.losses.objective import Moment
from ralf.train.losses.reconstruct import (
    MaskedObjective,
    ReconstructObjective,
    destroyed_by,
    ring_masks,
)
from ralf.train.publish.version import publish_run
from ralf.train.recipe import Data
from ralf.train.recipe_text import RecipeError
from tests.faces_on_disk import faces
from tests.test_two_stream import recipe, run_of
from tests.training import MadeBatches, tiny

pytestmark = pytest.mark.usefixtures("one_thread")
PATCH = {"loss.patch": "32"}
CPU = Compute(torch.device("cpu"))


def made(**changes: str) -> ReconstructObjective:
    chosen = recipe("reconstructor", **PATCH, **changes)
    found = objective(chosen, make_network(chosen))
    assert isinstance(found, ReconstructObjective)
    return found


def moment(progress: float, step: int = 0) -> Moment:
    return Moment(step, 0, 1, progress)


def test_a_batch_of_reals_has_no_forgery_and_is_the_same_every_time(tmp_path: Path):
    """Also where forgeries lie on disk beside them."""
    index = faces(tmp_path / "faces", forgeries="copies")
    data = Data(pairing="reals", batch=4)
    one, again = (Batches(index, data, seed=3)[5] for _ in range(2))

    assert not one.forged.any() and (one.pair == -1).all() and (one.family == -1).all()
    assert 4 == len(one) == len(set(one.ids)) and "copies" not in " ".join(one.ids)
    assert torch.equal(one.crops, again.crops)


def test_a_ring_takes_a_band_out_and_leaves_all_else():
    """From the lowest level that a mask may touch, 1.3 to 4 times as wide as it begins."""
    level = levels(32)
    narrow, wide = ring_masks(level, torch.tensor([[0.0, 0.0], [0.5, 1.0]]))
    middle = EDGES[0] * (300 / EDGES[0]) ** 0.5

    assert torch.equal(narrow == 0, (level >= 6) & (level < 6 * 1.3))
    assert torch.equal(wide == 0, (level >= middle) & (level < middle * 4))
    assert narrow[0, 0] == wide[0, 0] == 1


def test_what_is_destroyed_here_is_what_the_detector_destroys():
    """One mask for each patch, in place of one for all."""
    image, masks = torch.rand(2, 3, 32, 32), torch.rand(2, 32, 32)
    expected = [destruct_reference(one, mask) for one, mask in zip(image, masks, strict=True)]

    torch.testing.assert_close(destroyed_by(image, masks), torch.stack(expected))


def test_the_detectors_mask_takes_over_from_the_rings():
    """Half of the training, then a ramp, then that mask alone."""
    loss, place = made(), torch.Generator()
    ours = [loss.masks(64, at, place)[1].float().mean().item() for at in (0.0, 0.5, 0.65, 0.8, 1)]

    assert [0, 0, 1, 1] == [ours[0], ours[1], ours[3], ours[4]]
    assert 0.3 < ours[2] < 0.7


def test_a_bands_loss_is_the_energy_of_its_error_over_the_energy_removed():
    """A reconstructor that adds nothing leaves all that the mask removed."""
    loss, crops = made(**{"loss.patches": "1"}), MadeBatches()[0].crops
    for parameter in loss.network.reconstructor.leave.parameters():
        torch.nn.init.zeros_(parameter)
    terms = loss.terms(crops, MadeBatches()[0], moment(1.0))
    # The mask leaves half, so it removes a quarter of the energy; a hundredth counts besides.
    expected = 0.25 / (0.25 + 0.01)

    for band in ("band_1", "band_2", "band_3", "band_4"):
        assert float(terms.parts[band].detach()) == pytest.approx(expected, rel=1e-3)


def test_deviations_are_those_of_the_residuals_on_real_faces():
    """By band and colour, against SciPy; none are measured while rings alone are shown."""
    loss, batch = made(**{"loss.patches": "1"}), MadeBatches()[0]
    loss.terms(batch.crops, batch, moment(0.1))
    assert (loss.network.bands.deviation == 1).all()
    for parameter in loss.network.reconstructor.leave.parameters():
        torch.nn.init.zeros_(parameter)
    loss.terms(batch.crops, batch, moment(1.0))
    image = batch.crops.double().numpy() / 255
    removed = dctn(image, axes=(2, 3), norm="ortho") * 0.5
    level, ends = levels(32).numpy(), (*EDGES[1:], np.inf)
    for band, (low, high) in enumerate(zip(EDGES, ends, strict=True)):
        inside = (level >= low) & (level < high)
        power = (removed**2 * inside).sum((2, 3)).mean(0) / 32**2
        own = loss.network.bands.deviation[band].numpy()
        np.testing.assert_allclose(own, np.sqrt(power), rtol=1e-3)


def test_validation_reports_the_energy_restored_of_each_band():
    """Nothing added restores nothing; what the mask halved, doubled, restores everything."""
    loss, batches = made(), [MadeBatches()[100]]
    reconstructor = loss.network.reconstructor
    for parameter in reconstructor.leave.parameters():
        torch.nn.init.zeros_(parameter)
    nothing = loss.judge(None, batches, CPU)

    class Doubled(torch.nn.Module):
        def forward(self, destroyed: torch.Tensor) -> torch.Tensor:
            low = destroyed_by(destroyed, (loss.level < 6).float().expand(len(destroyed), -1, -1))
            return type("Rebuilt", (), {"image": 2 * destroyed - low})()

    loss.network.reconstructor = Doubled()
    everything = loss.judge(None, batches, CPU)

    assert nothing is not None and everything is not None
    np.testing.assert_allclose(nothing.by_mask, 0, atol=1e-5)
    np.testing.assert_allclose(everything.by_mask, 1, atol=1e-3)
    assert 4 == nothing.facts()["faces"]  # the forgeries are left out
    assert "energy restored 100%/100%/100%/100%" in everything.said


def test_only_the_reconstructor_learns_and_the_deviations_are_kept(tmp_path: Path):
    """The whole network is in the checkpoint, so the next training begins from it."""
    run = run_of(
        "reconstructor", tmp_path / "run", **PATCH, **{"loss.rings": "0", "loss.ramp": "0"}
    )
    found = load(run / "best.safetensors")
    before, after = make_network(found.recipe).state_dict(), found.part("network")
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}

    assert {"reconstructor", "bands"} == moved
    assert 0 < after["bands.deviation"].max() < 1
    network = make_network(recipe("residual_stream", **{"init.network": str(run)}))
    assert torch.equal(after["bands.deviation"], network.bands.deviation)


def test_what_cannot_be_trained_so_is_said():
    """Another network; a figure that only a detector has; a patch larger than the crop."""
    with pytest.raises(RecipeError, match="should be restored or last"):
        recipe("reconstructor", **PATCH, **{"schedule.select": "auc"})
    with pytest.raises(RecipeError, match="should be auc or bce or last"):
        recipe("two_stream", **{"schedule.select": "restored"})
    large = recipe("reconstructor")
    network = make_network(large)
    with pytest.raises(RecipeError, match=r"patch 128 should be at most network\.size 32"):
        objective(large, network)
    older = recipe("reconstructor", **PATCH, **{"network.sees": "both", "rates": "mask*0"})
    network = make_network(older)
    with pytest.raises(RecipeError, match="sees=bands"):
        objective(older, network)


# a backbone before the labels


def masked(**changes: str) -> MaskedObjective:
    chosen = tiny("masked_backbone", **{"loss.patch": "32", **changes})
    found = objective(chosen, make_network(chosen))
    assert isinstance(found, MaskedObjective)
    return found


def test_a_backbone_begins_by_restoring_nothing():
    """Its decoder is silent, so every removed band stays removed; there is no detector's mask."""
    loss, batch = masked(), MadeBatches()[0]
    judged = loss.judge(None, [MadeBatches()[100]], CPU)
    terms = loss.terms(batch.crops, batch, moment(0.9))

    assert judged is not None and "of whole bands" in judged.said
    np.testing.assert_allclose(judged.by_ring, 0, atol=1e-5)
    assert () == judged.by_mask and 4 == judged.facts()["faces"]
    assert judged.figure("restored") == pytest.approx(0, abs=1e-5)
    assert all(0 <= float(part.detach()) <= 1 for part in terms.parts.values())
    assert loss.network.training


def test_what_is_missing_reaches_every_weight_of_the_backbone_but_its_head():
    """From the last maps alone, so that no layer can be left out."""
    loss, batch = masked(), MadeBatches()[0]
    torch.nn.init.normal_(loss.decoder[0].weight, std=0.01)
    loss.terms(batch.crops, batch, moment(0.2)).total.backward()
    dry = {n for n, p in loss.network.named_parameters() if p.grad is None or not p.grad.any()}

    assert {"backbone.head.weight", "backbone.head.bias"} == dry
    assert all(p.grad is not None and p.grad.any() for p in loss.learnt())


def test_a_classifier_begins_with_the_pretrained_backbone(tmp_path: Path):
    """Its loss falls without a label; the head stays; the classifier gets each weight; as a
    detector it is not published."""
    run = tmp_path / "run"
    chosen = tiny(
        "masked_backbone", **{"loss.patch": "32", "schedule.steps": "30", "optimiser.lr": "3e-3"}
    )
    batches = Batches(faces(tmp_path / "faces"), chosen.data)
    train(chosen, batches, [batches[100]], run, data_sha256="d" * 64, options=Options(quiet=True))
    found = load(run / "best.safetensors")
    before, after = make_network(chosen).state_dict(), found.part("network")
    began = make_network(tiny("small_classifier", **{"init.backbone": str(run)})).state_dict()
    logged = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    totals = [line["total"] for line in logged if "total" in line]

    assert totals[-1] < 0.9 * totals[0]
    assert all(found.metrics["validation"][f"restored_ring_{band}"] > 0 for band in (1, 2, 3, 4))
    assert torch.equal(before["backbone.head.weight"], after["backbone.head.weight"])
    for name, tensor in after.items():
        # Counters of batches are no weights, and a file may leave them out.
        assert "num_batches" in name or torch.equal(tensor, began[name]), name
    with pytest.raises(ValueError, match="makes no detector"):
        publish_run(run, "x", tmp_path / "models")
    # It saw no generator, so a training that holds one out may begin with it.
    assert make_network(
        tiny("small_classifier", **{"init.backbone": str(run), "data.held_out": "someone"})
    )


def test_a_backbone_that_is_not_there_or_a_patch_that_does_not_fit_is_said():
    chosen = recipe("two_stream").replaced(loss=tiny("masked_backbone").loss)
    with pytest.raises(RecipeError, match=r"trains network\.backbone, and this network has none"):
        objective(chosen.replaced(loss=chosen.loss.replaced(patch=32)), make_network(chosen))
    with pytest.raises(RecipeError, match="patch 68 should be a multiple of"):
        masked(**{"loss.patch": "68", "network.size": "96", "data.input.size": "96"})


def test_a_chain_begins_with_it():
    """Then comes the chain that ships, from that backbone and not from ImageNet's."""
    chain, plain, run = CHAINS["shipped_masked"], CHAINS["shipped"], Path("runs/x")
    recipes = {each.name: chain.recipe(run, each, {}) for each in chain.trainings}

    assert ["masked", *(each.name for each in plain.trainings)] == list(recipes)
    assert ("imagenet", "runs/x/masked") == (
        recipes["masked"].init.backbone, recipes["head"].init.backbone
    )  # fmt: skip
    assert recipes["masked"].network == recipes["head"].network
    for each in plain.trainings[1:]:
        assert plain.recipe(run, each, {}) == recipes[each.name]
