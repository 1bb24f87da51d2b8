"""Built engines on disk: their keys, their records, and how one is found.

    ARTIFACT/engines/KEY.json          the record: what it is, how it was made, what was measured
    ARTIFACT/engines/KEY-1f2e3d4c.plan the plan that the record names, by its own hash
    ARTIFACT/engines/fastest.json      per device: the engine that measured fastest there

KEY is flavour and version of the runtime, the GPU architectures, precision and largest batch:
`rtx1.4.0.76-sm80_86_89-fp16-b64`.  A plan is looked up by it, never guessed: only the very
version that wrote a plan reads it.  A miss says what was sought, what is there, and the command
that builds it.

A plan may run on an architecture once a machine with that architecture has run the model's golden
crops through it; until then it is `unverified` there.  Writing is
ralf.kernels.plan_store's.  No torch in here: a registry reads this.
"""

import hashlib
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from ralf.kernels.artifact import Artifact, ArtifactError, Damaged, read_regular
from ralf.kernels.manifest import Strict

Flavour = Literal["trt", "rtx"]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
RECORD_MAX_BYTES = 1_000_000
_KEY = re.compile(
    r"(?P<flavour>trt|rtx)(?P<version>\d+(?:\.\d+)+)-sm(?P<sms>\d+(?:_\d+)*)"
    r"-(?P<precision>fp32|bf16|fp16|fp8)-b(?P<batch>[1-9]\d*)"
)
_TARGET = re.compile(r"cpu|(?P<sm>sm\d+)(?P<verified>-verified)?")


class PlanMissing(ArtifactError):
    """No plan fits; the message says what was sought, what is there, and what builds it."""


class Unverified(ArtifactError):
    """The plan is there, and no machine of this kind has checked it yet."""


@dataclass(frozen=True)
class Key:
    """What decides whether a runtime can load a plan; its text is the plan's name."""

    flavour: Flavour
    version: str
    """Of the runtime that reads it: all of it, 1.4.0.76."""
    architectures: tuple[str, ...]
    """sm75, sm90, …, ascending."""
    precision: str
    batch: int
    """The largest."""

    def __post_init__(self) -> None:
        ordered = sorted(set(self.architectures), key=lambda sm: int(sm[2:] or 0))
        if not _KEY.fullmatch(str(self)) or list(self.architectures) != ordered:
            raise ValueError(f"a key looks like trt10.15.1-sm90-fp16-b64, got {str(self)!r}")

    def __str__(self) -> str:
        numbers = "_".join(sm.removeprefix("sm") for sm in self.architectures)
        return f"{self.flavour}{self.version}-sm{numbers}-{self.precision}-b{self.batch}"

    @classmethod
    def parse(cls, text: str) -> "Key":
        """The key whose text this is, or a ValueError."""
        found = _KEY.fullmatch(text)
        if not found:
            raise ValueError(f"a key looks like trt10.15.1-sm90-fp16-b64, got {text!r}")
        flavour: Flavour = "trt" if found["flavour"] == "trt" else "rtx"
        sms = tuple(f"sm{number}" for number in found["sms"].split("_"))
        return cls(flavour, found["version"], sms, found["precision"], int(found["batch"]))


@dataclass(frozen=True)
class Device:
    """Where an engine is to run, as far as choosing one needs to know."""

    name: str
    """As its maker calls it: NVIDIA H200, or the processor's name."""
    architecture: str
    """sm90, … or cpu."""
    runtimes: Mapping[Flavour, str] = field(default_factory=dict)
    """Versions of the TensorRT flavours that this Python can import."""

    @property
    def label(self) -> str:
        """What fastest.json calls it: another runtime makes it another device."""
        runtimes = (f"{flavour}{version}" for flavour, version in sorted(self.runtimes.items()))
        return " ".join((self.name, self.architecture, *runtimes))


