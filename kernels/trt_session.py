"""A deserialised TensorRT plan on a GPU: contexts, buffers, workspaces, CUDA graphs.

Each bucket has an execution context, its buffers, and a workspace from torch's allocator, so that
running out of memory is torch's own error, which ralf.kernels.batching answers with half the batch.
Small batches spend their time launching kernels: there a CUDA graph is captured, timed against
plain launching, and kept where it is faster.  A captured graph is bound to its context's shapes
and addresses, which is why no two buckets share a context.

RTX plans are compiled for the GPU at hand when they first run, which takes seconds a bucket; the
result is kept in a file of the user's own, so that the next process starts at once.

The bindings come as an argument: standard TensorRT and TensorRT-RTX have the same interface.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog
import torch
from torch import Tensor

from ralf.kernels.cuda_graphs import capture
from ralf.kernels.engine import EngineError

log = structlog.get_logger()

GRAPH_MOST = 16
"""Larger batches keep the GPU busy for longer than their launches take."""
GRAPH_GAIN = 0.98
"""A graph is kept where it takes at most this share of the time of plain launching."""
TURNS = 5


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Make a GPU the current device: TensorRT loads a plan onto the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class Queue:
    """The engine's own CUDA stream; all CUDA calls are in this class, so a test can fake it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @property
    def handle(self) -> int:
        """What TensorRT takes."""
        return int(self.stream.cuda_stream)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Work inside runs on the stream, after the work already on the caller's stream."""
        # The crops may still be on their way on the caller's stream.
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            yield

    def finish(self) -> None:
        """Wait for the stream."""
        self.stream.synchronize()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """The work as one CUDA graph; inside a turn."""
        graph = torch.cuda.CUDAGraph()
        with capture(graph, self.device, self.stream):
            work()
        replay: Callable[[], None] = graph.replay
        return replay


@dataclass(eq=False)
class BucketState:
    """One bucket's context, buffers and workspace, which must all live equally long."""

    context: Any
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    workspace: Tensor
    launch: Callable[[], None]
    graphed: bool = False


