"""Two decoders as one: each clip goes where routing.py says, and counts as under way until done."""

import copy
import threading
from collections.abc import Iterator, Sequence

import structlog

from ralf.worker.errors import JobError
from ralf.worker.media.decode_dali import DaliDecoder
from ralf.worker.media.decode_pyav import PyavDecoder
from ralf.worker.media.routing import RATES, Rates, UnderWay, pixels_read, route
from ralf.worker.media.sampling import plan
from ralf.worker.media.types import Clip, Decoder, Frames

log = structlog.get_logger()


class RoutedDecoder:
    """Asks DALI or PyAV for each clip; Frames tell which it was.  For several threads at once."""

    name = "routed"

    def __init__(
        self, pyav: PyavDecoder, dali: DaliDecoder, *, cores: int, rates: Rates = RATES
    ) -> None:
        self.decoders: dict[str, Decoder] = {"dali": dali, "pyav": pyav}
        self.cores, self.rates = cores, rates
        self._pixels = {"dali": 0.0, "pyav": 0.0}
        self._lock = threading.Lock()

    def halved(self) -> "RoutedDecoder":
        """The same with chunks of half the size; what is under way is counted in common."""
        other = copy.copy(self)
        other.decoders = {name: decoder.halved() for name, decoder in self.decoders.items()}
        return other

    @property
    def under_way(self) -> UnderWay:
        """Pixels that clips already sent to each decoder were reckoned to take."""
        with self._lock:
            return UnderWay(cpu=self._pixels["pyav"], gpu=self._pixels["dali"])

    def decode(self, clips: Sequence[Clip]) -> Iterator[Frames]:
        """DALI's clips side by side, then PyAV's one after the other."""
        shares: dict[str, list[Clip]] = {"dali": [], "pyav": []}
        pixels = {"dali": 0.0, "pyav": 0.0}
        failed: list[JobError] = []
        try:
            for clip in clips:
                try:
                    decoder, cost = self._sent(clip)
                except JobError as error:  # what was asked of it is nonsense
                    failed.append(error)
                    continue
                shares[decoder].append(clip)
                pixels[decoder] += cost
            for decoder, share in shares.items():
                try:
                    yield from self.decoders[decoder].decode(share)
                except JobError as error:
                    failed.append(error)
                self._count(decoder, -pixels[decoder])
                pixels[decoder] = 0.0
        finally:
            for decoder, cost in pixels.items():
                self._count(decoder, -cost)
        if failed:
            raise failed[0]

    def _sent(self, clip: Clip) -> tuple[str, float]:
        """Where the clip goes, and the pixels that it counts for there from now on."""
        wanted = plan(clip)
        under_way = self.under_way
        way = route(clip.probe, wanted, cores=self.cores, under_way=under_way, rates=self.rates)
        cost = pixels_read(clip.probe, wanted)
        self._count(way.decoder, cost)
        log.debug("decoder.chosen", decoder=way.decoder, why=way.why)
        return way.decoder, cost

    def _count(self, decoder: str, pixels: float) -> None:
        with self._lock:
            self._pixels[decoder] += pixels
