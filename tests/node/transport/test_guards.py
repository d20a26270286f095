"""One test for each measured defect of py-libp2p 0.8.1: what it does to a bare host must not happen to ours.

Here: what strangers send, connections and dials. See test_limits.py and test_bridge.py for the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from node.ports import DialFailed, PeerAddress, StreamEnded, TransportError
from node.transport import guards
from node.transport.libp2p import Libp2pTransport
from tests.node.transport.conftest import DEADLINE_S, Libp2pNet, eventually, secret_of, where
from tests.node.transport.helpers import (
    assert_serves,
    in_trio,
    note,
    publish_until,
    raw_connection,
    varint,
)
from tests.node.transport.peer_process import ECHO, echo

GOSSIP = "/meshsub/1.1.0"


# ------------------------------------------------------------- exceptions in handlers, malformed bytes from outside


async def test_a_library_handler_that_raises_ends_its_stream_only(pair: tuple[Any, Any]) -> None:
    client, server = pair

    async def raises(_stream: Any) -> None:
        raise RuntimeError("a bug in a protocol handler")

    async def install(network: Any) -> None:
        network.host.set_stream_handler("/tally/test/raises/1", raises)

    await in_trio(server, install)
    stream = await client.open(where(server), "/tally/test/raises/1", DEADLINE_S)
    with pytest.raises(StreamEnded):
        await stream.receive(DEADLINE_S)
    await assert_serves(client, server)


@pytest.mark.parametrize(
    "garbage",
    [
        b"\xff" * 64,  # a length that never ends
        b"\x05\xff\xfe\xfd\xfc\n",  # no UTF-8
        b"\x13/multistream/1.0.0\n\x00",  # an empty protocol
        b"\x13/multistream/1.0.0\n\xff\xff\xff\xff\x07",  # half a gigabyte announced
        b"\x80\x80\x80",  # an unfinished length
    ],
)
async def test_malformed_negotiation_on_a_stream_cannot_end_the_host(pair: tuple[Any, Any], garbage: bytes) -> None:
    client, server = pair

    async def attack(network: Any) -> None:
        stream = await (await raw_connection(network, server)).open_stream()
        await stream.write(garbage)
        await stream.close()

    await in_trio(client, attack)
    await assert_serves(client, server)


async def test_malformed_bytes_on_the_socket_cannot_end_the_host(pair: tuple[Any, Any]) -> None:
    client, server = pair
    host, port = "127.0.0.1", int(server.addresses[0].rpartition("/")[2])
    noise = b"\x13/multistream/1.0.0\n\x07/noise\n"
    for garbage in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 1000, noise + b"\x00\x05hello", noise + b"\xff\xff"):
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(garbage)
        with contextlib.suppress(OSError):  # the host may have reset the connection before the end is written
            writer.write_eof()
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(DEADLINE_S):
                await reader.read()
        writer.close()
    await assert_serves(client, server)


async def test_an_endless_negotiation_line_of_a_stranger_is_not_collected(pair: tuple[Any, Any]) -> None:
    client, server = pair
    port = int(server.addresses[0].rpartition("/")[2])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"\x13/multistream/1.0.0\n" + varint(1 << 30) + b"x" * 1000)
    async with asyncio.timeout(guards.UPGRADE_S / 2):  # refused at the announcement, not by the handshake's deadline
        with contextlib.suppress(ConnectionError):
            while await reader.read(1000):
                pass
    writer.close()
    await assert_serves(client, server)


@pytest.mark.parametrize("garbage", [b"\x05\xff\xff\xff\xff\xff", b"\xff" * 32, b"\x04\x12\x02\x08\x01"])
async def test_a_malformed_gossip_packet_cannot_end_gossip(pair: tuple[Any, Any], garbage: bytes) -> None:
    client, server = pair
    heard: list[bytes] = []
    await server.subscribe("offers/1", lambda author, payload: note(heard, payload))
    attack = await client.open(where(server), GOSSIP, DEADLINE_S)
    await attack.send_raw(garbage)
    await attack.close()
    await assert_serves(client, server)
    await publish_until(client, "offers/1", b"offer", lambda: b"offer" in heard)


async def test_forged_and_nonsensical_gossip_messages_are_dropped(pair: tuple[Any, Any]) -> None:
    from libp2p.pubsub.pb import rpc_pb2

    client, server = pair
    heard: list[bytes] = []
    await server.subscribe("offers/1", lambda author, payload: note(heard, payload))
    forged = [
        rpc_pb2.Message(data=b"forged", topicIDs=["offers/1"], from_id=b"", seqno=b"", signature=b"", key=b""),
        rpc_pb2.Message(data=b"forged", topicIDs=["offers/1"], from_id=b"x", seqno=b"1", signature=b"s", key=b"\xff"),
        rpc_pb2.Message(data=b"forged", topicIDs=["offers/1"], from_id=b"\0\x25", seqno=b"2", signature=b"s" * 64),
    ]
    packet = rpc_pb2.RPC(publish=forged).SerializeToString()
    attack = await client.open(where(server), GOSSIP, DEADLINE_S)
    await attack.send_raw(varint(len(packet)) + packet)
    await publish_until(client, "offers/1", b"offer", lambda: b"offer" in heard)
    assert set(heard) == {b"offer"}
    await assert_serves(client, server)


async def test_a_validator_that_raises_cannot_end_gossip(pair: tuple[Any, Any]) -> None:
    client, server = pair
    heard: list[bytes] = []
    await server.subscribe("offers/1", lambda author, payload: note(heard, payload))
    calls = 0

    def validator(_forwarder: Any, msg: Any) -> bool:
        nonlocal calls
        calls += 1
        if msg.data.startswith(b"bad"):
            raise RuntimeError("a bug in a validator")
        return True

    async def install(network: Any) -> None:
        network.gossip.pubsub.set_topic_validator("offers/1", validator, False)

    await eventually(lambda: "offers/1" in server._network.gossip._joined)
    await in_trio(server, install)
    await assert_serves(client, server)
    await publish_until(client, "offers/1", b"bad", lambda: calls > 0)
    await publish_until(client, "offers/1", b"good", lambda: b"good" in heard)
    assert b"bad" not in b"".join(heard)


# --------------------------------------------------------------------------------------------- connections and dials


async def test_an_inbound_connection_gives_its_place_back(
    real: Libp2pNet, pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guards, "MAX_CONNECTIONS", 4)
    server = await real.node()
    server.serve(ECHO, echo)
    client, _ = pair

    async def hang_up(network: Any) -> None:
        await network.farewell()

    slots = server._network.swarm._inbound_limiter
    assert slots.total_tokens == 4
    for _ in range(12):
        await assert_serves(client, server)
        await in_trio(client, hang_up)
        # Not zero: the library dials again when it was about to introduce itself.
        await eventually(lambda: slots.borrowed_tokens <= 1)


async def test_plaintext_is_not_spoken(pair: tuple[Any, Any]) -> None:
    _, server = pair
    port = int(server.addresses[0].rpartition("/")[2])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answers = b""
    for proposal in (b"/multistream/1.0.0", b"/plaintext/2.0.0", b"/tls/1.0.0", b"/secio/1.0.0", b"/noise"):
        writer.write(varint(len(proposal) + 1) + proposal + b"\n")
    async with asyncio.timeout(DEADLINE_S):
        while not answers.endswith(b"/noise\n"):
            answers += await reader.read(1000)
    writer.close()
    assert answers == b"\x13/multistream/1.0.0\n" + b"\x03na\n" * 3 + b"\x07/noise\n"


async def test_a_peer_whose_key_is_no_secp256k1_key_is_not_served(
    real: Libp2pNet, pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from libp2p.crypto.ed25519 import Ed25519PrivateKey

    _, server = pair
    served = []
    server.serve("/tally/test/count/1", lambda stream: note(served, b""))
    with monkeypatch.context() as patch:
        patch.setattr(guards.Secp256k1PrivateKey, "new", lambda _secret: Ed25519PrivateKey.new(b"\7" * 32))
        stranger = await real.node()
    stream = await stranger.open(where(server), "/tally/test/count/1", DEADLINE_S)
    with pytest.raises(StreamEnded):
        await stream.receive(DEADLINE_S)
    assert not served


async def test_a_failed_dial_does_not_block_the_peer(real: Libp2pNet) -> None:
    client, server = await real.node(), await real.node(secret_of(500))
    at = where(server)
    await server.stop()
    for _ in range(2):
        with pytest.raises(DialFailed, match=at.peer_id):
            await client.open(at, ECHO, DEADLINE_S)
    again = await real.node(secret_of(500), at.addresses[0])
    again.serve(ECHO, echo)

    async def library_dial(network: Any) -> None:
        """What gossip and directory do: the library's own dial, which remembers failures."""
        from libp2p.peer.id import ID

        peer_id = ID.from_string(at.peer_id)
        assert not network.swarm._negative_peer_cache.is_blocked(str(peer_id))

    await in_trio(client, library_dial)
    await assert_serves(client, again)


