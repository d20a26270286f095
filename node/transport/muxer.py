"""py-libp2p's Yamux, kept within its bounds.

The library's muxer does not enforce its receive window, gives up on a reader who pauses for 5 s, asks for a window
update on every read, drops what has arrived when a connection closes, and can wait for ever to say goodbye to a peer
that is frozen. The subclasses here change that and nothing on the wire: the peer sees plain /yamux/1.0.0.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Awaitable, Callable
from typing import Any, Final

import trio
from libp2p.io.exceptions import IOException
from libp2p.network.connection.exceptions import RawConnError
from libp2p.stream_muxer import muxer_multistream
from libp2p.stream_muxer.exceptions import MuxedStreamEOF, MuxedStreamError, MuxedStreamReset
from libp2p.stream_muxer.yamux import yamux

log = logging.getLogger("tally.transport")

WINDOW_BYTES: Final = yamux.DEFAULT_WINDOW_SIZE
"""Receive window of a stream, fixed: 256 KiB, Yamux's initial value. The library would grow it to 16 MiB for a fast
sender; token streams need a thousandth, and whatever we grant a stranger may make us hold."""

MAX_DATA_FRAME_BYTES: Final = 1 << 20
"""A Yamux DATA frame announced above this closes the connection before its body is read. An honest peer stays within
WINDOW_BYTES; the slack is for muxers that round up."""

MAX_BUFFERED_BYTES: Final = 8 << 20
"""Unread bytes of all streams of one connection above which it is closed. 32 streams with a full window."""

MAX_STREAMS: Final = 512
"""Live streams on one connection, both directions, above which it is closed. An honest pair opens at most
MAX_OUTBOUND_STREAMS each way and a few of the library's own."""

MAX_OUTBOUND_STREAMS: Final = 200
"""Streams we open on one connection before we dial another: the library's 257th waits for ever, and 56 are left to its
own protocols (identify, gossip, directory)."""

WRITE_STALL_S: Final = 30.0
"""A peer who opens its window for no byte in this time is given up on: the stream is reset. Twice the time in which
a dead connection is noticed, so that whoever is merely slow is told from whoever is gone."""

GOODBYE_S: Final = 0.2
"""Time given to the farewell frame when a connection is closed. A frozen peer will not take it."""

_HEADER: Final = struct.Struct(yamux.YAMUX_HEADER_FORMAT)
_CHUNK_BYTES: Final = yamux.MAX_MESSAGE_SIZE - yamux.HEADER_SIZE


