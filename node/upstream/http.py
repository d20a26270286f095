"""One checked server over HTTP: JSON answers and event streams, bounded in size and time, no redirects, no cookies.

What a foreign server writes is never put into our log: an `UpstreamError` says what happened in our words, and the
server's own words travel only in `Rejected`, to whoever's request it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final, Self

import aiohttp
import msgspec

from node.log import redact
from node.upstream.urls import Lookup, PinnedResolver, Target, resolve
from protocol.errors import TallyError

log = logging.getLogger("tally.upstream")

CONNECT_TIMEOUT_S: Final = 5.0
"""For a connection, TLS included. Unit: s. Another continent takes under one; doubled, a dead server is seen later."""

ANSWER_TIMEOUT_S: Final = 60.0
"""For a whole JSON answer. Unit: s. A price sheet takes one; an embedding of 32 long texts on a CPU some tens."""

SILENCE_S: Final = 120.0
"""Longest silence of an event stream we are reading. Unit: s. A long prompt is read in less on what anybody sells; the
client's own patience (60 s by default) ends a job before, so doubling it only holds a slot for a dead server longer."""

MAX_ANSWER_BYTES: Final = 16 << 20
"""Largest JSON answer read. Unit: bytes. OpenRouter's list of models is 1 MB; 32 embeddings of 8,192 numbers are 6 MB.
Doubling it doubles what a foreign server can make us hold."""

MAX_EVENT_BYTES: Final = 1 << 20
"""Longest line of an event stream. Unit: bytes. A token with 20 alternatives has under 4 KB."""

READ_BUFFER_BYTES: Final = 16 << 10
"""What is read ahead of the consumer before the connection is paused. Unit: bytes: some 60 tokens as events, and the
receive buffer of the socket is as small, so that a server writes little for a reader that went slow."""

LAST_BYTES_S: Final = 0.1
"""How long the end of an answer after its last event is waited for. Unit: s. It comes with that event, or the
connection is dropped and the next request makes one of its own."""

MAX_SAID_CHARS: Final = 300
"""How much of a server's own explanation is passed on."""


class UpstreamError(TallyError):
    """The server failed, broke off or answered what cannot be used. What was received before stays valid."""


class Busy(UpstreamError):
    """The server has no room now: 429, 503, or more than it was told to take."""


class Rejected(UpstreamError):
    """The server refuses this request and would refuse it again; `said` is its explanation, `status` its HTTP code."""

    def __init__(self, status: int, said: str) -> None:
        super().__init__(f"the upstream server refuses this request (HTTP {status}); nothing was generated")
        self.status, self.said = status, said


def read_key(path: Path) -> str:
    """The API key in a file's first line; it is kept out of the log from then on.

    Raises: UpstreamError when the file cannot be read, is empty or is readable by others.
    """
    try:
        if path.stat().st_mode & 0o077:
            raise UpstreamError(f"the key file {path} can be read by others: chmod 600 {path}")
        key = path.read_text().partition("\n")[0].strip()
    except (OSError, UnicodeError) as exc:
        raise UpstreamError(f"the key file {path} cannot be read: {exc}") from exc
    if len(key) < 8 or not key.isascii() or not key.isprintable():
        raise UpstreamError(f"the key file {path} holds no key of 8 or more characters in its first line")
    redact(key)
    return key


