"""The torch engine and the commands of models: agreement, refusal, any batch."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ralf.kernels import artifact as models
from ralf.kernels import cli, engine_torch, registry
from ralf.kernels.artifact import Artifact, golden, open_artifact
from ralf.kernels.choose_engine import load
from ralf.kernels.engine import EngineError, check_golden, pick_device
from ralf.kernels.engine_torch import (
    TorchEngine,
    best_precision,
    pack,
    reference_logits,
    restore,
    weights_bytes,
)
from ralf.kernels.manifest import InputContract, Manifest, Network
from ralf.kernels.networks import build
from ralf.kernels.untrained import patterns, publish_untrained

SIZE = 64
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def published_once(tmp_path_factory) -> Path:
    """A folder with one tiny untrained model, promoted."""
    root = tmp_path_factory.mktemp("models")
    made = publish_untrained(root, base=4, blocks=1, size=SIZE, golden_crops=8)
    registry.point_to(root, "untrained", made.version)
    return root


@pytest.fixture
def tiny(published_once) -> Artifact:
    """The tiny untrained model."""
    return models.resolve(published_once, "untrained")


def baseline(size: int = SIZE, **changes: object) -> tuple[nn.Module, Manifest]:
    """The plain classifier and a draft for it."""
    dimensions = {"backbone": "tf_efficientnet_lite0", "size": size}
    draft = Manifest(
        name="plain",
        network=Network(build="classifier", **dimensions),
        input=InputContract(size=size),
        files={},
        **changes,
    )
    return build("classifier", **dimensions).eval(), draft


def test_the_engine_agrees_with_the_reference_on_all_golden_crops(tiny):
    """FP32 within rounding."""
    engine = load(tiny, "cpu", precision="fp32")

    assert check_golden(engine) < 1e-3
    assert (engine.name, engine.precision, engine.device) == ("torch", "fp32", "cpu")


@pytest.mark.parametrize("count", [0, 1, 3, 8])
def test_any_number_of_crops_is_scored_in_bounded_batches(tiny, count):
    """m = 0 gives no logits; the batch's bound changes nothing."""
    crops = torch.from_numpy(patterns(8, SIZE, seed=1))[:count]
    engine = TorchEngine.of(tiny, CPU, "fp32", max_batch=3)
    together = TorchEngine.of(tiny, CPU, "fp32", max_batch=64)
    logits = engine(crops)

    assert (logits.shape, logits.dtype, logits.device) == ((count,), torch.float32, CPU)
    torch.testing.assert_close(logits, together(crops), rtol=1e-4, atol=1e-4)


def test_the_batch_bound_holds(tiny, monkeypatch):
    """No call of the network sees more than max_batch crops."""
    engine = TorchEngine.of(tiny, CPU, "fp32", max_batch=3)
    seen: list[int] = []
    hook = engine.network.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    engine(torch.from_numpy(patterns(8, SIZE)))
    hook.remove()

    assert seen == [3, 3, 2]


def test_bf16_stays_within_its_budget_where_the_model_allows_it(tiny):
    """Emulated where the processor lacks it: slower, the same numbers."""
    assert "logit_bf16" in tiny.manifest.error_budget
    engine = load(tiny, "cpu", precision="bf16", golden_crops=8)

    assert engine.precision == "bf16"
    assert check_golden(engine) <= tiny.manifest.error_budget["logit_bf16"]


def test_auto_takes_bf16_only_with_hardware_and_measured_agreement(tiny, monkeypatch):
    """Both, or FP32."""
    without = tiny.manifest.model_copy(update={"error_budget": {"logit": 0.05}})
    chosen = {}
    for has in (True, False):
        monkeypatch.setattr(engine_torch, "cpu_has_bf16", lambda has=has: has)
        chosen[has] = [best_precision(m, CPU) for m in (tiny.manifest, without)]

    assert chosen == {True: ["bf16", "fp32"], False: ["fp32", "fp32"]}
    assert best_precision(without, torch.device("cuda", 0)) == "fp16"


def test_an_engine_beyond_the_budget_is_refused(tmp_path, tiny):
    """Golden logits that these weights do not give: what a wrong build looks like."""
    wrong = golden(tiny)
    wrong = models.Golden(wrong.crops, wrong.logits + 1)
    files = {name: tiny.read(name) for name in tiny.manifest.files}
    made = models.publish(tmp_path, tiny.manifest, {**files, "golden.npz": wrong.to_bytes()})

    with pytest.raises(EngineError, match=r"differ by (0\.9|1\.)\d+, budget"):
        load(made, "cpu")


