"""Built engines on disk: their keys, their records, and how they are found and written.

    ARTIFACT/engines/KEY.json          the record: what the plan is, how it was made and measured
    ARTIFACT/engines/KEY-1f2e3d4c.plan the plan that the record names, by its own hash
    ARTIFACT/engines/fastest.json      per device: the engine that measured fastest there

KEY is flavour and version of the runtime, the GPU architectures, precision and largest batch:
`rtx1.4.0.76-sm80_86_89-fp16-b64`.  A plan is found by its whole key, because only the very version
that wrote a plan can read it.  If none is found, the message says what was asked for, which plans
there are, and the command that builds one.

A plan may run on an architecture only after a machine with that architecture has run the model's
golden crops through it; until then it is `unverified` there.  Where this machine has keys
(ralf.kernels.plan_signature), only plans whose records are signed are loaded.  This file imports no
torch.
"""

import hashlib
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from ralf.kernels import plan_signature
from ralf.kernels.artifact import Artifact, ArtifactError, Damaged, read_regular
from ralf.kernels.atomic_files import flush_folder, locked, replace_text, write
from ralf.kernels.manifest import PRECISIONS, Strict

Flavour = Literal["trt", "rtx"]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
RECORD_MAX_BYTES = 1_000_000
_KEY = re.compile(
    r"(?P<flavour>trt|rtx)(?P<version>\d+(?:\.\d+)+)-sm(?P<sms>\d+(?:_\d+)*)"
    rf"-(?P<precision>{'|'.join(PRECISIONS)})-b(?P<batch>[1-9]\d*)"
)
_TARGET = re.compile(r"cpu|(?P<sm>sm\d+)(?P<verified>-verified)?")


class PlanMissing(ArtifactError):
    """There is no such plan; the message says which there are."""


class Unverified(ArtifactError):
    """The plan exists, but no machine of this architecture has checked it yet."""


@dataclass(frozen=True)
class Key:
    """What decides whether a runtime can load a plan; as text, the plan's name."""

    flavour: Flavour
    version: str
    """The whole version of the runtime that reads it: 1.4.0.76."""
    architectures: tuple[str, ...]
    """sm75, sm90, …, ascending."""
    precision: str
    batch: int
    """The largest."""

    def __post_init__(self) -> None:
        # By number: as text, sm120 would come before sm80.
        ordered = sorted(set(self.architectures), key=lambda sm: int(sm[2:] or 0))
        if not _KEY.fullmatch(str(self)) or list(self.architectures) != ordered:
            raise ValueError(f"a key looks like trt10.15.1-sm90-fp16-b64, got {str(self)!r}")

    def __str__(self) -> str:
        numbers = "_".join(sm.removeprefix("sm") for sm in self.architectures)
        return f"{self.flavour}{self.version}-sm{numbers}-{self.precision}-b{self.batch}"

    @classmethod
    def parse(cls, text: str) -> "Key":
        """A key from its text; ValueError if the text is none."""
        found = _KEY.fullmatch(text)
        if not found:
            raise ValueError(f"a key looks like trt10.15.1-sm90-fp16-b64, got {text!r}")
        flavour: Flavour = "trt" if found["flavour"] == "trt" else "rtx"
        sms = tuple(f"sm{number}" for number in found["sms"].split("_"))
        return cls(flavour, found["version"], sms, found["precision"], int(found["batch"]))


@dataclass(frozen=True)
class Device:
    """Where an engine runs: what choosing one needs to know."""

    name: str
    """The maker's name for it: NVIDIA H200, or the processor's."""
    architecture: str
    """sm90, … or cpu."""
    runtimes: Mapping[Flavour, str] = field(default_factory=dict)
    """Versions of the TensorRT flavours that this Python can import."""

    @property
    def label(self) -> str:
        """Its name in fastest.json; with another TensorRT version it is another device."""
        runtimes = (f"{flavour}{version}" for flavour, version in sorted(self.runtimes.items()))
        return " ".join((self.name, self.architecture, *runtimes))


class Verification(Strict):
    """The result of one machine that ran the golden crops through a plan."""

    device: str
    error: Annotated[float, Field(ge=0)]
    """The largest difference of a golden logit from the FP32 reference's."""
    budget: Annotated[float, Field(ge=0)]
    decisions: Annotated[int, Field(ge=0)] = 0
    """Random crops on which plan and reference made the same decision."""
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
    """Hash of the manifest of the model that it was built from."""
    weights_sha256: Sha256
    builder: str
    options: dict[str, Any] = Field(default_factory=dict)
    buckets: tuple[Annotated[int, Field(ge=1)], ...]
    """Batches are padded to one of these; the last is the largest."""
    error: dict[str, float] = Field(default_factory=dict)
    """What the checks at building measured, before the plan ran on another GPU."""
    timing: dict[str, float] = Field(default_factory=dict)
    """Seconds that exporting, checking and building took."""
    versions: dict[str, str] = Field(default_factory=dict)
    state: Literal["verified", "unverified"] = "unverified"
    verifications: dict[str, Verification] = Field(default_factory=dict)
    """By architecture."""
    at: str
    signature: str | None = None
    """Of all the other fields, by the machine that wrote them."""

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
        """Whether a machine of that architecture has checked the plan."""
        return architecture in self.verifications

    def plain(self) -> dict[str, Any]:
        """What is signed."""
        # Without defaults: a field that a later release adds must not change older signatures.
        return self.model_dump(
            mode="json", by_alias=True, exclude={"signature"}, exclude_defaults=True
        )


