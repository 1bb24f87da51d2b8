"""The plan's engine, with a runtime that is faked at its border: addresses, padding, refusals.

The fake reads and writes the memory whose addresses it was given, as the real one does, and the
queue runs on the CPU; all between is the engine's own.
"""

import ctypes
import math
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from structlog.testing import capture_logs

from ralf.kernels import engine_trt, machine, plans, trt_session
from ralf.kernels.artifact import Artifact, golden, open_artifact
from ralf.kernels.choose_engine import load
from ralf.kernels.engine import EngineError
from ralf.kernels.engine_torch import explainer, logits_of, restore
from ralf.kernels.engine_trt import TrtEngine, load_plan
from ralf.kernels.machine import describe
from ralf.kernels.plan_signature import Untrusted
from ralf.kernels.plans import Device, Key, Measured, Unverified
from ralf.kernels.trt_session import GRAPH_MOST, Session
from ralf.kernels.untrained import patterns, publish_untrained
from tests.test_plan_signature import OURS

CPU = torch.device("cpu")
SIZE = 64
KEY = Key("rtx", "1.4.0.76", ("sm80", "sm90"), "fp16", 8)
H200 = Device("NVIDIA H200", "sm90", {"rtx": "1.4.0.76"})
CHECKED = {"device": H200.label, "error": 0.01, "budget": 0.05, "at": "2026-11-20T10:00:00+00:00"}
TYPES = {"u8": np.uint8, "f16": np.float16, "f32": np.float32}


def at_address(address: int, shape: tuple[int, ...], kind: str) -> np.ndarray:
    """The memory that a tensor's address names."""
    flat = (ctypes.c_uint8 * (math.prod(shape) * np.dtype(TYPES[kind]).itemsize)).from_address(
        address
    )
    return np.frombuffer(flat, TYPES[kind]).reshape(shape)


class FakeContext:
    """What TensorRT's execution context does, as far as the session asks."""

    def __init__(self, engine: "FakeEngine") -> None:
        self.engine = engine
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.memory = 0

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = tuple(shape)
        return shape[0] <= self.engine.most

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (self.shapes[self.engine.inputs[0]][0],)

    def update_device_memory_size_for_shapes(self) -> int:
        assert self.shapes, "shapes come first"
        return 1000 * self.shapes[self.engine.inputs[0]][0]

    def set_device_memory(self, address: int, size: int) -> None:
        self.memory = size

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def is_stream_capturable(self, stream: int) -> bool:
        return self.engine.capturable

    def execute_async_v3(self, stream: int) -> bool:
        batch = self.shapes[self.engine.inputs[0]][0]
        assert self.memory >= 1000 * batch, "the workspace comes before the first run"
        self.engine.ran.append(batch)
        kinds = dict.fromkeys(self.engine.inputs, "f32") | {"crops": "u8"}
        values = [
            at_address(self.addresses[name], self.shapes[name], kinds[name])
            for name in self.engine.inputs
        ]
        at_address(self.addresses["logits"], (batch,), "f32")[:] = self.engine.score(*values)
        return not self.engine.broken


class FakeEngine:
    """A deserialised plan."""

    def __init__(self, score: Callable[..., np.ndarray], most: int = 64) -> None:
        self.score, self.most = score, most
        self.inputs = ["crops"]
        self.ran: list[int] = []
        self.capturable, self.broken = True, False
        self.compiled = b"compiled"
        self.contexts: list[FakeContext] = []

    @property
    def num_io_tensors(self) -> int:
        return 1 + len(self.inputs)

    def get_tensor_name(self, place: int) -> str:
        return ["logits", *reversed(self.inputs)][place]  # in an order of its own

    def get_tensor_mode(self, name: str) -> str:
        return "out" if name == "logits" else "in"

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, 3, SIZE, SIZE)

    def get_tensor_dtype(self, name: str) -> str:
        return "u8" if name == "crops" else "f32"

    def create_runtime_config(self) -> SimpleNamespace:
        cache = SimpleNamespace(
            deserialize=lambda data: setattr(self, "compiled", data),
            serialize=lambda: self.compiled,
        )
        return SimpleNamespace(
            set_execution_context_allocation_strategy=lambda strategy: None,
            create_runtime_cache=lambda: cache,
            set_runtime_cache=lambda cache: True,
        )

    def create_execution_context(self, config: object) -> FakeContext:
        self.contexts.append(FakeContext(self))
        return self.contexts[-1]


