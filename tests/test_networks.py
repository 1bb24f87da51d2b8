"""The networks: sizes as published, what flows where, every precision, export."""

from importlib.metadata import EntryPoint, EntryPoints
from typing import Literal, get_args

import numpy as np
import onnx
import pytest
import timm
import torch
from onnx.reference import ReferenceEvaluator
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ralf.kernels import networks
from ralf.kernels.networks import build, options
from ralf.kernels.networks.backbones import FAMILIES, Backbone, NetworkError, load_backbone
from ralf.kernels.networks.efficientnet_lite import SCALES, EfficientNetLite
from ralf.kernels.networks.ralf import Ralf
from ralf.kernels.networks.reconstructor import Reconstructor, ScaleFusion, double, half

TINY = {"base": 4, "blocks": 1, "backbone": "tf_efficientnet_lite0", "size": 64}


def crops(count: int, size: int = 64) -> Tensor:
    """u8 noise."""
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)


def tiny(**changes: object) -> Ralf:
    """A small RALF for inference."""
    network = build("ralf", **{**TINY, **changes})
    assert isinstance(network, Ralf)
    return network.eval()


def cost(network: nn.Module, *inputs: Tensor) -> tuple[float, float]:
    """Million parameters, and GFLOP (two a multiply-add) counted on meta tensors."""
    network = network.to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(*(x.to("meta") for x in inputs))
    return sum(p.numel() for p in network.parameters()) / 1e6, counter.get_total_flops() / 1e9


def test_the_reconstructor_is_the_published_size():
    """6.80 M parameters, 63.2 GMAC at 256²."""
    parameters, gflop = cost(Reconstructor(), torch.rand(1, 3, 256, 256))

    assert parameters == pytest.approx(6.80, rel=0.005)
    assert gflop / 2 == pytest.approx(63.2, rel=0.01)


def test_full_ralf_costs_140_gflop_a_face():
    """Reconstructor 127, Xception and guide 12, and the DCT, which the counter does not see."""
    parameters, gflop = cost(build("ralf").eval(), crops(1, 256))

    assert parameters == pytest.approx(6.80 + 20.8 + 0.066, rel=0.01)
    assert gflop == pytest.approx(139.6, rel=0.02)


def test_small_ralf_costs_19_gflop_a_face():
    """4.4 M parameters: about 9 MB in FP16."""
    small = build("ralf", base=16, blocks=4, backbone="tf_efficientnet_lite0").eval()
    parameters, gflop = cost(small, crops(1, 256))

    assert parameters == pytest.approx(4.4, rel=0.02)
    assert gflop + 0.4 == pytest.approx(19, rel=0.03)


def test_fusing_scale_by_scale_is_the_convolution_of_the_concatenation():
    """The cheap form computes the published one."""
    fuse = ScaleFusion(4, 0)
    maps = [torch.rand(1, 4 << i, 16 >> i, 16 >> i) for i in range(3)]
    whole = torch.cat([maps[0], double(maps[1]), double(double(maps[2]))], 1)
    weight = torch.cat([part.weight for part in fuse.parts], 1)
    expected = fuse.body(nn.functional.conv2d(whole, weight, fuse.parts[2].bias))
    fine = ScaleFusion(4, 1)
    whole = torch.cat([half(maps[0]), maps[1], double(maps[2])], 1)
    weight = torch.cat([part.weight for part in fine.parts], 1)
    expected_fine = fine.body(nn.functional.conv2d(whole, weight, fine.parts[2].bias))

    torch.testing.assert_close(fuse(*maps), expected)
    torch.testing.assert_close(fine(*maps), expected_fine)


def test_the_mask_starts_half_open_and_is_shared_by_the_colours():
    """One zeros(s, s) parameter behind a sigmoid: an image of pixels x comes out as x / 2."""
    network = tiny()
    trace = network.trace(crops(2))

    assert network.mask.shape == (64, 64) and not network.mask.any()
    torch.testing.assert_close(trace.destroyed, trace.image / 2)


def test_the_trace_has_the_published_shapes():
    """128-d embedding at base 32 is 4 × base; one logit a face; attention at the stem's size."""
    trace = tiny().trace(crops(2))

    assert [t.shape for t in (trace.image, trace.destroyed, trace.rebuilt)] == [(2, 3, 64, 64)] * 3
    assert [t.shape for t in trace[3:]] == [(2, 16), (2, 1, 32, 32), (2,)]
    assert all(t.dtype == torch.float32 for t in trace)
    assert trace.attention.min() >= 0 and trace.attention.max() <= 1


def test_the_rebuilt_image_is_the_destroyed_one_and_what_was_added():
    """out = z + destroyed: with the last convolution silent, nothing is added."""
    network = tiny()
    for parameter in network.reconstructor.leave.parameters():
        nn.init.zeros_(parameter)
    trace = network.trace(crops(1))

    assert torch.equal(trace.destroyed, trace.rebuilt)