class GuardedYamuxStream(yamux.YamuxStream):  # type: ignore[misc]
    """A Yamux stream whose windows are enforced inward and waited for, without polling, outward."""

    _opened: trio.Event | None = None  # set when the send window opens or the stream is over
    _send_window = 0
    _recv_window = 0
    _closed = False
    _unacknowledged = 0  # bytes read for which no window update was sent yet
    leftover = b""  # what had arrived and was unread when the connection went

    # The library's frame loop writes these three attributes directly, so the guards sit on the assignments.

    @property
    def send_window(self) -> int:
        return self._send_window

    @send_window.setter
    def send_window(self, value: int) -> None:
        self._send_window = value
        if value > 0:
            self._wake_writer()

    @property
    def recv_window(self) -> int:
        return self._recv_window

    @recv_window.setter
    def recv_window(self, value: int) -> None:
        self._recv_window = value
        if value < 0:
            self.conn.condemn(f"sent {-value} bytes beyond the window of a stream")

    @property
    def closed(self) -> bool:
        return self._closed

    @closed.setter
    def closed(self, value: bool) -> None:
        self._closed = value
        if value:
            self._wake_writer()
            # The library wakes no reader when it is our own side that resets.
            event = self.conn.stream_events.get(self.stream_id)
            if event is not None:
                event.set()

    def _wake_writer(self) -> None:
        if self._opened is not None:
            self._opened.set()

    async def write(self, data: bytes) -> None:
        """Raises: MuxedStreamError when the stream is over or its reader stalls for WRITE_STALL_S."""
        view, sent = memoryview(data), 0
        while sent < len(view):
            while self._send_window <= 0 and not (self._closed or self.send_closed):
                self._opened = trio.Event()
                with trio.move_on_after(WRITE_STALL_S) as stall:
                    await self._opened.wait()
                if stall.cancelled_caught:
                    raise MuxedStreamError(f"the peer read nothing for {WRITE_STALL_S:g} s")
            if self._closed or self.send_closed:
                raise MuxedStreamError("the stream is closed for sending")
            chunk = view[sent : sent + min(self._send_window, _CHUNK_BYTES)]
            self._send_window -= len(chunk)
            header = _HEADER.pack(0, yamux.TYPE_DATA, 0, self.stream_id, len(chunk))
            await self.conn._write_frame(header + bytes(chunk))
            sent += len(chunk)

    async def read(self, n: int | None = None) -> bytes:
        """Up to `n` bytes as soon as there are any; all there are without `n`. Raises: MuxedStreamEOF or Reset."""
        while True:
            if self.leftover:
                cut = len(self.leftover) if n is None or n < 0 else n
                data, self.leftover = self.leftover[:cut], self.leftover[cut:]
                return data
            buffer = self.conn.stream_buffers.get(self.stream_id)
            if buffer:
                data = bytes(buffer) if n is None or n < 0 else bytes(buffer[:n])
                del buffer[: len(data)]
                if self._closed and not buffer:
                    await self.conn._finalize_stream(self, fully_closed=True)
                else:
                    await self._acknowledge(len(data))
                return data
            if self.reset_received:
                raise MuxedStreamReset("the stream was reset")
            event = self.conn.stream_events.get(self.stream_id)
            if self.recv_closed or self._closed or event is None or self.conn.event_shutting_down.is_set():
                raise MuxedStreamEOF("the stream has ended")
            await event.wait()
            if self.stream_id in self.conn.stream_events:
                self.conn.stream_events[self.stream_id] = trio.Event()

    async def reset(self) -> None:
        await super().reset()
        # The library keeps the entry of a stream with unread bytes for a minute, in case they are read.
        buffer = self.conn.stream_buffers.get(self.stream_id)
        if buffer is not None:
            buffer.clear()
            await self.conn._finalize_stream(self, fully_closed=True)

    async def _acknowledge(self, count: int) -> None:
        # Half a window at a time: an update on each read doubles the packets of a stream of small frames.
        self._unacknowledged += count
        if self._unacknowledged >= WINDOW_BYTES // 2 and not self.recv_closed:
            increment, self._unacknowledged = self._unacknowledged, 0
            self._recv_window += increment
            try:
                await self.send_window_update(increment)
            except (IOException, RawConnError) as exc:
                log.debug("no window update for a connection that is gone: %r", exc)


class _Pong:
    """Stands where the frame loop expects an event to set for each pong, and keeps the time instead."""

    def __init__(self) -> None:
        self.at = trio.current_time()

    def set(self) -> None:
        self.at = trio.current_time()


