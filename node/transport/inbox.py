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
from protocol.framing import PREFIX_BYTES, FrameDecoder

INBOX_BYTES: Final = 128 * 1024
"""Received and unread bytes at which no more is read from the network, so that the sender's window closes. Above one
of the largest frames, or an unfinished one could block its own completion. Doubling it doubles what a slow reader's
peers can make us hold per stream."""

ROOM_BYTES: Final = INBOX_BYTES * 3 // 4
"""Unread bytes at which reading resumes. Above MAX_FRAME_BYTES + 4 for the same reason."""


class Inbox:
    """Decoded frames of one stream, with back-pressure told through `on_room`."""

    __slots__ = ("_decoder", "_ended", "_fed", "_frames", "_full", "_on_room", "_waiter", "taken")

    def __init__(self, on_room: Callable[[], None]) -> None:
        """`on_room` is called when an inbox that was `full` has room again, or has ended."""
        self._decoder = FrameDecoder()
        self._frames: deque[bytes] = deque()
        self._fed = 0
        self._full = False
        self._ended: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._on_room = on_room
        self.taken = 0  # wire bytes of the frames received so far; only this loop writes it, any thread may read it

    @property
    def ended(self) -> bool:
        """Whether nothing more can arrive (frames that already did can still be received)."""
        return self._ended is not None

    @property
    def full(self) -> bool:
        return self._fed - self.taken >= INBOX_BYTES

    def feed(self, data: bytes) -> None:
        """Add bytes from the wire. Ignored once ended."""
        if self._ended is not None:
            return
        self._fed += len(data)
        try:
            frames = self._decoder.feed(data)
        except FrameTooLarge:
            frames = []
        self._frames.extend(frames)
        self._full = self._full or self.full
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
        self.taken = self._fed

    def error(self) -> Exception:
        """Why the stream ended: a fresh exception each time, for raising one object twice piles up tracebacks."""
        if isinstance(self._ended, FrameTooLarge):
            return FrameTooLarge(self._ended.length, self._ended.limit)
        return StreamEnded(str(self._ended))

    async def receive(self, timeout_s: float | None) -> bytes:
        """The next frame. Raises: StreamEnded, FrameTooLarge, TimeoutError, LocalProtocolError (two receivers)."""
        while not self._frames:
            if self._ended is not None:
                raise self.error()
            if self._waiter is not None:
                raise LocalProtocolError("two tasks receive from one stream; let one of them hand the frames on")
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                async with asyncio.timeout(timeout_s):
                    await self._waiter
            finally:
                self._waiter = None
        frame = self._frames.popleft()
        self.taken += len(frame) + PREFIX_BYTES
        if self._full and self._fed - self.taken <= ROOM_BYTES:
            self._full = False
            self._on_room()
        return frame

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
