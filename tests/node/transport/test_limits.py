"""One test for each measured defect of py-libp2p 0.8.1: windows, streams, memory; frozen and killed peers."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

from node.ports import DialFailed, PeerAddress, Stream, StreamEnded
from node.transport import guards, muxer, streams
from tests.node.transport.conftest import DEADLINE_S, Libp2pNet, eventually, where
from tests.node.transport.helpers import (
    HOLD,
    assert_serves,
    fill,
    in_trio,
    inbound_connections,
    raw_connection,
)
from tests.node.transport.peer_process import ECHO, ROUNDS, echo

HEADER = muxer._HEADER


# ------------------------------------------------------------------------------------------ windows, streams, memory


async def test_bytes_beyond_the_window_close_the_connection(pair: tuple[Any, Any]) -> None:
    client, server = pair
    stream = await client.open(where(server), HOLD, DEADLINE_S)
    [inbound] = inbound_connections(server)
    held = 0

    async def flood(_network: Any) -> None:
        nonlocal held
        conn, payload = stream._muxed.conn, b"\0\0\xff\xfc" + b"x" * 65532
        for _ in range(200):  # 13 MB
            if conn.event_shutting_down.is_set():
                return
            await conn._write_frame(HEADER.pack(0, 0, 0, stream._muxed.stream_id, len(payload)) + payload)
            held = max(held, inbound.buffered_bytes)

    with contextlib.suppress(Exception):
        await in_trio(client, flood)
    await eventually(lambda: inbound.event_closed.is_set())
    assert inbound.condemned is not None and "window" in inbound.condemned
    assert held < 2 * muxer.WINDOW_BYTES
    await assert_serves(client, server)


async def test_a_data_frame_announced_too_large_closes_the_connection(pair: tuple[Any, Any]) -> None:
    client, server = pair
    stream = await client.open(where(server), HOLD, DEADLINE_S)
    [inbound] = inbound_connections(server)

    async def announce(_network: Any) -> None:
        header = HEADER.pack(0, 0, 0, stream._muxed.stream_id, muxer.MAX_DATA_FRAME_BYTES + 1)
        await stream._muxed.conn._write_frame(header)

    await in_trio(client, announce)
    await eventually(lambda: inbound.event_closed.is_set())
    await assert_serves(client, server)


async def test_many_unread_streams_close_the_connection(pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muxer, "MAX_BUFFERED_BYTES", 1 << 20)
    client, server = pair
    held = [await client.open(where(server), HOLD, DEADLINE_S) for _ in range(10)]
    [inbound] = inbound_connections(server)
    filling = [asyncio.create_task(fill(stream)) for stream in held]
    await eventually(lambda: inbound.event_closed.is_set())
    assert inbound.condemned is not None and "unread" in inbound.condemned
    await asyncio.gather(*filling)
    await assert_serves(client, server)


async def test_too_many_streams_close_the_connection(pair: tuple[Any, Any]) -> None:
    client, server = pair
    await assert_serves(client, server)
    [inbound] = inbound_connections(server)

    async def flood(network: Any) -> None:
        conn = await raw_connection(network, server)
        for number in range(muxer.MAX_STREAMS + 50):
            await conn._write_frame(HEADER.pack(0, 1, muxer.yamux.FLAG_SYN, 10_001 + 2 * number, 0))

    with contextlib.suppress(Exception):
        await in_trio(client, flood)
    await eventually(lambda: inbound.event_closed.is_set())
    assert inbound.condemned is not None and "streams" in inbound.condemned
    await assert_serves(client, server)


async def test_more_streams_than_one_connection_carries(pair: tuple[Any, Any]) -> None:
    client, server = pair
    at = where(server)
    opened = [await client.open(at, ECHO, DEADLINE_S) for _ in range(muxer.MAX_OUTBOUND_STREAMS + 70)]
    assert len(client._network.keeper.connections()) == 2
    for stream in (opened[0], opened[-1]):
        await stream.send(b"both ends of the queue")
        assert await stream.receive(DEADLINE_S) == b"both ends of the queue"
    await asyncio.gather(*(stream.close() for stream in opened))
    await eventually(lambda: sum(c.outbound_streams for c in client._network.keeper.connections()) < 10)


async def test_one_stream_too_many_is_refused_and_not_waited_for(
    pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, server = pair
    await assert_serves(client, server)
    await eventually(lambda: sum(c.outbound_streams for c in client._network.keeper.connections()) <= 2)
    monkeypatch.setattr(muxer, "MAX_OUTBOUND_STREAMS", 6)
    monkeypatch.setattr(guards, "MAX_CONNECTIONS_PER_PEER", 2)
    opened: list[Stream] = []
    with pytest.raises(DialFailed, match="close some streams"):
        for _ in range(13):
            opened.append(await client.open(where(server), HOLD, DEADLINE_S))
    assert len(opened) > 6
    await opened.pop().close()
    await eventually(lambda: min(c.outbound_streams for c in client._network.keeper.connections()) < 6)
    opened.append(await client.open(where(server), HOLD, DEADLINE_S))


async def test_a_reader_may_pause_longer_than_five_seconds(pair: tuple[Any, Any]) -> None:
    client, server = pair
    go_on, received = asyncio.Event(), []

    async def slow(stream: Stream) -> None:
        await go_on.wait()
        for _ in range(100):
            received.append(await stream.receive(DEADLINE_S))

    server.serve("/tally/test/slow/1", slow)
    stream = await client.open(where(server), "/tally/test/slow/1", DEADLINE_S)

    async def pour() -> None:
        for number in range(100):
            await stream.send(bytes([number]) * 10_000)

    pouring = asyncio.create_task(pour())
    await asyncio.wait({pouring}, timeout=5.5)
    assert not pouring.done(), "the window was to be shut"
    go_on.set()
    await pouring
    await eventually(lambda: len(received) == 100)
    assert received == [bytes([number]) * 10_000 for number in range(100)]


async def test_a_reader_who_never_reads_is_given_up_on(pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muxer, "WRITE_STALL_S", 0.3)
    monkeypatch.setattr(streams, "WRITE_STALL_S", 0.6)
    client, server = pair
    stream = await client.open(where(server), HOLD, DEADLINE_S)
    with pytest.raises(StreamEnded):
        async with asyncio.timeout(DEADLINE_S):
            while True:
                await stream.send(b"x" * 10_000)
    await assert_serves(client, server)


async def test_a_peer_who_talks_on_after_we_closed_is_reset(pair: tuple[Any, Any]) -> None:
    client, server = pair
    talking: asyncio.Queue[Stream] = asyncio.Queue()

    async def talk(stream: Stream) -> None:
        talking.put_nowait(stream)
        await asyncio.Event().wait()

    server.serve("/tally/test/talk/1", talk)
    stream = await client.open(where(server), "/tally/test/talk/1", DEADLINE_S)
    far = await asyncio.wait_for(talking.get(), DEADLINE_S)
    await stream.close()
    with pytest.raises(StreamEnded):
        async with asyncio.timeout(DEADLINE_S):
            while True:
                await far.send(b"x")
    [conn] = client._network.keeper.connections()
    await eventually(lambda: stream._muxed.stream_id not in conn.streams)


async def test_a_reset_frees_a_stream_with_bytes_unread_at_once(pair: tuple[Any, Any]) -> None:
    client, server = pair
    server.serve("/tally/test/pour/1", fill)
    stream = await client.open(where(server), "/tally/test/pour/1", DEADLINE_S)
    [conn] = client._network.keeper.connections()
    await eventually(lambda: conn.buffered_bytes > 0)
    await stream.reset()
    await eventually(lambda: stream._muxed.stream_id not in conn.streams and conn.buffered_bytes == 0)


# ------------------------------------------------------------------------------------------- frozen and killed peers


@pytest.fixture
def peer_process() -> Any:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.node.transport.peer_process"], stdout=subprocess.PIPE, text=True
    )
    yield process
    process.send_signal(signal.SIGCONT)
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


async def test_a_frozen_peer_is_noticed_and_a_killed_one_ends_its_streams(real: Libp2pNet, peer_process: Any) -> None:
    line = await asyncio.to_thread(peer_process.stdout.readline)
    peer_id, address = line.split()
    at = PeerAddress(peer_id, (address,))
    client = await real.node(ping_every_s=0.2, dead_after_s=1.5)

    stream = await client.open(at, ECHO, DEADLINE_S)
    await stream.send(b"hello")
    assert await stream.receive(DEADLINE_S) == b"hello"
    peer_process.send_signal(signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(StreamEnded):
        await stream.receive()  # no timeout of ours: the pings tell
    assert time.monotonic() - started < 8
    with pytest.raises(DialFailed):
        await client.open(at, ECHO, 0.5)
    await eventually(lambda: client.connected() == ())

    peer_process.send_signal(signal.SIGCONT)
    stream = await client.open(at, ECHO, DEADLINE_S)
    await stream.send(b"hello again")
    assert await stream.receive(DEADLINE_S) == b"hello again"
    waiting = asyncio.create_task(stream.receive())
    peer_process.kill()
    with pytest.raises(StreamEnded):
        async with asyncio.timeout(DEADLINE_S):
            await waiting


async def test_a_peer_to_whom_we_write_all_the_time_is_pinged_all_the_same(real: Libp2pNet) -> None:
    client, server = await real.node(ping_every_s=0.2, dead_after_s=1.0), await real.node()
    server.serve(ECHO, echo)
    stream = await client.open(where(server), ECHO, DEADLINE_S)

    async def occupy(_network: Any) -> None:
        """Two writers who leave the connection to each other: there is no moment at which it is free."""
        import trio

        async def write() -> None:
            while True:
                async with stream._muxed.conn._write_lock:
                    await trio.sleep(0.02)

        with trio.move_on_after(2.5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(write)
                nursery.start_soon(write)

    await in_trio(client, occupy)
    await stream.send(b"still here")
    assert await stream.receive(DEADLINE_S) == b"still here"


async def test_a_pause_of_our_own_is_nobodys_death(real: Libp2pNet) -> None:
    client, server = await real.node(ping_every_s=0.2, dead_after_s=1.0), await real.node()
    server.serve(ECHO, echo)
    stream = await client.open(where(server), ECHO, DEADLINE_S)
    client._thread.submit(time.sleep, 2.5)  # as a suspended laptop, or a core that something else holds
    await stream.send(b"still here")
    assert await stream.receive(DEADLINE_S) == b"still here"
    await in_trio(client, _one_more_look)
    assert client.connected() == (server.peer_id,)


async def _one_more_look(_network: Any) -> None:
    """Long enough for the keeper to judge again."""
    import trio

    await trio.sleep(3 * guards.KEEPER_TICK_S)


async def test_stop_is_prompt_though_a_peer_is_frozen(real: Libp2pNet, peer_process: Any) -> None:
    line = await asyncio.to_thread(peer_process.stdout.readline)
    peer_id, address = line.split()
    client = await real.node()
    stream = await client.open(PeerAddress(peer_id, (address,)), ECHO, DEADLINE_S)
    peer_process.send_signal(signal.SIGSTOP)
    filling = asyncio.create_task(fill(stream))
    await eventually(lambda: stream.unsent)
    started = time.monotonic()
    await client.stop()
    assert time.monotonic() - started < 2
    await filling


async def test_an_unguarded_py_libp2p_peer_is_understood(real: Libp2pNet) -> None:
    server = await real.node()
    server.serve(ECHO, echo)
    command = [sys.executable, "-m", "tests.node.transport.peer_process", "stock", server.peer_id, server.addresses[0]]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    async with asyncio.timeout(30):
        out, _ = await process.communicate()
    assert out.decode().split() == ["echoed", str(ROUNDS)]