def test_the_guide_steers_the_logit_only_where_it_is_built():
    """Shut the attention and a guided network hears nothing; an unguided one has none to shut."""
    guided, unguided = tiny(), tiny(guided=False)
    nn.init.constant_(guided.attention.conv.bias, -100)
    one, two = guided(crops(2))

    assert torch.isclose(one, two, atol=1e-6)
    assert unguided.guide is None and unguided.attention is None
    assert (unguided.trace(crops(1)).attention == 1).all()


def test_a_detector_that_sees_both_begins_as_its_classifier_alone(tmp_path):
    """The gate is shut: the residual is worth nothing until training opens it."""
    alone = build("classifier", backbone="tf_efficientnet_lite0", size=64).eval()
    named = {
        f"classifier.{name[5:]}" if name.startswith("head.") else name.partition(".")[2]: tensor
        for name, tensor in alone.backbone.state_dict().items()
    }
    save_file(named, tmp_path / "alone.safetensors")
    both, faces = tiny(sees="both"), crops(2)
    assert both.initialise(tmp_path / "alone.safetensors") == ()

    torch.testing.assert_close(alone(faces), both(faces))
    nn.init.ones_(both.gate)
    assert not torch.allclose(alone(faces), both(faces), atol=1e-3)


def test_explaining_shows_what_scoring_saw():
    """The residual is |x − rebuilt|."""
    network, faces = tiny(), crops(2)
    explanation, trace = network.explain(faces), network.trace(faces)

    torch.testing.assert_close(explanation.residual, (trace.image - trace.rebuilt).abs())
    assert torch.equal(explanation.attention, trace.attention)


def test_bytes_and_floats_are_the_same_crops():
    """Scaling is inside the network."""
    network, faces = tiny(), crops(2)

    torch.testing.assert_close(network(faces), network(faces / 255), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sees", ["residual", "both"])
def test_gradients_reach_the_mask_and_every_weight(sees: str):
    """One joint backward: the classifier's gradient goes through reconstructor and mask."""
    network = tiny(sees=sees).train()
    if sees == "both":
        nn.init.ones_(network.gate)
    trace = network.trace(crops(2))
    (trace.logit.sum() + trace.embedding.sum()).backward()
    dry = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]

    assert dry == []


@pytest.mark.parametrize("pool", ["max", "mean"])
@pytest.mark.parametrize("backbone", sorted(FAMILIES))
def test_a_cut_backbone_computes_what_timms_does(backbone: str, pool: str, tmp_path):
    """Stem, rest, pooling and head, against the uncut network with the same weights."""
    whole = timm.create_model(
        FAMILIES[backbone].timm_name, num_classes=1, global_pool={"mean": "avg"}.get(pool, pool)
    ).eval()
    save_file(whole.state_dict(), tmp_path / "whole.safetensors")
    cut = Backbone(backbone, pool).eval()
    load_backbone(cut, tmp_path / "whole.safetensors")
    image = torch.rand(2, 3, 64, 64)

    torch.testing.assert_close(cut(image), whole(image).squeeze(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("size", "channels"), [("0", 3), ("0", 6), ("2", 3)])
def test_our_efficientnet_lite_gives_the_bits_that_timms_gives(size: str, channels: int):
    """The same names; the same features and statistics, in training and after it, odd sizes too."""
    name = f"tf_efficientnet_lite{size}"
    theirs = timm.create_model(name, num_classes=1, in_chans=channels)
    ours = EfficientNetLite(SCALES[name], channels=channels)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())

    for training, side in ((True, 64), (True, 97), (False, 97), (False, 128)):
        image = torch.randn(2, channels, side, side)
        theirs.train(training)
        ours.train(training)
        features = ours.blocks(ours.bn1(ours.conv_stem(image)))
        assert torch.equal(theirs.forward_features(image), ours.bn2(ours.conv_head(features)))
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name]), name


@pytest.mark.parametrize(("size", "published"), [("0", 4.65), ("2", 6.09)])
def test_each_efficientnet_lite_has_as_many_weights_as_published(size: str, published: float):
    """In millions, with a head of ImageNet's thousand classes."""
    network = EfficientNetLite(SCALES[f"tf_efficientnet_lite{size}"])
    network.classifier = nn.Linear(network.num_features, 1000)

    assert published == round(sum(p.numel() for p in network.parameters()) / 1e6, 2)


@pytest.mark.parametrize("size", [224, 288])
def test_lite2_is_chosen_by_name_in_every_detector_at_several_sizes(size: int):
    """Shapes alone are computed: one logit a face."""
    for name in ("classifier", "ralf", "fdfl"):
        narrow = {"base": 4, "blocks": 1} if name == "ralf" else {}
        network = build(name, backbone="tf_efficientnet_lite2", size=size, **narrow)
        assert (2,) == network.eval().to("meta")(crops(2, size).to("meta")).shape


