"""What `node.ports.Transport` promises, held against the in-memory twin and against libp2p."""

from __future__ import annotations

import asyncio

import pytest

from node.ports import DialFailed, PeerAddress, Stream, StreamEnded, TransportError
from protocol.errors import FrameTooLarge, LocalProtocolError
from protocol.peers import peer_id_of_secret
from protocol.signing import Signer
from protocol.units import MAX_FRAME_BYTES
from tests.node.transport.conftest import DEADLINE_S, Net, eventually, secret_of, where

ECHO = "/tally/test/echo/1"


async def echo(stream: Stream) -> None:
    """Send every frame back until the other side has no more."""
    try:
        while True:
            await stream.send(await stream.receive(DEADLINE_S))
    except StreamEnded:
        await stream.close()


class Held:
    """A handler that keeps its streams open and hands them to the test."""

    def __init__(self) -> None:
        self.streams: asyncio.Queue[Stream] = asyncio.Queue()
        self.release = asyncio.Event()

    async def __call__(self, stream: Stream) -> None:
        self.streams.put_nowait(stream)
        await self.release.wait()


async def test_frames_travel_in_order_and_come_back(net: Net) -> None:
    client, server = await net.pair(ECHO, echo)
    stream = await client.open(where(server), ECHO, DEADLINE_S)
    sent = [bytes([i % 256]) * (i * 7 % 2000) for i in range(500)]
    for start in range(0, 500, 25):
        await stream.send(*sent[start : start + 25])
    assert [await stream.receive(DEADLINE_S) for _ in sent] == sent
    await stream.close()


