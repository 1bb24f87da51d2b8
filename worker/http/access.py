"""Who may call: rules on a request's headers alone, nothing here answers.

Host     an address, localhost, or a name of RALF_HTTP_NAMES. A page of another site whose name was
         made to lead here (DNS rebinding) sends that name.
Origin   a browser says which page makes a request; one that changes something comes from our own
         page or from no browser. There are no cookies, so nothing is sent along unseen.
Bearer   the token of RALF_HTTP_TOKEN, where there is one.  A browser cannot send it when it follows
         a link, so a verdict page's link carries a key for this page alone, for an hour.
"""

import hashlib
import hmac
import ipaddress
import time
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from ralf.worker.errors import Infrastructure
from ralf.worker.settings import Settings, SettingsError

LEAST_TOKEN = 16
PAGE_KEY_S = 3600
OPEN = frozenset({"/", "/upload.css", "/upload.js", "/openapi.json", "/healthz"})
"""What needs no token: it says nothing about any job."""


class Refused(Exception):
    """An answer other than the one asked for."""

    def __init__(self, status: int, code: str, message: str, retry_after: int = 0) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.retry_after = status, code, message, retry_after


@dataclass(frozen=True)
class Address:
    """Where the server listens."""

    host: str
    port: int

    @classmethod
    def read(cls, text: str) -> "Address":
        """From ADDRESS:PORT, the address in numbers or localhost."""
        host, _, port = text.rpartition(":")
        try:
            name = "127.0.0.1" if host == "localhost" else host.strip("[]")
            number = int(port)
            ipaddress.ip_address(name)
            if not 0 <= number < 65536:
                raise ValueError(port)
        except ValueError:
            raise SettingsError(
                f"--http should be ADDRESS:PORT, such as 127.0.0.1:8080 or [::1]:8080, got {text!r}"
            ) from None
        return cls(name, number)

    def check(self, settings: Settings) -> None:
        """Refuse to be reached from other machines without a token, and a token that is short."""
        if settings.http_token and len(settings.http_token) < LEAST_TOKEN:
            raise SettingsError(
                f"RALF_HTTP_TOKEN should have at least {LEAST_TOKEN} characters, got "
                f"{len(settings.http_token)}; make one: openssl rand -hex 32"
            )
        if not settings.http_token and not ipaddress.ip_address(self.host).is_loopback:
            raise Infrastructure(
                f"{self.host} can be reached from other machines, so a token is needed: set "
                "RALF_HTTP_TOKEN or RALF_HTTP_TOKEN_FILE, or listen at 127.0.0.1"
            )


@dataclass(frozen=True)
class Access:
    """The rules with an operator's settings."""

    token: str
    names: tuple[str, ...] = ()

    def check(
        self, method: str, path: str, headers: Mapping[str, str], query: Mapping[str, str]
    ) -> None:
        """Raise Refused for a request that may not be answered."""
        host = headers.get("Host", "")
        if not self._known(host):
            raise Refused(
                403,
                "unknown_host",
                f"expected an address or localhost in the Host header, got {host!r}; "
                "the operator may add a name to RALF_HTTP_NAMES",
            )
        if method not in {"GET", "HEAD"}:
            _check_origin(host, headers)
        if self.token and path not in OPEN and not self._carries_token(path, headers, query):
            raise Refused(
                401,
                "token_missing",
                "expected the header Authorization: Bearer TOKEN with the server's token",
            )

    def page_query(self, path: str) -> str:
        """What a link to this page needs after its path; empty where no token is asked for."""
        if not self.token:
            return ""
        until = str(int(time.time()) + PAGE_KEY_S)
        return f"?until={until}&key={self._key(path, until)}"

    def _known(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
            if name == "localhost" or name in {known.lower() for known in self.names}:
                return True
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def _carries_token(
        self, path: str, headers: Mapping[str, str], query: Mapping[str, str]
    ) -> bool:
        scheme, _, given = headers.get("Authorization", "").partition(" ")
        if scheme.lower() == "bearer" and _same(given.strip(), self.token):
            return True
        key, until = query.get("key", ""), query.get("until", "")
        if not path.endswith("/page") or not (until.isascii() and until.isdigit()):
            return False
        return _same(key, self._key(path, until)) and int(until[:12]) >= time.time()

    def _key(self, path: str, until: str) -> str:
        return hmac.new(self.token.encode(), f"{path} {until}".encode(), hashlib.sha256).hexdigest()


def _check_origin(host: str, headers: Mapping[str, str]) -> None:
    origin = headers.get("Origin")
    places = {f"{scheme}://{host}".lower() for scheme in ("http", "https")}
    ours = origin is None or origin.lower() in places
    if not ours or headers.get("Sec-Fetch-Site", "none") not in {"none", "same-origin"}:
        raise Refused(
            403, "foreign_origin", f"expected a request of this server's own page, got {origin!r}"
        )


def _same(given: str, wanted: str) -> bool:
    """Compared in a time that does not depend on where they differ."""
    return hmac.compare_digest(given.encode(errors="replace"), wanted.encode())