def test_our_efficientnet_lite_begins_with_weights_as_timm_draws_them():
    """Of each layer with enough weights, the deviation is timm's; norms and biases are equal."""
    theirs = timm.create_model("tf_efficientnet_lite0", num_classes=1).state_dict()
    ours_too = EfficientNetLite(SCALES["tf_efficientnet_lite0"])
    for name, ours in ours_too.state_dict().items():
        if ours.ndim < 2:
            assert torch.equal(ours, theirs[name]), name
        elif ours.numel() >= 800:
            assert float(ours.std() / theirs[name].std()) == pytest.approx(1, abs=0.15), name


def test_a_file_with_one_output_fills_the_baseline_to_the_last_weight(tmp_path):
    """FP16, timm's names, input x·2 − 1, max pooling: the same logits as timm's."""
    whole = timm.create_model("tf_efficientnet_lite0", num_classes=1, global_pool="max").eval()
    state = {k: v.half() if v.is_floating_point() else v for k, v in whole.state_dict().items()}
    save_file(state, tmp_path / "warm.safetensors")
    whole.load_state_dict(state)
    baseline = build("classifier", backbone="tf_efficientnet_lite0", size=64).eval()
    left = load_backbone(baseline.backbone, tmp_path / "warm.safetensors")
    faces = crops(3)

    assert left == ()
    torch.testing.assert_close(baseline(faces), whole(faces / 255 * 2 - 1).squeeze(1))


def test_an_imagenet_file_fills_all_but_the_head_and_the_guide_too(tmp_path):
    """1000 outputs are left out; both stems start alike; counters may be missing."""
    whole = timm.create_model("tf_efficientnet_lite0")
    state = {k: v for k, v in whole.state_dict().items() if "num_batches" not in k}
    save_file(state, tmp_path / "imagenet.safetensors")
    network = tiny()
    left = network.initialise(tmp_path / "imagenet.safetensors")

    assert left == ("head.bias", "head.weight")
    assert torch.equal(whole.conv_stem.weight, network.classifier.stem.conv_stem.weight)
    assert torch.equal(whole.conv_stem.weight, network.guide.conv_stem.weight)


def test_weights_of_another_network_are_refused_whole(tmp_path):
    """A half-loaded backbone would train, badly, without a word."""
    save_file(timm.create_model("resnet18").state_dict(), tmp_path / "resnet18.safetensors")

    with pytest.raises(NetworkError, match="is not tf_efficientnet_lite0: missing"):
        load_backbone(tiny().classifier, tmp_path / "resnet18.safetensors")
    with pytest.raises(NetworkError, match="no weights at"):
        load_backbone(tiny().classifier, tmp_path / "nothing.safetensors")
    with pytest.raises(NetworkError, match="give a safetensors file"):
        load_backbone(tiny().classifier)


def test_without_a_network_the_hub_is_a_clear_error(monkeypatch):
    """The message names the way out."""

    def unreachable(*args: object, **options: object) -> nn.Module:
        raise OSError("no route")

    backbone = tiny().classifier
    monkeypatch.setattr("timm.create_model", unreachable)

    with pytest.raises(NetworkError, match=r"no route.*safetensors file instead"):
        load_backbone(backbone, pretrained=True)


def test_pretrained_weights_come_from_the_hub(monkeypatch):
    """With a stand-in for the hub: the weights it serves are those that arrive."""
    served = timm.create_model("tf_efficientnet_lite0")
    network = tiny()
    monkeypatch.setattr("timm.create_model", lambda *args, pretrained, **options: served)
    network.initialise(pretrained=True)

    assert torch.equal(served.conv_head.weight, network.classifier.rest.conv_head.weight)


@pytest.mark.parametrize("sees", ["residual", "both"])
@pytest.mark.parametrize(
    ("dtype", "budget"), [(torch.bfloat16, 0.05), (torch.float16, 0.02), (torch.float32, 1e-4)]
)
def test_lowered_and_channels_last_it_agrees_with_fp32(
    dtype: torch.dtype, budget: float, sees: str
):
    """The residual is taken in FP32 and rounded after; logits stay close."""
    network, faces = tiny(sees=sees), crops(2)
    if sees == "both":
        nn.init.ones_(network.gate)
    expected = network(faces)
    lowered = network.lower(dtype).to(memory_format=torch.channels_last)

    assert torch.float32 == lowered(faces).dtype
    assert (lowered(faces) - expected).abs().max() < budget * max(1, expected.abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["ralf", "classifier"])
