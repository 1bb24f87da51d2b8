"""Plans are code: with keys, only those that an operator's machine has signed are loaded."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from ralf.kernels import plan_signature, plans
from ralf.kernels.artifact import Artifact, Damaged
from ralf.kernels.plan_signature import BadKey, Untrusted
from ralf.kernels.plans import Plan
from tests.test_artifact import publish
from tests.test_plans import CHECKED, KEY, draft, put


@dataclass(frozen=True)
class Keys:
    """One operator's two keys as PEM."""

    private: str
    public: str


def keys() -> Keys:
    """Fresh ones, as openssl writes them."""
    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return Keys(private.decode(), public.decode())


OURS, THEIRS = keys(), keys()


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    """A published model without engines."""
    return publish(tmp_path)


@pytest.fixture
def builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Keys | None], None]:
    """Makes this machine one that signs with a key; None: one without keys."""

    def become(held: Keys | None) -> None:
        for name in (plan_signature.SIGNING_KEY, plan_signature.PUBLIC_KEY):
            monkeypatch.delenv(name, raising=False)
            monkeypatch.delenv(f"{name}_FILE", raising=False)
        if held is not None:
            (tmp_path / "plan.key").write_text(held.private)
            monkeypatch.setenv("RALF_PLAN_SIGNING_KEY_FILE", str(tmp_path / "plan.key"))

    return become


def on_disk(artifact: Artifact, change: dict[str, object]) -> Plan:
    """The plan after somebody who may write to the folder changed its record."""
    path = plans.engines(artifact) / f"{KEY}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    return plans.plan(artifact, KEY)


def test_a_signed_plan_is_trusted_by_the_public_key_and_by_its_builder(artifact, builder):
    """A worker needs the public key alone; a second key beside it is for a rotation."""
    builder(OURS)
    made = put(artifact, b"plan", KEY, "sm90")
    made.check_trusted()
    builder(None)
    plans.plan(artifact, KEY).check_trusted(OURS.public)
    plans.plan(artifact, KEY).check_trusted(THEIRS.public + OURS.public)

    assert made == plans.plan(artifact, KEY)
    assert [] == plans.refused(artifact, OURS.public)


def test_a_made_up_record_with_the_right_hashes_is_refused(artifact, builder):
    """Whoever may write to the folder can write `verified` and every hash, but no signature."""
    builder(None)
    forged = put(artifact, b"code of an attacker", KEY, "sm90")
    with pytest.raises(Untrusted, match=r"not signed.*build it again where RALF_PLAN_SIGNING_KEY"):
        forged.check_trusted(OURS.public)
    [why] = plans.refused(artifact, OURS.public)

    assert forged.record.verified_on("sm90") and "not signed" in why
    assert b"code of an attacker" == forged.read()


@pytest.mark.parametrize("signature", ["", "no Base64 at all", "A" * 88, "AAAA"])
def test_nonsense_in_place_of_a_signature_is_refused(artifact, builder, signature: str):
    """As untrusted, and with no other error."""
    builder(None)
    put(artifact, b"plan", KEY, "sm90")
    with pytest.raises(Untrusted, match="none of the 1 keys"):
        on_disk(artifact, {"signature": signature}).check_trusted(OURS.public)


def test_a_plan_that_another_key_signed_is_refused(artifact, builder):
    """By workers, and by a builder with a key of its own."""
    builder(THEIRS)
    made = put(artifact, b"plan", KEY, "sm90")
    builder(OURS)
    for trusted in (None, OURS.public):
        with pytest.raises(Untrusted, match="signature is of none of"):
            made.check_trusted(trusted)


@pytest.mark.parametrize(
    "change",
    [
        {"state": "verified", "verifications": {"sm80": CHECKED, "sm90": CHECKED}},
        {"options": {"front": "op"}},
        {"buckets": [64]},
        {"plan_sha256": "0" * 64, "file": f"{KEY}-{'0' * 8}.plan"},
        {"size_bytes": 5},
        {"builder": "another"},
    ],
)
def test_a_signed_record_that_changed_in_any_field_is_refused(artifact, builder, change):
    """Also where the change alone is harmless."""
    builder(OURS)
    put(artifact, b"plan", KEY, "sm90")
    builder(None)
    with pytest.raises(Untrusted, match="or it changed"):
        on_disk(artifact, change).check_trusted(OURS.public)