@dataclass(frozen=True)
class Plan:
    """A published plan."""

    folder: Path
    key: Key
    record: PlanRecord

    @property
    def path(self) -> Path:
        """The plan's file."""
        return self.folder / self.record.file

    def check_trusted(self, public_key: str | None = None) -> None:
        """Untrusted where this machine has keys and none of them signed the record."""
        record = self.record
        why = plan_signature.why_untrusted(record.plain(), record.signature, public_key)
        if why:
            raise plan_signature.Untrusted(
                f"{self.key} in {self.folder} is not loaded: {why}; build it again where "
                f"{plan_signature.SIGNING_KEY} is set, or remove it"
            )

    def read(self) -> bytes:
        """The plan's bytes; the bytes returned are the bytes that were hashed."""
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
    """One device's line in fastest.json."""

    engine: str
    """The fastest: a plan's key, torch-PRECISION or torch-eager-PRECISION."""
    faces_per_s: dict[str, float]
    """By engine, for each that was timed."""
    batch: Annotated[int, Field(ge=1)]
    at: str


class Fastest(Strict):
    """fastest.json."""

    schema_: Literal["ralf.fastest/1"] = Field("ralf.fastest/1", alias="schema")
    devices: dict[str, Measured] = Field(default_factory=dict)


@dataclass(frozen=True)
class Coverage:
    """Whether a target has its engine; if not, the reason says what to do."""

    covered: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.covered


def engines(artifact: Artifact) -> Path:
    """The folder of the version's plans; it may not exist."""
    return artifact.path / "engines"


def plans(artifact: Artifact) -> list[Plan]:
    """Every published plan of the version, by name; Damaged if a record cannot be read."""
    folder = engines(artifact)
    if not folder.is_dir():
        return []
    records = (path for path in sorted(folder.glob("*.json")) if _KEY.fullmatch(path.stem))
    return [_read(artifact, path) for path in records]


def plan(artifact: Artifact, key: Key | str) -> Plan:
    """The plan with exactly this key."""
    for found in plans(artifact):
        if str(found.key) == str(key):
            return found
    raise PlanMissing(
        f"{artifact.label} has no plan {key} ({_present(artifact)}); build it: {command(artifact)}"
    )


def refused(artifact: Artifact, public_key: str | None = None) -> list[str]:
    """For each of the version's plans that is not trusted on this machine, why."""
    if not plan_signature.keys_present(public_key):
        return []
    reasons = []
    for found in plans(artifact):
        try:
            found.check_trusted(public_key)
        except plan_signature.Untrusted as error:
            reasons.append(str(error))
    return reasons


def unverified(artifact: Artifact, found: Plan, architecture: str) -> Unverified:
    """The error for a plan that was not checked on this architecture."""
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
    if asked["verified"]:
        verified = [found for found in fitting if found.record.verified_on(sm)]
        if not verified:
            return Coverage(False, str(unverified(artifact, fitting[0], sm)))
        fitting = verified
    reason = ""
    for found in fitting:
        try:
            found.check_trusted()
            return Coverage(True)
        except plan_signature.Untrusted as error:
            reason = str(error)
    return Coverage(False, reason)


def command(artifact: Artifact) -> str:
    """The command that builds this version's plans on the machine at hand."""
    models = shlex.quote(str(artifact.path.parent.parent))
    return f"ralf build {artifact.label} --models {models}"


def fastest(artifact: Artifact, device: Device) -> Measured | None:
    """What measured fastest on this device; None if nothing was timed."""
    return measurements(artifact).devices.get(device.label)


def measurements(artifact: Artifact) -> Fastest:
    """fastest.json, empty if there is none."""
    path = engines(artifact) / "fastest.json"
    if not path.exists():
        return Fastest()
    try:
        return Fastest.model_validate_json(read_regular(path, RECORD_MAX_BYTES))
    except ValidationError as error:
        raise _damaged(path, error) from error


