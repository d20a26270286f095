"""One test for each measured defect of py-libp2p 0.8.1: what it does to a bare host must not happen to ours."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from node.ports import DialFailed, PeerAddress, Stream, StreamEnded, TransportError
from node.transport import guards, muxer, streams
from node.transport.directory import PROTOCOL_ID as KAD
from node.transport.libp2p import Libp2pTransport
from tests.node.transport.conftest import DEADLINE_S, Libp2pNet, eventually, secret_of, where
from tests.node.transport.peer_process import ECHO, ROUNDS, echo

HOLD = "/tally/test/hold/1"
GOSSIP = "/meshsub/1.1.0"
HEADER = muxer._HEADER


@pytest.fixture
async def net() -> AsyncIterator[Libp2pNet]:
    made = Libp2pNet()
    yield made
    await made.close()


@pytest.fixture
async def pair(net: Libp2pNet) -> tuple[Libp2pTransport, Libp2pTransport]:
    """A client and a server that echoes on ECHO and holds its streams, unread, on HOLD."""
    client, server = await net.pair(ECHO, echo)
    server.serve(HOLD, hold)
    return client, server  # type: ignore[return-value]


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
        writer.write_eof()
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(DEADLINE_S):
                await reader.read()
        writer.close()
    await assert_serves(client, server)


@pytest.mark.parametrize("garbage", [b"\x05\xff\xff\xff\xff\xff", b"\xff" * 32, b"\x04\x12\x02\x08\x01"])
async def test_a_malformed_gossip_packet_cannot_end_gossip(pair: tuple[Any, Any], garbage: bytes) -> None:
    client, server = pair
    heard: list[bytes] = []
    await server.subscribe("offers/1", lambda author, payload: _note(heard, payload))
    attack = await client.open(where(server), GOSSIP, DEADLINE_S)
    await attack.send_raw(garbage)
    await attack.close()
    await assert_serves(client, server)
    await _publish_until(client, "offers/1", b"offer", lambda: b"offer" in heard)


async def test_forged_and_nonsensical_gossip_messages_are_dropped(pair: tuple[Any, Any]) -> None:
    from libp2p.pubsub.pb import rpc_pb2

    client, server = pair
    heard: list[bytes] = []
    await server.subscribe("offers/1", lambda author, payload: _note(heard, payload))
    forged = [
        rpc_pb2.Message(data=b"forged", topicIDs=["offers/1"], from_id=b"", seqno=b"", signature=b"", key=b""),
        rpc_pb2.Message(data=b"forged", topicIDs=["offers/1"], from_id=b"x", seqno=b"1", signature=b"s", key=b"\xff"),
        rpc_pb2.Message(data=b"forged", topicIDs=["offers/1"], from_id=b"\0\x25", seqno=b"2", signature=b"s" * 64),
    ]
    packet = rpc_pb2.RPC(publish=forged).SerializeToString()
    attack = await client.open(where(server), GOSSIP, DEADLINE_S)
    await attack.send_raw(_varint(len(packet)) + packet)
    await _publish_until(client, "offers/1", b"offer", lambda: b"offer" in heard)
    assert set(heard) == {b"offer"}
    await assert_serves(client, server)


async def test_a_validator_that_raises_cannot_end_gossip(pair: tuple[Any, Any]) -> None:
    client, server = pair
    heard: list[bytes] = []
    await server.subscribe("offers/1", lambda author, payload: _note(heard, payload))
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
    await _publish_until(client, "offers/1", b"bad", lambda: calls > 0)
    await _publish_until(client, "offers/1", b"good", lambda: b"good" in heard)
    assert b"bad" not in b"".join(heard)


async def _note(heard: list[bytes], payload: bytes) -> None:
    heard.append(payload.rstrip(b"0123456789"))


async def _publish_until(node: Libp2pTransport, topic: str, payload: bytes, condition: Callable[[], bool]) -> None:
    """Publish, each time anew, until it has shown effect: before the mesh has formed a message is lost."""
    for attempt in range(20):
        await node.publish(topic, payload + str(attempt).encode())
        with contextlib.suppress(AssertionError):
            await eventually(condition, 0.5)
            return
    raise AssertionError(f"no effect of {payload!r}")


def _varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


# --------------------------------------------------------------------------------------------- connections and dials


async def test_an_inbound_connection_gives_its_place_back(
    net: Libp2pNet, pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guards, "MAX_CONNECTIONS", 4)
    server = await net.node()
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
        writer.write(_varint(len(proposal) + 1) + proposal + b"\n")
    async with asyncio.timeout(DEADLINE_S):
        while not answers.endswith(b"/noise\n"):
            answers += await reader.read(1000)
    writer.close()
    assert answers == b"\x13/multistream/1.0.0\n" + b"\x03na\n" * 3 + b"\x07/noise\n"


async def test_a_peer_whose_key_is_no_secp256k1_key_is_not_served(
    net: Libp2pNet, pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from libp2p.crypto.ed25519 import Ed25519PrivateKey

    _, server = pair
    served = []
    server.serve("/tally/test/count/1", lambda stream: _note(served, b""))
    with monkeypatch.context() as patch:
        patch.setattr(guards.Secp256k1PrivateKey, "new", lambda _secret: Ed25519PrivateKey.new(b"\7" * 32))
        stranger = await net.node()
    stream = await stranger.open(where(server), "/tally/test/count/1", DEADLINE_S)
    with pytest.raises(StreamEnded):
        await stream.receive(DEADLINE_S)
    assert not served


async def test_a_failed_dial_does_not_block_the_peer(net: Libp2pNet) -> None:
    client, server = await net.node(), await net.node(secret_of(500))
    at = where(server)
    await server.stop()
    for _ in range(2):
        with pytest.raises(DialFailed, match=at.peer_id):
            await client.open(at, ECHO, DEADLINE_S)
    again = await net.node(secret_of(500), at.addresses[0])
    again.serve(ECHO, echo)

    async def library_dial(network: Any) -> None:
        """What gossip and directory do: the library's own dial, which remembers failures."""
        from libp2p.peer.id import ID

        peer_id = ID.from_string(at.peer_id)
        assert not network.swarm._negative_peer_cache.is_blocked(str(peer_id))

    await in_trio(client, library_dial)
    await assert_serves(client, again)


