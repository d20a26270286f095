"""Who listens to which gossip topic. A slow or raising listener costs itself messages and nobody else anything."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from typing import Final

from node.ports import GossipHandler

log = logging.getLogger("tally.transport")

QUEUE_MESSAGES: Final = 256
"""Messages waiting for one listener before the newest is dropped. Gossip is best effort, and at the 10 messages per
second that GossipSub lets through this is 25 s of a stalled listener; doubling it doubles 16 MiB at worst."""


class _Listener:
    """One handler with its queue and the task that empties it, one message after the other."""

    def __init__(self, topic: str, handler: GossipHandler) -> None:
        self._topic, self._handler = topic, handler
        self._queue: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue(QUEUE_MESSAGES)
        self.task = asyncio.create_task(self._run(), name=f"gossip {topic}")

    def offer(self, author: str, payload: bytes) -> None:
        try:
            self._queue.put_nowait((author, payload))
        except asyncio.QueueFull:
            log.warning("gossip on %s: a listener is %d messages behind; one is dropped", self._topic, QUEUE_MESSAGES)

    async def _run(self) -> None:
        while True:
            author, payload = await self._queue.get()
            try:
                await self._handler(author, payload)
            except Exception:
                log.exception(
                    "gossip on %s: the listener failed on a message of %s; the next is tried", self._topic, author
                )


class Subscriptions:
    """The listeners of one transport."""

    def __init__(self) -> None:
        self._by_topic: defaultdict[str, list[_Listener]] = defaultdict(list)

    @property
    def topics(self) -> tuple[str, ...]:
        return tuple(self._by_topic)

    def add(self, topic: str, handler: GossipHandler) -> None:
        """Needs a running loop."""
        self._by_topic[topic].append(_Listener(topic, handler))

    def deliver(self, topic: str, author: str, payload: bytes) -> None:
        for listener in self._by_topic.get(topic, ()):
            listener.offer(author, payload)

    async def close(self) -> None:
        """End the listeners' tasks. The topics are forgotten."""
        tasks = [listener.task for listeners in self._by_topic.values() for listener in listeners]
        self._by_topic.clear()
        await cancel_and_wait(tasks)


async def cancel_and_wait(tasks: list[asyncio.Task[None]]) -> None:
    """Cancel tasks and see them end; the calling task, if among them, is left to end by itself."""
    others = [task for task in tasks if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    if others:
        await asyncio.wait(others, timeout=1.0)
