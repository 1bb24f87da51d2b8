"""The reconstructor's training: reals alone, rings, then the detector's mask; restored by band."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.fft import dctn

from ralf.kernels.dct import destruct_reference
from ralf.kernels.networks.bands import EDGES, levels
from ralf.train.data.batches import Batches
from ralf.train.loop.checkpoint import load
from ralf.train.loop.distributed import Compute
from ralf.train.loop.initial_weights import make_network
from ralf.train.loop.step import objective
from ralf.train.losses.objective import Moment
from ralf.train.losses.reconstruct import (
    ReconstructObjective,
    destroyed_by,
    ring_masks,
)
from ralf.train.recipe import Data
from ralf.train.recipe_text import RecipeError
from tests.faces_on_disk import faces
from tests.test_two_stream import recipe, run_of
from tests.training import MadeBatches

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
    ours = [loss._masks(64, at, place)[1].float().mean().item() for at in (0.0, 0.5, 0.65, 0.8, 1)]

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
