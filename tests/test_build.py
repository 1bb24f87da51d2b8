"""`ralf build`: what agrees is published, what does not is refused with the layer that differs."""

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from ralf.kernels import build as building
from ralf.kernels import (
    build_rtx,
    build_trt,
    choose_engine,
    cli,
    engine_trt,
    machine,
    plans,
    verify,
)
from ralf.kernels.artifact import Artifact, golden, open_artifact
from ralf.kernels.build import BuildRequest, build
from ralf.kernels.choose_engine import load
from ralf.kernels.engine import EngineError
from ralf.kernels.engine_torch import restore
from ralf.kernels.export import Built
from ralf.kernels.networks import build as network_of
from ralf.kernels.plan_signature import BadKey
from ralf.kernels.plans import Device, Key, PlanMissing
from ralf.kernels.registry import point_to
from ralf.kernels.untrained import patterns, publish_untrained, settle
from ralf.kernels.verify import AgreementCheck, PlanRefused
from tests.test_plan_signature import OURS

pytest.importorskip("onnxruntime", reason="the extra build brings it")

from ralf.kernels import export

SIZE = 64
CPU = torch.device("cpu")
H200 = Device("NVIDIA H200", "sm90", {"rtx": "1.4.0.76"})
KEY = Key("rtx", "1.4.0.76", ("sm80", "sm90"), "fp16", 8)


@pytest.fixture(scope="module")
def published_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One tiny untrained model."""
    root = tmp_path_factory.mktemp("models")
    publish_untrained(root, name="tiny", base=4, blocks=1, size=SIZE, golden_crops=4)
    return root


@pytest.fixture
def artifact(published_once: Path, tmp_path: Path) -> Artifact:
    """A copy of it."""
    [version] = (published_once / "tiny").glob("????????")
    return open_artifact(shutil.copytree(version, tmp_path / "tiny" / version.name))


@pytest.fixture
def reference(artifact: Artifact) -> torch.nn.Module:
    """The FP32 module."""
    return restore(artifact.manifest, artifact.read("weights.safetensors"))


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch, reference: torch.nn.Module) -> SimpleNamespace:
    """TensorRT-RTX and ONNX, faked at their border: a graph that gives the module's logits."""
    state = SimpleNamespace(built=0, shift=0.0)

    def run(crops: np.ndarray) -> list[np.ndarray]:
        return [reference(torch.from_numpy(crops)).numpy() + np.float32(state.shift)]

    def compile_graph(
        graph: Path, size: int, buckets: tuple[int, ...], *, current: bool = False
    ) -> Built:
        state.built += 1
        return Built(b"plan %d" % state.built, 0.5, {"tf32": False})

    monkeypatch.setattr(export, "write_onnx", lambda network, path, **_: path.write_bytes(b"x"))
    monkeypatch.setattr(export, "session", lambda path: run)
    monkeypatch.setattr(export, "convolutions", lambda path: (["conv"], 1))
    monkeypatch.setattr(build_rtx, "version", lambda: "1.4.0.76")
    monkeypatch.setattr(build_rtx, "architectures", lambda: ("sm80", "sm90"))
    monkeypatch.setattr(build_rtx, "build", compile_graph)
    monkeypatch.setattr(build_rtx, "check_structure", lambda content, *graph: None)
    return state


def order(artifact: Artifact, **changes: object) -> BuildRequest:
    """Few crops, small batches, nothing said."""
    told: list[str] = []
    return BuildRequest(artifact, **{"buckets": (1, 8), "crops": 4, "say": told.append, **changes})


def test_a_plan_that_agrees_is_published_unverified(artifact: Artifact, builder):
    """With its hash, options, error, timing and versions; no GPU has run it."""
    made = build(order(artifact))
    record = plans.plan(artifact, KEY).record

    assert (made.record, "unverified", "rtx-aot") == (record, record.state, record.builder)
    assert b"plan 1" == made.read()
    assert (1, 8) == record.buckets and {"tf32": False} == record.options
    assert record.error["golden"] <= record.error["budget"] and 4 == record.error["decisions"]
    assert {"export_s", "check_s", "build_s"} == set(record.timing)
    assert {"python", "torch"} <= set(record.versions)
    assert not record.verified_on("sm90")


