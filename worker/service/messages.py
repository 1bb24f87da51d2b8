"""The words between a parent and its child: small frozen messages in length-prefixed JSON frames.

A frame is four bytes of length, big end first, then one JSON object whose `type` names the
message.  Nothing is pickled, so a child that hostile media has taken over can say only these
words, and the parent checks each field's type before it believes it.

    parent says                       child says
    Hello(version)                    Ready(pid, rss, facts) once the model is loaded and checked
    Run(job_id, function, …)          Started, then Advanced many times, then Done or Failed
    Cancel(job_id)                    Company(others) whenever the number of running jobs changes
    Ping(number)                      Pong(number)
    Shutdown()                        Compared(document) after a job that a shadow saw too

One connection has one job in flight.  Documents (job, verdict, evidence, progress) travel as JSON
text inside the frame: whoever needs one parses it with the contract, and nobody parses it twice.
"""

import json
import socket
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any, get_type_hints

VERSION = 1
MAX_FRAME = 64 * 1024**2
_LENGTH = struct.Struct(">I")


class WireError(Exception):
    """The other side said something that is not in the protocol."""


@dataclass(frozen=True)
class Hello:
    """A parent introduces itself."""

    version: int = VERSION


@dataclass(frozen=True)
class Ready:
    """The model is loaded, checked on its golden file, and warm."""

    pid: int
    rss: int
    facts: str
    """JSON: what the verdicts will be made with; shown by ralf_engine_info."""
    version: int = VERSION


@dataclass(frozen=True)
class Unready:
    """The model could not be loaded; the child exits after saying so."""

    message: str


@dataclass(frozen=True)
class Run:
    """Do this job; it waits its turn if others run."""

    job_id: str
    function: str
    path: str
    job: str
    """The contract's Job."""
    attempt: int = 1
    sha256: str = ""
    fetch_ms: float = 0.0
    alone: bool = False
    """True: with no other job in the child, so that a crash has one suspect."""


@dataclass(frozen=True)
class Started:
    """The job's turn has come."""

    job_id: str


@dataclass(frozen=True)
class Company:
    """How many other jobs run in the child right now."""

    others: int


@dataclass(frozen=True)
class Advanced:
    """The job has got further."""

    job_id: str
    progress: str
    """The contract's Progress."""
    seconds: float = 0.0
    """The clip's length; 0 while it is not known."""
    partial: str = ""
    """Now and then, the verdict on what was seen so far."""


@dataclass(frozen=True)
class Done:
    """The job has a verdict."""

    job_id: str
    verdict: str
    evidence: str


@dataclass(frozen=True)
class Compared:
    """After a job's end: what the shadow made of it."""

    document: str
    """shadow.Comparison."""


@dataclass(frozen=True)
class Failed:
    """The job has a named failure."""

    job_id: str
    code: str
    message: str
    fatal: bool = False
    """True: the child cannot be trusted any more and exits."""


@dataclass(frozen=True)
class Cancel:
    """Stop this job at the next opportunity."""

    job_id: str


@dataclass(frozen=True)
class Ping:
    """Are you there?"""

    number: int


@dataclass(frozen=True)
class Pong:
    """Yes."""

    number: int


@dataclass(frozen=True)
class Shutdown:
    """Finish nothing, exit."""


Message = (
    Hello
    | Ready
    | Unready
    | Run
    | Started
    | Company
    | Advanced
    | Done
    | Failed
    | Compared
    | Cancel
    | Ping
    | Pong
    | Shutdown
)
_KINDS: dict[str, Any] = {kind.__name__.lower(): kind for kind in Message.__args__}
_HINTS: dict[str, dict[str, type]] = {
    name: get_type_hints(kind) | {} for name, kind in _KINDS.items()
}


def encode(message: Message) -> bytes:
    """The message as one frame."""
    name = type(message).__name__.lower()
    body = json.dumps({"type": name, **asdict(message)}, separators=(",", ":")).encode()
    if len(body) > MAX_FRAME:
        raise WireError(f"a {name} of {len(body)} bytes; a frame holds at most {MAX_FRAME}")
    return _LENGTH.pack(len(body)) + body


def decode(body: bytes) -> Message:
    """The message in one frame's body; every field present, known, and of its type."""
    try:
        document = json.loads(body)
        name = document.pop("type")
        kind, hints = _KINDS[name], _HINTS[name]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WireError(f"expected a message of protocol {VERSION}, got {body[:80]!r}") from error
    if set(document) != {field.name for field in fields(kind)}:
        raise WireError(f"a {name} has the fields {sorted(hints)}, got {sorted(document)}")
    for field, value in document.items():
        want = hints[field]
        right = type(value) is want or (want is float and type(value) is int)
        if not right:
            raise WireError(f"{name}.{field} should be {want.__name__}, got {value!r:.80}")
    message: Message = kind(**document)
    return message


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
                raise WireError(f"a frame of {length} bytes; at most {MAX_FRAME} are taken")
            end = _LENGTH.size + length
            if len(self._bytes) < end:
                return
            body = bytes(self._bytes[_LENGTH.size : end])
            del self._bytes[:end]
            yield decode(body)


def receive(connection: socket.socket, inbox: Inbox) -> list[Message] | None:
    """What one readable moment brings; None when the other side has gone."""
    try:
        data = connection.recv(262_144)
    except (BlockingIOError, InterruptedError):
        return []
    except OSError:
        return None
    if not data:
        return None
    return list(inbox.feed(data))
