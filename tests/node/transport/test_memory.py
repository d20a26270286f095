"""The faults that can be ordered from the in-memory network, and that its peer ids are the real ones."""

from __future__ import annotations

import asyncio

import pytest

from node.ports import DialFailed, Stream, StreamEnded
from node.transport.memory import MemoryNetwork, MemoryTransport
from protocol.peers import NotOurKey, address_of_peer, peer_id_of_secret
from protocol.signing import Signer
from tests.node.transport.conftest import DEADLINE_S, eventually, secret_of, where

HOLD = "/tally/test/hold/1"


async def _pair(network: MemoryNetwork) -> tuple[MemoryTransport, MemoryTransport, Stream, Stream]:
    """A client, a server, and the two ends of a stream between them."""
    client, server = MemoryTransport(network, secret_of(1)), MemoryTransport(network, secret_of(2))
    far: asyncio.Queue[Stream] = asyncio.Queue()

    async def hold(stream: Stream) -> None:
        far.put_nowait(stream)
        await asyncio.Event().wait()

    server.serve(HOLD, hold)
    await client.start()
    await server.start()
    near = await client.open(where(server), HOLD, DEADLINE_S)
    return client, server, near, await asyncio.wait_for(far.get(), DEADLINE_S)


async def test_a_killed_peer_reads_as_an_end_of_file_after_what_it_had_sent() -> None:
    network = MemoryNetwork()
    client, server, near, far = await _pair(network)
    await far.send(b"last words")
    await network.kill(server.peer_id)
    assert await near.receive(DEADLINE_S) == b"last words"
    with pytest.raises(StreamEnded, match="end of file"):
        await near.receive(DEADLINE_S)
    assert client.connected() == ()


async def test_a_partition_is_silent_and_healed_in_time_loses_nothing() -> None:
    network = MemoryNetwork(dead_after_s=DEADLINE_S)
    client, server, near, far = await _pair(network)
    network.partition(client.peer_id, server.peer_id)
    await near.send(b"one")
    await near.send(b"two")
    with pytest.raises(DialFailed):
        await client.open(where(server), HOLD, DEADLINE_S)
    waiting = asyncio.create_task(far.receive())
    await asyncio.wait({waiting}, timeout=0.05)
    assert not waiting.done()
    network.heal()
    assert (await waiting, await far.receive(DEADLINE_S)) == (b"one", b"two")


async def test_a_frozen_peer_is_dead_after_a_while_to_both_sides() -> None:
    network = MemoryNetwork(dead_after_s=0.05)
    _, server, near, far = await _pair(network)
    network.freeze(server.peer_id)
    for end in (near, far):
        with pytest.raises(StreamEnded, match="taken for dead"):
            await end.receive()
    await eventually(lambda: not network._streams)


async def test_gossip_does_not_cross_a_partition() -> None:
    network = MemoryNetwork()
    client, server, _, _ = await _pair(network)
    heard: list[bytes] = []

    async def hear(_author: str, payload: bytes) -> None:
        heard.append(payload)

    await server.subscribe("offers/1", hear)
    network.partition(client.peer_id, server.peer_id)
    await client.publish("offers/1", b"lost")
    network.heal()
    await client.publish("offers/1", b"heard")
    await eventually(lambda: heard)
    assert heard == [b"heard"]


def test_a_peer_id_is_the_one_libp2p_derives_and_gives_the_address_back() -> None:
    from libp2p.crypto.secp256k1 import create_new_key_pair
    from libp2p.peer.id import ID

    for number in (1, 2, 7, 2**200):
        secret = secret_of(number)
        peer_id = peer_id_of_secret(secret)
        assert peer_id == str(ID.from_pubkey(create_new_key_pair(secret).public_key))
        assert address_of_peer(peer_id) == Signer.from_secret(secret).address


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0OIl",
        "12D3KooWQK8vCGo1LBXZt3mbiPGdWwaFQEb9QMbGVxf8YzjiYBAb",
        peer_id_of_secret(secret_of(1))[:-1] + "z" * 9,
    ],
)
def test_what_embeds_no_key_of_ours_has_no_address(text: str) -> None:
    with pytest.raises(NotOurKey):
        address_of_peer(text)
