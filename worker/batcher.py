"""Crops of several jobs in one batch: an Engine in front of an engine, for many threads.

Each thread walks a clip of its own and asks for the logits of a chunk's crops; it is blocked until
it has them.  While a batch is being scored the others queue up, and the next batch takes a few
crops of each in turn.  So a device is kept full, and decoding of the next clips overlaps scoring
of these, without a delay that anybody has to choose.

    job A  ──crops──▶ ┐             ┌──▶ logits of A
    job B  ──crops──▶ ├─ one batch ─┤
    job C  ──crops──▶ ┘             └──▶ logits of B, of C

No thread of its own: whoever waits and finds nobody at work runs the next batch, for all.

Fair: turns go round, SHARE crops each, so a job with thousands of crops takes no more of a batch
than its turn while others wait.  Bounded: what waits is one chunk's crops a thread, which were
there already, and a job decodes nothing more until they are scored.  Apart: a batch that fails is
halved by job until the job that owns the failure is alone with it; the others get their logits.
A job alone gets the batches that it would get from the engine itself.
"""

import threading
from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ralf.kernels.artifact import Artifact
from ralf.kernels.engine import Engine, check_crops
from ralf.kernels.manifest import Precision

SHARE = 8
"""Crops a turn."""
BATCH = 64
"""Of an engine that does not say its own."""


@dataclass(eq=False)
class _Request:
    """One thread's crops, and what is known of them."""

    crops: Tensor = field(repr=False)
    taken: int = 0
    """How many are in a batch, or were."""
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
    """What went through so far."""

    batches: int = 0
    crops: int = 0
    shared: int = 0
    """Batches with crops of more than one job."""


class Batcher:
    """Batches what several threads ask at the same time."""

    def __init__(self, engine: Engine, batch: int | None = None) -> None:
        self.engine = engine
        self.batch = batch or int(getattr(engine, "max_batch", BATCH))
        self.served = Served()
        self._waiting: deque[_Request] = deque()
        self._busy = False
        self._changed = threading.Condition()

    @property
    def name(self) -> str:
        """The engine's."""
        return self.engine.name

    @property
    def precision(self) -> Precision:
        """The engine's."""
        return self.engine.precision

    @property
    def device(self) -> str:
        """The engine's."""
        return self.engine.device

    @property
    def artifact(self) -> Artifact:
        """The engine's."""
        return self.engine.artifact

    def __call__(self, crops: Tensor) -> Tensor:
        """Crops u8 [m, 3, s, s] → FP32 logits [m] on the CPU, as the engine gives them."""
        check_crops(crops, self.artifact)
        request = _Request(crops)
        if request.over:
            return request.logits
        with self._changed:
            self._waiting.append(request)
        while (pieces := self._my_turn(request)) is not None:
            try:
                self._score(pieces)
            finally:
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()
        if request.error is not None:
            raise request.error
        return request.logits

    def _my_turn(self, request: _Request) -> list[_Piece] | None:
        """Wait; the next batch when nobody scores, None when the request has its answer."""
        with self._changed:
            self._changed.wait_for(lambda: request.over or not self._busy)
            if request.over:
                return None
            self._busy = True
            return self._next()

    def _next(self) -> list[_Piece]:
        """A batch, turn by turn; who has crops left goes to the end of the line."""
        first: dict[_Request, int] = {}
        room = self.batch
        while room and self._waiting:
            request = self._waiting.popleft()
            first.setdefault(request, request.taken)
            count = min(SHARE, room, len(request.crops) - request.taken)
            request.taken += count
            room -= count
            if request.taken < len(request.crops):
                self._waiting.append(request)
        return [_Piece(request, start, request.taken) for request, start in first.items()]

    def _score(self, pieces: list[_Piece]) -> None:
        """Give each piece its logits, or its request the error that is its own."""
        try:
            logits = self.engine(self._joined(pieces))
        except Exception as error:  # noqa: BLE001  the border: it goes to the job that owns it
            if len(pieces) == 1:
                self._fail(pieces[0].request, error)
                return
            half = len(pieces) // 2
            self._score(pieces[:half])
            self._score(pieces[half:])
            return
        with self._changed:
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
        """One tensor; crops that lie in different memories meet on the engine's device."""
        parts = [piece.crops for piece in pieces]
        if len(parts) == 1:
            return parts[0]
        if len({part.device for part in parts}) > 1:
            parts = [part.to(self.engine.device) for part in parts]
        return torch.cat(parts)

    def _fail(self, request: _Request, error: Exception) -> None:
        with self._changed:
            request.error = error
            if request in self._waiting:
                self._waiting.remove(request)


def engine_behind(engine: Engine) -> Engine:
    """The engine itself, without the Batcher before it: explaining is not batched."""
    return engine.engine if isinstance(engine, Batcher) else engine
