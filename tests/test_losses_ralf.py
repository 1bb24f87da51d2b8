"""RALF's loss: each equation against a figure worked out by hand, and where its gradient goes."""

import math

import numpy as np
import pytest
import scipy.fft
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from ralf.kernels.dct import dct2
from ralf.kernels.networks import build
from ralf.train.loop.step import objective
from ralf.train.losses.objective import Moment, cross_entropy
from ralf.train.losses.perceptual import CONVS, ENDS, perceptual
from ralf.train.losses.ralf import (
    PERCEPTUAL_WEIGHTS,
    Discriminator,
    EmbeddingCentre,
    RalfLoss,
    RalfObjective,
    adversarial_loss,
    alpha,
    band_weights,
    contrastive_loss,
    discriminator_loss,
    embedding_loss,
    frequency_loss,
    pixel_loss,
    unnormalised,
)
from ralf.train.recipe_text import RecipeError
from tests.training import MadeBatches, StubRalf, tiny

MOMENT = Moment(step=5, epoch=1, epochs=4, progress=0.25)
FORGED = torch.tensor([False, False, True, True])


# Equation 2


def test_the_embedding_loss_is_two_hinges_about_the_centre():
    """Reals 0.45 and 0 outside their ball, forgeries 0.5 and 0 inside theirs: 0.225 + 0.25."""
    embedding = torch.tensor([[0.5, 0.0], [0.03, 0.04], [0.6, 0.8], [3.0, 4.0]])

    loss = embedding_loss(embedding, FORGED, torch.zeros(2), 0.05, 1.5)

    assert loss.item() == pytest.approx(0.45 / 2 + 0.5 / 2)


def test_the_embedding_loss_measures_from_the_centre():
    """Moving all by the same vector changes nothing."""
    embedding, shift = torch.randn(4, 8), torch.randn(8)

    here = embedding_loss(embedding, FORGED, torch.zeros(8), 0.05, 1.5)
    there = embedding_loss(embedding + shift, FORGED, shift, 0.05, 1.5)

    torch.testing.assert_close(here, there)


def test_a_face_on_the_centre_has_a_finite_gradient():
    """The norm's slope at zero is not NaN."""
    embedding = torch.zeros(4, 3, requires_grad=True)

    embedding_loss(embedding, FORGED, torch.zeros(3), 0.05, 1.5).backward()

    assert embedding.grad is not None and torch.isfinite(embedding.grad).all()


@pytest.mark.parametrize("forged", [torch.zeros(4).bool(), torch.ones(4).bool()])
def test_a_batch_of_one_class_gives_zero_and_not_nan(forged: Tensor):
    """The absent class adds nothing, and no gradient."""
    image = torch.rand(4, 3, 8, 8, requires_grad=True)
    moved = torch.rand(5, 4, requires_grad=True)
    embedding = torch.rand(4, 2)

    losses = [
        embedding_loss(embedding, forged, torch.zeros(2), 0.05, 1.5),
        pixel_loss(image, torch.zeros_like(image), forged),
        contrastive_loss(moved, forged, torch.full((4,), -1), 1e-3, by_pairs=False),
    ]

    assert all(torch.isfinite(loss) for loss in losses)
    assert losses[2].item() == 0
    if forged.all():
        assert losses[1].item() == 0


# Equation 3


def embeddings(*values: float) -> Tensor:
    """One-dimensional embeddings."""
    return torch.tensor(values)[:, None]


def test_the_centre_of_an_epoch_is_the_mean_of_its_reals():
    """Unequal batches weigh by their faces; forgeries do not count; before its end it stands."""
    centre = EmbeddingCentre(1, RalfLoss(centre="epoch"))

    centre.see(embeddings(1, 3, 100, 100), FORGED)
    centre.see(embeddings(8, 100), torch.tensor([False, True]))
    before = centre.position.clone()
    centre.epoch_ended()

    assert before.item() == 0
    assert centre.position.item() == pytest.approx((1 + 3 + 8) / 3)
    centre.see(embeddings(7), torch.tensor([False]))
    centre.epoch_ended()
    assert centre.position.item() == 7  # the next epoch starts anew


def test_the_uploads_centre_is_the_sum_of_both_class_means():
    """Their bug, by its flag: all faces over the number of reals."""
    centre = EmbeddingCentre(1, RalfLoss(centre="epoch", centre_sums_forged=True))

    centre.see(embeddings(1, 3, 10, 20), FORGED)
    centre.epoch_ended()

    assert centre.position.item() == pytest.approx(2 + 15)