def test_it_also_runs_wholly_in_half_precision(name: str, dtype: torch.dtype):
    """network.to(dtype), as builders of engines do it."""
    dimensions = TINY if name == "ralf" else {"backbone": "tf_efficientnet_lite0", "size": 64}
    network = build(name, **dimensions).eval().to(dtype)

    assert network(crops(2)).isfinite().all()


@pytest.mark.parametrize("name", ["ralf", "classifier"])
def test_it_exports_with_a_dynamic_batch(name: str):
    """torch.export at one batch size, run at another."""
    dimensions = TINY if name == "ralf" else {"backbone": "tf_efficientnet_lite0", "size": 64}
    network, faces = build(name, **dimensions).eval(), crops(3)
    got = export(network, crops(2)).module()(faces)

    torch.testing.assert_close(got, network(faces), rtol=1e-4, atol=1e-4)


def export(network: nn.Module, faces: Tensor) -> torch.export.ExportedProgram:
    """With any batch of 1 to 64."""
    batch = torch.export.Dim("m", min=1, max=64)
    return torch.export.export(network, (faces,), dynamic_shapes=({0: batch},))


def test_an_exported_ralf_holds_no_op_of_ours():
    """Only torch knows them, and torch 2.11 cannot take them apart after the export."""
    network, faces = tiny(), crops(3)
    program = export(network, crops(2))

    assert not [node for node in program.graph.nodes if "ralf" in str(node.target)]
    assert torch.equal(network(faces), program.module()(faces))


def test_ralf_exports_to_onnx():
    """ONNX's own evaluator, which is slow, agrees at the smallest size."""
    network = tiny(size=32)
    plain = export(network, crops(2, 32)).run_decompositions()
    model = torch.onnx.export(plain, dynamo=True, verbose=False).model_proto
    onnx.checker.check_model(model)
    faces = crops(1, 32)
    [got] = ReferenceEvaluator(model).run(None, {model.graph.input[0].name: faces.numpy()})

    assert np.abs(network(faces).detach().numpy() - got).max() < 1e-3


@pytest.mark.parametrize(
    ("name", "dimensions", "message"),
    [
        ("ralph", {}, "one of ralf, classifier"),
        ("ralf", {"bass": 4}, r"no dimension \['bass'\] \(has: base"),
        ("ralf", {"backbone": "vgg"}, "one of xception"),
        ("ralf", {**TINY, "size": 30}, "multiple of 4"),
        ("ralf", {**TINY, "base": 3}, "base should be even"),
        ("ralf", {**TINY, "pool": "median"}, "max or mean"),
        ("ralf", {**TINY, "sees": "nothing"}, "one of residual, both, bands"),
        ("ralf", {**TINY, "leaves": 1.0}, "leaves between 0 and 1"),
    ],
)
def test_what_cannot_be_built_is_said(name: str, dimensions: dict, message: str):
    """Unknown names and dimensions are errors that show the known ones."""
    with pytest.raises(ValueError, match=message):
        build(name, **dimensions)


class Outside(nn.Module):
    """A network of another package."""

    def __init__(self, *, size: int = 64, mode: Literal["a", "b"] = "a") -> None:
        super().__init__()
        self.size, self.mode = size, mode


def installed(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """As if a package had registered Outside under these names."""
    value = f"{__name__}:Outside"
    found = EntryPoints(EntryPoint(name, value, networks.GROUP) for name in names)
    monkeypatch.setattr(networks, "entry_points", found.select)


def test_a_network_of_another_package_is_found_by_its_entry_point(monkeypatch: pytest.MonkeyPatch):
    """It is built by its name, and takes its own dimensions."""
    installed(monkeypatch, "outside")

    built = build("outside", size=96, mode="b")

    assert isinstance(built, Outside)
    assert (built.size, built.mode) == (96, "b")
    assert networks.names() == ["ralf", "classifier", "fdfl", "ensemble", "outside"]


def test_an_unknown_network_is_refused_with_the_names_of_all(monkeypatch: pytest.MonkeyPatch):
    """Ours and those of other packages."""
    installed(monkeypatch, "outside")

    with pytest.raises(ValueError, match="one of ralf, classifier, fdfl, ensemble, outside, got"):
        build("outsider")


def test_no_package_replaces_one_of_our_networks(monkeypatch: pytest.MonkeyPatch):
    """A published model means the same wherever it is loaded."""
    installed(monkeypatch, "ralf")

    assert isinstance(build("ralf", **TINY), Ralf)


@pytest.mark.parametrize("name", [*networks.OURS])
def test_a_networks_options_have_types(name: str):
    """Read from the signature, as types and not as text."""
    found = options(name)

    assert found["size"].annotation is int and found["size"].default == 256
    assert all(not isinstance(option.annotation, str) for option in found.values())


def test_an_option_of_a_few_words_lists_them():
    """What --set needs to refuse a wrong word."""
    assert get_args(options("ralf")["sees"].annotation) == ("residual", "both", "bands")
