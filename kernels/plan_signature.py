"""Who made a plan: signatures of plan records (Ed25519), and the keys that they are checked with.

TensorRT runs what a plan says, so loading a plan runs code.  Hashes bind a plan to its record and
its model, but whoever may write to the folder of models can write all three.  With keys, only a
plan whose record an operator's own machine has signed is loaded:

    openssl genpkey -algorithm ed25519 -out plan.key     for machines that build and verify
    openssl pkey -in plan.key -pubout -out plan.pub      for every worker

    RALF_PLAN_SIGNING_KEY_FILE=plan.key    `ralf build` and `ralf models verify` sign
    RALF_PLAN_PUBLIC_KEY_FILE=plan.pub     others are refused; several keys in one file: any of them

A machine that signs also refuses what its own key has not signed.  The signature is over the whole
record: the hashes of plan, manifest and weights, and where the plan was verified.  With public keys
the process that checks needs no secret, so the child process that decodes uploads holds none.

Without keys nothing is signed and nothing is refused.  This file imports no torch.
"""

import base64
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ralf import install_hint
from ralf.kernels.artifact import ArtifactError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )

SIGNING_KEY, PUBLIC_KEY = "RALF_PLAN_SIGNING_KEY", "RALF_PLAN_PUBLIC_KEY"
# What is signed starts with this, so that no signature of another kind of document fits.
CONTEXT = b"ralf.plan/1\0"
_PEM = re.compile(r"-----BEGIN PUBLIC KEY-----.+?-----END PUBLIC KEY-----", re.DOTALL)


class Untrusted(ArtifactError):
    """A plan's record has no signature of a key that this machine trusts."""


class BadKey(ArtifactError):
    """A key cannot be read, or is missing where a record has to be signed."""


def why_untrusted(
    record: dict[str, Any], signature: str | None, public_key: str | None = None
) -> str:
    """Why a record is not trusted; empty if it is, or if this machine has no keys.

    public_key: PEM; None means that of the environment.
    """
    keys = _public_keys(public_key)
    if not keys:
        return ""
    if signature is None:
        return f"it is not signed, and {PUBLIC_KEY} or {SIGNING_KEY} is set"
    from cryptography.exceptions import InvalidSignature

    for key in keys:
        try:
            key.verify(base64.b64decode(signature), signed_bytes(record))
            return ""
        # ValueError: it is no Base64.
        except (InvalidSignature, ValueError):
            continue
    return f"its signature is of none of the {len(keys)} keys that are trusted here, or it changed"


def sign(record: dict[str, Any]) -> str | None:
    """The record's signature in Base64; None on a machine without keys."""
    require_signer()
    key = _signing_key()
    return None if key is None else base64.b64encode(key.sign(signed_bytes(record))).decode()


def require_signer() -> None:
    """BadKey where records are checked but none could be signed: ask before work of minutes."""
    if _signing_key() is None and _public_keys(None):
        raise BadKey(
            f"{PUBLIC_KEY} is set and {SIGNING_KEY} is not: a plan that is built or verified here "
            f"would be refused; set {SIGNING_KEY}_FILE to the key that signs"
        )


def keys_present(public_key: str | None = None) -> int:
    """How many keys plans are checked with on this machine."""
    return len(_public_keys(public_key))


def signed_bytes(record: dict[str, Any]) -> bytes:
    """The bytes of a record that are signed: it as JSON, without its signature."""
    plain = {name: value for name, value in record.items() if name != "signature"}
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return CONTEXT + text.encode()


def _public_keys(named: str | None) -> "list[Ed25519PublicKey]":
    text = _from_environment(PUBLIC_KEY) if named is None else named
    own = _signing_key()
    if not text.strip():
        return [own.public_key()] if own else []
    serialization, ed25519 = _library()
    # Each block by itself: the library reads only the first of a file.
    blocks = _PEM.findall(text)
    try:
        found = [serialization.load_pem_public_key(block.encode()) for block in blocks]
    except ValueError as error:
        raise _unreadable(PUBLIC_KEY, str(error)) from error
    if not found or not all(isinstance(key, ed25519.Ed25519PublicKey) for key in found):
        raise _unreadable(PUBLIC_KEY, f"{len(found)} keys, not all of Ed25519")
    return found + ([own.public_key()] if own else [])


def _signing_key() -> "Ed25519PrivateKey | None":
    text = _from_environment(SIGNING_KEY)
    if not text.strip():
        return None
    serialization, ed25519 = _library()
    try:
        key = serialization.load_pem_private_key(text.encode(), None)
    # A TypeError asks for a passphrase.
    except (ValueError, TypeError) as error:
        # Without the library's message, which might quote what it could not read.
        raise _unreadable(SIGNING_KEY, type(error).__name__) from None
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise _unreadable(SIGNING_KEY, "a key of another algorithm")
    found: Ed25519PrivateKey = key
    return found


def _from_environment(name: str) -> str:
    """The variable, or the content of the file that NAME_FILE names."""
    path = os.environ.get(f"{name}_FILE")
    if not path:
        return os.environ.get(name, "")
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise BadKey(f"{name}_FILE should name a file to read, got {path}: {error}") from error


def _unreadable(name: str, why: str) -> BadKey:
    return BadKey(
        f"{name} should be an Ed25519 key in PEM, as `openssl genpkey -algorithm ed25519` and "
        f"`openssl pkey -pubout` write them, without a passphrase; got {why}"
    )


def _library() -> Any:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise BadKey(f"checking plans' signatures: {error}; " + install_hint("cpu")) from error
    return serialization, ed25519
