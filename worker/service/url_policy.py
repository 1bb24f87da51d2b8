"""Which URLs and addresses may be reached; pure rules, nothing here uses the network.

read_url() is strict (RFC 3986, no repair): http or https, no user, no backslash or control
character, a host that is a name (IDNA 2008) or an address in its one canonical form.  2130706433,
0x7f.1, 127.1 and 0177.0.0.1 are neither, whatever a resolver makes of them.

refusal() allows public addresses only.  An IPv6 address that contains an IPv4 one (mapped,
compatible, NAT64, 6to4, Teredo, ISATAP) is judged by that as well.
"""

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import quote

import idna

from ralf.worker.errors import RalfError

PORTS: Mapping[str, int] = {"http": 80, "https": 443}
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class EgressDenied(RalfError):
    """The policy forbids it; a second try will not help."""


_PLAIN = re.compile(r"[^\x00-\x20\x7f-\xa0\\\u2028\u2029\ud800-\udfff]+")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)([^?#]*)(\?[^#]*)?(#.*)?")
_AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]{2,45}\]|[^:\[\]@%]+)(?::([0-9]{1,5}))?")
_NAME = re.compile(r"(?=.{1,253}$)[a-z0-9_-]{1,63}(?:\.[a-z0-9_-]{1,63})*")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
# % is among them: what is percent-encoded already must not be encoded twice.
_SAFE = "!#$%&'()*+,/:;=?@[]~"


@dataclass(frozen=True)
class Target:
    """One URL, read; as text it has no query, since that of a signed URL is a credential."""

    scheme: str
    host: str
    """ASCII, lower case; an IPv6 address without its brackets."""
    port: int
    path: str = field(repr=False)
    """With the query, as it is sent."""

    @property
    def authority(self) -> str:
        """Host and port, as the Host header has them."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        """All of it."""
        return f"{self.scheme}://{self.authority}{self.path}"

    def __str__(self) -> str:
        return f"{self.scheme}://{self.authority}{self.path.split('?')[0]}"


def read_url(url: str) -> Target:
    """The URL's parts; EgressDenied, which never quotes the query, where it is not strictly one."""
    found = _URL.fullmatch(url) if _PLAIN.fullmatch(url) and len(url) <= 4096 else None
    if found is None:
        raise EgressDenied(
            "the URL is not one: expected scheme://host/path without spaces, control characters "
            "or backslashes, of at most 4096 characters; percent-encode them"
        )
    scheme, authority, path, query = found[1].lower(), found[2], found[3] or "/", found[4] or ""
    if scheme not in PORTS:
        raise EgressDenied(f"{scheme}: is not reached over the network; use https")
    # Before the pattern below, which refuses it too but cannot say why.
    if "@" in authority:
        raise EgressDenied("the URL has a user before its host; use a signed URL instead")
    parts = _AUTHORITY.fullmatch(authority)
    if parts is None:
        raise EgressDenied(f"{authority!r} is not a host with an optional port")
    host, port = _host(parts[1]), int(parts[2] or PORTS[scheme])
    if not 0 < port < 65536:
        raise EgressDenied(f"port {port} does not exist")
    return Target(scheme, host, port, quote(path + query, safe=_SAFE))


def _host(text: str) -> str:
    """A name in ASCII, or an address in its canonical form."""
    if text.startswith("["):
        try:
            return ipaddress.IPv6Address(text[1:-1]).compressed
        except ValueError:
            raise EgressDenied(f"{text} is not an IPv6 address") from None
    name = text.lower()
    if not name.isascii():
        try:
            # IDNA reads these three signs as dots: one label would become several.
            name = idna.encode(name).decode() if not re.search("[。．｡]", name) else ""
        except (idna.IDNAError, UnicodeError):
            name = ""
    if _NUMBER.fullmatch(name.rsplit(".", 1)[-1]):  # such a name is an address to every resolver
        try:
            return str(ipaddress.IPv4Address(name))
        except ValueError:
            raise EgressDenied(f"{text!r} is not an address as a.b.c.d in decimal") from None
    if not _NAME.fullmatch(name):
        raise EgressDenied(f"{text!r} is not a host name (letters, digits, -, no dot at the end)")
    return name


# addresses

METADATA = frozenset(
    ipaddress.ip_address(address)
    for address in (
        "169.254.169.254",
        "169.254.170.2",
        "169.254.170.23",
        "168.63.129.16",
        "100.100.100.200",
        "192.0.0.192",
        "fd00:ec2::254",
        "fd00:ec2::23",
        "fd20:ce::254",
    )
)
"""Where clouds hand out credentials; one of them is a public address."""
_NOT_PUBLIC = tuple(
    ipaddress.ip_network(network)
    for network in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",
        "240.0.0.0/4",
        "2001::/23",
        "2001:db8::/32",
        "2002::/16",
        "3fff::/20",
    )
)
"""Written out, since `is_global` differs between releases of Python."""
_UNICAST = ipaddress.IPv6Network("2000::/3")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_NAT64_OWN = ipaddress.IPv6Network("64:ff9b:1::/48")
_COMPATIBLE = ipaddress.IPv6Network("::/96")


def _embedded_ipv4(address: Address) -> tuple[ipaddress.IPv4Address, ...]:
    """The IPv4 addresses that an IPv6 one contains."""
    if isinstance(address, ipaddress.IPv4Address):
        return ()
    low = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    if address.ipv4_mapped is not None:
        return (address.ipv4_mapped,)
    if address.sixtofour is not None:
        return (address.sixtofour,)
    if address.teredo is not None:
        return address.teredo
    # 0000:5efe or 0200:5efe: the mask drops the bit for universal. & binds closer than ==.
    isatap = int(address) >> 32 & 0xFDFFFFFF == 0x5EFE
    if isatap or any(address in network for network in (_NAT64, _NAT64_OWN, _COMPATIBLE)):
        return (low,)
    return ()


def _public(address: Address) -> bool:
    inside = _embedded_ipv4(address)
    # First: a tunnel's address may be public although the host inside is not.
    if any(not _public(inner) for inner in inside):
        return False
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None or address in _NAT64:
            return True  # it is the address inside; on an IPv6-only network the only way to it
        # All public addresses are in 2000::/3; one with a scope belongs to a single link.
        if address not in _UNICAST or address.scope_id:
            return False
    return address.is_global and not any(
        address in network for network in _NOT_PUBLIC if network.version == address.version
    )


def refusal(address: str, *, private: bool = False) -> str:
    """Why this address may not be reached; empty when it may. private lifts all but metadata."""
    found = ipaddress.ip_address(address)
    if not METADATA.isdisjoint({found, *_embedded_ipv4(found)}):
        return "a cloud's metadata service"
    return "" if private or _public(found) else "not a public address"
