"""One test for each measured defect of py-libp2p 0.8.1: gossip and directory, and the thread the library lives in."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import pytest

from node.ports import StreamEnded, TransportError
from node.transport.directory import PROTOCOL_ID as KAD
from tests.node.transport.conftest import DEADLINE_S, Libp2pNet, eventually, secret_of, where
from tests.node.transport.helpers import (
    HOLD,
    assert_serves,
    in_trio,
    note,
    publish_until,
)
from tests.node.transport.peer_process import ECHO

# ------------------------------------------------------------------------------------------------ gossip, directory


async def test_gossip_keeps_its_mesh_every_second(real: Libp2pNet) -> None:
    node = await real.node()
    assert node._network.gossip._router.heartbeat_interval == 1


async def test_the_directory_is_a_private_one_and_fills_on_connect(real: Libp2pNet) -> None:
    hub = await real.node()
    hub_address = f"{hub.addresses[0]}/p2p/{hub.peer_id}"
    others = [await real.node(bootstrap=(hub_address,)) for _ in range(2)]
    protocols = hub._network.host.get_mux().get_protocols()
    assert KAD in protocols and not [p for p in protocols if str(p).startswith("/ipfs/kad")]
    for node in (hub, *others):
        await eventually(lambda: node._network.directory._dht.get_routing_table_size() >= 1)  # noqa: B023
    await eventually(lambda: hub._network.directory._dht.get_routing_table_size() == 2)


async def test_a_bootstrap_peer_is_dialled_again_after_a_restart(real: Libp2pNet) -> None:
    hub = await real.node(secret_of(600))
    node = await real.node(bootstrap=(f"{hub.addresses[0]}/p2p/{hub.peer_id}",))
    await eventually(lambda: node.connected() == (hub.peer_id,))
    address = hub.addresses[0]
    await hub.stop()
    await eventually(lambda: node.connected() == ())
    await real.node(secret_of(600), address)
    await eventually(lambda: node.connected() == (hub.peer_id,))


# ------------------------------------------------------------------------------------------------------- the bridge


async def test_the_network_thread_restarts_after_a_crash(pair: tuple[Any, Any]) -> None:
    client, server = pair
    at = where(server)
    heard: list[bytes] = []
    await server.subscribe("offers/1", lambda author, payload: note(heard, payload))
    stream = await client.open(at, ECHO, DEADLINE_S)
    waiting = asyncio.create_task(stream.receive())
    old = server._network

    def crash() -> None:
        import trio

        async def fails() -> None:
            raise RuntimeError("as if the library had a bug outside of any task of ours")

        trio.lowlevel.spawn_system_task(fails)

    assert server._thread.submit(crash)
    with pytest.raises(StreamEnded):
        async with asyncio.timeout(DEADLINE_S):
            await waiting
    await eventually(lambda: server._network is not None and server._network is not old)
    assert where(server) == at, "a restart listens where others know it"
    await assert_serves(client, server)
    await publish_until(client, "offers/1", b"offer", lambda: b"offer" in heard)


async def test_a_crash_of_our_own_side_ends_streams_and_calls_and_nothing_else(pair: tuple[Any, Any]) -> None:
    client, server = pair
    stream = await client.open(where(server), ECHO, DEADLINE_S)

    async def never(_network: Any) -> None:
        import trio

        await trio.sleep_forever()

    calling = asyncio.create_task(in_trio(client, never))
    await assert_serves(client, server)

    def crash() -> None:
        client._thread._nursery.start_soon(_raise)

    client._thread.submit(crash)
    with pytest.raises(StreamEnded):
        await stream.receive(DEADLINE_S)
    with pytest.raises(TransportError):
        await calling
    await eventually(lambda: client._network is not None)
    await assert_serves(client, server)


async def _raise() -> None:
    raise RuntimeError("a bug")


async def test_a_cancelled_open_leaves_no_stream_behind(pair: tuple[Any, Any]) -> None:
    client, server = pair
    await assert_serves(client, server)
    for delay_s in [0.0, 0.001, 0.002, 0.003, 0.004, 0.006, 0.01]:
        opening = asyncio.create_task(client.open(where(server), HOLD, DEADLINE_S))
        await asyncio.wait({opening}, timeout=delay_s)
        if opening.cancel():
            await asyncio.gather(opening, return_exceptions=True)
        else:
            await opening.result().reset()
    await eventually(lambda: not client._network.streams)


async def test_signals_are_left_alone_and_no_thread_remains(real: Libp2pNet) -> None:
    before, handler = set(threading.enumerate()), signal.getsignal(signal.SIGINT)
    node = await real.node()
    assert signal.getsignal(signal.SIGINT) is handler
    started = time.monotonic()
    await node.stop()
    assert time.monotonic() - started < 2
    assert set(threading.enumerate()) - before == set()


def test_the_package_and_the_twin_do_not_import_the_library() -> None:
    script = "import sys, node.transport, node.transport.memory; sys.exit(bool({'libp2p', 'trio'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
