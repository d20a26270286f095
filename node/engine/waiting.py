"""Whose turn it is when a slot is free. Most urgent first, then in order of arrival; nobody is passed over for ever.

The rule of ageing: after PATIENCE streams in a row took a slot before somebody less urgent who had come earlier, the
next free slot goes to whoever has waited longest of all, and that stream makes a leaf of tokens before it can be
displaced. So a flood of urgent work slows the rest to one slot in PATIENCE + 1, and delays an urgent arrival by one.
"""

from __future__ import annotations

from typing import Final

from node.engine.generation import Generation
from node.ports import Urgency
from protocol.units import LEAF_TOKENS

PATIENCE: Final = 8
"""Overtakings before the longest waiting goes first. Unit: streams. Doubling it halves what is left to the less urgent
under a flood, and how often an urgent stream finds a slot given to one of them."""

QUEUE_PERCENT: Final = {Urgency.BATCH: 25, Urgency.FLEX: 50, Urgency.STANDARD: 75, Urgency.PRIORITY: 100}
"""How full the queue may be, all classes together, for a class to queue in it. Unit: percent of its places. A flood of
one class leaves room for those above it; at 100 for all, whoever floods decides who is refused."""


def queue_limit(urgency: Urgency, places: int) -> int:
    """Streams that may wait, in all, for one of `urgency` to join them. Rounded up: a single place is for everybody."""
    return -(-places * QUEUE_PERCENT[urgency] // 100)


class WaitingRoom:
    """Streams without a slot, new ones and displaced ones."""

    def __init__(self) -> None:
        self._streams: list[Generation] = []
        self._arrivals = 0
        self._overtaken = 0

    def __len__(self) -> int:
        return len(self._streams)

    def all(self) -> list[Generation]:
        return list(self._streams)

    def arrive(self, stream: Generation) -> None:
        """A new one, at the end of its class."""
        self._arrivals += 1
        stream.arrival = self._arrivals
        self._streams.append(stream)

    def come_back(self, stream: Generation) -> None:
        """A displaced one, at its old place in the order of arrival."""
        self._streams.append(stream)

    def leave(self, stream: Generation) -> None:
        self._streams.remove(stream)

    def most_urgent(self) -> Generation:
        """Whom ageing does not concern: the first of the most urgent class."""
        return min(self._streams, key=lambda stream: (-stream.request.urgency, stream.arrival))

    def take(self) -> Generation:
        """Remove and return who gets a free slot."""
        first = self.most_urgent()
        if self._overtaken >= PATIENCE:
            first = min(self._streams, key=lambda stream: stream.arrival)
            first.secured = first.produced + LEAF_TOKENS
        self.leave(first)
        self.went(first)
        return first

    def went(self, stream: Generation) -> None:
        """`stream` got a slot: note whether it overtook anybody."""
        overtook = any(s.arrival < stream.arrival and s.request.urgency < stream.request.urgency for s in self._streams)
        self._overtaken = self._overtaken + 1 if overtook else 0