class HttpServer:
    """Requests to one server. `async with` opens and closes it; requests are made in between.

    `base`: URL that paths such as /models are put behind. Raises on entry: UrlRefused.
    """

    def __init__(
        self,
        base: str,
        *,
        key: str = "",
        allow_private: bool = False,
        connections: int = 64,
        lookup: Lookup | None = None,
    ) -> None:
        self._url, self._key = base, key
        self._allow_private, self._connections, self._lookup = allow_private, connections, lookup
        self._session: aiohttp.ClientSession | None = None
        self._target: Target | None = None
        self._resolver: PinnedResolver | None = None

    @property
    def target(self) -> Target:
        """Valid once entered."""
        assert self._target is not None
        return self._target

    async def __aenter__(self) -> Self:
        self._target = await resolve(self._url, allow_private=self._allow_private, lookup=self._lookup)
        self._session = self._open(self._target)
        return self

    async def __aexit__(self, *exc: object) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    def _open(self, target: Target) -> aiohttp.ClientSession:
        self._resolver = PinnedResolver(target)
        connector = aiohttp.TCPConnector(
            resolver=self._resolver, use_dns_cache=False, limit=self._connections, socket_factory=_small_socket
        )
        headers = {"Accept-Encoding": "identity", "User-Agent": "tallystick"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        return aiohttp.ClientSession(
            connector=connector,
            headers=headers,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, connect=None, sock_connect=CONNECT_TIMEOUT_S),
            read_bufsize=READ_BUFFER_BYTES,
            auto_decompress=False,
            trust_env=False,
        )

    async def get(self, path: str) -> Any:
        """A JSON answer. Raises: UpstreamError, Busy, Rejected."""
        return _decoded(await self._answer("GET", path, None))

    async def get_raw(self, path: str) -> bytes:
        """An answer as it came. Raises: UpstreamError, Busy, Rejected."""
        return await self._answer("GET", path, None)

    async def post(self, path: str, body: object) -> Any:
        """A JSON answer. Raises: UpstreamError, Busy, Rejected."""
        return _decoded(await self._answer("POST", path, body))

    async def stream(self, path: str, body: object) -> Events:
        """Begin an event stream; returns when the server has accepted the request (its headers are in).

        Raises: UpstreamError, Busy, Rejected. Close what is returned, also when it was read to the end.
        """
        response = await self._request("POST", path, body)
        try:
            await _check(response)
        except BaseException:
            response.close()
            raise
        return Events(response)

    async def _answer(self, method: str, path: str, body: object) -> bytes:
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                response = await self._request(method, path, body)
                try:
                    await _check(response)
                    return await _body(response, MAX_ANSWER_BYTES)
                finally:
                    response.close()
        except TimeoutError as exc:
            raise UpstreamError(f"the upstream server did not answer within {ANSWER_TIMEOUT_S:g} s") from exc

    async def _request(self, method: str, path: str, body: object) -> aiohttp.ClientResponse:
        assert self._session is not None, "requests are made inside `async with`"
        try:
            return await self._session.request(method, self.target.base + path, json=body, allow_redirects=False)
        except aiohttp.ClientConnectorError as exc:
            await self._look_again()
            raise UpstreamError("the upstream server cannot be reached; nothing was sent") from exc
        except (aiohttp.ClientError, OSError, ValueError, TimeoutError) as exc:
            raise UpstreamError(f"the upstream server broke off before it answered ({type(exc).__name__})") from exc

    async def _look_again(self) -> None:
        """The server may have moved: look its name up anew, with every check. Requests under way go on."""
        try:
            target = await resolve(self._url, allow_private=self._allow_private, lookup=self._lookup)
        except TallyError as exc:
            log.warning("the upstream server's name no longer passes: %s", exc)
            return
        if self._resolver is not None:
            self._target = self._resolver.target = target


def _small_socket(info: tuple[Any, ...]) -> socket.socket:
    """A socket that takes in little ahead of its reader. `info`: as getaddrinfo gives it."""
    family, kind, proto = info[0], info[1], info[2]
    made = socket.socket(family, kind, proto)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, READ_BUFFER_BYTES)
    return made


