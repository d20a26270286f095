"""One job per Idempotency-Key, however often a client sends the request.

The answer is recorded as it is made, by a task of its own; every request under the key reads the record from its start.
A failure for which nothing was paid is forgotten, so that a retry runs; one for which something was paid is kept, so
that it does not. When the last reader leaves, the job has a few seconds for a reader to come back and is then
cancelled.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final

from node.gateway.errors import INTERNAL, ApiError, invalid, too_busy
from node.gateway.jobs import Part
from node.gateway.limits import MAX_IDEMPOTENCY_KEY, Limits
from node.gateway.waiting import end
from node.ports import Clock

_LOG: Final = logging.getLogger(__name__)

EXPIRY_S: Final = 1.0
"""How often kept answers are looked through for those whose time is over. Unit: s. They are kept for an hour."""

Produce = Callable[[], AsyncGenerator[Part, None]]


@dataclass(frozen=True, slots=True)
class RequestKey:
    """Whose request it is: the API key's hash and the Idempotency-Key. `fingerprint`: SHA-256 of path and body."""

    owner: str
    key: str
    fingerprint: bytes


def request_key(owner: str, header: str, path: str, body: bytes) -> RequestKey:
    """Raises: ApiError (400) for a header that is no key."""
    if not 1 <= len(header) <= MAX_IDEMPOTENCY_KEY or not header.isprintable():
        raise invalid(
            "Idempotency-Key", f"Idempotency-Key must be 1 to {MAX_IDEMPOTENCY_KEY} printable characters.", "bad_key"
        )
    return RequestKey(owner, header, hashlib.sha256(path.encode() + b"\0" + body).digest())


class _Exchange:
    """One recorded answer. `base`: how many parts were dropped from the front, once it grew too large to replay."""

    def __init__(self, fingerprint: bytes) -> None:
        self.fingerprint = fingerprint
        self.parts: list[Part] = []
        self.base = 0
        self.size = 0
        self.failure: ApiError | None = None
        self.done = False
        self.replayable = True
        self.expires = 0.0
        self.readers: dict[object, int] = {}
        self.changed = asyncio.Condition()
        self.recorder: asyncio.Task[None] | None = None
        self.grace: asyncio.Task[None] | None = None

    @property
    def unread(self) -> int:
        """Bytes that the slowest reader has still to take."""
        first = min(self.readers.values(), default=self.base + len(self.parts))
        return sum(_size(part) for part in self.parts[first - self.base :])

    def trim(self) -> None:
        """Drop what every reader has: the answer is too large to be kept for a replay."""
        first = min(self.readers.values(), default=self.base + len(self.parts))
        del self.parts[: first - self.base]
        self.base = first


