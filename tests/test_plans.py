"""Plans on disk: found by key, refused with the cure, whole whatever dies between."""

import hashlib
import json
import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ralf.kernels import plans
from ralf.kernels.artifact import Artifact, Damaged
from ralf.kernels.manifest import PRECISIONS
from ralf.kernels.plans import Device, Key, Measured, Plan, PlanMissing
from tests.test_artifact import everything, publish

KEY = Key("rtx", "1.4.0.76", ("sm80", "sm90"), "fp16", 64)
H200 = Device("NVIDIA H200", "sm90", {"rtx": "1.4.0.76"})
A100 = Device("NVIDIA A100", "sm80", {"rtx": "1.4.0.76"})
CPU = Device("a processor (2 cores)", "cpu")
CHECKED = {"device": H200.label, "error": 0.01, "budget": 0.05, "at": "2026-11-20T10:00:00+00:00"}


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    """A published model without engines."""
    return publish(tmp_path)


def draft(key: Key = KEY, *architectures: str) -> dict[str, object]:
    """A record as a builder hands it over, verified on these architectures."""
    return {
        "key": str(key),
        "builder": "rtx-aot",
        "buckets": (1, 8, key.batch) if key.batch > 8 else (key.batch,),
        "state": "verified" if architectures else "unverified",
        "verifications": dict.fromkeys(architectures, CHECKED),
        "at": "2026-11-20T10:00:00+00:00",
    }


def put(artifact: Artifact, content: bytes, key: Key = KEY, *architectures: str) -> Plan:
    """Publish a plan of these bytes."""
    with plans.building(artifact):
        return plans.write_plan(artifact, content, draft(key, *architectures))


KEYS = st.builds(
    Key,
    st.sampled_from(["trt", "rtx"]),
    st.lists(st.integers(0, 99), min_size=2, max_size=4).map(lambda x: ".".join(map(str, x))),
    st.sets(st.integers(50, 130), min_size=1, max_size=5).map(
        lambda x: tuple(f"sm{n}" for n in sorted(x))
    ),
    st.sampled_from(PRECISIONS),
    st.integers(1, 512),
)


@given(KEYS)
def test_a_key_reads_back_from_its_text(key: Key):
    """The text is the key: a plan's name says all that decides whether it loads."""
    assert Key.parse(str(key)) == key


@pytest.mark.parametrize(
    "text", ["", "rtx", "trt10-sm90-fp16-b64", "trt10.1-sm90-fp16-b0", "../x", "rtx1.4-90-fp16-b1"]
)
def test_what_is_no_key_is_refused(text: str):
    """With an example of one."""
    with pytest.raises(ValueError, match="a key looks like"):
        Key.parse(text)


def test_architectures_of_a_key_ascend():
    """sm120 comes after sm90, whatever the alphabet says."""
    assert "sm90_120" in str(Key("rtx", "1.4", ("sm90", "sm120"), "fp16", 1))
    with pytest.raises(ValueError, match="a key looks like"):
        Key("rtx", "1.4", ("sm120", "sm90"), "fp16", 1)


def test_a_published_plan_is_found_by_its_key_and_reads_back(artifact: Artifact):
    """With the hash of its bytes and of the model that it was built from."""
    made = put(artifact, b"plan" * 99, KEY, "sm90")
    found = plans.plan(artifact, KEY)

    assert found == made
    assert b"plan" * 99 == found.read()
    assert hashlib.sha256(b"plan" * 99).hexdigest() == found.record.plan_sha256
    assert artifact.manifest_sha256 == found.record.manifest_sha256
    assert "verified" == json.loads((plans.engines(artifact) / f"{KEY}.json").read_text())["state"]


def test_a_plan_that_is_missing_is_reported_with_those_that_are_there(artifact: Artifact):
    """Nothing near is taken instead; the command that builds one is named."""
    other = Key("rtx", "1.4.0.75", ("sm90",), "fp16", 64)
    put(artifact, b"another version", other, "sm90")
    put(artifact, b"another precision", Key("rtx", "1.4.0.76", ("sm90",), "fp32", 8), "sm90")
    put(artifact, b"another GPU", Key("rtx", "1.4.0.76", ("sm80",), "fp16", 8), "sm80")
    with pytest.raises(PlanMissing) as caught:
        plans.plan(artifact, KEY)
    message = str(caught.value)

    assert f"no plan {KEY}" in message
    assert f"present: {other}, " in message
    assert f"ralf build {artifact.label} --models {artifact.path.parent.parent}" in message


