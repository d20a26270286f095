"""`node.ports.Transport` over py-libp2p. The library lives in a trio thread of its own; this is its asyncio face.

Contract: whatever happens to the network thread or to a peer, callers here see StreamEnded, DialFailed or
TransportError within their timeout, and the process goes on.
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import Sequence
from typing import Final

from node.ports import DialFailed, GossipHandler, PeerAddress, StreamHandler, TransportError
from node.transport.handlers import HandlerTasks
from node.transport.network import Network
from node.transport.streams import Libp2pStream
from node.transport.subscriptions import Subscriptions
from node.transport.trio_thread import NetworkDown, TrioThread
from protocol.peers import address_of_peer, peer_id_of_secret
from protocol.units import MAX_FRAME_BYTES

log = logging.getLogger("tally.transport")

PING_EVERY_S: Final = 5.0
DEAD_AFTER_S: Final = 15.0
"""A peer that answers no ping for this long is dead: three pings missed. Halved, a busy CPU looks like death; doubled,
a user waits half a minute before the next provider takes over."""

START_S: Final = 20.0
CALL_S: Final = 10.0
FLUSH_S: Final = 0.5
"""Time what was already sent has to leave when the node stops."""


class Libp2pTransport:
    """A node on the network, listening on one TCP port."""

    def __init__(
        self,
        node_secret: bytes,
        listen_host: str = "127.0.0.1",
        port: int = 0,
        announce: Sequence[str] = (),
        bootstrap: Sequence[str] = (),
        *,
        ping_every_s: float = PING_EVERY_S,
        dead_after_s: float = DEAD_AFTER_S,
    ) -> None:
        """`node_secret`: 32 bytes. `port` 0: any free one. `announce`: multiaddrs to tell others instead of the
        address listened on (behind a NAT). `bootstrap`: multiaddrs with their /p2p part, kept connected.

        Raises: ValueError (a bootstrap address without peer id, a secret that is no scalar).
        """
        self._secret = node_secret
        self._peer_id = peer_id_of_secret(node_secret)
        self._listen_host, self._port = listen_host, port
        self._announce, self._bootstrap = tuple(announce), tuple(bootstrap)
        for address in self._bootstrap:
            address_of_peer(address.partition("/p2p/")[2])
        self._ping_every_s, self._dead_after_s = ping_every_s, dead_after_s
        self._handlers = HandlerTasks()
        self._subscriptions = Subscriptions()
        self._wanted: list[tuple[str, GossipHandler]] = []
        self._streams: weakref.WeakSet[Libp2pStream] = weakref.WeakSet()
        self._thread: TrioThread | None = None
        self._network: Network | None = None
        self._addresses: tuple[str, ...] = ()

    @property
    def peer_id(self) -> str:
        return self._peer_id

    @property
    def addresses(self) -> tuple[str, ...]:
        return self._addresses

    # ----------------------------------------------------------------------------------------------------- life cycle

    async def start(self) -> None:
        if self._thread is not None:
            return
        thread = TrioThread("tally-network", self._t_main, self._went_down)
        self._thread = thread
        try:
            await thread.start(START_S)
        except BaseException:
            self._thread = None
            raise
        for topic, handler in self._wanted:
            self._subscriptions.add(topic, handler)

    async def stop(self) -> None:
        thread, network, self._thread = self._thread, self._network, None
        if thread is None:
            return
        await self._handlers.close()
        await self._subscriptions.close()
        try:
            if network is not None:
                async with asyncio.timeout(FLUSH_S):
                    while any(stream.unsent for stream in self._streams):
                        await asyncio.sleep(0.01)
        except TimeoutError:
            log.info("stopping with unsent frames: their readers take nothing")
        try:
            if network is not None:
                await thread.call(network.farewell, timeout_s=FLUSH_S)
        except (TransportError, TimeoutError) as exc:
            log.info("stopping without a farewell to every peer: %s", exc)
        await thread.stop()
        self._network, self._addresses = None, ()
        self._end_streams("the transport was stopped here")

    def _went_down(self) -> None:
        self._network = None
        self._end_streams("the network crashed and is restarting; open a new stream")

    def _end_streams(self, reason: str) -> None:
        for stream in list(self._streams):
            stream.end(reason)
        self._streams.clear()

    async def _t_main(self) -> None:
        """One run of the network, in trio."""
        thread = self._thread
        if thread is None:
            return
        network = Network(
            thread,
            self._secret,
            self._announce,
            self._ping_every_s,
            self._dead_after_s,
            self._accept,
            self._subscriptions.deliver,
        )
        for protocol_id in self._handlers.protocols:
            network.serve(protocol_id)
        family = "ip6" if ":" in self._listen_host else "ip4"
        await network.run(f"/{family}/{self._listen_host}/tcp/{self._port}", self._t_ready)

    def _t_ready(self, network: Network) -> None:
        """The host listens, in trio. Both sides agree from here on which network is the current one."""
        thread = self._thread
        if thread is None:
            return
        listening = network.host.get_transport_addrs()[0]
        thread.post(self._came_up, network, network.addresses, int(listening.value_for_protocol("tcp")))
        for address in self._bootstrap:
            thread.spawn(network.keep_bootstrapped, address)
        thread.ready()

    def _came_up(self, network: Network, addresses: tuple[str, ...], port: int) -> None:
        self._network, self._addresses = network, addresses
        self._port = port  # a restart listens where others know us
        for protocol_id in self._handlers.protocols:
            self._submit_serve(protocol_id)
        for topic in {topic for topic, _ in self._wanted}:
            self._submit_subscribe(topic)

    # -------------------------------------------------------------------------------------------------------- streams

    def serve(self, protocol_id: str, handler: StreamHandler) -> None:
        self._handlers.serve(protocol_id, handler)
        self._submit_serve(protocol_id)

    def _submit_serve(self, protocol_id: str) -> None:
        if self._thread is not None and self._network is not None:
            self._thread.submit(self._network.serve, protocol_id)

    def _accept(self, protocol_id: str, stream: Libp2pStream) -> None:
        self._streams.add(stream)
        self._handlers.start(protocol_id, stream)

    async def open(self, peer: PeerAddress, protocol_id: str, timeout_s: float) -> Libp2pStream:
        thread, network = self._running(DialFailed)
        try:
            stream = await thread.call(
                network.open, peer, protocol_id, timeout_s=timeout_s, orphan=lambda late: _drop(thread, late)
            )
        except NetworkDown as exc:
            raise DialFailed(f"no stream to {peer.peer_id}: {exc}") from exc
        except TimeoutError as exc:
            raise DialFailed(
                f"no stream to {peer.peer_id} within {timeout_s:g} s; nothing was sent; try again later or another peer"
            ) from exc
        self._streams.add(stream)
        return stream

    def connected(self) -> tuple[str, ...]:
        network = self._network
        if network is None:
            return ()
        # One call into C, so a snapshot, though the dictionary belongs to the other thread.
        connections = list(network.swarm.connections.items())
        return tuple(sorted(str(peer) for peer, conns in connections if any(not conn.is_closed for conn in conns)))

    # ---------------------------------------------------------------------------------------------- gossip, directory

    async def publish(self, topic: str, payload: bytes) -> None:
        if len(payload) > MAX_FRAME_BYTES:
            raise ValueError(f"a message of {len(payload)} bytes is above the limit of {MAX_FRAME_BYTES}")
        thread, network = self._running(TransportError)
        try:
            await thread.call(network.gossip.publish, topic, payload, timeout_s=CALL_S)
        except TimeoutError as exc:
            raise TransportError(f"a message on {topic} could not be handed to gossip within {CALL_S:g} s") from exc

    async def subscribe(self, topic: str, handler: GossipHandler) -> None:
        self._wanted.append((topic, handler))
        if self._thread is None:
            return
        self._subscriptions.add(topic, handler)
        self._submit_subscribe(topic)

    def _submit_subscribe(self, topic: str) -> None:
        thread, network = self._thread, self._network
        if thread is not None and network is not None:
            thread.submit(thread.spawn, network.subscribe, topic)

    async def provide(self, key: bytes) -> None:
        try:
            thread, network = self._running(TransportError)
            await thread.call(network.directory.provide, key, timeout_s=CALL_S)
        except (TransportError, TimeoutError) as exc:
            log.info("a key was not announced to every peer that should know: %s", exc)

    async def find_providers(self, key: bytes, limit: int) -> list[PeerAddress]:
        try:
            thread, network = self._running(TransportError)
            return await thread.call(network.directory.find, key, limit, timeout_s=CALL_S)
        except (TransportError, TimeoutError) as exc:
            log.info("no peer could be asked for a key: %s", exc)
            return []

    def _running(self, error: type[TransportError]) -> tuple[TrioThread, Network]:
        if self._thread is None:
            raise error("the transport is not running; nothing was sent; call start() first")
        if self._network is None:
            raise error("the network is restarting; nothing was sent; try again in a moment")
        return self._thread, self._network


def _drop(thread: TrioThread, stream: Libp2pStream) -> None:
    """Reset a stream whose opener has gone."""
    thread.submit(stream.t_reset)