async def test_a_connection_takes_no_quarter_of_a_second(real: Libp2pNet) -> None:
    client = await real.node()
    taken = []
    for _ in range(5):
        server = await real.node()
        server.serve(ECHO, echo)
        started = time.monotonic()
        await client.open(where(server), ECHO, DEADLINE_S)
        taken.append(time.monotonic() - started)
    assert min(taken) < 0.2, taken
    assert guards.swarm_module._HAPPY_EYEBALLS_DELAY < 0.25


async def test_every_address_of_a_peer_is_tried(real: Libp2pNet, pair: tuple[Any, Any]) -> None:
    client, server = pair
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        dead = f"/ip4/127.0.0.1/tcp/{closed.getsockname()[1]}"
        mute = await asyncio.start_server(lambda r, w: None, "127.0.0.1", 0)
        silent = f"/ip4/127.0.0.1/tcp/{mute.sockets[0].getsockname()[1]}"
        addresses = ("/ip4/127.0.0.1/udp/1/quic-v1", "nonsense/tcp/", dead, silent, *server.addresses)
        stream = await client.open(PeerAddress(server.peer_id, addresses), ECHO, DEADLINE_S)
        await stream.send(b"found")
        assert await stream.receive(DEADLINE_S) == b"found"
        mute.close()