def test_a_plan_verified_on_one_architecture_is_not_verified_on_another(artifact: Artifact):
    """The target says so, with the command that verifies it."""
    put(artifact, b"plan", KEY, "sm80")

    assert plans.covers(artifact, "sm80-verified") and plans.covers(artifact, "sm90")
    refused = plans.covers(artifact, "sm90-verified")
    assert not refused and "not verified on sm90" in refused.reason
    assert "ralf models verify tiny@" in refused.reason and "--device cuda" in refused.reason


def test_a_changed_plan_is_damaged(artifact: Artifact):
    """One bit, or a byte less."""
    made = put(artifact, b"plan" * 99)
    made.path.write_bytes(b"plan" * 98 + b"plaN")
    with pytest.raises(Damaged, match="truncated or changed"):
        made.read()
    made.path.unlink()
    with pytest.raises(Damaged, match="missing"):
        made.read()


def test_a_record_that_was_changed_copied_or_renamed_is_damaged(artifact: Artifact, tmp_path: Path):
    """It must be what the builder wrote, for this very version, under its own name."""
    made = put(artifact, b"plan")
    record = made.folder / f"{KEY}.json"
    text = record.read_text()
    record.write_text(text.replace('"unverified"', '"verified"'))
    with pytest.raises(Damaged, match="state verified with 0"):
        plans.plans(artifact)
    record.write_text("{")
    with pytest.raises(Damaged, match="remove it and build again"):
        plans.plans(artifact)
    record.write_text(text)
    record.rename(made.folder / f"{Key('rtx', '1.4.0.76', ('sm90',), 'fp16', 64)}.json")
    with pytest.raises(Damaged, match="renamed"):
        plans.plans(artifact)
    other = publish(tmp_path, "another card")
    (other.path / "engines").mkdir()
    (other.path / "engines" / f"{KEY}.json").write_text(text)
    with pytest.raises(Damaged, match="copied from another version"):
        plans.plans(other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file": "../../weights.plan"}, "file should be KEY-HASH"),
        ({"buckets": [8, 1, 64]}, "should ascend"),
        ({"buckets": [1, 32]}, "should ascend to the key's 64"),
        ({"state": "verified", "verifications": {"sm75": CHECKED}}, "does not name"),
        ({"surprise": 1}, "Extra inputs"),
    ],
)
def test_a_record_that_contradicts_itself_is_damaged(artifact: Artifact, change, message: str):
    """A path out of the folder among them."""
    made = put(artifact, b"plan")
    path = made.folder / f"{KEY}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(Damaged, match=message):
        plans.plans(artifact)


def test_a_target_is_covered_by_a_plan_and_verified_by_a_machine(artifact: Artifact):
    """cpu always is; a reason names what is there and the command."""
    assert plans.covers(artifact, "cpu")
    assert "build one: ralf build" in plans.covers(artifact, "sm90").reason
    put(artifact, b"plan", KEY, "sm80")

    assert plans.covers(artifact, "sm90") and plans.covers(artifact, "sm80-verified")
    assert "ralf models verify" in plans.covers(artifact, "sm90-verified").reason
    assert not plans.covers(artifact, "sm120")
    with pytest.raises(ValueError, match="a target is"):
        plans.covers(artifact, "h200")


def test_the_fastest_engine_is_kept_by_device_and_runtimes(artifact: Artifact):
    """With another TensorRT installed, nothing was measured."""
    measured = Measured(engine=str(KEY), faces_per_s={str(KEY): 1000.0}, batch=64, at="now")
    slower = Measured(engine="torch-bf16", faces_per_s={"torch-bf16": 8.0}, batch=4, at="now")
    put(artifact, b"plan", KEY, "sm90")
    with plans.building(artifact):
        plans.record_fastest(artifact, H200, measured)
        plans.record_fastest(artifact, CPU, slower)

    assert measured == plans.fastest(artifact, H200)
    assert slower == plans.fastest(artifact, CPU)
    assert plans.fastest(artifact, A100) is None
    assert plans.fastest(artifact, Device("NVIDIA H200", "sm90", {"trt": "10.15.1"})) is None


