"""A fetch in a thread, so that the parent can go on proving that the job runs."""

import threading
from pathlib import Path

import structlog

from ralf.worker.contract import Media
from ralf.worker.errors import Cancelled, FetchFailed, JobError
from ralf.worker.service.ending import Ending
from ralf.worker.service.fetch import Fetched, fetch
from ralf.worker.service.wakeup import Orders
from ralf.worker.settings import Settings

log = structlog.get_logger()


class Fetching:
    """One download; wakes the parent when it is over."""

    def __init__(
        self, media: Media, folder: Path, *, tenant: str, settings: Settings, orders: Orders
    ) -> None:
        self.file: Fetched | None = None
        self._error: BaseException | None = None
        self._orders = orders
        self._stop, self._over = threading.Event(), threading.Event()
        threading.Thread(
            target=self._work, args=(media, folder, tenant, settings), name="fetch", daemon=True
        ).start()

    def _work(self, media: Media, folder: Path, tenant: str, settings: Settings) -> None:
        try:
            self.file = fetch(
                media, folder, tenant=tenant, settings=settings, cancelled=self._stop.is_set
            )
        except BaseException as error:  # noqa: BLE001  carried over to the parent's thread
            self._error = error
        self._over.set()
        self._orders.wake()

    @property
    def over(self) -> bool:
        """Whether there is a file or an error."""
        return self._over.is_set()

    def stop(self) -> None:
        """End it at its next piece; nobody waits for that."""
        self._stop.set()

    def ending(self) -> Ending:
        """What a fetch without a file means for the job."""
        error = self._error
        if isinstance(error, JobError):
            return Ending.of(error)
        if isinstance(error, Cancelled):
            return Ending("failure", "cancelled", "cancelled by the client")
        log.error("fetch.broke", error=repr(error))
        return Ending.of(FetchFailed(f"{type(error).__name__}: {error}"))
