"""The messages between a parent and its child process: small frozen models in length-prefixed JSON.

A frame is four bytes of length, most significant byte first, then one JSON object whose `type`
names the message.  Nothing is pickled.  A child that a hostile file has taken over can send only
these messages, and pydantic checks every field before the parent uses it.

    the parent sends                  the child sends
    Hello(version)                    Ready(facts) once the model is loaded and checked, or Unready
    Run(job_id, function, …)          Started, then Advanced many times, then Done or Failed
    Cancel(job_id)                    OtherJobs(count) when the number of running jobs changes
    Shutdown()                        Compared(document) after a job that a shadow scored too

One connection has one job in flight.  Documents (job, verdict, evidence, progress) travel as JSON
text inside the frame, so that only the code that needs a document parses it.
"""

import json
import socket
import struct
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from ralf.kernels.manifest import Reference

# A parent of a newer release may connect to a shared child that still runs.  With another version
# in its Hello it is refused at once, and not at a field in the middle of a job.
VERSION = 5
# The length comes from the other side, which may be a child that a file has taken over.  Without a
# bound four bytes would make the parent allocate 4 GiB.
MAX_FRAME = 64 * 1024**2
_LENGTH = struct.Struct(">I")
EAGER = "torch-eager"
"""The engine that computes without a plan and without compiled kernels."""


class ProtocolError(Exception):
    """The other side sent something that is not in the protocol."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class RefusedModel(_Frozen):
    """A model version that could not be loaded."""

    role: str
    model: str
    why: str


class Protection(_Frozen):
    """One thing that confines the child, and whether it holds on this host."""

    name: str
    holds: bool
    found: str


class EngineFacts(_Frozen):
    """What the child's verdicts are made with; ralf_engine_info shows it."""

    model: str = ""
    version: str = ""
    engine: str = ""
    precision: str = ""
    device: str = ""
    decoder: str = ""
    refused: tuple[RefusedModel, ...] = ()
    protections: tuple[Protection, ...] = ()
    references: dict[str, Reference] = {}
    """By NAME@VERSION: the scores that drift is measured against."""
    loaded_late: bool = False
    """Loaded by a child that was confined already, and so could start no compiler."""

    @property
    def slow(self) -> bool:
        """Whether a GPU runs the network without a plan and without compiled kernels."""
        return self.engine == EAGER and self.device.startswith("cuda")


class Hello(_Frozen):
    """The first message of a parent: which protocol it speaks."""

    type: Literal["hello"] = "hello"
    version: int = VERSION


class Ready(_Frozen):
    """The model is loaded, checked on its golden file, and warm."""

    type: Literal["ready"] = "ready"
    facts: EngineFacts


class Unready(_Frozen):
    """The model could not be loaded; the child exits after this message."""

    type: Literal["unready"] = "unready"
    message: str


class Run(_Frozen):
    """Run this job; it waits its turn while others run."""

    type: Literal["run"] = "run"
    job_id: str
    function: str
    path: str
    job: str
    """The contract's Job."""
    attempt: int = 1
    sha256: str = ""
    fetch_ms: float = 0.0
    alone: bool = False
    """True: with no other job in the child, so that a crash has one possible cause."""


class Started(_Frozen):
    """The job's turn has come."""

    type: Literal["started"] = "started"
    job_id: str


class OtherJobs(_Frozen):
    """How many other jobs run in the child now."""

    type: Literal["other_jobs"] = "other_jobs"
    count: int


class Advanced(_Frozen):
    """The job has made progress."""

    type: Literal["advanced"] = "advanced"
    job_id: str
    progress: str
    """The contract's Progress."""
    seconds: float = 0.0
    """The clip's length; 0 while it is not known."""
    partial: str = ""
    """Now and then, the verdict on what was seen so far."""


class Done(_Frozen):
    """The job has a verdict."""

    type: Literal["done"] = "done"
    job_id: str
    verdict: str
    evidence: str
    served: int = 0
    """Jobs that the child has run to their end, of all its parents, with this one."""


class Failed(_Frozen):
    """The job has a named failure."""

    type: Literal["failed"] = "failed"
    job_id: str
    code: str
    message: str
    served: int = 0
    fatal: bool = False
    """True: the child cannot be trusted any more and exits."""


class Compared(_Frozen):
    """After a job's end: how a shadow's verdict differs."""

    type: Literal["compared"] = "compared"
    document: str
    """shadow.Comparison."""


class Cancel(_Frozen):
    """Stop this job at its next report of progress."""

    type: Literal["cancel"] = "cancel"
    job_id: str


class Shutdown(_Frozen):
    """Take no other job, and exit."""

    type: Literal["shutdown"] = "shutdown"


Message = (
    Hello
    | Ready
    | Unready
    | Run
    | Started
    | OtherJobs
    | Advanced
    | Done
    | Failed
    | Compared
    | Cancel
    | Shutdown
)
_ANY: TypeAdapter[Message] = TypeAdapter(Annotated[Message, Field(discriminator="type")])


def encode(message: Message) -> bytes:
    """The message as one frame."""
    # Not model_dump_json(), which raises for half a surrogate pair; a library's error text may hold
    # one.  No JSON reader takes it, so it is replaced.
    text = json.dumps(message.model_dump(), separators=(",", ":"), ensure_ascii=False)
    body = text.encode(errors="replace")
    if len(body) > MAX_FRAME:
        raise ProtocolError(
            f"a {message.type} of {len(body)} bytes; a frame holds at most {MAX_FRAME}"
        )
    return _LENGTH.pack(len(body)) + body


def decode(body: bytes) -> Message:
    """The message in one frame's body; every field is known and of its type."""
    try:
        return _ANY.validate_json(body)
    except ValidationError as error:
        # Without the input: it may be megabytes, and it goes to the log.
        why = error.errors(include_url=False, include_input=False)[0]
        raise ProtocolError(
            f"expected a message of protocol {VERSION}, got {body[:80]!r}: {why['msg'][:200]}"
        ) from None


class Inbox:
    """Bytes as they come in, messages as they become whole."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, data: bytes) -> Iterator[Message]:
        """Every message that is whole now."""
        self._bytes += data
        while len(self._bytes) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._bytes)
            if length > MAX_FRAME:
                raise ProtocolError(f"a frame of {length} bytes; at most {MAX_FRAME} are taken")
            end = _LENGTH.size + length
            if len(self._bytes) < end:
                return
            body = bytes(self._bytes[_LENGTH.size : end])
            del self._bytes[:end]
            yield decode(body)


def receive(connection: socket.socket, inbox: Inbox) -> list[Message] | None:
    """The messages that one read completes; None when the other side has gone."""
    try:
        data = connection.recv(262_144)
    except (BlockingIOError, InterruptedError):
        return []
    except OSError:
        return None
    if not data:
        return None
    return list(inbox.feed(data))