def test_where_a_gpu_runs_the_plan_the_graph_is_checked_on_a_few_crops(
    artifact: Artifact, builder, gpu, monkeypatch: pytest.MonkeyPatch
):
    """The graph runs on the CPU, a second a face; the plan is then asked for all 64 on the GPU."""
    counts: list[int] = []
    scored: list[int] = []
    real = AgreementCheck.run
    monkeypatch.setattr(building, "GRAPH_CROPS", 3)
    golden_crops = len(golden(artifact).crops)

    def counted(check: AgreementCheck, what: str, score, precision):
        counts.append(check.count)
        return real(
            replace(check, count=1),
            what,
            lambda crops: (scored.append(len(crops)), score(crops))[1],
            precision,
        )

    monkeypatch.setattr(AgreementCheck, "run", counted)
    made = build(OnGpu(artifact, buckets=(1, 8), say=lambda line: None), "rtx-aot")

    assert [building.GRAPH_CROPS, verify.DECISIONS] == counts == [3, 64]
    assert [3, 1, golden_crops, 1] == scored and golden_crops > 3
    assert made.record.verified_on("sm90")


def test_a_plan_that_is_there_is_not_built_twice(artifact: Artifact, builder):
    """Unless asked, or damaged, or for other batches."""
    first = build(order(artifact))
    assert first == build(order(artifact)) and 1 == builder.built
    build(order(artifact, again=True))
    assert 2 == builder.built
    plans.plan(artifact, KEY).path.write_bytes(b"damaged")
    assert b"plan 3" == build(order(artifact)).read()
    assert (1, 4, 8) == build(order(artifact, buckets=(1, 4, 8))).record.buckets
    assert 4 == builder.built


def test_a_graph_that_disagrees_is_refused(artifact: Artifact, builder):
    """By how much, against which budget; nothing is published, nothing was compiled."""
    builder.shift = 1.0
    with pytest.raises(PlanRefused) as caught:
        build(order(artifact))
    message = str(caught.value)

    assert "golden crops differ by 1.0000, budget 0.2500" in message
    assert 0 == builder.built and [] == plans.plans(artifact)
    assert [] == list(plans.engines(artifact).iterdir())


def test_decisions_that_flip_are_refused_even_where_golden_logits_agree(
    artifact: Artifact, builder, monkeypatch: pytest.MonkeyPatch
):
    """The larger random set is asked too."""
    check = AgreementCheck.run

    def flipping(gate: AgreementCheck, what: str, score, precision):
        def other(crops: np.ndarray) -> np.ndarray:
            return score(crops) if len(crops) == 4 and gate.count != 4 else -5 - score(crops)

        monkeypatch.setattr(AgreementCheck, "run", check)
        return check(gate, what, other, precision)

    monkeypatch.setattr(AgreementCheck, "run", flipping)
    with pytest.raises(PlanRefused, match=r"of 6 random crops otherwise.*not published"):
        build(order(artifact, crops=6))
    assert [] == plans.plans(artifact)


def test_a_builder_that_fails_leaves_nothing(artifact: Artifact, builder, monkeypatch):
    """And the lock is free for the next."""

    def fails(*_: object, **__: object) -> Built:
        raise EngineError("TensorRT-RTX built no plan")

    monkeypatch.setattr(build_rtx, "build", fails)
    with pytest.raises(EngineError, match="built no plan"):
        build(order(artifact))
    with plans.building(artifact):
        assert [] == plans.plans(artifact)


@pytest.mark.parametrize("batches", [(), (0, 8), (8, 1), (1, 1), (1, 1024)])
def test_batches_that_make_no_sense_are_refused(artifact: Artifact, batches: tuple[int, ...]):
    """They ascend from one."""
    with pytest.raises(EngineError, match="as 1,8,64"):
        BuildRequest(artifact, buckets=batches)


def test_torch_tensorrt_without_a_gpu_says_what_to_do(artifact: Artifact):
    """The other builder needs none."""
    with pytest.raises(EngineError, match="without one: --builder rtx-aot"):
        build(order(artifact), "torch-tensorrt")
    with pytest.raises(EngineError, match="precision should be one of"):
        BuildRequest(artifact, precision="fp12")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, reference: torch.nn.Module) -> SimpleNamespace:
    """A GPU whose plans say what the module says, give or take."""
    state = SimpleNamespace(shift=0.0, ran=[], front=[])

    def of(artifact: Artifact, key: Key, content: bytes, buckets, *, device, front="plan"):
        state.ran.append(content)
        state.front.append(front)

        class Engine:
            batching = SimpleNamespace(buckets=buckets)
            precision, name = key.precision, str(key)

            def __call__(self, crops: Tensor) -> Tensor:
                return reference(crops) + state.shift

        made = Engine()
        made.artifact, made.device = artifact, "cpu"
        return made

    for module in (building, verify, engine_trt):
        monkeypatch.setattr(module, "describe", lambda device: H200)
    monkeypatch.setattr(engine_trt.TrtEngine, "of", of)
    return state