@pytest.mark.parametrize("how", ["replaced", "withdrawn"])
def test_what_was_measured_of_a_plan_goes_with_it(artifact: Artifact, how: str):
    """Another plan of the same key is another plan."""
    measured = Measured(engine=str(KEY), faces_per_s={str(KEY): 1000.0}, batch=64, at="now")
    made = put(artifact, b"plan", KEY, "sm90")
    with plans.building(artifact):
        plans.record_fastest(artifact, H200, measured)
        if how == "withdrawn":
            plans.withdraw(artifact, made)
    if how == "replaced":
        put(artifact, b"another", KEY)

    assert plans.fastest(artifact, H200) is None
    assert not made.path.exists()


def test_the_model_itself_still_verifies_with_engines_beside_it(artifact: Artifact):
    """Plans are not part of the version."""
    put(artifact, b"plan")
    artifact.verify()

    assert {"engines"} == {path.name for path in artifact.path.iterdir() if path.is_dir()}


STEPS = ("fsync", "rename", "replace", "unlink", "mkdir")


def dies_before(step: int, act: Callable[[], object]) -> bool:
    """Run it in a process that dies, cleaning nothing up, before its n-th change of the disk."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the child only writes files, whatever threads there are
        child = os.fork()
    if child:
        return 9 == os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    counted = 0

    def dying(real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **options: object) -> object:
            nonlocal counted
            counted += 1
            if counted == step:
                os._exit(9)
            return real(*args, **options)

        return call

    for name in STEPS:
        setattr(os, name, dying(getattr(os, name)))
    try:
        act()
    except BaseException:
        os._exit(1)
    os._exit(0)


@pytest.mark.parametrize("before", ["nothing", "an old plan"])
def test_killed_at_any_step_a_builder_leaves_the_old_plan_or_the_new_one(
    artifact: Artifact, before: str
):
    """Whole, and what the dead left is swept by the next."""
    if before != "nothing":
        put(artifact, b"old", KEY, "sm90")
    allowed = {b"old", b"new"} if before != "nothing" else {b"new", None}

    def there() -> bytes | None:
        try:
            return plans.plan(artifact, KEY).read()
        except PlanMissing:
            return None

    deaths = 0
    while dies_before(deaths + 1, lambda: put(artifact, b"new", KEY)):
        deaths += 1
        assert there() in allowed
        assert deaths < 60
    put(artifact, b"newer", KEY)

    assert deaths > 5
    assert b"newer" == there()
    assert {f"{KEY}.json", plans.plan(artifact, KEY).record.file} == set(
        everything(plans.engines(artifact))
    )


def test_killed_at_any_step_withdrawing_leaves_it_whole_or_gone(artifact: Artifact):
    """Never a record without its plan."""
    step = 1
    put(artifact, b"plan", KEY)

    def withdraw() -> None:
        with plans.building(artifact):
            for found in plans.plans(artifact):
                plans.withdraw(artifact, found)

    while dies_before(step, withdraw):
        assert all(b"plan" == found.read() for found in plans.plans(artifact))
        put(artifact, b"plan", KEY)
        step += 1

    assert step > 3
    assert [] == plans.plans(artifact)


def test_two_builders_at_once_take_turns(artifact: Artifact):
    """The second waits for the first, and finds what it made."""
    inside, order = threading.Event(), []

    def first() -> None:
        with plans.building(artifact):
            inside.set()
            order.append("first in")
            second_started.wait(30)
            plans.write_plan(artifact, b"plan", draft())
            order.append("first out")

    def second() -> None:
        inside.wait(30)
        second_started.set()
        with plans.building(artifact):
            order.append(f"second in, finds {len(plans.plans(artifact))}")

    second_started = threading.Event()
    builders = [threading.Thread(target=first), threading.Thread(target=second)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join(60)

    assert ["first in", "first out", "second in, finds 1"] == order
