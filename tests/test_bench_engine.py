"""`ralf bench engine` and `dct`: every way runs, agrees, and is told in the record."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ralf.__main__ import main
from ralf.kernels.artifact import SHIPPED, resolve
from ralf.kernels.bench import dct, engine, residual
from ralf.kernels.bench.dct import CHAIN, COPY, Pair, ratios
from ralf.kernels.bench.engine import AUTHORS
from ralf.kernels.bench.record import interleave, nvidia_smi
from ralf.kernels.dct import FusedKernelError
from ralf.kernels.engine import EngineError


def measured(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict:
    """The record that the command prints."""
    assert 0 == main(["bench", *map(str, arguments)])
    return json.loads(capsys.readouterr().out)


def test_the_destructor_is_timed_by_every_way_and_its_errors_stand_beside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """On a CPU: the papers' FFT, our products in two precisions, and two ends for scale."""
    options = ("--device", "cpu", "--size", 64, "--batch", 2, "--repeats", 2, "--out", tmp_path)
    record = measured(capsys, "dct", *options)
    errors = record["facts"]["largest error against FP64"]

    assert {"authors, FFT FP32", "products, FP32", "products, FP16"} == errors.keys()
    assert errors.keys() | {CHAIN, COPY} == record["timings"].keys()
    assert max(errors["authors, FFT FP32"], errors["products, FP32"]) < 2e-6
    assert 1e-5 < errors["products, FP16"] < 2e-3
    assert 2 * 3 * 64 * 64 * 7 == record["facts"]["bytes"]
    assert "products, FP32 / products, FP16" in record["ratios"]
    [kept] = tmp_path.iterdir()
    assert kept.name.startswith("dct_cpu") and record == json.loads(kept.read_text())


