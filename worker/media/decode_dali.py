"""The GPU decoder: DALI over NVDEC, several clips at once, pixels directly in torch's memory.

One clip keeps only one of the chip's decoders busy, so the speed depends on how many clips are
decoded at once.  Jobs ask from their own threads for one chunk of one clip at a time; the requests
that arrive while DALI is busy are its next batch (DecodeQueue).

DALI gets explicit frame numbers, those of sampling.plan, and never more than a chunk holds, so a
container's claims decide no allocation.  It numbers frames by presentation time, as the probe does,
wherever routing.refusal gives no reason against it.  It has neither rotation nor any matrix but
BT.601; both are corrected on the device, by colour.py's policy and the probe's rotation.  The
pixels are copied to a new tensor before DALI's own memory is used again.

A clip that DALI refuses or fails on is decoded by PyAV, and a warning says so.  DALI's error fails
a whole batch without saying which clip caused it, and leaves the pipeline unusable; all jobs wait
while another is built.  So the clips of such a batch are tried one by one in the next pipeline, and
the last of them, if all others decode, is not tried at all: one bad clip costs two pipelines at
most, and one where it is the only new clip of its batch.  A file that failed is remembered by its
size and its ends, and PyAV decodes it from then on: in the second pass, in a retry, in a later job.

Limits: NVDEC hides damage inside a picture without a word, where the CPU decoder takes a neighbour
and warns.  Memory: at most BATCH_CHUNKS chunks at once in DALI's memory, and as much again in
torch's; besides, DALI keeps up to 100 NVDEC sessions, one for each picture size it has met.

device="cpu" is DALI's software decoder for VP9 and MJPEG.  It needs no GPU, and is for tests.
"""

import copy
import ctypes
import hashlib
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ralf.worker.errors import Infrastructure, JobError
from ralf.worker.media.colour import from_bt601
from ralf.worker.media.decode_pyav import PyavDecoder, frames_per_chunk, range_in_stream
from ralf.worker.media.routing import Backend, refusal
from ralf.worker.media.sampling import plan
from ralf.worker.media.types import Clip, Frames, Probe
from ralf.worker.shared_work import SharedWork

CLIPS_AT_ONCE = 8
"""H200's NVDEC has seven decoders; 588, 1,926 and 2,924 frames/s were measured with 1, 4 and 8."""
BATCH_CHUNKS = 4
"""The pixels of one batch, in chunks."""
ENDS = 2**16
"""Bytes of a file's beginning and of its end, by which it is remembered."""
MOST_FAILED = 4096
"""Files remembered because DALI failed on them; the oldest is forgotten first."""
PIXELS_A_PASS = 4 * 1920 * 1080
"""Pixels converted at once: 100 MB in FP32, and as much again for the result."""


def dali_version() -> str | None:
    """The name and version of the DALI that is installed."""
    for name in ("nvidia-dali-cuda130", "nvidia-dali-cuda120"):
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    return None


def nvdec_present() -> bool:
    """Whether the driver's decoding library can be loaded; containers often lack it."""
    try:
        ctypes.CDLL("libnvcuvid.so.1")
    except OSError:
        return False
    return True


@dataclass(eq=False)
class FrameRequest:
    """Frames wanted of one clip, and then their pixels or an error."""

    probe: Probe
    data: NDArray[np.uint8] = field(repr=False)
    wanted: NDArray[np.int64]
    file: bytes = b""
    """The name by which a failure of this file is remembered."""
    known: bool = False
    """DALI has decoded an earlier chunk of this clip, so another clip is the likelier to fail."""
    pixels: Tensor | None = field(default=None, repr=False)  # u8 [n, 3, h, w]
    error: str = ""

    @property
    def answered(self) -> bool:
        """Whether it has pixels or an error."""
        return self.pixels is not None or bool(self.error)

    @property
    def bytes(self) -> int:
        """The size of its decoded pixels."""
        return 3 * len(self.wanted) * self.probe.width * self.probe.height


class DecodeQueue:
    """Requests from several threads, decoded together by whichever thread is free.

    First come, first served.  A request is one chunk: a long clip queues anew for each of its
    chunks, so it does not delay short clips.
    """

    def __init__(
        self, decode: Callable[[Sequence[FrameRequest]], None], most: int, most_bytes: int
    ) -> None:
        self.decode, self.most, self.most_bytes = decode, most, most_bytes
        self.waiting: deque[FrameRequest] = deque()
        self.shared = SharedWork(self._take, self._answer)

    def ask(self, requests: Sequence[FrameRequest]) -> None:
        """Return when each request has its pixels or its error."""
        with self.shared.changed:
            self.waiting.extend(requests)
        self.shared.until(lambda: all(request.answered for request in requests))

    def _answer(self, batch: Sequence[FrameRequest]) -> None:
        try:
            self.decode(batch)
        finally:
            # Whatever happened, no thread may wait for an answer that never comes.
            for request in batch:
                if not request.answered:
                    request.error = "the batch was given up"

    def _take(self) -> list[FrameRequest]:
        """As many of the first requests as fit in one batch, and one at least."""
        # Never empty: the calling thread's request has no answer, and no other thread is working.
        # The first goes even where it is larger than the room, or it would wait for ever.
        batch = [self.waiting.popleft()]
        room = self.most_bytes - batch[0].bytes
        while self.waiting and len(batch) < self.most and self.waiting[0].bytes <= room:
            batch.append(self.waiting.popleft())
            room -= batch[-1].bytes
        return batch