class Verification(Strict):
    """One machine's run of the golden crops through a plan."""

    device: str
    error: Annotated[float, Field(ge=0)]
    """The largest difference of a golden logit from the FP32 reference's."""
    budget: Annotated[float, Field(ge=0)]
    decisions: Annotated[int, Field(ge=0)] = 0
    """Further random crops on which plan and reference decided alike."""
    timing_ms: dict[str, float] = Field(default_factory=dict)
    """Median of one batch, by its size."""
    at: str


class PlanRecord(Strict):
    """KEY.json."""

    schema_: Literal["ralf.plan/1"] = Field("ralf.plan/1", alias="schema")
    key: str
    file: str
    plan_sha256: Sha256
    size_bytes: Annotated[int, Field(ge=1)]
    manifest_sha256: Sha256
    """The model that it was built from."""
    weights_sha256: Sha256
    builder: str
    options: dict[str, Any] = Field(default_factory=dict)
    buckets: tuple[Annotated[int, Field(ge=1)], ...]
    """Batches are padded to one of these; the last is the largest."""
    error: dict[str, float] = Field(default_factory=dict)
    """What the builder's gates measured, before anything ran on a GPU."""
    timing: dict[str, float] = Field(default_factory=dict)
    """Seconds that exporting, checking and building took."""
    versions: dict[str, str] = Field(default_factory=dict)
    state: Literal["verified", "unverified"] = "unverified"
    verifications: dict[str, Verification] = Field(default_factory=dict)
    """By architecture."""
    at: str

    @model_validator(mode="after")
    def _consistent(self) -> "PlanRecord":
        key = Key.parse(self.key)
        if self.file != f"{key}-{self.plan_sha256[:8]}.plan":
            raise ValueError(f"file should be KEY-HASH.plan, got {self.file!r}")
        if list(self.buckets) != sorted(set(self.buckets)) or self.buckets[-1:] != (key.batch,):
            raise ValueError(f"buckets {self.buckets} should ascend to the key's {key.batch}")
        if (self.state == "verified") != bool(self.verifications):
            raise ValueError(f"state {self.state} with {len(self.verifications)} verifications")
        if foreign := self.verifications.keys() - set(key.architectures):
            raise ValueError(f"verified on {sorted(foreign)}, which the key does not name")
        return self

    def verified_on(self, architecture: str) -> bool:
        """Whether a machine of that architecture has checked it."""
        return architecture in self.verifications


@dataclass(frozen=True)
class Plan:
    """A published plan."""

    folder: Path
    key: Key
    record: PlanRecord

    @property
    def path(self) -> Path:
        """Where its bytes lie."""
        return self.folder / self.record.file

    def read(self) -> bytes:
        """The plan's bytes, hashed as read: what is checked is what is used."""
        data = read_regular(self.path)
        got = hashlib.sha256(data).hexdigest()
        if got != self.record.plan_sha256:
            raise Damaged(
                f"{self.path} ({len(data)} bytes) hashes to {got[:12]}…, its record says "
                f"{self.record.plan_sha256[:12]}…: truncated or changed after publishing; "
                "build it again"
            )
        return data


class Measured(Strict):
    """What fastest.json says of one device."""

    engine: str
    """A key, or torch-PRECISION or compile-PRECISION."""
    faces_per_s: dict[str, float]
    """Each engine that was timed."""
    batch: Annotated[int, Field(ge=1)]
    at: str


class Fastest(Strict):
    """fastest.json."""

    schema_: Literal["ralf.fastest/1"] = Field("ralf.fastest/1", alias="schema")
    devices: dict[str, Measured] = Field(default_factory=dict)


@dataclass(frozen=True)
class Coverage:
    """Whether a target has its engine; false with a reason that names the cure."""

    covered: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.covered


def engines(artifact: Artifact) -> Path:
    """Where the version's plans lie; it need not exist."""
    return artifact.path / "engines"


def plans(artifact: Artifact) -> list[Plan]:
    """Every published plan of the version, by name; Damaged where a record does not read."""
    folder = engines(artifact)
    if not folder.is_dir():
        return []
    records = (path for path in sorted(folder.glob("*.json")) if _KEY.fullmatch(path.stem))
    return [_read(artifact, path) for path in records]


