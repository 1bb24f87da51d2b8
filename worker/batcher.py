"""Crops of several jobs in one batch: an Engine in front of an engine, for many threads.

Each thread walks its own clip and waits for the logits of a chunk's crops.  While a batch is being
scored the other threads queue up, and the next batch takes a few crops of each in turn.  So a
device stays busy, and the next clips are decoded while these are scored, without a waiting time
to configure.

    job A  ──crops──▶ ┐             ┌──▶ logits of A
    job B  ──crops──▶ ├─ one batch ─┤
    job C  ──crops──▶ ┘             └──▶ logits of B, of C

It has no thread of its own: while no thread is scoring, one of those that wait scores the next
batch for all (shared_work.py).

Fair: jobs take turns of SHARE crops, so a job with thousands of crops does not delay the others.
Bounded: at most one chunk's crops per thread wait, and a job decodes no further until they are
scored.  Isolated: a batch that fails is halved by job until the failing job is alone; the others
get their logits.  A job that is alone gets the same batches as from the engine itself.
"""

from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ralf.kernels.artifact import Artifact
from ralf.kernels.engine import Engine, check_crops
from ralf.kernels.manifest import Precision
from ralf.worker.shared_work import SharedWork

SHARE = 8
"""Crops per turn."""
BATCH = 64
"""The batch of an engine that does not say its own."""


@dataclass(eq=False)
class _Request:
    """One thread's crops, and their logits as they come."""

    crops: Tensor = field(repr=False)
    taken: int = 0
    """How many have been put into a batch."""
    scored: int = 0
    error: Exception | None = None
    logits: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.logits = torch.zeros(len(self.crops))

    @property
    def over(self) -> bool:
        return self.error is not None or self.scored == len(self.crops)


@dataclass(frozen=True)
class _Piece:
    """The crops of one request that are in a batch."""

    request: _Request
    start: int
    stop: int

    @property
    def crops(self) -> Tensor:
        return self.request.crops[self.start : self.stop]


@dataclass(frozen=True)
class Served:
    """Counts since the start."""

    batches: int = 0
    crops: int = 0
    shared: int = 0
    """Batches with crops of more than one job."""


class Batcher:
    """Puts the crops that several threads ask for at the same time into one batch."""

    def __init__(self, engine: Engine, batch: int | None = None) -> None:
        self.engine = engine
        self.batch = batch or int(getattr(engine, "max_batch", BATCH))
        self.served = Served()
        self._waiting: deque[_Request] = deque()
        self._shared = SharedWork(self._next, self._score)

    @property
    def name(self) -> str:
        """The engine's own."""
        return self.engine.name

    @property
    def precision(self) -> Precision:
        """The engine's own."""
        return self.engine.precision

    @property
    def device(self) -> str:
        """The engine's own."""
        return self.engine.device

    @property
    def artifact(self) -> Artifact:
        """The engine's own."""
        return self.engine.artifact

    def __call__(self, crops: Tensor) -> Tensor:
        """Crops u8 [m, 3, s, s] → FP32 logits [m] on the CPU, as the engine gives them."""
        # Before it joins a batch: crops of a wrong shape must fail for their caller alone.
        check_crops(crops, self.artifact)
        request = _Request(crops)
        if request.over:
            return request.logits
        with self._shared.changed:
            self._waiting.append(request)
        self._shared.until(lambda: request.over)
        if request.error is not None:
            raise request.error
        return request.logits

    def _next(self) -> list[_Piece]:
        """A batch, turn by turn; a request with crops left goes to the end of the queue."""
        first: dict[_Request, int] = {}
        room = self.batch
        while room and self._waiting:
            request = self._waiting.popleft()
            # A request may have several turns in one batch.  Its crops follow each other, so they
            # make one piece from where the first turn began.
            first.setdefault(request, request.taken)
            count = min(SHARE, room, len(request.crops) - request.taken)
            request.taken += count
            room -= count
            if request.taken < len(request.crops):
                self._waiting.append(request)
        return [_Piece(request, start, request.taken) for request, start in first.items()]

    def _score(self, pieces: list[_Piece]) -> None:
        """Give each piece its logits; a request that fails alone gets its error."""
        try:
            logits = self.engine(self._joined(pieces))
        except Exception as error:  # noqa: BLE001 - any error goes to the job that caused it
            if len(pieces) == 1:
                self._fail(pieces[0].request, error)
                return
            # This also serves where the batch was too large for the device's memory: the halves
            # fit.
            half = len(pieces) // 2
            self._score(pieces[:half])
            self._score(pieces[half:])
            return
        with self._shared.changed:
            # Under the lock, because the owner returns as soon as `scored` is complete: the logits
            # must be in place by then.
            at = 0
            for piece in pieces:
                count = piece.stop - piece.start
                piece.request.logits[piece.start : piece.stop] = logits[at : at + count]
                piece.request.scored += count
                at += count
            done = self.served
            shared = done.shared + (len(pieces) > 1)
            self.served = Served(done.batches + 1, done.crops + at, shared)

    def _joined(self, pieces: list[_Piece]) -> Tensor:
        """One tensor; crops in different memories are moved to the engine's device."""
        parts = [piece.crops for piece in pieces]
        if len(parts) == 1:
            return parts[0]
        if len({part.device for part in parts}) > 1:
            parts = [part.to(self.engine.device) for part in parts]
        return torch.cat(parts)

    def _fail(self, request: _Request, error: Exception) -> None:
        with self._shared.changed:
            request.error = error
            # The rest of its crops would fail in the same way, and delay the others.
            if request in self._waiting:
                self._waiting.remove(request)


def engine_behind(engine: Engine) -> Engine:
    """The engine itself, without the Batcher before it: explaining is not batched."""
    return engine.engine if isinstance(engine, Batcher) else engine
