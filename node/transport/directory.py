"""A Kademlia directory under a prefix of our own: who says to have something to say about a key. Runs in trio.

A hint and no more: 20 providers are kept per key, first come, for 48 hours, and anybody may take those places. What is
found is checked by whoever uses it (signed offer, stake on chain). The library's routing table does not fill by
itself, so each new connection is put into it and followed by a lookup of our own id.
"""

from __future__ import annotations

import logging
from contextlib import AsyncExitStack
from typing import Any, Final

import trio
from libp2p.custom_types import TProtocol
from libp2p.kad_dht import common, kad_dht, peer_routing, provider_store, value_store
from libp2p.kad_dht.kad_dht import DHTMode, KadDHT
from libp2p.peer.id import ID
from libp2p.tools.anyio_service import background_trio_service

from node.ports import PeerAddress
from node.transport.guards import SafeTasks, map_libp2p_errors
from protocol.peers import NotOurKey, address_of_peer

log = logging.getLogger("tally.transport")

PREFIX: Final = TProtocol("/tally")
PROTOCOL_ID: Final = TProtocol("/tally/kad/1.0.0")
"""Not /ipfs/kad/1.0.0: a node that joins the public table answers, and is found by, the whole of IPFS."""

ASK_S: Final = 3.0
"""Time one peer has to answer a question for providers."""

ASK_PEERS: Final = 8
"""Peers asked for one key. Records are stored with the 20 closest; a few of them suffice for a hint."""

IDENTIFY_WAITS_S: Final = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
"""Pauses between looks whether a new peer has said (identify) that it serves the directory, and from where."""


class GuardedKadDHT(SafeTasks, KadDHT):  # type: ignore[misc]
    """Its maintenance is started again should it fail."""


def install() -> None:
    """Give the library's directory our protocol id; its own `protocol_prefix` changes checks only. Idempotent."""
    for module in (common, kad_dht, peer_routing, provider_store, value_store):
        module.PROTOCOL_ID = PROTOCOL_ID


class Directory:
    """The directory as one node sees it."""

    def __init__(self, host: Any) -> None:
        install()
        self._host = host
        self._dht = GuardedKadDHT(
            host, DHTMode.SERVER, enable_random_walk=False, protocol_prefix=PREFIX, enable_values=False
        )
        self._looking = False

    async def run(self, stack: AsyncExitStack) -> None:
        """Start the service; it ends with `stack`."""
        await stack.enter_async_context(background_trio_service(self._dht))

    async def meet(self, peer_id: Any) -> None:
        """Put a newly connected peer into the routing table once it has said who it is, then look around."""
        peerstore = self._host.get_peerstore()
        for wait_s in IDENTIFY_WAITS_S:
            await trio.sleep(wait_s)
            try:
                known = PROTOCOL_ID in peerstore.get_protocols(peer_id)
            except KeyError:  # the library's "peer not found"
                known = False
            if known and await self._dht.add_peer(peer_id):
                await self._look_around()
                return

    async def _look_around(self) -> None:
        if self._looking:
            return
        self._looking = True
        try:
            with trio.move_on_after(10.0):
                await self._dht.peer_routing.find_closest_peers_network(self._host.get_id().to_bytes())
        finally:
            self._looking = False

    async def provide(self, key: bytes) -> None:
        """Tell the peers closest to `key` that we have something to say about it."""
        with map_libp2p_errors("a key was not announced; peers still find us by address; it is announced again later"):
            await self._dht.provider_store.provide(key)

    async def find(self, key: bytes, limit: int) -> list[PeerAddress]:
        """Whom the peers closest to `key` name. Asks the network, for the library would answer from what it cached."""
        with map_libp2p_errors("no peer could be asked for a key; ask again later, or peers already known"):
            return await self._find(key, limit)

    async def _find(self, key: bytes, limit: int) -> list[PeerAddress]:
        store = self._dht.provider_store
        found = {info.peer_id: info for info in store.get_providers(key)}
        closest = await self._dht.peer_routing.find_closest_peers_network(key)

        async def ask(peer_id: Any) -> None:
            with trio.move_on_after(ASK_S):
                try:
                    providers, _ = await store._get_providers_from_peer_with_closers(peer_id, key)
                except Exception as exc:  # noqa: BLE001 - a hint: one peer's nonsense must not end the question
                    log.debug("%s could not be asked for providers: %r", peer_id, exc)
                    return
                found.update((info.peer_id, info) for info in providers)

        async with trio.open_nursery() as nursery:
            for peer_id in [p for p in closest if p != self._host.get_id()][:ASK_PEERS]:
                nursery.start_soon(ask, peer_id)
        peers = [_as_address(info) for info in found.values() if info.peer_id != self._host.get_id()]
        return [peer for peer in peers if peer is not None][:limit]


def _as_address(info: Any) -> PeerAddress | None:
    """None for a peer that has no secp256k1 key, or names no address that could be dialled."""
    peer_id = str(ID(info.peer_id.to_bytes()))
    try:
        address_of_peer(peer_id)
    except NotOurKey:
        return None
    addresses = dict.fromkeys(str(address).split("/p2p/")[0] for address in info.addrs)
    dialable = tuple(a for a in addresses if "/tcp/" in a and not a.startswith(("/ip4/0.0.0.0/", "/ip6/::/")))
    return PeerAddress(peer_id, dialable) if dialable else None