def test_verifying_marks_what_agrees_on_this_architecture(artifact: Artifact, builder, gpu):
    """With error, budget, decisions and timing; afterwards it is found."""
    build(order(artifact))
    gate_of, verify.DECISIONS = verify.DECISIONS, 6
    try:
        [checked] = verify.verify(artifact, CPU, say=lambda line: None)
    finally:
        verify.DECISIONS = gate_of
    seen = plans.plan(artifact, KEY).record.verifications["sm90"]

    assert checked.record == plans.plan(artifact, KEY).record
    assert "verified" == checked.record.state and not checked.record.verified_on("sm80")
    assert (H200.label, 6) == (seen.device, seen.decisions)
    assert {"1", "8"} == set(seen.timing_ms) and seen.error <= seen.budget


def test_with_keys_what_is_built_and_verified_is_signed_and_a_forged_plan_is_built_again(
    artifact: Artifact, builder, gpu, monkeypatch: pytest.MonkeyPatch
):
    """A forged plan is neither run to verify it nor taken for one that is there already."""
    monkeypatch.setattr(verify, "DECISIONS", 4)
    build(order(artifact))
    monkeypatch.setenv("RALF_PLAN_PUBLIC_KEY", OURS.public)
    with pytest.raises(BadKey, match="set RALF_PLAN_SIGNING_KEY_FILE"):
        build(order(artifact))
    monkeypatch.setenv("RALF_PLAN_SIGNING_KEY", OURS.private)
    with pytest.raises(PlanRefused, match="not signed"):
        verify.verify(artifact, CPU, say=lambda line: None)
    assert not plans.plans(artifact)[0].record.verifications
    build(order(artifact))
    assert [] == plans.refused(artifact)
    [checked] = verify.verify(artifact, CPU, say=lambda line: None)

    assert checked.record.verified_on("sm90")
    assert [] == plans.refused(artifact, OURS.public)


def test_verifying_withdraws_what_disagrees(artifact: Artifact, builder, gpu, monkeypatch):
    """Nobody finds it again."""
    build(order(artifact))
    monkeypatch.setattr(verify, "DECISIONS", 4)
    gpu.shift = 1.0
    with pytest.raises(
        PlanRefused, match=r"differ by 1\.0000, budget 0\.2500; rtx1.* was withdrawn"
    ):
        verify.verify(artifact, CPU, say=lambda line: None)
    assert [] == plans.plans(artifact) == list(plans.engines(artifact).iterdir())


def test_a_plan_that_cannot_run_is_said_and_left(artifact: Artifact, builder, gpu, monkeypatch):
    """A driver's trouble is not the plan's fault."""
    build(order(artifact))

    def fails(*_: object, **__: object) -> None:
        raise EngineError("TensorRT made no execution context")

    monkeypatch.setattr(engine_trt.TrtEngine, "of", fails)
    with pytest.raises(PlanRefused, match="could not run: TensorRT made no execution context"):
        verify.verify(artifact, CPU, say=lambda line: None)
    assert "unverified" == plans.plan(artifact, KEY).record.state


def test_verifying_leaves_plans_of_other_machines_alone(
    artifact: Artifact, builder, gpu, monkeypatch
):
    """Another version's, another GPU's; nothing there is nothing to do."""
    assert [] == verify.verify(artifact, CPU)
    monkeypatch.setattr(build_rtx, "version", lambda: "1.7.1")
    build(order(artifact))
    told: list[str] = []

    assert [] == verify.verify(artifact, CPU, say=told.append)
    assert "left as it is" in told[0] and "needs tensorrt_rtx 1.7.1" in told[0]
    assert "unverified" == plans.plans(artifact)[0].record.state


class OnGpu(BuildRequest):
    """An order whose device passes for a GPU."""

    @property
    def on_gpu(self) -> bool:
        return True


