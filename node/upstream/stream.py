"""One answer under way, pulled by its consumer; and what was seen of the server meanwhile."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Final

from node.ports import Clock, EngineToken
from node.upstream.http import Events, UpstreamError
from node.upstream.reading import read_chunk
from node.upstream.writing import Writing

SMOOTHING: Final = 0.2
"""Weight of the newest observation in the averages behind `wait_ms`: five jobs forget two thirds of what was before."""


class UpstreamStream(AsyncIterator[EngineToken]):
    """One answer as its consumer sees it. Nothing is read from the server that was not asked for here, so a slow reader
    slows the server, and nothing is dropped. Use with contextlib.aclosing, or read it to the end.

    `opening`: the request. `left`: called once when it is over. `began`: monotonic seconds.
    """

    def __init__(
        self, opening: asyncio.Task[Events], writing: Writing, load: Load, left: Callable[[], None], began: float
    ) -> None:
        self._opening, self._writing, self._load, self._left, self._began = opening, writing, load, left, began
        self._loop = asyncio.get_running_loop()
        self._events: Events | None = None
        self._ready: deque[EngineToken] = deque()
        self._error: UpstreamError | None = None
        self._first = True
        self._closed = False

    async def __anext__(self) -> EngineToken:
        """Raises: UpstreamError when the server fails or breaks off; StopAsyncIteration after the last token."""
        while not self._ready:
            if self._error is not None:
                raise self._error
            if self._closed:
                raise StopAsyncIteration
            try:
                await self._read()
            except UpstreamError as exc:
                if not self._closed:
                    self.break_off(exc)
        token = self._ready.popleft()
        self._load.token(self._began, first=self._first, last=self._writing.over and not self._ready)
        self._first = False
        return token

    async def aclose(self) -> None:
        """Close the request; the server stops generating when it sees that. Idempotent, never raises."""
        self._ready.clear()
        self._let_go()
        if self._events is not None:
            await self._events.aclose()

    def break_off(self, error: UpstreamError) -> None:
        """Nothing more comes; what is ready still does, and then `error`."""
        if not self._closed:
            self._error = error
            self._let_go()

    async def _read(self) -> None:
        """Take in one event of the server. Raises: UpstreamError."""
        if self._events is None:
            await asyncio.wait({self._opening})
            if self._opening.cancelled():
                return  # closed meanwhile
            self._events = self._opening.result()
        try:
            event = await anext(self._events)
        except StopAsyncIteration:
            self._writing.end()
            return
        self._ready.extend(self._writing.push(read_chunk(event)))
        if self._writing.over:
            self._let_go()
            await self._events.aclose()

    def _let_go(self) -> None:
        """Give the turn back and stop the server, once."""
        if self._closed:
            return
        self._closed = True
        self._left()
        if not self._opening.done():
            self._opening.cancel()
        elif not self._opening.cancelled() and self._opening.exception() is None and not self._writing.over:
            self._opening.result().drop()

    def __del__(self) -> None:
        if not self._loop.is_closed():
            self._let_go()  # dropped without aclose: the turn must not stay taken


class Load:
    """What was seen of the server. `first_s`, `whole_s`: smoothed seconds to a first and to a last token."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._busy_since: float | None = None
        self._busy = 0.0
        self.first_s = self.whole_s = 0.0
        self.tokens_total = self.prompt_total = 0

    def begin(self, active: int) -> None:
        """A turn was taken; `active` are now."""
        if active and self._busy_since is None:
            self._busy_since = self._clock.monotonic()

    def end(self, active: int) -> None:
        """A turn was given back; `active` are still taken."""
        if not active and self._busy_since is not None:
            self._busy += self._clock.monotonic() - self._busy_since
            self._busy_since = None

    def busy_s(self) -> float:
        """Seconds in which at least one request was under way."""
        return self._busy + (self._clock.monotonic() - self._busy_since if self._busy_since is not None else 0.0)

    def token(self, began: float, *, first: bool, last: bool) -> None:
        """A token went to its consumer; its stream began at `began`, monotonic seconds."""
        self.tokens_total += 1
        took = self._clock.monotonic() - began
        if first:
            self.first_s = _smoothed(self.first_s, took)
        if last:
            self.whole_s = _smoothed(self.whole_s, took)


def _smoothed(before: float, newest: float) -> float:
    return newest if not before else before + SMOOTHING * (newest - before)