async def test_a_connection_takes_no_quarter_of_a_second(net: Libp2pNet) -> None:
    client = await net.node()
    taken = []
    for _ in range(5):
        server = await net.node()
        server.serve(ECHO, echo)
        started = time.monotonic()
        await client.open(where(server), ECHO, DEADLINE_S)
        taken.append(time.monotonic() - started)
    assert min(taken) < 0.2, taken
    assert guards.swarm_module._HAPPY_EYEBALLS_DELAY < 0.25


async def test_every_address_of_a_peer_is_tried(net: Libp2pNet, pair: tuple[Any, Any]) -> None:
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


async def test_a_dial_to_a_silent_socket_ends_in_time(net: Libp2pNet, pair: tuple[Any, Any]) -> None:
    client, server = pair
    mute = await asyncio.start_server(lambda r, w: None, "127.0.0.1", 0)
    silent = f"/ip4/127.0.0.1/tcp/{mute.sockets[0].getsockname()[1]}"
    started = time.monotonic()
    with pytest.raises(DialFailed, match="within 0.3 s"):
        await client.open(PeerAddress(server.peer_id, (silent,)), ECHO, 0.3)
    assert time.monotonic() - started < 2
    mute.close()
    await assert_serves(client, server)


async def test_a_used_port_is_refused_and_named(net: Libp2pNet) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"/ip4/127.0.0.1/tcp/{other.getsockname()[1]}"
        with pytest.raises(TransportError, match=address):
            await net.node(address=address)
    threads = [t.name for t in threading.enumerate()]
    assert "tally-network" not in threads


async def test_addresses_are_never_every_interface(net: Libp2pNet) -> None:
    everywhere, announced = (
        Libp2pTransport(secret_of(1), "0.0.0.0"),
        Libp2pTransport(secret_of(2), announce=("/dns4/a.example/tcp/7",)),
    )
    net.made += [everywhere, announced]
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
    filling = [asyncio.create_task(_fill(stream)) for stream in held]
    await eventually(lambda: inbound.event_closed.is_set())
    assert inbound.condemned is not None and "unread" in inbound.condemned
    await asyncio.gather(*filling)
    await assert_serves(client, server)