class GuardedYamux(yamux.Yamux):  # type: ignore[misc]
    """A Yamux connection that can be told dead, and whose end harms nobody else."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.condemned: str | None = None
        self.on_close: Callable[[], Awaitable[None]] | None
        self._ping_id: int
        self._ping_waits = False
        self._pong = self._ping_event = _Pong()

    @property
    def last_pong(self) -> float:
        """trio time of the last sign of life; that of the connection's start before the first."""
        return self._pong.at

    @property
    def outbound_streams(self) -> int:
        """Streams we opened that are not over."""
        return int(self.stream_backlog_limit - self.stream_backlog_semaphore.value)

    @property
    def buffered_bytes(self) -> int:
        """Unread bytes of all streams."""
        return sum(map(len, self.stream_buffers.values()))

    async def start(self) -> None:
        """Serve the connection until it ends. Raises nothing: one peer's connection must not end the others'."""
        try:
            await super().start()
        except Exception as exc:  # noqa: BLE001 - one peer's connection must not end the others'
            log.info("the connection to %s ended by an error: %r", self.peer_id, exc)
        finally:
            self.event_started.set()  # whoever waits for the start must learn that it failed
            await self._cleanup_on_error()

    def forgive(self, seconds: float) -> None:
        """Do not count a time in which we ourselves could not listen."""
        self._pong.at += seconds

    def condemn(self, reason: str) -> None:
        """Close the connection of a peer that breaks the rules or is dead, without waiting for anything."""
        if self.condemned is None and not self.event_shutting_down.is_set():
            self.condemned = reason
            log.warning("closing the connection to %s: it %s; its streams end, others go on", self.peer_id, reason)
            if self._nursery is not None:
                self._nursery.start_soon(self._drop_socket)

    async def _drop_socket(self) -> None:
        # The frame loop sees the end of file and cleans up: from here the clean-up would be cancelled with the loop.
        with trio.CancelScope(shield=True), trio.move_on_after(GOODBYE_S):
            await self.secured_conn.close()

    async def close(self, error_code: int = yamux.GO_AWAY_NORMAL) -> None:
        if self.event_closed.is_set():
            return
        if not self.event_shutting_down.is_set():
            self.event_shutting_down.set()
            if not self._write_lock.locked():
                header = _HEADER.pack(0, yamux.TYPE_GO_AWAY, 0, 0, error_code)
                with trio.move_on_after(GOODBYE_S):
                    try:
                        await self.secured_conn.write(header)
                    except (IOException, RawConnError) as exc:
                        log.debug("no goodbye to %s: %r", self.peer_id, exc)
        await self._cleanup_on_error()

    async def _cleanup_on_error(self) -> None:
        """Let go of the socket first: that wakes whoever waits on it. Then of the streams, keeping what they hold."""
        if self.event_closed.is_set():
            return
        self.event_shutting_down.set()
        on_close, self.on_close = self.on_close, None
        with trio.CancelScope(shield=True):
            for stream in self.streams.values():
                buffer = self.stream_buffers.get(stream.stream_id)
                if buffer:
                    stream.leftover += bytes(buffer)
                    buffer.clear()
            await self._drop_socket()
            await super()._cleanup_on_error()
        if on_close is not None:
            # Not shielded: it tells the library's other services, and one that is stopping may never listen again.
            await on_close()

    async def _measure_rtt_loop(self) -> None:
        """The keeper pings on its own schedule (see guards.Keeper); the library's 30 s loop is not run."""

    async def ping(self) -> None:
        """Ask for a sign of life. Returns when it was written, or at once while an earlier one still waits for that."""
        if self._ping_waits:
            return
        self._ping_waits = True
        try:
            self._ping_id = (self._ping_id + 1) % (1 << 32)
            self._ping_sent_time = trio.current_time()
            await self._write_frame(_HEADER.pack(0, yamux.TYPE_PING, yamux.FLAG_SYN, 0, self._ping_id))
        finally:
            self._ping_waits = False

    async def _write_frame(self, data: bytes) -> None:
        # Shielded: a write cancelled half way leaves half an encrypted message on the wire and breaks every stream of
        # the connection. It cannot wait for ever: the keeper closes the socket of a peer that takes nothing.
        async with self._write_lock:
            with trio.CancelScope(shield=True):
                await self.secured_conn.write(data)
        await trio.lowlevel.checkpoint()


class GuardedMuxerMultistream(muxer_multistream.MuxerMultistream):  # type: ignore[misc]
    """Negotiates Yamux and makes the guarded one (the library's makes its own class whatever it was given)."""

    async def new_conn(self, conn: Any, peer_id: Any) -> GuardedYamux:
        protocol, _ = await self._selector.select(conn, conn.is_initiator, self.negotiate_timeout)
        muxed = GuardedYamux(conn, peer_id, is_initiator=conn.is_initiator)
        annotated: GuardedYamux = self._annotate_connection(muxed, conn, protocol)
        return annotated


def install() -> None:
    """Have the library's frame loop make guarded streams and refuse oversized frames. Process-wide, idempotent."""
    yamux.YamuxStream = GuardedYamuxStream
    yamux.MAX_WINDOW_SIZE = MAX_DATA_FRAME_BYTES