@dataclass(eq=False)
class Session:
    """A deserialised plan on a device: run(bucket, crops) → its outputs."""

    trt: Any
    content: bytes = field(repr=False)
    queue: Queue
    device: torch.device
    cache: Path | None = None
    front: Callable[[Tensor], tuple[Tensor, ...]] | None = None
    """Computes the plan's further inputs from the crops, if it takes any: our fused kernel."""
    states: dict[int, BucketState] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.logger = self.trt.Logger(self.trt.Logger.WARNING)
        self.runtime = self.trt.Runtime(self.logger)
        with on_device(self.device):
            self.engine = self.runtime.deserialize_cuda_engine(self.content)
        if self.engine is None:
            raise EngineError(
                f"{self.trt.__name__} {self.trt.__version__} does not read the plan on "
                f"{self.device} (its reason is on stderr); build it again here"
            )
        # The engine has its own copy, and a plan holds all weights.
        self.content = b""
        # The order in which a runtime lists its tensors is not defined.
        names = sorted(
            (self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)), key=_place
        )
        modes = {name: self.engine.get_tensor_mode(name) for name in names}
        self.taken = [name for name in names if modes[name] == self.trt.TensorIOMode.INPUT]
        self.given = [name for name in names if modes[name] == self.trt.TensorIOMode.OUTPUT]
        if (len(self.taken) > 1) != (self.front is not None) or not self.given:
            raise EngineError(
                f"the plan takes {self.taken} and gives {self.given}, which does not go with "
                f"{'a' if self.front else 'no'} kernel in front of it; build it again"
            )
        self._configure()

    def _configure(self) -> None:
        """RTX: compile each shape once, and keep what was compiled."""
        self.config = self.compiled = None
        # Standard TensorRT: its plans hold compiled kernels already.
        if not hasattr(self.engine, "create_runtime_config"):
            return
        self.config = self.engine.create_runtime_config()
        self.config.set_execution_context_allocation_strategy(
            self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        # Lazy, the default, compiles in the background and swaps kernels under a captured graph.
        strategies = self.trt.DynamicShapesKernelSpecializationStrategy
        self.config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
        self.compiled = self.config.create_runtime_cache()
        # What is read here becomes code on the GPU, so a link to another file is not followed.
        if self.cache and self.cache.is_file() and not self.cache.is_symlink():
            self.compiled.deserialize(self.cache.read_bytes())
        self.config.set_runtime_cache(self.compiled)

    def remember(self) -> None:
        """Write what RTX compiled to a file; if that fails, only the next start is slower."""
        if self.compiled is None or self.cache is None:
            return
        data = bytes(self.compiled.serialize())
        try:
            self.cache.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Several workers may write at once: each replaces the whole file in one step.
            with tempfile.NamedTemporaryFile(dir=self.cache.parent, delete=False) as staging:
                staging.write(data)
            Path(staging.name).replace(self.cache)
        except OSError as error:
            log.info("engine.cache_not_kept", path=str(self.cache), reason=str(error))

    def run(self, bucket: int, crops: Tensor) -> tuple[Tensor, ...]:
        """Up to `bucket` crops; FP32 outputs of `bucket` rows on the CPU, padding included."""
        state = self.state(bucket)
        with self.queue.turn():
            state.inputs[0][: len(crops)].copy_(crops, non_blocking=True)
            # Rows beyond these crops are an older batch's: finite pixels whose scores are cut off.
            state.launch()
            # Copies: the next part overwrites the buffers.
            outputs = tuple(output.to("cpu", torch.float32, copy=True) for output in state.outputs)
        self.queue.finish()
        return outputs

    def state(self, bucket: int) -> BucketState:
        """The bucket's state, made on first use; torch's out-of-memory error goes to the caller."""
        if bucket not in self.states:
            with self.queue.turn():
                self.states[bucket] = self._make(bucket)
            self.queue.finish()
        return self.states[bucket]

    def drop(self, above: int) -> None:
        """Give back the memory of larger buckets."""
        # A state owns all that its bucket uses, so dropping it frees everything at once.
        self.states = {bucket: state for bucket, state in self.states.items() if bucket <= above}

    def _make(self, bucket: int) -> BucketState:
        context = self._context()
        inputs = tuple(self._input(context, name, bucket) for name in self.taken)
        # The workspace is sized for these shapes and handed over before anything runs.
        needed = int(context.update_device_memory_size_for_shapes())
        # At least one byte: an empty tensor has no address to hand over.
        workspace = torch.empty(max(needed, 1), dtype=torch.uint8, device=self.device)
        context.set_device_memory(workspace.data_ptr(), needed)
        outputs = []
        for name in self.given:
            output_shape = tuple(context.get_tensor_shape(name))
            output = torch.empty(output_shape, dtype=self._dtype(name), device=self.device)
            context.set_tensor_address(name, output.data_ptr())
            outputs.append(output)

        def launch() -> None:
            if self.front is not None:
                for target, made in zip(inputs[1:], self.front(inputs[0]), strict=True):
                    target.copy_(made)
            if not context.execute_async_v3(self.queue.handle):
                raise EngineError("TensorRT could not start the plan (its reason is on stderr)")

        state = BucketState(context, inputs, tuple(outputs), workspace, launch)
        launch()  # RTX compiles here; and a graph is captured only of what has run before
        self.queue.finish()
        if bucket <= GRAPH_MOST:
            self._try_graph(state)
        return state

    def _input(self, context: Any, name: str, bucket: int) -> Tensor:
        shape = (bucket, *tuple(self.engine.get_tensor_shape(name))[1:])
        # Zeros: the first launch runs before there are crops, and fresh memory may hold NaN.
        tensor = torch.zeros(shape, dtype=self._dtype(name), device=self.device)
        if not context.set_input_shape(name, shape):
            raise EngineError(f"the plan does not take {shape}; build it for that batch")
        context.set_tensor_address(name, tensor.data_ptr())
        return tensor

    def _context(self) -> Any:
        if self.config is not None:
            context = self.engine.create_execution_context(self.config)
        else:
            strategy = self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
            context = self.engine.create_execution_context(strategy)
        if context is None:
            raise EngineError("TensorRT made no execution context (its reason is on stderr)")
        return context

    def _dtype(self, name: str) -> torch.dtype:
        kinds = self.trt.DataType
        known = {
            kinds.UINT8: torch.uint8,
            kinds.HALF: torch.float16,
            kinds.BF16: torch.bfloat16,
            kinds.FLOAT: torch.float32,
        }
        kind = self.engine.get_tensor_dtype(name)
        if kind not in known:
            raise EngineError(f"the plan's {name} is {kind}; expected u8 or a float")
        return known[kind]

    def _try_graph(self, state: BucketState) -> None:
        # Not every flavour has this question; without it the capture itself shows the answer.
        capturable = getattr(state.context, "is_stream_capturable", None)
        if capturable is not None and not capturable(self.queue.handle):
            return
        plain = state.launch
        try:
            replay = self.queue.capture(plain)
        except (RuntimeError, EngineError) as error:
            log.info("engine.no_graph", batch=len(state.inputs[0]), reason=str(error))
            return
        if self._median(replay) <= GRAPH_GAIN * self._median(plain):
            state.launch, state.graphed = replay, True

    def _median(self, work: Callable[[], None]) -> float:
        spent = []
        for _ in range(TURNS):
            start = time.perf_counter()
            work()
            self.queue.finish()
            spent.append(time.perf_counter() - start)
        return sorted(spent)[TURNS // 2]


def _place(name: str) -> tuple[bool, int, str]:
    """The crops first; then by number: destroyed_0, destroyed_1, output2, output10."""
    return name != "crops", len(name), name
