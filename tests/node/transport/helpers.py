"""Shared by the tests of the libp2p transport: reaching into its thread, and peers who keep no rules."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

from node.ports import Stream, StreamEnded
from node.transport.libp2p import Libp2pTransport
from tests.node.transport.conftest import DEADLINE_S, eventually, where
from tests.node.transport.peer_process import ECHO

HOLD = "/tally/test/hold/1"


async def hold(stream: Stream) -> None:
    await asyncio.Event().wait()


async def in_trio(transport: Libp2pTransport, function: Callable[..., Awaitable[Any]], *args: Any) -> Any:
    """Run `function(network, *args)` in the transport's own thread."""
    assert transport._thread is not None and transport._network is not None
    return await transport._thread.call(function, transport._network, *args, timeout_s=DEADLINE_S)


async def assert_serves(client: Libp2pTransport, server: Libp2pTransport) -> None:
    """Whatever was done to the server, it answers."""
    stream = await client.open(where(server), ECHO, DEADLINE_S)
    await stream.send(b"alive?")
    assert await stream.receive(DEADLINE_S) == b"alive?"
    await stream.close()


async def raw_connection(network: Any, server: Libp2pTransport) -> Any:
    """An authenticated Yamux connection, for peers who keep no rules above it. Runs in trio."""
    from libp2p.peer.id import ID

    conn, _ = await network._connection(ID.from_string(server.peer_id), server.addresses)
    return conn.muxed_conn


def inbound_connections(server: Libp2pTransport) -> list[Any]:
    assert server._network is not None
    return server._network.keeper.connections()


async def note(heard: list[bytes], payload: bytes) -> None:
    heard.append(payload.rstrip(b"0123456789"))


async def publish_until(node: Libp2pTransport, topic: str, payload: bytes, condition: Callable[[], bool]) -> None:
    """Publish, each time anew, until it has shown effect: before the mesh has formed a message is lost."""
    for attempt in range(20):
        await node.publish(topic, payload + str(attempt).encode())
        with contextlib.suppress(AssertionError):
            await eventually(condition, 0.5)
            return
    raise AssertionError(f"no effect of {payload!r}")


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


async def fill(stream: Stream) -> None:
    """Send until the stream ends, within the window all the time."""
    with contextlib.suppress(StreamEnded):
        while True:
            await stream.send(b"x" * 16_000)