class Events(AsyncIterator[dict[str, Any]]):
    """The events of one answer, decoded. Ends after `[DONE]`; an end without it is for the reader to judge."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self._lines = _lines(response)
        self._plain = "event-stream" not in response.headers.get("Content-Type", "")
        self.done = False

    async def __anext__(self) -> dict[str, Any]:
        """Raises: UpstreamError, Busy (the server says so within the stream), StopAsyncIteration."""
        if self._plain:
            raise UpstreamError("the upstream server was asked for a stream and answered without one")
        while not self.done:
            try:
                line = await anext(self._lines)
            except StopAsyncIteration:
                break
            if not line.startswith(b"data:"):
                continue  # comments, blank lines, and fields that OpenAI's streams do not use
            data = line[5:].strip()
            if data == b"[DONE]":
                self.done = True
                break
            event = _decoded(data)
            if not isinstance(event, dict):
                raise UpstreamError("the upstream server sent an event that is no JSON object")
            if event.get("error"):
                raise UpstreamError("the upstream server reported a failure inside its stream")
            return event
        raise StopAsyncIteration

    def drop(self) -> None:
        """Drop the connection at once, wherever its reader is. Idempotent, never raises."""
        self._response.close()

    async def aclose(self) -> None:
        """Keep the connection for the next request where the answer ended, else drop it. Idempotent, never raises."""
        if self.done:
            with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
                async with asyncio.timeout(LAST_BYTES_S):
                    await self._response.content.readany()
        if self._response.content.at_eof():
            self._response.release()
        else:
            self._response.close()


async def _lines(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """Lines without their ends. Reads only when asked. Raises: UpstreamError."""
    kept = bytearray()
    while True:
        end = kept.find(b"\n")
        if end >= 0:
            yield bytes(kept[:end]).rstrip(b"\r")
            del kept[: end + 1]
            continue
        if len(kept) > MAX_EVENT_BYTES:
            raise UpstreamError(f"the upstream server sent a line of more than {MAX_EVENT_BYTES} bytes")
        try:
            async with asyncio.timeout(SILENCE_S):
                chunk = await response.content.readany()
        except TimeoutError as exc:
            raise UpstreamError(f"the upstream server was silent for {SILENCE_S:g} s") from exc
        except (aiohttp.ClientError, OSError) as exc:
            raise UpstreamError("the upstream server broke off its stream") from exc
        if not chunk:
            if kept.strip():
                raise UpstreamError("the upstream server's stream ends in the middle of a line")
            return
        kept += chunk


async def _check(response: aiohttp.ClientResponse) -> None:
    """Raises: UpstreamError, Busy, Rejected for whatever is no 200."""
    status = response.status
    if status == 200:
        return
    if 300 <= status < 400:
        raise UpstreamError(f"the upstream server redirects (HTTP {status}), which is not followed: give its own URL")
    if status in (401, 403):
        raise UpstreamError(f"the upstream server does not accept our key (HTTP {status}): check the key file")
    if status in (429, 503):
        raise Busy(f"the upstream server has no room now (HTTP {status}): try again later")
    if 400 <= status < 500:
        raise Rejected(status, await _said(response))
    raise UpstreamError(f"the upstream server failed (HTTP {status})")


async def _said(response: aiohttp.ClientResponse) -> str:
    """The server's explanation, from the forms that such servers give it in; at most MAX_SAID_CHARS printable ones."""
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            raw = await _body(response, 64 << 10)
    except (UpstreamError, TimeoutError):
        return ""
    try:
        found = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return ""
    for name in ("error", "detail", "message"):
        if isinstance(found, dict) and name in found:
            found = found[name]
    if isinstance(found, list) and found and isinstance(found[0], dict):
        found = found[0].get("msg", "")
    text = found if isinstance(found, str) else ""
    return "".join(c if c.isprintable() else " " for c in text[:MAX_SAID_CHARS])


async def _body(response: aiohttp.ClientResponse, limit: int) -> bytes:
    """Raises: UpstreamError when it is longer than `limit` bytes or breaks off."""
    out = bytearray()
    try:
        while chunk := await response.content.readany():
            out += chunk
            if len(out) > limit:
                raise UpstreamError(f"the upstream server's answer has more than {limit} bytes")
    except (aiohttp.ClientError, OSError) as exc:
        raise UpstreamError("the upstream server broke off its answer") from exc
    return bytes(out)


def _decoded(raw: bytes) -> Any:
    try:
        return msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as exc:
        raise UpstreamError("the upstream server sent what is no JSON") from exc
