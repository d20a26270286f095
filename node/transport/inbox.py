"""What has arrived on one stream and was not yet received. Lives in the asyncio loop; both transports fill it.

Contract: frames come out in the order they were sent, none is lost when a `receive` is cancelled, and after the last
one the reason the stream ended is raised, for ever.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

from node.ports import StreamEnded
from protocol.errors import FrameTooLarge, LocalProtocolError
from protocol.framing import FrameDecoder

INBOX_BYTES: Final = 128 * 1024
"""Received and unread bytes above which nothing more is read from the network, so that the sender's window closes.
Two of the largest frames. Doubling it doubles what a slow reader's peers can make us hold per stream."""


class Inbox:
    """Decoded frames of one stream, with back-pressure told through `on_room`."""

    __slots__ = ("_decoder", "_ended", "_frames", "_held", "_on_room", "_waiter", "full")

    def __init__(self, on_room: Callable[[], None]) -> None:
        """`on_room` is called when an inbox that was `full` has been drained to half, or has ended."""
        self._decoder = FrameDecoder()
        self._frames: deque[bytes] = deque()
        self._held = 0
        self._ended: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._on_room = on_room
        self.full = False

    @property
    def ended(self) -> bool:
        """Whether nothing more can arrive (frames that already did can still be received)."""
        return self._ended is not None

    def feed(self, data: bytes) -> None:
        """Add bytes from the wire. Ignored once ended."""
        if self._ended is not None:
            return
        try:
            frames = self._decoder.feed(data)
        except FrameTooLarge:
            frames = []
        for frame in frames:
            # An empty frame still takes a place: it must not be free to send without end.
            self._held += len(frame) + 64
        self._frames.extend(frames)
        if self._held + self._decoder.buffered >= INBOX_BYTES:
            self.full = True
        if self._decoder.error is not None:
            self.end(self._decoder.error)
        elif frames:
            self._wake()

    def end(self, reason: Exception) -> None:
        """Say that nothing more will arrive and why. The first reason stays."""
        if self._ended is None:
            self._ended = reason
            self._wake()
            self._on_room()

    def discard(self) -> None:
        """Let go of what has arrived: the stream was closed or reset by its owner."""
        self._frames.clear()
        self._held = 0

    async def receive(self, timeout_s: float | None) -> bytes:
        """The next frame. Raises: StreamEnded, FrameTooLarge, TimeoutError, LocalProtocolError (two receivers)."""
        while not self._frames:
            if self._ended is not None:
                raise self._error()
            if self._waiter is not None:
                raise LocalProtocolError("two tasks receive from one stream; let one of them hand the frames on")
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                async with asyncio.timeout(timeout_s):
                    await self._waiter
            finally:
                self._waiter = None
        frame = self._frames.popleft()
        self._held -= len(frame) + 64
        if self.full and self._held <= INBOX_BYTES // 2:
            self.full = False
            self._on_room()
        return frame

    def _error(self) -> Exception:
        # A fresh exception for each raise: raising one object twice piles up tracebacks.
        if isinstance(self._ended, FrameTooLarge):
            return FrameTooLarge(self._ended.length, self._ended.limit)
        return StreamEnded(str(self._ended))

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
