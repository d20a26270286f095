"""A job stream: frames, the conversation table and the keep-alive over one transport stream, for either role.

A reader task runs from start to close, so pings are answered however busy the owner is. What a peer may have under
way is bounded by the protocol (one increment), and the queue's bound turns a flood into back-pressure.
"""

from __future__ import annotations

import asyncio
import contextlib
from types import TracebackType
from typing import Final, TypeVar

from node.ports import Clock, Stream, StreamEnded
from protocol import frames
from protocol.errors import RemoteProtocolError, UnexpectedFrame
from protocol.frames import Frame, Ping, Pong
from protocol.session import Conversation, Side, State

PING_AFTER_S: Final = 5.0
"""Silence before we ask whether the peer is there. Unit: s."""

DEAD_AFTER_S: Final = 15.0
"""Silence after which the peer is given up: three pings unanswered. Unit: s. A frozen peer never closes its
stream, so without this a job would hang for ever; doubling it doubles how long a user waits for a failover."""

QUEUE_FRAMES: Final = {Side.CLIENT: 64, Side.PROVIDER: 16}
"""Frames read and not yet handled, by who reads. An increment is at most 32 token frames and a receipt; a client that
sends more than a few is flooding, and a frame may be 64 KiB. What does not fit waits in the transport."""

F = TypeVar("F", bound=Frame)


class JobStream:
    """`async with JobStream(...) as talk`; leaving it resets the stream unless the conversation reached its end."""

    def __init__(self, stream: Stream, side: Side, clock: Clock) -> None:
        self.stream = stream
        self.received_at = 0
        """When the frame that `receive` last gave arrived, Unix ms: however late its owner came to read it."""
        self.conversation = Conversation(side)
        self._clock = clock
        self._queue: asyncio.Queue[tuple[Frame | Exception, int]] = asyncio.Queue(QUEUE_FRAMES[side])
        self._heard = clock.monotonic()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> JobStream:
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._keep_alive())]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.conversation.state is State.CLOSED:
            await self.stream.close()
        else:
            await self.stream.reset()

    async def send(self, *outgoing: Frame) -> None:
        """Raises: StreamEnded, also when the peer has ended the conversation meanwhile; LocalProtocolError."""
        if self.conversation.state is State.CLOSED:
            raise StreamEnded("the peer has ended the conversation")
        for frame in outgoing:
            self.conversation.sending(frame)
        await self.stream.send(*(frames.encode(frame) for frame in outgoing))

    async def receive(self, timeout_s: float | None = None) -> Frame:
        """The next frame, pings and pongs left out. Raises: StreamEnded, RemoteProtocolError; then and ever after."""
        if self._queue.empty():
            try:
                async with asyncio.timeout(timeout_s):  # not wait_for, which starts a task for every frame
                    item, self.received_at = await self._queue.get()
            except TimeoutError as exc:
                raise StreamEnded(f"the peer sent nothing the job could go on with for {timeout_s:g} s") from exc
        else:
            item, self.received_at = self._queue.get_nowait()
        if isinstance(item, Exception):
            self._queue.put_nowait((item, self.received_at))
            raise item
        return item

    async def expect(self, kind: type[F], timeout_s: float) -> F:
        """The next frame, which must be of `kind`. Raises: StreamEnded, RemoteProtocolError."""
        frame = await self.receive(timeout_s)
        if not isinstance(frame, kind):
            raise UnexpectedFrame(type(frame).__name__, self.conversation.state)
        return frame

    async def _read(self) -> None:
        try:
            while True:
                frame = frames.decode(await self.stream.receive())
                self._heard = self._clock.monotonic()
                self.conversation.received(frame)
                if isinstance(frame, Ping):
                    await self.send(Pong(frame.number))
                elif not isinstance(frame, Pong):
                    await self._queue.put((frame, self._clock.now_ms()))
        except (StreamEnded, RemoteProtocolError) as exc:
            await self._queue.put((exc, self._clock.now_ms()))

    async def _keep_alive(self) -> None:
        number = 0
        while True:
            await self._clock.sleep(PING_AFTER_S)
            silent = self._clock.monotonic() - self._heard
            if silent >= DEAD_AFTER_S:
                await self.stream.reset()  # the reader then ends, and tells the owner
                return
            if silent >= PING_AFTER_S and self.conversation.state is not State.CLOSED:
                with contextlib.suppress(StreamEnded):
                    await self.send(Ping(number))
                number += 1