def test_a_way_that_cannot_be_built_does_not_end_the_bench(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """The record says which and why, and has the others' times."""

    def broken() -> Pair:
        raise FusedKernelError("no room for the shared memory")

    monkeypatch.setattr(dct, "fused_ways", lambda *_: {"fused 512×512": broken})
    record = measured(capsys, "dct", "--device", "cpu", "--size", 16, "--repeats", 1)

    assert {"fused 512×512": "no room for the shared memory"} == record["facts"]["failed"]
    assert "fused 512×512" not in record["timings"]
    assert "products, FP32 / products, FP16" in record["ratios"]


def test_engines_are_timed_beside_the_papers_way(
    tiny_models: Path, capsys: pytest.CaptureFixture[str]
):
    """Every engine that this machine offers; the record says how far each is from the baseline."""
    where = ("--models", tiny_models, "--device", "cpu")
    record = measured(capsys, "engine", "tiny", *where, "--batch", 2, "--repeats", 2)
    speeds, facts = record["facts"]["faces_per_s"], record["facts"]
    differences = facts[f"largest logit difference to {AUTHORS}"]

    assert {AUTHORS, "FP32, channels last", "torch-fp32"} <= record["timings"].keys()
    assert record["timings"].keys() == speeds.keys() == differences.keys()
    assert 0 == differences[AUTHORS]
    assert 0 < differences["torch-fp32"] < 1e-3
    assert speeds["torch-fp32"] == pytest.approx(
        2 / record["timings"]["torch-fp32"]["median_s"], rel=0.01
    )
    assert f"{AUTHORS} / torch-fp32" in record["ratios"]
    assert "tiny@" in record["conditions"]["model"]
    assert {"device", "torch", "commit"} <= record["machine"].keys()


def test_a_level_of_the_reconstructor_is_timed(capsys: pytest.CaptureFixture[str]):
    """On a CPU the plain way alone; a GPU adds those that might be faster."""
    small = ("--channels", 16, "--size", 16, "--blocks", 1, "--repeats", 1, "--calls", 1)
    record = measured(capsys, "residual", "--device", "cpu", *small)
    [(name, timing)] = record["timings"].items()
    flop = 2 * 2 * 9 * 16 * 16 * 16 * 16

    assert residual.EAGER == name
    assert record["facts"]["TFLOP/s"][name] == round(flop / timing["median_s"] / 1e12, 2)
    assert {name: 0} == record["facts"][f"largest difference to {name}"]
    assert name == record["facts"]["fastest"]


def test_a_network_with_fresh_weights_can_be_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """On a machine that has no model yet; plans are built first where that is asked."""
    built: list[str] = []
    monkeypatch.setitem(
        engine.FRESH, "ralf", {"base": 4, "blocks": 1, "backbone": "tf_efficientnet_lite0"}
    )
    monkeypatch.setattr(engine, "build_plans", lambda artifact, device: built.append(artifact.name))
    options = ("--fresh", "ralf", "--size", 64, "--build", "--device", "cpu")
    record = measured(capsys, "engine", *options, "--batch", 1, "--repeats", 1)

    assert ["ralf"] == built
    assert 64 == record["conditions"]["network"]["size"]


def test_fresh_ralf_small_has_the_shape_that_ships():
    """Its speed is measured before its weights are there, so the shapes must agree."""
    network = resolve(SHIPPED, "ralf-small").manifest.network
    fresh = engine.FRESH["ralf-small"]

    assert network.dimensions == {**fresh, "size": 256}


def test_a_builder_that_fails_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """And is told."""
    from ralf.kernels import build

    tried: list[str] = []

    def fails_first(order: object, builder: str) -> None:
        tried.append(builder)
        if len(tried) == 1:
            raise EngineError("too old a driver")

    monkeypatch.setattr(build, "available", lambda: ["torch-tensorrt", "rtx-aot"])
    monkeypatch.setattr(build, "build", fails_first)
    monkeypatch.setattr(build, "BuildRequest", lambda artifact, **_: artifact)
    engine.build_plans(SimpleNamespace(), torch.device("cpu"))

    assert ["torch-tensorrt", "rtx-aot"] == tried
    assert "torch-tensorrt: too old a driver" in capsys.readouterr().err


def test_a_bench_without_a_model_says_what_to_give(capsys: pytest.CaptureFixture[str]):
    """One line, exit 1."""
    assert 1 == main(["bench", "engine", "--device", "cpu"])
    assert "--fresh" in capsys.readouterr().err


def test_a_turn_of_many_calls_is_told_as_one_call():
    """And waits for the device inside the turn."""
    did: list[str] = []
    ways: dict[str, Callable[[], object]] = {"a": lambda: did.append("a")}
    timings = interleave(ways, repeats=2, warmups=1, calls=3, settle=lambda: did.append("settle"))

    assert ["a", "a", "a", "settle"] * 3 == did
    assert 2 == timings["a"].repeats


def test_ratios_are_to_the_fastest_fused_tiling():
    """Or to FP16 products where no kernel ran."""
    on_gpu = {"products, FP16": 4.0, "fused": 2.0, "fused 32×32": 1.0, COPY: 0.5}

    assert ratios(on_gpu) == {
        "products, FP16 / fused 32×32": 4.0,
        "fused / fused 32×32": 2.0,
        "copy / fused 32×32": 0.5,
    }
    assert ratios({"products, FP16": 4.0, COPY: 2.0}) == {"copy / products, FP16": 0.5}


def test_what_nvidia_smi_says_is_told_and_its_absence_is_not_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A machine without the tool has a record all the same."""
    device = torch.device("cuda", 0)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert {} == nvidia_smi(device, "driver_version")
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\necho "580.1, 700.00 W"\n')
    tool.chmod(0o755)

    assert {"driver_version": "580.1", "power.limit": "700.00 W"} == nvidia_smi(
        device, "driver_version", "power.limit"
    )


@pytest.mark.gpu
def test_on_a_gpu_the_fused_kernels_and_the_compiled_network_are_in_the_record(
    tiny_models: Path, capsys: pytest.CaptureFixture[str]
):
    """With each tiling that fits; speeds are the bench's to tell, not this test's."""
    times = measured(capsys, "dct", "--batch", 2, "--size", 128, "--repeats", 2, "--tilings")
    engine = measured(
        capsys, "engine", "tiny", "--models", tiny_models, "--batch", 2, "--repeats", 2
    )

    residual = measured(capsys, "residual", "--batch", 1, "--blocks", 1, "--repeats", 1)
    ways = residual["timings"].keys()
    assert {"torch.compile", "eager, cuDNN's ReLU"} <= ways
    assert residual["facts"]["fastest"] in ways
    assert any(name.startswith("fused 2×128") for name in ways)
    assert {"torch-cudnn-fp16", "torch-eager-cudnn-fp16"} <= engine["timings"].keys()
    assert len([name for name in times["timings"] if name.startswith("fused")]) >= 3
    assert "fused quarters, shares: 4" in times["timings"]
    assert {"torch-fp16", "torch-eager-fp16", "authors, TF32"} <= engine["timings"].keys()
    assert {"capability", "cuda"} <= engine["machine"].keys()