def bindings(engine: FakeEngine | None, version: str = "1.4.0.76") -> SimpleNamespace:
    """The module, with this one plan in it."""

    class Logger:
        WARNING = 1

        def __init__(self, level: int) -> None:
            pass

    return SimpleNamespace(
        __name__="tensorrt_rtx",
        __version__=version,
        Logger=Logger,
        Runtime=lambda logger: SimpleNamespace(deserialize_cuda_engine=lambda content: engine),
        TensorIOMode=SimpleNamespace(INPUT="in", OUTPUT="out"),
        DataType=SimpleNamespace(UINT8="u8", HALF="f16", BF16="bf16", FLOAT="f32"),
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED=2),
        DynamicShapesKernelSpecializationStrategy=SimpleNamespace(EAGER=1),
    )


class FakeQueue:
    """The stream's place, on the CPU: everything is done when it is asked for."""

    handle = 7

    def __init__(self, device: torch.device) -> None:
        self.captured = 0

    @contextmanager
    def turn(self) -> Iterator[None]:
        yield

    def finish(self) -> None:
        pass

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        self.captured += 1
        return work


@pytest.fixture(scope="module")
def published_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One tiny untrained model."""
    root = tmp_path_factory.mktemp("models")
    publish_untrained(root, name="tiny", base=4, blocks=1, size=SIZE, golden_crops=4)
    return root


@pytest.fixture
def artifact(published_once: Path) -> Artifact:
    """The model."""
    [version] = (published_once / "tiny").glob("????????")
    return open_artifact(version)


@pytest.fixture
def own(artifact: Artifact, tmp_path: Path) -> Artifact:
    """A copy of it, to put engines beside."""
    return open_artifact(shutil.copytree(artifact.path, tmp_path / "tiny" / artifact.version))


def scores(crops: np.ndarray) -> np.ndarray:
    """A cheap network: each crop's own number, and each pixel has a say in it."""
    weights = np.random.default_rng(5).normal(size=crops.shape[1:]).astype(np.float32)
    return (crops.astype(np.float32) / 255 * weights).sum((1, 2, 3), dtype=np.float64) / 64


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeEngine:
    """A plan that a fake H200 can run."""
    made = FakeEngine(scores)
    monkeypatch.setattr(engine_trt, "describe", lambda device: H200)
    monkeypatch.setattr(engine_trt, "runtime_module", lambda flavour: bindings(made))
    monkeypatch.setattr(engine_trt, "Queue", FakeQueue)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return made


@pytest.fixture
def engine(artifact: Artifact, plan: FakeEngine) -> TrtEngine:
    """The engine around it, warmed."""
    made = TrtEngine.of(artifact, KEY, b"plan", (1, 4, 8), device=CPU)
    plan.ran.clear()
    return made


def put(artifact: Artifact, content: bytes, key: Key = KEY, *architectures: str) -> plans.Plan:
    """Publish a plan of these bytes."""
    record = {
        "key": str(key),
        "builder": "rtx-aot",
        "buckets": (1, 8),
        "state": "verified" if architectures else "unverified",
        "verifications": dict.fromkeys(architectures, CHECKED),
        "at": "2026-11-20T10:00:00+00:00",
    }
    with plans.building(artifact):
        return plans.write_plan(artifact, content, record)


@pytest.mark.parametrize("count", [0, 1, 3, 8, 11])
def test_any_number_of_crops_gives_the_networks_logits(engine: TrtEngine, count: int):
    """Padding is cut off, parts come back in order."""
    crops = torch.from_numpy(patterns(max(count, 1), SIZE, seed=4))[:count]
    got = engine(crops)

    assert ((count,), torch.float32, CPU) == (got.shape, got.dtype, got.device)
    if count:
        np.testing.assert_allclose(scores(crops.numpy()), got.numpy(), atol=1e-5)


def test_only_buckets_run(engine: TrtEngine, plan: FakeEngine):
    """Each batch is one of those that the plan was warmed for."""
    engine(torch.from_numpy(patterns(11, SIZE)))

    assert set(plan.ran) <= {1, 4, 8}
    assert (str(KEY), "fp16", "cpu") == (engine.name, engine.precision, engine.device)