def test_a_moving_centre_starts_at_its_first_batch_and_follows():
    """Its own weight is counted, so there is no pull towards zero."""
    centre = EmbeddingCentre(1, RalfLoss(centre="step", centre_momentum=0.5))

    centre.see(embeddings(2, 4, 50, 50), FORGED)
    first = centre.position.item()
    centre.see(embeddings(9, 9, 50, 50), FORGED)

    assert first == pytest.approx(3)
    assert centre.position.item() == pytest.approx((0.25 * 3 + 0.5 * 9) / 0.75)


@pytest.mark.parametrize("how", ["epoch", "step"])
def test_the_centre_keeps_no_graph(how: str):
    """Kept sums would hold every step's graph alive; the upload's flag brings that back."""
    embedding = torch.rand(4, 2, requires_grad=True)
    centre = EmbeddingCentre(2, RalfLoss(centre=how))
    centre.see(embedding, FORGED)

    assert not centre.total.requires_grad
    assert not centre.position.requires_grad
    leaking = EmbeddingCentre(2, RalfLoss(centre="epoch", centre_keeps_graph=True))
    leaking.see(embedding, FORGED)
    assert leaking.total.requires_grad
    leaking.epoch_ended()
    assert not leaking.position.requires_grad


# Equation 4


def test_the_pixel_loss_looks_at_reals_alone():
    """Reals off by 0.1 and 0.3 make 0.2, whatever the forgeries do."""
    image = torch.zeros(4, 3, 2, 2)
    rebuilt = torch.tensor([0.1, 0.3, 9.0, 9.0])[:, None, None, None].expand(4, 3, 2, 2)

    assert pixel_loss(rebuilt, image, FORGED).item() == pytest.approx(0.2)


# Equation 5


def test_w_has_the_cells_of_the_authors_table():
    """1, 35, 8,220, 38,944 and 18,336 cells at 256."""
    weights, counts = np.unique(band_weights(256).numpy(), return_counts=True)

    assert weights.tolist() == [1e-4, 1e-2, 1.0, 10.0, 100.0]
    assert counts.tolist() == [1, 35, 8220, 38944, 18336]
    assert band_weights(256)[3, 4] == 1e-2
    assert band_weights(256)[4, 4] == 1.0


@pytest.mark.parametrize("size", [8, 32, 255, 256])
def test_the_factors_make_the_orthonormal_dct_the_unnormalised_one(size: int):
    """scipy.fft.dctn with norm=None is torch_dct's scale."""
    image = np.random.default_rng(0).random((size, size))

    ours = dct2(torch.from_numpy(image)).numpy() * unnormalised(size).numpy()

    np.testing.assert_allclose(ours, scipy.fft.dctn(image, type=2, norm=None), rtol=1e-9, atol=1e-8)


def test_the_factors_at_256_are_512_724_and_1024():
    """What an ortho loss would be short of."""
    factors = unnormalised(256)

    assert factors[1, 1].item() == pytest.approx(512)
    assert factors[0, 1].item() == factors[1, 0].item() == pytest.approx(512 * math.sqrt(2))
    assert factors[0, 0].item() == pytest.approx(1024)


@pytest.mark.parametrize("magnitudes", [False, True])
def test_the_frequency_loss_is_scipys_on_the_unnormalised_scale(magnitudes: bool):
    """Both forms, reals only, mean over channels and cells."""
    rng = np.random.default_rng(1)
    image, rebuilt = rng.random((2, 4, 3, 16, 16))
    weights = band_weights(16) * unnormalised(16)

    ours = frequency_loss(
        torch.from_numpy(rebuilt), torch.from_numpy(image), FORGED, weights.float(), magnitudes
    )

    before, after = (scipy.fft.dctn(x[:2], axes=(2, 3)) for x in (image, rebuilt))
    difference = np.abs(after) - np.abs(before) if magnitudes else after - before
    expected = np.abs(band_weights(16).numpy() * difference).mean()
    assert ours.item() == pytest.approx(expected, rel=1e-5)


def test_magnitudes_forget_the_sign_and_differences_do_not():
    """The paper and its code part here: a flipped spectrum is free in the code."""
    image = torch.rand(4, 3, 16, 16)
    weights = torch.ones(16, 16)

    assert frequency_loss(-image, image, FORGED, weights, True).item() == pytest.approx(0, abs=1e-6)
    assert frequency_loss(-image, image, FORGED, weights, False).item() > 0.05


