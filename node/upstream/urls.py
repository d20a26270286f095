"""Where a node may connect to when a URL says so: checked before the first byte, and dialled exactly as checked.

A URL in a configuration or a command is often copied from elsewhere, and a machine in a data centre can reach services
that trust whoever reaches them: metadata servers, routers, databases. So only http and https; no credentials in the
URL; no link-local, multicast, unspecified, reserved or metadata address, whatever form it is written in; private
networks only when allowed (this machine's own loopback always is). A name is resolved here, all its addresses must
pass, and the connection goes to these addresses, so a name cannot pass the check as one address and be dialled as
another. Redirects are not followed by anybody in this folder.
Source: OWASP, Server Side Request Forgery Prevention; RFC 6890 (special-purpose addresses).
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from aiohttp.abc import AbstractResolver, ResolveResult

from protocol.errors import TallyError

RESOLVE_TIMEOUT_S: Final = 5.0
"""For one name. Unit: s. Resolvers answer in under a second or not at all; doubling it doubles a hopeless start."""

MAX_URL_CHARS: Final = 2048
"""Longest URL taken. Unit: characters. The longest base URLs of hosted platforms have about 200."""

METADATA_NAMES: Final = frozenset(
    {"metadata", "metadata.google.internal", "metadata.goog", "instance-data", "instance-data.ec2.internal"}
)
"""Names of cloud metadata services. Their addresses are refused as well; a name says it more clearly."""

_METADATA_ADDRESSES: Final = frozenset(
    map(ipaddress.ip_address, ("169.254.169.254", "100.100.100.200", "192.0.0.192", "fd00:ec2::254", "fd20:ce::254"))
)
"""AWS, Azure, Google; Alibaba; Oracle's old one; AWS and Google over IPv6. Some lie in private ranges."""

_THIS_NETWORK: Final = ipaddress.ip_network("0.0.0.0/8")
_NAT64: Final = ipaddress.ip_network("64:ff9b::/96")
_COMPATIBLE: Final = ipaddress.ip_network("::/96")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Lookup = Callable[[str, int], Awaitable[list[str]]]
"""A name and port to its addresses as text. Raises: OSError."""


class UrlRefused(TallyError):
    """A URL that is not dialled; says why and what would be. Nothing was sent."""


@dataclass(frozen=True, slots=True)
class Target:
    """A server that passed. `base`: URL without a slash at its end. `addresses`: the only ones that may be dialled."""

    base: str
    host: str
    port: int
    addresses: tuple[str, ...]


def parse_base(url: str) -> tuple[str, str, int]:
    """(base without a slash at its end, host in lower case, port). Raises: UrlRefused."""
    if len(url) > MAX_URL_CHARS or not url.isascii() or any(c <= " " or c in '\\"<>^`{|}' for c in url):
        raise UrlRefused(f"{url[:80]!r} is no URL: blanks, control and special characters are not allowed in one")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as exc:
        raise UrlRefused(f"{url[:200]!r} is no URL: {exc}") from exc
    if parts.scheme not in ("http", "https"):
        raise UrlRefused(f"{url[:200]!r} is not dialled: only http:// and https:// are")
    if "@" in parts.netloc:
        raise UrlRefused("the URL carries credentials: write the key to a file and name that file instead")
    host = (parts.hostname or "").rstrip(".").lower()
    if not host or parts.query or parts.fragment or "?" in url or "#" in url:
        raise UrlRefused(f"{url[:200]!r} is no base URL: a host and a path such as https://host/v1 are meant")
    if port is None:
        port = 443 if parts.scheme == "https" else 80
    if not 0 < port < 65_536:
        raise UrlRefused(f"{url[:200]!r} names port {port}")
    shown = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{shown}:{port}{parts.path.rstrip('/')}", host, port


def check_address(address: Address, *, allow_private: bool) -> None:
    """Raises: UrlRefused naming the address and what it is."""
    inner = _embedded(address)
    if inner is not None:
        check_address(inner, allow_private=allow_private)
        if inner.is_loopback:
            return
    if address in _METADATA_ADDRESSES:
        raise UrlRefused(f"{address} is a cloud metadata service: it is never dialled")
    if address.version == 4 and address in _THIS_NETWORK:
        raise UrlRefused(f"{address} is no address of a server: name the one that it listens on")
    if address.is_loopback:
        return
    for kind in ("unspecified", "link_local", "multicast", "reserved"):
        if inner is None and getattr(address, f"is_{kind}"):
            raise UrlRefused(f"{address} is {kind.replace('_', '-')}: it is never dialled")
    if not address.is_global and inner is None and not allow_private:
        raise UrlRefused(
            f"{address} is in a private network: allow such servers with --allow-private, if the URL is your own"
        )


def _embedded(address: Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that an IPv6 one stands for, by any of the schemes that a kernel or gateway would unwrap."""
    if isinstance(address, ipaddress.IPv4Address):
        return None
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address.sixtofour is not None:
        return address.sixtofour
    if address.teredo is not None:
        return address.teredo[1]
    if address in _NAT64 or (address in _COMPATIBLE and int(address) > 0xFFFF):
        return ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
    return None


async def resolve(url: str, *, allow_private: bool, lookup: Lookup | None = None) -> Target:
    """Check a base URL and the addresses behind its name. `lookup`: the system's when None.

    Raises: UrlRefused, also when the name does not resolve.
    """
    base, host, port = parse_base(url)
    if host in METADATA_NAMES:
        raise UrlRefused(f"{host} is a cloud metadata service: it is never dialled")
    try:
        async with asyncio.timeout(RESOLVE_TIMEOUT_S):
            found = await (lookup or _system_lookup)(host, port)
    except (OSError, TimeoutError, UnicodeError) as exc:
        raise UrlRefused(f"the name {host!r} does not resolve ({exc or 'no answer'}): check the URL") from exc
    addresses = tuple(dict.fromkeys(text.partition("%")[0] for text in found))
    for text in addresses:
        check_address(ipaddress.ip_address(text), allow_private=allow_private)
    if not addresses:
        raise UrlRefused(f"the name {host!r} has no address: check the URL")
    return Target(base, host, port, addresses)


async def _system_lookup(host: str, port: int) -> list[str]:
    rows = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(row[4][0]) for row in rows]


class PinnedResolver(AbstractResolver):
    """Answers aiohttp with the addresses of `target`, which were checked, and knows no other name."""

    def __init__(self, target: Target) -> None:
        self.target = target

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Raises: OSError for any other host."""
        if (host.lower(), port) != (self.target.host, self.target.port):
            raise OSError(f"{host} port {port} is not the server that was checked")
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=0,
                flags=socket.AI_NUMERICHOST,
            )
            for address in self.target.addresses
            if family == socket.AF_UNSPEC or (":" in address) == (family == socket.AF_INET6)
        ]

    async def close(self) -> None: ...