async def test_the_largest_frame_passes_and_a_larger_one_is_refused_by_the_sender(net: Net) -> None:
    client, server = await net.pair(ECHO, echo)
    stream = await client.open(where(server), ECHO, DEADLINE_S)
    largest = bytes(range(256)) * (MAX_FRAME_BYTES // 256)
    with pytest.raises(ValueError, match="above the limit"):
        await stream.send(b"small", largest + b"!")
    await stream.send(largest, b"")
    assert await stream.receive(DEADLINE_S) == largest, "nothing of the refused call was sent"
    assert await stream.receive(DEADLINE_S) == b""


async def test_an_oversized_frame_of_a_hostile_sender_resets_that_stream(net: Net) -> None:
    outcome: asyncio.Queue[Exception] = asyncio.Queue()

    async def careful(stream: Stream) -> None:
        assert await stream.receive(DEADLINE_S) == b"good"
        try:
            await stream.receive(DEADLINE_S)
        except FrameTooLarge as exc:
            outcome.put_nowait(exc)
            raise

    client, server = await net.pair(ECHO, careful)
    hostile = await client.open(where(server), ECHO, DEADLINE_S)
    await hostile.send_raw(b"\0\0\0\4good" + (MAX_FRAME_BYTES + 1).to_bytes(4, "big") + b"x" * 100)  # type: ignore[attr-defined]
    assert (await asyncio.wait_for(outcome.get(), DEADLINE_S)).args is not None
    with pytest.raises(StreamEnded):
        await hostile.receive(DEADLINE_S)
    server.serve(ECHO, echo)
    fresh = await client.open(where(server), ECHO, DEADLINE_S)
    await fresh.send(b"still here")
    assert await fresh.receive(DEADLINE_S) == b"still here"


async def test_both_sides_know_each_other_by_the_address_of_the_node_key(net: Net) -> None:
    held = Held()
    client, server = await net.node(secret_of(71)), await net.node(secret_of(72))
    server.serve(ECHO, held)
    outbound = await client.open(where(server), ECHO, DEADLINE_S)
    inbound = await asyncio.wait_for(held.streams.get(), DEADLINE_S)
    assert (outbound.peer_id, outbound.peer_address) == (server.peer_id, Signer.from_secret(secret_of(72)).address)
    assert (inbound.peer_id, inbound.peer_address) == (client.peer_id, Signer.from_secret(secret_of(71)).address)
    assert client.connected() == (server.peer_id,)
    await eventually(lambda: server.connected() == (client.peer_id,))


async def test_a_dial_expecting_another_key_fails(net: Net) -> None:
    client, server = await net.pair(ECHO, echo)
    with pytest.raises(DialFailed):
        await client.open(PeerAddress(peer_id_of_secret(secret_of(99)), server.addresses), ECHO, DEADLINE_S)
    stream = await client.open(where(server), ECHO, DEADLINE_S)
    await stream.send(b"x")
    assert await stream.receive(DEADLINE_S) == b"x"


async def test_nobody_there_or_not_that_protocol_is_a_failed_dial(net: Net) -> None:
    client, server = await net.pair(ECHO, echo)
    with pytest.raises(DialFailed):
        await client.open(where(server), "/tally/test/unknown/1", DEADLINE_S)
    with pytest.raises(DialFailed):
        await client.open(PeerAddress(server.peer_id, ()), "/tally/test/unknown/1", DEADLINE_S)
    gone = where(server)
    await server.stop()
    with pytest.raises(DialFailed):
        await client.open(gone, ECHO, DEADLINE_S)


async def test_what_was_sent_before_a_close_arrives_and_then_the_stream_has_ended(net: Net) -> None:
    async def farewell(stream: Stream) -> None:
        await stream.send(b"one", b"two")
        await stream.close()

    client, server = await net.pair(ECHO, farewell)
    stream = await client.open(where(server), ECHO, DEADLINE_S)
    assert [await stream.receive(DEADLINE_S), await stream.receive(DEADLINE_S)] == [b"one", b"two"]
    for _ in range(2):
        with pytest.raises(StreamEnded):
            await stream.receive(DEADLINE_S)


async def test_what_was_sent_before_a_close_arrives_though_the_closer_read_nothing(net: Net) -> None:
    async def deaf(stream: Stream) -> None:
        await heard.wait()
        await stream.send(*[bytes([number]) * 2000 for number in range(100)])
        await stream.close()

    heard = asyncio.Event()
    client, server = await net.pair(ECHO, deaf)
    stream = await client.open(where(server), ECHO, DEADLINE_S)
    for _ in range(5):
        await stream.send(b"x" * 60_000)  # more than the other side's inbox holds
    heard.set()
    assert [await stream.receive(DEADLINE_S) for _ in range(100)] == [bytes([n]) * 2000 for n in range(100)]
    with pytest.raises(StreamEnded):
        await stream.receive(DEADLINE_S)


async def test_what_was_sent_before_a_stop_arrives(net: Net) -> None:
    async def farewell(stream: Stream) -> None:
        await stream.send(*[bytes([number]) * 5000 for number in range(60)])
        await stream.close()
        done.set()

    done = asyncio.Event()
    client, server = await net.pair(ECHO, farewell)
    stream = await client.open(where(server), ECHO, DEADLINE_S)
    await asyncio.wait_for(done.wait(), DEADLINE_S)
    await server.stop()
    # More than a reader's inbox holds: the rest lay in the muxer when the connection went.
    assert [await stream.receive(DEADLINE_S) for _ in range(60)] == [bytes([number]) * 5000 for number in range(60)]
    with pytest.raises(StreamEnded):
        await stream.receive(DEADLINE_S)


async def test_a_reset_ends_the_stream_at_both_ends(net: Net) -> None:
    held = Held()
    client, server = await net.pair(ECHO, held)
    near = await client.open(where(server), ECHO, DEADLINE_S)
    far = await asyncio.wait_for(held.streams.get(), DEADLINE_S)
    waiting = asyncio.create_task(far.receive(DEADLINE_S))
    await near.reset()
    for end in (near.receive(DEADLINE_S), near.send(b"x"), waiting):
        with pytest.raises(StreamEnded):
            await end


async def test_the_streams_of_a_peer_that_stops_end(net: Net) -> None:
    held = Held()
    client, server = await net.pair(ECHO, held)
    stream = await client.open(where(server), ECHO, DEADLINE_S)
    await asyncio.wait_for(held.streams.get(), DEADLINE_S)
    waiting = asyncio.create_task(stream.receive(DEADLINE_S))
    await server.stop()
    with pytest.raises(StreamEnded):
        await waiting
    await eventually(lambda: client.connected() == ())


async def test_a_handler_that_fails_resets_its_stream_and_nothing_else(net: Net) -> None:
    async def fails(stream: Stream) -> None:
        if await stream.receive(DEADLINE_S) == b"fail":
            raise RuntimeError("a bug of the application")
        await stream.send(b"fine")

    client, server = await net.pair(ECHO, fails)
    good, bad = [await client.open(where(server), ECHO, DEADLINE_S) for _ in range(2)]
    await bad.send(b"fail")
    with pytest.raises(StreamEnded):
        await bad.receive(DEADLINE_S)
    await good.send(b"ok")
    assert await good.receive(DEADLINE_S) == b"fine"


async def test_a_receive_that_waits_too_long_ends_the_stream(net: Net) -> None:
    client, server = await net.pair(ECHO, Held())
    stream = await client.open(where(server), ECHO, DEADLINE_S)
    with pytest.raises(StreamEnded, match="sent nothing for"):
        await stream.receive(0.05)
    with pytest.raises(StreamEnded):
        await stream.send(b"x")


async def test_a_cancelled_receive_loses_no_frame(net: Net) -> None:
    client, server = await net.pair(ECHO, echo)
    stream = await client.open(where(server), ECHO, DEADLINE_S)
    for number in range(20):
        waiting = asyncio.create_task(stream.receive(DEADLINE_S))
        await asyncio.sleep(0)
        await stream.send(number.to_bytes(2, "big"))
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        if waiting.cancelled():
            assert await stream.receive(DEADLINE_S) == number.to_bytes(2, "big")
        else:
            assert waiting.result() == number.to_bytes(2, "big")


async def test_two_receivers_on_one_stream_are_a_bug_and_said_so(net: Net) -> None:
    client, server = await net.pair(ECHO, echo)
    stream = await client.open(where(server), ECHO, DEADLINE_S)
    waiting = asyncio.create_task(stream.receive(DEADLINE_S))
    await asyncio.sleep(0)
    with pytest.raises(LocalProtocolError):
        await stream.receive(DEADLINE_S)
    await stream.send(b"for the first")
    assert await waiting == b"for the first"


async def test_fifty_streams_at_once(net: Net) -> None:
    client, server = await net.pair(ECHO, echo)

    async def converse(number: int) -> None:
        stream = await client.open(where(server), ECHO, DEADLINE_S)
        for turn in range(5):
            await stream.send(f"{number}/{turn}".encode())
            assert await stream.receive(DEADLINE_S) == f"{number}/{turn}".encode()
        await stream.close()

    await asyncio.gather(*(converse(number) for number in range(50)))


async def test_a_sender_waits_for_a_slow_reader_and_nothing_is_lost(net: Net) -> None:
    held = Held()
    client, server = await net.pair(ECHO, held)
    stream = await client.open(where(server), ECHO, DEADLINE_S)
    far = await asyncio.wait_for(held.streams.get(), DEADLINE_S)
    sent = 0

    async def pour() -> None:
        nonlocal sent
        for number in range(100):
            await stream.send(number.to_bytes(2, "big") * (MAX_FRAME_BYTES // 2))
            sent += 1

    pouring = asyncio.create_task(pour())
    await eventually(lambda: sent >= 4)
    await asyncio.wait({pouring}, timeout=1.0)
    assert sent < 60, "a reader who reads nothing must hold the sender back"
    for number in range(100):
        assert (await far.receive(DEADLINE_S))[:2] == number.to_bytes(2, "big")
    await pouring


async def test_close_and_reset_and_stop_can_be_repeated(net: Net) -> None:
    client, server = await net.pair(ECHO, echo)
    stream = await client.open(where(server), ECHO, DEADLINE_S)
    for _ in range(2):
        await stream.close()
    await stream.reset()
    with pytest.raises(StreamEnded):
        await stream.send(b"x")
    with pytest.raises(StreamEnded):
        await stream.receive(DEADLINE_S)
    for _ in range(2):
        await server.stop()
        await client.stop()
    with pytest.raises(DialFailed):
        await client.open(where(server), ECHO, DEADLINE_S)


async def test_a_peer_that_restarts_at_its_address_is_dialled_again(net: Net) -> None:
    client, server = await net.node(), await net.node(secret_of(500))
    server.serve(ECHO, echo)
    at = where(server)
    await (await client.open(at, ECHO, DEADLINE_S)).close()
    await server.stop()
    with pytest.raises(DialFailed):
        await client.open(at, ECHO, DEADLINE_S)
    again = await net.node(secret_of(500), at.addresses[0])
    again.serve(ECHO, echo)
    stream = await client.open(at, ECHO, DEADLINE_S)
    await stream.send(b"welcome back")
    assert await stream.receive(DEADLINE_S) == b"welcome back"


async def test_an_address_in_use_is_named(net: Net) -> None:
    first = await net.node()
    with pytest.raises(TransportError) as caught:
        await net.node(address=first.addresses[0])
    assert first.addresses[0] in str(caught.value)


async def test_gossip_reaches_subscribers_with_its_author(net: Net) -> None:
    nodes = [await net.node() for _ in range(3)]
    heard: list[tuple[int, str, bytes]] = []

    def listener(number: int):  # type: ignore[no-untyped-def]
        async def hear(author: str, payload: bytes) -> None:
            heard.append((number, author, payload))
            if payload == b"bad":
                raise RuntimeError("a bug of the application")

        return hear

    for number, node in enumerate(nodes):
        node.serve(ECHO, echo)
        await node.subscribe("offers/7", listener(number))
    for node in nodes[1:]:
        await (await node.open(where(nodes[0]), ECHO, DEADLINE_S)).close()
    for payload in (b"bad", b"good"):
        # Best effort: what is published before the mesh has formed is lost, so it is said again until heard.
        for _ in range(int(DEADLINE_S)):
            await nodes[1].publish("offers/7", payload)
            try:
                await eventually(lambda: {n for n, _, p in heard if p == payload} >= {0, 2}, 1.0)  # noqa: B023
                break
            except AssertionError:
                continue
        assert {(n, a) for n, a, p in heard if p == payload} == {(0, nodes[1].peer_id), (2, nodes[1].peer_id)}


async def test_gossip_needs_a_running_transport_and_a_bounded_message(net: Net) -> None:
    node = await net.node()
    with pytest.raises(ValueError, match="above the limit"):
        await node.publish("offers/7", b"x" * (MAX_FRAME_BYTES + 1))
    await node.stop()
    with pytest.raises(TransportError):
        await node.publish("offers/7", b"x")


async def test_providers_of_a_key_are_found(net: Net) -> None:
    key = b"k" * 32
    hub = await net.node()
    hub.serve(ECHO, echo)
    nodes = [await net.node() for _ in range(2)]
    for node in nodes:
        await (await node.open(where(hub), ECHO, DEADLINE_S)).close()
    await nodes[0].provide(key)
    found: list[PeerAddress] = []
    for _ in range(50):
        found = await nodes[1].find_providers(key, 5)
        if found:
            break
        await asyncio.sleep(0.1)
    assert found == [where(nodes[0])]
    assert await nodes[1].find_providers(b"n" * 32, 5) == []
