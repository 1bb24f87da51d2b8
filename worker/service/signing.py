"""What a push says, and how it is signed: Standard Webhooks 1.0.

The signature is over id, time and the exact bytes of the body.  All secrets of one id sign, the
signatures joined by a space, so that a receiver may know the old secret or the new one.
"""

import base64
import binascii
import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from standardwebhooks import Webhook

from ralf.worker.service.records import Delivery
from ralf.worker.settings import SettingsError


class Secrets:
    """The signing secrets by id, checked when they are read; prints none."""

    def __init__(self, entries: Sequence[str]) -> None:
        self._hooks: dict[str, list[Webhook]] = {}
        for number, entry in enumerate(entries, 1):
            name, _, secret = entry.partition("=")
            if not name or not 24 <= _length(secret) <= 64:
                raise SettingsError(
                    f"RALF_WEBHOOK_SECRETS: entry {number} should be secret_id=whsec_ and the "
                    "base64 of 24 to 64 random bytes"
                )
            self._hooks.setdefault(name, []).append(Webhook(secret))

    def sign(self, secret_id: str, message_id: str, at: datetime, body: str) -> str:
        """One signature for each secret of that id; empty when there is none. at is in UTC."""
        hooks = self._hooks.get(secret_id, ())
        return " ".join(hook.sign(message_id, at, body) for hook in hooks)


def _length(secret: str) -> int:
    """Bytes of key in whsec_…; 0 when it is not one."""
    kind, _, text = secret.partition("_")
    padded = text + "=" * (-len(text) % 4)
    try:
        return len(base64.b64decode(padded, validate=True)) if kind == "whsec" else 0
    except binascii.Error:
        return 0


def body_of(delivery: Delivery, most: int) -> str | None:
    """{type, timestamp, data}, the same at each attempt; None when it needs more than `most` bytes.

    A failure's message is the one part that may be long: it is cut.
    """
    text = _json(delivery, delivery.data)
    message = delivery.data.get("message")
    if len(text.encode()) > most and isinstance(message, str):

        def cut(kept: int) -> str:
            return _json(delivery, {**delivery.data, "message": message[:kept] + "…"})

        fits = bisect_right(range(len(message)), most, key=lambda kept: len(cut(kept).encode()))
        text = cut(max(0, fits - 1))
    return text if len(text.encode()) <= most else None


def _json(delivery: Delivery, data: Mapping[str, object]) -> str:
    when = datetime.fromtimestamp(delivery.created_at, UTC).isoformat(timespec="milliseconds")
    document = {"type": delivery.event, "timestamp": when, "data": data}
    return json.dumps(document, ensure_ascii=False, separators=(",", ":"))