def test_buffers_are_kept_and_no_two_buckets_share_a_context(engine: TrtEngine, plan: FakeEngine):
    """Warming made them all; scoring makes none, and writes into the same memory."""
    before = [dict(context.addresses) for context in plan.contexts]
    for _ in range(3):
        engine(torch.from_numpy(patterns(13, SIZE)))

    assert 3 == len(plan.contexts)
    assert before == [context.addresses for context in plan.contexts]
    assert 3 == len({context.addresses["crops"] for context in plan.contexts})


def test_crops_of_another_shape_or_type_are_refused(engine: TrtEngine):
    """As by every engine."""
    with pytest.raises(EngineError, match=r"takes crops u8 \[m,3,64,64\]"):
        engine(torch.zeros(1, 3, SIZE, SIZE))


def test_memory_that_runs_out_halves_the_batch_once_and_for_all(
    artifact: Artifact, plan: FakeEngine, monkeypatch: pytest.MonkeyPatch
):
    """Found out while warming; later calls know it, and the logits are the same."""
    make, asked = Session._make, []

    def small_gpu(session: Session, bucket: int) -> object:
        asked.append(bucket)
        if bucket > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return make(session, bucket)

    monkeypatch.setattr(Session, "_make", small_gpu)
    engine = TrtEngine.of(artifact, KEY, b"plan", (1, 16), device=CPU)
    asked.clear()
    crops = patterns(10, SIZE)
    got = engine(torch.from_numpy(crops))

    assert [] == asked
    assert 4 == engine.batching.most
    np.testing.assert_allclose(scores(crops), got.numpy(), atol=1e-5)


def test_small_batches_try_a_graph_and_keep_it_where_it_is_faster(
    artifact: Artifact, plan: FakeEngine, monkeypatch: pytest.MonkeyPatch
):
    """Large ones do not; a context that cannot be captured does not."""
    times = {True: iter([]), False: iter([])}

    def clock(session: Session, work: Callable[[], None]) -> float:
        return next(times[work.__name__ == "launch"])

    monkeypatch.setattr(Session, "_median", clock)

    def queue(device: torch.device) -> FakeQueue:
        made = FakeQueue(device)

        def capture(work: Callable[[], None]) -> Callable[[], None]:
            made.captured += 1

            def replay() -> None:
                work()

            return replay

        made.capture = capture  # type: ignore[method-assign]
        return made

    monkeypatch.setattr(engine_trt, "Queue", queue)
    # buckets are made largest first: 8 then 1; replays, then plain launches
    times = {False: iter([0.9, 1.0]), True: iter([1.0, 1.0])}
    engine = TrtEngine.of(artifact, KEY, b"plan", (1, 8, GRAPH_MOST + 1), device=CPU)
    graphed = {bucket: state.graphed for bucket, state in engine.session.states.items()}

    assert 2 == engine.session.queue.captured
    assert {1, 8, GRAPH_MOST + 1} == set(graphed)
    assert 1 == sum(graphed.values()) and not graphed[GRAPH_MOST + 1]
    plan.capturable = False
    plain = TrtEngine.of(artifact, KEY, b"plan", (1, 8), device=CPU)
    assert 0 == plain.session.queue.captured