async def test_a_dial_to_a_silent_socket_ends_in_time(real: Libp2pNet, pair: tuple[Any, Any]) -> None:
    client, server = pair
    mute = await asyncio.start_server(lambda r, w: None, "127.0.0.1", 0)
    silent = f"/ip4/127.0.0.1/tcp/{mute.sockets[0].getsockname()[1]}"
    started = time.monotonic()
    with pytest.raises(DialFailed, match="within 0.3 s"):
        await client.open(PeerAddress(server.peer_id, (silent,)), ECHO, 0.3)
    assert time.monotonic() - started < 2
    mute.close()
    await assert_serves(client, server)


async def test_a_used_port_is_refused_and_named(real: Libp2pNet) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"/ip4/127.0.0.1/tcp/{other.getsockname()[1]}"
        with pytest.raises(TransportError, match=address):
            await real.node(address=address)
    threads = [t.name for t in threading.enumerate()]
    assert "tally-network" not in threads


async def test_addresses_are_never_every_interface(real: Libp2pNet) -> None:
    everywhere, announced = (
        Libp2pTransport(secret_of(1), "0.0.0.0"),
        Libp2pTransport(secret_of(2), announce=("/dns4/a.example/tcp/7",)),
    )
    real.made += [everywhere, announced]
    for node in (everywhere, announced):
        await node.start()
    assert announced.addresses == ("/dns4/a.example/tcp/7",)
    assert len(everywhere.addresses) == 1
    assert everywhere.addresses[0].startswith("/ip4/") and "0.0.0.0" not in everywhere.addresses[0]
    told = [str(address) for node in (everywhere, announced) for address in node._network.host.get_addrs()]
    assert told == [
        f"{everywhere.addresses[0]}/p2p/{everywhere.peer_id}",
        f"/dns4/a.example/tcp/7/p2p/{announced.peer_id}",
    ]
    everywhere.serve(ECHO, echo)
    await assert_serves(announced, everywhere)


async def test_a_connection_found_dying_is_replaced_by_a_new_one(
    pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, server = pair
    network, connection = client._network, client._network._connection
    dying = SimpleNamespace(muxed_conn=SimpleNamespace(event_shutting_down=SimpleNamespace(is_set=lambda: gone)))
    asked = 0

    async def new_stream() -> None:
        raise ConnectionResetError("by the peer, which was restarted")

    async def wait() -> None:
        return

    async def first_the_dying_one(*args: Any) -> Any:
        nonlocal asked
        asked += 1
        return (dying, False) if asked == 1 else await connection(*args)

    dying.new_stream, dying.muxed_conn.event_shutting_down.wait = new_stream, wait
    monkeypatch.setattr(network, "_connection", first_the_dying_one)
    gone = True
    await assert_serves(client, server)
    assert asked == 2
    asked, gone = 0, False  # the stream failed, the connection did not: nothing is done to those it carries
    with pytest.raises(DialFailed):
        await client.open(where(server), ECHO, DEADLINE_S)
    assert asked == 1
