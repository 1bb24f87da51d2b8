"""The platform's backend of a chaos run: it submits, submits again, cancels, and never gives up.

Jobs are test bodies of many kinds (bodies.py), some that must end badly.  Each is sent through
ralf.client under its own token.  A submission that raised QueueUnavailable is sent again with the
same token and body, as the client's docs tell backends; some tokens are sent once more later for no
reason, and some with another body, which must be refused.  What was asked and answered is kept for
the proof.
"""

import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TypeVar

from ralf.worker.chaos import bodies
from ralf.worker.chaos.proof import Asked, SeenEnd
from ralf.worker.chaos.receiver import Receiver
from ralf.worker.client import Client, IdempotencyConflict, QueueUnavailable, request
from ralf.worker.contract import ENDED, Callback, Job, Priority

T = TypeVar("T")
TENANTS = ("acme", "birch", "cedar", "dune")
BATCH = 8
_GOOD = ("succeeded", "quarantined")
_NEVER = ("quarantined",)


@dataclass(frozen=True)
class Kind:
    """One kind of job in the mix."""

    share: float
    body: str
    ends: tuple[str, ...]
    """Even a good job may be quarantined here: its worker may be killed twice."""
    seconds: tuple[float, float] | None = None
    """The body's argument."""
    innocent: bool = True
    deadline: bool = False
    cancelled: bool = False


KINDS: Mapping[str, Kind] = {
    "trivial": Kind(0.38, "trivial", _GOOD),
    "sleep": Kind(0.22, "sleep", _GOOD, (0.1, 1.5)),
    "oom": Kind(0.05, "oom", _GOOD),
    "poison": Kind(0.05, "poison", _GOOD),
    "crash_once": Kind(0.06, "crash_once", _GOOD, innocent=False),
    "crash": Kind(0.05, "crash", _NEVER, (0.0, 0.2), innocent=False),
    "hang": Kind(0.03, "hang", _NEVER, innocent=False),
    "late": Kind(0.07, "sleep", (*_GOOD, "expired"), (0.5, 1.5), deadline=True),
    "cancelled": Kind(0.07, "sleep", (*_GOOD, "cancelled"), (0.5, 3.0), cancelled=True),
    "cancelled_hang": Kind(
        0.02, "hang", ("cancelled", "quarantined"), innocent=False, cancelled=True
    ),
}


def mix(count: int, rng: random.Random) -> list[str]:
    """So many kinds in a random order, each by its share and, if there is room, at least once."""
    # Less one: each kind is in `chosen` once already.
    more = [name for name, kind in KINDS.items() for _ in range(int(kind.share * count) - 1)]
    more += ["trivial"] * (count - len(KINDS) - len(more))
    rng.shuffle(more)
    chosen = [*KINDS, *more[: max(0, count - len(KINDS))]]
    rng.shuffle(chosen)
    return chosen[:count]


@dataclass
class Upload:
    """One token, its job and what was answered."""

    job: Job
    kind: str
    body: str
    answers: list[str]