def test_an_engine_that_says_nan_is_refused(tiny):
    """Not a number is beyond every budget."""

    class Broken:
        name, precision, device, artifact = "broken", "fp32", "cpu", tiny

        def __call__(self, crops: torch.Tensor) -> torch.Tensor:
            return torch.full((len(crops),), float("nan"))

    with pytest.raises(EngineError, match="differ by inf"):
        check_golden(Broken())


@pytest.mark.parametrize(
    "crops",
    [
        torch.zeros(1, 3, SIZE, SIZE),
        torch.zeros(1, 3, 32, 32, dtype=torch.uint8),
        torch.zeros(3, SIZE, SIZE, dtype=torch.uint8),
    ],
)
def test_crops_of_another_kind_are_refused(tiny, crops):
    """The contract's size and u8; the message shows both."""
    with pytest.raises(EngineError, match=r"takes crops u8 \[m,3,64,64\], got"):
        load(tiny, "cpu")(crops)


@pytest.mark.parametrize("device", ["gpu", "cpu:0", "cuda:x", "cuda:", "mps", ""])
def test_a_device_that_is_no_name_is_refused(device):
    """auto, cpu, cuda or cuda:N."""
    with pytest.raises(EngineError, match="should be auto, cpu, cuda"):
        pick_device(device)


def test_asking_for_cuda_without_it_is_an_error(monkeypatch):
    """Nothing falls back in silence; auto may choose."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    assert pick_device("auto") == CPU
    with pytest.raises(EngineError, match="finds 0 CUDA devices"):
        pick_device("cuda")
    with pytest.raises(EngineError, match="'cuda:1'"):
        pick_device("cuda:1")


@pytest.mark.gpu
def test_cuda_agrees_with_the_reference(tiny):
    """FP16, within the budget."""
    engine = load(tiny, "cuda", golden_crops=8)

    assert (engine.precision, engine.device) == ("fp16", "cuda:0")


def test_explaining_shows_the_residual_for_any_number_of_crops(tiny):
    """FP32 pictures on the CPU; none for no crops."""
    engine = TorchEngine.of(tiny, CPU, "bf16", max_batch=2)
    crops = torch.from_numpy(patterns(3, SIZE))
    shown, nothing = engine.explain(crops), engine.explain(crops[:0])

    assert engine.explains
    assert [t.shape for t in shown] == [(3, 3, SIZE, SIZE)] * 3 + [(3, 1, SIZE // 2, SIZE // 2)]
    assert [len(t) for t in nothing] == [0] * 4
    assert {t.dtype for t in shown} == {torch.float32}
    torch.testing.assert_close(shown.residual, (crops / 255 - shown.rebuilt).abs())


def test_a_plain_classifier_is_an_engine_that_explains_nothing(tmp_path):
    """Packed, published and run as RALF is."""
    network, draft = baseline()
    manifest, files = pack(network, draft, patterns(4, SIZE))
    made = models.publish(tmp_path, manifest, {**files, "card.md": b"plain"})
    engine = load(made, "cpu", precision="fp32")

    assert not engine.explains
    with pytest.raises(EngineError, match="explains nothing"):
        engine.explain(torch.from_numpy(patterns(1, SIZE)))


def test_the_reference_is_the_weights_on_disk_in_fp32():
    """FP16 on disk, so the logits are those of rounded weights."""
    network, draft = baseline()
    crops = patterns(4, SIZE)
    manifest, files = pack(network, draft, crops)
    stored = restore(manifest, files["weights.safetensors"])
    rounded = network.half().float()
    expected = rounded(torch.from_numpy(crops)).detach().numpy()

    assert {p.dtype for p in stored.parameters()} == {torch.float32}
    assert (
        np.abs(reference_logits(manifest, files["weights.safetensors"], crops) - expected).max()
        < 1e-4
    )


def test_bf16_is_left_out_of_the_budget_where_it_is_not_good_enough():
    """A budget that no rounding meets: auto then takes FP32."""
    network, draft = baseline(error_budget={"logit": 1e-9})
    manifest, _ = pack(network, draft, patterns(4, SIZE))

    assert set(manifest.error_budget) == {"logit", "logit_fp32"}


def test_a_weight_that_fp16_cannot_hold_is_named():
    """Rather an error at publishing than an infinity in serving."""
    network, _ = baseline()
    with torch.no_grad():
        network.backbone.head.weight[0, 0] = 1e6

    with pytest.raises(EngineError, match=r"backbone\.head\.weight holds 1e\+06"):
        weights_bytes(network)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"network": Network(build="ralph")}, "network should be one of"),
        ({"network": Network(build="ralf", base=8, blocks=1, size=SIZE)}, "do not fit"),
        ({"input": InputContract(size=128)}, "takes 64 px, the input contract cuts 128 px"),
    ],
)
def test_a_manifest_that_does_not_fit_its_weights_is_refused(tiny, change, message):
    """Other network, other dimensions, other crop size."""
    with pytest.raises(EngineError, match=message):
        restore(tiny.manifest.model_copy(update=change), tiny.read("weights.safetensors"))


def test_weights_that_are_none_are_refused(tiny):
    """Torn inside a file whose hash was made afterwards."""
    with pytest.raises(EngineError, match="do not fit"):
        restore(tiny.manifest, tiny.read("weights.safetensors")[:1000])


def test_precision_and_batch_are_checked(tiny):
    """Names that no engine has."""
    with pytest.raises(EngineError, match="precision should be one of"):
        TorchEngine.of(tiny, CPU, "int3")
    with pytest.raises(EngineError, match="max_batch should be at least 1"):
        TorchEngine.of(tiny, CPU, "fp32", max_batch=0)


def test_a_manifest_without_a_budget_proves_nothing(tiny):
    """No number to be within."""
    bare = replace(tiny, manifest=tiny.manifest.model_copy(update={"error_budget": {}}))

    with pytest.raises(EngineError, match="has no logit"):
        check_golden(TorchEngine.of(bare, CPU, "fp32"))


def test_the_untrained_model_says_so_and_is_the_same_each_time(published_once, tiny, tmp_path):
    """Fixed seed: the same version on the same machine; the caller's random state untouched."""
    before = torch.random.get_rng_state()
    again = publish_untrained(tmp_path, base=4, blocks=1, size=SIZE, golden_crops=8)

    assert again.version == tiny.version
    assert torch.equal(before, torch.random.get_rng_state())
    assert tiny.manifest.untrained
    assert "knows nothing" in tiny.read("card.md").decode()
    assert np.ptp(golden(tiny).logits) > 1e-3


