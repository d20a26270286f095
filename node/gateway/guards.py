"""Who may speak to the gateway, and how much: checked before anything is believed.

A browser will send a web page's requests to localhost. Three things keep such a page from spending: it has no API
key, its Origin is refused, and a name of its own that resolves to this machine fails the Host check. Asking for
application/json also makes browsers ask first (a preflight), which is answered for allowed origins only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Final
from urllib.parse import urlsplit

from aiohttp import web

from node.gateway.errors import ApiError
from node.gateway.limits import Limits
from node.gateway.waiting import within
from node.ports import Clock

LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "::1"})


class Doors:
    """Which Host and Origin headers are let in. `hosts`: names besides the loopback ones. `origins`: exact."""

    def __init__(self, hosts: Iterable[str], origins: Iterable[str]) -> None:
        self._hosts = LOOPBACK | {host.lower() for host in hosts}
        self._origins = frozenset(origin.rstrip("/").lower() for origin in origins)

    def check(self, request: web.BaseRequest) -> None:
        """Raises: ApiError (403)."""
        host = request.headers.get("Host", "")
        if self._name(host) not in self._hosts:
            said = (
                f"Host {host[:100]!r} is not a name of this gateway. Use localhost, or allow the name in its settings."
            )
            raise ApiError(403, "permission_error", "host_not_allowed", said)
        origin = request.headers.get("Origin")
        if origin is not None and not self.allowed(origin, host):
            said = (
                f"Origin {origin[:100]!r} may not use this gateway. Allow it in the gateway's settings if it is yours."
            )
            raise ApiError(403, "permission_error", "origin_not_allowed", said)

    def allowed(self, origin: str, host: str) -> bool:
        """Whether pages of `origin` may ask: listed ones, and those this gateway served itself."""
        return origin.lower() in self._origins or origin.lower() == f"http://{host.lower()}"

    @staticmethod
    def _name(host: str) -> str:
        try:
            parts = urlsplit(f"//{host}")
            port_is_a_number = parts.port is None or parts.port >= 0
        except ValueError:
            return ""
        plain = parts.netloc == host and "@" not in host and port_is_a_number
        return (parts.hostname or "") if plain else ""


def cors_headers(origin: str) -> dict[str, str]:
    """What a browser needs to hand an allowed page the answer."""
    return {
        "Access-Control-Allow-Origin": origin,
        "Access-Control-Allow-Headers": "Authorization, Content-Type, Idempotency-Key",
        "Access-Control-Allow-Methods": "GET, POST, OPTIONS",
        "Access-Control-Expose-Headers": "x-tally-job, x-tally-provider, x-tally-cost, x-request-id, x-should-retry",
        "Vary": "Origin",
    }


async def read_json_body(request: web.Request, clock: Clock, limits: Limits) -> bytes:
    """The body of a JSON request, bounded in size and time. Raises: ApiError (400, 408, 413, 415)."""
    if request.content_type != "application/json":
        said = f"Content-Type must be application/json, not {request.content_type[:100]}."
        raise ApiError(415, "invalid_request_error", "unsupported_media_type", said)
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise ApiError(415, "invalid_request_error", "unsupported_encoding", "Send the body uncompressed.")
    if (request.content_length or 0) > limits.body_bytes:
        raise _too_large(limits)
    try:
        return await within(clock, limits.body_s, _read(request, limits))
    except TimeoutError as exc:
        said = f"The body did not arrive within {limits.body_s:g} s. Nothing was sent or paid."
        raise ApiError(408, "invalid_request_error", "request_timeout", said) from exc
    except web.RequestPayloadError as exc:
        raise ApiError(400, "invalid_request_error", "bad_body", "The body's framing is broken.") from exc


async def _read(request: web.Request, limits: Limits) -> bytes:
    body = bytearray()
    async for chunk in request.content.iter_any():
        body += chunk
        if len(body) > limits.body_bytes:
            raise _too_large(limits)
    return bytes(body)


def _too_large(limits: Limits) -> ApiError:
    said = f"The body is above the limit of {limits.body_bytes} bytes. Nothing was sent or paid. Shorten the prompt."
    return ApiError(413, "invalid_request_error", "request_too_large", said)


_FULL: Final = ApiError(503, "server_error", "too_many_connections", "This gateway has no connection free.")


class Doorkeeper:
    """Counts connections, and drops those whose first headers do not come."""

    def __init__(self, server: web.Server, clock: Clock, limits: Limits) -> None:
        self._server = server
        self._clock = clock
        self._limits = limits
        self._awaited: dict[asyncio.BaseTransport, asyncio.Task[None]] = {}

    def protocol(self) -> asyncio.Protocol:
        return _Greeting(self._admit)

    def arrived(self, transport: asyncio.BaseTransport | None) -> None:
        """A whole request head came on this connection; aiohttp's own keep-alive timeout rules from here."""
        timer = self._awaited.pop(transport, None) if transport is not None else None
        if timer is not None:
            timer.cancel()

    def close(self) -> None:
        for timer in self._awaited.values():
            timer.cancel()
        self._awaited.clear()

    def _admit(self, transport: asyncio.Transport) -> None:
        if len(self._server.connections) >= self._limits.connections:
            body = _FULL.encoded()
            transport.write(
                b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
                b"Connection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
            )
            transport.close()
            return
        handler = self._server()
        transport.set_protocol(handler)
        handler.connection_made(transport)
        self._awaited[transport] = asyncio.ensure_future(self._drop_later(transport))

    async def _drop_later(self, transport: asyncio.Transport) -> None:
        await self._clock.sleep(self._limits.headers_s)
        self._awaited.pop(transport, None)
        transport.abort()


class _Greeting(asyncio.Protocol):
    """A connection's first moment: it is handed on or sent away as soon as its transport exists."""

    def __init__(self, admit: Callable[[asyncio.Transport], None]) -> None:
        self._admit = admit

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._admit(transport)