class Uploader:
    """Sends all jobs over about `seconds` in a thread of its own, and writes down the answers;
    `stretch` makes the jobs, their deadlines and the waits before cancels so many times longer."""

    def __init__(
        self,
        client: Client,
        receiver: Receiver,
        *,
        count: int,
        seconds: float,
        stretch: float = 1.0,
        seed: int = 0,
    ) -> None:
        self._client, self._receiver = client, receiver
        self._seconds, self._stretch = seconds, stretch
        self._random = random.Random(seed)
        self._stop = threading.Event()
        self._uploads = [self._made(n, k) for n, k in enumerate(mix(count, self._random))]
        self._cancels: list[tuple[float, Upload]] = []
        self._thread = threading.Thread(target=self._run, name="uploader", daemon=True)
        self.facts: Counter[str] = Counter()
        self.seen_ends: list[SeenEnd] = []
        self.wrong: list[str] = []

    def start(self) -> None:
        """Begin to send."""
        self._thread.start()

    @property
    def done(self) -> bool:
        """Whether everything was sent and cancelled that was to be."""
        return self._thread.ident is not None and not self._thread.is_alive()

    def stop(self) -> None:
        """Send no more."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(30.0)

    def asked(self) -> list[Asked]:
        """Every token that was answered so far."""
        return [
            Asked(
                upload.job.token,
                upload.kind,
                frozenset(KINDS[upload.kind].ends),
                KINDS[upload.kind].innocent,
                upload.job.callback is not None,
                tuple(upload.answers),
            )
            for upload in self._uploads
            if upload.answers
        ]

    def _made(self, number: int, name: str) -> Upload:
        kind, rng = KINDS[name], self._random
        job = request(
            f"https://media.example/{number}.mp4",
            token=f"upload-{number}",
            tag=f"{name}:{self._between(*kind.seconds):.2f}" if kind.seconds else None,
            tenant=rng.choice(TENANTS),
            priority=rng.choices(("default", "high"), (0.7, 0.3))[0],
        )
        return Upload(job, name, bodies.PREFIX + kind.body, [])

    def _between(self, least: float, most: float) -> float:
        return self._stretch * self._random.uniform(least, most)

    def _run(self) -> None:
        """Batches at even steps, cancels as they come due, some tokens once more."""
        try:
            batches = [self._uploads[i : i + BATCH] for i in range(0, len(self._uploads), BATCH)]
            pause = self._seconds / len(batches)
            for batch in batches:
                self._send(batch)
                self._send_again()
                self._wait(pause)
            # Some cancels are due only after the last batch.
            while self._cancels and not self._stop.is_set():
                self._wait(0.1)
        except Exception as error:  # noqa: BLE001  the border: the run's figures name it
            # After stop() a client that cannot reach Redis gives up on purpose.
            if not self._stop.is_set():
                self.wrong.append(f"the client raised {type(error).__name__}: {error}")

    def _send(self, batch: list[Upload]) -> None:
        # By body, since the function that a job names is set on the whole store.
        for body in dict.fromkeys(upload.body for upload in batch):
            same = [upload for upload in batch if upload.body == body]
            for upload in same:
                upload.job = self._with_callback(self._with_deadline(upload))
            self._submit(same)
            for upload in same:
                if KINDS[upload.kind].cancelled:
                    self._cancels.append((time.monotonic() + self._between(0.0, 2.5), upload))

    def _with_deadline(self, upload: Upload) -> Job:
        if not KINDS[upload.kind].deadline:
            return upload.job
        moment = datetime.now(UTC) + timedelta(seconds=self._between(0.2, 6.0))
        return upload.job.model_copy(update={"deadline": moment})

    def _with_callback(self, job: Job) -> Job:
        url = self._random.choices(
            (self._receiver.steady, self._receiver.unreliable, ""), (0.65, 0.25, 0.1)
        )[0]
        return job.model_copy(update={"callback": Callback(url=url)}) if url else job

    def _submit(self, uploads: list[Upload]) -> None:
        def send() -> None:
            self._client.store.function = uploads[0].body
            self.facts["submissions"] += len(uploads)
            anew = [_anew(upload.job) for upload in uploads]
            for upload, made in zip(uploads, self._client.submit_many(anew), strict=True):
                upload.answers.append(made.job_id)
                self._saw(made.job_id, made.state)
                self.facts["repeats_answered"] += made.existing

        self._reach(send)

    def _send_again(self) -> None:
        """A token that is known, from a second server of the platform; or its misuse."""
        sent = [upload for upload in self._uploads if upload.answers]
        for upload in self._random.sample(sent, min(len(sent), 1)):
            if self._random.random() < 0.7:
                self._submit([upload])
                continue
            other = _anew(upload.job.model_copy(update={"tag": "another body"}))
            try:
                self._reach(lambda other=other: self._client.submit_many([other]))  # type: ignore[misc]
                self.wrong.append(f"token {other.token} was taken with another body")
            except IdempotencyConflict:
                self.facts["conflicts_refused"] += 1

    def _wait(self, seconds: float) -> None:
        """Wait so long; jobs that are to be cancelled meanwhile are cancelled in time."""
        end = time.monotonic() + seconds
        while not self._stop.is_set() and (left := end - time.monotonic()) > 0:
            now = time.monotonic()
            for entry in [entry for entry in self._cancels if entry[0] <= now]:
                self._cancels.remove(entry)
                job_id = entry[1].answers[0]
                self._saw(job_id, self._reach(lambda job_id=job_id: self._client.cancel(job_id)))  # type: ignore[misc]
                self.facts["cancels"] += 1
            self._stop.wait(min(left, 0.05))

    def _saw(self, job_id: str, state: str) -> None:
        if state in ENDED:
            self.seen_ends.append(SeenEnd(job_id, state))  # type: ignore[arg-type]

    def _reach(self, do: Callable[[], T]) -> T:
        """Call it; while the queue does not answer, call it again."""
        while True:
            try:
                return do()
            except QueueUnavailable:
                self.facts["unavailable"] += 1
                # When told to stop, or it would wait for a Redis that stays away.
                if self._stop.wait(0.3):
                    raise


def _anew(job: Job) -> Job:
    """The same request once more: as client.request() makes it, with a new id and moment."""
    return job.model_copy(update={"job_id": uuid.uuid4().hex, "submitted_at": datetime.now(UTC)})


def priorities(workers: int) -> dict[Priority, int]:
    """The last worker serves the high pool, the others the default one."""
    return {"default": max(1, workers - 1), "high": 1}