class DaliDecoder:
    """Clips in, chunks of at most `chunk_bytes` out; may be asked from several threads at once."""

    name = "dali"

    def __init__(
        self,
        fallback: PyavDecoder,
        *,
        device: str | torch.device = "cuda",
        chunk_bytes: int = 512 * 1024**2,
        clips_at_once: int = CLIPS_AT_ONCE,
    ) -> None:
        if chunk_bytes < 1:
            raise ValueError(f"chunk_bytes should be positive, got {chunk_bytes}")
        self.device = torch.device(device)
        self.backend: Backend = "mixed" if self.device.type == "cuda" else "cpu"
        self.chunk_bytes = chunk_bytes
        self.clips_at_once = clips_at_once
        self.fallback = fallback
        self._pipeline: Any = None
        self._failed: OrderedDict[bytes, str] = OrderedDict()
        """Why DALI failed on a file, by its fingerprint."""
        self._queue = DecodeQueue(self._decoded, clips_at_once, BATCH_CHUNKS * chunk_bytes)

    def decode(self, clips: Sequence[Clip]) -> Iterator[Frames]:
        """The clips' chunks as they come, up to `clips_at_once` clips side by side."""
        waiting = deque(clips)
        active: list[Iterator[FrameRequest | Frames]] = []
        failed: list[JobError] = []
        while waiting or active:
            while waiting and len(active) < self.clips_at_once:
                active.append(self._steps(waiting.popleft()))
            requests = []
            for steps in tuple(active):
                try:
                    while isinstance(step := next(steps), Frames):
                        yield step
                    requests.append(step)
                except StopIteration:
                    active.remove(steps)
                except JobError as error:
                    failed.append(error)
                    active.remove(steps)
            self._queue.ask(requests)
        if failed:
            raise failed[0]

    def refusal(self, probe: Probe) -> str:
        """Why PyAV decodes this clip; empty where DALI does."""
        why = refusal(probe, self.backend)
        if why or self.backend == "cpu" or probe.colour_range != "pc":
            return why
        # NVDEC's parser reads the bitstream's own flag, and for VP9 perhaps none.
        in_stream = probe.codec != "vp9" and range_in_stream(probe) == "pc"
        return "" if in_stream else "full range that the bitstream itself does not say"

    def halved(self) -> "DaliDecoder":
        """The same with chunks of half the size, for when the device's memory has run out."""
        # Shallow: both ask the same queue, so one pipeline runs one batch at a time.
        other = copy.copy(self)
        other.chunk_bytes = max(1, self.chunk_bytes // 2)
        other.fallback = self.fallback.halved()
        return other

    def warm(self) -> None:
        """Build the pipeline, so that what is missing is known before the first clip."""
        try:
            self._pipeline = self._built()
        except Exception as error:  # the border to DALI: C++ throws what it likes
            raise Infrastructure(f"DALI cannot start: {error}") from error

    def _steps(self, clip: Clip) -> Iterator[FrameRequest | Frames]:
        """One clip: requests to be answered, and the frames of each answer."""
        probe, wanted, done = clip.probe, plan(clip), 0
        warning = ""
        if not self.refusal(probe):
            data = np.fromfile(probe.path, np.uint8)
            most, mark = frames_per_chunk(self.chunk_bytes, probe), fingerprint(data)
            error = self._failed.get(mark, "")
            while done < len(wanted) and not error:
                part = wanted[done : done + most]
                request = FrameRequest(probe, data, part, file=mark, known=done > 0)
                yield request
                if request.pixels is None:
                    error = request.error
                    # Others may still hold the request, and PyAV reads the file itself, perhaps
                    # for minutes: its bytes need not stay in memory meanwhile.
                    request.data = np.zeros(0, np.uint8)
                    break
                done += len(request.wanted)
                yield Frames(
                    clip=clip,
                    pixels=request.pixels,
                    times_s=probe.times_s[request.wanted],
                    indices=request.wanted,
                    asked=done,
                    total=len(wanted),
                    decoder=self.name,
                )
                del request
            del data
            if error:
                warning = f"decoder: DALI could not decode it ({error}); PyAV did"
        if done < len(wanted):
            for frames in self.fallback.frames(clip, wanted[done:], before=done):
                yield replace(frames, warnings=(*filter(None, [warning]), *frames.warnings))

    def _give_up(self, request: FrameRequest, error: str) -> None:
        """Answer with an error, and remember the file."""
        request.error = error
        self._failed[request.file] = error
        if len(self._failed) > MOST_FAILED:
            self._failed.popitem(last=False)

    def _decoded(self, requests: Sequence[FrameRequest]) -> None:
        """Answer the requests; where DALI fails, find the clip that made it fail."""
        error = self._tried(requests)
        if not error:
            return
        # Clips that DALI has not decoded before come last: one of them is the likely cause.
        suspects = sorted(requests, key=lambda request: not request.known)
        for number, request in enumerate(suspects[:-1], 1):
            if own := self._tried([request]):
                self._give_up(request, own)
                self._decoded(suspects[number:])
                return
        self._give_up(suspects[-1], error)

    def _tried(self, requests: Sequence[FrameRequest]) -> str:
        """Decode them in one batch; DALI's reason where it fails."""
        try:
            outputs = self._run(requests)
        except Exception as error:  # noqa: BLE001 - the border to DALI: C++ throws what it likes
            self._pipeline = None
            return reason(error)
        for request, output in zip(requests, outputs, strict=True):
            # Of a picture whose size is not the probe's the rest would be wrong too; PyAV scales
            # such pictures to the first.
            if output.shape != (len(request.wanted), *coded_size(request.probe), 3):
                self._give_up(request, f"it gave pictures of {tuple(output.shape[1:3])}")
            else:
                request.pixels = upright(output, request.probe)
        if self.device.type == "cuda":  # before DALI may write there again
            torch.cuda.current_stream(self.device).synchronize()
        return ""

    def _run(self, requests: Sequence[FrameRequest]) -> list[Tensor]:
        """One batch through DALI: u8 [n, h, w, 3] for each request, in DALI's own memory."""
        if self._pipeline is None:
            self._pipeline = self._built()
        (output,) = self._pipeline.run(
            encoded=[request.data for request in requests],
            frames=[request.wanted.astype(np.int32) for request in requests],
        )
        return [torch.utils.dlpack.from_dlpack(output[row]) for row in range(len(requests))]

    def _built(self) -> Any:
        from nvidia.dali import Pipeline, fn, types

        pipeline = Pipeline(
            batch_size=self.clips_at_once,
            num_threads=self.clips_at_once
            if self.backend == "mixed"
            else self.fallback.threads or 1,
            device_id=(self.device.index or 0) if self.backend == "mixed" else None,
            # The default of 2 would double the memory of the output.
            prefetch_queue_depth=1,
        )
        with pipeline:
            encoded = fn.external_source(name="encoded", ndim=1, dtype=types.UINT8, no_copy=True)
            frames = fn.external_source(name="frames", ndim=1, dtype=types.INT32)
            pipeline.set_outputs(
                fn.decoders.video(
                    encoded, frames=frames, device=self.backend, pad_mode="none", affine=False
                )
            )
        pipeline.build()
        return pipeline


def fingerprint(data: NDArray[np.uint8]) -> bytes:
    """Names a file by its size and its ends; two files with one name only both go to PyAV."""
    ends = (len(data).to_bytes(8), data[:ENDS].tobytes(), data[-ENDS:].tobytes())
    return hashlib.blake2b(b"".join(ends), digest_size=16).digest()


def coded_size(probe: Probe) -> tuple[int, int]:
    """Height and width of the picture before it is turned."""
    return (probe.width, probe.height) if probe.rotation % 180 else (probe.height, probe.width)


def upright(pixels: Tensor, probe: Probe) -> Tensor:
    """u8 [n, h, w, 3] as DALI gives them → [n, 3, h, w] as displayed, in the policy's colours."""
    out = pixels.new_empty((len(pixels), 3, probe.height, probe.width))
    matrix = from_bt601(probe.colour_space)
    at_once = max(1, PIXELS_A_PASS // (probe.height * probe.width))
    for first in range(0, len(pixels), at_once):
        part = pixels[first : first + at_once].permute(0, 3, 1, 2)
        if matrix is not None:
            part = _recoloured(part, matrix)
        if probe.rotation:
            part = torch.rot90(part, probe.rotation // 90, (2, 3))
        out[first : first + at_once] = part.flip(3) if probe.mirrored else part
    return out


def _recoloured(part: Tensor, matrix: NDArray[np.float64]) -> Tensor:
    """Each pixel times the matrix; plain sums, which TF32 does not round."""
    red, green, blue = part.float().unbind(1)
    planes = [
        (r * red + g * green + b * blue).add_(0.5).clamp_(0, 255).to(torch.uint8)
        for r, g, b in matrix.tolist()
    ]
    return torch.stack(planes, 1)


def reason(error: Exception) -> str:
    """The one line of DALI's message that says what was wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # DALI's message is a page long and holds paths of its build.
    after = next((n for n, line in enumerate(lines) if line.startswith("encountered")), -1)
    said = lines[after + 1 : after + 2] or [type(error).__name__]
    return said[0][:160]