def plan(artifact: Artifact, key: Key | str) -> Plan:
    """The plan of exactly this key."""
    for found in plans(artifact):
        if str(found.key) == str(key):
            return found
    raise PlanMissing(f"{artifact.label} has no plan {key} ({_present(artifact)})")


def find(artifact: Artifact, device: Device, precision: str = "fp16") -> Plan:
    """The plan that this device can run, verified there; of several the one of largest batch."""
    fitting = [
        found
        for found in plans(artifact)
        if device.runtimes.get(found.key.flavour) == found.key.version
        and device.architecture in found.key.architectures
        and found.key.precision == precision
    ]
    fitting.sort(key=lambda found: found.key.batch, reverse=True)
    for found in fitting:
        if found.record.verified_on(device.architecture):
            return found
    if fitting:
        raise unverified(artifact, fitting[0], device.architecture)
    runtimes = [f"{flavour}{version}" for flavour, version in sorted(device.runtimes.items())]
    raise PlanMissing(
        f"{artifact.label}: sought a {precision} plan for {device.architecture} by "
        f"{' or '.join(runtimes) or 'no TensorRT runtime (none is installed)'}; "
        f"{_present(artifact)}; build it there: {command(artifact)}"
    )


def unverified(artifact: Artifact, found: Plan, architecture: str) -> Unverified:
    """The refusal of a plan that was not checked on this architecture."""
    return Unverified(
        f"{found.key} of {artifact.label} is not verified on {architecture}; "
        f"on a machine with such a GPU run: ralf models verify {artifact.label} --device cuda"
    )


def covers(artifact: Artifact, target: str) -> Coverage:
    """Whether the version can serve a target: cpu, sm90 (a plan is built), sm90-verified.

    The torch engine serves any CPU, so `cpu` is always covered.
    """
    asked = _TARGET.fullmatch(target)
    if not asked:
        raise ValueError(f"a target is cpu, smNN or smNN-verified, got {target!r}")
    if target == "cpu":
        return Coverage(True)
    sm = asked["sm"]
    fitting = [found for found in plans(artifact) if sm in found.key.architectures]
    if not fitting:
        return Coverage(
            False, f"no plan for {sm} ({_present(artifact)}); build one: {command(artifact)}"
        )
    if asked["verified"] and not any(found.record.verified_on(sm) for found in fitting):
        return Coverage(False, str(unverified(artifact, fitting[0], sm)))
    return Coverage(True)


def command(artifact: Artifact) -> str:
    """What builds this version's plans on the machine at hand."""
    models = shlex.quote(str(artifact.path.parent.parent))
    return f"ralf build {artifact.label} --models {models}"


def fastest(artifact: Artifact, device: Device) -> Measured | None:
    """What measured fastest on this device; None where nothing was timed."""
    return measurements(artifact).devices.get(device.label)


def measurements(artifact: Artifact) -> Fastest:
    """fastest.json, empty where there is none."""
    path = engines(artifact) / "fastest.json"
    if not path.exists():
        return Fastest()
    try:
        return Fastest.model_validate_json(read_regular(path, RECORD_MAX_BYTES))
    except ValidationError as error:
        raise _damaged(path, error) from error


def _read(artifact: Artifact, path: Path) -> Plan:
    try:
        record = PlanRecord.model_validate_json(read_regular(path, RECORD_MAX_BYTES))
    except ValidationError as error:
        raise _damaged(path, error) from error
    if record.key != path.stem:
        raise Damaged(f"{path} is the record of {record.key}: renamed; build it again")
    if record.manifest_sha256 != artifact.manifest_sha256:
        raise Damaged(
            f"{path} was built from manifest {record.manifest_sha256[:8]}, "
            f"this is {artifact.version}: copied from another version; build it again"
        )
    return Plan(path.parent, Key.parse(record.key), record)


def _damaged(path: Path, error: ValidationError) -> Damaged:
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"])) or "document"
    return Damaged(f"{path}: {where}: {first['msg']}; remove it and build again")


def _present(artifact: Artifact) -> str:
    there = ", ".join(str(found.key) for found in plans(artifact))
    return f"present: {there or 'none'}"