def now() -> str:
    """The time in UTC, as records have it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


# Writing: a plan is published by its record.  The plan is written under a name that no record has
# yet, then its record replaces the old one in one step, then files without a record are removed.  A
# builder killed at any point leaves the old plan or the new one; its lock ends with its process.


@contextmanager
def building(artifact: Artifact) -> Iterator[Path]:
    """The engines folder, locked for one builder, without what a killed builder left."""
    folder = engines(artifact)
    folder.mkdir(exist_ok=True)
    with locked(folder):
        sweep(artifact)
        yield folder


def write_plan(artifact: Artifact, content: bytes | Path, draft: Mapping[str, Any]) -> Plan:
    """Write the plan, then its record; the caller is inside `building`.

    The draft is a PlanRecord without file, plan_sha256, size_bytes and the model's hashes.
    """
    folder = engines(artifact)
    key = Key.parse(str(draft["key"]))
    # A hidden name, so that `sweep` removes it after a crash.
    staging = folder / f".{key}.new"
    # `write` refuses a file that is there already.
    staging.unlink(missing_ok=True)
    try:
        digest = write(staging, content)
        record = PlanRecord.model_validate(
            {
                **draft,
                # By content too, so that the old record never points at the new plan's bytes.
                "file": f"{key}-{digest[:8]}.plan",
                "plan_sha256": digest,
                "size_bytes": staging.stat().st_size,
                "manifest_sha256": artifact.manifest_sha256,
                "weights_sha256": artifact.weights_sha256,
            }
        )
        staging.replace(folder / record.file)
    finally:
        staging.unlink(missing_ok=True)
    # The plan's name must survive a power cut before a record refers to it.
    flush_folder(folder)
    # Before the record: a crash in between must not leave the new plan the old one's speed.
    _forget(artifact, key)
    made = write_record(Plan(folder, key, record))
    sweep(artifact)
    return made


def write_record(made: Plan) -> Plan:
    """Sign a plan's record and replace it in one step: this publishes a plan, or marks it as
    verified."""
    signature = plan_signature.sign(made.record.plain())
    record = made.record.model_copy(update={"signature": signature})
    replace_text(made.folder / f"{made.key}.json", _text(record))
    return Plan(made.folder, made.key, record)


def withdraw(artifact: Artifact, found: Plan) -> None:
    """Remove a plan: its record first, so that there is never a record without its plan."""
    _forget(artifact, found.key)
    (found.folder / f"{found.key}.json").unlink(missing_ok=True)
    flush_folder(found.folder)
    sweep(artifact)


def sweep(artifact: Artifact) -> None:
    """Remove files that no record names: a killed builder left them, or they were replaced."""
    folder = engines(artifact)
    named = {found.record.file for found in plans(artifact)}
    for path in folder.iterdir():
        if path.is_dir():
            continue
        if path.name.startswith(".") or (path.suffix == ".plan" and path.name not in named):
            path.unlink()


def record_fastest(artifact: Artifact, device: Device, measured: Measured) -> None:
    """Add or replace a device's line in fastest.json; the caller is inside `building`."""
    _write_fastest(artifact, {**measurements(artifact).devices, device.label: measured})


def _forget(artifact: Artifact, key: Key) -> None:
    """Drop a plan's measurements: they say nothing about the plan that replaces it."""
    known = measurements(artifact).devices
    kept = {label: measured for label, measured in known.items() if measured.engine != str(key)}
    if kept != known:
        _write_fastest(artifact, kept)


def _write_fastest(artifact: Artifact, devices: dict[str, Measured]) -> None:
    replace_text(engines(artifact) / "fastest.json", _text(Fastest(devices=devices)))


def _text(document: Strict) -> str:
    plain = document.model_dump(mode="json", by_alias=True)
    return json.dumps(plain, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _read(artifact: Artifact, path: Path) -> Plan:
    try:
        record = PlanRecord.model_validate_json(read_regular(path, RECORD_MAX_BYTES))
    except ValidationError as error:
        raise _damaged(path, error) from error
    if record.key != path.stem:
        raise Damaged(f"{path} is the record of {record.key}: renamed; build it again")
    # Another version's plan has other weights, and would pass every check of its own hash.
    if record.manifest_sha256 != artifact.manifest_sha256:
        raise Damaged(
            f"{path} was built from manifest {record.manifest_sha256[:8]}, "
            f"this is {artifact.version}: copied from another version; build it again"
        )
    if record.weights_sha256 != artifact.weights_sha256:
        raise Damaged(
            f"{path} was built from weights {record.weights_sha256[:8]}, {artifact.label} has "
            f"{artifact.weights_sha256[:8]}: changed after publishing; build it again"
        )
    return Plan(path.parent, Key.parse(record.key), record)


def _damaged(path: Path, error: ValidationError) -> Damaged:
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"])) or "document"
    return Damaged(f"{path}: {where}: {first['msg']}; remove it and build again")


def _present(artifact: Artifact) -> str:
    there = ", ".join(str(found.key) for found in plans(artifact))
    return f"present: {there or 'none'}"