def test_a_capture_that_fails_leaves_plain_launches(
    artifact: Artifact, plan: FakeEngine, monkeypatch: pytest.MonkeyPatch
):
    """Said in the log; the engine works."""

    def fails(queue: FakeQueue, work: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(FakeQueue, "capture", fails)
    engine = TrtEngine.of(artifact, KEY, b"plan", (1, 8), device=CPU)

    assert [False, False] == [state.graphed for state in engine.session.states.values()]
    assert 3 == len(engine(torch.from_numpy(patterns(3, SIZE))))


def test_what_rtx_compiled_is_kept_for_the_next_process(
    artifact: Artifact, plan: FakeEngine, tmp_path: Path
):
    """In the user's own folder, and read back from there."""
    TrtEngine.of(artifact, KEY, b"plan", (1,), device=CPU)
    [kept] = (tmp_path / "cache" / "ralf").iterdir()
    kept.write_bytes(b"of an earlier process")
    TrtEngine.of(artifact, KEY, b"plan", (1,), device=CPU)

    assert b"of an earlier process" == plan.compiled
    assert 0 == (kept.parent.stat().st_mode & 0o077)


def test_a_cache_that_cannot_be_written_costs_only_time(
    artifact: Artifact, plan: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A file where the folder should be."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))

    assert TrtEngine.of(artifact, KEY, b"plan", (1,), device=CPU).name == str(KEY)


def test_what_a_plan_judged_by_is_shown_by_torch(engine: TrtEngine):
    """A plan gives logits alone; the pictures are the same model's, and made when asked for."""
    torch_engine = explainer(engine)
    assert torch_engine is explainer(engine) and torch_engine is not None
    shown = torch_engine.explain(torch.from_numpy(patterns(1, SIZE)))

    assert (1, 3, SIZE, SIZE) == shown.residual.shape
    assert torch_engine is explainer(torch_engine)
    assert explainer(SimpleNamespace()) is None


def test_a_kernel_in_front_makes_the_plans_other_inputs(artifact: Artifact):
    """From the padded crops, in the plan's own buffers."""
    made = FakeEngine(lambda crops, one, two: one.mean((1, 2, 3)) + two[:, 0, 0, 0])
    made.inputs = ["crops", "destroyed_0", "destroyed_1"]
    front = lambda crops: (crops.float() * 2, torch.ones(crops.shape))  # noqa: E731
    session = Session(bindings(made), b"plan", FakeQueue(CPU), CPU, None, front)
    crops = torch.from_numpy(patterns(3, SIZE))
    [got] = session.run(4, crops)

    torch.testing.assert_close(crops.float().mean((1, 2, 3)) * 2 + 1, got[:3])
    with pytest.raises(EngineError, match="no kernel in front"):
        Session(bindings(made), b"plan", FakeQueue(CPU), CPU)
    made.inputs = ["crops"]
    with pytest.raises(EngineError, match="a kernel in front"):
        Session(bindings(made), b"plan", FakeQueue(CPU), CPU, None, front)


def test_what_the_runtime_refuses_is_an_error_with_a_cure(artifact: Artifact, plan: FakeEngine):
    """A plan that does not read, a batch beyond the profile, a run that does not start."""
    with pytest.raises(EngineError, match=r"does not read the plan.*build it again"):
        Session(bindings(None), b"plan", FakeQueue(CPU), CPU)
    plan.most = 8
    with pytest.raises(EngineError, match="build it for that batch"):
        TrtEngine.of(artifact, KEY, b"plan", (1, 16), device=CPU)
    plan.broken = True
    with pytest.raises(EngineError, match="could not start"):
        TrtEngine.of(artifact, KEY, b"plan", (1, 8), device=CPU)


@pytest.mark.parametrize(
    ("here", "version", "message"),
    [
        (Device("RTX 6000", "sm120", {"rtx": "1.4.0.76"}), "1.4.0.76", "RTX 6000 is sm120"),
        (H200, "1.7.1", r"needs tensorrt_rtx 1\.4\.0\.76, here is 1\.7\.1"),
    ],
)
def test_another_gpu_or_version_is_refused(
    artifact: Artifact, plan, monkeypatch, *, here, version, message
):
    """With the command that builds one here."""
    monkeypatch.setattr(engine_trt, "describe", lambda device: here)
    monkeypatch.setattr(engine_trt, "runtime_module", lambda flavour: bindings(plan, version))
    with pytest.raises(EngineError, match=message + ".*build one here: ralf build tiny@"):
        TrtEngine.of(artifact, KEY, b"plan", (1, 8), device=CPU)


def test_a_verified_plan_loads_by_its_key(own: Artifact, plan: FakeEngine):
    """And agrees with the golden crops, through `load`, where it was measured fastest."""
    network = restore(own.manifest, own.read("weights.safetensors"))
    plan.score = lambda crops: logits_of(network, crops)
    put(own, b"the plan", KEY, "sm90")
    named = load_plan(own, CPU, str(KEY))

    assert str(KEY) == named.name
    np.testing.assert_allclose(
        golden(own).logits, named(torch.from_numpy(golden(own).crops)), atol=1e-4
    )
    measured = Measured(engine=str(KEY), faces_per_s={str(KEY): 1000.0}, batch=8, at="now")
    from ralf.kernels.machine import describe

    with plans.building(own):
        plans.record_fastest(own, describe(CPU), measured)
    assert str(KEY) == load(own).name
    assert "torch" == load(own, precision="fp32").name
    # The very plan that ran a moment ago, on a machine that has keys and finds no signature.
    with pytest.raises(Untrusted, match="not signed"):
        load_plan(own, CPU, str(KEY), public_key=OURS.public)
    with capture_logs() as logged:
        assert "torch" == load(own, plan_public_key=OURS.public).name
    assert [("plan.refused", "torch")] == [(e["event"], e.get("instead")) for e in logged]


def test_an_unverified_or_damaged_plan_does_not_load(own: Artifact, plan: FakeEngine):
    """Nor one of another GPU that somebody names."""
    made = put(own, b"the plan", KEY, "sm80")
    with pytest.raises(Unverified, match="ralf models verify tiny@"):
        load_plan(own, CPU, str(KEY))
    ada = Key("rtx", "1.4.0.76", ("sm89",), "fp16", 8)
    put(own, b"for ada", ada, "sm89")
    with pytest.raises(EngineError, match="is for sm89, NVIDIA H200 is sm90"):
        load_plan(own, CPU, str(ada))
    made = put(own, b"the plan", KEY, "sm90")
    made.path.write_bytes(b"the plot")
    with pytest.raises(plans.Damaged, match="truncated or changed"):
        load_plan(own, CPU, str(KEY))


def test_a_plan_that_is_replaced_while_it_is_read_is_read_again(
    own: Artifact, plan: FakeEngine, monkeypatch: pytest.MonkeyPatch
):
    """The record was the old one's, its file has gone."""
    put(own, b"old", KEY, "sm90")
    read, contents = plans.Plan.read, []

    def meanwhile(found: plans.Plan) -> bytes:
        if not contents:
            put(own, b"new", KEY, "sm90")
        contents.append(found.record.file)
        return read(found)

    monkeypatch.setattr(plans.Plan, "read", meanwhile)
    load_plan(own, CPU, str(KEY))

    assert 2 == len(contents) == len(set(contents))


def test_what_is_installed_is_told_without_importing_it(monkeypatch: pytest.MonkeyPatch):
    """By the packages' own metadata, whatever CUDA they were built for."""
    versions = {"tensorrt-rtx-cu13": "1.4.0.76"}

    def version(name: str) -> str:
        if name not in versions:
            raise machine.PackageNotFoundError(name)
        return versions[name]

    found = lambda name: None if name == "tensorrt" else object()  # noqa: E731
    monkeypatch.setattr(machine, "version", version)
    monkeypatch.setattr(machine, "find_spec", found)

    assert {"rtx": "1.4.0.76"} == machine.installed_runtimes()


def test_the_session_knows_nothing_of_cuda_but_its_queue():
    """So that what is tested here is what runs there."""
    text = Path(trt_session.__file__).read_text()

    assert text.count("torch.cuda.") == text.split("class BucketState")[0].count("torch.cuda.")


@pytest.mark.gpu
@pytest.mark.parametrize("builder", ["torch-tensorrt", "rtx-aot"])
def test_a_plan_built_and_run_on_this_gpu_agrees_with_torch(own: Artifact, builder: str):
    """Any batch, from either side of the bus, from two threads; found again by its key."""
    from ralf.kernels.build import BuildRequest, available, build

    if builder not in available():
        pytest.skip(f"{builder} is not installed here")
    place = torch.device("cuda", 0)
    made = build(BuildRequest(own, buckets=(1, 4, 8), device=place, crops=16, say=print), builder)  # type: ignore[arg-type]
    engine = load_plan(own, place, str(made.key))
    crops = torch.from_numpy(patterns(11, SIZE, seed=6))
    expected = restore(own.manifest, own.read("weights.safetensors"))(crops)
    budget = own.manifest.error_budget["logit"]

    assert made.record.verified_on(describe(place).architecture)
    for count in (1, 3, 8, 11):
        torch.testing.assert_close(expected[:count], engine(crops[:count]), atol=budget, rtol=0)
    torch.testing.assert_close(engine(crops), engine(crops.to(place)), atol=1e-3, rtol=0)
    with ThreadPoolExecutor(2) as threads:
        for got in threads.map(engine, [crops] * 4):
            torch.testing.assert_close(expected, got, atol=budget, rtol=0)
    with pytest.raises(EngineError, match="does not read the plan"):
        Session(
            engine_trt.runtime_module(made.key.flavour),
            b"junk" * 99,
            trt_session.Queue(place),
            place,
        )