def test_a_signed_plan_of_another_version_or_other_weights_is_refused(artifact, builder, tmp_path):
    """With keys and without: a record names its model's manifest and its weights."""
    builder(OURS)
    text = (put(artifact, b"plan", KEY, "sm90").folder / f"{KEY}.json").read_text()
    other = publish(tmp_path, "another card")
    plans.engines(other).mkdir()
    (plans.engines(other) / f"{KEY}.json").write_text(text)
    with pytest.raises(Damaged, match="copied from another version"):
        plans.plans(other)
    builder(None)
    with pytest.raises(Damaged, match=r"built from weights 00000000.*build it again"):
        on_disk(artifact, {"weights_sha256": "0" * 64})


def test_verifying_signs_again_and_only_where_a_key_signs(artifact, builder, monkeypatch):
    """A machine that could only check says so before it works for minutes."""
    builder(OURS)
    made = put(artifact, b"plan", KEY)
    plain = made.record.model_dump(mode="json", by_alias=True)
    checked = {"state": "verified", "verifications": draft(KEY, "sm90")["verifications"]}
    known = plans.PlanRecord.model_validate({**plain, **checked})
    again = plans.write_record(Plan(made.folder, made.key, known))

    assert again.record.signature != made.record.signature
    plans.plan(artifact, KEY).check_trusted(OURS.public)
    builder(None)
    monkeypatch.setenv("RALF_PLAN_PUBLIC_KEY", OURS.public)
    with pytest.raises(BadKey, match="set RALF_PLAN_SIGNING_KEY_FILE"):
        plan_signature.require_signer()
    with pytest.raises(BadKey, match="RALF_PLAN_SIGNING_KEY is not"):
        plans.write_record(again)


def test_only_a_trusted_plan_covers_a_target(artifact, builder, monkeypatch):
    """So that no version is promoted for a GPU on which its plan would be refused."""
    builder(None)
    put(artifact, b"plan", KEY, "sm90")

    assert plans.covers(artifact, "sm90") and plans.covers(artifact, "sm90-verified")
    monkeypatch.setenv("RALF_PLAN_PUBLIC_KEY", OURS.public)
    assert "not signed" in plans.covers(artifact, "sm90").reason
    assert "not signed" in plans.covers(artifact, "sm90-verified").reason


def test_without_keys_nothing_is_signed_and_nothing_refused(artifact, builder):
    """As operations.md says."""
    builder(None)
    made = put(artifact, b"plan", KEY, "sm90")
    made.check_trusted()

    assert made.record.signature is None
    assert 0 == plan_signature.keys_present()


OTHER_ALGORITHM = X25519PrivateKey.generate()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("RALF_PLAN_PUBLIC_KEY", "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKs7CkVWbQ0qOPx6c operator"),
        ("RALF_PLAN_PUBLIC_KEY", OURS.private),
        (
            "RALF_PLAN_PUBLIC_KEY",
            OTHER_ALGORITHM.public_key()
            .public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
            .decode(),
        ),
        ("RALF_PLAN_SIGNING_KEY", OURS.public),
        (
            "RALF_PLAN_SIGNING_KEY",
            OTHER_ALGORITHM.private_bytes(
                Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
            ).decode(),
        ),
    ],
)
def test_a_key_that_cannot_be_read_is_an_error_never_no_key(
    artifact, builder, monkeypatch, *, name, text
):
    """It says how to make one, and does not show what it read."""
    builder(None)
    made = put(artifact, b"plan", KEY, "sm90")
    monkeypatch.setenv(name, text)
    with pytest.raises(BadKey, match=f"{name} should be an Ed25519 key in PEM") as caught:
        made.check_trusted()
    assert text[30:60] not in str(caught.value)
    monkeypatch.delenv(name)
    monkeypatch.setenv(f"{name}_FILE", "/nowhere/plan.key")
    with pytest.raises(BadKey, match="should name a file to read"):
        made.check_trusted()