def test_the_frequency_loss_stays_fp32_under_autocast():
    """bf16 would lose what high frequencies differ by."""
    image, rebuilt = torch.rand(2, 4, 3, 16, 16)
    weights = (band_weights(16) * unnormalised(16)).float()
    plain = frequency_loss(rebuilt, image, FORGED, weights, False)

    with torch.autocast("cpu", torch.bfloat16):
        cast = frequency_loss(rebuilt, image, FORGED, weights, False)

    assert cast.dtype == torch.float32
    assert cast.item() == plain.item()


# Equation 6


def test_the_contrastive_loss_holds_each_forgery_against_its_own_real():
    """Ratios 2/4 and 6/3, crossed pairs, times all layers' weights."""
    moved = torch.tensor([6.0, 2.0, 4.0, 3.0]).expand(5, 4)
    pair = torch.tensor([-1, -1, 1, 0])

    loss = contrastive_loss(moved, FORGED, pair, 0.0, by_pairs=True)

    assert loss.item() == pytest.approx(sum(PERCEPTUAL_WEIGHTS) * (2 / 4 + 6 / 3) / 2)


def test_each_layer_has_its_weight():
    """1/32, 1/16, 1/8, 1/4, 1, and eps below the line."""
    moved = torch.ones(5, 4)
    moved[:, :2] = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])[:, None]

    loss = contrastive_loss(moved, FORGED, torch.tensor([-1, -1, 0, 1]), 1.0, by_pairs=True)

    assert loss.item() == pytest.approx((1 / 32 + 2 / 16 + 3 / 8 + 4 / 4 + 5) / 2)


@pytest.mark.parametrize("by_pairs", [True, False])
def test_without_pairs_the_batchs_means_are_compared(by_pairs: bool):
    """The published form: (6 + 2)/2 over (4 + 3)/2."""
    moved = torch.tensor([6.0, 2.0, 4.0, 3.0]).expand(5, 4)
    none = torch.full((4,), -1)

    loss = contrastive_loss(moved, FORGED, none, 0.0, by_pairs=by_pairs)

    assert loss.item() == pytest.approx(sum(PERCEPTUAL_WEIGHTS) * 4 / 3.5)


def test_a_forgery_rebuilt_perfectly_does_not_divide_by_zero():
    """The upload's ratio has no eps."""
    moved = torch.tensor([1.0, 1.0, 0.0, 0.0]).expand(5, 4)

    loss = contrastive_loss(moved, FORGED, torch.tensor([-1, -1, 0, 1]), 1e-3, by_pairs=True)

    assert torch.isfinite(loss)


@settings(max_examples=30, deadline=None)
@given(real=st.floats(0.01, 10), forged=st.floats(0.01, 10), more=st.floats(1.01, 3))
def test_rebuilding_forgeries_worse_never_raises_the_contrastive_loss(
    real: float, forged: float, more: float
):
    """Monotone: down in the forged distance, up in the real one."""
    pair = torch.tensor([-1, -1, 0, 1])

    def at(r: float, f: float) -> float:
        moved = torch.tensor([r, r, f, f]).expand(5, 4)
        return contrastive_loss(moved, FORGED, pair, 1e-3, by_pairs=True).item()

    assert at(real, forged * more) < at(real, forged) < at(real * more, forged)


def test_perceptual_features_are_vggs_own_slices(tmp_path):
    """Against torchvision's VGG19 with the same weights, cut where the authors cut it."""
    from torchvision.models import vgg19

    torch.manual_seed(3)
    features = vgg19(weights=None).features.eval()
    kept = {
        f"features.{k}": v for k, v in features.state_dict().items() if int(k.split(".")[0]) < 14
    }
    save_file(kept, tmp_path / "vgg.safetensors")
    image = torch.rand(2, 3, 32, 32)

    ours = perceptual("vgg19", str(tmp_path / "vgg.safetensors"))(image)

    for layer in features:
        if isinstance(layer, nn.ReLU):
            layer.inplace = False  # else slice 3 would be changed after it was taken
    for end, feature in zip(ENDS, ours, strict=True):
        torch.testing.assert_close(feature, features[:end](image))