def test_on_a_gpu_both_fronts_are_tried_and_the_faster_kept(
    artifact: Artifact, gpu, monkeypatch: pytest.MonkeyPatch
):
    """Verified at once, both timings in the record."""
    spent = {"plan": 2.0, "op": 1.0}

    def compiled(network, buckets, front):
        return Built(front.encode(), 1.0, {"front": front})

    def timed(engine, agreement):
        made = real(engine, agreement)
        return made.model_copy(update={"timing_ms": {"1": 1.0, "8": spent[gpu.front[-1]]}})

    real = building.verification
    monkeypatch.setattr(building, "verification", timed)
    monkeypatch.setattr(build_trt, "flavour", lambda: "trt")
    monkeypatch.setattr(build_trt, "version", lambda: "10.15.1.29")
    monkeypatch.setattr(build_trt, "build", compiled)
    made = build(OnGpu(artifact, buckets=(1, 8), crops=4, say=lambda line: None))

    assert "trt10.15.1.29-sm90-fp16-b8" == str(made.key)
    assert b"op" == made.read() and made.record.verified_on("sm90")
    assert {"plan", "op"} == set(made.record.options["fronts_ms"])
    fails_with(monkeypatch, "op")
    made = build(OnGpu(artifact, buckets=(1, 8), crops=4, again=True, say=lambda line: None))
    assert b"plan" == made.read()
    gpu.shift = 1.0
    with pytest.raises(
        PlanRefused,
        match=r"destructor in the plan,.* golden crops differ by 1\.0000.*not published",
    ):
        build(OnGpu(artifact, buckets=(1, 8), crops=4, again=True, say=lambda line: None))
    assert b"plan" == plans.plan(artifact, made.key).read()