def run(*words: str) -> int:
    """A command as worker/cli/main.py would run it."""
    parser = argparse.ArgumentParser()
    cli.commands(parser.add_subparsers())
    args = parser.parse_args(words)
    return args.run(args)


def test_models_are_listed_shown_and_verified(published_once, tiny, capsys):
    """JSON on stdout for programs."""
    where = ("--models", str(published_once), "--json")
    assert run("models", "list", *where) == 0
    [row] = json.loads(capsys.readouterr().out)
    assert run("models", "show", "untrained", *where) == 0
    shown = json.loads(capsys.readouterr().out)
    assert run("models", "verify", "untrained", *where) == 0
    verified = json.loads(capsys.readouterr().out)

    assert (row["version"], row["current"], row["state"]) == (tiny.version, True, "untrained")
    assert Manifest.model_validate(shown["manifest"]) == tiny.manifest
    assert 0 <= verified["error"] <= verified["budget"]


def test_models_are_made_promoted_and_rolled_back_by_command(tmp_path, capsys):
    """The folder comes from the option."""
    where = ("--models", str(tmp_path))
    small = ("--base", "4", "--blocks", "1", "--size", "32")
    assert run("models", "untrained", *small, *where) == 0
    [first] = models.versions(tmp_path, "untrained")
    made = open_artifact(tmp_path / "untrained" / first)
    files = {name: made.read(name) for name in made.manifest.files}
    second = models.publish(tmp_path, made.manifest, {**files, "card.md": b"another"}).version
    assert run("models", "promote", f"untrained@{second}", *where) == 0
    assert models.promoted(tmp_path, "untrained") == second
    assert run("models", "rollback", "untrained", *where) == 0
    assert models.promoted(tmp_path, "untrained") == first
    assert run("models", "show", "untrained", *where) == 0
    assert "knows nothing" in capsys.readouterr().out


def test_commands_fail_with_a_line_and_a_code(tmp_path, published_once, tiny, monkeypatch, capsys):
    """5 for what is not there, 1 for what is damaged, 2 for usage."""
    copy = tmp_path / "untrained"
    (copy / tiny.version).mkdir(parents=True)
    for name in (*tiny.manifest.files, "manifest.json"):
        (copy / tiny.version / name).write_bytes((tiny.path / name).read_bytes())
    (copy / tiny.version / "card.md").write_text("changed")
    monkeypatch.setenv("RALF_MODELS_DIR", str(tmp_path))

    assert run("models", "show", "nothing") == 5
    assert "have: untrained" in capsys.readouterr().err
    assert run("models", "verify", f"untrained@{tiny.version}") == 1
    assert "card.md" in capsys.readouterr().err
    assert run("models", "list") == 1
    assert "damaged" in capsys.readouterr().out
    assert run("models", "promote", "untrained") == 2