async def _fill(stream: Stream) -> None:
    """Send until the stream ends, within the window all the time."""
    with contextlib.suppress(StreamEnded):
        while True:
            await stream.send(b"x" * 16_000)


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


async def test_a_frozen_peer_is_noticed_and_a_killed_one_ends_its_streams(net: Libp2pNet, peer_process: Any) -> None:
    line = await asyncio.to_thread(peer_process.stdout.readline)
    peer_id, address = line.split()
    at = PeerAddress(peer_id, (address,))
    client = await net.node(ping_every_s=0.2, dead_after_s=1.5)

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


async def test_stop_is_prompt_though_a_peer_is_frozen(net: Libp2pNet, peer_process: Any) -> None:
    line = await asyncio.to_thread(peer_process.stdout.readline)
    peer_id, address = line.split()
    client = await net.node()
    stream = await client.open(PeerAddress(peer_id, (address,)), ECHO, DEADLINE_S)
    peer_process.send_signal(signal.SIGSTOP)
    filling = asyncio.create_task(_fill(stream))
    await eventually(lambda: stream.unsent)
    started = time.monotonic()
    await client.stop()
    assert time.monotonic() - started < 2
    await filling


async def test_an_unguarded_py_libp2p_peer_is_understood(net: Libp2pNet) -> None:
    server = await net.node()
    server.serve(ECHO, echo)
    command = [sys.executable, "-m", "tests.node.transport.peer_process", "stock", server.peer_id, server.addresses[0]]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    async with asyncio.timeout(30):
        out, _ = await process.communicate()
    assert out.decode().split() == ["echoed", str(ROUNDS)]


# ------------------------------------------------------------------------------------------------ gossip, directory


async def test_gossip_keeps_its_mesh_every_second(net: Libp2pNet) -> None:
    node = await net.node()
    assert node._network.gossip._router.heartbeat_interval == 1


async def test_the_directory_is_a_private_one_and_fills_on_connect(net: Libp2pNet) -> None:
    hub = await net.node()
    hub_address = f"{hub.addresses[0]}/p2p/{hub.peer_id}"
    others = [await net.node(bootstrap=(hub_address,)) for _ in range(2)]
    protocols = hub._network.host.get_mux().get_protocols()
    assert KAD in protocols and not [p for p in protocols if str(p).startswith("/ipfs/kad")]
    for node in (hub, *others):
        await eventually(lambda: node._network.directory._dht.get_routing_table_size() >= 1)  # noqa: B023
    await eventually(lambda: hub._network.directory._dht.get_routing_table_size() == 2)


async def test_a_bootstrap_peer_is_dialled_again_after_a_restart(net: Libp2pNet) -> None:
    hub = await net.node(secret_of(600))
    node = await net.node(bootstrap=(f"{hub.addresses[0]}/p2p/{hub.peer_id}",))
    await eventually(lambda: node.connected() == (hub.peer_id,))
    address = hub.addresses[0]
    await hub.stop()
    await eventually(lambda: node.connected() == ())
    await net.node(secret_of(600), address)
    await eventually(lambda: node.connected() == (hub.peer_id,))


# ------------------------------------------------------------------------------------------------------- the bridge


async def test_the_network_thread_restarts_after_a_crash(pair: tuple[Any, Any]) -> None:
    client, server = pair
    at = where(server)
    heard: list[bytes] = []
    await server.subscribe("offers/1", lambda author, payload: _note(heard, payload))
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
    await _publish_until(client, "offers/1", b"offer", lambda: b"offer" in heard)


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


async def test_signals_are_left_alone_and_no_thread_remains(net: Libp2pNet) -> None:
    before, handler = set(threading.enumerate()), signal.getsignal(signal.SIGINT)
    node = await net.node()
    assert signal.getsignal(signal.SIGINT) is handler
    started = time.monotonic()
    await node.stop()
    assert time.monotonic() - started < 2
    assert set(threading.enumerate()) - before == set()


def test_the_package_and_the_twin_do_not_import_the_library() -> None:
    script = "import sys, node.transport, node.transport.memory; sys.exit(bool({'libp2p', 'trio'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
