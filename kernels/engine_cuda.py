"""A network on CUDA: compiled once for each bucket, on a stream of its own.

torch.compile makes one program per batch size when the engine is loaded, and never later: compiling
may take minutes, and a job that waits for it seems to hang.  So crops come in the buckets of
ralf.kernels.batching.  A size without a program (memory ran out and the batch was halved) runs
eagerly.  If compiling fails everything runs eagerly, and the log gives the reason once.

Everything runs in one thread of the engine's own, whichever thread asks.  torch.compile ties a
program to settings of the thread it was made in, such as set_num_threads and inference mode: called
from a thread with others, each bucket would be compiled once more, in the middle of a job.
(torch.compiler.set_stance("eager_on_recompile") would prevent that too, but holds for the whole
process, and so would keep a model that loads meanwhile from being compiled.)

Crops from the CPU go over by pinned memory, which the host fills while the device computes the
batch before.  One caller at a time.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import structlog
import torch
from torch import Tensor, nn

from ralf.kernels.batching import BUCKETS, Batching

PROGRAMS = 64
"""Programs that one class of network may have in a process: models × buckets.  torch's own limit
is 8; beyond it torch would run eagerly without any message."""

log = structlog.get_logger()


def buckets_of(max_batch: int) -> tuple[int, ...]:
    """The usual buckets, up to this one."""
    return (*(size for size in BUCKETS if size < max_batch), max_batch)


def c_compiler() -> str | None:
    """The compiler that Triton would use here for what starts its kernels; None: it has none."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


def stream_of(device: torch.device) -> torch.cuda.Stream | None:
    """A new stream; None on a CPU, where the tests run this file."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]


class OnCuda:
    """Runs u8 crops [m, 3, s, s] through a placed network; FP32 logits [m] on the CPU."""

    def __init__(
        self,
        network: nn.Module,
        device: torch.device,
        *,
        side: int,
        buckets: Sequence[int] = BUCKETS,
        compiled: bool = True,
        backend: str | Callable[..., object] = "inductor",
    ) -> None:
        self.network, self.device, self.side = network, device, side
        self.batching = Batching(buckets)
        self.stream = stream_of(device)
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self.ready: set[int] = set()
        self.program: Callable[[Tensor], Tensor] | None = None
        if compiled:
            self.program = torch.compile(network, dynamic=False, backend=backend)
        self.thread.submit(self._warm).result()

    @property
    def compiled(self) -> bool:
        """Whether compiling worked for at least one bucket."""
        return bool(self.ready)

    def __call__(self, crops: Tensor) -> Tensor:
        """Any m ≥ 1, on the CPU or on the device."""
        # Asked here, because each thread has a current stream of its own.
        made_on = None if self.stream is None else torch.cuda.current_stream(self.device)
        return self.thread.submit(self._run, crops, made_on).result()

    def _run(self, crops: Tensor, made_on: torch.cuda.Stream | None = None) -> Tensor:
        with torch.inference_mode(), self.on_stream(crops, made_on):
            # Copied within the stream: on another one, the copy would not wait for the kernels.
            return self.batching(crops, self._score).cpu()

    @contextmanager
    def on_stream(self, crops: Tensor, made_on: torch.cuda.Stream | None) -> Iterator[None]:
        """Run on our stream, after the work that made the crops on theirs."""
        if self.stream is None:
            yield
            return
        if made_on is not None:
            self.stream.wait_stream(made_on)
        if crops.is_cuda:  # so that their memory is not reused before this stream has read it
            crops.record_stream(self.stream)
        with torch.cuda.stream(self.stream):
            yield

    def _score(self, part: Tensor, bucket: int) -> Tensor:
        run = self.program if self.program is not None and bucket in self.ready else self.network
        return run(self._batch(part, bucket)).float()

    def _batch(self, part: Tensor, bucket: int) -> Tensor:
        """The part, filled up with zeros, on the device.

        Always a new tensor made in inference mode: the caller's may have other strides or come
        from outside that mode, and torch.compile would make another program for it.
        """
        pinned = self.stream is not None and not part.is_cuda
        shape = (bucket, *part.shape[1:])
        batch = torch.empty(shape, dtype=part.dtype, device=part.device, pin_memory=pinned)
        batch[: len(part)] = part
        batch[len(part) :] = 0
        # The pinned batch may go out of scope at once: torch keeps its memory until the copy is
        # done.
        return batch.to(self.device, non_blocking=True)

    def _warm(self) -> None:
        """Compile for every bucket and call each once, so that no job pays for a first call."""
        blank = torch.zeros((1, 3, self.side, self.side), dtype=torch.uint8)
        for bucket in self.batching.buckets:
            self._compile(blank, bucket)
        self._run(blank.expand(self.batching.most, -1, -1, -1))  # halves a batch that does not fit
        for bucket in self.batching.buckets:
            self._run(blank.expand(bucket, -1, -1, -1))

    def _compile(self, blank: Tensor, bucket: int) -> None:
        """Compile for this bucket; if that fails, all buckets run eagerly."""
        if self.program is None:
            return
        import torch._dynamo.config as dynamo  # seconds to import, and only needed here

        room = dynamo.patch(recompile_limit=PROGRAMS)
        try:
            # In inference mode as every later call: in another mode torch would compile once more.
            with room, torch.inference_mode(), self.on_stream(blank, None):
                self.program(self._batch(blank, bucket))
        # A RuntimeError too, so it comes before the general case.
        except torch.OutOfMemoryError:
            return  # the warm-up call will halve the bucket
        # torch's own errors are RuntimeErrors; a missing compiler or ptxas raises the others.
        except (RuntimeError, ImportError, OSError) as error:
            reason = " ".join(str(error).split())[:500] or type(error).__name__
            log.warning("engine.compile_failed", batch=bucket, reason=reason)
            self.program = None
            self.ready.clear()
        else:
            self.ready.add(bucket)
