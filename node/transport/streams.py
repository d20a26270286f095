"""One libp2p stream seen from asyncio. Two halves of one object: methods named `t_...` run in the trio thread.

Contract: what `send` accepted leaves in order, several sends in one write when they come faster than the network
takes them; what arrives is handed over in batches and no faster than it is received. Each counter is written by one
thread only and read by both, so a stale value delays a wake-up by one step and never loses one: whoever waits first
says so (`_starved`, `_want_room`) and then looks again.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from typing import Any, Final

import trio
from libp2p.exceptions import BaseLibp2pError
from libp2p.stream_muxer.exceptions import MuxedStreamEOF

from node.ports import StreamEnded
from node.transport.inbox import INBOX_BYTES, ROOM_BYTES, Inbox
from node.transport.muxer import WRITE_STALL_S
from node.transport.trio_thread import TrioThread
from protocol.errors import FrameTooLarge
from protocol.framing import encode_frame
from protocol.peers import address_of_peer
from protocol.units import Address

log = logging.getLogger("tally.transport")

OUTBOX_BYTES: Final = 128 * 1024
"""Bytes accepted by `send` and not yet taken by the muxer, above which `send` waits. With the peer's window and inbox
it bounds what is under way on a stream; doubling it doubles what a slow reader costs the sender."""

READ_BYTES: Final = 64 * 1024
"""Largest piece handed to asyncio at once."""

LINGER_S: Final = 5.0
"""How long a closed stream waits for the peer's own end of file before it is reset. Keeps a peer that never closes
from holding a place on the connection."""


class Libp2pStream:
    """`node.ports.Stream` over one Yamux stream whose protocol is negotiated."""

    def __init__(self, thread: TrioThread, net_stream: Any, registry: set[Libp2pStream]) -> None:
        """Made in trio. `net_stream`: the library's stream. `registry`: the live streams, kept in trio."""
        self._thread = thread
        self._net_stream = net_stream
        self._muxed = net_stream.muxed_stream
        self._peer_id = str(net_stream.muxed_conn.peer_id)
        self._registry = registry
        registry.add(self)
        self._inbox = Inbox(on_room=self._tell_room)
        self._let_go = False  # asyncio: closed or reset here
        # Towards the network.
        self._outbox: deque[bytes] = deque()
        self._accepted = 0  # bytes; written by asyncio
        self._written = 0  # bytes; written by trio
        self._poked = False
        self._want_room = False
        self._room = asyncio.Event()
        self._t_flushing = False
        self._t_closing = False
        # From the network.
        self._posted = 0  # bytes; written by trio
        self._starved = False
        self._t_room = trio.Event()
        self._t_over = trio.Event()

    @property
    def peer_id(self) -> str:
        return self._peer_id

    @property
    def peer_address(self) -> Address:
        return address_of_peer(self._peer_id)

    @property
    def unsent(self) -> bool:
        """Whether something accepted (or the end of the stream) is still to be written."""
        return bool(self._outbox) or self._t_flushing

    # -------------------------------------------------------------------------------------------------- asyncio side

    async def send(self, *frames: bytes) -> None:
        await self.send_raw(b"".join([encode_frame(frame) for frame in frames]))

    async def send_raw(self, data: bytes) -> None:
        """Bytes as they are, for tests that play a peer who keeps no rules. Raises: StreamEnded."""
        while self._accepted - self._written >= OUTBOX_BYTES and not self._inbox.ended:
            self._room.clear()
            self._want_room = True
            if self._accepted - self._written >= OUTBOX_BYTES:
                await self._wait_room()
        if self._inbox.ended:
            error = self._inbox.error()
            raise StreamEnded(f"the frames were not sent: {error}") from error
        self._accepted += len(data)
        self._outbox.append(data)
        if not self._poked:
            self._poked = True
            if not self._thread.submit(self.t_poke):
                self.end("the network is down; it restarts by itself; open a new stream")
                raise self._inbox.error()
        # Others run between two sends, as they would if this were a write to a socket.
        await asyncio.sleep(0)

    async def _wait_room(self) -> None:
        try:
            async with asyncio.timeout(WRITE_STALL_S):
                await self._room.wait()
        except TimeoutError as exc:
            await self.reset()
            raise StreamEnded(
                f"peer {self._peer_id} read nothing for {WRITE_STALL_S:g} s; the stream is reset"
            ) from exc

    async def receive(self, timeout_s: float | None = None) -> bytes:
        try:
            frame = await self._inbox.receive(timeout_s)
        except TimeoutError as exc:
            await self.reset()
            raise StreamEnded(f"peer {self._peer_id} sent nothing for {timeout_s:g} s; the stream is reset") from exc
        except FrameTooLarge:
            await self.reset()
            raise
        if self._starved and self._posted - self._inbox.taken <= ROOM_BYTES:
            self._tell_room()
        return frame

    async def close(self) -> None:
        if not self._let_go:
            self._release("the stream was closed here")
            self._thread.submit(self.t_close)

    async def reset(self) -> None:
        # After a close too: what was accepted and has not left is then dropped.
        if not self._let_go:
            self._release("the stream was reset here")
        self._thread.submit(self.t_reset)

    def end(self, reason: str) -> None:
        """Nothing more will arrive and nothing more be sent."""
        self._inbox.end(StreamEnded(reason))
        self._room.set()

    def _release(self, reason: str) -> None:
        self._let_go = True
        self.end(reason)
        self._inbox.discard()

    def _feed(self, data: bytes) -> None:
        self._inbox.feed(data)

    def _tell_room(self) -> None:
        if self._starved:
            self._starved = False
            self._thread.submit(self._t_wake_pump)

    # ----------------------------------------------------------------------------------------------------- trio side

    def _t_wake_pump(self) -> None:
        self._t_room.set()

    def t_poke(self) -> None:
        if not self._t_flushing:
            self._t_flushing = True
            self._thread.spawn(self._t_flush)

    async def _t_flush(self) -> None:
        """Write what was accepted until there is none left. At most one of these runs per stream."""
        try:
            while True:
                while self._outbox:
                    chunks = [self._outbox.popleft() for _ in range(len(self._outbox))]
                    data = b"".join(chunks)
                    await self._muxed.write(data)
                    self._written += len(data)
                    if self._want_room and self._accepted - self._written < OUTBOX_BYTES:
                        self._want_room = False
                        self._thread.post(self._room.set)
                self._poked = False
                if not self._outbox:
                    break
                self._poked = True
            if self._t_closing or self._t_over.is_set():
                await self._t_finish()
                self._thread.spawn(self._t_linger)
        except Exception as exc:  # noqa: BLE001 - whatever it is, this stream is over, and its user must learn it
            self._thread.post(self.end, f"peer {self._peer_id} takes no more: {exc}")
            await self._t_abandon()
        finally:
            self._t_flushing = False

    async def t_pump(self) -> None:
        """Read until the stream is over. Ends when both directions are."""
        try:
            while True:
                data = await self._muxed.read(READ_BYTES)
                if self._t_closing:
                    if self.unsent:
                        continue  # let go of, but what was accepted before has yet to leave
                    break  # the peer still talks after our end of file
                self._posted += len(data)
                self._thread.post(self._feed, data)
                while self._posted - self._inbox.taken >= INBOX_BYTES and not self._t_closing:
                    self._t_room = trio.Event()
                    self._starved = True
                    if self._posted - self._inbox.taken >= INBOX_BYTES:
                        await self._t_room.wait()
        except MuxedStreamEOF:
            self._thread.post(self.end, f"peer {self._peer_id} ended the stream (end of file)")
            if not self._t_flushing:
                # Our port has no half-closed streams: who ends a stream reads it no more.
                await self._t_finish()
            return
        except Exception as exc:  # noqa: BLE001 - whatever it is, this stream is over, and its user must learn it
            self._thread.post(self.end, f"peer {self._peer_id} is gone or has reset the stream ({exc})")
        finally:
            self._registry.discard(self)
            self._t_over.set()
        await self._t_abandon()

    def t_close(self) -> None:
        """Let what was accepted out, then say that it was all."""
        self._t_closing = True
        self._t_room.set()
        self.t_poke()

    def t_reset(self) -> None:
        self._t_closing = True
        self._t_room.set()
        self._thread.spawn(self._t_abandon)

    async def _t_linger(self) -> None:
        """Give the peer a while to end the stream too."""
        with trio.move_on_after(LINGER_S) as patience:
            await self._t_over.wait()
        if patience.cancelled_caught:
            await self._t_abandon()

    async def _t_finish(self) -> None:
        """Send our end of file."""
        with trio.move_on_after(LINGER_S):
            try:
                await self._net_stream.close()
            except BaseLibp2pError as exc:
                log.debug("the stream to %s was gone before it was closed: %r", self._peer_id, exc)

    async def _t_abandon(self) -> None:
        """Reset the stream; wakes the pump, which takes it off the register."""
        self._outbox.clear()
        with trio.move_on_after(LINGER_S):
            await self._net_stream.reset()