def test_perceptual_weights_that_do_not_fit_are_refused(tmp_path):
    """Missing file, missing layer, other shape: each with its reason."""
    with pytest.raises(RecipeError, match="no perceptual weights at"):
        perceptual("vgg16", str(tmp_path / "none.safetensors"))
    save_file({"0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "few.safetensors")
    with pytest.raises(RecipeError, match=r"lack 0\.bias"):
        perceptual("vgg16", str(tmp_path / "few.safetensors"))
    wrong = {f"{n}.weight": torch.zeros(8, 8, 3, 3) for n in CONVS}
    save_file(wrong | {f"{n}.bias": torch.zeros(8) for n in CONVS}, tmp_path / "odd.safetensors")
    with pytest.raises(RecipeError, match="should be"):
        perceptual("vgg16", str(tmp_path / "odd.safetensors"))


def test_the_hub_is_asked_for_the_named_network(monkeypatch: pytest.MonkeyPatch):
    """`imagenet` is torchvision's own weights; offline it says what else to do."""
    from torchvision import models

    asked: list[tuple[str, str]] = []

    def from_hub(name: str, weights: str) -> nn.Module:
        asked.append((name, weights))
        network = nn.Module()
        network.features = models.vgg.make_layers(models.vgg.cfgs["E"])
        return network

    monkeypatch.setattr(models, "get_model", from_hub)
    perceptual("vgg19", "imagenet")
    assert asked == [("vgg19", "IMAGENET1K_V1")]

    def offline(name: str, weights: str) -> nn.Module:
        raise OSError("no route")

    monkeypatch.setattr(models, "get_model", offline)
    with pytest.raises(RecipeError, match=r"init\.perceptual=FILE"):
        perceptual("vgg19", "imagenet")


# Equations 7, 8, 10


def test_the_discriminators_losses_are_log_likelihoods():
    """Of D(real) = 0.8 and D(rebuilt) = 0.25."""
    logit = torch.logit(torch.tensor([0.8, 0.25]))

    disc = discriminator_loss(logit[:1], logit[1:])

    assert disc.item() == pytest.approx(-math.log(0.8) - math.log(0.75))
    assert adversarial_loss(logit[1:]).item() == pytest.approx(-math.log(0.25))


def test_the_discriminator_is_dcgans():
    """8-16-32-64-128-256 at 256², and one logit a face at any size."""
    widths = [
        layer.out_channels for layer in Discriminator(256).body if hasattr(layer, "out_channels")
    ]

    assert widths == [8, 16, 32, 64, 128, 256, 1]
    for size in (32, 64, 96, 256):
        assert Discriminator(size)(torch.rand(2, 3, size, size)).shape == (2,)


def test_the_discriminator_begins_as_the_authors_one_does():
    """Convolutions at N(0, 0.02), norms at N(1, 0.02), in every recipe."""
    layers = list(Discriminator(256).modules())
    taps = torch.cat([x.weight.flatten() for x in layers if isinstance(x, torch.nn.Conv2d)])
    norms = torch.cat([x.weight for x in layers if isinstance(x, torch.nn.BatchNorm2d)])

    assert abs(taps.mean().item()) < 1e-3 and taps.std().item() == pytest.approx(0.02, rel=0.02)
    assert norms.mean().item() == pytest.approx(1, abs=0.005)
    assert norms.std().item() == pytest.approx(0.02, rel=0.2)


def test_cross_entropy_calls_forged_one():
    """The label's side is the commonest slip of all."""
    sure = torch.tensor([-9.0, -9.0, 9.0, 9.0])

    assert cross_entropy(sure, FORGED).item() < 0.001
    assert cross_entropy(-sure, FORGED).item() == pytest.approx(9, abs=0.01)
    assert cross_entropy(torch.zeros(4), FORGED).item() == pytest.approx(math.log(2))
    smoothed = cross_entropy(torch.zeros(1), torch.tensor([True]), 0.2)
    assert smoothed.item() == pytest.approx(math.log(2))


# Equations 11 and 12


def test_alpha_grows_as_asked():
    """By whole epochs as published, by steps as ours, or not at all."""
    assert [alpha(how, MOMENT) for how in ("epoch", "step", "one")] == [0.25, 0.25, 1.0]
    assert alpha("epoch", Moment(9, 0, 4, 0.2)) == 0


@pytest.fixture
def ralf() -> RalfObjective:
    """The loss on the stub network."""
    made = objective(tiny("ralf"), StubRalf())
    assert isinstance(made, RalfObjective)
    return made


def test_the_total_is_the_weighted_sum(ralf: RalfObjective):
    """L_C + .1 (L_1 + L_freq + .1 L_adv) + α .1 L_emb + .1 L_con."""
    batch = MadeBatches()[0]

    terms = ralf.terms(ralf.run(batch.crops), batch, MOMENT)

    part = {name: value.item() for name, value in terms.parts.items()}
    assert {"bce", "l1", "freq", "adv", "emb", "con"} == part.keys()
    assert terms.total.item() == pytest.approx(
        part["bce"]
        + 0.1 * (part["l1"] + part["freq"] + 0.1 * part["adv"])
        + 0.25 * 0.1 * part["emb"]
        + 0.1 * part["con"],
        rel=1e-5,
    )


def test_a_patch_is_the_same_square_of_both_and_moves_with_the_step():
    """Full resolution, a part of the cost; a resumed run draws the same."""
    made = objective(tiny("ralf", con_patch="16"), StubRalf())
    image = torch.rand(2, 3, 32, 32)

    one, other = made._patch(3, image, image + 1)

    assert one.shape == (2, 3, 16, 16)
    torch.testing.assert_close(one + 1, other)
    assert torch.equal(one, made._patch(3, image)[0])
    assert len({made._patch(step, image)[0].sum().item() for step in range(9)}) > 5
    whole = objective(tiny("ralf"), StubRalf())
    assert whole._patch(3, image)[0] is image


REACH = {
    "bce": {"mask", "encoder", "decoder", "classifier"},
    "l1": {"mask", "encoder", "decoder"},
    "freq": {"mask", "encoder", "decoder"},
    "adv": {"mask", "encoder", "decoder"},
    "con": {"mask", "encoder", "decoder"},
    "emb": {"mask", "encoder"},
}


@pytest.mark.parametrize("term", REACH)
def test_a_terms_gradient_reaches_its_parts_and_no_others(ralf: RalfObjective, term: str):
    """Also not the discriminator, nor the extractor."""
    batch = MadeBatches()[0]

    ralf.terms(ralf.run(batch.crops), batch, MOMENT).parts[term].backward()

    reached = {
        name.split(".")[0]
        for name, parameter in ralf.network.named_parameters()
        if parameter.grad is not None and parameter.grad.abs().sum() > 0
    }
    assert REACH[term] == reached
    assert all(parameter.grad is None for parameter in ralf.parameters())


def test_the_real_networks_embedding_loss_stops_at_its_encoder():
    """The same on ralf.kernels.networks.ralf: neither decoder nor classifier learns from L_emb."""
    recipe = tiny("ralf_small")
    made = objective(recipe, build(recipe.network.build, **recipe.network.dimensions))
    batch = MadeBatches()[0]

    terms = made.terms(made.run(batch.crops), batch, MOMENT)
    terms.parts["emb"].backward(retain_graph=True)
    reached = {name for name, p in made.network.named_parameters() if p.grad is not None}
    terms.total.backward()

    assert "mask" in reached
    assert any(name.startswith("reconstructor.encoders") for name in reached)
    assert not any(
        name.startswith(("reconstructor.decoders", "reconstructor.fuses", "classifier", "guide"))
        for name in reached
    )
    assert all(p.grad is not None for p in made.network.parameters())


def test_the_rivals_gradient_reaches_the_rival_alone(ralf: RalfObjective):
    """The reconstructor must not learn to be caught."""
    batch = MadeBatches()[0]
    seen = ralf.run(batch.crops)

    loss = ralf.rival(seen, batch)
    assert loss is not None
    loss.backward()

    assert all(parameter.grad is None for parameter in ralf.network.parameters())
    assert ralf.discriminator is not None
    assert all(parameter.grad is not None for parameter in ralf.discriminator.parameters())


@pytest.mark.parametrize(
    ("weight", "part"),
    [("weight_freq", "freq"), ("weight_emb", "emb"), ("weight_con", "con"), ("weight_adv", "adv")],
)
def test_a_weight_of_zero_leaves_the_term_out(weight: str, part: str):
    """The ablation's rows cost nothing for what they lack."""
    made = objective(tiny("ralf", **{weight: "0"}), StubRalf())
    batch = MadeBatches()[0]

    assert part not in made.terms(made.run(batch.crops), batch, MOMENT).parts
    if weight == "weight_adv":
        assert made.rival(made.run(batch.crops), batch) is None
        assert made.rival_optimiser() is None


def test_the_loss_state_holds_centre_and_rival_but_not_the_extractor(ralf: RalfObjective):
    """What a checkpoint must carry, and nothing that can be had again."""
    parts = {name.split(".")[0] for name in ralf.state_dict()}

    assert {"centre", "discriminator"} == parts
    ralf.centre.see(torch.ones(4, 4), FORGED)
    other = objective(tiny("ralf"), StubRalf())
    other.load_state_dict(ralf.state_dict())
    assert torch.equal(ralf.centre.position, other.centre.position)


def test_the_unweighted_row_of_the_ablation_has_w_one():
    """Table 4: `unweighted`."""
    plain = objective(tiny("ralf", freq_weighted="no", freq_scale="ortho"), StubRalf())
    scaled = objective(tiny("ralf", freq_weighted="no"), StubRalf())

    assert torch.equal(plain.weights, torch.ones(32, 32))
    torch.testing.assert_close(scaled.weights, unnormalised(32).float())