def fails_with(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    """torch-tensorrt builds all but one way."""
    real = build_trt.build

    def compiled(network, buckets, front):
        if front == wrong:
            raise EngineError("torch-tensorrt does not build the network")
        return real(network, buckets, front)

    monkeypatch.setattr(build_trt, "build", compiled)


def test_without_onnx_the_message_says_what_to_install(artifact: Artifact, monkeypatch):
    """Not a bare ImportError."""
    monkeypatch.delitem(sys.modules, "ralf.kernels.export")
    monkeypatch.delattr("ralf.kernels.export")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(EngineError, match=r"needs onnx and onnxruntime.*\.\[build\]"):
        build(order(artifact))


def test_torch_tensorrt_is_asked_for_the_whole_network_in_its_own_types(
    monkeypatch: pytest.MonkeyPatch,
):
    """Faked at the library: what it is given runs, and equals the network."""
    torch.manual_seed(0)
    dimensions = {"base": 4, "blocks": 1, "backbone": "tf_efficientnet_lite0", "size": 32}
    network = network_of("ralf", **dimensions)
    settle(network, patterns(4, 32))
    network.eval().requires_grad_(False)
    asked: dict[str, object] = {}

    def convert(program, *, arg_inputs, **options):
        asked.update(options, program=program, inputs=arg_inputs)
        return b"plan"

    library = SimpleNamespace(
        Input=lambda **spec: spec,
        dynamo=SimpleNamespace(convert_exported_program_to_serialized_trt_engine=convert),
    )
    monkeypatch.setattr(build_trt, "_library", lambda: library)
    crops = torch.from_numpy(patterns(3, 32))
    built = build_trt.build(network, (1, 8), "op")
    got = asked["program"].module()(crops, *network.destroy(crops))

    assert (b"plan", "op") == (built.content, built.options["front"])
    torch.testing.assert_close(network(crops), got, rtol=1e-4, atol=1e-4)
    assert [(8, 3, 32, 32)] * 3 == [spec["max_shape"] for spec in asked["inputs"]]
    assert [torch.uint8, torch.float32, torch.float32] == [s["dtype"] for s in asked["inputs"]]
    for option in ("require_full_compilation", "disable_tf32", "immutable_weights"):
        assert asked[option] is True
    for option in ("cache_built_engines", "reuse_cached_engines"):
        assert asked[option] is False
    assert not Path(asked["timing_cache_path"]).parent.exists()


class LibrarysOwn(Exception):
    """As torch's SpecViolationError: no RuntimeError, and private."""


def test_any_failure_of_a_librarys_exporter_is_ours(monkeypatch: pytest.MonkeyPatch):
    """So that the other builder is tried; the library's reason is in the message."""

    def fails(*_: object, **__: object) -> None:
        raise LibrarysOwn("lifted_tensor_0 is not in the constants dictionary")

    monkeypatch.setattr(torch.export, "export", fails)
    network = network_of("ralf", base=4, blocks=1, backbone="tf_efficientnet_lite0", size=32)
    with pytest.raises(EngineError, match=r"LibrarysOwn: lifted_tensor_0 is not"):
        export.exported(network, 4)


def test_a_failed_conversion_of_one_front_leaves_the_other(
    artifact: Artifact, gpu, monkeypatch: pytest.MonkeyPatch
):
    """torch-tensorrt 2.11 raises UnboundLocalError after a conversion that failed."""

    def convert(program, *, arg_inputs, **options):
        if len(arg_inputs) == 1:
            raise UnboundLocalError("cannot access local variable 'engine'")
        return b"the plan behind the op"

    library = SimpleNamespace(
        Input=lambda **spec: spec,
        dynamo=SimpleNamespace(convert_exported_program_to_serialized_trt_engine=convert),
    )
    monkeypatch.setattr(build_trt, "_library", lambda: library)
    monkeypatch.setattr(build_trt, "flavour", lambda: "trt")
    monkeypatch.setattr(build_trt, "version", lambda: "10.15.1.29")
    said: list[str] = []
    made = build(OnGpu(artifact, buckets=(1, 8), crops=4, say=said.append))

    assert b"the plan behind the op" == made.read() and made.record.verified_on("sm90")
    assert any("UnboundLocalError: cannot access" in line for line in said)


@contextmanager
def quiet(capsys: pytest.CaptureFixture[str]):
    """What was printed meanwhile."""
    capsys.readouterr()
    said = SimpleNamespace()
    yield said
    said.out, said.err = capsys.readouterr()


def command(*words: str) -> Callable[[], int]:
    """`ralf build …`, ready to run."""
    parser = argparse.ArgumentParser()
    cli.add_build(parser.add_subparsers())
    args = parser.parse_args(["build", *words])
    return lambda: args.run(args)


def test_all_on_a_cpu_times_torch_and_the_fastest_is_loaded(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch, capsys
):
    """One line a device in engines/fastest.json; `load` takes what it says."""
    point_to(artifact.path.parent.parent, "tiny", artifact.version)
    monkeypatch.setattr(building, "available", list)
    monkeypatch.setattr(choose_engine, "REPEATS", 2)
    for winner in ("torch-fp32", "torch-bf16"):
        told = {"torch-fp32": 0.2, "torch-bf16": 0.4, winner: 0.1}

        def interleave(ways, told=told, **_):
            return {
                name: SimpleNamespace(median_s=told[name])
                for name in ways
                if not ways[name]().isnan().any()
            }

        monkeypatch.setattr(
            choose_engine, "offers", lambda manifest, device: ["torch-fp32", "torch-bf16"]
        )
        monkeypatch.setattr(choose_engine, "interleave", interleave)
        with quiet(capsys) as said:
            models = str(artifact.path.parent.parent)
            assert 0 == command("tiny", "--models", models, "--all", "--json", "--device", "cpu")()
        found = json.loads(said.out)["fastest"]

        assert winner == found["engine"] == plans.fastest(artifact, machine.describe(CPU)).engine
        assert {"torch-fp32", "torch-bf16"} == set(found["faces_per_s"])
        assert winner.removeprefix("torch-") == load(artifact, "cpu").precision


def test_an_engine_that_fails_is_left_out_of_the_race(artifact: Artifact, monkeypatch):
    """And said."""
    monkeypatch.setattr(choose_engine, "REPEATS", 1)
    monkeypatch.setattr(choose_engine, "offers", lambda manifest, device: ["torch-fp32", str(KEY)])
    told: list[str] = []
    measured = choose_engine.measure(artifact, CPU, batch=2, say=told.append)

    assert ["torch-fp32"] == list(measured.faces_per_s)
    assert f"{KEY}: left out: a plan runs on a GPU, not on cpu" in told


def test_the_command_prints_what_was_made_and_what_was_refused(artifact: Artifact, builder, capsys):
    """0 and a line; 1 and the reason; 2 for a batch that is none; 5 for no such model."""
    models = str(artifact.path.parent.parent)
    point_to(models, "tiny", artifact.version)
    words = ("tiny", "--models", models, "--batch", "1,8", "--crops", "4", "--device", "cpu")
    with quiet(capsys) as said:
        assert 0 == command(*words)()
    assert f"{KEY}  unverified" in said.out
    with quiet(capsys) as said:
        assert 0 == command(*words, "--json")()
    assert [str(KEY)] == [plan["key"] for plan in json.loads(said.out)["plans"]]
    builder.shift = 1.0
    with quiet(capsys) as said:
        assert 1 == command(*words, "--again")()
    assert "budget 0.2500" in said.err and said.out == ""
    with quiet(capsys) as said:
        assert 2 == command("tiny", "--models", models, "--batch", "1;8")()
        assert 5 == command("nobody", "--models", models)()
    assert b"plan 1" == plans.plan(artifact, KEY).read()


def test_a_plan_nobody_built_is_missed_with_the_command(artifact: Artifact):
    """That very command."""
    with pytest.raises(PlanMissing, match="ralf build tiny@"):
        plans.plan(artifact, KEY)
