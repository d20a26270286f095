"""Whose turn it is: a bounded number at a time, the most urgent first, the rest in a bounded queue."""

from __future__ import annotations

import asyncio
import heapq
from itertools import count

from node.ports import EngineFull, Urgency


class Turns:
    """`slots` at a time, `max_queue` waiting. Equal urgency is served in order of arrival."""

    def __init__(self, slots: int, max_queue: int) -> None:
        self._slots, self._max_queue = slots, max_queue
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._arrivals = count()
        self.active = 0

    @property
    def queued(self) -> int:
        return sum(not place.done() for _, _, place in self._waiting)

    async def take(self, urgency: Urgency, limit_s: float) -> None:
        """Returns with the turn; every one that was taken is given back. Raises: EngineFull, also after `limit_s`."""
        if self.active < self._slots:
            self.active += 1
            return
        if self.queued >= self._max_queue:
            raise EngineFull(f"all {self._slots} slots and {self._max_queue} queue places are taken: try again later")
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (-urgency, next(self._arrivals), place))
        try:
            async with asyncio.timeout(limit_s):
                await place
        except (TimeoutError, asyncio.CancelledError) as exc:
            if place.done() and not place.cancelled():
                self.give_back()  # the turn came at the moment the wait was given up
            if isinstance(exc, asyncio.CancelledError):
                raise
            raise EngineFull(f"all {self._slots} slots stayed taken for {limit_s:g} s: try again later") from exc

    def give_back(self) -> None:
        """The next in line goes on, or a slot is free."""
        while self._waiting:
            _, _, place = heapq.heappop(self._waiting)
            if not place.done():
                place.set_result(None)
                return
        self.active -= 1