class Exchanges:
    """All recorded answers, bounded in bytes and in time."""

    def __init__(self, clock: Clock, limits: Limits) -> None:
        self._clock = clock
        self._limits = limits
        self._held: OrderedDict[tuple[str, str], _Exchange] = OrderedDict()
        self._running = 0
        self._bytes = 0
        self._expires_next = 0.0

    async def follow(self, key: RequestKey, produce: Produce) -> AsyncGenerator[Part, None]:
        """The answer to `key`'s request, made by `produce` unless it exists. Raises: ApiError."""
        exchange = self._open(key, produce)
        reader = object()
        exchange.readers[reader] = 0
        if exchange.grace is not None:
            exchange.grace.cancel()
            exchange.grace = None
        try:
            while True:
                async with exchange.changed:
                    position = exchange.readers[reader]
                    while position == exchange.base + len(exchange.parts) and not exchange.done:
                        await exchange.changed.wait()
                    parts = exchange.parts[position - exchange.base :]
                if not parts:
                    break
                for part in parts:
                    yield part
                async with exchange.changed:
                    exchange.readers[reader] = position + len(parts)
                    if not exchange.replayable:
                        exchange.trim()
                    exchange.changed.notify_all()
            if exchange.failure is not None:
                raise exchange.failure
        finally:
            del exchange.readers[reader]
            if not exchange.readers and not exchange.done:
                exchange.grace = asyncio.ensure_future(self._leave(exchange))

    async def close(self) -> None:
        """Cancel the jobs that still run."""
        tasks = [task for item in self._held.values() for task in (item.grace, item.recorder) if task is not None]
        await end(*tasks)
        self._held.clear()
        self._bytes = 0

    def _open(self, key: RequestKey, produce: Produce) -> _Exchange:
        self._expire()
        place = (key.owner, key.key)
        found = self._held.get(place)
        if found is not None:
            if found.fingerprint != key.fingerprint:
                said = "This Idempotency-Key was used for another request. Nothing was sent. Use a new key."
                raise ApiError(422, "invalid_request_error", "idempotency_key_reused", said, "Idempotency-Key")
            if not found.replayable:
                said = "The answer to this Idempotency-Key was too large to keep, and was paid. Use a new key."
                raise ApiError(409, "invalid_request_error", "answer_not_kept", said, "Idempotency-Key", retry=False)
            return found
        if self._running >= self._limits.jobs:
            raise too_busy(f"This gateway already runs {self._running} jobs. Nothing was sent or paid.")
        self._running += 1
        exchange = self._held[place] = _Exchange(key.fingerprint)
        exchange.recorder = asyncio.ensure_future(self._record(place, exchange, produce()))
        return exchange

    async def _record(self, place: tuple[str, str], exchange: _Exchange, parts: AsyncGenerator[Part, None]) -> None:
        paid = False
        try:
            async with aclosing(parts):
                async for part in parts:
                    paid = True  # parts appear only once tokens were delivered
                    await self._append(exchange, part)
        except ApiError as exc:
            exchange.failure = exc
            paid = paid or (exc.delivered is not None and exc.delivered.anything)
        except asyncio.CancelledError:
            said = "The job under this Idempotency-Key was cancelled when its client left. Use a new key to ask again."
            exchange.failure = ApiError(
                409, "invalid_request_error", "job_cancelled", said, "Idempotency-Key", retry=False
            )
            paid = True  # perhaps: tokens on their way count, so a retry under this key must not buy them again
        except Exception:  # noqa: BLE001  a bug of ours must end the readers' wait as well
            _LOG.exception("a job under an Idempotency-Key failed in the gateway")
            exchange.failure, paid = INTERNAL, True
        finally:
            exchange.done = True
            self._running -= 1
            exchange.expires = self._clock.monotonic() + self._limits.replay_s
            if exchange.failure is not None and not paid and self._held.get(place) is exchange:
                self._drop(place)
            async with exchange.changed:
                exchange.changed.notify_all()
            self._bound()

    async def _append(self, exchange: _Exchange, part: Part) -> None:
        limit = self._limits.replay_entry_bytes
        async with exchange.changed:
            exchange.parts.append(part)
            exchange.size += _size(part)
            self._bytes += _size(part)
            if exchange.size > limit:
                exchange.replayable = False
                exchange.trim()
            exchange.changed.notify_all()
            # Beyond what is kept, a slow reader slows the job down as it would without a record.
            while not exchange.replayable and exchange.readers and exchange.unread > limit:
                await exchange.changed.wait()

    async def _leave(self, exchange: _Exchange) -> None:
        async with exchange.changed:
            exchange.changed.notify_all()  # a recorder that waited for the reader who left
        await self._clock.sleep(self._limits.grace_s)
        if not exchange.readers and exchange.recorder is not None:
            exchange.recorder.cancel()

    def _expire(self) -> None:
        """Forget answers whose time is over. Looks once in EXPIRY_S: a batch leaves tens of thousands of them."""
        now = self._clock.monotonic()
        if now < self._expires_next:
            return
        self._expires_next = now + EXPIRY_S
        for place in [place for place, item in self._held.items() if item.done and item.expires <= now]:
            self._drop(place)

    def _bound(self) -> None:
        """Drop the oldest finished answers until the rest fit."""
        if self._bytes <= self._limits.replay_bytes:
            return
        for place in [place for place, item in self._held.items() if item.done and not item.readers]:
            self._drop(place)
            if self._bytes <= self._limits.replay_bytes // 8 * 7:  # room for more, so that few answers pay for the look
                return

    def _drop(self, place: tuple[str, str]) -> None:
        self._bytes -= self._held.pop(place).size


def _size(part: Part) -> int:
    # A fixed allowance for the objects around the bytes.
    return 200 + (len(part) if isinstance(part, bytes) else 0)
